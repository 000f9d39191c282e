"""Writes nbeats.npz: forecast, features and gradient of a tiny N-BEATS, in float64.

It is the model of leejoonhun/fan-beats@d2da08e. Weights are random multiples of 1/32, stored as
int8 in jaxref's layout, one after the other in the order of their paths in the model.

Run once with PyTorch and a checkout; the stored numbers are of torch 2.13.0:
`python tests/oracles/nbeats.py CHECKOUT`.
"""

import sys
from pathlib import Path

import numpy as np
import torch

BLOCKS = 2


def leaves_of(model):
    """The weights by their paths in jaxref."""
    found = {}
    for i, block in enumerate(model.blocks):
        path = f"stacks/{i // BLOCKS}/{i % BLOCKS}"
        for j, layer in enumerate(block.extraction_layer):
            found[f"{path}/layers/{j}/kernel"] = layer.linear.weight.T
            found[f"{path}/layers/{j}/bias"] = layer.linear.bias
        found[f"{path}/coefficients/kernel"] = block.prediction_layer.weight.T
    return found


def main():
    sys.path.insert(0, sys.argv[1])
    from models.nbeats import NBEATS

    rng = np.random.default_rng(0)
    stacks = ["generic", "trend", "seasonality"]
    model = NBEATS(4, 9, stacks, False, BLOCKS, 2, "ReLU", [5, 6, 7], 2, 2).double().train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "basis" not in name:
                values = rng.integers(-16, 17, size=tuple(parameter.shape)) / 32
                parameter.copy_(torch.tensor(values))
    leaves = leaves_of(model)
    units = [32 * leaves[path].detach().numpy().ravel() for path in sorted(leaves)]
    stored = {
        "weights": np.concatenate(units).astype(np.int8),
        "inputs": rng.integers(-16, 17, size=(2, 9, 2)).astype(np.int8),
        "cotangent": rng.normal(size=(2, 4, 2)).astype(np.float32),
    }
    inputs = torch.tensor(stored["inputs"] / 8.0).requires_grad_()
    forecast, features = model(inputs.transpose(1, 2).reshape(4, 9))
    forecast = forecast.reshape(2, 2, 4).transpose(1, 2)
    # the bases are kept in float32, where that of the season is not exact
    stored["forecast"] = forecast.detach().numpy().astype(np.float32)
    for i, feature in enumerate(features):
        stored[f"features_{i}"] = feature.detach().numpy().reshape(2, 2, -1).astype(np.float32)
    loss = (forecast * torch.tensor(stored["cotangent"])).sum() + features[-1].sum()
    stored["slope"] = torch.autograd.grad(loss, inputs)[0].numpy().astype(np.float32)
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
