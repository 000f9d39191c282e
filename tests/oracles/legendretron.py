"""Writes legendretron.npz: a learned link of the authors' with its gradients, in float64.

Made with torch 2.13.0 and github.com/khflam/legendretron at b313840, the checkout on the path:

    PYTHONPATH=legendretron python tests/oracles/legendretron.py

stores tests/oracles/legendretron.npz beside it. The layers are normalised to the scores, as the
authors' first forward pass does. Biases that add to one another are stored as their sum, and the
constant that is added to the potential is left out.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from lib.models import LegendreLink


def parameters(flow):
    """By the names of ConvexPotential."""
    net = flow.icnn
    inner, gain = net.Wzs[1:-1], 1 / net.Wzs[0].out_features

    def stack(values):
        return torch.stack(list(values)).detach().numpy()

    biases = [
        norm.b[0, :, 0] + of_input.bias + gain * of_hidden.bias
        for norm, of_input, of_hidden in zip(net.actnorms, net.Wxs, inner)
    ]
    named = {
        "first_kernel": net.Wzs[0].weight.T,
        "first_bias": net.Wzs[0].bias,
        "output_kernel": net.Wzs[-1].weight[0],
        "output_input_kernel": net.Wxs[-1].weight[0],
        "output_log_scale": net.actnorms[-1].logs[0, 0, 0],
        "network_weight": flow.w1[0],
        "quadratic_weight": flow.w0[0],
    }
    return {name: value.detach().numpy() for name, value in named.items()} | {
        "hidden_kernels": stack(layer.weight.T for layer in inner),
        "input_kernels": stack(layer.weight.T for layer in net.Wxs[:-1]),
        "shifts": stack(biases),
        "log_scales": stack(norm.logs[0, :, 0] for norm in net.actnorms[:-1]),
        "skip_kernels": stack(layer.weight.T for layer in net.Wx2s),
        "skip_biases": stack(layer.bias for layer in net.Wx2s),
    }


def main():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    scores = (2 * torch.randn(10, 3)).requires_grad_()
    labels = torch.randint(4, (10,))
    link = LegendreLink(n_blocks=2, K=3)
    link(scores)  # normalises the layers
    log_p = link(scores)
    loss = F.nll_loss(log_p, labels, reduction="none")
    flow = link.cpflows[0]
    shift = flow.icnn.actnorms[-1].b.item()
    scale = np.exp(flow.icnn.actnorms[-1].logs.item()) + 1e-3
    constant = F.softplus(flow.w1).item() * shift * scale
    potentials = flow.get_potential(scores)[:, 0] - constant
    named = dict(link.named_parameters())
    weights = ["cpflows.0.w0", "cpflows.0.w1", "cpflows.1.icnn.Wzs.2.weight"]
    gradients = torch.autograd.grad(loss.sum(), [scores, *(named[name] for name in weights)])
    stored = {
        f"{block}_{name}": value
        for block, flow in enumerate(link.cpflows)
        for name, value in parameters(flow).items()
    }
    np.savez_compressed(
        Path(__file__).with_suffix(".npz"),
        scores=scores.detach().numpy(),
        labels=labels.numpy(),
        potentials=potentials.detach().numpy(),
        log_probabilities=log_p.detach().numpy(),
        scores_gradient=gradients[0].numpy(),
        quadratic_weight_gradient=gradients[1].numpy()[0],
        network_weight_gradient=gradients[2].numpy()[0],
        hidden_kernel_gradient=gradients[3].numpy().T,
        **stored,
    )


if __name__ == "__main__":
    main()
