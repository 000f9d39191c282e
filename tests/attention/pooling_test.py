import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref.attention import sequence_pooling


def random_tokens(shape=(3, 5, 4), seed=0):
    """Tokens, kernel and a mask that leaves a few in each sequence."""
    rng = np.random.default_rng(seed)
    x, kernel = rng.normal(size=shape).astype("f"), rng.normal(size=shape[-1]).astype("f")
    where = rng.random(shape[:-1]) < 0.6
    where[..., 1] = True
    return x, kernel, where


def pooled64(x, kernel, where):
    """Sequence by sequence, in float64."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    rows = []
    for tokens, exists in zip(x, where):
        weights = np.exp(tokens[exists] @ kernel)
        rows.append(weights / weights.sum() @ tokens[exists])
    return np.stack(rows)


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_values_match_the_formula(self):
        x, kernel, where = random_tokens()
        pool = self.variant(lambda x, kernel, where: sequence_pooling(x, kernel, 0.7, where=where))
        np.testing.assert_allclose(pool(x, kernel, where), pooled64(x, kernel, where), rtol=1e-5)
        all_of_them = np.ones_like(where)
        plain = sequence_pooling(x, kernel)
        np.testing.assert_allclose(plain, pooled64(x, kernel, all_of_them), rtol=1e-5)

    def test_gradients_match_attention_of_one_query(self):
        """The weights are those of a query g over the tokens as keys and values."""
        x, kernel, where = random_tokens()
        cotangent = np.random.default_rng(1).normal(size=(3, 4)).astype("f")

        def peer(x, kernel):
            query = jnp.broadcast_to(kernel, (3, 1, 1, 4))
            key = x[:, :, None]
            mask = where[:, None, None]
            return jax.nn.dot_product_attention(query, key, key, mask=mask, scale=1.0)[:, 0, 0]

        ours = jax.vjp(lambda x, kernel: sequence_pooling(x, kernel, where=where), x, kernel)[1]
        theirs = jax.vjp(peer, x, kernel)[1]
        chex.assert_trees_all_close(ours(cotangent), theirs(cotangent), rtol=1e-4, atol=1e-5)


class TestClaims:
    @pytest.mark.claim("compact-convolutional-transformer")
    def test_weighs_tokens_by_what_they_hold_and_not_by_where_they_are(self):
        x, kernel, _ = random_tokens()
        np.testing.assert_allclose(
            sequence_pooling(x, np.zeros_like(kernel)), x.mean(axis=1), rtol=1e-5, atol=1e-6
        )
        order = np.array([3, 0, 4, 1, 2])
        np.testing.assert_allclose(
            sequence_pooling(x[:, order], kernel), sequence_pooling(x, kernel), rtol=1e-5, atol=1e-6
        )
        farthest = np.take_along_axis(x, np.argmax(x @ kernel, axis=1)[:, None, None], axis=1)
        np.testing.assert_allclose(
            sequence_pooling(x, 1e3 * kernel), farthest[:, 0], rtol=1e-5, atol=1e-6
        )


class TestTransformations:
    def test_vmap_and_sharded_batch(self):
        x, kernel, where = random_tokens((8, 5, 4))
        pool = jax.jit(lambda x, where: sequence_pooling(x, kernel, where=where))
        expected = pool(x, where)
        np.testing.assert_allclose(jax.vmap(pool)(x, where), expected, rtol=1e-6)
        sharding = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
        ours = pool(*(jax.device_put(array, sharding) for array in (x, where)))
        assert ours.sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


class TestEdges:
    def test_no_token_gives_zeros_and_hidden_ones_count_for_nothing(self):
        x, kernel, where = random_tokens()
        where[0] = False
        x[~where] = np.nan
        pool = lambda x, kernel: sequence_pooling(x, kernel, where=where)
        assert np.all(pool(x, kernel)[0] == 0)
        gradients = jax.grad(lambda *a: jnp.sum(pool(*a) ** 2), argnums=(0, 1))(x, kernel)
        chex.assert_tree_all_finite(gradients)
        assert np.all(gradients[0][~where] == 0)

    def test_huge_scores_and_one_token(self):
        x, kernel, _ = random_tokens()
        gradients = jax.grad(lambda *a: jnp.sum(sequence_pooling(*a)), argnums=(0, 1))(
            1e4 * x, 1e2 * kernel
        )
        chex.assert_tree_all_finite(gradients)
        np.testing.assert_allclose(sequence_pooling(x[:, :1], kernel), x[:, 0], rtol=1e-6)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision(self, dtype):
        x, kernel = (jnp.asarray(array, dtype) for array in random_tokens()[:2])
        ours = sequence_pooling(x, kernel)
        assert ours.dtype == dtype
        exact = sequence_pooling(x.astype(jnp.float32), kernel.astype(jnp.float32))
        tolerance = 2 * jnp.finfo(dtype).eps
        np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.ones(4, "f")}, ValueError, r"x must have shape \[\.\.\., tokens, features\]"),
        ({"kernel": np.ones(3, "f")}, ValueError, r"kernel must have shape \(4,\), got \(3,\)"),
        ({"kernel": np.ones((4, 1), "f")}, ValueError, "kernel must have shape"),
        ({"bias": np.ones(1, "f")}, ValueError, r"bias must have shape \(\)"),
        ({"where": np.ones((3, 4), bool)}, ValueError, "where must broadcast to"),
        ({"x": np.ones((3, 5, 4), int)}, TypeError, "x must have a floating-point type"),
    ],
)
def test_bad_input_is_named(change, error, message):
    x, kernel, where = random_tokens()
    with pytest.raises(error, match=message):
        sequence_pooling(**({"x": x, "kernel": kernel, "where": where} | change))
