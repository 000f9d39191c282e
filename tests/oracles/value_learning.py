"""Writes value_learning.npz: encodings of values over bins, from hl-gauss-pytorch and rlax.

Run once with both packages; the stored numbers are of hl-gauss-pytorch 0.3.0 under torch 2.13.0,
in float32, and of rlax 0.1.9: `python tests/oracles/value_learning.py`.
"""

from pathlib import Path

import numpy as np
import rlax
import torch
from hl_gauss_pytorch import HLGaussLoss
from rlax._src.transforms import transform_to_2hot_nonlinear

LOW, HIGH, BINS = -10.0, 10.0, 51


def main():
    rng = np.random.default_rng(0)
    values = np.r_[rng.uniform(LOW, HIGH, 6), LOW, HIGH, 0.0].astype("f")
    logits = rng.normal(size=(9, BINS)).astype("f")
    stored = {"values": values, "logits": logits}
    for ratio in (0.75, 2.0):
        module = HLGaussLoss(LOW, HIGH, BINS, sigma_to_bin_ratio=ratio, eps=0.0)
        prediction = torch.tensor(logits, requires_grad=True)
        losses = module(prediction, torch.tensor(values), reduction="none")
        stored[f"hl_gauss_{ratio}"] = losses.detach().numpy()
        (gradient,) = torch.autograd.grad(losses.sum(), prediction)
        stored[f"hl_gauss_{ratio}_grad"] = gradient.numpy()

    atoms = np.array([-2.0, -0.5, 0.0, 1.0, 4.0], "f")
    scalars = np.array([-2.0, -1.0, 0.25, 1.0, 3.0, 4.0, 9.0, -5.0], "f")
    even = np.linspace(-2, 2, 5, dtype="f")
    stored |= {
        "atoms": atoms,
        "scalars": scalars,
        "two_hot": transform_to_2hot_nonlinear(scalars, atoms),
    }
    next_probs = rng.dirichlet(np.ones(5), size=4).astype("f")
    rewards, discounts = rng.normal(size=4).astype("f"), np.array([0.9, 0.5, 0.0, 1.0], "f")
    projected = [
        rlax.categorical_l2_project(r + gamma * even, q, even)
        for r, gamma, q in zip(rewards, discounts, next_probs)
    ]
    stored |= {
        "next_probs": next_probs,
        "rewards": rewards,
        "discounts": discounts,
        "projected": np.stack(projected),
    }
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
