"""Writes quantization_aware.npz: OFQ's quantizers, frozen weights and tracker, by the authors.

Run once with PyTorch and a checkout of github.com/nbasyl/OFQ (commit 7ed37d1):
`python tests/oracles/quantization_aware.py PATH`. The code asks for a GPU, so that its text is
read, turned to the CPU and run.
"""

import ast
import sys
from pathlib import Path

import numpy as np
import torch

BITS = (2, 4)


def authors_names(root):
    scope = {"torch": torch, "np": np}
    for file in ("src/quantization/quantizer/statsq.py", "src/quantization/quantizer/lsq.py"):
        text = (Path(root) / file).read_text()
        exec(text.replace('device="cuda"', 'device="cpu"').replace(".cuda()", ""), scope)
    for node in ast.parse((Path(root) / "cga.py").read_text()).body:
        if getattr(node, "name", "") == "freeze_outside_boundary_weight_idx":
            exec(compile(ast.Module([node], []), "cga.py", "exec"), scope)
    return scope


def main():
    names = authors_names(sys.argv[1])
    rng = np.random.default_rng(0)
    w = rng.normal(size=(6, 40)).astype(np.float32)
    x = rng.normal(size=(3, 5, 8)).astype(np.float32)
    codes = rng.integers(-2, 2, size=(60, 4)).astype(np.float32)
    cotangent = rng.normal(size=x.shape).astype(np.float32)
    stored = {"w": w, "x": x, "codes": codes, "cotangent": cotangent}
    for bits in BITS:
        weight = torch.tensor(w, requires_grad=True)
        stored[f"statsq_{bits}"] = names["StatsQuantizer"](bits, False)(weight).detach().numpy()
        frozen = names["freeze_outside_boundary_weight_idx"](weight.detach(), bits, 0.05)
        stored[f"frozen_{bits}"] = frozen.numpy().astype(bool)
        for signed in (True, False):
            inputs = torch.tensor(x if signed else np.abs(x), requires_grad=True)
            quantizer = names["LsqQuantizer"](bits, all_positive=not signed)
            y = quantizer(inputs)
            y.backward(torch.tensor(cotangent))
            key = f"{bits}_{signed}"
            stored[f"step_{key}"] = quantizer.s.detach().numpy()
            stored[f"lsq_{key}"] = y.detach().numpy()
            stored[f"lsq_dx_{key}"] = inputs.grad.numpy()
            stored[f"lsq_dstep_{key}"] = quantizer.s.grad.numpy()
    three = torch.tensor(x)
    stored["statsq_three_axes"] = names["StatsQuantizer"](2, False)(three).numpy()
    tracker = names["TrackOscillation"](momentum=0.1)
    for row in codes:
        tracker(torch.tensor(row))
    stored["frequency"] = tracker.ema_oscillation.numpy()
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
