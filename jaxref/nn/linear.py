"""Linear maps and embeddings whose parameters name their axes."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from jaxref.kernels.vocabulary_parallel import local_ids, whole_width
from jaxref.parallel import merge_rows, on_shards, split_over, split_rows


def _as_tuple(features: int | tuple[int, ...]) -> tuple[int, ...]:
    return (features,) if isinstance(features, int) else tuple(features)


def _as_rows(x: Array, in_features: tuple[int, ...]) -> Array:
    """`[..., *in_features]` as a matrix `[rows, inputs]`; `_from_rows` goes back."""
    if x.shape[-len(in_features) :] != in_features:
        sizes = ", ".join(map(str, in_features))
        raise ValueError(f"x must have shape [..., {sizes}], got {tuple(x.shape)}")
    rows = merge_rows(x, x.ndim - len(in_features))
    return rows.reshape(len(rows), math.prod(in_features))


def _from_rows(
    y: Array, x: Array, in_features: tuple[int, ...], out_features: tuple[int, ...]
) -> Array:
    """A matrix `[rows, outputs]`, made of the rows of `x`, as `[..., *out_features]`."""
    y = y.reshape(len(y), *out_features)
    return split_rows(y, x.shape[: x.ndim - len(in_features)])


class Linear(nnx.Module):
    """An affine map over the trailing axes of its input.

        y = x W (+ b)

    with the input's axes of W and x contracted, so that W may map to heads, or from them.

    Args:
      in_features: size of the input's last axis, or sizes of its last axes.
      out_features: the same for the output; `(heads, head_dim)` projects to heads.
      axes: logical axis names of the kernel, input axes first, for the rules of
        `jaxref.parallel`; None for an axis that is never split.
      use_bias: add a bias of shape `out_features`, initially 0.
      kernel_init: initializer, called with the flat shape `[inputs, outputs]`. Default: truncated
        normal of variance 1 / inputs.
      dtype: type to compute in; default the parameters'.
      param_dtype: type of the parameters.
      rngs: source of the `params` key.

    Attributes:
      kernel: `[*in_features, *out_features]`.
      bias: `[*out_features]`, or None.

    Raises:
      ValueError: `axes` do not name the kernel's axes, or an input of the wrong size.

    Use it in place of `flax.nnx.Linear` and `LinearGeneral` where parameters are to be sharded by
    what their axes mean.

    Cost: inputs · outputs parameters, as many multiplications a row.

    Example:
      >>> project = Linear(8, (2, 4), axes=("embed", "heads", None), rngs=nnx.Rngs(0))
      >>> project(jnp.ones((3, 5, 8))).shape
      (3, 5, 2, 4)
    """

    def __init__(
        self,
        in_features: int | tuple[int, ...],
        out_features: int | tuple[int, ...],
        *,
        axes: tuple[str | None, ...],
        use_bias: bool = False,
        kernel_init: Initializer = jax.nn.initializers.lecun_normal(),
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.in_features, self.out_features = _as_tuple(in_features), _as_tuple(out_features)
        shape = self.in_features + self.out_features
        if len(axes) != len(shape):
            raise ValueError(f"axes must name the {len(shape)} axes of kernel {shape}, got {axes}")
        flat = math.prod(self.in_features), math.prod(self.out_features)
        kernel = kernel_init(rngs.params(), flat, param_dtype).reshape(shape)
        self.kernel = nnx.Param(kernel, axes=axes)
        self.bias = (
            nnx.Param(jnp.zeros(self.out_features, param_dtype), axes=axes[len(self.in_features) :])
            if use_bias
            else None
        )
        self.dtype = dtype

    def _kernel_by_output(self) -> Array:
        """The parameter with one axis of outputs, which is the last: a matrix, in its own type."""
        return self.kernel[...].reshape(math.prod(self.in_features), -1)

    def effective_kernel(self) -> Array:
        """The matrix `[inputs, outputs]` that the input is multiplied with, in the type to compute
        in: the parameter itself, but for subclasses that reparametrize it."""
        return self._kernel_by_output().astype(self.dtype or self.kernel.dtype)

    def __call__(self, x: Array) -> Array:
        """Maps `[..., *in_features]` to `[..., *out_features]`."""
        dtype = self.dtype or self.kernel.dtype
        # One flat matrix product: with more leading axes than one, XLA's CPU backend transposes the
        # output's gradient, recomputing all that is fused into it (1.8 x the time of a train step).
        rows = _as_rows(x.astype(dtype), self.in_features)
        y = self._product(rows).astype(dtype)
        y = _from_rows(y, x, self.in_features, self.out_features)
        return y if self.bias is None else y + self.bias[...].astype(dtype)

    def _product(self, rows: Array) -> Array:
        """`rows [n, inputs]`, in the type to compute in, times the kernel: `[n, outputs]`."""
        return rows @ self.effective_kernel()


class Embed(nnx.Module):
    """A table of vectors, looked up by integer id.

    Args:
      num_embeddings: rows of the table.
      features: size of a vector.
      axes: logical names of the table's two axes, for the rules of `jaxref.parallel`.
      embedding_init: initializer of the table. Default: normal of standard deviation 1.
      dtype: type of the result; default the parameters'.
      param_dtype: type of the table.
      rngs: source of the `params` key.

    Attributes:
      embedding: the table `[num_embeddings, features]`.

    Raises:
      TypeError: ids that are not integers.

    Use it for tokens and other categories where the table is to be sharded by what its axes mean;
    `StableEmbedding` normalises its vectors, for optimizers with states of few bits.

    Cost: num_embeddings · features parameters; a row of the table read for each id, and a gradient
    of the table's size.

    Example:
      >>> table = Embed(10, 4, axes=("vocabulary", "embed"), rngs=nnx.Rngs(0))
      >>> table(jnp.array([[1, 2, 3]])).shape
      (1, 3, 4)
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        axes: tuple[str | None, str | None],
        embedding_init: Initializer = jax.nn.initializers.normal(1.0),
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        table = embedding_init(rngs.params(), (num_embeddings, features), param_dtype)
        self.embedding = nnx.Param(table, axes=axes)
        self.axes = axes
        self.dtype = dtype

    def __call__(self, ids: Array) -> Array:
        """Rows of the table for integer `ids [...]`, as `[..., features]`.

        An id outside [0, num_embeddings) gives NaN.
        """
        if not jnp.issubdtype(jnp.result_type(ids), jnp.integer):
            raise TypeError(f"ids must be integers, got {jnp.result_type(ids).name}")
        # Converted after the lookup, so that the gradients of a frequent id add up in the table's
        # type.
        rows = _rows_of(self.embedding[...], jnp.asarray(ids), self.axes)
        return rows.astype(self.dtype or self.embedding.dtype)


def _rows_of(table: Array, ids: Array, axes: tuple[str | None, str | None]) -> Array:
    """Rows of a table that may be spread, by rows and by features.

    Every device looks up what it has of them: of the rows, which are then summed; of the features,
    for the tokens of all devices that have others, to each of which then goes what it asked for.
    """
    over_rows, over_features = (split_over(name) if name else () for name in axes)

    def look_up(table: Array, ids: Array) -> Array:
        if over_features:
            ids = jax.lax.all_gather(ids, over_features, axis=0, tiled=True)
        if over_rows:
            here_ids, here = local_ids(ids, len(table), over_rows)
            rows = jax.lax.psum(jnp.where(here[..., None], table[here_ids], 0), over_rows)
            exists = (ids >= 0) & (ids < whole_width(len(table), over_rows))
            rows = jnp.where(exists[..., None], rows, jnp.nan)
        else:
            rows = table.at[ids].get(mode="fill", wrap_negative_indices=False)
        if over_features:
            rows = jax.lax.all_to_all(rows, over_features, 0, rows.ndim - 1, tiled=True)
        return rows

    if ids.ndim != 2 or not over_rows + over_features:
        return table.at[ids].get(mode="fill", wrap_negative_indices=False)
    tokens = ("batch", "length")
    return on_shards(look_up, [axes, tokens], (*tokens, None))(table, ids)
