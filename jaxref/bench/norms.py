"""The norms against flax.nnx.LayerNorm, in transformers against pre-LN, and deep ones' compilation.

Three questions: how long a norm takes forward and backward, alone; what a transformer gains from
RMS norms, in training and, converted, in inference; and whether a model of scanned layers takes
longer to compile where it is deeper.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from jaxref import norms
from jaxref.bench.harness import Measurement, compiled_cost, interleave, progress, ratios
from jaxref.kernels import linear_softmax_cross_entropy
from jaxref.models import (
    Transformer,
    TransformerConfig,
    pre_ln_to_pre_rms,
    pre_rms_to_pre_crms,
)
from jaxref.nn import GradientState, Norm

NAME = "norms"
PEER = "flax.nnx.LayerNorm"
NORMS: dict[str, Callable[..., Any]] = {
    "layer_norm": norms.layer_norm,
    "rms_norm": norms.rms_norm,
    "compressed_rms_norm": norms.compressed_rms_norm,
    "group_norm": norms.group_norm,
    "power_norm": norms.power_norm,
    "power_norm_v": norms.power_norm_v,
    "unified_norm": norms.unified_norm,
    "batch_norm": norms.batch_norm,
    "ghost_batch_norm": partial(norms.ghost_batch_norm, ghost_batch_size=16),
    "estimated_batch_norm": partial(norms.estimated_batch_norm, rate=0.1),
    "batch_channel_norm": norms.batch_channel_norm,
    "evonorm_s0": norms.evonorm_s0,
    "evonorm_s1": norms.evonorm_s1,
    "evonorm_s2": norms.evonorm_s2,
    "evonorm_b0": norms.evonorm_b0,
    "evonorm_b1": norms.evonorm_b1,
    "evonorm_b2": norms.evonorm_b2,
}
MODEL = TransformerConfig(  # the main job's, with twice its layers
    vocab_size=256,
    max_length=128,
    num_layers=4,
    features=192,
    num_heads=3,
    head_dim=64,
    mlp_features=512,
    norm=norms.layer_norm,
    query_key_norm=norms.rms_norm,
    activation=jax.nn.silu,
    gated=True,
)


def run(
    *, quick: bool = False, repeats: int = 10, model_repeats: int = 40, only: str = ""
) -> Iterator[Measurement]:
    """`repeats` rounds of each norm, `model_repeats` of the models; `only`: norms, by commas."""
    if quick:
        repeats = model_repeats = 2
    shape = (16, 8, 64) if quick else (64, 512, 768)
    yield from alone(shape, only.split(",") if only else list(NORMS), repeats=repeats)
    config, batch = MODEL, 16
    if quick:
        config, batch = dataclasses.replace(MODEL, num_layers=1, max_length=16), 2
    yield from in_training(config, batch=batch, repeats=model_repeats)
    yield from in_inference(config, batch=batch, repeats=model_repeats)
    depths = (2, 4) if quick else (4, 48)
    yield from compilation(*depths, repeats=1 if quick else 3)


def alone(shape: tuple[int, int, int], names: list[str], *, repeats: int) -> Iterator[Measurement]:
    """Each norm's value and gradients, of a weighted sum of its output."""
    batch, length, features = shape
    case = f"batch={batch} length={length} features={features} float32"
    rng = np.random.default_rng(0)
    x, weights = (jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(2))
    modules: dict[str, Any] = {PEER: nnx.LayerNorm(features, rngs=nnx.Rngs(0))}
    modules |= {name: Norm(NORMS[name], features) for name in names}
    steps = {name: differentiated(module) for name, module in modules.items()}
    if "layer_norm" in names:
        (_, ours), (_, theirs) = (steps[name](x, weights) for name in ("layer_norm", PEER))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), ours[1], theirs[1])
        del ours, theirs
    progress(case)
    bytes_moved = {name: compiled_cost(step, x, weights).bytes for name, step in steps.items()}
    times = interleave(
        {name: partial(step, x, weights) for name, step in steps.items()}, repeats=repeats, warmup=1
    )
    for name in modules:
        seconds = statistics.median(times[name])
        if name == PEER:
            yield Measurement(NAME, case, name, "seconds", seconds)
            yield Measurement(NAME, case, name, "bytes", bytes_moved[name])
            continue
        ratio = ratios(times, name, PEER)
        yield Measurement(NAME, case, name, "seconds", seconds, PEER, ratio)
        ratio = bytes_moved[name] / bytes_moved[PEER]
        yield Measurement(NAME, case, name, "bytes", bytes_moved[name], PEER, ratio)


def differentiated(module: Any) -> jax.stages.Wrapped:
    """`step(x, weights)`: the sum of weights · module(x), its gradients, and new statistics."""
    graphdef, *variables = nnx.split(module, (nnx.Param, GradientState), ...)
    learned, statistics = map(nnx.to_pure_dict, variables)

    def total(learned: Any, x: Array, weights: Array) -> tuple[Array, Any]:
        norm = nnx.merge(graphdef, learned, statistics)
        value = jnp.sum(weights * norm(x))
        return value, nnx.state(norm, nnx.BatchStat)

    gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    return jax.jit(partial(gradients, learned))


def in_training(config: TransformerConfig, *, batch: int, repeats: int) -> Iterator[Measurement]:
    """Loss and gradients of transformers that differ in their norms only."""
    case = f"training layers={config.num_layers} features={config.features} batch={batch}"
    progress(case)
    tokens = random_tokens(config, batch, config.max_length + 1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].reshape(-1)

    def step(norm: Callable[..., Any]) -> Callable[[], Any]:
        model = dataclasses.replace(config, norm=norm).build(rngs=nnx.Rngs(0))
        graphdef, params = split(model)

        def loss(params: Any, inputs: Array, targets: Array) -> Array:
            model = nnx.merge(graphdef, params)
            hidden = model.hidden(inputs).reshape(-1, config.features)
            return linear_softmax_cross_entropy(hidden, model.output_kernel(), targets).mean()

        return partial(jax.jit(jax.value_and_grad(loss)), params, inputs, targets)

    calls = {"pre-LN": step(norms.layer_norm), "pre-RMS": step(norms.rms_norm)}
    yield from compared(case, calls, "pre-LN", repeats=repeats)


def in_inference(config: TransformerConfig, *, batch: int, repeats: int) -> Iterator[Measurement]:
    """Logits of a pre-LN transformer and of what it is converted to.

    The compressed model comes from one with a feature more, so that all have streams of one width.
    """
    case = f"inference layers={config.num_layers} features={config.features} batch={batch}"
    progress(case)
    tokens = random_tokens(config, batch, config.max_length)
    wider = dataclasses.replace(config, features=config.features + 1).build(rngs=nnx.Rngs(0))
    model = config.build(rngs=nnx.Rngs(0))
    models = {
        "pre-LN": model,
        "pre-RMS": pre_ln_to_pre_rms(model),
        "pre-CRMS": pre_rms_to_pre_crms(pre_ln_to_pre_rms(wider)),
    }

    def logits(model: Transformer) -> Callable[[], Any]:
        graphdef, params = split(model)
        call = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))
        return partial(call, params, tokens)

    calls = {name: logits(model) for name, model in models.items()}
    for name, expected in (("pre-RMS", calls["pre-LN"]), ("pre-CRMS", logits(wider))):
        np.testing.assert_allclose(calls[name](), expected(), rtol=1e-3, atol=1e-3, err_msg=name)
    yield from compared(case, calls, "pre-LN", repeats=repeats)


def compilation(shallow: int, deep: int, *, repeats: int) -> Iterator[Measurement]:
    """The time to trace and compile a training step whose layers are scanned, at two depths."""
    config = dataclasses.replace(
        MODEL, features=32, num_heads=2, head_dim=16, mlp_features=64, scan_layers=True
    )
    case = f"compilation of a scanned training step, features={config.features}"
    progress(case)

    def compile_step(depth: int) -> None:
        deeper = dataclasses.replace(config, num_layers=depth)
        graphdef, params = split(nnx.eval_shape(lambda: deeper.build(rngs=nnx.Rngs(0))))
        optimizer = optax.adamw(1e-3)

        def step(params: Any, opt_state: Any, tokens: Array) -> Any:
            def loss(params: Any) -> Array:
                model = nnx.merge(graphdef, params)
                hidden = model.hidden(tokens[:, :-1]).reshape(-1, config.features)
                kernel, labels = model.output_kernel(), tokens[:, 1:].reshape(-1)
                return linear_softmax_cross_entropy(hidden, kernel, labels).mean()

            value, gradient = jax.value_and_grad(loss)(params)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, value

        tokens = jax.ShapeDtypeStruct((8, config.max_length + 1), jnp.int32)
        opt_state = jax.eval_shape(optimizer.init, params)
        jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, tokens).compile()

    calls = {f"{depth} layers": partial(compile_step, depth) for depth in (shallow, deep)}
    yield from compared(
        case, calls, f"{shallow} layers", metric="compile seconds", repeats=repeats, warmup=1
    )


def compared(
    case: str,
    calls: Mapping[str, Callable[[], Any]],
    peer: str,
    *,
    metric: str = "seconds",
    repeats: int,
    warmup: int = 2,
) -> Iterator[Measurement]:
    """The times of all calls, and their ratios to that of the peer."""
    times = interleave(calls, repeats=repeats, warmup=warmup)
    for name, seconds in times.items():
        value = statistics.median(seconds)
        if name == peer:
            yield Measurement(NAME, case, name, metric, value)
        else:
            ratio = ratios(times, name, peer)
            yield Measurement(NAME, case, name, metric, value, peer, ratio)


def split(model: Transformer) -> tuple[nnx.GraphDef, Any]:
    """The model without its parameters, and these as dictionaries, which are quick to flatten."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def random_tokens(config: TransformerConfig, batch: int, length: int) -> Array:
    """Integers `[batch, length]` below the size of the vocabulary."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(config.vocab_size, size=(batch, length)), jnp.int32)
