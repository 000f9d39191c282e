from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxref import losses

PEER = np.load(Path(__file__).parents[1] / "oracles" / "forecasting.npz")
EDGES = np.array([-1.0, 0.0, 1.0, 3.0], "f")


@jax.jit
def value_and_gradients(predictions, logits, targets, edges, weight, class_where, where):
    def loss(*heads):
        return losses.regression_classification_loss(
            *heads, targets, edges, regression_weight=weight, class_where=class_where, where=where
        )

    value, vjp = jax.vjp(loss, predictions, logits)
    return value, vjp(jnp.ones_like(value))


def batch(size=6):
    rng = np.random.default_rng(0)
    targets = np.array([-5.0, -0.5, 0.0, 0.9, 2.0, 3.0])[:size]
    heads = rng.normal(size=size), rng.normal(size=(size, 3))
    return *(x.astype("f") for x in heads), targets.astype("f")


class TestNumbers:
    def test_values_and_gradients_match_the_authors(self):
        """Whose loss is the mean, of the class term over the examples that have a label."""
        labels = PEER["class_labels"]
        # any edges do that put the labels where they are: targets sorted by their label
        targets, edges = np.where(labels < 0, 0, labels) + 0.5, np.arange(4.0)
        shift = targets - PEER["class_targets"]
        arguments = PEER["class_predictions"] + shift, PEER["class_logits"], targets
        arguments = [x.astype("f") for x in arguments]
        with_class = value_and_gradients(*arguments, edges, 10.0, labels >= 0, True)
        alone = value_and_gradients(*arguments, edges, 10.0, False, True)
        number = np.sum(labels >= 0)
        expected = PEER["class_value"]
        np.testing.assert_allclose(
            alone[0].mean() + (with_class[0] - alone[0]).sum() / number, expected, rtol=1e-5
        )
        np.testing.assert_allclose(with_class[1][0] / 6, PEER["class_gradient"], rtol=1e-4)
        gradient = with_class[1][1] / number
        np.testing.assert_allclose(gradient, PEER["class_logits_gradient"], rtol=1e-4, atol=1e-7)

    @pytest.mark.parametrize("i", range(3))
    def test_equalized_edges_match_the_authors(self, i):
        histogram, expected = PEER[f"histogram{i}"], PEER[f"edges{i}"]
        edges, counts = losses.histogram_equalized_edges(
            histogram, np.arange(histogram.size + 1) / 2
        )
        np.testing.assert_array_equal(edges, expected)
        np.testing.assert_array_equal(counts, PEER[f"counts{i}"])

    def test_equalized_counts_are_those_of_the_targets(self):
        targets = np.random.default_rng(0).gamma(2.0, size=3000)
        plain, equal = (losses.target_bins(targets, 32, equalize=e) for e in (False, True))
        np.testing.assert_allclose(plain, np.histogram_bin_edges(targets, 32), rtol=1e-6)
        counts = [
            np.bincount(losses.bin_targets(targets, edges), minlength=len(edges) - 1)
            for edges in (plain, equal)
        ]
        assert counts[1].min() > 0
        assert counts[1].max() / counts[1].min() < counts[0].max() / max(counts[0].min(), 1) / 10
        histogram = np.histogram(targets, 32)
        np.testing.assert_array_equal(counts[1], losses.histogram_equalized_edges(*histogram)[1])

    def test_classes_of_targets(self):
        targets = np.array([-7.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 9.0], "f")
        found = losses.bin_targets(targets, EDGES)
        np.testing.assert_array_equal(found, [0, 0, 0, 1, 1, 2, 2, 2])
        assert found.dtype == jnp.int32
        edges = losses.target_bins(np.arange(10), 4)
        centers = (edges[1:] + edges[:-1]) / 2
        np.testing.assert_array_equal(jax.jit(losses.bin_targets)(centers, edges), np.arange(4))
        np.testing.assert_array_equal(losses.target_bins([2.0, 2.0], 2), [1.5, 2, 2.5])


class TestClaims:
    @pytest.mark.claim("classification-helps-regression")
    def test_a_class_beside_the_number_helps_where_the_targets_are_crowded(self):
        """The paper's curve, learnt from targets about one height: ten networks, tested on all."""
        curve = lambda x: 0.5 * np.sin(12 * x) + np.sin(3 * x)
        rng = np.random.default_rng(1)

        def sampled(size, density):
            """Points whose targets are distributed as `density` says, whatever the curve does."""
            x = rng.uniform(-1, 1, size=20000)
            height = (curve(x) + 1.4) / 2.8
            count, ends = np.histogram(height, 16, (0, 1))
            weight = density(height) / count[np.digitize(height, ends[1:-1])]
            x = rng.choice(x, size, p=weight / weight.sum())
            return x.astype("f"), curve(x).astype("f")

        peak = lambda height: np.exp(-(((height - 0.82) / 0.1) ** 2)) + 0.02
        sets = [sampled(300, peak) for _ in range(10)]
        x, y = (np.stack(part) for part in zip(*sets))
        edges = np.stack([losses.target_bins(targets, 8) for targets in y])
        test_x, test_y = sampled(400, np.ones_like)
        shapes = {"a": (1, 20), "b": (20, 20), "number": (20, 1), "class": (20, 8)}
        weights = {
            name: (np.sqrt(2 / sum(shape)) * rng.normal(size=(10, *shape))).astype("f")
            for name, shape in shapes.items()
        }
        weights |= {f"{name}_bias": np.zeros((10, 1, s[1]), "f") for name, s in shapes.items()}

        def network(w, x):
            layer = lambda name, h: h @ w[name] + w[f"{name}_bias"]
            features = jax.nn.relu(layer("a", x[..., None]))
            features = jax.nn.relu(layer("b", features))
            return layer("number", features)[..., 0], layer("class", features)

        optimizer = optax.adam(0.01)

        @jax.jit
        def test_error(has_class):
            options = {"regression_weight": 10.0, "class_where": has_class}
            each = jax.vmap(partial(losses.regression_classification_loss, **options))
            loss = lambda w: each(*network(w, x), y, edges).sum() / 300

            def step(_, carried):
                w, state = carried
                updates, state = optimizer.update(jax.grad(loss)(w), state)
                return optax.apply_updates(w, updates), state

            w, _ = jax.lax.fori_loop(0, 400, step, (weights, optimizer.init(weights)))
            forecast = network(w, np.broadcast_to(test_x, (10, 400)))[0]
            return jnp.square(forecast - test_y).mean(axis=1)

        alone, helped = (np.asarray(test_error(has_class)) for has_class in (False, True))
        assert np.mean(helped) < 0.85 * np.mean(alone)
        assert np.sum(helped < alone) >= 6


class TestEdges:
    def test_weight_0_is_the_class_alone_and_one_class_the_number_alone(self):
        predictions, logits, targets = batch()
        labels = np.array([0, 0, 1, 1, 2, 2])
        value, gradients = value_and_gradients(predictions, logits, targets, EDGES, 0.0, True, True)
        expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        assert np.all(gradients[0] == 0)
        value, gradients = value_and_gradients(
            predictions, logits[:, :1], targets, EDGES[[0, 3]], 2.0, True, True
        )
        np.testing.assert_allclose(value, 2 * (predictions - targets) ** 2, rtol=1e-5)
        np.testing.assert_allclose(gradients[0], 4 * (predictions - targets), rtol=1e-5)
        assert np.all(gradients[1] == 0)

    def test_masks(self):
        predictions, logits, targets = batch()
        whole = value_and_gradients(predictions, logits, targets, EDGES, 3.0, True, True)
        where, class_where = np.arange(6) < 4, np.arange(6) % 2 == 0
        poisoned = [x.copy() for x in (predictions, logits, targets)]
        for x in poisoned:
            x[4:] = np.nan
        value, gradients = value_and_gradients(*poisoned, EDGES, 3.0, class_where, where)
        number = 3 * (predictions - targets) ** 2
        expected = np.where(class_where, whole[0], number) * where
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_allclose(gradients[0], whole[1][0] * where, rtol=1e-5)
        kept = (where & class_where)[:, None]
        np.testing.assert_allclose(gradients[1], whole[1][1] * kept, rtol=1e-5)

    def test_half_precision_and_far_logits(self):
        predictions, logits, targets = batch()
        half = [x.astype(jnp.bfloat16) for x in (predictions, logits)]
        loss = jax.jit(losses.regression_classification_loss)
        ours = loss(*half, targets, EDGES)
        assert ours.dtype == jnp.bfloat16
        wide = loss(*(x.astype("f") for x in half), targets, EDGES).astype(jnp.bfloat16)
        np.testing.assert_array_equal(np.asarray(ours, "f"), np.asarray(wide, "f"))
        far = value_and_gradients(predictions, 1e4 * logits, targets, EDGES, 1.0, True, True)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(far))

    def test_balanced_classes(self):
        labels = np.repeat(np.arange(4), [4000, 1000, 250, 50])
        counts = np.array([4000, 1000, 250, 0])
        kept = losses.balanced_class_mask(labels, counts, key=jax.random.key(0))
        number = np.bincount(labels, weights=kept)
        np.testing.assert_allclose(number[:3], 250, rtol=0.2)
        assert number[2] == 250
        assert number[3] == 0
        assert not np.any(losses.balanced_class_mask(labels - 10, counts, key=jax.random.key(0)))

    def test_bad_input_is_named(self):
        predictions, logits, targets = batch()
        loss = partial(losses.regression_classification_loss)
        with pytest.raises(ValueError, match="edges must be in ascending order"):
            loss(predictions, logits, targets, EDGES[::-1])
        with pytest.raises(ValueError, match=r"edges must have shape \[classes \+ 1\]"):
            loss(predictions, logits, targets, EDGES[:1])
        with pytest.raises(ValueError, match=r"class_logits must have shape \(6, 2\)"):
            loss(predictions, logits, targets, EDGES[:3])
        with pytest.raises(ValueError, match=r"targets must have shape \(6,\)"):
            loss(predictions, logits, targets[:2], EDGES)
        with pytest.raises(ValueError, match="regression_weight must be in"):
            loss(predictions, logits, targets, EDGES, regression_weight=-1.0)
        with pytest.raises(ValueError, match="class_where must broadcast"):
            loss(predictions, logits, targets, EDGES, class_where=np.ones(3, bool))
        with pytest.raises(TypeError, match="predictions must have a floating-point type"):
            loss(predictions.astype(int), logits, targets, EDGES)
        with pytest.raises(TypeError, match="bins must be an integer"):
            losses.target_bins(targets, 2.5)
        with pytest.raises(ValueError, match="bins must be in"):
            losses.target_bins(targets, 0)
        with pytest.raises(ValueError, match="targets must have at least one number"):
            losses.target_bins([], 2)
        with pytest.raises(ValueError, match="targets must be in"):
            losses.target_bins([0.0, np.nan], 2)
        with pytest.raises(ValueError, match="histogram must have a bin that is not empty"):
            losses.histogram_equalized_edges([0, 0], [0, 1, 2])
        with pytest.raises(ValueError, match=r"edges must have shape \(3,\)"):
            losses.histogram_equalized_edges([1, 0], [0, 1])
        key = jax.random.key(0)
        with pytest.raises(TypeError, match="labels must be integers"):
            losses.balanced_class_mask(targets, [1, 2], key=key)
        with pytest.raises(ValueError, match="counts must be in"):
            losses.balanced_class_mask([0], np.array([-1, 2]), key=key)
