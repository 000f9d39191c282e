"""Metric-learning losses against PyTorch Metric Learning, forward and backward.

Both compute the loss of the same batch and its gradients by all that is learned: embeddings, and
where there are, the classes' weights. PyTorch's threads are as many as it takes by itself.
"""

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxref import losses
from jaxref.bench.harness import Measurement, interleave, optional_peer, progress, ratios

NAME = "metric_learning"
PEER = "pytorch_metric_learning"


class Compared(NamedTuple):
    """A loss of embeddings, labels and classes' weights, and the peer's name and arguments for it.

    Attributes:
      loss: `loss(embeddings, labels, class_weights) -> values`, whose mean is taken.
      peer: the name of the peer's class.
      arguments: its arguments, but for the sizes of `class_weights`.
      has_weights: whether the peer holds classes' weights.
    """

    loss: Callable[..., Any]
    peer: str
    arguments: dict[str, Any]
    has_weights: bool


def _two_views(x: Any, labels: Any, weights: Any) -> Any:
    del labels, weights
    return losses.nt_xent_loss(*jnp.split(x, 2), temperature=0.1)


def _of_pairs(x: Any, labels: Any, weights: Any) -> Any:
    del weights
    return losses.threshold_consistent_margin_loss(x, labels)


LOSSES = {
    "nt_xent_loss": Compared(_two_views, "NTXentLoss", {"temperature": 0.1}, False),
    "threshold_consistent_margin_loss": Compared(
        _of_pairs, "ThresholdConsistentMarginLoss", {}, False
    ),
    "arcface_loss": Compared(
        lambda x, labels, weights: losses.arcface_loss(x, weights, labels, scale=64.0, margin=0.5),
        "ArcFaceLoss",
        {"scale": 64.0, "margin": np.degrees(0.5)},
        True,
    ),
    "cosface_loss": Compared(
        lambda x, labels, weights: losses.cosface_loss(x, weights, labels, scale=64.0, margin=0.35),
        "CosFaceLoss",
        {"scale": 64.0, "margin": 0.35},
        True,
    ),
}


def run(*, quick: bool = False, repeats: int = 20) -> Iterator[Measurement]:
    """Batches of 256 and 512 embeddings of 128 features; 1000 classes where they have weights."""
    peers = optional_peer("pytorch_metric_learning.losses")
    for batch in (16,) if quick else (256, 512):
        features, classes = (8, 5) if quick else (128, 1000)
        rng = np.random.default_rng(0)
        embeddings = rng.normal(size=(batch, features)).astype(np.float32)
        weights = rng.normal(size=(classes, features)).astype(np.float32)
        for name, compared in LOSSES.items():
            count = classes if compared.has_weights else batch // 2
            labels = np.arange(batch) % count  # of two views, those of one example
            case = f"{name} batch={batch} features={features}"
            progress(case)
            calls = {"jaxref": _ours(compared, embeddings, labels, weights)}
            if peers is not None:
                calls[PEER] = _theirs(peers, compared, embeddings, labels, weights)
            seconds = interleave(calls, repeats=2 if quick else repeats, pause=0.2)
            for who in calls:
                median = statistics.median(seconds[who])
                peer = PEER if who != PEER and PEER in calls else None
                ratio = None if peer is None else ratios(seconds, who, peer)
                yield Measurement(NAME, case, who, "seconds", median, peer, ratio)


def _ours(
    compared: Compared, embeddings: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> Callable[[], Any]:
    def mean(embeddings: Any, weights: Any, labels: Any) -> Any:
        return jnp.mean(compared.loss(embeddings, labels, weights))

    learned = (0, 1) if compared.has_weights else (0,)
    gradient = jax.jit(jax.value_and_grad(mean, argnums=learned))
    return partial(gradient, *map(jnp.asarray, (embeddings, weights, labels)))


def _theirs(
    peers: Any, compared: Compared, embeddings: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> Callable[[], Any]:
    import torch

    sizes = {"num_classes": weights.shape[0], "embedding_size": weights.shape[1]}
    loss = getattr(peers, compared.peer)(
        **compared.arguments, **(sizes if compared.has_weights else {})
    )
    x, ids = torch.tensor(embeddings, requires_grad=True), torch.tensor(labels)
    learned = [x]
    if compared.has_weights:
        loss.W.data = torch.tensor(weights.T.copy())
        learned.append(loss.W)

    def call() -> Any:
        return torch.autograd.grad(loss(x, ids), learned)

    return call
