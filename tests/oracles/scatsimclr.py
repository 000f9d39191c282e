"""Writes scatsimclr.npz: features and embeddings of the authors' ScatSimCLR8 in training.

Its parameters are drawn one after the other from a seed, and not stored.

Run once with PyTorch, Kymatio and a checkout of github.com/vkinakh/scatsimclr (7630b12); the stored
numbers are of torch 2.13.0 and kymatio 0.3.0: `python tests/oracles/scatsimclr.py SCATSIMCLR`.
"""

import sys
from pathlib import Path

import numpy as np
import scipy.special
import torch

if not hasattr(scipy.special, "sph_harm"):
    scipy.special.sph_harm = None  # Kymatio's transforms in three dimensions want it


def main(checkout):
    sys.path.append(f"{checkout}/src/models")
    from scatnet_simclr import ScatSimCLR

    model = ScatSimCLR(J=1, L=2, input_size=(10, 8, 2), res_blocks=8, out_dim=16).train()
    rng = np.random.default_rng(0)
    for name, parameter in model.named_parameters():
        if name.startswith("_scatnet_bn"):
            continue  # which the forward pass leaves out
        fan_in = max(parameter[0].numel(), 1)
        value = rng.normal(size=tuple(parameter.shape)) / np.sqrt(fan_in)
        parameter.data = torch.tensor(value + (parameter.ndim == 1), dtype=torch.float32)
    images = rng.normal(size=(2, 10, 8, 2)).astype(np.float32)
    with torch.no_grad():
        h, z = model(torch.tensor(images).permute(0, 3, 1, 2).contiguous())
    h = h.reshape(2, 128, 4, 4).permute(0, 2, 3, 1).numpy()
    np.savez_compressed(
        Path(__file__).with_suffix(".npz"),
        torch_version=torch.__version__,
        images=images,
        some_of_h=h.reshape(2, -1)[:, ::8],
        z=z.numpy(),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
