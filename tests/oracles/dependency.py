"""Writes dependency.npz: exact optimal transport of joint distributions to their products, by POT.

Run once with POT; the stored numbers are of pot 0.9.7.post1: `python tests/oracles/dependency.py`.
"""

from pathlib import Path

import numpy as np
import ot


def main():
    rng = np.random.default_rng(0)
    stored = {"pot_version": ot.__version__}
    for case, (n, m) in enumerate([(3, 4), (4, 2)]):
        joint = rng.dirichlet(np.full(n * m, 0.3)).reshape(n, m)
        points = rng.normal(size=(n, 2)), rng.normal(size=(m, 3))
        costs = [np.linalg.norm(x[:, None] - x, axis=-1) for x in points]
        product = joint.sum(1)[:, None] * joint.sum(0)
        total = (costs[0][:, None, :, None] + costs[1][None, :, None, :]).reshape(n * m, n * m)
        stored |= {f"joint_{case}": joint, f"x_cost_{case}": costs[0], f"y_cost_{case}": costs[1]}
        stored[f"value_{case}"] = ot.emd2(joint.ravel(), product.ravel(), total)
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
