"""Writes query_reformulation.npz: query vectors and the hinge of arXiv:2204.11545, by its authors.

Run once with PyTorch, transformers and a checkout of zycdev/LoL@00ad744; the stored numbers are
float64 of torch 2.13.0: `python tests/oracles/query_reformulation.py CHECKOUT`.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import torch
import torch.nn.functional as F


def ranking_losses(queries, passages, positive):
    """The lines of the trainer that rank passages."""
    scores = queries @ passages.T
    labels = torch.empty(len(scores), dtype=torch.long)
    for q, relevant in enumerate(positive):
        places = relevant.nonzero()[:, 0]
        labels[q] = places[scores[q, places].argmin()]
        for p in places:
            if p != labels[q]:
                scores[q, p] = float("-inf")
    return F.cross_entropy(scores, labels, reduction="none")


def main():
    sys.path.insert(0, sys.argv[1])
    # what metrics and the command line alone need
    sys.modules |= {name: MagicMock() for name in ("pytrec_eval", "arguments")}
    from modeling import DenseDqr, SparseMlmDqr
    from util import pairwise_hinge

    rng = np.random.default_rng(0)
    positive = rng.uniform(size=(4, 7)) < 0.3
    positive[:, :4] |= np.eye(4, dtype=bool)
    stored = {
        "revision_losses": rng.uniform(0, 3, size=(5, 3)).astype(np.float32),
        "queries": rng.normal(size=(4, 6)).astype(np.float32),
        "passages": rng.normal(size=(7, 6)).astype(np.float32),
        "positive": positive,
        "token_logits": rng.normal(size=(3, 5, 12)).astype(np.float32),
        "attention_mask": np.arange(5) < np.array([[5], [3], [1]]),
        "special": np.array([1, 4, 5]),
        "hidden": rng.normal(size=(3, 6)).astype(np.float32),
        "kernel": rng.normal(size=(6, 6)).astype(np.float32),
        "bias": rng.normal(size=6).astype(np.float32),
    }

    def double(name):
        tensor = torch.tensor(stored[name])
        return tensor.double().requires_grad_() if tensor.is_floating_point() else tensor

    def store(name, value, *arguments):
        stored[name] = value.detach().numpy()
        total = torch.sum(value * torch.cos(torch.arange(value.numel())).reshape(value.shape))
        for i, gradient in enumerate(torch.autograd.grad(total, arguments)):
            stored[f"{name}/{i}"] = gradient.numpy()

    for margin in (0.0, 0.4):
        losses = double("revision_losses")
        amounts = torch.arange(3, 0, -1)[None].double()
        rows = [pairwise_hinge(-losses[i : i + 1], amounts, margin=margin) for i in range(5)]
        store(f"hinge/{margin}", torch.stack(rows), losses)

    queries, passages = double("queries"), double("passages")
    store("ranking", ranking_losses(queries, passages, torch.tensor(positive)), queries, passages)

    for name, (relu, log, norm) in {
        "plain": (True, False, 2),
        "logarithm": (True, True, 1),
        "signed": (False, False, 2),
    }.items():
        logits, mask = double("token_logits"), double("attention_mask")
        model = SimpleNamespace(
            encoder=SimpleNamespace(bert=lambda *_: (logits,), cls=lambda x: 1 * x),
            model_args=SimpleNamespace(no_relu=not relu, log_sat=log, norm_power=norm),
            special_token_ids=stored["special"].tolist(),
        )
        batch = {"input_ids": None, "attention_mask": mask, "token_type_ids": None}
        vector, _ = SparseMlmDqr.forward(model, batch, scoring=False)
        store(f"sparse/{name}", vector, logits)

    hidden, kernel, bias = double("hidden"), double("kernel"), double("bias")
    model = DenseDqr.__new__(DenseDqr)
    torch.nn.Module.__init__(model)
    model.encoder = lambda *_: (hidden[:, None],)
    model.dense_proj = lambda x: x @ kernel + bias
    model.layer_norm = torch.nn.LayerNorm(6).double()
    model.model_args = SimpleNamespace(norm_power=float("nan"))
    vector, _ = model.forward(batch, scoring=False)
    store("dense", vector, hidden, kernel, bias)
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
