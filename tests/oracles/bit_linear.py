"""Writes bit_linear.npz: ternary linear layers with their gradients.

Run once with PyTorch, transformers and, on the path, the authors' package
(github.com/schneiderkamplab/bitlinear, commit 7b66f06):
`TORCHDYNAMO_DISABLE=1 PYTHONPATH=/path/to/bitlinear python tests/oracles/bit_linear.py`; the stored
numbers are of torch 2.13.0 and transformers 5.24.0, uncompiled.
"""

from pathlib import Path

import numpy as np
import torch
from bitlinear.bitlinear import BitLinear
from transformers.integrations.bitnet import ActQuant, WeightQuant


def main():
    rng = np.random.default_rng(0)
    stored = {"torch_version": torch.__version__}
    # An odd number of weights: torch takes the lower of two central values for the median.
    arrays = {
        "x": rng.normal(size=(6, 15)).astype(np.float32),
        "w": rng.standard_t(3, size=(15, 7)).astype(np.float32) / 4,
        "cotangent": rng.normal(size=(6, 7)).astype(np.float32),
    }
    stored |= arrays
    x, w, cotangent = (torch.tensor(value) for value in arrays.values())
    for name in ("AbsMedian", "AbsMean"):
        # Its scale of activations is 128 / max|x|, which clips the largest; 127 / max|x| is
        # that of the range from -127.
        layer = BitLinear(15, 7, bias=False, weight_measure=name, activation_range=(-127, 127))
        layer.weight.data = w.T.contiguous()
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        gradients = torch.autograd.grad(y, (inputs, layer.weight), cotangent)
        stored[name] = y.detach().numpy()
        stored[f"{name}_x_gradient"] = gradients[0].numpy()
        stored[f"{name}_w_gradient"] = gradients[1].numpy().T
    latent = w.clone().requires_grad_()
    inputs = x.clone().requires_grad_()
    y = ActQuant.apply(inputs) @ WeightQuant.apply(latent)
    gradients = torch.autograd.grad(y, (inputs, latent), cotangent)
    stored["transformers"] = y.detach().numpy()
    stored["transformers_x_gradient"] = gradients[0].numpy()
    stored["transformers_w_gradient"] = gradients[1].numpy()
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
