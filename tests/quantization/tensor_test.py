import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxref.quantization import QTensor, QuantSpec, dequantize, quantize

ROWS = QuantSpec(bits=4, granularity="channel", axis=0)
BLOCKS = QuantSpec(bits=4, granularity="block", axis=0, block_size=4, symmetric=False)


def random_matrix(shape=(6, 7), seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def assert_trees_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


class TestQuantSpec:
    def test_equal_specs_are_one_static_argument(self):
        traces = []

        def sum_of_codes(x, spec):
            traces.append(spec)
            return quantize(x, spec).codes.sum()

        jitted = jax.jit(sum_of_codes, static_argnums=1)
        for spec in (QuantSpec(bits=4), QuantSpec(bits=4), QuantSpec(bits=5)):
            jitted(jnp.ones(3), spec)
        assert [spec.bits for spec in traces] == [4, 5]

    def test_code_range(self):
        for bits in range(2, 9):
            assert QuantSpec(bits=bits).code_range == (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
        assert QuantSpec(bits=8, symmetric=False).code_range == (-128, 127)

    def test_axes_are_resolved_from_the_end(self):
        spec = QuantSpec(granularity="channel", axis=(-1, 0))
        assert spec.resolve(3).axis == (-3, -1)
        assert spec.resolve(3).resolve(3) == spec.resolve(3)
        assert QuantSpec().resolve(3) == QuantSpec()

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"format": "float"}, ValueError, "format must be one of"),
            ({"format": "float8_e5m2", "bits": 4}, ValueError, "bits and symmetric must be 8 and"),
            ({"format": "float8_e5m2", "symmetric": False}, ValueError, "bits and symmetric must"),
            ({"bits": 1}, ValueError, r"bits must be in \[2, 8\], got 1"),
            ({"bits": 9}, ValueError, r"bits must be in \[2, 8\], got 9"),
            ({"bits": 4.0}, TypeError, "bits must be an int"),
            ({"bits": True}, TypeError, "bits must be an int"),
            ({"granularity": "group"}, ValueError, "granularity must be one of"),
            ({"symmetric": 1}, TypeError, "symmetric must be a bool"),
            ({"axis": 0}, ValueError, "axis must be None"),
            ({"block_size": 8}, ValueError, "block_size must be None"),
            ({"granularity": "channel"}, ValueError, "axis must be given"),
            ({"granularity": "channel", "axis": ()}, ValueError, "axis must be given"),
            ({"granularity": "channel", "axis": [0]}, TypeError, "axis must be an int"),
            ({"granularity": "channel", "axis": (0, 1.0)}, TypeError, "axis must be an int"),
            (
                {"granularity": "channel", "axis": 0, "block_size": 8},
                ValueError,
                "block_size must be None",
            ),
            ({"granularity": "block", "block_size": 8}, ValueError, "axis must be one axis"),
            (
                {"granularity": "block", "axis": (0, 1), "block_size": 8},
                ValueError,
                "axis must be one axis",
            ),
            ({"granularity": "block", "axis": 0}, TypeError, "block_size must be an int"),
            (
                {"granularity": "block", "axis": 0, "block_size": 0},
                ValueError,
                "block_size must be at least 1",
            ),
        ],
    )
    def test_bad_arguments_are_named(self, arguments, error, message):
        with pytest.raises(error, match=message):
            QuantSpec(**arguments)


class TestQTensor:
    def test_shape_and_memory(self):
        q = quantize(random_matrix(), BLOCKS)
        assert q.values.shape == (6, 4)
        assert q.scale.shape == q.zero_point.shape == (2, 7)
        assert (q.shape, q.ndim, q.size, q.dtype) == ((6, 7), 2, 42, jnp.float32)
        assert q.nbytes == 6 * 4 + 2 * 7 * (4 + 1)
        assert quantize(random_matrix(), QuantSpec()).nbytes == 42 + 4

    def test_four_bits_in_blocks_of_64_take_a_seventh_of_float32(self):
        x = random_matrix((64, 128))
        q = quantize(x, QuantSpec(bits=4, granularity="block", axis=0, block_size=64))
        assert q.nbytes == x.nbytes * (4 / 32 + 1 / 64)
        assert q.nbytes < 0.16 * x.nbytes

    def test_is_a_pytree_of_its_arrays(self):
        q = quantize(random_matrix(), BLOCKS)
        assert len(jax.tree.leaves(q)) == 3
        assert len(jax.tree.leaves(quantize(random_matrix(), ROWS))) == 2
        assert_trees_equal(jax.tree.map(lambda a: a, q), q)
        assert_trees_equal(jax.jit(lambda q: q)(q), q)
        abstract = jax.eval_shape(lambda x: quantize(x, BLOCKS), random_matrix())
        assert (abstract.shape, abstract.nbytes) == (q.shape, q.nbytes)

    def test_mapping_over_two_specs_raises(self):
        x = random_matrix()
        with pytest.raises(ValueError, match="QTensor"):
            jax.tree.map(jnp.add, quantize(x, ROWS), quantize(x, BLOCKS))

    @pytest.mark.parametrize("spec", [ROWS, BLOCKS, QuantSpec()], ids=lambda s: s.granularity)
    def test_axes_in_front_from_vmap_and_scan(self, spec):
        stack = random_matrix((3, 6, 7))
        each = [quantize(x, spec) for x in stack]
        q = jax.vmap(lambda x: quantize(x, spec))(stack)
        assert_trees_equal(q, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))
        assert q.shape == stack.shape
        expected = jnp.stack([dequantize(one) for one in each])
        np.testing.assert_array_equal(jax.vmap(dequantize)(q), expected)
        np.testing.assert_array_equal(dequantize(q), expected)
        scanned = jax.lax.scan(lambda carry, one: (carry, dequantize(one)), None, q)[1]
        np.testing.assert_array_equal(scanned, expected)

    def test_gradient_of_the_scale(self):
        q = quantize(random_matrix(), BLOCKS)
        weights = random_matrix(seed=1)
        gradient = jax.grad(
            lambda scale: jnp.sum(weights * dequantize(dataclasses.replace(q, scale=scale)))
        )(q.scale)
        zero_points = np.repeat(np.asarray(q.zero_point, float), 4, axis=0)[:6]
        terms = np.asarray(weights) * (np.asarray(q.codes, float) - zero_points)
        expected = np.stack([terms[:4].sum(0), terms[4:].sum(0)])
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)
        whole = jax.grad(lambda q: jnp.sum(weights * dequantize(q)), allow_int=True)(q)
        np.testing.assert_array_equal(whole.scale, gradient)

    def test_one_sharding_fits_all_arrays(self):
        mesh = jax.make_mesh((8,), ("model",))
        spec = QuantSpec(bits=4, granularity="block", axis=1, block_size=4, symmetric=False)
        q = quantize(random_matrix((16, 20)), spec)
        rows = NamedSharding(mesh, PartitionSpec("model", None))
        sharded = jax.device_put(q, rows)
        assert_trees_equal(sharded, q)
        assert all(leaf.sharding == rows for leaf in jax.tree.leaves(sharded))
        by_leaf = jax.device_put(q, jax.tree.map(lambda _: rows, q))
        assert by_leaf.values.sharding == rows
        restored = jax.jit(dequantize)(sharded)
        assert restored.sharding.is_equivalent_to(rows, 2)
        np.testing.assert_array_equal(restored, dequantize(q))

    def test_checkpoint(self, tmp_path):
        params = {"kernel": quantize(random_matrix(), BLOCKS), "rows": quantize(jnp.ones(3), ROWS)}
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "params", params)
            checkpointer.wait_until_finished()
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, params)
            restored = checkpointer.restore(tmp_path / "params", abstract)
        assert_trees_equal(restored, params)
        np.testing.assert_array_equal(dequantize(restored["kernel"]), dequantize(params["kernel"]))

    def test_codes_from_elsewhere(self):
        values = jnp.array([[1, -2, 3], [4, 5, -6]], jnp.int8)
        q = QTensor(values, jnp.array([[0.5], [2.0]]), None, QuantSpec(), jnp.dtype("bfloat16"))
        restored = dequantize(q)
        assert restored.dtype == jnp.bfloat16
        np.testing.assert_array_equal(restored, [[0.5, -1.0, 1.5], [8.0, 10.0, -12.0]])

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"scale": jnp.ones((3, 7))}, ValueError, r"q.scale must broadcast to shape \(2, 7\)"),
            ({"zero_point": jnp.ones((2, 6), jnp.int8)}, ValueError, "q.zero_point must broadcast"),
            ({"zero_point": None}, ValueError, "q.zero_point must be an array"),
            (
                {"spec": dataclasses.replace(BLOCKS, symmetric=True)},
                ValueError,
                "q.zero_point must be None",
            ),
            (
                {"spec": dataclasses.replace(BLOCKS, block_size=2)},
                ValueError,
                r"q.scale must broadcast to shape \(3, 7\)",
            ),
            ({"spec": dataclasses.replace(BLOCKS, bits=8)}, TypeError, "values of 8 bits"),
        ],
    )
    def test_parts_that_do_not_fit_the_spec_raise(self, change, error, message):
        q = dataclasses.replace(quantize(random_matrix(), BLOCKS), **change)
        with pytest.raises(error, match=message):
            dequantize(q)
