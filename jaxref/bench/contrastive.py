"""Sigmoid against softmax contrastive loss: time and memory by batch, on one device and on a ring.

Values and gradients of both losses, with 64 features. First all pairs of a batch on one device, and
the same batch over all devices: gathered (softmax) and round a ring (both). Then a batch that grows
with the number of devices: what a device needs beside its embeddings should stay what it is. On a
machine with a single device XLA_FLAGS=--xla_force_host_platform_device_count=8 makes eight of its
CPU, which share its cores: their memory is told apart, their times are not. What would take more
than half of the host's memory is compiled and not run.
"""

import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxref import losses
from jaxref.bench.harness import Measurement, interleave, progress, ratios

NAME = "contrastive"
PEER = "softmax, ring"
FEATURES = 64
ROWS = PartitionSpec("data")


def run(
    *, quick: bool = False, repeats: int = 3, largest: int = 32768, rows: int = 2048
) -> Iterator[Measurement]:
    """Batches of 1024, 4096, ... up to `largest`; then `rows` on each of 1, 2, 4, ... devices."""
    if quick:
        repeats, largest, rows = 1, 1024, 128
    sigmoid = partial(losses.sigmoid_contrastive_loss, bias=-10.0)
    softmax = losses.softmax_contrastive_loss
    everywhere = _mesh(jax.device_count())
    forms: dict[str, Callable[..., Array]] = {
        "softmax, one device": softmax,
        "sigmoid, one device": sigmoid,
        "softmax, gathered": _spread(softmax, everywhere),
        PEER: _spread(partial(softmax, ring=True), everywhere),
        "sigmoid, ring": _spread(sigmoid, everywhere),
    }
    batch = 1024
    while batch <= largest:
        yield from _compared(batch, forms, everywhere, repeats=repeats)
        batch *= 4 if 4 * batch <= largest or batch == largest else largest // batch
    yield from _growing(rows, sigmoid, softmax)


def _compared(
    batch: int, forms: Mapping[str, Callable[..., Array]], mesh: Mesh, *, repeats: int
) -> Iterator[Measurement]:
    """Time and temporary memory of each form on the same batch."""
    case = f"batch={batch} features={FEATURES} devices={mesh.size}"
    progress(case)
    calls, memory = {}, {}
    for name, form in forms.items():
        where = None if name.endswith("one device") else NamedSharding(mesh, ROWS)
        arguments = [jax.device_put(x, where) for x in _embeddings(batch)]
        compiled = _gradient(form).lower(*arguments).compile()
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
        if memory[name] * (1 if where is None else mesh.size) < _host_memory() / 2:
            calls[name] = partial(compiled, *arguments)
    seconds = interleave(calls, repeats=repeats, warmup=1)
    for name in forms:
        peer = None if name == PEER else PEER
        if name in seconds:
            ratio = None if peer is None else ratios(seconds, name, peer)
            median = statistics.median(seconds[name])
            yield Measurement(NAME, case, name, "seconds", median, peer, ratio)
        share = None if peer is None else memory[name] / memory[peer]
        yield Measurement(NAME, case, name, "temporary bytes", memory[name], peer, share)


def _host_memory() -> float:
    """Bytes of it where the devices are the CPU's; else no limit, as every device has its own."""
    if jax.default_backend() != "cpu":
        return np.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _growing(rows: int, sigmoid: Any, softmax: Any) -> Iterator[Measurement]:
    """What a device needs where each has as many rows, on more and more of them."""
    devices = 1
    while devices <= jax.device_count():
        mesh = _mesh(devices)
        case = f"rows={rows} on each of {devices}"
        progress(case)
        arguments = [
            jax.ShapeDtypeStruct(
                (devices * rows, FEATURES), jnp.float32, sharding=NamedSharding(mesh, ROWS)
            )
        ] * 2
        for name, form in {
            "softmax, gathered": softmax,
            "softmax, ring": partial(softmax, ring=True),
            "sigmoid, ring": sigmoid,
        }.items():
            compiled = _gradient(_spread(form, mesh)).lower(*arguments).compile()
            needed = compiled.memory_analysis().temp_size_in_bytes
            yield Measurement(NAME, case, name, "temporary bytes", needed)
        devices *= 2


def _mesh(devices: int) -> Mesh:
    return jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])


def _spread(loss: Callable[..., Array], mesh: Mesh) -> Callable[..., Array]:
    """The loss with the batch over the mesh's devices."""

    def sharded(image: Array, text: Array, log_temperature: float) -> Array:
        return jax.shard_map(
            partial(loss, log_temperature=log_temperature, axis_name="data"),
            mesh=mesh,
            in_specs=ROWS,
            out_specs=ROWS,
        )(image, text)

    return sharded


def _gradient(loss: Callable[..., Array]) -> Any:
    def mean(image: Array, text: Array) -> Array:
        return jnp.mean(loss(image, text, log_temperature=np.log(10.0)))

    return jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))


def _embeddings(batch: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(batch, FEATURES)).astype(np.float32)
    return image, image + rng.normal(size=image.shape).astype(np.float32)
