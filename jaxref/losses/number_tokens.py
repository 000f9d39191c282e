"""Losses of language models on tokens that are numbers, for which 3 is nearer to 4 than 9 is."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.losses.cross_entropy import softmax_cross_entropy
from jaxref.losses.forecasting import ordinal_wasserstein_loss
from jaxref.losses.regression import absolute_error, huber_loss

NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")
WORD_BOUNDARIES = "▁Ġ "
"""What SentencePiece and byte-level BPE write for the space before a word."""


def number_token_values(vocabulary: Sequence[str] | Mapping[str, int]) -> np.ndarray:
    r"""The number that each token of a vocabulary is, NaN for those that are none.

    A token is a number where it is decimal digits, with a sign and a fraction or without, behind
    the mark of a word's beginning or not: "7", "-12", "3.5", "▁7", "Ġ7".

    Args:
      vocabulary: the tokens in the order of their ids, or a mapping of tokens to ids, such as a
        tokenizer's `get_vocab()`.

    Returns:
      float32 `[tokens]`. Ids that a mapping leaves out are NaN.

    Raises:
      ValueError: a negative id.

    Use it once, for `number_token_loss`. Where a vocabulary has digits and whole numbers, keep one
    kind: `np.where(np.abs(values) < 10, values, np.nan)`, say, as 2024 would outweigh all digits.

    Cost: one pass over the vocabulary, on the host.

    Example:
      >>> print(number_token_values(["a", "0", "1", "-2.5", "1e3"]))
      [ nan  0.   1.  -2.5  nan]

    Reference: Zausinger et al., "Regress, Don't Guess -- A Regression-like Loss on Number Tokens
    for Language Models", 2024, arXiv:2411.02083.
    """
    if isinstance(vocabulary, Mapping):
        ids = dict(vocabulary)
        check_interval(0, np.inf, vocabulary=np.array(list(ids.values()), np.int64))
    else:
        ids = {token: i for i, token in enumerate(vocabulary)}
    values = np.full(max(ids.values(), default=-1) + 1, np.nan, np.float32)
    for token, i in ids.items():
        text = token.lstrip(WORD_BOUNDARIES)
        if NUMBER.fullmatch(text):
            values[i] = float(text)
    return values


def number_token_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    token_values: ArrayLike,
    *,
    kind: str = "wasserstein",
    p: float = 2.0,
    delta: float | None = None,
    ignore_index: int = -100,
    where: ArrayLike | None = None,
) -> Array:
    r"""How far the numbers that a model predicts are from the label's number (NTL).

        wasserstein   L = Σ_j p_j |y - v_j|
        dot           L = |y - Σ_j p_j v_j|^p,  or Huber's of that difference with `delta`

    with the values v of the tokens that are numbers, the softmax p over the logits of those alone,
    and the label's value y. The first, the Wasserstein distance, is 0 for the label alone; the
    second for any spread whose mean is y. Tokens that are no numbers get no gradient.

    Args:
      logits: `[..., tokens]` floating point.
      labels: integer ids `[...]`, or distributions of the shape of `logits`, whose mass on numbers
        weighs the loss. An id that is no token gives NaN for its example.
      token_values: v `[tokens]`, NaN for tokens that are no numbers, as of `number_token_values`;
        known when it is called.
      kind: "wasserstein", the default (NTL-WAS), or "dot" (NTL-MSE with p = 2, NTL-MAE with p = 1).
      p: at least 1, the power of "dot". Default 2.
      delta: above 0; where given, "dot" takes Huber's loss, which is quadratic up to `delta`, in
        place of the power. Default: not.
      ignore_index: the id of labels that do not count. Default -100.
      where: boolean, broadcastable to the labels `[...]` without classes: the positions that count;
        the others may hold anything. Default: all.

    Returns:
      `[...]` losses in the type of `logits`: 0 where the label is no number, and where the position
      does not count. A mean should be one over the labels that are numbers.

    Raises:
      ValueError: less than two numbers, an infinite one, an unknown `kind`, `p` below 1, `delta`
        not positive, or shapes that do not match.
      TypeError: logits not floating point, labels of a type that is neither, or `token_values` that
        are traced.

    Use it added to cross-entropy, as `number_token_cross_entropy` does, which alone does not know
    that 9 is farther from 4 than 3 is. `ordinal_wasserstein_loss` is for series.

    Cost: that of a softmax over the tokens that are numbers alone; on the host a sort of their
    values, once under jit.

    Example:
      >>> values = number_token_values(["a", "0", "4", "8"])
      >>> logits = jnp.log(jnp.array([[0.2, 0.4, 0.0, 0.4]]))
      >>> print(number_token_loss(logits, jnp.array([2]), values))
      [4.]
      >>> print(number_token_loss(logits, jnp.array([2]), values, kind="dot"))
      [0.]

    Reference: Zausinger et al., "Regress, Don't Guess -- A Regression-like Loss on Number Tokens
    for Language Models", 2024, arXiv:2411.02083.
    """
    check_floating(logits=logits)
    check_interval(1, jnp.inf, p=p)
    if delta is not None:
        check_interval(0, jnp.inf, closed="right", delta=delta)
    if kind not in ("wasserstein", "dot"):
        raise ValueError(f"kind must be 'wasserstein' or 'dot', got {kind!r}")
    numbers, values = _numbers_in_order(token_values)
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    check_shape((*logits.shape[:-1], np.size(token_values)), logits=logits)
    counted = _counted(logits, labels, ignore_index, where)
    wide = logits[..., numbers].astype(compute_dtype(logits))
    if jnp.issubdtype(labels.dtype, jnp.integer):
        place = np.full(logits.shape[-1], -1, np.int32)
        place[numbers] = np.arange(numbers.size)
        known = (labels >= 0) & (labels < place.size)
        target = jnp.where(known, jnp.asarray(place)[jnp.where(known, labels, 0)], numbers.size)
        counted &= target >= 0
    else:
        target = labels[..., numbers].astype(wide.dtype)
    if kind == "wasserstein":
        loss = ordinal_wasserstein_loss(wide, target, values, where=counted)
    else:
        loss = _loss_of_mean(wide, target, values, counted, p, delta)
    return loss.astype(logits.dtype)


def number_token_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    token_values: ArrayLike,
    *,
    number_weight: float = 0.3,
    kind: str = "wasserstein",
    p: float = 2.0,
    delta: float | None = None,
    ignore_index: int = -100,
    where: ArrayLike | None = None,
) -> Array:
    r"""Cross-entropy over all tokens, and the number token loss where the label is a number.

        L = -log softmax_label(f) + w NTL,   f = logits,   w = number_weight

    Args:
      logits: `[..., tokens]` floating point.
      labels: integer ids `[...]`, or distributions of the shape of `logits`. An id that is no token
        gives NaN for its example.
      token_values: `[tokens]`, NaN for tokens that are no numbers; known when it is called.
      number_weight: w at least 0. Default 0.3, the paper's; 0 is cross-entropy alone.
      kind, p, delta: as for `number_token_loss`.
      ignore_index: the id of labels that do not count. Default -100.
      where: boolean, broadcastable to the labels `[...]` without classes: the positions that count;
        the others have loss 0 and may hold anything. Default: all.

    Returns:
      `[...]` losses of the tokens in the type of `logits`. The paper averages the two parts each
      over its own labels, all and numbers; to do so, add the means of the two losses.

    Raises:
      ValueError: a negative `number_weight`, and what `number_token_loss` refuses.
      TypeError: as `number_token_loss`.

    Use it to train a language model on text with numbers that have to be about right: of regression
    written out, or of sums; `softmax_cross_entropy` is enough where numbers are but names.

    Cost: that of `softmax_cross_entropy` over all tokens; the second part reads the numbers' logits
    alone.

    Example:
      >>> values = number_token_values(["a", "0", "4", "8"])
      >>> logits = jnp.log(jnp.array([[0.2, 0.2, 0.4, 0.2], [0.2, 0.2, 0.4, 0.2]]))
      >>> loss = number_token_cross_entropy(logits, jnp.array([0, 3]), values)
      >>> print(loss.round(2))
      [1.61 2.81]

    Reference: Zausinger et al., "Regress, Don't Guess -- A Regression-like Loss on Number Tokens
    for Language Models", 2024, arXiv:2411.02083.
    """
    check_interval(0, jnp.inf, number_weight=number_weight)
    check_floating(logits=logits)
    options: dict[str, Any] = {"kind": kind, "p": p, "delta": delta, "ignore_index": ignore_index}
    wide, labels = jnp.asarray(logits).astype(compute_dtype(logits)), jnp.asarray(labels)
    numbers = number_token_loss(wide, labels, token_values, where=where, **options)
    counted = _counted(wide, labels, ignore_index, where)
    of_label = counted if labels.ndim == counted.ndim else counted[..., None]
    tokens = softmax_cross_entropy(
        jnp.where(counted[..., None], wide, 0.0), jnp.where(of_label, labels, 0)
    )
    loss = jnp.where(counted, tokens, 0.0) + number_weight * numbers
    return loss.astype(jnp.result_type(logits))


def _numbers_in_order(token_values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The ids of the tokens that are numbers in ascending order of their values, and those."""
    if isinstance(token_values, jax.core.Tracer):
        raise TypeError("token_values must be known when it is called, got a traced array")
    values = np.asarray(token_values, np.float64)
    if values.ndim != 1:
        raise ValueError(f"token_values must have shape [tokens], got {values.shape}")
    numbers = np.flatnonzero(~np.isnan(values))
    if numbers.size < 2:
        raise ValueError(f"token_values must have at least two numbers, got {numbers.size}")
    check_interval(-np.inf, np.inf, token_values=values[numbers])
    numbers = numbers[np.argsort(values[numbers], kind="stable")]
    return numbers, values[numbers]


def _counted(logits: Array, labels: Array, ignore_index: int, where: ArrayLike | None) -> Array:
    """The positions `[...]` that `where` admits and whose label is not to be ignored."""
    positions = logits.shape[:-1]
    check_broadcastable(positions, where=where)
    counted = jnp.broadcast_to(True if where is None else where, positions)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        check_shape(positions, labels=labels)
        return counted & (labels != ignore_index)
    if not jnp.issubdtype(labels.dtype, jnp.floating):
        raise TypeError(f"labels must be integer ids or a distribution, got {labels.dtype.name}")
    check_shape(logits.shape, labels=labels)
    return counted


def _loss_of_mean(
    logits: Array,
    target: Array,
    values: np.ndarray,
    counted: Array,
    p: float,
    delta: float | None,
) -> Array:
    """The loss of the mean number against the label's, of logits over the numbers alone."""
    v = jnp.asarray(values, logits.dtype)
    mean = jnp.sum(jax.nn.softmax(jnp.where(counted[..., None], logits, 0.0)) * v, axis=-1)
    if jnp.issubdtype(target.dtype, jnp.integer):
        label = jnp.take(v, target, mode="fill", fill_value=jnp.nan)
        mass = jnp.ones_like(mean)
    else:
        target = jnp.where(counted[..., None], target, 0.0)
        mass = jnp.sum(target, axis=-1)
        label = jnp.sum(target * v, axis=-1) / jnp.where(mass == 0, 1.0, mass)
    if delta is not None:
        return mass * huber_loss(mean, label, delta=delta, where=counted)
    return mass * absolute_error(mean, label, where=counted) ** p
