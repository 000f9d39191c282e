"""Scaling laws: how loss falls with compute, parameters and data, fitted and extrapolated."""

from jaxref.analysis.scaling_laws.downstream import (
    LawFit,
    ValueReport,
    downstream_log_law,
    downstream_loss_law,
    fit_downstream_log_law,
    fit_downstream_loss_law,
    plot_downstream_law,
    pretraining_value_report,
    translation_alignment_score,
)
from jaxref.analysis.scaling_laws.intersection import ScalingIntersection, scaling_intersection

__all__ = [
    "ScalingIntersection",
    "scaling_intersection",
    "downstream_log_law",
    "downstream_loss_law",
    "LawFit",
    "fit_downstream_log_law",
    "fit_downstream_loss_law",
    "translation_alignment_score",
    "ValueReport",
    "pretraining_value_report",
    "plot_downstream_law",
]
