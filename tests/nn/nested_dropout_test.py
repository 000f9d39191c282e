from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxref.nn import (
    best_truncation,
    bias_variance_of_predictions,
    nested_dropout,
    nested_dropout_distribution,
    nested_logits,
)

PEER = np.load(Path(__file__).parents[1] / "oracles" / "nested_co_teaching.npz")
RNG = np.random.default_rng(0)
X, KERNEL = RNG.normal(size=(3, 7, 6)).astype("f"), RNG.normal(size=(6, 4)).astype("f")
LABELS = RNG.integers(4, size=(3, 7))
KEY = jax.random.key(0)


class TestDistribution:
    @pytest.mark.parametrize("std", [3.0, 100.0])
    def test_matches_the_release(self, std):
        ours = nested_dropout_distribution(12, mean=1.0, std=std)
        np.testing.assert_allclose(ours, PEER[f"distribution_{std}"], rtol=1e-5)
        np.testing.assert_allclose(ours.sum(), 1, rtol=1e-5)


class TestNestedDropout:
    def test_first_features_are_kept_as_often_as_the_distribution_says(self):
        x = np.ones((2000, 6), "f")
        p = np.array([0.3, 0.0, 0.3, 0.2, 0.1, 0.1])
        drop = jax.jit(nested_dropout, static_argnames="per_example")
        kept = drop(x, key=KEY, probabilities=p, per_example=True)
        widths = np.asarray(kept).sum(-1).astype(int)
        np.testing.assert_array_equal(kept, np.arange(6) < widths[:, None])
        np.testing.assert_allclose(np.bincount(widths, minlength=7)[1:] / 2000, p, atol=0.04)
        assert not np.any(widths == 2)
        same = drop(x, key=KEY)
        assert len(np.unique(np.asarray(same).sum(-1))) == 1
        np.testing.assert_array_equal(nested_dropout(x), x)

    def test_a_fixed_width_and_its_gradient(self):
        @jax.jit
        def keep(x, k):
            value, vjp = jax.vjp(lambda x: nested_dropout(x, keep=k), x)
            return value, *vjp(2 * X)

        value, slope = keep(X, 4)
        np.testing.assert_array_equal(value, X * (np.arange(6) < 4))
        np.testing.assert_array_equal(slope, 2 * X * (np.arange(6) < 4))
        np.testing.assert_array_equal(keep(X, 6)[0], X)
        assert nested_dropout(jnp.asarray(X, jnp.bfloat16), keep=2).dtype == jnp.bfloat16

    def test_units_of_a_linear_autoencoder_are_the_principal_axes_in_order(self):
        """The marked claim of the paper is in tests/data/co_teaching_test.py."""
        data = jax.random.normal(KEY, (256, 5)) * jnp.array([3.0, 2.0, 1.0, 0.3, 0.1])
        axes, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (5, 5)))
        data, p = data @ axes, jnp.full(3, 1 / 3)
        optimizer = optax.adam(0.03)

        def step(carry, key):
            params, moments = carry

            def loss(params):
                code = nested_dropout(
                    data @ params["encode"], key=key, probabilities=p, per_example=True
                )
                return jnp.mean((code @ params["decode"] - data) ** 2)

            change, moments = optimizer.update(jax.grad(loss)(params), moments)
            return (optax.apply_updates(params, change), moments), None

        params = {"encode": 0.3 * jnp.eye(5, 3), "decode": 0.3 * jnp.eye(3, 5)}
        start = (params, optimizer.init(params))
        train = jax.jit(lambda keys: jax.lax.scan(step, start, keys)[0][0])
        decode = train(jax.random.split(KEY, 400))["decode"]
        for k in (1, 2):
            basis, _ = np.linalg.qr(np.asarray(decode[:k]).T)
            cosines = np.linalg.svd(np.asarray(axes[:k]) @ basis, compute_uv=False)
            assert cosines.min() > 0.98

    def test_bad_input_is_named(self):
        for keep in (0, 7):
            with pytest.raises(ValueError, match="keep must be in"):
                nested_dropout(X, keep=keep)
        with pytest.raises(ValueError, match="keep and key exclude each other"):
            nested_dropout(X, keep=1, key=KEY)
        with pytest.raises(ValueError, match=r"probabilities must have shape \(6,\)"):
            nested_dropout(X, key=KEY, probabilities=jnp.ones(3))
        with pytest.raises(TypeError, match="features must have a floating-point type"):
            nested_dropout(np.ones(3, int), keep=1)
        with pytest.raises(ValueError, match="std must be in"):
            nested_dropout_distribution(3, std=0.0)
        with pytest.raises(ValueError, match="dim must be in"):
            nested_dropout_distribution(0)


class TestTruncation:
    def test_logits_of_all_widths_are_those_of_the_masked_features(self):
        logits = jax.jit(nested_logits)(X, KERNEL)
        for k in range(1, 7):
            expected = X[..., :k] @ KERNEL[:k]
            np.testing.assert_allclose(logits[k - 1], expected, rtol=1e-4, atol=1e-5)

    def test_the_best_width_is_that_of_a_loop(self):
        find = jax.jit(best_truncation)
        where = RNG.random((3, 7)) < 0.7

        def loop(logits, where):
            right = np.argmax(logits, -1) == LABELS
            accuracies = np.array([r[where].mean() for r in right])
            return 1 + np.argmax(accuracies - 1e-5 * np.arange(6)), accuracies

        logits_of = lambda x, w: np.cumsum(np.moveaxis(x, -1, 0)[..., None] * w[:, None, None], 0)
        logits = logits_of(X, KERNEL)
        for mask in (where, np.ones((3, 7), bool)):
            width, accuracies = find(X, KERNEL, LABELS, where=mask)
            expected = loop(logits, mask)
            np.testing.assert_allclose(accuracies, expected[1], rtol=1e-5)
            assert width == expected[0]
        other = -2 * X[..., ::-1], KERNEL[::-1] + 1
        both = (np.stack(pair) for pair in zip((X, KERNEL), other))
        width, accuracies = find(*both, LABELS)
        expected = loop(logits + logits_of(*other), np.ones((3, 7), bool))
        np.testing.assert_allclose(accuracies, expected[1], rtol=1e-5)
        assert width == expected[0]
        # features without weight change nothing: the smallest width is taken
        assert find(X, KERNEL * (np.arange(6) == 0)[:, None], LABELS).width == 1

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match="features and kernel must have shapes"):
            nested_logits(X, KERNEL.T)
        with pytest.raises(ValueError, match="features and kernel must have shapes"):
            best_truncation(X, KERNEL[None, None], LABELS)
        with pytest.raises(ValueError, match="labels must have shape"):
            best_truncation(X, KERNEL, LABELS[0])
        with pytest.raises(TypeError, match="labels must be integers"):
            best_truncation(X, KERNEL, np.ones((3, 7)))


class TestBiasVariance:
    def test_parts_add_up_and_averages_vary_less(self):
        f, y = RNG.normal(1, 2, size=(50, 3)).astype("f"), np.arange(3.0)
        decompose = jax.jit(bias_variance_of_predictions)
        bias_squared, variance = decompose(f, y)
        error = np.mean((f - y) ** 2, axis=0)
        np.testing.assert_allclose(bias_squared + variance, error, rtol=1e-5)
        np.testing.assert_allclose(variance, f.var(0), rtol=1e-5)
        two = decompose((f[:25] + f[25:]) / 2, y)
        np.testing.assert_allclose(two.bias_squared, bias_squared, rtol=1e-4)
        assert np.all(two.variance < variance)
        with pytest.raises(ValueError, match=r"predictions must have shape \[draws, ...\]"):
            bias_variance_of_predictions(f[:0], y)
        with pytest.raises(ValueError, match="targets must broadcast"):
            bias_variance_of_predictions(f, y[:2])
