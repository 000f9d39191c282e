"""Metrics: what is reported of a trained model."""

from jaxref.metrics.aggregation_bias import (
    SimpsonsBias,
    bleu_from_statistics,
    bleu_statistics,
    simpsons_bias,
)
from jaxref.metrics.calibration import (
    ReliabilityCurve,
    brier_score,
    calibration_suite,
    classwise_calibration_error,
    expected_calibration_error,
    kernel_density_calibration_error,
    kolmogorov_smirnov_calibration_error,
    maximum_mean_calibration_error,
    plot_reliability,
    reliability_curve,
)
from jaxref.metrics.classification import (
    binary_counts,
    f1_from_counts,
    f1_score,
    log_loss,
    precision_from_counts,
    recall_from_counts,
)
from jaxref.metrics.depth import (
    absolute_relative_error,
    depth_accuracy,
    human_disagreement_rate,
    log10_error,
    root_mean_squared_log_error,
)
from jaxref.metrics.detection import (
    box_overlaps,
    detection_average_precision,
    detection_average_recall,
    panoptic_quality,
)
from jaxref.metrics.ensemble import ensemble_probability, video_probability
from jaxref.metrics.image import (
    frechet_distance,
    inception_score,
    peak_signal_to_noise_ratio,
    structural_similarity,
    structural_similarity_map,
)
from jaxref.metrics.language import normalised_perplexity, steps_for_compute_class
from jaxref.metrics.ranking import (
    ImbalanceFactors,
    area_over_curve,
    imbalance_factors,
    label_imbalance,
    macro_auc,
    partial_auc,
    roc_auc,
    threshold_at_fpr,
    top_group_profit,
    two_way_partial_auc,
)
from jaxref.metrics.regression import (
    mean_absolute_percentage_error,
    r2_score,
    root_mean_squared_error,
    symmetric_mean_absolute_percentage_error,
)
from jaxref.metrics.rejection import (
    PrecisionCoverage,
    coverage_at_precision,
    precision_coverage_curve,
    rejection_risk,
)
from jaxref.metrics.sampling import (
    optimal_coverage_policy,
    pass_at_n,
    unbiased_pass_at_k,
)
from jaxref.metrics.segmentation import dice_score, hausdorff_distance_95, mean_iou
from jaxref.metrics.sound_events import segment_based_error_rate, segment_based_f1
from jaxref.metrics.survival import concordance_index
from jaxref.metrics.text import (
    bleu,
    exact_match,
    meteor,
    rouge,
    token_error_rate,
)

__all__ = [
    "normalised_perplexity",
    "steps_for_compute_class",
    "roc_auc",
    "area_over_curve",
    "partial_auc",
    "two_way_partial_auc",
    "threshold_at_fpr",
    "macro_auc",
    "label_imbalance",
    "imbalance_factors",
    "ImbalanceFactors",
    "top_group_profit",
    "ensemble_probability",
    "video_probability",
    "root_mean_squared_error",
    "mean_absolute_percentage_error",
    "symmetric_mean_absolute_percentage_error",
    "r2_score",
    "absolute_relative_error",
    "root_mean_squared_log_error",
    "log10_error",
    "depth_accuracy",
    "human_disagreement_rate",
    "peak_signal_to_noise_ratio",
    "structural_similarity_map",
    "structural_similarity",
    "inception_score",
    "frechet_distance",
    "box_overlaps",
    "detection_average_precision",
    "detection_average_recall",
    "panoptic_quality",
    "bleu",
    "rouge",
    "meteor",
    "token_error_rate",
    "exact_match",
    "log_loss",
    "binary_counts",
    "precision_from_counts",
    "recall_from_counts",
    "f1_from_counts",
    "f1_score",
    "ReliabilityCurve",
    "reliability_curve",
    "expected_calibration_error",
    "classwise_calibration_error",
    "kolmogorov_smirnov_calibration_error",
    "maximum_mean_calibration_error",
    "kernel_density_calibration_error",
    "brier_score",
    "calibration_suite",
    "plot_reliability",
    "mean_iou",
    "dice_score",
    "hausdorff_distance_95",
    "segment_based_f1",
    "segment_based_error_rate",
    "rejection_risk",
    "precision_coverage_curve",
    "coverage_at_precision",
    "PrecisionCoverage",
    "pass_at_n",
    "unbiased_pass_at_k",
    "optimal_coverage_policy",
    "concordance_index",
    "SimpsonsBias",
    "simpsons_bias",
    "bleu_statistics",
    "bleu_from_statistics",
]
