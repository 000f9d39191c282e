from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxref.losses import (
    stack_alignment_loss,
    symmetric_absolute_percentage_error,
)
from jaxref.models import NBEATSConfig

ORACLE = np.load(Path(__file__).parents[1] / "oracles" / "nbeats.npz")
STACKS = ("generic", "trend", "seasonality")
TINY = {"context_length": 9, "horizon": 4, "num_blocks": 2, "num_layers": 2, "stacks": STACKS}


def load(model, weights):
    """The weights of an oracle, one after the other in the order of their paths, in a model."""
    flat = {"/".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(model))}
    assert sum(v.size for v in flat.values()) == weights.size
    ends = np.cumsum([flat[path].size for path in sorted(flat)])[:-1]
    for path, values in zip(sorted(flat), np.split(weights.astype("f") / 32, ends)):
        flat[path][...] = jnp.asarray(values.reshape(flat[path].shape))
    return model


class TestNumbers:
    def test_forecast_features_and_gradient_match_the_authors(self, make_model, quick_apply):
        config = NBEATSConfig(**TINY, features=(5, 6, 7), share_weights=False)
        model = load(make_model(config), ORACLE["weights"])

        def run(model, inputs):
            def loss(inputs):
                forecast, features = model.forecast_with_features(inputs)
                total = jnp.sum(forecast * ORACLE["cotangent"]) + jnp.sum(features[-1])
                return total, (forecast, features)

            return jax.value_and_grad(loss, has_aux=True)(inputs)

        inputs = ORACLE["inputs"].astype("f") / 8
        (_, (forecast, features)), slope = quick_apply(run, model, inputs)
        np.testing.assert_allclose(forecast, ORACLE["forecast"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(slope, ORACLE["slope"], rtol=1e-3, atol=1e-3)
        for i, feature in enumerate(features):
            expected = ORACLE[f"features_{i}"]
            np.testing.assert_allclose(feature, expected, rtol=1e-4, atol=1e-4)

    def test_number_of_parameters(self, count_parameters):
        """The authors' N-BEATS-I for a horizon of 10 and a window of 50."""
        config = NBEATSConfig(context_length=50, horizon=10, features=(2048, 512, 512))
        count = count_parameters(lambda: config.build(rngs=nnx.Rngs(0)))
        mlp = lambda width: 51 * width + 3 * (width + 1) * width
        assert count == mlp(2048) + 6 * 2048 + 2 * (mlp(512) + 36 * 512)


class TestParts:
    def test_parts_add_up_and_have_the_shapes_of_their_stacks(self, make_model, quick_apply):
        model = make_model(NBEATSConfig(**TINY, features=5, channels=3))
        assert [len(stack) for stack in model.stacks] == [1, 1, 1]  # the blocks share weights
        inputs = np.random.default_rng(0).normal(size=(2, 9, 3)).astype("f")

        parts = quick_apply(lambda model, inputs: model.decompose(inputs), model, inputs)
        np.testing.assert_allclose(sum(parts["backcasts"]) + parts["residual"], inputs, atol=1e-5)
        np.testing.assert_array_equal(parts["level"], inputs[:, -1:])
        trend, season = parts["forecasts"][2], parts["forecasts"][4]
        assert np.abs(np.diff(trend, n=2, axis=1)).max() > 1e-3
        np.testing.assert_allclose(np.diff(trend, n=3, axis=1), 0, atol=1e-5)
        steps = 2 * np.pi * np.arange(4)[:, None] * [0, 1, 1.5] / 4
        waves = np.concatenate([np.cos(steps), np.sin(steps)], axis=1)
        rows = np.moveaxis(season, 1, 0).reshape(4, -1)
        fitted = waves @ np.linalg.lstsq(waves, rows)[0]
        np.testing.assert_allclose(fitted, rows, atol=1e-5)

    def test_alignment_of_channels_is_owed_in_training_by_the_layers_alone(self):
        """The divergence is that of the features; no other parameter has a gradient from it."""
        config = NBEATSConfig(
            context_length=8,
            horizon=4,
            stacks=("generic", "trend"),
            num_blocks=2,
            num_layers=1,
            features=6,
            alignment=0.3,
            share_weights=False,
        )
        inputs = np.random.default_rng(0).normal(size=(5, 8, 3)).astype("f")
        graphdef, params, rest = nnx.split(config.build(rngs=nnx.Rngs(0)), nnx.Param, ...)

        @jax.jit
        def owed(params, rest):
            model = nnx.merge(graphdef, params, rest)
            model(inputs)
            return model.alignment_loss[...], model.forecast_with_features(inputs)[1]

        (value, features), pull = jax.vjp(lambda params: owed(params, rest), params)
        moved = [jnp.swapaxes(f, 0, 1) for f in features]
        expected = 0.3 * stack_alignment_loss(moved, np.arange(3))
        np.testing.assert_allclose(value, expected, rtol=1e-4)
        (slopes,) = pull((jnp.ones_like(value), jax.tree.map(jnp.zeros_like, features)))
        for path, slope in jax.tree_util.tree_leaves_with_path(slopes):
            path = jax.tree_util.keystr(path, simple=True, separator="/")
            _, _, block, part, *_ = path.split("/")
            assert np.any(slope != 0) == (block == "1" and part == "layers"), path
        model = nnx.merge(graphdef, params, rest)
        model.eval()
        model(inputs)
        assert model.alignment_loss[...] == 0

    @pytest.mark.claim("feature-aligned-nbeats")
    def test_alignment_brings_domains_together_at_no_cost_of_the_forecast(self):
        """Two domains of waves, of different length and level, and the same model trained with and
        without alignment."""
        rng = np.random.default_rng(0)
        ids = np.repeat([0, 1], 12)
        time = np.arange(12) + rng.uniform(0, 20, size=(24, 1))
        series = 3 + ids[:, None] + np.sin(time * (1 + 0.5 * ids[:, None]))
        past, future = np.split(series[..., None].astype("f"), [8], axis=1)
        config = NBEATSConfig(
            context_length=8,
            horizon=4,
            stacks=("generic",),
            num_blocks=1,
            num_layers=2,
            features=16,
        )
        # the first stack's features know no other parameters than those of its layers
        graphdef, params = nnx.split(config.build(rngs=nnx.Rngs(0)))
        optimizer = optax.adam(1e-2)

        @jax.jit
        @jax.vmap
        def train(weight):
            def loss(params):
                model = nnx.merge(graphdef, params)
                forecast, features = model.forecast_with_features(past)
                error = jnp.mean(symmetric_absolute_percentage_error(forecast, future))
                apart = stack_alignment_loss(features, ids, iterations=10)
                return error + weight * apart, (error, apart)

            def step(state, _):
                params, moments = state
                (_, parts), slope = jax.value_and_grad(loss, has_aux=True)(params)
                updates, moments = optimizer.update(slope, moments)
                return (optax.apply_updates(params, updates), moments), parts

            return jax.lax.scan(step, (params, optimizer.init(params)), length=150)[1]

        errors, apart = train(jnp.array([0.0, 1.0]))
        last = errors[:, -20:].mean(axis=1)
        assert np.all(last < errors[:, 0] / 5)
        assert last[1] < 1.25 * last[0]
        assert apart[1, -1] < apart[0, -1] / 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stacks": ("level",)}, "stacks must be some of"),
        ({"stacks": ()}, "stacks must be some of"),
        ({"features": (5, 6)}, "features must be one number or one for each of 3 stacks"),
        ({"features": (5, 0, 6)}, "features must be in"),
        ({"horizon": 0}, "horizon must be in"),
        ({"channels": 0}, "channels must be in"),
        ({"degree": -1}, "degree must be in"),
    ],
)
def test_bad_configuration_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        NBEATSConfig(**TINY | change)


def test_bad_input_is_named_and_the_shortest_horizons_work():
    shapes = lambda config, shape: nnx.eval_shape(
        lambda: config.build(rngs=nnx.Rngs(0))(jnp.zeros(shape))
    )
    least = {"context_length": 2, "features": 4, "num_blocks": 1, "num_layers": 1}
    for horizon in (1, 2, 3):
        config = NBEATSConfig(**least, horizon=horizon, stacks=("seasonality",))
        assert shapes(config, (1, 2, 1)).shape == (1, horizon, 1)
    with pytest.raises(ValueError, match=r"inputs must have shape \[batch, 2, channels\]"):
        shapes(config, (1, 3, 1))
    with pytest.raises(ValueError, match=r"inputs must have shape \[batch, 2, 2\]"):
        shapes(NBEATSConfig(**least, horizon=1, channels=2), (1, 2, 3))
    with pytest.raises(TypeError, match="inputs must have a floating-point type"):
        nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))(jnp.zeros((1, 2, 1), int)))
