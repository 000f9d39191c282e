"""Every classification loss against plain softmax cross-entropy, forward and backward.

Losses of logits and labels take [4096, 1000] at once, as does the peer; losses of single decisions
the same logits, each a decision of its own. Losses of a set of scores take 4096 scores, against
the binary cross-entropy of optax.
"""

import inspect
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxref import losses
from jaxref.bench.harness import Measurement, compiled_cost, interleave, progress, ratios

NAME = "losses_classification"
PEER = "optax softmax cross-entropy"
BINARY_PEER = "optax sigmoid cross-entropy"
ARGUMENTS: dict[str, dict[str, Any]] = {"truncated_poly_loss": {"num_terms": 3}}
"""What a loss cannot be called without."""


DEARER = {
    "rescaled_square_loss": "reads every wrong logit, and where the label stands among them",
    "squentropy": "reads every wrong logit besides the softmax",
    "crammer_singer_loss": "a search for the worst rival of the label, besides the pass over all",
    "label_distributionally_robust_loss": "two exponentials a class, exact for every temperature",
    "adaptive_ldr_loss": "a second softmax, its divergence from uniform, and normalised logits",
    "dual_focal_loss": "a softmax whose every class is compared with the label's",
    "ensemble_calibrated_loss": "draws and sorts as many random numbers as there are scores",
    "periodic_ensemble_calibrated_loss": "draws and sorts likewise",
    "one_way_partial_auc_loss": "all pairs of a positive and a negative",
    "two_way_partial_auc_loss": "all pairs of a positive and a negative",
}
"""Why a loss takes more than three times as long as plain cross-entropy."""
NO_LOSSES = ("fit_temperature", "logit_margin")
"""What takes logits and labels, too."""


def run(*, quick: bool = False, repeats: int = 10, only: str = "") -> Iterator[Measurement]:
    """`repeats` rounds of each loss; `only`: some of the losses, by commas."""
    repeats = 2 if quick else repeats
    rows, classes = (16, 8) if quick else (4096, 1000)
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(rows, classes)), jnp.float32)
    labels = jnp.asarray(rng.integers(classes, size=rows), jnp.int32)
    decisions = jnp.asarray(rng.integers(2, size=(rows, classes)), jnp.int32)
    softmax = optax.losses.softmax_cross_entropy_with_integer_labels
    sigmoid = optax.losses.sigmoid_binary_cross_entropy
    for first, second, case, arguments, peer, peer_function in (
        ("logits", "labels", f"rows={rows} classes={classes}", (logits, labels), PEER, softmax),
        (
            "logits",
            "targets",
            f"decisions={rows} x {classes}",
            (logits, decisions),
            BINARY_PEER,
            sigmoid,
        ),
        (
            "scores",
            "labels",
            f"scores={rows}",
            (logits[:, 0], decisions[:, 0]),
            BINARY_PEER,
            sigmoid,
        ),
    ):
        functions = {
            name: bound(name, rows)
            for name in found(first, second)
            if not only or name in only.split(",")
        }
        functions[peer] = peer_function
        yield from compared(f"{case} float32", functions, arguments, peer, repeats=repeats)


def found(first: str, second: str) -> Iterator[str]:
    """The losses of these two arguments and nothing else that `bound` cannot give them; of logits,
    those of single examples."""
    for name in losses.__all__:
        function = getattr(losses, name)
        asked = inspect.signature(function).parameters if callable(function) else {}
        given = {first, second, "key", "indices", "state", *ARGUMENTS.get(name, {})}
        needed = {n for n, parameter in asked.items() if parameter.default is parameter.empty}
        line = (function.__doc__ or "").partition("\n")[0]
        single = "of the set" not in line and "image" not in line
        fits = first == "scores" or (single and (second == "targets" or "axis" in asked))
        if list(asked)[:2] != [first, second] or name in NO_LOSSES:
            continue
        if needed <= given and fits:
            yield name


def bound(name: str, rows: int) -> Callable[[Array, Array], Array]:
    """The loss as a function of its first two arguments, from a fresh state where it has one."""
    function = getattr(losses, name)
    asked = inspect.signature(function).parameters
    given = {"key": jax.random.key(0), "indices": jnp.arange(rows)} | ARGUMENTS.get(name, {})
    given = {argument: value for argument, value in given.items() if argument in asked}
    if "state" not in asked:
        return partial(function, **given)
    state = getattr(losses, f"{name.removesuffix('_loss')}_init")(rows)
    return lambda predictions, targets: function(predictions, targets, state=state, **given)[0]


def compared(
    case: str,
    functions: Mapping[str, Callable[..., Array]],
    arguments: tuple[Array, ...],
    peer: str,
    *,
    repeats: int,
) -> Iterator[Measurement]:
    """Time and memory traffic of each function's mean and its gradient, over the peer's."""
    progress(case)
    compiled = {}
    for name, function in functions.items():
        compiled[name] = jax.jit(jax.value_and_grad(partial(_mean, function)))
    seconds = interleave(
        {name: partial(call, *arguments) for name, call in compiled.items()}, repeats=repeats
    )
    moved = {name: compiled_cost(call, *arguments).bytes for name, call in compiled.items()}
    times = {name: ratios(seconds, name, peer) for name in functions}
    for name in sorted(functions, key=times.__getitem__):
        median = statistics.median(seconds[name])
        if name == peer:
            yield Measurement(NAME, case, name, "seconds", median)
            yield Measurement(NAME, case, name, "bytes", moved[name])
        else:
            yield Measurement(NAME, case, name, "seconds", median, peer, times[name])
            if times[name] > 3:
                progress(f"above 3 x: {name}: {DEARER.get(name, 'no reason is known')}")
            share = moved[name] / moved[peer]
            yield Measurement(NAME, case, name, "bytes", moved[name], peer, share)


def _mean(function: Callable[..., Array], predictions: Array, targets: Array) -> Array:
    return jnp.mean(function(predictions, targets))
