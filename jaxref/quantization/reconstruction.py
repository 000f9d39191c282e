"""What methods share that fit a quantized layer to the outputs of the layer as it was."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_floating, check_interval
from jaxref.core.numerics import compute_dtype
from jaxref.quantization.gptq import check_finite
from jaxref.quantization.packing import pack, values_per_byte
from jaxref.quantization.tensor import QTensor, QuantSpec

LayerFn = Callable[[Array, Array | None, Array], Array]

_EVALUATE_EVERY = 10  # steps; the whole data is seen as often as that


def linear(weight: Array, bias: Array | None, inputs: Array) -> Array:
    """inputs · weight + bias, for a kernel `[in, out]`."""
    outputs = inputs @ weight
    return outputs if bias is None else outputs + bias


def round_straight_through(x: Array) -> Array:
    """round(x), with the gradient of x."""
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def check_spec(**specs: Any) -> None:
    """Raises TypeError unless every value is a `QuantSpec`."""
    for name, spec in specs.items():
        if not isinstance(spec, QuantSpec):
            raise TypeError(f"{name} must be a QuantSpec, got {type(spec).__name__}")


def checked_layer(
    weight: ArrayLike,
    bias: ArrayLike | None,
    inputs: ArrayLike,
    targets: ArrayLike,
    layer_fn: LayerFn,
) -> tuple[Array, Array | None, Array, Array]:
    """The four as arrays of at least float32 that fit together."""
    arrays = {"weight": weight, "inputs": inputs, "targets": targets}
    if bias is not None:
        arrays["bias"] = bias
    check_floating(**arrays)
    wide = {name: jnp.asarray(array).astype(compute_dtype(array)) for name, array in arrays.items()}
    check_finite(**wide)
    shapes = {name: array.shape for name, array in wide.items()}
    if layer_fn is linear:
        if len(shapes["weight"]) != 2:
            raise ValueError(f"weight must have shape [in, out], got {shapes['weight']}")
        if len(shapes["inputs"]) < 2 or shapes["inputs"][-1] != shapes["weight"][0]:
            raise ValueError(
                f"inputs must have shape [examples, ..., {shapes['weight'][0]}], "
                f"got {shapes['inputs']}"
            )
    if not shapes["inputs"] or not shapes["inputs"][0]:
        raise ValueError(f"inputs must have at least one example, got shape {shapes['inputs']}")
    expected = jax.eval_shape(layer_fn, wide["weight"], wide.get("bias"), wide["inputs"]).shape
    if shapes["targets"] != expected:
        raise ValueError(f"targets must have shape {expected}, got {shapes['targets']}")
    return wide["weight"], wide.get("bias"), wide["inputs"], wide["targets"]


def as_qtensor(
    codes: Array, scale: Array, zero_point: Array | None, spec: QuantSpec, dtype: Any
) -> QTensor:
    """Whole numbers within the range of the spec as a `QTensor`."""
    padding = -codes.shape[-1] % values_per_byte(spec.bits) if codes.ndim else 0
    if zero_point is not None:
        zero_point = zero_point.astype(jnp.int8)
    values = pack(codes.astype(jnp.int8), spec.bits)
    return QTensor(values, scale, zero_point, spec, jnp.dtype(dtype), padding)


def random_batches(key: Array, examples: int, batch_size: int, steps: int) -> Array:
    """int32 `[steps, batch_size]`: examples for every step, each of them as likely as any other."""
    return jax.random.randint(key, (steps, batch_size), 0, examples)


def minimize_keeping_best(
    objective: Callable[[Any, Array, Array], Array],
    params: Any,
    learning_rates: Any,
    inputs: Array,
    targets: Array,
    *,
    steps: int,
    batch_size: int,
    key: Array,
    project: Callable[[Any], Any] = lambda params: params,
) -> tuple[Any, Array, Array]:
    """Adam on random batches, and the best of its iterates on all of the data.

    Args:
      objective: `objective(params, inputs, targets)`, a mean over examples.
      params: where to start, a pytree.
      learning_rates: a pytree of numbers like `params`.
      inputs, targets: examples along their first axis.
      steps: how many, at least 0.
      batch_size: examples in each, as `random_batches` draws them.
      key: for the batches.
      project: brings params back to where they may be, after each step.

    Returns:
      The params with the least objective on all examples, among the start, every tenth step and
      the last; that objective; and the one at the start.
    """
    adam = optax.scale_by_adam()

    def step(carry: Any, index_and_batch: tuple[Array, Array]) -> tuple[Any, None]:
        params, state, best, least = carry
        index, batch = index_and_batch
        gradient = jax.grad(objective)(params, inputs[batch], targets[batch])
        updates, state = adam.update(gradient, state)
        params = project(jax.tree.map(lambda p, u, r: p - r * u, params, updates, learning_rates))
        is_due = (index % _EVALUATE_EVERY == _EVALUATE_EVERY - 1) | (index == steps - 1)
        value = jax.lax.cond(
            is_due,
            lambda params: objective(params, inputs, targets),
            lambda _: jnp.full_like(least, jnp.inf),
            params,
        )
        is_better = value < least  # never if the objective is NaN
        new, old = (params, value), (best, least)
        best, least = jax.tree.map(lambda a, b: jnp.where(is_better, a, b), new, old)
        return (params, state, best, least), None

    start = objective(params, inputs, targets)
    carry = (params, adam.init(params), params, start)
    batches = random_batches(key, inputs.shape[0], batch_size, steps)
    (_, _, best, least), _ = jax.lax.scan(step, carry, (jnp.arange(steps), batches))
    return best, least, start


def check_steps(**counts: Any) -> None:
    """Raises unless every value is an int, at least 0 for `steps` and 1 for all others."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int | np.integer):
            raise TypeError(f"{name} must be an int, got {count!r}")
        values: dict[str, Any] = {name: count}
        check_interval(0 if name == "steps" else 1, jnp.inf, **values)
