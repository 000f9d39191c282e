from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref.nn import QuasiLSTM, QuasiLSTMBlock, quasi_lstm

ORACLE = np.load(Path(__file__).parents[1] / "oracles" / "quasi_lstm.npz")
BATCH, LENGTH, HEADS, HEAD_DIM = 2, 12, 2, 3
IMPLEMENTATIONS = ("block", "scan", "associative")


def random_inputs(length=LENGTH, batch=BATCH, seed=0):
    """The four logits, and a state."""
    rng = np.random.default_rng(seed)
    shape = (batch, length, HEADS, HEAD_DIM)
    logits = [2 * rng.normal(size=shape).astype(np.float32) for _ in range(4)]
    c, h = rng.normal(size=(2, batch, HEADS, HEAD_DIM)).astype(np.float32)
    return logits, (c, h)


def quasi_lstm64(logits, state):
    """The recurrence in float64."""
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    f, i, z, o = (np.asarray(x, np.float64) for x in logits)
    f, i, z, o = sigmoid(f), sigmoid(i), np.tanh(z), sigmoid(o)
    c, outputs = np.asarray(state[0], np.float64), []
    for t in range(f.shape[1]):
        c = f[:, t] * c + i[:, t] * z[:, t]
        outputs.append(o[:, t] * np.tanh(c))
    return np.stack(outputs, 1), c


def oracle_block(**options):
    """The block with the authors' parameters."""
    block = QuasiLSTMBlock(6, 10, 2, 3, num_layers=4, **options, rngs=nnx.Rngs(0))
    linears = {
        "rnn.linear_Fx": block.lstm.forget,
        "rnn.linear_Ix": block.lstm.input,
        "rnn.linear_Zx": block.lstm.candidate,
        "rnn.linear_Ox": block.lstm.output,
        "rnn.linear_post_head": block.lstm.projection,
        "mlp.c_fc": block.mlp.up,
        "mlp.c_proj": block.mlp.down,
    }
    for name, linear in linears.items():
        linear.kernel[...] = ORACLE[f"param_{name}.weight"].T.reshape(linear.kernel.shape)
        linear.bias[...] = ORACLE[f"param_{name}.bias"].reshape(linear.bias.shape)
    for name, norm in (("ln1", block.lstm_norm), ("ln2", block.mlp_norm)):
        norm.scale[...], norm.bias[...] = (ORACLE[f"param_{name}.{n}"] for n in ("weight", "bias"))
    return block


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*IMPLEMENTATIONS)
    def test_values_match_the_recurrence(self, implementation):
        logits, state = random_inputs()
        expected, expected_c = quasi_lstm64(logits, state)
        run = self.variant(lambda *a: quasi_lstm(*a, block_length=4, implementation=implementation))
        h, (last_c, last_h) = run(*logits, state)
        np.testing.assert_allclose(h, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(last_c, expected_c, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(last_h, h[:, -1])

    def test_block_matches_the_authors_on_two_segments(self):
        block = oracle_block(block_length=4, implementation="block")

        @nnx.jit
        def run(block, x):
            def segments(block, x):
                _, state = block(x[0])
                y, state = block(x[1], state)
                return jnp.sum(y * ORACLE["cotangent"]), (y, state)

            return nnx.value_and_grad(segments, argnums=(0, 1), has_aux=True)(block, x)

        (_, (y, (c, h))), (grads, grad_x) = run(block, ORACLE["x"])
        np.testing.assert_allclose(y, ORACLE["y"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(c, ORACLE["c"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(h, ORACLE["h"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(grad_x, ORACLE["grad_x"], rtol=1e-3, atol=1e-3)
        for ours, name in (
            (grads.lstm.forget.kernel, "rnn.linear_Fx"),
            (grads.lstm.candidate.kernel, "rnn.linear_Zx"),
            (grads.lstm.projection.kernel, "rnn.linear_post_head"),
        ):
            expected = ORACLE[f"grad_{name}.weight"].T.reshape(ours.shape)
            np.testing.assert_allclose(ours[...], expected, rtol=1e-3, atol=1e-3)


class TestClaims:
    @pytest.mark.claim("languini-quasi-lstm")
    def test_blocks_of_any_length_and_segments_give_the_recurrence(self):
        """Gates that do not see the state make the steps of a block one product: the same states
        and gradients as step by step, in one piece or in two with the state carried on."""
        logits, state = random_inputs()
        weights = random_inputs(seed=1)[0][0]

        def value_and_gradients(**options):
            def loss(logits, state):
                h, last = quasi_lstm(*logits, state, **options)
                return jnp.sum(weights * h), (h, last)

            run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
            (_, states), gradients = run(logits, state)
            return states, gradients

        expected = value_and_gradients(implementation="scan")
        for options in (
            *({"block_length": k, "implementation": "block"} for k in (1, 4, 12)),
            {"implementation": "associative"},
        ):
            chex.assert_trees_all_close(
                value_and_gradients(**options), expected, rtol=1e-4, atol=1e-5
            )
        run = jax.jit(lambda *a: quasi_lstm(*a, block_length=3, implementation="block"))
        first, middle = run(*(x[:, :6] for x in logits), state)
        second, last = run(*(x[:, 6:] for x in logits), middle)
        np.testing.assert_allclose(
            np.concatenate([first, second], 1), expected[0][0], rtol=1e-4, atol=1e-5
        )
        chex.assert_trees_all_close(last, expected[0][1], rtol=1e-4, atol=1e-5)
        changed = [x.copy() for x in logits]
        changed[0][:, 7:] -= 1e4  # forgets everything from step 7 on
        h = np.concatenate([first, run(*(x[:, 6:] for x in changed), middle)[0]], 1)
        alone = [1 / (1 + np.exp(-x)) for x in (logits[1], logits[3])]
        expected_alone = alone[1] * np.tanh(alone[0] * np.tanh(logits[2]))
        np.testing.assert_allclose(h[:, 7:], expected_alone[:, 7:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestEdges:
    def test_extreme_logits_stay_finite_and_right(self, implementation):
        logits, state = random_inputs()
        signs = np.random.default_rng(2).choice([-1, 1], size=logits[0].shape)
        for size in (0.0, 1e4):
            extreme = [np.float32(size * signs), *logits[1:]]
            run = lambda *a: quasi_lstm(*a, block_length=6, implementation=implementation)[0]
            h, vjp = jax.vjp(run, *extreme, state)
            with np.errstate(over="ignore"):
                expected, _ = quasi_lstm64(extreme, state)
            np.testing.assert_allclose(h, expected, rtol=1e-5, atol=1e-6)
            assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(vjp(jnp.ones_like(h))))

    def test_half_precision_keeps_a_wide_state(self, implementation):
        logits, state = random_inputs()
        half = [jnp.asarray(x, jnp.bfloat16) for x in logits]
        options = {"block_length": 4, "implementation": implementation}
        h, (c, _) = quasi_lstm(*half, state, **options)
        assert (h.dtype, c.dtype) == (jnp.bfloat16, jnp.float32)
        wide, (wide_c, _) = quasi_lstm(*(x.astype(jnp.float32) for x in half), state, **options)
        np.testing.assert_array_equal(h, wide.astype(jnp.bfloat16))
        np.testing.assert_array_equal(c, wide_c)

    def test_sharded_batch(self, implementation):
        logits, state = random_inputs(batch=8)
        sharding = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
        run = jax.jit(lambda *a: quasi_lstm(*a, block_length=4, implementation=implementation))
        ours = run(*jax.device_put((*logits, state), sharding))
        chex.assert_trees_all_close(ours, run(*logits, state), rtol=1e-5, atol=1e-6)


class TestModules:
    def test_initial_values(self):
        block = QuasiLSTMBlock(64, 256, 2, 32, num_layers=8, rngs=nnx.Rngs(0))
        for linear, deviation in (
            (block.lstm.forget, 0.02),
            (block.lstm.projection, 0.02),
            (block.mlp.up, 0.02),
            (block.mlp.down, 0.005),
        ):
            np.testing.assert_allclose(linear.kernel[...].std(), deviation, rtol=0.05)
            np.testing.assert_array_equal(linear.bias[...], 0)
        assert block.lstm.forget.kernel.get_metadata()["axes"] == ("embed", "heads", None)

    def test_state_starts_at_zero_and_forget_gates_open(self):
        layer = QuasiLSTM(4, HEADS, HEAD_DIM, block_length=3, rngs=nnx.Rngs(0))
        x = np.random.default_rng(0).normal(size=(BATCH, 6, 4)).astype(np.float32)
        zero = np.zeros((BATCH, HEADS, HEAD_DIM), np.float32)
        chex.assert_trees_all_close(layer(x), layer(x, (zero, zero)))
        ones = np.ones_like(zero)
        _, (c, _) = layer(0 * x, (ones, ones))
        np.testing.assert_allclose(c, (1 / (1 + np.exp(-1))) ** 6, rtol=1e-4)


def test_bad_input_is_named():
    logits, state = random_inputs()
    with pytest.raises(ValueError, match="block_length must divide the length 12, got 5"):
        quasi_lstm(*logits, state, block_length=5)
    with pytest.raises(ValueError, match="block_length must be in"):
        quasi_lstm(*logits, state, block_length=0)
    with pytest.raises(ValueError, match="implementation must be 'block'"):
        quasi_lstm(*logits, state, implementation="loop")
    with pytest.raises(ValueError, match="candidate_logits must have shape"):
        quasi_lstm(logits[0], logits[1], logits[2][:1], logits[3], state)
    with pytest.raises(ValueError, match=r"forget_logits must have shape \[batch, length"):
        quasi_lstm(*(x[0] for x in logits), state)
    with pytest.raises(ValueError, match="c must have shape"):
        quasi_lstm(*logits, (state[0][:1], state[1]))
    with pytest.raises(TypeError, match="input_logits must have a floating-point type"):
        quasi_lstm(logits[0], logits[1].astype(int), *logits[2:], state)
    with pytest.raises(ValueError, match="num_layers must be in"):
        QuasiLSTMBlock(4, 8, 2, 2, num_layers=0, rngs=nnx.Rngs(0))
