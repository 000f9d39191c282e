import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding, PartitionSpec

from jaxref.attention import (
    dot_product_attention,
    harmonic_block_probability,
    probabilistic_block_attention,
)
from jaxref.attention.block import draw_blocks

KEY = jax.random.key(3)
certain = lambda distance: 1.0
near = lambda distance: distance == 0


def random_inputs(batch=2, q_len=7, k_len=7, heads=4, kv_heads=2, dim=3, value_dim=2, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (
        (batch, q_len, heads, dim),
        (batch, k_len, kv_heads, dim),
        (batch, k_len, kv_heads, value_dim),
    )
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def participation(q_len, k_len, block_size, is_causal, heads=4):
    """The draw as a mask over positions `[heads, q_len, k_len]`."""
    seen = min(q_len, k_len) if is_causal else k_len
    keep = draw_blocks(KEY, heads, -(-q_len // block_size), -(-seen // block_size))
    keep = np.repeat(np.repeat(keep, block_size, axis=1), block_size, axis=2)[:, :q_len, :k_len]
    return np.pad(keep, [(0, 0), (0, 0), (0, k_len - keep.shape[2])])


def value_and_pullback(function, arrays):
    def both(arrays):
        output, vjp = jax.vjp(function, *arrays)
        return output, vjp(jnp.cos(jnp.arange(output.size)).reshape(output.shape))

    return jax.jit(both)(arrays)


class NumbersTest(chex.TestCase):
    @parameterized.parameters(
        (7, 7, 2, True, "both"),  # an even number of blocks, the last one short
        (5, 9, 2, True, "mask"),  # an odd number, and keys that nobody sees
        (9, 4, 2, True, "bias"),  # more queries than keys
        (5, 9, 4, False, "both"),
        (3, 3, 64, True, None),
    )
    def test_values_and_gradients_match_dense_attention_under_the_mask_of_the_draw(
        self, q_len, k_len, block_size, is_causal, given
    ):
        arrays = random_inputs(q_len=q_len, k_len=k_len)
        rng = np.random.default_rng(1)
        options, mask = {"scale": 0.7}, True
        if given in ("bias", "both"):
            options["bias"] = rng.normal(size=(4, q_len, k_len)).astype("f")
        if given in ("mask", "both"):
            mask = rng.random((2, 1, 1, k_len)) < 0.7
        dense_mask = participation(q_len, k_len, block_size, is_causal) & mask
        assert block_size == 64 or not participation(q_len, k_len, block_size, False).all()
        ours = value_and_pullback(
            lambda *a: probabilistic_block_attention(
                *a,
                key_rng=KEY,
                block_size=block_size,
                is_causal=is_causal,
                mask=None if mask is True else mask,
                **options,
            ),
            arrays,
        )
        expected = value_and_pullback(
            lambda *a: dot_product_attention(*a, mask=dense_mask, is_causal=is_causal, **options),
            arrays,
        )
        chex.assert_trees_all_close(ours, expected, rtol=1e-4, atol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_with_every_block_it_is_dense_causal_attention(self):
        arrays = random_inputs()
        attend = self.variant(
            lambda key, *a: probabilistic_block_attention(
                *a, key_rng=key, block_size=2, keep_probability=certain
            )
        )
        expected = dot_product_attention(*arrays, is_causal=True)
        np.testing.assert_allclose(attend(KEY, *arrays), expected, rtol=1e-5, atol=1e-6)

    def test_a_bias_alike_for_all_heads_and_its_gradient(self):
        arrays, bias = random_inputs(), np.random.default_rng(1).normal(size=(7, 1)).astype("f")
        bias = bias * bias.T
        ours = lambda bias, *a: probabilistic_block_attention(
            *a, key_rng=KEY, block_size=3, bias=bias, keep_probability=certain
        )
        dense = lambda bias, *a: dot_product_attention(*a, bias=bias, is_causal=True)
        pulled = [value_and_pullback(f, [bias, *arrays]) for f in (ours, dense)]
        chex.assert_trees_all_close(*pulled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["pallas_tpu_interpret", "pallas_gpu_interpret"])
class TestKernels:
    def test_they_take_the_same_draw(self, implementation):
        arrays, rng = random_inputs(q_len=20, k_len=30), np.random.default_rng(1)
        options = {
            "bias": rng.normal(size=(4, 20, 30)).astype("f"),
            "mask": rng.random((2, 1, 1, 30)) < 0.7,
            "block_size": 8,
        }
        ours, theirs = (
            value_and_pullback(
                lambda *a, name=name: probabilistic_block_attention(
                    *a, key_rng=KEY, implementation=name, **options
                ),
                arrays,
            )
            for name in (implementation, "xla")
        )
        chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-5)

    def test_they_do_not_compute_what_the_draw_leaves_out(self, implementation):
        query, key, value = random_inputs(q_len=16, k_len=16)
        key[:, :8] = value[:, :8] = np.nan
        output = probabilistic_block_attention(
            query,
            key,
            value,
            key_rng=KEY,
            block_size=8,
            keep_probability=near,
            implementation=implementation,
        )
        assert np.isnan(output[:, :8]).all()
        assert np.isfinite(output[:, 8:]).all()


class TestDraw:
    def test_blocks_are_as_frequent_as_asked(self):
        heads, blocks = 2000, 6
        keep = np.asarray(draw_blocks(KEY, heads, blocks, blocks))
        distance = np.abs(np.subtract.outer(np.arange(blocks), np.arange(blocks)))
        expected = 1 / (1 + distance)
        np.testing.assert_allclose(keep.mean(0), expected, atol=4 * 0.5 / heads**0.5)
        assert keep[:, distance == 0].all()
        computed = np.tril(keep).sum((1, 2)).mean()
        np.testing.assert_allclose(computed, np.tril(expected).sum(), rtol=0.02)
        # independent: neighbours in a row take part together as often as by chance
        together = (keep[:, 3, 0] & keep[:, 3, 1]).mean()
        np.testing.assert_allclose(together, 1 / 4 * 1 / 3, atol=0.03)

    def test_keys_heads_and_rows_differ(self):
        keep = np.asarray(draw_blocks(KEY, 4, 8, 8))
        assert np.any(keep[0] != keep[1])
        assert np.any(keep != np.asarray(draw_blocks(jax.random.key(4), 4, 8, 8)))

    def test_default_probability(self):
        np.testing.assert_allclose(harmonic_block_probability(np.arange(3)), [1, 1 / 2, 1 / 3])


class TestMemory:
    @pytest.mark.optimized
    def test_no_more_than_two_rows_of_weights_at_a_time(self):
        def memory(length):
            array = jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float32)
            loss = lambda *a: probabilistic_block_attention(
                *a, key_rng=jax.random.key(0), block_size=32
            ).sum()
            compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*[array] * 3).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        assert memory(2048) < 6 * memory(512)


class TestTransformationsAndEdges:
    def test_vmap_and_sharding_over_batch_and_heads(self):
        arrays = random_inputs(batch=8, heads=16, kv_heads=8)
        attend = jax.jit(lambda *a: probabilistic_block_attention(*a, key_rng=KEY, block_size=2))
        expected = attend(*arrays)
        mapped = jax.vmap(lambda *a: attend(*(x[None] for x in a))[0])
        np.testing.assert_allclose(mapped(*arrays), expected, rtol=1e-5, atol=1e-6)
        mesh = jax.make_mesh((8,), ("devices",))
        for spec in (PartitionSpec("devices"), PartitionSpec(None, None, "devices")):
            placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays]
            np.testing.assert_allclose(attend(*placed), expected, rtol=1e-5, atol=1e-6)

    def test_huge_and_masked_inputs_have_finite_gradients(self):
        query, key, value = random_inputs()
        mask = np.ones((7, 7), bool)
        mask[3] = False
        attend = lambda *a: probabilistic_block_attention(*a, key_rng=KEY, block_size=2, mask=mask)
        output, gradients = value_and_pullback(attend, (1e4 * query, 1e4 * key, value))
        chex.assert_tree_all_finite((output, gradients))
        assert np.all(output[:, 3] == 0)
        assert np.all(gradients[0][:, 3] == 0)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_computes_in_float32(self, dtype):
        arrays = [jnp.asarray(x, dtype) for x in random_inputs()]
        attend = lambda arrays: probabilistic_block_attention(*arrays, key_rng=KEY, block_size=4)
        ours = attend(arrays)
        assert ours.dtype == dtype
        exact = attend([x.astype(jnp.float32) for x in arrays])
        np.testing.assert_array_equal(ours, exact.astype(dtype))

    def test_no_queries(self):
        query, key, value = random_inputs()
        assert probabilistic_block_attention(query[:0], key[:0], value[:0], key_rng=KEY).size == 0

    @pytest.mark.parametrize(
        ("kwargs", "error", "message"),
        [
            ({"block_size": 0}, ValueError, "block_size must be in"),
            ({"keep_probability": lambda d: 0.5}, ValueError, "must be 1 at distance 0"),
            ({"keep_probability": lambda d: 1.0 * (d != 1)}, ValueError, "not increase"),
            ({"keep_probability": lambda d: 1.0 - d}, ValueError, "keep_probability must be in"),
            (
                {"keep_probability": lambda d: jnp.ones(9)},
                ValueError,
                "keep_probability must broad",
            ),
            ({"mask": np.ones((2, 7), bool)}, ValueError, "mask must broadcast"),
            ({"scale": np.ones(2)}, ValueError, r"scale must have shape \(\)"),
            ({"implementation": "cudnn"}, ValueError, "implementation must be None or one of"),
            ({"implementation": "pallas_tpu"}, ValueError, "multiple of 128 on a TPU"),
        ],
    )
    def test_bad_input_is_named(self, kwargs, error, message):
        with pytest.raises(error, match=message):
            jax.jit(
                lambda *a: probabilistic_block_attention(
                    *a, key_rng=KEY, **{"block_size": 2, **kwargs}
                )
            )(*random_inputs())
