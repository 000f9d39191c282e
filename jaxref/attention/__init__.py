"""Attention: `f(query, key, value, *, bias, mask, scale, is_causal)`, and what goes with it."""

from jaxref.attention.block import harmonic_block_probability, probabilistic_block_attention
from jaxref.attention.cache import (
    KeyValueCache,
    key_value_cache_append,
    key_value_cache_init,
)
from jaxref.attention.dot_product import dot_product_attention
from jaxref.attention.entropy import (
    EntropyProfile,
    attention_entropy,
    attention_entropy_lower_bound,
    attention_entropy_regularizer,
    attention_probabilities,
    entropy_guided_attention,
    entropy_profile,
    scaled_fused_ffn,
)
from jaxref.attention.higher_order import (
    approximate_third_order_attention,
    higher_order_attention,
    match_three_embedding,
    polynomial_features,
    required_degree,
    third_order_attention,
)
from jaxref.attention.linear import elu_plus_one, linear_attention
from jaxref.attention.linear_self_attention import (
    gradient_descent_attention_weights,
    linear_self_attention,
    one_step_gradient_descent_predictor,
    optimal_in_context_step_size,
    ridge_predictor,
)
from jaxref.attention.parameter_attention import (
    grow_optimizer_state,
    grow_parameter_tokens,
    parameter_attention,
)
from jaxref.attention.point_grid import grid_to_points, point_grid_attention, scatter_softmax
from jaxref.attention.pooling import sequence_pooling
from jaxref.attention.positions import (
    alibi_slopes,
    harmonic_alibi_bias,
    rope_alibi_attention,
    rotary_embedding,
    sinusoidal_position_embedding,
)
from jaxref.attention.query_key import (
    query_key_reparameterization,
    query_key_reparameterized_attention,
)
from jaxref.attention.ring import into_zigzag, out_of_zigzag, ring_attention, zigzag_positions
from jaxref.attention.stability import normalize_query_key, query_key_norm_attention
from jaxref.attention.static_mixing import (
    CausalPairState,
    causal_pair_reduction,
    causal_pair_reduction_init,
    causal_pair_reduction_step,
)

__all__ = [
    "dot_product_attention",
    "KeyValueCache",
    "key_value_cache_init",
    "key_value_cache_append",
    "rotary_embedding",
    "sinusoidal_position_embedding",
    "alibi_slopes",
    "harmonic_alibi_bias",
    "rope_alibi_attention",
    "query_key_reparameterization",
    "query_key_reparameterized_attention",
    "normalize_query_key",
    "query_key_norm_attention",
    "attention_probabilities",
    "attention_entropy",
    "attention_entropy_lower_bound",
    "attention_entropy_regularizer",
    "EntropyProfile",
    "entropy_profile",
    "entropy_guided_attention",
    "scaled_fused_ffn",
    "sequence_pooling",
    "parameter_attention",
    "grow_parameter_tokens",
    "grow_optimizer_state",
    "CausalPairState",
    "causal_pair_reduction",
    "causal_pair_reduction_init",
    "causal_pair_reduction_step",
    "elu_plus_one",
    "linear_attention",
    "linear_self_attention",
    "gradient_descent_attention_weights",
    "one_step_gradient_descent_predictor",
    "optimal_in_context_step_size",
    "ridge_predictor",
    "third_order_attention",
    "higher_order_attention",
    "polynomial_features",
    "approximate_third_order_attention",
    "required_degree",
    "match_three_embedding",
    "harmonic_block_probability",
    "probabilistic_block_attention",
    "scatter_softmax",
    "point_grid_attention",
    "grid_to_points",
    "ring_attention",
    "zigzag_positions",
    "into_zigzag",
    "out_of_zigzag",
]
