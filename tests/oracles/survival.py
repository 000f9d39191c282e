"""Writes survival.npz: hazard and Cox losses with gradients, and concordance, from two packages.

Run once with PyTorch, pycox 0.3.0 and lifelines 0.30.3; the stored numbers are of torch 2.13.0, in
float64: `python tests/oracles/survival.py`.
"""

from pathlib import Path

import numpy as np
import torch
from lifelines import KaplanMeierFitter
from lifelines.utils import concordance_index
from pycox.models.loss import CoxPHLoss, NLLLogistiHazardLoss


def main():
    rng = np.random.default_rng(0)
    stored = {
        "logits": (2 * rng.normal(size=(8, 5))).astype(np.float32),
        "interval": rng.integers(5, size=8),
        "observed": rng.integers(2, size=8),
        "log_risk": rng.normal(size=12).astype(np.float32),
        "times": rng.permutation(12).astype(np.float32),
        "ended": rng.integers(2, size=12),
        "tied_times": rng.integers(6, size=30).astype(np.float32),
        "tied_risk": rng.integers(5, size=30).astype(np.float32),
        "tied_ended": rng.integers(2, size=30),
    }
    logits = torch.tensor(stored["logits"]).double().requires_grad_()
    targets = torch.tensor(stored["interval"]), torch.tensor(stored["observed"]).double()
    loss = NLLLogistiHazardLoss(reduction="none")(logits, *targets)
    stored["hazard"] = loss.detach().numpy()
    stored["hazard_grad"] = torch.autograd.grad(loss.sum(), logits)[0].numpy()

    risk = torch.tensor(stored["log_risk"]).double().requires_grad_()
    ended = torch.tensor(stored["ended"]).double()
    mean = CoxPHLoss()(risk, torch.tensor(stored["times"]), ended)
    stored["cox_mean"] = mean.detach().numpy()
    stored["cox_grad"] = torch.autograd.grad(mean, risk)[0].numpy()

    stored["concordance"] = concordance_index(
        stored["tied_times"], -stored["tied_risk"], stored["tied_ended"]
    )
    fitter = KaplanMeierFitter().fit(stored["tied_times"], stored["tied_ended"])
    stored["kaplan_meier"] = fitter.survival_function_at_times(np.arange(6)).to_numpy()
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
