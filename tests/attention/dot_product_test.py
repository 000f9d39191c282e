from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxref.attention import dot_product_attention

TORCH = np.load(Path(__file__).parents[1] / "oracles" / "attention.npz")


def random_inputs(batch=2, q_len=5, k_len=5, heads=4, kv_heads=4, dim=8, value_dim=8, seed=0):
    """Query, key, value, a cotangent of the output, a bias, and a mask with no row all False."""
    rng = np.random.default_rng(seed)
    shapes = (
        (batch, q_len, heads, dim),
        (batch, k_len, kv_heads, dim),
        (batch, k_len, kv_heads, value_dim),
        (batch, q_len, heads, value_dim),
        (1, heads, q_len, k_len),
    )
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    mask = rng.random((batch, 1, q_len, k_len)) < 0.7
    mask[..., 0] = True
    return *arrays, mask


def attention64(query, key, value, *, bias=0.0, mask=True, is_causal=False):
    """The formula in float64, one query of one head at a time."""
    (batch, q_len, heads, dim), (_, k_len, kv_heads, _) = query.shape, key.shape
    bias, mask = (np.broadcast_to(x, (batch, heads, q_len, k_len)) for x in (bias, mask))
    output = np.zeros((batch, q_len, heads, value.shape[-1]))
    for b, i, h in np.ndindex(batch, q_len, heads):
        g = h // (heads // kv_heads)
        seen = [j for j in range(k_len) if mask[b, h, i, j] and (j <= i or not is_causal)]
        if seen:
            logits = key[b, seen, g].astype(np.float64) @ query[b, i, h] / np.sqrt(dim)
            logits += bias[b, h, i, seen]
            weights = np.exp(logits - logits.max())
            output[b, i, h] = weights @ value[b, seen, g] / weights.sum()
    return output


def gradients(attention, arrays, cotangent, **options):
    """Output and gradients for `arrays`: query, key, value and, if it is there, bias."""

    @jax.jit
    def run(*arrays):
        call = lambda q, k, v, *bias: attention(q, k, v, bias=bias[0] if bias else None, **options)
        output, vjp = jax.vjp(call, *arrays)
        return output, *vjp(cotangent)

    return run(*arrays)


def assert_all_close(ours, theirs, tolerance=2e-5):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters("plain", "causal", "causal_wide", "grouped_biased")
    def test_values_and_gradients_match_torch(self, case):
        names = ["query", "key", "value", "bias"][: 3 + (f"{case}_bias" in TORCH)]
        options = {"is_causal": case.startswith("causal")}
        options["scale"] = 0.3 if case == "grouped_biased" else None

        def call(*arrays):
            return dot_product_attention(**dict(zip(names, arrays)), **options)

        ours = self.variant(lambda arrays, g: (call(*arrays), *jax.vjp(call, *arrays)[1](g)))
        arrays = [TORCH[f"{case}_{name}"] for name in names]
        expected = [TORCH[f"{case}_output"], *(TORCH[f"{case}_grad_{name}"] for name in names)]
        assert_all_close(ours(arrays, TORCH[f"{case}_cotangent"]), expected)

    @parameterized.parameters(
        # lengths on both sides of the causal blocks of 64, equal or not, grouped heads
        (150, 150, 4, 4, True),
        (130, 70, 4, 2, True),
        (70, 130, 4, 1, True),
        (7, 9, 4, 2, False),
    )
    def test_values_and_gradients_match_jax(self, q_len, k_len, heads, kv_heads, is_causal):
        *arrays, cotangent, bias, mask = random_inputs(2, q_len, k_len, heads, kv_heads)
        options = {"mask": mask, "is_causal": is_causal, "scale": 0.5}
        ours = gradients(dot_product_attention, (*arrays, bias), cotangent, **options)
        theirs = gradients(jax.nn.dot_product_attention, (*arrays, bias), cotangent, **options)
        assert_all_close(ours, theirs)

    def test_causal_blocks_without_bias_or_mask_match_jax(self):
        *arrays, cotangent, _, _ = random_inputs(1, 1030, 1030, 1, 1, 2, 2)
        ours = gradients(dot_product_attention, arrays, cotangent, is_causal=True)
        theirs = gradients(jax.nn.dot_product_attention, arrays, cotangent, is_causal=True)
        assert_all_close(ours, theirs)

    @parameterized.parameters(False, True)
    def test_matches_the_formula(self, is_causal):
        query, key, value, _, bias, mask = random_inputs(2, 4, 6, 4, 2, value_dim=3)
        mask[1, 0, 2] = False
        options = {"bias": bias, "mask": mask, "is_causal": is_causal}
        ours = dot_product_attention(query, key, value, **options)
        expected = attention64(query, key, value, **options)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
        assert np.all(ours[1, 2] == 0)

    @parameterized.parameters(((), ()), ((5,), (5, 1)), ((4, 1, 1), (5, 5)), ((2, 1, 5, 1), (1, 5)))
    def test_bias_and_mask_broadcast_with_their_gradients(self, bias_shape, mask_shape):
        query, key, value, cotangent, *_ = random_inputs()
        rng = np.random.default_rng(1)
        bias = rng.normal(size=bias_shape).astype(np.float32)
        mask = rng.random(mask_shape) < 0.7
        full = (2, 4, 5, 5)

        def value_and_gradient(expand):
            call = lambda b: jnp.vdot(
                cotangent,
                dot_product_attention(
                    query,
                    key,
                    value,
                    bias=jnp.broadcast_to(b, full) if expand else b,
                    mask=jnp.broadcast_to(mask, full) if expand else mask,
                ),
            )
            return jax.jit(jax.value_and_grad(call))(bias)

        assert_all_close(value_and_gradient(False), value_and_gradient(True), 1e-5)

    def test_gradients_against_finite_differences(self):
        with jax.enable_x64(True):
            *arrays, _, bias, mask = random_inputs(1, 3, 4, 2, 1, 2, 2)
            arrays = [jnp.asarray(x, jnp.float64) for x in (*arrays, bias)]
            call = lambda q, k, v, b, s: dot_product_attention(
                q, k, v, bias=b, scale=s, mask=mask[:1]
            )
            check_grads(call, (*arrays, 0.7), order=1, modes=["rev", "fwd"])
            assert call(*arrays, 0.7).dtype == jnp.float64


class TestTransformations:
    def test_vmap(self):
        query, key, value, *_, mask = random_inputs()
        attend = lambda q, k, v, m: dot_product_attention(q, k, v, mask=m, is_causal=True)
        ours = jax.vmap(attend)(*(x[:, None] for x in (query, key, value, mask)))
        np.testing.assert_allclose(ours[:, 0], attend(query, key, value, mask), atol=1e-6)

    def test_hessian_vector_products(self):
        query, key, value, *_ = random_inputs(1, 3, 3, 1, 1, 2, 2)
        loss = lambda f: lambda q: jnp.sum(f(q, key, value, is_causal=True) ** 2)
        ours, theirs = (
            jax.jit(lambda q, t, f=f: jax.jvp(jax.grad(loss(f)), (q,), (t,)))(query, key)
            for f in (dot_product_attention, jax.nn.dot_product_attention)
        )
        assert_all_close(ours, theirs)

    @pytest.mark.parametrize(
        ("spec", "kv_heads"), [(P("x"), 2), (P(None, None, "x"), 8), (P("y", None, "z"), 4)]
    )
    def test_sharded_over_batch_and_heads(self, spec, kv_heads):
        *arrays, cotangent, bias, mask = random_inputs(8, 66, 66, 8, kv_heads, 4, 4)
        mesh = jax.make_mesh((8,), ("x",)) if "x" in spec else jax.make_mesh((2, 4), ("y", "z"))
        sharding = NamedSharding(mesh, spec)
        options = {"mask": mask, "is_causal": True}
        expected = gradients(dot_product_attention, (*arrays, bias), cotangent, **options)
        placed = [jax.device_put(x, sharding) for x in arrays]
        ours = gradients(dot_product_attention, (*placed, bias), cotangent, **options)
        assert_all_close(ours, expected)
        for x in ours[:4]:
            assert x.sharding.is_equivalent_to(sharding, 4)

    def test_the_bias_gradient_is_summed_over_shards(self):
        query, key, value, cotangent, bias, _ = random_inputs(8)

        def gradient(q, k, v, g, b):
            call = lambda b: dot_product_attention(q, k, v, bias=b)
            return jax.vjp(call, b)[1](g)[0]

        mesh, specs = jax.make_mesh((8,), ("x",)), (*[P("x")] * 4, P())
        arguments = (query, key, value, cotangent, bias)
        placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arguments, specs)]
        sharded = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=P()))
        np.testing.assert_allclose(sharded(*placed), jax.jit(gradient)(*arguments), atol=1e-5)


@pytest.mark.parametrize("implementation", ["pallas_tpu_interpret", "pallas_gpu_interpret"])
def test_kernels_match(implementation):
    *arrays, cotangent, bias, mask = random_inputs(1, 5, 9, 4, 2)
    mask[:, :, 2] = False
    options = {"mask": mask, "is_causal": True, "scale": 0.5}
    ours = gradients(
        dot_product_attention, (*arrays, bias), cotangent, implementation=implementation, **options
    )
    expected = gradients(dot_product_attention, (*arrays, bias), cotangent, **options)
    assert_all_close(ours, expected)


def test_a_kernel_that_is_not_here_is_refused():
    *arrays, _, _, _ = random_inputs()
    with pytest.raises(ValueError, match="needs a TPU or a GPU"):
        dot_product_attention(*arrays, implementation="pallas")


class TestEdges:
    @pytest.mark.parametrize("how", ["mask", "bias", "causal"])
    def test_queries_without_keys_give_zeros_with_zero_gradients(self, how):
        *arrays, cotangent, bias, mask = random_inputs()
        if how == "bias":
            bias[:, :, 2] = -np.inf
            mask[:] = True
        elif how == "mask":
            mask[:, :, 2] = False
        else:
            mask[:, :, 2, :3] = False
        options = {"mask": mask, "is_causal": how == "causal"}
        output, *slopes = gradients(dot_product_attention, (*arrays, bias), cotangent, **options)
        chex.assert_tree_all_finite((output, slopes))
        assert np.all(output[:, 2] == 0)
        assert np.all(slopes[0][:, 2] == 0)
        assert np.all(slopes[3][:, :, 2] == 0)
        cotangent[:, 2] = 7
        again = gradients(dot_product_attention, (*arrays, bias), cotangent, **options)
        assert_all_close(again[1:], slopes, 0)
        assert np.any(output != 0)

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_logits_of_ten_thousand_stay_finite(self, is_causal):
        *arrays, cotangent, _, _ = random_inputs(dim=1, value_dim=8)
        arrays[0] = np.where(arrays[0] > 0, 1e4, -1e4).astype(np.float32)
        arrays[1] = np.where(arrays[1] > 0, 1, -1).astype(np.float32)
        ours = gradients(dot_product_attention, arrays, cotangent, is_causal=is_causal)
        chex.assert_tree_all_finite(ours)
        expected = attention64(*arrays, is_causal=is_causal)
        np.testing.assert_allclose(ours[0], expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_has_a_softmax_in_float32(self, dtype):
        *arrays, cotangent, bias, mask = random_inputs(2, 5, 70)
        arrays = [jnp.asarray(x, dtype) for x in arrays]
        options = {"mask": mask, "scale": 0.25}  # a power of two rounds nothing
        cotangent = jnp.asarray(cotangent, dtype)
        ours = gradients(dot_product_attention, (*arrays, bias), cotangent, **options)
        wide = [x.astype(jnp.float32) for x in arrays]
        exact = gradients(
            dot_product_attention, (*wide, bias), cotangent.astype(jnp.float32), **options
        )
        assert [x.dtype for x in ours] == [dtype] * 4 + [jnp.float32]
        tolerance = 3 * jnp.finfo(dtype).eps
        assert_all_close([x.astype(jnp.float32) for x in ours], exact, tolerance)
        # logits so large that rounding them to the type of the inputs would show
        sharp = [dot_product_attention(32 * a[0], *a[1:], **options) for a in (arrays, wide)]
        np.testing.assert_allclose(sharp[0].astype(jnp.float32), sharp[1], atol=3 * tolerance)

    def test_mixed_types_give_their_common_type(self):
        query, key, value, *_ = random_inputs()
        output = dot_product_attention(query.astype(jnp.bfloat16), key, value)
        assert output.dtype == jnp.float32

    def test_no_query_gives_an_empty_output(self):
        for is_causal in (False, True):
            query, key, value, *_ = random_inputs(q_len=0)
            output = dot_product_attention(query, key, value, is_causal=is_causal)
            assert output.shape == (2, 0, 4, 8)

    @pytest.mark.optimized
    def test_causal_attention_computes_little_of_what_it_masks(self):
        arrays = random_inputs(1, 512, 512, 1, 1, 8, 8)[:3]

        def flops(is_causal):
            attend = lambda *a: dot_product_attention(*a, is_causal=is_causal)
            return jax.jit(attend).lower(*arrays).compile().cost_analysis()["flops"]

        assert flops(True) < 0.65 * flops(False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": np.zeros((2, 5, 32), "f")}, ValueError, r"query must have shape \[batch"),
        ({"query": np.zeros((2, 5, 6, 8), "f")}, ValueError, "heads that divide the query's 6"),
        ({"key": np.zeros((2, 5, 4, 7), "f")}, ValueError, r"key must have shape \(2, 5, 4, 8\)"),
        ({"key": np.zeros((3, 5, 4, 8), "f")}, ValueError, r"key must have shape \(2, 5, 4, 8\)"),
        ({"value": np.zeros((2, 6, 4, 8), "f")}, ValueError, "value must have shape"),
        ({"value": np.zeros((2, 5, 2, 8), "f")}, ValueError, "value must have shape"),
        ({"bias": np.zeros((2, 4, 5, 6), "f")}, ValueError, "bias must broadcast to"),
        ({"mask": np.ones((3, 1, 5, 5), bool)}, ValueError, "mask must broadcast to"),
        ({"scale": np.ones(4, "f")}, ValueError, r"scale must have shape \(\)"),
        ({"key": np.zeros((2, 0, 4, 8), "f")}, ValueError, "at least one position"),
        ({"query": np.zeros((2, 5, 4, 8), int)}, TypeError, "query must have a floating-point"),
        ({"value": np.zeros((2, 5, 4, 8), int)}, TypeError, "value must have a floating-point"),
        ({"bias": np.zeros((5, 5), int)}, TypeError, "bias must have a floating-point"),
        ({"mask": np.ones((5, 5), "f")}, TypeError, "mask must be boolean, got float32"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = dict(zip(("query", "key", "value"), random_inputs()))
    if change.keys() == {"key"} and change["key"].shape[1] == 0:
        change = {**change, "value": change["key"]}
    with pytest.raises(error, match=message):
        dot_product_attention(**(arguments | change))
