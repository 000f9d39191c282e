"""Writes forecasting.npz: errors of forecasts, tokens of series, and regression with classes.

Run once with PyTorch, torchmetrics, chronos-forecasting and the authors' code of "A step towards
understanding why classification helps regression" (github.com/SilviaLauraPintea/reg-cls at
696e2c5): `python tests/oracles/forecasting.py FOLDER_1D_OF_THAT_CODE`. The stored numbers are of
torch 2.13.0, torchmetrics 1.9.0 and chronos-forecasting 2.3.2; all but the tokens in float64.
"""

import contextlib
import io
import sys
import types
from pathlib import Path

import numpy as np
import torch
import torchmetrics.functional.regression as peer
from chronos.chronos import ChronosConfig, MeanScaleUniformBins

SCALES = ("mean", "range", "std")


def differentiated(loss, *arguments):
    """The value and its gradients in all arguments, of the sum where there are several."""
    leaves = [torch.tensor(x).double().requires_grad_() for x in arguments]
    value = loss(*leaves)
    return [x.detach().numpy() for x in (value, *torch.autograd.grad(value.sum(), leaves))]


def errors(predictions, targets):
    """The survey's errors of sets, and elementwise ones that PyTorch has not."""
    losses = {
        f"normalized_{by}": lambda p, t, by=by: peer.normalized_root_mean_squared_error(p, t, by)
        for by in SCALES
    } | {
        "relative_squared": peer.relative_squared_error,
        "root_squared_log": lambda p, t: peer.mean_squared_log_error(p, t).sqrt(),
        "percentage": peer.mean_absolute_percentage_error,
        "relative_absolute": lambda p, t: (p - t).abs().sum() / (t - t.mean()).abs().sum(),
        "relative_root": lambda p, t: ((p - t).square().sum() / p.square().sum()).sqrt(),
    }
    stored = {}
    for name, loss in losses.items():
        value, gradient = differentiated(lambda p: loss(p, torch.tensor(targets)), predictions)
        stored |= {f"{name}_value": value, f"{name}_gradient": gradient}
    return stored


def likelihood(mean, targets, scale):
    def loss(m, s):
        target = torch.tensor(targets)
        return torch.nn.functional.gaussian_nll_loss(
            m, target, s.square(), full=True, eps=1e-2, reduction="none"
        )

    names = ("nll_value", "nll_mean_gradient", "nll_scale_gradient")
    return dict(zip(names, differentiated(loss, mean, scale)))


def tokens(series):
    config = ChronosConfig(
        tokenizer_class="MeanScaleUniformBins", tokenizer_kwargs={}, context_length=512,
        prediction_length=4, n_tokens=103, n_special_tokens=2, pad_token_id=0, eos_token_id=1,
        use_eos_token=False, model_type="seq2seq", num_samples=1, temperature=1.0, top_k=1,
        top_p=1.0,
    )  # fmt: skip
    tokenizer = MeanScaleUniformBins(-5.0, 5.0, config)
    ids, _, scale = tokenizer.context_input_transform(torch.tensor(series))
    future = tokenizer.label_input_transform(torch.tensor(3 * series[:, :4]), scale)[0]
    back = tokenizer.output_transform(ids[:, None], scale)[:, 0]
    # its first bin is the id after the special ones and one more
    return {
        "tokens": ids.numpy(),
        "future_tokens": future.numpy(),
        "scale": scale.numpy(),
        "series_back": back.numpy(),
    }


def classes(folder, rng):
    sys.path.insert(0, folder)
    plotting = types.ModuleType("matplotlib")
    plotting.pyplot = None  # which histeq.py imports for its example
    sys.modules["matplotlib"] = plotting
    from histeq import cls_equalized_ranges
    from model import Reg_Cls

    predictions, targets = rng.normal(size=(2, 6))
    logits, labels = rng.normal(size=(6, 3)), np.array([0, 2, -1, 1, 0, -1])
    network = Reg_Cls([2], 1, 2, 3, False)

    def loss(p, z):
        target, label = torch.tensor(targets), torch.tensor(labels)
        return network.loss(p[:, None], z, target, label, 10.0)[0]

    value, *gradients = differentiated(loss, predictions, logits)
    stored = {
        "class_predictions": predictions,
        "class_targets": targets,
        "class_logits": logits,
        "class_labels": labels,
        "class_value": value,
        "class_gradient": gradients[0],
        "class_logits_gradient": gradients[1],
    }
    for i, size in enumerate((16, 9, 5)):
        histogram = rng.multinomial(32 * (size - i - 1), rng.dirichlet(np.full(size, 0.3)))
        histogram[i + 1] += histogram[: i + 1].sum()  # of this total its quotients do not round
        histogram[: i + 1] = 0
        with contextlib.redirect_stdout(io.StringIO()):
            edges, counts = cls_equalized_ranges(histogram, np.arange(size + 1) / 2)
        stored |= {f"histogram{i}": histogram, f"edges{i}": edges, f"counts{i}": counts}
    return stored


def main():
    rng = np.random.default_rng(0)
    targets = rng.uniform(0.1, 3, size=12)
    predictions = targets * rng.uniform(0.5, 1.5, size=12)
    series = rng.normal(size=(3, 20)).astype(np.float32)
    series[0, :5], series[1] = np.nan, 0
    stored = {"predictions": predictions, "targets": targets, "series": series}
    stored |= errors(predictions, targets)
    mean, scale = rng.normal(size=(2, 8))
    scale[0] = 0.05  # whose square is below the floor
    stored |= {"mean": mean, "nll_targets": targets[:8], "nll_scale": scale}
    stored |= likelihood(mean, targets[:8], scale)
    stored |= tokens(series) | classes(sys.argv[1], rng)
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
