"""The numbers, shards and edges of its loss are in tests/losses/angular_margin_test.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref import adaptation, losses


class TestClaims:
    @pytest.mark.claim("hyperspherical-novel-class")
    def test_unseen_classes_join_a_trained_head_without_training(self):
        """Seven of ten directions have a trained class vector; three get theirs from five examples
        each. Embeddings differ in length by class."""
        rng = np.random.default_rng(0)
        centres = rng.normal(size=(10, 16))
        centres *= np.geomspace(1, 12, 10)[:, None] / np.linalg.norm(centres, axis=1, keepdims=True)

        def sample(label, number):
            noise = rng.normal(size=(number, 16)) * np.linalg.norm(centres[label]) / 6
            return (centres[label] + noise).astype("f")

        head = np.float32(centres[:7] / np.linalg.norm(centres[:7], axis=1, keepdims=True))
        supports = np.stack([sample(k, 5) for k in range(7, 10)])
        queries = np.concatenate([sample(k, 20) for k in range(10)])
        truth = np.repeat(np.arange(10), 20)

        @jax.jit
        def classify(head, supports, queries):
            joint = head
            for support in supports:
                joint = adaptation.imprint_class(joint, support)
            disjoint = adaptation.novel_class_head(
                supports.reshape(15, 16), jnp.repeat(jnp.arange(3), 5), 3
            )
            own = losses.normalized_softmax_logits(supports[0, :1], joint[7:8] * 0 + supports[0, 0])
            return joint, disjoint, losses.normalized_softmax_logits(queries, joint), own

        joint, disjoint, logits, own = classify(head, supports, queries)
        np.testing.assert_array_equal(joint[:7], head)
        np.testing.assert_allclose(joint[7:], disjoint, atol=1e-6)
        np.testing.assert_allclose(own, 10, rtol=1e-6)  # its own cosine is 1
        right = np.mean(np.argmax(logits, 1) == truth)
        means = supports.mean(1)
        plain = queries @ np.concatenate([head, means]).T
        assert right > 0.9
        assert np.mean(np.argmax(plain, 1) == truth) < right - 0.1

    def test_lengths_have_no_part_in_it(self):
        rng = np.random.default_rng(0)
        e, w = (rng.normal(size=(n, 4)).astype("f") for n in (5, 3))
        y = np.array([0, 1, 2, 1, 0])
        loss = jax.jit(losses.normalized_softmax_loss)
        expected = loss(e, w, y)
        stretched = loss(
            e * rng.uniform(0.1, 9, (5, 1)).astype("f"), w * np.array([[2.0], [0.3], [7]], "f"), y
        )
        np.testing.assert_allclose(stretched, expected, rtol=1e-5)
        soft = loss(e, w, np.eye(3, dtype="f")[y])
        np.testing.assert_allclose(soft, expected, rtol=1e-5)


class TestMinimumScale:
    @pytest.mark.parametrize("classes", [2, 5])
    def test_simplex_attains_the_probability(self, classes):
        corners = (np.eye(classes) - 1 / classes).astype("f")
        cosines = np.float64(corners @ corners.T / (corners[0] @ corners[0]))
        for p in (0.6, 0.99):
            z = np.exp(float(losses.minimum_scale(classes, p)) * cosines)
            np.testing.assert_allclose(np.diag(z) / z.sum(1), p, rtol=1e-4)
        assert losses.minimum_scale(classes, 0.1) == 0

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match="num_classes must be in"):
            losses.minimum_scale(1, 0.5)
        with pytest.raises(ValueError, match="probability must be in"):
            losses.minimum_scale(3, 1.0)
