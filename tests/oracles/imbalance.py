"""Writes imbalance.npz: the authors' dual focal loss and Dice loss for NLP with their gradients.

The Dice loss of several classes is their binary one of each class, summed: their own loop divides
the overlap of single examples by the size of the whole set.

Run once with PyTorch, checkouts of github.com/Linwei94/DualFocalLoss (e1ddb6b) and of
github.com/ShannonAI/dice_loss_for_NLP (d437bb9); the stored numbers are of torch 2.13.0:
`python tests/oracles/imbalance.py DUAL_FOCAL_LOSS DICE_LOSS_FOR_NLP`.
"""

import sys
from pathlib import Path

import numpy as np
import torch


def main(dual_focal_loss, dice_loss_for_nlp):
    sys.path += [dual_focal_loss, f"{dice_loss_for_nlp}/loss"]
    from dice_loss import DiceLoss
    from dual_focal_loss import DualFocalLoss

    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(12, 5))
    labels = rng.integers(5, size=12)
    stored = {"torch_version": torch.__version__, "logits": logits, "labels": labels}

    def keep(name, loss, *inputs):
        z = torch.tensor(inputs[0], requires_grad=True)
        value = loss(z, *map(torch.tensor, inputs[1:])).sum()
        (gradient,) = torch.autograd.grad(value, z)
        stored[name], stored[f"{name}_gradient"] = value.item(), gradient.numpy()

    for gamma in (0.0, 0.5, 5.0):
        keep(f"dual_{gamma}", DualFocalLoss(gamma), logits, labels)
    targets = (rng.random(12) < 0.3).astype(int)
    stored["targets"] = targets
    mask = (rng.random(12) < 0.7).astype(int)
    stored["mask"] = mask
    for alpha in (0.0, 0.01, 1.0):
        for squared in (False, True):
            name = f"dice_{alpha}_{squared}"
            settings = {
                "smooth": 0.7, "alpha": alpha, "square_denominator": squared, "reduction": "none"
            }  # fmt: skip
            loss = DiceLoss(**settings)
            keep(f"{name}_binary", loss, logits[:, :1], targets)
            keep(f"{name}_masked", loss, logits[:, :1], targets, mask)
            of_class = DiceLoss(**settings, with_logits=False)

            def classes(z, y):
                p = torch.softmax(z, -1)
                return sum(of_class(p[:, k : k + 1], (y == k).long()) for k in range(5))

            keep(f"{name}_multiclass", classes, logits, labels)
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main(*sys.argv[1:])
