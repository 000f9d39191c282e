"""A larger transformer that starts from the function of a smaller one."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval
from jaxref.models.blocks import component_class
from jaxref.models.conversions import centre_writers, readers, with_scan_layers, writer
from jaxref.models.transformer import Transformer, TransformerConfig
from jaxref.nn import MLP, Linear, MultiHeadAttention, Norm
from jaxref.norms import layer_norm, rms_norm


def pad_kernel(
    kernel: ArrayLike,
    in_size: int,
    out_size: int,
    *,
    key: Array | None = None,
    new_scale: float = 0.0,
) -> Array:
    r"""A kernel for more inputs and outputs that treats the old ones as before.

        W' = [ W   A ]        A, B random of standard deviation new_scale / √in_size
             [ 0   B ]

    so that `[x, 0] W' = [x W, x A]`, whatever is in A and B, and new inputs reach new outputs only.

    Args:
      kernel: W `[inputs, outputs]` floating point.
      in_size: inputs of W', at least those of W.
      out_size: outputs of W', at least those of W.
      key: random key; not needed where `new_scale` is 0.
      new_scale: at least 0. Default 0: new outputs are 0.

    Returns:
      W' `[in_size, out_size]` in the type of `kernel`.

    Raises:
      ValueError: a size below the kernel's, a negative scale, or no key where one is needed.

    Use it for the linear maps of a model of your own that is to grow; `grow_transformer` does all
    of a `Transformer`'s, `rescale_norm_for_padding` the norms.

    Cost: one kernel of the new size, and as many random numbers where `new_scale` is above 0.

    Example:
      >>> print(pad_kernel(jnp.ones((1, 2)), 2, 3))
      [[1. 1. 0.]
       [0. 0. 0.]]

    Reference: Zhang, "Transfer training from smaller language model", 2021, arXiv:2104.11390.
    """
    kernel = jnp.asarray(kernel)
    inputs, outputs = kernel.shape
    check_interval(inputs, jnp.inf, in_size=in_size)
    check_interval(outputs, jnp.inf, out_size=out_size)
    check_interval(0, jnp.inf, new_scale=new_scale)
    padded = jnp.zeros((in_size, out_size), kernel.dtype)
    if new_scale > 0:
        if key is None:
            raise ValueError("key must be given for a new_scale above 0, got None")
        noise = jax.random.normal(key, padded.shape, kernel.dtype)
        padded = (new_scale / in_size**0.5 * noise).at[:, :outputs].set(0)
    return padded.at[:inputs, :outputs].set(kernel)


def rescale_norm_for_padding(
    scale: ArrayLike, epsilon: float, old_width: int, new_width: int
) -> tuple[Array, float]:
    r"""The gain and ε with which a norm of `[x, 0]` is, at x, the norm of x.

        g' = g √(d / D),   ε' = ε d / D

    for a root mean square over D entries of which d are not zero; for a layer norm likewise where x
    has zero mean.

    Args:
      scale: g `[d]` floating point.
      epsilon: ε at least 0.
      old_width: d.
      new_width: D, at least d.

    Returns:
      g' `[D]`, 1 at the new entries, and ε'.

    Raises:
      ValueError: a width that shrinks, or a negative `epsilon`.

    Use it for the norms in front of what `pad_kernel` made, where new channels of the stream are 0;
    `grow_transformer` does both.

    Cost: elementwise, once.

    Example:
      >>> scale, epsilon = rescale_norm_for_padding(jnp.ones(1), 4e-6, 1, 4)
      >>> print(scale, epsilon)
      [0.5 1.  1.  1. ] 1e-06

    Reference: Zhang, "Transfer training from smaller language model", 2021, arXiv:2104.11390; the
    exact rescaling is ours.
    """
    check_interval(0, jnp.inf, epsilon=epsilon)
    check_interval(1, new_width, old_width=old_width)
    share = old_width / new_width
    scale = jnp.asarray(scale)
    grown = jnp.ones(new_width, scale.dtype).at[:old_width].set(scale * share**0.5)
    return grown, epsilon * share


def grow_transformer(
    model: Transformer,
    *,
    key: Array,
    num_layers: int | None = None,
    features: int | None = None,
    num_heads: int | None = None,
    mlp_features: int | None = None,
    new_scale: float = 0.0,
    exact_norm: bool = True,
) -> Transformer:
    r"""A larger transformer with the logits of a trained smaller one, to train on from there.

    Width: new channels of the residual stream start at 0 and are read by none of the old maps.
    Hidden units and heads: new ones read at random and write nothing. Depth: new layers come last
    and write nothing. What writes nothing has a gradient, and reads more than nothing once it does.

    Args:
      model: a pre-norm `Transformer` with `MultiHeadAttention`, `MLP` and plain linear maps. It
        stays as it is.
      key: random key of the new parts.
      num_layers, features, num_heads, mlp_features: the new sizes. Default: the old ones. The size
        of a head stays.
      new_scale: at least 0: what new parts write, and what old parts write to new channels, as a
        multiple of usual initial values. Default 0, which leaves the logits as they are.
      exact_norm: whether the norms are corrected for the channels that are 0, as they are in
        `rescale_norm_for_padding`, after re-centring what writes to the stream of a layer norm.
        Default True; False copies the norms, as the paper does, and is an approximation.

    Returns:
      The grown model.

    Raises:
      ValueError: a size that shrinks, a model of another form, or a tied embedding that a layer
        norm would have to re-centre.

    Use it to continue training from the small model's loss in place of that of random weights.

    Cost: the initialization of the larger model and a copy of the smaller one; no data and no
    gradients.

    Example:
      >>> from jaxref.models import TransformerConfig
      >>> config = TransformerConfig(
      ...     vocab_size=16, max_length=8, num_layers=1, features=8, num_heads=2, mlp_features=16
      ... )
      >>> model, tokens = config.build(rngs=nnx.Rngs(0)), jnp.arange(8)[None]
      >>> grown = grow_transformer(
      ...     model, key=jax.random.key(0), num_layers=2, features=12, num_heads=3, mlp_features=20
      ... )
      >>> bool(jnp.allclose(model(tokens), grown(tokens), atol=1e-5))
      True

    Reference: Zhang, "Transfer training from smaller language model", 2021, arXiv:2104.11390; the
    exact norms and the identity layers are ours.
    """
    old = model.config
    given = {
        "num_layers": num_layers,
        "features": features,
        "num_heads": num_heads,
        "mlp_features": mlp_features,
    }
    sizes: dict[str, Any] = {
        name: getattr(old, name) if size is None else size for name, size in given.items()
    }
    for name, size in sizes.items():
        check_interval(getattr(old, name), jnp.inf, **{name: size})
    check_interval(0, jnp.inf, new_scale=new_scale)
    _check_form(model, sizes["features"], exact_norm)
    share = old.features / sizes["features"]
    norm: Any = old.norm
    if exact_norm and share < 1:
        epsilon = getattr(norm, "keywords", {}).get("epsilon", 1e-6)
        norm = partial(norm, epsilon=epsilon * share)
    config = dataclasses.replace(
        old,
        **sizes,
        norm=norm,
        num_kv_heads=_kv_heads(old, sizes["num_heads"]),
        head_dim=old.head_dim or old.features // old.num_heads,
        scan_layers=False,
    )
    small = with_scan_layers(model, False)
    if exact_norm and share < 1 and component_class(old.norm) is layer_norm:
        centre_writers(small)
    made = config.build(rngs=nnx.Rngs(params=key))
    keys = iter(jax.random.split(jax.random.fold_in(key, 1), 7 * old.num_layers + 1))
    for new, before in zip(made.blocks, small.blocks):
        for name in ("attention", "mlp"):
            function, old_function = getattr(new, name).function, getattr(before, name).function
            for linear, old_linear in zip(readers(function), readers(old_function)):
                _grow_linear(linear, old_linear, next(keys), 1.0)
            _grow_linear(writer(function), writer(old_function), next(keys), new_scale)
            for part in ("query_norm", "key_norm"):
                if getattr(old_function, part, None) is not None:
                    nnx.update(getattr(function, part), nnx.state(getattr(old_function, part)))
            _grow_norm(getattr(new, name).input_norm, getattr(before, name).input_norm, exact_norm)
    for new in made.blocks[old.num_layers :]:
        for sublayer in (new.attention, new.mlp):
            kernel = writer(sublayer.function).kernel
            kernel[...] = new_scale * kernel[...]
    for table, old_table in ((made.embed, small.embed), (made.positions, small.positions)):
        if table is not None:
            rows = table.embedding.shape[0]
            table.embedding[...] = pad_kernel(old_table.embedding[...], rows, config.features)
    _grow_norm(made.final_norm, small.final_norm, exact_norm)
    if made.output is not None:
        made.output.kernel[...] = pad_kernel(
            small.output.kernel[...], config.features, config.vocab_size
        )
    return with_scan_layers(made) if old.scan_layers else made


def _check_form(model: Transformer, features: int, exact_norm: bool) -> None:
    config = model.config
    if config.norm_placement != "pre" or config.architecture == "encoder_decoder":
        raise ValueError(
            f"model must be a pre-norm model without an encoder, got norm_placement "
            f"{config.norm_placement!r}, architecture {config.architecture!r}"
        )
    if component_class(config.norm) not in (layer_norm, rms_norm) or config.final_norm is not None:
        raise ValueError(f"model must have layer_norm or rms_norm as every norm, got {config.norm}")
    if config.stable_embedding:
        raise ValueError("model must use its embedding as it is: stable_embedding is True")
    for block in model.blocks:
        if type(block.attention.function) is not MultiHeadAttention or (
            type(block.mlp.function) is not MLP
        ):
            raise ValueError("model must have MultiHeadAttention and MLP")
        for sublayer in (block.attention, block.mlp):
            linears = [*readers(sublayer.function), writer(sublayer.function)]
            if any(type(linear) is not Linear for linear in linears):
                raise ValueError("model must have plain linear maps")
    if exact_norm and features > config.features and model.final_norm.scale is None:
        raise ValueError(
            "model must have norms with a gain, which makes up for channels that are 0; "
            "exact_norm=False grows it approximately"
        )
    centres = exact_norm and component_class(config.norm) is layer_norm
    if centres and config.tie_embeddings and features > config.features:
        raise ValueError(
            "model must have an output matrix of its own, for its embedding is re-centred: "
            "tie_embeddings is True; exact_norm=False grows it approximately"
        )


def _kv_heads(config: TransformerConfig, num_heads: int) -> int | None:
    """Key heads for more query heads, each shared by as many as before."""
    if config.num_kv_heads is None:
        return None
    groups = config.num_heads // config.num_kv_heads
    if num_heads % groups:
        raise ValueError(f"num_heads must be a multiple of {groups}, got {num_heads}")
    return num_heads // groups


def _grow_linear(new: Any, old: Any, key: Array, new_scale: float) -> None:
    """The new map with the old one inside, by `pad_kernel`; heads lie behind each other."""
    rows, columns = math.prod(old.in_features), math.prod(old.out_features)
    kernel = pad_kernel(
        old.kernel[...].reshape(rows, columns),
        math.prod(new.in_features),
        math.prod(new.out_features),
        key=key,
        new_scale=new_scale,
    )
    new.kernel[...] = kernel.reshape(new.kernel.shape)
    if old.bias is not None:
        bias = jnp.zeros(math.prod(new.out_features), old.bias.dtype)
        bias = bias.at[:columns].set(old.bias[...].reshape(-1))
        new.bias.set_value(bias.reshape(new.bias.shape))


def _grow_norm(new: Norm, old: Norm, exact: bool) -> None:
    if old.scale is None:
        return
    width = old.scale.shape[0]
    scale, _ = rescale_norm_for_padding(old.scale[...], 0.0, width, new.scale.shape[0])
    new.scale[...] = scale if exact else new.scale[...].at[:width].set(old.scale[...])
    if old.bias is not None:
        new.bias[...] = new.bias[...].at[:width].set(old.bias[...])
