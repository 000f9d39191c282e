"""Loss landscapes: how the loss changes around where a model is."""

from jaxref.analysis.landscape.logit_sharpness import logit_sharpness

__all__ = [
    "logit_sharpness",
]
