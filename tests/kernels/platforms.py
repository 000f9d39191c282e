"""What the kernels' tests share: who computes, and small tiles, so that small arrays have many."""

import pytest

from jaxref.kernels import rows_gpu, rows_tpu

ANYWHERE = ("xla", "pallas_tpu_interpret", "pallas_gpu_interpret")
"""The implementations that a CPU can run."""


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of few rows and columns; on a GPU long rows are cut into parts as well."""
    monkeypatch.setattr(rows_tpu, "default_block", lambda *_: (8, 128))
    monkeypatch.setattr(rows_gpu, "default_block", lambda *_: (2, 64))
    monkeypatch.setattr(rows_gpu, "_PROGRAMS", 8)
