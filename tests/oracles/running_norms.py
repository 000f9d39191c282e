"""Writes running_norms.npz: steps of PowerNorm and Unified Normalization by their authors' code.

Run once with PyTorch and the two files of the repositories sIncerass/powernorm (commit 9ea6226,
fairseq/modules/norms/mask_powernorm.py) and hikvision-research/Unified-Normalization (commit
0ce9bf2, image_classification/models/unified_normalization/unified_normalization.py); the stored
numbers are of torch 2.13.0:
`python tests/oracles/running_norms.py mask_powernorm.py unified_normalization.py`.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch

STEPS, BATCH, LENGTH, CHANNELS = 10, 2, 2, 3
POWER = {"power": None, "power_grouped": 3, "power_masked": None}  # groups
UNIFIED = {
    "unified": {"window_size": (3, 4), "warmup_iters": 5},
    "unified_by_itself": {"window_size": (1, 2), "warmup_iters": 5},
    "unified_filtered": {"window_size": (4, 2), "warmup_iters": 5, "outlier_filtration": True},
    "unified_masked": {"window_size": (2, 2), "warmup_iters": 1},
    "unified_late": {"window_size": (2, 3), "warmup_iters": 5},
}


def load(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(module, buffers, inputs, mask):
    """What every step gives: value, gradients, and the module's buffers after it."""
    steps = {}
    module.double().train()
    with torch.no_grad():
        module.weight.copy_(torch.tensor(inputs["scale"]))
        module.bias.copy_(torch.tensor(inputs["bias"]))
    time_first = not hasattr(module, "momentum")  # PowerNorm
    arrange = (lambda a: a.transpose(0, 1)) if time_first else (lambda a: a)
    for x, cotangent in zip(inputs["x"], inputs["cotangent"]):
        x = torch.tensor(x).double().requires_grad_()
        given = {} if mask is None else {"pad_mask": ~torch.tensor(mask)}
        y = arrange(module(arrange(x), **given))
        gradients = torch.autograd.grad(y, (x, module.weight), torch.tensor(cotangent).double())
        found = {"y": y.detach()} | {name: getattr(module, name) for name in buffers}
        if mask is None:  # the authors' means of gradients are not masked
            found |= dict(zip(("dx", "dscale"), gradients))
        for name, value in found.items():
            steps.setdefault(name, []).append(value.squeeze().numpy().copy())
    module.eval()
    steps["evaluated"] = arrange(module(arrange(x))).detach().numpy()
    return {name: np.array(values) for name, values in steps.items()}


def main():
    power_norm, unified_norm = (load(path) for path in sys.argv[1:])
    rng = np.random.default_rng(0)
    size = rng.uniform(0.5, 2, size=(STEPS, 1, 1, CHANNELS))
    size[8] *= 50  # an outlier
    inputs = {
        "x": size * rng.normal(1, 1, size=(STEPS, BATCH, LENGTH, CHANNELS)),
        "cotangent": rng.normal(0.5, 1, size=(STEPS, BATCH, LENGTH, CHANNELS)),
        "scale": rng.normal(1, 0.5, size=CHANNELS),
        "bias": rng.normal(size=CHANNELS),
    }
    inputs = {name: value.astype(np.float32) for name, value in inputs.items()}
    mask = np.array([[True, True], [True, False]])
    stored = {"torch_version": torch.__version__, "mask": mask, **inputs}
    for case, groups in POWER.items():
        module = power_norm.MaskPowerNorm(CHANNELS, warmup_iters=5, group_num=groups or 1)
        if groups is None:
            module.gp = torch.nn.Identity()
        found = train(module, ("running_phi", "ema_gz"), inputs, mask if "masked" in case else None)
        stored |= {f"{case}_{name}": value for name, value in found.items()}
    buffers = ("running_var", "ema_gz", "buffer_x2", "buffer_gz", "skip_counter")
    for case, options in UNIFIED.items():
        module = unified_norm.UN1d(CHANNELS, **options)
        if case == "unified_late":
            module.iters.fill_(2000)  # then gradients are compensated
            module.buffer_x2.fill_(1)
        found = train(module, buffers, inputs, mask if "masked" in case else None)
        stored |= {f"{case}_{name}": value for name, value in found.items()}
    stored = {
        name: value.astype(np.float32) if np.asarray(value).dtype == np.float64 else value
        for name, value in stored.items()
    }
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
