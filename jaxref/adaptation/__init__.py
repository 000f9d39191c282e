"""Adaptation: models that go on learning where they are used."""

from jaxref.adaptation.federated import federated_round, fedwon_client_update
from jaxref.adaptation.few_shot import class_prototypes, imprint_class, novel_class_head
from jaxref.adaptation.test_time import class_correlation_loss, core_adapt_step
from jaxref.adaptation.transfer import inflate_input_channels

__all__ = [
    "class_correlation_loss",
    "class_prototypes",
    "novel_class_head",
    "imprint_class",
    "core_adapt_step",
    "federated_round",
    "fedwon_client_update",
    "inflate_input_channels",
]
