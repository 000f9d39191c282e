"""Writes pv_tuning.npz: codes found and steps taken by the code of PV-tuning's authors.

Run once with PyTorch and tqdm, given a checkout of github.com/Vahe1994/AQLM; the stored numbers are
of its commit e79a896 and torch 2.13.0: `python tests/oracles/pv_tuning.py PATH`.
"""

import sys
from pathlib import Path

import numpy as np
import torch

OUT, IN, GROUP, BITS = 6, 16, 2, 3


def main():
    sys.path.insert(0, sys.argv[1])
    from src.aq import QuantizedWeight
    from src.beam_search_l2 import beam_search_optimal_codes
    from src.pv_optimizer import StraightThroughAdamW

    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    stored = {"torch_version": torch.__version__}

    # the search: two codebooks, with and without limits, and with changes forced
    target, books, scales = draw(OUT, IN), draw(2, 8, 1, GROUP), 0.5 + np.abs(draw(OUT, 1, 1, 1))
    codes = rng.integers(0, 8, size=(OUT, IN // GROUP, 2))
    stored |= {"target": target, "codebooks": books, "scales": scales, "codes": codes}
    cases = {
        "beam": (2, {"beam_size": 5}),
        "greedy": (2, {"beam_size": 1}),
        "limited": (2, {"beam_size": 5, "max_update_fraction": 0.2}),
        "trusted": (2, {"beam_size": 5, "max_update_fraction": 0.5, "trust_ratio": 0.3}),
        "forced": (
            2,
            {"beam_size": 5, "max_update_fraction": 0.3, "force_update": True},
        ),
    }
    for name, (count, options) in cases.items():
        stored[name] = beam_search_optimal_codes(
            torch.tensor(target),
            torch.tensor(books[:count]),
            torch.tensor(codes[..., :count]),
            torch.tensor(scales),
            **options,
        ).numpy()

    # the optimizer: four steps on least squares, one codebook, for three ways to keep the buffer
    x, y = draw(32, IN), draw(32, OUT)
    stored |= {"x": x, "y": y}
    for decay in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        weight = QuantizedWeight(
            reference_weight=torch.tensor(target),
            in_group_size=GROUP,
            out_group_size=1,
            num_codebooks=1,
            nbits_per_codebook=BITS,
            max_iter=5,
        )
        stored |= {
            f"start_{name}": getattr(weight, name).detach().numpy().copy()
            for name in ("codes", "codebooks", "scales")
        }
        kernel = torch.nn.Parameter(weight().detach().clone())
        optimizer = StraightThroughAdamW(
            named_dequantized_params={"w": kernel},
            named_quantized_params={"w": weight},
            update_codebooks_and_scales={"lr": 0.03, "betas": (0.9, 0.95)},
            update_codes={"lr": 0.6, "betas": (0.0, 0.95)},
            beam_size=1,
            max_code_change_per_step=1.0,
            delta_decay=decay,
            verbose=False,
        )
        for _ in range(4):
            loss = torch.mean(torch.square(torch.tensor(x) @ kernel.T - torch.tensor(y)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for name in ("codes", "codebooks", "scales"):
            stored[f"end_{name}_{decay}"] = getattr(weight, name).detach().numpy()
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
