"""Writes crrelu.npz: CRReLU's formula with its gradients, from PyTorch in float64.

Run once with PyTorch; the stored numbers are of torch 2.13.0: `python tests/oracles/crrelu.py`.
"""

from pathlib import Path

import numpy as np
import torch


def main():
    rng = np.random.default_rng(0)
    inputs = {
        "x": 2 * rng.normal(size=(4, 6)),
        "epsilon": 0.3,
        "cotangent": rng.normal(size=(4, 6)),
    }
    x, epsilon, cotangent = (torch.tensor(v, dtype=torch.float64) for v in inputs.values())
    x.requires_grad_(), epsilon.requires_grad_()
    y = torch.relu(x) + epsilon * x * torch.exp(-(x**2) / 2)
    gradients = torch.autograd.grad(y, (x, epsilon), cotangent)
    stored = {
        "y": y.detach().numpy(),
        "grad_x": gradients[0].numpy(),
        "grad_epsilon": gradients[1].numpy(),
        "torch_version": torch.__version__,
    }
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **inputs, **stored)


if __name__ == "__main__":
    main()
