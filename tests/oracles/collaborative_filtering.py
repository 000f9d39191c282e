"""Writes collaborative_filtering.npz: SimpleX and its losses by the authors of arXiv:2109.12613.

Run once with PyTorch and a checkout of xue-pai/TwoToweRS@6af132f, where RecBole's SimpleX is too;
the stored numbers are float64 of torch 2.13.0:
`python tests/oracles/collaborative_filtering.py CHECKOUT`.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import numpy as np
import torch


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def simplex_class(root):
    """RecBole's module by itself: of the rest of RecBole it needs a base class."""
    for name in ("init", "abstract_recommender", "loss"):
        module = ModuleType(f"recbole.model.{name}")
        module.xavier_normal_initialization = module.EmbLoss = None
        module.GeneralRecommender = torch.nn.Module
        sys.modules[module.__name__] = module
    sys.modules |= {name: MagicMock() for name in ("recbole", "recbole.model", "recbole.utils")}
    path = "recbox/third_party/recbole/model/general_recommender/simplex.py"
    return load(root / path).SimpleX


def main():
    root = Path(sys.argv[1])
    rng = np.random.default_rng(0)
    lengths = np.array([4, 1, 3])
    stored = {
        "scores": rng.uniform(-1, 1, size=(3, 7)).astype(np.float32),
        "user": rng.normal(size=(3, 5)).astype(np.float32),
        "history": rng.normal(size=(3, 4, 5)).astype(np.float32),
        "where": np.arange(4) < lengths[:, None],
        "projection": rng.normal(size=(5, 5)).astype(np.float32),
        "key_kernel": rng.normal(size=(5, 5)).astype(np.float32),
        "key_bias": rng.normal(size=5).astype(np.float32),
        "query": rng.normal(size=5).astype(np.float32),
        "cotangent": rng.normal(size=(3, 5)).astype(np.float32),
    }
    double = {name: torch.tensor(value).double() for name, value in stored.items()}

    def store(name, values, arguments, cotangent):
        stored[name] = values.detach().numpy()
        for key, gradient in zip(
            arguments, torch.autograd.grad(values, arguments.values(), cotangent)
        ):
            stored[f"{name}/{key}"] = gradient.numpy()

    folder = root / "recbox/core/pytorch/losses"
    contrastive = load(folder / "cosine_contrastive_loss.py").CosineContrastiveLoss
    losses = {
        "contrastive/sum": contrastive(margin=0.2, negative_weight=None),
        "contrastive/mean": contrastive(margin=0.2, negative_weight=10),
        "ranking": load(folder / "pairwise_logistic_loss.py").PairwiseLogisticLoss(),
        "hinge": load(folder / "pairwise_margin_loss.py").PairwiseMarginLoss(margin=0.7),
        "softmax": load(folder / "softmax_crossentropy_loss.py").SoftmaxCrossEntropyLoss(),
    }
    for name, loss in losses.items():
        scores = double["scores"].clone().requires_grad_()
        rows = torch.stack([loss(scores[i : i + 1], None) for i in range(3)])
        store(name, rows, {"scores": scores}, torch.ones(3).double())

    SimpleX = simplex_class(root)
    for mode in ("mean", "user_attention", "self_attention"):
        model = SimpleX.__new__(SimpleX)
        torch.nn.Module.__init__(model)
        model.aggregator, model.gamma = mode, 0.3
        names = ["user", "history", "projection", "key_kernel", "key_bias", "query"]
        arguments = {name: double[name].clone().requires_grad_() for name in names}
        model.UI_map = lambda x: x @ arguments["projection"]
        model.W_k = lambda x: torch.tanh(x @ arguments["key_kernel"] + arguments["key_bias"])
        model.W_q = lambda x: (x @ arguments["query"])[..., None]
        history = arguments["history"] * double["where"][..., None]  # padding is a vector of 0
        h = model.get_UI_aggregation(arguments["user"], history, torch.tensor(lengths))
        used = names[: {"mean": 3, "user_attention": 5, "self_attention": 6}[mode]]
        store(mode, h, {name: arguments[name] for name in used}, double["cotangent"])
        items = double["history"]
        stored[f"{mode}/cosines"] = model.get_cos(h, items).detach().numpy()
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
