import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxref.analysis.landscape.sample_size import (
    gauss_newton_hessian_norm,
    loss_difference_bound,
    loss_difference_curve,
    relu_network_hessian_bound,
    sufficient_sample_size,
)
from jaxref.losses import softmax_cross_entropy

curve_of = jax.jit(loss_difference_curve, static_argnames="num_permutations")
size_of = jax.jit(sufficient_sample_size, static_argnames="num_permutations")


def curve64(losses):
    """As the difference of the two means."""
    losses = np.float64(losses)
    means = [np.mean(losses[..., :k], axis=-1) for k in range(1, losses.shape[-1] + 1)]
    return np.abs(np.diff(np.stack(means, axis=-1), axis=-1))


def average64(curve, smoothing):
    averaged = [curve[..., 0]]
    for k in range(1, curve.shape[-1]):
        averaged.append(smoothing * averaged[-1] + (1 - smoothing) * curve[..., k])
    return np.stack(averaged, axis=-1)


class CurveTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_matches_the_difference_of_the_means(self):
        losses = np.random.default_rng(0).gamma(0.5, size=(2, 3, 50)).astype(np.float32)
        expected = curve64(losses)
        ours = self.variant(loss_difference_curve)(losses)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-7)
        ours = self.variant(functools.partial(loss_difference_curve, smoothing=0.9))(losses)
        np.testing.assert_allclose(ours, average64(expected, 0.9), rtol=1e-5)


def network(weights, x):
    for weight in weights[:-1]:
        x = jax.nn.relu(weight @ x)
    return weights[-1] @ x


def train(key, depth, x, labels, width=16):
    """The weights after some steps of Adam, in one loop."""
    sizes = [x.shape[1]] + [width] * (depth - 1) + [3]
    keys = jax.random.split(key, depth)
    weights = [
        jax.random.normal(k, (rows, cols)) * np.sqrt(2 / cols)
        for k, rows, cols in zip(keys, sizes[1:], sizes[:-1])
    ]
    optimizer = optax.adam(1e-2)

    def losses(weights):
        logits = jax.vmap(functools.partial(network, weights))(x)
        return softmax_cross_entropy(logits, labels)

    def step(_, carry):
        weights, state = carry
        gradient = jax.grad(lambda w: jnp.mean(losses(w)))(weights)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(weights, updates), state

    carry = (weights, optimizer.init(weights))
    weights, _ = jax.lax.fori_loop(0, 300, step, carry)
    return weights, losses(weights), losses


class TestClaim:
    @pytest.mark.claim("loss-landscape-sample-convergence")
    def test_one_more_example_changes_the_loss_of_a_trained_network_by_one_over_k(self):
        """With a slope of -1, at and around the minimum, below the bound by its sharpest example,
        which is below that by depth and weights."""
        rng = np.random.default_rng(0)
        x = rng.normal(size=(400, 4)).astype(np.float32)
        labels = np.argmax(x @ rng.normal(size=(4, 3)) + rng.normal(size=(400, 3)), axis=1)
        k, key = np.arange(1, 400), jax.random.key(0)

        @jax.jit
        def experiment():
            weights, at_minimum, losses = train(key, 3, x, labels)
            move = [jax.random.normal(jax.random.key(w.size), w.shape) for w in weights]
            length = jnp.sqrt(sum(jnp.sum(jnp.square(m)) for m in move))
            near = losses([w + 0.5 * m / length for w, m in zip(weights, move)])
            curves = loss_difference_curve(
                jnp.stack([at_minimum, near]), num_permutations=100, key=key
            )
            sharpest = jnp.max(
                jax.vmap(
                    lambda x: gauss_newton_hessian_norm(network, weights, x, num_steps=3, key=key)
                )(x)
            )
            weight_norm = jnp.max(jnp.stack([jnp.linalg.norm(w, 2) for w in weights]))
            return curves, jnp.max(at_minimum), sharpest, weight_norm

        curves, largest, sharpest, weight_norm = experiment()
        assert weight_norm > 1
        length = np.max(np.linalg.norm(x, axis=1))
        tight = relu_network_hessian_bound(3, weight_norm, length, variant="tight")
        assert sharpest < tight < relu_network_hessian_bound(3, weight_norm, length)
        for curve, radius in zip(curves, (0.0, 0.5)):
            assert np.all(curve < loss_difference_bound(k, largest, sharpest, radius))
            slope = np.polyfit(np.log(k[20:]), np.log(curve[20:]), 1)[0]
            np.testing.assert_allclose(slope, -1, atol=0.05)


class TestLossDifferenceCurve:
    def test_orders_give_the_mean_over_all_of_them(self):
        """Of four examples all 24 orders; the given order is one of them."""
        losses = np.float32([[0.0, 1.0, 5.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
        ours = curve_of(losses, num_permutations=4000, key=jax.random.key(0))
        orders = np.array(list(itertools.permutations(range(4))))
        expected = np.mean([curve64(losses[:, order]) for order in orders], axis=0)
        np.testing.assert_allclose(ours, expected, rtol=0.05)
        other = curve_of(losses, num_permutations=4000, key=jax.random.key(1))
        assert not np.array_equal(ours, other)

    def test_a_large_sample_does_not_lose_the_difference_in_the_mean(self):
        losses = 100 + np.random.default_rng(0).normal(size=60000)
        ours = curve_of(losses.astype(np.float32))
        means = np.cumsum(losses) / np.arange(1, 60001)
        np.testing.assert_allclose(ours, np.abs(np.diff(means)), rtol=1e-2, atol=2e-9)
        assert ours.dtype == jnp.float32
        half = jnp.asarray(losses[:50] - 100, jnp.bfloat16)
        np.testing.assert_allclose(curve_of(half), curve64(np.float64(half)), rtol=1e-3, atol=1e-6)
        assert curve_of(half).dtype == jnp.float32

    def test_edges(self):
        np.testing.assert_array_equal(curve_of(jnp.full(20, 0.7)) < 1e-8, True)
        np.testing.assert_allclose(curve_of(jnp.array([1e4, -1e4])), [1e4])
        assert curve_of(jnp.zeros((0, 5))).shape == (0, 4)
        slope = jax.grad(lambda losses: jnp.sum(curve_of(losses, smoothing=0.5)))
        assert np.all(np.isfinite(slope(jnp.array([1.0, 1.0, 2.0, -1e4]))))


class TestSufficientSampleSize:
    def test_matches_a_search_from_the_end(self):
        losses = np.random.default_rng(0).gamma(0.5, size=(4, 60)).astype(np.float32)
        for smoothing in (0.0, 0.9):
            curve = average64(curve64(losses), smoothing)
            for tolerance in (3e-3, 1e-2, 0.1, 10.0):
                expected = [
                    min([k for k in range(1, 60) if np.all(row[k - 1 :] < tolerance)], default=60)
                    for row in curve
                ]
                np.testing.assert_array_equal(
                    size_of(losses, tolerance, smoothing=smoothing), expected
                )
        tolerances = np.float32([1e-2, 0.1, 10.0, 1e-9])
        sizes = size_of(losses, tolerances, smoothing=0.0)
        assert jnp.issubdtype(sizes.dtype, jnp.integer)
        assert sizes[2] == 1
        assert sizes[3] == 60

    def test_the_size_goes_as_one_over_the_tolerance(self):
        losses = np.random.default_rng(0).exponential(size=4000).astype(np.float32)
        find = lambda tolerance: size_of(
            losses, tolerance, smoothing=0.0, num_permutations=200, key=jax.random.key(0)
        )
        np.testing.assert_allclose(find(1e-3) / find(1e-2), 10, rtol=0.2)


def bound64(depth, weight, length, variant):
    if variant == "tight":
        return 0.5 * depth * length**2 * weight ** (2 * (depth - 1))
    ratio = depth if weight == 1 else weight**2 * (weight ** (2 * depth) - 1) / (weight**2 - 1)
    return np.sqrt(2) * (depth * length**2 * weight ** (2 * depth) + ratio)


def random_network(key, sizes=(5, 7, 6, 4)):
    """Matrices of spectral norms about a scale that differs from network to network."""
    keys = jax.random.split(key, len(sizes))
    scale = 10 ** jax.random.uniform(keys[0], minval=-1.0, maxval=1.0)
    shapes = zip(keys[1:], sizes[1:], sizes[:-1])
    return [scale * jax.random.normal(k, s) / np.sqrt(sum(s)) for k, *s in shapes]


class TestHessianBound:
    def test_matches_a_literal_transcription(self):
        for depth in (1, 2, 5):
            for weight in (0.1, 1.0, 3.0):
                for variant in ("paper", "tight"):
                    ours = relu_network_hessian_bound(depth, weight, 2.5, variant=variant)
                    np.testing.assert_allclose(
                        ours, bound64(depth, weight, 2.5, variant), rtol=1e-5
                    )
        for k, radius in ((1, 0.0), (9, 0.3)):
            expected = 2 / (k + 1) * (1.5 + 7.0 * radius**2)
            np.testing.assert_allclose(loss_difference_bound(k, 1.5, 7.0, radius), expected)

    def test_no_random_network_exceeds_it_and_the_paper_s_only_with_small_weights(self):
        keys = jax.random.split(jax.random.key(0), 1000)

        @jax.jit
        @jax.vmap
        def measure(key):
            weights, x = random_network(key), jax.random.normal(key, 5)
            norm = gauss_newton_hessian_norm(network, weights, x, num_steps=4, key=key)
            weight_norm = jnp.max(jnp.stack([jnp.linalg.norm(w, 2) for w in weights]))
            bounds = [
                relu_network_hessian_bound(3, weight_norm, jnp.linalg.norm(x), variant=variant)
                for variant in ("paper", "tight")
            ]
            return norm, weight_norm, *bounds

        norm, weight_norm, paper, tight = measure(keys)
        assert np.mean(norm > 0) > 0.8  # in some all units of a layer are off
        assert np.all(norm <= tight)
        assert np.all(norm[weight_norm >= 1] <= paper[weight_norm >= 1])
        assert np.sum(weight_norm < 1) > 100
        # One layer, two classes, p = 1/2: the tight bound is reached, and the paper's exceeded.
        x = jnp.array([1.0, -2.0, 2.0])
        weights = [0.1 * jnp.ones((2, 3)) / np.sqrt(6)]
        norm = gauss_newton_hessian_norm(network, weights, x, key=keys[0])
        tight, paper = (
            relu_network_hessian_bound(1, 0.1, 3.0, variant=v) for v in ("tight", "paper")
        )
        np.testing.assert_allclose(norm, 4.5, rtol=1e-5)
        np.testing.assert_allclose(tight, 4.5, rtol=1e-6)
        assert norm > 10 * paper

    def test_gradients_are_finite_and_types_kept(self):
        for variant in ("paper", "tight"):
            bound = functools.partial(relu_network_hessian_bound, variant=variant)
            slope = jax.jit(jax.grad(lambda w, x, f=bound: f(1, w, x) + f(3, w, x), (0, 1)))
            for weight in (0.0, 1.0, 50.0):
                assert np.all(np.isfinite(np.stack(slope(weight, 0.0))))
            assert bound(2, jnp.bfloat16(2.0), jnp.bfloat16(1.0)).dtype == jnp.float32


class TestGaussNewtonHessianNorm:
    def test_matches_a_literal_transcription_with_kronecker_products(self):
        weights = [np.float64(w) for w in random_network(jax.random.key(3))]
        x = np.random.default_rng(0).normal(size=(6, 5))
        total = 0
        for example in x:
            inputs, slopes = [example], []
            for weight in weights[:-1]:
                z = weight @ inputs[-1]
                slopes.append(np.diag(np.float64(z >= 0)))
                inputs.append(np.maximum(z, 0))
            behind, blocks = np.eye(4), []
            for layer in reversed(range(3)):
                blocks.append(np.kron(behind, inputs[layer]))
                if layer:
                    behind = behind @ weights[layer] @ slopes[layer - 1]
            z = weights[-1] @ inputs[-1]
            p = np.exp(z) / np.sum(np.exp(z))
            jacobian = np.concatenate(blocks, axis=1)
            hessian = jacobian.T @ (np.diag(p) - np.outer(p, p)) @ jacobian
            total = total + hessian / len(x)
        apply = lambda weights, x: jax.vmap(functools.partial(network, weights))(x)
        norm = jax.jit(
            lambda weights, x: gauss_newton_hessian_norm(apply, weights, x, key=jax.random.key(0))
        )
        weights, x = [np.float32(w) for w in weights], np.float32(x)
        np.testing.assert_allclose(norm(weights, x), np.linalg.eigvalsh(total)[-1], rtol=1e-4)
        one = jax.jit(
            lambda weights, x: gauss_newton_hessian_norm(
                network, weights, x, num_steps=4, key=jax.random.key(0)
            )
        )(weights, x[-1])
        np.testing.assert_allclose(one, np.linalg.eigvalsh(hessian)[-1], rtol=1e-4)

    def test_of_linear_logits_is_the_hessian_whatever_the_labels(self):
        rng = np.random.default_rng(0)
        x, weight = rng.normal(size=(8, 3)).astype(np.float32), np.float32(rng.normal(size=(3, 4)))

        @jax.jit
        def both(weight, labels):
            loss = lambda w: jnp.mean(softmax_cross_entropy(x @ w, labels))
            norm = gauss_newton_hessian_norm(lambda w, x: x @ w, weight, x, key=jax.random.key(0))
            return norm, jax.hessian(loss)(weight).reshape(12, 12)

        for labels in (rng.integers(4, size=8), np.zeros(8, int)):
            norm, hessian = both(weight, labels)
            np.testing.assert_allclose(norm, np.linalg.eigvalsh(hessian)[-1], rtol=1e-4)

    def test_confident_half_precision_and_one_class(self):
        x, key = jnp.array([3.0, 4.0]), jax.random.key(0)
        norm = jax.jit(lambda w, x: gauss_newton_hessian_norm(jnp.matmul, w, x, key=key))
        assert norm(jnp.array([[1e4, 1e4], [-1e4, -1e4]]), x) == 0
        assert norm(jnp.ones((1, 2)), x) == 0
        sure = jnp.linspace(0.5, 3, 300)[:, None, None] * jnp.array([[1.0, 1], [-1, -1], [0.3, -1]])
        first_step = jax.vmap(
            lambda w, key: gauss_newton_hessian_norm(jnp.matmul, w, x, num_steps=1, key=key)
        )
        assert np.all(
            jax.jit(first_step)(sure, jax.random.split(key, 300)) >= 0
        )  # but for rounding
        half = norm(jnp.zeros((2, 2), jnp.bfloat16), x.astype(jnp.bfloat16))
        assert half.dtype == jnp.float32
        np.testing.assert_allclose(half, 12.5, rtol=2e-2)


def test_bad_input_is_named():
    losses, key = np.float32([1.0, 2.0, 3.0]), jax.random.key(0)
    for arguments, keywords, error, message in [
        ((losses[:1],), {}, ValueError, r"must have shape \[\.\.\., examples\], at least 2, got"),
        ((np.float32(1.0),), {}, ValueError, r"per_example_losses must have shape .* got \(\)"),
        ((np.float32([1, np.nan, 2]),), {}, ValueError, "per_example_losses must be in"),
        ((np.array([1, 2]),), {}, TypeError, "per_example_losses must have a floating"),
        ((losses,), {"smoothing": 1.0}, ValueError, "smoothing must be in"),
        ((losses,), {"num_permutations": -1}, ValueError, "num_permutations must be in"),
        ((losses,), {"num_permutations": 3}, ValueError, "key must be given"),
    ]:
        with pytest.raises(error, match=message):
            loss_difference_curve(*arguments, **keywords)
    for tolerance in (0.0, np.nan):
        with pytest.raises(ValueError, match="tolerance must be in"):
            sufficient_sample_size(losses, tolerance)
    for arguments, keywords, message in [
        ((0, 1.0, 1.0), {}, "num_layers must be in"),
        ((1, -1.0, 1.0), {}, "weight_norm must be in"),
        ((1, 1.0, -1.0), {}, "input_norm must be in"),
        ((1, 1.0, 1.0), {"variant": "loose"}, "variant must be 'paper' or 'tight', got 'loose'"),
    ]:
        with pytest.raises(ValueError, match=message):
            relu_network_hessian_bound(*arguments, **keywords)
    names = ("sample_size", "loss_bound", "hessian_bound", "radius")
    for i, name in enumerate(names):
        arguments = [1.0, 1.0, 1.0, 1.0]
        arguments[i] = -1.0
        with pytest.raises(ValueError, match=f"{name} must be in"):
            loss_difference_bound(*arguments)
    for f, params, error, message in [
        (lambda w, x: jnp.sum(w), losses, ValueError, r"logits must have shape .* got \(\)"),
        (lambda w, x: w[:0], losses, ValueError, r"logits must have shape .* got \(0,\)"),
        (lambda w, x: x, {}, ValueError, "params must have at least one entry"),
    ]:
        with pytest.raises(error, match=message):
            gauss_newton_hessian_norm(f, params, losses, key=key)
    with pytest.raises(ValueError, match="num_steps must be in"):
        gauss_newton_hessian_norm(lambda w, x: w, losses, None, num_steps=0, key=key)
