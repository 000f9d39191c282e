"""Data: what is trained on, made or changed, as pure functions with explicit keys."""

from jaxref.data.audio import channel_swap, spec_augment_mask
from jaxref.data.blank_infilling import (
    BlankInfillingExample,
    blank_infilling_example,
)
from jaxref.data.co_teaching import co_teaching_losses, co_teaching_select, forget_rate_schedule
from jaxref.data.folds import stratified_k_fold
from jaxref.data.hard_negatives import hard_negative_tuple_indices
from jaxref.data.in_context import InContextPrompts, linear_regression_prompts
from jaxref.data.loss_reweighting import (
    loss_based_weights,
    reweighted_mean,
    temperature_schedule,
)
from jaxref.data.point_clouds import boundary_mask
from jaxref.data.rollout_selection import (
    down_sampling_schedule,
    group_relative_advantage,
    max_variance_subset,
    select_rollouts,
    select_tokens,
)
from jaxref.data.shortcuts import two_moons_shortcut
from jaxref.data.span_corruption import (
    CorruptedExample,
    corrupt_spans,
    mixed_objective_example,
    prefix_lm_mask,
    sample_span_mask,
)
from jaxref.data.stratified import stratified_batches
from jaxref.data.tokenization import (
    Segmentation,
    build_subword_vocabulary,
    maximum_likelihood_segmentation,
)

__all__ = [
    "InContextPrompts",
    "linear_regression_prompts",
    "boundary_mask",
    "maximum_likelihood_segmentation",
    "build_subword_vocabulary",
    "Segmentation",
    "stratified_k_fold",
    "two_moons_shortcut",
    "spec_augment_mask",
    "channel_swap",
    "stratified_batches",
    "forget_rate_schedule",
    "co_teaching_select",
    "co_teaching_losses",
    "hard_negative_tuple_indices",
    "sample_span_mask",
    "corrupt_spans",
    "mixed_objective_example",
    "prefix_lm_mask",
    "CorruptedExample",
    "group_relative_advantage",
    "max_variance_subset",
    "select_rollouts",
    "select_tokens",
    "down_sampling_schedule",
    "loss_based_weights",
    "reweighted_mean",
    "temperature_schedule",
    "blank_infilling_example",
    "BlankInfillingExample",
]
