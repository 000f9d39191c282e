"""Modules in the place of `MultiHeadAttention`: its constructor's keywords, and its calls.

`__call__(x, *, mask, is_causal)` mixes a sequence; `init_cache` and `extend` go on token by token.
A keyword that a mixer has no use for is refused by name.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from jaxref.attention import (
    CausalPairState,
    KeyValueCache,
    attention_entropy_regularizer,
    attention_probabilities,
    causal_pair_reduction,
    causal_pair_reduction_init,
    causal_pair_reduction_step,
    dot_product_attention,
    key_value_cache_append,
    key_value_cache_init,
    third_order_attention,
)
from jaxref.attention.static_mixing import Context, Reduction, check_pair_reduction
from jaxref.core.checks import check_interval
from jaxref.nn.attention import MultiHeadAttention, visible_positions
from jaxref.nn.linear import Linear
from jaxref.nn.variables import AuxiliaryLoss


class EntropyGuidedAttention(MultiHeadAttention):
    """Attention whose heads learn how widely they look from each position, and are held to it.

        softmax(q kᵀ / (τ √d)) v,   τ = exp(log_temperature) for each head and position

    In training the entropy of each head is drawn to a level that the head learns, by
    `jaxref.attention.attention_entropy_regularizer`.

    Args:
      features, num_heads: as for `MultiHeadAttention`.
      max_length: positions that have a temperature.
      tolerance: share of the largest entropy within which a head is free. Default 0.2.
      coefficient: of the regularizer; 0 for none. Default 1e-5, for a sum over batch and queries.
      rngs: source of the `params` key.
      **kwargs: as for `MultiHeadAttention`.

    Attributes:
      log_temperature: `[heads, max_length]`, initially 0.
      threshold_weights: `[heads]`, each head's level as a share of the largest entropy, initially
        0.5.
      regularizer: the `AuxiliaryLoss` of the newest call in training.
      deterministic: whether the regularizer rests (evaluation). Initially False.

    Raises:
      ValueError: as `MultiHeadAttention`; more positions than `max_length`; a number out of range.

    Use it in a transformer with few nonlinearities, whose early heads see all tokens alike;
    `MultiHeadAttention` where norms and activations are at hand.

    Cost: that of `MultiHeadAttention` and num_heads · (max_length + 1) parameters; in training the
    regularizer forms all weights of a head, which a `coefficient` of 0 spares.

    Example:
      >>> attend = EntropyGuidedAttention(8, 2, max_length=5, rngs=nnx.Rngs(0))
      >>> attend(jnp.ones((1, 5, 8)), is_causal=True).shape
      (1, 5, 8)

    Reference: Jha, Reagen, "Entropy-Guided Attention for Private LLMs", 2025, arXiv:2501.03489.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        max_length: int,
        tolerance: float = 0.2,
        coefficient: float = 1e-5,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(features, num_heads, param_dtype=param_dtype, rngs=rngs, **kwargs)
        check_interval(0, jnp.inf, coefficient=coefficient)
        check_interval(0, 1, tolerance=tolerance)
        zeros = jnp.zeros((num_heads, max_length), param_dtype)
        self.log_temperature = nnx.Param(zeros, axes=("heads", None))
        self.threshold_weights = nnx.Param(jnp.full(num_heads, 0.5, param_dtype), axes=("heads",))
        self.regularizer = AuxiliaryLoss(jnp.zeros((), jnp.float32), axes=())
        self.tolerance, self.coefficient = tolerance, coefficient
        self.deterministic = False

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
        """As `MultiHeadAttention.attend`, at the temperatures of the queries' positions."""
        limit = self.log_temperature.shape[1]
        if query.shape[1] > limit:
            raise ValueError(f"x must have at most max_length = {limit} tokens, got {query.shape}")
        inverse = jnp.exp(-self.log_temperature[...].astype(jnp.float32)).T
        inverse = inverse[: query.shape[1]] if positions is None else inverse[positions]
        query = (query * inverse[..., None]).astype(query.dtype)
        if self.coefficient > 0 and not self.deterministic:
            probabilities = attention_probabilities(query, key, mask=mask, is_causal=is_causal)
            self.regularizer[...] = attention_entropy_regularizer(
                probabilities[None],
                self.threshold_weights[...],
                tolerance=self.tolerance,
                coefficient=self.coefficient,
            ).astype(jnp.float32)
        return super().attend(
            query, key, value, mask=mask, is_causal=is_causal, positions=positions
        )


class ThirdOrderAttention(nnx.Module):
    """Attention of each token over pairs of tokens.

        y_i = Σ_{j,k} softmax_{j,k}(Σ_l q_il a_jl b_kl / d) (v_j · w_k) W_o

    with two projections each of keys and values: `jaxref.attention.third_order_attention`, head by
    head.

    Args:
      features: size of input and output.
      num_heads: heads, a divisor of `features`.
      linear, use_bias, kernel_init, value_init, output_init: as for `MultiHeadAttention`.
      dtype, param_dtype: types to compute in and of the parameters.
      rngs: source of the `params` key.
      **refused: what `MultiHeadAttention` takes besides. Anything but its default is refused.

    Raises:
      ValueError: `num_heads` does not divide `features`, or an argument that has no meaning here:
        grouped heads, rotary positions, biases by position, a norm of query and key.

    Use it where what matters about a token shows in three tokens at once, which takes several
    layers of `MultiHeadAttention`, and sequences are short.

    Cost: 6 · features² parameters, as many multiplications a token; O(length³ · features) time for
    the pairs; a cache of twice the size when generating.

    Example:
      >>> attend = ThirdOrderAttention(8, 2, rngs=nnx.Rngs(0))
      >>> attend(jnp.ones((1, 5, 8)), is_causal=True).shape
      (1, 5, 8)

    Reference: Alman, Song, "How to Capture Higher-order Correlations? Generalizing Matrix Softmax
    Attention to Kronecker Computation", 2023, arXiv:2310.04064.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        linear: Any = Linear,
        use_bias: bool = False,
        kernel_init: Initializer | None = None,
        value_init: Initializer | None = None,
        output_init: Initializer | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **refused: Any,
    ):
        _refuse(type(self).__name__, num_heads, refused)
        # The projections are those of plain attention, with one more pair of key and value.
        plain = partial(
            MultiHeadAttention,
            features,
            num_heads,
            linear=linear,
            use_bias=use_bias,
            kernel_init=kernel_init,
            value_init=value_init,
            output_init=output_init,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        first, second = plain(), plain()
        self.query, self.output = first.query, first.output
        self.keys = nnx.List([first.key, second.key])
        self.values = nnx.List([first.value, second.value])
        self.num_heads, self.head_dim = num_heads, first.head_dim

    def __call__(self, x: Array, *, mask: Array | None = None, is_causal: bool = False) -> Array:
        """Mixes `x [batch, length, features]`; `mask` is boolean, broadcastable to
        `[batch, 1, length, length]`: a pair is seen where both of its tokens are."""
        keys, values = ([project(x) for project in pair] for pair in (self.keys, self.values))
        y = third_order_attention(
            self.query(x), *keys, *values, mask1=mask, mask2=mask, is_causal=is_causal
        )
        return self.output(y)

    def init_cache(
        self, batch: int, max_length: int, *, dtype: DTypeLike, kind: str = "full"
    ) -> list[KeyValueCache]:
        """A cache for each of the two sets of keys and values."""
        if kind != "full":
            raise ValueError(f"kind must be 'full' for ThirdOrderAttention, got {kind!r}")
        sizes = (batch, max_length, self.num_heads, self.head_dim)
        return [key_value_cache_init(*sizes, dtype=dtype) for _ in range(2)]

    def extend(
        self,
        x: Array,
        cache: list[KeyValueCache],
        *,
        positions: Array,
        where: Array,
        prefix_lengths: Array,
    ) -> tuple[Array, list[KeyValueCache]]:
        """As `MultiHeadAttention.extend`."""
        del where  # what does not exist lies behind what every token sees
        cache = [
            key_value_cache_append(memory, key(x), value(x), positions[:, 0])
            for memory, key, value in zip(cache, self.keys, self.values)
        ]
        mask = visible_positions(positions, prefix_lengths, cache[0].key.shape[1])
        y = third_order_attention(
            self.query(x),
            *(memory.key for memory in cache),
            *(memory.value for memory in cache),
            mask1=mask,
            mask2=mask,
        )
        return self.output(y), cache


class CausalGenerationMixer(nnx.Module):
    """Attention's place taken by joining each token with the one before it.

        y = reduce(v_t, v_{t-1}) W_out,   v = x W_in

    with a mean of the tokens so far as third candidate where a context is asked for:
    `jaxref.attention.causal_pair_reduction`. Heads and softmax are gone.

    Args:
      features: size of input and output.
      num_heads: ignored: there are no heads.
      reduction: "min", "max" or "mean". Default "min".
      context: None or "causal". "global" would show the tokens to come.
      linear, use_bias, kernel_init, output_init: as for `MultiHeadAttention`.
      dtype, param_dtype: types to compute in and of the parameters.
      rngs: source of the `params` key.
      **refused: what `MultiHeadAttention` takes besides. Anything but its default is refused.

    Raises:
      ValueError: an unknown `reduction` or `context`, an argument that has no meaning here, or,
        when called, a mask between tokens or a call that is not causal.

    Use it in place of `MultiHeadAttention` where speed and size matter more than looking far back:
    a stack of L sees L tokens back, and with a context all of them, on average.

    Cost: 2 · features² parameters, half of attention's, as many multiplications a token, and
    nothing for pairs; in generation the state of a token, however many came before.

    Example:
      >>> mix = CausalGenerationMixer(8, rngs=nnx.Rngs(0))
      >>> mix(jnp.ones((1, 5, 8)), is_causal=True).shape
      (1, 5, 8)

    Reference: Hilsenbek, "Breaking the Attention Bottleneck", 2024, arXiv:2406.10906.
    """

    def __init__(
        self,
        features: int,
        num_heads: int = 1,
        *,
        reduction: Reduction = "min",
        context: Context = "causal",
        linear: Any = Linear,
        use_bias: bool = False,
        kernel_init: Initializer | None = None,
        value_init: Initializer | None = None,
        output_init: Initializer | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **refused: Any,
    ):
        _refuse(type(self).__name__, num_heads, refused)
        check_pair_reduction(reduction, context)
        if context == "global":
            raise ValueError("context must be None or 'causal' in a causal mixer, got 'global'")

        def project(axes: tuple[str, str], init: Initializer | None) -> Any:
            given: dict[str, Any] = {} if init is None else {"kernel_init": init}
            if use_bias:
                given["use_bias"] = True
            return linear(
                features,
                features,
                axes=axes,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
                **given,
            )

        self.features, self.reduction, self.context = features, reduction, context
        self.input = project(("embed", "heads"), value_init or kernel_init)
        self.output = project(("heads", "embed"), output_init or kernel_init)

    def __call__(self, x: Array, *, mask: Array | None = None, is_causal: bool = False) -> Array:
        """Mixes `x [batch, length, features]`; `mask [batch, 1, 1, length]` says which tokens
        exist."""
        if not is_causal:
            raise ValueError("is_causal must be True: CausalGenerationMixer sees no later token")
        where = None
        if mask is not None:
            if mask.ndim != 4 or mask.shape[1:3] != (1, 1):
                raise ValueError(
                    f"mask must say which tokens exist, [batch, 1, 1, length], got {mask.shape}"
                )
            where = mask[:, 0, 0, :, None]
        mixed = causal_pair_reduction(
            self.input(x), reduction=self.reduction, context=self.context, where=where
        )
        return self.output(mixed)

    def init_cache(
        self, batch: int, max_length: int, *, dtype: DTypeLike, kind: str = "full"
    ) -> CausalPairState:
        """The state before the first token, whose size is that of one token."""
        if kind != "full":
            raise ValueError(f"kind must be 'full' for CausalGenerationMixer, got {kind!r}")
        return causal_pair_reduction_init(batch, self.features)

    def extend(
        self,
        x: Array,
        cache: CausalPairState,
        *,
        positions: Array,
        where: Array,
        prefix_lengths: Array,
    ) -> tuple[Array, CausalPairState]:
        """As `MultiHeadAttention.extend`, token by token."""
        del positions, prefix_lengths

        def step(state: CausalPairState, inputs: tuple[Array, Array]) -> tuple[Any, Array]:
            token, exists = inputs
            y, after = causal_pair_reduction_step(
                token, state, reduction=self.reduction, context=self.context
            )
            kept = jax.tree.map(
                lambda new, old: jnp.where(exists.reshape(-1, *[1] * (new.ndim - 1)), new, old),
                after,
                state,
            )
            return kept, y

        tokens = jnp.moveaxis(self.input(x), 1, 0)
        cache, mixed = jax.lax.scan(step, cache, (tokens, where.T))
        return self.output(jnp.moveaxis(mixed, 0, 1)), cache


def _refuse(mixer: str, num_heads: int, arguments: dict[str, Any]) -> None:
    """Raises where something is asked for that the mixer does not have."""
    defaults = {
        "num_kv_heads": (None, num_heads),
        "head_dim": (None,),
        "query_key_norm": (None,),
        "rotary_base": (None,),
        "rotary_fraction": (1.0,),
        "position_bias": (None,),
        "attention": (dot_product_attention,),
    }
    for name, value in arguments.items():
        if name not in defaults:
            raise TypeError(f"{mixer} takes no argument {name!r}")
        if value not in defaults[name]:
            advice = "; choose positions 'learned' or None" if "rotary" in name else ""
            raise ValueError(f"{name} has no meaning in {mixer}, got {value}{advice}")
