"""What every image classifier has to be: one contract, many models."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxref.models import (
    CompactConvolutionalTransformerConfig,
    CompactVisionTransformerConfig,
    NFResNetConfig,
    ResNetConfig,
    TinyNetConfig,
    VisionTransformerConfig,
    ViTLiteConfig,
    WideNetConfig,
)
from jaxref.models.compound_scaling import Stage
from jaxref.models.vision import dropout, split_keys, stochastic_depth
from jaxref.parallel import logical_sharding, make_mesh, use_rules

IMAGES = {"num_classes": 5, "image_shape": (8, 8, 3)}
TOKENS = IMAGES | {"num_layers": 1, "features": 8, "num_heads": 2}
COMPACT = TOKENS | {"dropout": 0.2}
RESIDUAL = IMAGES | {"stem": "small", "stages": (1, 1), "width": 8, "dropout": 0.2}
CASES = {
    "vit": VisionTransformerConfig(**TOKENS, patch_size=4, mlp_features=16, dropout=0.2),
    "cct": CompactConvolutionalTransformerConfig(**COMPACT),
    "cvt": CompactVisionTransformerConfig(**COMPACT),
    "vit_lite": ViTLiteConfig(**COMPACT),
    "widenet": WideNetConfig(
        **(TOKENS | {"num_layers": 2}), patch_size=4, mlp_features=16, dropout=0.2
    ),
    "resnet": ResNetConfig(**RESIDUAL, depth=18, stochastic_depth=0.2),
    "nf_resnet": NFResNetConfig(**(RESIDUAL | {"width": 4})),
    "tinynet": TinyNetConfig(
        **IMAGES,
        stages=(Stage(3, 1, 1, 8, 1), Stage(5, 1, 2, 8, 1)),
        stem_features=8,
        head_features=16,
    ),
}
KEY = jax.random.key(0)


def random_batch(batch=8, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, 8, 8, 3)).astype(np.float32), rng.integers(5, size=batch)


def training_loss(model, images, labels, key):
    logits = model(images, key=key)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, logits


def run_eval(graphdef, state, images):
    model = nnx.merge(graphdef, state)
    model.eval()
    return model(images)


@pytest.fixture(scope="module", params=CASES)
def case(request, make_model, quick_jit):
    """A model with a training step and an evaluation, each compiled once per shape."""
    config = CASES[request.param]
    graphdef, state = nnx.split(make_model(config))

    @quick_jit
    def step(state, images, labels, key, rate):
        def loss_fn(state):
            model = nnx.merge(graphdef, state)
            model.train()
            loss, logits = training_loss(model, images, labels, key)
            return loss, (logits, nnx.state(model, nnx.Not(nnx.Param)))

        (loss, (logits, others)), slopes = jax.value_and_grad(loss_fn, has_aux=True)(state)
        slopes = nnx.filter_state(slopes, nnx.Param)
        params = nnx.filter_state(state, nnx.Param)
        params = jax.tree.map(lambda p, g: p - rate * g, params, slopes)
        return loss, logits, slopes, nnx.merge_state(params, others)

    return SimpleNamespace(
        config=config,
        graphdef=graphdef,
        state=state,
        step=step,
        evaluate=quick_jit(partial(run_eval, graphdef)),
    )


class TestEvaluation:
    def test_an_example_does_not_see_its_batch(self, case):
        images, _ = random_batch()
        logits = case.evaluate(case.state, images)
        assert logits.shape == (8, 5)
        assert logits.dtype == jnp.float32
        others = case.evaluate(case.state, np.concatenate([images[:1], 2 - images[1:]]))
        np.testing.assert_allclose(others[0], logits[0], rtol=1e-5, atol=1e-6)
        assert np.all(np.abs(others[1:] - logits[1:]).max(axis=1) > 1e-5)

    def test_a_batch_of_one(self, case):
        images, _ = random_batch()
        one = case.evaluate(case.state, images[:1])
        np.testing.assert_allclose(one, case.evaluate(case.state, images)[:1], rtol=1e-5, atol=1e-6)

    def test_bfloat16(self, case, make_model, quick_jit):
        config = type(case.config)(**(vars(case.config) | {"dtype": jnp.bfloat16}))
        graphdef, state = nnx.split(make_model(config))
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.float32.dtype}
        images, _ = random_batch()
        logits = quick_jit(partial(run_eval, graphdef))(state, images)
        assert logits.dtype == jnp.float32
        exact = case.evaluate(case.state, images)
        assert np.mean(np.abs(logits - exact)) < 0.02 * np.abs(exact).max()
        assert np.any(logits != exact)

    @pytest.mark.parametrize(
        "shape", [(2, 8, 8), (2, 8, 9, 3), (2, 9, 8, 3), (2, 8, 8, 1), (8, 8, 3)]
    )
    def test_images_of_another_shape(self, case, shape):
        model = nnx.merge(case.graphdef, case.state)
        with pytest.raises(ValueError, match=r"images must have shape \[batch, 8, 8, 3\], got"):
            model(np.zeros(shape, np.float32))
        with pytest.raises(TypeError, match="images must have a floating-point type"):
            model(np.zeros((2, 8, 8, 3), np.uint8))


class TestTraining:
    def test_the_key_decides_what_drops(self, case):
        images, labels = random_batch()
        run = lambda key: case.step(case.state, images, labels, key, 0.0)[1]
        first, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert np.any(first != other)

    def test_without_a_key_nothing_is_random(self, case):
        def run(state, images, key=None):
            model = nnx.merge(case.graphdef, state)
            model.train()
            return model(images, key=key)

        drawn = [
            "random_bits" in str(jax.make_jaxpr(run)(case.state, random_batch()[0], *key))
            for key in ((), (KEY,))
        ]
        assert drawn == [False, True]

    def test_gradients_are_finite_and_reach_every_parameter(self, case):
        images, labels = random_batch()
        *_, slopes, _ = case.step(case.state, images, labels, KEY, 0.0)
        for path, slope in nnx.to_flat_state(slopes):
            assert np.all(np.isfinite(slope[...])), path
            # a constant added to all scores of a softmax changes nothing
            assert np.any(slope[...] != 0) or path[-1] == "pool_bias", path

    def test_a_step_lowers_the_loss(self, case):
        images, labels = random_batch()
        first, _, slopes, after = case.step(case.state, images, labels, KEY, 3e-3)
        second, *_ = case.step(after, images, labels, KEY, 0.0)
        squares = sum(float(np.sum(leaf**2)) for leaf in jax.tree.leaves(slopes))
        assert first - second == pytest.approx(3e-3 * squares, rel=0.5)

    def test_statistics_move_in_training(self, case):
        images, labels = random_batch()
        *_, after = case.step(case.state, images, labels, KEY, 0.0)
        for path, variable in nnx.to_flat_state(nnx.filter_state(case.state, nnx.BatchStat)):
            new = dict(nnx.to_flat_state(after))[path]
            assert np.any(new[...] != variable[...]), path
        has_norm_with_statistics = getattr(case.config, "norm", None) is not None
        assert bool(nnx.to_flat_state(nnx.filter_state(case.state, nnx.BatchStat))) == (
            has_norm_with_statistics or isinstance(case.config, TinyNetConfig)
        )


class TestSharding:
    def test_a_sharded_batch_gives_the_same_logits(self, case, quick_jit):
        """Statistics of the global batch included."""
        images, labels = random_batch()
        *_, expected, _, _ = case.step(case.state, images, labels, KEY, 0.0)
        mesh = make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
        placed = jax.tree.map(
            lambda leaf: leaf.replace(
                jax.device_put(
                    leaf[...], logical_sharding(leaf.get_metadata()["axes"], leaf.shape, mesh)
                )
            ),
            case.state,
            is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
        )
        rows = jax.device_put(
            images, logical_sharding(("batch", None, None, None), images.shape, mesh)
        )

        @quick_jit
        def run(state, images):
            with use_rules(mesh):
                model = nnx.merge(case.graphdef, state)
                model.train()
                return model(images, key=KEY)

        np.testing.assert_allclose(run(placed, rows), expected, rtol=1e-4, atol=1e-5)

    def test_every_parameter_names_its_axes(self, case):
        known = {"embed", "heads", "kv_heads", "mlp", "expert", None}
        for path, variable in nnx.to_flat_state(case.state):
            axes = variable.get_metadata()["axes"]
            assert len(axes) == len(variable.shape), path
            assert set(axes) <= known, path


class TestHelpers:
    def test_dropout_keeps_the_mean(self):
        x = np.ones((100, 100), np.float32)
        y = dropout(x, 0.25, KEY)
        assert set(np.unique(y)) == {0, np.float32(4 / 3)}
        assert abs(y.mean() - 1) < 0.03
        for rate, key in ((0.25, None), (0.0, KEY)):
            assert dropout(x, rate, key) is x

    @pytest.mark.parametrize(("rescale", "kept"), [(True, 2), (False, 1)])
    def test_stochastic_depth_drops_examples(self, rescale, kept):
        x = np.ones((100, 2, 3), np.float32)
        y = stochastic_depth(x, 0.5, KEY, rescale=rescale)
        assert np.all(y == y[:, :1, :1])
        assert set(np.unique(y)) == {0, kept}
        assert 30 < np.count_nonzero(y[:, 0, 0]) < 70

    def test_keys(self):
        assert split_keys(None, 3) == [None] * 3
        assert len({jax.random.key_data(key).tobytes() for key in split_keys(KEY, 3)}) == 3
