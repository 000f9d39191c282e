"""flax.nnx models built from `jaxref.nn`."""

from jaxref.models.conversions import (
    fold_linears,
    fold_norm_affine,
    fold_statistics,
    pre_ln_to_pre_rms,
    pre_rms_to_pre_crms,
    with_scan_layers,
)
from jaxref.models.generation import generate, sample_tokens
from jaxref.models.gpt2 import gpt2_config, load_gpt2, save_safetensors
from jaxref.models.growth import grow_transformer, pad_kernel, rescale_norm_for_padding
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
    "with_scan_layers",
    "pad_kernel",
    "rescale_norm_for_padding",
    "grow_transformer",
    "gpt2_config",
    "load_gpt2",
    "save_safetensors",
]
