from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

from jaxref import norms
from jaxref.norms import UnMixState

TORCH = np.load(Path(__file__).parents[1] / "oracles" / "batch_norms.npz")


def random_batch(shape=(8, 3, 4), components=3, seed=0):
    """x, components, and a scale and a bias."""
    rng = np.random.default_rng(seed)
    x = 1 + 2 * rng.normal(size=shape)
    means, scale_and_bias = (
        rng.normal(size=(components, shape[-1])),
        rng.normal(size=(2, shape[-1])),
    )
    state = UnMixState(means.astype("f"), rng.uniform(0.5, 2, size=means.shape).astype("f"))
    return x.astype("f"), state, *scale_and_bias.astype("f")


def assert_close(ours, expected, rtol=1e-4, atol=1e-5):
    chex.assert_trees_all_close(ours, expected, rtol=rtol, atol=atol)


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_alpha_batch_norm_matches_torch(self):
        f = lambda *a: norms.alpha_batch_norm(*a, alpha=0.7, epsilon=1e-3)

        @self.variant
        def ours(x, mean, var, scale, bias):
            y, vjp = jax.vjp(lambda x, *p: f(x, mean, var, *p), x, scale, bias)
            return y, vjp(TORCH["cotangent"])

        y, gradients = ours(*(TORCH[name] for name in ("x", "mean", "var", "scale", "bias")))
        assert_close(y, TORCH["alpha_y"])
        for name, gradient in zip(("x", "0", "1"), gradients):
            assert_close(gradient, TORCH[f"alpha_grad_{name}"])

    def test_unmix_tns_matches_the_authors(self):
        state = UnMixState(TORCH["unmix_means"], TORCH["unmix_variances"])
        f = lambda x, *p: norms.unmix_tns(x, state, *p, momentum=0.2, epsilon=1e-3)

        @jax.jit
        def ours(*arguments):
            y, vjp, after = jax.vjp(f, *arguments, has_aux=True)
            return y, vjp(TORCH["cotangent"]), after

        y, gradients, after = ours(TORCH["x"], TORCH["scale"], TORCH["bias"])
        assert_close(y, TORCH["unmix_y"])
        for name, gradient in zip(("x", "0", "1"), gradients):
            assert_close(gradient, TORCH[f"unmix_grad_{name}"])
        assert_close(after.means, TORCH["unmix_next_means"])
        assert_close(after.variances, TORCH["unmix_next_variances"])

    @parameterized.parameters(0.0, 0.3, 1.0)
    def test_mixture_moments_are_those_of_both_samples_together(self, alpha):
        """x beside a sample of the source's moments, at the proportion of the weights."""
        x, *_ = random_batch((7, 4))
        source = random_batch((3, 4), seed=1)[0]
        mean, var = source.mean(0), source.var(0)
        weights = np.concatenate([np.full(3, alpha / 3), np.full(7, (1 - alpha) / 7)])
        together = np.concatenate([source, x]).astype(np.float64)
        mixed_mean = weights @ together
        mixed_var = weights @ (together - mixed_mean) ** 2
        ours = norms.alpha_batch_norm(x, mean, var, alpha=alpha, mixture_moments=True)
        assert_close(ours, (x - mixed_mean) / np.sqrt(mixed_var + 1e-5))

    def test_cross_variance_is_that_of_the_mixtures(self):
        """Each M_bk, S_bk from a sample of a component beside the example's positions."""
        x, state, *_ = random_batch((2, 5, 4), components=2)
        m, cosine = x.mean(1), lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        y, _ = norms.unmix_tns(x, state, momentum=0.1, cross_variance=True)
        for b in range(2):
            p = jax.nn.softmax(np.array([cosine(m[b], mu) for mu in state.means]) / 0.07)
            spread = np.sqrt(state.variances)
            parts = [
                (1 - p[k]) / 2 * (np.stack([mu - s, mu + s]) ** n).sum(0)
                + p[k] * (x[b] ** n).mean(0)
                for n in (1, 2)
                for k, (mu, s) in enumerate(zip(state.means, spread))
            ]
            mean, second = (parts[0] + parts[1]) / 2, (parts[2] + parts[3]) / 2
            assert_close(y[b], (x[b] - mean) / np.sqrt(second - mean**2 + 1e-5), rtol=1e-3)


DIGITS = load_digits()
WIDTH, BATCH = 32, 16


def logits_of(params, x, states, norm):
    """Logits of images whose rows are positions, and the states of the two norms."""
    after = []
    for layer, state in zip(("0", "1"), states):
        x, state = norm(x @ params[f"kernel_{layer}"], state, **params[f"norm_{layer}"])
        after.append(state)
        x = jax.nn.relu(x)
    return x.reshape(len(x), -1) @ params["head"], after


@pytest.fixture(scope="module")
def trained():
    """Parameters and statistics of a network with batch norms, and test digits with labels."""
    order = np.random.default_rng(0).permutation(len(DIGITS.target))
    images, labels = DIGITS.images[order].astype("f") / 16, DIGITS.target[order]
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "kernel_0": jax.random.normal(keys[0], (8, WIDTH)) / np.sqrt(8),
        "kernel_1": jax.random.normal(keys[1], (WIDTH, WIDTH)) / np.sqrt(WIDTH),
        "head": 0.05 * jax.random.normal(keys[2], (8 * WIDTH, 10)),
    } | {f"norm_{i}": {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)} for i in (0, 1)}
    optimizer = optax.adam(1e-2)

    def step(carry, batch):
        params, opt_state, states = carry

        def loss(params):
            norm = partial(norms.batch_norm, training=True)
            logits, after = logits_of(params, images[:1200][batch], states, norm)
            targets = labels[:1200][batch]
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(), after

        gradients, states = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradients, opt_state)
        return (optax.apply_updates(params, updates), opt_state, states), None

    images, labels = jnp.asarray(images), jnp.asarray(labels)
    batches = np.random.default_rng(1).integers(1200, size=(100, 64))
    start = params, optimizer.init(params), [norms.batch_norm_init(WIDTH)] * 2
    (params, _, states), _ = jax.jit(partial(jax.lax.scan, step))(start, batches)
    return params, states, np.asarray(images[1200:1776]), np.asarray(labels[1200:1776])


def accuracy(params, states, images, labels, norm, batch=BATCH):
    """Of a stream in the order given, in batches, the norms' states carried along."""

    def step(states, x):
        logits, states = logits_of(params, x, states, norm)
        return states, logits.argmax(-1)

    stream = images.reshape(-1, batch, 8, 8)
    _, predictions = jax.jit(partial(jax.lax.scan, step))(states, stream)
    return np.mean(np.ravel(predictions) == labels)


def alpha_norm(alpha):
    def norm(x, state, **parameters):
        y = norms.alpha_batch_norm(x, state.mean, state.var, **parameters, alpha=alpha)
        return y, state

    return norm


class TestClaims:
    @pytest.mark.claim("alpha-bn-core")
    def test_between_source_and_batch_statistics_there_is_better_than_either(self, trained):
        """Both ends are the known norms; brighter digits, one at a time, are read best between."""
        x, _, scale, bias = random_batch()
        state = norms.BatchNormState(*np.float32([[1, 0, -2, 5], [1, 2, 0.1, 3]]))
        ends = {alpha: alpha_norm(alpha)(x, state, scale=scale, bias=bias)[0] for alpha in (0.0, 1)}
        for alpha, y in ends.items():
            usual, _ = norms.batch_norm(x, state, scale, bias, training=alpha == 0)
            assert_close(y, usual)
        params, states, images, labels = trained
        of_alpha = {
            alpha: accuracy(params, states, images + 0.2, labels, alpha_norm(alpha), batch=1)
            for alpha in (0.0, 0.5, 1.0)
        }
        assert accuracy(params, states, images, labels, alpha_norm(1.0)) > 0.9
        assert of_alpha[0.5] > max(of_alpha[0.0], of_alpha[1.0]) + 0.03

    @pytest.mark.claim("unmix-tns")
    def test_a_stream_sorted_by_class_is_read_as_well_as_a_shuffled_one(self, trained):
        params, states, images, labels = trained
        images, order = images + 0.2, np.argsort(labels, kind="stable")
        keys = jax.random.split(jax.random.key(1))
        components = [norms.unmix_tns_init(key, *s, 4) for key, s in zip(keys, states)]
        runs = {
            "source": (states, alpha_norm(1.0)),
            "batch": (states, alpha_norm(0.0)),
            "unmix": (components, partial(norms.unmix_tns, momentum=norms.unmix_momentum())),
        }
        shuffled, of_sorted = (
            {
                name: accuracy(params, start, images[i], labels[i], norm)
                for name, (start, norm) in runs.items()
            }
            for i in (np.arange(len(labels)), order)
        )
        assert shuffled["batch"] - of_sorted["batch"] > 0.08
        assert abs(shuffled["unmix"] - of_sorted["unmix"]) < 0.04
        assert of_sorted["unmix"] > max(of_sorted["batch"], of_sorted["source"]) + 0.04
        assert shuffled["unmix"] > shuffled["batch"] - 0.06

    def test_an_example_sees_no_other(self):
        x, state, scale, bias = random_batch((3, 2, 4))
        f = lambda x: norms.unmix_tns(x, state, scale, bias, momentum=0.1)[0]
        jacobian = np.moveaxis(jax.jit(jax.jacobian(f))(x), 3, 1)
        across = ~np.eye(3, dtype=bool)
        assert np.all(jacobian[across] == 0)
        assert np.any(jacobian[~across] != 0)

    def test_components_start_with_the_moments_of_the_source(self):
        mean, var = np.float32([1, -2, 0]), np.float32([1, 0.5, 4])
        init = partial(norms.unmix_tns_init, source_mean=mean, source_var=var, num_components=4)
        for alpha in (0.5, 0.9):
            draw = jax.jit(jax.vmap(partial(init, alpha=alpha)))
            means, variances = draw(jax.random.split(jax.random.key(0), 20_000))
            np.testing.assert_allclose(means.mean((0, 1)), mean, atol=0.03)
            total = means.var(1).mean(0) + variances.mean((0, 1))
            np.testing.assert_allclose(total, var, rtol=0.02)
            np.testing.assert_allclose(means.var(1).mean(0), alpha * var, rtol=0.03)
        one = norms.unmix_tns_init(jax.random.key(0), mean, var, 1)
        chex.assert_trees_all_equal(one, UnMixState(mean[None], var[None]))

    def test_one_component_is_instance_norm(self):
        x, state, scale, bias = random_batch(components=1)
        y, _ = norms.unmix_tns(x, state, scale, bias, momentum=0.1)
        assert_close(y, norms.group_norm(x, scale, bias, groups=4))

    def test_a_repeated_batch_draws_the_components_to_it(self):
        x, state, *_ = random_batch((1, 5, 4))
        m, v = x.mean(1), x.var(1)
        step = jax.jit(lambda state: norms.unmix_tns(x, state, momentum=0.5, temperature=1.0)[1])
        distances = []
        for _ in range(10):
            distances.append([np.abs(state.means - m), np.abs(state.variances - v)])
            state = step(state)
        assert np.all(np.diff(distances, axis=0) < 0)

    def test_momentum_forgets_as_fast_in_parts(self):
        for batch in (1, 16):
            kept = (1 - norms.unmix_momentum(0.3, batch)) ** (64 / batch)
            np.testing.assert_allclose(kept, 0.7, rtol=1e-6)
        np.testing.assert_allclose(norms.unmix_momentum(0.2, 8, 8), 0.2)


class TestGlobalStatistics:
    """With `axis_name`, a batch spread over devices is one batch."""

    def test_values_and_gradients_are_those_of_the_whole_batch(self):
        x, state, scale, bias = random_batch((16, 3, 4))
        weights = random_batch((16, 3, 4), seed=1)[0]
        mesh = jax.make_mesh((8,), ("data",))
        placed = jax.device_put(x, NamedSharding(mesh, P("data")))

        def alpha(x, scale, bias, **axis):
            mean, var = state.means[0], state.variances[0]
            return norms.alpha_batch_norm(x, mean, var, scale, bias, alpha=0.3, **axis), state

        def unmix(x, scale, bias, **axis):
            return norms.unmix_tns(x, state, scale, bias, momentum=0.1, **axis)

        def results(run, x):
            def loss(x, scale, bias):
                y, after = run(x, scale, bias)
                return jnp.sum(weights * y), (y, after)

            return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(x, scale, bias)

        for norm in (alpha, unmix):
            sharded = jax.shard_map(
                partial(norm, axis_name="data"),
                mesh=mesh,
                in_specs=(P("data"), P(), P()),
                out_specs=(P("data"), P()),
            )
            assert_close(results(sharded, placed), results(norm, x), atol=1e-4)


class TestEdges:
    @pytest.mark.parametrize("epsilon", [0.0, 1e-5])
    @pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
    def test_constant_and_huge_features(self, value, epsilon):
        _, state, scale, bias = random_batch()
        x = np.full((1, 1, 4), value, "f")
        for k in (1, 3):
            state = UnMixState(state.means[:k], state.variances[:k])
            f = lambda x: norms.unmix_tns(x, state, scale, bias, momentum=0.1, epsilon=epsilon)
            jacobian = jax.jit(jax.jacrev(lambda x: f(x)[0]))
            chex.assert_tree_all_finite((f(x), jacobian(x)))
        zero = np.zeros(4, "f")
        f = lambda x: norms.alpha_batch_norm(x, zero, zero, scale, bias, alpha=0.0, epsilon=epsilon)
        np.testing.assert_array_equal(f(x), bias[None, None])
        chex.assert_tree_all_finite(jax.jit(jax.jacrev(f))(x))

    def test_components_at_zero_have_no_direction(self):
        x, state, *_ = random_batch()
        state = state._replace(means=0 * state.means)
        y, after = norms.unmix_tns(x, state, momentum=1.0)
        assert np.all(np.isfinite(y))
        expected = np.broadcast_to(x.mean((0, 1)) / 3, (3, 4))  # each has a third of all
        assert_close(after.means, expected)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_computes_in_float32(self, dtype):
        x, state, scale, bias = random_batch()
        half = jnp.asarray(300 * x, dtype)
        for f in (
            lambda x: norms.alpha_batch_norm(x, state.means[0], state.variances[0], scale, bias),
            lambda x: norms.unmix_tns(x, state, scale, bias, momentum=0.1)[0],
        ):
            ours = f(half)
            assert ours.dtype == dtype
            expected = f(half.astype(jnp.float32)).astype(dtype)
            np.testing.assert_array_equal(ours, expected)

    def test_the_state_carries_no_gradient_and_vmap(self):
        x, state, *_ = random_batch((4, 3, 4))
        total = lambda x: sum(map(jnp.sum, norms.unmix_tns(x, state, momentum=0.1)[1]))
        np.testing.assert_array_equal(jax.jit(jax.grad(total))(x), 0)
        f = jax.jit(lambda x: norms.unmix_tns(x, state, momentum=0.1)[0])
        assert_close(jax.jit(jax.vmap(lambda x: f(x[None])[0]))(x), f(x))


class TestBadInput:
    def test_of_alpha_batch_norm_is_named(self):
        x, state, scale, _ = random_batch()
        mean, var = state.means[0], state.variances[0]
        for alpha in (-0.1, 1.1):
            with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
                norms.alpha_batch_norm(x, mean, var, alpha=alpha)
        with pytest.raises(ValueError, match=r"source_mean must have shape \(4,\)"):
            norms.alpha_batch_norm(x, mean[:2], var)
        with pytest.raises(ValueError, match=r"source_var must have shape \(4,\)"):
            norms.alpha_batch_norm(x, mean, var[None])
        with pytest.raises(ValueError, match=r"scale must have shape \(4,\)"):
            norms.alpha_batch_norm(x, mean, var, scale[:1])
        with pytest.raises(TypeError, match="x must have a floating-point type"):
            norms.alpha_batch_norm(x.astype(int), mean, var)

    def test_of_unmix_tns_is_named(self):
        x, state, _, bias = random_batch()
        run = partial(norms.unmix_tns, momentum=0.1)
        with pytest.raises(ValueError, match="x must have an axis of positions"):
            run(x[:, 0], state)
        with pytest.raises(ValueError, match=r"state.means must have shape \[components, feat"):
            run(x, UnMixState(bias, bias))
        with pytest.raises(ValueError, match=r"state.variances must have shape \(3, 4\)"):
            run(x, state._replace(variances=state.variances[:1]))
        with pytest.raises(ValueError, match="temperature must be in"):
            run(x, state, temperature=0.0)
        with pytest.raises(ValueError, match="momentum must be in"):
            run(x, state, momentum=1.5)
        with pytest.raises(ValueError, match=r"bias must have shape \(4,\)"):
            run(x, state, None, bias[:2])
        init = partial(norms.unmix_tns_init, jax.random.key(0))
        for count in (0, 1.5):
            with pytest.raises(ValueError, match="num_components must be an integer of at least 1"):
                init(bias, bias, count)
        with pytest.raises(ValueError, match=r"source_var must have shape \(4,\)"):
            init(bias, bias[:2])
        with pytest.raises(ValueError, match="alpha must be in"):
            init(bias, bias, alpha=2.0)
        with pytest.raises(TypeError, match="source_mean must have a floating-point type"):
            init(bias.astype(int), bias)
        with pytest.raises(ValueError, match="batch_size must be in"):
            norms.unmix_momentum(batch_size=0)
