"""Writes gridformer.npz: one level of GridFormer on planes and on a volume, its loss, its sampling.

Made with torch 2.13.0, scipy 1.17.1 and github.com/list17/GridFormer at f0f287f, the checkout on
the path:

    PYTHONPATH=GridFormer python tests/oracles/gridformer.py

stores tests/oracles/gridformer.npz beside it. The level is that of the authors' down path with the
convolutions before the attention left out, as these are the U-Net's, and with 2 groups of channels
in place of 8, to be small. torch_scatter is a loop over the rows; of the authors' compiled tools
and of what they draw with nothing is used.
"""

import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn


def scatter_softmax(src, index):
    """Along the last axis; `index` has size 1 at the channels."""
    out = torch.zeros_like(src)
    for b in range(src.shape[0]):
        for segment in index[b, 0].unique():
            rows = index[b, 0] == segment
            out[b, :, rows] = src[b, :, rows].softmax(-1)
    return out


def scatter_add(src, index, out):
    return out.scatter_add(-1, index.expand_as(src), src)


SCATTER = {
    "scatter_softmax": scatter_softmax,
    "scatter_add": scatter_add,
    "scatter_mean": None,
    "scatter_max": None,
}
STUBS = {
    "torch_scatter": SCATTER,
    "src.utils.libkdtree": {"KDTree": None},
    "src.utils.visualize": {},
}
for name, values in STUBS.items():
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(values)
import src  # noqa: E402

for name in ("encoder", "conv_onet"):  # whose __init__ import every model
    package = types.ModuleType(f"src.{name}")
    package.__path__ = [str(Path(src.__path__[0]) / name)]
    sys.modules[package.__name__] = package

from scripts.boundary_sampling import calculate_constrasitve  # noqa: E402
from src.common import normalize_3d_coordinate, normalize_coordinate  # noqa: E402
from src.conv_onet.training import Trainer  # noqa: E402
from src.encoder.unet import DownConv  # noqa: E402
from src.encoder.unet3d import Encoder  # noqa: E402

BATCH, POINTS, INPUTS, FEATURES, GROUPS = 2, 24, 3, 4, 2
PLANES = ("xy", "xz", "yz")


class Plain(nn.Module):
    """In the place of what comes before the attention in a level on volumes."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def forward(self, x):
        return x


def channels_last(tensor):
    """`[batch, features, last coordinate, ..., first coordinate]` with the axes turned round."""
    return tensor.detach().permute(0, *range(tensor.ndim - 1, 0, -1)).numpy()


def kernel(tensor):
    """As `channels_last`, of a convolution: sizes by coordinate, inputs, outputs."""
    return tensor.detach().permute(*range(tensor.ndim - 1, 0, -1), 0).numpy()


def parameters(level):
    """The level's parameters in a vector, sorted by their names in `jaxref.nn.PointGridBlock`."""
    linear = {"key": level.fc_k[0], "weight": level.fc_w[0]}
    linear |= {f"value.{i}": level.fc_v[2 * i] for i in range(3)}
    linear |= {"position.0": level.fc_pos[0], "position.2": level.fc_pos[3]}
    conv_q = level.conv_q[0] if isinstance(level.conv_q, nn.Sequential) else level.conv_q
    conv = {"query": conv_q, "update": level.weight_conv[0], "residual": level.conv1x1}
    stored = {}
    for name, module in (linear | conv).items():
        turned = kernel(module.weight) if name in conv else module.weight.detach().numpy().T
        stored |= {f"{name}.kernel": turned, f"{name}.bias": module.bias.detach().numpy()}
    for name, module in (("weight_norm", level.fc_w[1]), ("position.1", level.fc_pos[1])):
        stored[f"{name}.scale"] = module.weight.detach().numpy()
        stored[f"{name}.bias"] = module.bias.detach().numpy()
    return np.concatenate([stored[name].ravel() for name in sorted(stored)])


def run_level(level, names, resolution, apply, points):
    """Values of a level in training, and the gradients of half the sum of their squares."""
    level.share_channels = GROUPS
    width = FEATURES // GROUPS
    level.fc_w = nn.Sequential(nn.Linear(FEATURES, width), nn.BatchNorm1d(width), nn.ReLU())
    with torch.no_grad():
        for parameter in level.parameters():
            parameter.normal_(std=0.6)
    shape = (BATCH, FEATURES, *(resolution,) * (2 if len(names) == 3 else 3))
    grids = {name: torch.randn(shape).abs().requires_grad_() for name in names}
    features = torch.randn(BATCH, POINTS, INPUTS, requires_grad=True)
    given = {name: grid * 1.0 for name, grid in grids.items()}
    new_grids, new_features = apply(level, points, given, features)
    outputs = [new_features, *(new_grids[name] for name in names)]
    inputs = [features, level.fc_w[0].weight, level.fc_pos[0].weight, *grids.values()]
    loss = sum(torch.sum(output**2) for output in outputs) / 2
    gradients = torch.autograd.grad(loss, inputs)
    stored = {"parameters": parameters(level)}
    stored |= {"features": features, "new_features": new_features}
    stored |= {"grad_features": gradients[0]}
    stored |= {"grad_weight": gradients[1].T, "grad_position": gradients[2].T}
    for name, tensors in (
        ("grids", grids.values()),
        ("new_grids", outputs[1:]),
        ("grad_grids", gradients[3:]),
    ):
        stored[name] = np.stack([channels_last(tensor) for tensor in tensors])
    return {name: np.asarray(torch.as_tensor(value).detach()) for name, value in stored.items()}


def on_planes(level, points, grids, features):
    level.conv1 = nn.Identity()
    new_grids, _, new_features = level(points, grids, PLANES, features)
    return new_grids, new_features


def on_volume(level, points, grids, features):
    new_grids, _, new_features = level(grids, points, features)
    return new_grids, new_features


def boundary():
    """A dense and a wide cloud, cut by a plane; both limits decide."""
    rng = np.random.default_rng(0)
    points = np.concatenate(
        [rng.uniform(0, 0.07, size=(160, 3)), rng.uniform(-0.5, 0.5, size=(80, 3))]
    ).astype(np.float32)
    occupancy = points @ np.array([1.0, 0.3, 0.2]) > 0.095
    with tempfile.TemporaryDirectory() as folder:
        stored = {"points": points, "occupancies": np.packbits(occupancy)}
        np.savez(Path(folder) / "points.npz", **stored)
        calculate_constrasitve(folder)
        kept = np.load(Path(folder) / "boundary0.08" / "boundary_value.npy").astype(bool)
    return {"boundary_points": points, "boundary_occupancy": occupancy, "boundary_mask": kept}


def margin_loss():
    logits = torch.tensor([-30.0, -2.0, -0.3, 0.0, 0.7, 2.0, 9.0], dtype=torch.float64)
    losses, gradients = [], []
    for margin in (0.0, 2.0):
        for target in (0.0, 1.0):
            for logit in logits:
                z = logit.clone().reshape(1, 1).requires_grad_()
                trainer = Trainer(lambda p, inputs, logits, z=z: z, None, None, device="cpu")
                data = {
                    "points": torch.zeros(1, 1, 3),
                    "points.occ": torch.full((1, 1), target).double(),
                }
                loss = trainer.compute_loss(data, margin)
                losses.append(loss.item())
                gradients.append(torch.autograd.grad(loss, z)[0].item())
    shape = (2, 2, len(logits))  # margins, targets, logits
    return {
        "margin_logits": logits.float().numpy(),
        "margin_losses": np.reshape(losses, shape).astype(np.float32),
        "margin_gradients": np.reshape(gradients, shape).astype(np.float32),
    }


def main():
    torch.manual_seed(0)
    points = torch.rand(BATCH, POINTS, 3) - 0.5
    by_plane = {name: normalize_coordinate(points.clone(), plane=name) for name in PLANES}
    planes = run_level(DownConv(INPUTS, FEATURES, 4, pooling=False), PLANES, 4, on_planes, points)
    planes["positions"] = torch.cat([by_plane["xy"], by_plane["yz"][..., 1:]], -1).numpy()
    volume = run_level(
        Encoder(INPUTS, FEATURES, apply_pooling=False, basic_module=Plain),
        ("grid",),
        2,
        on_volume,
        points,
    )
    volume["positions"] = normalize_3d_coordinate(points.clone()).numpy()
    stored = {"torch_version": torch.__version__, **boundary(), **margin_loss()}
    for case, values in (("planes", planes), ("volume", volume)):
        stored |= {f"{case}_{name}": value for name, value in values.items()}
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
