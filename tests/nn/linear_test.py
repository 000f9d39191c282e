import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

from jaxref.nn import Embed, Linear
from jaxref.parallel import logical_sharding, make_mesh, use_rules

CASES = {  # in_features, out_features, einsum over the leading axis a
    "flat": (6, 4, "ai,io->ao"),
    "to_heads": (6, (2, 4), "ai,iop->aop"),
    "from_heads": ((2, 3), 4, "aij,ijo->ao"),
    "between": ((2, 3), (4, 5), "aij,ijop->aop"),
}


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(case, **kwargs):
    inputs, outputs, _ = CASES[case]
    ndim = sum(1 if isinstance(n, int) else len(n) for n in (inputs, outputs))
    return Linear(inputs, outputs, axes=(None,) * ndim, rngs=nnx.Rngs(0), **kwargs)


class LinearNumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(case=list(CASES), leading=((), (3,), (2, 1, 3)))
    def test_matches_einsum(self, case, leading):
        linear = build(case)
        x = random(leading + linear.in_features)
        graphdef, state = nnx.split(linear)
        ours = self.variant(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)
        flat = x.reshape(-1, *linear.in_features)
        expected = np.einsum(CASES[case][2], flat, np.float64(linear.kernel[...]))
        assert ours.shape == leading + linear.out_features
        np.testing.assert_allclose(ours, expected.reshape(ours.shape), rtol=1e-5, atol=1e-6)

    @parameterized.product(case=list(CASES), use_bias=(True, False))
    def test_values_and_gradients_match_flax(self, case, use_bias):
        ours = build(case, use_bias=use_bias)
        theirs = nnx.LinearGeneral(
            ours.in_features,
            ours.out_features,
            axis=tuple(range(-len(ours.in_features), 0)),
            use_bias=use_bias,
            rngs=nnx.Rngs(1),
        )
        theirs.kernel[...] = ours.kernel[...]
        if use_bias:
            ours.bias[...] = theirs.bias[...] = random(ours.out_features, 1)
        x = random((3, 2, *ours.in_features))

        def loss(module, x):
            y = module(x)
            return jnp.sum(y * random(y.shape, 2)), y

        (_, y), (grads, grad_x) = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(ours, x)
        (_, y_flax), (grads_flax, grad_x_flax) = nnx.value_and_grad(
            loss, argnums=(0, 1), has_aux=True
        )(theirs, x)
        chex.assert_trees_all_close(
            (y, grad_x, nnx.to_pure_dict(grads)),
            (y_flax, grad_x_flax, nnx.to_pure_dict(grads_flax)),
            rtol=1e-5,
            atol=1e-5,
        )

    def test_matches_flax_linear(self):
        ours = build("flat")
        theirs = nnx.Linear(6, 4, use_bias=False, rngs=nnx.Rngs(1))
        theirs.kernel[...] = ours.kernel[...]
        x = random((5, 6))
        np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-6)


class TestLinear:
    def test_bias_starts_at_zero_and_is_named_by_the_output(self):
        linear = Linear((2, 3), (4, 5), axes=("a", None, "b", "c"), use_bias=True, rngs=nnx.Rngs(0))
        assert linear.bias.shape == (4, 5)
        assert not linear.bias[...].any()
        assert linear.kernel.get_metadata()["axes"] == ("a", None, "b", "c")
        assert linear.bias.get_metadata()["axes"] == ("b", "c")

    def test_initial_variance_is_that_of_the_flat_matrix(self):
        linear = Linear((4, 64), (8, 16), axes=(None,) * 4, rngs=nnx.Rngs(0))
        np.testing.assert_allclose(np.var(linear.kernel[...]), 1 / 256, rtol=0.05)
        shapes = []
        init = lambda key, shape, dtype: shapes.append(shape) or jnp.zeros(shape, dtype)
        Linear((4, 6), (8, 2), axes=(None,) * 4, kernel_init=init, rngs=nnx.Rngs(0))
        assert shapes == [(24, 16)]

    @pytest.mark.parametrize(
        ("kwargs", "result", "kept"),
        [
            ({}, jnp.float32, jnp.float32),
            ({"dtype": jnp.bfloat16}, jnp.bfloat16, jnp.float32),
            ({"param_dtype": jnp.bfloat16}, jnp.bfloat16, jnp.bfloat16),
            (
                {"dtype": np.dtype("float32"), "param_dtype": jnp.bfloat16},
                jnp.float32,
                jnp.bfloat16,
            ),
        ],
    )
    def test_types(self, kwargs, result, kept):
        linear = build("to_heads", use_bias=True, **kwargs)
        assert linear.kernel.dtype == linear.bias.dtype == kept
        x = random((3, 6))
        for array in (x, jnp.asarray(x, jnp.bfloat16)):
            assert linear(array).dtype == result
        grads = nnx.grad(lambda linear: linear(x).astype(jnp.float32).sum())(linear)
        assert grads.kernel.dtype == kept
        expected = np.einsum("ai,iop->aop", x, np.float64(linear.kernel[...]))
        tolerance = 1e-5 if result == kept == jnp.float32 else 5e-2
        np.testing.assert_allclose(np.float64(linear(x)), expected, atol=tolerance)

    def test_no_rows(self):
        assert build("to_heads")(jnp.ones((0, 3, 6))).shape == (0, 3, 2, 4)

    def test_vmap_equals_the_batch(self):
        linear, x = build("from_heads"), random((4, 3, 2, 3))
        mapped = nnx.vmap(lambda linear, x: linear(x), in_axes=(None, 0))(linear, x)
        np.testing.assert_allclose(mapped, linear(x), rtol=1e-6)

    def test_sharded_rows_and_kernel(self):
        mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
        axes = ("embed", "heads", None)
        linear = Linear(8, (2, 4), axes=axes, rngs=nnx.Rngs(0))
        x = random((4, 3, 8))
        expected = linear(x)
        linear.kernel[...] = jax.device_put(
            linear.kernel[...], logical_sharding(axes, (8, 2, 4), mesh)
        )
        rows = jax.device_put(x, logical_sharding(("batch", None, None), x.shape, mesh))
        ours = nnx.jit(lambda linear, x: linear(x))(linear, rows)
        assert len(ours.sharding.device_set) == 8
        assert not ours.is_fully_replicated
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match=r"axes must name the 3 axes of kernel \(6, 2, 4\)"):
            Linear(6, (2, 4), axes=("embed", "heads"), rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"x must have shape \[..., 6\], got \(3, 5\)"):
            build("flat")(jnp.ones((3, 5)))
        with pytest.raises(ValueError, match=r"x must have shape \[..., 2, 3\], got \(6,\)"):
            build("from_heads")(jnp.ones(6))


class TestEmbed:
    @pytest.fixture
    def table(self):
        return Embed(5, 4, axes=("vocabulary", "embed"), rngs=nnx.Rngs(0))

    @pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.int8, np.uint16])
    def test_looks_rows_up(self, table, dtype):
        ids = np.array([[0, 4, 2], [2, 2, 1]]).astype(dtype)
        rows = np.asarray(table.embedding[...])
        np.testing.assert_array_equal(table(ids), rows[ids])
        np.testing.assert_array_equal(nnx.jit(lambda table, ids: table(ids))(table, ids), rows[ids])
        np.testing.assert_array_equal(table(ids[0, 1]), rows[4])

    def test_matches_flax_and_so_does_the_gradient(self, table):
        theirs = nnx.Embed(5, 4, rngs=nnx.Rngs(1))
        theirs.embedding[...] = table.embedding[...]
        ids = jnp.array([[0, 4, 2], [2, 2, 1]])
        loss = lambda module: jnp.sum(module(ids) * random((2, 3, 4)))
        ours, expected = nnx.value_and_grad(loss)(table), nnx.value_and_grad(loss)(theirs)
        np.testing.assert_allclose(ours[0], expected[0], rtol=1e-6)
        np.testing.assert_allclose(ours[1].embedding[...], expected[1].embedding[...], rtol=1e-6)

    def test_ids_outside_the_table_give_nan_in_their_row_only(self, table):
        rows = table(jnp.array([-1, 0, 5, 4, -6]))
        nans = np.isnan(rows)
        assert nans[[0, 2, 4]].all()
        assert not nans[[1, 3]].any()

    def test_half_precision_adds_the_gradients_of_a_frequent_id_in_the_tables_type(self):
        table = Embed(2, 1, axes=(None, None), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        ids = jnp.zeros(1000, int)
        assert table(ids).dtype == jnp.bfloat16
        grads = nnx.grad(lambda table: table(ids).astype(jnp.float32).sum())(table)
        np.testing.assert_array_equal(grads.embedding[...], [[1000.0], [0.0]])

    def test_parameters(self, table):
        assert table.embedding.get_metadata()["axes"] == ("vocabulary", "embed")
        wide = Embed(
            300, 64, axes=(None, None), rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16
        ).embedding[...]
        assert wide.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.std(np.float32(wide)), 1, rtol=0.05)

    @pytest.mark.parametrize("dtype", [jnp.float32, bool])
    def test_ids_that_are_no_integers_raise(self, table, dtype):
        with pytest.raises(TypeError, match="ids must be integers, got"):
            table(jnp.zeros((2, 3), dtype))


@pytest.mark.parametrize("sizes", [{"tensor": 4, "fsdp": 2}, {"fsdp": 8}, {"tensor": 2, "data": 4}])
def test_rows_of_a_spread_table_are_those_of_a_whole_one(sizes):
    mesh, axes = make_mesh(sizes), ("vocabulary", "embed")
    table = Embed(12, 16, axes=axes, rngs=nnx.Rngs(0))
    ids = np.random.default_rng(0).integers(0, 12, (8, 3))
    ids[0, 0], ids[5, 2] = -1, 12  # of no row
    graphdef, state = nnx.split(table)

    def look_up(state):
        return nnx.merge(graphdef, state)(jnp.asarray(ids))

    def on_mesh(state):
        with use_rules(mesh):
            return look_up(state)

    def gradient(function):
        return jax.tree.leaves(jax.grad(lambda state: jnp.nansum(jnp.sin(function(state))))(state))

    placed = jax.device_put(state, logical_sharding(axes, (12, 16), mesh))
    rows = jax.jit(on_mesh)(placed)
    np.testing.assert_array_equal(rows, look_up(state))
    assert np.isnan(rows[0, 0]).all()
    assert np.isnan(rows[5, 2]).all()
    np.testing.assert_allclose(gradient(jax.jit(on_mesh)), gradient(look_up), atol=1e-6)
