from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref.models import VisionTransformerConfig
from jaxref.models.vit import EncoderBlock, PatchEmbedding, depth_rates

TINY = {
    "num_classes": 5,
    "image_shape": (8, 8, 3),
    "patch_size": 4,
    "num_layers": 2,
    "features": 8,
    "num_heads": 2,
    "mlp_features": 16,
}


class TestNumbers:
    def test_logits_and_gradients_match_timm(self, check_oracle):
        exact = partial(jax.nn.gelu, approximate=False)
        check_oracle(VisionTransformerConfig(**TINY, activation=exact), "vit")

    def test_number_of_parameters(self, count_parameters):
        count = 86_567_656  # timm's vit_base_patch16_224
        for pool, fewer in (("class", 0), ("mean", 2 * 768)):  # a class token and its position
            config = VisionTransformerConfig(num_classes=1000, pool=pool)
            assert count_parameters(lambda: config.build(rngs=nnx.Rngs(0))) == count - fewer


class TestPatches:
    def test_tokens_are_squares_in_reading_order(self, make_module):
        embed = make_module(
            lambda: PatchEmbedding(
                (6, 4, 2), 2, 3, dtype=None, param_dtype=np.float32, rngs=nnx.Rngs(0)
            )
        )
        images = np.random.default_rng(0).normal(size=(1, 6, 4, 2)).astype(np.float32)
        tokens = embed(images)
        assert tokens.shape == (1, embed.num_tokens, 3) == (1, 6, 3)
        square = images[0, 2:4, 2:4].ravel()  # second row of squares, second column
        expected = square @ embed.project.kernel[...] + embed.project.bias[...]
        np.testing.assert_allclose(tokens[0, 3], expected, rtol=1e-5, atol=1e-6)

    def test_mean_pooling_without_positions_knows_no_order(self, make_model, quick_apply):
        model = make_model(VisionTransformerConfig(**TINY, pool="mean"))
        model.positions[...] = np.zeros(model.positions.shape, np.float32)
        images = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32)
        others = [images, np.roll(images, 4, axis=1), images[:, ::-1]]
        same, turned, mirrored = quick_apply(
            lambda model, x: model(x), model, np.concatenate(others)
        )
        np.testing.assert_allclose(same, turned, atol=1e-5)
        assert np.abs(same - mirrored).max() > 1e-3


class TestWhatDrops:
    def make_block(self, make_module, **rates):
        return make_module(
            lambda: EncoderBlock(
                8,
                2,
                16,
                kernel_init=jax.nn.initializers.zeros,
                dtype=None,
                param_dtype=np.float32,
                rngs=nnx.Rngs(0),
                **rates,
            )
        )

    def test_stochastic_depth_skips_branches_by_example_and_keeps_the_mean(
        self, make_module, quick_apply
    ):
        block = self.make_block(make_module, stochastic_depth=0.5)
        x = np.random.default_rng(0).normal(size=(64, 3, 8)).astype(np.float32)

        def run(block, x):
            attended = x + 2 * block.attention(block.attention_norm(x))
            second = lambda x: x + 2 * block.mlp(block.mlp_norm(x))
            possible = jnp.stack([x, attended, second(x), second(attended)])
            return block(x, key=jax.random.key(0)), possible

        y, possible = quick_apply(run, block, x)
        distance = np.abs(possible - y).max(axis=(2, 3))
        assert np.all(distance.min(axis=0) < 1e-5)
        assert np.all(np.bincount(distance.argmin(axis=0), minlength=4) > 5)

    def test_attention_dropout_drops_weights_and_keeps_the_mean(self, make_module, quick_apply):
        block = self.make_block(make_module, attention_dropout=0.5)
        x = np.random.default_rng(0).normal(size=(1, 1, 8)).astype(np.float32)
        x = np.broadcast_to(x, (400, 3, 8))  # of equal values, a multiple is left

        def run(block, x):
            key, bias = jax.random.key(0), block.attention.output.bias[...]
            return block._attend(x, key, None) - bias, block._attend(x, None, None) - bias

        dropped, whole = quick_apply(run, block, x)
        # each of the two heads keeps its own share: their mean is what stays
        error = np.abs(dropped.mean(axis=(0, 1)) - whole[0, 0]).max() / np.abs(whole).max()
        assert error < 0.1
        assert dropped[:, 0].std(axis=0).max() > 0.1 * np.abs(whole).max()

    def test_rates_grow_to_the_last_layer(self):
        assert depth_rates(0.3, 1) == [0]
        np.testing.assert_allclose(depth_rates(0.3, 4), [0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool": "max"}, "pool must be 'class' or 'mean', got 'max'"),
        ({"patch_size": 3}, "patch_size must divide the image of 8 x 8, got 3"),
        ({"num_heads": 3}, "num_heads must divide features = 8"),
        ({"num_layers": 0}, "num_layers must be in"),
        ({"num_classes": 0}, "num_classes must be in"),
        ({"image_shape": (8, 8)}, r"image_shape must be \(height, width, channels\)"),
        ({"image_shape": (8, 0, 3)}, "image_shape must be in"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"stochastic_depth": -0.1}, "stochastic_depth must be in"),
    ],
)
def test_bad_configuration_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: VisionTransformerConfig(**(TINY | change)).build(rngs=nnx.Rngs(0)))
