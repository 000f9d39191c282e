"""Greedy generation with either cache, against computing all again and against PyTorch.

A prompt of a few tokens is continued to the model's last position: by `jaxref.models.generate`
with the full cache and with the staircase; by a plain jitted loop that reads the whole window at
each step; and by the same model in eager PyTorch with keys and values remembered. The seconds are
those of a token for each sequence of the batch, the prompt's share included.
"""

import dataclasses
import os
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxref.bench.harness import Measurement, interleave, optional_peer, progress, ratios
from jaxref.models import Transformer, TransformerConfig, generate
from jaxref.norms import rms_norm

NAME = "generate"
PROMPT = 4
MAIN_JOB = TransformerConfig(
    vocab_size=256,
    max_length=128,
    num_layers=2,
    features=192,
    num_heads=3,
    mlp_features=512,
    query_key_norm=rms_norm,
    activation=jax.nn.silu,
    gated=True,
)
LARGER = dataclasses.replace(
    MAIN_JOB, max_length=256, num_layers=6, features=384, num_heads=6, mlp_features=1024
)


def run(*, quick: bool = False, repeats: int = 5) -> Iterator[Measurement]:
    """`repeats` rounds for each of two sizes and of the batches 1 and 8."""
    configs = [MAIN_JOB, LARGER]
    if quick:
        small = dataclasses.replace(
            MAIN_JOB, max_length=16, num_layers=1, features=32, num_heads=2, mlp_features=64
        )
        repeats, configs = 2, [small]
    for config in configs:
        model = config.build(rngs=nnx.Rngs(0))
        for batch in (2,) if quick else (1, 8):
            yield from compared(model, batch, repeats=repeats, pause=0.0 if quick else 0.3)


def compared(
    model: Transformer, batch: int, *, repeats: int, pause: float
) -> Iterator[Measurement]:
    """All implementations for one model and batch, once their tokens agree."""
    config = model.config
    case = f"layers={config.num_layers} features={config.features} batch={batch}"
    progress(case)
    prompts = np.random.default_rng(0).integers(config.vocab_size, size=(batch, PROMPT))
    num_tokens = config.max_length - PROMPT
    few = max(num_tokens // 16, 4)  # of steps that all take the same time

    ours = partial(generate, model, prompts, num_tokens=num_tokens, temperature=0.0)
    calls: dict[str, Callable[[], Any]] = {
        "full cache": ours,
        "staircase cache": partial(ours, cache="staircase"),
        "recomputed": partial(recomputing(model), prompts, few),
    }
    steps = {"full cache": num_tokens, "staircase cache": num_tokens, "recomputed": few}
    if optional_peer("torch"):
        calls["pytorch"] = partial(in_pytorch(model), prompts, num_tokens)
        steps["pytorch"] = num_tokens
    expected = calls["full cache"]()
    for name in (name for name in calls if "cache" not in name):
        drawn = np.asarray(calls[name]())[:, :few]
        np.testing.assert_array_equal(drawn, expected[:, :few], err_msg=name)

    times = interleave(calls, repeats=repeats, warmup=1, pause=pause)
    seconds = {name: [t / steps[name] for t in values] for name, values in times.items()}
    for name, values in seconds.items():
        median = statistics.median(values)
        yield Measurement(NAME, case, name, "seconds", median)
        yield Measurement(NAME, case, name, "tokens_per_second", batch / median)
    ours_median = statistics.median(seconds["full cache"])
    for peer in (name for name in seconds if name != "full cache"):
        ratio = ratios(seconds, "full cache", peer)
        yield Measurement(NAME, case, "full cache", "seconds", ours_median, peer, ratio)
    for kind in ("full", "staircase"):
        layers = jax.eval_shape(lambda kind=kind: model.init_cache(batch, kind=kind).layers)
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(layers))
        yield Measurement(NAME, case, f"{kind} cache", "cache bytes", size)


def recomputing(model: Transformer) -> Callable[[np.ndarray, int], Array]:
    """`draw(prompts, num_tokens)`, which computes all of the window at every step."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def draw(state: Any, prompts: Array, num_tokens: int) -> Array:
        model = nnx.merge(graphdef, state)
        batch, n = prompts.shape
        window = jnp.zeros((batch, model.config.max_length), jnp.int32).at[:, :n].set(prompts)

        def advance(end: Array, window: Array) -> Array:
            last = jax.lax.dynamic_index_in_dim(model.hidden(window), end - 1, 1, keepdims=False)
            return window.at[:, end].set(jnp.argmax(model.logits(last), axis=-1))

        return jax.lax.fori_loop(n, n + num_tokens, advance, window)[:, n:]

    return partial(draw, nnx.to_pure_dict(state))


def in_pytorch(model: Transformer) -> Callable[[np.ndarray, int], np.ndarray]:
    """`draw(prompts, num_tokens)` in eager PyTorch, with a cache."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    params: Any = nnx.to_pure_dict(nnx.state(model))
    config, epsilon = model.config, 1e-6
    features, heads, width = config.features, config.num_heads, config.features // config.num_heads
    frequencies = config.rotary_base ** (-np.arange(width // 2) / (width // 2))
    angles = np.arange(config.max_length)[:, None] * frequencies
    cos, sin = (torch.tensor(f(angles), dtype=torch.float32) for f in (np.cos, np.sin))

    def vector(p: Any) -> torch.Tensor:
        return torch.tensor(np.asarray(p["scale"]))

    def matrix(p: Any, inputs: int, *names: str) -> torch.Tensor:
        kernels = [np.asarray(p[name]["kernel"]).reshape(inputs, -1) for name in names]
        return torch.tensor(np.ascontiguousarray(np.concatenate(kernels, axis=1).T))

    def rotate(x: torch.Tensor, positions: slice) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        c, s = cos[positions], sin[positions]
        return torch.cat((first * c - second * s, first * s + second * c), -1)

    embedding = torch.tensor(np.asarray(params["embed"]["embedding"]))
    final_norm, output = vector(params["final_norm"]), matrix(params, features, "output")
    layers = []
    for i in range(config.num_layers):
        attention, mlp = params["blocks"][i]["attention"], params["blocks"][i]["mlp"]
        layers.append(
            {
                "attention_norm": vector(attention["input_norm"]),
                "qkv": matrix(attention["function"], features, "query", "key", "value"),
                "query_norm": vector(attention["function"]["query_norm"]),
                "key_norm": vector(attention["function"]["key_norm"]),
                "output": matrix(attention["function"], features, "output"),
                "mlp_norm": vector(mlp["input_norm"]),
                "gate_up": matrix(mlp["function"], features, "gate", "up"),
                "down": matrix(mlp["function"], config.mlp_features, "down"),
            }
        )

    def extend(ids: torch.Tensor, start: int, caches: list[torch.Tensor]) -> torch.Tensor:
        """The most probable next tokens; the caches are written in place."""
        batch, n = ids.shape
        x, positions = F.embedding(ids, embedding), slice(start, start + n)
        for p, (keys, values) in zip(layers, caches):
            y = F.linear(F.rms_norm(x, (features,), p["attention_norm"], epsilon), p["qkv"])
            q, k, v = y.view(batch, n, 3, heads, width).permute(2, 0, 3, 1, 4).unbind(0)
            q = rotate(F.rms_norm(q, (width,), p["query_norm"], epsilon), positions)
            keys[:, :, positions] = rotate(
                F.rms_norm(k, (width,), p["key_norm"], epsilon), positions
            )
            values[:, :, positions] = v
            seen = slice(0, start + n)
            y = F.scaled_dot_product_attention(
                q, keys[:, :, seen], values[:, :, seen], is_causal=start == 0
            )
            x = x + F.linear(y.transpose(1, 2).reshape(x.shape), p["output"])
            y = F.linear(F.rms_norm(x, (features,), p["mlp_norm"], epsilon), p["gate_up"])
            gate, up = y.chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, p["down"])
        x = F.rms_norm(x[:, -1], (features,), final_norm, epsilon)
        return F.linear(x, output).argmax(-1)

    @torch.inference_mode()
    def draw(prompts: np.ndarray, num_tokens: int) -> np.ndarray:
        batch, n = prompts.shape
        shape = (2, batch, heads, config.max_length, width)
        caches = [torch.zeros(shape) for _ in layers]
        drawn = [extend(torch.tensor(prompts), 0, caches)]
        for position in range(n, n + num_tokens - 1):
            drawn.append(extend(drawn[-1][:, None], position, caches))
        return torch.stack(drawn, dim=1).numpy()

    return draw
