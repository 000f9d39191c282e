"""Compilation for machines that are not here, and the mark of the tests that need it."""

import importlib.util

import pytest

from jaxref.bench.ahead_of_time import TOPOLOGIES, compile_for_tpu, lower_for_gpu

__all__ = ["TOPOLOGIES", "compile_for_tpu", "lower_for_gpu", "needs_tpu_compiler"]

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: pip install -e '.[tpu-aot]'",
)
