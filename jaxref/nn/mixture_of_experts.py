"""Feed-forward sublayers of many experts, of which a router or a domain picks a few per token."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from jaxref.core.checks import check_floating, check_interval, check_shape
from jaxref.core.numerics import compute_dtype
from jaxref.losses import load_balance_loss
from jaxref.nn.linear import Linear
from jaxref.nn.mlp import MLP, is_module_class
from jaxref.nn.variables import AuxiliaryLoss
from jaxref.parallel import constrain, on_shards


class RouterOutput(NamedTuple):
    """Which experts see which tokens, of `top_k_router`.

    Attributes:
      dispatch: boolean `[tokens, E, capacity]`, the place of a token in an expert's batch; without
        a capacity `[tokens, E]`, whether the expert sees the token.
      combine: of the shape of `dispatch`: the gate where that is True, and 0 elsewhere.
      probabilities: `[tokens, E]`, the router's softmax.
      assignment: int32 `[tokens, top_k]`, the experts that a token chose, the most probable first.
      dropped: boolean `[tokens, top_k]`, the choices for which there was no place.
    """

    dispatch: Array
    combine: Array
    probabilities: Array
    assignment: Array
    dropped: Array


class ExpertParameters(NamedTuple):
    """Weights of E two-layer networks as `MLP` has them, stacked along the leading axis.

    Attributes:
      up: `[E, features, hidden]`.
      down: `[E, hidden, features]`.
      gate: like `up`, or None for the plain form.
      up_bias, gate_bias: `[E, hidden]`, or None.
      down_bias: `[E, features]`, or None.
    """

    up: Array
    down: Array
    gate: Array | None = None
    up_bias: Array | None = None
    down_bias: Array | None = None
    gate_bias: Array | None = None


def top_k_router(
    logits: ArrayLike,
    top_k: int,
    *,
    key: Array | None = None,
    noise_std: float | None = None,
    capacity: int | None = None,
) -> RouterOutput:
    r"""Sends every token to the K experts that its router finds most probable.

    With E experts and logits f,

        p = softmax(f + ε),   ε ~ N(0, noise_std²),   g = TopK(p)

    where TopK keeps the K largest entries as they are, not renormalised, and makes the others 0.
    An expert has room for `capacity` tokens: the first choices of all tokens are placed before the
    second ones, and tokens in their order. What finds no place is dropped: its gate is 0.

    Args:
      logits: `[tokens, E]` floating point.
      top_k: K in [1, E].
      key: random key of the noise. Default: no noise, as in evaluation.
      noise_std: at least 0; default 1 / E. Without a `key` it says nothing.
      capacity: places per expert, at least 1. Default: no limit, and no axis for the places.

    Returns:
      A `RouterOutput`, its gates and probabilities in at least float32. Ties go to the expert of
      the lower index.

    Raises:
      ValueError: logits that are not `[tokens, E]`, a `top_k` that is not in [1, E], a negative
        `noise_std` or a `capacity` below 1.
      TypeError: logits that are not floating point.

    Use it with `mixture_of_experts_ffn`, and `jaxref.losses.load_balance_loss` to keep the experts
    equally busy. A capacity makes training's shapes static and its experts' work equal; in
    evaluation, leave it out so that no token depends on the others.

    Cost: a softmax and the K largest of E logits a token; with a capacity of a share of the tokens,
    arrays `[tokens, E, capacity]` that grow with their square.

    Example:
      >>> routed = top_k_router(jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3]])), 2)
      >>> print(routed.combine)
      [[0.5 0.3 0. ]
       [0.6 0.  0.3]]

    Reference: Xue, Shi, Wei, Lou, Liu, You, "Go Wider Instead of Deeper", 2021, arXiv:2107.11817,
    after Fedus, Zoph, Shazeer, "Switch Transformers: Scaling to Trillion Parameter Models with
    Simple and Efficient Sparsity", 2021, arXiv:2101.03961.
    """
    check_floating(logits=logits)
    logits = jnp.asarray(logits)
    if logits.ndim != 2:
        raise ValueError(f"logits must have shape [tokens, experts], got {logits.shape}")
    num_experts = logits.shape[1]
    check_interval(1, num_experts, top_k=top_k)
    logits = logits.astype(compute_dtype(logits))
    if key is not None:
        std = 1 / num_experts if noise_std is None else noise_std
        check_interval(0, jnp.inf, noise_std=std)
        logits += std * jax.random.normal(key, logits.shape, logits.dtype)
    probabilities = jax.nn.softmax(logits)
    assignment = jax.lax.top_k(probabilities, top_k)[1].astype(jnp.int32)
    chosen = assignment[..., None] == jnp.arange(num_experts)  # [tokens, K, E]
    if capacity is None:
        dispatch = chosen.any(axis=1)
        dropped = jnp.zeros(assignment.shape, bool)
        gates = jnp.where(dispatch, probabilities, 0)
        return RouterOutput(dispatch, gates, probabilities, assignment, dropped)
    check_interval(1, jnp.inf, capacity=capacity)
    by_choice = chosen.swapaxes(0, 1).reshape(-1, num_experts)
    earlier = jnp.cumsum(by_choice, axis=0, dtype=jnp.int32) - by_choice
    place = jnp.where(by_choice, earlier, 0).reshape(chosen.swapaxes(0, 1).shape).sum(axis=0)
    dispatch = chosen.any(axis=1)[..., None] & (place[..., None] == jnp.arange(capacity))
    dropped = jnp.take_along_axis(place, assignment, axis=1) >= capacity
    gates = jnp.where(dispatch, probabilities[..., None], 0)
    return RouterOutput(dispatch, gates, probabilities, assignment, dropped)


def mixture_of_experts_ffn(
    x: ArrayLike,
    params: ExpertParameters,
    router_output: RouterOutput,
    *,
    activation: Callable[..., Any] = jax.nn.gelu,
) -> Array:
    r"""The experts' outputs for each token, weighted by its gates.

        y = Σ_i g_i e_i(x),   e_i(x) = act(x W_up,i + b) W_down,i + b'

    or, with W_gate, `e_i(x) = (act(x W_gate,i) * (x W_up,i)) W_down,i`. A token that was dropped by
    all of its experts gives 0: a residual connection carries it.

    Args:
      x: `[tokens, features]` floating point.
      params: `ExpertParameters` of E experts.
      router_output: of `top_k_router`. With a capacity, each expert sees a batch of that many
        places. Without, the experts follow each other on all tokens.
      activation: an elementwise function, the same for all experts. Default GELU.

    Returns:
      `[tokens, features]` in the type of `x`.

    Raises:
      ValueError: shapes of tokens, experts and weights that do not match.
      TypeError: `x` that is not floating point.

    Use it in place of a feed-forward network, to give it more parameters at about K times its work;
    `enforced_routing_mlp` where the expert is known beforehand.

    Cost: with a capacity E · capacity rows of experts, and 2 · tokens · E · capacity · features
    multiplications to send them; without, E / K times the work, in memory linear in the tokens.

    Example:
      >>> params = ExpertParameters(jnp.ones((2, 1, 1)), jnp.array([[[1.0]], [[10.0]]]))
      >>> routed = top_k_router(jnp.log(jnp.array([[0.75, 0.25]])), 2)
      >>> print(mixture_of_experts_ffn(jnp.array([[2.0]]), params, routed, activation=jax.nn.relu))
      [[6.5]]

    Reference: Xue, Shi, Wei, Lou, Liu, You, "Go Wider Instead of Deeper", 2021, arXiv:2107.11817.
    """
    check_floating(x=x)
    x = jnp.asarray(x)
    num_experts, features, _ = _check_parameters(params)
    check_shape((x.shape[0], features), x=x)
    dispatch, combine = router_output.dispatch, router_output.combine
    check_shape((x.shape[0], num_experts, *dispatch.shape[2:]), dispatch=dispatch)
    if dispatch.ndim == 2:
        return _every_expert(x, params, combine, activation)
    return _dispatched(x[None], params, dispatch[None], combine[None], activation)[0]


def enforced_routing_mlp(
    hidden: ArrayLike,
    expert_params: ExpertParameters,
    assignment: ArrayLike,
    *,
    activation: Callable[..., Any] = jax.nn.gelu,
) -> Array:
    r"""The output of the one expert that is named for each sequence, or for each token.

        y_b = e_{a_b}(h_b)

    with e_i as in `mixture_of_experts_ffn`. No router decides, no gate scales, nothing is dropped
    and nothing has to be balanced: the domain that the data comes from is the expert.

    Args:
      hidden: `[batch, length, features]` floating point.
      expert_params: `ExpertParameters` of N experts.
      assignment: integer `[batch]`, or `[batch, length]` to name an expert for each token, in
        [0, N).
      activation: an elementwise function, the same for all experts. Default GELU.

    Returns:
      `[batch, length, features]` in the type of `hidden`. An expert that is not named gets a
      gradient of 0.

    Raises:
      ValueError: an assignment outside [0, N), or shapes that do not match. Under jit, where values
        cannot be tested, such an assignment gives NaN.
      TypeError: `hidden` not floating point, or `assignment` not integer.

    Use it where the domain of an input is known, such as the field of a paper;
    `mixture_of_experts_ffn` where it has to be learned.

    Cost: one expert's work a token and a copy of its weights for each sequence; with an assignment
    by token, the work of all N experts on all tokens.

    Example:
      >>> params = ExpertParameters(jnp.ones((2, 1, 1)), jnp.array([[[1.0]], [[10.0]]]))
      >>> hidden = jnp.full((2, 1, 1), 3.0)
      >>> print(enforced_routing_mlp(hidden, params, jnp.array([1, 0])).round(1).ravel())
      [30.  3.]

    Reference: Hallee, Kapur, Patel, Gleghorn, Khomtchouk, "Contrastive Learning and Mixture of
    Experts Enables Precise Vector Embeddings", 2024, arXiv:2401.15713.
    """
    check_floating(hidden=hidden)
    hidden, assignment = jnp.asarray(hidden), jnp.asarray(assignment)
    num_experts, features, _ = _check_parameters(expert_params)
    if hidden.ndim != 3:
        raise ValueError(f"hidden must have shape [batch, length, features], got {hidden.shape}")
    check_shape((*hidden.shape[:2], features), hidden=hidden)
    if not jnp.issubdtype(assignment.dtype, jnp.integer):
        raise TypeError(f"assignment must be integers, got {assignment.dtype.name}")
    check_interval(0, num_experts - 1, assignment=assignment)
    known = (assignment >= 0) & (assignment < num_experts)
    if assignment.ndim == 2:
        check_shape(hidden.shape[:2], assignment=assignment)
        gates = (assignment.reshape(-1, 1) == jnp.arange(num_experts)).astype(hidden.dtype)
        rows = _every_expert(hidden.reshape(-1, features), expert_params, gates, activation)
        y = rows.reshape(hidden.shape)
    else:
        check_shape(hidden.shape[:1], assignment=assignment)
        own = jax.tree.map(
            lambda stack: jnp.asarray(stack).at[assignment].get(mode="clip"), expert_params
        )
        y = jax.vmap(lambda x, expert: _expert(x, expert, activation))(hidden, own)
    return jnp.where(known.reshape(*known.shape, *[1] * (3 - known.ndim)), y, jnp.nan)


def _check_parameters(params: ExpertParameters) -> tuple[int, int, int]:
    """Experts, features and hidden units; raises unless all weights agree on them."""
    if jnp.ndim(params.up) != 3:
        raise ValueError(f"up must have shape [experts, features, hidden], got {params.up.shape}")
    num_experts, features, hidden = params.up.shape
    check_shape((num_experts, hidden, features), down=params.down)
    expected = {
        "gate": (num_experts, features, hidden),
        "up_bias": (num_experts, hidden),
        "gate_bias": (num_experts, hidden),
        "down_bias": (num_experts, features),
    }
    for name, shape in expected.items():
        if getattr(params, name) is not None:
            check_shape(shape, **{name: getattr(params, name)})
    return num_experts, features, hidden


def _expert(x: Array, expert: ExpertParameters, activation: Callable[..., Any]) -> Array:
    """One expert, `expert` without its leading axis, on `[rows, features]`, in the type of `x`."""

    def project(x: Array, kernel: Array, bias: Array | None) -> Array:
        y = x @ kernel.astype(x.dtype)
        return y if bias is None else y + bias.astype(x.dtype)

    hidden = project(x, expert.up, expert.up_bias)
    if expert.gate is None:
        hidden = activation(hidden)
    else:
        hidden = activation(project(x, expert.gate, expert.gate_bias)) * hidden
    return project(hidden, expert.down, expert.down_bias)


def _every_expert(
    x: Array, params: ExpertParameters, gates: Array, activation: Callable[..., Any]
) -> Array:
    """Σ_i gates_i e_i(x), one expert after the other on all rows."""

    def add(total: Array, of_expert: tuple[ExpertParameters, Array]) -> tuple[Array, None]:
        expert, gate = of_expert
        return total + gate[:, None] * _expert(x, expert, activation), None

    zeros = jnp.zeros(x.shape, compute_dtype(x))
    return jax.lax.scan(add, zeros, (params, gates.T.astype(zeros.dtype)))[0].astype(x.dtype)


def _dispatched(
    x: Array,
    params: ExpertParameters,
    dispatch: Array,
    combine: Array,
    activation: Callable[..., Any],
) -> Array:
    """Σ_i gates_i e_i(x) of groups of tokens, `x [groups, tokens, features]`, each with places of
    its own at each expert: `dispatch` and `combine [groups, tokens, E, capacity]`.

    Where groups and experts are spread over devices, tokens go to their experts' devices and back.
    """

    def place(rows: Array, experts: str | None) -> Array:
        return constrain(rows, experts, "batch", None, None) if len(x) > 1 else rows

    def expert(rows: Array, expert: ExpertParameters) -> Array:
        return _expert(rows.reshape(-1, x.shape[-1]), expert, activation).reshape(rows.shape)

    inputs = place(jnp.einsum("gteb,gtd->egbd", dispatch.astype(x.dtype), x), None)
    outputs = place(jax.vmap(expert)(place(inputs, "expert"), params), "expert")
    y = jnp.einsum(
        "gteb,egbd->gtd",
        combine.astype(x.dtype),
        place(outputs, None),
        preferred_element_type=compute_dtype(x),
    )
    return y.astype(x.dtype)


class _Stack(nnx.Module):
    """The kernels, and biases, of one linear map of every expert."""

    def __init__(
        self,
        num_experts: int,
        sizes: tuple[int, int],
        axes: tuple[str, str],
        init: Initializer,
        use_bias: bool,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        keys = jax.random.split(rngs.params(), num_experts)
        kernel = jax.vmap(lambda key: init(key, sizes, param_dtype))(keys)
        self.kernel = nnx.Param(kernel, axes=("expert", *axes))
        bias = jnp.zeros((num_experts, sizes[1]), param_dtype)
        self.bias = nnx.Param(bias, axes=("expert", axes[1])) if use_bias else None


class _Experts(nnx.Module):
    """Several `MLP`s of one form, their parameters stacked."""

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        num_experts: int,
        activation: Callable[..., Any] = jax.nn.gelu,
        gated: bool = False,
        use_bias: bool = False,
        kernel_init: Initializer = jax.nn.initializers.lecun_normal(),
        output_init: Initializer | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_interval(1, jnp.inf, num_experts=num_experts)

        def stack(inputs: int, outputs: int, axes: tuple[str, str], init: Initializer) -> _Stack:
            return _Stack(num_experts, (inputs, outputs), axes, init, use_bias, param_dtype, rngs)

        self.num_experts = num_experts
        self.activation = activation() if is_module_class(activation) else activation
        self.up = stack(features, hidden, ("embed", "mlp"), kernel_init)
        self.gate = stack(features, hidden, ("embed", "mlp"), kernel_init) if gated else None
        self.down = stack(hidden, features, ("mlp", "embed"), output_init or kernel_init)
        self.dtype = dtype

    def parameters(self) -> ExpertParameters:
        """The experts' weights, as the functions of this file take them."""

        def bias(stack: _Stack | None) -> Array | None:
            return None if stack is None or stack.bias is None else stack.bias[...]

        return ExpertParameters(
            self.up.kernel[...],
            self.down.kernel[...],
            None if self.gate is None else self.gate.kernel[...],
            bias(self.up),
            bias(self.down),
            bias(self.gate),
        )

    def _cast(self, x: Array) -> Array:
        features = self.up.kernel.shape[1]
        if x.shape[-1:] != (features,):
            raise ValueError(f"x must have shape [..., {features}], got {tuple(x.shape)}")
        return x.astype(self.dtype or self.up.kernel.dtype)


class MixtureOfExperts(_Experts):
    """A feed-forward sublayer of E experts, each token computed by the K that its router chooses.

        y = Σ_i g_i e_i(x),   g = TopK(softmax(x W_router + ε))

    with experts e_i of the form of `MLP`. In training each expert has room for

        capacity = ceil(capacity_factor · K · group_size / E)

    tokens of each group, noise ε explores where a key is given, and `auxiliary_loss` is what keeps
    the experts equally busy. In evaluation no token is dropped, and nothing is random or stored.
    `train()` and `eval()` of this or any enclosing module say which it is.

    Args:
      features: size of input and output.
      hidden: size between them, of each expert.
      num_experts: E. Default 4.
      top_k: K in [1, E], experts per token. Default 2.
      capacity_factor: above 0; at E / K nothing can be dropped. Default 1.2.
      group_size: consecutive tokens that compete for places at the experts, a divisor of the number
        of tokens. Default: all of them; then the memory of the dispatch grows with the square of
        the tokens. Where devices share the experts, each must have whole groups.
      activation: an elementwise function of the hidden units, or the class of a module that is one,
        shared by the experts. Default GELU.
      gated: the gated form of `MLP`.
      noise_std: standard deviation of ε, at least 0. Default 1 / E.
      balance_coefficient: weight of the balance loss, at least 0. Default 0.01.
      kernel_init: initializer of the experts' maps that read the input, given the shape of one.
      output_init: of those that write the output; default the same.
      use_bias: add biases to the experts' maps.
      dtype, param_dtype: types to compute in and of the parameters. The router is computed in at
        least float32.
      rngs: source of the `params` key.

    Attributes:
      router: the `Linear` from features to experts.
      auxiliary_loss: an `AuxiliaryLoss`, `balance_coefficient · load_balance_loss` of the newest
        call in training; it has a gradient with respect to the router. Initially 0.
      deterministic: whether this is evaluation. Initially False.

    Raises:
      ValueError: a value out of its range, or an input whose last axis is not `features`.

    Use it in place of `MLP` where parameters are cheap and operations are not; `EnforcedRoutingMoE`
    where the domain of an input says which expert.

    Cost: E times the parameters of `MLP`; in training capacity_factor · K times its work and a
    dispatch of O(group_size²) a group, in evaluation E times its work.

    Example:
      >>> mixture = MixtureOfExperts(4, 8, rngs=nnx.Rngs(0))
      >>> mixture(jnp.ones((2, 3, 4)), key=jax.random.key(0)).shape
      (2, 3, 4)
      >>> bool(mixture.auxiliary_loss[...] > 0.01)
      True

    Reference: Xue, Shi, Wei, Lou, Liu, You, "Go Wider Instead of Deeper", 2021, arXiv:2107.11817.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        num_experts: int = 4,
        top_k: int = 2,
        capacity_factor: float = 1.2,
        group_size: int | None = None,
        activation: Callable[..., Any] = jax.nn.gelu,
        gated: bool = False,
        noise_std: float | None = None,
        balance_coefficient: float = 0.01,
        kernel_init: Initializer = jax.nn.initializers.lecun_normal(),
        output_init: Initializer | None = None,
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            features,
            hidden,
            num_experts=num_experts,
            activation=activation,
            gated=gated,
            use_bias=use_bias,
            kernel_init=kernel_init,
            output_init=output_init,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        check_interval(1, num_experts, top_k=top_k)
        check_interval(0, jnp.inf, closed="neither", capacity_factor=capacity_factor)
        check_interval(0, jnp.inf, balance_coefficient=balance_coefficient)
        if noise_std is not None:
            check_interval(0, jnp.inf, noise_std=noise_std)
        if group_size is not None:
            check_interval(1, jnp.inf, group_size=group_size)
        self.group_size = group_size
        self.top_k, self.capacity_factor, self.noise_std = top_k, capacity_factor, noise_std
        self.balance_coefficient = balance_coefficient
        self.router = Linear(
            features,
            num_experts,
            axes=("embed", None),
            dtype=compute_dtype(jnp.zeros((), param_dtype)),
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.auxiliary_loss = AuxiliaryLoss(jnp.zeros(()), axes=())
        self.deterministic = False

    def __call__(self, x: Array, *, key: Array | None = None) -> Array:
        """Maps `[..., features]` to `[..., features]`; `key` is that of the router's noise."""
        rows = self._cast(x).reshape(-1, x.shape[-1])
        logits, params = self.router(rows), self.parameters()
        if self.deterministic:
            routed = top_k_router(logits, self.top_k)
            y = mixture_of_experts_ffn(rows, params, routed, activation=self.activation)
            return y.reshape(x.shape)
        groups = self._groups(len(rows))

        def route(logits: Array, key: Array | None) -> RouterOutput:
            return top_k_router(
                logits,
                self.top_k,
                key=key,
                noise_std=self.noise_std,
                capacity=self.capacity(len(logits)),
            )

        keys = None if key is None else jax.random.split(key, groups)
        route_all: Any = jax.vmap(route)
        if groups > 1:  # the compiler would gather all probabilities to pick the largest
            route_all = on_shards(route_all, [("batch", None, None), ("batch",)], ("batch",))
        routed = route_all(logits.reshape(groups, -1, self.num_experts), keys)
        balance = load_balance_loss(
            routed.probabilities.reshape(-1, self.num_experts),
            routed.assignment.reshape(-1, self.top_k),
        )
        self.auxiliary_loss[...] = self.balance_coefficient * balance
        y = _dispatched(
            rows.reshape(groups, -1, x.shape[-1]),
            params,
            routed.dispatch,
            routed.combine,
            self.activation,
        )
        return y.reshape(x.shape)

    def _groups(self, tokens: int) -> int:
        size = tokens if self.group_size is None else self.group_size
        if tokens % size:
            raise ValueError(f"group_size must divide the {tokens} tokens, got {size}")
        return tokens // size

    def capacity(self, tokens: int) -> int:
        """Places per expert in training on a group of so many tokens: at least 1, and no more than
        tokens."""
        wanted = self.capacity_factor * self.top_k * tokens / self.num_experts
        return max(1, min(tokens, math.ceil(round(wanted, 6))))  # 1.1 · 10 is a little above 11


class EnforcedRoutingMoE(_Experts):
    """A feed-forward sublayer of N experts, of which the data's domain picks one.

        y_b = e_{a_b}(h_b)

    `from_mlp` makes one of a trained model's sublayer, as N copies of it: the model is the same as
    before until training on the domains tells the copies apart. Attention and norms of the model
    stay shared.

    Args:
      features: size of input and output.
      hidden: size between them, of each expert.
      num_experts: N at least 1, the number of domains.
      activation, gated, use_bias, kernel_init, output_init, dtype, param_dtype, rngs: as for
        `MixtureOfExperts`.

    Raises:
      ValueError: `num_experts` below 1; and as `enforced_routing_mlp` when called.

    Use it to keep one encoder for several domains whose notions of similarity differ; replacing the
    sublayer of the middle layer alone has most of the effect.

    Cost: N times the parameters of `MLP` at its work a token, and a copy of an expert's weights for
    each sequence; N times the work with an assignment by token.

    Example:
      >>> mlp = MLP(4, 8, rngs=nnx.Rngs(0))
      >>> mixture = EnforcedRoutingMoE.from_mlp(mlp, 3)
      >>> hidden = jnp.ones((2, 5, 4))
      >>> bool(jnp.allclose(mixture(hidden, jnp.array([0, 2])), mlp(hidden)))
      True

    Reference: Hallee, Kapur, Patel, Gleghorn, Khomtchouk, "Contrastive Learning and Mixture of
    Experts Enables Precise Vector Embeddings", 2024, arXiv:2401.15713.
    """

    @classmethod
    def from_mlp(cls, mlp: MLP, num_experts: int) -> Self:
        """N copies of a trained `MLP`.

        Args:
          mlp: plain or gated, its maps of the class `Linear`. It shares nothing with the result but
            an activation that is a module.
          num_experts: N at least 1.

        Raises:
          ValueError: `num_experts` below 1.
          TypeError: maps that are not `Linear`.
        """
        for name in ("up", "gate", "down"):
            map_ = getattr(mlp, name)
            if map_ is not None and not isinstance(map_, Linear):
                raise TypeError(f"mlp.{name} must be a Linear, got {type(map_).__name__}")
        features, hidden = mlp.up.kernel.shape
        mixture = cls(
            features,
            hidden,
            num_experts=num_experts,
            activation=mlp.activation,
            gated=mlp.gate is not None,
            use_bias=mlp.up.bias is not None,
            kernel_init=jax.nn.initializers.zeros,
            dtype=mlp.up.dtype,
            param_dtype=mlp.up.kernel.dtype,
            rngs=nnx.Rngs(0),
        )
        for name in ("up", "gate", "down"):
            one, stack = getattr(mlp, name), getattr(mixture, name)
            if one is None:
                continue
            stack.kernel[...] = jnp.broadcast_to(one.kernel[...], stack.kernel.shape)
            if one.bias is not None:
                stack.bias[...] = jnp.broadcast_to(one.bias[...], stack.bias.shape)
        return mixture

    def __call__(self, hidden: Array, assignment: Array) -> Array:
        """Maps `[batch, length, features]` to the same; assignment `[batch]` or
        `[batch, length]`."""
        hidden = self._cast(hidden)
        return enforced_routing_mlp(
            hidden, self.parameters(), assignment, activation=self.activation
        )
