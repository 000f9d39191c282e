"""Fused computations behind one function each, with `implementation=` to choose who computes."""

from jaxref.kernels.flash_attention import flash_attention
from jaxref.kernels.layer_norm import layer_norm, rms_norm
from jaxref.kernels.linear_softmax_cross_entropy import linear_softmax_cross_entropy
from jaxref.kernels.linear_softmax_entropy import (
    linear_softmax_entropy,
)
from jaxref.kernels.quantized_matmul import quantized_matmul
from jaxref.kernels.softmax import log_softmax, logsumexp, softmax
from jaxref.kernels.softmax_cross_entropy import softmax_cross_entropy
from jaxref.kernels.two_pass_softmax import (
    extended_add,
    extended_exponential,
    three_pass_softmax,
    two_pass_logsumexp,
    two_pass_softmax,
)

__all__ = [
    "flash_attention",
    "layer_norm",
    "rms_norm",
    "linear_softmax_cross_entropy",
    "quantized_matmul",
    "softmax",
    "log_softmax",
    "logsumexp",
    "softmax_cross_entropy",
    "extended_exponential",
    "extended_add",
    "two_pass_softmax",
    "two_pass_logsumexp",
    "three_pass_softmax",
    "linear_softmax_entropy",
]
