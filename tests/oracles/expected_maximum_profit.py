"""Writes expected_maximum_profit.npz: the expected maximum profit of churn scores, from empulse.

Run once with empulse; the stored numbers are of 0.13.1:
`python tests/oracles/expected_maximum_profit.py`.
"""

from importlib.metadata import version
from pathlib import Path

import numpy as np
from empulse.metrics import empc_score

CAMPAIGNS = ((200, 10, 1, 6, 14), (100, 20, 1, 6, 14), (50, 5, 2, 2, 3), (30, 8, 4, 1.5, 0.8))
"""Lifetime value, costs of offer and of contact, alpha and beta."""


def main():
    rng = np.random.default_rng(0)
    stored = {"empulse_version": version("empulse"), "campaigns": np.array(CAMPAIGNS)}
    for name, decimals in (("scores", 6), ("tied_scores", 1)):
        churned = (rng.random(80) < 0.3).astype(int)
        scores = np.round(1 / (1 + np.exp(-rng.normal(size=80) - 1.2 * churned)), decimals)
        profits = [
            empc_score(
                churned, scores, clv=v, incentive_cost=d, contact_cost=f, alpha=alpha, beta=beta
            )
            for v, d, f, alpha, beta in CAMPAIGNS
        ]
        stored |= {name: scores, f"{name}_churned": churned, f"{name}_profits": np.array(profits)}
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
