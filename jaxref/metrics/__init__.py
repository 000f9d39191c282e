"""Metrics: what is reported of a trained model."""

from jaxref.metrics.language import normalised_perplexity, steps_for_compute_class

__all__ = [
    "normalised_perplexity",
    "steps_for_compute_class",
]
