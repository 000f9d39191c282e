"""Writes concept_bottleneck.npz: the authors' losses of concept bottlenecks, and their search.

Only the functions named below are taken from their files, which import what is not needed here.

Run once with PyTorch and a checkout of github.com/Andron00e/SparseCBM (e2e4da7); the stored numbers
are of torch 2.13.0: `python tests/oracles/concept_bottleneck.py SPARSECBM`.
"""

import ast
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

LOSSES = (
    "contrastive_loss",
    "criterion_contrastive",
    "gumbel_contrastive_loss",
    "criterion_gumbel",
    "criterion_similarity",
)
SEARCH = ("similarity", "cubed_similarity", "get_dot_prods_matrix")


def functions(path, names):
    wanted = [
        node
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name in names
    ]
    scope = {"torch": torch, "F": F}
    exec(compile(ast.Module(wanted, []), path, "exec"), scope)
    return [scope[name] for name in names]


def main(checkout):
    bottlenecks = Path(checkout, "bottlenecks")
    _, contrastive, _, gumbel, similarity = functions(bottlenecks / "cbm.py", LOSSES)
    cosine, cubed, matrix = functions(bottlenecks / "setup.py", SEARCH)
    rng = np.random.default_rng(0)
    stored = {"torch_version": torch.__version__}

    def keep(name, loss, *inputs):
        z = torch.tensor(inputs[-1]).double().requires_grad_()
        value = loss(*(torch.tensor(x).double() for x in inputs[:-1]), z)
        stored[name] = value.item()
        stored[f"{name}_gradient"] = torch.autograd.grad(value, z)[0].numpy()

    logits, clip = 2 * rng.normal(size=(2, 8, 5))
    exponentials = rng.exponential(size=(2, 8, 5))
    stored |= {"logits": logits, "clip": clip, "noise": -np.log(exponentials)}
    keep("contrastive", contrastive, logits)
    keep("contrastive_wide", contrastive, logits.T)
    for temperature in (0.5, 2.0):
        draws = mock.Mock(side_effect=torch.tensor(exponentials))
        with mock.patch.object(torch.Tensor, "exponential_", draws):
            keep(f"gumbel_{temperature}", lambda z: gumbel(z, tau=temperature), logits)
    for power in (1, 3):
        keep(f"similarity_{power}", lambda u, c: -similarity(u, c, power == 3), clip, logits)
    images, classes, concepts = (rng.normal(size=(n, 6)) for n in (4, 3, 7))
    stored |= {"images": images, "classes": classes, "concepts": concepts}
    v, t = (matrix(torch.tensor(x), torch.tensor(concepts)) for x in (images, classes))
    stored["image_matrix"] = v.numpy()
    for name, score in (("cosine", cosine), ("cubed", cubed)):  # of one image at a time
        stored[name] = np.stack([score(row[None], t).numpy()[0] for row in v])
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main(*sys.argv[1:])
