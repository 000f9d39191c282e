"""Decisions: solvers, and search without gradients."""

from jaxref.decision.solvers import SolveInfo, levenberg_marquardt

__all__ = [
    "levenberg_marquardt",
    "SolveInfo",
]
