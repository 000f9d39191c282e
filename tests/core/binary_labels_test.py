import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref.core.binary_labels import split_by_label


@pytest.mark.parametrize("kind", [bool, int, float])
def test_splits_what_counts_whatever_the_rest_holds(kind):
    labels, where = np.array([1, 0, 1, 0]).astype(kind), np.array([True, True, False, False])
    positive, negative = split_by_label(jnp.zeros(4), where, labels=labels)
    assert np.array_equal(positive, [True, False, False, False])
    assert np.array_equal(negative, [False, True, False, False])
    padded = np.array([1, 0, -1, 7])
    for found in (
        split_by_label(jnp.zeros(4), where, labels=padded),
        jax.jit(lambda y: split_by_label(jnp.zeros(4), where, labels=y))(padded),
    ):
        assert np.array_equal(found, (positive, negative))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="targets must be 0 or 1, got"):
        split_by_label(jnp.zeros(2), None, targets=np.array([1, 2]))
    with pytest.raises(ValueError, match=r"targets must have shape \(2,\)"):
        split_by_label(jnp.zeros(2), None, targets=np.array([1]))
    with pytest.raises(ValueError, match="where must broadcast"):
        split_by_label(jnp.zeros(2), np.ones(3, bool), targets=np.array([1, 0]))
    with pytest.raises(TypeError, match="scores must have a floating-point type"):
        split_by_label(jnp.zeros(2, int), None, targets=np.array([1, 0]))
