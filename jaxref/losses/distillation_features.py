"""Distillation of hidden states and attention: what a student's layer does against a teacher's.

States are compared feature by feature: bring a student of another width to the teacher's with a
learned projection first. `where` (boolean) says which tokens exist; excluded ones have loss 0. The
teacher has no gradient.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_broadcastable, check_floating, check_shape
from jaxref.core.labels import masked_log_softmax
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean
from jaxref.core.vectors import unit_vectors


def hidden_mse_loss(
    student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""The mean square difference of two hidden states, token by token.

        L = mean_d (s_d - t_d)²

    Args:
      student: s `[..., features]` floating point.
      teacher: t of the same shape, floating point; no gradient.
      where: boolean, broadcastable to `[...]`: the tokens that exist. Default: all.

    Returns:
      `[...]` losses in the type of `student`; the paper's is their mean over the tokens that exist.

    Raises:
      ValueError: shapes that do not match.
      TypeError: states that are not floating point.

    Use it where student and teacher have states of one kind and scale: it is the bound on the
    mutual information for a Gaussian critic of fixed width; `hidden_cosine_loss` does not see
    lengths, `mi_alpha_loss` sees other samples.

    Cost: one pass over the states, and the teacher's forward pass.

    Example:
      >>> print(hidden_mse_loss(jnp.array([[1.0, 3.0]]), jnp.array([[1.0, 1.0]])))
      [2.]

    Reference: He, Shi, Mueller, Zha, Li, Karypis, "Distiller: A Systematic Study of Model
    Distillation Methods in Natural Language Processing", 2021, arXiv:2109.11105.
    """
    s, t = _states(student, teacher, where)
    return jnp.mean(jnp.square(s - t), axis=-1).astype(jnp.result_type(student))


def hidden_cosine_loss(
    student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""One minus the cosine of two hidden states, token by token.

        L = 1 - ⟨s, t⟩ / (||s|| ||t||)

    Args:
      student: s `[..., features]` floating point.
      teacher: t of the same shape, floating point; no gradient.
      where: boolean, broadcastable to `[...]`: the tokens that exist. Default: all.

    Returns:
      `[...]` losses in [0, 2] in the type of `student`; a vector of zeros has loss 1 and gradient
      0. The paper's is their mean over the tokens that exist.

    Raises:
      ValueError: shapes that do not match.
      TypeError: states that are not floating point.

    Use it where the length of a state means little; `patient_distillation_loss` is twice this.

    Cost: two passes over the states, for lengths and products, and the teacher's forward pass.

    Example:
      >>> print(hidden_cosine_loss(jnp.array([[3.0, 4.0]]), jnp.array([[2.0, 0.0]])).round(3))
      [0.4]

    Reference: He, Shi, Mueller, Zha, Li, Karypis, "Distiller: A Systematic Study of Model
    Distillation Methods in Natural Language Processing", 2021, arXiv:2109.11105.
    """
    s, t = _states(student, teacher, where)
    loss = 1 - jnp.sum(unit_vectors(s) * unit_vectors(t), axis=-1)
    if where is not None:
        loss = jnp.where(where, loss, 0.0)
    return loss.astype(jnp.result_type(student))


def patient_distillation_loss(
    student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""The square distance of two hidden states of length 1 (PKD).

        L = || s / ||s|| - t / ||t|| ||²

    Args:
      student: s `[..., features]` floating point, such as the states of the first token of each
        sequence, in the layers of `layer_mapping`.
      teacher: t of the same shape, floating point; no gradient.
      where: boolean, broadcastable to `[...]`: the states that exist. Default: all.

    Returns:
      `[...]` losses in [0, 4] in the type of `student`, to relative precision where the two are
      close. A vector of zeros stays one.

    Raises:
      ValueError: shapes that do not match.
      TypeError: states that are not floating point.

    Use it on one state for each sequence, where `hidden_cosine_loss` is for all tokens: but for the
    factor of 2 they are the same.

    Cost: two passes over the states, of one token for each sequence as a rule, and the teacher's
    forward pass.

    Example:
      >>> print(patient_distillation_loss(jnp.array([3.0, 4.0]), jnp.array([2.0, 0.0])).round(3))
      0.8

    Reference: He, Shi, Mueller, Zha, Li, Karypis, "Distiller: A Systematic Study of Model
    Distillation Methods in Natural Language Processing", 2021, arXiv:2109.11105, after Sun, Cheng,
    Gan, Liu, "Patient Knowledge Distillation for BERT Model Compression", 2019, arXiv:1908.09355.
    """
    s, t = _states(student, teacher, where)
    loss = jnp.sum(jnp.square(unit_vectors(s) - unit_vectors(t)), axis=-1)
    return loss.astype(jnp.result_type(student))


def attention_cross_entropy_loss(
    student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""Cross-entropy of the student's attention with the teacher's, query by query.

        L = -Σ_k softmax(t)_k log softmax(s)_k

    Args:
      student: s `[..., queries, keys]` floating point: scores before the softmax.
      teacher: t of the same shape, floating point; no gradient.
      where: boolean, broadcastable to `student`: the keys that a query may attend to. Default: all.

    Returns:
      `[..., queries]` losses in the type of `student`, in nats: the teacher's entropy at least, and
      more by the divergence of the two. 0 for a query without any key; the paper's is the mean over
      the queries that exist.

    Raises:
      ValueError: shapes that do not match.
      TypeError: scores that are not floating point.

    Use it where both have the same number of heads, or with the mean over heads. The constant apart
    it is `soft_label_distillation_loss` at temperature 1.

    Cost: two softmaxes of `[..., queries, keys]`, whose scores have to be in memory for both: no
    fused attention.

    Example:
      >>> scores = jnp.array([[2.0, 0.0], [0.0, 0.0]])
      >>> print(attention_cross_entropy_loss(scores, jnp.zeros((2, 2))).round(2))
      [1.13 0.69]

    Reference: He, Shi, Mueller, Zha, Li, Karypis, "Distiller: A Systematic Study of Model
    Distillation Methods in Natural Language Processing", 2021, arXiv:2109.11105.
    """
    check_floating(student=student, teacher=teacher)
    check_shape(jnp.shape(student), teacher=teacher)
    check_broadcastable(jnp.shape(student), where=where)
    dtype = compute_dtype(student, teacher)
    s, t = (jnp.asarray(x).astype(dtype) for x in (student, jax.lax.stop_gradient(teacher)))
    log_p, log_q = (masked_log_softmax(x, axis=-1, where=where) for x in (s, t))
    # log_p is 0 where there is no key
    loss = -jnp.sum(jnp.exp(log_q) * log_p, axis=-1)
    return loss.astype(jnp.result_type(student))


def gram_distillation_loss(
    student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    r"""The mean square difference of the tokens' similarities to each other.

        L = mean_{n,m} ( ⟨s_n, s_m⟩ / D_s - ⟨t_n, t_m⟩ / D_t )²

    over the pairs of tokens of a sequence, for D_s and D_t features: the squared maximum mean
    discrepancy of neuron selectivity transfer. No projection is needed, whatever the two widths.

    Args:
      student: s `[..., tokens, D_s]` floating point.
      teacher: t `[..., tokens, D_t]` floating point; no gradient.
      where: boolean, broadcastable to `[..., tokens]`: the tokens that exist. Default: all.

    Returns:
      `[...]` losses of the sequences in the type of `student`; 0 for one without tokens.

    Raises:
      ValueError: shapes that do not match.
      TypeError: states that are not floating point.

    Use it where states may turn and mirror freely; `hidden_mse_loss` holds each feature.

    Cost: O(N² (D_s + D_t)) time for sequences of N tokens, and two arrays of N².

    Example:
      >>> student, teacher = jnp.eye(2), jnp.array([[1.0], [0.0]])
      >>> print(gram_distillation_loss(student, teacher))
      0.125

    Reference: He, Shi, Mueller, Zha, Li, Karypis, "Distiller: A Systematic Study of Model
    Distillation Methods in Natural Language Processing", 2021, arXiv:2109.11105, after Huang, Wang,
    "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017, arXiv:1707.01219.
    """
    check_floating(student=student, teacher=teacher)
    tokens = jnp.shape(student)[:-1]
    if not tokens:
        raise ValueError(
            f"student must have shape [..., tokens, features], got {jnp.shape(student)}"
        )
    check_shape((*tokens, *jnp.shape(teacher)[-1:]), teacher=teacher)
    check_broadcastable(tokens, where=where)
    dtype = compute_dtype(student, teacher)
    exists = jnp.ones(tokens, bool) if where is None else jnp.broadcast_to(where, tokens)

    def gram(x: ArrayLike) -> Array:
        wide = jnp.where(exists[..., None], jnp.asarray(x).astype(dtype), 0.0)
        product = jnp.einsum("...nd,...md->...nm", wide, wide, precision=jax.lax.Precision.HIGHEST)
        return product / max(wide.shape[-1], 1)

    pairs = exists[..., :, None] & exists[..., None, :]
    square = jnp.square(gram(student) - jax.lax.stop_gradient(gram(teacher)))
    loss = masked_mean(square, axis=(-2, -1), where=pairs)
    return loss.astype(jnp.result_type(student))


def _states(student: ArrayLike, teacher: ArrayLike, where: ArrayLike | None) -> tuple[Array, Array]:
    """Both in the type to compute in, 0 where a token does not exist, the teacher constant."""
    check_floating(student=student, teacher=teacher)
    shape = jnp.shape(student)
    if not shape or shape[-1] == 0:
        raise ValueError(f"student must have shape [..., features], got {shape}")
    check_shape(shape, teacher=teacher)
    check_broadcastable(shape[:-1], where=where)
    dtype = compute_dtype(student, teacher)
    s, t = (jnp.asarray(x).astype(dtype) for x in (student, teacher))
    if where is not None:
        exists = jnp.broadcast_to(where, shape[:-1])[..., None]
        s, t = (jnp.where(exists, x, 0.0) for x in (s, t))
    return s, jax.lax.stop_gradient(t)
