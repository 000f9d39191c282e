"""Writes image_models.npz: logits and gradients of tiny image classifiers, in float64.

CCT, CVT and ViT-Lite are the authors' (github.com/SHI-Labs/Compact-Transformers, commit in the
file), the vision transformer, the residual networks and the inverted bottlenecks timm's. Their
weights are random multiples of 1/32, stored as int8 in jaxref's layout, one after the other in the
order of their paths in the model. timm's NF-ResNet is the authors' after its average-pooled
shortcuts and its stem's max pooling are exchanged for strided convolutions and one with "SAME"
padding. Gradients are those of every second pixel.

Run with timm and a checkout: `python tests/oracles/image_models.py COMPACT_TRANSFORMERS_CHECKOUT`;
the stored numbers are of torch 2.13.0 and timm 1.0.31.
"""

import importlib
import importlib.abc
import importlib.machinery
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import torch


class _Named(type):
    """Classes whose attributes are their names."""

    def __getattr__(cls, name):
        return name


class _WithoutTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """timm asks for torchvision, but not in what is used here."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)

        def stand_in(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return _Named(name, (), {})

        module.__getattr__ = stand_in
        return module

    def exec_module(self, module):
        pass


sys.meta_path.append(_WithoutTorchvision())

timm = importlib.import_module("timm")
efficientnet, nfnet, resnet, vision_transformer = (
    importlib.import_module(f"timm.models.{name}")
    for name in ("efficientnet", "nfnet", "resnet", "vision_transformer")
)


def randomise(model, rng):
    """Weights and statistics that are multiples of 1/32, and none a 1 or 0 that could be lost."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            values = rng.integers(-12, 13, size=tuple(tensor.shape)) / 32
            if name.endswith("running_var"):
                values = np.abs(values) + 0.5
            elif tensor.ndim == 1 and name.endswith(("weight", "gain")):
                values = values + 1
            tensor.copy_(torch.tensor(values))
    return model.double()


def conv(w):
    """[out, in, h, w] -> [h, w, in, out]"""
    return w.permute(2, 3, 1, 0)


def patches(w):
    """[out, in, h, w] -> [h w in, out]"""
    return w.permute(2, 3, 1, 0).reshape(-1, w.shape[0])


def of(tree, module, kind=lambda w: w, names=(("weight", "kernel"), ("bias", "bias"))):
    """Adds a module's parameters under `tree`'s path: (dictionary, path)."""
    leaves, path = tree
    for theirs, ours in names:
        value = getattr(module, theirs, None)
        if value is not None:
            leaves[f"{path}/{ours}"] = kind(value) if theirs == "weight" else value


def norm(leaves, path, module):
    of((leaves, path), module, names=(("weight", "scale"), ("bias", "bias")))
    if getattr(module, "running_mean", None) is not None:
        leaves[f"{path}/state/mean"] = module.running_mean
        leaves[f"{path}/state/var"] = module.running_var


def linear(leaves, path, module):
    of((leaves, path), module, lambda w: w.T)


def attention(leaves, path, qkv, proj, heads):
    features = proj.weight.shape[0]
    for i, name in enumerate(("query", "key", "value")):
        weight = qkv.weight[i * features : (i + 1) * features]
        leaves[f"{path}/{name}/kernel"] = weight.T.reshape(features, heads, -1)
        if qkv.bias is not None:
            bias = qkv.bias[i * features : (i + 1) * features]
            leaves[f"{path}/{name}/bias"] = bias.reshape(heads, -1)
    leaves[f"{path}/output/kernel"] = proj.weight.T.reshape(heads, -1, features)
    leaves[f"{path}/output/bias"] = proj.bias


def compact(model, pooled, heads=2):
    leaves, layers = {}, model.tokenizer.conv_layers
    if pooled == "conv":
        for i, layer in enumerate(layers):
            of((leaves, f"tokenizer/convs/{i}"), layer[0], conv)
    else:
        of((leaves, "tokenizer/project"), layers[0][0], patches)
    encoder = model.classifier
    leaves["encoder/positions"] = encoder.positional_emb[0]
    if hasattr(encoder, "class_emb"):
        leaves["encoder/class_token"] = encoder.class_emb[0]
    else:
        leaves["encoder/pool_kernel"] = encoder.attention_pool.weight[0]
        leaves["encoder/pool_bias"] = encoder.attention_pool.bias[0]
    for i, block in enumerate(encoder.blocks):
        path = f"encoder/blocks/{i}"
        norm(leaves, f"{path}/attention_norm", block.pre_norm)
        norm(leaves, f"{path}/mlp_norm", block.norm1)
        attention(leaves, f"{path}/attention", block.self_attn.qkv, block.self_attn.proj, heads)
        linear(leaves, f"{path}/mlp/up", block.linear1)
        linear(leaves, f"{path}/mlp/down", block.linear2)
    norm(leaves, "encoder/final_norm", encoder.norm)
    linear(leaves, "encoder/head", encoder.fc)
    return leaves


def vit(model, heads=2):
    leaves = {"class_token": model.cls_token[0], "positions": model.pos_embed[0]}
    of((leaves, "patches/project"), model.patch_embed.proj, patches)
    for i, block in enumerate(model.blocks):
        path = f"blocks/{i}"
        norm(leaves, f"{path}/attention_norm", block.norm1)
        norm(leaves, f"{path}/mlp_norm", block.norm2)
        attention(leaves, f"{path}/attention", block.attn.qkv, block.attn.proj, heads)
        linear(leaves, f"{path}/mlp/up", block.mlp.fc1)
        linear(leaves, f"{path}/mlp/down", block.mlp.fc2)
    norm(leaves, "final_norm", model.norm)
    linear(leaves, "head", model.head)
    return leaves


def residual(model):
    leaves = {}

    def layer(path, convolution, normalization):
        of((leaves, f"{path}/conv"), convolution, conv)
        norm(leaves, f"{path}/norm", normalization)

    layer("stem", model.conv1, model.bn1)
    blocks = [*model.layer1, *model.layer2]
    for i, block in enumerate(blocks):
        for j in range(3 if hasattr(block, "conv3") else 2):
            parts = getattr(block, f"conv{j + 1}"), getattr(block, f"bn{j + 1}")
            layer(f"blocks/{i}/convs/{j}", *parts)
        if block.downsample is not None:
            layer(f"blocks/{i}/shortcut", *block.downsample)
    linear(leaves, "head", model.fc)
    return leaves


def normalizer_free(model):
    leaves = {}

    def layer(path, convolution):
        names = (("weight", "kernel"), ("bias", "bias"), ("gain", "gain"))
        of((leaves, path), convolution, conv, names)
        leaves[f"{path}/gain"] = convolution.gain.reshape(-1)

    layer("stem", model.stem.conv)
    for i, block in enumerate([block for stage in model.stages for block in stage]):
        for j in range(3):
            layer(f"blocks/{i}/convs/{j}", getattr(block, f"conv{j + 1}"))
        if block.downsample is not None:
            layer(f"blocks/{i}/shortcut", block.downsample)
        leaves[f"blocks/{i}/skip_gain"] = block.skipinit_gain
    linear(leaves, "head", model.head.fc)
    return leaves


def inverted(model):
    leaves = {}

    def layer(path, convolution, normalization):
        of((leaves, f"{path}/conv"), convolution, conv)
        norm(leaves, f"{path}/norm", normalization)

    layer("stem", model.conv_stem, model.bn1)
    for i, block in enumerate([block for stage in model.blocks for block in stage]):
        path = f"blocks/{i}"
        expands = hasattr(block, "conv_pwl")
        if expands:
            layer(f"{path}/expand", block.conv_pw, block.bn1)
            layer(f"{path}/depthwise", block.conv_dw, block.bn2)
            layer(f"{path}/project", block.conv_pwl, block.bn3)
        else:
            layer(f"{path}/depthwise", block.conv_dw, block.bn1)
            layer(f"{path}/project", block.conv_pw, block.bn2)
        for ours, theirs in (("squeeze", "conv_reduce"), ("excite", "conv_expand")):
            of((leaves, f"{path}/{ours}"), getattr(block.se, theirs), patches)
    layer("last", model.conv_head, model.bn2)
    linear(leaves, "head", model.classifier)
    return leaves


def make_nf_resnet():
    config = nfnet.NfCfg(
        depths=(2, 1),
        channels=(16, 32),
        stem_type="7x7_pool",
        stem_chs=4,
        bottle_ratio=0.25,
        ch_div=1,
        same_padding=True,
        std_conv_eps=1e-12,
        skipinit=True,
        act_layer="relu",
        gamma_in_act=True,  # as in the authors' code: stem and head have it in the right places
    )
    nfnet._nonlin_gamma["relu"] = np.sqrt(2 / (1 - 1 / np.pi))  # timm's is an estimate
    # timm's multiplies in place what the gradient of ReLU needs
    nfnet.GammaAct.forward = lambda self, x: self.act_fn(x) * self.gamma
    model = nfnet.NormFreeNet(config, num_classes=5)
    model.stem.pool = timm.layers.create_pool2d("max", 3, 2, padding="same")
    layer = timm.layers.ScaledStdConv2dSame
    model.stem.conv = layer(3, 4, 7, 2, bias=False, eps=1e-12)
    sizes = iter([(4, 16, 1), None, (16, 32, 2)])
    for block in [block for stage in model.stages for block in stage]:
        size = next(sizes)
        if size is not None:
            block.downsample = layer(*size[:2], 1, size[2], eps=1e-12)
    return model


def make_tiny_net():
    stages = ["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r2_k5_s2_e2_c16_se0.25"]
    return efficientnet.EfficientNet(
        efficientnet.decode_arch_def([list(stage) for stage in stages]),
        num_classes=5,
        num_features=16,
        stem_size=8,
        fix_stem=True,
        act_layer=torch.nn.SiLU,
    )


def main():
    checkout = Path(sys.argv[1])
    sys.path.insert(0, str(checkout))
    from src.cct import CCT
    from src.cvt import CVT
    from src.vit import ViTLite

    rng = np.random.default_rng(0)
    commit = ["git", "-C", checkout, "rev-parse", "HEAD"]
    stored = {
        "torch_version": torch.__version__,
        "timm_version": timm.__version__,
        "compact_transformers": subprocess.check_output(commit, text=True).strip(),
        "images": rng.integers(-16, 17, size=(2, 8, 8, 3)).astype(np.int8),
        "cotangent": rng.normal(size=(2, 5)).astype(np.float32),
    }
    sizes = {"embedding_dim": 8, "num_layers": 2, "num_heads": 2, "mlp_ratio": 2, "num_classes": 5}
    conv_sizes = {"kernel_size": 3, "stride": 1, "padding": 1, "n_conv_layers": 1}
    cases = {
        "cct": (CCT(img_size=8, **conv_sizes, **sizes), lambda m: compact(m, "conv"), False),
        "cvt": (CVT(img_size=8, kernel_size=4, **sizes), lambda m: compact(m, "patch"), False),
        "vit_lite": (
            ViTLite(img_size=8, kernel_size=4, **sizes),
            lambda m: compact(m, "patch"),
            False,
        ),
        "vit": (
            vision_transformer.VisionTransformer(
                img_size=8,
                patch_size=4,
                embed_dim=8,
                depth=2,
                num_heads=2,
                mlp_ratio=2,
                num_classes=5,
            ),
            vit,
            False,
        ),
        "resnet_basic": (
            resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), num_classes=5),
            residual,
            True,
        ),
        "resnet_bottleneck": (
            resnet.ResNet(resnet.Bottleneck, (1, 1, 1, 1), num_classes=5),
            residual,
            True,
        ),
        "nf_resnet": (make_nf_resnet(), normalizer_free, False),
        "tinynet": (make_tiny_net(), inverted, True),
    }
    for case, (model, leaves_of, has_statistics) in cases.items():
        if case.startswith("resnet"):
            model.conv1 = torch.nn.Conv2d(3, 4, 7, 2, 3, bias=False)
            model.bn1 = torch.nn.BatchNorm2d(4)
            expansion = 4 if case == "resnet_bottleneck" else 1
            first = resnet.Bottleneck if expansion == 4 else resnet.BasicBlock
            shortcut = lambda i, o, s: resnet.downsample_conv(i, o, 1, s)
            model.layer1 = torch.nn.Sequential(
                first(4, 4, 1, shortcut(4, 16, 1) if expansion == 4 else None)
            )
            model.layer2 = torch.nn.Sequential(
                first(4 * expansion, 8, 2, shortcut(4 * expansion, 8 * expansion, 2))
            )
            model.layer3, model.layer4 = torch.nn.Identity(), torch.nn.Identity()
            model.fc = torch.nn.Linear(8 * expansion, 5)
        randomise(model, rng)
        leaves = leaves_of(model)
        units = [np.round(32 * leaves[path].detach().numpy()).ravel() for path in sorted(leaves)]
        stored[f"{case}/weights"] = np.concatenate(units).astype(np.int8)
        assert np.array_equal(stored[f"{case}/weights"], np.concatenate(units))
        for training in (False, True) if has_statistics else (False,):
            model.train(training)
            images = torch.tensor(stored["images"] / 8.0).permute(0, 3, 1, 2).requires_grad_()
            logits = model(images)
            (slope,) = torch.autograd.grad(
                logits, images, torch.tensor(stored["cotangent"]).double()
            )
            name = "training" if training else "evaluation"
            stored[f"{case}/{name}/logits"] = logits.detach().numpy().astype(np.float32)
            slope = slope.permute(0, 2, 3, 1)[:, ::2, ::2].numpy()
            stored[f"{case}/{name}/slope"] = slope.astype(np.float32)
            print(case, name, logits.abs().max().item(), np.abs(slope).max())
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **stored)


if __name__ == "__main__":
    main()
