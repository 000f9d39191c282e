"""Writes multilabel_retrieval.npz: losses and soft top-k by the authors of arXiv:2310.10636.

Run once with PyTorch and a checkout of nilesh2797/DEXML@7690769; the stored numbers are float64 of
torch 2.13.0: `python tests/oracles/multilabel_retrieval.py CHECKOUT`.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch


def main():
    sys.path.insert(0, sys.argv[1])
    from losses import SimLoss
    from utils.topk_utils import dist_log_topk, dist_topk

    rng = np.random.default_rng(0)
    positive = rng.uniform(size=(4, 10)) < 0.3
    positive[0] = np.arange(10) == 7
    stored = {
        "scores": (3 * rng.normal(size=(4, 10))).astype(np.float32),
        "positive": positive,
        "weights": np.where(positive, rng.uniform(0.2, 2, size=(4, 10)), 0).astype(np.float32),
        "cotangent": rng.normal(size=(4, 10)).astype(np.float32),
    }

    def store(name, values, scores, cotangent):
        stored[name] = values.detach().numpy()
        stored[f"{name}/gradient"] = torch.autograd.grad(values, scores, cotangent)[0].numpy()

    def store_loss(name, criterion, weighted=False, k=None):
        loss = SimLoss(
            SimpleNamespace(
                loss_criterion=criterion,
                loss_sample=False,
                loss_reduction="mean",
                loss_weighted=weighted,
                numy=10,
                topk_K=k,
                topk_alpha=2.0,
                topk_n_iter=60,
            )
        )
        scores = torch.tensor(stored["scores"]).double().requires_grad_()
        target = torch.tensor(stored["weights"] if weighted else positive.astype("f")).double()
        columns = torch.arange(10)[None]
        rows = [  # one query after the other, since their mean is what it gives
            loss.compute_loss(
                1 * scores[i : i + 1], (columns, target[i : i + 1]), lambda *indices: indices
            )
            for i in range(4)
        ]
        store(name, torch.stack(rows), scores, torch.ones(4).double())

    store_loss("softmax", "softmax")
    store_loss("decoupled", "decoupled-softmax")
    store_loss("decoupled/weighted", "decoupled-softmax", weighted=True)
    store_loss("top_k/number", "topk", k="num_pos")

    cotangent = torch.tensor(stored["cotangent"]).double()
    for k in (1, 4):
        for alpha in (0.5, 2.0):
            for name, function in (("shares", dist_topk), ("logarithms", dist_log_topk)):
                scores = torch.tensor(stored["scores"]).double().requires_grad_()
                values = function(scores, k, alpha, 60)
                store(f"{name}/{k}/{alpha}", values, scores, cotangent)
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
