"""Writes alibi.npz: ALiBi's slopes and causal attention with its biases, from BLOOM in float64.

Run once with PyTorch and transformers; the stored numbers are of torch 2.13.0 and transformers
5.24.0: `python tests/oracles/alibi.py`.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

HEAD_COUNTS = (1, 2, 6, 8, 12, 20)
BATCH, LENGTH, HEADS, DIM = 2, 5, 6, 4
NAMES = ("query", "key", "value")


def main():
    rng = np.random.default_rng(0)
    stored = {"torch_version": torch.__version__, "transformers_version": transformers.__version__}
    for heads in HEAD_COUNTS:  # at the key of position 1 the tensor is the slope itself
        alibi = build_alibi_tensor(torch.ones(1, 2, dtype=torch.int64), heads, torch.float64)
        stored[f"slopes_{heads}"] = alibi[:, 0, 1].numpy()

    shape = (BATCH, LENGTH, HEADS, DIM)
    arrays = [(2 * rng.normal(size=shape)).astype(np.float32) for _ in NAMES]
    cotangent = rng.normal(size=shape).astype(np.float32)
    tensors = [torch.tensor(array).double().requires_grad_() for array in arrays]
    query, key, value = (tensor.transpose(1, 2) for tensor in tensors)
    every_token = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    alibi = build_alibi_tensor(every_token, HEADS, torch.float64).reshape(BATCH, HEADS, 1, LENGTH)
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    bias = alibi.expand(-1, -1, LENGTH, -1).masked_fill(later, -torch.inf)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2)
    gradients = torch.autograd.grad(output, tensors, torch.tensor(cotangent).double())
    stored |= {"cotangent": cotangent, "output": output.detach().numpy().astype(np.float32)}
    for name, array, gradient in zip(NAMES, arrays, gradients):
        stored[name] = array
        stored[f"grad_{name}"] = gradient.numpy().astype(np.float32)
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
