import itertools
from math import comb, exp, factorial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from jaxref.attention import (
    approximate_third_order_attention,
    dot_product_attention,
    higher_order_attention,
    match_three_embedding,
    polynomial_features,
    required_degree,
    third_order_attention,
)


def random_inputs(batch=2, q_len=3, lengths=(5, 4), heads=2, dim=3, value_dim=2, size=1.0, seed=0):
    """Query, then the keys of all sets, then their values."""
    rng = np.random.default_rng(seed)
    shapes = [(batch, q_len, heads, dim)]
    shapes += [(batch, length, heads, dim) for length in lengths]
    shapes += [(batch, length, heads, value_dim) for length in lengths]
    return [(size * rng.normal(size=shape)).astype(np.float32) for shape in shapes]


def attention64(query, keys, values, *, scale=None, seen=True, weigh=np.exp):
    """The definition over all tuples of keys in float64: `seen [batch, heads, q, k1, k2, ...]`."""
    query, *sets = (np.asarray(x, np.float64) for x in (query, *keys, *values))
    keys, values = sets[: len(keys)], sets[len(keys) :]
    letters = "jklm"[: len(keys)]
    scale = 1 / query.shape[3] if scale is None else scale
    pairs = ",".join(f"b{letter}hd" for letter in letters)
    logits = scale * np.einsum(f"bqhd,{pairs}->bhq{letters}", query, *keys)
    axes = tuple(range(3, 3 + len(keys)))
    if weigh is np.exp:
        logits -= logits.max(axis=axes, keepdims=True)
    weights = weigh(logits) * seen
    total = weights.sum(axis=axes, keepdims=True)
    weights /= np.where(total == 0, 1, total)
    return np.einsum(f"bhq{letters},{pairs}->bqhd", weights, *values)


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_third_order_matches_the_sum_over_pairs(self):
        query, *sets = random_inputs()
        attend = self.variant(lambda *a: third_order_attention(*a, block_size=2))
        expected = attention64(query, sets[:2], sets[2:])
        np.testing.assert_allclose(attend(query, *sets), expected, rtol=1e-4, atol=1e-5)

    def test_masks_scale_and_blocks(self):
        rng = np.random.default_rng(1)
        query, *sets = random_inputs(q_len=4)
        mask = rng.random((2, 1, 4, 5, 4)) < 0.7
        mask1, mask2 = rng.random((2, 2, 4, 5)) < 0.7, rng.random((1, 4)) < 0.7
        both = mask & mask1[..., None] & mask2[:, None, :]
        both[0, :, 2] = mask[0, :, 2] = False
        causal = np.tri(4, 5, dtype=bool)[:, :, None] & np.tri(4, 4, dtype=bool)[:, None]
        for block_size, is_causal in ((None, False), (3, True), (1, False)):
            ours = jax.jit(
                lambda *a, b=block_size, c=is_causal: third_order_attention(
                    *a, mask=mask, mask1=mask1, mask2=mask2, scale=0.5, block_size=b, is_causal=c
                )
            )(query, *sets)
            seen = both & causal if is_causal else both
            expected = attention64(query, sets[:2], sets[2:], scale=0.5, seen=seen)
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
            assert np.all(ours[0, 2] == 0)

    def test_a_mask_that_is_the_same_for_all_of_the_first_set(self):
        query, *sets = random_inputs()
        mask = np.random.default_rng(2).random((3, 1, 4)) < 0.6
        ours = third_order_attention(query, *sets, mask=mask, block_size=2)
        expected = attention64(query, sets[:2], sets[2:], seen=mask)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)

    def test_gradients_match_the_direct_softmax_over_pairs(self):
        arrays = random_inputs(q_len=4, lengths=(4, 4))
        cotangent = np.random.default_rng(1).normal(size=(2, 4, 2, 2)).astype("f")
        causal = np.tri(4, dtype=bool)[:, :, None] & np.tri(4, dtype=bool)[:, None]

        def direct(query, key1, key2, value1, value2):
            logits = jnp.einsum("bqhd,bjhd,bkhd->bhqjk", query, key1, key2) / 3
            logits = jnp.where(causal, logits, -1e30)
            weights = jax.nn.softmax(logits.reshape(*logits.shape[:3], -1)).reshape(logits.shape)
            return jnp.sum(cotangent * jnp.einsum("bhqjk,bjhd,bkhd->bqhd", weights, value1, value2))

        def ours(*arrays):
            attended = third_order_attention(*arrays, is_causal=True, block_size=3)
            return jnp.sum(cotangent * attended)

        gradients = [jax.jit(jax.grad(f, argnums=range(5)))(*arrays) for f in (ours, direct)]
        chex.assert_trees_all_close(*gradients, rtol=1e-4, atol=1e-5)

    def test_orders_two_and_four(self):
        rng = np.random.default_rng(1)
        for lengths in ((5,), (3, 2, 4)):
            query, *sets = random_inputs(lengths=lengths)
            keys, values = sets[: len(lengths)], sets[len(lengths) :]
            masks = [rng.random((2, 1, 3, length)) < 0.8 for length in lengths]
            masks[-1] = None
            ours = jax.jit(
                lambda q, k, v, m=masks: higher_order_attention(q, k, v, masks=m, is_causal=True)
            )(query, keys, values)
            seen = np.ones((2, 2, 3, *lengths), bool)
            for axis, (length, mask) in enumerate(zip(lengths, masks)):
                admitted = np.tri(3, length, dtype=bool)
                if mask is not None:
                    admitted = admitted & mask
                admitted = np.broadcast_to(admitted, (2, 1, 3, length))
                shape = [2, 1, 3] + [1] * len(lengths)
                shape[3 + axis] = length
                seen &= admitted.reshape(shape)
            expected = attention64(query, keys, values, seen=seen)
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)

    def test_monomials(self):
        x = np.random.default_rng(0).normal(size=(2, 3)).astype("f")
        for degree in (0, 1, 4):
            exponents = [
                a for a in itertools.product(range(degree + 1), repeat=3) if sum(a) <= degree
            ]
            assert polynomial_features(x, degree).shape == (2, comb(3 + degree, degree))
            for weighted in (False, True):
                ours = polynomial_features(x, degree, weighted=weighted, scale=0.5)
                expected = [
                    np.prod(x.astype(np.float64) ** a, axis=1)
                    * (0.5 ** sum(a) / np.prod([factorial(i) for i in a]) if weighted else 1)
                    for a in exponents
                ]
                # the same numbers, whatever the order of monomials of equal degree
                np.testing.assert_allclose(
                    np.sort(ours, axis=1), np.sort(np.stack(expected, 1), axis=1), rtol=1e-5
                )

    def test_the_factorised_form_equals_the_sum_over_pairs_of_the_polynomial(self):
        query, *sets = random_inputs(size=1.2)
        for degree in (2, 4):
            taylor = lambda x, g=degree: sum(x**m / factorial(m) for m in range(g + 1))
            expected = attention64(query, sets[:2], sets[2:], scale=0.7, weigh=taylor)
            ours = jax.jit(
                lambda *a, g=degree: approximate_third_order_attention(*a, degree=g, scale=0.7)
            )(query, *sets)
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)

    def test_masks_and_gradients_of_the_factorised_form(self):
        query, *sets = random_inputs()
        exists = np.array([[1, 1, 0, 1, 0]], bool).reshape(1, 1, 1, 5)
        ours = approximate_third_order_attention(query, *sets, mask1=exists)
        kept = np.flatnonzero(exists)
        shorter = [sets[0][:, kept], sets[1], sets[2][:, kept], sets[3]]
        expected = approximate_third_order_attention(query, *shorter)
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
        with jax.enable_x64(True):
            arrays = [x.astype(np.float64) for x in random_inputs(1, 2, (2, 2), 1, 2, 1)]
            check_grads(
                jax.jit(lambda *a: approximate_third_order_attention(*a, degree=2)),
                arrays,
                order=1,
                modes=["rev"],
            )

    def test_required_degree_is_the_smallest_even_one(self):
        for bound, scale, epsilon in ((1.0, None, 1e-3), (0.5, None, 1e-6), (1.5, 0.5, 1e-2)):
            largest = bound**3 * (1 if scale is None else 8 * scale)
            remainder = lambda g, x=largest: x ** (g + 1) * exp(x) / factorial(g + 1)
            degree = required_degree(bound, 8, epsilon, scale=scale)
            assert degree % 2 == 0
            assert remainder(degree) <= epsilon < remainder(degree - 2)
            x = np.linspace(-largest, largest, 101)
            taylor = sum(x**m / factorial(m) for m in range(degree + 1))
            assert np.abs(taylor - np.exp(x)).max() <= epsilon
        assert required_degree(0.0, 8, 1e-9) == 0


class TestClaims:
    @pytest.mark.optimized
    @pytest.mark.claim("kronecker-tensor-attention")
    def test_finds_triples_that_pairs_do_not_show_and_is_linear_for_small_entries(self):
        """At a large scale one layer tells whether x_i + x_j + x_k = 0 modulo M for some pair of
        keys, where attention over single keys of the same features hardly beats a guess."""
        modulus, length, rng = 11, 4, np.random.default_rng(0)
        values = rng.integers(0, modulus, size=(400, length))
        sums = values[:, :1, None] + values[:, :, None] + values[:, None]  # for the first token
        solvable = np.any(sums % modulus == 0, axis=(1, 2))
        assert 0.3 < solvable.mean() < 0.9
        query, key1, key2 = match_three_embedding(values, modulus)
        logits = np.einsum("bd,bjd,bkd->bjk", query[:, 0], key1, key2)
        np.testing.assert_allclose(logits, np.cos(2 * np.pi * sums / modulus), atol=1e-5)

        # A fifth entry gives a blank key of value 0 a logit between those of 0 and of ±1.
        blank = (1 + np.cos(2 * np.pi / modulus)) / 2
        fifth = lambda x, entry: np.pad(x, [(0, 0), (0, 0), (0, 1)], constant_values=entry)
        with_blank = lambda x, entry: np.concatenate(
            [fifth(x, 0), np.full((len(x), 1, 5), [0, 0, 0, 0, entry])], axis=1
        ).astype("f")[:, :, None]
        queries = fifth(query[:, :1], 1).astype("f")[:, :, None]
        keys1, keys2 = with_blank(key1, 1), with_blank(key2, blank)
        ones = np.ones((400, length + 1, 1, 1), "f")
        ones[:, -1] = 0
        found = third_order_attention(queries, keys1, keys2, ones, ones, scale=1000.0)
        np.testing.assert_array_equal(found[:, 0, 0, 0] > 0.5, solvable)
        single = dot_product_attention(queries, keys1, ones, scale=1000.0)[:, 0, 0, 0]
        agreement = np.mean((single > 0.5) == solvable)
        assert max(agreement, 1 - agreement) < 0.75

        # Small entries: the error falls with the degree, and the work grows with n, not n³.
        arrays = random_inputs(1, 6, (6, 6), 1, 3, size=0.5)
        exact = attention64(arrays[0], arrays[1:3], arrays[3:])
        error = lambda degree: np.abs(
            approximate_third_order_attention(*arrays, degree=degree) - exact
        ).max()
        assert error(0) > 10 * error(2) > 100 * error(4)
        assert error(4) < 1e-5

        def work(attend, length):
            array = jax.ShapeDtypeStruct((1, length, 1, 3), jnp.float32)
            return jax.jit(attend).lower(*[array] * 5).compile().cost_analysis()["flops"]

        growth = work(approximate_third_order_attention, 512) / work(
            approximate_third_order_attention, 128
        )
        assert growth < 4.5

    def test_a_second_set_of_one_neutral_key_is_attention(self):
        query, key, _, value, _ = random_inputs()
        one = np.ones((2, 1, 2, 3), "f")
        ours = third_order_attention(query, key, one, value, one[..., :2])
        expected = dot_product_attention(query, key, value, scale=1 / 3)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.optimized
    def test_memory_stays_with_the_square(self):
        def memory(length):
            array = jax.ShapeDtypeStruct((1, length, 1, 2), jnp.float32)
            loss = lambda *a: third_order_attention(*a, block_size=4).sum()
            compiled = jax.jit(jax.grad(loss, argnums=range(5))).lower(*[array] * 5).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        assert memory(128) < 5 * memory(64)


class TestTransformationsAndEdges:
    def test_vmap_and_sharding_over_heads(self):
        arrays = random_inputs(heads=8)
        attend = jax.jit(third_order_attention)
        expected = attend(*arrays)
        mapped = jax.vmap(lambda *a: attend(*(x[None] for x in a))[0])
        np.testing.assert_allclose(mapped(*arrays), expected, rtol=1e-5, atol=1e-6)
        sharding = NamedSharding(jax.make_mesh((8,), ("t",)), PartitionSpec(None, None, "t"))
        ours = attend(*(jax.device_put(x, sharding) for x in arrays))
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)

    def test_huge_and_masked_inputs_have_finite_gradients(self):
        arrays = random_inputs()
        arrays[0] *= 1e4
        arrays[1] *= 1e4
        mask1 = np.ones((3, 5), bool)
        mask1[1] = False
        loss = lambda *a: jnp.sum(third_order_attention(*a, mask1=mask1, block_size=2) ** 2)
        value, gradients = jax.jit(jax.value_and_grad(loss, argnums=range(5)))(*arrays)
        chex.assert_tree_all_finite((value, gradients))
        assert np.all(gradients[0][:, 1] == 0)
        nothing = np.zeros((1, 1, 1, 1), bool)
        assert np.all(approximate_third_order_attention(*random_inputs(), mask2=nothing) == 0)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_computes_in_float32(self, dtype):
        arrays = [jnp.asarray(x, dtype) for x in random_inputs()]
        wide = [x.astype(jnp.float32) for x in arrays]
        for attend in (third_order_attention, approximate_third_order_attention):
            ours = attend(*arrays)
            assert ours.dtype == dtype
            np.testing.assert_array_equal(ours, attend(*wide).astype(dtype))

    @pytest.mark.parametrize(
        ("kwargs", "error", "message"),
        [
            ({"key2": np.ones((2, 4, 1, 3), "f")}, ValueError, "in key set 2: value must have"),
            ({"key1": np.ones((2, 5, 2, 4), "f")}, ValueError, "in key set 1: key must have shape"),
            ({"value2": np.ones((2, 4, 2, 3), "f")}, ValueError, "value2 must have shape"),
            ({"mask": np.ones((2, 1, 3, 4, 5), bool)}, ValueError, "mask must broadcast"),
            ({"mask": np.ones((5, 4))}, TypeError, "mask must be boolean"),
            ({"mask2": np.ones((3, 5), bool)}, ValueError, "in key set 2: mask must broadcast"),
            ({"block_size": 0}, ValueError, "block_size must be in"),
            ({"query": np.ones((2, 3, 2, 3), int)}, TypeError, "query must have a floating-point"),
        ],
    )
    def test_bad_input_is_named(self, kwargs, error, message):
        names = ("query", "key1", "key2", "value1", "value2")
        with pytest.raises(error, match=message):
            third_order_attention(**(dict(zip(names, random_inputs())) | kwargs))

    def test_other_bad_input_is_named(self):
        arrays = random_inputs()
        grouped = [arrays[0], *(x[:, :, :1] for x in arrays[1:])]
        with pytest.raises(ValueError, match="key must have the query's 2 heads, got 1"):
            third_order_attention(*grouped)
        with pytest.raises(ValueError, match="degree must be even"):
            approximate_third_order_attention(*arrays, degree=3)
        with pytest.raises(ValueError, match=r"mask1 must have .*the same for every query"):
            approximate_third_order_attention(*arrays, mask1=np.ones((3, 5), bool))
        wide = [jax.ShapeDtypeStruct((1, 64, 1, 256), jnp.float32)] * 5
        with pytest.raises(ValueError, match=r"degree 4 takes .* features"):
            jax.eval_shape(approximate_third_order_attention, *wide)
        with pytest.raises(ValueError, match="keys, values and masks must be as many"):
            higher_order_attention(arrays[0], arrays[1:3], arrays[3:4])
        with pytest.raises(ValueError, match="entry_bound must leave logits"):
            required_degree(5.0, 8, 1e-3)
        with pytest.raises(ValueError, match="degree must be in"):
            polynomial_features(np.ones(3, "f"), -1)
        with pytest.raises(ValueError, match="x must have shape"):
            polynomial_features(np.float32(1), 1)
        with pytest.raises(TypeError, match="values must be integers"):
            match_three_embedding(np.ones(3), 5)
