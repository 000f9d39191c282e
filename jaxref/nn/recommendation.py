"""Recommendation from who a user is and what the user chose before."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import (
    check_broadcastable,
    check_floating,
    check_interval,
    check_shape,
)
from jaxref.core.labels import masked_log_softmax
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean
from jaxref.core.vectors import unit_vectors
from jaxref.nn.linear import Embed, Linear

_MODES = ("mean", "user_attention", "self_attention")


class BehaviorAggregationParams(NamedTuple):
    """What `behavior_aggregation` learns.

    Attributes:
      projection: V `[features, features]`, by which items become like users.
      key_kernel: W `[features, features]`, of both kinds of attention; else None.
      key_bias: b `[features]`, likewise.
      query: v `[features]`, of self-attention; else None.

    Reference: Mao, Zhu, Wang, Dai, Dong, Xiao, He, "SimpleX: A Simple and Strong Baseline for
    Collaborative Filtering", 2021, arXiv:2109.12613.
    """

    projection: ArrayLike
    key_kernel: ArrayLike | None = None
    key_bias: ArrayLike | None = None
    query: ArrayLike | None = None


def behavior_aggregation(
    user: ArrayLike,
    history: ArrayLike,
    params: BehaviorAggregationParams,
    *,
    mode: str = "mean",
    gamma: float = 0.5,
    where: ArrayLike | None = None,
) -> Array:
    r"""A user's vector from the user's own and those of the items that the user chose before.

        h = γ e_u + (1 - γ) (Σ_k a_k e_k) V,   γ = gamma

        mean:            a_k = 1/K
        user_attention:  a = softmax_k(e_u · tanh(e_k W + b))
        self_attention:  a = softmax_k(v · tanh(e_k W + b))

    Args:
      user: e_u `[..., features]` floating point.
      history: e_k `[..., K, features]`.
      params: `BehaviorAggregationParams`.
      mode: one of the names above. Default "mean".
      gamma: γ in [0, 1]. Default 0.5. 1 is matrix factorization, without history; 0 does without
        users, and so knows new ones from what they chose.
      where: boolean, broadcastable to `[..., K]`: the items that there are. The others may hold
        anything. Default: all.

    Returns:
      h `[..., features]` in the type of `user`; γ e_u where there are no items.

    Raises:
      ValueError: shapes that do not match, an unknown `mode`, one whose parameters are None, or a
        `gamma` outside of [0, 1].
      TypeError: vectors that are not floating point.

    Use it where items' vectors come from elsewhere; `SimpleX` has tables of both.

    Cost: features² multiplications a user and a pass over its K items; with attention features² for
    each item, too.

    Example:
      >>> params = BehaviorAggregationParams(jnp.eye(2))
      >>> print(behavior_aggregation(jnp.array([1.0, 0.0]), jnp.eye(2), params))
      [0.75 0.25]

    Reference: Mao, Zhu, Wang, Dai, Dong, Xiao, He, "SimpleX: A Simple and Strong Baseline for
    Collaborative Filtering", 2021, arXiv:2109.12613.
    """
    check_floating(user=user, history=history)
    check_interval(0, 1, gamma=gamma)
    shape, features = jnp.shape(history)[:-1], jnp.shape(user)[-1:]
    check_shape((*jnp.shape(user)[:-1], *shape[-1:], *features), history=history)
    check_broadcastable(shape, where=where)
    _check_params(params, features, mode)
    dtype = compute_dtype(user, history)
    e_u, e_k = (jnp.asarray(x).astype(dtype) for x in (user, history))
    p = {
        name: jnp.asarray(value).astype(dtype)
        for name, value in params._asdict().items()
        if value is not None
    }
    exists = jnp.ones(shape, bool) if where is None else jnp.broadcast_to(where, shape)
    e_k = jnp.where(exists[..., None], e_k, 0.0)
    if mode == "mean" or shape[-1] == 0:
        pooled = masked_mean(e_k, axis=-2, where=exists[..., None])
    else:
        by = e_u[..., None, :] if mode == "user_attention" else p["query"]
        relevance = jnp.sum(jnp.tanh(e_k @ p["key_kernel"] + p["key_bias"]) * by, axis=-1)
        weights = jnp.exp(masked_log_softmax(relevance, axis=-1, where=exists)) * exists
        pooled = jnp.einsum("...k,...kf->...f", weights, e_k)
    return (gamma * e_u + (1 - gamma) * (pooled @ p["projection"])).astype(jnp.result_type(user))


class SimpleX(nnx.Module):
    """Users and items as vectors, and how alike they are: tables, history and cosines.

        score = cos(h_u, e_i),   h_u from `behavior_aggregation`

    Args:
      num_users, num_items: rows of the tables.
      features: size of a vector. Default 64.
      mode, gamma: as for `behavior_aggregation`.
      dropout: rate in [0, 1) on h_u, where a key is given. Default 0.1.
      dtype, param_dtype: types to compute in (None: the parameters') and of the parameters.
      rngs: source of the `params` key.

    Attributes:
      users, items: the tables.
      projection, key, query: `Linear`s, whose kernels are the `BehaviorAggregationParams`; the last
        two are None where the mode has none.

    Raises:
      ValueError: an unknown mode, or a number out of range.

    Use it where nothing is known but who chose what; `behavior_aggregation` takes items' vectors
    from elsewhere. Train it by `jaxref.losses.cosine_contrastive_loss` of the cosines with an item
    that the user chose and with many drawn at random, which may be among the user's own; the
    authors do so with Adam at 1e-4 and weight decay on the tables. With gamma 1 it is matrix
    factorization.

    Cost: (num_users + num_items) · features parameters, and features² of V (twice that with
    attention); features multiplications a score.

    Example:
      >>> def scores(users, history):
      ...     model = SimpleX(3, 10, features=4, rngs=nnx.Rngs(0))
      ...     return model.all_cosines(model(users, history))
      >>> nnx.eval_shape(scores, jnp.array([0, 2]), jnp.array([[1, 5, 7], [2, 2, 9]])).shape
      (2, 10)

    Reference: Mao, Zhu, Wang, Dai, Dong, Xiao, He, "SimpleX: A Simple and Strong Baseline for
    Collaborative Filtering", 2021, arXiv:2109.12613.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        *,
        features: int = 64,
        mode: str = "mean",
        gamma: float = 0.5,
        dropout: float = 0.1,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        _check_mode(mode)
        check_interval(1, jnp.inf, num_users=num_users, num_items=num_items, features=features)
        check_interval(0, 1, gamma=gamma)
        check_interval(0, 1, closed="left", dropout=dropout)
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        initial = jax.nn.initializers.glorot_normal()

        def table(rows: int) -> Embed:
            axes = ("vocabulary", "embed")
            return Embed(rows, features, axes=axes, embedding_init=initial, **types)

        def linear(outputs: int, *, use_bias: bool = False) -> Linear:
            axes = ("embed", None)
            return Linear(
                features, outputs, axes=axes, use_bias=use_bias, kernel_init=initial, **types
            )

        self.users, self.items = table(num_users), table(num_items)
        self.projection = linear(features)
        self.key = None if mode == "mean" else linear(features, use_bias=True)
        self.query = linear(1) if mode == "self_attention" else None
        self.mode, self.gamma, self.dropout = mode, gamma, dropout

    def __call__(
        self,
        users: Array,
        history: Array | None = None,
        *,
        where: Array | None = None,
        key: Array | None = None,
    ) -> Array:
        """Vectors of users.

        Args:
          users: integer `[...]`. One that is not in the table gives NaN.
          history: integer `[..., K]`, what each has chosen, the newest 50 in the paper. None: there
            is none.
          where: boolean, broadcastable to `history`: the items that there are. The others may be
            any integers. Default: all.
          key: random key for dropout; None drops nothing.

        Returns:
          h `[..., features]`, not at length 1.
        """
        if history is None:
            history = jnp.zeros((*jnp.shape(users), 0), jnp.int32)
        check_broadcastable(jnp.shape(history), where=where)
        items = self.items(history if where is None else jnp.where(where, history, 0))
        keys = self.key
        h = behavior_aggregation(
            self.users(users),
            items,
            BehaviorAggregationParams(
                self.projection.kernel[...],
                None if keys is None else keys.kernel[...],
                None if keys is None or keys.bias is None else keys.bias[...],
                None if self.query is None else self.query.kernel[..., 0],
            ),
            mode=self.mode,
            gamma=self.gamma,
            where=where,
        )
        if key is None or self.dropout == 0:
            return h
        keep = jax.random.bernoulli(key, 1 - self.dropout, h.shape)
        return jnp.where(keep, h / (1 - self.dropout), 0).astype(h.dtype)

    def cosines(self, h: Array, items: Array) -> Array:
        """Cosines of users' vectors `[..., features]` with items `[..., n]` of their own.

        `[..., n]` in at least float32. Serving takes the items at length 1 once: `all_cosines`.
        """
        h, vectors = (unit_vectors(x.astype(compute_dtype(x))) for x in (h, self.items(items)))
        return jnp.einsum("...f,...nf->...n", h, vectors)

    def all_cosines(self, h: Array) -> Array:
        """Cosines `[..., num_items]` of users' vectors `[..., features]` with all items."""
        table = self.items.embedding[...]
        h, table = (unit_vectors(x.astype(compute_dtype(x))) for x in (h, table))
        return h @ table.T


def _check_mode(mode: str) -> None:
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {_MODES}, got {mode!r}")


def _check_params(params: BehaviorAggregationParams, features: tuple[int, ...], mode: str) -> None:
    """Raises ValueError unless there are the mode's parameters, with the right shapes."""
    _check_mode(mode)
    shapes = {"projection": 2 * features}
    if mode != "mean":
        shapes |= {"key_kernel": 2 * features, "key_bias": features}
    if mode == "self_attention":
        shapes |= {"query": features}
    for name, shape in shapes.items():
        if getattr(params, name) is None:
            raise ValueError(f"params.{name} must not be None where mode is {mode!r}")
        check_shape(shape, **{f"params.{name}": getattr(params, name)})
