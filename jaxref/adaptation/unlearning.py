"""Unlearning of answers with the data to forget alone (FLAT), and how well examples are unlearned.

The f-divergence between template answers and the answers to forget has a variational form, the
best of E_template g(v) - E_forget f*(g(v)) over functions v. FLAT puts the model's own probability
of an answer in the place of v and ascends: templates are learned and the others forgotten, each
with a weight that never grows without bound as that of gradient ascent does.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_shape
from jaxref.core.exponential import linear_tail_exp
from jaxref.core.labels import expected_over_labels
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, sum_over_shards

FlatDivergence = Literal["total_variation", "jensen_shannon", "pearson", "kl"]
Pool = Literal["example", "batch"]

_DIVERGENCES: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "total_variation": (lambda v: jnp.tanh(v) / 2, lambda v: jnp.tanh(v) / 2),
    "jensen_shannon": (
        lambda v: math.log(2) - jax.nn.softplus(-v),
        lambda v: jax.nn.softplus(v) - math.log(2),
    ),
    "pearson": (lambda v: v, lambda v: jnp.square(v) / 4 + v),
    "kl": (lambda v: v, lambda v: linear_tail_exp(v - 1)),
}


def flat_loss(
    template_logits: ArrayLike,
    template_labels: ArrayLike,
    forget_logits: ArrayLike,
    forget_labels: ArrayLike,
    *,
    divergence: FlatDivergence = "total_variation",
    pool: Pool = "example",
    template_where: ArrayLike | None = None,
    forget_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""How probable an answer to forget is beside a template answer to the same prompt (FLAT).

        L = -g(P_e) + f*(g(P_f))

    of `flat_loss_of_log_probs`, with P_e and P_f the mean probabilities of the tokens of the
    template and of the answer to forget, each after its prompt, by softmax(logits).

    Args:
      template_logits: `[..., length, vocabulary]` floating point, of the prompt with a template.
      template_labels: integer ids `[..., length]`, the token that each position has to predict. One
        that is out of the vocabulary gives NaN where it counts.
      forget_logits: `[..., other length, vocabulary]`, of the prompt with the answer to forget.
      forget_labels: integer ids `[..., other length]`.
      divergence, pool, axis_name: as in `flat_loss_of_log_probs`.
      template_where: boolean, broadcastable to `template_labels`: the tokens of the answer, neither
        the prompt's nor padding. Default: all.
      forget_where: likewise, of `forget_labels`.

    Returns:
      `[...]` losses in the type of `template_logits`; a scalar where `pool` is "batch".

    Raises:
      ValueError: shapes that do not match, an unknown divergence or `pool`.
      TypeError: logits that are not floating point, or labels that are not integers.

    Use it to unlearn without data to retain and without a reference model. Where the vocabulary is
    large, `flat_loss_of_log_probs` needs no logits.

    Cost: two softmaxes over the vocabulary; a forward and backward pass of the model for both
    answers, none of a reference model.

    Example:
      >>> template, forget = jnp.zeros((1, 3, 4)), jnp.zeros((1, 2, 4))
      >>> labels = jnp.array([[1, 2, 3]])
      >>> print(flat_loss(template, labels, forget, labels[:, :2], divergence="pearson").round(4))
      [0.0156]

    Reference: Wang, Wei, Liu, Pang, Liu, Shah, Bao, Liu, Wei, "LLM Unlearning via Loss Adjustment
    with Only Forget Data", 2024, arXiv:2410.11143.
    """
    log_probs = []
    for name, logits, labels in (
        ("template", template_logits, template_labels),
        ("forget", forget_logits, forget_labels),
    ):
        check_floating(**{f"{name}_logits": logits})
        if jnp.ndim(logits) < 2:
            raise ValueError(
                f"{name}_logits must have shape [..., length, vocabulary], got {jnp.shape(logits)}"
            )
        check_shape(jnp.shape(logits)[:-1], **{f"{name}_labels": labels})
        if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
            raise TypeError(f"{name}_labels must be integers, got {jnp.result_type(labels).name}")
        log_probs.append(expected_over_labels(lambda log_p: log_p, labels, logits))
    losses = flat_loss_of_log_probs(
        *log_probs,
        divergence=divergence,
        pool=pool,
        template_where=template_where,
        forget_where=forget_where,
        axis_name=axis_name,
    )
    return losses.astype(jnp.result_type(template_logits))


def flat_loss_of_log_probs(
    template_log_probs: ArrayLike,
    forget_log_probs: ArrayLike,
    *,
    divergence: FlatDivergence = "total_variation",
    pool: Pool = "example",
    template_where: ArrayLike | None = None,
    forget_where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The loss of FLAT from the log-probabilities of the tokens of both answers.

        L = -g(P_e) + f*(g(P_f)),   P = `mean_answer_probability`

    with g and f* of `variational_f_divergence`. A step of descent learns the template with the
    weight g'(P_e), and forgets the other answer with the weight (f* ∘ g)'(P_f): both are bounded,
    and ∇P_f goes to 0 with P_f, so that nothing pulls on an answer that is forgotten.

    Args:
      template_log_probs: log p `[..., length]` floating point, of the tokens of template answers.
      forget_log_probs: log p `[..., other length]`, of the tokens of the answers to forget.
      divergence: "total_variation" (the default, that of the authors' configuration),
        "jensen_shannon", "pearson" or "kl".
      pool: what P is a mean of: the tokens of an "example" (the default), or of the whole "batch",
        as in the authors' code, where padding counts with probability 0.
      template_where: boolean, broadcastable to `template_log_probs`: the tokens of the answer.
        Default: all. Others may hold anything.
      forget_where: likewise, of `forget_log_probs`.
      axis_name: for the pool "batch": name or names of mapped axes over which it is spread.

    Returns:
      `[...]` losses in the type of `template_log_probs`; a scalar where `pool` is "batch". An
      answer without tokens adds nothing to its loss.

    Raises:
      ValueError: shapes that do not match, an unknown divergence or `pool`.
      TypeError: log-probabilities that are not floating point.

    Use it with the negative of `jaxref.kernels.linear_softmax_cross_entropy`, which forms no
    logits; else `flat_loss`.

    Cost: one pass over the tokens' log-probabilities, beside the forward and backward pass of both
    answers.

    Example:
      >>> template, forget = jnp.log(jnp.array([[0.5, 0.7]])), jnp.log(jnp.array([[0.2]]))
      >>> print(flat_loss_of_log_probs(template, forget, divergence="pearson").round(4))
      [-0.39]

    Reference: Wang, Wei, Liu, Pang, Liu, Shah, Bao, Liu, Wei, "LLM Unlearning via Loss Adjustment
    with Only Forget Data", 2024, arXiv:2410.11143.
    """
    activation, conjugate = variational_f_divergence(divergence)
    template, _ = _pooled(pool, axis_name, template_where, template_log_probs=template_log_probs)
    forget, exists = _pooled(pool, axis_name, forget_where, forget_log_probs=forget_log_probs)
    check_shape(
        jnp.shape(template_log_probs)[:-1] + jnp.shape(forget_log_probs)[-1:],
        forget_log_probs=forget_log_probs,
    )
    losses = jnp.where(exists, conjugate(forget), 0.0) - activation(template)
    return losses.astype(jnp.result_type(template_log_probs))


def mean_answer_probability(
    log_probs: ArrayLike,
    *,
    pool: Pool = "example",
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The mean probability of the tokens of an answer, in [0, 1].

        P = Σ_t m_t p_t / Σ_t m_t,   m = where

    of probabilities, not of their logarithms: one improbable token costs at most its share.

    Args:
      log_probs: log p `[..., length]` floating point, of the tokens that came. -inf is allowed.
      pool, axis_name: as in `flat_loss_of_log_probs`.
      where: boolean, broadcastable to `log_probs`: the tokens of the answer. Default: all.

    Returns:
      P `[...]` in the type of `log_probs`, 0 for an answer without tokens; a scalar where `pool` is
      "batch".

    Raises:
      ValueError: log-probabilities without an axis, a mask that does not fit, an unknown `pool`.
      TypeError: log-probabilities that are not floating point.

    Use it to follow what `flat_loss` does to either answer.

    Cost: one pass over the tokens' log-probabilities.

    Example:
      >>> log_probs = jnp.log(jnp.array([[0.5, 0.7, 0.1]]))
      >>> print(mean_answer_probability(log_probs, where=jnp.array([True, True, False])).round(3))
      [0.6]

    Reference: Wang, Wei, Liu, Pang, Liu, Shah, Bao, Liu, Wei, "LLM Unlearning via Loss Adjustment
    with Only Forget Data", 2024, arXiv:2410.11143.
    """
    mean, _ = _pooled(pool, axis_name, where, log_probs=log_probs)
    return mean.astype(jnp.result_type(log_probs))


def variational_f_divergence(
    name: FlatDivergence,
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    r"""The two functions of an f-divergence's variational form.

        D_f(p || q) = sup_v E_p g(v) - E_q f*(g(v)),   v: outcomes → reals

        name             g(v)                      f*(g(v))              best v
        total_variation  tanh(v) / 2               tanh(v) / 2           ±∞, as sign(p - q)
        jensen_shannon   log 2 - log(1 + e^(-v))   log(1 + e^v) - log 2  log(p / q)
        pearson          v                         v²/4 + v              2 (p / q - 1)
        kl               v                         e^(v - 1)             1 + log(p / q)

    with f* the conjugate of f and g a map into its domain. The divergences are Σ|p - q| / 2,
    KL(p || m) + KL(q || m) with m = (p + q) / 2, Σ (p - q)² / q, and KL(p || q).

    Args:
      name: of the first column.

    Returns:
      g and f* ∘ g, elementwise functions of v. The second has no log(2 - e^u), which the conjugate
      of Jensen-Shannon's loses its digits in.

    Raises:
      ValueError: an unknown name.

    Use it to bound a divergence from below by samples, or to see the weights of `flat_loss`: the
    derivatives of the two at P_e and P_f.

    Cost: elementwise functions.

    Example:
      >>> g, conjugate_of_g = variational_f_divergence("kl")
      >>> p, q = jnp.array([0.9, 0.1]), jnp.array([0.5, 0.5])
      >>> v = 1 + jnp.log(p / q)
      >>> print(jnp.sum(p * g(v) - q * conjugate_of_g(v)).round(4))
      0.3681

    Reference: Wang, Wei, Liu, Pang, Liu, Shah, Bao, Liu, Wei, "LLM Unlearning via Loss Adjustment
    with Only Forget Data", 2024, arXiv:2410.11143.
    """
    if name not in _DIVERGENCES:
        raise ValueError(f"divergence must be one of {tuple(_DIVERGENCES)}, got {name!r}")
    return _DIVERGENCES[name]


class UnlearningMetrics(NamedTuple):
    """What a model knows of examples to forget, and of others; each in [0, 1].

    Attributes:
      unlearning_accuracy: UA, the share of the examples to forget that is misclassified.
      retain_accuracy: RA, the accuracy on the rest of the training set.
      test_accuracy: TA, the accuracy on new examples.
      mia_efficacy: the share of the examples to forget that a membership inference attack takes for
        new ones.
    """

    unlearning_accuracy: Array
    retain_accuracy: Array
    test_accuracy: Array
    mia_efficacy: Array


class UnlearningGap(NamedTuple):
    """How far an unlearned model is from a retrained one.

    Attributes:
      average: the mean of the four differences.
      differences: |metric - metric of the retrained model|, each.
    """

    average: Array
    differences: UnlearningMetrics


def unlearning_metrics(
    forget_logits: ArrayLike,
    forget_labels: ArrayLike,
    retain_logits: ArrayLike,
    retain_labels: ArrayLike,
    test_logits: ArrayLike,
    test_labels: ArrayLike,
) -> UnlearningMetrics:
    r"""How well a classifier has forgotten, and what it still knows (UA, RA, TA, MIA).

        UA = 1 - accuracy(forget)    RA = accuracy(retain)    TA = accuracy(test)
        MIA = share of the forget set with p(label) < t

    The attack knows the confidence p(label) alone. It takes for members what is at or above the t
    among the confidences of the retain and test sets that tells these two apart best,

        t = argmax_t  share of retain at or above t - share of test at or above t,

    the lowest of equally good ones. The authors fit a support vector machine with a radial kernel
    to as many confidences of either set; on the line that is a threshold, but for its tails.

    Args:
      forget_logits: `[examples, classes]` floating point, on the examples to forget.
      forget_labels: integer ids `[examples]`, the true ones. One that is no class gives NaN.
      retain_logits, retain_labels: likewise, on the training examples to retain.
      test_logits, test_labels: likewise, on examples that were never trained on.

    Returns:
      `UnlearningMetrics`, float32 scalars.

    Raises:
      ValueError: shapes that do not match, or an empty set.
      TypeError: logits that are not floating point, or labels that are not integers.

    Use it on all of each set, with the model in evaluation mode. No value is good by itself: an
    ideal model has those of a model that was trained without the forget set, see `unlearning_gap`.

    Cost: a forward pass over all three sets; then a softmax for each example and sorts of the
    confidences, O(n log n).

    Example:
      >>> sure, unsure = jnp.array([[4.0, 0.0]]), jnp.array([[1.0, 0.0]])
      >>> label = jnp.array([0])
      >>> metrics = unlearning_metrics(unsure, label, sure, label, unsure, label)
      >>> print(metrics.unlearning_accuracy, metrics.mia_efficacy)
      0.0 1.0

    Reference: Fan, Liu, Zhang, Wong, Wei, Liu, "SalUn: Empowering Machine Unlearning via
    Gradient-based Weight Saliency in Both Image Classification and Generation", 2023,
    arXiv:2310.12508.
    """
    accuracies, confidences = {}, {}
    for name, logits, labels in (
        ("forget", forget_logits, forget_labels),
        ("retain", retain_logits, retain_labels),
        ("test", test_logits, test_labels),
    ):
        check_floating(**{f"{name}_logits": logits})
        if jnp.ndim(logits) != 2 or jnp.size(logits) == 0:
            raise ValueError(
                f"{name}_logits must have shape [examples, classes], got {jnp.shape(logits)}"
            )
        check_shape(jnp.shape(logits)[:1], **{f"{name}_labels": labels})
        if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
            raise TypeError(f"{name}_labels must be integers, got {jnp.result_type(labels).name}")
        confidences[name] = expected_over_labels(jnp.exp, labels, logits)
        hits = jnp.argmax(jnp.asarray(logits), axis=-1) == jnp.asarray(labels)
        accuracies[name] = jnp.mean(jnp.where(jnp.isnan(confidences[name]), jnp.nan, hits))
    members, others = jnp.sort(confidences["retain"]), jnp.sort(confidences["test"])
    thresholds = jnp.sort(jnp.concatenate([members, others]))
    told_apart = jnp.searchsorted(others, thresholds) / others.size
    told_apart -= jnp.searchsorted(members, thresholds) / members.size
    threshold = thresholds[jnp.argmax(told_apart)]
    return UnlearningMetrics(
        unlearning_accuracy=1 - accuracies["forget"],
        retain_accuracy=accuracies["retain"],
        test_accuracy=accuracies["test"],
        mia_efficacy=jnp.mean(confidences["forget"] < threshold, dtype=jnp.float32),
    )


def unlearning_gap(metrics: UnlearningMetrics, retrained: UnlearningMetrics) -> UnlearningGap:
    r"""How far an unlearned model is from one that never saw the examples to forget.

        gap = 1/4 Σ |M - M_retrained|   over M in UA, RA, TA, MIA

    Args:
      metrics: `unlearning_metrics` of the unlearned model.
      retrained: those of a model that was trained anew, without the forget set.

    Returns:
      `UnlearningGap`: the average, and each difference; 0 for a perfect method.

    Use it to rank methods of unlearning; forgetting more than the retrained model counts as badly
    as forgetting less.

    Cost: four differences, but a training from scratch for the model to compare with.

    Example:
      >>> gap = unlearning_gap(UnlearningMetrics(0.9, 1.0, 0.8, 0.5), UnlearningMetrics(*[0.8] * 4))
      >>> print(gap.average.round(3))
      0.15

    Reference: Fan, Liu, Zhang, Wong, Wei, Liu, "SalUn: Empowering Machine Unlearning via
    Gradient-based Weight Saliency in Both Image Classification and Generation", 2023,
    arXiv:2310.12508.
    """
    differences = UnlearningMetrics(
        *(jnp.abs(jnp.subtract(m, r)) for m, r in zip(metrics, retrained))
    )
    return UnlearningGap(jnp.mean(jnp.stack(differences)), differences)


def _pooled(
    pool: str, axis_name: AxisName | None, where: ArrayLike | None, **log_probs: ArrayLike
) -> tuple[Array, Array]:
    """The mean probability of the tokens that count, and whether there is any."""
    check_floating(**log_probs)
    ((name, values),) = log_probs.items()
    if jnp.ndim(values) == 0:
        raise ValueError(f"{name} must have shape [..., length], got ()")
    check_broadcastable(jnp.shape(values), where=where)
    if pool not in ("example", "batch"):
        raise ValueError(f"pool must be 'example' or 'batch', got {pool!r}")
    log_p = jnp.asarray(values)
    counted = jnp.broadcast_to(True if where is None else where, log_p.shape)
    # the argument of exp is guarded too: what does not count may be NaN
    p = jnp.where(
        counted, jnp.exp(jnp.where(counted, log_p.astype(compute_dtype(log_p)), 0.0)), 0.0
    )
    axis = -1 if pool == "example" else None
    total, count = jnp.sum(p, axis=axis), jnp.count_nonzero(counted, axis=axis)
    if pool == "batch":
        total, count = sum_over_shards((total, count), axis_name)
    return total / jnp.maximum(count, 1), count > 0
