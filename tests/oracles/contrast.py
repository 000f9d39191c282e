"""Writes contrast.npz: cross-entropy of similarities and the uniformity of features, in float64.

Run once with PyTorch and align_uniform (github.com/SsnL/align_uniform) on the path:
`python tests/oracles/contrast.py ALIGN_UNIFORM_CHECKOUT`. The stored numbers are of torch 2.13.0.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.append(sys.argv[1])
from align_uniform import uniform_loss


def main():
    rng = np.random.default_rng(0)
    stored = {
        "similarities": rng.uniform(-1, 1, size=(5, 9)).astype("f"),
        "index": rng.integers(9, size=5),
        "features": rng.normal(size=(7, 4)).astype("f"),
    }
    s = torch.tensor(stored["similarities"]).double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(
        s / 0.2, torch.tensor(stored["index"]), reduction="none"
    )
    stored["losses"] = losses.detach().numpy()
    stored["grad"] = torch.autograd.grad(losses.sum(), s)[0].numpy()
    features = torch.nn.functional.normalize(torch.tensor(stored["features"]).double(), dim=1)
    stored["uniformity"] = np.array([uniform_loss(features, t=t).item() for t in (2, 0.5)])
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
