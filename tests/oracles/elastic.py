"""Writes elastic.npz: EQ-Net's first ranges, regularization and distillation, by the authors.

Run once with PyTorch and a checkout of github.com/xuke225/EQ-Net (commit 86b9e41):
`python tests/oracles/elastic.py PATH`. Of its modules only the classes are run, since they import
the whole of the training.
"""

import ast
import itertools
import sys
from pathlib import Path

import numpy as np
import torch

FILES = ("module/base_lsq.py", "runner/criterion.py")
NAMES = {"grad_scale", "round_ste", "lp_loss", "LSQQuantizer", "LSQQuantizerForWeight"}
NAMES |= {"KurtosisLossCalc", "SkewnessLossCalc", "KLLossSoft"}


def authors_names(root):
    scope = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional}
    for file in FILES:
        for node in ast.parse((Path(root) / file).read_text("utf-8")).body:
            if getattr(node, "name", "") in NAMES:
                exec(compile(ast.Module([node], []), file, "exec"), scope)
    return scope


def main():
    names = authors_names(sys.argv[1])
    rng = np.random.default_rng(0)
    w = rng.normal(0.3, 1.0, size=(4, 24)).astype(np.float32)
    logits = rng.normal(size=(3, 5, 6)).astype(np.float32)
    labels = rng.integers(6, size=5)
    stored = {"w": w, "logits": logits, "labels": labels}
    quantizer = names["LSQQuantizerForWeight"]()
    weight = torch.tensor(w)
    ranges = {
        "symmetric": quantizer.symmetric_init,
        "asymmetric": quantizer.asymmetric_init,
        "channel_asymmetric": quantizer.asymmetric_init_for_per_channel,
    }
    for name, search in ranges.items():
        found = [search(weight, bits) for bits in range(2, 9)]
        stored[name] = np.array([[np.asarray(value) for value in pair] for pair in found])
    quantizer.all_positive = True
    found = [quantizer.symmetric_init(weight.abs(), bits)[0] for bits in range(2, 9)]
    stored["unsigned"] = np.array(found)
    for name in ("kurtosis", "skewness"):
        moment = names[f"{name.title()}LossCalc"](weight)
        moment.fn_regularization()
        stored[name] = getattr(moment, name).numpy()
    outputs, truth = torch.tensor(logits, requires_grad=True), torch.tensor(labels)
    loss = torch.nn.functional.cross_entropy(outputs[0], truth)
    for before, after in itertools.pairwise(outputs):
        loss = loss + names["KLLossSoft"]()(after, before.detach(), truth, alpha=0.5)
    loss.backward()
    stored["loss"], stored["dlogits"] = loss.detach().numpy(), outputs.grad.numpy()
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
