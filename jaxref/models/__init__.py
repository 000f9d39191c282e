"""flax.nnx models built from `jaxref.nn`."""

from jaxref.models.conversions import (
    fold_linears,
    fold_norm_affine,
    fold_statistics,
    pre_ln_to_pre_rms,
    pre_rms_to_pre_crms,
)
from jaxref.models.generation import generate, sample_tokens
from jaxref.models.transformer import GenerationCache, Transformer, TransformerConfig

__all__ = [
    "Transformer",
    "TransformerConfig",
    "GenerationCache",
    "generate",
    "sample_tokens",
    "pre_ln_to_pre_rms",
    "pre_rms_to_pre_crms",
    "fold_norm_affine",
    "fold_statistics",
    "fold_linears",
]
