"""What the image classifiers share: checks of images and configurations, and what drops at random.

Every one is a `Config` with `num_classes`, `image_shape`, `dtype` and `param_dtype`, whose `build`
makes a model that maps `[batch, height, width, channels]` to logits `[batch, num_classes]`.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_floating, check_interval


class ImageConfig(Protocol):
    """What every image classifier's configuration has."""

    @property
    def num_classes(self) -> int: ...

    @property
    def image_shape(self) -> tuple[int, int, int]: ...


def check_image_config(config: ImageConfig, *, rates: tuple[str, ...] = ()) -> None:
    """Raises ValueError for sizes below 1, or named fields that are not in [0, 1)."""
    check_interval(1, jnp.inf, num_classes=config.num_classes)
    if len(config.image_shape) != 3:
        raise ValueError(
            f"image_shape must be (height, width, channels), got {config.image_shape!r}"
        )
    check_interval(1, jnp.inf, image_shape=config.image_shape)
    for name in rates:
        check_interval(0, 1, closed="left", **{name: getattr(config, name)})


def check_images(images: ArrayLike, image_shape: tuple[int, int, int]) -> None:
    """Raises unless images are floating point `[batch, *image_shape]`.

    >>> check_images(jnp.zeros((2, 8, 8, 3)), (8, 8, 3))
    """
    check_floating(images=images)
    if jnp.ndim(images) != 4 or jnp.shape(images)[1:] != tuple(image_shape):
        sizes = ", ".join(map(str, image_shape))
        raise ValueError(f"images must have shape [batch, {sizes}], got {jnp.shape(images)}")


def logits_dtype(config: Any) -> DTypeLike:
    """The type of logits: that of the parameters, and never less than float32."""
    return jnp.promote_types(config.param_dtype, jnp.float32)


def split_keys(key: Array | None, count: int) -> list[Array | None]:
    """Random keys for `count` places; None, which drops nothing, for each of None."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Entries at 0 with probability `rate`, and the others enlarged so that the mean stays."""
    return _drop(x, x.shape, rate, key, rescale=True)


def stochastic_depth(x: Array, rate: float, key: Array | None, *, rescale: bool = True) -> Array:
    """Whole examples of `x [batch, ...]`, the output of a branch, at 0 with probability `rate`.

    With `rescale` the others are enlarged so that the mean stays.
    """
    return _drop(x, (x.shape[0],) + (1,) * (x.ndim - 1), rate, key, rescale)


def _drop(x: Array, shape: Any, rate: float, key: Array | None, rescale: bool) -> Array:
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, shape)
    return jnp.where(keep, x / (1 - rate) if rescale else x, 0).astype(x.dtype)
