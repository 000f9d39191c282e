"""Writes ensloss.npz: random and fixed margin losses with their gradients, from the authors' code.

Run once with PyTorch, given losses.py of https://github.com/statmlben/ensLoss; the stored numbers
are of torch 2.13.0: `python tests/oracles/ensloss.py losses.py`. The draws of the random loss are
stored too, and take the place of PyTorch's.
"""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch

FIXED = {
    "hinge": "Hinge",
    "exponential": "EXP",
    "logistic": "BCELoss",
    "inverse_tail_hinge": "Inv_Hinge",
    "log_tail_hinge": "Log_Hinge",
}


def main(path):
    sys.modules.setdefault("pandas", types.ModuleType("pandas"))  # imported there and not used
    spec = importlib.util.spec_from_file_location("authors", path)
    authors = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(authors)
    torch.Tensor.to = lambda self, device: self
    torch.set_default_dtype(torch.float64)

    rng = np.random.default_rng(0)
    scores, labels = 2 * rng.normal(size=12), rng.integers(2, size=12)
    stored = {"torch_version": torch.__version__, "scores": scores, "labels": labels}
    for name, peer in FIXED.items():
        x = torch.tensor(scores, requires_grad=True)
        each = [getattr(authors, peer)()(x[i], torch.tensor(float(labels[i]))) for i in range(12)]
        values = torch.stack(each)
        stored[name] = values.detach().numpy()
        stored[f"{name}_gradient"] = torch.autograd.grad(values.sum(), x)[0].numpy()
    stored["draws"] = draws = rng.normal(size=12)
    stored["lambdas"] = np.array([0.0, 0.7, -0.7, 1.0])
    torch.randn = lambda shape: torch.tensor(draws)
    np.maximum = lambda a, b: torch.clamp(a, min=b)
    gradients = []
    for lam in stored["lambdas"]:
        loss, x = authors.ensLoss(), torch.tensor(scores, requires_grad=True)
        loss.lam = float(lam)
        value = loss(x, torch.tensor(labels, dtype=torch.float64))
        gradients.append(torch.autograd.grad(12 * value, x)[0].numpy())
    stored["ensemble_gradients"] = np.stack(gradients)
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main(sys.argv[1])
