"""Writes quasi_lstm.npz: the authors' Quasi-LSTM block on two segments, with gradients.

In float64, with torch 2.13.0 and github.com/languini-kitchen/languini-kitchen at the checkout on
the path, whose projects import one another by their bare names:

    PYTHONPATH=languini-kitchen:languini-kitchen/languini/projects/lstm \
        python tests/oracles/quasi_lstm.py

Their cell adds 1e-8 to forget gates before it takes the logarithm.
"""

from pathlib import Path

import numpy as np
import torch
from lib import Block

FEATURES, MLP_FEATURES, HEADS, HEAD_DIM, LENGTH, BLOCK_LENGTH, BATCH = 6, 10, 2, 3, 8, 4, 2


def main():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    block = Block(
        LENGTH, FEATURES, MLP_FEATURES, HEAD_DIM, HEADS, 4, False, BLOCK_LENGTH, "block"
    ).double()
    stored = {"torch_version": torch.__version__}
    for name, parameter in block.named_parameters():
        value = rng.normal(size=parameter.shape).astype(np.float32)
        parameter.data = torch.tensor(value).double()
        stored[f"param_{name}"] = value
    stored["x"] = rng.normal(size=(2, BATCH, LENGTH, FEATURES)).astype(np.float32)
    stored["cotangent"] = rng.normal(size=(BATCH, LENGTH, FEATURES)).astype(np.float32)
    x = torch.tensor(stored["x"]).double().requires_grad_()
    zeros = torch.zeros(BATCH, HEADS, HEAD_DIM).double()
    _, state = block(x[0], (zeros, zeros))
    y, (c, h) = block(x[1], state)
    y.backward(torch.tensor(stored["cotangent"]).double())
    stored |= {"y": y.detach().numpy(), "c": c.detach().numpy(), "h": h.detach().numpy()}
    stored["grad_x"] = x.grad.numpy()
    for name in ("rnn.linear_Fx", "rnn.linear_Zx", "rnn.linear_post_head"):
        stored[f"grad_{name}.weight"] = block.get_parameter(f"{name}.weight").grad.numpy()
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
