"""Models turned into others that compute the same function."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxref.models.blocks import Block, component_class, renamed, stack_blocks, unstack_block
from jaxref.models.transformer import Transformer
from jaxref.nn import Linear, Norm
from jaxref.norms import (
    compressed_rms_norm,
    fold_unified_norm,
    layer_norm,
    norm_placement,
    rms_norm,
    unified_norm,
)


def fold_norm_affine(
    scale: Array | None, bias: Array | None, kernel: Array, kernel_bias: Array | None = None
) -> tuple[Array, Array | None]:
    r"""A linear map that has taken over the gain and the bias of the norm before it.

        (scale · z + bias) K + c = z (diag(scale) K) + (bias K + c)

    Args:
      scale: the norm's gain `[features]`; None is 1.
      bias: the norm's bias `[features]`; None is 0.
      kernel: K `[features, ...]`.
      kernel_bias: c of the shape of the kernel's other axes; None is 0.

    Returns:
      The new kernel and bias; the bias is None where both were.

    Use it before a norm is replaced by one without parameters; `pre_ln_to_pre_rms` does it for all
    of a `Transformer`.

    Cost: a pass over the kernel for the gain and a product of the bias with it, once.

    Example:
      >>> kernel, bias = fold_norm_affine(jnp.array([2.0]), jnp.array([3.0]), jnp.array([[5.0]]))
      >>> float(kernel[0, 0]), float(bias[0])
      (10.0, 15.0)

    Reference: Jiang, Gu, Zhu, Pan, "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and
    Efficient Pre-LN Transformers", 2023, arXiv:2305.14858.
    """
    if bias is not None:
        shift = jnp.tensordot(bias, kernel, axes=1)
        kernel_bias = shift if kernel_bias is None else kernel_bias + shift
    if scale is not None:
        kernel = kernel * scale.reshape(-1, *[1] * (kernel.ndim - 1))
    return kernel, kernel_bias


def pre_ln_to_pre_rms(model: Transformer) -> Transformer:
    r"""A transformer with RMS norms that computes what one with layer norms does.

    The gains and biases of the norms move into the linear maps that read them, and what writes to
    the residual stream, embeddings and output maps, is re-centred: its mean over the features
    subtracted. The stream then is the old one minus its mean, on which both norms agree.

    Args:
      model: a pre-norm `Transformer` whose norm is `jaxref.norms.layer_norm`, with plain linear
        maps. It stays as it is.

    Returns:
      A new `Transformer` whose norm is `rms_norm` without a gain, with the same logits.

    Raises:
      ValueError: another placement, norm, kind of linear maps, or a tied or normalised embedding,
        which cannot take over a gain or be re-centred on its own.

    Use it after training, for cheaper norms at the same logits; `pre_rms_to_pre_crms` goes on from
    there.

    Cost: a copy of the model and passes over its parameters, once; then a reduction and a
    subtraction less in each norm.

    In training, too, the two compute the same where the re-centring stays in the graph.

    Example:
      >>> from jaxref.models import TransformerConfig
      >>> config = TransformerConfig(
      ...     vocab_size=16, max_length=8, num_layers=2, features=8, num_heads=2, mlp_features=16,
      ...     norm=layer_norm,
      ... )
      >>> model, tokens = config.build(rngs=nnx.Rngs(0)), jnp.arange(8)[None]
      >>> bool(jnp.allclose(model(tokens), pre_ln_to_pre_rms(model)(tokens), atol=1e-5))
      True

    Reference: Jiang, Gu, Zhu, Pan, "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and
    Efficient Pre-LN Transformers", 2023, arXiv:2305.14858.
    """
    epsilon = _check_convertible(model, layer_norm)
    model = nnx.clone(model)
    _fold_norms(
        model, lambda norm: partial(fold_norm_affine, _value(norm.scale), _value(norm.bias))
    )
    centre_writers(model)
    _replace_norms(model, partial(rms_norm, scale=None, epsilon=epsilon))
    return model


def pre_rms_to_pre_crms(model: Transformer) -> Transformer:
    r"""A transformer whose stream has one entry less, of the function of one with RMS norms.

    A stream of zero mean is determined by all entries but the last. What writes it keeps the
    others; what reads it, a kernel K, becomes `K[:d-1] - K[d-1]`, since the last entry is the
    negative sum of the others.

    Args:
      model: what `pre_ln_to_pre_rms` gives: a pre-norm `Transformer` whose stream has zero mean and
        whose norms have no parameters. It stays as it is.

    Returns:
      A new `Transformer` of `features - 1`, whose norm is `compressed_rms_norm`, with the same
      logits.

    Raises:
      ValueError: another placement, norm or kind of linear maps, norms with a gain, or what writes
        to the stream is not of zero mean.

    Use it where `features - 1` is a size that the hardware likes.

    Cost: a copy of the model and passes over its parameters, once; then 1 / features fewer
    parameters and multiplications in each map.

    Example:
      >>> from jaxref.models import TransformerConfig
      >>> config = TransformerConfig(
      ...     vocab_size=16, max_length=8, num_layers=2, features=8, num_heads=2, mlp_features=16,
      ...     norm=layer_norm,
      ... )
      >>> model, tokens = config.build(rngs=nnx.Rngs(0)), jnp.arange(8)[None]
      >>> small = pre_rms_to_pre_crms(pre_ln_to_pre_rms(model))
      >>> small.config.features, bool(jnp.allclose(model(tokens), small(tokens), atol=1e-5))
      (7, True)

    Reference: Jiang, Gu, Zhu, Pan, "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and
    Efficient Pre-LN Transformers", 2023, arXiv:2305.14858.
    """
    epsilon = _check_convertible(model, rms_norm)
    if model.final_norm.scale is not None:
        raise ValueError("model must have norms without a gain: pre_ln_to_pre_rms folds them")
    model = nnx.clone(model)
    for parameter in _written(model):
        values = parameter[...]
        if jnp.max(jnp.abs(jnp.mean(values, axis=-1))) > 1e-5 * jnp.max(jnp.abs(values)):
            raise ValueError("model must write with zero mean: pre_ln_to_pre_rms re-centres it")
        parameter.set_value(values[..., :-1])

    def narrowed(kernel: Array, bias: Array | None) -> tuple[Array, Array | None]:
        return kernel[:-1] - kernel[-1], bias

    _fold_norms(model, lambda norm: narrowed)
    config = model.config
    smaller = config.features - 1
    for block in model.blocks:
        for sublayer in (block.attention, block.mlp):
            for reader in readers(sublayer.function):
                reader.in_features = (smaller,)
            writer(sublayer.function).out_features = (smaller,)
    model.output.in_features = (smaller,)
    model.config = dataclasses.replace(
        config, features=smaller, head_dim=config.head_dim or config.features // config.num_heads
    )
    _replace_norms(model, partial(compressed_rms_norm, scale=None, epsilon=epsilon))
    return model


def fold_statistics(model: Transformer) -> Transformer:
    r"""A transformer without norms that computes what one with unified norms does in evaluation.

    In evaluation `unified_norm` multiplies each channel by a constant and adds one, which the
    linear maps that read it take over: `jaxref.norms.fold_unified_norm`.

    Args:
      model: a pre-norm `Transformer` whose norm is `jaxref.norms.unified_norm`, with plain linear
        maps. It stays as it is.

    Returns:
      A new `Transformer` whose norm is None, with the logits that `model` has after `eval()`.

    Raises:
      ValueError: another placement, norm or kind of linear maps, or a tied embedding.

    Use it before inference with a model of `jaxref.norms.unified_norm`; `fold_linears` does away
    with reparametrized kernels.

    Cost: a copy of the model and a product of each norm's shift with the kernels behind it, once;
    then no statistics, no reductions, no norms.

    Example:
      >>> from jaxref.models import TransformerConfig
      >>> config = TransformerConfig(
      ...     vocab_size=16, max_length=8, num_layers=2, features=8, num_heads=2, mlp_features=16,
      ...     norm=unified_norm,
      ... )
      >>> model, tokens = config.build(rngs=nnx.Rngs(0)), jnp.arange(8)[None]
      >>> model.eval()
      >>> bool(jnp.allclose(model(tokens), fold_statistics(model)(tokens), atol=1e-5))
      True

    Reference: Yang, Zhang, Zhang, Deng, Hao, Wang, Ren, Lyu, Zhang, Zheng, "Unified Normalization
    for Accelerating and Stabilizing Transformers", 2022, arXiv:2208.01313.
    """
    epsilon = _check_convertible(model, unified_norm, default_epsilon=1e-5)
    model = nnx.clone(model)

    def fold(norm: Norm) -> Callable[..., tuple[Array, Array]]:
        state = norm.running_state()
        scale, bias = _value(norm.scale), _value(norm.bias)

        def folded(kernel: Array, kernel_bias: Array | None) -> tuple[Array, Array]:
            return fold_unified_norm(state, scale, bias, kernel, kernel_bias, epsilon=epsilon)

        return folded

    _fold_norms(model, fold)
    for block in model.blocks:
        block.attention.input_norm = block.mlp.input_norm = None
    model.final_norm = None
    model.config = dataclasses.replace(model.config, norm=None, final_norm=None)
    return model


def fold_linears(model: Any) -> Any:
    r"""A model whose reparametrised linear maps and convolutions have become plain ones.

        x W̃ for the kernel W̃ that `SigmaReparamLinear`, `WeightStandardizedConv`, ... make of theirs

    Args:
      model: any `nnx.Module` of `jaxref`; stacked layers included. It stays as it is.

    Returns:
      A copy that computes what `model` does in evaluation, without computing kernels at each call.

    Use it before inference with `jaxref.nn.SigmaReparamLinear` and its kind; `fold_statistics` does
    away with norms that have statistics.

    Cost: a copy of the model and each kernel computed once; then that of plain maps.

    Example:
      >>> from jaxref.models import TransformerConfig
      >>> from jaxref.nn import SigmaReparamLinear
      >>> config = TransformerConfig(
      ...     vocab_size=16, max_length=8, num_layers=2, features=8, num_heads=2, mlp_features=16,
      ...     linear=SigmaReparamLinear,
      ... )
      >>> model, tokens = config.build(rngs=nnx.Rngs(0)), jnp.arange(8)[None]
      >>> model.eval()
      >>> bool(jnp.allclose(model(tokens), fold_linears(model)(tokens), atol=1e-5))
      True

    Reference: Zhai et al., "Stabilizing Transformer Training by Preventing Attention Entropy
    Collapse", 2023, arXiv:2303.06296.
    """
    model = nnx.clone(model)
    model.eval()
    stacked = [node for _, node in nnx.iter_graph(model) if getattr(node, "depth", None)]
    inside = {id(n) for block in stacked for _, n in nnx.iter_graph(block) if hasattr(n, "fold")}
    for _, node in list(nnx.iter_graph(model)):
        if not isinstance(node, nnx.Module):
            continue
        for name, child in list(vars(node).items()):
            if hasattr(child, "fold"):
                fold = _fold_stacked if id(child) in inside else lambda linear: linear.fold()
                setattr(node, name, fold(child))
    if isinstance(model, Transformer):
        model.config = dataclasses.replace(model.config, linear=Linear)
    return model


def _fold_stacked(linear: Any) -> Any:
    graphdef, leaves = nnx.split(linear)
    leaves = renamed(leaves, lambda axes: axes[1:])
    made: list[Any] = []

    def fold(leaves: Any) -> Any:
        plain_graphdef, plain = nnx.split(nnx.merge(graphdef, leaves).fold())
        made.append(plain_graphdef)
        return plain

    plain = renamed(jax.vmap(fold)(leaves), lambda axes: ("layers", *axes))
    return nnx.merge(made[0], plain)


def with_scan_layers(model: Transformer, scan_layers: bool = True) -> Transformer:
    r"""A transformer of the same values that runs its layers by `lax.scan`, or does not.

    Args:
      model: a `Transformer`. It stays as it is.
      scan_layers: True for stacked parameters and a scan; False for single layers.

    Returns:
      A new `Transformer`, whose configuration has `scan_layers` so.

    Use it to load single layers into a model that compiles quickly, or to take layers out of one.

    Cost: a copy of the layers; scanned, the time to compile does not grow with depth.

    Example:
      >>> from jaxref.models import TransformerConfig
      >>> config = TransformerConfig(
      ...     vocab_size=16, max_length=8, num_layers=2, features=8, num_heads=2, mlp_features=16
      ... )
      >>> model, tokens = config.build(rngs=nnx.Rngs(0)), jnp.arange(8)[None]
      >>> scanned = with_scan_layers(model)
      >>> len(scanned.blocks), bool(jnp.allclose(model(tokens), scanned(tokens), atol=1e-5))
      (1, True)
    """
    model = nnx.clone(model)
    placements = norm_placement(
        model.config.num_layers,
        model.config.norm_placement,
        post_fraction=model.config.post_fraction,
    )

    def arranged(blocks: nnx.List) -> nnx.List:
        single = [layer for block in blocks for layer in unstack_block(block)]
        if not scan_layers:
            return nnx.List(single)
        kinds = dict.fromkeys(placements)  # equal ones follow each other
        return nnx.List(
            [
                stack_blocks([b for b, placement in zip(single, placements) if placement == kind])
                for kind in kinds
            ]
        )

    model.blocks = arranged(model.blocks)
    if model.encoder is not None:
        model.encoder = arranged(model.encoder)
    model.config = dataclasses.replace(model.config, scan_layers=scan_layers)
    return model


def _check_convertible(
    model: Transformer, norm: Callable[..., Any], *, default_epsilon: float = 1e-6
) -> float:
    """Raises where a conversion does not hold; the norms' ε otherwise."""
    config = model.config
    if config.norm_placement != "pre" or config.architecture == "encoder_decoder":
        raise ValueError(
            f"model must be a pre-norm model without an encoder, got norm_placement "
            f"{config.norm_placement!r}, architecture {config.architecture!r}"
        )
    if component_class(config.norm) is not norm or config.final_norm is not None:
        raise ValueError(f"model must have {norm.__name__} as every norm, got {config.norm}")
    if config.layer_norm_scaling:
        raise ValueError("model must not scale its norms by depth: layer_norm_scaling is True")
    if config.tie_embeddings or config.stable_embedding:
        raise ValueError("model must have an embedding of its own that is used as it is")
    for block in model.blocks:
        for sublayer in (block.attention, block.mlp):
            linears = [*readers(sublayer.function), writer(sublayer.function)]
            if any(type(linear) is not Linear for linear in linears):
                raise ValueError("model must have plain linear maps: jaxref.models.fold_linears")
    return getattr(config.norm, "keywords", {}).get("epsilon", default_epsilon)


def readers(function: Any) -> list[Linear]:
    """The linear maps of an attention or MLP that read the stream."""
    names = ("query", "key", "value", "up", "gate")
    found = [getattr(function, name, None) for name in names]
    readers = [linear for linear in found if linear is not None]
    if not readers:
        raise ValueError(f"model must have MultiHeadAttention and MLP, got {type(function)}")
    return readers


def writer(function: Any) -> Linear:
    """The linear map of an attention or MLP that writes to the stream."""
    return function.down if hasattr(function, "down") else function.output


def centre_writers(model: Transformer) -> None:
    """Subtracts its mean over the features from what is added to the stream, in place."""
    for parameter in _written(model):
        parameter[...] = parameter[...] - jnp.mean(parameter[...], axis=-1, keepdims=True)


def _written(model: Transformer) -> list[nnx.Param]:
    """The parameters that are added to the stream."""
    tables = [table.embedding for table in (model.embed, model.positions) if table is not None]
    writers = [writer(s.function) for block in model.blocks for s in (block.attention, block.mlp)]
    return [
        *tables,
        *(p for linear in writers for p in (linear.kernel, linear.bias) if p is not None),
    ]


def _fold_norms(
    model: Transformer, fold: Callable[[Norm], Callable[..., tuple[Array, Array | None]]]
) -> None:
    """Replaces kernel and bias of what reads each norm by what `fold(norm)` makes of them."""

    def taken_over(norm: Norm, linear: Linear) -> tuple[Array, Array | None]:
        return fold(norm)(linear.kernel[...], _value(linear.bias))

    def assign(
        linear: Linear, made: tuple[Array, Array | None], leading: tuple[str, ...] = ()
    ) -> None:
        kernel, bias = made
        linear.kernel.set_value(kernel)
        if bias is None:
            return
        if linear.bias is not None:
            linear.bias.set_value(bias)
            return
        axes = linear.kernel.get_metadata()["axes"]
        linear.bias = nnx.data(
            nnx.Param(bias, axes=(*leading, *axes[len(axes) - len(linear.out_features) :]))
        )

    for block in model.blocks:
        for sublayer in (block.attention, block.mlp):
            for reader in readers(sublayer.function):
                made = _of_each(block, taken_over, sublayer.input_norm, reader)
                assign(reader, made, () if block.depth is None else ("layers",))
    assign(model.output, taken_over(model.final_norm, model.output))


def _of_each(block: Block, function: Callable[..., Any], *modules: Any) -> Any:
    """The function of modules of a block; of each layer's, where the block is a stack."""
    if block.depth is None:
        return function(*modules)
    split = [nnx.split(module) for module in modules]

    def of_one(leaves: list[Any]) -> Any:
        merged = [nnx.merge(graphdef, leaf) for (graphdef, _), leaf in zip(split, leaves)]
        return function(*merged)

    return jax.vmap(of_one, axis_size=block.depth)([leaves for _, leaves in split])


def _replace_norms(model: Transformer, norm: Callable[..., Any]) -> None:
    features = model.config.features
    for block in model.blocks:
        for sublayer in (block.attention, block.mlp):
            sublayer.input_norm = Norm(norm, features, axes=("norm",))
    model.final_norm = Norm(norm, features, axes=("norm",))
    model.config = dataclasses.replace(model.config, norm=norm)


def _value(parameter: nnx.Param | None) -> Array | None:
    return None if parameter is None else parameter[...]
