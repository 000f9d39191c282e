"""The main job's training step against the same step written by hand, and in PyTorch.

All three are the model, loss, clipping and optimizer of jaxref/train/configs/default.py. The step
by hand is plain JAX, without modules, configuration or sharding rules: what they cost is the ratio
of the two, in time, and in the flops and bytes that the compiler counts. PyTorch runs eagerly, with
its fused attention, norms, cross-entropy and optimizer, on as many threads as XLA.
"""

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxref.attention import dot_product_attention, rotary_embedding
from jaxref.bench.harness import (
    Measurement,
    compiled_cost,
    interleave,
    optional_peer,
    progress,
    ratios,
)
from jaxref.kernels import linear_softmax_cross_entropy
from jaxref.train.components import build_schedule
from jaxref.train.config import load_config
from jaxref.train.program import build

NAME = "train_step"
VOCABULARY = 256


def run(*, quick: bool = False, repeats: int = 10, steps: int = 8) -> Iterator[Measurement]:
    """Rounds of `steps` steps each, `repeats` of them, after checking that the losses agree."""
    overrides = ["model.num_layers=1", "batch_size=8", "length=16"] if quick else []
    config = load_config(overrides=overrides)
    if quick:
        repeats, steps = 2, 1
    case = f"default batch={config.batch_size} length={config.length}"
    progress(f"compiling {case}")
    program = build(config, VOCABULARY)
    state = program.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    shape = (config.batch_size, config.length + 1)
    tokens = rng.integers(0, VOCABULARY, shape, np.int32)
    batch = program.put({"inputs": tokens[:, :-1], "targets": tokens[:, 1:]})

    optimizer, plain_step = by_hand(config)
    plain_step = jax.jit(plain_step, donate_argnums=0)
    params = jax.tree.map(jnp.copy, state.params)
    plain_state = (params, optimizer.init(params))
    costs = {
        "jaxref": compiled_cost(program.step, state, batch),
        "plain jax": compiled_cost(plain_step, plain_state, batch),
    }
    torch_run = None
    if optional_peer("torch"):
        torch_run = in_pytorch(config, params, tokens)

    runs = {
        "jaxref": Runner(program.step, state, batch),
        "plain jax": Runner(plain_step, plain_state, batch),
    }
    losses = {name: [run(1) for _ in range(3)] for name, run in runs.items()}
    if torch_run is not None:
        losses["pytorch"] = [torch_run(1) for _ in range(3)]
    for name, values in losses.items():
        np.testing.assert_allclose(values, losses["jaxref"], rtol=2e-3, err_msg=name)

    functions: dict[str, Callable[[], Any]] = {n: partial(r, steps) for n, r in runs.items()}
    if torch_run is not None:
        functions["pytorch"] = partial(torch_run, steps)
    seconds = interleave(functions, repeats=repeats, pause=0.0 if quick else 0.3)
    for peer in functions:
        ratio = None if peer == "jaxref" else ratios(seconds, "jaxref", peer)
        value = statistics.median(seconds[peer]) / steps
        yield Measurement(NAME, case, peer, "seconds", value)
        yield Measurement(
            NAME, case, peer, "tokens_per_second", config.batch_size * config.length / value
        )
        if ratio is not None:
            ours = statistics.median(seconds["jaxref"]) / steps
            yield Measurement(NAME, case, "jaxref", "seconds", ours, peer, ratio)
            rate = config.batch_size * config.length / ours
            yield Measurement(NAME, case, "jaxref", "tokens_per_second", rate, peer, 1 / ratio)
    for metric in ("flops", "bytes", "temporary_bytes"):
        ours, theirs = (getattr(costs[name], metric) for name in ("jaxref", "plain jax"))
        yield Measurement(NAME, case, "plain jax", metric.replace("_", " "), theirs)
        yield Measurement(
            NAME, case, "jaxref", metric.replace("_", " "), ours, "plain jax", ours / theirs
        )


class Runner:
    """Calls `step(state, batch)` a number of times, from where the last call ended."""

    def __init__(self, step: Callable[..., Any], state: Any, batch: dict[str, Array]):
        self.step, self.state, self.batch = step, state, batch

    def __call__(self, steps: int) -> float:
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready(self.state)
        return float(metrics[0])


def by_hand(
    config: Any, spread: Callable[[Array], Array] = lambda x: x
) -> tuple[optax.GradientTransformation, Callable[..., Any]]:
    """The optimizer and the step of the default configuration, in plain JAX.

    `spread` says where activations with leading rows are.
    """
    model = config.model
    epsilon, heads = 1e-6, model.num_heads
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            build_schedule(config),
            b2=config.optimizer.b2,
            weight_decay=config.optimizer.weight_decay,
        ),
    )

    def norm(x: Array, p: Any) -> Array:
        return x * (1 / jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + epsilon)) * p["scale"]

    def dense(x: Array, kernel: Array) -> Array:
        return x @ kernel.reshape(x.shape[-1], -1)

    def attend(x: Array, p: Any, batch: int) -> Array:
        project = lambda name: dense(x, p[name]["kernel"]).reshape(  # noqa: E731
            batch, -1, heads, model.features // heads
        )
        query, key, value = project("query"), project("key"), project("value")
        query, key = norm(query, p["query_norm"]), norm(key, p["key_norm"])
        query, key = rotary_embedding(query), rotary_embedding(key)
        y = dot_product_attention(query, key, value, is_causal=True)
        return y.reshape(x.shape) @ p["output"]["kernel"].reshape(x.shape[-1], -1)

    def loss(params: Any, batch: dict[str, Array]) -> Array:
        rows = batch["inputs"].shape[0]
        x = spread(jnp.take(params["embed"]["embedding"], batch["inputs"].reshape(-1), axis=0))
        for layer in range(model.num_layers):
            attention, mlp = params["blocks"][layer]["attention"], params["blocks"][layer]["mlp"]
            y = norm(x, attention["input_norm"])
            x = spread(x + attend(y, attention["function"], rows))
            y = norm(x, mlp["input_norm"])
            kernel = {name: p["kernel"] for name, p in mlp["function"].items()}
            y = jax.nn.silu(dense(y, kernel["gate"])) * dense(y, kernel["up"])
            x = spread(x + dense(y, kernel["down"]))
        hidden, kernel = norm(x, params["final_norm"]), params["output"]["kernel"]
        return linear_softmax_cross_entropy(hidden, kernel, batch["targets"].reshape(-1)).mean()

    def step(state: Any, batch: dict[str, Array]) -> Any:
        params, opt_state = state
        value, gradient = jax.value_and_grad(loss)(params, batch)
        size = optax.global_norm(gradient)
        updates, new_opt_state = optimizer.update(gradient, opt_state, params)
        new = optax.apply_updates(params, updates), new_opt_state
        finite = jnp.isfinite(size) & jnp.isfinite(value)
        return jax.tree.map(partial(jnp.where, finite), new, state), (value, size)

    return optimizer, step


def in_pytorch(config: Any, params: Any, tokens: np.ndarray) -> Callable[[int], float]:
    """A function that takes a number of steps of the same training in eager PyTorch."""
    import os

    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model, epsilon = config.model, 1e-6
    heads, width = model.num_heads, model.features // model.num_heads
    frequencies = 10000.0 ** (-np.arange(width // 2) / (width // 2))
    angles = np.arange(config.length)[:, None] * frequencies
    cos = torch.tensor(np.cos(angles), dtype=torch.float32)
    sin = torch.tensor(np.sin(angles), dtype=torch.float32)

    def tensor(array: Array, inputs: int) -> torch.Tensor:
        matrix = np.asarray(array).reshape(inputs, -1).T
        return nn.Parameter(torch.tensor(np.ascontiguousarray(matrix)))

    def vector(p: Any) -> torch.Tensor:
        return nn.Parameter(torch.tensor(np.asarray(p["scale"])))

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)

    class Block(nn.Module):
        def __init__(self, p: Any):
            super().__init__()
            attention, mlp = p["attention"]["function"], p["mlp"]["function"]
            self.norm1, self.norm2 = (
                vector(p[name]["input_norm"]) for name in ("attention", "mlp")
            )
            kernels = [attention[name]["kernel"] for name in ("query", "key", "value")]
            self.qkv = nn.Parameter(torch.cat([tensor(k, model.features).data for k in kernels]))
            self.query_norm, self.key_norm = (
                vector(attention[name]) for name in ("query_norm", "key_norm")
            )
            self.output = tensor(attention["output"]["kernel"], model.features)
            kernels = [mlp[name]["kernel"] for name in ("gate", "up")]
            self.gate_up = nn.Parameter(
                torch.cat([tensor(k, model.features).data for k in kernels])
            )
            self.down = tensor(mlp["down"]["kernel"], model.mlp_features)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, length, features = x.shape
            y = F.linear(F.rms_norm(x, (features,), self.norm1, epsilon), self.qkv)
            q, k, v = y.view(batch, length, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
            q = rotate(F.rms_norm(q, (width,), self.query_norm, epsilon))
            k = rotate(F.rms_norm(k, (width,), self.key_norm, epsilon))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + F.linear(y.transpose(1, 2).reshape(x.shape), self.output)
            y = F.linear(F.rms_norm(x, (features,), self.norm2, epsilon), self.gate_up)
            gate, up = y.chunk(2, -1)
            return x + F.linear(F.silu(gate) * up, self.down)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Parameter(torch.tensor(np.asarray(params["embed"]["embedding"])))
            self.blocks = nn.ModuleList(Block(params["blocks"][i]) for i in range(model.num_layers))
            self.norm = vector(params["final_norm"])
            self.output = tensor(params["output"]["kernel"], model.features)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = F.embedding(ids, self.embed)
            for block in self.blocks:
                x = block(x)
            x = F.rms_norm(x, (model.features,), self.norm, epsilon)
            return F.linear(x, self.output)

    module = Model()
    weights = list(module.parameters())
    schedule, options = build_schedule(config), config.optimizer
    optimizer = torch.optim.AdamW(
        weights, betas=(0.9, options.b2), weight_decay=options.weight_decay, fused=True
    )
    ids = torch.tensor(tokens, dtype=torch.long)
    inputs, targets = ids[:, :-1], ids[:, 1:].reshape(-1)
    taken = 0

    def run(steps: int) -> float:
        nonlocal taken
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(module(inputs).view(-1, VOCABULARY), targets)
            loss.backward()
            nn.utils.clip_grad_norm_(weights, config.clip_norm)
            optimizer.param_groups[0]["lr"] = float(schedule(taken))
            optimizer.step()
            value = loss.item()
            taken += 1
        return value

    return run
