import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref.optimizers import (
    SAFState,
    mesa_loss,
    saf_loss,
    saf_memory_init,
    sam_value_and_grad,
    trajectory_loss,
)

ORACLE = Path(__file__).parents[1] / "oracles" / "sharpness_aware_free.npz"


def random_logits(*shape, seed=0, scale=3.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def literal(logits, past, temperature=5.0):
    """τ² KL(softmax(past / τ) ‖ softmax(logits / τ)) in float64."""
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    q, p = (softmax(np.float64(x) / temperature) for x in (logits, past))
    return temperature**2 * (p * np.log(p / q)).sum(-1)


@pytest.fixture(scope="module")
def stored():
    with np.load(ORACLE) as file:
        return {key: jnp.asarray(file[key]) for key in file.files}


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_trajectory_loss_by_the_formula(self):
        logits, past = random_logits(2, 3, 4), random_logits(2, 3, 4, seed=1)
        ours = self.variant(trajectory_loss)(logits, past)
        np.testing.assert_allclose(ours, literal(logits, past), rtol=1e-5)
        other = self.variant(lambda x, y: trajectory_loss(x, y, temperature=0.5, axis=1))
        expected = literal(np.moveaxis(logits, 1, -1), np.moveaxis(past, 1, -1), 0.5)
        np.testing.assert_allclose(other(logits, past), expected, rtol=1e-5)


class TestNumbers:
    def test_trajectory_loss_agrees_with_pytorch(self, stored):
        ours = trajectory_loss(stored["logits"][1], stored["logits"][0])
        np.testing.assert_allclose(ours, stored["distances"], rtol=1e-5)

    def test_saf_agrees_with_its_authors_ring_for_twenty_steps(self, stored):
        """Theirs has a slot more and is written before it is read."""
        labels, count = stored["labels"], len(stored["labels"])

        @jax.jit
        def step(logits, state, ids, epoch):
            def loss(logits):
                ce = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels[ids])
                each = saf_loss(ce, logits, state, ids, epoch, start_epoch=4, end_epoch=9)
                return jnp.mean(each[0]), each[1]

            return jax.value_and_grad(loss, has_aux=True)(logits)

        state = saf_memory_init(count, stored["logits"].shape[-1], dtype=jnp.float32)
        for epoch, batches in enumerate(stored["ids"]):
            for i, ids in enumerate(batches):
                logits = stored["logits"][epoch, ids]
                (value, state), gradient = step(logits, state, ids, jnp.asarray(epoch))
                np.testing.assert_allclose(value, stored["losses"][epoch, i], rtol=1e-5)
                expected = stored["gradients"][epoch, i]
                np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)

    def test_mesa_by_hand(self):
        logits, average = random_logits(5, 4), random_logits(5, 4, seed=1)
        losses = jnp.arange(5.0)
        active = mesa_loss(losses, logits, average, 6)
        np.testing.assert_allclose(active, losses + 0.8 * literal(logits, average), rtol=1e-5)
        for epoch, setting in ((5, {}), (6, {"start_epoch": 6}), (9, {"end_epoch": 9})):
            np.testing.assert_array_equal(
                mesa_loss(losses, logits, average, epoch, **setting), losses
            )
        to_average = jax.grad(lambda x: jnp.sum(mesa_loss(losses, logits, x, 6)))(average)
        np.testing.assert_array_equal(to_average, 0)

    def test_mesa_along_the_trajectory_of_the_average(self):
        """With β = 0 the average is the parameters, and the loss the plain one; with β > 0 it
        trails them."""
        x, target = random_logits(8, 3), random_logits(8, 4, seed=1)
        plain = lambda w: jnp.mean((x @ w - target) ** 2, axis=-1)

        def trained(decay):
            w = v = random_logits(3, 4, seed=2)
            extra = []
            for _ in range(5):
                values = lambda w, v: mesa_loss(plain(w), x @ w, x @ v, 6)
                extra.append(float(jnp.max(jnp.abs(values(w, v) - plain(w)))))
                w = w - 0.1 * jax.grad(lambda w, v: values(w, v).mean())(w, v)
                v = optax.incremental_update(w, v, 1 - decay)
            return extra

        assert max(trained(0.0)) < 1e-5
        extra = trained(0.9)
        assert extra[0] < 1e-5 < 1e-2 < extra[1] < extra[2]


class TestClaims:
    @pytest.mark.claim("sharpness-aware-training-for-free")
    @pytest.mark.optimized
    def test_flatter_minima_for_the_cost_of_one_gradient(self):
        """On noisy half-moons the Hessian of the training loss ends the smaller the more the
        trajectory loss weighs, at the same accuracy; the step takes 1.1 times the operations of
        plain descent at most, that of SAM 1.9 times at least."""
        data = jax.tree.map(lambda *x: jnp.stack(x), *map(noisy_data, range(3)))
        each = jax.vmap(jax.vmap(saf_outcome, (None, 0)), (0, None))
        curvature, accuracy = jax.jit(each)(data, jnp.array([0.0, 0.3, 1.0]))
        assert np.all(curvature[:, 1] < 0.96 * curvature[:, 0])
        assert np.all(curvature[:, 2] < 0.88 * curvature[:, 0])
        assert np.all(accuracy[:, 1:] > accuracy[:, :1] - 0.02)

        x, ids = random_logits(32, 64), jnp.arange(32)
        w = [(random_logits(64, 64), jnp.zeros(64)), (random_logits(64, 10), jnp.zeros(10))]
        state = saf_memory_init(32, 10)

        def plain(w):
            logits = outputs(w, x)
            return optax.losses.softmax_cross_entropy_with_integer_labels(logits, ids % 10), logits

        def with_saf(w, state):
            losses, state = saf_loss(*plain(w), state, ids, 6)
            return losses.mean(), state

        def operations(f, *args):
            return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]

        sgd = operations(jax.grad(lambda w: plain(w)[0].mean()), w)
        saf = operations(jax.grad(with_saf, has_aux=True), w, state)
        sam = operations(lambda w: sam_value_and_grad(lambda w: plain(w)[0].mean())(w)[1], w)
        assert saf < 1.1 * sgd
        assert sam > 1.9 * sgd

    def test_distance_is_zero_at_the_past_and_positive_elsewhere(self):
        logits, past = random_logits(50, 4), random_logits(50, 4, seed=1)
        value, gradient = jax.value_and_grad(lambda x: jnp.sum(trajectory_loss(x, past)))(past)
        np.testing.assert_allclose(value, 0, atol=1e-5)
        np.testing.assert_allclose(gradient, 0, atol=1e-5)
        distance = trajectory_loss(logits, past)
        assert np.all(distance > 0)
        np.testing.assert_allclose(trajectory_loss(logits + 7, past), distance, rtol=1e-3)
        np.testing.assert_allclose(trajectory_loss(logits, past - 7), distance, rtol=1e-3)

    def test_gradient_is_the_difference_of_the_softmaxes(self):
        logits, past = random_logits(6, 4), random_logits(6, 4, seed=1)
        for t in (0.7, 5.0):
            total = lambda x: jnp.sum(trajectory_loss(x, past, temperature=t))
            expected = t * (jax.nn.softmax(logits / t) - jax.nn.softmax(past / t))
            np.testing.assert_allclose(jax.grad(total)(logits), expected, rtol=1e-4, atol=1e-6)
        to_past = jax.grad(lambda past: jnp.sum(trajectory_loss(logits, past)))(past)
        np.testing.assert_array_equal(to_past, 0)

    @pytest.mark.parametrize("lag", [1, 3])
    def test_the_past_lies_exactly_lag_epochs_back(self, lag):
        logits, ids = random_logits(7, 4, 3), jnp.array([3, 0, 5, 1])
        step = jax.jit(
            lambda s, z, e: saf_loss(jnp.ones(4), z, s, ids, e, start_epoch=-1, weight=1)
        )
        state = saf_memory_init(6, 3, lag, jnp.float32)
        for epoch in range(7):
            values, state = step(state, logits[epoch], epoch)
            expected = literal(logits[epoch], logits[epoch - lag]) if epoch >= lag else np.zeros(4)
            np.testing.assert_allclose(values - 1, expected, rtol=1e-4, atol=1e-6)


def noisy_data(seed, examples=120, epochs=600, batch=20):
    """Half-moons of which a tenth have the wrong label, first weights, batches of ids."""
    rng = np.random.default_rng(seed)
    labels, angle = rng.integers(2, size=examples), rng.uniform(0, np.pi, size=examples)
    x = np.stack([np.cos(angle), np.sin(angle)], 1) * np.where(labels, -1, 1)[:, None]
    x += labels[:, None] * np.array([1.0, 0.5]) + 0.2 * rng.normal(size=(examples, 2))
    labels = np.where(rng.uniform(size=examples) < 0.1, 1 - labels, labels)
    gains = {(2, 16): 2.0, (16, 16): 0.25, (16, 2): 0.25}
    weights = [(g * rng.normal(size=s)).astype(np.float32) for s, g in gains.items()]
    orders = np.stack([rng.permutation(examples).reshape(-1, batch) for _ in range(epochs)])
    return x.astype(np.float32), labels, weights, orders


def outputs(w, x):
    for kernel, bias in w[:-1]:
        x = jnp.tanh(x @ kernel + bias)
    return x @ w[-1][0] + w[-1][1]


def saf_outcome(data, weight):
    """The top eigenvalue of the training loss's Hessian and the training accuracy after SAF."""
    x, labels, weights, orders = data
    epochs, steps, _ = orders.shape

    def losses(w, ids):
        logits = outputs(w, x[ids])
        targets = 0.9 * jax.nn.one_hot(labels[ids], 2) + 0.05
        return optax.losses.softmax_cross_entropy(logits, targets), logits

    def step(carry, now):
        w, state = carry
        epoch, ids = now

        def total(w):
            values, new = saf_loss(*losses(w, ids), state, ids, epoch, weight=weight)
            return values.mean(), new

        g, state = jax.grad(total, has_aux=True)(w)
        return (jax.tree.map(lambda w, g: w - 0.3 * g, w, g), state), None

    now = jnp.repeat(jnp.arange(epochs), steps), orders.reshape(epochs * steps, -1)
    start = [(k, jnp.zeros(k.shape[1])) for k in weights], saf_memory_init(len(x), 2)
    (w, _), _ = jax.lax.scan(step, start, now)
    vector, unravel = jax.flatten_util.ravel_pytree(w)
    everything = jnp.arange(len(x))
    hessian = jax.hessian(lambda v: losses(unravel(v), everything)[0].mean())(vector)
    accuracy = jnp.mean(outputs(w, x).argmax(-1) == labels)
    return jnp.linalg.eigvalsh(hessian)[-1], accuracy


SETTING = {"start_epoch": -1, "weight": 1.0}


def run(epochs, state, *, ids=None, **setting):
    """The values of every epoch, for losses of 0, and the memory after the last."""
    step = jax.jit(functools.partial(saf_loss, **(SETTING | setting)))
    values = []
    for epoch, logits in epochs:
        rows = jnp.arange(len(logits)) if ids is None else jnp.asarray(ids)
        losses = jnp.zeros(logits.shape[:-1])
        value, state = step(losses, logits, state, rows, epoch)
        values.append(value)
    return values, state


class TestMemory:
    def test_only_what_was_seen_exactly_lag_epochs_before_counts(self):
        """Not an example that was missed then, nor one that comes again in the same epoch."""
        z = random_logits(5, 2, 3)
        missed = [(0, z[0]), (1, z[1]), (4, z[2]), (5, z[3]), (6, z[4])]
        values, _ = run(missed, saf_memory_init(2, 3, lag=2, dtype=jnp.float32))
        for value, past in zip(values, [None, None, None, None, 2]):
            expected = np.zeros(2) if past is None else literal(z[4], z[past])
            np.testing.assert_allclose(value, expected, rtol=1e-4)
        values, _ = run([(0, z[0]), (2, z[1]), (2, z[2])], saf_memory_init(2, 3, lag=2))
        assert np.all(values[1] > 0)
        np.testing.assert_array_equal(values[2], 0)

    def test_ids_out_of_range_have_no_past_and_are_not_stored(self):
        z, empty = random_logits(2, 4, 3), saf_memory_init(3, 3, lag=1)
        values, state = run([(0, z[0]), (1, z[1])], empty, ids=[-1, 2, 3, -3])
        assert values[1][1] > 0
        np.testing.assert_array_equal(jnp.delete(values[1], 1), 0)
        _, alone = run([(0, z[0, 1:2]), (1, z[1, 1:2])], empty, ids=[2])
        chex.assert_trees_all_equal(state, alone)

    def test_an_id_that_comes_twice_keeps_one_of_them(self):
        z = random_logits(2, 2, 3)
        values, _ = run([(0, z[0]), (1, z[1])], saf_memory_init(3, 3, 1, jnp.float32), ids=[1, 1])
        either = [literal(z[1], z[0, i]) for i in range(2)]
        assert any(np.allclose(values[1], e, rtol=1e-4) for e in either)

    def test_start_and_end(self):
        z = random_logits(8, 2, 3)
        values, _ = run(enumerate(z), saf_memory_init(2, 3, 1), start_epoch=3, end_epoch=6)
        assert [bool(np.any(v > 0)) for v in values] == [False] * 4 + [True] * 2 + [False] * 2

    def test_logits_of_a_sequence(self):
        """One id for `[length, vocabulary]`: the same as one for each token."""
        z = random_logits(2, 3, 4, 5)
        whole, state = run(enumerate(z), saf_memory_init(6, (4, 5), 1), ids=[5, 0, 2])
        assert whole[1].shape == (3, 4)
        assert state.logits.shape == (1, 6, 4, 5)
        tokens = z.reshape(2, 12, 5)
        each, _ = run(enumerate(tokens), saf_memory_init(12, 5, 1))
        np.testing.assert_allclose(whole[1].ravel(), each[1], rtol=1e-5)
        np.testing.assert_array_equal(whole[0], 0)

    def test_a_large_common_part_of_the_logits_does_not_cost_precision(self):
        """In bfloat16 1000.5 is 1000; what is stored is the distance from the largest."""
        z = jnp.array([[[1000.5, 1000.0, 995.0]], [[2.0, 0.0, 1.0]]])
        values, state = run(enumerate(z), saf_memory_init(1, 3, 1))
        assert state.logits.dtype == jnp.bfloat16
        np.testing.assert_allclose(values[1], literal(z[1], [0.5, 0.0, -5.0]), rtol=1e-4)

    def test_checkpoint(self, tmp_path):
        z = random_logits(4, 2, 3)
        _, middle = run(enumerate(z[:2]), saf_memory_init(2, 3, 2))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", middle)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / "state", saf_memory_init(2, 3, 2))
        rest = [(2, z[2]), (3, z[3])]
        chex.assert_trees_all_equal(run(rest, restored), run(rest, middle))


class TestSharding:
    """Examples and their memory over 8 devices, against one."""

    LAG, COUNT, EPOCHS = 2, 256, 4

    @pytest.fixture(scope="class")
    def mesh(self):
        return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    @pytest.fixture(scope="class")
    def data(self):
        """Logits, ids (4 of each device's 32, in an order of its own) and what one device says."""
        z, rng = random_logits(self.EPOCHS, 32, 3), np.random.default_rng(1)
        local = np.stack([rng.permuted(np.tile([0, 7, 9, 31], (8, 1)), axis=1) for _ in z])
        ids = (local + 32 * np.arange(8)[:, None]).reshape(self.EPOCHS, -1)
        state, values = saf_memory_init(self.COUNT, 3, self.LAG), []
        for epoch in range(self.EPOCHS):
            value, state = self.step(state, z[epoch], ids[epoch], epoch)
            values.append(value)
        assert np.all(values[-1] > 0)
        return z, ids, values, state

    def step(self, state, logits, ids, epoch):
        return saf_loss(jnp.zeros(len(logits)), logits, state, ids, epoch, **SETTING)

    def check(self, step, mesh, data, ids):
        """Runs `step` and returns the program's text."""
        table, rows = NamedSharding(mesh, P(None, "data")), NamedSharding(mesh, P("data"))
        init = jax.jit(saf_memory_init, static_argnums=(0, 1, 2), out_shardings=table)
        state = init(self.COUNT, 3, self.LAG)
        z, _, values, expected = data
        step = jax.jit(step, out_shardings=(rows, SAFState(table, table)))
        for epoch in range(self.EPOCHS):
            args = *jax.device_put((z[epoch], ids[epoch]), rows), jnp.asarray(epoch)
            value, state = step(state, *args)
            np.testing.assert_allclose(value, values[epoch], rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(expected))
        assert all(x.sharding.is_equivalent_to(table, x.ndim) for x in state)
        return step.lower(state, *args).compile().as_text()

    def test_under_jit_the_memory_is_not_gathered(self, mesh, data):
        def step(state, *args):
            state = jax.lax.with_sharding_constraint(state, NamedSharding(mesh, P(None, "data")))
            return self.step(state, *args)

        text = self.check(step, mesh, data, data[1])
        assert f"[{self.LAG},{self.COUNT // 8},3]" in text
        assert f"[{self.LAG},{self.COUNT},3]" not in text

    def test_inside_shard_map_with_local_ids_nothing_is_communicated(self, mesh, data):
        table, rows = P(None, "data"), P("data")
        state = SAFState(table, table)
        step = jax.shard_map(
            self.step, mesh=mesh, in_specs=(state, rows, rows, P()), out_specs=(rows, state)
        )
        text = self.check(step, mesh, data, data[1] % 32)
        for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
            assert collective not in text


GOOD = {
    "losses": jnp.zeros(2),
    "logits": jnp.zeros((2, 3)),
    "state": saf_memory_init(4, 3),
    "example_ids": jnp.arange(2),
    "epoch": 0,
}


class TestEdges:
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
    def test_extreme_logits_are_finite(self, dtype):
        """±1e4, one class, all equal; and in float16, where differences overflow."""
        rows = [[1e4, -1e4, 0.0], [-1e4, 1e4, 6e4], [1e4] * 3, [0.0] * 3, [-6e4, 0.0, 6e4]]
        rows = jnp.asarray(rows, dtype)
        step = lambda z: run([(0, rows), (1, z)], saf_memory_init(5, 3, 1, dtype))[0][1]
        for z in (rows, rows[::-1], jnp.zeros_like(rows)):
            total, gradient = jax.value_and_grad(lambda z: jnp.sum(step(z)))(z)
            assert gradient.dtype == dtype
            assert np.all(np.isfinite(gradient.astype(jnp.float32)))
            assert np.isfinite(total)
        np.testing.assert_array_equal(trajectory_loss(rows[:, :1], -rows[:, :1]), 0)

    def test_narrow_types_are_computed_in_float32(self):
        logits, past = (random_logits(5, 4, seed=s).astype(jnp.bfloat16) for s in (0, 1))
        wide = lambda x: x.astype(jnp.float32)
        ours = trajectory_loss(logits, past)
        assert ours.dtype == jnp.bfloat16
        exact = trajectory_loss(wide(logits), wide(past))
        np.testing.assert_array_equal(ours, exact.astype(jnp.bfloat16))
        losses = jnp.linspace(0.0, 1.0, 5)
        added = mesa_loss(losses, logits, past, 6)
        np.testing.assert_array_equal(added, mesa_loss(losses, wide(logits), wide(past), 6))
        assert mesa_loss(losses.astype(jnp.bfloat16), logits, past, 6).dtype == jnp.bfloat16

    def test_classes_that_do_not_exist(self):
        logits, past = random_logits(3, 4), random_logits(3, 4, seed=1)
        where = jnp.array([[True, True, True, False]] * 2 + [[False] * 4])
        broken = jnp.where(where, logits, jnp.nan)
        total = lambda z: jnp.sum(trajectory_loss(z, past, where=where)[:2])
        value, gradient = jax.value_and_grad(total)(broken)
        np.testing.assert_allclose(value, literal(logits[:2, :3], past[:2, :3]).sum(), rtol=1e-5)
        np.testing.assert_array_equal(gradient[~where], 0)
        assert trajectory_loss(broken, past, where=where)[2] == 0
        excluded = jnp.where(where, past, -jnp.inf)[:2]
        ours = trajectory_loss(jnp.where(where, logits, -jnp.inf)[:2], excluded)
        np.testing.assert_allclose(ours.sum(), value, rtol=1e-5)

    def test_sizes_may_be_integers_of_numpy(self):
        state = saf_memory_init(np.int64(5), np.int32(3), np.int64(2))
        assert state.logits.shape == (2, 5, 3)

    def test_no_examples(self):
        values, state = run([(0, jnp.zeros((0, 3)))], saf_memory_init(2, 3, 1))
        assert values[0].shape == (0,)
        chex.assert_trees_all_equal(state, saf_memory_init(2, 3, 1))
        assert trajectory_loss(jnp.zeros((0, 3)), jnp.zeros((0, 3))).shape == (0,)

    def test_traced_numbers(self):
        z = random_logits(2, 2, 3)
        _, state = run([(0, z[0])], saf_memory_init(2, 3, 1))
        step = lambda epoch, weight, start: saf_loss(
            jnp.zeros(2), z[1], state, jnp.arange(2), epoch, weight=weight, start_epoch=start
        )
        chex.assert_trees_all_close(jax.jit(step)(1, 0.5, 0), step(1, 0.5, 0), rtol=1e-5)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"losses": jnp.zeros(())}, ValueError, r"losses must have shape \(2,\), got \(\)"),
            ({"losses": jnp.zeros(2, int)}, TypeError, "losses must have a floating-point type"),
            ({"logits": jnp.zeros((2, 3), int)}, TypeError, "logits must have a floating-point"),
            (
                {"logits": jnp.zeros((2, 4))},
                ValueError,
                r"state.logits must have shape \(3, 4, 4\)",
            ),
            ({"logits": jnp.zeros(())}, ValueError, "example_ids must have shape"),
            ({"example_ids": jnp.arange(3)}, ValueError, r"example_ids must have shape \(2,\)"),
            ({"example_ids": jnp.zeros(2)}, TypeError, "example_ids must be integers, got float32"),
            ({"epoch": -1}, ValueError, r"epoch must be in \[0, inf\), got -1"),
            ({"epoch": 1.0}, TypeError, "epoch must be an integer, got 1.0"),
            ({"weight": -0.1}, ValueError, r"weight must be in \[0, inf\)"),
            ({"weight": np.nan}, ValueError, "weight must be in"),
            ({"temperature": 0.0}, ValueError, r"temperature must be in \(0, inf\)"),
            ({"start_epoch": np.nan}, ValueError, "start_epoch must be in"),
            ({"end_epoch": np.inf}, ValueError, "end_epoch must be in"),
        ],
    )
    def test_bad_input_of_saf(self, change, error, message):
        with pytest.raises(error, match=message):
            saf_loss(**GOOD | change)

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda: saf_memory_init(0, 3), ValueError, "num_examples must be an integer of at"),
            (lambda: saf_memory_init(5, 3, lag=0), ValueError, "lag must be an integer of at"),
            (lambda: saf_memory_init(5, ()), ValueError, "logits_shape must be"),
            (lambda: saf_memory_init(5, (4, 0)), ValueError, r"logits_shape must .* got \(4, 0\)"),
            (lambda: saf_memory_init(5, 3, dtype=int), TypeError, "dtype must be a floating-point"),
            (
                lambda: trajectory_loss(jnp.zeros((2, 3)), jnp.zeros((2, 4))),
                ValueError,
                r"past_logits must have shape \(2, 3\), got \(2, 4\)",
            ),
            (
                lambda: trajectory_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)), axis=2),
                ValueError,
                "axis must name axes",
            ),
            (
                lambda: trajectory_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)), where=jnp.ones(4)),
                ValueError,
                "where must broadcast",
            ),
            (
                lambda: mesa_loss(jnp.zeros(2), jnp.zeros((2, 3)), jnp.zeros((2, 4)), 0),
                ValueError,
                "ema_logits must have shape",
            ),
            (
                lambda: mesa_loss(jnp.zeros(2), jnp.zeros((2, 3)), jnp.zeros((2, 3)), -1),
                ValueError,
                "epoch must be in",
            ),
        ],
    )
    def test_bad_input_raises(self, call, error, message):
        with pytest.raises(error, match=message):
            call()
