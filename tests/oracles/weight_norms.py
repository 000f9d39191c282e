"""Writes weight_norms.npz: reparametrized kernels and their gradients, from timm, the authors' code
of two papers and PyTorch, in float64.

Needs a checkout of https://github.com/joe-siyuan-qiao/Batch-Channel-Normalization and one of
https://github.com/apple/ml-sigma-reparam:
`python tests/oracles/weight_norms.py BATCH_CHANNEL_NORMALIZATION ML_SIGMA_REPARAM`.
The stored numbers are of torch 2.13.0 and timm 1.0.31. Kernels are stored with their outputs last,
images with their channels last.
"""

import importlib.metadata
import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch

SHAPE = (4, 3, 3, 2)  # out, in, height, width
OPTIONS = {"stride": (2, 1), "padding": (1, 0)}


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def timm_layers():
    """timm.layers alone: all of timm needs packages for images."""
    folders = importlib.util.find_spec("timm").submodule_search_locations
    for name in ("torchvision", "torchvision.ops", "torchvision.ops.misc", "timm"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = torch.nn.BatchNorm2d
    sys.modules["timm"].__path__ = folders
    import timm.layers

    return timm.layers


def main(batch_channel_normalization, sigma_reparam):
    timm = timm_layers()
    authors_ws = load("ws_layers", f"{batch_channel_normalization}/imagenet/models/layers.py")
    for name in ("timm.models", "timm.models.layers"):  # where the layers were once
        sys.modules[name] = types.ModuleType(name)
    sys.modules["timm.models.layers"].to_2tuple = timm.to_2tuple
    apple = load("sigma_layers", f"{sigma_reparam}/vision/layers.py")

    rng = np.random.default_rng(0)
    kernel = (0.3 + rng.normal(size=SHAPE)).astype(np.float32)
    x = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)
    bias = rng.normal(size=4).astype(np.float32)
    gain = rng.uniform(0.5, 2, size=4).astype(np.float32)
    cotangent = rng.normal(size=(2, 4, 3, 3)).astype(np.float32)
    stored = {
        "torch_version": torch.__version__,
        "timm_version": importlib.metadata.version("timm"),
        "kernel": kernel.transpose(2, 3, 1, 0),
        "x": x.transpose(0, 2, 3, 1),
        "bias": bias,
        "gain": gain,
        "cotangent": cotangent.transpose(0, 2, 3, 1),
    }
    layers = {
        "plain": torch.nn.Conv2d(3, 4, (3, 2), **OPTIONS),
        "authors_ws": authors_ws.Conv2d(3, 4, (3, 2), **OPTIONS),
        "timm_ws": timm.StdConv2d(3, 4, (3, 2), bias=True, **OPTIONS),
        "timm_scaled": timm.ScaledStdConv2d(3, 4, (3, 2), gamma=1.7, **OPTIONS),
        "sigma": apple.SNConv2d(3, 4, (3, 2), **OPTIONS),
    }
    for name, layer in layers.items():
        layer = layer.double().train()
        weight = torch.tensor(kernel).double()
        with torch.no_grad():
            if name == "sigma":
                normed = apple.SpectralNormedWeight(
                    torch.nn.Parameter(weight.flatten(1).contiguous())
                )
                layer.spectral_normed_weight = normed
                normed.u = torch.nn.functional.normalize(torch.ones(18).double(), dim=0)
                layer.weight = normed.weight
                layer.sigma[...] = 1.5
            else:
                layer.weight[...] = weight
            layer.bias[...] = torch.tensor(bias)
            if name == "timm_scaled":
                layer.gain[...] = torch.tensor(gain).reshape(-1, 1, 1, 1)
        inputs = torch.tensor(x).double().requires_grad_()
        y = layer(inputs)
        parameters = {"x": inputs, "kernel": layer.weight, "bias": layer.bias}
        if name == "timm_scaled":
            parameters["gain"] = layer.gain
        if name == "sigma":
            parameters["gamma"] = layer.sigma
            stored["sigma_next_v"] = layer.spectral_normed_weight.u.numpy()
            stored["sigma_sigma"] = layer.spectral_normed_weight.spectral_norm.numpy()
        gradients = torch.autograd.grad(
            y, tuple(parameters.values()), torch.tensor(cotangent).double()
        )
        stored[name] = y.detach().numpy().transpose(0, 2, 3, 1)
        for parameter, gradient in zip(parameters, gradients):
            gradient = gradient.numpy()
            if parameter == "x":
                gradient = gradient.transpose(0, 2, 3, 1)
            if parameter == "kernel":
                gradient = gradient.reshape(SHAPE).transpose(2, 3, 1, 0)
            stored[f"{name}_grad_{parameter}"] = gradient.squeeze()

    grouped = torch.nn.Conv2d(4, 6, (3, 3), padding=(1, 2), groups=2).double()
    images = rng.normal(size=(2, 4, 5, 5)).astype(np.float32)
    stored["grouped_x"] = images.transpose(0, 2, 3, 1)
    stored["grouped_kernel"] = grouped.weight.detach().numpy().transpose(2, 3, 1, 0)
    stored["grouped_bias"] = grouped.bias.detach().numpy()
    stored["grouped"] = (
        grouped(torch.tensor(images).double()).detach().numpy().transpose(0, 2, 3, 1)
    )

    matrix = torch.tensor(kernel.reshape(4, -1)).double()  # [out, in]
    rows = torch.tensor(rng.normal(size=(4, 18))).double()
    stored["rows"] = rows.numpy().T
    dense = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(18, 4).double())
    dense.parametrizations.weight.original1.data[...] = matrix
    dense.parametrizations.weight.original0.data[...] = torch.tensor(gain)[:, None]
    v = dense.parametrizations.weight.original1
    g = dense.parametrizations.weight.original0
    stored["weight_norm"] = dense.weight.detach().numpy().T
    gradients = torch.autograd.grad(dense.weight, (v, g), rows)
    stored["weight_norm_grad_kernel"] = gradients[0].numpy().T
    stored["weight_norm_grad_gain"] = gradients[1].numpy().ravel()

    linear = torch.nn.Linear(18, 4).double()
    linear.weight.data[...] = matrix
    dense = torch.nn.utils.parametrizations.spectral_norm(linear, n_power_iterations=50)
    original = dense.parametrizations.weight.original
    dense.weight  # noqa: B018  power iteration runs when the weight is read
    dense.eval()
    stored["spectral_norm"] = dense.weight.detach().numpy().T
    (gradient,) = torch.autograd.grad(dense.weight, original, rows)
    stored["spectral_norm_grad_kernel"] = gradient.numpy().T
    small = {
        name: np.float32(value) if getattr(value, "dtype", None) == np.float64 else value
        for name, value in stored.items()
    }
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **small)


if __name__ == "__main__":
    main(*sys.argv[1:])
