"""Every implementation of flash attention against dense attention in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref.attention import dot_product_attention
from jaxref.kernels import flash_attention
from tests.kernels.ahead_of_time import (
    TOPOLOGIES,
    compile_for_tpu,
    lower_for_gpu,
    needs_tpu_compiler,
)
from tests.kernels.platforms import ANYWHERE


def dense(query, key, value, bias=None, slopes=None, **options):
    """Output and logsumexp in the operands' type, all logits at once."""
    (_, q_len, heads, dim), (_, k_len, kv_heads, _) = query.shape, key.shape
    key, value = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (key, value))
    scale, cap = options.get("scale") or dim**-0.5, options.get("soft_cap")
    logits = jnp.einsum("bqhd,bkhd->bhqk", scale * query, key)
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    q_at, k_at = np.arange(q_len)[:, None], np.arange(k_len)
    logits = logits if bias is None else logits + bias
    logits = logits if slopes is None else logits - slopes[:, None, None] * np.abs(q_at - k_at)
    seen = np.ones((1, 1, q_len, k_len), bool)
    if options.get("is_causal"):
        seen = seen & (k_at <= q_at)
    if "query_segment_ids" in options:
        q_ids, k_ids = options["query_segment_ids"], options["key_segment_ids"]
        seen = seen & (q_ids[:, None, :, None] == k_ids[:, None, None, :])
    if "block_mask" in options:
        keep = options["block_mask"].repeat(8, 1).repeat(8, 2)
        seen = seen & keep[:, :q_len, :k_len]
    logits = jnp.where(seen, logits, -jnp.inf)
    sees_a_key = jnp.any(logits > -jnp.inf, axis=-1, keepdims=True)
    logits = jnp.where(sees_a_key, logits, 0)
    weights = jnp.where(sees_a_key, jax.nn.softmax(logits), 0)
    logsumexp = jnp.where(sees_a_key[..., 0], jax.nn.logsumexp(logits, axis=-1), -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value), logsumexp


def random_arrays(
    batch=2, q_len=21, k_len=21, heads=4, kv_heads=2, dim=8, value_dim=8, bias=None, slopes=False
):
    """Query, key and value, a bias of that shape or None, slopes or None, and cotangents."""
    rng = np.random.default_rng(0)
    shapes = [
        (batch, q_len, heads, dim),
        (batch, k_len, kv_heads, dim),
        (batch, k_len, kv_heads, value_dim),
        bias,
        (heads,) if slopes else None,
    ]
    arrays = [x if x is None else rng.normal(size=x).astype(np.float32) for x in shapes]
    cotangents = [
        rng.normal(size=x).astype(np.float32)
        for x in ((batch, q_len, heads, value_dim), (batch, heads, q_len))
    ]
    return arrays, cotangents


def differentiated(attend, arrays, cotangents):
    """Output, logsumexp, and the gradients of all arrays that are there."""

    @jax.jit
    def run(arrays, cotangents):
        (output, logsumexp), pull = jax.vjp(attend, *arrays)
        return output, logsumexp, *pull((cotangents[0].astype(output.dtype), cotangents[1]))

    return [x for x in run(arrays, cotangents) if x is not None]


def ours(arrays, cotangents, implementation, block_q=8, block_k=8, **options):
    def attend(query, key, value, bias, slopes):
        return flash_attention(
            query,
            key,
            value,
            bias=bias,
            alibi_slopes=slopes,
            return_logsumexp=True,
            implementation=implementation,
            block_q=block_q,
            block_k=block_k,
            **options,
        )

    return differentiated(attend, arrays, cotangents)


def exact(arrays, cotangents, **options):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x).astype(np.float64), (arrays, cotangents))
        return differentiated(functools.partial(dense, **options), *wide)


def assert_all_close(got, expected, tolerance=1e-5):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b))
        size = np.abs(b[np.isfinite(b)]).max(initial=1)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * size)


SEGMENTS = np.array([[0] * 9 + [1] * 12, [3] * 2 + [5] * 19])

# Lengths are no multiples of the blocks of 8, and most have three of them.
CASES = {
    "causal, fewer queries": (
        {"q_len": 19, "bias": (2, 1, 19, 21), "slopes": True},
        {"is_causal": True},
    ),
    "causal, more queries": (
        {"k_len": 9, "kv_heads": 1, "value_dim": 4},
        {"is_causal": True, "scale": 0.3},
    ),
    "cap and a full bias": ({"bias": (2, 4, 21, 21)}, {"soft_cap": 1.5}),
    "segments and a bias of keys": (
        {"bias": (2, 1, 1, 21)},
        {
            "query_segment_ids": SEGMENTS,
            "key_segment_ids": np.where(SEGMENTS == 3, 4, SEGMENTS),  # two queries see no key
        },
    ),
    "slopes and a bias of queries": ({"bias": (21, 1), "slopes": True}, {"soft_cap": 2.0}),
    "blocks and a bias of heads": (
        {"bias": (4, 21, 21)},
        {"block_mask": np.random.default_rng(1).random((4, 3, 3)) < 0.4},
    ),
    "causal blocks": (
        {"q_len": 30},
        {"block_mask": np.random.default_rng(2).random((4, 4, 3)) < 0.6, "is_causal": True},
    ),
}
everywhere = pytest.mark.parametrize("implementation", ANYWHERE)


@functools.cache
def expected_of(case):
    sizes, options = CASES[case]
    return exact(*random_arrays(**sizes), **options)


@everywhere
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_match_dense_attention_in_float64(implementation, case):
    sizes, options = CASES[case]
    got = ours(*random_arrays(**sizes), implementation, **options)
    assert_all_close(got, expected_of(case))


@everywhere
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 1e-2), (jnp.float16, 2e-3)])
def test_half_precision(implementation, dtype, tolerance):
    arrays, cotangents = random_arrays(batch=1, q_len=9, k_len=9, heads=2, kv_heads=1)
    arrays = [x if x is None else jnp.asarray(x, dtype) for x in arrays]
    got = ours(arrays, cotangents, implementation, is_causal=True)
    assert [x.dtype for x in got] == [dtype, jnp.float32, dtype, dtype, dtype]
    for a, b in zip(got, exact(arrays, cotangents, is_causal=True)):
        a, b = np.asarray(a, np.float64), np.asarray(b)
        assert np.linalg.norm(a - b) < tolerance * np.linalg.norm(b)


def test_float64():
    arrays, cotangents = random_arrays(batch=1, q_len=9, k_len=9)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(np.float64), (arrays, cotangents))
        got = ours(*wide, None, is_causal=True)
        assert all(x.dtype == jnp.float64 for x in got)
        with pytest.raises(ValueError, match="'xla' for float64"):
            flash_attention(*wide[0][:3], implementation="pallas_tpu_interpret")
    assert_all_close(got, exact(arrays, cotangents, is_causal=True), 1e-12)


@everywhere
def test_huge_logits_and_queries_without_a_key(implementation):
    """Logits of ±1e4 that float32 holds exactly; bias hides keys one by one and by rows."""
    rng = np.random.default_rng(3)
    arrays, cotangents = random_arrays(batch=1, heads=2, kv_heads=1, bias=(1, 1, 21, 21))
    arrays[0], arrays[1] = (50.0 * np.sign(x) for x in arrays[:2])
    arrays[3] = np.where(rng.random((1, 1, 21, 21)) < 0.2, -np.inf, 0.0).astype(np.float32)
    arrays[3][:, :, [0, 10]] = -np.inf
    cotangents[1][:, :, 10] = np.inf  # as the derivative of some function of -inf may be
    got = ours(arrays, cotangents, implementation, scale=0.5)
    cotangents[1][:, :, 10] = 0
    expected = exact(arrays, cotangents, scale=0.5)
    assert_all_close(got[:2], expected[:2])
    assert_all_close(got[2:], expected[2:], 5e-4)  # float32 rounds a logsumexp of 1e4 by that much
    output, logsumexp, d_query, *_, d_bias = got
    assert np.abs(logsumexp[:, :, 1:10]).max() > 9e3
    assert np.all(logsumexp[:, :, [0, 10]] == -np.inf)
    for zero in (output[:, [0, 10]], d_query[:, [0, 10]], d_bias[:, :, [0, 10]]):
        assert np.all(zero == 0)


@pytest.mark.parametrize("implementation", ANYWHERE[1:])
def test_kernels_do_not_compute_what_is_left_out(implementation):
    """Even 0 · NaN would be NaN."""
    (query, key, value, *_), cotangents = random_arrays(batch=1, q_len=16, k_len=24, kv_heads=4)
    keep = np.ones((4, 2, 3), bool)
    keep[:, :, 1] = False
    key[:, 8:16] = value[:, 8:16] = np.nan  # left out by the mask
    key[:, 16:] = value[:, 16:] = np.nan  # by causality
    arrays = [query, key, value, None, None]
    output, _, *gradients = ours(
        arrays, cotangents, implementation, block_mask=keep, is_causal=True
    )
    assert np.isfinite(output).all()
    assert all(np.isfinite(x).all() for x in gradients)


@everywhere
def test_vmap(implementation):
    case = "causal, more queries"
    sizes, options = CASES[case]
    arrays, cotangents = random_arrays(**sizes)
    each = lambda x: None if x is None else x[:, None]
    got = jax.vmap(lambda arrays, cotangents: ours(arrays, cotangents, implementation, **options))(
        [each(x) for x in arrays], [each(x) for x in cotangents]
    )
    assert_all_close([x[:, 0] for x in got], expected_of(case))


@everywhere
def test_batch_and_heads_in_shards(implementation):
    """Bias and slopes are shared by the shards of the batch, and their gradients summed over it."""
    sizes, options = {"batch": 4, "bias": (4, 21, 21), "slopes": True}, {"is_causal": True}
    arrays, cotangents = random_arrays(**sizes)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    of_array, of_row = P("data", None, "tensor"), P("data", "tensor")
    specs = [of_array, of_array, of_array, P("tensor"), P("tensor")]

    def attend(*arrays):
        return jax.shard_map(
            lambda query, key, value, bias, slopes: flash_attention(
                query,
                key,
                value,
                bias=bias,
                alibi_slopes=slopes,
                return_logsumexp=True,
                implementation=implementation,
                block_q=16,
                block_k=16,
                **options,
            ),
            mesh=mesh,
            in_specs=tuple(specs),
            out_specs=(of_array, of_row),
            check_vma=implementation != "pallas_gpu_interpret",  # whose interpreter fails the check
        )(*arrays)

    place = lambda arrays, specs: [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs)
    ]
    got = differentiated(attend, place(arrays, specs), place(cotangents, [of_array, of_row]))
    assert_all_close(got, exact(arrays, cotangents, **options))


@pytest.mark.parametrize("spec", [P("x"), P(None, None, "x")])
def test_xla_is_spread_by_the_compiler(spec):
    sizes = {"batch": 4, "q_len": 70, "k_len": 70, "heads": 8, "kv_heads": 4}
    arrays, cotangents = random_arrays(**sizes)
    sharding = NamedSharding(jax.make_mesh((4,), ("x",)), spec)
    placed = [x if x is None else jax.device_put(x, sharding) for x in arrays]
    got = ours(placed, cotangents, "xla", is_causal=True)
    assert_all_close(got, exact(arrays, cotangents, is_causal=True))
    assert all(x.sharding.is_equivalent_to(sharding, 4) for x in (got[0], *got[2:]))


@everywhere
def test_no_queries(implementation):
    output, logsumexp = flash_attention(
        jnp.zeros((0, 3, 2, 4)),
        jnp.zeros((0, 5, 1, 4)),
        jnp.zeros((0, 5, 1, 6)),
        return_logsumexp=True,
        implementation=implementation,
    )
    assert output.shape == (0, 3, 2, 6)
    assert logsumexp.shape == (0, 2, 3)


def test_scale_has_a_gradient():
    (query, key, value, *_), _ = random_arrays()

    @jax.jit
    def gradients(scale):
        square = lambda attend, scale: jnp.sum(attend(query, key, value, scale=scale) ** 2)
        return [
            jax.grad(functools.partial(square, attend))(scale)
            for attend in (flash_attention, dot_product_attention)
        ]

    ours, theirs = gradients(0.4)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"query": np.zeros((2, 21, 8), np.float32)}, ValueError, "query must have shape"),
        ({"query": np.zeros((2, 21, 3, 8), np.float32)}, ValueError, "heads that divide"),
        ({"key": np.zeros((2, 21, 2, 8), int)}, TypeError, "key must have a floating-point"),
        ({"bias": np.zeros((21, 20), np.float32)}, ValueError, "bias must broadcast"),
        ({"alibi_slopes": np.ones(2, np.float32)}, ValueError, "alibi_slopes must have shape"),
        ({"alibi_slopes": np.ones(4, int)}, TypeError, "alibi_slopes must have a floating"),
        ({"scale": np.ones(2, np.float32)}, ValueError, "scale must have shape"),
        ({"soft_cap": 0.0}, ValueError, "soft_cap must be in"),
        ({"query_segment_ids": SEGMENTS}, ValueError, "must be given together"),
        (
            {"query_segment_ids": SEGMENTS, "key_segment_ids": SEGMENTS[:1]},
            ValueError,
            "key_segment_ids must have shape",
        ),
        (
            {"query_segment_ids": 1.0 * SEGMENTS, "key_segment_ids": SEGMENTS},
            TypeError,
            "query_segment_ids must be integers",
        ),
        ({"block_mask": np.ones((4, 1, 1), bool)}, ValueError, "come with block_q and block_k"),
        (
            {"block_mask": np.ones((4, 2, 3), bool), "block_q": 8, "block_k": 8},
            ValueError,
            r"block_mask must have shape \(4, 3, 3\)",
        ),
        (
            {"block_mask": np.ones((4, 3, 3), int), "block_q": 8, "block_k": 8},
            TypeError,
            "block_mask must be boolean",
        ),
        ({"block_q": 0}, ValueError, "block_q must be in"),
        ({"block_q": 64, "implementation": "pallas_tpu"}, ValueError, "multiple of 128 on a TPU"),
        ({"block_k": 24, "implementation": "pallas_gpu"}, ValueError, "power of two"),
        ({"block_k": 8, "implementation": "pallas_gpu"}, ValueError, "at least 16"),
        ({"implementation": "cudnn"}, ValueError, "implementation must be None or one of"),
    ],
)
def test_bad_input_is_named(changed, error, message):
    (query, key, value, *_), _ = random_arrays()
    given = {"query": query, "key": key, "value": value} | changed
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: flash_attention(**given))


def training(shape, *, bias=None, slopes=False, **options):
    """A function that gives all gradients of attention over `[batch, length, heads, head_dim]`, a
    fourth of whose heads are of keys, and the shapes of its arguments."""
    batch, length, heads, dim = shape
    query = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    key = jax.ShapeDtypeStruct((batch, length, heads // 4, dim), jnp.bfloat16)
    shapes = {"query": query, "key": key, "value": key}
    if bias is not None:
        shapes["bias"] = jax.ShapeDtypeStruct(bias, jnp.float32)
    if slopes:
        shapes["alibi_slopes"] = jax.ShapeDtypeStruct((heads,), jnp.float32)

    def loss(arrays):
        output, logsumexp = flash_attention(**arrays, return_logsumexp=True, **options)
        return jnp.sum(output.astype(jnp.float32) ** 2) + jnp.sum(logsumexp)

    return jax.grad(loss), shapes


def temporary_megabytes(compiled):
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


@pytest.mark.optimized
def test_memory_of_xla_is_linear_in_length():
    def memory(length):
        gradients, shapes = training((1, length, 4, 8), implementation="xla")
        return temporary_megabytes(jax.jit(gradients).lower(shapes).compile())

    assert memory(16384) < 4.5 * memory(4096)
    assert memory(16384) < 0.02 * 4 * 16384**2 * 4 / 2**20  # of all logits


@needs_tpu_compiler
class TestTpuCompiler:
    @pytest.mark.parametrize("chip", TOPOLOGIES)
    def test_kernels_compile(self, chip):
        """All of them, with all options at once, in blocks that compile quickly."""
        length, options = 1000, {"is_causal": True, "soft_cap": 30.0}
        options["query_segment_ids"] = options["key_segment_ids"] = np.zeros((2, length), np.int32)
        options |= {"block_mask": np.ones((4, 8, 4), bool), "block_q": 128, "block_k": 256}
        gradients, shapes = training(
            (2, length, 4, 64),
            bias=(4, length, length),
            slopes=True,
            implementation="pallas_tpu",
            **options,
        )
        compiled = compile_for_tpu(
            chip, lambda *x: gradients(dict(zip(shapes, x))), *shapes.values()
        )
        names = ("forward", "query_gradient", "key_gradients", "bias_gradient")
        assert all(f"flash_attention_{name}" in compiled.as_text() for name in names)

    def test_the_gradient_of_a_bias_that_is_not_used_is_not_computed(self):
        options = {"implementation": "pallas_tpu", "block_q": 128, "block_k": 128}
        gradients, shapes = training((1, 256, 4, 64), bias=(256, 256), **options)
        of_query = lambda *x: gradients(dict(zip(shapes, x)))["query"]
        program = compile_for_tpu("v5e", of_query, *shapes.values()).as_text()
        assert "flash_attention_query_gradient" in program
        assert "flash_attention_bias_gradient" not in program

    @pytest.mark.slow
    def test_memory_is_linear_in_length(self):
        def memory(length):
            gradients, shapes = training(
                (4, length, 16, 128),
                is_causal=True,
                implementation="pallas_tpu",
                block_q=256,
                block_k=256,
            )
            by_order = lambda *x: gradients(dict(zip(shapes, x)))
            return temporary_megabytes(compile_for_tpu("v5e", by_order, *shapes.values()))

        short, long = memory(8192), memory(16384)
        assert long < 2.5 * short
        assert long < 0.02 * 4 * 16 * 16384**2 * 4 / 2**20  # of all logits

    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [
            ({"q_len": 300, "k_len": 70, "dim": 80, "value_dim": 96}, jnp.float32),
            ({"bias": (21, 1)}, jnp.float16),
        ],
    )
    def test_other_shapes_and_types(self, shape, dtype):
        arrays, _ = random_arrays(**shape)
        names = ("query", "key", "value", "bias")
        shapes = [jax.ShapeDtypeStruct(x.shape, dtype) for x in arrays if x is not None]
        loss = lambda *x: jnp.sum(
            flash_attention(**dict(zip(names, x)), implementation="pallas_tpu") ** 2
        )
        compile_for_tpu("v5e", jax.grad(loss, argnums=tuple(range(len(shapes)))), *shapes)


class TestGpuCompiler:
    def test_kernels_lower(self):
        options = {"is_causal": True, "soft_cap": 30.0, "implementation": "pallas_gpu"}
        options["query_segment_ids"] = options["key_segment_ids"] = np.zeros((2, 1000), np.int32)
        options |= {"block_mask": np.ones((8, 16, 32), bool), "block_q": 64, "block_k": 32}
        gradients, shapes = training((2, 1000, 8, 80), bias=(1000, 1), slopes=True, **options)
        program = lower_for_gpu(gradients, shapes)
        names = ("forward", "query_gradient", "key_gradients", "bias_gradient")
        assert all(f"flash_attention_{name}" in program for name in names)
