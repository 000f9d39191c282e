from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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
