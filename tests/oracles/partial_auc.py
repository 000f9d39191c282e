"""Writes partial_auc.npz: two steps of the losses of partial AUC, from LibAUC in float32.

Run once with PyTorch and libauc 2.0.1; the stored numbers are of torch 2.13.0:
`python tests/oracles/partial_auc.py`.
"""

from pathlib import Path

import numpy as np
import torch
from libauc.losses import pAUC_DRO_Loss, tpAUC_KL_Loss
from libauc.metrics import pauc_roc_score

CASES = {"default": {}, "sharp": {"Lambda": 0.5, "margin": 0.7, "surr_loss": "logistic"}}


def main():
    rng = np.random.default_rng(0)
    stored = {
        "scores": rng.uniform(size=(2, 12)).astype(np.float32),
        "labels": np.stack([rng.permutation(np.arange(12) % 3 == 0) for _ in range(2)]).astype(int),
        "indices": np.stack([rng.permutation(16)[:12] for _ in range(2)]),
    }
    for case, options in CASES.items():
        losses = {
            "two_way": tpAUC_KL_Loss(16, gammas=(0.8, 0.6), tau=1.5, device="cpu", **options),
            "one_way": pAUC_DRO_Loss(16, gamma=0.8, device="cpu", **options),
        }
        for name, loss_fn in losses.items():
            values, gradients = [], []
            for scores, labels, indices in zip(
                *(stored[k] for k in ("scores", "labels", "indices"))
            ):
                s = torch.tensor(scores, requires_grad=True)
                loss = loss_fn(s, torch.tensor(labels), torch.tensor(indices))
                values.append(loss.item())
                gradients.append(torch.autograd.grad(loss, s)[0].numpy())
            stored |= {
                f"{case}_{name}": np.array(values),
                f"{case}_{name}_grad": np.stack(gradients),
                f"{case}_{name}_u": loss_fn.u_pos.numpy().ravel(),
            }
        stored[f"{case}_two_way_w"] = losses["two_way"].w.numpy()
    stored["metric_scores"] = rng.normal(size=200).astype(np.float32)
    stored["metric_labels"] = (rng.uniform(size=200) < 0.3).astype(int)
    pairs = (0.05, 0.8), (0.3, 0.4), (0.5, 0.5)
    stored["rates"] = np.array(pairs)
    stored["two_way_areas"] = np.array(
        [
            pauc_roc_score(
                stored["metric_labels"], stored["metric_scores"], max_fpr=max_fpr, min_tpr=min_tpr
            )
            for max_fpr, min_tpr in pairs
        ]
    )
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
