"""Which layers to distil into which, and which of many ways to distil to try on a new task."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval, check_shape
from jaxref.core.numerics import compute_dtype

STRATEGIES = ("skip", "last", "first")


def layer_mapping(
    teacher_layers: int, student_layers: int, strategy: str = "skip"
) -> tuple[int, ...]:
    r"""The teacher's layer for each layer of the student, counted from 0.

        skip:   ⌊(i + 1) T / S⌋ - 1     spread over the teacher, its last layer included
        last:   T - S + i
        first:  i                       for the student's layer i = 0 ... S - 1

    Args:
      teacher_layers: T.
      student_layers: S, from 1 to T.
      strategy: "skip", "last" or "first". Default "skip".

    Returns:
      A tuple of S ids of the teacher's layers, from the lowest up.

    Raises:
      ValueError: S that is not from 1 to T, numbers that are not integers, or an unknown
        `strategy`.

    Use it to pair the states that `hidden_mse_loss` and its neighbours compare. With the
    embeddings as layer 0, as many models return them, add 1.

    Cost: S integers, without arrays.

    Example:
      >>> layer_mapping(12, 4), layer_mapping(12, 4, "last")
      ((2, 5, 8, 11), (8, 9, 10, 11))

    Reference: He, Shi, Mueller, Zha, Li, Karypis, "Distiller: A Systematic Study of Model
    Distillation Methods in Natural Language Processing", 2021, arXiv:2109.11105.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {sorted(STRATEGIES)}, got {strategy!r}")
    for name, number in {
        "teacher_layers": teacher_layers,
        "student_layers": student_layers,
    }.items():
        if not isinstance(number, int):
            raise ValueError(f"{name} must be an integer, got {number!r}")
    check_interval(1, teacher_layers, student_layers=student_layers)
    layers = range(student_layers)
    if strategy == "skip":
        return tuple((i + 1) * teacher_layers // student_layers - 1 for i in layers)
    offset = teacher_layers - student_layers if strategy == "last" else 0
    return tuple(offset + i for i in layers)


def recommend_pipeline(
    features: ArrayLike,
    scores: ArrayLike,
    candidates: ArrayLike,
    new_features: ArrayLike,
    *,
    top_k: int = 1,
    ridge: float = 1.0,
) -> tuple[Array, Array]:
    r"""The ways to distil that should do best on a new task, from how they did on others
    (AutoDistiller).

    The score of a way on a task, less the task's mean and over its standard deviation, is
    regressed on features of the task, choices of the way, and their products: ridge regression with
    the kernel

        k((x, c), (x', c')) = (1 + ⟨x, x'⟩ / F) (1 + ⟨c, c'⟩ / C)

    for the standardised features x of F numbers and the choices c of C. It predicts the score of
    each way on the new task. Without products, every task would be recommended the same.

    Args:
      features: `[tasks, F]`: what is known of each task before training, such as its number of
        examples, of classes, and the logarithms of both.
      scores: `[tasks, ways]`, higher for better: those of the teacher's share that the student
        reached, say. NaN where a way was not tried on a task.
      candidates: `[ways, C]`: the choices that each way is made of, one-hot.
      new_features: `[F]` of the new task.
      top_k: how many to recommend, from 1 to the number of ways. Default 1.
      ridge: the penalty, above 0. Default 1.

    Returns:
      The ids `[top_k]` int32 of the ways, best first, of equal ones the first; and their predicted
      scores, in standard deviations above a task's mean.

    Raises:
      ValueError: shapes that do not match, `top_k` out of range, or a `ridge` that is not positive.

    Use it with up to some hundreds of runs, to choose what to try first on a new task. The paper
    leaves the regression to an ensemble of tabular models (AutoGluon); take one where there are
    thousands.

    Cost: one linear system of all pairs of tasks and ways, tried or not: O((tasks · ways)³) time
    and the square in memory.

    Example:
      >>> features, candidates = jnp.array([[1.0], [2.0], [8.0], [9.0]]), jnp.eye(2)
      >>> scores = jnp.array([[0.9, 0.5], [0.8, 0.6], [0.5, 0.7], [0.6, 0.9]])
      >>> ids, predicted = recommend_pipeline(features, scores, candidates, jnp.array([10.0]))
      >>> print(ids)
      [1]

    Reference: He, Shi, Mueller, Zha, Li, Karypis, "Distiller: A Systematic Study of Model
    Distillation Methods in Natural Language Processing", 2021, arXiv:2109.11105.
    """
    check_interval(0, jnp.inf, closed="right", ridge=ridge)
    dtype = compute_dtype(features, scores, candidates, new_features)
    x, y, c, new = (
        jnp.asarray(values).astype(dtype) for values in (features, scores, candidates, new_features)
    )
    for name, array in {"features": x, "candidates": c}.items():
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(f"{name} must be a matrix with entries, got shape {array.shape}")
    check_shape((len(x), len(c)), scores=y)
    check_shape(x.shape[1:], new_features=new)
    if not isinstance(top_k, int) or not 1 <= top_k <= len(c):
        raise ValueError(f"top_k must be an integer from 1 to {len(c)}, got {top_k!r}")

    tried = ~jnp.isnan(y)
    mean, std = _moments(y, tried, axis=1)
    y = jnp.where(tried, y - mean, 0.0) / std
    mean, std = _moments(x, jnp.ones(x.shape, bool), axis=0)
    x, new = (x - mean) / std, (new - mean[0]) / std[0]
    with jax.default_matmul_precision("highest"):
        of_tasks, of_new = 1 + x @ x.T / x.shape[1], 1 + x @ new / x.shape[1]
        of_ways = 1 + c @ c.T / c.shape[1]
        both = tried.ravel()
        kernel = jnp.where(both[:, None] & both, jnp.kron(of_tasks, of_ways), 0.0)
        regular = kernel + ridge * jnp.eye(both.size, dtype=dtype)
        weights = jax.scipy.linalg.solve(regular, y.ravel(), assume_a="pos").reshape(y.shape)
        predicted = of_new @ weights @ of_ways
    best, ids = jax.lax.top_k(predicted, top_k)
    return ids.astype(jnp.int32), best


def _moments(values: Array, exists: Array, *, axis: int) -> tuple[Array, Array]:
    """Mean and standard deviation of those that exist; 0 without any, 1 without spread."""
    count = jnp.maximum(jnp.sum(exists, axis=axis, keepdims=True), 1)
    mean = jnp.sum(values, axis=axis, keepdims=True, where=exists) / count
    square = jnp.sum(jnp.square(values - mean), axis=axis, keepdims=True, where=exists) / count
    return mean, jnp.sqrt(jnp.where(square > 0, square, 1.0))
