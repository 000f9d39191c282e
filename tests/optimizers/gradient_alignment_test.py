from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref.optimizers import align_gradients

PEER = np.load(Path(__file__).parents[1] / "oracles" / "distillation.npz")
ALIGN = jax.jit(align_gradients)


def tree(vector, scale=1.0, dtype="f"):
    vector = np.asarray(scale * vector, dtype)
    return {"w": vector[:6].reshape(2, 3), "b": [vector[6]]}


def flat(tree):
    return np.concatenate([np.ravel(tree["w"]), np.ravel(tree["b"][0])]).astype("d")


@pytest.mark.parametrize("case", ["conflict", "agree"])
def test_matches_the_release(case):
    primary, auxiliary = PEER[f"{case}_gradients"]
    assert (primary @ auxiliary < 0) == (case == "conflict")
    np.testing.assert_allclose(flat(ALIGN(tree(primary), tree(auxiliary))), PEER[case], rtol=1e-5)


def test_very_large_and_small_gradients_and_none():
    primary, auxiliary = PEER["conflict_gradients"]
    for scale in (1e-30, 1e30):
        found = flat(ALIGN(tree(primary, scale), tree(auxiliary, scale)))
        np.testing.assert_allclose(found / scale, PEER["conflict"], rtol=1e-4)
    for pair in ((primary, 0 * auxiliary), (0 * primary, auxiliary), (0 * primary, 0 * auxiliary)):
        found = flat(ALIGN(tree(pair[0]), tree(pair[1])))
        np.testing.assert_allclose(found, sum(pair), rtol=1e-6)


def test_half_precision_computes_in_float32():
    pair = [tree(g, dtype=jnp.bfloat16) for g in PEER["conflict_gradients"]]
    ours = ALIGN(*pair)
    wide = ALIGN(*(jax.tree.map(lambda x: np.asarray(x, "f"), t) for t in pair))
    assert ours["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours["w"], wide["w"].astype(jnp.bfloat16))


def test_trees_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"auxiliary_grads\['w'\] must have shape"):
        align_gradients({"w": jnp.ones(3)}, {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="auxiliary_grads must have the tree structure"):
        align_gradients({"w": jnp.ones(3)}, {"v": jnp.ones(3)})
