from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxref.attention import attention_entropy_regularizer, dot_product_attention
from jaxref.nn import CausalGenerationMixer, EntropyGuidedAttention, ThirdOrderAttention
from jaxref.norms import rms_norm

X = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
MIXERS = {
    "entropy": partial(EntropyGuidedAttention, max_length=6),
    "third order": ThirdOrderAttention,
    "static": CausalGenerationMixer,
}


def build(mixer, **kwargs):
    module = mixer(8, 2, rngs=nnx.Rngs(0), **kwargs)
    rng = np.random.default_rng(1)
    for _, parameter in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        parameter[...] += 0.3 * rng.normal(size=parameter.shape)
    return module


def kernel(linear):
    return np.asarray(linear.kernel[...], np.float64)


class TestEntropyGuided:
    def literal(self, module, x):
        y = 0
        for head in range(2):
            q, k, v = (x @ kernel(p)[:, head] for p in (module.query, module.key, module.value))
            tau = np.exp(np.asarray(module.log_temperature[...], np.float64)[head, : len(x)])
            scores = np.tril(np.exp(q @ k.T / (tau[:, None] * np.sqrt(4))))
            weights = scores / scores.sum(-1, keepdims=True)
            y = y + weights @ v @ kernel(module.output)[head]
        return y

    def test_numbers(self):
        module = build(MIXERS["entropy"])
        expected = np.stack([self.literal(module, x.astype(np.float64)) for x in X])
        np.testing.assert_allclose(module(X, is_causal=True), expected, rtol=1e-4, atol=1e-5)

    def test_regularizer_in_training_only(self):
        module = build(MIXERS["entropy"], coefficient=0.5, tolerance=0.1)
        module(X, is_causal=True)
        owed = float(module.regularizer[...])
        query, key = module.query(X), module.key(X)
        query = query * np.exp(-module.log_temperature[...].T[:5])[..., None]
        weights = jax.nn.softmax(
            jnp.where(np.tri(5, dtype=bool), jnp.einsum("bqhd,bkhd->bhqk", query, key) / 2, -1e9)
        )
        expected = attention_entropy_regularizer(
            weights[None], module.threshold_weights[...], tolerance=0.1, coefficient=0.5
        )
        assert owed == pytest.approx(float(expected), rel=1e-5)
        module.eval()
        module.regularizer[...] = jnp.zeros(())
        module(X, is_causal=True)
        assert module.regularizer[...] == 0

    def test_at_the_start_it_is_plain_attention(self):
        module = MIXERS["entropy"](8, 2, rngs=nnx.Rngs(0))
        plain = module.attend(module.query(X), module.key(X), module.value(X), is_causal=True)
        expected = dot_product_attention(
            module.query(X), module.key(X), module.value(X), is_causal=True
        )
        np.testing.assert_allclose(plain, expected, rtol=1e-6)

    def test_more_positions_than_temperatures(self):
        with pytest.raises(ValueError, match="at most max_length = 3 tokens"):
            build(partial(EntropyGuidedAttention, max_length=3))(X)


class TestThirdOrder:
    def test_numbers(self):
        """Pair by pair, in float64."""
        module = build(ThirdOrderAttention)
        ours = module(X, is_causal=True)
        for x, y in zip(X.astype(np.float64), ours):
            q = np.einsum("td,dhe->the", x, kernel(module.query))
            (a, b), (v, w) = (
                [np.einsum("td,dhe->the", x, kernel(p)) for p in pair]
                for pair in (module.keys, module.values)
            )
            for t in range(5):
                out = 0
                for h in range(2):
                    scores = np.exp(
                        np.einsum("e,je,ke->jk", q[t, h], a[: t + 1, h], b[: t + 1, h]) / 4
                    )
                    mean = np.einsum(
                        "jk,je,ke->e", scores / scores.sum(), v[: t + 1, h], w[: t + 1, h]
                    )
                    out = out + mean @ kernel(module.output)[h]
                np.testing.assert_allclose(y[t], out, rtol=1e-3, atol=1e-4)

    def test_mask_hides_from_both_sets(self):
        module = build(ThirdOrderAttention)
        mask = (np.arange(5) != 2)[None, None, None]
        changed = X.copy()
        changed[:, 2] += 1
        kept = [0, 1, 3, 4]
        np.testing.assert_allclose(
            module(X, mask=mask)[:, kept], module(changed, mask=mask)[:, kept], rtol=1e-6
        )


class TestStatic:
    def test_numbers(self):
        module = build(CausalGenerationMixer, reduction="max")
        for x, y in zip(X.astype(np.float64), module(X, is_causal=True)):
            v = x @ kernel(module.input)
            mean = np.cumsum(v, axis=0) / np.arange(1, 6)[:, None]
            before = np.concatenate([v[:1], v[:-1]])
            expected = np.maximum(np.maximum(v, before), mean) @ kernel(module.output)
            np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)

    def test_half_the_parameters_of_attention(self):
        module = build(CausalGenerationMixer)
        assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module))) == 2 * 8 * 8

    def test_bad_input(self):
        module = build(CausalGenerationMixer)
        with pytest.raises(ValueError, match="is_causal must be True"):
            module(X)
        with pytest.raises(ValueError, match="mask must say which tokens exist"):
            module(X, mask=np.ones((5, 5), bool), is_causal=True)
        with pytest.raises(ValueError, match="context must be None or 'causal'"):
            build(CausalGenerationMixer, context="global")


@pytest.mark.parametrize("name", MIXERS)
class TestContract:
    def test_causal(self, name):
        module = build(MIXERS[name])
        changed = X.copy()
        changed[:, 3] += 1
        before, after = module(X, is_causal=True), module(changed, is_causal=True)
        np.testing.assert_allclose(before[:, :3], after[:, :3], rtol=1e-6, atol=1e-7)
        assert np.all(np.any(before[:, 3:] != after[:, 3:], axis=-1))

    def test_gradients_reach_every_parameter(self, name):
        module = build(MIXERS[name], **({"coefficient": 1.0} if name == "entropy" else {}))

        def loss(module):
            y = jnp.sum(jnp.sin(module(X, is_causal=True)))
            return y + module.regularizer[...] if name == "entropy" else y

        for path, leaf in nnx.to_flat_state(nnx.grad(loss)(module)):
            assert np.isfinite(leaf[...]).all(), path
            assert np.any(leaf[...]), path

    def test_half_precision_and_axes(self, name):
        module = build(MIXERS[name], dtype=jnp.bfloat16)
        assert module(X, is_causal=True).dtype == jnp.bfloat16
        for path, parameter in nnx.to_flat_state(nnx.state(module, nnx.Param)):
            assert len(parameter.get_metadata()["axes"]) == len(parameter.shape), path


@pytest.mark.parametrize("mixer", [ThirdOrderAttention, CausalGenerationMixer])
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"rotary_base": 1e4}, ValueError, "rotary_base has no meaning .*choose positions"),
        ({"num_kv_heads": 1}, ValueError, "num_kv_heads has no meaning"),
        ({"query_key_norm": rms_norm}, ValueError, "query_key_norm has no meaning"),
        ({"heads": 3}, TypeError, "takes no argument 'heads'"),
    ],
)
def test_what_a_mixer_does_not_have_is_refused(mixer, kwargs, error, message):
    with pytest.raises(error, match=message):
        build(mixer, **kwargs)
    assert build(mixer, num_kv_heads=2)(X, is_causal=True).shape == X.shape
