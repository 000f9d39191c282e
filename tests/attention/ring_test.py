"""Ring attention over virtual devices against attention over the whole sequence in float64."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref.attention import (
    alibi_slopes,
    dot_product_attention,
    into_zigzag,
    out_of_zigzag,
    ring_attention,
    zigzag_positions,
)
from jaxref.bench.ahead_of_time import TOPOLOGIES, one_core
from jaxref.kernels import flash_attention
from tests.kernels.ahead_of_time import needs_tpu_compiler

ROWS = P("data", "sequence", "tensor")
"""Batch, length and heads; an axis that a mesh does not have is left out."""

LENGTH = 16
SEGMENTS = np.array([[0] * 3 + [1] * 7 + [2] * 6, [5] * 12 + [6] * 4])


def random_arrays(batch=2, q_len=LENGTH, k_len=LENGTH, heads=4, kv_heads=2, value_dim=8):
    """Query, key, value, and a cotangent of the output."""
    rng = np.random.default_rng(0)
    shapes = [
        (batch, q_len, heads, 8),
        (batch, k_len, kv_heads, 8),
        (batch, k_len, kv_heads, value_dim),
        (batch, q_len, heads, value_dim),
    ]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def mesh_of(devices=None, **sizes):
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes), devices=devices
    )


def on_mesh(mesh, spec):
    return P(*(axis if axis in mesh.axis_names else None for axis in spec))


def ring(mesh, layout="contiguous", axis_name="sequence", check_vma=True, **options):
    """Attention of whole arrays in the order of `layout`, and a scale, by the devices of a mesh."""
    rows = on_mesh(mesh, ROWS)
    if isinstance(axis_name, tuple):
        rows = P(None, axis_name)
    by_name = {
        "query_segment_ids": P(rows[0], rows[1]),
        "key_segment_ids": P(rows[0], rows[1]),
        "alibi_slopes": P(*rows[2:]),
    }
    extra = {name: jnp.asarray(options.pop(name)) for name in by_name if name in options}

    def attend(query, key, value, scale):
        def of_shard(query, key, value, scale, extra):
            return ring_attention(
                query,
                key,
                value,
                axis_name=axis_name,
                layout=layout,
                scale=scale,
                **extra,
                **options,
            )

        return jax.shard_map(
            of_shard,
            mesh=mesh,
            in_specs=(rows, rows, rows, P(), {name: by_name[name] for name in extra}),
            out_specs=rows,
            check_vma=check_vma,
        )(query, key, value, scale, extra)

    return attend


def zigzag(attend, axis_size):
    """Takes arrays into the layout and the output out of it."""

    def run(query, key, value, scale):
        arrays = (x[:, zigzag_positions(x.shape[1], axis_size)] for x in (query, key, value))
        back = np.argsort(zigzag_positions(query.shape[1], axis_size))
        return attend(*arrays, scale)[:, back]

    return run


def whole(query, key, value, scale, is_causal=False, soft_cap=None, **options):
    """The same attention on one device."""
    q_at, k_at = np.arange(query.shape[1])[:, None], np.arange(key.shape[1])
    slopes, q_ids = options.get("alibi_slopes"), options.get("query_segment_ids")
    if soft_cap is not None:
        return flash_attention(
            query, key, value, scale=scale, is_causal=is_causal, soft_cap=soft_cap, **options
        )
    bias = None if slopes is None else -slopes[:, None, None] * np.abs(q_at - k_at)
    mask = None
    if q_ids is not None:
        mask = (q_ids[:, :, None] == options["key_segment_ids"][:, None])[:, None]
    return dot_product_attention(
        query, key, value, scale=scale, is_causal=is_causal, bias=bias, mask=mask
    )


@functools.partial(jax.jit, static_argnums=0)
def differentiated(attend, query, key, value, cotangent):
    """The output, and the gradients of query, key, value and scale."""
    scale = jnp.asarray(0.4, cotangent.dtype)
    output, pull = jax.vjp(attend, query, key, value, scale)
    return output, *pull(cotangent.astype(output.dtype))


def exact(arrays, **options):
    with jax.enable_x64(True):
        wide = [np.asarray(x).astype(np.float64) for x in arrays]
        return differentiated(functools.partial(whole, **options), *wide)


def assert_all_close(got, expected, tolerance=4e-5):
    for a, b in zip(got, expected, strict=True):
        size = np.abs(b).max(initial=1)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * size)


def with_segments(keys=SEGMENTS, queries=SEGMENTS):
    return {"query_segment_ids": queries, "key_segment_ids": keys}


# Mesh, layout, sizes of the arrays, options.
CASES = {
    "one shard": ({"sequence": 1}, "zigzag", {}, {"is_causal": True}),
    "all see all": (
        {"sequence": 4},
        "zigzag",
        {"k_len": 24, "value_dim": 4},
        {"soft_cap": 1.5},
    ),
    "two axes, and segments of which one has no keys": (
        {"outer": 2, "inner": 2},
        "contiguous",
        {"kv_heads": 1},
        with_segments(np.where(SEGMENTS == 1, 9, SEGMENTS)),
    ),
    "causal, slopes and segments": (
        {"sequence": 8},
        "contiguous",
        {},
        {"is_causal": True, "alibi_slopes": alibi_slopes(4), **with_segments()},
    ),
    "zigzag": ({"sequence": 8}, "zigzag", {}, {"is_causal": True}),
    "batch and heads in shards": (
        {"data": 2, "sequence": 2, "tensor": 2},
        "zigzag",
        {},
        {"is_causal": True, **with_segments()},
    ),
}


@functools.cache
def sharded(case, implementation=None, **more):
    """The attention of a case, for arrays in the order of the sequence."""
    sizes, layout, _, options = CASES[case]
    options = {"axis_name": "sequence" if "sequence" in sizes else tuple(sizes), **options}
    if layout == "zigzag":
        for name in {"query_segment_ids", "key_segment_ids"} & options.keys():
            order = zigzag_positions(LENGTH, sizes["sequence"])
            options[name] = options[name][:, order]
    attend = ring(mesh_of(**sizes), layout, implementation=implementation, **options, **more)
    return zigzag(attend, sizes["sequence"]) if layout == "zigzag" else attend


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_match_attention_over_the_whole(case):
    _, _, sizes, options = CASES[case]
    arrays = random_arrays(**sizes)
    got = differentiated(sharded(case), *arrays)
    assert_all_close(got, exact(arrays, **options))
    if "no keys" in case:
        hidden = SEGMENTS == 1
        assert hidden.any()
        assert np.all(np.asarray(got[0])[hidden] == 0)
        assert np.all(np.asarray(got[1])[hidden] == 0)


@pytest.mark.parametrize("implementation", ["pallas_tpu_interpret", "pallas_gpu_interpret"])
def test_kernels_match(implementation):
    arrays = random_arrays(batch=1, heads=2, kv_heads=1)
    options = {"is_causal": True, "alibi_slopes": alibi_slopes(2)}
    options["query_segment_ids"] = options["key_segment_ids"] = SEGMENTS[:1]
    # The interpreters fail the check of what varies over the mesh; what is compiled passes it.
    mesh = mesh_of(sequence=2)
    attend = ring(mesh, implementation=implementation, check_vma=False, **options)
    assert_all_close(differentiated(attend, *arrays), exact(arrays, **options))


def test_half_precision_is_summed_in_float32():
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in random_arrays()]
    *got, _ = differentiated(sharded("zigzag"), *arrays)
    *expected, _ = exact(arrays, is_causal=True)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        a, b = np.asarray(a, np.float64), np.asarray(b)
        assert np.linalg.norm(a - b) < 5e-3 * np.linalg.norm(b)


def test_huge_logits():
    """Of ±1e4, which float32 holds exactly."""
    query, key, value, cotangent = random_arrays()
    arrays = [100.0 * np.sign(query), 31.25 * np.sign(key), value, cotangent]
    got = differentiated(sharded("zigzag"), *arrays)
    chex.assert_tree_all_finite(got)
    assert_all_close(got[:4], exact(arrays, is_causal=True)[:4], 5e-4)


def test_slopes_are_exact_far_from_the_start():
    """Biases of the whole length, up to 4096 here, would lose three digits of the logits."""
    arrays = random_arrays(1, 512, 512, 1, 1)[:3]
    options = {"is_causal": True, "alibi_slopes": np.array([8.0], np.float32)}
    attend = zigzag(ring(mesh_of(sequence=2), "zigzag", **options), 2)
    output = jax.jit(attend)(*arrays, 0.4)
    with jax.enable_x64(True):
        of_whole = jax.jit(functools.partial(whole, **options))
        expected = np.asarray(of_whole(*(x.astype(np.float64) for x in arrays), 0.4))
    assert_all_close([output], [expected], 3e-6)


def test_float64():
    arrays, slopes = random_arrays(), np.asarray(alibi_slopes(4))
    order = zigzag_positions(LENGTH, 4)
    options = {"is_causal": True, "alibi_slopes": slopes, **with_segments()}
    placed = options | with_segments(SEGMENTS[:, order], SEGMENTS[:, order])
    attend = zigzag(ring(mesh_of(sequence=4), "zigzag", **placed), 4)
    with jax.enable_x64(True):
        got = differentiated(attend, *(x.astype(np.float64) for x in arrays))
        assert all(x.dtype == jnp.float64 for x in got)
    assert_all_close(got, exact(arrays, **options), 1e-12)


def test_no_queries():
    mesh = mesh_of(sequence=2)
    output = ring(mesh, is_causal=True)(*(jnp.zeros((0, 4, 2, 8)) for _ in range(3)), 1.0)
    assert output.shape == (0, 4, 2, 8)


class TestProgram:
    """What is exchanged, kept and computed, of a sequence of 512 over eight shards."""

    LOCAL, HEADS, DIM = 64, 2, 8

    def loss(self, layout, **options):
        attend = ring(mesh_of(sequence=8), layout, is_causal=True, **options)
        return lambda query, key, value: jnp.sum(attend(query, key, value, 0.3) ** 2)

    def shapes(self, mesh):
        shape = (1, 8 * self.LOCAL, self.HEADS, self.DIM)
        sharding = NamedSharding(mesh, on_mesh(mesh, ROWS))
        return [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)] * 3

    def equations(self, jaxpr, path=()):
        """All equations, and those that are inside of one of them, with the path to each."""
        for equation in jaxpr.eqns:
            yield equation, path
            inner = (*path, equation.primitive.name)
            for jaxpr in jaxprs_in_params(equation.params):
                yield from self.equations(jaxpr, inner)

    def products(self, jaxpr):
        """Operations of the matrix products."""
        total = 0
        for equation, _ in self.equations(jaxpr):
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                sizes = [equation.invars[0].aval.shape[axis] for axis in contracted]
                total += 2 * math.prod(sizes) * equation.outvars[0].aval.size
        return total

    @pytest.mark.parametrize("sizes", [{"sequence": 8}, {"data": 2, "sequence": 2, "tensor": 2}])
    def test_only_neighbours_talk(self, sizes):
        mesh = mesh_of(**sizes)
        sharding = NamedSharding(mesh, on_mesh(mesh, ROWS))
        array = jax.ShapeDtypeStruct((2, 32, 4, 8), jnp.float32, sharding=sharding)
        attend = ring(mesh, "zigzag", is_causal=True)
        output = lambda q, k, v: attend(q, k, v, 0.3)
        gradients = lambda q, k, v, g: jax.vjp(output, q, k, v)[1](g)
        for function, arrays in ((output, [array] * 3), (gradients, [array] * 4)):
            program = jax.jit(function).lower(*arrays).compile().as_text()
            assert "collective-permute" in program
            for other in ("all-gather", "all-reduce", "all-to-all", "reduce-scatter"):
                assert other not in program

    def test_what_is_kept_for_the_backward_pass_is_the_shards_own(self):
        mesh = mesh_of(sequence=8)
        attend = ring(mesh, "zigzag", is_causal=True)
        of_whole = lambda *x: attend(*x, 0.3)
        pull = jax.eval_shape(lambda *x: jax.vjp(of_whole, *x)[1], *self.shapes(mesh))
        of_array, of_row = 8 * self.LOCAL * self.HEADS * self.DIM, 8 * self.LOCAL * self.HEADS
        kept = sorted(x.size for x in jax.tree.leaves(pull) if x.size > 8)
        assert kept == [of_row] + 4 * [of_array]

    @pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
    def test_memory_is_that_of_a_block(self, layout):
        """Neither a stack of the ring's keys nor logits of all keys exist."""
        gradients = jax.grad(self.loss(layout), argnums=(0, 1, 2))
        jaxpr = jax.make_jaxpr(gradients)(*self.shapes(mesh_of(sequence=8))).jaxpr
        largest = self.HEADS * self.LOCAL**2  # the logits of a block
        inside = [
            variable.aval.size
            for equation, path in self.equations(jaxpr)
            if "shard_map" in path
            for variable in equation.outvars
        ]
        assert max(inside) == largest
        loops = [
            equation
            for equation, path in self.equations(jaxpr)
            if equation.primitive.name == "scan" and "ppermute" in str(equation.params["jaxpr"])
        ]
        assert len(loops) == 2  # forward and backward
        for loop in loops:
            assert len(loop.outvars) == loop.params["num_carry"]

    @pytest.mark.parametrize("direction", ["forward", "backward"])
    @pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
    def test_work_of_a_step(self, layout, direction):
        """A shard computes all of an earlier block or nothing of a later one, or half of each."""
        function = self.loss(layout)
        function = function if direction == "forward" else jax.grad(function, argnums=(0, 1, 2))
        jaxpr = jax.make_jaxpr(function)(*self.shapes(mesh_of(sequence=8))).jaxpr
        block = (2 if direction == "forward" else 5) * 2 * self.HEADS * self.LOCAL**2 * self.DIM
        conditions = [
            [self.products(branch.jaxpr) for branch in equation.params["branches"]]
            for equation, _ in self.equations(jaxpr)
            if equation.primitive.name == "cond"
        ]
        expected = [0, block] if layout == "contiguous" else [block / 2] * 2
        # In the loop, and in the step after it; for the gradient those of the forward pass as well.
        assert conditions[-2:] == [expected] * 2
        assert len(conditions) == (2 if direction == "forward" else 4)


@needs_tpu_compiler
class TestTpuCompiler:
    def test_keys_travel_while_a_block_is_computed(self):
        from jax.experimental import topologies

        one_core("v5e")  # which prepares the environment
        devices = topologies.get_topology_desc(TOPOLOGIES["v5e"], platform="tpu").devices
        mesh = Mesh(np.array(devices).reshape(4), ("sequence",), axis_types=(AxisType.Auto,))
        sharding = NamedSharding(mesh, on_mesh(mesh, ROWS))
        query, key = (
            jax.ShapeDtypeStruct((1, 2048, heads, 64), jnp.bfloat16, sharding=sharding)
            for heads in (4, 1)
        )
        attend = ring(mesh, "zigzag", is_causal=True, implementation="pallas_tpu")
        gradients = lambda q, k, v, g: jax.vjp(lambda *x: attend(*x, 0.3), q, k, v)[1](g)
        program = jax.jit(gradients).lower(query, key, key, query).compile().as_text()
        for name in ("forward", "query_gradient", "key_gradients"):
            assert f"flash_attention_{name}" in program
        loops = [
            steps
            for steps in program.split("\n}\n")
            if "collective-permute-start(" in steps and "ENTRY" not in steps
        ]
        for steps, sent in zip(loops, (2, 4), strict=True):  # keys and values; their gradients too
            before, after = re.split(r"conditional\(", steps)
            assert before.count("collective-permute-start(") == sent
            assert after.count("collective-permute-done(") == sent


class TestZigzagPositions:
    def test_shards_have_an_early_and_a_late_chunk(self):
        positions = zigzag_positions(24, 4).reshape(4, 2, 3)
        chunks = np.arange(24).reshape(8, 3)
        for i in range(4):
            np.testing.assert_array_equal(positions[i], chunks[[i, 7 - i]])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [((12, 4), "length must be a multiple of 8"), ((8, 0), "axis_size must be in")],
    )
    def test_bad_input_is_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            zigzag_positions(*arguments)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"axis_name": "rows"}, ValueError, "axis_name must be an axis that is mapped .* 'rows'"),
        ({"layout": "striped"}, ValueError, "layout must be one of"),
        ({"query": np.zeros((2, 5, 4, 8), "f")}, ValueError, "as long as query where is_causal, 5"),
        (
            {"query": np.zeros((2, 5, 4, 8), "f"), "is_causal": False, "layout": "zigzag"},
            ValueError,
            "even length in every shard.*got 5 and 4",
        ),
        ({"query": np.zeros((2, 4, 3, 8), "f")}, ValueError, "heads that divide the query's 3"),
        ({"value": np.zeros((2, 5, 2, 8), "f")}, ValueError, "value must have shape"),
        ({"key": np.zeros((2, 4, 2, 8), int)}, TypeError, "key must have a floating-point"),
        ({"scale": np.ones(4, "f")}, ValueError, r"scale must have shape \(\)"),
        ({"soft_cap": 0.0}, ValueError, "soft_cap must be in"),
        ({"alibi_slopes": np.ones(2, "f")}, ValueError, "alibi_slopes must have shape"),
        ({"alibi_slopes": np.ones(4, int)}, TypeError, "alibi_slopes must have a floating"),
        (
            {"alibi_slopes": np.ones(4, "f"), "is_causal": False},
            ValueError,
            "alibi_slopes must come with is_causal",
        ),
        ({"query_segment_ids": np.ones((2, 4), int)}, ValueError, "must be given together"),
        (
            {"query_segment_ids": np.ones((2, 4), int), "key_segment_ids": np.ones((2, 3), int)},
            ValueError,
            "key_segment_ids must have shape",
        ),
        ({"implementation": "cudnn"}, ValueError, "implementation must be None or one of"),
    ],
)
def test_bad_input_is_named(changed, error, message):
    query, key, value, _ = random_arrays(q_len=4, k_len=4)
    given = {"query": query, "key": key, "value": value, "axis_name": "sequence"}
    attend = lambda _: ring_attention(**(given | {"is_causal": True} | changed))
    mesh = mesh_of(sequence=2)
    with pytest.raises(error, match=message):
        jax.shard_map(attend, mesh=mesh, in_specs=P(), out_specs=P("sequence"))(jnp.zeros(()))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_rows_are_exchanged_into_the_zigzag_layout_and_back(size):
    mesh = mesh_of(jax.devices()[:size], sequence=size)

    def mapped(function):
        rows = P(None, "sequence")
        function = functools.partial(function, axis_name="sequence")
        return jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows)

    x = np.arange(2 * 32 * 3).reshape(2, 32, 3)
    zigzag = jax.jit(mapped(into_zigzag))(x)
    np.testing.assert_array_equal(zigzag, x[:, zigzag_positions(32, size)])
    np.testing.assert_array_equal(jax.jit(mapped(out_of_zigzag))(zigzag), x)


def test_an_odd_number_of_rows_has_no_halves():
    with pytest.raises(ValueError, match=r"an even number of rows, .*got \(2, 3\)"):
        into_zigzag(jnp.ones((2, 3)), "sequence")
