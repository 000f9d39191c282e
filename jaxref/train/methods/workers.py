"""Devices that exchange less than their gradients: compressed ones, or a byte."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxref import optimizers
from jaxref.core.checks import check_interval
from jaxref.parallel import mapped_over
from jaxref.train.methods.frame import (
    Batch,
    Method,
    Outcome,
    Params,
    Problem,
    Transformation,
    clipped,
    descended,
    on_each_device,
)


def ef21(
    learning_rate: optax.Schedule,
    *,
    clip_norm: float,
    mesh: Mesh,
    base: Transformation = optimizers.adamw,
    compressor: Callable[[], optimizers.Compressor] = partial(optimizers.top_k_compressor, 0.1),
    seed: int = 0,
) -> Method:
    """EF21: the devices along the axis "data" exchange compressed differences of gradients.

    Each index of the axis is a client: where "data" is the network between slices, a slice, within
    which parameters and gradients are sharded as ever. A client's devices each compress the part of
    a parameter that they have.

    Args:
      learning_rate, clip_norm, mesh: the program's.
      base: the optimizer that descends along the estimate of the gradient. Default `adamw`.
      compressor: what makes the compressor, a component. Default the largest tenth of each leaf.
      seed: of a compressor that draws random numbers. Default 0.

    Returns:
      The `Method`.

    `jaxref.optimizers.ef21_gradient` says more.
    """
    return _error_feedback(
        optimizers.ef21_gradient, learning_rate, clip_norm, mesh, base, compressor, seed
    )


def ef14(
    learning_rate: optax.Schedule,
    *,
    clip_norm: float,
    mesh: Mesh,
    base: Transformation = optimizers.adamw,
    compressor: Callable[[], optimizers.Compressor] = partial(optimizers.top_k_compressor, 0.1),
    seed: int = 0,
) -> Method:
    """The classical error feedback, otherwise as `ef21`.

    Args:
      learning_rate, clip_norm, mesh, base, compressor, seed: as for `ef21`.

    Returns:
      The `Method`.
    """
    return _error_feedback(
        optimizers.ef14_gradient, learning_rate, clip_norm, mesh, base, compressor, seed
    )


def _error_feedback(
    estimate: Transformation,
    learning_rate: optax.Schedule,
    clip_norm: float,
    mesh: Mesh,
    base: Transformation,
    compressor: Callable[[], optimizers.Compressor],
    seed: int,
) -> Method:
    clients = mesh.shape["data"]
    estimated = estimate(
        compressor(), axis_name="data", num_clients=clients, key=jax.random.key(seed)
    )
    optimizer = clipped(base(learning_rate=learning_rate), clip_norm)

    def init(params: Params) -> Any:
        return estimated.init(params), optimizer.init(params)

    def update(
        problem: Problem, params: Params, state: Any, batch: Batch, key: Array, step: Array
    ) -> Outcome:
        del step
        value_and_grad = problem.averaged(problem.loss_and_gradient)

        def of_client(batch: Batch, key: Array) -> Any:
            with mapped_over("data"):
                return value_and_grad(params, batch, key)

        batches = jax.tree.map(lambda x: x.reshape(clients, -1, *x.shape[1:]), batch)
        keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(clients))
        values, gradients = jax.vmap(of_client, spmd_axis_name="data")(batches, keys)

        def exchange(gradients: Params, state: Any) -> Any:
            return estimated.update(jax.tree.map(lambda x: x[0], gradients), state)

        # Every device compresses its part of a parameter, and sends it to those of other clients.
        specs = jax.tree.map(lambda sharding: sharding.spec, problem.shardings)
        of_clients, of_state = _over_clients(specs), _state_specs(state[0], specs)
        exchange_on_each = jax.shard_map(
            exchange, mesh=mesh, in_specs=(of_clients, of_state), out_specs=(specs, of_state)
        )
        gradient, estimate_state = exchange_on_each(gradients, state[0])
        outcome = descended(optimizer, params, state[1], jnp.mean(values), gradient)
        return outcome._replace(
            state=(estimate_state, outcome.state),
            gradient_norm=optax.global_norm(gradients) / clients**0.5,
        )

    def shardings(state: Any, params: Params, default: Any) -> Any:
        specs = _state_specs(state[0], jax.tree.map(lambda sharding: sharding.spec, params))
        return jax.tree.map(partial(NamedSharding, mesh), specs), default[1]

    return Method(init, update, shardings)


def _over_clients(specs: Any) -> Any:
    """Specs of arrays like the parameters with a leading axis of clients."""
    return jax.tree.map(lambda spec: PartitionSpec("data", *spec), specs)


def _state_specs(state: Any, specs: Any) -> Any:
    """Specs of an `ErrorFeedbackState`."""
    return state._replace(
        count=PartitionSpec(),
        client=_over_clients(specs),
        server=None if state.server is None else specs,
        key=None if state.key is None else PartitionSpec(),
    )


def spsa(
    learning_rate: optax.Schedule,
    *,
    mesh: Mesh,
    num_samples: int = 1,
    epsilon: float = 1e-3,
    seed: int = 0,
) -> Method:
    """Zeroth-order training: the devices along "data" exchange one byte per perturbation.

    Args:
      learning_rate, mesh: the program's.
      num_samples: perturbations a step on each device, each on a share of its rows. Default 1.
      epsilon: the size of a perturbation, above 0. Default 1e-3.
      seed: of the perturbations. Default 0.

    Returns:
      The `Method`.

    Raises:
      ValueError: `num_samples` below 1; when a step is traced, one that does not divide the rows of
        a device and micro-batch, or a mesh that splits anything else besides the batch over "data".

    `jaxref.optimizers.decentralized_spsa_step` says more.
    """
    check_interval(1, jnp.inf, num_samples=num_samples)
    axis_name = "data" if mesh.shape["data"] > 1 else None  # else the one machine may be sharded

    def update(
        problem: Problem, params: Params, state: Any, batch: Batch, key: Array, step: Array
    ) -> Outcome:
        def walk(params: Params, batch: Batch, key: Array, step: Array) -> Any:
            if axis_name:
                key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
            rows = len(batch["ids"])
            if rows % (num_samples * problem.accumulate):
                raise ValueError(
                    f"num_samples must divide the {rows // problem.accumulate} rows of a device"
                    f" and micro-batch, got {num_samples}"
                )
            shares = jax.tree.map(lambda x: x.reshape(num_samples, -1, *x.shape[1:]), batch)
            keys = jax.random.split(key, num_samples)
            mean_loss = problem.averaged(problem.loss)
            params, info = optimizers.decentralized_spsa_step(
                lambda params, share: mean_loss(params, *share),
                params,
                (shares, keys),
                base_key=jax.random.key(seed),
                step=step,
                learning_rate=learning_rate,
                epsilon=epsilon,
                axis_name=axis_name,
            )
            value = jnp.mean(info.losses)
            return params, jax.lax.pmean(value, axis_name) if axis_name else value, info.codes

        if axis_name:
            everywhere = PartitionSpec()
            walk = on_each_device(
                mesh, walk, (everywhere, PartitionSpec("data"), everywhere, everywhere), everywhere
            )
        params, value, codes = walk(params, batch, key, step)
        slopes = optimizers.decode_projected_gradient(codes)
        return Outcome(params, state, value, jnp.sqrt(jnp.mean(slopes**2)))

    return Method(lambda params: (), update)
