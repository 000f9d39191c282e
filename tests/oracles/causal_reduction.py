"""Writes causal_reduction.npz: the author's reductions of neighbouring tokens, with gradients.

Run once with PyTorch and src/model/causal_reduction.py from Bachstelze/causalFlashT5 at commit
40fbc598; the stored numbers are of torch 2.13.0:

    python tests/oracles/causal_reduction.py causal_reduction.py
"""

import runpy
import sys
from pathlib import Path

import numpy as np
import torch

# reduction and context: the author's function
CASES = {
    "min_None": "causal_matrix_reduction",
    "max_None": "causal_max_reduction",
    "max_global": "causal_context_unity_matrix",
}


def main(path):
    functions = runpy.run_path(path)
    x, cotangent = np.random.default_rng(0).normal(size=(2, 7, 3)).astype("f")
    stored = {"torch_version": torch.__version__, "x": x, "cotangent": cotangent}
    for case, name in CASES.items():
        tensor = torch.tensor(x).requires_grad_()
        y = functions[name](tensor)
        (gradient,) = torch.autograd.grad(y, tensor, torch.tensor(cotangent))
        stored |= {case: y.detach().numpy(), f"{case}_grad": gradient.numpy()}
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main(sys.argv[1])
