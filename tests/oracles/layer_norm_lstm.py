"""Writes layer_norm_lstm.npz: one step of PyTorch's layer-normalised LSTM, with gradients.

In float64, with torch 2.13.0 and benchmarks/fastrnns/custom_lstms.py of github.com/pytorch/pytorch
at 02ed725, its folder on the path:

    PYTHONPATH=pytorch/benchmarks/fastrnns python tests/oracles/layer_norm_lstm.py

That cell carries the normalised cell state on, where the paper carries the state itself: one step
gives the same output, and the norm of the paper's cell.
"""

from pathlib import Path

import numpy as np
import torch
from custom_lstms import LayerNormLSTMCell

BATCH, INPUTS, HIDDEN = 3, 4, 5


def main():
    rng = np.random.default_rng(0)
    cell = LayerNormLSTMCell(INPUTS, HIDDEN).double()
    stored = {"torch_version": torch.__version__}
    for name, parameter in cell.named_parameters():
        stored[f"param_{name}"] = rng.normal(size=parameter.shape).astype(np.float32)
        parameter.data = torch.tensor(stored[f"param_{name}"]).double()
    shapes = {"x": (BATCH, INPUTS), "h": (BATCH, HIDDEN), "c": (BATCH, HIDDEN)}
    shapes["cotangent"] = shapes["h"]
    stored |= {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    x, h, c = (torch.tensor(stored[name]).double().requires_grad_() for name in ("x", "h", "c"))
    y, (_, normed_cell) = cell(x, (h, c))
    y.backward(torch.tensor(stored["cotangent"]).double())
    stored |= {"y": y.detach().numpy(), "normed_cell": normed_cell.detach().numpy()}
    stored |= {f"grad_{name}": value.grad.numpy() for name, value in zip("xhc", (x, h, c))}
    for name, parameter in cell.named_parameters():
        stored[f"grad_{name}"] = parameter.grad.numpy()
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
