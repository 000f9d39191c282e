"""Writes q_vlm.npz: the dependency of layers and the quantizer, from the authors' code.

Run once with PyTorch and a checkout of github.com/ChangyuanWang17/QVLM (commit 191bdc9):
`python tests/oracles/q_vlm.py PATH`. Its modules ask for a GPU when imported, so that the functions
are taken out of their file.
"""

import ast
import sys
from pathlib import Path

import numpy as np
import torch

FUNCTIONS = {"compute_DED", "asymmetric_linear_quantization_params", "quantization"}


def authors_functions(root):
    folder = Path(root) / "custom_bitsandbytes/bitsandbytes/quantization_utils"
    scope = {"torch": torch, "F": torch.nn.functional}
    for file in ("quant_utils.py", "quant_modules.py"):
        for node in ast.walk(ast.parse((folder / file).read_text())):
            if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS:
                exec(compile(ast.Module([node], []), file, "exec"), scope)
    return scope


def main():
    scope = authors_functions(sys.argv[1])
    rng = np.random.default_rng(0)
    x, following = (rng.normal(size=(2, 6, 5)).astype(np.float32) for _ in range(2))
    low, high = x.min((0, 1)) * 0.7, x.max((0, 1)) * 0.7
    tensors = [torch.tensor(array) for array in (x, following, low, high)]

    class Quantizer:
        activation_bit = 4

    stored = {"x": x, "next": following, "low": low, "high": high}
    stored["dependency"] = scope["compute_DED"](None, tensors[0].abs(), tensors[1].abs()).numpy()
    stored["quantized"] = scope["quantization"](Quantizer(), tensors[0], *tensors[2:]).numpy()
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
