"""Region normalization as modules, for inpainting networks."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from jaxref.norms import region_norm_basic, region_norm_learnable


class RegionNormBasic(nnx.Module):
    """`jaxref.norms.region_norm_basic` with its parameters, for the layers that see the mask.

    Args:
      features: size of the last axis.
      axes: logical name of that axis, for the rules of `jaxref.parallel`.
      per_sample: take the statistics of each image, not of the batch.
      epsilon: at least 0, added to the variances. Default 1e-5.
      param_dtype: type of the parameters.

    Attributes:
      foreground_scale, foreground_bias, background_scale, background_bias: `[features]`, initially
        0; the gains are 1 plus the scales.

    Raises:
      What `region_norm_basic` raises, when called.

    Use it in the first layers of an inpainting network, where the mask tells the hole's pixels from
    others; `RegionNormLearnable` in those after.

    Cost: 4 · features parameters; two masked norms of the whole image.

    Example:
      >>> norm = RegionNormBasic(3)
      >>> norm(jnp.ones((2, 8, 8, 3)), jnp.ones((2, 32, 32, 1), bool)).shape
      (2, 8, 8, 3)

    Reference: Yu et al., "Region Normalization for Image Inpainting", 2019, arXiv:1911.10375.
    """

    def __init__(
        self,
        features: int,
        *,
        axes: tuple[str | None] = (None,),
        per_sample: bool = True,
        epsilon: float = 1e-5,
        param_dtype: DTypeLike = jnp.float32,
    ):
        zeros = partial(jnp.zeros, features, param_dtype)
        self.foreground_scale = nnx.Param(zeros(), axes=axes)
        self.foreground_bias = nnx.Param(zeros(), axes=axes)
        self.background_scale = nnx.Param(zeros(), axes=axes)
        self.background_bias = nnx.Param(zeros(), axes=axes)
        self.per_sample, self.epsilon = per_sample, epsilon

    def __call__(self, x: Array, mask: Array) -> Array:
        """Normalises `[batch, height, width, features]` by a mask `[batch or 1, h, w, 1]`."""
        return region_norm_basic(
            x,
            mask,
            self.foreground_scale[...],
            self.foreground_bias[...],
            self.background_scale[...],
            self.background_bias[...],
            per_sample=self.per_sample,
            epsilon=self.epsilon,
        )


class RegionNormLearnable(nnx.Module):
    """`jaxref.norms.region_norm_learnable` with its kernels, for the layers after those.

    Args:
      kernel_size: of the three convolutions. Default 7.
      threshold: the importance in (0, 1) from which a pixel is of the first region. Default 0.8.
      per_sample: take the statistics of each image, not of the batch.
      epsilon: at least 0, added to the variances. Default 1e-5.
      kernel_init: initializer of the kernels. Default: truncated normal of variance 1 / inputs.
      param_dtype: type of the parameters.
      rngs: source of the `params` key.

    Attributes:
      attention_kernel: `[kernel_size, kernel_size, 2, 1]`.
      scale_kernel, bias_kernel: `[kernel_size, kernel_size, 1, 1]`.
      scale_bias, bias_bias: `[1]`, initially 0.

    Raises:
      What `region_norm_learnable` raises, when called.

    Use it in the later layers of an inpainting network, where the hole is partly filled and the
    mask says little; `RegionNormBasic` in those before.

    Cost: 4 · kernel_size² + 2 parameters, however many channels; two masked norms of the whole
    image and three convolutions to one channel.

    Example:
      >>> norm = RegionNormLearnable(rngs=nnx.Rngs(0))
      >>> norm(jnp.ones((2, 8, 8, 3))).shape
      (2, 8, 8, 3)

    Reference: Yu et al., "Region Normalization for Image Inpainting", 2019, arXiv:1911.10375.
    """

    def __init__(
        self,
        *,
        kernel_size: int = 7,
        threshold: float = 0.8,
        per_sample: bool = True,
        epsilon: float = 1e-5,
        kernel_init: Initializer = jax.nn.initializers.lecun_normal(),
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def kernel(inputs: int) -> nnx.Param:
            shape = (kernel_size, kernel_size, inputs, 1)
            return nnx.Param(kernel_init(rngs.params(), shape, param_dtype), axes=(None,) * 4)

        self.attention_kernel = kernel(2)
        self.scale_kernel, self.bias_kernel = kernel(1), kernel(1)
        self.scale_bias = nnx.Param(jnp.zeros(1, param_dtype), axes=(None,))
        self.bias_bias = nnx.Param(jnp.zeros(1, param_dtype), axes=(None,))
        self.threshold, self.per_sample, self.epsilon = threshold, per_sample, epsilon

    def __call__(self, x: Array) -> Array:
        """Normalises `[batch, height, width, features]`."""
        return region_norm_learnable(
            x,
            self.attention_kernel[...],
            self.scale_kernel[...],
            self.scale_bias[...],
            self.bias_kernel[...],
            self.bias_bias[...],
            threshold=self.threshold,
            per_sample=self.per_sample,
            epsilon=self.epsilon,
        )
