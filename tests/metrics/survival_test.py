from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref.metrics import concordance_index

PEERS = np.load(Path(__file__).parents[1] / "oracles" / "survival.npz")
TIED = tuple(PEERS[f"tied_{name}"] for name in ("risk", "times", "ended"))


def test_matches_lifelines_with_ties_in_time_and_risk():
    ours = jax.jit(concordance_index)(*TIED)
    np.testing.assert_allclose(ours, PEERS["concordance"], rtol=1e-6)


def test_more_items_than_are_compared_at_a_time():
    rng = np.random.default_rng(0)
    risk, times = rng.normal(size=(2, 300)).astype(np.float32)
    ended = rng.integers(2, size=300)
    later = (times[:, None] < times) & (ended[:, None] == 1)
    expected = np.mean((risk[:, None] > risk)[later])
    np.testing.assert_allclose(concordance_index(risk, times, ended), expected, rtol=1e-5)


def test_perfect_reversed_and_constant_risks():
    times, ended = np.arange(1.0, 6), np.array([1, 1, 0, 1, 1])
    assert concordance_index(-times, times, ended) == 1
    assert concordance_index(times, times, ended) == 0
    assert concordance_index(np.zeros(5), times, ended) == 0.5


def test_excluded_items_and_what_is_not_defined():
    where = np.arange(30) < 22
    risk, times = (np.where(where, x, np.nan) for x in TIED[:2])
    ended = np.where(where, TIED[2], 7)
    ours = concordance_index(risk, times, ended, where=where)
    np.testing.assert_allclose(ours, concordance_index(*(x[:22] for x in TIED)), rtol=1e-6)
    assert np.isnan(concordance_index(*TIED[:2], np.zeros(30)))
    assert np.isnan(concordance_index(risk, TIED[1], TIED[2]))
    assert np.isnan(concordance_index(*(x[:0] for x in TIED)))
    assert concordance_index(jnp.asarray(TIED[0], jnp.bfloat16), *TIED[1:]).dtype == jnp.float32


def test_bad_input_is_named():
    risk, times, ended = TIED
    with pytest.raises(ValueError, match="observed must be 0 or 1"):
        concordance_index(risk, times, ended * 2)
    with pytest.raises(ValueError, match="times must have shape"):
        concordance_index(risk, times[:3], ended)
    with pytest.raises(ValueError, match=r"risk must have shape \[n\]"):
        concordance_index(risk[None], times[None], ended[None])
    with pytest.raises(TypeError, match="risk must have a floating-point type"):
        concordance_index(ended, times, ended)
