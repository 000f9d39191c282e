"""Writes bitsandbytes_int8.npz: vector-wise int8 quantization and LLM.int8 products.

Run once with bitsandbytes, on a CPU: `python tests/oracles/bitsandbytes_int8.py`; the stored
numbers are of bitsandbytes 0.50.2 with torch 2.13.0.
"""

from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import torch


def main():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 32)).astype(np.float32)
    # Every entry of an outlier feature is one: otherwise bitsandbytes lets its small entries count
    # for the row scales of the rest.
    x[:, [5, 20]] = 30 * np.sign(x[:, [5, 20]]) + x[:, [5, 20]]
    w = rng.normal(size=(32, 10)).astype(np.float32)
    cotangent = rng.normal(size=(6, 10)).astype(np.float32)
    # The layer computes in float16.
    x, w, cotangent = (value.astype(np.float16).astype(np.float32) for value in (x, w, cotangent))
    x_codes, x_absmax, _ = bnb.functional.int8_vectorwise_quant(torch.tensor(x))
    w_codes, w_absmax, _ = bnb.functional.int8_vectorwise_quant(torch.tensor(w.T.copy()))
    stored = {
        "versions": f"bitsandbytes {bnb.__version__}, torch {torch.__version__}",
        "x": x,
        "w": w,
        "cotangent": cotangent,
        "x_codes": x_codes.numpy(),
        "x_absmax": x_absmax.numpy(),
        "w_codes": w_codes.numpy().T,
        "w_absmax": w_absmax.numpy(),
    }
    for name, threshold in (("plain", 0.0), ("decomposed", 6.0)):
        layer = bnb.nn.Linear8bitLt(32, 10, bias=False, has_fp16_weights=False, threshold=threshold)
        layer.load_state_dict({"weight": torch.tensor(w.T.copy())})
        layer = layer.to("cpu")
        with torch.no_grad():
            stored[name] = layer.eval()(torch.tensor(x)).numpy()
        inputs = torch.tensor(x, requires_grad=True)
        y = layer.train()(inputs)  # on a CPU, the float product with the dequantized kernel
        stored[f"{name}_gradient"] = torch.autograd.grad(y, inputs, torch.tensor(cotangent))[0]
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
