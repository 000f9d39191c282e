"""Networks that predict the parameters of another, whose input's size does not set their scale."""

import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer, variance_scaling
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_interval, check_shape
from jaxref.nn.linear import Linear

Encoding = Literal["cos_sin", "complement"] | None


class HyperNetworkParameters(NamedTuple):
    """Weights of a hypernetwork.

    Attributes:
      kernels: of the hidden layers, each `[inputs, outputs]`.
      biases: of the hidden layers, each `[outputs]`.
      heads: for each predicted tensor, the kernel `[hidden, *shape]` in the pytree of the target.
      base: θ0, the target's own parameters, in its pytree.
    """

    kernels: tuple[Array, ...]
    biases: tuple[Array, ...]
    heads: Any
    base: Any


def magnitude_invariant_encoding(
    z: ArrayLike, mode: Encoding = "cos_sin", *, strict: bool = False
) -> Array:
    r"""Encodes conditioning values so that the code's norm says nothing about them.

        cos_sin:     E(z) = [cos(π z / 2), sin(π z / 2)],   ‖E(z)‖₂² = D for all z
        complement:  E(z) = [z, 1 - z],                     ‖E(z)‖₁ = D for z in [0, 1]

    A network of zero biases and piecewise linear activations is proportional to the size of its
    input. Without the encoding the sizes of predicted parameters and of gradients vary with z.

    Args:
      z: `[..., D]` real, in [0, 1]: rescale other ranges first. Integers count as float32.
      mode: "cos_sin" (default), "complement", or None for z as it is.
      strict: raise where values outside of [0, 1] are known, instead of a warning.

    Returns:
      `[..., 2 D]`, all cosines (or z) ahead of all sines (or 1 - z); z for None.

    Raises:
      ValueError: no value to encode, an unknown mode, or with `strict` values outside of [0, 1].

    Use it as the first layer of a hypernetwork; `HyperNetwork` does.

    Cost: elementwise; the first layer has 2 D inputs in place of D.

    Example:
      >>> print(magnitude_invariant_encoding(jnp.array([0.0, 1.0])).round(3) + 0.0)
      [1. 0. 0. 1.]

    Reference: Gonzalez Ortiz, Guttag, Dalca, "Magnitude Invariant Parametrizations Improve
    Hypernetwork Learning", 2023, arXiv:2304.07645.
    """
    z = jnp.asarray(z)
    if not jnp.issubdtype(z.dtype, jnp.floating):
        z = z.astype(jnp.float32)
    if z.ndim == 0 or z.shape[-1] == 0:
        raise ValueError(f"z must have shape [..., D] with D at least 1, got {z.shape}")
    if mode is None:
        return z
    if mode not in ("cos_sin", "complement"):
        raise ValueError(f"mode must be 'cos_sin', 'complement' or None, got {mode!r}")
    if strict:
        check_interval(0, 1, z=z)
    elif not isinstance(z, jax.core.Tracer) and _leaves_unit_interval(np.asarray(z)):
        warnings.warn("z has values outside of [0, 1]: rescale them", stacklevel=2)
    if mode == "complement":
        return jnp.concatenate([z, 1 - z], axis=-1)
    angle = jnp.pi / 2 * z
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def hypernetwork_apply(
    params: HyperNetworkParameters,
    z: ArrayLike | Mapping[str, ArrayLike],
    *,
    encoding: Encoding = "cos_sin",
    activation: Callable[[Array], Array] = jax.nn.leaky_relu,
    strict: bool = False,
) -> Any:
    r"""The parameters that a hypernetwork predicts for conditioning values.

        θ = θ0 + h(E(z)) W,   h = act(act(E(z) W_1 + b_1) W_2 + b_2) ...

    with W cut into the tensors of the target. θ0 are parameters of their own, so that h only has to
    say what changes with z.

    Args:
      params: `HyperNetworkParameters`.
      z: `[..., D]` real in [0, 1], or several by name, which are joined in the order of their
        names.
      encoding, strict: of `magnitude_invariant_encoding`.
      activation: between the layers; piecewise linear ones make h homogeneous. Default leaky ReLU.

    Returns:
      The pytree of `params.base`, its tensors with the leading axes of `z` in front.

    Raises:
      ValueError: a `z` whose size does not fit, or what the encoding raises.

    Use it under `jax.vmap` of the target network to apply it to a batch of conditions.

    Cost: H · P multiplications and P numbers for each condition, for H last hidden units and P
    predicted numbers, beside the hidden layers.

    Example:
      >>> base = {"w": jnp.array([[1.0, 2.0]])}
      >>> params = HyperNetworkParameters((), (), {"w": jnp.zeros((2, 1, 2))}, base)
      >>> print(hypernetwork_apply(params, jnp.array([0.3]))["w"])
      [[1. 2.]]

    Reference: Gonzalez Ortiz, Guttag, Dalca, "Magnitude Invariant Parametrizations Improve
    Hypernetwork Learning", 2023, arXiv:2304.07645.
    """
    if isinstance(z, Mapping):
        z = jnp.concatenate([jnp.asarray(z[name]) for name in sorted(z)], axis=-1)
    x = magnitude_invariant_encoding(z, encoding, strict=strict)
    first = params.kernels[0] if params.kernels else jax.tree.leaves(params.heads)[0]
    factor = 1 if encoding is None else 2
    check_shape((*jnp.shape(z)[:-1], first.shape[0] // factor), z=z)
    x = x.astype(jnp.result_type(x, first))
    for kernel, bias in zip(params.kernels, params.biases):
        x = activation(x @ kernel + bias)

    def predict(head: Array, base: Array) -> Array:
        flat = x @ head.reshape(head.shape[0], -1)
        return base + flat.reshape(*x.shape[:-1], *head.shape[1:])

    return jax.tree.map(predict, params.heads, params.base)


class HyperNetwork(nnx.Module):
    """Predicts the parameters of another network from conditioning values.

        θ = θ0 + h(E(z))

    with the encoding E of constant norm and θ0 learned beside h: the magnitude invariant
    parametrization. Optimizers and their settings stay what they were.

    Args:
      input_dim: D, the number of conditioning values.
      target_shapes: a pytree of what is predicted: shapes as tuples of ints, or arrays (abstract
        ones too), whose shapes count.
      hidden_sizes: of h. Default (16, 64, 128).
      encoding: of `magnitude_invariant_encoding`.
      residual: whether θ0 starts as the target would by itself: He normal where a tensor has two
        axes or more, inputs ahead of outputs, and 0 otherwise. False starts all of it at 0, which
        makes it the bias of an ordinary last layer.
      activation: between the layers. Default leaky ReLU.
      strict: raise instead of a warning for known values outside of [0, 1].
      param_dtype: type of the parameters.
      rngs: source of the `params` key.

    Attributes:
      layers: the `Linear`s of h but the last, He normal by fan-out, with biases of 0.
      heads: for each predicted tensor, by its name in `jax.tree_util.keystr`, the kernel
        `[hidden, *shape]`, normal of variance 1 / size.
      base: θ0, by the same names.

    Raises:
      ValueError: `input_dim` below 1, no shapes, an unknown encoding, or a `z` that does not fit.

    Use it to train a family of models at once, over a regularization weight, say, or a task. For a
    trained target, start with `from_existing`; what it predicts then deviates from that.

    Cost: (H + 1) · P parameters for P of the target and H last hidden units, 128 by default; H · P
    multiplications and P numbers for each `z`.

    Example:
      >>> hyper = HyperNetwork(1, {"kernel": (3, 4), "bias": (4,)}, rngs=nnx.Rngs(0))
      >>> params = hyper(jnp.array([[0.2], [0.7]]))
      >>> params["kernel"].shape, params["bias"].shape
      ((2, 3, 4), (2, 4))

    Reference: Gonzalez Ortiz, Guttag, Dalca, "Magnitude Invariant Parametrizations Improve
    Hypernetwork Learning", 2023, arXiv:2304.07645.
    """

    def __init__(
        self,
        input_dim: int,
        target_shapes: Any,
        hidden_sizes: tuple[int, ...] = (16, 64, 128),
        encoding: Encoding = "cos_sin",
        residual: bool = True,
        activation: Callable[[Array], Array] = jax.nn.leaky_relu,
        *,
        strict: bool = False,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_interval(1, jnp.inf, input_dim=input_dim)
        if encoding not in ("cos_sin", "complement", None):
            raise ValueError(f"encoding must be 'cos_sin', 'complement' or None, got {encoding!r}")
        paths, self._structure = jax.tree_util.tree_flatten_with_path(
            target_shapes, is_leaf=_is_shape
        )
        if not paths:
            raise ValueError(f"target_shapes must hold at least one shape, got {target_shapes}")
        shapes = {
            jax.tree_util.keystr(path): leaf if _is_shape(leaf) else tuple(jnp.shape(leaf))
            for path, leaf in paths
        }
        width = input_dim if encoding is None else 2 * input_dim
        sizes = (width, *hidden_sizes)
        self.layers = nnx.List(
            Linear(
                inputs,
                outputs,
                axes=(None, None),
                use_bias=True,
                kernel_init=variance_scaling(2.0, "fan_out", "normal"),
                param_dtype=param_dtype,
                rngs=rngs,
            )
            for inputs, outputs in itertools.pairwise(sizes)
        )
        last = variance_scaling(1.0, "fan_out", "normal")

        def head(shape: tuple[int, ...]) -> nnx.Param:
            flat = last(rngs.params(), (sizes[-1], math.prod(shape)), param_dtype)
            kernel = flat.reshape(sizes[-1], *shape)
            return nnx.Param(kernel, axes=(None,) * kernel.ndim)

        def base(shape: tuple[int, ...]) -> nnx.Param:
            init: Initializer = jax.nn.initializers.zeros
            if residual and len(shape) >= 2:
                init = jax.nn.initializers.he_normal()
            return nnx.Param(init(rngs.params(), shape, param_dtype), axes=(None,) * len(shape))

        self.heads = nnx.data({name: head(shape) for name, shape in shapes.items()})
        self.base = nnx.data({name: base(shape) for name, shape in shapes.items()})
        self.encoding, self.activation, self.strict = encoding, activation, strict

    @classmethod
    def from_existing(cls, params: Any, input_dim: int, **kwargs: Any) -> Self:
        """A hypernetwork around a trained target.

        Args:
          params: the target's parameters, a pytree of arrays, which θ0 starts at.
          input_dim: D.
          **kwargs: further arguments of the class.
        """
        hyper = cls(input_dim, params, residual=False, **kwargs)
        for base, leaf in zip(hyper.base.values(), jax.tree.leaves(params)):
            base[...] = jnp.asarray(leaf, base.dtype)
        return hyper

    def parameters(self) -> HyperNetworkParameters:
        """The weights, as `hypernetwork_apply` takes them."""

        def tree(named: Mapping[str, nnx.Param]) -> Any:
            return jax.tree.unflatten(self._structure, [leaf[...] for leaf in named.values()])

        return HyperNetworkParameters(
            tuple(layer.kernel[...] for layer in self.layers),
            tuple(layer.bias[...] for layer in self.layers if layer.bias is not None),
            tree(self.heads),
            tree(self.base),
        )

    def __call__(self, z: ArrayLike | Mapping[str, ArrayLike]) -> Any:
        """The target's parameters for `z [..., D]`, or for several values by name."""
        return hypernetwork_apply(
            self.parameters(),
            z,
            encoding=self.encoding,
            activation=self.activation,
            strict=self.strict,
        )


def _leaves_unit_interval(z: np.ndarray) -> bool:
    return bool(np.any((z < 0) | (z > 1)))


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, tuple) and all(isinstance(n, int | np.integer) for n in leaf)
