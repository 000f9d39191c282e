"""Analysis: measurements of models and of training, returned as numbers."""

from jaxref.analysis.dynamics.attention_entropy import plot_attention_entropy
from jaxref.analysis.dynamics.depth import (
    DepthStatistics,
    hidden_state_statistics,
    layer_gradient_norms,
    layer_removal_drop,
    plot_depth_statistics,
    pre_ln_variance_growth,
)
from jaxref.analysis.dynamics.diffusion import (
    UltraSlowDiffusion,
    fit_ultra_slow_diffusion,
    weight_distance,
)
from jaxref.analysis.dynamics.loss_spikes import divergence_rate, loss_spike_score
from jaxref.analysis.dynamics.signal_propagation import (
    SignalPropagation,
    plot_signal_propagation,
    signal_propagation,
)
from jaxref.analysis.dynamics.starvation import (
    FeatureResponse,
    feature_response,
    starved_response,
    tangent_features,
)
from jaxref.analysis.dynamics.training_stability import (
    StabilityForecast,
    extrapolate_instability,
    learning_rate_sensitivity,
    log_z,
    max_attention_logit,
)
from jaxref.analysis.landscape.batch_hessian import (
    LearningRateAndMomentum,
    batch_gauss_newton_top_eigenvalue,
    batch_hessian_top_eigenvalue,
    estimate_hessian_variance,
    lanczos_learning_rate_and_momentum,
    maximal_learning_rate,
    scale_learning_rate,
)
from jaxref.analysis.landscape.lanczos import (
    SpectrumResult,
    stochastic_lanczos,
)
from jaxref.analysis.landscape.logit_sharpness import logit_sharpness
from jaxref.analysis.landscape.sample_size import (
    gauss_newton_hessian_norm,
    loss_difference_bound,
    loss_difference_curve,
    relu_network_hessian_bound,
    sufficient_sample_size,
)
from jaxref.analysis.landscape.sgd_stability import (
    CoherenceResult,
    hessian_coherence,
    linearized_sgd_growth_rate,
    sgd_instability_threshold,
    sgd_stability_boundary,
    simulate_linearized_sgd,
)
from jaxref.analysis.landscape.visualization import (
    CurvatureRatio,
    LandscapeGrid,
    TrajectoryPlane,
    curvature_ratio,
    loss_line,
    loss_plane,
    plot_landscape,
    random_direction,
    trajectory_pca_directions,
)
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
    "learning_rate_sensitivity",
    "max_attention_logit",
    "log_z",
    "StabilityForecast",
    "extrapolate_instability",
    "pre_ln_variance_growth",
    "hidden_state_statistics",
    "DepthStatistics",
    "plot_depth_statistics",
    "layer_gradient_norms",
    "layer_removal_drop",
    "signal_propagation",
    "SignalPropagation",
    "plot_signal_propagation",
    "plot_attention_entropy",
    "angular_distance",
    "scaling_intersection",
    "ScalingIntersection",
    "weight_distance",
    "UltraSlowDiffusion",
    "fit_ultra_slow_diffusion",
    "tangent_features",
    "feature_response",
    "FeatureResponse",
    "starved_response",
    "loss_spike_score",
    "divergence_rate",
    "logit_sharpness",
    "stochastic_lanczos",
    "SpectrumResult",
    "random_direction",
    "loss_line",
    "loss_plane",
    "LandscapeGrid",
    "trajectory_pca_directions",
    "TrajectoryPlane",
    "curvature_ratio",
    "CurvatureRatio",
    "plot_landscape",
    "batch_hessian_top_eigenvalue",
    "batch_gauss_newton_top_eigenvalue",
    "maximal_learning_rate",
    "scale_learning_rate",
    "estimate_hessian_variance",
    "lanczos_learning_rate_and_momentum",
    "LearningRateAndMomentum",
    "WassersteinDependency",
    "exact_wasserstein_dependency",
    "mutual_information",
    "relative_penalty",
    "penalty_entropy",
    "uniformity",
    "tolerance",
    "downstream_log_law",
    "downstream_loss_law",
    "fit_downstream_log_law",
    "fit_downstream_loss_law",
    "LawFit",
    "plot_downstream_law",
    "pretraining_value_report",
    "translation_alignment_score",
    "ValueReport",
    "hessian_coherence",
    "CoherenceResult",
    "linearized_sgd_growth_rate",
    "sgd_instability_threshold",
    "sgd_stability_boundary",
    "simulate_linearized_sgd",
    "loss_difference_curve",
    "sufficient_sample_size",
    "relu_network_hessian_bound",
    "loss_difference_bound",
    "gauss_newton_hessian_norm",
]
