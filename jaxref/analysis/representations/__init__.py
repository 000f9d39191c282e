"""Representations: what the hidden states of a model hold, and how alike they are."""

from jaxref.analysis.representations.similarity import angular_distance

__all__ = ["angular_distance"]
