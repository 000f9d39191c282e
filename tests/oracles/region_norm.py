"""Writes region_norm.npz: RN-B and RN-L with their gradients, from their authors' code.

Run once with PyTorch and rn.py of the repository geekyutao/RN (commit b0a9476); the stored numbers
are of torch 2.13.0: `python tests/oracles/region_norm.py rn.py`. The authors multiply ε by N / N_r,
so theirs is next to 0 here; channels come last in what is stored.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch


def load(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def last(array):
    array = np.asarray(array.detach())
    return np.moveaxis(array, 1, -1) if array.ndim == 4 else array


def main():
    rn = load(sys.argv[1])
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(1, 2, size=(2, 3, 6, 5)))
    cotangent = torch.tensor(rng.normal(size=x.shape))
    mask = torch.tensor(rng.random((2, 1, 9, 10)) < 0.6).double()
    stored = {"torch_version": torch.__version__, "x": last(x), "cotangent": last(cotangent)}
    stored["mask"] = last(mask) > 0
    torch.manual_seed(0)
    for case, layer in (("basic", rn.RN_B(3)), ("learnable", rn.RN_L(3, threshold=0.6))):
        layer.double().rn.bn_norm.eps = 1e-12
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if case == "basic" or name.endswith("bias"):
                    parameter.copy_(torch.tensor(rng.normal(size=parameter.shape)))
        given = x.clone().requires_grad_()
        y = layer(given, mask) if case == "basic" else layer(given)
        names, parameters = zip(*layer.named_parameters())
        gradients = torch.autograd.grad(y, (given, *parameters), cotangent)
        stored |= {f"{case}_y": last(y), f"{case}_grad_x": last(gradients[0])}
        if case == "learnable":
            stored["learnable_map"] = last(layer.sa(x)[0])
        for name, parameter, gradient in zip(names, parameters, gradients[1:]):
            for key, value in ((name, parameter), (f"grad_{name}", gradient)):
                value = value.detach().numpy()
                stored[f"{case}_{key}"] = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
    narrow = {
        name: np.asarray(value, np.float32) if np.asarray(value).dtype == float else value
        for name, value in stored.items()
    }
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **narrow)


if __name__ == "__main__":
    main()
