"""Writes fixed_point.npz: fixed-point rounding to nearest, from QPyTorch.

Run once with PyTorch and QPyTorch, which compiles itself; the stored numbers are of qtorch 0.3.0:
`python tests/oracles/fixed_point.py`.
"""

from pathlib import Path

import numpy as np
import torch
from qtorch.quant import fixed_point_quantize

FORMATS = ((8, 4), (4, 2), (16, 12), (6, 0), (2, 1))


def main():
    x = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32) * 6
    x[0, :4] = 0.5, -0.5, 1.125, 1e6
    stored = {"x": x, "formats": np.array(FORMATS)}
    stored["rounded"] = np.stack(
        [
            fixed_point_quantize(torch.tensor(x), wl, fl, rounding="nearest").numpy()
            for wl, fl in FORMATS
        ]
    )
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
