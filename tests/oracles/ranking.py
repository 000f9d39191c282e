"""Writes ranking.npz: losses on lists and the list transformer, from the code of arXiv:2509.16616.

Run once with PyTorch and a checkout of waylonli/PARiskRanker@629fa74, whose LambdaLoss is that of
allRank; the stored numbers are of torch 2.13.0: `python tests/oracles/ranking.py CHECKOUT`.
"""

import sys
from pathlib import Path

import numpy as np
import torch

SCHEMES = {
    "ndcg1": "ndcgLoss1_scheme",
    "ndcg2": "ndcgLoss2_scheme",
    "lambda_rank": "lambdaRank_scheme",
    "ndcg2pp": "ndcgLoss2PP_scheme",
    "rank_net": "rankNet_scheme",
    "rank_net_gap": "rankNetWeightedByGTDiff_scheme",
    "rank_net_squared_gap": "rankNetWeightedByGTDiffPowed_scheme",
}


def main():
    sys.path.insert(0, sys.argv[1])
    from ranking_model.ft_transformer import FTTransformer
    from ranking_model.loss import GraphBasedLoss, LambdaLoss
    from ranking_model.pariskranker import PARiskRanker

    rng = np.random.default_rng(0)
    stored = {
        "scores": rng.normal(size=(3, 9)).astype(np.float32),
        "profits": (10 * rng.standard_t(2, size=(3, 9))).astype(np.float32),
        "relevance": rng.integers(4, size=(3, 9)),
    }

    def store(name, loss_of):
        scores = torch.tensor(stored["scores"]).double().requires_grad_()
        losses = torch.stack([loss_of(i, scores[i]) for i in range(3)])
        stored[name] = losses.detach().numpy()
        stored[f"{name}_grad"] = torch.autograd.grad(losses.sum(), scores)[0].numpy()

    profits = torch.tensor(stored["profits"]).double()
    store("profit", lambda i, s: GraphBasedLoss()(s, target=profits[i], pnl=profits[i]))
    store("profit_3", lambda i, s: GraphBasedLoss(top_k=3)(s, target=profits[i], pnl=profits[i]))
    relevance = torch.tensor(stored["relevance"]).double()
    for name, scheme in SCHEMES.items():
        loss = LambdaLoss(weighing_scheme=scheme, sigma=0.7, mu=3.0)
        store(name, lambda i, s, loss=loss: loss(s, relevance[i]))

    torch.manual_seed(0)
    sizes = {"categories": (3, 2), "num_continuous": 4, "dim": 8, "depth": 1, "heads": 2}
    torch.load = lambda path: FTTransformer(**sizes)  # where the model reads its trained embedder
    model = PARiskRanker(
        8,
        tf_dim_feedforward=12,
        tf_nhead=2,
        tf_num_layers=1,
        head_hidden_layers=[6],
        ft_embedder_checkpoint_path=__file__,
        freeze_ft_embedder=False,
    )
    model = model.eval()
    flat = []
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape)
            rounded = parameter.half()
            parameter.copy_(rounded)
            flat.append(rounded.numpy().ravel())
    stored["parameters"] = np.concatenate(flat)
    model = model.double()
    lengths = np.array([5, 3])
    categorical = np.stack([rng.integers(3, size=8), rng.integers(2, size=8)], axis=1)
    numerical = rng.normal(size=(8, 4)).astype(np.float32)
    inputs = torch.tensor(numerical).double().requires_grad_()
    scores = model(torch.tensor(categorical), inputs, torch.tensor(lengths))
    stored |= {
        "lengths": lengths,
        "categorical": categorical,
        "numerical": numerical,
        "model_scores": scores.detach().numpy(),
        "model_grad_numerical": torch.autograd.grad(scores.square().sum(), inputs)[0].numpy(),
        "model_logits": model.ft_embedder(torch.tensor(categorical), inputs).detach().numpy()[:, 0],
    }
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
