"""The bench of quantized products: tuning, which needs a chip, with interpreted kernels."""

import pytest

from jaxref.bench import quantized_matmul
from jaxref.kernels.block_sizes import tuned_block


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXREF_CACHE_DIR", str(tmp_path))


def test_the_best_tile_is_kept():
    candidates = ((32, 128, 128), (32, 256, 128))
    rows = list(
        quantized_matmul.tuned(
            (8, 128, 256),
            "float32",
            repeats=1,
            implementation="pallas_tpu_interpret",
            candidates=candidates,
        )
    )
    best = min(rows, key=lambda row: row.value).implementation
    kept = tuned_block("quantized_matmul", (8, 128, 128))
    assert kept in candidates
    assert " x ".join(map(str, kept)) == best


def test_a_cpu_has_nothing_to_tune():
    with pytest.raises(ValueError, match="tune needs a GPU or a TPU"):
        list(quantized_matmul.run(quick=True, tune=True))
