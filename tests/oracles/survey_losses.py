"""Writes survey_losses.npz: regression, classification and detection losses with their gradients.

Run once with PyTorch, torchvision and pytorch-msssim; the stored numbers are of torch 2.13.0,
torchvision 0.29.1 (of which the losses in Python alone are used) and pytorch-msssim 1.0.0, in
float64: `python tests/oracles/survey_losses.py`.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

OPERATORS = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):  # so that it loads without its compiled operators
    OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import pytorch_msssim  # noqa: E402
from torchvision.ops import (  # noqa: E402
    complete_box_iou_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
)

WEIGHTS = [0.5, 1.0, 2.0, 3.0]


def balanced_l1(x, y, alpha=0.5, gamma=1.5):
    """As in Libra R-CNN's release."""
    e = (x - y).abs()
    b = np.e ** (gamma / alpha) - 1
    small = alpha / b * (b * e + 1) * torch.log(b * e + 1) - alpha * e
    return torch.where(e < 1, small, gamma * e + gamma / b - alpha)


def main():
    rng = np.random.default_rng(0)
    x, y = 3 * rng.normal(size=12), rng.normal(size=12)
    logits, labels = 2 * rng.normal(size=(6, 4)), rng.integers(4, size=6)
    soft, binary = rng.dirichlet(np.ones(4), size=6), rng.integers(2, size=(6, 4))
    low, sides = rng.uniform(size=(2, 16, 2)), rng.uniform(0.1, 1, size=(2, 16, 2))
    boxes = np.concatenate([low, low + sides], axis=-1)
    boxes[0, :4] += 3  # apart from the other
    boxes[0, 4] = boxes[1, 4]
    images = rng.uniform(size=(2, 2, 2, 12, 13))
    reduce = {"reduction": "none"}
    label, weight = torch.tensor(labels), torch.tensor(WEIGHTS).double()
    element = {
        "squared_error": lambda p, t: F.mse_loss(p, t, **reduce),
        "absolute_error": lambda p, t: F.l1_loss(p, t, **reduce),
        "huber_loss": lambda p, t: F.huber_loss(p, t, delta=1.5, **reduce),
        "smooth_l1_loss": lambda p, t: F.smooth_l1_loss(p, t, beta=0.7, **reduce),
        "balanced_l1_loss": balanced_l1,
    }
    cases = {name: (loss, x, y) for name, loss in element.items()} | {
        "poisson_rate": (
            lambda p, t: F.poisson_nll_loss(p, t, log_input=False, eps=0.0, **reduce),
            np.abs(x) + 0.1,
            np.round(np.abs(y)),
        ),
        "poisson_log_rate": (
            lambda p, t: F.poisson_nll_loss(p, t, **reduce),
            x,
            np.round(np.abs(y)),
        ),
        "cross_entropy_ids": (
            lambda p, _: F.cross_entropy(p, label, weight, label_smoothing=0.1, **reduce),
            logits,
            soft,
        ),
        "cross_entropy_soft": (
            lambda p, t: F.cross_entropy(p, t, weight, label_smoothing=0.2, **reduce),
            logits,
            soft,
        ),
        "negative_log_likelihood": (
            lambda p, _: F.nll_loss(p, label, weight, **reduce),
            logits,
            soft,
        ),
        "binary_cross_entropy": (
            lambda p, t: F.binary_cross_entropy_with_logits(p, t, pos_weight=weight, **reduce),
            logits,
            binary,
        ),
        "giou_loss": (generalized_box_iou_loss, *boxes),
        "diou_loss": (distance_box_iou_loss, *boxes),
        "ciou_loss": (complete_box_iou_loss, *boxes),
        "ssim_loss": (
            lambda p, t: 1 - pytorch_msssim.ssim(p, t, data_range=1, size_average=False),
            *images,
        ),
    }
    stored = {"labels": labels, "weights": WEIGHTS}
    for name, (loss, prediction, target) in cases.items():
        p = torch.tensor(prediction).double().requires_grad_()
        value = loss(p, torch.tensor(target).double())
        (gradient,) = torch.autograd.grad(value.sum(), p)
        stored |= {
            f"{name}_prediction": prediction.astype(np.float32),
            f"{name}_target": target.astype(np.float32),
            f"{name}_value": value.detach().numpy().astype(np.float32),
            f"{name}_gradient": gradient.numpy().astype(np.float32),
        }
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
