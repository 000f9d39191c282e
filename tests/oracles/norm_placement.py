"""Writes norm_placement.npz: blocks of two sublayers with their norms, and their gradients.

Pre- and post-norm are `torch.nn.TransformerEncoderLayer`, norms around each sublayer (Peri-LN) are
`Gemma2DecoderLayer`; in both, attention and feed-forward network are replaced by linear maps, so
that what they say is where the norms stand. In float64, with torch 2.13.0 and transformers 5.24.0:

    python tests/oracles/norm_placement.py
"""

from pathlib import Path

import numpy as np
import torch
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config

FEATURES = 6


class Encoder(torch.nn.TransformerEncoderLayer):
    def _sa_block(self, x, *args, **kwargs):
        return self.first(x)

    def _ff_block(self, x):
        return self.second(x)


class WithoutWeights(torch.nn.Module):
    """An attention of Gemma: its result, and attention weights that nobody reads."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, hidden_states, **kwargs):
        return self.function(hidden_states), None


def linear(kernel):
    module = torch.nn.Linear(FEATURES, FEATURES, bias=False).double()
    module.weight.data = torch.tensor(kernel).double().T.contiguous()
    return module


def encoder(placement, inputs):
    block = Encoder(FEATURES, 1, norm_first=placement == "pre", layer_norm_eps=1e-5).double()
    block.first, block.second = linear(inputs["first"]), linear(inputs["second"])
    for norm, scale, bias in zip((block.norm1, block.norm2), inputs["scales"], inputs["biases"]):
        norm.weight.data, norm.bias.data = torch.tensor(scale).double(), torch.tensor(bias).double()
    return block


def gemma(inputs):
    config = Gemma2Config(
        hidden_size=FEATURES,
        intermediate_size=FEATURES,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=FEATURES,
        num_hidden_layers=1,
        rms_norm_eps=1e-6,
    )
    # Gemma's own norm computes in float32.
    modeling_gemma2.Gemma2RMSNorm = lambda size, eps: torch.nn.RMSNorm(size, eps).double()
    block = modeling_gemma2.Gemma2DecoderLayer(config, 0)
    block.self_attn = WithoutWeights(linear(inputs["first"]))
    block.mlp = linear(inputs["second"])
    norms = (
        block.input_layernorm,
        block.post_attention_layernorm,
        block.pre_feedforward_layernorm,
        block.post_feedforward_layernorm,
    )
    for norm, scale in zip(norms, inputs["scales"]):
        norm.weight.data = torch.tensor(scale).double()
    return block


def main():
    rng = np.random.default_rng(0)
    shapes = {
        "x": (2, 3, FEATURES),
        "cotangent": (2, 3, FEATURES),
        "first": (FEATURES, FEATURES),
        "second": (FEATURES, FEATURES),
        "scales": (4, FEATURES),
        "biases": (2, FEATURES),
    }
    inputs = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    stored = {"torch_version": torch.__version__} | inputs
    for placement in ("pre", "post", "peri"):
        block = gemma(inputs) if placement == "peri" else encoder(placement, inputs)
        block.train()
        x = torch.tensor(inputs["x"]).double().requires_grad_()
        y = block(x)
        y.backward(torch.tensor(inputs["cotangent"]).double())
        stored[placement] = y.detach().numpy()
        stored[f"{placement}_grad_x"] = x.grad.numpy()
        second = block.mlp if placement == "peri" else block.second
        stored[f"{placement}_grad_second"] = second.weight.grad.numpy().T
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
