"""Loss landscapes: how the loss changes around where a model is."""

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

__all__ = [
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
