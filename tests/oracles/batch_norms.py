"""Writes batch_norms.npz: norms with batch statistics, and group norm, with their gradients.

Run once with PyTorch, the README.md of joe-siyuan-qiao/Batch-Channel-Normalization (its code
blocks are read) and tta_experiments/unmixtns.py of devavratTomar/unmixtns at commit 8e12b9f; the
stored numbers are of torch 2.13.0 in float64:

    python tests/oracles/batch_norms.py README.md unmixtns.py
"""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

BATCH, FEATURES, GROUPS, COMPONENTS = 6, 4, 2, 3
EPSILON, KEPT, ALPHA = 1e-3, 0.8, 0.7


def channels_last(tensor):
    return tensor.movedim(1, -1).detach().numpy()


def biased(running_var, initial, updates, count):
    """The running variance had PyTorch fed it with biased batch variances."""
    kept = KEPT**updates * initial
    return kept + (running_var - kept) * (count - 1) / count


def authors_classes(readme):
    names = {"nn": nn, "torch": torch, "Parameter": nn.Parameter}
    for block in re.findall(r"```python\n(.*?)```", Path(readme).read_text("utf-8"), re.DOTALL):
        exec(block, names)
    return names["BCNorm"], names["EstBN"]


def trained_batch_norm(stored):
    norm = nn.BatchNorm2d(FEATURES, eps=EPSILON, momentum=1 - KEPT).double()
    for name, value in (
        ("weight", "scale"),
        ("bias", "bias"),
        ("running_mean", "mean"),
        ("running_var", "var"),
    ):
        getattr(norm, name).data[:] = torch.tensor(stored[value])
    return norm


def main(readme, unmix):
    rng = np.random.default_rng(0)
    shape = (BATCH, 3, 2, FEATURES)
    stored = {"x": 1 + 2 * rng.normal(size=shape), "cotangent": rng.normal(size=shape)}
    for name in ("scale", "bias", "mean"):
        stored[name] = rng.normal(size=FEATURES)
    stored["var"] = rng.uniform(0.5, 2, size=FEATURES)
    stored["group_scale"], stored["group_bias"] = rng.normal(size=(2, GROUPS))
    stored = {name: value.astype(np.float32) for name, value in stored.items()}

    def record(name, run, parameters):
        """Stores the result of run(x) and its gradients."""
        x = torch.tensor(stored["x"]).double().movedim(-1, 1).contiguous().requires_grad_()
        y = run(x)
        cotangent = torch.tensor(stored["cotangent"]).double().movedim(-1, 1)
        gradients = torch.autograd.grad(y, [x, *parameters], cotangent)
        stored[f"{name}_y"] = channels_last(y)
        stored[f"{name}_grad_x"] = channels_last(gradients[0])
        for i, gradient in enumerate(gradients[1:]):
            stored[f"{name}_grad_{i}"] = gradient.numpy().ravel()

    positions = shape[1] * shape[2]
    initial = stored["var"].astype(np.float64)

    norm = trained_batch_norm(stored)
    record("batch", norm, [norm.weight, norm.bias])
    stored["batch_mean"] = norm.running_mean.numpy()
    stored["batch_var"] = biased(norm.running_var.numpy(), initial, 1, BATCH * positions)
    norm = trained_batch_norm(stored).eval()
    record("evaluation", norm, [norm.weight, norm.bias])

    norm = trained_batch_norm(stored)
    chunks = lambda x: torch.cat([norm(part) for part in x.chunk(3)])
    record("ghost", chunks, [norm.weight, norm.bias])
    stored["ghost_mean"] = norm.running_mean.numpy()
    stored["ghost_var"] = biased(norm.running_var.numpy(), initial, 3, BATCH // 3 * positions)

    scale, bias = (torch.tensor(stored[n]).double().requires_grad_() for n in ("scale", "bias"))
    record("group", lambda x: F.group_norm(x, GROUPS, scale, bias, EPSILON), [scale, bias])

    def mixed(x):
        moments = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        source = torch.tensor(stored["mean"]), torch.tensor(stored["var"])
        mean, var = ((ALPHA * s + (1 - ALPHA) * t)[:, None, None] for s, t in zip(source, moments))
        y = (x - mean) / torch.sqrt(var + EPSILON)
        return y * scale[:, None, None] + bias[:, None, None]

    record("alpha", mixed, [scale, bias])

    batch_channel, estimated = authors_classes(readme)

    def from_source(norm):  # their epsilon is 1e-5
        for ours, theirs in (("mean", "running_mean"), ("var", "running_var")):
            getattr(norm, theirs).data[:] = torch.tensor(stored[ours])
        norm.weight.data[:], norm.bias.data[:] = map(
            torch.tensor, (stored["scale"], stored["bias"])
        )
        if hasattr(norm, "estbn_moving_speed"):
            norm.estbn_moving_speed[:] = 1 - KEPT
        else:
            norm.momentum = 1 - KEPT

    norm = estimated(FEATURES).double()
    from_source(norm)
    record("estimated", norm, [norm.weight, norm.bias])
    stored["estimated_mean"] = norm.running_mean.numpy()
    stored["estimated_var"] = norm.running_var.numpy()
    for name, estimate in (("batch_channel", False), ("estimated_channel", True)):
        norm = batch_channel(FEATURES, GROUPS, 1e-5, estimate).double()
        from_source(norm.bn)
        norm.weight.data[0, :, 0] = torch.tensor(stored["group_scale"])
        norm.bias.data[0, :, 0] = torch.tensor(stored["group_bias"])
        record(name, norm, [norm.bn.weight, norm.bn.bias, norm.weight, norm.bias])

    torch.manual_seed(0)
    norm = runpy.run_path(unmix)["UnMixTNS2d"](trained_batch_norm(stored), 1 - KEPT, COMPONENTS)
    stored["unmix_means"] = norm.running_means_mat.numpy()
    stored["unmix_variances"] = norm.running_vars_mat.numpy()
    record("unmix", norm, [norm.weight, norm.bias])
    stored["unmix_next_means"] = norm.running_means_mat.numpy()
    stored["unmix_next_variances"] = norm.running_vars_mat.numpy()

    stored = {name: np.asarray(value, np.float32) for name, value in stored.items()}
    stored["torch_version"] = torch.__version__
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main(*sys.argv[1:])
