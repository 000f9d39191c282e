"""Writes card.npz: forecasts and gradients of a tiny CARD, in float64.

It is long_term_forecast_l96/models/CARD.py of wxie9/CARD@ca6d34b, with scores divided by the square
root of the length, as in the paper, where the file has `/ length ** -0.5`. Weights are random
multiples of 1/32, stored as int8 in jaxref's layout, one after the other in the order of their
paths in the model.

Run once with PyTorch, einops and a checkout; the stored numbers are of torch 2.13.0:
`python tests/oracles/card.py CHECKOUT`.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

CONFIG = {
    "task_name": "long_term_forecast",
    "seq_len": 10,
    "pred_len": 5,
    "enc_in": 3,
    "patch_len": 4,
    "stride": 2,
    "d_model": 8,
    "n_heads": 4,
    "d_ff": 6,
    "e_layers": 1,
    "alpha": 0.3,
    "dp_rank": 2,
    "merge_size": 2,
    "momentum": 0.1,
    "dropout": 0.0,
}


def leaves_of(model):
    """The weights and statistics by their paths in jaxref."""
    found = {}

    def linear(path, layer):
        found[f"{path}/kernel"], found[f"{path}/bias"] = layer.weight.T, layer.bias

    def norm(path, layer):
        found[f"{path}/scale"], found[f"{path}/bias"] = layer.weight, layer.bias
        found[f"{path}/state/mean"] = layer.running_mean
        found[f"{path}/state/var"] = layer.running_var

    def attention(path, layer, projects):
        features, heads = CONFIG["d_model"], CONFIG["n_heads"]
        for i, name in enumerate(("query", "key", "value")):
            rows = slice(i * features, (i + 1) * features)
            found[f"{path}/{name}/kernel"] = layer.qkv.weight[rows].T.reshape(features, heads, -1)
            found[f"{path}/{name}/bias"] = layer.qkv.bias[rows].reshape(heads, -1)
        if projects:
            linear(f"{path}/shorten/0", layer.dp_k)
            linear(f"{path}/shorten/1", layer.dp_v)
        for i, (post, branch) in enumerate(
            ((layer.norm_post1, layer.ff_1), (layer.norm_post2, layer.ff_2))
        ):
            norm(f"{path}/branch_norms/{i}", post[1])
            linear(f"{path}/branches/{i}/up", branch[0])
            linear(f"{path}/branches/{i}/down", branch[3])
        norm(f"{path}/norm", layer.norm_attn[1])

    linear("project", model.W_input_projection)
    found["positions"] = model.W_pos_embed
    if model.use_statistic:
        linear("statistics", model.W_statistic)
    else:
        found["token"] = model.cls
    found["head/kernel"] = model.W_out.weight.T.reshape(-1, CONFIG["d_model"], CONFIG["pred_len"])
    found["head/bias"] = model.W_out.bias
    for i in range(CONFIG["e_layers"]):
        attention(f"layers/{i}/channels", model.Attentions_over_channel[i], True)
        attention(f"layers/{i}/tokens", model.Attentions_over_token[i], False)
        linear(f"layers/{i}/output", model.Attentions_mlp[i])
        norm(f"layers/{i}/norm", model.Attentions_norm[i][1])
    return found


def main():
    source = (Path(sys.argv[1]) / "long_term_forecast_l96/models/CARD.py").read_text()
    assert source.count("** -0.5") == 3
    release = {}
    exec(source.replace("** -0.5", "** 0.5"), release)

    rng = np.random.default_rng(0)
    stored = {
        "inputs": rng.integers(-16, 17, size=(3, 10, 3)).astype(np.int8),
        "cotangent": rng.normal(size=(3, 5, 3)).astype(np.float32),
    }
    # with the learned token in evaluation, and with that of the statistics in training
    for case, training in (("evaluation", False), ("training", True)):
        config = SimpleNamespace(**CONFIG, use_statistic=training)
        model = release["Model"](config).double().train(training)
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if not tensor.is_floating_point() or "ema" in name:
                    continue
                values = rng.integers(-12, 13, size=tuple(tensor.shape)) / 32
                if name.endswith("running_var"):
                    values = np.abs(values) + 0.5
                elif tensor.ndim == 1 and "norm" in name and name.endswith("weight"):
                    values = values + 1
                tensor.copy_(torch.tensor(values))
        leaves = leaves_of(model.model)
        units = [32 * leaves[path].detach().numpy().ravel() for path in sorted(leaves)]
        stored[f"{case}/weights"] = np.concatenate(units).astype(np.int8)
        assert np.array_equal(stored[f"{case}/weights"], np.concatenate(units))
        inputs = torch.tensor(stored["inputs"] / 8.0).requires_grad_()
        forecast = model(inputs, None)
        (slope,) = torch.autograd.grad(forecast, inputs, torch.tensor(stored["cotangent"]).double())
        stored[f"{case}/forecast"] = forecast.detach().numpy().astype(np.float32)
        stored[f"{case}/slope"] = slope.numpy().astype(np.float32)
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
