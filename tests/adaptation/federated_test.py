import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref.adaptation import federated_round, fedwon_client_update
from jaxref.norms import scaled_weight_standardization


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


PARAMS = {"body": {"kernel": random((3, 4)), "bias": 0.1 * random(4)}, "head": random((4, 2))}


def loss(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["body"]["kernel"] + params["body"]["bias"])
    return jnp.mean((hidden @ params["head"] - y) ** 2)


def sgd(params, batch):
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params, batch))


def client_batches(clients=3, batches=2, size=4):
    return random((clients, batches, size, 3), 1), random((clients, batches, size, 2), 2)


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_round_matches_a_loop_over_clients(self):
        batches, weights = client_batches(), np.array([1, 0, 5])
        ours = self.variant(lambda p, b: federated_round(p, b, weights, sgd, 3))(PARAMS, batches)
        ends = []
        for k in range(3):
            params = PARAMS
            for t in range(3):
                params = sgd(params, jax.tree.map(lambda leaf: leaf[k, t % 2], batches))
            ends.append(params)
        expected = jax.tree.map(lambda a, _, c: (a + 5 * np.float64(c)) / 6, *ends)
        chex.assert_trees_all_close(ours, expected, rtol=1e-4, atol=1e-5)

    def test_default_is_one_epoch(self):
        batches = client_batches()
        ours, same = (federated_round(PARAMS, batches, np.ones(3), sgd, n) for n in (None, 2))
        chex.assert_trees_all_equal(ours, same)

    def test_local_parameters_stay_with_their_clients(self):
        batches, weights = client_batches(), np.ones(3)
        local = {"body": {"kernel": False, "bias": True}, "head": False}
        biases = random((3, 4), 5)
        params = {**PARAMS, "body": {**PARAMS["body"], "bias": biases}}
        ours = federated_round(params, batches, weights, sgd, 1, local_parameters=local)
        ends = [
            sgd(
                {**PARAMS, "body": {**PARAMS["body"], "bias": biases[k]}},
                jax.tree.map(lambda leaf: leaf[k, 0], batches),
            )
            for k in range(3)
        ]
        expected_biases = np.stack([end["body"]["bias"] for end in ends])
        np.testing.assert_allclose(ours["body"]["bias"], expected_biases, rtol=1e-5)
        expected_head = np.mean([end["head"] for end in ends], axis=0)
        np.testing.assert_allclose(ours["head"], expected_head, rtol=1e-5, atol=1e-6)

    def test_client_update_clips_as_optax_does_but_for_the_last_layer(self):
        x, y = (leaf[0, 0] for leaf in client_batches())
        batch = 10 * x, 100 * y
        ours = jax.jit(fedwon_client_update(loss, 0.5, 0.05, last_layer="^head"))(PARAMS, batch)
        gradients = jax.grad(loss)(PARAMS, batch)
        kernel, g = PARAMS["body"]["kernel"], gradients["body"]["kernel"]
        expected, _ = optax.adaptive_grad_clip(0.05).update(
            {"kernel": g}, optax.EmptyState(), {"kernel": kernel}
        )
        assert np.abs(expected["kernel"] - g).max() > 1
        np.testing.assert_allclose(
            ours["body"]["kernel"], kernel - 0.5 * expected["kernel"], rtol=1e-3
        )
        np.testing.assert_allclose(
            ours["head"], PARAMS["head"] - 0.5 * gradients["head"], rtol=1e-4
        )


class TestClaims:
    @pytest.mark.claim("fedwon")
    def test_two_domains_are_learned_from_single_examples_where_batch_norm_learns_nothing(self):
        """The second client sees the inputs inverted and shifted; batches have one example."""
        rng = np.random.default_rng(0)
        clean = rng.normal(size=(2, 64, 1, 6)).astype(np.float32)
        labels = (clean[..., 0] * clean[..., 1] > 0).astype(np.int32)
        inputs = np.stack([clean[0], 2 - 3 * clean[1]])
        start = {
            "first": random((6, 32), 1) / np.sqrt(6),
            "second": random((32, 32), 2) / np.sqrt(32),
            "bias": [0.5 * random(32, 3), 0.1 * random(32, 4)],
            "head": random((32, 2), 5) / np.sqrt(32),
        }

        def fedwon(params, x):
            first, second = (
                scaled_weight_standardization(params[name], nonlinearity_gain=1.7)
                for name in ("first", "second")
            )
            x = jax.nn.relu(x @ first + params["bias"][0])
            return jax.nn.relu(x @ second + params["bias"][1]) @ params["head"]

        def batch_norm(params, x):
            for name, bias in zip(("first", "second"), params["bias"]):
                x = x @ params[name]
                x = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5) + bias
                x = jax.nn.relu(x)
            return x @ params["head"]

        def accuracies(network):
            def loss(params, batch):
                x, y = batch
                losses = optax.softmax_cross_entropy_with_integer_labels(network(params, x), y)
                return jnp.mean(losses)

            update = fedwon_client_update(loss, 0.05, 0.64, last_layer="head")
            run = jax.jit(lambda p: federated_round(p, (inputs, labels), np.ones(2), update))
            params = start
            for _ in range(25):
                params = run(params)
            one_by_one = jax.vmap(jax.vmap(lambda x: network(params, x)))(inputs)
            return params, np.mean(one_by_one.argmax(-1) == labels, axis=(1, 2))

        params, ours = accuracies(fedwon)
        _, normalised = accuracies(batch_norm)
        assert ours.min() > 0.9
        assert normalised.max() < 0.65
        together = fedwon(params, inputs[0, :, 0])  # an example does not see the others
        np.testing.assert_allclose(together[5], fedwon(params, inputs[0, 5])[0], rtol=1e-4)


class TestEdges:
    def test_one_client_and_one_step_is_a_step_and_equal_clients_average_to_one(self):
        batches = client_batches(clients=1, batches=1)
        alone = federated_round(PARAMS, batches, np.array([3.0]), sgd)
        step = sgd(PARAMS, jax.tree.map(lambda leaf: leaf[0, 0], batches))
        chex.assert_trees_all_close(alone, step, rtol=1e-5, atol=1e-6)
        repeated = jax.tree.map(lambda leaf: np.repeat(leaf, 3, axis=0), batches)
        together = federated_round(PARAMS, repeated, np.array([1.0, 2.0, 0.5]), sgd)
        chex.assert_trees_all_close(together, alone, rtol=1e-5, atol=1e-6)
        idle = federated_round(PARAMS, repeated, np.ones(3), lambda params, batch: params)
        chex.assert_trees_all_equal(idle, jax.tree.map(jnp.asarray, PARAMS))

    def test_a_client_without_weight_may_diverge_and_all_of_them_may_be_absent(self):
        x, y = client_batches()
        x[1] = np.nan
        weights = np.array([1.0, 0.0, 1.0])
        ours = federated_round(PARAMS, (x, y), weights, sgd)
        chex.assert_tree_all_finite(ours)
        without = federated_round(PARAMS, (x[[0, 2]], y[[0, 2]]), np.ones(2), sgd)
        chex.assert_trees_all_close(ours, without, rtol=1e-5, atol=1e-6)
        absent = jax.jit(lambda w: federated_round(PARAMS, (x, y), w, sgd))(np.zeros(3))
        chex.assert_trees_all_equal(absent, jax.tree.map(jnp.asarray, PARAMS))

    def test_half_precision_parameters(self):
        half = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), PARAMS)
        update = fedwon_client_update(loss, 0.1, last_layer="head")
        ours = federated_round(half, client_batches(), np.ones(3), update)
        chex.assert_trees_all_equal_shapes_and_dtypes(ours, half)
        exact = federated_round(PARAMS, client_batches(), np.ones(3), update)
        chex.assert_trees_all_close(jax.tree.map(np.float32, ours), exact, atol=0.03, rtol=0.03)

    def test_clients_over_devices(self):
        batches = client_batches(clients=8)
        expected = federated_round(PARAMS, batches, np.arange(8.0), sgd)
        sharding = NamedSharding(
            jax.make_mesh((8,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,)),
            P("clients"),
        )
        ours = jax.jit(lambda p, b: federated_round(p, b, np.arange(8.0), sgd))(
            PARAMS, jax.device_put(batches, sharding)
        )
        chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-6)

    def test_bad_input_is_named(self):
        x, y = client_batches()
        with pytest.raises(ValueError, match=r"client_weights must have shape \(3,\)"):
            federated_round(PARAMS, (x, y), np.ones(2), sgd)
        with pytest.raises(ValueError, match="client_weights must be in"):
            federated_round(PARAMS, (x, y), np.array([1.0, -1.0, 1.0]), sgd)
        with pytest.raises(ValueError, match="client_weights must have a positive sum"):
            federated_round(PARAMS, (x, y), np.zeros(3), sgd)
        with pytest.raises(ValueError, match="num_local_steps must be in"):
            federated_round(PARAMS, (x, y), np.ones(3), sgd, 0)
        for batches in ((x, y[:2]), (x, y[:, :0]), (np.ones(3), np.ones(3))):
            with pytest.raises(ValueError, match=r"client_batches must have leaves of shape"):
                federated_round(PARAMS, batches, np.ones(3), sgd)
        with pytest.raises(ValueError, match="local_parameters must have the tree structure"):
            federated_round(PARAMS, (x, y), np.ones(3), sgd, local_parameters={"head": True})
        local = jax.tree.map(lambda _: True, PARAMS)
        with pytest.raises(ValueError, match="must have a leading axis of 2 clients"):
            federated_round(PARAMS, (x[:2], y[:2]), np.ones(2), sgd, local_parameters=local)
        with pytest.raises(ValueError, match="last_layer must match the path of a parameter"):
            fedwon_client_update(loss, 0.1, last_layer="tail")(PARAMS, (x[0, 0], y[0, 0]))
        with pytest.raises(ValueError, match="clipping must be in"):
            fedwon_client_update(loss, 0.1, 0.0, last_layer="head")
        with pytest.raises(ValueError, match="learning_rate must be in"):
            fedwon_client_update(loss, -0.1, last_layer="head")
