"""Losses: `f(predictions, targets, *, hyperparameters..., axis=-1, where=None)`, unreduced."""

from jaxref.losses.classification import (
    margin_binary_cross_entropy,
    poly1_focal_loss,
    poly_cross_entropy,
    rescaled_square_loss,
    squentropy,
    truncated_poly_loss,
)
from jaxref.losses.language import load_balance_loss, z_loss

__all__ = [
    "poly_cross_entropy",
    "poly1_focal_loss",
    "truncated_poly_loss",
    "squentropy",
    "rescaled_square_loss",
    "margin_binary_cross_entropy",
    "z_loss",
    "load_balance_loss",
]
