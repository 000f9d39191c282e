"""Writes optimal_transport.npz: geomloss's Sinkhorn divergences and entropic transport, in float64.

Run once with geomloss, half a minute, as the blur comes down in small steps; the stored numbers are
of torch 2.13.0 and geomloss 0.3.1: `python tests/oracles/optimal_transport.py`.
"""

from pathlib import Path

import numpy as np
import torch
from geomloss import SamplesLoss


def main():
    rng = np.random.default_rng(0)
    stored = {
        "x": rng.normal(size=(6, 3)).astype(np.float32),
        "y": (0.7 * rng.normal(size=(6, 3)) + 1).astype(np.float32),
        "weights_x": rng.uniform(0.2, 1, size=6).astype(np.float32),
        "weights_y": rng.uniform(0.2, 1, size=6).astype(np.float32),
    }
    x, y, *weights = (torch.tensor(stored[name]).double() for name in stored)
    cases = {"uniform": [torch.ones_like(w) for w in weights], "weighted": weights}
    for case, given in cases.items():
        for blur in (0.3, 1.0):
            for debias, count in ((True, 6), (False, 5)):  # of the points of y
                loss = SamplesLoss("sinkhorn", p=2, blur=blur, scaling=0.9995, debias=debias)
                points = x.clone().requires_grad_(), y[:count].clone().requires_grad_()
                a, b = (w / w.sum() for w in (given[0], given[1][:count]))
                value = loss(a, points[0], b, points[1])
                gradients = torch.autograd.grad(value, points)
                name = f"{case}/{blur}/{'divergence' if debias else 'transport'}"
                stored[name] = value.item()
                stored[f"{name}/x"], stored[f"{name}/y"] = (g.numpy() for g in gradients)
                print(name, value.item())
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
