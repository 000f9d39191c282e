import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref.models import NFResNetConfig
from jaxref.norms import nf_residual_scales

TINY = {"num_classes": 5, "image_shape": (8, 8, 3), "stages": (2, 1), "width": 4}


def at_initial_values(model, skip_gain):
    """Gains of 1 and no biases, as `build` makes them; random kernels stay."""
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] in ("gain", "bias", "skip_gain"):
            value = {"gain": 1.0, "bias": 0.0, "skip_gain": skip_gain}[path[-1]]
            parameter[...] = jnp.full(parameter.shape, value)


class TestNumbers:
    def test_logits_and_gradients_match_timm(self, check_oracle):
        check_oracle(NFResNetConfig(**TINY), "nf_resnet")

    def test_number_of_parameters(self, count_parameters):
        """timm's, but for a scalar in each of 16 blocks, and no biases in the stem."""
        config = NFResNetConfig(num_classes=1000)
        count = count_parameters(lambda: config.build(rngs=nnx.Rngs(0)))
        assert count == 25_557_032 + 16 - 64


class TestSignal:
    def test_variance_is_kept_by_branches_and_grows_as_a_saw_tooth_in_the_stream(
        self, make_model, quick_apply
    ):
        stages = (3, 2)
        config = NFResNetConfig(
            num_classes=2, image_shape=(16, 16, 3), stages=stages, width=32, stem="small", alpha=0.7
        )
        model = make_model(config)
        at_initial_values(model, skip_gain=1.0)

        def run(model, x):
            x, signals = model.stem(x), []
            for block in model.blocks:
                branch = block.branch(x)
                x = block(x, None)
                signals.append((branch, x))
            moments = lambda y: (y.var((0, 1, 2)).mean(), jnp.square(y.mean((0, 1, 2))).mean())
            return [(moments(branch), moments(x)) for branch, x in signals]

        images = np.random.default_rng(1).normal(size=(8, 16, 16, 3)).astype(np.float32)
        measured = np.array(quick_apply(run, model, images))
        branch_variance, stream = measured[:, 0, 0], measured[:, 1]
        np.testing.assert_allclose(branch_variance, 1, atol=0.35)  # zeros at the border: less
        betas = [scale.beta for scale in nf_residual_scales(stages, 0.7)]
        expected = [beta**2 for beta in betas[1:]] + [1 + 2 * 0.7**2]
        np.testing.assert_allclose(stream[:, 0], expected, rtol=0.25)
        assert stream[2, 0] > stream[3, 0]  # the transition starts anew
        assert np.all(stream[:, 1] < 0.25 * stream[:, 0])  # no mean builds up

    def test_at_the_start_a_block_is_its_shortcut(self, make_model, quick_apply):
        model = make_model(NFResNetConfig(**TINY, stem="small"))
        at_initial_values(model, skip_gain=0.0)
        x = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
        run = lambda model, x: (model.blocks[0](x, None), model.blocks[0].skip(x))
        np.testing.assert_array_equal(*quick_apply(run, model, x))

    def test_the_initial_model(self):
        """What `build` leaves: SkipInit's scalars at 0, gains at 1, and kernels of the fan-in."""
        config = NFResNetConfig(**(TINY | {"width": 32, "stages": (1,)}))
        block = jax.jit(lambda: nnx.state(config.build(rngs=nnx.Rngs(0)).blocks[0]))()
        assert block["skip_gain"][...] == 0
        for conv in block["convs"].values():
            kernel = conv["kernel"][...]
            assert np.all(conv["gain"][...] == 1)
            assert np.std(kernel) == pytest.approx(np.prod(kernel.shape[:-1]) ** -0.5, rel=0.1)

    def test_dropped_branches_are_gone_and_the_others_as_they_were(self, make_model, quick_apply):
        model = make_model(NFResNetConfig(**TINY, stem="small", stochastic_depth=0.75))
        block = model.blocks[2]
        assert block.rate == pytest.approx(0.5)  # two of three blocks before it
        x = np.random.default_rng(0).normal(size=(32, 8, 8, 16)).astype(np.float32)
        run = lambda model, x: (
            model.blocks[2](x, jax.random.key(0)),
            model.blocks[2](x, None),
            model.blocks[2].skip(x),
        )
        y, whole, skipped = quick_apply(run, model, x)
        kept = np.abs(y - whole).max((1, 2, 3)) < 1e-5
        dropped = np.abs(y - skipped).max((1, 2, 3)) < 1e-5
        assert np.all(kept ^ dropped)
        assert 6 < kept.sum() < 26


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 18}, "depth must be that of bottleneck blocks, got 18"),
        ({"depth": 60}, "depth must be one of"),
        ({"activation": "swish"}, "name must be one of .*'silu'.* got 'swish'"),
        ({"alpha": 0.0}, "alpha must be in"),
        ({"stem": "none"}, "stem must be 'imagenet' or 'small'"),
        ({"stages": (0,)}, "stages must be in"),
        ({"stochastic_depth": 1.0}, "stochastic_depth must be in"),
    ],
)
def test_bad_configuration_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        NFResNetConfig(**(TINY | change))
