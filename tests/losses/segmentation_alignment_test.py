from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref import losses

PEER = np.load(Path(__file__).parents[1] / "oracles" / "segmentation.npz")


def half_plane(column, shape=(1, 12, 12)):
    labels = np.zeros(shape, int)
    labels[..., column:] = 1
    return labels


class TestActiveBoundary:
    def test_matches_the_authors(self):
        distance = np.floor(losses.label_boundary_distance(PEER["moved_labels"]))
        assert np.array_equal(distance, PEER["active_distance"])  # whole numbers there
        loss = lambda z: losses.active_boundary_loss(
            z, distance, label_smoothing=0.0, max_boundary_fraction=0.5
        )
        value, gradient = jax.jit(jax.value_and_grad(loss))(PEER["moved_logits"])
        np.testing.assert_allclose(value, PEER["active_boundary"], rtol=1e-4)
        expected = np.moveaxis(PEER["active_boundary_gradient"], 1, -1)
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-6)

    def test_a_step_moves_the_predicted_boundary_towards_the_true_one(self):
        """The descent step is the larger, the further up the gradient points to the right."""
        labels = half_plane(8)
        distance = losses.label_boundary_distance(labels)
        z = (3.0 * np.eye(2)[half_plane(4)]).astype(np.float32)
        run = jax.jit(
            jax.value_and_grad(
                lambda z: losses.active_boundary_loss(z, distance, max_boundary_fraction=0.3)
            )
        )
        value, gradient = run(z)
        # Just right of the boundary pixels become more like the background, which lets it move.
        evidence = np.asarray(gradient)[0, 5, :, 1] - np.asarray(gradient)[0, 5, :, 0]
        assert value > 0
        assert evidence[4] > 0
        assert np.all(evidence[8:] == 0)
        aligned = (3.0 * np.eye(2)[labels]).astype(np.float32)
        assert run(aligned)[0] < value / 5

    def test_only_so_many_pixels_are_boundary_and_smoothing_spreads_the_target(self):
        rng = np.random.default_rng(0)
        z = rng.normal(size=(1, 10, 10, 3)).astype(np.float32)
        distance = rng.integers(1, 9, size=(1, 10, 10)).astype(np.float32)
        loss = lambda **k: losses.active_boundary_loss(z, distance, **k)
        # no pixel of a hundred may be one at half a percent
        assert loss(max_boundary_fraction=0.005) == 0
        plain, smoothed, even = (loss(label_smoothing=s) for s in (0.0, 0.4, 7 / 8))
        # linear in the smoothing
        np.testing.assert_allclose(smoothed, plain + (even - plain) * 0.4 / (7 / 8), rtol=1e-5)

    def test_bad_input_is_named(self):
        z, distance = np.zeros((1, 4, 4, 2), np.float32), np.zeros((1, 4, 4))
        with pytest.raises(ValueError, match="boundary_distance must have shape"):
            losses.active_boundary_loss(z, distance[0])
        with pytest.raises(ValueError, match="logits must have shape"):
            losses.active_boundary_loss(z[0], distance[0])
        with pytest.raises(ValueError, match="truncation must be in"):
            losses.active_boundary_loss(z, distance, truncation=0.0)


class TestInverseForm:
    @staticmethod
    def network(parameters, a, b):
        """The authors' form: both maps, flattened, through a perceptron to a transform."""
        x = jnp.concatenate([a.reshape(len(a), -1), b.reshape(len(b), -1)], axis=1)
        for weights in parameters[:-1]:
            x = jax.nn.relu(x @ weights)
        return (x @ parameters[-1]).reshape(-1, 2, 3)

    def test_is_the_mean_distance_from_the_identity_over_the_tiles(self):
        rng = np.random.default_rng(0)
        maps = rng.uniform(size=(2, 2, 6, 4)).astype(np.float32)
        sizes = ((8, 5), (5, 6))
        parameters = [rng.normal(size=size).astype(np.float32) for size in sizes]
        run = lambda p, y: losses.inverse_form_loss(
            p, y, transform_network=lambda a, b: self.network(parameters, a, b), tile_size=2
        )
        expected = []
        for p, y in zip(*maps.astype(np.float64)):
            norms = []
            for i in range(0, 6, 2):
                for j in range(0, 4, 2):
                    x = np.r_[p[i : i + 2, j : j + 2].ravel(), y[i : i + 2, j : j + 2].ravel()]
                    theta = np.maximum(x @ parameters[0], 0) @ parameters[1]
                    norms.append(np.linalg.norm(theta.reshape(2, 3) - np.eye(2, 3)))
            expected.append(np.mean(norms))
        np.testing.assert_allclose(jax.jit(run)(*maps), expected, rtol=1e-5)

    def test_a_matching_form_costs_nothing_and_a_shifted_one_little(self):
        """A network that finds the shift between two maps by their centres of mass."""

        def shift(a, b):
            centre = lambda x: jnp.sum(x * jnp.arange(12.0), axis=(1, 2)) / jnp.sum(x, axis=(1, 2))
            offset = jnp.zeros((len(a), 2, 3)).at[:, 0, 2].set(centre(a) - centre(b))
            return jnp.eye(2, 3) + offset / 12

        line = (np.arange(12) == 4) * np.ones((1, 12, 1), np.float32)
        run = jax.jit(lambda p, y: losses.inverse_form_loss(p, y, transform_network=shift))
        costs = [run(np.roll(line, step, axis=2), line)[0] for step in (0, 1, 5)]
        np.testing.assert_allclose(costs, [0, 1 / 12, 5 / 12], rtol=1e-5)
        gradient = jax.grad(lambda p: run(p, line).sum())(line)
        assert np.all(np.isfinite(gradient))

    def test_bad_input_is_named(self):
        p = np.zeros((1, 6, 4), np.float32)
        identity = lambda a, b: jnp.broadcast_to(jnp.eye(2, 3), (len(a), 2, 3))
        with pytest.raises(ValueError, match="tile_size must divide"):
            losses.inverse_form_loss(p, p, transform_network=identity, tile_size=4)
        with pytest.raises(ValueError, match="boundaries must have shape"):
            losses.inverse_form_loss(p[0], p[0], transform_network=identity)
        with pytest.raises(ValueError, match="one matrix for each of 6 tiles"):
            losses.inverse_form_loss(p, p, transform_network=lambda a, b: a[0], tile_size=2)


class TestConditionalBoundary:
    def random_input(self):
        rng = np.random.default_rng(0)
        shape = (2, 6, 7)
        labels = rng.integers(3, size=shape)
        logits = 2 * np.eye(3)[labels] + rng.normal(size=(*shape, 3))
        features = rng.normal(size=(*shape, 4))
        boundary = rng.uniform(size=shape) < 0.4
        return features, labels, logits, boundary, rng.normal(size=(4, 3))

    @staticmethod
    def literal(features, labels, logits, boundary, weights, window):
        """The three means, pixel by pixel, and the gradient of the first with its centres fixed."""
        correct = logits.argmax(-1) == labels
        reach, pulls, entropies, pairs = window // 2, [], [], []
        slope = np.zeros(features.shape)
        _, height, width = labels.shape
        for b, i, j in zip(*np.nonzero(boundary)):
            near = [
                (b, u, v)
                for u in range(max(0, i - reach), min(height, i + reach + 1))
                for v in range(max(0, j - reach), min(width, j + reach + 1))
                if (u, v) != (i, j) and correct[b, u, v]
            ]
            same = [n for n in near if labels[n] == labels[b, i, j]]
            if not same:
                continue
            f, centre = features[b, i, j], np.mean([features[n] for n in same], axis=0)
            pulls.append(np.mean((f - centre) ** 2))
            slope[b, i, j] = 2 * (f - centre) / f.size
            scores = centre @ weights
            entropies.append(np.log(np.exp(scores).sum()) - scores[labels[b, i, j]])
            for n in near:
                cosine = f @ features[n] / np.linalg.norm(f) / np.linalg.norm(features[n])
                pairs.append((cosine - (n in same)) ** 2)
        means = [np.mean(terms) for terms in (pulls, entropies, pairs)]
        return means, slope / len(pulls)

    @pytest.mark.parametrize("window", [3, 5])
    def test_matches_the_definition(self, window):
        features, labels, logits, boundary, weights = self.random_input()
        expected, slope = self.literal(features, labels, logits, boundary, weights, window)
        loss = lambda f, a, b, c: losses.conditional_boundary_loss(
            f,
            labels,
            logits=logits,
            boundary=boundary,
            classifier=lambda x: x @ weights,
            window=window,
            centre_weight=a,
            classification_weight=b,
            pair_weight=c,
        )
        run = jax.jit(jax.value_and_grad(loss))
        f = features.astype(np.float32)
        for i in range(3):
            ours, gradient = run(f, *np.eye(3)[i])
            np.testing.assert_allclose(ours, expected[i], rtol=1e-4)
            if i == 0:
                np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-7)
        ours, _ = run(f, 2.0, 0.2, 1.0)
        np.testing.assert_allclose(ours, np.dot(expected, (2, 0.2, 1)), rtol=1e-4)

    def test_features_at_a_boundary_part(self):
        """Descent on mixed features of two halves: within a side they agree, across they do not."""
        rng = np.random.default_rng(0)
        labels = half_plane(4, (1, 6, 8))
        logits = np.eye(2)[labels]
        boundary = np.isin(np.arange(8), (3, 4)) & np.ones((1, 6, 8), bool)
        features = (1 + 0.3 * rng.normal(size=(1, 6, 8, 3))).astype(np.float32)
        weights = rng.normal(size=(3, 2)).astype(np.float32)
        loss = lambda f: losses.conditional_boundary_loss(
            f, labels, logits=logits, boundary=boundary, classifier=lambda x: x @ weights
        )
        step = lambda f, _: (f - 3.0 * jax.grad(loss)(f), None)
        after = np.asarray(jax.jit(lambda f: jax.lax.scan(step, f, length=60)[0])(features))

        def cosine(f, u, v):
            a, b = f[0, 1:-1, u], f[0, 1:-1, v]
            return np.mean(
                (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
            )

        assert cosine(features, 3, 4) > 0.8
        assert cosine(after, 3, 4) < 0.3
        assert cosine(after, 3, 2) > 0.8

    def test_bad_input_is_named(self):
        features, labels, logits, boundary, _ = self.random_input()
        features = features.astype(np.float32)
        arguments = {"logits": logits, "boundary": boundary, "classifier": jnp.sin}
        with pytest.raises(ValueError, match="window be odd"):
            losses.conditional_boundary_loss(features, labels, window=4, **arguments)
        arguments["boundary"] = boundary[:1]
        with pytest.raises(ValueError, match="boundary must have shape"):
            losses.conditional_boundary_loss(features, labels, **arguments)
