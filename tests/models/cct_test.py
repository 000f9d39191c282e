import numpy as np
import pytest
from flax import nnx

from jaxref.attention import sinusoidal_position_embedding
from jaxref.models import (
    CompactConvolutionalTransformerConfig,
    CompactEncoder,
    CompactEncoderConfig,
    CompactVisionTransformerConfig,
    ViTLiteConfig,
    cct_2,
    cct_4,
    cct_6,
    cct_7,
    cct_14,
)

TINY = {
    "num_classes": 5,
    "image_shape": (8, 8, 3),
    "num_layers": 2,
    "features": 8,
    "num_heads": 2,
}


class TestNumbers:
    @pytest.mark.parametrize(
        ("case", "config"),
        [
            ("cct", CompactConvolutionalTransformerConfig(**TINY)),
            ("cvt", CompactVisionTransformerConfig(**TINY)),
            ("vit_lite", ViTLiteConfig(**TINY)),
        ],
        ids=["cct", "cvt", "vit_lite"],
    )
    def test_logits_and_gradients_match_the_authors(self, case, config, check_oracle):
        check_oracle(config, case)

    @pytest.mark.parametrize(
        ("config", "count"),
        [
            (cct_7(3, 1, num_classes=10), 3_760_139),
            (cct_2(3, 2, num_classes=10), 283_723),
            (cct_4(3, 2, num_classes=10), 482_123),
            (cct_6(3, 1, num_classes=10), 3_233_803),
            (cct_14(num_classes=1000, image_shape=(224, 224, 3)), 22_367_273),
        ],
        ids=["cct_7", "cct_2", "cct_4", "cct_6", "cct_14"],
    )
    def test_number_of_parameters_is_the_authors(self, config, count, count_parameters):
        assert count_parameters(lambda: config.build(rngs=nnx.Rngs(0))) == count


class TestEncoder:
    @pytest.mark.parametrize("class_token", [False, True])
    @pytest.mark.parametrize("positions", ["learned", "sinusoidal", None])
    def test_tokens_that_do_not_exist_change_nothing(
        self, class_token, positions, make_module, quick_apply
    ):
        sizes = {"num_classes": 3, "num_layers": 1, "features": 8, "num_heads": 2}
        config = CompactEncoderConfig(**sizes, positions=positions)
        encoder = make_module(
            lambda: CompactEncoder(config, 4, class_token=class_token, rngs=nnx.Rngs(0))
        )
        x = np.random.default_rng(0).normal(size=(1, 4, 8)).astype(np.float32)
        changed = x.copy()
        changed[:, 2] *= -3
        where = np.arange(4)[None] != 2
        run = lambda encoder, x: (encoder(x, where=where), encoder(x))
        (hidden, seen), (hidden_changed, seen_changed) = (
            quick_apply(run, encoder, tokens) for tokens in (x, changed)
        )
        np.testing.assert_allclose(hidden, hidden_changed, atol=1e-6)
        assert np.abs(seen - seen_changed).max() > 1e-3

    def test_positions_tell_tokens_apart(self, make_module, quick_apply):
        sizes = {"num_classes": 3, "num_layers": 1, "features": 8, "num_heads": 2}
        x = np.random.default_rng(0).normal(size=(1, 4, 8)).astype(np.float32)
        for positions in ("learned", "sinusoidal", None):
            config = CompactEncoderConfig(**sizes, positions=positions)
            encoder = make_module(lambda c=config: CompactEncoder(c, 4, rngs=nnx.Rngs(0)))
            both = np.concatenate([x, x[:, ::-1]])
            y, turned = quick_apply(lambda encoder, x: encoder(x), encoder, both)
            assert (np.abs(y - turned).max() > 1e-4) == (positions is not None)
            if positions == "sinusoidal":
                table = sinusoidal_position_embedding(4, 8)
                np.testing.assert_array_equal(encoder._positions(), table)
                with pytest.raises(ValueError, match=r"tokens must be 4 .*, got 3"):
                    encoder(x[:, :3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": "rotary"}, "positions must be 'learned', 'sinusoidal' or None"),
        ({"num_heads": 3}, "num_heads must divide features = 8"),
        ({"mlp_ratio": 0}, "mlp_ratio must be in"),
        ({"attention_dropout": 1.0}, r"attention_dropout must be in \[0, 1\)"),
        ({"conv_layers": 0}, "num_layers must be in"),
        ({"kernel_size": 0}, "kernel_size must be in"),
        ({"kernel_size": 15, "conv_padding": 0}, "image_shape .* is too small"),
        ({"image_shape": (8, 8)}, r"image_shape must be \(height, width, channels\)"),
    ],
)
def test_bad_configuration_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(
            lambda: CompactConvolutionalTransformerConfig(**(TINY | change)).build(rngs=nnx.Rngs(0))
        )
