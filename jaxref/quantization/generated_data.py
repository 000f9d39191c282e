"""Images for calibration from a generator that is trained with its latents (GENIE-D).

Channels last, and networks as in `jaxref.quantization.zero_shot`, whose loss it is.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval
from jaxref.norms import batch_norm, batch_norm_init
from jaxref.quantization.reconstruction import check_steps
from jaxref.quantization.zero_shot import (
    DistilledData,
    adam_until_plateaus,
    check_ddof,
    checked_statistics,
    descend,
    statistics_loss,
)

KeyedActivationsFn = Callable[[Array, Array], Sequence[Array]]

_GENERATOR_DECAY = (100, 0.95)  # every so many steps, the generator's rate times this
_LEAK = 0.2  # slope of the generator's leaky ReLU below 0


def swing_convolution_inputs(x: ArrayLike, key: Array, *, jitter: int = 1) -> Array:
    r"""The input of a strided convolution, moved by a pixel or so at random (swing convolution).

    The images are padded by reflection with j pixels on each side, and from those a window of the
    size that they had is cut, whose upper left corner is uniform in {0, ..., 2 j}²; (j, j) gives
    back the input.

    Args:
      x: `[..., height, width, channels]`, both sizes above j.
      key: for the corner, the same for all images. Another one for each convolution and each step.
      jitter: j, at least 0. Default 1.

    Returns:
      The shape and type of `x`.

    Raises:
      ValueError: `x` too small or without these axes, or `jitter` below 0.
      TypeError: `jitter` not an int.

    A strided convolution passes some pixels' gradients more often than others', which leaves a
    chequered pattern on distilled images; so a network under `genie_distill` calls this before each
    one. It is not for a network that is used.

    Cost: one padded copy of the images, and one cut from it.

    Example:
      >>> x = jnp.arange(9.0).reshape(3, 3, 1)
      >>> print(swing_convolution_inputs(x, jax.random.key(0))[..., 0])
      [[1. 0. 1.]
       [4. 3. 4.]
       [7. 6. 7.]]

    Reference: Jeon, Lee, Kim, "Genie: Show Me the Data for Quantization", 2022, arXiv:2212.04780.
    """
    if isinstance(jitter, bool) or not isinstance(jitter, int):
        raise TypeError(f"jitter must be an int, got {jitter!r}")
    check_interval(0, jnp.inf, jitter=jitter)
    x = jnp.asarray(x)
    if x.ndim < 3 or min(x.shape[-3:-1]) <= jitter:
        raise ValueError(
            f"x must have shape [..., height, width, channels] with more than {jitter} rows and "
            f"columns, got {x.shape}"
        )
    sides = [(0, 0)] * (x.ndim - 3) + [(jitter, jitter)] * 2 + [(0, 0)]
    padded = jnp.pad(x, sides, mode="reflect")
    row, column = jax.random.randint(key, (2,), 0, 2 * jitter + 1)
    start = (*[0] * (x.ndim - 3), row, column, 0)
    return jax.lax.dynamic_slice(padded, start, x.shape)


def genie_distill(
    activations_fn: KeyedActivationsFn,
    running_means: Sequence[ArrayLike],
    running_variances: Sequence[ArrayLike],
    shape: tuple[int, int, int, int],
    *,
    key: Array,
    latent_dim: int = 256,
    features: tuple[int, int] = (128, 64),
    steps: int = 4000,
    lr_latent: float = 0.1,
    lr_generator: float = 0.01,
    patience: int = 100,
    ddof: int = 0,
) -> DistilledData:
    r"""Images of a generator that is trained with its latents to match statistics (GENIE-D).

        x = G(z),   min over z and G of   L(x),   z ~ N(0, 1) at first

    L is the `batch_norm_statistics_loss` per batch, with the images. G has a linear layer to a
    quarter of the size, batch normalization, and twice: doubled pixels and a 3 x 3 convolution;
    between these two batch normalization and a leaky ReLU, after them tanh and batch normalization
    without parameters. Adam moves z at a rate that plateaus divide as in `distilled_data`, and G at
    one that falls by 5% every 100 steps. Both begin anew for every batch.

    Args:
      activations_fn: `activations_fn(images, key)`, the inputs of the normalization layers in
        evaluation. With the key, other ones from it for each layer, it moves the inputs of strided
        convolutions by `swing_convolution_inputs`. Compiled once, as in `distilled_data`.
      running_means: of these layers, `[channels]` each.
      running_variances: likewise.
      shape: of the images, `[batch, height, width, channels]`, both sizes multiples of 4.
      key: for latents, generator and swings.
      latent_dim: the size of a latent, at least 1. Default 256.
      features: channels before the two convolutions of G. Default (128, 64).
      steps: at least 0. Default 4000.
      lr_latent: the rate of z, above 0. Default 0.1.
      lr_generator: that of G, above 0. Default 0.01.
      patience: of the plateaus, at least 1. Default 100.
      ddof: of `batch_norm_statistics_loss`. Default 0.

    Returns:
      `DistilledData`. The images are those of the last step: as convolutions swing, a loss that is
      less than others may only have been luck.

    Raises:
      ValueError: no layers, statistics or activations that do not fit, sizes that are no multiples
        of 4, or a number out of range.
      TypeError: statistics or activations not floating point, or counts not ints.

    What the images have in common goes into G, where `distilled_data` leaves each pixel free. The
    authors take it with few bits, where weights are fitted to the images as well
    (`genie_reconstruct`).

    Cost: `steps` forward and backward passes of network and generator for a batch, eight times as
    many as `distilled_data` takes by default.

    Example:
      >>> from flax import nnx
      >>> from jaxref.nn import Conv, Norm
      >>> conv, norm = Conv(3, 4, (3, 3), strides=2, rngs=nnx.Rngs(0)), Norm(batch_norm, 4)
      >>> state = norm.running_state()
      >>> def activations_fn(images, key):
      ...     return [conv(swing_convolution_inputs(images, key))]
      >>> data = genie_distill(activations_fn, [state.mean], [state.var], (2, 12, 8, 3), steps=60,
      ...                      latent_dim=6, features=(5, 4), key=jax.random.key(0))
      >>> data.images.shape, bool(data.losses[-10:].mean() < 0.5 * data.losses[0])
      ((2, 12, 8, 3), True)

    Reference: Jeon, Lee, Kim, "Genie: Show Me the Data for Quantization", 2022, arXiv:2212.04780.
    """
    means, variances = checked_statistics(running_means, running_variances)
    check_ddof(ddof)
    check_steps(steps=steps, patience=patience, latent_dim=latent_dim)
    check_interval(0, jnp.inf, closed="neither", lr_latent=lr_latent, lr_generator=lr_generator)
    check_interval(1, jnp.inf, features=features, shape=shape)
    if len(shape) != 4 or shape[1] % 4 or shape[2] % 4:
        raise ValueError(
            "shape must be (batch, height, width, channels) with multiples of 4 for height and "
            f"width, got {shape}"
        )
    start_key, key = jax.random.split(key)
    return _genie_distill(
        genie_start(start_key, tuple(shape), latent_dim, tuple(features)),
        means,
        variances,
        (lr_latent, lr_generator),
        patience,
        key,
        activations_fn=activations_fn,
        ddof=ddof,
        steps=steps,
    )


@functools.partial(jax.jit, static_argnames=("activations_fn", "ddof", "steps"))
def _genie_distill(
    params: dict[str, Any],
    means: list[Array],
    variances: list[Array],
    rates: tuple[ArrayLike, ArrayLike],
    patience: ArrayLike,
    key: Array,
    *,
    activations_fn: KeyedActivationsFn,
    ddof: int,
    steps: int,
) -> DistilledData:
    def objective(params: dict[str, Any], key: Array) -> tuple[Array, Array]:
        images = generate(params["generator"], params["latents"])
        loss = statistics_loss(
            activations_fn(images, key), means, variances, images, reduction="per_batch", ddof=ddof
        )
        return loss, images

    decay_steps, decay = _GENERATOR_DECAY
    falling = optax.exponential_decay(rates[1], decay_steps, decay, staircase=True)
    optimizer = optax.multi_transform(
        {"latents": adam_until_plateaus(rates[0], patience), "generator": optax.adam(falling)},
        {"latents": "latents", "generator": "generator"},
    )
    images = jax.eval_shape(generate, params["generator"], params["latents"])
    start = jnp.zeros(images.shape, images.dtype)
    keys = jax.random.split(key, steps + 1)
    return descend(objective, params, optimizer, start, keys, keep_best=False)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def genie_start(
    key: Array, shape: tuple[int, int, int, int], latent_dim: int, features: tuple[int, int]
) -> dict[str, Any]:
    """Normal latents, and a generator whose parameters are uniform up to 1 / √(inputs)."""
    batch, height, width, channels = shape
    latent_key, key = jax.random.split(key)
    shapes = {
        "linear": (latent_dim, height // 4, width // 4, features[0]),
        "first": (3, 3, *features),
        "second": (3, 3, features[1], channels),
    }
    params: dict[str, Any] = {}
    for (name, shape), layer_key in zip(shapes.items(), jax.random.split(key, len(shapes))):
        outputs = shape[1:] if name == "linear" else shape[-1:]
        inputs = math.prod(shape) // math.prod(outputs)
        drawn = jax.random.uniform(layer_key, (inputs + 1, *outputs), minval=-1.0) * inputs**-0.5
        params[name] = {"kernel": drawn[1:].reshape(shape), "bias": drawn[0]}
    for name, size in zip(("before", "between"), features):
        params[name] = {"scale": jnp.ones(size), "bias": jnp.zeros(size)}
    return {"latents": jax.random.normal(latent_key, (batch, latent_dim)), "generator": params}


def generate(params: dict[str, Any], latents: Array) -> Array:
    """GENIE-D's generator: latents `[batch, latent_dim]` to `[batch, height, width, channels]`."""

    def normalized(x: Array, scale: Array | None = None, bias: Array | None = None) -> Array:
        return batch_norm(x, batch_norm_init(x.shape[-1]), scale, bias, training=True)[0]

    def doubled_and_convolved(x: Array, layer: dict[str, Array]) -> Array:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
        y = jax.lax.conv_general_dilated(
            x, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + layer["bias"]

    linear = params["linear"]
    x = jnp.tensordot(latents, linear["kernel"], axes=1) + linear["bias"]
    x = doubled_and_convolved(normalized(x, **params["before"]), params["first"])
    x = jax.nn.leaky_relu(normalized(x, **params["between"]), _LEAK)
    return normalized(jnp.tanh(doubled_and_convolved(x, params["second"])))
