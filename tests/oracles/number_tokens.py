"""Writes number_tokens.npz: the number token loss in its forms and its gradient.

Run once with the authors' package: `python tests/oracles/number_tokens.py`. The stored numbers are
of ntloss 0.3.2 without its reweighting, which the paper does not have, and torch 2.13.0.
"""

from pathlib import Path

import numpy as np
import torch
from ntloss import NTLoss, NTLossDotProduct

VOCABULARY = ["a", "7", "0", "b", "1", "2", "c", "9", "3", "4", "8", "5", "6", "d"]


class Tokenizer:
    """What ntloss asks of a tokenizer."""

    def __len__(self):
        return len(VOCABULARY)

    def add_tokens(self, tokens):
        return sum(token not in VOCABULARY for token in tokens)

    def get_vocab(self):
        return {token: i for i, token in enumerate(VOCABULARY)}


def main():
    rng = np.random.default_rng(0)
    logits = (2 * rng.normal(size=(3, 6, len(VOCABULARY)))).astype(np.float32)
    labels = rng.integers(len(VOCABULARY), size=(3, 6))
    labels[0, :2] = -100
    stored = {"vocabulary": VOCABULARY, "logits": logits, "labels": labels}
    options = {"tokenizer": Tokenizer(), "reweigh": False}
    functions = {"square": "mse_loss", "absolute": "l1_loss", "huber": "huber_loss"}
    losses = {"wasserstein": NTLoss(**options)} | {
        name: NTLossDotProduct(loss_function=getattr(torch.nn.functional, function), **options)
        for name, function in functions.items()
    }
    for name, loss in losses.items():
        z = torch.tensor(logits).requires_grad_()
        value = loss(z, torch.tensor(labels), reduction="none")
        (gradient,) = torch.autograd.grad(value.sum(), z)
        stored |= {f"{name}_value": value.detach().numpy(), f"{name}_gradient": gradient.numpy()}
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
