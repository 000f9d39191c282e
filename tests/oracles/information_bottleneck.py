"""Writes information_bottleneck.npz: Cauchy-Schwarz divergences and gradients, in float64.

They are those of loss_cs.py of SJYuCNEL/Cauchy-Schwarz-Information-Bottleneck@252f86b, in bits.

Run once with PyTorch and a checkout; the stored numbers are of torch 2.13.0:
`python tests/oracles/information_bottleneck.py CHECKOUT`.
"""

import sys
from pathlib import Path

import numpy as np
import torch


def main():
    sys.path.insert(0, sys.argv[1])
    torch.set_default_dtype(torch.float64)
    from loss_cs import CS_QMI, CS_Div, CS_QMI_normalized

    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, 3))
    stored = {
        "x": x,
        "t": x[:, :2] + 0.3 * rng.normal(size=(9, 2)),
        "y": x[:, :1] + 0.3 * rng.normal(size=(9, 1)),
        "predictions": x[:, :1] - 0.5,
    }
    stored = {name: values.astype(np.float32) for name, values in stored.items()}
    for sigma in (0.7, 2.0):
        tensors = {
            name: torch.tensor(stored[name]).double().requires_grad_()
            for name in ("x", "t", "y", "predictions")
        }
        x, t, y, guess = tensors.values()
        for name, value, argument in (
            ("divergence", CS_Div(x, y, guess, sigma), guess),
            ("information", CS_QMI(x, t, sigma), t),
            ("normalized", CS_QMI_normalized(x, t, sigma), t),
        ):
            stored[f"{sigma}/{name}"] = value.item()
            gradient = torch.autograd.grad(value, argument, retain_graph=True)[0]
            stored[f"{sigma}/{name}/gradient"] = gradient.numpy()
            print(sigma, name, value.item())
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
