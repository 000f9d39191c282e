import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from jaxref.attention import elu_plus_one, linear_attention
from jaxref.nn import MultiHeadAttention


def random_inputs(batch=2, q_len=5, k_len=7, heads=4, kv_heads=2, dim=3, value_dim=2, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (
        (batch, q_len, heads, dim),
        (batch, k_len, kv_heads, dim),
        (batch, k_len, kv_heads, value_dim),
    )
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def linear_attention64(query, key, value, *, mask=None, scale=1.0, is_causal=False, divide=True):
    """The square of weights in float64, with φ(x) = elu(x) + 1, from scratch in jax.numpy."""
    group = query.shape[2] // key.shape[2]
    phi = lambda x: jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))
    key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
    weights = jnp.einsum("bqhd,bkhd->bhqk", phi(scale * query), phi(key))
    if mask is not None:
        weights = weights * mask
    if is_causal:
        weights = weights * np.tri(*weights.shape[2:])
    if divide:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def value_and_pullback(function, arrays, cotangent):
    def both(arrays, cotangent):
        output, vjp = jax.vjp(function, *arrays)
        return output, vjp(cotangent)

    return jax.jit(both)(arrays, cotangent)


KEYS_THAT_EXIST = np.random.default_rng(1).random((2, 4, 1, 7)) < 0.7
KEYS_THAT_EXIST[..., 0] = True


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_values_match_the_square_of_weights(self):
        arrays = random_inputs()
        ours = self.variant(lambda *a: linear_attention(*a, is_causal=True))(*arrays)
        expected = linear_attention64(*arrays, is_causal=True)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)

    @parameterized.parameters(
        (5, {"mask": KEYS_THAT_EXIST, "scale": 0.5}),
        (5, {"mask": KEYS_THAT_EXIST[:, :1], "is_causal": True}),
        (9, {"is_causal": True}),
    )
    def test_values_and_gradients_match_the_square_of_weights(self, q_len, options):
        arrays = random_inputs(q_len=q_len)
        cotangent = np.random.default_rng(2).normal(size=(2, q_len, 4, 2)).astype("f")
        ours = value_and_pullback(lambda *a: linear_attention(*a, **options), arrays, cotangent)
        with jax.enable_x64(True):
            wide = [x.astype(np.float64) for x in arrays]
            theirs = value_and_pullback(
                lambda *a: linear_attention64(*a, **options), wide, cotangent.astype(np.float64)
            )
        for x, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
            np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5)

    def test_chunks_join(self):
        arrays = random_inputs(1, 150, 150, 2, 1)
        ours = jax.jit(lambda *a: linear_attention(*a, is_causal=True))(*arrays)
        expected = linear_attention64(*arrays, is_causal=True)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
        ours = linear_attention(*arrays, is_causal=True, normalise=False)
        expected = linear_attention64(*arrays, is_causal=True, divide=False)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)

    def test_second_derivatives_against_finite_differences(self):
        with jax.enable_x64(True):
            arrays = [x.astype(np.float64) for x in random_inputs(1, 3, 3, 1, 1, 2, 1)]
            attend = jax.jit(lambda *a: linear_attention(*a, is_causal=True))
            check_grads(attend, arrays, order=2, modes=["rev"])

    def test_feature_map_of_another_size(self):
        arrays = random_inputs()
        square = lambda x: jnp.einsum("...i,...j->...ij", x, x).reshape(*x.shape[:-1], -1)
        ours = linear_attention(*arrays, feature_map=square)
        query, key, value = arrays
        weights = np.einsum("bqhd,bkhd->bhqk", query, key.repeat(2, 2)) ** 2
        weights /= weights.sum(-1, keepdims=True)
        expected = np.einsum("bhqk,bkhd->bqhd", weights, value.repeat(2, 2))
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)

    def test_feature_map(self):
        x = np.array([-80, -20, -1, 0, 1e-3, 3, 1e4], "f")
        expected = np.where(x > 0, x.astype(np.float64) + 1, np.exp(np.minimum(x, 0.0)))
        np.testing.assert_allclose(elu_plus_one(x), expected, rtol=1e-6)
        np.testing.assert_allclose(
            jax.vmap(jax.grad(elu_plus_one))(x), np.minimum(expected, 1), rtol=1e-6
        )


class TestProperties:
    @pytest.mark.optimized
    def test_memory_and_work_are_linear_in_the_length(self):
        def cost(length):
            arrays = [jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)] * 3
            compiled = (
                jax.jit(lambda *a: linear_attention(*a, is_causal=True)).lower(*arrays).compile()
            )
            return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

        short, long = cost(512), cost(4096)
        assert long[0] < 10 * short[0]
        assert long[1] < 10 * short[1]

    def test_module_takes_it(self):
        module = MultiHeadAttention(8, 2, attention=linear_attention, rngs=nnx.Rngs(0))
        attend = nnx.jit(module, static_argnames="is_causal")
        x = random_inputs(q_len=6, dim=8, heads=1)[0][:, :, 0]
        y = attend(x, is_causal=True)
        changed = attend(x + (np.arange(6) == 4)[:, None], is_causal=True)
        np.testing.assert_allclose(y[:, :4], changed[:, :4], atol=1e-6)
        assert np.abs(y - changed)[:, 4:].min(axis=(0, 2)).max() > 0
        padded = attend(x, mask=(np.arange(6) < 4).reshape(1, 1, 1, 6))
        np.testing.assert_allclose(padded[:, :4], attend(x[:, :4]), atol=1e-5)

    def test_vmap_and_sharding_over_heads(self):
        arrays = random_inputs(heads=16, kv_heads=8)
        attend = jax.jit(lambda *a: linear_attention(*a, is_causal=True))
        expected = attend(*arrays)
        mapped = jax.vmap(lambda q, k, v: attend(q[None], k[None], v[None])[0])
        np.testing.assert_allclose(mapped(*arrays), expected, rtol=1e-5, atol=1e-6)
        sharding = NamedSharding(jax.make_mesh((8,), ("t",)), PartitionSpec(None, None, "t"))
        ours = attend(*(jax.device_put(x, sharding) for x in arrays))
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


class TestEdges:
    @pytest.mark.parametrize("is_causal", [True, False])
    def test_masked_huge_and_vanishing_inputs_stay_finite(self, is_causal):
        query, key, value = random_inputs(k_len=5)
        query[0, 1], query[0, 2], key[1] = -1e4, 1e4, 1e4 * key[1]
        query[0, 3], key[0] = -40, -40  # weights of 1e-35 average as any others
        mask = np.ones((2, 1, 1, 5), bool)
        mask[1, ..., 0] = False  # causal: the first query sees nothing
        attend = jax.jit(lambda *a: linear_attention(*a, mask=mask, is_causal=is_causal))
        output, vjp = jax.vjp(attend, query, key, value)
        chex.assert_tree_all_finite((output, vjp(jnp.ones_like(output))))
        assert np.all(output[0, 1] == 0)
        assert np.all(output[1, 0] == 0) == is_causal
        seen = slice(0, 4 if is_causal else 5)
        np.testing.assert_allclose(
            output[0, 3], value[0, seen].mean(0).repeat(2, axis=0), rtol=1e-4
        )
        masked = linear_attention(query, key, value, mask=np.zeros((1, 1, 1, 1), bool))
        assert np.all(masked == 0)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_computes_in_float32(self, dtype):
        arrays = [jnp.asarray(x, dtype) for x in random_inputs()]
        ours = linear_attention(*arrays)
        assert ours.dtype == dtype
        exact = linear_attention(*(x.astype(jnp.float32) for x in arrays))
        np.testing.assert_array_equal(ours, exact.astype(dtype))

    @pytest.mark.parametrize(
        ("kwargs", "error", "message"),
        [
            ({"bias": np.zeros((5, 7), "f")}, ValueError, "bias must be None"),
            ({"mask": np.ones((5, 7), bool)}, ValueError, "mask must have .*the same for every q"),
            ({"mask": np.ones((2, 1, 1, 7))}, TypeError, "mask must be boolean"),
            ({"mask": np.ones((3, 1, 1, 7), bool)}, ValueError, "mask must broadcast"),
            ({"scale": np.ones(4, "f")}, ValueError, r"scale must have shape \(\)"),
        ],
    )
    def test_bad_input_is_named(self, kwargs, error, message):
        with pytest.raises(error, match=message):
            linear_attention(*random_inputs(), **kwargs)
