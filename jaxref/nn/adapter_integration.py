"""Low-rank adapters of one model for several domains, and their integration for a new one."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_broadcastable, check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.core.reductions import masked_mean
from jaxref.nn.linear import Linear

Module = TypeVar("Module", bound=nnx.Module)


class IntegratorParam(nnx.Param):
    """A parameter of an `XCrossEncoder` that a new domain trains: of an integrator or of the head.

    All others are frozen: `nnx.Optimizer(model, ..., wrt=IntegratorParam)` trains these alone.

    Use it to filter what a new domain trains, in optimizers and in `count_parameters`; the adapters
    of earlier domains are `nnx.LoRAParam`.

    Cost: none: it marks variables.

    Example:
      >>> isinstance(IntegratorParam(jnp.zeros(2)), nnx.Param)
      True

    Reference: Hadad, Roitman, Eshel, Shapira, Rokach, "X-Cross: Dynamic Integration of Language
    Models for Cross-Domain Sequential Recommendation", 2025, arXiv:2504.20859.
    """


class LoRALinear(Linear):
    """A linear map with low-rank adapters, of which each has its share of the batch.

        y = x W (+ b) + (α / r) x A_m B_m   for the m-th of as many equal parts of the rows

    With one adapter, all rows are its own: `nnx.Optimizer(model, ..., wrt=nnx.LoRAParam)` trains
    it and leaves W as it is. With n, the batch is that of n models one after the other, and the
    product with W, which they have in common, is one.

    Args:
      in_features: size of the input's last axis, or sizes of its last axes.
      out_features: the same for the output.
      rank: r at least 1.
      alpha: α, the strength of the adapters. Default: r.
      num_adapters: n at least 1. Default 1.
      axes: logical axis names of the kernel, input axes first, as for `Linear`.
      use_bias, kernel_init, dtype, param_dtype: as for `Linear`.
      rngs: source of the `params` key.

    Attributes:
      kernel, bias: as of `Linear`.
      down: A `[n, inputs, r]`, initially normal of variance 1 / inputs.
      up: B `[n, r, outputs]`, initially 0, so that adapters begin without effect.

    Raises:
      ValueError: a size below 1, or an input whose rows n does not divide.

    Use it to fine-tune a frozen `Linear` by few parameters, or to run n such models at once. It
    stands where a `Linear` does: `MLP(..., linear=functools.partial(LoRALinear, rank=8))`.
    `stack_adapters` makes n adapters of n models with one each.

    Cost: n · r · (inputs + outputs) parameters beside the kernel's; r · (inputs + outputs)
    multiplications a row beside its inputs · outputs.

    Example:
      >>> adapted = LoRALinear(8, 4, rank=2, axes=("embed", "mlp"), rngs=nnx.Rngs(0))
      >>> adapted(jnp.ones((3, 8))).shape, adapted.down.shape
      ((3, 4), (1, 8, 2))

    Reference: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021,
    arXiv:2106.09685, as in Hadad, Roitman, Eshel, Shapira, Rokach, "X-Cross: Dynamic Integration of
    Language Models for Cross-Domain Sequential Recommendation", 2025, arXiv:2504.20859.
    """

    def __init__(
        self,
        in_features: int | tuple[int, ...],
        out_features: int | tuple[int, ...],
        rank: int,
        *,
        alpha: float | None = None,
        num_adapters: int = 1,
        axes: tuple[str | None, ...],
        use_bias: bool = False,
        kernel_init: Initializer = jax.nn.initializers.lecun_normal(),
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_interval(1, jnp.inf, rank=rank, num_adapters=num_adapters)
        super().__init__(
            in_features,
            out_features,
            axes=axes,
            use_bias=use_bias,
            kernel_init=kernel_init,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        inputs, outputs = math.prod(self.in_features), math.prod(self.out_features)
        down = jax.random.normal(rngs.params(), (num_adapters, inputs, rank), param_dtype)
        in_axis, out_axis = (
            names[0] if len(names) == 1 else None
            for names in (axes[: len(self.in_features)], axes[len(self.in_features) :])
        )
        self.down = nnx.LoRAParam(down / math.sqrt(inputs), axes=(None, in_axis, None))
        up = jnp.zeros((num_adapters, rank, outputs), param_dtype)
        self.up = nnx.LoRAParam(up, axes=(None, None, out_axis))
        self.scale = 1.0 if alpha is None else alpha / rank

    def effective_kernel(self) -> Array:
        """W + (α / r) A B of the one adapter, in the type to compute in."""
        if len(self.down[...]) != 1:
            raise ValueError(f"the kernel is not one with {len(self.down[...])} adapters")
        kernel = self._kernel_by_output()
        product = self.scale * self.down[0] @ self.up[0]
        return (kernel + product).astype(self.dtype or self.kernel.dtype)

    def _product(self, rows: Array) -> Array:
        n = len(self.down[...])
        if len(rows) % n:
            raise ValueError(f"x must have rows in {n} equal parts, got {len(rows)}")
        down, up = (v[...].astype(rows.dtype) for v in (self.down, self.up))
        parts = rows.reshape(n, -1, rows.shape[-1])
        adapted = self.scale * jnp.einsum("nbr,nro->nbo", parts @ down, up)
        y = rows @ self._kernel_by_output().astype(rows.dtype)
        return y + adapted.reshape(y.shape).astype(y.dtype)


def stack_adapters(modules: Sequence[Module]) -> Module:
    """One module with the adapters of several that were trained on one frozen base.

    Args:
      modules: at least one, alike but for their `nnx.LoRAParam`s, those of `LoRALinear`.

    Returns:
      A module of the same class whose maps have all adapters, in the order of the modules. Given
      their batches one after the other, it computes what they do.

    Raises:
      ValueError: no module, modules of different structure or shapes, or, where values are
        concrete, a base that is not the same.

    Use it on what n domains made of one encoder, for the layers of an `XCrossEncoder`.

    Cost: a copy of all adapters, while the base is shared; known values of every base are compared
    with the first one's on the host.

    Example:
      >>> models = [
      ...     LoRALinear(4, 3, rank=2, axes=(None, None), rngs=nnx.Rngs(0)) for _ in range(2)
      ... ]
      >>> stack_adapters(models)(jnp.ones((6, 4))).shape
      (6, 3)

    Reference: Hadad, Roitman, Eshel, Shapira, Rokach, "X-Cross: Dynamic Integration of Language
    Models for Cross-Domain Sequential Recommendation", 2025, arXiv:2504.20859.
    """
    if not modules:
        raise ValueError("modules must have at least one module, got none")
    graph, *states = nnx.split(modules[0], nnx.LoRAParam, ...)
    adapters, base = states
    stacked = [adapters]
    for module in modules[1:]:
        others, other_base = nnx.state(module, nnx.LoRAParam, ...)
        for mine, theirs in ((adapters, others), (base, other_base)):
            shapes = [jax.tree.map(jnp.shape, nnx.to_pure_dict(s)) for s in (mine, theirs)]
            if shapes[0] != shapes[1]:
                raise ValueError("modules must have the same structure and shapes")
        for a, b in zip(jax.tree.leaves(base), jax.tree.leaves(other_base)):
            if not any(isinstance(x, jax.core.Tracer) for x in (a, b)) and not _same(a, b):
                raise ValueError("modules must have the same parameters but for their adapters")
        stacked.append(others)
    joined = jax.tree.map(lambda *v: jnp.concatenate(v), *stacked)
    return nnx.merge(graph, joined, base)


def cross_model_integrate(
    hidden_states: ArrayLike,
    weight: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    per_token: bool = True,
) -> Array:
    r"""The hidden states of several models, each refined by those of all.

        h'_m = h_m + Σ_j Z_mj h_j,   Z = reshape([h_1; ...; h_n] W + b)

    Every entry of Z `[n, n]` is a number that the states themselves decide, of either sign: what a
    model adds to another, or takes from it.

    Args:
      hidden_states: h `[n, ..., length, features]` floating point of n models on the same tokens.
      weight: W `[n · features, n²]`, the blocks of rows in the order of the models.
      bias: b `[n²]`. Default: 0.
      per_token: whether every token has a Z of its own; else that of the first token is for all.

    Returns:
      h' of the shape and type of `hidden_states`, computed in at least float32; h itself, to the
      bit, for W and b of 0.

    Raises:
      ValueError: states without a token, or shapes that do not match.
      TypeError: states that are not floating point.

    Use it between the layers of models that run side by side; `XCrossEncoder` does. n = 1 scales
    each token by 1 + z.

    Cost: (n³ + n²) · features multiplications a token, for Z and its product; the n³ once a
    sequence without `per_token`.

    Example:
      >>> h = jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]])  # two models, one token
      >>> weight = jnp.zeros((4, 4)).at[0, 1].set(0.5)  # from the first feature of the first, Z_12
      >>> print(cross_model_integrate(h, weight)[:, 0])
      [[1.  0.5]
       [0.  1. ]]

    Reference: Hadad, Roitman, Eshel, Shapira, Rokach, "X-Cross: Dynamic Integration of Language
    Models for Cross-Domain Sequential Recommendation", 2025, arXiv:2504.20859. The residual form
    and one number for each pair of models are choices of this library.
    """
    check_floating(hidden_states=hidden_states)
    shape = jnp.shape(hidden_states)
    if len(shape) < 3 or shape[-2] == 0:
        raise ValueError(f"hidden_states must have shape [n, ..., length, features], got {shape}")
    n, features = shape[0], shape[-1]
    check_shape((n * features, n * n), weight=weight)
    if bias is not None:
        check_shape((n * n,), bias=bias)
    h = jnp.asarray(hidden_states).astype(compute_dtype(hidden_states))
    w = jnp.asarray(weight).astype(h.dtype).reshape(n, features, n, n)
    seen = h if per_token else h[..., :1, :]
    z = jnp.einsum("k...d,kdmj->mj...", seen, w)
    if bias is not None:
        b = jnp.asarray(bias).astype(h.dtype)
        z += b.reshape((n, n) + (1,) * (z.ndim - 2))
    return (h + jnp.sum(z[..., None] * h, axis=1)).astype(jnp.result_type(hidden_states))


class XCrossEncoder(nnx.Module):
    """n frozen encoders side by side, integrated layer by layer, and a score from all (X-Cross).

        h_m ← layer_l(h_m; adapter m),   h ← h + Z(h) h   for every layer l
        score = v · [pool h_1; ...; pool h_n] + c

    with Z of `cross_model_integrate`. A layer's integrated states are what the next layer of each
    encoder sees. Integrators begin at 0, so that the encoders begin as they were; they and the head
    are all that trains.

    Args:
      layers: modules of n adapters each, from `[batch, length, features]` to the same, such as
        those of `stack_adapters`. They are used as they are: no gradient reaches their parameters,
        and what they would store of a batch is dropped.
      features: size of the hidden states.
      num_streams: n at least 1.
      per_token: whether every token is integrated in its own way, or all as the first is.
      pooling: "mean" of the tokens that exist, or "first", as for a model with a token for that.
      param_dtype: type of the parameters.
      rngs: source of the `params` key, for the head.

    Attributes:
      layers: the layers.
      weights: by layer, W `[n · features, n²]`, initially 0.
      biases: by layer, b `[n²]`, initially 0.
      head: v `[n · features]`, initially normal of variance 1 / (n · features).
      head_bias: c, initially 0.

    Raises:
      ValueError: a size below 1, an unknown `pooling`, no layers, or states of another size.

    Use it for a new domain with little data, where adapters of other domains exist. Train it with
    `jaxref.losses.softmax_cross_entropy` over the scores of a user's candidates, one of them
    positive, each with the user's history in its prompt.

    Cost: n³ · features + n² parameters to train a layer and as many multiplications a token, beside
    the work of n encoders; the backward pass goes through all layers.

    Example:
      >>> layer = LoRALinear(8, 8, rank=2, num_adapters=3, axes=(None, None), rngs=nnx.Rngs(0))
      >>> encoder = XCrossEncoder([layer], 8, num_streams=3, rngs=nnx.Rngs(1))
      >>> nnx.jit(lambda encoder, x: encoder(x))(encoder, jnp.ones((2, 5, 8))).shape
      (2,)
      >>> count_parameters(encoder, IntegratorParam), count_parameters(encoder, nnx.LoRAParam)
      (250, 96)

    Reference: Hadad, Roitman, Eshel, Shapira, Rokach, "X-Cross: Dynamic Integration of Language
    Models for Cross-Domain Sequential Recommendation", 2025, arXiv:2504.20859. Pooling and head
    are choices of this library.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        features: int,
        *,
        num_streams: int,
        per_token: bool = True,
        pooling: str = "mean",
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_interval(1, jnp.inf, features=features, num_streams=num_streams)
        if not layers:
            raise ValueError("layers must have at least one layer, got none")
        if pooling not in ("mean", "first"):
            raise ValueError(f"pooling must be 'mean' or 'first', got {pooling!r}")
        self.features, self.num_streams = features, num_streams
        self.per_token, self.pooling = per_token, pooling
        self.layers = nnx.List(layers)
        n, width = num_streams, num_streams * features

        def zeros(*shape: int) -> nnx.List:
            axes = (None,) * len(shape)
            return nnx.List(
                [IntegratorParam(jnp.zeros(shape, param_dtype), axes=axes) for _ in layers]
            )

        self.weights, self.biases = zeros(width, n * n), zeros(n * n)
        head = jax.random.normal(rngs.params(), (width,), param_dtype) / math.sqrt(width)
        self.head = IntegratorParam(head, axes=(None,))
        self.head_bias = IntegratorParam(jnp.zeros((), param_dtype), axes=())

    def streams(self, x: Array, **kwargs: Any) -> Array:
        """The last hidden states of all encoders, `[n, batch, length, features]`.

        Args:
          x: `[batch, length, features]` floating point, which all encoders begin with.
          **kwargs: for the layers; arrays have a leading axis of the batch, which is repeated for
            every encoder.
        """
        if x.ndim != 3 or x.shape[-1] != self.features:
            raise ValueError(
                f"x must have shape [batch, length, {self.features}], got {tuple(x.shape)}"
            )
        n = self.num_streams

        def repeated(a: Any) -> Any:
            return jnp.tile(a, (n,) + (1,) * (jnp.ndim(a) - 1)) if jnp.ndim(a) else a

        kwargs = jax.tree.map(repeated, kwargs)
        h = jnp.broadcast_to(x, (n, *x.shape))
        for layer, weight, bias in zip(self.layers, self.weights, self.biases):
            y = _frozen(layer)(h.reshape(-1, *x.shape[1:]), **kwargs)
            h = cross_model_integrate(
                y.reshape(h.shape), weight[...], bias=bias[...], per_token=self.per_token
            )
        return h

    def __call__(self, x: Array, *, where: Array | None = None, **kwargs: Any) -> Array:
        """Scores `[batch]` in at least float32 of `x [batch, length, features]`.

        `where` is boolean `[batch, length]`: the tokens that pooling counts. The layers are given
        `kwargs`, a mask of their own among them.
        """
        h = self.streams(x, **kwargs)
        check_broadcastable(x.shape[:2], where=where)
        h = h.astype(compute_dtype(h))
        if self.pooling == "first":
            pooled = h[:, :, 0]
        else:
            counts = None if where is None else jnp.broadcast_to(where, x.shape[:2])[..., None]
            pooled = masked_mean(h, axis=2, where=counts)
        v = self.head[...].reshape(self.num_streams, self.features)
        return jnp.einsum("nbd,nd->b", pooled, v.astype(h.dtype)) + self.head_bias[...]


def count_parameters(module: nnx.Module, kind: Any = nnx.Param) -> int:
    """How many numbers of a kind of parameter a module has.

    Args:
      module: any `nnx.Module`.
      kind: a class of variables, or another filter of `flax.nnx`. Default: all parameters.

    Returns:
      Their number.

    Use it to see what a new domain costs: `IntegratorParam`s against the `nnx.LoRAParam`s of one
    adapter more.

    Cost: none on a device: shapes are added up.

    Example:
      >>> count_parameters(LoRALinear(8, 4, rank=2, axes=(None, None), rngs=nnx.Rngs(0)))
      56

    Reference: Hadad, Roitman, Eshel, Shapira, Rokach, "X-Cross: Dynamic Integration of Language
    Models for Cross-Domain Sequential Recommendation", 2025, arXiv:2504.20859.
    """
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(nnx.state(module, kind)))


def _frozen(layer: Any) -> Any:
    """A layer through whose parameters no gradient goes, while it does through its input."""
    graph, state = nnx.split(layer)
    return nnx.merge(graph, jax.tree.map(jax.lax.stop_gradient, state))


def _same(a: Any, b: Any) -> bool:
    return a is b or bool(np.array_equal(np.asarray(a), np.asarray(b)))
