"""The embedding that goes with 8-bit optimizers."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jaxref.nn.linear import Embed
from jaxref.nn.normalization import Norm
from jaxref.norms import layer_norm


class StableEmbedding(nnx.Module):
    """A table of vectors, each normalised after it is looked up.

        y = LayerNorm(table[id]),     table ~ U(-a, a),  a² = 6 / (num_embeddings + features)

    The gradients of a table's rows differ by orders of magnitude, since some ids are rare, and
    that is what quantized optimizer states suffer from most. Normalising before positions are
    added, in float32, and small uniform initial values make their extremes smaller.

    Args:
      num_embeddings: rows of the table.
      features: size of a vector.
      axes: logical names of the table's two axes, for the rules of `jaxref.parallel`.
      epsilon: at least 0, added to the variance. Default 1e-5, as in the authors' code: rows of a
        large table start with a variance not far above it.
      dtype: type of the result; default the parameters'.
      param_dtype: type of the parameters.
      rngs: source of the `params` key.

    Attributes:
      table: the `Embed` with the table `[num_embeddings, features]`.
      norm: the `Norm` with `scale` and `bias`, `[features]`.

    Raises:
      TypeError: ids that are not integers.
      ValueError: a negative `epsilon`, when called.

    Use it in place of `Embed` in a model that `jaxref.optimizers.adam_8bit` trains, and keep the
    table's optimizer state in float32: `adam_8bit(..., full_precision="embedding")`.

    Cost: (num_embeddings + 2) · features parameters; a layer norm of each vector in float32 more
    than `Embed`.

    Example:
      >>> embed = StableEmbedding(10, 4, axes=("vocabulary", "embed"), rngs=nnx.Rngs(0))
      >>> embed(jnp.array([[1, 2, 3]])).shape
      (1, 3, 4)

    Reference: Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers via Block-wise
    Quantization", 2021, arXiv:2110.02861.
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        axes: tuple[str | None, str | None],
        epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.table = Embed(
            num_embeddings,
            features,
            axes=axes,
            embedding_init=jax.nn.initializers.glorot_uniform(),
            dtype=jnp.float32,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.norm = Norm(
            partial(layer_norm, epsilon=epsilon), features, axes=axes[1:], param_dtype=param_dtype
        )
        self.dtype = dtype or param_dtype

    def __call__(self, ids: Array) -> Array:
        """Normalised rows of the table for integer `ids [...]`, as `[..., features]`.

        An id outside [0, num_embeddings) gives NaN.
        """
        return self.norm(self.table(ids)).astype(self.dtype)
