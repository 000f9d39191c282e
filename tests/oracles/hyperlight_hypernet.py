"""Writes hyperlight_hypernet.npz: the authors' hypernetwork, its predictions and gradients.

Run once with PyTorch and hyperlight; the stored numbers are of torch 2.13.0 and hyperlight 0.0.5:
`python tests/oracles/hyperlight_hypernet.py`.
"""

from pathlib import Path

import numpy as np
import torch
from hyperlight.hypernet import HyperNet

SHAPES = {"kernel": (3, 2), "bias": (2,)}


def flat(tensors):
    return np.concatenate([tensor.detach().numpy().ravel() for tensor in tensors])


def main():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    values = {"b": rng.uniform(size=(4, 1)), "a": rng.uniform(size=(4, 2))}
    cotangents = {name: rng.normal(size=(4, *shape)) for name, shape in SHAPES.items()}
    stored = {"torch_version": torch.__version__, "hyperlight_version": "0.0.5"}
    stored |= {f"z_{n}": v for n, v in values.items()}
    stored |= {f"cotangent_{n}": v for n, v in cotangents.items()}
    for encoding, name in (("cos|sin", "cos_sin"), ("z|1-z", "complement"), (None, "none")):
        net = HyperNet({"a": (2,), "b": (1,)}, SHAPES, [5, 4], encoding=encoding).double()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(0.5 * torch.tensor(rng.normal(size=parameter.shape)))
        inputs = {n: torch.tensor(v, requires_grad=True) for n, v in values.items()}
        outputs = net(**inputs)
        loss = sum((outputs[n] * torch.tensor(c)).sum() for n, c in cotangents.items())
        parameters = dict(net.backbone.named_parameters())
        gradients = torch.autograd.grad(loss, [*inputs.values(), *parameters.values()])
        stored |= {f"{name}_{key}": tensor.detach().numpy() for key, tensor in outputs.items()}
        stored[f"{name}_parameters"] = flat(parameters.values())
        stored[f"{name}_gradients"] = flat(gradients)
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
