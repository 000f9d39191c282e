"""Writes mean_shifted.npz: the authors' contrastive loss of shifted features, in float64.

Run once with PyTorch and main.py of github.com/talreiss/Mean-Shifted-Anomaly-Detection:
`python tests/oracles/mean_shifted.py MAIN_PY`. The stored numbers are of torch 2.13.0.
"""

import ast
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F


def authors_loss(path):
    """The function `contrastive_loss` of the file alone, which imports what is not needed here."""
    (function,) = (
        node
        for node in ast.parse(Path(path).read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "contrastive_loss"
    )
    names = {"torch": torch, "F": F}
    exec(compile(ast.Module([function], []), path, "exec"), names)
    return names["contrastive_loss"]


def main(path):
    rng = np.random.default_rng(0)
    center = rng.normal(size=5)
    first = center + 0.5 * rng.normal(size=(6, 5))
    stored = {
        "views": np.stack([first, first + 0.3 * rng.normal(size=first.shape)]).astype("f"),
        "center": (center / np.linalg.norm(center)).astype("f"),
    }
    views = torch.tensor(stored["views"]).double().requires_grad_()
    shifted = F.normalize(views, dim=-1) - torch.tensor(stored["center"]).double()
    loss = authors_loss(path)(*shifted)
    stored["loss"] = loss.item()
    stored["grad"] = torch.autograd.grad(loss, views, retain_graph=True)[0].numpy()
    angular = shifted.square().sum(dim=-1).mean(dim=-1).sum()  # as in `run_epoch`
    stored["angular"] = angular.item()
    stored["angular_grad"] = torch.autograd.grad(angular, views)[0].numpy()
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main(sys.argv[1])
