import re
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxref import optimizers
from jaxref.optimizers.blockwise import encode

ORACLE = Path(__file__).parents[1] / "oracles" / "bitsandbytes_blockwise.npz"
CODEBOOKS = {signed: optimizers.dynamic_tree_codebook(signed) for signed in (True, False)}


def nearest(x, codebook):
    """The codes by the definition, in float64; argmin takes the lower of two."""
    x = np.ravel(np.asarray(x, np.float64))
    return np.argmin(np.abs(x[:, None] - np.float64(codebook)), axis=1)


def normal(shape, seed=0, scale=1.0):
    return np.asarray(scale * np.random.default_rng(seed).normal(size=shape), np.float32)


def decades(shape, seed=0):
    """Numbers of either sign, their sizes over three decades."""
    rng = np.random.default_rng(seed)
    return np.float32(rng.normal(size=shape) * 10 ** rng.uniform(-3, 0, size=shape))


def literal_quantize(x, codebook, block_size):
    """What x becomes, block after block, in float64."""
    result = np.zeros(x.shape)
    for start in range(0, len(x), block_size):
        block = x[start : start + block_size]
        absmax = np.abs(block).max() or 1.0
        result[start : start + block_size] = codebook[nearest(block / absmax, codebook)] * absmax
    return result


class NumbersTest(chex.TestCase):
    def test_codebook_by_hand(self):
        signed, unsigned = CODEBOOKS[True], CODEBOOKS[False]
        expected = [0, 5.5e-7, 3.25e-6, 7.75e-6, 2.125e-5]
        np.testing.assert_allclose(signed[127:132], expected, rtol=1e-6)
        np.testing.assert_allclose(signed[126:122:-1], np.negative(expected[1:]), rtol=1e-6)
        np.testing.assert_allclose(unsigned[:4], [0, 3.25e-7, 7.75e-7, 2.125e-6], rtol=1e-6)
        for codebook, steps in ((signed, 64), (unsigned, 128)):
            assert len(set(codebook)) == 256
            assert np.all(np.diff(codebook) > 0)
            assert codebook[-1] == 1
            np.testing.assert_allclose(np.diff(codebook[-20:-1]), 0.9 / steps, rtol=1e-4)
        assert signed[0] > -1

    @parameterized.parameters(True, False)
    def test_codebook_is_that_of_bitsandbytes(self, signed):
        with np.load(ORACLE) as stored:
            theirs = stored["signed_codebook" if signed else "unsigned_codebook"]
        np.testing.assert_allclose(CODEBOOKS[signed], theirs, rtol=2e-7)

    @parameterized.parameters("signed", "unsigned")
    def test_codes_and_scales_are_those_of_bitsandbytes(self, name):
        """Its CPU code looks x / N up in a table of 2^16 cells over [-1, 1], so that its code is
        the nearest to a number that near to x / N."""
        codebook = CODEBOOKS[name == "signed"]
        with np.load(ORACLE) as stored:
            x = stored["x"] if name == "signed" else np.abs(stored["x"])
            block_size = int(stored["block_size"])
            codes, absmax = stored[f"{name}_codes"], stored[f"{name}_absmax"]
            dequantized = stored[f"{name}_dequantized"]
        ours = optimizers.quantize_blockwise(x, codebook, block_size)
        np.testing.assert_array_equal(ours.absmax, absmax)
        normalized = x / np.repeat(absmax, block_size)[: len(x)]
        least, most = (nearest(normalized + d, codebook) for d in (-(2.0**-16), 2.0**-16))
        assert np.all((least <= codes) & (codes <= most))
        same = np.asarray(ours.codes) == codes
        assert same.mean() > 0.98
        values = optimizers.dequantize_blockwise(ours, codebook)
        np.testing.assert_allclose(values[same], dequantized[same], rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(True, False)
    def test_the_code_is_the_nearest(self, signed):
        """At every middle between two entries and the floats beside it, ties down."""
        codebook = CODEBOOKS[signed]
        middles = np.float32((np.float64(codebook[1:]) + codebook[:-1]) / 2)
        beside = [np.nextafter(middles, np.float32(end)) for end in (-2, 2)]
        tiny = np.float32([0.0, -0.0, 1e-30, -1e-30, 2.0**-23, -(2.0**-23), 1.0, -1.0])
        x = np.concatenate([middles, *beside, codebook, tiny, np.linspace(-1, 1, 999)])
        x = np.float32(x if signed else x[x >= 0])
        expected = nearest(x, codebook)
        np.testing.assert_array_equal(self.variant(partial(encode, signed=signed))(x), expected)
        # 1 is in every block, so that the scales are 1.
        blocks = np.append(x, np.float32(1))
        quantize = partial(optimizers.quantize_blockwise, codebook=codebook, block_size=10_000)
        q = self.variant(quantize)(blocks)
        np.testing.assert_array_equal(q.codes[:-1], expected)
        assert q.codes.dtype == jnp.uint8

    @parameterized.parameters(1, 7, 64, 2048)
    def test_values_in_blocks_match_the_definition(self, block_size):
        x = decades((3, 5, 20))
        q = optimizers.quantize_blockwise(x, CODEBOOKS[True], block_size)
        assert q.codes.shape == x.shape
        assert q.absmax.shape == (-(-300 // block_size),)
        assert q.absmax.dtype == jnp.float32
        expected = literal_quantize(np.ravel(x), CODEBOOKS[True], block_size).reshape(x.shape)
        ours = optimizers.dequantize_blockwise(q, CODEBOOKS[True])
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-12)

    def test_any_codebook(self):
        linear = np.linspace(-1, 1, 17)
        x = normal(50)
        q = optimizers.quantize_blockwise(x, linear, 50)
        np.testing.assert_array_equal(q.codes, nearest(x / np.abs(x).max(), linear))

    @parameterized.parameters({}, {"b1": 0.8, "b2": 0.95, "eps": 1e-3})
    def test_twenty_steps_of_adam_match_a_literal_one(self, **setting):
        """All but entries of which rounding in float32 chose the other one of two codes."""
        b1, b2, eps = (setting.get(k, d) for k, d in (("b1", 0.9), ("b2", 0.999), ("eps", 1e-8)))
        quantized = {"block_size": 64, "min_quantized_size": 1}
        optimizer = optimizers.adam_8bit(0.01, weight_decay=0.1, **quantized, **setting)
        x = jnp.asarray(normal(300))
        state, update = optimizer.init(x), jax.jit(optimizer.update)
        expected, m, v = np.float64(x), np.zeros(300), np.zeros(300)
        for t in range(1, 21):
            g = decades(300, seed=t)
            updates, state = update(jnp.asarray(g), state, x)
            x = optax.apply_updates(x, updates)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * np.float64(g) ** 2
            u = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
            expected -= 0.01 * (u + 0.1 * expected)
            m = literal_quantize(m, CODEBOOKS[True], 64)
            v = literal_quantize(v, CODEBOOKS[False], 64)
        assert np.isclose(x, expected, rtol=1e-5, atol=1e-6).mean() > 0.98
        np.testing.assert_allclose(x, expected, atol=2e-3)

    def test_twenty_steps_of_momentum_match_a_literal_one(self):
        optimizer = optimizers.momentum_8bit(
            0.01, 0.8, block_size=64, min_quantized_size=1, weight_decay=0.1
        )
        x = jnp.asarray(normal(300))
        state, update = optimizer.init(x), jax.jit(optimizer.update)
        expected, m = np.float64(x), np.zeros(300)
        for t in range(1, 21):
            g = decades(300, seed=t)
            updates, state = update(jnp.asarray(g), state, x)
            x = optax.apply_updates(x, updates)
            m = 0.8 * m + g
            expected -= 0.01 * (m + 0.1 * expected)
            m = literal_quantize(m, CODEBOOKS[True], 64)
        assert np.isclose(x, expected, rtol=1e-5, atol=1e-6).mean() > 0.98
        np.testing.assert_allclose(x, expected, atol=2e-3)

    def test_small_parameters_follow_optax(self):
        """min_quantized_size is 4096: these have fewer entries."""
        x = {"kernel": jnp.asarray(normal((63, 65))), "bias": jnp.asarray(normal(63, seed=1))}
        for ours, theirs in (
            (
                optimizers.adam_8bit(0.01, weight_decay=0.1, mask={"kernel": True, "bias": False}),
                optax.adamw(0.01, weight_decay=0.1, mask={"kernel": True, "bias": False}),
            ),
            (optimizers.momentum_8bit(0.01), optax.sgd(0.01, momentum=0.9)),
        ):
            a = b = x
            state, their_state = ours.init(a), theirs.init(b)
            update, their_update = jax.jit(ours.update), jax.jit(theirs.update)
            for t in range(20):
                g = jax.tree.map(lambda x, t=t: jnp.asarray(decades(x.shape, seed=t)), x)
                updates, state = update(g, state, a)
                their_updates, their_state = their_update(g, their_state, b)
                a = optax.apply_updates(a, updates)
                b = optax.apply_updates(b, their_updates)
            chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-6)

    @parameterized.parameters(
        ((3 * 2**17 + 5,), 2048),  # a block and a piece that are not full
        ((700, 601), 100),  # blocks that do not divide, more than one row of the array
        ((2048, 1024), 2048),  # several pieces of all segments
        ((64, 48), 4096),  # one block, not full
    )
    def test_large_leaves_are_updated_piece_by_piece(self, shape, block_size):
        """u = m = μ m̃ + g, so that the new state must be the direction, quantized."""
        size = {"block_size": block_size}
        optimizer = optimizers.scale_by_momentum_8bit(0.7, min_quantized_size=1, **size)
        old = optimizers.quantize_blockwise(decades(shape), CODEBOOKS[True], **size)
        g = jnp.asarray(decades(shape, seed=1))
        state = optimizers.ScaleByMomentum8bitState(old.codes, old.absmax)
        u, state = jax.jit(optimizer.update)(g, state)
        expected = 0.7 * optimizers.dequantize_blockwise(old, CODEBOOKS[True]) + g
        np.testing.assert_allclose(u, expected, rtol=1e-5, atol=1e-7)
        new = optimizers.quantize_blockwise(u, CODEBOOKS[True], **size)
        np.testing.assert_array_equal(state.trace, new.codes)
        np.testing.assert_array_equal(state.trace_absmax, new.absmax)


def regression():
    """A network of two layers on a smooth function: its parameters and loss."""
    inputs = jnp.asarray(normal((256, 16)))
    labels = jnp.sin(inputs[:, :4].sum(1)) + inputs[:, 4] * inputs[:, 5]
    params = {
        "hidden": jnp.asarray(normal((16, 128), seed=1, scale=0.3)),
        "middle": jnp.asarray(normal((128, 64), seed=2, scale=0.1)),
        "out": jnp.asarray(normal(64, seed=3, scale=0.1)),
    }

    def loss(p):
        hidden = jnp.tanh(inputs @ p["hidden"])
        return jnp.mean((jnp.tanh(hidden @ p["middle"]) @ p["out"] - labels) ** 2)

    return params, loss


def trained(optimizer, steps):
    params, loss = regression()

    def one(carry, _):
        params, state = carry
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    return jax.jit(lambda c: jax.lax.scan(one, c, length=steps))((params, optimizer.init(params)))


class TestClaims:
    @pytest.mark.claim("eight-bit-blockwise-optimizers")
    def test_an_outlier_costs_only_its_block_and_training_is_as_in_32_bits(self):
        x, codebook = normal(4096, scale=1e-3), CODEBOOKS[True]
        outlier = x.copy()
        outlier[5] = 1e4

        def errors(x, block_size):
            q = optimizers.quantize_blockwise(x, codebook, block_size)
            return np.abs(optimizers.dequantize_blockwise(q, codebook) - x)

        np.testing.assert_array_equal(errors(outlier, 256)[256:], errors(x, 256)[256:])
        assert errors(outlier, 4096)[256:].mean() > 20 * errors(x, 4096)[256:].mean()

        schedule = optax.cosine_decay_schedule(0.01, 300)
        _, expected = trained(optax.adamw(schedule, weight_decay=0.01), 300)
        ours = optimizers.adam_8bit(
            schedule, weight_decay=0.01, block_size=256, min_quantized_size=1024
        )
        (_, state), losses = trained(ours, 300)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state[0].mu)} == {"uint8", "float32"}
        assert expected[-1] < 0.05 * expected[0]
        np.testing.assert_allclose(losses[-20:].mean(), expected[-20:].mean(), rtol=0.02)

    def test_momentum_trains_as_in_32_bits(self):
        _, expected = trained(optax.sgd(0.01, momentum=0.9), 100)
        _, losses = trained(optimizers.momentum_8bit(0.01, min_quantized_size=1024), 100)
        assert expected[-1] < 0.3 * expected[0]
        np.testing.assert_allclose(losses[-1], expected[-1], rtol=0.02)

    def test_the_largest_entry_and_what_was_quantized_stay(self):
        """A block keeps its codes the second time if its largest entry is positive: 1 is an entry
        of the codebook, -1 is not."""
        x = np.clip(decades(1000), -1, 1)
        x[::100] = 1.5
        again = x
        for _ in range(2):
            q = optimizers.quantize_blockwise(again, CODEBOOKS[True], 100)
            again = optimizers.dequantize_blockwise(q, CODEBOOKS[True])
            np.testing.assert_array_equal(again[::100], 1.5)
        first = optimizers.quantize_blockwise(x, CODEBOOKS[True], 100)
        chex.assert_trees_all_equal(q, first)
        negative = optimizers.quantize_blockwise(-x, CODEBOOKS[True], 100)
        values = optimizers.dequantize_blockwise(negative, CODEBOOKS[True])
        np.testing.assert_allclose(values[::100], 1.5 * CODEBOOKS[True][0], rtol=1e-6)

    def test_small_magnitudes_are_finer_than_in_linear_quantization(self):
        x = normal(20_000)
        relative = {}
        for name, codebook in (
            ("dynamic", CODEBOOKS[True]),
            ("linear", np.arange(-127, 128) / 127),
        ):
            q = optimizers.quantize_blockwise(x, codebook)
            relative[name] = np.abs(optimizers.dequantize_blockwise(q, codebook) / x - 1)
        small = np.abs(x) < 0.1
        assert relative["dynamic"][small].mean() < 0.5 * relative["linear"][small].mean()
        assert relative["dynamic"].mean() < 0.5 * relative["linear"].mean()


class TestMemory:
    def nbytes(self, tree):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    def test_two_bytes_a_parameter(self):
        params = {
            "kernel": jnp.zeros((1024, 512)),
            "out": jnp.zeros((512, 64)),
            "b": jnp.zeros(512),
        }
        ours = jax.eval_shape(optimizers.adam_8bit(0.1).init, params)
        adam = jax.eval_shape(optax.adam(0.1).init, params)
        assert self.nbytes(ours) <= 0.27 * self.nbytes(adam)
        kernel = ours[0].mu["kernel"], ours[0].nu["kernel"]
        assert {(x.shape, x.dtype.name) for x in kernel} == {((1024, 512), "uint8")}
        assert ours[0].mu_absmax["kernel"].shape == ours[0].nu_absmax["kernel"].shape == (256,)
        momentum = jax.eval_shape(optimizers.momentum_8bit(0.1).init, params)
        assert self.nbytes(momentum) <= 0.27 * self.nbytes(adam) / 2

    @pytest.mark.parametrize("shape", [(8192, 8192), (2**26 + 77,), (8191, 8193)], ids=str)
    @pytest.mark.optimized
    def test_no_large_leaf_is_dequantized_at_once(self, shape):
        """An eighth of Adam's float32 state, 8 bytes a parameter, is the most that may be alive."""
        optimizer = optimizers.adam_8bit(0.1, weight_decay=0.1)
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        update = jax.jit(optimizer.update, donate_argnums=1)
        compiled = update.lower(x, jax.eval_shape(optimizer.init, x), x).compile()
        assert compiled.memory_analysis().temp_size_in_bytes <= 64 * 2**20


class TestSharding:
    @pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
    @pytest.mark.optimized
    def test_rows_of_whole_blocks_stay_on_their_devices(self, axis_type):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
        rows = NamedSharding(mesh, PartitionSpec("data"))
        everywhere = NamedSharding(mesh, PartitionSpec())
        optimizer = optimizers.adam_8bit(0.1, block_size=256, weight_decay=0.1)
        x, g = (jnp.asarray(normal((512, 1024), seed=seed)) for seed in range(2))  # four pieces
        like_x = lambda leaf: rows if leaf.shape == x.shape else everywhere
        state = optimizer.init(x)
        expected = optimizer.update(g, state, x)
        update = jax.jit(optimizer.update)
        arguments = jax.tree.map(lambda leaf: jax.device_put(leaf, like_x(leaf)), (g, state, x))
        ours = update(*arguments)
        chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-6)
        for leaf in jax.tree.leaves(ours):
            assert leaf.shape != x.shape or leaf.sharding.is_equivalent_to(rows, 2)
        program = update.lower(*arguments).compile().as_text()
        sent = re.findall(r" = (.*) (?:all-|collective-|reduce-scatter)[\w-]*\(", program)
        sizes = {shape for kinds in sent for shape in re.findall(r"\[([\d,]*)\]", kinds)}
        assert sizes <= {"2048"}  # the scales

    def test_other_shardings_give_the_same_numbers(self):
        mesh = jax.make_mesh((4, 2), ("data", "model"))
        optimizer = optimizers.adam_8bit(0.1, block_size=100, min_quantized_size=1)
        x, g = (jnp.asarray(normal((16, 24), seed=seed)) for seed in range(2))
        expected = optimizer.update(g, optimizer.init(x), x)
        for spec in (("model", "data"), (None, "model"), (("data", "model"), None)):
            sharding = NamedSharding(mesh, PartitionSpec(*spec))
            sharded, gradient = jax.device_put((x, g), sharding)
            ours = jax.jit(optimizer.update)(gradient, optimizer.init(sharded), sharded)
            chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-6)


class TestTransformations:
    def test_quantize_and_dequantize_under_vmap(self):
        x, codebook = decades((3, 50)), CODEBOOKS[True]
        quantize = partial(optimizers.quantize_blockwise, codebook=codebook, block_size=20)
        q = jax.vmap(quantize)(x)
        chex.assert_trees_all_equal(q, jax.tree.map(lambda *a: jnp.stack(a), *map(quantize, x)))
        values = jax.vmap(partial(optimizers.dequantize_blockwise, codebook=codebook))(q)
        np.testing.assert_array_equal(
            values[1], optimizers.dequantize_blockwise(quantize(x[1]), codebook)
        )

    def test_update_under_vmap_in_pieces(self):
        optimizer = optimizers.scale_by_adam_8bit()
        g = jnp.asarray(decades((2, 2**17 + 2048)))
        states = [optimizer.init(row) for row in g]
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *states)
        ours = jax.vmap(optimizer.update)(g, stacked)
        alone = [optimizer.update(row, state) for row, state in zip(g, states)]
        expected = jax.tree.map(lambda *a: jnp.stack(a), *alone)
        chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision(self, dtype):
        x = jnp.asarray(decades(4096), dtype)
        wide = x.astype(jnp.float32)
        q, expected = (optimizers.quantize_blockwise(a, CODEBOOKS[True]) for a in (x, wide))
        chex.assert_trees_all_equal(q, expected)
        optimizer = optimizers.scale_by_adam_8bit()
        ours, state = optimizer.update(x, optimizer.init(x))
        updates, expected_state = optimizer.update(wide, optimizer.init(wide))
        chex.assert_trees_all_equal((ours, state), (updates.astype(dtype), expected_state))

    def test_injected_hyperparameters_are_traced_and_sizes_static(self):
        x = jnp.asarray(normal(4096))
        build = optimizers.adam_8bit
        with pytest.raises(TypeError, match="block_size must be an int"):
            optax.inject_hyperparams(build)(0.1).init(x)
        static = ("block_size", "min_quantized_size")
        optimizer = optax.inject_hyperparams(build, static_args=static)(0.1, b1=0.5)
        updates, _ = jax.jit(optimizer.update)(x, optimizer.init(x), x)
        plain = build(0.1, b1=0.5)
        np.testing.assert_allclose(updates, plain.update(x, plain.init(x), x)[0], rtol=1e-5)


class TestEdges:
    def test_which_parameters_are_quantized(self):
        x = {"embed": {"table": jnp.ones((64, 64))}, "out": jnp.ones((64, 64)), "b": jnp.ones(4095)}
        codes = lambda **kwargs: [
            leaf.dtype == jnp.uint8
            for leaf in jax.tree.leaves(optimizers.adam_8bit(0.1, **kwargs).init(x)[0].mu)
        ]
        assert codes() == [False, True, True]
        assert codes(full_precision="^embed/table$") == [False, False, True]
        assert codes(full_precision=lambda path: path == "out") == [False, True, False]
        assert codes(min_quantized_size=1) == [True, True, True]
        assert codes(min_quantized_size=4097) == [False, False, False]

    @pytest.mark.parametrize("scale", [1e-12, 1e12])
    def test_no_size_of_gradients_matters(self, scale):
        optimizer = optimizers.scale_by_adam_8bit(eps=0.0)
        g = jnp.asarray(normal(4096))
        u, state = optimizer.update(g, optimizer.init(g))
        scaled, scaled_state = optimizer.update(scale * g, optimizer.init(g))
        np.testing.assert_allclose(scaled, u, rtol=1e-5)
        assert np.mean(scaled_state.mu == state.mu) > 0.99  # but for roundings of scale * g

    def test_extreme_numbers(self):
        x = jnp.array([3e38, -3e38, 1.0, 0.0, 0.0, 0.0, 1e-37, -1e-37, 5e-38])
        q = optimizers.quantize_blockwise(x, CODEBOOKS[True], 3)
        values = optimizers.dequantize_blockwise(q, CODEBOOKS[True])
        expected = [3e38, -2.9789e38, 0, 0, 0, 0, 1e-37, -9.9297e-38, 5.0078e-38]
        np.testing.assert_allclose(values, expected, rtol=1e-4)
        assert q.codes[3] == 127

    def test_gradients_that_are_zero_now_and_then(self):
        optimizer = optimizers.scale_by_adam_8bit(block_size=64)
        g = jnp.asarray(normal(4096)).at[:64].set(0.0)
        state = optimizer.init(g)
        for gradient in (g, jnp.zeros_like(g), -g):
            u, state = optimizer.update(gradient, state)
            np.testing.assert_array_equal(u[:64], 0)
            assert np.all(np.isfinite(u))

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_gradients_that_are_not_finite_show_in_their_block(self, value):
        g = jnp.asarray(normal(4096)).at[100].set(value)
        for optimizer in (optimizers.scale_by_adam_8bit(), optimizers.scale_by_momentum_8bit()):
            _, state = optimizer.update(g, optimizer.init(g))
            u, _ = optimizer.update(jnp.zeros_like(g), state)
            assert not np.isfinite(u[100])
            assert np.all(np.isfinite(u[2048:]))
        q = optimizers.quantize_blockwise(g, CODEBOOKS[True], 2048)
        np.testing.assert_array_equal(np.isfinite(q.absmax), [False, True])

    def test_scalars_and_nothing(self):
        for x in (jnp.array(-2.0), jnp.zeros((0, 3)), jnp.array([4.0])):
            q = optimizers.quantize_blockwise(x, CODEBOOKS[True], 4)
            assert q.absmax.shape == (min(x.size, 1),)
            values = optimizers.dequantize_blockwise(q, CODEBOOKS[True])
            assert values.shape == x.shape
            np.testing.assert_allclose(values, x, rtol=0.01)
            optimizer = optimizers.scale_by_adam_8bit(min_quantized_size=1, block_size=4)
            u, _ = optimizer.update(x, optimizer.init(x))
            np.testing.assert_allclose(u, jnp.sign(x), rtol=1e-5)

    def test_the_codebook_that_is_returned_is_the_callers(self):
        codebook = optimizers.dynamic_tree_codebook()
        codebook[:] = 0
        assert optimizers.dynamic_tree_codebook()[-1] == 1


def quantized():
    return optimizers.quantize_blockwise(jnp.ones(10), CODEBOOKS[True], 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: optimizers.adam_8bit(0.1, b1=1.0), ValueError, r"b1 must be in \[0, 1\)"),
        (lambda: optimizers.adam_8bit(0.1, b2=-0.1), ValueError, r"b2 must be in \[0, 1\)"),
        (lambda: optimizers.adam_8bit(0.1, eps=-1.0), ValueError, "eps must be in"),
        (lambda: optimizers.adam_8bit(0.1, block_size=0), ValueError, "block_size must be in"),
        (lambda: optimizers.adam_8bit(0.1, block_size=2.0), TypeError, "block_size must be an int"),
        (
            lambda: optimizers.adam_8bit(0.1, min_quantized_size=0),
            ValueError,
            "min_quantized_size must be in",
        ),
        (
            lambda: optimizers.adam_8bit(0.1, full_precision=["embed"]),
            TypeError,
            "full_precision must be a regular expression or a predicate",
        ),
        (lambda: optimizers.momentum_8bit(0.1, 1.0), ValueError, r"momentum must be in \[0, 1\)"),
        (lambda: optimizers.momentum_8bit(0.1, np.nan), ValueError, "momentum must be in"),
        (
            lambda: optimizers.quantize_blockwise(jnp.ones(3), CODEBOOKS[True], 0),
            ValueError,
            "block_size must be in",
        ),
        (
            lambda: optimizers.quantize_blockwise(jnp.arange(3), CODEBOOKS[True]),
            TypeError,
            "x must have a floating-point type",
        ),
        (
            lambda: optimizers.quantize_blockwise(jnp.ones(3), np.zeros(4)),
            ValueError,
            "codebook must be at most 256 increasing numbers",
        ),
        (
            lambda: optimizers.quantize_blockwise(jnp.ones(3), np.linspace(-1, 1, 257)),
            ValueError,
            r"codebook must be at most 256 increasing numbers, got shape \(257,\)",
        ),
        (
            lambda: optimizers.quantize_blockwise(jnp.ones(3), np.array([0.0, 2.0])),
            ValueError,
            r"codebook must be in \[-1, 1\]",
        ),
        (
            lambda: optimizers.dequantize_blockwise(
                optimizers.BlockQuantized(quantized().codes, jnp.ones(2), 4), CODEBOOKS[True]
            ),
            ValueError,
            r"absmax must have shape \(3,\), got \(2,\)",
        ),
    ],
)
def test_bad_input_raises(call, error, message):
    with pytest.raises(error, match=message):
        call()
