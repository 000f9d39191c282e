"""Writes scattering.npz: scattering transforms and their gradient, and the filters, by Kymatio.

Run once with PyTorch and Kymatio; the stored numbers are of torch 2.13.0 and kymatio 0.3.0:
`python tests/oracles/scattering.py`.
"""

from pathlib import Path

import numpy as np
import scipy.special
import torch

if not hasattr(scipy.special, "sph_harm"):
    scipy.special.sph_harm = None  # Kymatio's transforms in three dimensions want it

import kymatio
from kymatio.scattering2d.filter_bank import filter_bank
from kymatio.torch import Scattering2D

CASES = {  # J, L, height, width, max_order
    "square": (2, 3, 12, 12, 2),
    "deep": (3, 2, 17, 8, 2),
    "small": (2, 5, 4, 6, 2),
    "single": (1, 1, 7, 10, 1),
}


def main():
    rng = np.random.default_rng(0)
    stored = {"torch_version": torch.__version__, "kymatio_version": kymatio.__version__}
    for name, (J, L, height, width, order) in CASES.items():
        x = rng.normal(size=(1, height, width)).astype(np.float32)
        tensor = torch.tensor(x, requires_grad=True)
        s = Scattering2D(J=J, shape=(height, width), L=L, max_order=order)(tensor)
        cotangent = rng.normal(size=tuple(s.shape)).astype(np.float32)
        stored[f"{name}_case"] = [J, L, order]
        stored |= {f"{name}_x": x, f"{name}_s": s.detach().numpy()}
        if name == "square":
            stored["cotangent"] = cotangent
            stored["gradient"] = torch.autograd.grad(s, tensor, torch.tensor(cotangent))[0].numpy()
    filters = filter_bank(8, 6, 2, 3)
    stored["psi"] = np.float32([psi["levels"][0] for psi in filters["psi"]])
    stored["phi"] = np.float32(filters["phi"]["levels"][0])
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
