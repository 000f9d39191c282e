"""The marked claim of the paper is in tests/losses/normalized_softmax_test.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref import adaptation


class TestPrototypes:
    def test_means_of_the_classes(self):
        rng = np.random.default_rng(0)
        e, y = rng.normal(size=(9, 4)), np.array([0, 3, 0, 1, 3, 3, 5, -1, 0])
        e[7:] = np.nan  # excluded below
        where = np.arange(9) < 7
        plain, head = jax.jit(
            lambda e, where: [
                function(e, y, 5, where=where)
                for function in (adaptation.class_prototypes, adaptation.novel_class_head)
            ]
        )(e.astype("f"), where)
        units = e / np.linalg.norm(e, axis=1, keepdims=True)
        for k in range(5):
            members = where & (y == k)
            if members.any():
                mean = units[members].mean(0)
                np.testing.assert_allclose(plain[k], e[members].mean(0), rtol=1e-5)
                np.testing.assert_allclose(head[k], mean / np.linalg.norm(mean), rtol=1e-5)
            else:
                assert np.all(plain[k] == 0)
                assert np.all(head[k] == 0)

    def test_zero_vectors_and_types(self):
        @jax.jit
        def both(head):
            opposite = jnp.array([[1.0, 0], [-2, 0]])
            return (
                adaptation.imprint_class(head, jnp.zeros((3, 2))),
                adaptation.novel_class_head(opposite, jnp.zeros(2, int), 1),
            )

        head, opposite = both(np.eye(2).astype("bfloat16"))
        assert head.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.float32(head[2]), 0)
        np.testing.assert_array_equal(opposite, 0)

    def test_bad_input_is_named(self):
        e, y = np.ones((3, 2), "f"), np.array([0, 1, 1])
        for function in (adaptation.class_prototypes, adaptation.novel_class_head):
            with pytest.raises(ValueError, match="num_classes must be in"):
                function(e, y, 0)
            with pytest.raises(ValueError, match=r"embeddings must have shape \[examples"):
                function(e[0], y, 2)
            with pytest.raises(ValueError, match="labels must have shape"):
                function(e, y[:2], 2)
            with pytest.raises(TypeError, match="labels must be integer ids"):
                function(e, e[:, 0], 2)
            with pytest.raises(ValueError, match="where must have shape"):
                function(e, y, 2, where=np.ones(2, bool))
        with pytest.raises(ValueError, match="embeddings must have shape"):
            adaptation.imprint_class(np.eye(2), e[:0])
        with pytest.raises(ValueError, match=r"embeddings must have shape \(3, 3\)"):
            adaptation.imprint_class(np.eye(3), e)
        with pytest.raises(ValueError, match="class_weights must have shape"):
            adaptation.imprint_class(np.ones(3), e)
        with pytest.raises(TypeError, match="class_weights must have a floating-point type"):
            adaptation.imprint_class(np.eye(2, dtype=int), e)
