"""Between encoders and an index: vectors of queries, and what to keep of what they find."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.vectors import unit_vectors
from jaxref.losses.relevance import monotone_score_map, score_map_parameters
from jaxref.nn.linear import Linear
from jaxref.nn.normalization import Norm
from jaxref.norms import layer_norm


class CosineAdapter(nnx.Module):
    """What a cosine means for a query, read from the query alone.

        θ = MLP(q),   relevance = sigmoid(map(cos(q, d); θ))

    with one hidden layer and `jaxref.losses.monotone_score_map`, which keeps the order of a query's
    documents. One threshold for all queries then decides which of the nearest to keep.

    Args:
      features: size of a query's vector.
      hidden: hidden units, at least 1. Default 64.
      kind: of map: "linear", "sqrt", "quadratic" or "power", the default.
      dtype, param_dtype: types to compute in (None: the parameters') and of the parameters.
      rngs: source of the `params` key.

    Attributes:
      hidden, output: the two `Linear`s, with biases that are initially 0.

    Raises:
      ValueError: an unknown kind, or a number below 1.

    Use it where one threshold is to decide for all queries which of the nearest documents to keep.
    Train it by `jaxref.losses.relevance_filter_loss` on labelled pairs, with the encoders as they
    are, and take the threshold from `jaxref.metrics.threshold_at_recall` on others.

    Cost: about (features + 4) · hidden parameters and as many multiplications a query, however many
    its documents.

    Example:
      >>> def relevance(query, cosine):
      ...     return CosineAdapter(8, rngs=nnx.Rngs(0)).relevance(query, cosine)
      >>> nnx.eval_shape(relevance, jnp.ones((2, 8)), jnp.ones((2, 5))).shape
      (2, 5)

    Reference: Rossi, Lin, Liu, Yang, Lee, Magnani, Liao, "Relevance Filtering for Embedding-based
    Retrieval", 2024, arXiv:2408.04887.
    """

    def __init__(
        self,
        features: int,
        *,
        hidden: int = 64,
        kind: str = "power",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_interval(1, jnp.inf, features=features, hidden=hidden)
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        outputs = score_map_parameters(kind)
        self.hidden = Linear(features, hidden, axes=("embed", "mlp"), use_bias=True, **types)
        self.output = Linear(hidden, outputs, axes=("mlp", None), use_bias=True, **types)
        self.kind = kind

    def __call__(self, query: Array) -> Array:
        """Parameters of the map, `[..., 2]` or `[..., 3]`, for queries `[..., features]`."""
        return self.output(jax.nn.relu(self.hidden(query)))

    def relevance(self, query: Array, cosine: Array) -> Array:
        """Probabilities of relevance `[..., documents]` for the cosines of the same shape."""
        return jax.nn.sigmoid(monotone_score_map(cosine, self(query), kind=self.kind))


class DenseQuery(nnx.Module):
    """A query's vector from the encoder's output at the class token (for dense retrieval).

        v = LayerNorm(h W + b)

    Args:
      features: size of h, and of v.
      epsilon: at least 0, added to the variance. Default 1e-5, PyTorch's.
      dtype, param_dtype: types to compute in (None: the parameters') and of the parameters.
      rngs: source of the `params` key.

    Attributes:
      projection, norm: the `Linear` and the `Norm`.

    Use it on an encoder that reads the query and the passages that it found, to write the query
    anew; `sparse_query_vector` is for an index of terms.

    Cost: features² + 3 · features parameters, about as many multiplications a query.

    Example:
      >>> nnx.eval_shape(lambda h: DenseQuery(8, rngs=nnx.Rngs(0))(h), jnp.ones((2, 8))).shape
      (2, 8)

    Reference: Zhu, Pang, Lan, Cheng, "LoL: A Comparative Regularization Loss over Query
    Reformulation Losses for Pseudo-Relevance Feedback", 2022, arXiv:2204.11545.
    """

    def __init__(
        self,
        features: int,
        *,
        epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.projection = Linear(
            features,
            features,
            axes=("embed", None),
            use_bias=True,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.norm = Norm(partial(layer_norm, epsilon=epsilon), features, param_dtype=param_dtype)

    def __call__(self, h: Array) -> Array:
        """Maps `[..., features]` to `[..., features]`."""
        return self.norm(self.projection(h))


def sparse_query_vector(
    token_logits: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    special_token_mask: ArrayLike | None = None,
    relu: bool = True,
    log_saturation: bool = False,
    norm: int | None = 2,
) -> Array:
    r"""A query's weights of all terms, from the logits of a masked language model.

        v = x / ||x||,   x = max(0, max over positions of the logits)

    Args:
      token_logits: `[..., positions, vocabulary]` floating point: of the query and of the passages
        that it found, one after the other.
      attention_mask: boolean or 0 and 1, broadcastable to `[..., positions]`: the positions that
        are not padding. Default: all.
      special_token_mask: boolean `[vocabulary]`: terms whose weight is 0, as those of separators
        and of unused tokens. Default: none.
      relu: whether negative weights are 0. Default True.
      log_saturation: whether x is log(1 + x) of the above, which takes `relu`. Default False.
      norm: 1 or 2, the norm that v has length 1 in, or None to leave x as it is. Default 2.

    Returns:
      v `[..., vocabulary]` in the type of `token_logits`; 0 without any position.

    Raises:
      ValueError: shapes that do not match, another norm, or `log_saturation` without `relu`.
      TypeError: logits that are not floating point.

    Use it to write a query anew for an inverted index, as learned sparse retrieval has it. Where
    too many terms stay, add the mean of `jnp.abs(v).sum(-1)` to the loss, with a weight that grows
    like the square of the step (`optax.polynomial_schedule`). `DenseQuery` is for dense retrieval.

    Cost: one pass over the positions · vocabulary logits, all of which the model has to make.

    Example:
      >>> logits = jnp.array([[3.0, -1.0, 0.0, 9.0], [1.0, -2.0, 4.0, 0.0]])
      >>> print(sparse_query_vector(logits, special_token_mask=jnp.arange(4) == 3))
      [0.6 0.  0.8 0. ]

    Reference: Zhu, Pang, Lan, Cheng, "LoL: A Comparative Regularization Loss over Query
    Reformulation Losses for Pseudo-Relevance Feedback", 2022, arXiv:2204.11545.
    """
    check_floating(token_logits=token_logits)
    logits = jnp.asarray(token_logits).astype(compute_dtype(token_logits))
    if logits.ndim < 2:
        raise ValueError(
            f"token_logits must have shape [..., positions, vocabulary], got {logits.shape}"
        )
    check_broadcastable(logits.shape[:-1], attention_mask=attention_mask)
    if norm not in (1, 2, None):
        raise ValueError(f"norm must be 1, 2 or None, got {norm!r}")
    if log_saturation and not relu:
        raise ValueError("log_saturation must be False where relu is")
    exists = jnp.ones(logits.shape[:-1], bool)
    if attention_mask is not None:
        exists = jnp.broadcast_to(jnp.asarray(attention_mask) > 0, exists.shape)
    counts = exists.any(axis=-1, keepdims=True)
    x = jnp.max(jnp.where(exists[..., None], logits, -jnp.inf), axis=-2, initial=-jnp.inf)
    x = jnp.where(counts, x, 0.0)
    if special_token_mask is not None:
        check_shape(logits.shape[-1:], special_token_mask=special_token_mask)
        x = jnp.where(special_token_mask, 0.0, x)
    if relu:
        x = jax.nn.relu(x)
    if log_saturation:
        x = jnp.log1p(x)
    if norm == 2:
        x = unit_vectors(x)
    elif norm == 1:
        length = jnp.sum(jnp.abs(x), axis=-1, keepdims=True)
        x = x / jnp.where(length > 0, length, 1.0)
    return x.astype(jnp.result_type(token_logits))
