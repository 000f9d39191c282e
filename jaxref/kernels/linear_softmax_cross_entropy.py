"""Cross-entropy of a linear head, whose logits never exist as a whole.

The language-model head: `hidden @ kernel` has a column per word, and with a large vocabulary its
logits and their gradient are the largest arrays of a training step. There are two ways to go over
them in blocks.

By tokens: a block of rows is whole in its vocabulary, so that its softmax, and with it its share
of both gradients, is known while its logits exist. The gradients are then taken in the forward
pass, for a cotangent of one per token; the backward pass scales them. That is as many matrix
products as the plain version's. Cotangents that differ between tokens cost a second pass.

By vocabulary: a block of columns, of all tokens, updates a running maximum and sum (online softmax)
and is dropped; backward it is computed again. That is 8/6 of the plain matrix products, whatever
the cotangents, and where tokens are sharded every block of the kernel's gradient is reduced over
the devices once, where by tokens the whole of it would be, for every block.

By vocabulary there is one differentiable piece, the statistics of the rows of logits: the largest,
the logarithm of the sum, and the logit of the label. XLA and the Pallas kernels compute it and its
gradients; losses, and a vocabulary spread over devices, are made of these numbers per token.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from jaxref.core.checks import (
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.numerics import compute_dtype
from jaxref.core.shards import AxisName, varying_alike
from jaxref.kernels import linear_softmax_cross_entropy_xla as xla
from jaxref.kernels.implementation import (
    Implementation,
    choose_implementation,
)
from jaxref.kernels.vocabulary_parallel import combine_over_vocabulary, local_ids, whole_width

_BLOCKS = ("tokens", "vocabulary")

# More do not fit in a TPU's fast memory, where the kernels hold tokens and columns whole.
_MAX_TPU_FEATURES = 16384


def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    z_loss: float | Array = 0.0,
    where: ArrayLike | None = None,
    blocks: str | None = None,
    axis_name: AxisName | None = None,
    implementation: str | None = None,
) -> Array:
    r"""Softmax cross-entropy of the logits `hidden @ kernel`, without storing them.

    For a token with the features h, the kernel W and the label y, logits l = h W and
    log Z = logsumexp(l),

        L = log Z - l_y + z (log Z)²,   z = z_loss

    and `∂L/∂l = (1 + 2 z log Z) softmax(l) - onehot(y)`, of which backward, too, only a block of
    the vocabulary exists at a time. The result is exact for any cotangents, not an approximation.

    Args:
      hidden: `[..., features]` floating point, the inputs of the head.
      kernel: `[features, vocabulary]` floating point, the head's weights, at least one column.
      labels: integer ids `[...]`. An id outside [0, vocabulary) gives NaN for its token, and no
        gradient.
      z_loss: z at least 0, the weight of the term that keeps log Z near 0. Default 0: plain
        cross-entropy; 1e-4 is the paper's.
      where: boolean, broadcastable to `labels`: the tokens that count. Others have loss 0 and no
        gradient, whatever their label and features. Default: all.
      blocks: what a block of logits has few of, "tokens" or "vocabulary" (columns); see below.
        Default: by tokens where XLA computes on one device for a kernel in float32, else by
        vocabulary.
      axis_name: name or names of the mapped axes (`jax.shard_map`) over which the vocabulary is
        spread: `kernel` has the shard's own columns, those of the first shard first, and labels
        are ids of the whole vocabulary. Default: none, it is whole.
      implementation: None, for the best that the platform supports; "xla"; "pallas", kernels of
        the default backend; or another name of `choose_implementation`. Kernels go by vocabulary.

    Returns:
      `[...]` losses per token in the type of `hidden`, in units of nats; with `axis_name` the same
      on every shard of the vocabulary.

    Raises:
      ValueError: shapes that do not match, an empty vocabulary, a negative `z_loss`, an
        `implementation` that does not exist or cannot run here, more than 16384 features for a
        TPU's kernel, or `blocks` by tokens for a Pallas kernel or a vocabulary that is spread.
      TypeError: `hidden` or `kernel` not floating point, or labels that are not integers.

    Matrix products accumulate and the softmax runs in at least float32; gradients have the types
    of their inputs. Where the logits are small (32 MiB and less) XLA simply computes them: nothing
    is gained by blocks. By tokens, the gradients are made together with the losses: the fewest
    operations when all live tokens have the same cotangent, as under a mean or a sum, and five
    thirds of them when not. The kernel's gradient is summed up in float32 meanwhile, which for a
    kernel in bfloat16 can take as much memory as its logits. By vocabulary, 4/3 of the operations
    (5/3 in the kernels for TPU, where no gradient of logits is written either), for any
    cotangents, and the least memory: for 8192 tokens, 4096 features and 131072 words in bfloat16
    the compilers for TPU v5e and v5p ask for 128 and 161 MiB, and with the kernels for 16 MiB at
    most, where the plain version needs 2 and 4 GiB.

    Sharded tokens want blocks of vocabulary; with a vocabulary that the compiler has sharded every
    device gathers the columns that it multiplies. In `jax.shard_map`, with `axis_name`, none is
    gathered: devices exchange a maximum and two sums per token, and the gradient of `hidden`.

    Blocked, it supports reverse-mode differentiation (`jax.grad`), not `jax.jvp`; `jax.grad` of
    `jax.grad` by vocabulary in XLA alone.

    Use it in place of `optax.losses.softmax_cross_entropy_with_integer_labels` wherever the logits
    serve the loss alone; those who also sample from them or smooth the labels need the logits.

    Cost: 3 products of tokens · features · vocabulary a step by tokens, as of the plain head, 4 by
    vocabulary (5 in TPU kernels); a block of logits in memory.

    Example:
      >>> hidden, kernel = jnp.array([[1.0, 2.0]]), jnp.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
      >>> print(linear_softmax_cross_entropy(hidden, kernel, jnp.array([0])).round(4))
      [0.4076]

    Reference: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024,
    arXiv:2411.09009; z-loss: Wortsman et al., "Small-scale proxies for large-scale Transformer
    training instabilities", 2023, arXiv:2309.14322.
    """
    hidden, kernel, labels = jnp.asarray(hidden), jnp.asarray(kernel), jnp.asarray(labels)
    check_floating(hidden=hidden, kernel=kernel)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integer ids, got {labels.dtype.name}")
    if hidden.ndim == 0:
        raise ValueError("hidden must have a feature axis, got a scalar")
    if kernel.ndim != 2 or kernel.shape[0] != hidden.shape[-1] or kernel.shape[1] == 0:
        raise ValueError(
            f"kernel must have shape ({hidden.shape[-1]}, vocabulary) for hidden of shape "
            f"{hidden.shape}, with at least one column, got {kernel.shape}"
        )
    check_shape(hidden.shape[:-1], labels=labels)
    check_broadcastable(labels.shape, where=where)
    check_interval(0, jnp.inf, z_loss=z_loss)
    if blocks is not None and blocks not in _BLOCKS:
        raise ValueError(f"blocks must be None or one of {_BLOCKS}, got {blocks!r}")
    chosen = choose_implementation(implementation, hidden, kernel)
    too_wide = chosen.platform == "tpu" and hidden.shape[-1] > _MAX_TPU_FEATURES
    if implementation is None and (
        too_wide or blocks == "tokens" or xla.fits_in_a_block(labels.size, kernel.shape[1])
    ):
        chosen = Implementation("xla")
    elif too_wide:
        raise ValueError(
            f"hidden must have at most {_MAX_TPU_FEATURES} features for implementation="
            f"{implementation!r}, got {hidden.shape[-1]}: 'xla' takes more"
        )
    if blocks is None:
        alone = axis_name is None and jax.device_count() == 1
        in_place = kernel.dtype == compute_dtype(hidden, kernel)  # its gradient is summed up there
        by_tokens = chosen.platform == "xla" and alone and in_place
        blocks = "tokens" if by_tokens else "vocabulary"
    elif blocks == "tokens" and (chosen.platform != "xla" or axis_name is not None):
        raise ValueError(
            "blocks must be None or 'vocabulary' for a Pallas kernel or with an axis_name, got "
            f"'tokens' with implementation={implementation!r} and axis_name={axis_name!r}"
        )
    if where is not None:
        where = jnp.broadcast_to(where, labels.shape)
    losses = partial(
        _losses, by_tokens=blocks == "tokens", axis_name=axis_name, implementation=chosen
    )
    return _partitioned_by_compiler(losses, hidden, kernel)(hidden, kernel, labels, where, z_loss)


def _losses(
    hidden: Array,
    kernel: Array,
    labels: Array,
    where: Array | None,
    z_loss: float | Array,
    *,
    by_tokens: bool,
    axis_name: AxisName | None,
    implementation: Implementation,
) -> Array:
    """The losses, with every token that has none replaced by one that is harmless to compute."""
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))  # int8 has no 1000
    exists = (labels >= 0) & (labels < whole_width(kernel.shape[1], axis_name))
    ids, here = local_ids(labels, kernel.shape[1], axis_name)
    x = hidden if where is None else jnp.where(where[..., None], hidden, 0)
    if by_tokens and not xla.fits_in_a_block(labels.size, kernel.shape[1]):
        live = exists if where is None else exists & where
        rows = x.reshape(-1, x.shape[-1]), kernel, ids.reshape(-1), live.reshape(-1)
        weight = jnp.asarray(z_loss, compute_dtype(x, kernel))
        losses = xla.by_tokens(*varying_alike(*rows), weight).reshape(labels.shape)
    else:
        x, weights, ids = varying_alike(x, kernel, jnp.where(here, ids, -1))
        top, log_sum, of_label = _statistics(x, weights, ids, implementation)
        top, log_sum, of_label = combine_over_vocabulary(top, log_sum, axis_name, of_label)
        log_z = log_sum + top
        losses = log_sum + (top - of_label) + z_loss * log_z * log_z
    losses = jnp.where(exists, losses, jnp.nan)
    if where is not None:
        losses = jnp.where(where, losses, 0)
    return losses.astype(hidden.dtype)


def _statistics(
    hidden: Array, kernel: Array, ids: Array, implementation: Implementation
) -> xla.Statistics:
    """The statistics of the rows of logits, by whoever computes them, on this device alone."""
    if ids.size == 0 or (
        implementation.platform == "xla" and xla.fits_in_a_block(ids.size, kernel.shape[1])
    ):
        return xla.plain_statistics(hidden, kernel, ids)
    if implementation.platform == "xla":
        return _by_vocabulary(hidden, kernel, ids, implementation)
    rows = _by_vocabulary(
        hidden.reshape(-1, hidden.shape[-1]), kernel, ids.reshape(-1), implementation
    )
    top, log_sum, of_id = (x.reshape(ids.shape) for x in rows)
    return top, log_sum, of_id


def _statistics_from_blocks(
    hidden: Array, kernel: Array, ids: Array, implementation: Implementation
) -> xla.Statistics:
    if implementation.platform == "xla":
        return xla.statistics(hidden, kernel, ids)
    return _kernels(implementation.platform).statistics(
        hidden, kernel, ids, implementation.interpret
    )


_by_vocabulary = jax.custom_vjp(_statistics_from_blocks, nondiff_argnums=(3,))


def _by_vocabulary_forward(*args: Any) -> Any:
    top, log_sum, of_id = _statistics_from_blocks(*args)
    return (top, log_sum, of_id), (*args[:3], top, log_sum)


def _by_vocabulary_backward(
    implementation: Implementation, residuals: Any, cotangents: xla.Statistics
) -> Any:
    _, of_log_sum, of_id = cotangents  # the largest logit counts as a constant
    if implementation.platform == "xla":
        return *xla.gradients(*residuals, of_log_sum, of_id), None
    kernels = _kernels(implementation.platform)
    return *kernels.gradients(*residuals, of_log_sum, of_id, implementation.interpret), None


_by_vocabulary.defvjp(_by_vocabulary_forward, _by_vocabulary_backward)


def _kernels(platform: str) -> ModuleType:
    """The module of a platform's kernels. Pallas takes a while to load: it does on first use."""
    if platform == "tpu":
        from jaxref.kernels import linear_softmax_cross_entropy_tpu

        return linear_softmax_cross_entropy_tpu
    from jaxref.kernels import linear_softmax_cross_entropy_gpu

    return linear_softmax_cross_entropy_gpu


def _partitioned_by_compiler(
    function: Callable[..., Array], hidden: Array, kernel: Array
) -> Callable[..., Array]:
    """`function`, its inside sharded by the compiler also on meshes with explicit axes.

    There its result has the sharding of the tokens.
    """
    for array in (hidden, kernel):
        mesh = jax.typeof(array).sharding.mesh
        if mesh.explicit_axes:
            tokens = PartitionSpec(*jax.typeof(hidden).sharding.spec[:-1])
            return jax.sharding.auto_axes(function, out_sharding=NamedSharding(mesh, tokens))
    return function
