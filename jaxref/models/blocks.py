"""What a transformer is stacked of: sublayers with their norms, blocks, depth by loop or scan."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer, normal, variance_scaling

from jaxref.attention import harmonic_alibi_bias
from jaxref.nn import CausalActivation, MultiHeadAttention, Norm, ParameterAttention
from jaxref.nn.mlp import is_module_class
from jaxref.norms import deep_norm_alpha, deep_norm_gain, layer_norm_scaling_factor
from jaxref.parallel import constrain, merge_rows, split_rows

TransformerConfig = Any  # that of jaxref.models.transformer, which imports this file
Call = Callable[..., tuple[Array, Any]]
Policy = Callable[..., Any]

ROWS = ("batch", "length")
"""The axes that were merged into the rows of the stream."""


def stream_norm(function: Callable[..., Any] | None, config: TransformerConfig) -> Norm | None:
    """A norm of the stream; None of None."""
    if function is None:
        return None
    return Norm(function, config.features, axes=("norm",), param_dtype=config.param_dtype)


class Sublayer(nnx.Module):
    """A function of the stream with its norms, dropout and residual connection.

        pre:              x + f(norm(x))             post:       norm(x + f(x))
        peri, sandwich:   x + norm(f(norm(x)))       deep_norm:  norm(α x + f(x))

    The stream is a matrix `[tokens, features]`: with batch and length apart, XLA's CPU backend
    takes 6% longer for a training step.
    """

    def __init__(self, function: Callable[..., Any], config: TransformerConfig, placement: str):
        norm = partial(stream_norm, config.norm, config)
        self.function: Any = function
        self.input_norm: Any = norm() if placement in ("pre", "peri", "sandwich") else None
        self.output_norm = norm() if placement in ("peri", "sandwich") else None
        self.stream_norm = norm() if placement in ("post", "deep_norm") else None
        self.alpha = deep_norm_alpha(config.num_layers) if placement == "deep_norm" else None
        self.rate = config.dropout

    def __call__(
        self,
        x: Array,
        key: Array | None,
        function: Callable[[Array], Array] | None = None,
        *,
        factor: Array | float | None = None,
        where: Array | None = None,
    ) -> Array:
        """`x [tokens, features]` after this sublayer.

        Args:
          x: the stream.
          key: random key for dropout; None drops nothing.
          function: f with what it needs bound to it, of `[tokens, features]`. Default: the
            sublayer's own.
          factor: multiplies what f reads.
          where: boolean `[tokens, 1]`, the tokens that count in a norm's statistics.
        """
        y = x if self.input_norm is None else self.input_norm(x, where=where)
        if factor is not None:
            y = (y * factor).astype(y.dtype)
        y = (function or self.function)(y)
        if self.output_norm is not None:
            y = self.output_norm(y, where=where)
        if key is not None and self.rate > 0:
            keep = jax.random.bernoulli(key, 1 - self.rate, y.shape)
            y = jnp.where(keep, y / (1 - self.rate), 0).astype(y.dtype)
        x = constrain((x if self.alpha is None else self.alpha * x) + y, ROWS, None)
        return x if self.stream_norm is None else self.stream_norm(x, where=where)


class Block(nnx.Module):
    """One layer: attention, attention over the source where there is one, and MLP.

    Args:
      config: of the transformer.
      placement: of this layer's norms.
      cross: whether it attends over a source, too.
      rngs: source of the `params` key.

    Attributes:
      depth: None, or the number of layers whose parameters are stacked along a leading axis.
    """

    depth: int | None = None

    def __init__(
        self, config: TransformerConfig, placement: str, *, cross: bool = False, rngs: nnx.Rngs
    ):
        types: dict[str, Any] = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        inits = _initializers(config, placement)
        linear: dict[str, Any] = {"linear": _linear(config), "use_bias": config.use_bias}
        heads: dict[str, Any] = {
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "query_key_norm": config.query_key_norm,
        }
        self.attention = Sublayer(
            _mixer(config)(
                config.features,
                config.num_heads,
                **heads,
                **linear,
                **_position_options(config),
                **inits.attention,
                **types,
                rngs=rngs,
            ),
            config,
            placement,
        )
        self.cross: Any = (
            Sublayer(
                MultiHeadAttention(
                    config.features,
                    config.num_heads,
                    **heads,
                    **linear,
                    **inits.attention,
                    **types,
                    rngs=rngs,
                ),
                config,
                placement,
            )
            if cross
            else None
        )
        self.mlp = Sublayer(_mlp(config, inits.mlp, rngs), config, placement)
        self.scaled = config.layer_norm_scaling

    def __call__(
        self,
        x: Array,
        key: Array | None,
        index: Array | int,
        shape: tuple[int, ...],
        *,
        where: Array | None = None,
        memory: Array | None = None,
        memory_mask: Array | None = None,
        **kwargs: Any,
    ) -> Array:
        """`x [tokens, features]` after this layer.

        Args:
          x: the stream.
          key: random key for dropout and routing, or None.
          index: the layer's number, from 1.
          shape: `[batch, length]` of the tokens.
          where: boolean `[tokens, 1]`, as for `Sublayer`.
          memory: `[batch, source length, features]`, what to attend over besides.
          memory_mask: boolean, which of it may be seen.
          **kwargs: `mask`, `is_causal` and `positions` of the attention.
        """

        def cross(y: Array) -> Array:
            return self.cross.function(y, context=memory, mask=memory_mask)

        return self._around(
            x,
            key,
            index,
            shape,
            where,
            attention=lambda y: self.attention.function(y, **kwargs),
            cross=cross,
        )

    def extend(
        self,
        x: Array,
        cache: Any,
        index: Array | int,
        shape: tuple[int, ...],
        *,
        where: Array,
        memory_mask: Array | None = None,
        **kwargs: Any,
    ) -> tuple[Array, Any]:
        """As `__call__` for the next tokens, `where [batch, n]`, after those in the cache.

        The cache is a dictionary of what the attention remembers and, where there is a source, the
        keys and values of that. Further arguments are those of the attention's `extend`.
        """
        after: list[Any] = []

        def attention(y: Array) -> Array:
            y, attended = self.attention.function.extend(
                y, cache["attention"], where=where, **kwargs
            )
            after.append(attended)
            return y

        def cross(y: Array) -> Array:
            return self.cross.function.recall(y, cache["memory"], mask=memory_mask)

        x = self._around(x, None, index, shape, None, attention=attention, cross=cross)
        return x, cache | {"attention": after[0]}

    def _around(
        self,
        x: Array,
        key: Array | None,
        index: Array | int,
        shape: tuple[int, ...],
        where: Array | None,
        *,
        attention: Callable[[Array], Array],
        cross: Callable[[Array], Array],
    ) -> Array:
        """The layer around its attention functions, which take `[batch, length, features]`."""
        keys = (
            [None] * 4
            if key is None
            else [*jax.random.split(key), *(jax.random.fold_in(key, i) for i in (2, 3))]
        )
        factor = layer_norm_scaling_factor(index) if self.scaled else None

        def apart(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
            return lambda y: merge_rows(function(split_rows(y, shape)))

        x = self.attention(x, keys[0], apart(attention), factor=factor, where=where)
        if self.cross is not None:
            x = self.cross(x, keys[2], apart(cross), factor=factor, where=where)

        def mlp(y: Array) -> Array:
            function = self.mlp.function
            if "key" in inspect.signature(type(function).__call__).parameters:
                function = partial(function, key=keys[3])
            if isinstance(getattr(function, "activation", None), CausalActivation):
                function = apart(function)
            return function(y)

        return self.mlp(x, keys[1], mlp, factor=factor, where=where)


def make_stack(make: Callable[[Array], Block], keys: Array) -> Block:
    """Blocks of one kind as one, with the parameters of all along a leading axis "layers".

    Args:
      make: makes a block from a key.
      keys: one for each block.
    """
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(keys[0])))
    leaves = jax.vmap(lambda key: nnx.split(make(key))[1])(keys)
    return _stacked(graphdef, leaves, len(keys))


def stack_blocks(blocks: Sequence[Block]) -> Block:
    """Single blocks of one kind as one stacked block."""
    graphdef = nnx.graphdef(blocks[0])
    leaves = jax.tree.map(lambda *each: jnp.stack(each), *(nnx.state(block) for block in blocks))
    return _stacked(graphdef, leaves, len(blocks))


def unstack_block(block: Block) -> list[Block]:
    """The single blocks that are stacked in one; of a single one, itself."""
    if block.depth is None:
        return [block]
    graphdef, leaves = nnx.split(block)
    blocks = []
    for i in range(block.depth):
        single = renamed(jax.tree.map(lambda x, i=i: x[i], leaves), lambda axes: axes[1:])
        blocks.append(nnx.merge(graphdef, single))
        blocks[-1].depth = None
    return blocks


def _stacked(graphdef: nnx.GraphDef, leaves: Any, depth: int) -> Block:
    block = nnx.merge(graphdef, renamed(leaves, lambda axes: ("layers", *axes)))
    block.depth = depth
    return block


def renamed(leaves: Any, axes: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> Any:
    """The variables with other names of their axes."""

    def rename(variable: nnx.Variable) -> nnx.Variable:
        variable = variable.copy()
        variable.set_metadata(axes=axes(variable.get_metadata()["axes"]))
        return variable

    return jax.tree.map(rename, leaves, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def run_blocks(
    blocks: Sequence[Block],
    x: Array,
    call: Call,
    *,
    keys: Array | None = None,
    caches: Sequence[Any] | None = None,
    remat: Policy | None = None,
) -> tuple[Array, list[Any]]:
    """The stream after all layers, one after the other; stacked blocks by `lax.scan`.

    Args:
      blocks: single and stacked blocks.
      x: the stream.
      call: `call(block, x, key, index, cache) -> (x, cache)`, with the layer's number from 1.
      keys: random keys, one for each layer.
      caches: one for each block; of a stacked block, with a leading axis.
      remat: recompute each layer in the backward pass, but for what the policy keeps. Default:
        keep all.

    Returns:
      The stream, and the new caches.
    """
    outputs: list[Any] = []
    first = 0
    for block, cache in zip(blocks, caches or [None] * len(blocks)):
        if block.depth is not None:
            layers = slice(first, first + block.depth)
            index = np.arange(first + 1, first + block.depth + 1)
            inputs: Any = (None if keys is None else keys[layers], index, cache)
            x, output = _run_apart(block, x, call, inputs, remat=remat, scan=True)
        elif remat is not None:
            inputs = (None if keys is None else keys[first], first + 1, cache)
            x, output = _run_apart(block, x, call, inputs, remat=remat, scan=False)
        else:
            x, output = call(block, x, None if keys is None else keys[first], first + 1, cache)
        outputs.append(output)
        first += block.depth or 1
    return x, outputs


def _run_apart(
    block: Block, x: Array, call: Call, inputs: Any, *, remat: Policy | None, scan: bool
) -> tuple[Array, Any]:
    # Not nnx.remat or nnx.scan, which write the parameters back: that forbids a model from outside
    # the trace. What the layers write themselves, statistics, comes back beside the stream.
    graphdef, *leaves = nnx.split(block, nnx.Param, ...)

    def step(x: Array, leaves_and_inputs: Any) -> tuple[Array, Any]:
        leaves, (key, index, cache) = leaves_and_inputs
        layer = nnx.merge(graphdef, *leaves)
        x, cache = call(layer, x, key, index, cache)
        return x, (nnx.state(layer, nnx.Not(nnx.Param)), cache)

    if remat is not None:
        step = jax.checkpoint(step, prevent_cse=not scan, policy=remat)
    run: Any = partial(jax.lax.scan, step) if scan else step
    x, (moved, output) = run(x, (leaves, inputs))
    if jax.tree.leaves(moved):
        nnx.update(block, moved)
    return x, output


class _Initializers(NamedTuple):
    """Initializers of a layer's maps, as keywords of its attention and of its MLP."""

    attention: dict[str, Any]
    mlp: dict[str, Any]


def _initializers(config: TransformerConfig, placement: str) -> _Initializers:
    if config.layer_norm_scaling or is_tokenized(config):
        return _Initializers({}, {})
    if placement == "deep_norm":
        gain = deep_norm_gain(config.num_layers)
        plain = variance_scaling(1, "fan_avg", "normal")
        small = variance_scaling(gain**2, "fan_avg", "normal")
        attention = {"kernel_init": plain, "value_init": small, "output_init": small}
        return _Initializers(attention, {"kernel_init": small, "output_init": small})
    # Writers of the residual stream start smaller, so that its variance at the end does not grow
    # with depth (GPT-2's scaling).
    writer = variance_scaling(1 / (2 * config.num_layers), "fan_in", "truncated_normal")
    return _Initializers({"output_init": writer}, {"output_init": writer})


def is_tokenized(config: TransformerConfig) -> bool:
    """Whether the projections are attention over parameter tokens, as in TokenFormer."""
    return issubclass(component_class(config.linear), ParameterAttention)


def _linear(config: TransformerConfig) -> Callable[..., Any]:
    if not is_tokenized(config):
        return config.linear
    return partial(config.linear, value_init=normal(2 / (config.num_layers * config.features**0.5)))


def component_class(component: Any) -> Any:
    """A component without the arguments that are bound to it."""
    while isinstance(component, partial):
        component = component.func
    return component


def _mixer(config: TransformerConfig) -> Callable[..., Any]:
    """The class of the attention, from a class or from the function that it is around."""
    if not is_module_class(config.attention):
        return partial(MultiHeadAttention, attention=config.attention)
    if "max_length" in inspect.signature(component_class(config.attention).__init__).parameters:
        return partial(config.attention, max_length=config.max_length)
    return config.attention


def _mlp(config: TransformerConfig, inits: dict[str, Initializer], rngs: nnx.Rngs) -> Any:
    types: dict[str, Any] = {"dtype": config.dtype, "param_dtype": config.param_dtype}
    if is_tokenized(config):  # one map, whose tokens are the hidden units
        return _linear(config)(
            config.features,
            config.features,
            num_tokens=config.mlp_features,
            axes=("embed", None),
            **types,
            rngs=rngs,
        )
    given = {"activation": config.activation, "gated": config.gated, "use_bias": config.use_bias}
    if "linear" in inspect.signature(component_class(config.mlp).__init__).parameters:
        given["linear"] = _linear(config)
    return config.mlp(config.features, config.mlp_features, **given, **inits, **types, rngs=rngs)


def _position_options(config: TransformerConfig) -> dict[str, Any]:
    kind = config.positions or ""
    options: dict[str, Any] = {}
    if "rotary" in kind:
        options |= {"rotary_base": config.rotary_base, "rotary_fraction": config.rotary_fraction}
    if "alibi" in kind:
        options["position_bias"] = partial(
            harmonic_alibi_bias, slopes=config.alibi_slopes, distance=config.alibi_distance
        )
    return options
