"""A head that tells the meaning of a whole sequence, for a regularizing loss."""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jaxref.core.checks import check_broadcastable
from jaxref.losses.captioning import mean_over_tokens
from jaxref.nn.linear import Linear


class SentenceEmbeddingHead(nnx.Module):
    """A sentence embedding from the states of a decoder.

        ê = (mean over the tokens that exist of h_t) W + b

    Args:
      features: size of a state.
      embedding_dim: size of the embedding. Default 768, Sentence-BERT's.
      dtype, param_dtype: types to compute in and of the parameters.
      rngs: source of the `params` key.

    Attributes:
      projection: the `Linear` map of a mean to its embedding.

    Raises:
      ValueError: states of another size, or a `where` that does not broadcast.

    Use it in training alone, with `jaxref.losses.sentence_embedding_regression_loss`, or give its
    `projection` to `jaxref.losses.captioning_multitask_loss`; inference does without.

    Cost: (features + 1) · embedding_dim parameters, as many multiplications a sequence, and a pass
    over the states.

    Example:
      >>> head = SentenceEmbeddingHead(8, 4, rngs=nnx.Rngs(0))
      >>> head(jnp.ones((2, 5, 8))).shape
      (2, 4)

    Reference: Labbé, Pinquier, Pellegrini, "Multitask learning in Audio Captioning: a sentence
    embedding regression loss acts as a regularizer", 2023, arXiv:2305.01482.
    """

    def __init__(
        self,
        features: int,
        embedding_dim: int = 768,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.projection = Linear(
            features,
            embedding_dim,
            axes=("embed", None),
            use_bias=True,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, hidden: Array, *, where: Array | None = None) -> Array:
        """Maps `[..., tokens, features]` to `[..., embedding_dim]`.

        `where` is boolean, broadcastable to `[..., tokens]`: the tokens that exist.
        """
        if hidden.ndim < 2:
            raise ValueError(f"hidden must have shape [..., tokens, features], got {hidden.shape}")
        check_broadcastable(hidden.shape[:-1], where=where)
        return self.projection(mean_over_tokens(hidden, where))
