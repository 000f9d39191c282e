import math
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding, PartitionSpec

from jaxref import optimizers
from jaxref.optimizers.lion_kappa import resolve_kappa

ORACLE = Path(__file__).parents[1] / "oracles" / "lion.npz"

KAPPAS = {
    "l1": optimizers.l1,
    "l2": optimizers.l2,
    "lp": optimizers.lp(1.5),
    "lp3": optimizers.lp(3),
    "group_l2": optimizers.group_l2(),
    "huber": optimizers.huber(0.5),
    "entropy": optimizers.entropy,
    "top_k_l1": optimizers.top_k_l1(4),
    "relu_truncated": optimizers.relu_truncated(0.3),
}

OPTAX_SETTINGS = {
    "no_decay": {"weight_decay": 0.0},
    "language": {"b1": 0.95, "b2": 0.98, "weight_decay": 0.3},
    "masked": {"weight_decay": 0.1, "mask": {"bias": False, "kernel": True}},
    "scheduled": {"weight_decay": lambda count: 0.1 / (1 + count)},
}


def random_tree(seed=0, scale=1.0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {"bias": (4,), "kernel": (3, 4)}
    return {k: jnp.asarray(scale * rng.normal(size=s), dtype) for k, s in shapes.items()}


def flat(tree):
    """All leaves as one float64 vector."""
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def rows(tree):
    """The rows of all leaves: the groups of `group_l2()`."""
    return [row for x in jax.tree.leaves(tree) for row in np.reshape(np.float64(x), (-1, 4))]


def literal(name, x):
    """K(x) and ∂K(x) of a tree, the latter as one vector, written out in float64."""
    v, size = flat(x), np.abs(flat(x))
    norm = lambda p: np.sum(size**p) ** (1 / p)
    groups = [np.linalg.norm(row) for row in rows(x)]
    last = np.sort(size)[-4]
    return {
        "l1": lambda: (size.sum(), np.sign(v)),
        "l2": lambda: (norm(2), v / norm(2)),
        "lp": lambda: (norm(1.5), np.sign(v) * size**0.5 / norm(1.5) ** 0.5),
        "lp3": lambda: (norm(3), np.sign(v) * size**2 / norm(3) ** 2),
        "group_l2": lambda: (
            sum(groups),
            np.concatenate([row / n for row, n in zip(rows(x), groups)]),
        ),
        "huber": lambda: (
            np.where(size <= 0.5, v**2, size - 0.25).sum(),
            np.where(size <= 0.5, 2 * v, np.sign(v)),
        ),
        "entropy": lambda: ((np.logaddexp(v, -v) - np.log(2)).sum(), np.tanh(v)),
        "top_k_l1": lambda: (size[size >= last].sum(), np.sign(v) * (size >= last)),
        "relu_truncated": lambda: (
            np.maximum(size - 0.3, 0).sum(),
            np.sign(v) * (size > 0.3),
        ),
    }[name]()


def trajectory(optimizer, x, gradient, steps):
    """The parameters after every step along `gradient(x, t)`."""

    def one(carry, t):
        x, state = carry
        updates, state = optimizer.update(gradient(x, t), state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), x

    carry = (x, optimizer.init(x))
    return jax.jit(lambda c: jax.lax.scan(one, c, jnp.arange(steps)))(carry)[1]


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*OPTAX_SETTINGS)
    def test_lion_is_optax_lion_for_a_hundred_steps(self, name):
        setting = OPTAX_SETTINGS[name]
        schedule = optax.cosine_decay_schedule(0.01, 100)
        ours, theirs = optimizers.lion(schedule, **setting), optax.lion(schedule, **setting)
        x = y = random_tree()
        state, their_state = ours.init(x), theirs.init(y)
        update, their_update = self.variant(ours.update), self.variant(theirs.update)
        for seed in range(100):
            gradients = random_tree(seed, scale=10.0 ** (seed % 5 - 2))
            updates, state = update(gradients, state, x)
            their_updates, their_state = their_update(gradients, their_state, y)
            x, y = optax.apply_updates(x, updates), optax.apply_updates(y, their_updates)
        chex.assert_trees_all_equal(x, y)
        chex.assert_trees_all_equal(state[0].mu, their_state[0].mu)
        assert state[0].count == 100

    def test_positional_arguments_are_those_of_optax_lion(self):
        x = random_tree()
        arguments = (0.1, 0.8, 0.9, jnp.bfloat16, 0.3, {"bias": False, "kernel": True})
        ours, theirs = optimizers.lion(*arguments), optax.lion(*arguments)
        updates, state = ours.update(x, ours.init(x), x)
        their_updates, their_state = theirs.update(x, theirs.init(x), x)
        chex.assert_trees_all_equal(updates, their_updates)
        assert state[0].mu["bias"].dtype == their_state[0].mu["bias"].dtype == jnp.bfloat16

    @parameterized.parameters("lion_pytorch", "pytorch_optimizer")
    def test_lion_agrees_with_pytorch(self, package):
        with np.load(ORACLE) as stored:
            gradients = jnp.asarray(stored["gradients"])
            start, expected = jnp.asarray(stored["start"]), stored[package]
        optimizer = optimizers.lion(0.02, b1=0.9, b2=0.98, weight_decay=0.3)
        ours = trajectory(optimizer, start, lambda x, t: gradients[t], len(gradients))
        np.testing.assert_allclose(ours, expected, atol=1e-6)

    @parameterized.parameters(*KAPPAS)
    def test_lion_k_matches_the_formula(self, name):
        optimizer = optimizers.lion_k(0.1, KAPPAS[name], b1=0.8, b2=0.7, weight_decay=0.5)
        x = random_tree()
        state, expected, m = optimizer.init(x), flat(x), flat(x) * 0
        _, unravel = jax.flatten_util.ravel_pytree(x)
        for seed in range(1, 5):
            g = random_tree(seed)
            updates, state = optimizer.update(g, state, x)
            x = optax.apply_updates(x, updates)
            mixed = jax.tree.map(np.asarray, unravel(jnp.asarray(0.8 * m + 0.2 * flat(g))))
            expected = expected - 0.1 * (literal(name, mixed)[1] + 0.5 * expected)
            m = 0.7 * m + 0.3 * flat(g)
        np.testing.assert_allclose(flat(x), expected, atol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(*KAPPAS)
    def test_kappa_values_and_subgradients_match_the_formulas(self, name):
        x, kappa = random_tree(), KAPPAS[name]
        value, subgradient = literal(name, x)
        np.testing.assert_allclose(self.variant(kappa.value)(x), value, rtol=1e-6)
        np.testing.assert_allclose(
            flat(self.variant(kappa.subgradient)(x)), subgradient, rtol=1e-5, atol=1e-7
        )
        np.testing.assert_allclose(flat(jax.grad(kappa.value)(x)), subgradient, rtol=1e-5)

    def test_conjugates_by_hand(self):
        u = {"a": jnp.array([0.5, -1.0]), "b": jnp.array([[0.2]])}
        assert optimizers.l1.conjugate(u) == 0
        assert optimizers.l2.conjugate(u) == np.inf
        assert optimizers.lp(1).conjugate(u) == 0
        assert optimizers.group_l2(0).conjugate(u) == np.inf
        np.testing.assert_allclose(optimizers.huber(0.5).conjugate(u), 0.25 * 1.29, rtol=1e-6)
        np.testing.assert_allclose(optimizers.relu_truncated(0.3).conjugate(u), 0.51, rtol=1e-6)
        terms = [(1 + s) * math.log(1 + s) for s in (0.5, -0.5, 1.0, 0.2, -0.2)]
        np.testing.assert_allclose(optimizers.entropy.conjugate(u), sum(terms) / 2, rtol=1e-6)
        assert optimizers.top_k_l1(1).conjugate(u) == np.inf
        assert optimizers.top_k_l1(2).conjugate(u) == 0

    def test_half_the_square_is_momentum_sgd(self):
        half = lambda x: optax.tree.norm(x, squared=True) / 2
        kappa = optimizers.Kappa(half, lambda x: x, half)
        ours = optimizers.lion_k(0.1, kappa, b1=0.9, b2=0.9, weight_decay=0.0)
        theirs = optax.chain(optax.ema(0.9, debias=False), optax.scale(-0.1))
        gradient = lambda x, t: jax.tree.map(jnp.sin, x)
        expected = trajectory(theirs, random_tree(), gradient, 10)
        np.testing.assert_allclose(
            flat(trajectory(ours, random_tree(), gradient, 10)), flat(expected), rtol=1e-6
        )

    def test_lyapunov_function_by_hand(self):
        """K = ‖·‖₁ at wd x = (1, -0.4), m = (-0.3, 0.1): ‖m‖₁ - wd x·m = 0.4 + 0.34."""
        x, m = {"w": jnp.array([0.5, -0.2])}, {"w": jnp.array([-0.3, 0.1])}
        setting = {"alpha": 1.3, "gamma": 0.7, "epsilon": 0.5, "weight_decay": 2.0}
        ours = optimizers.lion_k_lyapunov(x, m, 3.0, kappa="l1", **setting)
        np.testing.assert_allclose(ours, 1.3 * 3 + (1 - 0.35) / (1 + 1) * 0.74, rtol=1e-6)
        ours = optimizers.lion_k_lyapunov(x, m, 3.0, kappa=optimizers.huber(0.5), **setting)
        conjugate, value = 0.25 * 1.16, 0.09 + 0.01
        expected = 3.9 + 0.35 * conjugate + 0.325 * (conjugate + value + 0.34)
        np.testing.assert_allclose(ours, expected, rtol=1e-6)

    def test_hyperparameters_from_adamw_keep_the_strength_of_the_decay(self):
        ours = optimizers.lion_hyperparameters_from_adamw(3e-4, 0.1, factor=3.0)
        np.testing.assert_allclose(ours, (1e-4, 0.3))
        assert isinstance(optimizers.lion(**ours._asdict()), optax.GradientTransformation)


class TestClaims:
    @pytest.mark.claim("lion")
    def test_every_coordinate_moves_by_the_learning_rate_whatever_the_gradients_scale(self):
        """So ‖step‖ = lr √d, more than Adam's, and scaling the loss changes no step at all."""
        rng = np.random.default_rng(0)
        gradients = jnp.asarray(rng.normal(size=(100, 30)), jnp.float32)

        def steps(optimizer, scale=1.0):
            x = trajectory(optimizer, jnp.zeros(30), lambda x, t: scale * gradients[t], 100)
            return np.diff(np.asarray(x, np.float64), axis=0)

        ours = steps(optimizers.lion(0.01))
        np.testing.assert_allclose(np.abs(ours), 0.01, rtol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 0.01 * np.sqrt(30), rtol=1e-4)
        adam = steps(optax.adam(0.01))
        assert np.all(np.linalg.norm(adam[20:], axis=1) < 0.6 * np.linalg.norm(ours[20:], axis=1))
        for scale in (1e-6, 0.3, 1e6):
            np.testing.assert_array_equal(steps(optimizers.lion(0.01), scale), ours)

    def test_state_is_one_array_per_parameter_half_of_adams(self):
        size = lambda state: sum(x.size for x in jax.tree.leaves(state)) - 1  # the count
        x = random_tree()
        lion, adam = optimizers.lion().init(x), optax.adam(1e-3).init(x)
        assert size(lion) == len(flat(x)) == size(adam) / 2

    @pytest.mark.claim("lion-k")
    def test_weight_decay_projects_on_the_box(self):
        """½‖x - x*‖² ends at clip(x*, ±1/wd). From outside, the violation shrinks by at least
        (1 - lr wd) per step, and once in the box the parameters stay there."""
        target = jnp.array([3.0, -2.0, 0.7, 0.2, -0.1, 0.0, 1.5])
        lr, wd = 2e-3, 2.0
        gradient = lambda x, t: x - target
        for start in (5 * jnp.ones(7), jnp.zeros(7), -target):
            x = trajectory(optimizers.lion(lr, weight_decay=wd), start, gradient, 6000)
            np.testing.assert_allclose(x[-1], np.clip(target, -1 / wd, 1 / wd), atol=5 * lr)
            violation = jax.vmap(lambda x: optimizers.box_constraint_violation(x, wd))(x)
            assert np.all(violation[1:] <= (1 - lr * wd) * violation[:-1] + 1e-6)
            assert violation[-1] < 1e-4  # where float32 no longer moves x = 0.5
        free = trajectory(optimizers.lion(lr), jnp.zeros(7), gradient, 6000)
        np.testing.assert_allclose(free[-1], target, atol=5 * lr)

    @pytest.mark.optimized  # where entries tie, which of them is largest hangs on the last bit
    @pytest.mark.parametrize("name", KAPPAS)
    def test_fixed_points_solve_the_composite_problem(self, name):
        """At the minimum of f(x) + K*(wd x)/wd, wd x is a subgradient of K at -∇f(x): the
        Fenchel-Young gap of the two vanishes, and the iterates are in the domain of K*."""
        kappa, target, wd = KAPPAS[name], random_tree(1, scale=2.0), 1.5
        gradient = lambda x, t: jax.tree.map(jnp.subtract, x, target)
        schedule = optax.cosine_decay_schedule(0.03, 3000)
        optimizer = optimizers.lion_k(schedule, kappa, weight_decay=wd)
        x = jax.tree.map(lambda x: x[-1], trajectory(optimizer, random_tree(), gradient, 3000))
        pull = jax.tree.map(jnp.subtract, target, x)
        decayed = jax.tree.map(lambda x: wd * x, x)
        product = optax.tree.vdot(decayed, pull)
        gap = kappa.value(pull) + kappa.conjugate(decayed) - product
        assert abs(gap) < 2e-3 * product

    @pytest.mark.parametrize("name", KAPPAS)
    def test_fenchel_young(self, name):
        """K(x) + K*(u) ≥ u·x, with equality at u = ∂K(x); K* is infinite beyond."""
        kappa = KAPPAS[name]
        with jax.enable_x64(True):
            for seed in range(3):
                x = random_tree(seed, scale=2.0, dtype=np.float64)
                u = kappa.subgradient(x)
                product = lambda u, x: optax.tree.vdot(u, x)
                gap = kappa.value(x) + kappa.conjugate(u) - product(u, x)
                np.testing.assert_allclose(gap, 0, atol=1e-12)
                others = [random_tree(s, dtype=np.float64) for s in range(10, 15)]
                for other in (*others, *map(kappa.subgradient, others)):
                    gap = kappa.value(x) + kappa.conjugate(other) - product(other, x)
                    assert gap > -1e-12
            far = kappa.subgradient(random_tree(3, scale=1e3, dtype=np.float64))
            assert kappa.conjugate(far) < np.inf
            beyond = jax.tree.map(lambda u: 1.01 * u, far)
            assert kappa.conjugate(beyond) == np.inf

    @pytest.mark.parametrize("kappa", [optimizers.entropy, optimizers.huber(0.5)])
    @pytest.mark.parametrize("epsilon", [0.0, 0.5, 1 / 0.7])
    def test_lyapunov_function_falls_along_the_flow(self, kappa, epsilon):
        """Euler steps of length 1e-3 on a random quadratic."""
        rng = np.random.default_rng(0)
        with jax.enable_x64(True):
            root = jnp.asarray(rng.normal(size=(5, 5)))
            target = jnp.asarray(rng.normal(size=5))
            loss = lambda x: jnp.sum((root @ (x - target)) ** 2) / 2
            a, g, wd, dt = 1.3, 0.7, 0.4, 1e-3

            def euler(carry, _):
                x, m = carry
                pull = a * jax.grad(loss)(x) + g * m
                direction = kappa.subgradient(m - epsilon * pull)
                new = x + dt * (direction - wd * x), m - dt * pull
                h = optimizers.lion_k_lyapunov(
                    x,
                    m,
                    loss(x),
                    kappa=kappa,
                    alpha=a,
                    gamma=g,
                    epsilon=epsilon,
                    weight_decay=wd,
                )
                return new, h

            start = jnp.asarray(rng.uniform(-2, 2, size=5)), jnp.asarray(rng.normal(size=5))
            _, h = jax.jit(lambda c: jax.lax.scan(euler, c, length=10_000))(start)
            assert np.all(np.diff(h) < 0)
            assert h[-1] < h[0] - 1

    def test_larger_decay_tightens_the_box_around_a_networks_weights(self):
        rng = np.random.default_rng(0)
        inputs = jnp.asarray(rng.normal(size=(64, 4)), jnp.float32)
        labels = jnp.sin(3 * inputs[:, 0]) + inputs[:, 1] ** 2
        shapes = {"hidden": (4, 16), "out": (16,)}
        start = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
        loss = lambda w: jnp.mean((jnp.tanh(inputs @ w["hidden"]) @ w["out"] - labels) ** 2)

        @jax.jit
        def largest_weight(wd):
            optimizer = optimizers.lion(0.005, weight_decay=wd)
            final = trajectory(optimizer, start, lambda w, t: jax.grad(loss)(w), 2000)
            return jnp.max(jnp.abs(jax.flatten_util.ravel_pytree(final)[0][-16:]))

        sizes = {wd: float(largest_weight(wd)) for wd in (0.0, 1.0, 4.0)}
        assert sizes[0.0] > sizes[1.0] > sizes[4.0]
        assert sizes[1.0] <= 1 + 1e-3
        assert sizes[4.0] <= 1 / 4 + 1e-3


@pytest.mark.parametrize("name", KAPPAS)
class TestKappas:
    def test_zeros_and_empty_trees(self, name):
        kappa = KAPPAS[name]
        zeros = {"scalar": jnp.zeros(()), "matrix": jnp.zeros((3, 4)), "empty": jnp.zeros((0, 4))}
        assert kappa.value(zeros) == 0
        assert kappa.conjugate(zeros) == 0
        np.testing.assert_array_equal(flat(kappa.subgradient(zeros)), 0)
        assert np.all(np.isfinite(flat(jax.grad(kappa.value)(zeros))))
        assert kappa.value({}) == 0
        assert kappa.conjugate({}) == 0
        assert kappa.subgradient({}) == {}

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_no_size_under_or_overflows(self, name, scale):
        kappa, x = KAPPAS[name], random_tree(scale=scale)
        value, subgradient = literal(name, x)
        np.testing.assert_allclose(kappa.value(x), value, rtol=1e-5, atol=1e-37)
        np.testing.assert_allclose(flat(kappa.subgradient(x)), subgradient, rtol=1e-5, atol=1e-7)

    def test_bfloat16_is_computed_in_float32(self, name):
        kappa, half = KAPPAS[name], random_tree(dtype=jnp.bfloat16)
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)
        assert kappa.value(half).dtype == jnp.float32
        np.testing.assert_array_equal(kappa.value(half), kappa.value(wide))
        rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), kappa.subgradient(wide))
        chex.assert_trees_all_equal(kappa.subgradient(half), rounded)

    def test_sharded_tree_is_one_vector(self, name):
        x = {"bias": random_tree()["bias"], "kernel": jnp.tile(random_tree()["kernel"], (8, 1))}
        x["kernel"] += jnp.arange(24.0)[:, None] / 100
        mesh = jax.make_mesh((8,), ("data",))
        split = {"bias": PartitionSpec(), "kernel": PartitionSpec("data")}
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), split)
        ours = jax.jit(KAPPAS[name].subgradient)(jax.device_put(x, shardings))
        expected = flat(KAPPAS[name].subgradient(x))
        np.testing.assert_allclose(flat(ours), expected, rtol=1e-5, atol=1e-7)

    def test_vmap(self, name):
        kappa, trees = KAPPAS[name], [random_tree(seed) for seed in range(3)]
        stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
        ours = jax.vmap(kappa.subgradient)(stack(trees))
        chex.assert_trees_all_close(ours, stack([*map(kappa.subgradient, trees)]), rtol=1e-6)


def test_top_k_shares_the_last_places_among_ties():
    kappa = optimizers.top_k_l1(2)
    tied = {"a": jnp.array([1.0, -1.0]), "b": jnp.array([3.0, 1.0])}
    u = kappa.subgradient(tied)
    np.testing.assert_allclose(flat(u), [1 / 3, -1 / 3, 1, 1 / 3], rtol=1e-6)
    assert kappa.value(tied) + kappa.conjugate(u) == optax.tree.vdot(u, tied) == 4
    np.testing.assert_array_equal(optimizers.top_k_l1(np.int64(9)).subgradient(tied)["a"], [1, -1])


def test_groups_run_along_the_given_axes():
    x = random_tree()["kernel"]
    columns = optimizers.group_l2(0).subgradient(x)
    np.testing.assert_allclose(jnp.linalg.norm(columns, axis=0), 1, rtol=1e-6)
    both = optimizers.group_l2((0, 1)).subgradient(x)
    np.testing.assert_allclose(both, optimizers.l2.subgradient(x), rtol=1e-6)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 5)))
    groups = optimizers.group_l2((1, 3)).subgradient(images)
    np.testing.assert_allclose(jnp.linalg.norm(groups, axis=(1, 3)), 1, rtol=1e-6)
    with pytest.raises(ValueError, match="axis"):
        optimizers.group_l2(1).subgradient(random_tree())


def test_kappas_are_chosen_by_name():
    x = random_tree()
    for name in ("l1", "l2", "lp", "group_l2", "huber", "entropy", "top_k_l1", "relu_truncated"):
        optimizer = optimizers.scale_by_lion_k(name)
        u, _ = optimizer.update(x, optimizer.init(x))
        mixed = jax.tree.map(lambda g: (1 - 0.9) * g, x)
        kappa = getattr(optimizers, name)
        kappa = kappa if isinstance(kappa, optimizers.Kappa) else kappa()
        chex.assert_trees_all_close(u, kappa.subgradient(mixed), rtol=1e-6)
        assert isinstance(resolve_kappa(name), optimizers.Kappa)


def test_momentum_has_its_own_type():
    x = random_tree()
    optimizer = optimizers.scale_by_lion(mu_dtype=jnp.bfloat16)
    updates, state = optimizer.update(x, optimizer.init(x))
    assert state.mu["bias"].dtype == jnp.bfloat16
    assert updates["bias"].dtype == jnp.float32


def test_lyapunov_function_is_infinite_outside_the_constraint():
    x = jnp.array([2.0])
    for epsilon in (0.5, 1.0):
        h = optimizers.lion_k_lyapunov(
            x, x, 0.0, kappa="l1", alpha=1.0, gamma=1.0, epsilon=epsilon, weight_decay=1.0
        )
        assert h == np.inf


def test_box_violation_edges():
    assert optimizers.box_constraint_violation({}, 1.0) == 0
    assert optimizers.box_constraint_violation({"w": jnp.full(3, 1e30)}, 0.0) == 0
    assert optimizers.box_constraint_violation(jnp.array([-4.0, 1.0]), 0.5) == 1


LYAPUNOV = {"kappa": "l1", "alpha": 1.0, "gamma": 1.0, "epsilon": 0.5, "weight_decay": 1.0}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: optimizers.lion(b1=1.0), ValueError, r"b1 must be in \[0, 1\)"),
        (lambda: optimizers.lion(b2=-0.1), ValueError, r"b2 must be in \[0, 1\)"),
        (lambda: optimizers.scale_by_lion(b2=jnp.nan), ValueError, "b2 must be in"),
        (lambda: optimizers.lion(mu_dtype=jnp.int8), TypeError, "mu_dtype must be a floating"),
        (lambda: optimizers.lion_k(0.1, "l3"), ValueError, "one of l1, l2, entropy, lp, group_l2"),
        (lambda: optimizers.lion_k(0.1, jnp.sign), TypeError, "kappa must be a Kappa or the name"),
        (lambda: optimizers.lp(0.5), ValueError, "p must be in"),
        (lambda: optimizers.huber(0.0), ValueError, "epsilon must be in"),
        (lambda: optimizers.relu_truncated(-1.0), ValueError, "threshold must be in"),
        (lambda: optimizers.top_k_l1(0), ValueError, "k must be an integer"),
        (lambda: optimizers.top_k_l1(1.5), ValueError, "k must be an integer"),
        (
            lambda: optimizers.lion_hyperparameters_from_adamw(1e-3, 0.1, factor=0.0),
            ValueError,
            "factor must be in",
        ),
        (lambda: optimizers.box_constraint_violation({}, -1.0), ValueError, "weight_decay must"),
        *(
            (
                lambda change=change: optimizers.lion_k_lyapunov(
                    jnp.ones(2), jnp.ones(2), 0.0, **LYAPUNOV | change
                ),
                ValueError,
                message,
            )
            for change, message in [
                ({"weight_decay": 0.0}, "weight_decay must be in"),
                ({"gamma": 0.0}, "gamma must be in"),
                ({"alpha": -1.0}, "alpha must be in"),
                ({"epsilon": 2.0}, r"epsilon \* gamma must be in"),
                ({"kappa": "none"}, "kappa must be"),
            ]
        ),
        (
            lambda: optimizers.lion_k_lyapunov(jnp.ones(2), jnp.ones(3), 0.0, **LYAPUNOV),
            ValueError,
            "momentum must have shape",
        ),
    ],
)
def test_bad_input_raises(call, error, message):
    with pytest.raises(error, match=message):
        call()
