"""flax.nnx models built from `jaxref.nn`."""

from jaxref.models.card import (
    CARD,
    CARDConfig,
    dynamic_projection,
    exponential_moving_average,
    token_blend,
)
from jaxref.models.cct import (
    CompactConvolutionalTransformer,
    CompactConvolutionalTransformerConfig,
    CompactEncoder,
    CompactEncoderConfig,
    CompactVisionTransformer,
    CompactVisionTransformerConfig,
    ViTLite,
    ViTLiteConfig,
    cct_2,
    cct_4,
    cct_6,
    cct_7,
    cct_14,
)
from jaxref.models.compound_scaling import (
    TINYNET_ANCHORS,
    Multipliers,
    efficientnet_b0_flops,
    fit_tiny_formula,
    inverse_giant_formula,
    scale_channels,
    tiny_formula,
)
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
from jaxref.models.nbeats import NBEATS, NBEATSConfig
from jaxref.models.nf_resnet import NFResNet, NFResNetConfig
from jaxref.models.resnet import ResNet, ResNetConfig
from jaxref.models.scatsimclr import (
    PretextHead,
    ScatSimCLR,
    ScatSimCLRConfig,
    jigsaw_permutations,
    jigsaw_pretext,
    rotation_pretext,
    scatsimclr_loss,
)
from jaxref.models.time_series_transformer import (
    TimeSeriesTransformer,
    TimeSeriesTransformerConfig,
    class_activation_map,
)
from jaxref.models.tinynet import TinyNet, TinyNetConfig, tinynet_config
from jaxref.models.tokenizers import ConvTokenizer, TextTokenizer
from jaxref.models.transformer import GenerationCache, Transformer, TransformerConfig
from jaxref.models.vit import VisionTransformer, VisionTransformerConfig
from jaxref.models.widenet import WideNet, WideNetConfig, WideNetEncoder

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
    "VisionTransformer",
    "VisionTransformerConfig",
    "CompactConvolutionalTransformer",
    "CompactConvolutionalTransformerConfig",
    "CompactVisionTransformer",
    "CompactVisionTransformerConfig",
    "ViTLite",
    "ViTLiteConfig",
    "CompactEncoder",
    "CompactEncoderConfig",
    "ConvTokenizer",
    "TextTokenizer",
    "cct_2",
    "cct_4",
    "cct_6",
    "cct_7",
    "cct_14",
    "WideNet",
    "WideNetConfig",
    "WideNetEncoder",
    "ResNet",
    "ResNetConfig",
    "NFResNet",
    "NFResNetConfig",
    "TinyNet",
    "TinyNetConfig",
    "tinynet_config",
    "TINYNET_ANCHORS",
    "Multipliers",
    "tiny_formula",
    "inverse_giant_formula",
    "fit_tiny_formula",
    "scale_channels",
    "efficientnet_b0_flops",
    "NBEATS",
    "NBEATSConfig",
    "CARD",
    "CARDConfig",
    "exponential_moving_average",
    "dynamic_projection",
    "token_blend",
    "TimeSeriesTransformer",
    "TimeSeriesTransformerConfig",
    "class_activation_map",
    "ScatSimCLR",
    "ScatSimCLRConfig",
    "PretextHead",
    "rotation_pretext",
    "jigsaw_pretext",
    "jigsaw_permutations",
    "scatsimclr_loss",
]
