"""Writes calibration.npz: calibration errors, and the training of an adaptive temperature.

Run once with PyTorch, torchmetrics, netcal, KDEpy, and checkouts of
github.com/liuyvchi/Correctness-aware-calibration (d843d4b) and of
github.com/zhang64-llnl/Mix-n-Match-Calibration (0c13914); the stored numbers are of torch 2.13.0,
torchmetrics 1.9.0, netcal 1.4.0, KDEpy 1.1.12:
`python tests/oracles/calibration.py CORRECTNESS_AWARE MIX_N_MATCH`.
"""

import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch
from netcal.metrics import MMCE
from torchmetrics.functional.classification import multiclass_calibration_error

EXAMPLES, CLASSES = 200, 4


def keep_errors(stored, rng, all_metrics, ece_kde_binary):
    logits = 2.5 * rng.normal(size=(EXAMPLES, CLASSES))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    p = p.astype(np.float32)
    flatter = np.exp(0.4 * logits) / np.exp(0.4 * logits).sum(-1, keepdims=True)
    labels = np.array([rng.choice(CLASSES, p=row) for row in flatter])
    stored |= {"probabilities": p, "labels": labels}
    for norm in ("l1", "l2", "max"):
        for bins in (5, 15):
            stored[f"{norm}_{bins}"] = multiclass_calibration_error(
                torch.tensor(p), torch.tensor(labels), CLASSES, bins, norm
            ).item()
    confidence, correct = p.max(-1), p.argmax(-1) == labels
    stored["mmce"] = MMCE().measure(p, labels)
    stored["kolmogorov_smirnov"] = all_metrics.KS_error_from_conf_acc(confidence, correct)
    stored["classwise_25"] = all_metrics.compute_sce(p, labels)
    stored["kernel_density"] = ece_kde_binary(p.astype(float), np.eye(CLASSES)[labels])


def keep_adaptive_temperature(stored, rng, Temperature_adaptive):
    torch.manual_seed(0)
    logits = torch.tensor(2 * rng.normal(size=(60, CLASSES)), dtype=torch.float32)
    features = torch.tensor(rng.random((60, 8)), dtype=torch.float32)
    labels = torch.tensor(rng.integers(CLASSES, size=60))
    module = Temperature_adaptive(input_dim=8, feat_dim=5)
    with torch.no_grad():
        module.temperature_layer.bias.fill_(1.0)

    def parameters():
        layers = (module.embed_layer[0], module.temperature_layer)
        kept = [x.detach().numpy().copy() for layer in layers for x in (layer.weight, layer.bias)]
        return kept[0].T, kept[1], kept[2][0], kept[3][0]

    names = ("hidden_kernel", "hidden_bias", "kernel", "bias")
    stored |= {f"before_{n}": x for n, x in zip(names, parameters())}
    module.set_temperature(logits, features, labels)
    stored |= {f"after_{n}": x for n, x in zip(names, parameters())}
    scaled, temperature = module(logits, features, return_temp=True)
    stored |= {
        "adaptive_logits": logits.numpy(),
        "adaptive_features": features.numpy(),
        "adaptive_labels": labels.numpy(),
        "temperature": temperature.detach().numpy(),
        "scaled": scaled.detach().numpy(),
    }


def main(correctness_aware, mix_n_match):
    sys.path += [f"{correctness_aware}/src", mix_n_match]
    absent = ("matplotlib", "matplotlib.pyplot", "pandas")  # imported, and not used here
    sys.modules.update({name: MagicMock() for name in absent})
    from cal_metrics import all_metrics
    from cal_metrics.temperature_scaling_CA import Temperature_adaptive
    from util_evaluation import ece_kde_binary

    for name in absent:
        del sys.modules[name]
    vars(np)["trapz"] = np.trapezoid  # NumPy dropped the old name
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self: self
    rng = np.random.default_rng(0)
    stored = {"torch_version": torch.__version__}
    keep_errors(stored, rng, all_metrics, ece_kde_binary)
    keep_adaptive_temperature(stored, rng, Temperature_adaptive)
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main(*sys.argv[1:])
