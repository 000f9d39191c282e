"""Tokens from convolutions, of images and of sequences of word vectors."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jaxref.core.checks import check_interval
from jaxref.nn import Conv

HE_NORMAL = jax.nn.initializers.he_normal()


class ConvTokenizer(nnx.Module):
    """Layers of convolution, ReLU and max pooling, whose pixels are the tokens.

    Args:
      in_features: channels of the image.
      features: size of a token.
      kernel_size: side of the kernels. Default 3.
      num_layers: layers, at least 1. Default 1.
      hidden: channels between layers. Default 64.
      strides: of the convolutions. Default max(1, kernel_size // 2 - 1).
      padding: zeros around the image, for each convolution. Default max(1, kernel_size // 2).
      dtype, param_dtype: types to compute in and of the parameters.
      rngs: source of the `params` key.

    Raises:
      ValueError: a size below 1, or images of another number of channels.

    Use it in front of a `CompactEncoder`: tokens that overlap, and that a convolution has looked
    at, spare a transformer what it would need many images to learn. `CompactVisionTransformer` has
    patches that do not overlap.

    Cost: kernel_size² · in_features · features parameters with one layer, as many multiplications a
    pixel, a quarter of which are left as tokens.

    Pooling is over 3 x 3 pixels with stride 2 and one pixel of padding, and there are no biases.

    Example:
      >>> images = jnp.ones((2, 32, 32, 3))
      >>> nnx.eval_shape(lambda: ConvTokenizer(3, 8, rngs=nnx.Rngs(0))(images)).shape
      (2, 256, 8)

    Reference: Hassani, Walton, Shah, Abuduweili, Li, Shi, "Escaping the Big Data Paradigm with
    Compact Transformers", 2021, arXiv:2104.05704.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        kernel_size: int = 3,
        num_layers: int = 1,
        hidden: int = 64,
        strides: int | None = None,
        padding: int | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_interval(1, jnp.inf, kernel_size=kernel_size, num_layers=num_layers, hidden=hidden)
        strides = max(1, kernel_size // 2 - 1) if strides is None else strides
        padding = max(1, kernel_size // 2) if padding is None else padding
        widths = [in_features, *[hidden] * (num_layers - 1), features]
        self.convs = nnx.List(
            Conv(
                inputs,
                outputs,
                (kernel_size, kernel_size),
                strides=strides,
                padding=((padding, padding),) * 2,
                axes=(None, "embed" if layer == num_layers - 1 else None),
                kernel_init=HE_NORMAL,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )
            for layer, (inputs, outputs) in enumerate(itertools.pairwise(widths))
        )
        self._step = (kernel_size, strides, padding)

    def num_tokens(self, height: int, width: int) -> int:
        """How many tokens an image of this size gives."""
        kernel, stride, padding = self._step
        for _ in self.convs:
            height, width = ((n + 2 * padding - kernel) // stride + 1 for n in (height, width))
            height, width = ((n - 1) // 2 + 1 for n in (height, width))
        return height * width

    def __call__(self, images: Array) -> Array:
        """Maps `[batch, height, width, in_features]` to `[batch, tokens, features]`."""
        x = images
        for conv in self.convs:
            x = nnx.max_pool(jax.nn.relu(conv(x)), (3, 3), (2, 2), ((1, 1), (1, 1)))
        return x.reshape(x.shape[0], -1, x.shape[-1])


class TextTokenizer(nnx.Module):
    """Convolution, ReLU and max pooling along a sequence of word vectors.

    Args:
      in_features: size of a word vector.
      features: size of a token.
      kernel_size: words that the kernel sees. Default 4.
      strides: of the convolution. Default 1.
      padding: zeros before and after the sequence. Default max(1, kernel_size // 2).
      dtype, param_dtype: types to compute in and of the parameters.
      rngs: source of the `params` key.

    Raises:
      ValueError: a size below 1, or word vectors of another size.

    Use it on word vectors in front of a `CompactEncoder`, which then classifies texts from half the
    tokens; `ConvTokenizer` is for images.

    Cost: kernel_size · in_features · features parameters, as many multiplications a word; about
    half as many tokens as words.

    Pooling is over 3 positions with stride 2 and one of padding, and there is no bias. A token
    exists where the words do that it was made of, any of them: others come out 0.

    Example:
      >>> tokenizer = TextTokenizer(5, 8, rngs=nnx.Rngs(0))
      >>> tokens, where = tokenizer(jnp.ones((1, 12, 5)), where=jnp.arange(12)[None] < 3)
      >>> tokens.shape, where.astype(int)
      ((1, 7, 8), Array([[1, 1, 1, 0, 0, 0, 0]], dtype=int32))

    Reference: Hassani, Walton, Shah, Abuduweili, Li, Shi, "Escaping the Big Data Paradigm with
    Compact Transformers", 2021, arXiv:2104.05704.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        kernel_size: int = 4,
        strides: int = 1,
        padding: int | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        padding = max(1, kernel_size // 2) if padding is None else padding
        self.conv = Conv(
            in_features,
            features,
            (kernel_size,),
            strides=strides,
            padding=((padding, padding),),
            axes=(None, "embed"),
            kernel_init=HE_NORMAL,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: Array, *, where: Array | None = None) -> tuple[Array, Array | None]:
        """Maps `[batch, length, in_features]` to `[batch, tokens, features]`.

        `where` is boolean `[batch, length]`: the words that exist. Returns the tokens, and which of
        them exist.
        """
        y = nnx.max_pool(jax.nn.relu(self.conv(x)), (3,), (2,), ((1, 1),))
        if where is None:
            return y, None
        seen = jax.lax.reduce_window(
            where,
            False,
            jax.lax.bitwise_or,
            (1, *self.conv.kernel_size),
            (1, *self.conv.strides),
            ((0, 0), *self.conv.padding),
        )
        exists = jax.lax.reduce_window(
            seen, False, jax.lax.bitwise_or, (1, 3), (1, 2), ((0, 0), (1, 1))
        )
        return jnp.where(exists[..., None], y, 0), exists
