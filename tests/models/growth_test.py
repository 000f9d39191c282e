from functools import partial

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from jaxref import norms
from jaxref.models import (
    TransformerConfig,
    grow_transformer,
    pad_kernel,
    rescale_norm_for_padding,
)

TOKENS = np.random.default_rng(0).integers(11, size=(4, 8))
LARGER = {"num_layers": 3, "features": 12, "num_heads": 3, "mlp_features": 20}


def build(**kwargs):
    sizes = {
        "vocab_size": 11,
        "max_length": 8,
        "num_layers": 2,
        "features": 8,
        "num_heads": 2,
        "mlp_features": 12,
    }
    model = TransformerConfig(**sizes | kwargs).build(rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for _, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        parameter[...] += 0.3 * rng.normal(size=parameter.shape)
    return model


def loss(model):
    logits = model(TOKENS[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()


grow = partial(grow_transformer, key=jax.random.key(3))


class TestClaims:
    @pytest.mark.claim("small-to-large-initialisation")
    @pytest.mark.parametrize(
        "options",
        [
            {"norm": norms.rms_norm},
            {"norm": norms.layer_norm, "use_bias": True, "positions": "learned"},
            {"norm": norms.rms_norm, "tie_embeddings": True, "gated": True, "scan_layers": True},
            {"norm": norms.layer_norm, "num_kv_heads": 1, "query_key_norm": norms.rms_norm},
        ],
        ids=lambda options: "-".join(options),
    )
    def test_growing_everything_changes_no_logit(self, options):
        model = build(**options)
        larger = LARGER | ({"num_heads": 4} if "num_kv_heads" in options else {})
        grown = grow(model, **larger)
        np.testing.assert_allclose(grown(TOKENS), model(TOKENS), rtol=1e-4, atol=2e-5)
        for name, size in larger.items():
            assert getattr(grown.config, name) == size
        assert grown.output_kernel().shape == (12, 11)


class TestExactness:
    def test_copied_norms_are_close_where_exact_ones_are_equal(self):
        """The paper's approximation: not the same logits, but far from starting anew."""
        model = build(norm=norms.layer_norm)
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        step = nnx.jit(lambda model, optimizer: optimizer.update(model, nnx.grad(loss)(model)))
        for _ in range(100):
            step(model, optimizer)
        trained, approximate = loss(model), loss(grow(model, features=9, exact_norm=False))
        assert abs(approximate - trained) > 1e-4
        assert approximate - trained < 0.2 * (np.log(11) - trained)
        np.testing.assert_allclose(loss(grow(model, features=9)), trained, rtol=1e-4)

    def test_hidden_units_heads_and_depth_need_no_correction(self):
        model = build(norm=norms.layer_norm)
        grown = grow(model, num_layers=3, num_heads=3, mlp_features=20, exact_norm=False)
        np.testing.assert_allclose(grown(TOKENS), model(TOKENS), rtol=1e-4, atol=2e-5)

    def test_new_parts_learn(self):
        model = grow(build(), **LARGER)
        before = nnx.to_pure_dict(nnx.state(model))
        optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
        step = nnx.jit(lambda model, optimizer: optimizer.update(model, nnx.grad(loss)(model)))
        start = loss(model)
        for _ in range(10):
            step(model, optimizer)
        assert loss(model) < start
        after = nnx.to_pure_dict(nnx.state(model))
        moved = jax.tree.map(lambda a, b: np.asarray(a != b), after, before)
        assert moved["blocks"][2]["mlp"]["function"]["up"]["kernel"].all()
        assert moved["blocks"][0]["mlp"]["function"]["down"]["kernel"][12:].all()
        assert moved["blocks"][0]["attention"]["function"]["output"]["kernel"][2].all()
        assert moved["blocks"][0]["mlp"]["function"]["up"]["kernel"][8:, 12:].all()

    def test_new_scale_lets_new_parts_write(self):
        model = build()
        small, large = (
            np.abs(grow(model, **LARGER, new_scale=s)(TOKENS) - model(TOKENS)).mean()
            for s in (0.01, 1.0)
        )
        assert 0 < small < 0.1 * large


class TestParts:
    def test_pad_kernel(self):
        rng = np.random.default_rng(0)
        kernel, x, new = rng.normal(size=(3, 2)), rng.normal(size=3), rng.normal(size=4)
        padded = pad_kernel(kernel, 7, 5, key=jax.random.key(0), new_scale=2.0)
        y = np.concatenate([x, new]) @ padded
        np.testing.assert_allclose(y[:2], x @ kernel, rtol=1e-5)
        wide = pad_kernel(np.zeros((1, 1)), 400, 401, key=jax.random.key(0), new_scale=2.0)
        assert np.std(wide[:, 1:]) == pytest.approx(2 / 20, rel=0.02)
        np.testing.assert_array_equal(pad_kernel(kernel, 7, 5)[:3, :2], kernel.astype("f"))
        np.testing.assert_array_equal(pad_kernel(kernel, 7, 5)[:, 2:], 0)

    def test_rescaled_norm(self):
        x = np.random.default_rng(0).normal(size=5).astype("f")
        x -= x.mean()
        scale = np.arange(1.0, 6, dtype="f")
        grown, epsilon = rescale_norm_for_padding(scale, 0.3, 5, 8)
        padded = np.concatenate([x, np.zeros(3, "f")])
        for norm in (norms.rms_norm, norms.layer_norm):
            np.testing.assert_allclose(
                norm(padded, grown, epsilon=epsilon)[:5],
                norm(x, scale, epsilon=0.3),
                rtol=1e-5,
            )

    @pytest.mark.parametrize(
        ("options", "larger", "message"),
        [
            ({}, {"features": 7}, r"features must be in \[8"),
            ({}, {"num_layers": 1}, r"num_layers must be in"),
            ({}, {"new_scale": -1.0}, "new_scale must be in"),
            ({"norm_placement": "post"}, {}, "pre-norm model"),
            ({"norm": norms.power_norm}, {}, "layer_norm or rms_norm"),
            ({"norm": norms.layer_norm, "tie_embeddings": True}, {"features": 9}, "is re-centred"),
            ({"num_kv_heads": 1}, {"num_heads": 3}, "num_heads must be a multiple of 2, got 3"),
            ({"stable_embedding": True}, {}, "stable_embedding is True"),
        ],
    )
    def test_bad_input(self, options, larger, message):
        with pytest.raises(ValueError, match=message):
            grow(build(**options), **larger)

    def test_bad_kernels(self):
        with pytest.raises(ValueError, match="in_size must be in"):
            pad_kernel(np.ones((3, 2)), 2, 2)
        with pytest.raises(ValueError, match="key must be given"):
            pad_kernel(np.ones((3, 2)), 3, 3, new_scale=1.0)
        with pytest.raises(ValueError, match="old_width must be in"):
            rescale_norm_for_padding(np.ones(3), 0.0, 3, 2)
