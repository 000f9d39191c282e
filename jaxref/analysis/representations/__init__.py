"""Representations: what the hidden states of a model hold, and how alike they are."""

from jaxref.analysis.representations.contrast import (
    penalty_entropy,
    relative_penalty,
    tolerance,
    uniformity,
)
from jaxref.analysis.representations.dependency import (
    WassersteinDependency,
    exact_wasserstein_dependency,
    mutual_information,
)
from jaxref.analysis.representations.similarity import angular_distance

__all__ = [
    "angular_distance",
    "WassersteinDependency",
    "exact_wasserstein_dependency",
    "mutual_information",
    "relative_penalty",
    "penalty_entropy",
    "uniformity",
    "tolerance",
]
