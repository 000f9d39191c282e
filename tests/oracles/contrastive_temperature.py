"""Writes contrastive_temperature.npz: steps of iSogCLR, from LibAUC and the authors in float32.

Run once with PyTorch, libauc 2.0.1 and the authors' unimodal_exps/losses.py (github.com/zhqiu/
contrastive-learning-iSogCLR): `python tests/oracles/contrastive_temperature.py LOSSES_PY`. The
stored numbers are of torch 2.13.0.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
from libauc.losses import GCLoss_v1, GCLoss_v2

EXAMPLES, BATCH, FEATURES = 8, 6, 5
RATES = {"gamma": 0.7, "rho": 0.3, "tau_min": 0.1, "tau_max": 0.9}


def authors_losses(path):
    torch.Tensor.cuda = lambda self: self
    spec = importlib.util.spec_from_file_location("authors_losses", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unit_rows(stored, step):
    """The two views of a step, which have gradients, and the same at length 1."""
    views = [torch.tensor(stored["views"][step, side], requires_grad=True) for side in range(2)]
    return views, [torch.nn.functional.normalize(view, dim=1) for view in views]


def gradients(loss, views):
    return np.stack([gradient.numpy() for gradient in torch.autograd.grad(loss, views)])


def main(path):
    rng = np.random.default_rng(0)
    chosen = rng.permutation(EXAMPLES)[:BATCH]
    first = rng.normal(size=(2, BATCH, FEATURES))
    stored = {
        "views": np.stack([first, first + rng.normal(size=first.shape)], axis=1).astype("f"),
        "indices": np.stack([chosen, rng.permutation(chosen)]),
        "s": rng.uniform(0.2, 2, size=EXAMPLES).astype("f"),
    }

    # the first visit, where it makes no difference that the mean is of exp(s / tau)
    loss_fn = GCLoss_v1(
        EXAMPLES, tau=0.4, device="cpu", enable_isogclr=True, eta=0.05, beta=0.6, **RATES
    )
    views, rows = unit_rows(stored, 0)
    loss = loss_fn(*rows, torch.tensor(stored["indices"][0]))
    stored["visit"] = loss.item()
    stored["visit_grad"] = gradients(loss, views)
    stored["visit_tau"] = loss_fn.learnable_tau.detach().numpy().ravel()

    # The authors' class that takes differences, with the identity for its surrogate: a later visit
    # at one temperature for all, as it divides columns in place of rows by those of the examples.
    loss_fn = authors_losses(path).SogCLR_DRO_Loss_v2(
        EXAMPLES, bsz=BATCH, tau_init=0.4, eta_init=0.05, beta_u=0.6, **RATES
    )
    loss_fn._sqh = lambda x: x
    loss_fn.mask_neg = (1 - torch.eye(BATCH)).repeat(2, 2)
    loss_fn.num_neg = 2 * BATCH - 2
    loss_fn.s = torch.tensor(stored["s"])
    views, rows = unit_rows(stored, 0)
    loss, *_ = loss_fn(torch.tensor(stored["indices"][0]), torch.stack(rows, dim=1), 1, 9)
    stored |= {
        "unimodal": loss.item(),
        "unimodal_grad": gradients(loss, views),
        "unimodal_state": torch.stack([loss_fn.s, loss_fn.tau, loss_fn.u]).numpy(),
    }

    loss_fn = GCLoss_v2(EXAMPLES, tau=0.4, enable_isogclr=True, eta=0.05, beta=0.6, **RATES)
    for step in range(2):
        views, rows = unit_rows(stored, step)
        loss, _ = loss_fn(*rows, torch.tensor(stored["indices"][step]))
        states = [
            (torch.log(loss_fn.u1) + loss_fn.b1, loss_fn.learnable_tau_img, loss_fn.grad_tau_img),
            (torch.log(loss_fn.u2) + loss_fn.b2, loss_fn.learnable_tau_txt, loss_fn.grad_tau_txt),
        ]
        stored |= {
            f"bimodal{step}": loss.item(),
            f"bimodal{step}_grad": gradients(loss, views),
            f"bimodal{step}_state": np.stack([np.hstack(state).T for state in states]),
        }
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main(sys.argv[1])
