from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.ndimage
from flax import nnx
from sklearn.datasets import load_digits

from jaxref import losses
from jaxref.nn import ConceptBottleneck, concept_matrix, concept_matrix_search

PEER = np.load(Path(__file__).parents[1] / "oracles" / "concept_bottleneck.npz")
IMAGES, CLASSES, CONCEPTS = (PEER[name].astype("f") for name in ("images", "classes", "concepts"))

matrix = jax.jit(concept_matrix)
search = jax.jit(concept_matrix_search, static_argnames="cubed")


class TestConceptBottleneck:
    def test_two_maps_without_bias_that_share_the_activations(self):
        bottleneck = ConceptBottleneck(5, 3, rngs=nnx.Rngs(0))
        u = np.random.default_rng(0).normal(size=(2, 4, 5)).astype("f")
        w, v = bottleneck.concepts.kernel[...], bottleneck.head.kernel[...]
        concepts, logits = nnx.jit(lambda module, u: module(u))(bottleneck, u)
        np.testing.assert_allclose(concepts, u @ w, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(logits, u @ w @ v, rtol=1e-4, atol=1e-6)
        assert len(jax.tree.leaves(nnx.state(bottleneck))) == 2
        with pytest.raises(ValueError, match=r"x must have shape \[..., 5\]"):
            bottleneck(u[..., :4])


class TestConceptMatrixSearch:
    def test_matches_the_release(self):
        images, classes = (matrix(x, CONCEPTS) for x in (IMAGES, CLASSES))
        np.testing.assert_allclose(images, PEER["image_matrix"], rtol=1e-4)
        for cubed, name in ((False, "cosine"), (True, "cubed")):
            ours = search(images, classes, cubed=cubed)
            np.testing.assert_allclose(ours, PEER[name], rtol=1e-4, atol=1e-6)

    def test_scale_does_not_matter_and_images_find_themselves(self):
        images = matrix(IMAGES, CONCEPTS)
        scaled = matrix(7 * IMAGES, CONCEPTS * np.arange(1, 8, dtype="f")[:, None])
        np.testing.assert_allclose(images, scaled, rtol=1e-4, atol=1e-6)
        for cubed in (False, True):
            found = np.asarray(search(np.float32(1e-20) * images, images, cubed=cubed))
            np.testing.assert_array_equal(np.argmax(found, axis=-1), np.arange(4))
            np.testing.assert_allclose(np.diag(found), 1, rtol=1e-5)

    def test_zero_vectors_half_precision_and_bad_input(self):
        zero = matrix(np.zeros((4, 6), "f"), CONCEPTS)
        assert np.all(zero == 0)
        assert np.all(search(zero, zero) == 0)
        half = jnp.asarray(CONCEPTS, jnp.bfloat16)  # whose cosines do not cancel with their own
        ours, expected = matrix(half, half), matrix(half.astype("f"), half.astype("f"))
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(ours), expected, rtol=1e-2, atol=1e-2)
        with pytest.raises(ValueError, match=r"concepts must have shape \[n, 6\]"):
            concept_matrix(IMAGES, CONCEPTS[:, :5])
        with pytest.raises(ValueError, match=r"class_concepts must have shape \[n, 7\]"):
            concept_matrix_search(np.zeros((1, 7), "f"), CLASSES)
        with pytest.raises(TypeError, match="image_concepts must have a floating-point type"):
            concept_matrix_search(np.ones((2, 2), int), np.ones((2, 2)))


def concepts_of(images):
    """21 concepts of images `[n, 8, 8]` in [0, 1]: the ink in each of 4 x 4 parts, the number of
    areas without ink (the holes and the ground), how like its mirror images it is, from left to
    right and from top to bottom, and how much the ink changes down the columns and along the rows.
    """
    ink = images.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)
    areas = [scipy.ndimage.label(np.pad(image, 1) < 0.3)[1] for image in images]
    mirrored = [-np.abs(images - np.flip(images, axis)).mean((1, 2)) for axis in (2, 1)]
    changes = [np.abs(np.diff(images, axis=axis)).sum((1, 2)) for axis in (1, 2)]
    return np.column_stack([ink, areas, *mirrored, *changes])


class TestTraining:
    def test_a_penalty_leaves_few_weights_and_named_concepts_can_be_corrected(self):
        """Digits are classified from concepts that are read from them through noise. An L1 penalty
        leaves a third of the weights, for the accuracy of cross-entropy alone, and a tenth together
        with the similarity of each activation with its concept. Then predictions become right as
        more of the activations, at random, are set to what goes with the concept of the image
        without noise; where cross-entropy alone made the activations, they become wrong."""
        digits, rng = load_digits(), np.random.default_rng(0)
        train, test = slice(0, 800), slice(800, 1797)

        def split(seed):
            order = np.random.default_rng(seed).permutation(1797)
            images = digits.images[order] / 16
            noisy = np.clip(images + 0.4 * rng.normal(size=images.shape), 0, 1)
            both = [concepts_of(x) for x in (noisy, images)]
            return [((x - x[train].mean(0)) / x[train].std(0)) for x in both] + [
                digits.target[order]
            ]

        read, true, labels = map(np.stack, zip(*map(split, range(2))))
        num_concepts = read.shape[-1]

        def trained(weights, key, read, labels):
            bottleneck = ConceptBottleneck(num_concepts, 10, rngs=nnx.Rngs(key))
            graph, start = nnx.split(bottleneck)
            optimizer = optax.adam(0.02)

            def objective(params):
                model = nnx.merge(graph, params)
                activations, logits = model(read[train])
                penalty = losses.l1_bottleneck_penalty(model.concepts.kernel[...], weight=1.0)
                unlike = losses.cubic_cosine_similarity_loss(read[train], activations).mean()
                loss = losses.softmax_cross_entropy(logits, labels[train]).mean()
                return loss + weights[0] * penalty + weights[1] * unlike

            def step(carry, _):
                params, state = carry
                updates, state = optimizer.update(jax.grad(objective)(params), state)
                return (optax.apply_updates(params, updates), state), None

            carry, _ = jax.lax.scan(step, (start, optimizer.init(start)), length=150)
            model = nnx.merge(graph, carry[0])
            return model.concepts.kernel[...], model(read)[0], model.head.kernel[...]

        over_splits = jax.vmap(trained, in_axes=(None, 0, 0, 0))
        train_all = jax.jit(jax.vmap(over_splits, in_axes=(0, None, None, None)))
        weights = np.array([[0, 0], [0.01, 0], [0.01, 10]], "f")
        keys = jax.random.split(jax.random.key(0), 2)
        found = train_all(weights, keys, read.astype("f"), labels)

        def measured(kernel, activations, head, true, labels):
            accuracy = []
            corrected = np.array(activations)
            for j, truth in enumerate(true.T):  # what the activation is for such a concept
                line = np.polyfit(truth[train], activations[train, j], 1)
                corrected[:, j] = np.polyval(line, truth)
            order = np.argsort(rng.random(corrected[test].shape), axis=1)
            for number in (0, 7, 14, num_concepts):
                c = np.where(order < number, corrected[test], activations[test])
                accuracy.append(np.mean(np.argmax(c @ head, -1) == labels[test]))
            return [np.mean(np.abs(kernel) > 0.01), *accuracy]

        plain, sparse, named = np.mean(
            [
                [measured(*of_split) for of_split in zip(*of_weights, true, labels)]
                for of_weights in zip(*map(np.asarray, found))
            ],
            axis=1,
        )
        assert sparse[0] < 0.4 * plain[0]
        assert named[0] < 0.15 * plain[0]
        assert min(sparse[1], named[1]) > plain[1] - 0.03
        assert plain[1] > 0.6
        assert np.all(np.diff(named[1:]) > 0.02)
        assert named[-1] > 0.85
        assert np.all(np.diff(plain[1:]) < 0)
