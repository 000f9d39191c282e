import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref.losses import weighted_log_loss
from jaxref.models import TimeSeriesTransformerConfig, class_activation_map

TINY = {
    "num_classes": 3,
    "channels": 2,
    "features": 4,
    "num_heads": 2,
    "mlp_features": 6,
    "auxiliary_features": 2,
}


def float64(module):
    return jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(module, nnx.Param))
    )


def tokens64(params, x, heads):
    """The encoder in float64, head by head, as in the authors' code."""

    def dense(p, x):
        return x @ p["kernel"].reshape(x.shape[-1], -1) + p["bias"].ravel()

    def normed(p, x):
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        return p["scale"] * centred / np.sqrt(variance + 1e-6) + p["bias"]

    x = np.maximum(dense(params["embed"], x), 0)
    places, size = np.arange(x.shape[1])[:, None], x.shape[2]
    angles = places / 10000 ** (np.arange(0, size, 2) / size)
    x = x + np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(-1, size)
    for p in params["blocks"].values():
        query, key, value = (dense(p["attention"][n], x) for n in ("query", "key", "value"))
        attended = []
        for part in np.split(np.arange(size), heads):
            q, k, v = (y[..., part] for y in (query, key, value))
            weights = np.exp(q @ np.swapaxes(k, 1, 2) / np.sqrt(len(part)))
            attended.append(weights / weights.sum(-1, keepdims=True) @ v)
        output = p["attention"]["output"]
        y = np.concatenate(attended, -1) @ output["kernel"].reshape(size, size) + output["bias"]
        x = normed(p["attention_norm"], x + y)
        y = dense(p["mlp"]["down"], np.maximum(dense(p["mlp"]["up"], x), 0))
        x = normed(p["mlp_norm"], x + y)
    return x


def random_batch(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(3, 5, 2)).astype("f"), rng.normal(size=(3, 2)).astype("f")


class TestNumbers:
    @pytest.mark.parametrize("place", ["channels", "time"])
    def test_logits_match_float64(self, place, make_model, quick_apply):
        layers = 2 if place == "channels" else 1
        model = make_model(
            TimeSeriesTransformerConfig(**TINY, num_layers=layers, add_auxiliary_to=place)
        )
        inputs, auxiliary = random_batch()
        logits = quick_apply(lambda m, x, z: m(x, z), model, inputs, auxiliary)
        if place == "channels":
            repeated = np.repeat(auxiliary[:, None], 5, axis=1)
            x = np.concatenate([inputs, repeated], axis=2)
        else:
            x = np.concatenate([inputs, np.repeat(auxiliary[:, :, None], 2, axis=2)], axis=1)
        params = float64(model)
        expected = (
            tokens64(params, x, 2).mean(1) @ params["head"]["kernel"] + params["head"]["bias"]
        )
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.claim("time-series-transformer-photometric")
def test_activation_maps_add_up_to_logits_and_the_loss_counts_classes_alike(
    make_model, quick_apply
):
    model = make_model(TimeSeriesTransformerConfig(**TINY | {"auxiliary_features": 0}))
    inputs, _ = random_batch()

    def run(model, inputs):
        tokens, kernel = model.tokens(inputs), model.head.kernel[...]
        return model(inputs), [class_activation_map(tokens, kernel, c) for c in range(3)]

    logits, maps = quick_apply(run, model, np.concatenate([inputs, inputs[:, ::-1]]))
    np.testing.assert_allclose(
        np.stack(maps, -1).mean(1) + model.head.bias[...], logits, rtol=1e-4, atol=1e-5
    )
    logits, turned = np.split(logits, 2)
    assert np.abs(turned - logits).max() > 1e-3  # the order of the steps is seen
    p, labels = np.asarray(jax.nn.softmax(logits)), np.array([0, 1, 2])
    balanced = weighted_log_loss(p, labels)
    nll = -np.log(p[np.arange(3), labels])
    np.testing.assert_allclose(balanced, nll.mean(), rtol=1e-5)
    often = np.array([0, 1, 2, 2, 2, 2])
    np.testing.assert_allclose(weighted_log_loss(p[often], often), balanced, rtol=1e-5)
    np.testing.assert_allclose(weighted_log_loss(np.full((3, 3), 1 / 3, "f"), labels), np.log(3))


class TestActivationMap:
    def test_class_of_each_example_and_normalization(self):
        rng = np.random.default_rng(0)
        tokens, kernel = rng.normal(size=(3, 5, 4)), rng.normal(size=(4, 6))
        index = np.array([2, 0, 6])
        expected = np.stack([t @ kernel[:, min(c, 5)] for t, c in zip(tokens, index)])
        tokens, kernel = tokens.astype("f"), kernel.astype("f")
        ours = class_activation_map(tokens, kernel, index)
        np.testing.assert_allclose(ours[:2], expected[:2], rtol=1e-4, atol=1e-6)
        assert np.all(np.isnan(ours[2]))
        scaled = class_activation_map(tokens, kernel, 1, normalize=True)
        np.testing.assert_allclose(scaled.min(1), 0, atol=1e-6)
        np.testing.assert_allclose(scaled.max(1), 1, rtol=1e-6)
        assert np.all(class_activation_map(0 * tokens, kernel, 1, normalize=True) == 0)

    def test_bad_input_is_named(self):
        tokens, kernel = jnp.ones((3, 5, 4)), jnp.ones((4, 6))
        for message, arguments in (
            (r"classifier_kernel must have shape \(4, 3\)", (tokens, jnp.ones((2, 3)), 0)),
            (r"class_index must have shape \(3,\)", (tokens, kernel, jnp.zeros(5, int))),
            ("tokens must have shape", (tokens[0, 0], kernel, 0)),
        ):
            with pytest.raises(ValueError, match=message):
                class_activation_map(*arguments)
        with pytest.raises(TypeError, match="class_index must be integers"):
            class_activation_map(tokens, kernel, 0.0)


def test_dropout_and_half_precision(make_model, quick_apply):
    inputs, auxiliary = random_batch()
    inputs[1], auxiliary[1] = inputs[0], auxiliary[0]
    model = make_model(TimeSeriesTransformerConfig(**TINY, dropout=0.3, dtype=jnp.bfloat16))
    key = jax.random.key(0)
    logits = quick_apply(lambda m, x, z: m(x, z, key=key), model, inputs, auxiliary)
    assert logits.dtype == jnp.float32
    assert np.all(np.isfinite(logits))
    assert np.abs(logits[0] - logits[1]).max() > 0.1  # the same, with other entries dropped


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide features = 4"),
        ({"add_auxiliary_to": "M"}, "add_auxiliary_to must be 'channels' or 'time'"),
        ({"auxiliary_features": -1}, "auxiliary_features must be in"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"channels": 0}, "channels must be in"),
    ],
)
def test_bad_configuration_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        TimeSeriesTransformerConfig(**TINY | change)


def test_bad_input_is_named(make_model):
    model = make_model(TimeSeriesTransformerConfig(**TINY))
    inputs, auxiliary = random_batch()
    for message, arguments in (
        (r"inputs must have shape \[batch, length, 2\]", (inputs[..., :1], auxiliary)),
        (r"inputs must have shape \[batch, length, 2\]", (inputs[:, :0], auxiliary)),
        ("auxiliary must hold 2 numbers per series, got none", (inputs,)),
        (r"auxiliary must have shape \(3, 2\)", (inputs, auxiliary[:2])),
    ):
        with pytest.raises(ValueError, match=message):
            model(*arguments)
    with pytest.raises(TypeError, match="inputs must have a floating-point type"):
        model(np.ones((3, 5, 2), int), auxiliary)
