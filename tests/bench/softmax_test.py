import pytest

from jaxref.bench import softmax
from jaxref.kernels.block_sizes import _table, tuned_block


def test_tuning_keeps_the_fastest_tile(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXREF_CACHE_DIR", str(tmp_path))
    candidates = ((8, 128), (16, 256))
    measured = list(
        softmax.tuned(
            (16, 256),
            "float32",
            repeats=1,
            implementation="pallas_interpret",
            candidates=candidates,
        )
    )
    assert len(measured) == 5 * len(candidates)
    _table.cache_clear()  # what a new process finds
    for name in ("softmax", "softmax_cross_entropy"):
        times = {m.implementation: m.value for m in measured if m.case.endswith(f"of {name}")}
        best = min(times, key=times.get)
        assert best == "{} x {}".format(*tuned_block(name, (16, 256)))


def test_a_cpu_has_nothing_to_tune():
    with pytest.raises(ValueError, match="tune needs a GPU or a TPU"):
        list(softmax.run(quick=True, tune=True))


def test_attention_is_compared_forward_and_backward():
    measured = list(
        softmax.attention_case(
            (1, 16, 2, 16), "float32", repeats=1, implementation="pallas_interpret", peer="xla"
        )
    )
    assert [m.case.endswith("backward") for m in measured] == [False, False, True, True]
    assert all(m.peer == "jax.nn, xla" for m in measured if m.implementation == "flash_attention")
