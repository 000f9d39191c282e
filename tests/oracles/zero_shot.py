"""Writes zero_shot.npz: distilled images of ZeroQ and GENIE, and a block rebuilt by GENIE-M.

Run once with PyTorch (2.13.0) and checkouts of github.com/amirgholami/ZeroQ (commit 9715739) and
github.com/SamsungLabs/Genie (7b089d9): `python tests/oracles/zero_shot.py ZEROQ GENIE`. The
authors' functions run as they are, in float64 and on the CPU, with fewer steps, less patience, a
smaller generator whose rate falls every 10 steps, and random choices that are always the same.
"""

import ast
import builtins
import copy
import logging
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import nn

STEPS, FEATURES, LATENT_DIM, SIZE = 60, (5, 4), 6, 8


def run_file(path, replacements=()):
    """The classes and functions of a file, without its imports."""
    text = path.read_text("utf-8")
    for old, new in replacements:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    scope = {"torch": torch, "nn": nn, "optim": torch.optim, "F": nn.functional, "np": np}
    scope |= {"copy": copy, "log": logging.getLogger(), "Tensor": torch.Tensor}
    scope |= {"OrderedDict": OrderedDict, "find_parent": find_parent, "ActivationHook": Hook}
    kept = [n for n in ast.parse(text).body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    exec(compile(ast.Module(kept, []), path.name, "exec"), scope)
    return scope


def find_parent(model, name):
    return model.get_submodule(name.rpartition(".")[0])


class Hook:
    def __init__(self, module):
        self.handle = module.register_forward_hook(self.keep)

    def keep(self, module, inputs, outputs):
        self.inputs, self.outputs = inputs[0], outputs

    def remove(self):
        self.handle.remove()


class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    """With the patience that is put there, and it remembers the losses."""

    def __init__(self, optimizer, min_lr, verbose, patience):
        super().__init__(optimizer, min_lr=min_lr, patience=Plateau.less_patience)

    def step(self, loss):
        Plateau.losses.append(loss)
        super().step(loss)


def batch_normed_network(rng, stored):
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, padding=1, bias=False),
        nn.BatchNorm2d(5),
    )
    for i, conv, norm in ((0, net[0], net[1]), (1, net[3], net[4])):
        values = {
            "kernel": rng.normal(0, 0.4, conv.weight.shape),
            "scale": rng.uniform(0.5, 1.5, norm.weight.shape),
            "bias": rng.normal(0, 0.2, norm.bias.shape),
            "mean": rng.normal(0, 0.3, norm.bias.shape),
            "var": rng.uniform(0.3, 1.5, norm.bias.shape),
        }
        values = {name: value.astype(np.float32) for name, value in values.items()}
        stored |= {f"{name}{i}": value for name, value in values.items()}
        tensors = (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        for tensor, value in zip(tensors, values.values()):
            tensor.data.copy_(torch.tensor(value))
    return net


def zeroq(path, net, rng, stored):
    start = rng.normal(size=(2, 3, SIZE, SIZE)).astype(np.float32)
    names = run_file(path / "classification/distill_data.py")
    names["range"] = lambda steps: builtins.range(STEPS)
    names["getRandomData"] = lambda **_: [torch.tensor(start, dtype=torch.float64)]
    Plateau.losses, Plateau.less_patience = [], 4
    names["getDistilData"](net, "imagenet", 2)
    stored |= {"zeroq_start": start, "zeroq_losses": np.array(Plateau.losses)}


def genie_data(path, net, stored):
    smaller = [("latent_dim = 256\n", f"latent_dim = {LATENT_DIM}\n")]
    smaller += [("if (it+1) % 100 == 0", "if (it+1) % 10 == 0")]
    names = run_file(path / "distill.py", smaller)
    generators, latents = [], []
    authors_generator = names["Generator"]

    def small_generator(latent_dim):
        names["Generator"] = authors_generator  # it looks its own name up
        generator = authors_generator(SIZE, latent_dim, *FEATURES)
        for parameter in generator.parameters():  # to what is stored
            parameter.data = parameter.data.float().double()
        generators.append(copy.deepcopy(generator.state_dict()))
        return generator

    def randn(*shape):
        latents.append(normal(*shape).float().double())
        return latents[-1].clone()

    names["Generator"] = small_generator
    normal, torch.randn = torch.randn, randn
    np.random.randint = lambda high: 1  # a window in the middle
    Plateau.losses, Plateau.less_patience = [], 1
    images = names["distill_data"](net, 3, 3, lr_g=50.0, iters=STEPS)  # latents overshoot
    torch.randn = normal
    stored |= {"genie_latents": latents[0], "genie_losses": np.array(Plateau.losses)}
    stored["genie_images"] = images
    for name, value in generators[0].items():
        if "running" not in name and "num_batches" not in name:
            stored["generator." + name] = value


def genie_block(path, rng, stored):
    quantizer = run_file(path / "quantizer.py")
    names = run_file(path / "reconstruct.py")
    names |= {name: quantizer[name] for name in ("WeightQuantizer", "ActivationQuantizer")}
    torch.rand_like = torch.zeros_like  # nothing is dropped
    kernels = rng.normal(0, 0.3, (2, 4, 4, 3, 3)).astype(np.float32)
    inputs = rng.normal(size=(2, 1, 4, 5, 6)).astype(np.float32)
    inputs[1] = inputs[0] + 0.1 * inputs[1]
    x, x_q = torch.tensor(inputs).double()
    layers = [nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2)]
    for layer, kernel in zip(layers, kernels):
        layer.weight.data.copy_(torch.tensor(kernel))
    y = layers[1](torch.relu(layers[0](x))).detach()
    block = nn.Sequential(
        names["QuantizableLayer"](layers[0], 3, 4),
        nn.ReLU(),
        names["QuantizableLayer"](layers[1], 2, 3),
    )
    for i in (0, 2):
        block[i].enable_act_quant = True
        weights = block[i].weight_quantizer
        stored[f"scale_start{i}"] = weights.scale.flatten().clone()
        stored[f"zero_point{i}"] = weights.zero_point.flatten()
        weights.train_mode = True
        stored[f"soft{i}"] = weights()
        weights.train_mode = False
    stored["y_start"] = block(x_q)
    for i in (0, 2):
        stored[f"step_start{i}"] = block[i].activation_quantizer.scale.flatten().clone()
    rates = {"lr_w_scale": 0.005, "lr_a_scale": 0.004, "lr_bit": 0.05}
    names["reconstruct_block"](
        block, x, x_q, y, iterations=40, round_weight=0.02, batch_size=1, **rates
    )
    stored |= {"kernels": kernels, "inputs": inputs, "y": y, "y_learned": block(x_q)}
    for i in (0, 2):
        weights = block[i].weight_quantizer
        stored[f"scale_end{i}"] = weights.scale.flatten()
        stored[f"hard{i}"] = weights()
        stored[f"step{i}"] = block[i].activation_quantizer.scale.flatten()


def main():
    zeroq_path, genie_path = map(Path, sys.argv[1:])
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    torch.Tensor.cuda = nn.Module.cuda = lambda self: self
    torch.optim.lr_scheduler.ReduceLROnPlateau = Plateau
    rng = np.random.default_rng(0)
    stored = {}
    net = batch_normed_network(rng, stored)
    zeroq(zeroq_path, net, rng, stored)
    genie_data(genie_path, net, stored)
    genie_block(genie_path, rng, stored)
    for name, value in stored.items():
        value = value.detach().numpy() if isinstance(value, torch.Tensor) else value
        stored[name] = value.astype(np.float32)
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
