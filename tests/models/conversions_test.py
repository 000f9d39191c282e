from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxref import nn, norms
from jaxref.models import (
    TransformerConfig,
    fold_linears,
    fold_norm_affine,
    fold_statistics,
    pre_ln_to_pre_rms,
    pre_rms_to_pre_crms,
    with_scan_layers,
)

TOKENS = np.random.default_rng(0).integers(11, size=(2, 6))


def build(**kwargs):
    """A model whose parameters are all off their initial values."""
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


def parameters(model):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))


LAYER_NORMED = {
    "plain": {},
    "biases, learned positions, gated": {"use_bias": True, "positions": "learned", "gated": True},
    "scanned, grouped": {"scan_layers": True, "num_kv_heads": 1, "query_key_norm": norms.rms_norm},
    "epsilon, no bias": {"norm": partial(norms.layer_norm, bias=None, epsilon=0.1)},
}


class TestPreNorms:
    @pytest.mark.parametrize("name", LAYER_NORMED)
    def test_the_same_logits(self, name):
        model = build(**{"norm": norms.layer_norm} | LAYER_NORMED[name])
        before, expected = parameters(model), model(TOKENS)
        rms = pre_ln_to_pre_rms(model)
        crms = pre_rms_to_pre_crms(rms)
        np.testing.assert_allclose(rms(TOKENS), expected, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(crms(TOKENS), expected, rtol=2e-4, atol=2e-4)
        jax.tree.map(np.testing.assert_array_equal, parameters(model), before)
        assert crms.config.features == 7
        assert not [
            path
            for path in nnx.to_flat_state(nnx.state(rms)).paths
            if "norm" in path[-2] and "query" not in path[-2] and "key" not in path[-2]
        ]

    def test_in_float64_to_the_last_digits(self):
        with jax.enable_x64(True):
            model = build(norm=norms.layer_norm, use_bias=True, param_dtype=jnp.float64)
            expected = model(TOKENS)
            rms = pre_ln_to_pre_rms(model)
            np.testing.assert_allclose(rms(TOKENS), expected, rtol=1e-10, atol=1e-10)
            crms = pre_rms_to_pre_crms(rms)
            np.testing.assert_allclose(crms(TOKENS), expected, rtol=1e-10, atol=1e-10)

    def test_gradients_agree_with_recentring_in_the_graph(self):
        """Loss and gradients of shared parameters, as a function of the layer-normed model's."""
        model = build(norm=norms.layer_norm)
        graphdef, state = nnx.split(model)

        def loss(state, convert):
            logits = convert(nnx.merge(graphdef, state))(TOKENS[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()

        run = jax.jit(jax.grad(loss), static_argnums=1)
        ours, expected = run(state, pre_ln_to_pre_rms), run(state, lambda model: model)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), ours, expected)

    def test_without_recentring_they_differ(self):
        """Negative control: the norm alone is not what makes them equal."""
        model = build(norm=norms.layer_norm)
        wrong = TransformerConfig(**model.config.__dict__ | {"norm": norms.rms_norm}).build(
            rngs=nnx.Rngs(0)
        )
        nnx.update(wrong, nnx.state(model, lambda path, _: path[-1] != "bias"))
        assert np.abs(wrong(TOKENS) - model(TOKENS)).max() > 0.1

    def test_a_trained_model_generates_on(self):
        model = pre_ln_to_pre_rms(build(norm=norms.layer_norm))
        hidden, _ = model.extend(TOKENS, model.init_cache(2))
        np.testing.assert_allclose(model.logits(hidden), model(TOKENS), rtol=1e-4, atol=1e-4)

    def test_output_kernel_says_that_it_is_not_all(self):
        with pytest.raises(ValueError, match="logits have a bias"):
            pre_ln_to_pre_rms(build(norm=norms.layer_norm)).output_kernel()

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"norm_placement": "post"}, "pre-norm model without an encoder, got .*'post'"),
            ({"norm": norms.rms_norm}, "model must have layer_norm as every norm"),
            ({"tie_embeddings": True}, "an embedding of its own"),
            ({"layer_norm_scaling": True}, "layer_norm_scaling is True"),
            ({"linear": nn.WeightStandardizedLinear}, "plain linear maps"),
            ({"architecture": "encoder_decoder"}, "without an encoder"),
            ({"attention": nn.CausalGenerationMixer, "positions": None}, "MultiHeadAttention"),
        ],
    )
    def test_other_models_are_refused(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            pre_ln_to_pre_rms(build(**{"norm": norms.layer_norm} | kwargs))

    def test_compression_needs_a_converted_model(self):
        with pytest.raises(ValueError, match="norms without a gain"):
            pre_rms_to_pre_crms(build(norm=norms.rms_norm))
        with pytest.raises(ValueError, match="write with zero mean"):
            pre_rms_to_pre_crms(build(norm=partial(norms.rms_norm, scale=None)))

    def test_fold_norm_affine(self):
        rng = np.random.default_rng(0)
        x, scale, bias = rng.normal(size=(3, 4))
        kernel, kernel_bias = rng.normal(size=(4, 2, 3)), rng.normal(size=(2, 3))
        expected = np.tensordot(scale * x + bias, kernel, 1) + kernel_bias
        folded, shift = fold_norm_affine(scale, bias, kernel, kernel_bias)
        np.testing.assert_allclose(np.tensordot(x, folded, 1) + shift, expected, rtol=1e-5)
        assert fold_norm_affine(scale, None, kernel)[1] is None
        assert fold_norm_affine(None, None, kernel)[0] is kernel


class TestFoldStatistics:
    @pytest.mark.parametrize("scan_layers", [False, True])
    def test_unified_norm_disappears(self, scan_layers):
        model = build(norm=norms.unified_norm, scan_layers=scan_layers, use_bias=True)
        for _ in range(2):
            model(TOKENS)  # statistics of their own in every norm
        model.eval()
        folded = fold_statistics(model)
        np.testing.assert_allclose(folded(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)
        assert {type(leaf) for _, leaf in nnx.to_flat_state(nnx.state(folded))} == {nnx.Param}
        model.train()
        assert np.abs(folded(TOKENS) - model(TOKENS)).max() > 1e-3  # with its own statistics

    def test_other_norms_are_refused(self):
        with pytest.raises(ValueError, match="model must have unified_norm"):
            fold_statistics(build())


class TestFoldLinears:
    @pytest.mark.parametrize(
        ("linear", "scan_layers"),
        [
            (nn.SigmaReparamLinear, False),
            (nn.SigmaReparamLinear, True),
            (nn.WeightStandardizedLinear, False),
            (partial(nn.WeightNormalizedLinear), True),
        ],
    )
    def test_the_same_logits_with_plain_maps(self, linear, scan_layers):
        model = build(linear=linear, scan_layers=scan_layers, use_bias=True)
        model.eval()
        folded = fold_linears(model)
        np.testing.assert_allclose(folded(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)
        linears = [node for _, node in nnx.iter_graph(folded) if isinstance(node, nn.Linear)]
        assert {type(linear) for linear in linears} == {nn.Linear}
        assert len(linears) == (1 if scan_layers else 2) * 6 + 1
        assert folded.config.linear is nn.Linear

    def test_a_convolutional_network(self):
        conv = nn.WeightStandardizedConv(3, 4, (3, 3), rngs=nnx.Rngs(0))
        model = nnx.Dict(first=conv)
        x = np.random.default_rng(0).normal(size=(1, 5, 5, 3)).astype("f")
        folded = fold_linears(model)
        assert type(folded.first) is nn.Conv
        np.testing.assert_allclose(folded.first(x), conv(x), rtol=1e-5, atol=1e-6)


class TestWithScanLayers:
    @pytest.mark.parametrize(
        "kwargs",
        [
            {"num_layers": 3, "norm_placement": "mix", "post_fraction": 0.34},
            {"norm": norms.power_norm, "architecture": "encoder_decoder"},
        ],
    )
    def test_there_and_back(self, kwargs):
        model = build(**kwargs)
        given = {"source": TOKENS} if "architecture" in kwargs else {}
        model.eval()
        expected = model(TOKENS, **given)
        scanned = with_scan_layers(model)
        np.testing.assert_allclose(scanned(TOKENS, **given), expected, rtol=1e-4, atol=1e-4)
        back = with_scan_layers(scanned, False)
        jax.tree.map(np.testing.assert_array_equal, parameters(back), parameters(model))
        built = TransformerConfig(**model.config.__dict__ | {"scan_layers": True}).build(
            rngs=nnx.Rngs(0)
        )
        for (path, ours), (_, theirs) in zip(
            nnx.to_flat_state(nnx.state(scanned)), nnx.to_flat_state(nnx.state(built))
        ):
            assert ours.shape == theirs.shape, path
            assert ours.get_metadata()["axes"] == theirs.get_metadata()["axes"], path
