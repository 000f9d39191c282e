import math

import pytest
from flax import nnx

from jaxref.models import TINYNET_ANCHORS, TinyNetConfig, efficientnet_b0_flops, tinynet_config
from jaxref.models.compound_scaling import Stage

# Of the paper's table, in millions.
FLOPS = {"a": 339, "b": 202, "c": 100, "d": 52, "e": 24}
PARAMETERS = {"a": 6_187_972, "b": 3_730_562, "c": 2_457_234, "d": 2_338_446, "e": 2_042_972}


class TestNumbers:
    def test_logits_and_gradients_match_timm(self, check_oracle):
        config = TinyNetConfig(
            num_classes=5,
            image_shape=(8, 8, 3),
            stages=(Stage(3, 1, 1, 8, 1), Stage(5, 2, 2, 16, 2)),
            stem_features=8,
            head_features=16,
        )
        check_oracle(config, "tinynet", ("evaluation", "training"))

    @pytest.mark.parametrize("variant", TINYNET_ANCHORS)
    def test_size_of_the_published_networks(self, variant, count_parameters):
        """The numbers of parameters are those of timm's models."""
        config = tinynet_config(variant, num_classes=1000)
        assert count_parameters(lambda: config.build(rngs=nnx.Rngs(0))) == PARAMETERS[variant]
        flops = efficientnet_b0_flops(*TINYNET_ANCHORS[variant])
        assert abs(flops / 1e6 / FLOPS[variant] - 1) < 0.02

    def test_operations_of_the_base(self):
        """Every product of a convolution, from the shapes of the model itself."""
        total = []

        def record(model, side):
            for path, module in nnx.iter_modules(model):
                kernel = getattr(module, "kernel", None)
                if kernel is not None and kernel.ndim == 4:
                    halved = 2 ** sum(s > 1 for s in strides_before(path))
                    pixels = math.ceil(side / halved) ** 2
                    total.append(kernel.size * pixels)
                elif kernel is not None:
                    total.append(kernel.size)

        config = TinyNetConfig(num_classes=1000)
        model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
        strides = [block.depthwise.conv.strides[0] for block in model.blocks]

        def strides_before(path):
            if path[0] == "stem":
                return [2]
            if path[0] != "blocks":
                return [2, *strides]
            last = path[1] + (path[2] in ("depthwise", "project"))
            return [2, *strides[:last]]

        record(model, 224)
        assert sum(total) == efficientnet_b0_flops()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tinynet_config("f", num_classes=3), r"variant must be one of \['a', .*, got 'f'"),
        (lambda: TinyNetConfig(num_classes=3, width=0.0), "width must be in"),
        (lambda: TinyNetConfig(num_classes=3, stages=()), "stages must have at least one"),
        (lambda: TinyNetConfig(num_classes=3, dropout=1.0), "dropout must be in"),
    ],
)
def test_bad_configuration_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
