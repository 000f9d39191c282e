"""Scaling laws: how loss falls with compute, parameters and data, fitted and extrapolated."""

from jaxref.analysis.scaling_laws.intersection import ScalingIntersection, scaling_intersection

__all__ = [
    "ScalingIntersection",
    "scaling_intersection",
]
