"""Quantization: one tensor type `QTensor`, and `quantize`, `dequantize`, `fake_quantize`."""

from jaxref.quantization.kv_cache import (
    StaircaseCache,
    staircase_bits,
    staircase_cache_append,
    staircase_cache_init,
    staircase_cache_nbytes,
    staircase_cache_read,
)
from jaxref.quantization.packing import pack, unpack
from jaxref.quantization.tensor import QTensor, QuantSpec
from jaxref.quantization.uniform import dequantize, fake_quantize, quantize

__all__ = [
    "QTensor",
    "QuantSpec",
    "quantize",
    "dequantize",
    "fake_quantize",
    "pack",
    "unpack",
    "StaircaseCache",
    "staircase_bits",
    "staircase_cache_init",
    "staircase_cache_append",
    "staircase_cache_read",
    "staircase_cache_nbytes",
]
