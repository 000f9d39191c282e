"""Writes distillation.npz: distillation losses of PyTorch and of two papers' code.

Run once with PyTorch and checkouts of penghui-yang/DHKD@7976c69 (arXiv:2411.08937) and
Cli212/Distiller@a6a48f7 (arXiv:2109.11105); the stored numbers are of torch 2.13.0 in float64:
`python tests/oracles/distillation.py DHKD DISTILLER`. Of the second, the file of the losses is run
alone, since its package asks for much more.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F


def losses_of_distiller(checkout):
    folder = Path(checkout) / "src" / "Distiller" / "textbrewer"
    package = ModuleType("textbrewer")
    package.__path__ = [str(folder)]
    sys.modules["textbrewer"] = package
    spec = spec_from_file_location("textbrewer.losses", folder / "losses.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main():
    torch.set_default_dtype(torch.float64)
    sys.path.insert(0, sys.argv[1])
    from distiller_zoo.BinaryKL import BinaryKL
    from distiller_zoo.BinaryKLNorm import BinaryKLNorm
    from helper.optimizer import OptimGradAlign

    distiller = losses_of_distiller(sys.argv[2])
    rng = np.random.default_rng(0)
    stored = {
        "student": (2 * rng.normal(size=(4, 5))).astype("f"),
        "teacher": (2 * rng.normal(size=(4, 5))).astype("f"),
    }

    def store(name, loss_of, *arguments):
        student = torch.tensor(arguments[0]).double().requires_grad_()
        loss = loss_of(student, *(torch.tensor(x).double() for x in arguments[1:]))
        stored[name] = loss.detach().numpy()
        stored[f"{name}_grad"] = torch.autograd.grad(loss.sum(), student)[0].numpy()

    def each_row(module):
        return lambda s, t: torch.stack([module(s[i, None], t[i, None]) for i in range(len(s))])

    def soft_labels(temperature):
        return lambda s, t: (
            temperature**2
            * F.kl_div(
                F.log_softmax(s / temperature, -1),
                F.log_softmax(t / temperature, -1),
                reduction="none",
                log_target=True,
            ).sum(-1)
        )

    logits = stored["student"], stored["teacher"]
    for temperature in (1.0, 4.0):
        store(f"soft_{temperature}", soft_labels(temperature), *logits)
        store(f"binary_{temperature}", each_row(BinaryKL(temperature)), *logits)
        store(f"norm_{temperature}", each_row(BinaryKLNorm(temperature)), *logits)

    align = OptimGradAlign(None)._project_conflicting
    for name, sign in (("conflict", -1.0), ("agree", 1.0)):
        primary = rng.normal(size=7)
        auxiliary = rng.normal(size=7) + 2 * sign * primary
        gradients = [torch.tensor(primary), torch.tensor(auxiliary)]
        stored[f"{name}_gradients"] = np.stack([primary, auxiliary])
        stored[name] = align(gradients, [torch.ones(7), torch.ones(7)]).numpy()

    stored["scores"] = (2 * rng.normal(size=(6, 6)) + 2 * np.eye(6)).astype("f")
    stored["log_baseline"] = rng.normal(size=6).astype("f")
    scores = stored["scores"], stored["log_baseline"]
    for alpha in (0.1, 0.5, 0.9):
        logit = float(np.log(alpha / (1 - alpha)))
        store(
            f"mi_{alpha}",
            lambda f, a, logit=logit: distiller.interpolated_lower_bound(f, a, logit),
            *scores,
        )
    # the code subtracts the baseline in place
    store("tuba", lambda f, a: distiller.tuba_lower_bound(f + 0, a), *scores)
    store("nwj", lambda f, a: distiller.nwj_lower_bound(f), *scores)

    stored |= {
        "state": rng.normal(size=(2, 3, 4)).astype("f"),
        "teacher_state": rng.normal(size=(2, 3, 4)).astype("f"),
        "wide_state": rng.normal(size=(2, 3, 6)).astype("f"),
        "attention": rng.normal(size=(2, 2, 3, 3)).astype("f"),
        "teacher_attention": rng.uniform(0, 2, size=(2, 2, 3, 3)).astype("f"),
        "token_mask": np.array([[True, True, False], [True, True, True]]),
    }
    states = stored["state"], stored["teacher_state"]
    mask = torch.tensor(stored["token_mask"])
    store("hidden_mse", lambda s, t: distiller.hid_mse_loss(s, t, mask), *states)
    store("patient", distiller.pkd_loss, *states)
    store(
        "gram",
        lambda s, t: distiller.mmd_loss([s, s], [t, t]),
        stored["state"],
        stored["wide_state"],
    )
    attention = stored["attention"], stored["teacher_attention"]
    store("attention_ce", distiller.att_ce_loss, *attention)
    store(
        "cosine",
        lambda s, t: F.cosine_embedding_loss(
            s.flatten(0, 1), t.flatten(0, 1), torch.ones(6), reduction="none"
        ).reshape(2, 3),
        *states,
    )
    store("smooth_l1", lambda s, t: F.smooth_l1_loss(s, t, reduction="none").mean(-1), *states)
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
