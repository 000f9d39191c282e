"""Writes switch_balance.npz: the balance loss of Switch Transformers and its gradient.

Run once with PyTorch and transformers; the stored numbers are of torch 2.13.0 and transformers
5.24.0: `python tests/oracles/switch_balance.py`.
"""

from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.models.switch_transformers.modeling_switch_transformers import (
    load_balancing_loss_func,
)


def main():
    logits = np.random.default_rng(0).normal(size=(3, 7, 4))
    probabilities = torch.softmax(torch.tensor(logits), -1).requires_grad_()
    experts = probabilities.argmax(-1)
    loss = load_balancing_loss_func(probabilities, experts)
    (gradient,) = torch.autograd.grad(loss, probabilities)
    np.savez_compressed(
        Path(__file__).with_suffix(".npz"),
        probabilities=probabilities.detach().numpy(),
        experts=experts.numpy(),
        loss=loss.item(),
        gradient=gradient.numpy(),
        torch_version=torch.__version__,
        transformers_version=transformers.__version__,
    )


if __name__ == "__main__":
    main()
