"""Distillation on logits: a student's against a teacher's, softened by a temperature.

Every function reduces the class axis alone and returns the per-example values in the type of the
student's logits. `where` (boolean, broadcastable to the logits) says which classes exist for an
example; an example with none of them has loss 0. The teacher has no gradient.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import (
    canonical_axes,
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.labels import masked_log_softmax
from jaxref.core.numerics import compute_dtype
from jaxref.losses.cross_entropy import softmax_cross_entropy
from jaxref.losses.regression import log_cosh_loss


def soft_label_distillation_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: float = 10.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Divergence of the student's softened softmax from the teacher's: plain distillation.

        L = T² KL( softmax(t / T) || softmax(s / T) )

    for the logits s of the student and t of the teacher, T = temperature. The gradient with respect
    to s is T (softmax(s / T) - softmax(t / T)); T² keeps its size as T grows, where L tends to the
    squared distance of the centred logits over 2C. 0 where s and t differ by a constant.

    Args:
      student_logits: s `[..., classes]` floating point, the classes at `axis`.
      teacher_logits: t of the same shape, floating point; no gradient.
      temperature: T above 0. Default 10, the paper's; 1 to 4 is usual with few classes.
      axis: the class axis.
      where: boolean, broadcastable to the logits; classes to admit. Default: all.

    Returns:
      `[...]` losses in the type of `student_logits`, in nats, to relative precision where the two
      are close, too; 0 where no class is admitted.

    Raises:
      ValueError: shapes that do not match, no class, or a `temperature` that is not positive.
      TypeError: logits that are not floating point.

    Use it alone on data without labels, or add `softmax_cross_entropy` of the labels.
    `binary_kl_logit_loss` sees what a constant added to the logits changes;
    `plackett_luce_distillation_loss` the order of the classes.

    Cost: two softmaxes over the classes, and the teacher's forward pass.

    Example:
      >>> student = jnp.array([[1.0, 0.0], [2.0, 4.0]])
      >>> teacher = jnp.array([[0.0, 1.0], [3.0, 5.0]])
      >>> print(soft_label_distillation_loss(student, teacher, temperature=2.0).round(3))
      [0.49 0.  ]

    Reference: Shi, Yang, Xu, Kang, He, Lo, "Compressing Pre-trained Models of Code into 3 MB",
    2022, arXiv:2208.07120, after Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural
    Network", 2015, arXiv:1503.02531.
    """
    s, t = _checked(student_logits, teacher_logits, temperature, axis, where)
    divergence = softmax_divergence(t / temperature, s / temperature, axis=axis, where=where)
    return (temperature**2 * divergence).astype(jnp.result_type(student_logits))


def binary_kl_logit_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: float = 2.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Divergence of the student's sigmoids from the teacher's, class by class (BinaryKL).

        L = T² Σ_c KL( Bern(σ(t_c / T)) || Bern(σ(s_c / T)) )

    for the logits s of the student and t of the teacher, T = temperature. Each class is a decision
    of its own, so that the logits themselves are compared, and not what a softmax leaves of them.
    The gradient is T (σ(s_c / T) - σ(t_c / T)), which vanishes where both are large.

    Args:
      student_logits: s `[..., classes]` floating point, the classes at `axis`.
      teacher_logits: t of the same shape, floating point; no gradient.
      temperature: T above 0. Default 2, the paper's for CIFAR-100.
      axis: the class axis.
      where: boolean, broadcastable to the logits; classes to admit. Default: all.

    Returns:
      `[...]` losses in the type of `student_logits`, in nats, at least 0, and 0 where s = t alone.

    Raises:
      ValueError: shapes that do not match, no class, or a `temperature` that is not positive.
      TypeError: logits that are not floating point.

    Use it where classes are decisions of their own, and a constant added to the logits matters,
    which `soft_label_distillation_loss` does not see; `binary_kl_norm_logit_loss` has a gradient
    for large logits, too, and is what the paper trains with.

    Cost: a few passes over arrays of twice the logits' size, and the teacher's forward pass.

    Example:
      >>> loss = binary_kl_logit_loss(jnp.array([-2.0, -1.0, 0.0]), jnp.array([2.0, 3.0, 4.0]))
      >>> print(loss.round(3))
      4.791

    Reference: Yang, Zong, Huang, Feng, An, "Dual-Head Knowledge Distillation: Enhancing Logits
    Utilization with an Auxiliary Head", 2024, arXiv:2411.08937.
    """
    s, t = _checked(student_logits, teacher_logits, temperature, axis, where)
    # a sigmoid is the softmax of the logit and 0
    pairs = [jnp.stack([jnp.zeros_like(z), z / temperature], axis=-1) for z in (t, s)]
    loss = temperature**2 * jnp.sum(softmax_divergence(*pairs, axis=-1), axis=axis)
    return loss.astype(jnp.result_type(student_logits))


def binary_kl_norm_logit_loss(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: float = 2.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Divergence from even chances of the sigmoids of the logits' differences (BinaryKL-Norm).

        L = T² Σ_c KL( Bern(1/2) || Bern(σ((s_c - t_c) / T)) ) = T² Σ_c log cosh((s_c - t_c) / 2T)

    for the logits s of the student and t of the teacher, T = temperature. A function of s - t
    alone, with the gradient T (σ((s_c - t_c) / T) - 1/2): bounded by T/2, and not vanishing where
    both are large.

    Args:
      student_logits: s `[..., classes]` floating point, the classes at `axis`.
      teacher_logits: t of the same shape, floating point; no gradient.
      temperature: T above 0. Default 2, the paper's for CIFAR-100.
      axis: the class axis.
      where: boolean, broadcastable to the logits; classes to admit. Default: all.

    Returns:
      `[...]` losses in the type of `student_logits`, in nats, at least 0, and 0 where s = t alone.

    Raises:
      ValueError: shapes that do not match, no class, or a `temperature` that is not positive.
      TypeError: logits that are not floating point.

    Use it on an auxiliary head (`dual_head_distillation_loss`): together with cross-entropy on one
    head, a loss on the logits themselves makes the classifier collapse.

    Cost: one pass over the logits, without a softmax, and the teacher's forward pass.

    Example:
      >>> loss = binary_kl_norm_logit_loss(jnp.array([20.0, 1.0]), jnp.array([25.0, 1.0]))
      >>> print(loss.round(3))
      2.543

    Reference: Yang, Zong, Huang, Feng, An, "Dual-Head Knowledge Distillation: Enhancing Logits
    Utilization with an Auxiliary Head", 2024, arXiv:2411.08937.
    """
    s, t = _checked(student_logits, teacher_logits, temperature, axis, where)
    losses = log_cosh_loss((s - t) / (2 * temperature), 0.0)
    loss = temperature**2 * jnp.sum(losses, axis=axis)
    return loss.astype(jnp.result_type(student_logits))


def dual_head_distillation_loss(
    main_logits: ArrayLike,
    auxiliary_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    temperature: float = 2.0,
    classification_weight: float = 1.0,
    distillation_weight: float = 1.0,
    norm: bool = True,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Cross-entropy on one head and distillation on another, with one backbone (DHKD).

        L = γ CE(main, labels) + α BinaryKL-Norm(auxiliary, teacher)

    γ = classification_weight, α = distillation_weight. The two pull the backbone together, and each
    leaves the other's head alone.

    Args:
      main_logits: `[..., classes]` floating point, the classes at `axis`: the head for inference.
      auxiliary_logits: of the same shape, floating point: the head for training alone.
      teacher_logits: of the same shape, floating point; no gradient.
      labels: integer ids `[...]`, or distributions of the shape of `main_logits`. An id that is not
        an admitted class gives NaN for its example.
      temperature: of the distillation, above 0. Default 2, the paper's for CIFAR-100.
      classification_weight: γ at least 0. Default 1.
      distillation_weight: α at least 0. Default 1; the paper takes 0.1 for ImageNet.
      norm: whether the distillation is `binary_kl_norm_logit_loss`, as the paper's, or else
        `binary_kl_logit_loss`.
      axis: the class axis.
      where: boolean, broadcastable to the logits; classes to admit. Default: all.

    Returns:
      `[...]` losses in the type of `main_logits`, in nats; 0 where no class is admitted.

    Raises:
      ValueError: shapes that do not match, a `temperature` that is not positive, or a negative
        weight.
      TypeError: logits that are not floating point, or labels of a type that is neither.

    Use it for students that a loss on the logits themselves makes collapse on one head;
    `soft_label_distillation_loss` needs no second one. `jaxref.nn.DualHeadClassifier` has the two
    heads. Where the gradients of the two terms conflict, take them apart and through
    `jaxref.optimizers.align_gradients`, as the paper does.

    Cost: a softmax and a pass over the auxiliary logits, the teacher's forward pass, and a second
    head, which inference does not need.

    Example:
      >>> main, auxiliary, teacher = jnp.array([[2.0, 0.0], [1.0, 0.0], [5.0, 0.0]])
      >>> print(dual_head_distillation_loss(main, auxiliary, teacher, jnp.array(0)).round(3))
      1.862

    Reference: Yang, Zong, Huang, Feng, An, "Dual-Head Knowledge Distillation: Enhancing Logits
    Utilization with an Auxiliary Head", 2024, arXiv:2411.08937.
    """
    check_interval(
        0,
        jnp.inf,
        classification_weight=classification_weight,
        distillation_weight=distillation_weight,
    )
    check_floating(main_logits=main_logits, auxiliary_logits=auxiliary_logits)
    check_shape(jnp.shape(main_logits), auxiliary_logits=auxiliary_logits)
    # both terms are added before they are rounded to the type of the logits
    main, auxiliary = (
        jnp.asarray(z).astype(compute_dtype(main_logits, auxiliary_logits))
        for z in (main_logits, auxiliary_logits)
    )
    distill = binary_kl_norm_logit_loss if norm else binary_kl_logit_loss
    task = softmax_cross_entropy(main, labels, axis=axis, where=where)
    distillation = distill(
        auxiliary, teacher_logits, temperature=temperature, axis=axis, where=where
    )
    loss = classification_weight * task + distillation_weight * distillation
    return loss.astype(jnp.result_type(main_logits))


def softmax_divergence(
    teacher: Array, student: Array, *, axis: int, where: ArrayLike | None = None
) -> Array:
    """KL(softmax(teacher) || softmax(student)) over the classes that `where` admits.

    To relative precision where the two are close, too. Both in the type to compute in; 0 where no
    class is admitted.
    """
    log_q, log_p = (masked_log_softmax(z, axis=axis, where=where) for z in (teacher, student))
    q, difference = jnp.exp(log_q), student - teacher
    if where is not None:
        q, difference = (jnp.where(where, x, 0.0) for x in (q, difference))
    x = difference - jnp.sum(q * difference, axis=axis, keepdims=True)
    if where is not None:
        x = jnp.where(where, x, 0.0)
    is_small = jnp.max(jnp.abs(x), axis=axis, keepdims=True) < 0.5
    x = jnp.where(is_small, x, 0.0)
    # KL = log Σ q exp(x) with Σ q x = 0: nothing cancels in log(1 + Σ q (exp(x) - 1 - x))
    series = jnp.ones_like(x)
    for n in range(8, 2, -1):
        series = 1 + x / n * series
    close = jnp.log1p(jnp.sum(q * 0.5 * jnp.square(x) * series, axis=axis))
    apart = jnp.sum(q * (log_q - log_p), axis=axis)
    return jnp.where(jnp.squeeze(is_small, axis), close, apart)


def _checked(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    temperature: float,
    axis: int,
    where: ArrayLike | None,
) -> tuple[Array, Array]:
    """Both in the type to compute in, equal where classes do not exist, the teacher constant."""
    check_floating(student_logits=student_logits, teacher_logits=teacher_logits)
    check_interval(0, jnp.inf, closed="right", temperature=temperature)
    shape = jnp.shape(student_logits)
    check_shape(shape, teacher_logits=teacher_logits)
    check_broadcastable(shape, where=where)
    (axis,) = canonical_axes(axis, len(shape))
    if shape[axis] == 0:
        raise ValueError(f"student_logits must have at least one class, got shape {shape}")
    dtype = compute_dtype(student_logits, teacher_logits)
    s, t = (jnp.asarray(z).astype(dtype) for z in (student_logits, teacher_logits))
    if where is not None:
        s, t = (jnp.where(where, z, 0.0) for z in (s, t))
    return s, jax.lax.stop_gradient(t)
