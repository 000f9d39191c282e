"""Writes entropy_regularization.npz: the authors' penalty on attention entropies, with gradients.

Run once with PyTorch and the file of that name from Nandan91/entropy-guided-attention-llm at commit
728944df; the stored numbers are of torch 2.13.0 in float64:

    python tests/oracles/entropy_regularization.py entropy_regularization.py
"""

import runpy
import sys
from pathlib import Path

import numpy as np
import torch

# name: (causal, tolerance, context size)
CASES = {"full": (False, 0.2, None), "causal": (True, 0.05, 16)}


def main(path):
    regularization = runpy.run_path(path)["EntropyRegularization"]
    rng = np.random.default_rng(0)
    layers, batch, heads, length = 2, 2, 3, 5
    sizes = np.array([0.1, 2, 6]).reshape(3, 1, 1)  # from nearly uniform to nearly one-hot
    stored = {
        "torch_version": torch.__version__,
        "logits": (sizes * rng.normal(size=(layers, batch, heads, length, length))).astype("f"),
        "threshold_weights": rng.uniform(0.3, 0.7, size=heads).astype("f"),
    }
    for case, (causal, tolerance, context_size) in CASES.items():
        logits = torch.tensor(stored["logits"]).double().requires_grad_()
        weights = torch.tensor(stored["threshold_weights"]).double().requires_grad_()
        hidden = torch.full((length, length), -torch.inf).triu(1) if causal else 0.0
        probabilities = torch.softmax(logits + hidden, dim=-1)
        module = regularization(1e-2, tolerance, context_size)
        penalty = module.compute_loss(list(probabilities), weights, heads, layers)
        gradients = torch.autograd.grad(penalty, (logits, weights))
        stored[f"{case}_entropy"] = module.compute_entropy(probabilities).detach().numpy()
        stored[f"{case}_penalty"] = penalty.detach().numpy()
        for name, gradient in zip(("logits", "threshold_weights"), gradients):
            stored[f"{case}_grad_{name}"] = gradient.numpy()
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main(sys.argv[1])
