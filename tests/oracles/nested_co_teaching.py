"""Writes nested_co_teaching.npz: the authors' distribution of widths, selection and losses.

Run once with PyTorch and a checkout of github.com/yingyichen-cyy/Nested-Co-teaching (9a2fc40); the
stored numbers are of torch 2.13.0: `python tests/oracles/nested_co_teaching.py NESTED_CO_TEACHING`.
"""

import ast
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn


def function(path, name):
    (node,) = (
        node
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    scope = {"np": np}
    exec(compile(ast.Module([node], []), path, "exec"), scope)
    return scope[name]


def main(checkout):
    sys.path.append(f"{checkout}/co_teaching_resnet")
    import loss

    rng = np.random.default_rng(0)
    stored = {"torch_version": torch.__version__}
    distribution = function(Path(checkout, "nested/train_resnet.py"), "GaussianDist")
    for std in (3.0, 100.0):
        stored[f"distribution_{std}"] = distribution(1.0, std, 12)
    features, kernels = rng.normal(size=(2, 10, 6)), rng.normal(size=(2, 6, 4))
    labels = rng.integers(4, size=(2, 10))
    stored |= {"features": features, "kernels": kernels, "labels": labels}
    layers = [nn.Linear(6, 4, bias=False).double() for _ in range(2)]
    for layer, kernel in zip(layers, kernels):
        layer.weight.data = torch.tensor(kernel.T)
    x, y = torch.tensor(features), torch.tensor(labels)
    width, masks = 4, [(torch.arange(6) <= k).double() for k in range(6)]
    with torch.no_grad():  # each model on its half, with a fixed width
        logits = [layer(half * masks[4]) for layer, half in zip(layers, x)]
    for rate in (0.0, 0.3, 0.55):
        *chosen, _ = loss.SampleSelection(*logits, *y, rate)
        stored[f"chosen_{rate}"] = np.stack([np.sort(c.numpy()) for c in chosen])
        only = np.eye(6)[width - 1]  # the width of the update, drawn for certain
        values = loss.Classification(
            *x, *y, *chosen, nn.Identity(), layers[0], nn.Identity(), layers[1], only, masks, None
        )
        stored[f"losses_{rate}"] = [value.item() for value in values]
        stored[f"gradients_{rate}"] = np.stack(
            [torch.autograd.grad(v, net.weight)[0].numpy().T for v, net in zip(values, layers)]
        )
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main(*sys.argv[1:])
