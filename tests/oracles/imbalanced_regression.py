"""Writes imbalanced_regression.npz: the authors' importance weights and correlation loss.

Their weights are divided by the sum; their correlation loss, which is in TensorFlow, runs on the
operations of PyTorch with the same meaning.

Run once with PyTorch, SciPy and a checkout of github.com/Machine-Earning/CISIR (5f3ddd2); the
stored numbers are of torch 2.13.0 and scipy 1.17.1:
`python tests/oracles/imbalanced_regression.py CISIR`.
"""

import ast
import sys
import types
from pathlib import Path
from typing import Optional
from unittest.mock import MagicMock

import numpy as np
import torch

WEIGHTS = {
    "involution_0.5": ("MDI", {"alpha": 0.5}),
    "involution_1": ("MDI", {"alpha": 1.0}),
    "involution_2": ("MDI", {"alpha": 2.0}),
    "reciprocal_0.5": ("SQInvImportance", {}),
    "reciprocal_1": ("InvImportance", {}),
    "linear": ("LinearImportance", {"alpha": 0.7}),
    "cosine_2": ("CosineImportance", {"alpha": 2.0}),
    "dense_0.6": ("DenseLossImportance", {"alpha": 0.6}),
    "dense_1.5": ("DenseLossImportance", {"alpha": 1.5}),
}


def correlation_loss(path):
    """The function `coreg` of the file alone."""
    (function,) = (
        node
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "coreg"
    )
    operations = types.SimpleNamespace(
        Tensor=torch.Tensor,
        ones_like=torch.ones_like,
        reduce_mean=torch.mean,
        reduce_sum=torch.sum,
        square=torch.square,
        sqrt=torch.sqrt,
    )
    scope = {
        "tf": operations,
        "K": types.SimpleNamespace(epsilon=lambda: 1e-7),
        "Optional": Optional,
    }
    exec(compile(ast.Module([function], []), path, "exec"), scope)
    return scope["coreg"]


def main(checkout):
    sys.modules["matplotlib"] = sys.modules["matplotlib.pyplot"] = MagicMock()  # it plots, too
    sys.path.append(f"{checkout}/modules/reweighting")
    import ImportanceWeighting

    rng = np.random.default_rng(0)
    labels = np.concatenate([rng.normal(0, 0.2, 18), rng.uniform(-1, 1.9, 6)]).astype(np.float32)
    stored = {"torch_version": torch.__version__, "labels": labels}
    for name, (kind, settings) in WEIGHTS.items():
        peer = getattr(ImportanceWeighting, kind)(None, labels.astype(float), **settings)
        stored[name], stored["density"] = peer.importance_weights, peer.densities
    loss = correlation_loss(Path(checkout, "modules/training/ts_modeling.py"))
    predictions = (0.5 * labels + rng.normal(size=24)).astype(np.float32)
    stored["predictions"] = predictions
    for name, weights in (("plain", None), ("weighted", torch.tensor(stored["involution_2"]))):
        p = torch.tensor(predictions).double().requires_grad_()
        value = loss(torch.tensor(labels).double(), p, weights)
        stored[f"correlation_{name}"] = value.item()
        stored[f"correlation_{name}_gradient"] = torch.autograd.grad(value, p)[0].numpy()
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main(*sys.argv[1:])
