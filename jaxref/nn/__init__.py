"""flax.nnx modules: thin classes around the pure functions of the method rooms."""

from jaxref.nn.attention import MultiHeadAttention
from jaxref.nn.linear import Embed, Linear
from jaxref.nn.mlp import MLP
from jaxref.nn.normalization import Norm
from jaxref.nn.stable_embedding import StableEmbedding
from jaxref.nn.variables import AuxiliaryLoss, GradientState

__all__ = [
    "Linear",
    "Embed",
    "StableEmbedding",
    "Norm",
    "MLP",
    "MultiHeadAttention",
    "GradientState",
    "AuxiliaryLoss",
]
