"""Multi-head attention around any attention function of `jaxref.attention`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from jaxref.attention import (
    KeyValueCache,
    dot_product_attention,
    into_zigzag,
    key_value_cache_append,
    key_value_cache_init,
    linear_attention,
    out_of_zigzag,
    ring_attention,
    rotary_embedding,
)
from jaxref.core.checks import check_interval
from jaxref.nn.linear import Linear
from jaxref.nn.normalization import Norm
from jaxref.parallel import on_shards, split_over
from jaxref.quantization import (
    StaircaseCache,
    staircase_cache_append,
    staircase_cache_init,
    staircase_cache_read,
)

Cache = KeyValueCache | StaircaseCache


class MultiHeadAttention(nnx.Module):
    """Attention of a sequence over itself, or over another one: project, attend, project back.

        q = x W_q,   k, v = c W_k, c W_v,   y = attention(q, k, v) W_o,   c = x unless given

    with q and k normalised per head and rotated by position where asked for.

    Args:
      features: size of input and output.
      num_heads: query heads.
      num_kv_heads: key and value heads, a divisor of `num_heads`; default `num_heads`.
      head_dim: size of a head; default `features / num_heads`.
      attention: `attention(query, key, value, *, mask, is_causal)`, and `bias` where
        `position_bias` is given; a kernel by
        `functools.partial(dot_product_attention, implementation="pallas")`.
      query_key_norm: a norm of `jaxref.norms` for query and key, over `head_dim` with a gain shared
        by the heads; None leaves them as they are.
      rotary_base: base of the rotary embedding's wavelengths; None for no rotation.
      rotary_fraction: the share of each head that is rotated, its first entries; in (0, 1].
      position_bias: `position_bias(num_heads, q_len, k_len, *, query_positions)`, what is added to
        the logits, such as `jaxref.attention.harmonic_alibi_bias`; None for nothing.
      linear: the class of the projections: `Linear`, or one of its kind.
      use_bias: add biases to the projections.
      kernel_init: initializer of W_q and W_k. Default: the projections' own.
      value_init, output_init: of W_v and of W_o. Default: `kernel_init`.
      dtype, param_dtype: types to compute in and of the parameters.
      rngs: source of the `params` key.

    Raises:
      ValueError: `num_heads` does not divide `features` and no `head_dim` is given, or
        `num_kv_heads` does not divide `num_heads`, or one of them is below 1, or a fraction that
        leaves no pair of entries to rotate.

    Use it as the mixer of a block, with the attention function as an argument;
    `EntropyGuidedAttention`, `ThirdOrderAttention` and `CausalGenerationMixer` stand in its place.

    Cost: 2 · features · head_dim · (num_heads + num_kv_heads) parameters, as many multiplications a
    token, and those of `attention`; 2 · num_kv_heads · head_dim numbers of cache a token.

    Fewer key and value heads make decoding cheaper; the norm of query and key bounds the scores,
    for high learning rates.

    Example:
      >>> attend = MultiHeadAttention(8, 2, rngs=nnx.Rngs(0))
      >>> attend(jnp.ones((1, 5, 8)), is_causal=True).shape
      (1, 5, 8)

    Reference: Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762; Ainslie et al.,
    "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", 2023,
    arXiv:2305.13245.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        attention: Callable[..., Array] = dot_product_attention,
        query_key_norm: Callable[..., Array] | None = None,
        rotary_base: float | None = None,
        rotary_fraction: float = 1.0,
        position_bias: Callable[..., Array] | None = None,
        linear: Callable[..., Any] = Linear,
        use_bias: bool = False,
        kernel_init: Initializer | None = None,
        value_init: Initializer | None = None,
        output_init: Initializer | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_interval(1, jnp.inf, num_heads=num_heads, num_kv_heads=num_kv_heads)
        check_interval(0, 1, closed="right", rotary_fraction=rotary_fraction)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads = {num_heads}, got {num_kv_heads}"
            )
        if head_dim is None:
            if features % num_heads:
                raise ValueError(
                    f"num_heads must divide features = {features} or head_dim be given, "
                    f"got {num_heads}"
                )
            head_dim = features // num_heads
        self.rotated = (
            head_dim if rotary_fraction == 1 else int(rotary_fraction * head_dim) // 2 * 2
        )
        if rotary_base is not None and self.rotated == 0:
            raise ValueError(
                f"rotary_fraction must leave a pair of the {head_dim} entries of a head to rotate, "
                f"got {rotary_fraction}"
            )

        def project(inputs: Any, outputs: Any, axes: Any, init: Initializer | None) -> Any:
            given: dict[str, Any] = {} if init is None else {"kernel_init": init}
            if use_bias:
                given["use_bias"] = True
            return linear(
                inputs, outputs, axes=axes, dtype=dtype, param_dtype=param_dtype, rngs=rngs, **given
            )

        def to_heads(heads: int, axis: str, init: Initializer | None) -> Any:
            return project(features, (heads, head_dim), ("embed", axis, None), init)

        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.attention = attention
        self.rotary_base = rotary_base
        self.position_bias = position_bias
        self.query = to_heads(num_heads, "heads", kernel_init)
        self.key = to_heads(num_kv_heads, "kv_heads", kernel_init)
        self.value = to_heads(num_kv_heads, "kv_heads", value_init or kernel_init)
        self.output = project(
            (num_heads, head_dim), features, ("heads", None, "embed"), output_init or kernel_init
        )

        def norm() -> Norm | None:
            if query_key_norm is None:
                return None
            return Norm(query_key_norm, head_dim, param_dtype=param_dtype)

        self.query_norm, self.key_norm = norm(), norm()

    def __call__(
        self,
        x: Array,
        *,
        context: Array | None = None,
        mask: Array | None = None,
        is_causal: bool = False,
        positions: Array | None = None,
    ) -> Array:
        """Attends within `x [batch, length, features]`, or from it over a context.

        `context` is `[batch, k_len, features]`. `mask` is boolean, broadcastable to
        `[batch, heads, length, k_len]`, True where a query (third axis) may see a key (fourth);
        `is_causal` hides the keys that follow the query. `positions [batch, length]` say where the
        tokens of `x` stand, for rotary ones; they count from 0 by default.
        """
        query = self._query(x, positions)
        key, value = self.remember(x, positions) if context is None else self.remember(context)
        return self.output(self.attend(query, key, value, mask=mask, is_causal=is_causal))

    def attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        *,
        mask: Array | None = None,
        is_causal: bool = False,
        positions: Array | None = None,
    ) -> Array:
        """The attention of projected queries; `positions [batch, q_len]` are those of the queries,
        which by default count from 0."""
        given: dict[str, Any] = {}
        if self.position_bias is not None:
            given["bias"] = self.position_bias(
                self.num_heads, query.shape[1], key.shape[1], query_positions=positions
            )
        attend = _on_shards(self.attention)
        return attend(query, key, value, mask=mask, is_causal=is_causal, **given)

    def remember(self, x: Array, positions: Array | None = None) -> tuple[Array, Array]:
        """Keys and values `[batch, length, kv_heads, head_dim]` of a sequence, to attend over."""
        key = self.key(x)
        if self.key_norm is not None:
            key = self.key_norm(key)
        return self._rotate(key, positions), self.value(x)

    def recall(self, x: Array, memory: tuple[Array, Array], *, mask: Array | None = None) -> Array:
        """Attends from `x` over what `remember` gave."""
        return self.output(self.attend(self._query(x, None), *memory, mask=mask))

    def init_cache(
        self, batch: int, max_length: int, *, dtype: DTypeLike, kind: str = "full", **options: Any
    ) -> Cache:
        """What generation remembers: "full" keys and values, or "staircase" for those whose
        precision falls with age, with the options of `jaxref.quantization.staircase_cache_init`."""
        init: Any = {"full": key_value_cache_init, "staircase": staircase_cache_init}[kind]
        sizes = (batch, max_length, self.num_kv_heads, self.head_dim)
        return init(*sizes, dtype=dtype, **options)

    def extend(
        self,
        x: Array,
        cache: Any,
        *,
        positions: Array,
        where: Array,
        prefix_lengths: Array,
    ) -> tuple[Array, Any]:
        """Attends from the next tokens over themselves and all that came before.

        Args:
          x: `[batch, n, features]`.
          cache: what `init_cache` or the previous call gave.
          positions: integer `[batch, n]`, where each token stands; they follow each other.
          where: boolean `[batch, n]`: the tokens that exist, ahead of those that do not.
          prefix_lengths: integer `[batch]`, how many positions every token may see, besides those
            up to its own.

        Returns:
          `[batch, n, features]`, and the cache with these tokens in it.
        """
        query, (key, value) = self._query(x, positions), self.remember(x, positions)
        if isinstance(cache, KeyValueCache):
            cache = key_value_cache_append(cache, key, value, positions[:, 0])
            key, value = cache
        else:
            cache = staircase_cache_append(cache, key, value, where=where)
            key, value = staircase_cache_read(cache)
        mask = visible_positions(positions, prefix_lengths, key.shape[1])
        attend = partial(self.attend, key=key, value=value)
        if self.attention is linear_attention:  # whose mask is one for all queries
            each = jax.vmap(lambda q, m: attend(q[:, None], mask=m[:, :, None]), (1, 2), 1)
            return self.output(each(query, mask)[:, :, 0]), cache
        return self.output(attend(query, mask=mask, positions=positions)), cache

    def _query(self, x: Array, positions: Array | None) -> Array:
        query = self.query(x)
        if self.query_norm is not None:
            query = self.query_norm(query)
        return self._rotate(query, positions)

    def _rotate(self, x: Array, positions: Array | None) -> Array:
        if self.rotary_base is None:
            return x
        rotated = rotary_embedding(x[..., : self.rotated], positions, base=self.rotary_base)
        if self.rotated == self.head_dim:
            return rotated
        return jnp.concatenate([rotated, x[..., self.rotated :]], axis=-1)


def _on_shards(attention: Callable[..., Array]) -> Callable[..., Array]:
    """The attention where it runs on a mesh: each device attends with its sequences and heads, and
    where it has parts of sequences only, with those that go round the ring.

    That serves the kernels, which the compiler cannot cut. Other functions than plain attention are
    left to the compiler, as nobody knows here what they mix.
    """
    over = split_over("length")
    function: Any = attention
    options: dict[str, Any] = {}
    while isinstance(function, partial):
        function, options = function.func, function.keywords | options
    if function is not dot_product_attention:
        if over:
            raise ValueError(
                f"mesh axes {list(over)} split the length, which attention "
                f"{getattr(function, '__name__', function)} cannot have: choose "
                "dot_product_attention, or a mesh without them"
            )
        return attention

    def attend(
        query: Array, key: Array, value: Array, *, is_causal: bool, **broadcast: Array | None
    ) -> Array:
        names = [name for name, x in broadcast.items() if x is not None]
        if over and names:
            raise ValueError(
                f"mesh axes {list(over)} split the length, and there is a {names[0]} of the "
                "logits, which does not go round the ring of devices"
            )

        def on_each(query: Array, key: Array, value: Array, *broadcast: Array) -> Array:
            if over:
                return _ring(query, key, value, over, is_causal, **options)
            return attention(query, key, value, is_causal=is_causal, **dict(zip(names, broadcast)))

        of_keys = ("batch", "length", "kv_heads", None)
        of_queries = ("batch", "length", "heads", None)
        given: list[Any] = [broadcast[name] for name in names]
        axes = [of_queries, of_keys, of_keys, *map(_axes_of_broadcast, given)]
        return on_shards(on_each, axes, of_queries)(query, key, value, *given)

    return attend


def _ring(
    query: Array,
    key: Array,
    value: Array,
    axis_name: tuple[str, ...],
    is_causal: bool,
    **options: Any,
) -> Array:
    """Ring attention of shards whose rows are in order, its work shared out evenly."""
    attend: Any = partial(ring_attention, axis_name=axis_name, is_causal=is_causal, **options)
    if not is_causal or query.shape[1] % 2:
        return attend(query, key, value)
    query, key, value = (into_zigzag(x, axis_name) for x in (query, key, value))
    return out_of_zigzag(attend(query, key, value, layout="zigzag"), axis_name)


def _axes_of_broadcast(x: Array) -> tuple[str | None, ...]:
    """Logical names of the axes of a mask or bias, those along which it is one for all left out."""
    names = ("batch", "heads", None, None)[4 - x.ndim :]
    return tuple(name if size > 1 else None for name, size in zip(names, x.shape))


def visible_positions(positions: Array, prefix_lengths: Array, length: int) -> Array:
    """What tokens at `positions [batch, n]` may see: a mask `[batch, 1, n, length]`.

    >>> visible_positions(jnp.array([[1]]), jnp.array([0]), 3).ravel().tolist()
    [True, True, False]
    """
    keys = jnp.arange(length)
    seen = (keys <= positions[..., None]) | (keys < prefix_lengths[:, None, None])
    return seen[:, None]
