"""One transformer, whose parts are functions and modules chosen by its configuration."""

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jaxref.attention import dot_product_attention, linear_attention
from jaxref.core.checks import check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.kernels.flash_attention import SAVEABLE
from jaxref.models.blocks import (
    ROWS,
    Block,
    component_class,
    is_tokenized,
    make_stack,
    run_blocks,
    stream_norm,
)
from jaxref.nn import MLP, Embed, Linear, Norm, StableEmbedding
from jaxref.nn.losses import OutputOfLoss
from jaxref.nn.mlp import is_module_class
from jaxref.norms import norm_placement, rms_norm, shrink_embedding_gradient
from jaxref.parallel import constrain, merge_rows, split_rows

ARCHITECTURES = ("decoder", "encoder", "prefix", "encoder_decoder")
NORM_PLACEMENTS = ("pre", "post", "peri", "sandwich", "mix", "deep_norm")
REMAT_POLICIES = {
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "attention_saveable": jax.checkpoint_policies.save_only_these_names(SAVEABLE),
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "everything_saveable": jax.checkpoint_policies.everything_saveable,
}
POSITIONS = ("rotary", "learned", "alibi", "rotary_alibi", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """What a `Transformer` is made of; `build` makes it.

    Attributes:
      vocab_size: number of token ids.
      max_length: longest sequence; it sizes learned positions and bounds generation.
      num_layers, features, num_heads, mlp_features: depth, width, heads, hidden units.
      architecture: which tokens a token sees. "decoder": those before it; "encoder": all;
        "prefix": those before it and all of a prefix; "encoder_decoder": those before it and all
        of a source, which `num_layers` more layers encode.
      num_kv_heads: key and value heads, for grouped-query attention; default `num_heads`.
      head_dim: size of a head; default `features / num_heads`.
      norm: a norm of `jaxref.norms`, with or without statistics; None for none at all.
      final_norm: the norm before the output matrix; default `norm`.
      norm_placement: "pre": x + f(norm(x)); "post": norm(x + f(x)); "sandwich":
        x + norm(f(norm(x))); "peri": that, and a norm of the embedding; "mix": "post" in the first
        layers and "pre" in the others; "deep_norm": norm(α x + f(x)) with α and initial values by
        depth. All but "post" and "deep_norm" end in one more norm, before the output matrix.
      post_fraction: the share of layers, rounded down, that "mix" places "post".
      layer_norm_scaling: divide the norms' outputs in layer l by √l; placement "pre" only.
      attention: a function of `jaxref.attention`, or a module of `jaxref.nn` in the place of
        `MultiHeadAttention`.
      query_key_norm: a norm for query and key per head; None for none.
      linear: the class of the linear maps of attention and MLP. `ParameterAttention` makes a
        TokenFormer, whose MLP is one such map with `mlp_features` tokens.
      use_bias: biases in those maps.
      positions: "rotary", "learned", "alibi", "rotary_alibi" or None.
      rotary_base, rotary_fraction: base of the rotary wavelengths, and the share of each head that
        is rotated.
      alibi_slopes, alibi_distance: "geometric" or "harmonic" slopes by head, "linear" or "harmonic"
        in the distance.
      mlp: the class of the MLP, such as `jaxref.nn.MixtureOfExperts`.
      activation, gated: the MLP's; SiLU gated is SwiGLU. An activation may be a module's class.
      stable_embedding: normalise the embeddings (`jaxref.nn.StableEmbedding`).
      embedding_gradient: what the embeddings' gradients are multiplied by, in (0, 1].
      tie_embeddings: the output matrix is the transposed embedding.
      dropout: rate in [0, 1) on each sublayer's output, where a key is given.
      remat: recompute each block in the backward pass instead of keeping its activations.
      remat_policy: what is kept all the same: "nothing_saveable", or another policy of
        `jax.checkpoint_policies`, "dots_with_no_batch_dims_saveable", "dots_saveable" or
        "everything_saveable"; or "attention_saveable", the results of `flash_attention` and of
        `ring_attention`, which take longest to compute again where sequences are long.
      scan_layers: stack the parameters of equal layers and run them by `lax.scan`, so that the
        time to compile does not grow with depth.
      dtype, param_dtype: types to compute in (None: the parameters') and of the parameters.

    Raises:
      ValueError: a size below 1, an unknown choice, a number out of range, or choices that cannot
        be combined, and why.

    Use "pre" to train without a warm-up, "post" for the original's fixed variance, "peri" where
    the activations of "pre" grow too large with depth, "mix" or `layer_norm_scaling` where the
    deep layers of "pre" learn little, "deep_norm" for hundreds of layers.

    Cost: num_layers · (4 · features² + 2 · features · mlp_features) parameters, 3 for 2 if gated,
    and vocab_size · features a table; `remat` costs a forward pass more.

    Example:
      >>> config = TransformerConfig(
      ...     vocab_size=16, max_length=8, num_layers=2, features=8, num_heads=2, mlp_features=16
      ... )
      >>> config.build(rngs=nnx.Rngs(0)).output_kernel().shape
      (8, 16)

    Reference: the placements are those of Vaswani et al., "Attention Is All You Need", 2017,
    arXiv:1706.03762 (post); Xiong et al., "On Layer Normalization in the Transformer
    Architecture", 2020, arXiv:2002.04745 (pre); Kim et al., "Peri-LN: Revisiting Layer
    Normalization in the Transformer Architecture", 2025, arXiv:2502.02732 (peri); Li, Yin, Liu,
    "Mix-LN: Unleashing the Power of Deeper Layers by Combining Pre-LN and Post-LN", 2024,
    arXiv:2412.13795 (mix); Wang et al., "DeepNet: Scaling Transformers to 1,000 Layers", 2022,
    arXiv:2203.00555 (deep_norm).
    """

    vocab_size: int
    max_length: int
    num_layers: int
    features: int
    num_heads: int
    mlp_features: int
    architecture: str = "decoder"
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm: Callable[..., Any] | None = rms_norm
    final_norm: Callable[..., Any] | None = None
    norm_placement: str = "pre"
    post_fraction: float = 0.25
    layer_norm_scaling: bool = False
    attention: Callable[..., Any] = dot_product_attention
    query_key_norm: Callable[..., Array] | None = None
    linear: Callable[..., Any] = Linear
    use_bias: bool = False
    positions: str | None = "rotary"
    rotary_base: float = 10000.0
    rotary_fraction: float = 1.0
    alibi_slopes: str = "geometric"
    alibi_distance: str = "linear"
    mlp: Callable[..., Any] = MLP
    activation: Callable[..., Any] = jax.nn.gelu
    gated: bool = False
    stable_embedding: bool = False
    embedding_gradient: float = 1.0
    tie_embeddings: bool = False
    dropout: float = 0.0
    remat: bool = False
    remat_policy: str = "nothing_saveable"
    scan_layers: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def build(self, *, rngs: nnx.Rngs) -> "Transformer":
        """The model of this configuration."""
        return Transformer(self, rngs=rngs)

    def __post_init__(self):
        for name in (
            "vocab_size",
            "max_length",
            "num_layers",
            "features",
            "num_heads",
            "mlp_features",
        ):
            check_interval(1, jnp.inf, **{name: getattr(self, name)})
        check_interval(0, 1, closed="left", dropout=self.dropout)
        check_interval(0, 1, closed="right", embedding_gradient=self.embedding_gradient)
        for name, options in (
            ("architecture", ARCHITECTURES),
            ("norm_placement", NORM_PLACEMENTS),
            ("positions", POSITIONS),
            ("remat_policy", tuple(REMAT_POLICIES)),
        ):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {options}, got {getattr(self, name)!r}")
        self._check_combinations()

    def _check_combinations(self):
        if self.layer_norm_scaling and self.norm_placement != "pre":
            raise ValueError(
                "layer_norm_scaling needs norm_placement 'pre': behind another norm the factor "
                f"would be lost, and 'post' has no norm to scale; got {self.norm_placement!r}"
            )
        if self.norm is None and self.norm_placement != "pre":
            raise ValueError(f"norm must be given to be placed {self.norm_placement!r}, got None")
        if self.stable_embedding and self.tie_embeddings:
            raise ValueError(
                "tie_embeddings needs a table that is used as it is, and stable_embedding "
                "normalises it"
            )
        if is_tokenized(self):
            if self.use_bias:
                raise ValueError("use_bias is not for linear=ParameterAttention, without biases")
            if self.mlp is not MLP or self.gated or self.activation is not jax.nn.gelu:
                raise ValueError(
                    "mlp, gated and activation have no meaning with linear=ParameterAttention: one "
                    "map of parameter tokens in the place of the MLP has its own nonlinearity"
                )
        if is_module_class(self.attention):
            return  # a module says itself what it does not take
        attention = component_class(self.attention)
        takes_bias = "bias" in inspect.signature(attention).parameters
        if "alibi" in (self.positions or "") and (attention is linear_attention or not takes_bias):
            raise ValueError(
                f"positions {self.positions!r} are a bias of the logits, and attention "
                f"{attention.__name__} takes none"
            )


class GenerationCache(NamedTuple):
    """What a `Transformer` remembers of the tokens so far, of each sequence of a batch.

    Attributes:
      lengths: `[batch]`, how many there are.
      prefix_lengths: `[batch]`, how many of them are seen by all (architecture "prefix").
      layers: what each block remembers.
      memory_mask: boolean `[batch, 1, 1, source length]`, the source tokens that exist; None
        without a source.
    """

    lengths: Array
    prefix_lengths: Array
    layers: list[Any]
    memory_mask: Array | None


class Transformer(nnx.Module):
    """A language model: embed, `num_layers` blocks, norm, project to logits.

    Args:
      config: its parts and sizes.
      rngs: source of the `params` key.

    Raises:
      ValueError: head counts that do not divide each other or `features`, or a module that cannot
        do what another choice asks of it.

    Use it for language models, and to compare norms, attentions and linear maps in one model;
    `VisionTransformer` and `CompactEncoder` are for images.

    Cost: a multiplication for each parameter of its maps and O(length · features) of attention a
    layer, for each token; 2 · features numbers of cache a layer and token.

    Every parameter's metadata `axes` names its axes for the rules of `jaxref.parallel`. Without a
    norm or linear map that has statistics the model keeps no state: its parameters are all that it
    is. With one, `train()` and `eval()` say whether a call moves the statistics.

    Example:
      >>> config = TransformerConfig(
      ...     vocab_size=16, max_length=8, num_layers=2, features=8, num_heads=2, mlp_features=16
      ... )
      >>> model = Transformer(config, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((1, 8), int)).shape
      (1, 8, 16)

    Reference: Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762.
    """

    Config = TransformerConfig

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        types: dict[str, Any] = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        norm = partial(stream_norm, config=config)

        def table(rows: int, axis: str | None, std: float) -> Embed:
            return Embed(
                rows,
                config.features,
                axes=(axis, "embed"),
                embedding_init=jax.nn.initializers.normal(std),
                rngs=rngs,
                **types,
            )

        self.embed: Any
        if config.stable_embedding:
            self.embed = StableEmbedding(
                config.vocab_size,
                config.features,
                axes=("vocabulary", "embed"),
                rngs=rngs,
                **types,
            )
        else:
            std = config.features**-0.5 if config.tie_embeddings else 1.0
            self.embed = table(config.vocab_size, "vocabulary", std)
        learned = config.positions == "learned"
        self.positions: Any = table(config.max_length, None, 0.02) if learned else None
        self.embed_norm = norm(config.norm) if config.norm_placement == "peri" else None
        encodes = config.architecture == "encoder_decoder"
        self.encoder = nnx.List(_make_blocks(config, rngs, cross=False)) if encodes else None
        self.blocks = nnx.List(_make_blocks(config, rngs, cross=encodes))
        ends_in_norm = config.norm_placement not in ("post", "deep_norm")
        self.final_norm: Any = norm(config.final_norm or config.norm) if ends_in_norm else None
        self.source_norm = (
            norm(config.final_norm or config.norm) if ends_in_norm and encodes else None
        )
        self.output: Any = (
            None
            if config.tie_embeddings
            else Linear(
                config.features, config.vocab_size, axes=("embed", "vocabulary"), rngs=rngs, **types
            )
        )

    def hidden(
        self,
        tokens: Array,
        *,
        key: Array | None = None,
        mask: Array | None = None,
        where: Array | None = None,
        prefix_lengths: Array | None = None,
        positions: Array | None = None,
        source: Array | None = None,
        source_where: Array | None = None,
    ) -> Array:
        """The states that the output matrix reads: `[batch, length, features]`.

        Args:
          tokens: integer `[batch, length]`, length at most `max_length`; an id that is not in
            [0, vocab_size) gives NaN in its sequence.
          key: random key for dropout and routing; None (evaluation) drops nothing.
          mask: boolean, broadcastable to `[batch, heads, length, length]`, True where a query may
            see a key; besides what the architecture hides.
          where: boolean `[batch, length]`: the tokens that exist. The others are seen by none and
            count in no statistics.
          prefix_lengths: integer `[batch]`, for "prefix": how many tokens all may see.
          positions: integer `[batch, length]` in [0, max_length), where the tokens stand, for
            rotary or learned positions. Default: one after the other, from 0.
          source: integer `[batch, source length]`, for "encoder_decoder".
          source_where: boolean like `source`: the source tokens that exist.

        Returns:
          The states in `dtype`. A loss that reads them with `output_kernel` need not store logits.

        Raises:
          ValueError: tokens that are not two-dimensional, or longer than `max_length`, or a prefix
            or source that the architecture does not have, or lacks, or positions where the model
            biases by distance.
          TypeError: tokens that are not integers.
        """
        x, _ = self._passed(
            tokens,
            key=key,
            mask=mask,
            where=where,
            prefix_lengths=prefix_lengths,
            positions=positions,
            source=source,
            source_where=source_where,
        )
        return self._finished(x, self.final_norm, tokens.shape, where)

    def states(self, tokens: Array, **kwargs: Any) -> Array:
        """The stream before the first block and after each, as `jaxref.analysis` reads it.

        Returns:
          `[num_layers + 1, batch, length, features]`, of stacked layers too. `hidden` is the last
          of these after the final norm, where there is one; arguments and errors are as there.
        """
        return self._passed(tokens, keep=True, **kwargs)[1]

    def encode(
        self, source: Array, *, key: Array | None = None, where: Array | None = None
    ) -> tuple[Array, Array | None]:
        """The encoded source `[batch, length, features]`, and the mask of the tokens that exist.

        Raises:
          ValueError: the architecture has no encoder of its own, or a source of a wrong shape.
        """
        if self.encoder is None:
            raise ValueError(
                f"source is for architecture 'encoder_decoder', this is "
                f"{self.config.architecture!r}"
            )
        self._check_tokens("source", source)
        if where is not None:
            check_shape(source.shape, source_where=where)
        x = self._embedded(source, where=where)
        x, _ = self._through(self.encoder, x, source.shape, key, where)
        mask = None if where is None else where[:, None, None, :]
        return self._finished(x, self.source_norm, source.shape, where), mask

    def init_cache(
        self,
        batch: int,
        *,
        max_length: int | None = None,
        kind: str = "full",
        source: Array | None = None,
        source_where: Array | None = None,
        **options: Any,
    ) -> GenerationCache:
        """An empty cache for `extend`.

        Args:
          batch: sequences.
          max_length: tokens that it has room for. Default: the model's.
          kind: "full" keys and values, or "staircase" for those whose precision falls with age.
          source: integer `[batch, source length]`, for "encoder_decoder".
          source_where: boolean like `source`: the source tokens that exist.
          **options: of the kind, as of `jaxref.quantization.staircase_cache_init`.

        Raises:
          ValueError: a model that sees what follows, a length above the model's, a source that the
            architecture does not have, or lacks, or an attention that cannot go on step by step.
        """
        if self.config.architecture == "encoder":
            raise ValueError("architecture 'encoder' sees what follows: it cannot generate")
        self._check_asked("source", source, "encoder_decoder")
        max_length = self.config.max_length if max_length is None else max_length
        check_interval(1, self.config.max_length, max_length=max_length)
        if kind not in ("full", "staircase"):
            raise ValueError(f"kind must be 'full' or 'staircase', got {kind!r}")
        dtype = self.config.dtype or self.config.param_dtype
        memory, memory_mask = None, None
        if source is not None:
            memory, memory_mask = self.encode(source, where=source_where)

        def layer(block: Block) -> dict[str, Any]:
            made = {
                "attention": block.attention.function.init_cache(
                    batch, max_length, dtype=dtype, kind=kind, **options
                )
            }
            if memory is not None:
                made["memory"] = block.cross.function.remember(memory)
            return made

        zeros = jnp.zeros(batch, jnp.int32)
        return GenerationCache(
            zeros, zeros, [_each_layer(block, layer) for block in self.blocks], memory_mask
        )

    def extend(
        self,
        tokens: Array,
        cache: GenerationCache,
        *,
        where: Array | None = None,
        prefix_lengths: Array | None = None,
    ) -> tuple[Array, GenerationCache]:
        """The states of the next tokens of each sequence, given all that came before.

        Args:
          tokens: integer `[batch, n]`, the n next tokens; sequences may be at different lengths.
          cache: of `init_cache`, or of the previous call.
          where: boolean `[batch, n]`: the tokens that exist, ahead of those that do not, whose
            states mean nothing. Default: all.
          prefix_lengths: integer `[batch]`, for "prefix", of the first call: how many of these
            tokens all may see.

        Returns:
          `[batch, n, features]`, as `hidden` gives for the whole sequences, and the new cache. What
          goes beyond the length of the cache is lost: `jaxref.models.generate` checks that none
          does.

        Raises:
          ValueError: shapes that do not match the cache.
          TypeError: tokens that are not integers.
        """
        self._check_tokens("tokens", tokens)
        batch, n = tokens.shape
        check_shape((batch,), lengths=cache.lengths)
        where = jnp.ones((batch, n), bool) if where is None else where
        check_shape((batch, n), where=where)
        positions = cache.lengths[:, None] + jnp.arange(n)
        lengths = cache.lengths + jnp.sum(where, axis=1, dtype=jnp.int32)
        if prefix_lengths is None:
            prefix_lengths = cache.prefix_lengths

        def call(block: Block, x: Array, _: None, index: Any, layer: Any) -> tuple[Array, Any]:
            return block.extend(
                x,
                layer,
                index,
                (batch, n),
                where=where,
                positions=positions,
                prefix_lengths=prefix_lengths,
                memory_mask=cache.memory_mask,
            )

        x = self._embedded(tokens, positions)
        x, layers = run_blocks(self.blocks, x, call, caches=cache.layers)
        hidden = self._finished(x, self.final_norm, tokens.shape)
        return hidden, GenerationCache(lengths, prefix_lengths, layers, cache.memory_mask)

    def output_kernel(self) -> Array:
        """The matrix `[features, vocab_size]` that turns `hidden` into logits.

        Raises:
          ValueError: logits have a bias, too (of a converted model): take `logits`.
        """
        if self.output is None:
            return self.embed.embedding[...].T
        if self.output.bias is not None:
            raise ValueError("the output matrix is not all: logits have a bias; take `logits`")
        return self.output.kernel[...]

    def logits(self, hidden: Array) -> Array:
        """Logits `[..., vocab_size]` of states `[..., features]`, in at least float32."""
        if isinstance(self.output, OutputOfLoss):
            return self.output(hidden)
        kernel = self.embed.embedding[...].T if self.output is None else self.output.kernel[...]
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits = jnp.matmul(
            rows, kernel.astype(hidden.dtype), preferred_element_type=compute_dtype(hidden)
        )
        if self.output is not None and self.output.bias is not None:
            logits += self.output.bias[...].astype(logits.dtype)
        return logits.reshape(*hidden.shape[:-1], logits.shape[-1])

    def __call__(self, tokens: Array, **kwargs: Any) -> Array:
        """Logits `[batch, length, vocab_size]` in at least float32; arguments as in `hidden`."""
        return self.logits(self.hidden(tokens, **kwargs))

    def _check_tokens(self, name: str, tokens: Array) -> None:
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"{name} must be integers, got {tokens.dtype.name}")
        if tokens.ndim != 2 or tokens.shape[1] > self.config.max_length:
            raise ValueError(
                f"{name} must have shape [batch, length of at most {self.config.max_length}], "
                f"got {tuple(tokens.shape)}"
            )

    def _check_asked(self, name: str, value: Any, architecture: str) -> None:
        if (value is not None) != (self.config.architecture == architecture):
            raise ValueError(
                f"{name} must be given for architecture {architecture!r} and no other, this is "
                f"{self.config.architecture!r}"
            )

    def _passed(
        self,
        tokens: Array,
        *,
        key: Array | None = None,
        mask: Array | None = None,
        where: Array | None = None,
        prefix_lengths: Array | None = None,
        positions: Array | None = None,
        source: Array | None = None,
        source_where: Array | None = None,
        keep: bool = False,
    ) -> tuple[Array, Any]:
        """The stream after all blocks, and `states` if they are to be kept; see `hidden`."""
        self._check_tokens("tokens", tokens)
        self._check_asked("prefix_lengths", prefix_lengths, "prefix")
        self._check_asked("source", source, "encoder_decoder")
        if where is not None:
            check_shape(tokens.shape, where=where)
        decoder_key, source_key = (None, None)
        if key is not None:
            decoder_key, source_key = key, jax.random.fold_in(key, 1)
        memory, memory_mask = None, None
        if source is not None:
            memory, memory_mask = self.encode(source, key=source_key, where=source_where)
        if prefix_lengths is not None:
            seen = _prefix_mask(tokens.shape, prefix_lengths)
            mask = seen if mask is None else mask & seen
        is_causal = self.config.architecture in ("decoder", "encoder_decoder")
        given = {}
        if positions is not None:
            if "alibi" in (self.config.positions or ""):
                raise ValueError(
                    "positions must be None for distances in the order of the tokens "
                    f"({self.config.positions!r})"
                )
            check_shape(tokens.shape, positions=positions)
            given["positions"] = positions
        x = self._embedded(tokens, positions, where=where)
        return self._through(
            self.blocks,
            x,
            tokens.shape,
            decoder_key,
            where,
            mask=mask,
            is_causal=is_causal,
            memory=memory,
            memory_mask=memory_mask,
            keep=keep,
            **given,
        )

    def _embedded(
        self, tokens: Array, positions: Array | None = None, *, where: Array | None = None
    ) -> Array:
        """The stream `[tokens, features]` that enters the blocks."""
        x = self.embed(tokens)
        if self.config.embedding_gradient < 1:
            x = shrink_embedding_gradient(x, self.config.embedding_gradient)
        if self.positions is not None:
            # A token that does not exist may lie beyond the last position: its row is not read.
            last = self.config.max_length - 1
            ids = jnp.arange(tokens.shape[1]) if positions is None else jnp.minimum(positions, last)
            x = x + self.positions(ids)
        x = constrain(merge_rows(x), ROWS, None)
        return x if self.embed_norm is None else self.embed_norm(x, where=_rows(where))

    def _through(
        self,
        blocks: nnx.List,
        x: Array,
        shape: tuple[int, ...],
        key: Array | None,
        where: Array | None,
        *,
        mask: Array | None = None,
        keep: bool = False,
        **kwargs: Any,
    ) -> tuple[Array, Any]:
        if where is not None:
            mask = where[:, None, None, :] if mask is None else mask & where[:, None, None, :]
            kwargs["where"] = _rows(where)

        def call(block: Block, x: Array, key: Any, index: Any, _: None) -> tuple[Array, Any]:
            x = block(x, key, index, shape, mask=mask, **kwargs)
            return x, x if keep else None

        keys = None if key is None else jax.random.split(key, self.config.num_layers)
        policy = REMAT_POLICIES[self.config.remat_policy]
        last, after = run_blocks(
            blocks, x, call, keys=keys, remat=policy if self.config.remat else None
        )
        if not keep:
            return last, None
        states = jnp.concatenate([x[None], *(layers.reshape(-1, *x.shape) for layers in after)])
        return last, jax.vmap(lambda rows: split_rows(rows, shape))(states.reshape(-1, *x.shape))

    def _finished(
        self, x: Array, norm: Norm | None, shape: tuple[int, ...], where: Array | None = None
    ) -> Array:
        x = x if norm is None else norm(x, where=_rows(where))
        return split_rows(x, shape)


def _rows(where: Array | None) -> Array | None:
    """Which rows of the stream exist, `[tokens, 1]`."""
    return None if where is None else merge_rows(where)[:, None]


def _make_blocks(config: TransformerConfig, rngs: nnx.Rngs, *, cross: bool) -> list[Block]:
    placements = norm_placement(
        config.num_layers, config.norm_placement, post_fraction=config.post_fraction
    )
    keys = jax.random.split(rngs.params(), config.num_layers)

    def make(placement: str, key: Array) -> Block:
        return Block(config, placement, cross=cross, rngs=nnx.Rngs(params=key))

    if not config.scan_layers:
        return [make(placement, key) for placement, key in zip(placements, keys)]
    blocks, first = [], 0
    for placement in dict.fromkeys(placements):  # equal ones follow each other
        count = placements.count(placement)
        blocks.append(make_stack(partial(make, placement), keys[first : first + count]))
        first += count
    return blocks


def _each_layer(block: Block, function: Callable[[Block], Any]) -> Any:
    """The function of a block; of a stacked one, of every layer, along a leading axis."""
    if block.depth is None:
        return function(block)
    graphdef, leaves = nnx.split(block)
    return jax.vmap(lambda leaves: function(nnx.merge(graphdef, leaves)), axis_size=block.depth)(
        leaves
    )


def _prefix_mask(shape: tuple[int, ...], prefix_lengths: Array) -> Array:
    batch, length = shape
    check_shape((batch,), prefix_lengths=prefix_lengths)
    in_prefix = jnp.arange(length) < jnp.asarray(prefix_lengths)[:, None]
    return jnp.tri(length, dtype=bool) | in_prefix[:, None, None, :]
