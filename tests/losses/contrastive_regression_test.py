from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxref import losses

PEER = np.load(Path(__file__).parents[1] / "oracles" / "contrastive_regression.npz")


def unit(x):
    return np.float64(x) / np.linalg.norm(np.float64(x), axis=-1, keepdims=True)


def literal(features, targets, predictions, eta, w, t, e, pushing):
    """Example by example in float64."""
    v, (y, p) = unit(features), (np.float64(x).reshape(len(x), -1) for x in (targets, predictions))
    distance, predicted = (np.linalg.norm(x[:, None] - x, axis=-1) for x in (y, p))
    values = np.zeros(len(v))
    for i in range(len(v)):
        positives = [j for j in range(len(v)) if j != i and distance[i, j] <= w]
        negatives = [j for j in range(len(v)) if distance[i, j] > w and predicted[i, j] <= w]
        if not positives or not negatives:
            continue
        far = distance[i, negatives]
        push = eta[i] * (np.exp(e * far) if pushing == "exponential" else e * far)
        total = np.exp(v[positives] @ v[i] / t).sum() + push @ np.exp(v[negatives] @ v[i] / t)
        values[i] = eta[i] * np.mean([np.log(total) - v[j] @ v[i] / t for j in positives])
    return values


def batch(number=12, k=None, seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.uniform(0, 3, size=number if k is None else (number, k))
    predictions = targets + 0.7 * rng.normal(size=targets.shape)
    arrays = rng.normal(size=(number, 5)), targets, predictions, rng.uniform(0.5, 2, size=number)
    return [x.astype("f") for x in arrays]


class TestNumbers:
    def test_value_and_gradient_are_the_authors_without_their_extra_terms(self):
        """Theirs also have exp(0) in the denominator for each example that is no positive."""
        targets, predictions, eta = (PEER[k] for k in ("targets", "predictions", "weights"))
        alike = (np.abs(targets[:, None] - targets) <= 2) & ~np.eye(12, dtype=bool)

        @jax.jit
        @jax.value_and_grad
        def release(features):
            ours = losses.conr_loss(
                features, targets, predictions, similarity_window=2, push_scale=0.1,
                sample_weights=eta,
            ) / eta  # fmt: skip
            v = features / jnp.linalg.norm(features, axis=1, keepdims=True)
            attraction = jnp.mean(v @ v.T / 0.07, axis=1, where=alike)
            total = jnp.exp(ours + attraction) + (~alike).sum(axis=1)
            return jnp.mean(jnp.where(ours > 0, eta * (jnp.log(total) - attraction), 0))

        value, gradient = release(PEER["features"])
        np.testing.assert_allclose(value, PEER["loss"], rtol=1e-5)
        np.testing.assert_allclose(gradient, PEER["grad"], rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(("k", "pushing"), [(None, "linear"), (2, "exponential")])
    def test_matches_the_literal_formula_and_masks(self, k, pushing):
        *arrays, eta = batch(k=k)
        eta[4] = 0
        options = {"similarity_window": 0.8, "push_scale": 0.5, "temperature": 0.3}
        loss = partial(losses.conr_loss, pushing=pushing, **options)
        where = np.arange(12) % 5 != 2

        @jax.jit
        def run(features, where):
            def total(features):
                values = loss(features, *arrays[1:], sample_weights=eta, where=where)
                return jnp.sum(values), values

            return jax.value_and_grad(total, has_aux=True)(features)

        (_, found), _ = run(arrays[0], jnp.ones(12, bool))
        expected = literal(*arrays, eta, 0.8, 0.3, 0.5, pushing)
        assert 3 < np.count_nonzero(expected) < 12
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        poisoned = np.where(where[:, None], arrays[0], np.nan)
        (_, found), gradient = run(poisoned, where)
        expected = literal(*(x[where] for x in (*arrays, eta)), 0.8, 0.3, 0.5, pushing)
        np.testing.assert_allclose(found[where], expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(found[~where], 0)
        assert np.all(np.isfinite(gradient))


class TestClaims:
    @pytest.mark.claim("conr")
    def test_pushes_what_is_confused_the_harder_the_farther_its_label(self):
        """Seen in the gradients of similarities: features are rows of an orthogonal frame."""
        targets = np.array([30, 31, 40, 60, 35], "f")
        confused = np.array([30, 30, 30, 30, 50], "f")
        frame = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0].astype("f")

        @jax.jit
        def run(features, predictions, eta):
            loss = partial(losses.conr_loss, targets=targets, predictions=predictions)
            values, pull = jax.vjp(lambda f: loss(f, sample_weights=eta), features)
            return values, pull(jnp.eye(5)[0])[0]  # of the first example's loss

        value, gradient = run(frame, confused, jnp.ones(5))
        slopes = frame @ gradient[0]  # with respect to its similarities with all
        assert slopes[1] < 0 < slopes[2] < slopes[3]  # 1 year apart, then 10 and 30
        np.testing.assert_allclose(slopes[3] / slopes[2], np.exp(0.2), rtol=1e-4)
        np.testing.assert_allclose(slopes[4], 0, atol=1e-5)  # not taken for alike
        np.testing.assert_allclose(-slopes[1], slopes[2] + slopes[3], rtol=1e-4)
        rare_value, rare = run(frame, confused, jnp.full(5, 3.0))
        assert np.all(np.asarray(frame @ rare[0])[2:4] > 3 * slopes[2:4])
        for predictions in (targets, targets + 5):  # nothing is confused
            right, none = run(frame, predictions, jnp.ones(5))
            np.testing.assert_array_equal(right, 0)
            np.testing.assert_array_equal(none, 0)
        lengths = np.array([[0.5], [2], [1], [10], [3]], "f")
        np.testing.assert_allclose(run(lengths * frame, confused, jnp.ones(5))[0], value, rtol=1e-5)
        assert rare_value[0] > 3 * value[0] > 0


@pytest.mark.parametrize("ring", [False, True], ids=["gathered", "ring"])
def test_eight_devices_have_the_values_and_gradient_of_one(ring):
    features, targets, predictions, eta = batch(24)
    where = np.arange(24) % 7 != 3
    weights = 1 + jnp.arange(24.0)

    def loss(features, targets, predictions, eta, where, **options):
        return losses.conr_loss(
            features, targets, predictions, similarity_window=0.6, temperature=0.5,
            sample_weights=eta, where=where, **options,
        )  # fmt: skip

    sharded = jax.shard_map(
        partial(loss, axis_name="data", ring=ring),
        mesh=jax.make_mesh((8,), ("data",), (AxisType.Auto,)),
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec("data"),
    )

    def total(features, function):
        values = function(features, targets, predictions, eta, where)
        return jnp.mean(weights * values), values

    found, expected = (
        jax.jit(jax.value_and_grad(partial(total, function=f), has_aux=True))(features)
        for f in (sharded, loss)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


class TestEdges:
    def test_extremes_are_finite_and_half_precision_computes_in_float32(self):
        features, targets, predictions, eta = batch(6)
        features[1], features[2] = 0, 1e18
        targets = np.array([0, 0, 0, 1e4, -1e4, 5], "f")
        predictions[:] = 0

        @jax.jit
        def run(features):
            loss = partial(losses.conr_loss, targets=targets, predictions=predictions)
            values, pull = jax.vjp(partial(loss, push_scale=1.0, sample_weights=eta), features)
            return values, pull(jnp.ones_like(values))[0]

        values, gradient = run(features)
        assert np.all(np.isfinite(values))
        assert np.all(np.isfinite(gradient))
        np.testing.assert_array_equal(gradient[1], 0)
        assert np.all(values[:3] > 1e3)
        half = jnp.asarray(features, jnp.bfloat16)
        found, _ = run(half)
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, run(half.astype("f"))[0].astype(jnp.bfloat16))

    def test_one_example_has_nothing_to_compare(self):
        features, targets, predictions, _ = batch(1)
        slope = jax.value_and_grad(lambda f: losses.conr_loss(f, targets, predictions)[0])
        value, gradient = jax.jit(slope)(features)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)

    def test_bad_input(self):
        features, targets, predictions, eta = batch(4)
        call = partial(losses.conr_loss, features, targets, predictions)
        for name, value in (("similarity_window", -1), ("temperature", 0), ("push_scale", -1)):
            with pytest.raises(ValueError, match=f"{name} must be in"):
                call(**{name: value})
        with pytest.raises(ValueError, match="pushing must be 'exponential' or 'linear'"):
            call(pushing="quadratic")
        with pytest.raises(ValueError, match="sample_weights must be in"):
            call(sample_weights=-eta)
        with pytest.raises(ValueError, match=r"predictions must have shape \(4,\), got \(3,\)"):
            losses.conr_loss(features, targets, predictions[:3])
        with pytest.raises(ValueError, match=r"targets must have shape \(4,\) or \(4, k\)"):
            losses.conr_loss(features, targets[:3], predictions)
        with pytest.raises(ValueError, match=r"features must have shape \[batch, features\]"):
            losses.conr_loss(features[0], targets, predictions)
        with pytest.raises(TypeError, match="features must have a floating-point type"):
            losses.conr_loss(features.astype(int), targets, predictions)
