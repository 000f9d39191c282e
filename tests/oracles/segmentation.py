"""Writes segmentation.npz: segmentation losses with their gradients, from PyTorch.

Run once with PyTorch, MONAI, segmentation_models_pytorch and a folder with checkouts of the
authors' code, which is not part of this repository:
`python tests/oracles/segmentation.py FOLDER`, FOLDER holding
SPOCKMIP (github.com/soumickmj/SPOCKMIP, 1ebfbd3), active-boundary-loss (wangchi95, 1511507),
BoundaryDoULoss (sunfan-bvb, 9f1185c), RMI (ZJULearning, 10a40cd), t-loss (Digital-Dermatology,
f132e87). The stored numbers are of torch 2.13.0, monai 1.6.1, segmentation_models_pytorch 0.6.0.
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch

STUBS = ("medpy", "SimpleITK", "skimage", "cv2", "torchvision")


def load(path, name, **before):
    """A module from a file, with `before` as its package's other modules."""
    package = types.ModuleType(name)
    package.__path__ = [str(path.parent)]
    sys.modules[name] = package
    for other, module in before.items():
        sys.modules[f"{name}.{other}"] = module
    spec = importlib.util.spec_from_file_location(f"{name}.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Compose:
    def __init__(self, steps):
        self.steps = steps

    def __call__(self, x):
        for step in self.steps:
            x = step(x)
        return x


def main(folder):
    for stub in STUBS:
        sys.modules[stub] = mock.MagicMock()
    sys.modules["torchvision"].transforms.Compose = Compose
    torch.Tensor.cuda = lambda self, *a, **k: self
    torch.cuda.DoubleTensor = torch.DoubleTensor
    torch.cholesky = torch.linalg.cholesky
    stored = {"torch_version": torch.__version__}
    rng = np.random.default_rng(0)

    def keep(name, loss, argument):
        """Losses, and the gradient of their weighted sum, channels first."""
        loss = loss.squeeze()
        weights = torch.arange(1.0, loss.numel() + 1).reshape(loss.shape)
        (gradient,) = torch.autograd.grad((weights * loss).sum(), argument)
        stored[name] = loss.detach().numpy()
        stored[f"{name}_gradient"] = gradient.numpy().astype(np.float32)

    def channels_first(x):
        return torch.tensor(np.moveaxis(x, -1, 1)).double()

    # MONAI and segmentation_models_pytorch
    from monai import losses as monai

    logits = (2 * rng.normal(size=(2, 7, 6, 3))).astype(np.float32)
    labels = rng.integers(3, size=(2, 7, 6))
    stored |= {"logits": logits, "labels": labels}
    one_hot = channels_first(np.eye(3)[labels])
    p = torch.softmax(channels_first(logits), 1).requires_grad_()
    stored["probabilities"] = np.moveaxis(p.detach().numpy(), 1, -1).astype(np.float32)
    smooth = {"smooth_nr": 1.0, "smooth_dr": 1.0}
    peers = {
        "dice": monai.DiceLoss(reduction="none", **smooth),
        "dice_batch": monai.DiceLoss(reduction="none", batch=True, **smooth),
        "dice_squared": monai.DiceLoss(reduction="none", squared_pred=True, **smooth),
        "jaccard": monai.DiceLoss(reduction="none", jaccard=True, **smooth),
        "tversky": monai.TverskyLoss(reduction="none", alpha=0.3, beta=0.7, **smooth),
        "hausdorff": monai.HausdorffDTLoss(reduction="none", alpha=1.5, include_background=True),
    }
    for name, peer in peers.items():
        keep(name, peer(p, one_hot), p)
    z = channels_first(logits).requires_grad_()
    matrix = np.array([[0, 1, 1], [1, 0, 0.3], [1, 0.3, 0]])
    wasserstein = monai.GeneralizedWassersteinDiceLoss(matrix, reduction="none", **smooth)
    keep("wasserstein", wasserstein(z, torch.tensor(labels)), z)
    two = torch.softmax(channels_first(logits[..., :2]), 1).requires_grad_()
    two_hot = channels_first(np.eye(2)[np.minimum(labels, 1)])
    from monai.losses import unified_focal_loss as unified

    focal = unified.AsymmetricFocalLoss(delta=0.7, gamma=0.3, reduction="none")(two, two_hot)
    overlap = unified.AsymmetricFocalTverskyLoss(delta=0.7, gamma=0.3, reduction="none")
    both = 0.4 * focal.sum(1).mean((1, 2)) + 0.6 * overlap(two, two_hot).mean(1)
    keep("unified", both, two)
    spec = importlib.util.find_spec("segmentation_models_pytorch")
    lovasz_file = Path(spec.origin).parent / "losses" / "lovasz.py"
    constants = load(lovasz_file.parent / "constants.py", "smp")
    lovasz = load(lovasz_file, "smp", constants=constants).LovaszLoss
    keep("lovasz", lovasz("multiclass")(z.float(), torch.tensor(labels)), z)
    hinge = torch.tensor(logits[..., 0]).double().requires_grad_()
    keep("lovasz_hinge", lovasz("binary")(hinge.float(), torch.tensor(labels > 0).float()), hinge)

    # SPOCKMIP: the terms of its training step
    focal_tversky = load(folder / "SPOCKMIP/Evaluation/evaluate.py", "spockmip").FocalTverskyLoss()
    volume = rng.uniform(size=(2, 4, 6, 8)).astype(np.float32)
    coarse = rng.uniform(size=(2, 2, 3, 4)).astype(np.float32)
    vessels = (rng.uniform(size=volume.shape) < 0.2).astype(np.float32)
    stored |= {"volume": volume, "coarse": coarse, "vessels": vessels}
    y = torch.tensor(vessels).double()
    fine = torch.tensor(volume).double().requires_grad_()
    total = torch.zeros(())
    for weight, output in ((1, fine), (0.66, torch.tensor(coarse).double())):
        output = torch.nn.functional.interpolate(output[:, None], size=y.shape[1:])[:, 0]
        projected = sum(
            focal_tversky(torch.amax(sample, axis), torch.amax(truth, axis))
            for sample, truth in zip(output, y)
            for axis in (0, 1, 2)
        )
        total = total + weight * (0.7 * focal_tversky(output, y) + 0.3 * projected / len(output))
    keep("spockmip", total, fine)
    keep("focal_tversky", focal_tversky(fine, y), fine)

    # Active boundary loss: regions of equal logits, so that its threshold needs no steps
    labels = np.zeros((1, 12, 14), int)
    labels[:, 3:9, 4:11] = 1
    region = np.roll(labels, (2, -2), axis=(1, 2)) + (np.arange(14) > 11)
    moved = rng.normal(size=(4, 3))[region].astype(np.float32)
    stored |= {"moved_labels": labels, "moved_logits": moved}
    smoothing = types.ModuleType("label_smooth")
    smoothing.LabelSmoothSoftmaxCEV1 = None
    active = load(folder / "active-boundary-loss/abl.py", "abl", label_smooth=smoothing)
    loss = active.ABL(max_N_ratio=0.5, label_smoothing=0)
    z = channels_first(moved).requires_grad_()
    keep("active_boundary", loss(z.float(), torch.tensor(labels)), z)
    stored["active_distance"] = loss.get_dist_maps(loss.gt2boundary(torch.tensor(labels))).numpy()

    # Boundary difference over union: one object that is middling, one that is large
    difference = load(folder / "BoundaryDoULoss/TransUNet/utils.py", "bdou").BoundaryDoULoss(1)
    for name, side in (("middling", 12), ("large", 44)):
        mask = np.zeros((1, 48, 48))
        mask[:, 2 : 2 + side, 3 : 3 + side] = 1
        score = np.clip(np.roll(mask, 3, axis=1) * 0.9 + 0.05, 0, 1)
        q = torch.tensor(score).requires_grad_()
        keep(
            f"difference_{name}",
            difference._adaptive_size(q.float(), torch.tensor(mask).float()),
            q,
        )

    # Region mutual information, each image by itself
    for name in ("RMI", "RMI.losses"):
        sys.modules[name] = types.ModuleType(name)
    utilities = load(folder / "RMI/losses/rmi/rmi_utils.py", "RMI.losses.rmi")
    sys.modules["RMI.losses.rmi"].rmi_utils = utilities
    rmi = load(folder / "RMI/losses/rmi/rmi.py", "RMI.losses.rmi", rmi_utils=utilities)
    maps = (2 * rng.normal(size=(2, 13, 11, 2))).astype(np.float32)
    truth = rng.integers(2, size=(2, 13, 11))
    stored |= {"maps": maps, "truth": truth}
    z = channels_first(maps).requires_grad_()
    bound = rmi.RMILoss(2, rmi_pool_way=1, rmi_pool_size=2, rmi_pool_stride=2)
    hot = channels_first(np.eye(2)[truth])
    values = [
        bound.rmi_lower_bound(hot[i : i + 1], z[i : i + 1].sigmoid() + 1e-6).double()
        for i in range(2)
    ]
    keep("mutual_information", torch.stack(values), z)

    # Robust t-loss, with the identity for its scale matrix
    config = types.SimpleNamespace(data=types.SimpleNamespace(image_size=6), device="cpu")
    t_loss = load(folder / "t-loss/tloss.py", "tloss").TLoss(config, reduction="none", epsilon=0.0)
    t_loss.double()
    t_loss.lambdas = torch.zeros(6, 6)
    t_loss.nu.data.fill_(0.7)
    t_loss.D = t_loss.D.double()
    guess = rng.uniform(size=(3, 6, 6)).astype(np.float32)
    noisy = (rng.uniform(size=(3, 6, 6)) < 0.5).astype(np.float32)
    stored |= {"guess": guess, "noisy": noisy}
    g = torch.tensor(guess).double().requires_grad_()
    keep("t_loss", t_loss(g, torch.tensor(noisy).double()), g)
    (slope,) = torch.autograd.grad(t_loss(g, torch.tensor(noisy).double()).sum(), t_loss.nu)
    stored["t_loss_log_nu_gradient"] = slope.numpy()

    from monai.metrics import compute_hausdorff_distance

    masks = np.zeros((2, 3, 14, 12), bool)  # predicted and true
    masks[:, :, 3:9, 2:8] = True
    masks[0] ^= rng.uniform(size=masks[0].shape) < 0.05
    masks[0, 2] = np.roll(masks[0, 2], (3, 2), axis=(0, 1))
    stored["masks"] = masks
    for name, spacing in (("hausdorff_95", None), ("hausdorff_95_spacing", (2.0, 0.5))):
        distances = [
            compute_hausdorff_distance(
                *(torch.tensor(mask)[None, None].float() for mask in pair),
                include_background=True,
                percentile=95,
                spacing=spacing,
            ).item()
            for pair in masks.swapaxes(0, 1)
        ]
        stored[name] = np.array(distances)
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
