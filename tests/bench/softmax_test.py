import pytest

from jaxref.bench import softmax
from jaxref.kernels.block_sizes import _table, tuned_block


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXREF_CACHE_DIR", str(tmp_path))


def best_of(measured, kernel):
    """The fastest tile of what was measured."""
    times = {m.implementation: m.value for m in measured if m.case.endswith(f"of {kernel}")}
    assert len(times) == 2
    return tuple(map(int, min(times, key=times.get).split(" x ")))


def test_tuning_keeps_the_fastest_tile():
    how = {"repeats": 1, "implementation": "pallas_interpret"}
    rows = list(softmax.tuned_rows((16, 256), "float32", candidates=((8, 128), (16, 256)), **how))
    shape = (1, 128, 2, 8)
    attention = list(
        softmax.tuned_attention(shape, "float32", candidates=((128, 128), (128, 256)), **how)
    )
    sizes = (16, 8, 256)
    head = list(softmax.tuned_head(sizes, "float32", candidates=((32, 256), (16, 128)), **how))
    _table.cache_clear()  # what a new process finds
    for kernel in ("softmax", "logsumexp", "softmax_cross_entropy"):
        assert tuned_block(kernel, (16, 256)) == best_of(rows, kernel)
    assert tuned_block("flash_attention", shape[1:]) == best_of(attention, "flash_attention")
    name = "linear_softmax_cross_entropy"
    assert tuned_block(name, sizes) == best_of(head, name)


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
