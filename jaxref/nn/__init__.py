"""flax.nnx modules: thin classes around the pure functions of the method rooms."""

from jaxref.nn.activations import (
    CRReLU,
    activation_entropy,
    crrelu,
    entropy_correction,
    worst_activation,
)
from jaxref.nn.adapter_integration import (
    IntegratorParam,
    LoRALinear,
    XCrossEncoder,
    count_parameters,
    cross_model_integrate,
    stack_adapters,
)
from jaxref.nn.attention import MultiHeadAttention
from jaxref.nn.bit_linear import BitLinear
from jaxref.nn.calibration import called_linears, collect_hessians, collect_inputs
from jaxref.nn.concept_bottleneck import ConceptBottleneck, concept_matrix, concept_matrix_search
from jaxref.nn.conv import (
    Conv,
    ScaledWeightStandardizedConv,
    SigmaReparamConv,
    WeightStandardizedConv,
)
from jaxref.nn.convex import (
    InputConvexNetwork,
)
from jaxref.nn.dual_head import DualHeadClassifier
from jaxref.nn.generalized_mean import (
    MultipletLayer,
    gini_mean,
    lehmer_mean,
    lehmer_mean_order_gradient,
    lehmer_mean_weight_gradient,
    mean_case_slope_score,
    multiplet,
)
from jaxref.nn.hypernetwork import (
    HyperNetwork,
    HyperNetworkParameters,
    hypernetwork_apply,
    magnitude_invariant_encoding,
)
from jaxref.nn.implicit import (
    diffusion_sorption_residual,
    hard_constraint_mixture_of_experts,
    hard_constraint_solve,
    merge_domain,
    partition_domain,
)
from jaxref.nn.linear import Embed, Linear
from jaxref.nn.list_transformer import FeatureTransformer, ListTransformer
from jaxref.nn.losses import Loss
from jaxref.nn.mixture_of_experts import (
    EnforcedRoutingMoE,
    ExpertParameters,
    MixtureOfExperts,
    RouterOutput,
    enforced_routing_mlp,
    mixture_of_experts_ffn,
    top_k_router,
)
from jaxref.nn.mlp import MLP, ScaledFusedMLP
from jaxref.nn.nested_dropout import (
    BiasVariance,
    Truncation,
    best_truncation,
    bias_variance_of_predictions,
    nested_dropout,
    nested_dropout_distribution,
    nested_logits,
)
from jaxref.nn.normalization import Norm
from jaxref.nn.parameter_attention import ParameterAttention
from jaxref.nn.point_grid import PointGridBlock
from jaxref.nn.quantized_linear import (
    QuantizedBitLinear,
    QuantizedLinear,
    QuantizedWeight,
    quantize_linears,
)
from jaxref.nn.quasi_lstm import QuasiLSTM, QuasiLSTMBlock, quasi_lstm
from jaxref.nn.recommendation import BehaviorAggregationParams, SimpleX, behavior_aggregation
from jaxref.nn.recurrent import (
    LayerNormGRUCell,
    LayerNormGRUParams,
    LayerNormLSTMCell,
    LayerNormLSTMParams,
    layer_norm_gru_cell,
    layer_norm_lstm_cell,
)
from jaxref.nn.reduced_precision_linear import ReducedPrecisionLinear
from jaxref.nn.region import RegionNormBasic, RegionNormLearnable
from jaxref.nn.reparametrized import (
    ScaledWeightStandardizedLinear,
    SigmaReparamLinear,
    SpectralNormalizedLinear,
    WeightNormalizedLinear,
    WeightStandardizedLinear,
)
from jaxref.nn.retrieval import CosineAdapter, DenseQuery, sparse_query_vector
from jaxref.nn.scattering import (
    MorletFilters,
    morlet_filter_bank,
    scattering_channels,
    scattering_transform,
)
from jaxref.nn.sentence_embedding import SentenceEmbeddingHead
from jaxref.nn.stable_embedding import StableEmbedding
from jaxref.nn.static_mixing import CausalActivation
from jaxref.nn.test_time import AlphaBatchNorm, UnMixNorm
from jaxref.nn.token_mixers import (
    CausalGenerationMixer,
    EntropyGuidedAttention,
    ThirdOrderAttention,
)
from jaxref.nn.variables import AuxiliaryLoss, GradientState

__all__ = [
    "Linear",
    "Embed",
    "StableEmbedding",
    "Norm",
    "RegionNormBasic",
    "RegionNormLearnable",
    "MLP",
    "ScaledFusedMLP",
    "MultiHeadAttention",
    "EntropyGuidedAttention",
    "ThirdOrderAttention",
    "CausalGenerationMixer",
    "GradientState",
    "AuxiliaryLoss",
    "Loss",
    "CausalActivation",
    "ParameterAttention",
    "MixtureOfExperts",
    "EnforcedRoutingMoE",
    "ExpertParameters",
    "RouterOutput",
    "top_k_router",
    "mixture_of_experts_ffn",
    "enforced_routing_mlp",
    "crrelu",
    "CRReLU",
    "worst_activation",
    "entropy_correction",
    "activation_entropy",
    "lehmer_mean",
    "gini_mean",
    "multiplet",
    "lehmer_mean_weight_gradient",
    "lehmer_mean_order_gradient",
    "mean_case_slope_score",
    "MultipletLayer",
    "HyperNetwork",
    "HyperNetworkParameters",
    "hypernetwork_apply",
    "magnitude_invariant_encoding",
    "hard_constraint_solve",
    "hard_constraint_mixture_of_experts",
    "partition_domain",
    "merge_domain",
    "diffusion_sorption_residual",
    "AlphaBatchNorm",
    "UnMixNorm",
    "Conv",
    "WeightStandardizedConv",
    "ScaledWeightStandardizedConv",
    "SigmaReparamConv",
    "WeightStandardizedLinear",
    "ScaledWeightStandardizedLinear",
    "SigmaReparamLinear",
    "WeightNormalizedLinear",
    "SpectralNormalizedLinear",
    "layer_norm_lstm_cell",
    "LayerNormLSTMParams",
    "LayerNormLSTMCell",
    "layer_norm_gru_cell",
    "LayerNormGRUParams",
    "LayerNormGRUCell",
    "quasi_lstm",
    "QuasiLSTM",
    "QuasiLSTMBlock",
    "PointGridBlock",
    "ListTransformer",
    "FeatureTransformer",
    "InputConvexNetwork",
    "BitLinear",
    "QuantizedLinear",
    "QuantizedBitLinear",
    "QuantizedWeight",
    "quantize_linears",
    "collect_hessians",
    "collect_inputs",
    "called_linears",
    "ReducedPrecisionLinear",
    "ConceptBottleneck",
    "concept_matrix",
    "concept_matrix_search",
    "DualHeadClassifier",
    "IntegratorParam",
    "LoRALinear",
    "XCrossEncoder",
    "count_parameters",
    "cross_model_integrate",
    "stack_adapters",
    "SimpleX",
    "behavior_aggregation",
    "BehaviorAggregationParams",
    "Truncation",
    "BiasVariance",
    "nested_dropout_distribution",
    "nested_dropout",
    "nested_logits",
    "best_truncation",
    "bias_variance_of_predictions",
    "SentenceEmbeddingHead",
    "MorletFilters",
    "morlet_filter_bank",
    "scattering_channels",
    "scattering_transform",
    "CosineAdapter",
    "DenseQuery",
    "sparse_query_vector",
]
