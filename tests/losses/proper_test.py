from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec

from jaxref import losses

PEER = np.load(Path(__file__).parents[1] / "oracles" / "legendretron.npz")


def peer_params(dtype=np.float32):
    fields = losses.ConvexPotential._fields
    return tuple(
        losses.ConvexPotential(*(PEER[f"{b}_{name}"].astype(dtype) for name in fields))
        for b in (0, 1)
    )


def random_params(num_classes, seed=0, **settings):
    return losses.legendretron_init(jax.random.key(seed), num_classes, **settings)


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_two_blocks_match_the_authors(self):
        params, scores = peer_params(), PEER["scores"].astype("f")
        potential = self.variant(losses.convex_potential)
        np.testing.assert_allclose(potential(params[0], scores), PEER["potentials"], rtol=2e-5)
        log_p = self.variant(losses.legendretron_log_probabilities)(scores, params)
        np.testing.assert_allclose(log_p, PEER["log_probabilities"], rtol=1e-4, atol=1e-5)

    def test_gradients_match_the_authors(self):
        with jax.enable_x64(True):
            loss = lambda z, params: losses.legendretron_loss(z, PEER["labels"], params).sum()
            arguments = (jnp.asarray(PEER["scores"]), peer_params(np.float64))
            of_scores, of_params = jax.jit(jax.grad(loss, (0, 1)))(*arguments)
            np.testing.assert_allclose(of_scores, PEER["scores_gradient"], rtol=1e-9)
            for name in ("quadratic_weight", "network_weight"):
                ours = getattr(of_params[0], name)
                np.testing.assert_allclose(ours, PEER[f"{name}_gradient"], rtol=1e-9)
            ours = of_params[1].hidden_kernels[1]
            np.testing.assert_allclose(ours, PEER["hidden_kernel_gradient"], rtol=1e-9)

    def test_scores_of_the_first_batch_normalise_as_the_authors_layers_do(self):
        rng = np.random.default_rng(0)
        scores = (5 * rng.normal(size=(40, 3)) + 2).astype("f")
        params = losses.convex_potential_init(jax.random.key(0), 3, scores=scores)
        plain = losses.convex_potential_init(jax.random.key(0), 3)
        np.testing.assert_array_equal(params.hidden_kernels, plain.hidden_kernels)
        softplus = lambda x: np.log1p(np.exp(x))
        h = softplus(scores @ plain.first_kernel + plain.first_bias)
        for layer in range(3):
            sums = h @ softplus(plain.hidden_kernels[layer]) / 4
            sums = sums + scores @ plain.input_kernels[layer]
            scale = np.exp(params.log_scales[layer])
            normal = scale * (sums + params.shifts[layer])
            np.testing.assert_allclose(normal.mean(0), 0, atol=1e-4)
            np.testing.assert_allclose(normal.std(0), 1, rtol=1e-4)
            normal = (scale + 1e-3) * (sums + params.shifts[layer])
            skip = scores @ plain.skip_kernels[layer] + plain.skip_biases[layer]
            h = softplus(np.concatenate([normal, skip], axis=-1))
        output = h @ softplus(plain.output_kernel) / 4 + scores @ plain.output_input_kernel
        np.testing.assert_allclose(np.exp(params.output_log_scale), 1 / output.std(), rtol=1e-4)

    def test_softmax_plus_and_the_canonical_loss(self):
        rng = np.random.default_rng(0)
        v, labels = rng.normal(size=(6, 3)).astype("f"), rng.integers(4, size=6)
        full = np.concatenate([v, np.zeros((6, 1), "f")], axis=-1)
        np.testing.assert_allclose(losses.log_softmax_plus(v), jax.nn.log_softmax(full), rtol=1e-6)
        expected = losses.softmax_cross_entropy(full, labels)
        np.testing.assert_allclose(losses.canonical_log_loss(v, labels), expected, rtol=1e-5)
        whole = lambda v: jnp.log(1 + jnp.exp(v).sum(-1)).sum()
        p = jnp.exp(losses.log_softmax_plus(v))
        np.testing.assert_allclose(jax.grad(whole)(v), p[:, :3], rtol=1e-5)


class TestClaims:
    @pytest.mark.claim("legendretron")
    def test_a_learned_link_is_monotone_and_its_loss_proper_whatever_its_parameters(self):
        """The link is the gradient of a strongly convex function, and of all scores those with the
        true probabilities have the least expected loss."""
        rng = np.random.default_rng(0)
        a, b = (3 * rng.normal(size=(2, 50, 3))).astype("f")
        truth = jnp.asarray(rng.dirichlet(np.ones(4), size=5), jnp.float32)

        @jax.jit
        def study(params):
            g = [losses.convex_gradient_map(params[0], x) for x in (a, b)]
            rises = jnp.sum((g[0] - g[1]) * (a - b), axis=-1)
            least = jax.nn.softplus(params[0].quadratic_weight)
            jacobian = jax.vmap(jax.jacobian(lambda z: losses.convex_gradient_map(params[0], z)))(a)

            wanted = jnp.log(truth[:, :3] / truth[:, 3:])
            g_of = lambda z: losses.convex_gradient_map(params[0], z)

            def newton(_, z):
                gap = g_of(z) - wanted
                return z - jax.vmap(jnp.linalg.solve)(jax.vmap(jax.jacobian(g_of))(z), gap)

            z = jax.lax.fori_loop(0, 20, newton, jnp.zeros((5, 3)))
            found = jnp.exp(losses.legendretron_log_probabilities(z, params))
            loss = lambda z, q: losses.legendretron_loss(z, q, params)
            slope = jax.vmap(jax.grad(loss))(z, truth)
            others = jax.vmap(lambda z, q: loss(z + a / 3, jnp.tile(q, (50, 1))))(z, truth)
            gaps = others - loss(z, truth)[:, None]
            return rises, least, jacobian, found, slope, gaps

        for seed in range(3):
            rises, least, jacobian, found, slope, gaps = study(random_params(4, seed))
            distance = np.sum((a - b) ** 2, axis=-1)
            assert np.all(rises >= 0.999 * least * distance)
            np.testing.assert_allclose(jacobian, np.swapaxes(jacobian, 1, 2), atol=1e-5)
            assert np.linalg.eigvalsh(jacobian).min() >= 0.999 * least
            np.testing.assert_allclose(found, truth, atol=1e-4)
            np.testing.assert_allclose(slope, 0, atol=1e-4)
            assert np.all(gaps > 0)

    def test_without_its_network_it_is_the_multinomial_logistic_loss(self):
        (potential,) = random_params(4)
        potential = potential._replace(
            network_weight=jnp.float32(-50), quadratic_weight=jnp.log(jnp.e - 1)
        )
        rng = np.random.default_rng(0)
        scores, labels = rng.normal(size=(6, 3)).astype("f"), rng.integers(4, size=6)
        ours = losses.legendretron_loss(scores, labels, (potential,))
        np.testing.assert_allclose(ours, losses.canonical_log_loss(scores, labels), rtol=1e-5)

    def test_a_link_that_is_learned_fits_probabilities_that_are_no_softmax_of_scores(self):
        """Labels of a linear model behind a link with a step: fitted with and without a learned
        link."""
        rng = np.random.default_rng(0)
        weights = rng.normal(size=(5, 2))

        def examples(n):
            x = rng.normal(size=(n, 5))
            v = 3 * np.tanh(4 * (x @ weights - 1))
            p = np.exp(np.asarray(losses.log_softmax_plus(v.astype("f"))))
            return x.astype("f"), p

        (x, p), (held_out, truth) = examples(200), examples(500)

        @jax.jit
        def fitted(w, params):
            start, unravel = ravel_pytree((w, params))
            loss = lambda flat, x, p: losses.legendretron_loss(
                x @ unravel(flat)[0], p, unravel(flat)[1]
            ).mean()

            def step(t, carry):  # Adam, whose rate falls to 0
                flat, m, v = carry
                slope = jax.grad(loss)(flat, x, p)
                m, v = 0.9 * m + 0.1 * slope, 0.99 * v + 0.01 * slope**2
                rate = 0.1 * (1 - t / 200) * jnp.sqrt(1 - 0.99**t) / (1 - 0.9**t)
                return flat - rate * m / (jnp.sqrt(v) + 1e-8), m, v

            zero = jnp.zeros_like(start)
            flat = jax.lax.fori_loop(1, 201, step, (start, zero, zero))[0]
            return loss(flat, held_out, truth)

        w = jnp.asarray(0.1 * rng.normal(size=(5, 2)), jnp.float32)
        params = random_params(3, scores=x @ w)
        plain = (
            params[0]._replace(
                network_weight=jnp.float32(-50), quadratic_weight=jnp.log(jnp.e - 1)
            ),
        )
        learned, logistic = fitted(w, params), fitted(w, plain)
        best = -np.sum(truth * np.log(truth + 1e-30), axis=-1).mean()
        assert best < learned < logistic - 0.1


class TestContract:
    def test_two_classes_have_an_increasing_link(self):
        params = random_params(2, num_blocks=2)
        scores = np.linspace(-9, 9, 50, dtype="f")[:, None]
        p = jnp.exp(losses.legendretron_log_probabilities(scores, params))
        assert np.all(np.diff(p[:, 0]) > 0)
        np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-6)

    def test_soft_labels_shards_and_mapping(self):
        rng = np.random.default_rng(0)
        params = random_params(4)
        scores, labels = rng.normal(size=(8, 3)).astype("f"), rng.integers(4, size=8, dtype="i4")
        loss = jax.jit(losses.legendretron_loss)
        expected = loss(scores, labels, params)
        rows = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
        ours = loss(*jax.device_put((scores, labels), rows), params)
        np.testing.assert_allclose(ours, expected, rtol=1e-5)
        mapped = jax.vmap(loss, (0, 0, None))(scores, labels, params)
        np.testing.assert_allclose(mapped, expected, rtol=1e-5)
        hot = np.eye(4, dtype="f")[labels]
        np.testing.assert_allclose(loss(scores, hot, params), expected, rtol=1e-5)
        labels[:2] = -1, 4
        np.testing.assert_array_equal(np.isnan(loss(scores, labels, params)), np.arange(8) < 2)
        half = scores.astype(jnp.bfloat16)
        assert loss(half, labels, params).dtype == jnp.bfloat16
        expected = loss(half.astype("f"), labels, params).astype(jnp.bfloat16)[2:]
        np.testing.assert_array_equal(loss(half, labels, params)[2:], expected)

    def test_extreme_scores_stay_finite(self):
        params = random_params(3)
        gradient_of = jax.jit(
            jax.value_and_grad(lambda z, p: losses.legendretron_loss(z, labels, p).sum(), (0, 1))
        )
        labels = np.arange(3)
        for size in (1e4, -1e4, 0.0):
            scores = jnp.array([[size, -size], [size, size], [0.0, size]])
            chex.assert_tree_all_finite(gradient_of(scores, params))

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda k, p: losses.legendretron_init(k, 1), ValueError, "num_classes must be in"),
            (
                lambda k, p: losses.legendretron_init(k, 3, num_blocks=0),
                ValueError,
                "num_blocks must be in",
            ),
            (
                lambda k, p: losses.convex_potential_init(k, 2, hidden=3),
                ValueError,
                "hidden must be even",
            ),
            (
                lambda k, p: losses.convex_potential_init(k, 2, scores=np.zeros((4, 3), "f")),
                ValueError,
                "scores must have shape",
            ),
            (
                lambda k, p: losses.legendretron_loss(np.zeros((4, 3), "f"), np.zeros(4, int), p),
                ValueError,
                "z must have shape",
            ),
            (
                lambda k, p: losses.legendretron_loss(np.zeros((4, 2), "f"), np.zeros(3, int), p),
                ValueError,
                "labels must have shape",
            ),
            (
                lambda k, p: losses.legendretron_loss(np.zeros((4, 2), int), np.zeros(4, int), p),
                TypeError,
                "values must have a floating-point type",
            ),
            (
                lambda k, p: losses.log_softmax_plus(jnp.float32(0)),
                ValueError,
                r"values must have shape \[..., classes - 1\]",
            ),
        ],
    )
    def test_bad_input_is_named(self, call, error, message):
        with pytest.raises(error, match=message):
            call(jax.random.key(0), random_params(3))
