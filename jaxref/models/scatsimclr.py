"""ScatSimCLR: contrastive learning on scattering features, with a pretext task beside it."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.nn.initializers import variance_scaling
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_floating, check_interval
from jaxref.core.numerics import compute_dtype
from jaxref.losses import nt_xent_loss, softmax_cross_entropy
from jaxref.models.vision import check_images, dropout, split_keys
from jaxref.nn import Conv, Linear, Norm
from jaxref.nn.scattering import scattering_channels, scattering_transform
from jaxref.norms import batch_norm
from jaxref.parallel import constrain

NETWORKS = {
    8: (32, ((64, 4), (128, 4))),
    12: (256, ((128, 4), (64, 4), (128, 4))),
    16: (256, ((128, 6), (64, 4), (128, 6))),
    30: (256, ((128, 30),)),
    45: (256, ((128, 15), (64, 15), (128, 15))),
}
"""Channels of the first convolution, then channels and number of blocks, by number of blocks."""
POOLED = 4
"""Pixels a side after pooling, for 128 channels each."""
FEATURES = 128 * POOLED**2
"""Size of the features h."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScatSimCLRConfig:
    """What a `ScatSimCLR` is made of; `build` makes it. The defaults are ScatSimCLR30 for STL-10.

    Attributes:
      image_shape: `(height, width, channels)`.
      J: scales of the scattering transform, at least 1, with 2^J at most the smaller side.
      L: its angles, at least 1.
      num_blocks: residual blocks: 8, 12, 16, 30 or 45.
      projection_dim: size of the embedding z.
      norm: a norm of `jaxref.norms` over channels.
      dtype, param_dtype: types to compute in (None: the parameters') and of the parameters.

    Raises:
      ValueError: a size out of range, or an unknown number of blocks.

    Use fewer `num_blocks` and a smaller `L` for the smallest collections of images; 30 blocks and
    16 angles are the paper's for STL-10.

    Cost: 15.5 million parameters and 6.4 billion multiplications an image at the defaults, 6.1
    million and 1.0 billion with 8 blocks.

    Example:
      >>> config = ScatSimCLRConfig()
      >>> model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
      >>> print(sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))))
      15499904

    Reference: Kinakh, Taran, Voloshynovskiy, "ScatSimCLR: self-supervised contrastive learning with
    pretext task regularization for small-scale datasets", 2021, arXiv:2108.13939.
    """

    image_shape: tuple[int, int, int] = (96, 96, 3)
    J: int = 2
    L: int = 16
    num_blocks: int = 30
    projection_dim: int = 128
    norm: Callable[..., Any] = batch_norm
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def build(self, *, rngs: nnx.Rngs) -> "ScatSimCLR":
        """The model of this configuration."""
        return ScatSimCLR(self, rngs=rngs)

    def __post_init__(self):
        if len(self.image_shape) != 3:
            raise ValueError(
                f"image_shape must be (height, width, channels), got {self.image_shape!r}"
            )
        check_interval(1, jnp.inf, projection_dim=self.projection_dim, J=self.J, L=self.L)
        check_interval(1, jnp.inf, image_shape=self.image_shape)
        if min(self.image_shape[:2]) < 2**self.J:
            raise ValueError(
                f"image_shape must have at least 2^J = {2**self.J} pixels a side, "
                f"got {self.image_shape}"
            )
        if self.num_blocks not in NETWORKS:
            raise ValueError(
                f"num_blocks must be one of {sorted(NETWORKS)}, got {self.num_blocks!r}"
            )


class ScatSimCLR(nnx.Module):
    """A scattering transform, residual blocks behind it, and a projection for contrastive learning.

        h = pool_4x4(blocks(relu(norm(conv(scattering(images))))))
        z = W₂ relu(W₁ h + b₁) + b₂

    The scattering transform takes the place of the first layers and has no parameters, which is
    what makes few images enough.

    Args:
      config: its parts and sizes.
      rngs: source of the `params` key.

    Raises:
      ValueError: when called, images of another shape.

    Use it to learn features of few images without labels: train z with `scatsimclr_loss`, and h
    with a `PretextHead`; classify h.

    Cost: at the defaults 15.5 million parameters, 4.2 of them in W₁, 6.4 billion multiplications
    and a `jaxref.nn.scattering_transform` of each image.

    `train()` and `eval()` say whether norms use the batch's statistics and move theirs.

    Example:
      >>> config = ScatSimCLRConfig(image_shape=(16, 16, 3), L=4, num_blocks=8)
      >>> images = jnp.ones((2, 16, 16, 3))
      >>> h, z = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))(images))
      >>> h.shape, z.shape
      ((2, 2048), (2, 128))

    Reference: Kinakh, Taran, Voloshynovskiy, "ScatSimCLR: self-supervised contrastive learning with
    pretext task regularization for small-scale datasets", 2021, arXiv:2108.13939.
    """

    Config = ScatSimCLRConfig

    def __init__(self, config: ScatSimCLRConfig, *, rngs: nnx.Rngs):
        self.config = config
        maps = config.image_shape[2] * scattering_channels(config.J, config.L)
        features, stages = NETWORKS[config.num_blocks]
        self.stem = _ConvNorm(config, maps, features, 3, rngs=rngs)
        blocks = []
        for width, count in stages:
            for _ in range(count):
                blocks.append(_Block(config, features, width, rngs=rngs))
                features = width
        self.blocks = nnx.List(blocks)
        self.hidden = _linear(config, FEATURES, FEATURES, rngs)
        self.projection = _linear(config, FEATURES, config.projection_dim, rngs)

    def __call__(self, images: Array) -> tuple[Array, Array]:
        """Features `[batch, 2048]` and embeddings `[batch, projection_dim]`.

        Args:
          images: floating point `[batch, *image_shape]`.

        Raises:
          ValueError: images of another shape.
          TypeError: images that are not floating point.
        """
        config = self.config
        check_images(images, config.image_shape)
        x = scattering_transform(images, J=config.J, L=config.L)
        x = jax.nn.relu(self.stem(x.astype(config.dtype or x.dtype)))
        for block in self.blocks:
            x = block(x)
        h = adaptive_average_pool(x, POOLED)
        h = h.reshape(len(h), -1)
        return h, self.projection(jax.nn.relu(self.hidden(h)))


class PretextHead(nnx.Module):
    """Which rotation, or which order of the tiles, an image was given, from its features.

        rotation: logits = W₃ d(W₂ d(W₁ h)),   2048, 512, 128 and 4 units
        jigsaw:   logits = W₃ d(W₂ [d(W₁ h_1); ...; d(W₁ h_9)]),   9 · 512, 4096 and `permutations`

    with biases, ReLU and dropout in d.

    Args:
      task: "rotation" or "jigsaw".
      permutations: number of orders of the tiles. Default 35.
      rate: of dropout, in [0, 1), where a key is given. Default 0.5.
      dtype, param_dtype: types to compute in and of the parameters.
      rngs: source of the `params` key.

    Raises:
      ValueError: an unknown `task`, or a number out of its range.

    Use one of the two beside the contrastive loss: `rotation_pretext` and `jigsaw_pretext` make its
    images.

    Cost: 1.1 million parameters for the rotation, 20 million for the jigsaw; more than that, the
    encoder on four or nine further images of each.

    Example:
      >>> h = jnp.ones((2, 4, 2048))
      >>> nnx.eval_shape(lambda: PretextHead("rotation", rngs=nnx.Rngs(0))(h)).shape
      (2, 4, 4)

    Reference: Kinakh, Taran, Voloshynovskiy, "ScatSimCLR: self-supervised contrastive learning with
    pretext task regularization for small-scale datasets", 2021, arXiv:2108.13939.
    """

    def __init__(
        self,
        task: str,
        *,
        permutations: int = 35,
        rate: float = 0.5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if task not in ("rotation", "jigsaw"):
            raise ValueError(f"task must be 'rotation' or 'jigsaw', got {task!r}")
        check_interval(1, jnp.inf, permutations=permutations)
        check_interval(0, 1, closed="left", rate=rate)
        self.task, self.rate = task, rate
        tiles, wide, classes = (1, 128, 4) if task == "rotation" else (9, 4096, permutations)
        sizes = [(FEATURES, 512), (tiles * 512, wide), (wide, classes)]
        types = _Types(dtype, param_dtype)
        self.layers = nnx.List([_linear(types, a, b, rngs) for a, b in sizes])

    def __call__(self, h: Array, *, key: Array | None = None) -> Array:
        """Logits `[..., classes]` of features `[..., 2048]`, or `[..., 9, 2048]` of nine tiles.

        `key` is a random key for dropout; None (evaluation) drops nothing.
        """
        first, second, last = self.layers
        keys = split_keys(key, 2)
        x = dropout(jax.nn.relu(first(h)), self.rate, keys[0])
        if self.task == "jigsaw":
            x = x.reshape(*x.shape[:-2], -1)
        return last(dropout(jax.nn.relu(second(x)), self.rate, keys[1]))


def rotation_pretext(images: ArrayLike) -> tuple[Array, Array]:
    """Every image in four rotations, and which these are.

    Args:
      images: `[batch, size, size, channels]`.

    Returns:
      `[batch, 4, size, size, channels]`, turned clockwise by 0, 90, 180 and 270 degrees, and int32
      labels `[batch, 4]`, 0 to 3.

    Raises:
      ValueError: images that are not square.

    Use it for `PretextHead("rotation")`; augment the images before.

    Cost: four copies of the images, each of which the encoder then has to read.

    Example:
      >>> turned, labels = rotation_pretext(jnp.arange(4.0).reshape(1, 2, 2, 1))
      >>> print(turned[0, 1, ..., 0], labels)
      [[2. 0.]
       [3. 1.]] [[0 1 2 3]]

    Reference: Kinakh, Taran, Voloshynovskiy, "ScatSimCLR: self-supervised contrastive learning with
    pretext task regularization for small-scale datasets", 2021, arXiv:2108.13939.
    """
    x = jnp.asarray(images)
    if x.ndim != 4 or x.shape[1] != x.shape[2]:
        raise ValueError(f"images must have shape [batch, size, size, channels], got {x.shape}")
    turned = jnp.stack([jnp.rot90(x, -k, axes=(1, 2)) for k in range(4)], axis=1)
    return turned, jnp.tile(jnp.arange(4, dtype=jnp.int32), (len(x), 1))


def jigsaw_pretext(
    images: ArrayLike, permutations: ArrayLike, *, key: Array
) -> tuple[Array, Array]:
    """Every image as nine tiles in one of several orders, and which that is.

    The tiles are thirds of each side, without a remainder at their ends, and are enlarged to the
    size of the image by linear interpolation.

    Args:
      images: `[batch, height, width, channels]` floating point, 3 pixels a side at least.
      permutations: `[orders, 9]` integers, as of `jigsaw_permutations`: place t holds tile
        permutations[o, t], counted row by row.
      key: a random key, for the orders.

    Returns:
      `[batch, 9, height, width, channels]` tiles, and int32 labels `[batch]`, the orders.

    Raises:
      ValueError: shapes that do not match, or, where they are concrete, rows that are no
        permutations.
      TypeError: images that are not floating point.

    Use it for `PretextHead("jigsaw")`; augment each tile after, so that edges and colours do not
    give its neighbours away.

    Cost: nine images of the full size for each, by interpolation, all of which the encoder then has
    to read.

    Example:
      >>> orders = jnp.array([[0, 1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 2, 1, 0]])
      >>> jigsaw = jax.jit(lambda x, key: jigsaw_pretext(x, orders, key=key))
      >>> tiles, labels = jigsaw(jnp.ones((2, 9, 9, 3)), jax.random.key(0))
      >>> tiles.shape, labels.shape
      ((2, 9, 9, 9, 3), (2,))

    Reference: Kinakh, Taran, Voloshynovskiy, "ScatSimCLR: self-supervised contrastive learning with
    pretext task regularization for small-scale datasets", 2021, arXiv:2108.13939.
    """
    check_floating(images=images)
    x = jnp.asarray(images)
    if x.ndim != 4 or min(x.shape[1:3]) < 3:
        raise ValueError(f"images must have shape [batch, height, width, channels], got {x.shape}")
    orders = jnp.asarray(permutations)
    if orders.ndim != 2 or orders.shape[1] != 9 or len(orders) == 0:
        raise ValueError(f"permutations must have shape [orders, 9], got {orders.shape}")
    concrete = None if isinstance(permutations, jax.core.Tracer) else np.asarray(permutations)
    if concrete is not None and np.any(np.sort(concrete, axis=1) != np.arange(9)):
        raise ValueError("permutations must have the numbers 0 to 8 in each row")
    batch, height, width, channels = x.shape
    rows, columns = ([math.ceil(i * size / 3) for i in range(3)] for size in (height, width))
    tiles = jnp.stack(
        [
            jax.lax.dynamic_slice(
                x, (0, row, column, 0), (batch, height // 3, width // 3, channels)
            )
            for row in rows
            for column in columns
        ],
        axis=1,
    )
    labels = jax.random.randint(key, (batch,), 0, len(orders), jnp.int32)
    tiles = jnp.take_along_axis(tiles, orders[labels][:, :, None, None, None], axis=1)
    return jax.image.resize(tiles, (batch, 9, height, width, channels), "linear"), labels


def jigsaw_permutations(orders: int = 35, *, seed: int = 0) -> np.ndarray:
    """Orders of nine tiles that have little in common.

    After a random first one, each is the permutation that has on average the most places other
    than those before it: the largest Hamming distance.

    Args:
      orders: their number, from 1 to 9!. Default 35, the paper's.
      seed: of the first, and of the choice among equals.

    Returns:
      int32 `[orders, 9]`, distinct rows.

    Raises:
      ValueError: `orders` out of its range.

    Use it once, on the host, for `jigsaw_pretext`. Orders that differ in two places only would
    leave two tiles to tell them by.

    Cost: 9 · 9! comparisons an order on the host, about a second for 35.

    Example:
      >>> jigsaw_permutations(3).shape
      (3, 9)

    Reference: Kinakh, Taran, Voloshynovskiy, "ScatSimCLR: self-supervised contrastive learning with
    pretext task regularization for small-scale datasets", 2021, arXiv:2108.13939; the choice is of
    Noroozi, Favaro, "Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles",
    2016, arXiv:1603.09246.
    """
    every = np.array(list(itertools.permutations(range(9))), np.int8)
    check_interval(1, len(every), orders=orders)
    rng = np.random.default_rng(seed)
    every = every[rng.permutation(len(every))]
    chosen, distance = [0], np.zeros(len(every), np.int32)
    while len(chosen) < orders:
        distance += np.sum(every != every[chosen[-1]], axis=1)
        distance[chosen[-1]] = np.iinfo(np.int32).min // 2  # not again
        chosen.append(int(np.argmax(distance)))
    return every[chosen].astype(np.int32)


def scatsimclr_loss(
    z_a: ArrayLike,
    z_b: ArrayLike,
    pretext_logits: ArrayLike,
    pretext_labels: ArrayLike,
    *,
    pretext_weight: float = 0.3,
    temperature: float = 0.5,
) -> Array:
    r"""Contrastive loss of two views and cross-entropy of the pretext task (a loss of the set).

        L = mean NT-Xent(z_a, z_b) + λ mean CE(logits, labels),   λ = pretext_weight

    Args:
      z_a: `[batch, features]` floating point, embeddings of one view of each image.
      z_b: of the same shape, of the other.
      pretext_logits: `[..., classes]` floating point, of a `PretextHead`.
      pretext_labels: integer ids `[...]`; one that is no class gives NaN.
      pretext_weight: λ at least 0. Default 0.3, the paper's.
      temperature: of `jaxref.losses.nt_xent_loss`, above 0. Default 0.5.

    Returns:
      A scalar in the type of `z_a`, in nats.

    Raises:
      ValueError: shapes that do not match, or a number out of its range.
      TypeError: arguments of another type.

    Use it to train all of a `ScatSimCLR`; the pretext task keeps features that the views' changes
    would let it forget.

    Cost: O(batch² · features) for the pairs of `jaxref.losses.nt_xent_loss`, and a softmax of the
    pretext logits.

    Example:
      >>> z, labels = jnp.eye(2), jnp.array([0, 1])
      >>> loss = jax.jit(scatsimclr_loss)(z, z, jnp.zeros((2, 4)), labels)
      >>> print(loss.round(3))
      0.655

    Reference: Kinakh, Taran, Voloshynovskiy, "ScatSimCLR: self-supervised contrastive learning with
    pretext task regularization for small-scale datasets", 2021, arXiv:2108.13939.
    """
    check_interval(0, jnp.inf, pretext_weight=pretext_weight)
    contrastive = jnp.mean(nt_xent_loss(z_a, z_b, temperature=temperature), dtype=jnp.float32)
    pretext = jnp.mean(softmax_cross_entropy(pretext_logits, pretext_labels), dtype=jnp.float32)
    return (contrastive + pretext_weight * pretext).astype(jnp.result_type(z_a))


def adaptive_average_pool(x: Array, size: int) -> Array:
    """Means over `size` x `size` parts of the pixels of `[batch, height, width, features]`.

    Part i of a side of n pixels is from ⌊i n / size⌋ to ⌈(i + 1) n / size⌉, so that parts overlap
    where `size` does not divide n.
    """

    def weights(n: int) -> np.ndarray:
        first = np.arange(size)[:, None] * n // size
        last = -(-(np.arange(size)[:, None] + 1) * n // size)
        inside = (np.arange(n) >= first) & (np.arange(n) < last)
        return inside / inside.sum(axis=1, keepdims=True)

    rows, columns = (jnp.asarray(weights(n), compute_dtype(x)) for n in x.shape[1:3])
    pooled = jnp.einsum("ih,jw,bhwc->bijc", rows, columns, x.astype(rows.dtype))
    return pooled.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class _Types:
    dtype: DTypeLike | None
    param_dtype: DTypeLike


def _linear(config: Any, inputs: int, outputs: int, rngs: nnx.Rngs) -> Linear:
    return Linear(
        inputs,
        outputs,
        axes=("embed", "mlp"),
        use_bias=True,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        rngs=rngs,
    )


class _ConvNorm(nnx.Module):
    """A convolution without bias and its norm."""

    def __init__(
        self, config: ScatSimCLRConfig, inputs: int, outputs: int, size: int, *, rngs: nnx.Rngs
    ):
        self.conv = Conv(
            inputs,
            outputs,
            (size, size),
            kernel_init=variance_scaling(2, "fan_out", "normal"),
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.norm = Norm(config.norm, outputs, param_dtype=config.param_dtype)

    def __call__(self, x: Array) -> Array:
        return self.norm(self.conv(x))


class _Block(nnx.Module):
    """Two convolutions and their shortcut, which is one where the number of channels changes."""

    def __init__(self, config: ScatSimCLRConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.first = _ConvNorm(config, inputs, outputs, 3, rngs=rngs)
        self.second = _ConvNorm(config, outputs, outputs, 3, rngs=rngs)
        self.shortcut = (
            _ConvNorm(config, inputs, outputs, 1, rngs=rngs) if inputs != outputs else None
        )

    def __call__(self, x: Array) -> Array:
        y = self.second(jax.nn.relu(self.first(x)))
        y += x if self.shortcut is None else self.shortcut(x)
        return constrain(jax.nn.relu(y), "batch", None, None, None)
