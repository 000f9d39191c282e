"""Decisions: solvers, and search without gradients."""

from jaxref.decision.black_box import CrossEntropyResult, Gaussian, cross_entropy_search
from jaxref.decision.solvers import SolveInfo, levenberg_marquardt

__all__ = [
    "levenberg_marquardt",
    "SolveInfo",
    "cross_entropy_search",
    "CrossEntropyResult",
    "Gaussian",
]
