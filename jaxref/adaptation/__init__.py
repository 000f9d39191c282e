"""Adaptation: models that go on learning where they are used."""

from jaxref.adaptation.federated import federated_round, fedwon_client_update
from jaxref.adaptation.few_shot import class_prototypes, imprint_class, novel_class_head
from jaxref.adaptation.knowledge_isolation import (
    CausalTrace,
    ConstrainedUnlearningState,
    adaptive_retain_multiplier,
    causal_tracing,
    constrained_unlearning_init,
    constrained_unlearning_loss,
    layer_filter,
)
from jaxref.adaptation.test_time import class_correlation_loss, core_adapt_step
from jaxref.adaptation.transfer import inflate_input_channels
from jaxref.adaptation.unlearning import (
    UnlearningGap,
    UnlearningMetrics,
    flat_loss,
    flat_loss_of_log_probs,
    mean_answer_probability,
    unlearning_gap,
    unlearning_metrics,
    variational_f_divergence,
)
from jaxref.adaptation.unlearning_saliency import (
    loreun_loss,
    loss_reweighting,
    masked_updates,
    random_label_forget_loss,
    saliency_mask,
    salun_classification_loss,
    salun_diffusion_loss,
)

__all__ = [
    "class_correlation_loss",
    "class_prototypes",
    "novel_class_head",
    "imprint_class",
    "core_adapt_step",
    "federated_round",
    "fedwon_client_update",
    "inflate_input_channels",
    "flat_loss",
    "flat_loss_of_log_probs",
    "mean_answer_probability",
    "variational_f_divergence",
    "UnlearningMetrics",
    "UnlearningGap",
    "unlearning_metrics",
    "unlearning_gap",
    "saliency_mask",
    "masked_updates",
    "random_label_forget_loss",
    "salun_classification_loss",
    "salun_diffusion_loss",
    "loss_reweighting",
    "loreun_loss",
    "ConstrainedUnlearningState",
    "CausalTrace",
    "adaptive_retain_multiplier",
    "constrained_unlearning_init",
    "constrained_unlearning_loss",
    "layer_filter",
    "causal_tracing",
]
