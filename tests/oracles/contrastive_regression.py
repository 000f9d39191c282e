"""Writes contrastive_regression.npz: ConR with its gradient, from the authors' code in float64.

Run once with PyTorch and agedb-dir/loss.py of github.com/BorealisAI/ConR (ad6a8c9):
`python tests/oracles/contrastive_regression.py LOSS_PY`. The stored numbers are of torch 2.13.0.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch


def main(path):
    spec = importlib.util.spec_from_file_location("authors_loss", path)
    authors = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(authors)
    rng = np.random.default_rng(0)
    ages = np.repeat(rng.integers(20, 30, size=6), 2)  # two views: each has a positive
    stored = {
        "features": rng.normal(size=(12, 5)).astype("f"),
        "targets": ages.astype("f"),
        "predictions": (ages + 4 * rng.normal(size=12)).astype("f"),
        "weights": rng.uniform(0.5, 2, size=12).astype("f"),
    }
    features = torch.tensor(stored["features"]).double().requires_grad_()
    targets, predictions, weights = (
        torch.tensor(stored[name]).double()[:, None]
        for name in ("targets", "predictions", "weights")
    )
    loss = authors.ConR(features, targets, predictions, w=2, weights=weights, e=0.1)
    stored["loss"] = loss.item()
    stored["grad"] = torch.autograd.grad(loss, features)[0].numpy()
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main(sys.argv[1])
