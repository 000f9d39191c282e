"""Writes label_robust.npz: (adaptive) LDR losses and multi-class hinges, from the authors' code.

Run once with PyTorch, given loss.py of https://github.com/Optimization-AI/ICML2023_LDR; the stored
numbers are of torch 2.13.0: `python tests/oracles/label_robust.py loss.py`.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch


def main(path):
    spec = importlib.util.spec_from_file_location("authors", path)
    authors = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(authors)
    torch.Tensor.cuda = lambda self: self
    torch.set_default_dtype(torch.float64)

    rng = np.random.default_rng(0)
    logits, labels = 2 * rng.normal(size=(3, 6, 5)), rng.integers(5, size=6)
    places = np.array([3, 0, 7, 5, 1, 2])
    stored = {"torch_version": torch.__version__}
    stored |= {"logits": logits, "labels": labels, "places": places}
    one_hot = torch.eye(5)[torch.tensor(labels)]

    def record(name, loss, visit):
        """Values and gradients of the examples one by one, since the authors take the mean."""
        x = torch.tensor(logits[visit], requires_grad=True)
        values = torch.stack([loss(x[i : i + 1], one_hot[i : i + 1], i) for i in range(6)])
        stored[name] = values.detach().numpy()
        stored[f"{name}_gradient"] = torch.autograd.grad(values.sum(), x)[0].numpy()

    for temperature in (0.3, 2.0):
        ldr = authors.LDRLoss_V1(threshold=0.1, Lambda=temperature)
        record(f"ldr_{temperature}", lambda f, y, i: ldr(f, y), 0)
    hinges = {"crammer_singer": authors.CSLoss, "weston_watkins": authors.WWLoss}
    for name, hinge in hinges.items():
        record(name, lambda f, y, i: hinge(threshold=1.5)(f, y), 0)
    adaptive = authors.ALDRLoss_V1(N=8, threshold=0.1, Lambda=1.5, alpha=2.0)
    adaptive.Lambda = adaptive.Lambda.double()
    for visit in range(3):
        record(f"adaptive_{visit}", lambda f, y, i: adaptive(f, y, places[i : i + 1]), visit)
        stored[f"temperatures_{visit}"] = adaptive.Lambda[:, 0].numpy().copy()
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main(sys.argv[1])
