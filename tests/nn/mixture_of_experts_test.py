import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref.losses import load_balance_loss
from jaxref.nn import (
    MLP,
    AuxiliaryLoss,
    EnforcedRoutingMoE,
    ExpertParameters,
    MixtureOfExperts,
    enforced_routing_mlp,
    mixture_of_experts_ffn,
    top_k_router,
)


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_experts(num_experts=4, features=3, hidden=5, *, gated=True, seed=0):
    """Experts with biases."""
    shapes = {
        "up": (num_experts, features, hidden),
        "down": (num_experts, hidden, features),
        "up_bias": (num_experts, hidden),
        "down_bias": (num_experts, features),
    }
    if gated:
        shapes |= {"gate": shapes["up"], "gate_bias": shapes["up_bias"]}
    return ExpertParameters(**{n: random(s, seed + i) for i, (n, s) in enumerate(shapes.items())})


def softmax64(logits):
    weights = np.exp(np.float64(logits) - np.max(logits, -1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def expert64(x, params, i):
    """One expert, with the activation tanh."""
    up = x @ np.float64(params.up[i]) + params.up_bias[i]
    gate = x @ np.float64(params.gate[i]) + params.gate_bias[i]
    return (np.tanh(gate) * up) @ np.float64(params.down[i]) + params.down_bias[i]


def mixture64(x, params, logits, top_k, capacity):
    """Token by token, the first choices of all before the second ones; and the drops."""
    p = softmax64(logits)
    order = np.argsort(-p, axis=-1, kind="stable")[:, :top_k]
    y, dropped, busy = np.zeros(x.shape), np.zeros(order.shape, bool), np.zeros(p.shape[1], int)
    for choice in range(top_k):
        for token in range(len(x)):
            i = order[token, choice]
            busy[i] += 1
            if busy[i] > capacity:
                dropped[token, choice] = True
            else:
                y[token] += p[token, i] * expert64(x[token], params, i)
    return y, dropped, order


class RouterTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_matches_a_loop_over_the_tokens(self):
        x, params, logits = random((9, 3), 7), random_experts(), random((9, 4), 8)
        for capacity, limit in ((3, 3), (None, 9)):

            @self.variant
            def mixture(x, params, logits, capacity=capacity):
                routed = top_k_router(logits, 2, capacity=capacity)
                return mixture_of_experts_ffn(x, params, routed, activation=jnp.tanh), routed

            y, routed = mixture(x, params, logits)
            expected, dropped, order = mixture64(x, params, logits, 2, limit)
            np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(routed.dropped, dropped)
            np.testing.assert_array_equal(routed.assignment, order)
            np.testing.assert_allclose(routed.probabilities, softmax64(logits), rtol=1e-5)
            assert dropped.any() == (capacity is not None)

    def test_places_are_given_once_and_in_order(self):
        logits = np.array([[9.0, 0, -9], [9, 0, -9], [0, 9, -9], [9, -9, 0]], np.float32)
        routed = top_k_router(logits, 2, capacity=2)
        expected = np.zeros((4, 3, 2), bool)
        expected[0, 0, 0] = expected[1, 0, 1] = True  # the first choices; the fourth is dropped
        expected[2, 1, 0] = expected[0, 1, 1] = True  # after the third token's first choice
        expected[3, 2, 0] = True
        np.testing.assert_array_equal(routed.dispatch, expected)
        drops = [[False, False], [False, True], [False, True], [True, False]]
        np.testing.assert_array_equal(routed.dropped, drops)
        gates = routed.probabilities[..., None] * expected
        np.testing.assert_array_equal(routed.combine, gates)

    def test_gradients_with_and_without_a_limit_agree_with_finite_differences(self):
        x, params, logits = random((6, 3), 7), random_experts(), random((6, 4), 8)
        weights = random((6, 3), 9)

        def loss(arguments, capacity):
            x, params, logits = arguments
            routed = top_k_router(logits, 2, capacity=capacity)
            y = mixture_of_experts_ffn(x, params, routed, activation=jnp.tanh)
            return jnp.sum(weights * y)

        gradient = jax.jit(jax.grad(loss), static_argnums=1)
        ours, limited = (gradient((x, params, logits), capacity) for capacity in (None, 6))
        chex.assert_trees_all_close(limited, ours, rtol=1e-4, atol=1e-5)

        def loss64(x, logits, kernel):
            y, *_ = mixture64(x, params._replace(down=kernel), logits, 2, 6)
            return np.sum(weights * y)

        point = [np.float64(a) for a in (x, logits, params.down)]
        for i, slope in enumerate((ours[0], ours[2], ours[1].down)):
            direction = np.random.default_rng(i).normal(size=slope.shape)
            ends = [
                [a + step * direction if i == j else a for j, a in enumerate(point)]
                for step in (1e-6, -1e-6)
            ]
            difference = (loss64(*ends[0]) - loss64(*ends[1])) / 2e-6
            np.testing.assert_allclose(np.sum(slope * direction), difference, rtol=1e-3, atol=1e-4)

    def test_noise_explores_with_the_given_spread(self):
        logits = np.zeros((4096, 4), np.float32)
        plain = top_k_router(logits, 1)
        np.testing.assert_array_equal(plain.assignment, 0)
        for std, given in ((0.25, None), (1.5, 1.5)):
            noisy = top_k_router(logits, 1, key=jax.random.key(0), noise_std=given)
            log_p = np.log(noisy.probabilities)
            spread = np.std(log_p[:, 0] - log_p[:, 1]) / np.sqrt(2)
            np.testing.assert_allclose(spread, std, rtol=0.05)
        np.testing.assert_allclose(np.bincount(noisy.assignment[:, 0]) / 4096, 0.25, atol=0.03)

    def test_one_expert_is_a_plain_network(self):
        x, params = random((5, 3)), random_experts(1)
        routed = top_k_router(random((5, 1)), 1, capacity=5)
        y = mixture_of_experts_ffn(x, params, routed, activation=jnp.tanh)
        np.testing.assert_allclose(y, expert64(x, params, 0), rtol=1e-5, atol=1e-6)

    def test_extreme_logits_and_half_precision(self):
        logits = jnp.array([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]], jnp.bfloat16)
        routed = top_k_router(logits, 2, capacity=1)
        assert routed.combine.dtype == jnp.float32
        slopes = jax.grad(lambda z: top_k_router(z, 2).combine[:, 0].sum())(logits)
        assert np.all(np.isfinite(slopes.astype("f")))
        x = jnp.ones((2, 3), jnp.bfloat16)
        y = mixture_of_experts_ffn(x, random_experts(3, gated=False), routed)
        assert y.dtype == jnp.bfloat16

    def test_bad_input_is_named(self):
        logits = np.zeros((5, 4), "f")
        for top_k in (0, 5):
            with pytest.raises(ValueError, match=r"top_k must be in \[1, 4\]"):
                top_k_router(logits, top_k)
        with pytest.raises(ValueError, match="capacity must be in"):
            top_k_router(logits, 1, capacity=0)
        with pytest.raises(ValueError, match="noise_std must be in"):
            top_k_router(logits, 1, key=jax.random.key(0), noise_std=-1.0)
        with pytest.raises(ValueError, match=r"logits must have shape \[tokens, experts\]"):
            top_k_router(logits[None], 1)
        with pytest.raises(TypeError, match="logits must have a floating-point type"):
            top_k_router(logits.astype(int), 1)
        routed, params = top_k_router(logits, 1), random_experts()
        with pytest.raises(ValueError, match=r"x must have shape \(5, 3\)"):
            mixture_of_experts_ffn(np.ones((5, 2), "f"), params, routed)
        with pytest.raises(ValueError, match=r"dispatch must have shape \(6, 4\)"):
            mixture_of_experts_ffn(np.ones((6, 3), "f"), params, routed)
        wrong = params._replace(gate_bias=np.ones((4, 3), "f"))
        with pytest.raises(ValueError, match=r"gate_bias must have shape \(4, 5\)"):
            mixture_of_experts_ffn(np.ones((5, 3), "f"), wrong, routed)


class TestMixtureOfExperts:
    def test_training_and_evaluation(self):
        module = MixtureOfExperts(3, 5, activation=jnp.tanh, gated=True, rngs=nnx.Rngs(0))
        x = random((2, 8, 3))
        module.eval()
        assert module.deterministic
        y = module(x, key=jax.random.key(0))
        assert module.auxiliary_loss[...] == 0
        rows, zeros = x.reshape(16, 3), np.zeros((4, 5))
        params = module.parameters()._replace(
            up_bias=zeros, gate_bias=zeros, down_bias=np.zeros((4, 3))
        )
        logits = rows @ module.router.kernel[...]
        expected, *_ = mixture64(rows, params, logits, 2, 16)
        np.testing.assert_allclose(y.reshape(16, 3), expected, rtol=1e-4, atol=1e-5)
        module.train()
        assert not module.deterministic
        assert module.capacity(16) == 10  # ceil(1.2 · 2 · 16 / 4)
        y = module(x)
        expected, dropped, _ = mixture64(rows, params, logits, 2, 10)
        assert dropped.any()
        np.testing.assert_allclose(y.reshape(16, 3), expected, rtol=1e-4, atol=1e-5)
        routed = top_k_router(logits, 2)
        balance = 0.01 * load_balance_loss(routed.probabilities, routed.assignment)
        np.testing.assert_allclose(module.auxiliary_loss[...], balance, rtol=1e-5)
        assert isinstance(module.auxiliary_loss, AuxiliaryLoss)
        noisy = module(x, key=jax.random.key(1))
        assert not np.allclose(noisy, y)

    def test_auxiliary_loss_trains_the_router_alone(self):
        module, x = MixtureOfExperts(3, 5, rngs=nnx.Rngs(0)), random((8, 3))

        def loss(module):
            module(x)
            return sum(jax.tree.leaves(nnx.state(module, AuxiliaryLoss)))

        slopes = nnx.to_pure_dict(nnx.jit(nnx.grad(loss))(module))
        assert np.any(slopes["router"]["kernel"] != 0)
        assert not np.any(slopes["up"]["kernel"])
        assert module.auxiliary_loss[...] > 0

    def test_parameters_and_capacity(self):
        module = MixtureOfExperts(
            4,
            6,
            num_experts=3,
            use_bias=True,
            gated=True,
            param_dtype=jnp.bfloat16,
            rngs=nnx.Rngs(0),
        )
        assert module.up.kernel.shape == module.gate.kernel.shape == (3, 4, 6)
        assert module.down.kernel.shape == (3, 6, 4)
        assert module.up.kernel.get_metadata()["axes"] == ("expert", "embed", "mlp")
        assert module.down.kernel.get_metadata()["axes"] == ("expert", "mlp", "embed")
        assert module.down.bias.get_metadata()["axes"] == ("expert", "embed")
        assert module.auxiliary_loss.get_metadata()["axes"] == ()
        params = jax.tree.leaves(nnx.state(module, nnx.Param))
        assert {leaf.dtype for leaf in params} == {jnp.bfloat16.dtype}
        kernels = module.up.kernel[...].astype("f")
        assert not np.array_equal(kernels[0], kernels[1])
        np.testing.assert_allclose(kernels.std(), 0.5, rtol=0.3)  # of one expert's 4 inputs
        assert module(jnp.ones((2, 4))).dtype == jnp.bfloat16
        assert module.capacity(1) == 1
        wide = MixtureOfExperts(4, 6, capacity_factor=1.1, top_k=4, rngs=nnx.Rngs(0))
        assert wide.capacity(10) == 10
        narrow = MixtureOfExperts(4, 6, capacity_factor=1.1, top_k=1, rngs=nnx.Rngs(0))
        assert narrow.capacity(40) == 11

    def test_groups_compete_for_places_among_themselves(self):
        sizes = {"num_experts": 4, "capacity_factor": 0.6}
        grouped = MixtureOfExperts(4, 8, group_size=6, **sizes, rngs=nnx.Rngs(0))
        alone = MixtureOfExperts(4, 8, **sizes, rngs=nnx.Rngs(0))
        x = random((24, 4))
        parts = [alone(part) for part in x.reshape(4, 6, 4)]
        ours = grouped(x.reshape(2, 12, 4)).reshape(24, 4)
        np.testing.assert_allclose(ours, np.concatenate(parts), rtol=1e-5, atol=1e-6)
        assert not np.allclose(ours, alone(x), atol=1e-3)  # who is dropped depends on the group
        with pytest.raises(ValueError, match="group_size must divide the 20 tokens, got 6"):
            grouped(x[:20])
        with pytest.raises(ValueError, match="group_size must be in"):
            MixtureOfExperts(4, 8, group_size=0, rngs=nnx.Rngs(0))

    def test_experts_split_over_a_mesh(self):
        module = MixtureOfExperts(4, 8, num_experts=8, rngs=nnx.Rngs(0))
        x = random((16, 4))
        graphdef, state = nnx.split(module)
        apply = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
        expected = apply(state, x)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        place = lambda leaf: NamedSharding(mesh, P("data") if leaf.ndim == 3 else P())
        placed = jax.device_put(state, jax.tree.map(place, state))
        ours = apply(placed, jax.device_put(x, NamedSharding(mesh, P("data"))))
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"top_k": 5}, r"top_k must be in \[1, 4\]"),
            ({"num_experts": 0}, "num_experts must be in"),
            ({"capacity_factor": 0.0}, "capacity_factor must be in"),
            ({"noise_std": -1.0}, "noise_std must be in"),
            ({"balance_coefficient": -1.0}, "balance_coefficient must be in"),
        ],
    )
    def test_bad_arguments_are_named(self, change, message):
        with pytest.raises(ValueError, match=message):
            MixtureOfExperts(4, 6, **change, rngs=nnx.Rngs(0))

    def test_input_of_another_size_raises(self):
        module = MixtureOfExperts(4, 6, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"x must have shape \[..., 4\], got \(3, 5\)"):
            module(jnp.ones((3, 5)))


class TestEnforcedRouting:
    @pytest.mark.claim("mnr-enforced-routing-moe")
    def test_copies_are_the_dense_model_until_training_and_only_the_named_one_is_trained(self):
        mlp = MLP(3, 5, gated=True, use_bias=True, rngs=nnx.Rngs(0))
        mlp.up.bias[...], mlp.down.bias[...] = random(5, 1), random(3, 2)
        mixture = EnforcedRoutingMoE.from_mlp(mlp, 4)
        hidden = random((3, 6, 3))
        dense, apply = mlp(hidden), nnx.jit(lambda mixture, *a: mixture(*a))
        by_token = np.random.default_rng(0).integers(4, size=(3, 6))
        for assignment in (np.array([0, 0, 0]), np.array([3, 1, 2]), by_token):
            ours = apply(mixture, hidden, assignment)
            np.testing.assert_allclose(ours, dense, rtol=1e-5, atol=1e-6)
        loss = lambda mixture, a: jnp.sum(jnp.square(mixture(hidden, a)))
        for assignment in (np.array([1, 3, 1]), 1 + 2 * (by_token % 2)):
            slopes = nnx.to_pure_dict(nnx.jit(nnx.grad(loss))(mixture, assignment))
            for slope in jax.tree.leaves(slopes):
                assert not np.any(slope[0])
                assert not np.any(slope[2])
                assert np.any(slope[1])
                assert np.any(slope[3])

    def test_each_sequence_or_token_goes_through_its_expert(self):
        params, hidden = random_experts(), random((3, 5, 3), 7)
        apply = jax.jit(lambda *a: enforced_routing_mlp(*a, activation=jnp.tanh))
        by_sequence = np.array([2, 0, 2])
        by_token = np.random.default_rng(1).integers(4, size=(3, 5))
        for assignment in (by_sequence, by_token):
            ours = apply(hidden, params, assignment)
            each = np.broadcast_to(assignment.reshape(3, -1), (3, 5))
            expected = [[expert64(x, params, i) for x, i in zip(*row)] for row in zip(hidden, each)]
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
        mapped = jax.vmap(lambda h, a: enforced_routing_mlp(h[None], params, a[None])[0])
        whole = enforced_routing_mlp(hidden, params, by_sequence)
        np.testing.assert_allclose(mapped(hidden, by_sequence), whole, rtol=1e-5, atol=1e-6)

    def test_the_copy_is_independent_and_keeps_types(self):
        mlp = MLP(3, 5, dtype=jnp.float32, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        mixture = EnforcedRoutingMoE.from_mlp(mlp, 2)
        assert mixture.up.kernel.dtype == jnp.bfloat16
        assert mixture(jnp.ones((1, 2, 3)), jnp.array([1])).dtype == jnp.float32
        assert mixture.gate is None
        before = mixture.up.kernel[...]
        mlp.up.kernel[...] = 0 * mlp.up.kernel[...]
        np.testing.assert_array_equal(mixture.up.kernel[...], before)

    def test_unknown_experts(self):
        params, hidden = random_experts(), random((2, 5, 3))
        for assignment in (np.array([0, 4]), np.array([-1, 0])):
            with pytest.raises(ValueError, match=r"assignment must be in \[0, 3\]"):
                enforced_routing_mlp(hidden, params, assignment)
            traced = jax.jit(enforced_routing_mlp)(hidden, params, assignment)
            wrong = assignment != 0
            assert np.all(np.isnan(traced[wrong]))
            assert np.all(np.isfinite(traced[~wrong]))

    def test_bad_input_is_named(self):
        params, hidden = random_experts(), random((2, 5, 3))
        with pytest.raises(TypeError, match="assignment must be integers"):
            enforced_routing_mlp(hidden, params, np.zeros(2))
        with pytest.raises(ValueError, match=r"assignment must have shape \(2,\)"):
            enforced_routing_mlp(hidden, params, np.zeros(3, int))
        with pytest.raises(ValueError, match=r"hidden must have shape \(2, 5, 3\)"):
            enforced_routing_mlp(random((2, 5, 4)), params, np.zeros(2, int))
        with pytest.raises(ValueError, match=r"hidden must have shape \[batch, length, features\]"):
            enforced_routing_mlp(hidden[0], params, np.zeros(2, int))
        other = MLP(
            3, 5, linear=lambda *a, **k: nnx.Linear(3, 5, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)
        )
        with pytest.raises(TypeError, match=r"mlp.up must be a Linear, got Linear"):
            EnforcedRoutingMoE.from_mlp(other, 2)
