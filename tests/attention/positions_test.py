from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from jaxref.attention import (
    alibi_slopes,
    dot_product_attention,
    harmonic_alibi_bias,
    rope_alibi_attention,
    rotary_embedding,
    sinusoidal_position_embedding,
)

BLOOM = np.load(Path(__file__).parents[1] / "oracles" / "alibi.npz")


def random_heads(shape=(2, 5, 3, 8), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rotated64(x, positions, base):
    """Each pair as one complex number, multiplied by exp(i t θ)."""
    x = np.asarray(x, np.float64)
    half = x.shape[-1] // 2
    theta = np.array([base ** (-2 * i / x.shape[-1]) for i in range(half)])
    positions = np.broadcast_to(np.asarray(positions, np.float64), x.shape[:2])
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * positions[:, :, None, None] * theta)
    return np.concatenate([turned.real, turned.imag], axis=-1)


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(
        base=(10000.0, 50.0),
        positions=(None, [0, 1, 5, 5, 900], [[3, 1, 4, 1, 5], [0, 0, 2, 7, 99]], [0.5, 1, 2, 3, 4]),
    )
    def test_matches_the_complex_product(self, base, positions):
        x = random_heads()
        given = None if positions is None else jnp.array(positions)
        ours = self.variant(lambda x, t: rotary_embedding(x, t, base=base))(x, given)
        expected = rotated64(x, range(5) if positions is None else positions, base)
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4 if positions else 1e-6)

    def test_gradient_turns_back(self):
        """The derivative of a rotation is its transpose, the rotation by the opposite angle."""
        x, cotangent = random_heads(), random_heads(seed=1)
        positions = np.array([0, 3, 7, 20, 21])
        gradient = jax.vjp(lambda x: rotary_embedding(x, positions), x)[1](cotangent)[0]
        np.testing.assert_allclose(gradient, rotated64(cotangent, -positions, 10000.0), atol=1e-5)

    def test_gradient_in_positions_against_finite_differences(self):
        with jax.enable_x64(True):
            x = jnp.array(random_heads((1, 3, 1, 4)), jnp.float64)
            positions = jnp.array([0.0, 1.5, 2.0])
            check_grads(rotary_embedding, (x, positions), order=1, modes=["rev", "fwd"])

    def test_default_positions_are_exact_far_out(self):
        x = random_heads((1, 20000, 1, 4))
        expected = rotated64(x, range(20000), 10000.0)
        np.testing.assert_allclose(rotary_embedding(x), expected, atol=1e-6)


class TestProperties:
    def test_scores_depend_on_the_distance_alone(self):
        query, key = random_heads((1, 6, 1, 8), seed=1), random_heads((1, 6, 1, 8), seed=2)
        query[:], key[:] = query[:, :1], key[:, :1]  # the same vectors at every position
        scores = np.einsum("bqhd,bkhd->qk", rotary_embedding(query), rotary_embedding(key))
        for distance in range(-5, 6):
            diagonal = np.diagonal(scores, distance)
            np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
        assert np.ptp(scores) > 0.1  # and they do depend on it

        later = jnp.arange(6) + 100
        shifted = np.einsum(
            "bqhd,bkhd->qk", rotary_embedding(query, later), rotary_embedding(key, later)
        )
        np.testing.assert_allclose(shifted, scores, atol=1e-4)

    def test_keeps_lengths_and_the_first_position(self):
        x = random_heads()
        ours = rotary_embedding(x)
        np.testing.assert_array_equal(ours[:, 0], x[:, 0])
        np.testing.assert_allclose(
            np.linalg.norm(ours, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6
        )


class TestTransformations:
    def test_vmap_and_traced_base(self):
        x = random_heads((3, 2, 4, 1, 6))
        positions = jnp.array([1, 2, 4, 8])
        ours = jax.vmap(rotary_embedding, in_axes=(0, None))(x, positions)
        bases = jax.jit(lambda x, base: rotary_embedding(x, base=base))
        for example, turned in zip(x, ours):
            np.testing.assert_allclose(turned, rotary_embedding(example, positions), atol=1e-6)
            np.testing.assert_allclose(
                bases(example, 50.0), rotary_embedding(example, base=50.0), atol=1e-6
            )

    @pytest.mark.parametrize("spec", [("data",), (None, "data"), (None, None, "data")])
    def test_sharded_batch_length_or_heads(self, spec):
        x = random_heads((8, 8, 8, 4))
        sharding = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec(*spec))
        ours = jax.jit(rotary_embedding)(jax.device_put(x, sharding))
        assert ours.sharding.is_equivalent_to(sharding, 4)
        np.testing.assert_allclose(ours, rotary_embedding(x), atol=1e-6)


class TestEdges:
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_computes_in_float32(self, dtype):
        x = jnp.asarray(random_heads((1, 600, 1, 4)), dtype)
        for positions in (None, jnp.arange(600)):
            ours = rotary_embedding(x, positions)
            assert ours.dtype == dtype
            expected = rotary_embedding(x.astype(jnp.float32), positions).astype(dtype)
            np.testing.assert_array_equal(ours, expected)

    def test_large_finite_input_stays_finite(self):
        for size in (1e4, -1e4, 0.0):
            x = jnp.full((1, 4, 1, 4), size)
            value, gradient = jax.value_and_grad(lambda x: rotary_embedding(x).sum())(x)
            assert np.isfinite(value)
            assert np.all(np.isfinite(gradient))

    def test_no_tokens_and_two_features(self):
        assert rotary_embedding(jnp.ones((2, 0, 1, 4))).shape == (2, 0, 1, 4)
        ours = rotary_embedding(jnp.ones((1, 2, 1, 2)))[0, 1, 0]
        np.testing.assert_allclose(ours, [np.cos(1) - np.sin(1), np.cos(1) + np.sin(1)], rtol=1e-6)

    @pytest.mark.parametrize(
        ("kwargs", "error", "message"),
        [
            ({"x": np.ones((2, 5, 8), "f")}, ValueError, r"x must have shape .*got \(2, 5, 8\)"),
            ({"x": np.ones((2, 5, 3, 7), "f")}, ValueError, "even head_dim"),
            ({"x": np.ones((2, 5, 3, 8), int)}, TypeError, "x must have a floating-point type"),
            ({"positions": np.arange(4)}, ValueError, r"positions must have shape \(5,\) or"),
            ({"positions": np.zeros((3, 5))}, ValueError, r"positions .*got \(3, 5\)"),
            ({"base": 1.0}, ValueError, "base must be in"),
            ({"base": np.nan}, ValueError, "base must be in"),
        ],
    )
    def test_bad_input_is_named(self, kwargs, error, message):
        with pytest.raises(error, match=message):
            rotary_embedding(**{"x": random_heads(), **kwargs})


def bias64(slopes, q_positions, k_len, distance):
    """The formula, entry by entry, in float64."""
    bias = np.zeros((len(slopes), len(q_positions), k_len))
    for h, i, j in np.ndindex(*bias.shape):
        apart = abs(int(q_positions[i]) - j)
        steps = sum(1 / n for n in range(1, apart + 1)) if distance == "harmonic" else apart
        bias[h, i, j] = -slopes[h] * steps
    return bias


def random_attention(batch=2, q_len=5, k_len=5, heads=4, kv_heads=2, dim=8, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(batch, q_len, heads, dim)] + 2 * [(batch, k_len, kv_heads, dim)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


class TestSinusoidal:
    @pytest.mark.parametrize(("dim", "base"), [(6, 10000.0), (5, 30.0), (1, 10000.0)])
    def test_matches_the_formula(self, dim, base):
        expected = np.zeros((9, dim))
        for t, i in np.ndindex(9, dim):
            angle = t / base ** (2 * (i // 2) / dim)
            expected[t, i] = np.cos(angle) if i % 2 else np.sin(angle)
        ours = sinusoidal_position_embedding(9, dim, base=base)
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-7)

    def test_a_shift_of_the_position_turns_every_pair(self):
        table = sinusoidal_position_embedding(40, 6)
        turned = rotary_embedding(
            jnp.concatenate([table[:, 1::2], table[:, ::2]], -1)[None, :, None], jnp.full(40, 3)
        )[0, :-3, 0]
        np.testing.assert_allclose(turned[:, :3], table[3:, 1::2], atol=1e-5)
        np.testing.assert_allclose(turned[:, 3:], table[3:, ::2], atol=1e-5)

    def test_sizes_are_checked(self):
        assert sinusoidal_position_embedding(0, 4).shape == (0, 4)
        for bad in ({"length": -1}, {"dim": 0}, {"base": 1.0}):
            with pytest.raises(ValueError, match=f"{next(iter(bad))} must be in"):
                sinusoidal_position_embedding(**{"length": 3, "dim": 4, **bad})


class TestDistanceBias:
    @pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 20])
    def test_geometric_slopes_match_bloom(self, heads):
        np.testing.assert_allclose(alibi_slopes(heads), BLOOM[f"slopes_{heads}"], rtol=1e-6)

    @pytest.mark.parametrize("slopes", ["harmonic", "geometric"])
    @pytest.mark.parametrize("distance", ["harmonic", "linear"])
    def test_bias_matches_the_formula(self, slopes, distance):
        m = np.asarray(alibi_slopes(3, slopes))
        ours = harmonic_alibi_bias(3, 4, 6, slopes=slopes, distance=distance)
        np.testing.assert_allclose(ours, bias64(m, range(4), 6, distance), rtol=1e-6, atol=1e-7)
        assert np.all(np.diagonal(ours, axis1=1, axis2=2) == 0)

    def test_harmonic_numbers_far_out(self):
        expected = -np.cumsum(1 / np.arange(1.0, 100_000))
        ours = harmonic_alibi_bias(1, 1, 100_000)[0, 0, 1:]
        np.testing.assert_allclose(ours, expected, rtol=1e-6)

    def test_traced_positions_give_the_rows_of_the_whole(self):
        whole = np.asarray(harmonic_alibi_bias(3, 7, 7))
        rows = np.array([[4, 0], [6, 5]])
        bias = jax.jit(lambda at: harmonic_alibi_bias(3, 2, 7, query_positions=at))
        np.testing.assert_allclose(bias(rows), whole[:, rows].swapaxes(0, 1), rtol=1e-6)
        np.testing.assert_allclose(bias(rows[0]), whole[:, rows[0]], rtol=1e-6)
        beyond = np.asarray(bias(np.array([100, 8])))  # where no key stands
        np.testing.assert_allclose(
            beyond, bias64(1 / np.arange(1, 4), [100, 8], 7, "harmonic"), rtol=1e-6
        )

    def test_gradient_of_slopes(self):
        cotangent = np.random.default_rng(0).normal(size=(2, 3, 5)).astype("f")
        slopes = jnp.array([0.3, 0.7])
        gradient = jax.grad(lambda m: jnp.sum(cotangent * harmonic_alibi_bias(2, 3, 5, slopes=m)))
        expected = (cotangent * bias64([1, 1], range(3), 5, "harmonic")).sum((1, 2))
        np.testing.assert_allclose(gradient(slopes), expected, rtol=1e-5)

    @pytest.mark.parametrize(
        ("kwargs", "error", "message"),
        [
            ({"slopes": "linear"}, ValueError, "slopes must be 'harmonic', 'geometric' or numbers"),
            ({"distance": "square"}, ValueError, "distance must be 'harmonic' or 'linear'"),
            ({"slopes": np.ones(3, "f")}, ValueError, r"slopes must have shape \(4,\)"),
            ({"slopes": np.ones(4, int)}, TypeError, "slopes must have a floating-point"),
            ({"query_positions": np.ones(2)}, TypeError, "query_positions must be integers"),
            ({"query_positions": np.arange(3)}, ValueError, r"query_positions .*got \(3,\)"),
            ({"num_heads": 0}, ValueError, "num_heads must be in"),
            ({"k_len": 0}, ValueError, "k_len must be in"),
        ],
    )
    def test_bad_input_is_named(self, kwargs, error, message):
        with pytest.raises(error, match=message):
            harmonic_alibi_bias(**{"num_heads": 4, "q_len": 2, "k_len": 3, **kwargs})
        with pytest.raises(ValueError, match="kind must be"):
            alibi_slopes(4, "linear")


def rope_alibi64(query, key, value, slopes, distance, mixing, scale, base, positions=None):
    """The formula in float64, one query at a time, heads grouped."""
    batch, q_len, heads, _ = query.shape
    k_len, group = key.shape[1], heads // key.shape[2]
    positions = np.arange(q_len) if positions is None else positions
    q, k = rotated64(query, positions, base), rotated64(key, range(k_len), base)
    bias = bias64(slopes, positions, k_len, distance)
    output = np.zeros((batch, q_len, heads, value.shape[3]))
    for b, i, h in np.ndindex(batch, q_len, heads):
        seen = np.arange(k_len) <= positions[i]
        logits = mixing * scale * k[b, :, h // group] @ q[b, i, h] + bias[h, i]
        weights = np.where(seen, np.exp(logits - logits[seen].max()), 0)
        output[b, i, h] = weights @ value[b, :, h // group] / weights.sum()
    return output


class RopeAlibiTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_matches_the_formula(self):
        arrays = random_attention()
        for slopes, distance, mixing in (
            ("harmonic", "harmonic", 1.0),
            ("geometric", "linear", 0.3),
        ):
            attend = self.variant(
                partial(
                    rope_alibi_attention, slopes=slopes, distance=distance, mixing=mixing, base=50.0
                )
            )
            m = np.asarray(alibi_slopes(4, slopes), np.float64)
            expected = rope_alibi64(*arrays, m, distance, mixing, 8**-0.5, 50.0)
            np.testing.assert_allclose(attend(*arrays), expected, rtol=1e-4, atol=1e-5)

    def test_values_and_gradients_match_bloom_where_it_is_alibi(self):
        """Without the rotation, geometric slopes and linear distances are BLOOM's attention."""
        arrays = [BLOOM[name] for name in ("query", "key", "value")]
        bias = harmonic_alibi_bias(6, 5, 5, slopes="geometric", distance="linear")
        attend = jax.jit(lambda *a: dot_product_attention(*a, bias=bias, is_causal=True))
        output, vjp = jax.vjp(attend, *arrays)
        np.testing.assert_allclose(output, BLOOM["output"], rtol=1e-4, atol=1e-5)
        for name, gradient in zip(("query", "key", "value"), vjp(BLOOM["cotangent"])):
            np.testing.assert_allclose(gradient, BLOOM[f"grad_{name}"], rtol=1e-4, atol=1e-5)

    def test_gradients_against_finite_differences(self):
        with jax.enable_x64(True):
            arrays = [x.astype(np.float64) for x in random_attention(1, 3, 3, 2, 1, 2)]
            attend = jax.jit(
                lambda q, k, v, m, x: rope_alibi_attention(q, k, v, slopes=m, mixing=x)
            )
            check_grads(attend, (*arrays, np.array([0.7, 0.2]), np.float64(0.8)), 1, modes=["rev"])

    def test_a_step_of_generation_gives_the_last_rows(self):
        query, key, value = random_attention(q_len=6, k_len=6)
        whole = np.asarray(rope_alibi_attention(query, key, value))
        step = jax.jit(lambda q, at: rope_alibi_attention(q, key, value, query_positions=at))
        for positions in (np.array([4, 2]), np.array([[4, 2], [1, 5]])):
            rows = np.broadcast_to(positions, (2, 2))[..., None, None]
            ours = step(np.take_along_axis(query, rows, axis=1), positions)
            expected = np.take_along_axis(whole, rows, axis=1)
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


class TestRopeAlibi:
    @pytest.mark.claim("probabilistic-generative-ai-components")
    def test_between_rotary_attention_and_alibi_by_distance_alone(self):
        """Zero slopes are rotary attention; without mixing, slopes and distances alone decide; and
        the harmonic series keeps as much weight on far keys as a power law does."""
        query, key, value = random_attention()
        rotary = dot_product_attention(
            rotary_embedding(query), rotary_embedding(key), value, is_causal=True
        )
        ours = rope_alibi_attention(query, key, value, slopes=jnp.zeros(4))
        np.testing.assert_allclose(ours, rotary, rtol=1e-5, atol=1e-6)
        assert np.abs(rope_alibi_attention(query, key, value) - rotary).max() > 0.1

        # The same vectors at every position: logits by the distance alone, wherever queries stand.
        query[:], key[:] = query[:, :1], key[:, :1]
        ones = np.broadcast_to(np.eye(5, dtype="f")[:, None], (2, 5, 2, 5))
        weights = np.asarray(rope_alibi_attention(query, key, ones, is_causal=False))
        logits = np.log(weights)
        differences = logits - np.einsum("bihi->bih", logits)[..., None]
        for distance in range(-4, 5):
            diagonal = np.diagonal(differences, distance, axis1=1, axis2=3)
            np.testing.assert_allclose(diagonal - diagonal[..., :1], 0, atol=1e-4)

        # The share of the keys at least 1000 positions back, from position 2000 and with slope 1.
        uniform = [np.ones((1, 1, 1, 2), "f"), np.ones((1, 2001, 1, 2), "f")]
        far = (np.arange(2001) <= 1000).astype("f").reshape(1, -1, 1, 1)
        share = {
            distance: float(
                rope_alibi_attention(
                    *uniform,
                    far,
                    mixing=0.0,
                    slopes=jnp.ones(1),
                    distance=distance,
                    query_positions=jnp.array([2000]),
                )[0, 0, 0, 0]
            )
            for distance in ("harmonic", "linear")
        }
        assert share["linear"] < 1e-30
        # exp(-H(n)) is e^-0.577 / n: about e^-0.577 ln 2 of a total of 1 + e^-0.577 ln 2000 + ...
        assert 0.06 < share["harmonic"] < 0.1

    def test_large_masked_and_half_precision_inputs(self):
        query, key, value = random_attention()
        mask = np.ones((5, 5), bool)
        mask[2] = False
        loss = lambda *a: jnp.sum(rope_alibi_attention(*a, mask=mask) ** 2)
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(1e4 * query, 1e4 * key, value)
        chex.assert_tree_all_finite(gradients)
        output = rope_alibi_attention(1e4 * query, key, value, mask=mask)
        assert np.all(output[:, 2] == 0)
        for dtype in (jnp.bfloat16, jnp.float16):
            half = [jnp.asarray(x, dtype) for x in (query, key, value)]
            ours = rope_alibi_attention(*half)
            assert ours.dtype == dtype
            exact = rope_alibi_attention(*(x.astype(jnp.float32) for x in half))
            np.testing.assert_allclose(
                ours.astype(jnp.float32), exact, atol=16 * jnp.finfo(dtype).eps
            )

    def test_vmap_and_sharding_over_heads(self):
        query, key, value = random_attention(heads=16, kv_heads=8)
        attend = jax.jit(rope_alibi_attention)
        expected = attend(query, key, value)
        mapped = jax.vmap(lambda q, k, v: attend(q[None], k[None], v[None])[0])
        np.testing.assert_allclose(mapped(query, key, value), expected, rtol=1e-5, atol=1e-6)
        sharding = NamedSharding(jax.make_mesh((8,), ("t",)), PartitionSpec(None, None, "t"))
        ours = attend(*(jax.device_put(x, sharding) for x in (query, key, value)))
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)

    def test_bad_input_is_named(self):
        query, key, value = random_attention()
        with pytest.raises(ValueError, match=r"mixing must have shape \(\)"):
            rope_alibi_attention(query, key, value, mixing=np.ones(4))
        with pytest.raises(ValueError, match="mixing must be in"):
            rope_alibi_attention(query, key, value, mixing=np.nan)
        with pytest.raises(ValueError, match="even head_dim"):
            rope_alibi_attention(query[..., :3], key[..., :3], value)
        with pytest.raises(ValueError, match="mask must broadcast"):
            rope_alibi_attention(query, key, value, mask=np.ones((3, 5), bool))
