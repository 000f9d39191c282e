"""Writes evonorm.npz: EvoNorms in training and evaluation with their gradients, from timm.

Run once with PyTorch and timm; the stored numbers are of torch 2.13.0 and timm 1.0.31:
`python tests/oracles/evonorm.py`. timm's package imports torchvision, these layers do not.
"""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch

EPSILON = 1e-3


def load():
    """timm.layers.evo_norm without what `import timm` runs."""
    (root,) = importlib.util.find_spec("timm").submodule_search_locations
    for name, path in (("timm", root), ("timm.layers", f"{root}/layers")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [path]
    return importlib.import_module("timm.layers.evo_norm")


def main():
    evo_norm = load()
    rng = np.random.default_rng(0)
    shape = (3, 4, 2, 3)  # channels second
    inputs = {
        "x": rng.normal(0.5, 2, size=shape),
        "cotangent": rng.normal(size=shape),
        "scale": rng.normal(1, 0.5, size=4),
        "bias": rng.normal(size=4),
        "v": rng.normal(1, 0.5, size=4),
    }
    inputs = {name: value.astype(np.float32) for name, value in inputs.items()}
    stored = {"torch_version": torch.__version__, **inputs}
    for name in ("x", "cotangent"):
        stored[name] = inputs[name].transpose(0, 2, 3, 1)
    x, cotangent, scale, bias, v = (torch.tensor(value).double() for value in inputs.values())
    for variant in ("B0", "B1", "B2", "S0", "S1", "S2"):
        options = {"groups": 2} if variant[0] == "S" else {}
        layer = getattr(evo_norm, f"EvoNorm2d{variant}")(4, eps=EPSILON, **options).double()
        with torch.no_grad():
            layer.weight.copy_(scale)
            layer.bias.copy_(bias)
            if hasattr(layer, "v"):
                layer.v.copy_(v)
        given = x.clone().requires_grad_()
        y = layer(given)
        parameters = [("x", given), ("scale", layer.weight)]
        if hasattr(layer, "v"):
            parameters.append(("v", layer.v))
        gradients = torch.autograd.grad(y, [tensor for _, tensor in parameters], cotangent)
        prefix = f"evonorm_{variant.lower()}"
        for (name, _), gradient in zip(parameters, gradients):
            if name == "x":
                gradient = gradient.permute(0, 2, 3, 1)
            stored[f"{prefix}_grad_{name}"] = gradient.numpy()
        stored[f"{prefix}_y"] = y.detach().permute(0, 2, 3, 1).numpy()
        if variant[0] == "B":
            stored[f"{prefix}_var"] = layer.running_var.numpy()
            layer.eval()
            stored[f"{prefix}_evaluated"] = layer(x).detach().permute(0, 2, 3, 1).numpy()
    narrow = {
        name: np.asarray(value, np.float32) if np.asarray(value).dtype == float else value
        for name, value in stored.items()
    }
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **narrow)


if __name__ == "__main__":
    main()
