import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from jaxref.attention import (
    dot_product_attention,
    query_key_reparameterization,
    query_key_reparameterized_attention,
)


def random_inputs(kv_heads=2, seed=0):
    """x, w_query, w_key and values."""
    rng = np.random.default_rng(seed)
    shapes = ((2, 5, 6), (6, 2, 3), (6, kv_heads, 3), (2, 5, 2, 4))
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def plain(x, w_query, w_key, value, **kwargs):
    heads = value.shape[2] // w_key.shape[1]
    query = jnp.einsum("btd,dhe->bthe", x, w_query)
    key = jnp.repeat(jnp.einsum("btd,dhe->bthe", x, w_key), heads, axis=2)
    return dot_product_attention(query, key, value, **kwargs)


def ours(x, w_query, w_key, value, **kwargs):
    w = query_key_reparameterization(w_query, w_key)
    return query_key_reparameterized_attention(x, w, value, head_dim=3, **kwargs)


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(1, 2)
    def test_values_and_gradients_are_those_of_plain_attention(self, kv_heads):
        inputs = random_inputs(kv_heads)
        mask = np.random.default_rng(1).random((2, 1, 5, 5)) < 0.7
        score = lambda f: lambda *a: jnp.sum(jnp.sin(f(*a, mask=mask, is_causal=True)))
        value, grads = self.variant(jax.value_and_grad(score(ours), argnums=(0, 1, 2, 3)))(*inputs)
        expected = jax.value_and_grad(score(plain), argnums=(0, 1, 2, 3))(*inputs)
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        for gradient, theirs in zip(grads, expected[1]):
            np.testing.assert_allclose(gradient, theirs, rtol=1e-3, atol=1e-4)


class TestClaims:
    @pytest.mark.claim("oscillation-free-quantization")
    def test_quantized_scores_depend_on_the_product_alone(self):
        """A rotation that both projections share changes no score, quantized or not, where the
        product is what is rounded; where both factors are, it makes them jump."""
        rng = np.random.default_rng(0)
        x = rng.normal(size=(16, 8))
        w_query, w_key = rng.normal(size=(2, 8, 1, 4))
        rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
        turned = w_query @ rotation, w_key @ rotation
        rounded = lambda w: np.floor(np.asarray(w) / 0.37) * 0.37 + 0.185  # has no zero level

        def scores(w_query, w_key, inner=np.asarray, outer=np.asarray):
            return x @ outer(query_key_reparameterization(inner(w_query), inner(w_key)))[0] @ x.T

        exact = (x @ w_query[:, 0]) @ (x @ w_key[:, 0]).T
        np.testing.assert_allclose(scores(w_query, w_key), exact, rtol=1e-4, atol=1e-4)
        once = [scores(*pair, outer=rounded) for pair in ((w_query, w_key), turned)]
        twice = [scores(*pair, inner=rounded) for pair in ((w_query, w_key), turned)]
        np.testing.assert_allclose(once[0], once[1], rtol=1e-4, atol=1e-4)
        assert np.abs(once[0] - exact).mean() > 0.05  # it is rounded
        assert np.abs(twice[0] - twice[1]).mean() > 0.05


class TestProperties:
    def test_quantize_sees_the_intermediate(self):
        x, w_query, w_key, value = random_inputs()
        seen = []
        y = ours(x, w_query, w_key, value, quantize=lambda a: seen.append(a.shape) or 0 * a)
        assert seen == [(2, 5, 2, 6)]
        expected = np.broadcast_to(value.mean(1, keepdims=True), value.shape)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)

    def test_context_and_masked_rows(self):
        x, w_query, w_key, value = random_inputs()
        w = query_key_reparameterization(w_query, w_key)
        run = lambda **kw: query_key_reparameterized_attention(x[:, :3], w, value, head_dim=3, **kw)
        key = jnp.einsum("btd,dhe->bthe", x, w_key)
        query = jnp.einsum("btd,dhe->bthe", x[:, :3], w_query)
        np.testing.assert_allclose(
            run(context=x), dot_product_attention(query, key, value), rtol=1e-4, atol=1e-5
        )
        np.testing.assert_array_equal(run(context=x, mask=np.zeros((1, 1, 1, 5), bool)), 0)

    def test_half_precision_and_extremes(self):
        inputs = [jnp.asarray(a, jnp.bfloat16) for a in random_inputs()]
        assert ours(*inputs).dtype == jnp.bfloat16
        x, *others = random_inputs()
        assert np.isfinite(ours(1e4 * x, *others)).all()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"w_key": np.ones((6, 3, 3), "f")}, "w_key must have heads that divide w_query's 2"),
            ({"w_key": np.ones((6, 2, 4), "f")}, r"w_key must have shape \(6, 2, 3\)"),
            ({"w_query": np.ones((6, 6), "f")}, r"w_query must have shape \[features"),
            ({"x": np.ones((2, 5, 7), "f")}, "w_query_key must have shape"),
            ({"value": np.ones((2, 4, 2, 4), "f")}, "value must have shape"),
        ],
    )
    def test_bad_input(self, change, message):
        given = dict(zip(("x", "w_query", "w_key", "value"), random_inputs())) | change
        with pytest.raises(ValueError, match=message):
            ours(**given)
