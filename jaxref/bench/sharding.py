"""What rules and modules cost over plain JAX: the main job's step on all devices, by both.

Nothing is run: of the compiled programs it counts what one device computes, moves and sends. The
step by hand is that of `train_step`, whose parameters are placed where the program has them and
whose activations are split by `jax.lax.with_sharding_constraint`. On a machine with a single device
XLA_FLAGS=--xla_force_host_platform_device_count=8 makes eight of its CPU.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from jaxref.bench.harness import Measurement, progress
from jaxref.bench.train_step import VOCABULARY, by_hand
from jaxref.parallel.compiled import collectives, flops, memory_traffic
from jaxref.train.config import load_config
from jaxref.train.program import build

NAME = "sharding"


def run(*, quick: bool = False) -> Iterator[Measurement]:
    """Data parallel, and with sharded parameters."""
    small = ["model.num_layers=1", "length=16"] if quick else []
    rows = f"batch_size={2 * jax.device_count()}"
    for axis in ("data",) if quick else ("data", "fsdp"):
        overrides = [rows, "mesh.data=1", f"mesh.{axis}=-1", *small]
        yield from compare(overrides, f"{axis}={jax.device_count()} {rows}")


def compare(overrides: list[str], case: str) -> Iterator[Measurement]:
    """A device's operations and bytes in the step of this configuration, by both."""
    progress(f"compiling {case}")
    config = load_config(overrides=overrides)
    program = build(config, VOCABULARY)
    state, batch = program.abstract_state, program.abstract_batch
    rows = NamedSharding(program.mesh, PartitionSpec(("data", "fsdp")))

    def spread(x: Array) -> Array:
        return jax.lax.with_sharding_constraint(x, rows)

    optimizer, plain_step = by_hand(config, spread)
    params, everywhere = (
        program.state_shardings.params,
        NamedSharding(program.mesh, PartitionSpec()),
    )
    opt_state = jax.eval_shape(optimizer.init, state.params)
    places = (
        params,
        optax.tree.map_params(
            optimizer,
            lambda _, place: place,
            opt_state,
            params,
            transform_non_params=lambda _: everywhere,
        ),
    )
    plain_step = jax.jit(
        plain_step, donate_argnums=0, in_shardings=(places, None), out_shardings=(places, None)
    )
    step: Any = program.step  # jitted
    compiled = {
        "jaxref": step.lower(state, batch).compile(),
        "plain jax": plain_step.lower((state.params, opt_state), batch).compile(),
    }
    counts: dict[str, Any] = {
        "flops": flops,
        "bytes": memory_traffic,
        "bytes sent": partial(bytes_sent, mesh=program.mesh),
    }
    for metric, count in counts.items():
        ours, theirs = (count(compiled[name]) for name in ("jaxref", "plain jax"))
        yield Measurement(NAME, case, "plain jax", metric, theirs)
        ratio = ours / theirs if theirs else np.nan
        yield Measurement(NAME, case, "jaxref", metric, ours, "plain jax", ratio)


def bytes_sent(compiled: jax.stages.Compiled, mesh: jax.sharding.Mesh) -> float:
    """What a device sends to others."""
    return float(sum(one.sent_bytes * one.times for one in collectives(compiled, mesh)))
