from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from jaxref import losses


def random_logits(shape=(6, 5), seed=0, scale=2.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def log_z64(logits):
    return np.log(np.exp(np.asarray(logits, np.float64)).sum(-1))


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_z_loss_and_its_gradient_match_the_formula(self):
        logits = random_logits()
        loss = self.variant(lambda z: losses.z_loss(z, coefficient=0.3))
        np.testing.assert_allclose(loss(logits), 0.3 * log_z64(logits) ** 2, rtol=1e-5)
        gradient = self.variant(jax.grad(lambda z: losses.z_loss(z, coefficient=0.3).sum()))
        softmax = np.exp(logits - log_z64(logits)[:, None])
        expected = 2 * 0.3 * log_z64(logits)[:, None] * softmax
        np.testing.assert_allclose(gradient(logits), expected, rtol=1e-4, atol=1e-6)

    def test_the_default_coefficient_is_the_papers(self):
        logits = random_logits()
        np.testing.assert_allclose(losses.z_loss(logits), 1e-4 * log_z64(logits) ** 2, rtol=1e-5)

    def test_gradient_against_finite_differences(self):
        with jax.enable_x64(True):
            logits = random_logits((2, 4)).astype(np.float64)
            loss = lambda z: losses.z_loss(z, coefficient=0.5)
            assert loss(logits).dtype == jnp.float64
            check_grads(loss, (logits,), order=2, modes=["rev", "fwd"])


class TestClaims:
    def test_z_loss_fixes_the_shift_that_cross_entropy_leaves_free(self):
        """Gradient descent on drifted logits: log Z returns towards 0 with the penalty only."""
        logits, labels = random_logits() - 40, np.arange(6) % 5

        def descend(coefficient):
            def loss(z):
                cross_entropy = optax.softmax_cross_entropy_with_integer_labels(z, labels)
                return jnp.sum(cross_entropy + losses.z_loss(z, coefficient=coefficient))

            step = lambda _, z: z - 0.1 * jax.grad(loss)(z)
            return jax.jit(lambda z: jax.lax.fori_loop(0, 200, step, z))(logits)

        # the gradient of cross-entropy sums to 0: without the penalty the mean logit cannot move
        np.testing.assert_allclose(descend(0.0).mean(-1), logits.mean(-1), rtol=1e-4)
        assert np.all(log_z64(descend(0.0)) < -30)
        assert np.all(np.abs(log_z64(descend(0.1))) < 8)


class TestContract:
    def test_axis_and_vmap(self):
        logits = random_logits((3, 4, 5))
        expected = losses.z_loss(logits)
        assert expected.shape == (3, 4)
        moved = losses.z_loss(np.moveaxis(logits, -1, 1), axis=1)
        np.testing.assert_allclose(moved, expected, rtol=1e-6)
        np.testing.assert_allclose(jax.vmap(losses.z_loss)(logits), expected, rtol=1e-6)

    def test_sharded_over_classes(self):
        logits = random_logits((4, 16))
        mesh = jax.make_mesh((8,), ("tensor",))
        placed = jax.device_put(logits, NamedSharding(mesh, PartitionSpec(None, "tensor")))
        ours = jax.jit(losses.z_loss)(placed)
        np.testing.assert_allclose(ours, losses.z_loss(logits), rtol=1e-5)

    def test_masked_classes_count_for_nothing(self):
        logits, where = random_logits(), np.arange(5) < 3
        poisoned = np.where(where, logits, 1e30).astype(np.float32)
        ours, vjp = jax.vjp(lambda z: losses.z_loss(z, where=where), poisoned)
        np.testing.assert_allclose(ours, losses.z_loss(logits[:, :3]), rtol=1e-6)
        gradient = vjp(jnp.ones(6))[0]
        assert np.all(gradient[:, 3:] == 0)
        assert np.all(gradient[:, :3] != 0)

    def test_masked_examples_are_zero_with_zero_gradient(self):
        logits, where = random_logits((3, 5)), np.array([[True], [False], [True]])
        ours, vjp = jax.vjp(lambda z: losses.z_loss(z, where=where), logits)
        np.testing.assert_allclose(ours[::2], losses.z_loss(logits)[::2], rtol=1e-6)
        assert ours[1] == 0
        assert np.all(vjp(jnp.ones(3))[0][1] == 0)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_computes_in_float32(self, dtype):
        half = jnp.asarray(random_logits(), dtype)
        ours = losses.z_loss(half)
        assert ours.dtype == dtype
        expected = losses.z_loss(half.astype(jnp.float32)).astype(dtype)
        np.testing.assert_array_equal(ours, expected)

    @pytest.mark.parametrize("size", [1e4, -1e4, 0.0])
    def test_extreme_and_equal_logits_stay_finite(self, size):
        logits = np.array([[size, 0.0, -size], [size, size, size]], np.float32)
        value, gradient = jax.value_and_grad(lambda z: losses.z_loss(z).sum())(logits)
        assert np.isfinite(value)
        chex.assert_tree_all_finite(gradient)
        one_class = losses.z_loss(np.full((2, 1), size, np.float32))
        np.testing.assert_allclose(one_class, 1e-4 * size**2, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": np.ones((2, 3), int)}, TypeError, "logits must have a floating-point type"),
        ({"logits": np.ones((2, 0), "f")}, ValueError, "at least one class"),
        ({"coefficient": -1.0}, ValueError, "coefficient must be in"),
        ({"axis": 2}, ValueError, "axis"),
        ({"where": np.ones((2, 4), bool)}, ValueError, "where must broadcast"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        losses.z_loss(**({"logits": np.ones((2, 3), "f")} | arguments))


class TestLoadBalance:
    def routed(self, tokens=16, experts=4, top_k=2, seed=0):
        probabilities = jax.nn.softmax(random_logits((tokens, experts), seed))
        return probabilities, jax.lax.top_k(probabilities, top_k)[1]

    @staticmethod
    def literal(probabilities, assignment):
        tokens, experts = probabilities.shape
        shares = np.bincount(np.ravel(assignment), minlength=experts) / np.size(assignment)
        return experts * sum(shares * np.float64(probabilities).sum(0) / tokens)

    def test_matches_switch_transformers_in_each_group(self):
        peer = np.load(Path(__file__).parents[1] / "oracles" / "switch_balance.npz")

        def loss(probabilities):
            return jax.vmap(losses.load_balance_loss)(
                probabilities, peer["experts"][..., None]
            ).mean()

        value, slope = jax.value_and_grad(loss)(peer["probabilities"].astype("f"))
        np.testing.assert_allclose(value, peer["loss"], rtol=1e-5)
        np.testing.assert_allclose(slope, peer["gradient"], rtol=1e-5)

    def test_matches_the_formula_and_its_gradient_leaves_the_shares_alone(self):
        probabilities, assignment = self.routed()
        value, slope = jax.jit(jax.value_and_grad(losses.load_balance_loss))(
            probabilities, assignment
        )
        np.testing.assert_allclose(value, self.literal(probabilities, assignment), rtol=1e-5)
        shares = np.bincount(np.ravel(assignment), minlength=4) / 32
        np.testing.assert_allclose(slope, np.broadcast_to(4 * shares / 16, (16, 4)), rtol=1e-5)

    def test_is_1_for_uniform_use_and_the_number_of_experts_for_one_alone(self):
        uniform = np.full((8, 4), 0.25, np.float32)
        spread = np.arange(8)[:, None] % 4
        np.testing.assert_allclose(losses.load_balance_loss(uniform, spread), 1, rtol=1e-6)
        certain = np.eye(4, dtype=np.float32)[np.zeros(8, int)]
        ours = losses.load_balance_loss(certain, np.zeros((8, 1), int))
        np.testing.assert_allclose(ours, 4, rtol=1e-6)

    def test_tokens_on_several_axes_or_devices_and_masked_ones(self):
        probabilities, assignment = self.routed()
        whole = losses.load_balance_loss(probabilities, assignment)
        apart = [x.reshape(8, 2, -1) for x in (probabilities, assignment)]
        np.testing.assert_allclose(losses.load_balance_loss(*apart), whole, rtol=1e-6)
        each = jax.vmap(
            lambda p, a: losses.load_balance_loss(p, a, axis_name="device"), axis_name="device"
        )
        np.testing.assert_allclose(each(*apart), whole, rtol=1e-6)
        where = np.arange(16) < 10
        ours = losses.load_balance_loss(
            jnp.where(where[:, None], probabilities, jnp.nan), assignment, where=where
        )
        expected = self.literal(probabilities[:10], assignment[:10])
        np.testing.assert_allclose(ours, expected, rtol=1e-5)
        nothing = losses.load_balance_loss(probabilities, assignment, where=~np.ones(16, bool))
        assert nothing == 0

    def test_unknown_experts_and_bad_input(self):
        probabilities, assignment = self.routed()
        assert np.isnan(losses.load_balance_loss(probabilities, assignment.at[0, 0].set(4)))
        half = losses.load_balance_loss(probabilities.astype(jnp.bfloat16), assignment)
        assert half.dtype == jnp.float32
        with pytest.raises(ValueError, match=r"assignment must have shape \(16, 2\)"):
            losses.load_balance_loss(probabilities, assignment[:8])
        with pytest.raises(TypeError, match="assignment must be integers"):
            losses.load_balance_loss(probabilities, probabilities)
        with pytest.raises(ValueError, match="where must broadcast"):
            losses.load_balance_loss(probabilities, assignment, where=np.ones(4, bool))
        with pytest.raises(ValueError, match=r"probabilities must have shape \[\.\.\., tokens"):
            losses.load_balance_loss(probabilities[0], assignment[0])
