import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxref.quantization import (
    staircase_bits,
    staircase_cache_append,
    staircase_cache_init,
    staircase_cache_nbytes,
    staircase_cache_read,
)

LENGTH, BLOCK, GROUP, HEADS, DIM = 20, 4, 4, 2, 8
append = jax.jit(staircase_cache_append)
read = jax.jit(staircase_cache_read)


def empty(batch=2, **options):
    options = {"block": BLOCK, "group_size": GROUP} | options
    return staircase_cache_init(batch, LENGTH, HEADS, DIM, **options)


def random_tokens(batch=2, n=LENGTH, seed=0):
    """Keys whose channels have means and spreads of their own, and values."""
    rng = np.random.default_rng(seed)
    spread, mean = rng.uniform(0.5, 3, size=(2, DIM))
    key = 5 * mean + spread * rng.normal(size=(batch, n, HEADS, DIM))
    return key.astype("f"), rng.normal(size=key.shape).astype("f")


def rounded(x, bits, axis):
    """Min-max quantization of a group along an axis, as float32 stores scale and minimum."""
    low = x.min(axis, keepdims=True)
    scale = np.float32((x.max(axis, keepdims=True) - low) / np.float32(2**bits - 1))
    codes = np.round((x - low) / np.where(scale > 0, scale, 1))
    return np.where(scale > 0, low + scale * codes, x)


def staircase(x, axis, block=BLOCK, bits=(16, 8, 4, 2), group=GROUP):
    """One sequence `[n, kv_heads, head_dim]` as it is remembered, block by block.

    Each block is an array of its own, and goes through the widths one after the other.
    """
    blocks, newest = [], []

    def groups(one, width):
        pieces = np.split(one, one.shape[axis] // group, axis)
        return np.concatenate([rounded(piece, width, axis) for piece in pieces], axis)

    for token in x:
        newest.append(token)
        if len(newest) == block:
            blocks.append(np.stack(newest))
            newest = []
            for age, index in enumerate(range(len(blocks) - 1, -1, -1), 1):
                if age < len(bits):
                    blocks[index] = groups(blocks[index], bits[age])
    return np.concatenate([*blocks, np.reshape(newest, (-1, *x.shape[1:]))])


def assert_holds(cache, row, key, value, **options):
    """The sequence of a row is what the literal staircase remembers, and zeros follow."""
    keys, values = read(cache)
    n = len(key)
    assert cache.lengths[row] == n
    close = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(keys[row, :n], staircase(key, 0, **options), **close)
    np.testing.assert_allclose(values[row, :n], staircase(value, 2, **options), **close)
    np.testing.assert_array_equal(keys[row, n:], 0)
    np.testing.assert_array_equal(values[row, n:], 0)


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_the_first_block(self):
        key, value = random_tokens(n=BLOCK)
        cache = self.variant(staircase_cache_append)(empty(), key, value)
        for row in range(2):
            assert_holds(cache, row, key[row], value[row])

    def test_matches_a_literal_staircase(self):
        key, value = random_tokens()
        cache = append(empty(), key[:, 0], value[:, 0])
        later = [np.roll(x, -1, axis=1) for x in (key, value)]
        cache = append(cache, *later, where=np.tile(np.arange(LENGTH) < 17, (2, 1)))
        for row in range(2):
            assert_holds(cache, row, key[row, :18], value[row, :18])

    def test_two_widths(self):
        key, value = random_tokens()
        cache = append(empty(bits=(32, 2)), key, value, where=np.ones((2, LENGTH), bool))
        assert_holds(cache, 0, key[0], value[0], bits=(32, 2))

    def test_default_groups(self):
        assert staircase_cache_init(1, 9, 1, 96, block=96).group_sizes == (32, 32)
        assert staircase_cache_init(1, 9, 1, 80, block=40).group_sizes == (40, 80)

    def test_sequences_grow_by_different_numbers_of_tokens(self):
        key, value = random_tokens()
        where = np.random.default_rng(1).random((2, LENGTH)) < np.array([[0.8], [0.4]])
        cache = append(empty(), key, value, where=where)
        cache = append(cache, key[:, 0], value[:, 0], where=np.array([True, False]))
        for row, also in enumerate((1, 0)):
            own = [np.concatenate([x[row][where[row]], x[row][:also]]) for x in (key, value)]
            assert_holds(cache, row, *own)


class TestStaircase:
    """The marked claim of the paper is beside its attention."""

    def test_bits(self):
        assert staircase_bits(5, (16, 8, 4, 2)) == (8, 4, 2, 2, 2)
        assert staircase_bits(2) == (8, 4)
        assert staircase_bits(0) == ()

    def test_error_rises_with_age_and_stays_below_two_bits_throughout(self):
        tokens, where = random_tokens(), np.tile(np.arange(LENGTH) < 18, (2, 1))
        errors = []
        for cache in (empty(), empty(bits=(32, 2))):
            off = [
                jnp.abs(x - y) for x, y in zip(read(append(cache, *tokens, where=where)), tokens)
            ]
            errors.append([np.mean([x[:, i : i + 4].mean() for x in off]) for i in (12, 8, 4, 0)])
        ours, two_bits = np.array(errors)
        assert np.all(ours[1:3] > 4 * ours[:2])  # 17 and 5 levels for one
        assert ours[3] > 0.5 * ours[2]
        assert ours.mean() < 0.7 * two_bits.mean()

    def test_memory_is_packed(self):
        shape = (1, 64 * 12, 2, 64)
        cache = jax.eval_shape(lambda: staircase_cache_init(*shape, dtype=jnp.bfloat16))
        per_block = 2 * 64 * 2 * 64  # entries of keys and values
        codes = per_block * (8 + 4 + 10 * 2) // 8
        scales = 12 * per_block // 32 * 2 * 2
        assert staircase_cache_nbytes(cache) == codes + scales + 2 * per_block + 4
        assert staircase_cache_nbytes(cache) < 0.35 * 2 * 12 * per_block
        assert cache.stairs[-1][0].values.dtype == jnp.uint8


class TestTransformations:
    def test_vmap_over_layers(self):
        key, value = random_tokens()
        where = np.ones((2, LENGTH), bool)
        layers = jax.tree.map(lambda x: jnp.stack([x, x]), empty())
        inputs = np.stack([key, 2 * key]), np.stack([value, -value])
        both = jax.jit(jax.vmap(staircase_cache_append))(layers, *inputs)
        for i in range(2):
            one = append(empty(), inputs[0][i], inputs[1][i], where=where)
            chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], both), one, rtol=1e-6)

    def test_tokens_one_by_one_or_together_are_the_same(self):
        key, value = random_tokens()
        together = append(empty(), key, value, where=np.ones((2, LENGTH), bool))
        steps = (key.swapaxes(0, 1), value.swapaxes(0, 1))
        step = lambda cache, x: (staircase_cache_append(cache, *x), None)
        one_by_one, _ = jax.jit(lambda cache: jax.lax.scan(step, cache, steps))(empty())
        chex.assert_trees_all_close(one_by_one, together, rtol=1e-6)

    def test_sharded_over_the_batch(self):
        tokens, where = random_tokens(), np.ones((2, LENGTH), bool)
        expected = read(append(empty(), *tokens, where=where))
        sharding = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
        several = [np.concatenate([x] * 4) for x in (*tokens, where)]
        start, key, value, where = jax.device_put((empty(8), *several), sharding)
        ours = read(append(start, key, value, where=where))
        for array, two in zip(ours, expected):
            assert array.sharding.is_equivalent_to(sharding, 4)
            np.testing.assert_allclose(array, np.concatenate([two] * 4), rtol=1e-6)


class TestEdges:
    def test_what_goes_beyond_the_end_is_dropped(self):
        key, value = random_tokens()
        where = np.ones((2, LENGTH), bool)
        once = append(empty(), key, value, where=where)
        twice = append(once, key, value, where=where)
        chex.assert_trees_all_equal(twice, once)

    @pytest.mark.parametrize("max_length", [1, 5])
    def test_caches_shorter_than_the_staircase(self, max_length):
        key, value = random_tokens(n=max_length)
        cache = staircase_cache_init(2, max_length, HEADS, DIM, block=2)
        cache = append(cache, key, value)
        np.testing.assert_array_equal(cache.lengths, max_length)
        keys = read(cache)[0]
        expected = staircase(key[0], 0, block=2, group=2)
        np.testing.assert_allclose(keys[0], expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision(self, dtype):
        key, value = (jnp.asarray(500 * x, dtype) for x in random_tokens(n=BLOCK))
        cache = append(empty(dtype=dtype), key, value)
        keys, values = read(cache)
        assert keys.dtype == cache.stairs[0][0].scale.dtype == dtype
        wide = np.asarray(key, np.float32)
        # a scale that is rounded in the type moves the far end of a range by as much
        tolerance = 4 * float(jnp.finfo(dtype).eps) * np.abs(wide).max()
        expected = staircase(wide[0], 0)
        np.testing.assert_allclose(keys[0, :BLOCK].astype("f"), expected, atol=tolerance)
        assert np.all(np.isfinite(values.astype("f")))

    def test_constant_channels_and_two_extremes_are_exact_in_two_bits(self):
        key, value = random_tokens()
        key[:] = key[:, :1]
        value[:] = np.where(value > 0, 1e4, -1e4)
        cache = append(empty(), key, value, where=np.ones((2, LENGTH), bool))
        np.testing.assert_array_equal(read(cache)[0], key)
        np.testing.assert_allclose(read(cache)[1], value, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch must be in"),
        ({"block": 0}, "block must be in"),
        ({"group_size": 4}, "group_size must divide head_dim = 6, got 4"),
        ({"group_size": 3}, "group_size must divide block = 4, got 3"),
        ({"bits": (16,)}, "bits must be"),
        ({"bits": (8, 4)}, "bits must be"),
        ({"bits": (16, 4, 8)}, "bits must be"),
        ({"bits": (16, 1)}, "bits must be"),
    ],
)
def test_bad_sizes_are_named(change, message):
    arguments = {"batch": 2, "max_length": 8, "kv_heads": 2, "head_dim": 6, "block": 4}
    with pytest.raises(ValueError, match=message):
        staircase_cache_init(**(arguments | change))


def test_bad_tokens_are_named():
    cache, (key, value) = empty(), random_tokens(n=3)
    with pytest.raises(ValueError, match=r"value must have shape \(2, 3, 2, 8\)"):
        staircase_cache_append(cache, key, value[:, :2])
    with pytest.raises(ValueError, match=r"key must have shape \(2, 2, 8\)"):
        staircase_cache_append(cache, key[:1, 0], value[:, 0])
    with pytest.raises(ValueError, match="key must have at most 20 tokens, got 21"):
        staircase_cache_append(cache, *(np.repeat(x, 7, axis=1) for x in (key, value)))
    with pytest.raises(ValueError, match=r"where must have shape \(2, 3\)"):
        staircase_cache_append(cache, key, value, where=np.ones((2, 2), bool))
    with pytest.raises(TypeError, match="where must be boolean"):
        staircase_cache_append(cache, key, value, where=np.ones((2, 3)))
    with pytest.raises(TypeError, match="key must have a floating-point type"):
        staircase_cache_append(cache, key.astype(int), value)
    with pytest.raises(TypeError, match="dtype must have a floating-point type"):
        empty(dtype=jnp.int8)
    assert staircase_cache_append(cache, key[:, :0], value[:, :0]) is cache
