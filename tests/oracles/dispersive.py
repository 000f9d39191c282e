"""Writes dispersive.npz: the authors' dispersive loss with its gradient, in float64.

Run once with PyTorch and transport/transport.py of github.com/raywang4/DispLoss (a copy is in
github.com/whaletech-ai/Disperse-Loss): `python tests/oracles/dispersive.py TRANSPORT_PY`. The
stored numbers are of torch 2.13.0.
"""

import ast
import sys
from pathlib import Path

import numpy as np
import torch


def authors_loss(path):
    """The method `disp_loss` of the file alone, which imports what is not needed here."""
    (function,) = (
        node
        for node in ast.walk(ast.parse(Path(path).read_text("utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name == "disp_loss"
    )
    names = {"th": torch}
    exec(compile(ast.Module([function], []), path, "exec"), names)
    return names["disp_loss"]


def main(path):
    torch.Tensor.cuda = lambda self: self
    rng = np.random.default_rng(0)
    stored = {"features": rng.normal(size=(6, 3, 4)).astype("f")}
    features = torch.tensor(stored["features"]).double().requires_grad_()
    loss = authors_loss(path)(None, features)
    stored["loss"] = loss.item()
    stored["grad"] = torch.autograd.grad(loss, features)[0].numpy()
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main(sys.argv[1])
