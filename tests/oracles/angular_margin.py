"""Writes angular_margin.npz: margin softmax losses with their gradients, from their authors' code.

Run once with PyTorch and pytorch_metric_learning 2.8.1, on checkouts of the authors' repositories;
the stored numbers are of torch 2.13.0, in float64:
`python tests/oracles/angular_margin.py ADAFACE UNPG CFCD`
with github.com/mk-minchul/AdaFace at c60eaa7, github.com/Jung-Jun-Uk/UNPG at a6f9c17 and
github.com/bassyess/CFCD at 5db8545.
"""

import ast
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses


def from_source(path, *names, **scope):
    """Definitions of a file whose imports ask for more than they need."""
    tree = ast.parse(Path(path).read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) in names]
    scope |= {"torch": torch, "F": F, "nn": torch.nn, "Module": torch.nn.Module}
    exec(compile(tree, path, "exec"), scope)
    return [scope[name] for name in names]


def module(path, **modules):
    """A file run as a module, with stand-ins for others that it imports."""
    for name, content in modules.items():
        sys.modules[name.replace("__", ".")] = content
    found = types.ModuleType(Path(path).stem)
    exec(compile(Path(path).read_text(), path, "exec"), found.__dict__)
    return found


def main(adaface_path, unpg_path, cfcd_path):
    torch.set_default_dtype(torch.float64)
    rng = np.random.default_rng(0)
    labels = np.array([0, 2, 2, 4, 1, 0, 5, 2])
    weights = rng.normal(size=(7, 5)).astype(np.float32)
    lengths = rng.uniform(0.2, 40, size=(2, 8, 1))
    directions = rng.normal(size=(2, 8, 5)) + 0.8 * weights[labels]
    directions[0, 3] = -weights[4] + 0.1 * rng.normal(size=5)  # θ + m passes π
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    stored = {
        "torch_version": torch.__version__,
        "labels": labels,
        "weights": weights,
        "embeddings": (directions * lengths).astype(np.float32),
        "cotangent": rng.normal(size=8).astype(np.float32),
    }
    y, cotangent = torch.tensor(labels), torch.tensor(stored["cotangent"]).double()

    def store(name, loss, step=0):
        embeddings = torch.tensor(stored["embeddings"][step]).double().requires_grad_()
        w = torch.tensor(weights).double().requires_grad_()
        values = loss(embeddings, w)
        gradients = torch.autograd.grad(values, (embeddings, w), cotangent)
        stored.update(zip((name, f"{name}_d_e", f"{name}_d_w"), (values.detach(), *gradients)))

    def package(kind, **options):
        def loss(e, w):
            head = kind(7, 5, **options)
            del head.W
            head.W = w.T
            head.cast_types = lambda *_: None
            return head.compute_loss(e, y, None, e, y)["loss"]["losses"]

        return loss

    store("arcface", package(losses.ArcFaceLoss, margin=np.degrees(0.5)))
    store("cosface", package(losses.CosFaceLoss, margin=0.4, scale=32))
    store("normalized", package(losses.NormalizedSoftmaxLoss, temperature=0.1))

    heads = module(Path(adaface_path) / "head.py")
    adaface = heads.AdaFace(5, 7, t_alpha=0.3)

    def adaface_loss(e, w):
        del adaface._parameters["kernel"]
        adaface.kernel = w.T
        norms = e.norm(dim=1, keepdim=True)
        values = F.cross_entropy(adaface(e / norms, norms, y), y, reduction="none")
        del adaface.kernel
        adaface._parameters["kernel"] = None
        return values

    for step in range(2):
        store(f"adaface_{step}", adaface_loss, step)
        stored[f"adaface_{step}_state"] = np.array([adaface.batch_mean[0], adaface.batch_std[0]])

    models = Path(unpg_path) / "recognition" / "models"
    cosface, unpg = from_source(models / "head.py", "CosFace", "UNPG")
    names = ("box_and_whisker_algorithm", "convert_label_to_similarity")
    filtered, pairs = from_source(models / "build.py", *names)

    def unpg_loss(e, w):
        head, criterion = cosface(5, 7, 64.0, 0.4), unpg(64.0)
        del head.weight
        head.weight = w
        criterion.cross_entropy = torch.nn.CrossEntropyLoss(reduction="none")
        negatives = filtered(pairs(F.normalize(e), y)[1], 0.5)
        return criterion(head(e, y), negatives[None], y)

    store("unpg", unpg_loss, 1)

    cfg = SimpleNamespace(NUM_GPUS=1, MODEL=SimpleNamespace(HEADS=SimpleNamespace(ALPHA=0.02)))
    logging = types.ModuleType("core.logging")
    logging.get_logger = lambda name: None
    config = types.ModuleType("core.config")
    config.cfg = cfg
    core = types.ModuleType("core")
    core.logging = logging
    others = {"core": core, "core__logging": logging, "core__config": config}
    madacos = module(Path(cfcd_path) / "core" / "model" / "madacos.py", **others)

    def madacos_loss(e, w):
        head = madacos.MadaCos(5, 7)
        del head.weight
        head.weight = w
        return F.cross_entropy(head(e, y), y, reduction="none")

    store("madacos", madacos_loss)
    store("madacos_loose", madacos_loss, 1)
    with torch.no_grad():
        for name, step in (("madacos", 0), ("madacos_loose", 1)):
            e = torch.tensor(stored["embeddings"][step]).double()
            cosines = F.normalize(e) @ F.normalize(torch.tensor(weights).double()).T
            _, margin, scale, *_ = madacos.MadaCosLayer(alpha=0.02)(cosines, y)
            stored[f"{name}_scale_margin"] = np.array([scale.item(), margin.item()])
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main(*sys.argv[1:])
