from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref.losses import signal_decay_loss
from jaxref.models import CARDConfig, dynamic_projection, exponential_moving_average, token_blend

ORACLE = np.load(Path(__file__).parents[1] / "oracles" / "card.npz")
TINY = {
    "channels": 3,
    "context_length": 10,
    "horizon": 5,
    "patch_size": 4,
    "stride": 2,
    "features": 8,
    "num_heads": 4,
    "mlp_features": 6,
    "num_layers": 1,
    "alpha": 0.3,
    "projection_rank": 2,
}


def load(model, weights):
    """The weights of an oracle, one after the other in the order of their paths, in a model."""
    flat = {"/".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(model))}
    assert sum(v.size for v in flat.values()) == weights.size
    ends = np.cumsum([flat[path].size for path in sorted(flat)])[:-1]
    for path, values in zip(sorted(flat), np.split(weights.astype("f") / 32, ends)):
        flat[path][...] = jnp.asarray(values.reshape(flat[path].shape))
    return model


SCALE, SHIFT = np.array([0.5, 3, 20], "f"), np.array([5, -7, 100], "f")


@pytest.fixture(scope="module")
def evaluated(make_model, quick_apply):
    """Forecasts of the oracle's inputs, and of the same in other units."""
    model = load(make_model(CARDConfig(**TINY)), ORACLE["evaluation/weights"])
    model.eval()
    x = ORACLE["inputs"].astype("f") / 8
    return np.split(
        quick_apply(lambda m, x: m(x), model, np.concatenate([x, SCALE * x + SHIFT])), 2
    )


class TestNumbers:
    def test_forecast_in_evaluation_matches_the_authors(self, evaluated):
        expected = ORACLE["evaluation/forecast"]
        np.testing.assert_allclose(evaluated[0], expected, rtol=1e-4, atol=1e-4)

    def test_forecast_and_gradient_in_training_match_the_authors(self, make_model, quick_apply):
        """With the statistics in the token in front."""
        model = make_model(CARDConfig(**TINY, use_statistics=True))
        load(model, ORACLE["training/weights"])

        def run(model, inputs):
            graphdef, state = nnx.split(model)
            forecast, vjp = jax.vjp(lambda s, x: nnx.merge(graphdef, s)(x), state, inputs)
            return forecast, vjp(jnp.asarray(ORACLE["cotangent"]))[1]

        forecast, slope = quick_apply(run, model, ORACLE["inputs"].astype("f") / 8)
        np.testing.assert_allclose(forecast, ORACLE["training/forecast"], rtol=1e-4, atol=1e-4)
        expected = ORACLE["training/slope"]
        tolerance = 1e-3 * np.abs(expected).max()
        np.testing.assert_allclose(slope, expected, rtol=1e-3, atol=tolerance)


class TestPieces:
    def test_moving_average_is_the_recursion_keeps_constants_and_ends_at_the_identity(self):
        x = np.random.default_rng(0).normal(size=(2, 5, 3)).astype("f")
        expected = x.astype(float)
        for i in range(1, 5):
            expected[:, i] = 0.3 * x[:, i] + 0.7 * expected[:, i - 1]
        ours = exponential_moving_average(x, alpha=0.3, axis=1)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(exponential_moving_average(x, alpha=1.0, axis=-1), x)
        np.testing.assert_allclose(exponential_moving_average(np.ones(4, "f"), axis=0), 1)

    def test_projection_spreads_each_token_over_the_new_places(self):
        rng = np.random.default_rng(0)
        x, kernel, bias = rng.normal(size=(2, 5, 3)), rng.normal(size=(3, 2)), rng.normal(size=2)
        logits = np.exp(x @ kernel + bias)
        shares = logits / logits.sum(-1, keepdims=True)
        ours = dynamic_projection(*(a.astype("f") for a in (x, kernel, bias)))
        np.testing.assert_allclose(ours, np.swapaxes(shares, 1, 2) @ x, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(ours.sum(1), x.sum(1), rtol=1e-4)

    @pytest.mark.parametrize("merge_size", [1, 2, 4])
    def test_blend_moves_entries_and_merges_heads_as_usual_for_1(self, merge_size):
        x = np.arange(2 * 3 * 4 * 2).reshape(2, 3, 4, 2)
        blended = token_blend(x, merge_size=merge_size)
        flat = np.swapaxes(x, 1, 2).reshape(2, 12, 2)  # one head after the other
        for t in range(3):
            entries = [
                flat[:, g * 3 * merge_size + t * merge_size + i]
                for i in range(merge_size)
                for g in range(4 // merge_size)
            ]
            np.testing.assert_array_equal(blended[:, t], np.concatenate(entries, axis=-1))
        assert sorted(np.ravel(blended)) == sorted(x.ravel())
        if merge_size == 1:
            np.testing.assert_array_equal(blended, x.reshape(2, 3, 8))

    def test_bad_input_is_named(self):
        x = jnp.ones((5, 4, 2))
        for message, call in (
            ("merge_size must divide the 4 heads", lambda: token_blend(x, merge_size=3)),
            (r"x must have shape \[\.\.\., length, heads", lambda: token_blend(x[0])),
            ("alpha must be in", lambda: exponential_moving_average(x, alpha=0.0, axis=0)),
            ("axis must name axes", lambda: exponential_moving_average(x, axis=3)),
            (r"kernel must have shape \(2, 3\)", lambda: dynamic_projection(x, jnp.ones((4, 3)))),
            ("x must have shape", lambda: dynamic_projection(x[0, 0], jnp.ones((2, 3)))),
            ("bias must have", lambda: dynamic_projection(x, jnp.ones((2, 3)), jnp.ones(2))),
        ):
            with pytest.raises(ValueError, match=message):
                call()
        with pytest.raises(TypeError, match="x must have a floating-point type"):
            exponential_moving_average(jnp.arange(3), axis=0)


class TestModel:
    @pytest.mark.claim("card")
    def test_forecasts_follow_units_and_the_loss_weighs_the_steps_of_drifting_errors_alike(
        self, evaluated
    ):
        forecast, changed = evaluated
        assert np.std(forecast) > 0.1
        np.testing.assert_allclose(changed, SCALE * forecast + SHIFT, rtol=1e-3, atol=2e-2)
        walks = np.random.default_rng(1).normal(size=(20_000, 24, 1)).cumsum(axis=1).astype("f")
        weighed = signal_decay_loss(walks, 0.0).mean(axis=(0, 2))
        np.testing.assert_allclose(weighed, np.sqrt(2 / np.pi), rtol=2e-2)

    def test_dropout_half_precision_and_one_channel(self, make_model, quick_apply):
        config = CARDConfig(**TINY | {"channels": 1, "use_statistics": True, "dtype": jnp.bfloat16})
        model = make_model(config)
        model.eval()
        x = np.random.default_rng(0).normal(size=(3, 10, 1)).astype("f")
        x[1], x[2] = x[0], 3.0  # the same twice, and a constant
        key = jax.random.key(0)
        forecast = quick_apply(lambda model, x: model(x, key=key), model, x)
        assert forecast.dtype == jnp.float32
        assert np.abs(forecast[0] - forecast[1]).max() > 1e-3
        np.testing.assert_allclose(forecast[2], 3, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 4}, "stride must divide context_length - patch_size = 6"),
        ({"patch_size": 11}, "patch_size must be in"),
        ({"num_heads": 3}, "num_heads must divide features = 8"),
        ({"merge_size": 3}, "merge_size must divide the 4 heads"),
        ({"alpha": 0.0}, "alpha must be in"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"projection_rank": 0}, "projection_rank must be in"),
        ({"channels": 0}, "channels must be in"),
    ],
)
def test_bad_configuration_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        CARDConfig(**TINY | change)
