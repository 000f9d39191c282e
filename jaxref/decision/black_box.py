"""Search for the best configuration of a function that has no gradient."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxref.core.checks import check_interval


class Gaussian(NamedTuple):
    """A real parameter of `cross_entropy_search`, and where to look for it first.

    Attributes:
      mean: of the first samples.
      std: of the first samples, above 0.
    """

    mean: float
    std: float


class CrossEntropyResult(NamedTuple):
    """What `cross_entropy_search` found.

    Attributes:
      best: the configuration of the least value seen.
      value: that value.
      thresholds: the largest value of the elite, round by round.
      distributions: by name, the last `Gaussian`, or the probabilities of the choices.
    """

    best: dict[str, Any]
    value: float
    thresholds: tuple[float, ...]
    distributions: dict[str, Any]


def cross_entropy_search(
    key: jax.Array,
    objective: Callable[[dict[str, Any]], float],
    space: Mapping[str, Gaussian | Sequence[Any]],
    *,
    num_samples: int = 100,
    elite_fraction: float = 0.1,
    smoothing: float = 0.7,
    num_iterations: int = 20,
) -> CrossEntropyResult:
    r"""Minimises a function by sampling and refitting to the best samples (cross-entropy method).

    Each round draws N configurations from independent factors with parameters θ, takes the share
    ρ with the least values as its elite, fits θ' to them by maximum likelihood, and moves

        θ ← s θ' + (1 - s) θ

    with probabilities of the choices, or mean and standard deviation, as θ. It stops when the
    elite's largest value has not come down for 5 rounds.

    Args:
      key: random key of the whole search.
      objective: from a dictionary with a value for each name to a number; NaN counts as infinite.
      space: by name, the choices of a categorical parameter, or a `Gaussian`.
      num_samples: N at least 1. Default 100.
      elite_fraction: ρ in (0, 1], of which at least one sample. Default 0.1.
      smoothing: s in (0, 1]; below 1 no choice is lost after one unlucky round. Default 0.7.
      num_iterations: rounds at most, at least 1. Default 20.

    Returns:
      The `CrossEntropyResult`.

    Raises:
      ValueError: an empty space, a parameter without choices, a standard deviation that is not
        positive, or a number that is out of range.

    Use it for a handful of hyperparameters, categorical ones among them, that some hundred
    evaluations are affordable for; where there are gradients, follow those.

    Cost: at most num_iterations · num_samples evaluations, one after the other, 2000 by default.

    Example:
      >>> space = {"x": Gaussian(0.0, 2.0), "sign": (-1, 1)}
      >>> distance = lambda at: (at["x"] - 3.0) ** 2 + at["sign"]
      >>> found = cross_entropy_search(jax.random.key(0), distance, space)
      >>> found.best["sign"], round(found.best["x"], 1)
      (-1, 3.0)

    Reference: Li, "The Nature of Mathematical Modeling and Probabilistic Optimization Engineering
    in Generative AI", 2024, arXiv:2410.18441.
    """
    check_interval(1, np.inf, num_samples=num_samples, num_iterations=num_iterations)
    check_interval(0, 1, closed="right", elite_fraction=elite_fraction, smoothing=smoothing)
    if not space:
        raise ValueError("space must have at least one parameter, got none")
    factors: dict[str, Any] = {}
    for name, factor in space.items():
        if isinstance(factor, Gaussian):
            check_interval(-np.inf, np.inf, mean=factor.mean)
            check_interval(0, np.inf, closed="neither", std=factor.std)
            factors[name] = factor
        elif len(factor) == 0:
            raise ValueError(f"space[{name!r}] must have at least one choice, got none")
        else:
            factors[name] = np.full(len(factor), 1 / len(factor))
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    num_elite = max(1, round(elite_fraction * num_samples))
    best: dict[str, Any] = {}
    least, thresholds = np.inf, []

    def value_of(name: str, draw: Any) -> Any:
        choices = space[name]
        return float(draw) if isinstance(choices, Gaussian) else choices[draw]

    for _ in range(num_iterations):
        draws = {
            name: rng.normal(*factor, size=num_samples)
            if isinstance(factor, Gaussian)
            else rng.choice(len(factor), size=num_samples, p=factor)
            for name, factor in factors.items()
        }
        samples = [
            {name: value_of(name, draws[name][i]) for name in space} for i in range(num_samples)
        ]
        values = np.array([float(objective(sample)) for sample in samples])
        values = np.where(np.isnan(values), np.inf, values)
        order = np.argsort(values, kind="stable")
        if values[order[0]] < least or not best:
            best, least = samples[order[0]], float(values[order[0]])
        elite = order[:num_elite]
        thresholds.append(float(values[elite[-1]]))
        for name, factor in factors.items():
            chosen = draws[name][elite]
            if isinstance(factor, Gaussian):
                fitted = np.array([chosen.mean(), chosen.std()])
                factors[name] = Gaussian(*map(float, _mix(fitted, np.array(factor), smoothing)))
            else:
                fitted = np.bincount(chosen, minlength=len(factor)) / num_elite
                factors[name] = _mix(fitted, factor, smoothing)
        if len(thresholds) > 5 and min(thresholds[-5:]) >= min(thresholds[:-5]):
            break
    return CrossEntropyResult(best, least, tuple(thresholds), factors)


def _mix(new: np.ndarray, old: np.ndarray, smoothing: float) -> np.ndarray:
    return smoothing * new + (1 - smoothing) * old
