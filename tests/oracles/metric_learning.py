"""Writes metric_learning.npz: losses of metric learning with their gradients, in float64.

Run once with PyTorch and pytorch_metric_learning 2.8.1, on checkouts of the authors' repositories;
the stored numbers are of torch 2.13.0:
`python tests/oracles/metric_learning.py MEAN_FIELD FSL_LOSS CFCD`
with the official code of "Mean Field Theory in Deep Metric Learning" (its folder `loss`),
github.com/maumruiz/FSL-Loss at 249405f and github.com/bassyess/CFCD at 5db8545.
"""

import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from pytorch_metric_learning import losses, reducers


def module(path, **modules):
    """A file run as a module, with stand-ins for others that it imports."""
    for name, content in modules.items():
        sys.modules[name.replace("__", ".")] = content
    found = types.ModuleType(Path(path).stem)
    exec(compile(Path(path).read_text(), path, "exec"), found.__dict__)
    return found


def main(mean_field_path, fsl_path, cfcd_path):
    torch.set_default_dtype(torch.float64)
    rng = np.random.default_rng(0)
    stored = {
        "torch_version": torch.__version__,
        "embeddings": rng.normal(size=(9, 4)).astype(np.float32),
        "labels": np.array([0, 3, 0, 1, 3, 3, 5, 1, 0]),
        "targets": rng.uniform(1, 5, size=9).astype(np.float32),
        "fields": rng.normal(size=(6, 4)).astype(np.float32),
        "query": rng.normal(size=(8, 5)).astype(np.float32),
        "negatives": rng.normal(size=(2, 8, 5)).astype(np.float32),
    }
    stored["embeddings"] += 0.7 * stored["fields"][stored["labels"]]
    noise = 0.6 * rng.normal(size=(8, 5))
    stored["positive"] = (stored["query"][rng.permutation(8)] + noise).astype(np.float32)
    labels = torch.tensor(stored["labels"])

    def store(name, loss, *inputs):
        values = [torch.tensor(stored[key]).double().requires_grad_() for key in inputs]
        value = loss(*values)
        gradients = torch.autograd.grad(value, values, allow_unused=True)
        stored[name] = value.detach()
        stored.update({f"{name}_d_{k}": g for k, g in zip(inputs, gradients) if g is not None})

    tcm = losses.ThresholdConsistentMarginLoss(
        lambda_plus=0.8, lambda_minus=1.2, margin_plus=0.7, margin_minus=0.1
    )
    store("tcm", lambda e: tcm(e, labels), "embeddings")

    gaps = np.abs(stored["targets"][:, None] - stored["targets"])
    i, j, k = np.nonzero(
        (gaps[:, :, None] < gaps[:, None])
        & ~np.eye(9, dtype=bool)[:, :, None]
        & ~np.eye(9, dtype=bool)[:, None]
    )
    triplets = tuple(torch.tensor(index) for index in (i, j, k))
    for name, reducer in (
        ("active", reducers.AvgNonZeroReducer()),
        ("valid", reducers.MeanReducer()),
    ):
        triplet = losses.TripletMarginLoss(margin=0.2, reducer=reducer)
        store(f"triplet_{name}", lambda e: triplet(e, labels, triplets), "embeddings")

    sys.path.insert(0, mean_field_path)
    from loss.classwise_multisimilarity_loss import ClassWiseMultiSimilarityLoss
    from loss.mean_field_classwise_multisimilarity_loss import (
        MeanFieldClassWiseMultiSimilarityLoss,
    )
    from loss.mean_field_contrastive_loss import MeanFieldContrastiveLoss

    def with_fields(kind, of_fields, **options):
        loss = kind(6, 4, mf_reg=0.7, mf_power=2, **options)

        def of_batch(e, fields):
            del loss.W
            loss.W = fields.T
            return loss.get_loss(torch.nn.functional.normalize(e), labels)

        def regularizer(fields):
            del loss.W
            loss.W = fields.T
            return loss.get_reg()

        del loss._parameters["W"]
        loss.W = None
        return regularizer if of_fields else of_batch

    kinds = {
        "contrastive": (MeanFieldContrastiveLoss, {"pos_margin": 0.05, "neg_margin": 0.9}),
        "similarity": (
            MeanFieldClassWiseMultiSimilarityLoss,
            {"alpha": 0.5, "beta": 20.0, "base": 0.4},
        ),
    }
    for name, (kind, options) in kinds.items():
        store(f"mean_field_{name}", with_fields(kind, False, **options), "embeddings", "fields")
        store(f"regularizer_{name}", with_fields(kind, True, **options), "fields")
    parent = ClassWiseMultiSimilarityLoss(0.5, 20.0, 0.4)
    store("classwise", lambda e: parent(e, labels), "embeddings")

    util = types.ModuleType("util")
    util.globals = types.ModuleType("util.globals")
    icnn = module(
        Path(fsl_path) / "algorithms" / "icnn_loss.py", util=util, util__globals=util.globals
    )
    ids = torch.arange(6)
    for name, options in (("two", {"k": 2}), ("all", {"k": 8}), ("wide", {"k": 3, "ipc": 6})):
        store(f"icnn_{name}", lambda e: icnn.modified_score(e, labels, **options), "embeddings")
    store(
        "icnn_target",
        lambda e, t: icnn.modified_score(e, labels, t, ids, k=3),
        "embeddings",
        "fields",
    )
    store(
        "proto",
        lambda e, p: icnn.proto_triplet_loss(e, labels, p, ids, way=6, margin=0.8),
        "embeddings",
        "fields",
    )

    logging = types.ModuleType("core.logging")
    logging.get_logger = lambda name: None
    config = types.ModuleType("core.config")
    config.cfg = SimpleNamespace(DATA_LOADER=SimpleNamespace(TUPLE_SIZE=4))
    core = types.ModuleType("core")
    core.logging = logging
    others = {"core": core, "core__logging": logging, "core__config": config}
    local = module(Path(cfcd_path) / "core" / "losses" / "super_loss.py", **others)
    attention = torch.tensor(stored["positive"]).double().abs().sum(1)
    store(
        "local",
        lambda q, p, n: local.SuperfeatureTripletLoss(margin=0.3)([q, p, *n], [None, attention]),
        "query",
        "positive",
        "negatives",
    )
    q, p = (
        torch.nn.functional.normalize(torch.tensor(stored[key]).double())
        for key in ("query", "positive")
    )
    places, matched = local.match_attn(q, p, attention)
    stored |= {"match_query": places, "match_positive": matched}
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main(*sys.argv[1:])
