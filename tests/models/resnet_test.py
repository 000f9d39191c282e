from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref.models import ResNetConfig
from jaxref.nn import SigmaReparamConv, WeightStandardizedConv
from jaxref.norms import (
    batch_channel_norm,
    evonorm_b0,
    evonorm_s0,
    ghost_batch_norm,
    group_norm,
    weight_standardization,
)

TINY = {"num_classes": 5, "image_shape": (8, 8, 3), "depth": 18, "stages": (1, 1), "width": 4}


def random_images(batch=4, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, 8, 8, 3)).astype(np.float32)


class TestNumbers:
    @pytest.mark.parametrize(("depth", "case"), [(18, "basic"), (50, "bottleneck")])
    def test_logits_and_gradients_match_timm(self, depth, case, check_oracle):
        config = ResNetConfig(**(TINY | {"depth": depth}))
        check_oracle(config, f"resnet_{case}", ("evaluation", "training"))

    @pytest.mark.parametrize(
        ("depth", "count"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032)]
    )
    def test_number_of_parameters_is_that_of_timm(self, depth, count, count_parameters):
        config = ResNetConfig(num_classes=1000, depth=depth)
        assert count_parameters(lambda: config.build(rngs=nnx.Rngs(0))) == count

    def test_evonorm_block_is_the_paper_s(self, make_model, quick_apply):
        """It replaces norm and activation; where none follows, a gain and a bias are left of it."""
        norm = partial(evonorm_s0, groups=2)
        config = ResNetConfig(**TINY, norm=norm, activation=None, stem="small")
        model = make_model(config)

        def run(model, x):
            block = model.blocks[1]
            first, second = block.convs
            convolved = lambda layer, x: layer.conv(x)
            y = norm(
                convolved(first, x), first.norm.scale[...], first.norm.bias[...], first.norm.v[...]
            )
            y = convolved(second, y) * second.norm.scale[...] + second.norm.bias[...]
            shortcut = convolved(block.shortcut, x)
            shortcut = shortcut * block.shortcut.norm.scale[...] + block.shortcut.norm.bias[...]
            return block(x, None), jax.nn.relu(y + shortcut)

        x = np.random.default_rng(0).normal(size=(2, 6, 6, 4)).astype(np.float32)
        ours, expected = quick_apply(run, model, x)
        assert ours.shape == (2, 3, 3, 8)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


class TestParts:
    @pytest.mark.parametrize(
        ("parts", "has_statistics"),
        [
            ({"norm": partial(ghost_batch_norm, ghost_batch_size=2)}, True),
            ({"conv": WeightStandardizedConv, "norm": partial(group_norm, groups=2)}, False),
            ({"conv": WeightStandardizedConv, "norm": partial(batch_channel_norm, groups=2)}, True),
            ({"conv": SigmaReparamConv, "norm": partial(group_norm, groups=2)}, True),
            ({"norm": evonorm_b0, "activation": None}, True),
        ],
        ids=["ghost", "ws_gn", "ws_bcn", "sigma_reparam", "evonorm_b0"],
    )
    def test_statistics_move_in_training_alone(
        self, parts, has_statistics, make_model, quick_apply
    ):
        model = make_model(ResNetConfig(**TINY, stem="small", **parts))

        def run(model, x):
            statistics = lambda: jax.tree.map(jnp.copy, nnx.state(model, nnx.Not(nnx.Param)))
            logits, states = [], [statistics()]
            for evaluation in (False, True):
                model.set_attributes(use_running_average=evaluation, raise_if_not_found=False)
                logits.append(model(x))
                states.append(statistics())
            return logits, states

        logits, states = quick_apply(run, model, random_images())
        assert np.isfinite(logits).all()
        before, trained, evaluated = (jax.tree.leaves(state) for state in states)
        assert bool(before) == has_statistics
        for old, new, same in zip(before, trained, evaluated):
            assert np.any(old != new)
            np.testing.assert_array_equal(new, same)

    def test_the_convolution_is_the_chosen_one(self, make_model):
        model = make_model(ResNetConfig(**TINY, conv=WeightStandardizedConv))
        for layer in (model.stem, *model.blocks[1].convs, model.blocks[1].shortcut):
            kernel = layer.conv.kernel[...]
            np.testing.assert_allclose(
                layer.conv.effective_kernel(), weight_standardization(kernel), rtol=1e-5
            )

    @pytest.mark.parametrize("norm", [None, partial(batch_channel_norm, groups=2)])
    @pytest.mark.parametrize("zero", [True, False])
    def test_blocks_start_as_their_shortcuts(self, norm, zero):
        given = TINY | ({} if norm is None else {"norm": norm})
        config = ResNetConfig(**given, zero_init_residual=zero)

        def gains():
            model = config.build(rngs=nnx.Rngs(0))
            name = "scale" if norm is None else "channel_scale"
            return [[getattr(c.norm, name)[...] for c in block.convs] for block in model.blocks]

        for first, last in jax.jit(gains)():
            assert np.all(first == 1)
            assert np.all(last == (0 if zero else 1))

    def test_stems(self):
        for stem, size in (("imagenet", (8, 8)), ("small", (32, 32))):
            config = ResNetConfig(**(TINY | {"image_shape": (32, 32, 3)}), stem=stem)
            seen = []

            def run(config=config, seen=seen):
                model = config.build(rngs=nnx.Rngs(0))
                block = model.blocks[0]
                block.shortcut = lambda x: seen.append(x.shape) or x
                return model(jnp.zeros((2, 32, 32, 3)))

            nnx.eval_shape(run)
            assert seen == [(2, *size, 4)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 20}, r"depth must be one of \[18, 34, 50, 101, 152\], got 20"),
        ({"stages": ()}, "stages must have at least one stage"),
        ({"stages": (1, 0)}, "stages must be in"),
        ({"stem": "large"}, "stem must be 'imagenet' or 'small', got 'large'"),
        ({"width": 0}, "width must be in"),
        ({"dropout": 1.0}, "dropout must be in"),
    ],
)
def test_bad_configuration_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        ResNetConfig(**(TINY | change))
