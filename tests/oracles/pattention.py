"""Writes pattention.npz: the authors' attention over parameter tokens, with its gradients.

Run once with PyTorch and megatron/model/tokenformer.py from Haiyang-W/TokenFormer at commit
4d56c73f, of which the one class is read; the stored numbers are of torch 2.13.0 in float64:

    python tests/oracles/pattention.py tokenformer.py
"""

import ast
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

# our name: theirs
NORMALIZATIONS = {"l2_gelu": "l2_norm_gelu", "gelu_l2": "gelu_l2_norm", "softmax": "softmax"}


def main(path):
    tree = ast.parse(Path(path).read_text("utf-8"))
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Pattention"]
    names = {"torch": torch, "nn": torch.nn, "F": F, "math": math}
    exec(compile(ast.Module(classes, []), path, "exec"), names)
    rng = np.random.default_rng(0)
    rows, inputs, outputs, tokens = 3, 4, 2, 6
    stored = {
        "torch_version": torch.__version__,
        "x": rng.normal(size=(rows, inputs)).astype("f"),
        "key_tokens": rng.normal(size=(tokens, inputs)).astype("f"),
        "value_tokens": rng.normal(size=(tokens, outputs)).astype("f"),
        "cotangent": rng.normal(size=(rows, outputs)).astype("f"),
        "where": rng.random((rows, tokens)) < 0.6,
    }
    for ours, theirs in NORMALIZATIONS.items():
        for masked in (False, True)[: 1 if ours == "softmax" else 2]:
            layer = names["Pattention"](
                SimpleNamespace(norm_activation_type=theirs),
                inputs,
                outputs,
                tokens,
                lambda tokens: tokens.data.copy_(torch.tensor(stored["key_tokens"])),
                lambda tokens: tokens.data.copy_(torch.tensor(stored["value_tokens"])),
            ).double()
            x = torch.tensor(stored["x"]).double().requires_grad_()
            y = layer(x, attn_mask=torch.tensor(stored["where"]) if masked else None)
            gradients = torch.autograd.grad(
                y,
                (x, layer.key_param_tokens, layer.value_param_tokens),
                torch.tensor(stored["cotangent"]).double(),
            )
            case = f"{ours}_masked" if masked else ours
            stored[case] = y.detach().numpy()
            for name, gradient in zip(("x", "key_tokens", "value_tokens"), gradients):
                stored[f"{case}_grad_{name}"] = gradient.numpy()
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main(sys.argv[1])
