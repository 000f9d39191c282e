import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxref import losses

ORACLE = np.load(Path(__file__).parents[1] / "oracles" / "information_bottleneck.npz")
IN_BITS = 1 / math.log(2)


def kernel64(a, b, bandwidth):
    a, b = (np.float64(z).reshape(len(z), -1) for z in (a, b))
    return np.exp(-np.square(a[:, None] - b).sum(-1) / (2 * bandwidth**2))


def information64(k_x, k_t):
    cross = (k_x.mean(1) * k_t.mean(1)).mean()
    return np.log((k_x * k_t).mean()) + np.log(k_x.mean() * k_t.mean()) - 2 * np.log(cross)


@jax.jit
def information(x, t, bandwidth):
    """Plain and normalised, with the gradient of the second in t; one program for each shape."""
    found = partial(losses.cauchy_schwarz_mutual_information, bandwidth=bandwidth)
    normalized, slope = jax.value_and_grad(partial(found, normalized=True), argnums=1)(x, t)
    return found(x, t), normalized, slope


class TestNumbers:
    @pytest.mark.parametrize("bandwidth", [0.7, 2.0])
    def test_values_and_gradients_match_the_authors(self, bandwidth):
        x, t, y, guess = (ORACLE[name] for name in ("x", "t", "y", "predictions"))

        @jax.jit
        def run(t, guess):
            divergence = lambda guess: losses.conditional_cauchy_schwarz_divergence(
                x, y, guess, bandwidth=bandwidth, normalization="sum_of_squares"
            )
            measure = lambda t: losses.cauchy_schwarz_mutual_information(x, t, bandwidth=bandwidth)
            return jax.value_and_grad(divergence)(guess), jax.value_and_grad(measure)(t)

        found = dict(zip(("divergence", "information"), run(t, guess)))
        _, *found["normalized"] = information(x, t, bandwidth)
        for name, (value, slope) in found.items():
            unit = 1 if name == "normalized" else IN_BITS
            expected = ORACLE[f"{bandwidth}/{name}"]
            np.testing.assert_allclose(unit * value, expected, rtol=1e-4)
            expected = ORACLE[f"{bandwidth}/{name}/gradient"]
            np.testing.assert_allclose(unit * slope, expected, rtol=1e-3, atol=1e-5)

    def test_the_papers_denominator_two_samples_and_the_whole_loss_match_float64(self):
        x, t, y, guess = (ORACLE[name] for name in ("x", "t", "y", "predictions"))
        k = kernel64(x, x, 0.7)
        f = lambda k_y: ((k * k_y).sum(1) / k.sum(1) ** 2).sum()
        terms = [f(kernel64(a, b, 0.7)) for a, b in ((y, y), (guess, guess), (guess, y))]
        divergence = np.log(terms[0] * terms[1] / terms[2] ** 2)
        pairs = ((t, t), (t[:5] + 1, t[:5] + 1), (t, t[:5] + 1))
        means = [kernel64(a, b, 0.7).mean() for a, b in pairs]
        two = jax.jit(losses.cauchy_schwarz_divergence)(t, t[:5] + 1, bandwidth=0.7)
        np.testing.assert_allclose(two, np.log(means[0] * means[1] / means[2] ** 2), rtol=1e-4)
        whole = jax.jit(losses.cauchy_schwarz_information_bottleneck_loss)
        loss = whole(x, t, guess, y, beta=0.3, bandwidth=0.7)
        normalized = ORACLE["0.7/normalized"]
        np.testing.assert_allclose(loss, divergence + 0.3 * normalized, rtol=1e-4)

    def test_wide_kernels_of_the_default_bandwidth_lose_no_digits(self):
        """Where all kernels are 1 but for some 1e-4, logarithms in float32 would give noise."""
        x, t = ORACLE["x"], ORACLE["t"]
        kernels = []
        for z in (x, t):
            distances = -2 * np.log(kernel64(z, z, 1.0))
            kernels.append(kernel64(z, z, 10 * np.median(distances[np.triu_indices(9, 1)])))
        expected = information64(*kernels)
        own = [information64(k, k) for k in kernels]
        assert expected < 1e-5
        plain, normalized, slope = information(x, t, None)
        np.testing.assert_allclose(plain, expected, rtol=1e-3)
        np.testing.assert_allclose(normalized, expected / np.sqrt(own[0] * own[1]), rtol=1e-3)
        assert np.all(np.isfinite(slope))


class TestClaims:
    @pytest.mark.claim("cauchy-schwarz-information-bottleneck")
    def test_a_higher_price_buys_less_information_for_more_error(self):
        """A linear encoder of two inputs, of which the target needs one, at three prices."""
        rng = np.random.default_rng(0)
        x = rng.normal(size=(32, 2)).astype("f")
        y = x[:, :1] + 0.1 * rng.normal(size=(32, 1)).astype("f")
        optimizer = optax.adam(0.05)

        def parts(params):
            t = x @ params["encoder"]
            guess = t @ params["decoder"]
            divergence = losses.conditional_cauchy_schwarz_divergence(x, y, guess)
            shared = losses.cauchy_schwarz_mutual_information(x, t, bandwidth=1.0, normalized=True)
            return divergence, shared, jnp.square(guess - y).mean()

        @jax.jit
        @jax.vmap
        def train(beta):
            def loss(params):
                measured = parts(params)
                return measured[0] + beta * measured[1], measured

            def step(state, _):
                params, moments = state
                (_, measured), slope = jax.value_and_grad(loss, has_aux=True)(params)
                updates, moments = optimizer.update(slope, moments)
                return (optax.apply_updates(params, updates), moments), measured

            start = {"encoder": jnp.eye(2), "decoder": jnp.ones((2, 1)) / 2}
            return jax.lax.scan(step, (start, optimizer.init(start)), length=120)[1]

        trained = train(jnp.array([0.0, 0.03, 1.0]))
        divergence, shared, error = (values[:, -1] for values in trained)
        assert np.all(np.diff(shared) < -0.1)
        assert np.all(np.diff(divergence) > 0)
        assert error[2] > error[0]

    def test_is_at_least_0_symmetric_and_0_where_nothing_differs_or_is_shared(self):
        rng = np.random.default_rng(0)
        x, t = rng.normal(size=(2, 200, 6, 2)).astype("f")
        t = t * rng.choice([0.1, 1, 10], size=(200, 1, 1)).astype("f") + 0.5 * x
        both = jax.jit(
            jax.vmap(
                lambda x, t: (
                    losses.cauchy_schwarz_divergence(x, t),
                    losses.cauchy_schwarz_divergence(t, x),
                    losses.cauchy_schwarz_mutual_information(x, t, bandwidth=1.0),
                    losses.cauchy_schwarz_mutual_information(t, x, bandwidth=1.0),
                    losses.cauchy_schwarz_mutual_information(x, x, bandwidth=1.0, normalized=True),
                    losses.cauchy_schwarz_mutual_information(x, 0 * t, normalized=True),
                    losses.cauchy_schwarz_divergence(x, x),
                    losses.conditional_cauchy_schwarz_divergence(x, t, t),
                )
            )
        )
        forth, back, shared, turned, own, alone, same, exact = both(x, t)
        assert np.all(forth > -1e-6)
        assert np.all(shared > -1e-6)
        np.testing.assert_allclose(forth, back, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(shared, turned, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(own, 1, rtol=1e-4)
        assert np.all(alone == 0)
        np.testing.assert_allclose(same, 0, atol=1e-5)
        np.testing.assert_allclose(exact, 0, atol=1e-5)
        noise = rng.normal(size=x.shape).astype("f")
        noisy = [(x + size * noise) / np.hypot(1, size) for size in (0, 0.3, 1, 3)]
        kept = [both(x, t.astype("f"))[2].mean() for t in noisy]
        assert np.all(np.diff(kept) < 0)


def test_losses_over_eight_devices():
    rng = np.random.default_rng(0)
    x, t, y, guess = rng.normal(size=(4, 16, 2)).astype("f")

    def total(x, t, y, guess, axis_name=None):
        divergence = losses.conditional_cauchy_schwarz_divergence(x, y, guess, axis_name=axis_name)
        return divergence + 1e4 * losses.cauchy_schwarz_mutual_information(
            x, t, axis_name=axis_name
        )

    data = PartitionSpec("data")
    sharded = jax.shard_map(
        partial(total, axis_name="data"),
        mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(data,) * 4,
        out_specs=PartitionSpec(),
    )
    found, expected = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2, 3)))(x, t, y, guess)
        for f in (sharded, total)
    )
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)
    for mine, theirs in zip(found[1], expected[1]):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)


class TestEdges:
    def test_far_equal_and_half_precise_samples(self):
        x, t, y, guess = (ORACLE[name] for name in ("x", "t", "y", "predictions"))

        whole = losses.cauchy_schwarz_information_bottleneck_loss
        slopes = jax.jit(jax.value_and_grad(whole, argnums=(1, 2)))
        apart = jax.jit(jax.value_and_grad(losses.cauchy_schwarz_divergence))
        for size in (0.0, 1e4):
            found = slopes(size * x, size * t, -size * guess, size * y), apart(size * x, -size * x)
            assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))
        half = [jnp.asarray(z, jnp.bfloat16) for z in (x, t, guess, y)]
        assert jax.eval_shape(whole, *half).dtype == jnp.bfloat16
        value = jax.jit(losses.cauchy_schwarz_divergence)(half[0], -half[0])
        wide, _ = apart(half[0].astype("f"), -half[0].astype("f"))
        assert value == wide.astype(jnp.bfloat16)

    def test_bad_input_is_named(self):
        x, y = ORACLE["x"], ORACLE["y"]
        conditional = losses.conditional_cauchy_schwarz_divergence
        shared = losses.cauchy_schwarz_mutual_information
        for message, call in (
            ("bandwidth must be in", lambda: conditional(x, y, y, bandwidth=0.0)),
            ("bandwidth must be in", lambda: shared(x, y, bandwidth=-1.0)),
            ("normalization must be", lambda: conditional(x, y, y, normalization="sum")),
            ("predictions must have shape", lambda: conditional(x, y, x)),
            ("targets must have 9 samples", lambda: conditional(x, y[:8], y[:8])),
            ("t must have 9 samples", lambda: shared(x, y[:8])),
            ("x must have at least two samples", lambda: shared(x[:1], y[:1])),
            (r"x must have shape \[n, \.\.\.\]", lambda: shared(x[:0], y[:0])),
            (
                "samples_q must have the 3 features",
                lambda: losses.cauchy_schwarz_divergence(x, y),
            ),
            (
                "beta must be in",
                lambda: losses.cauchy_schwarz_information_bottleneck_loss(x, x, y, y, beta=-1.0),
            ),
        ):
            with pytest.raises(ValueError, match=message):
                call()
        with pytest.raises(TypeError, match="t must have a floating-point type"):
            shared(x, np.arange(9))
