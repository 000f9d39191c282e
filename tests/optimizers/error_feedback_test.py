import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref import optimizers

COMPRESSORS = {
    "top_k": optimizers.top_k_compressor(2),
    "block_top_k": optimizers.block_top_k_compressor(1, block_size=5),
    "rand_k": optimizers.rand_k_compressor(0.5),
    "sign": optimizers.sign_compressor(),
    "natural": optimizers.natural_compressor(),
}
WEIGHTS = np.array([1.0, 2.0, 5.0, 1.0, 3.0, 1.0, 1.0, 4.0])
SHAPES = {"kernel": (3, 4), "bias": (), "empty": (0, 2)}
# jaxlib 0.11.2 crashes where a program for CPU gathers anything and returns an empty shard.
FILLED = {name: shape for name, shape in SHAPES.items() if 0 not in shape}


def random_tree(seed=0, clients=None, shapes=SHAPES, dtype=np.float32):
    rng = np.random.default_rng(seed)
    lead = () if clients is None else (clients,)
    return {k: jnp.asarray(rng.normal(size=lead + s), dtype) for k, s in shapes.items()}


def trajectory(optimizer, start, gradient, steps, **extra_args):
    """x₀, ..., x_steps, where gradient(x, t) is what the optimizer gets in step t."""
    optimizer = optax.with_extra_args_support(optimizer)

    def one(carry, t):
        x, state = carry
        updates, state = optimizer.update(gradient(x, t), state, x, **extra_args)
        return (optax.apply_updates(x, updates), state), x

    run = jax.jit(lambda c: jax.lax.scan(one, c, jnp.arange(steps)))
    (last, _), before = run((start, optimizer.init(start)))
    return jax.tree.map(lambda xs, x: jnp.concatenate([xs, x[None]]), before, last)


def largest(v, k):
    """Top-k of a vector, entry by entry."""
    kept = sorted(range(len(v)), key=lambda i: (-abs(v[i]), i))[:k]
    return np.array([value if i in kept else 0.0 for i, value in enumerate(v)])


def mean_sign(v):
    return np.mean(np.abs(v)) * np.where(v < 0, -1, 1)


# The functions f_i(x) = (a_i·x)² + ‖x‖²/4 on which compression without feedback diverges.
A = np.array([[-3.0, 2, 2], [2, -3, 2], [2, 2, -3]])


def counterexample(x, t=0):
    return 2 * (A @ x)[:, None] * A + x / 2


def heterogeneous(smoothness, d=10):
    """∇f_i(x) of quadratics whose largest curvatures are given, and the L of their mean."""
    rng = np.random.default_rng(0)
    hessians = []
    for largest_curvature in smoothness:
        basis, _ = np.linalg.qr(rng.normal(size=(d, d)))
        curvatures = largest_curvature * np.linspace(0.2, 1, d)
        hessians.append(basis * curvatures @ basis.T)
    hessians, centres = np.stack(hessians), rng.normal(size=(len(smoothness), d))
    gradient = lambda x, t=0: jnp.einsum("nij,nj->ni", hessians, x - centres)
    return gradient, np.linalg.norm(hessians.mean(0), 2)


class TestClaims:
    @pytest.mark.claim("ef21-weighted")
    def test_feedback_converges_where_compression_diverges_and_at_the_arithmetic_mean_step(self):
        """Top-1 of the gradients themselves multiplies x by 1 + 11γ/6 in every step, whatever γ.
        With feedback x → 0; and the step of the arithmetic mean, larger by 2.2 on functions with
        L = (1, 1, 1, 1, 1, 50), converges too, and faster by orders of magnitude."""
        top_1 = optimizers.top_k_compressor(1)
        with jax.enable_x64(True):
            start = jnp.ones(3)
            hessian = 2 / 3 * A.T @ A + np.eye(3) / 2
            smoothness = 2 * np.sum(A**2, axis=1) + 1 / 2
            safe = optimizers.ef21_step_size(np.linalg.norm(hessian, 2), smoothness, 1 / 3)
            for step in (1e-3, float(safe), 0.5):
                x = start
                for t in range(4):
                    gradients = counterexample(x)
                    sent = [top_1.decompress(top_1.compress(g), jnp.zeros(3)) for g in gradients]
                    x = x - step * jnp.mean(jnp.stack(sent), axis=0)
                    growth = (1 + 11 * step / 6) ** (t + 1)
                    np.testing.assert_allclose(x, growth * np.ones(3), rtol=1e-13)
            ours = optimizers.ef21(safe, top_1, num_clients=3)
            assert np.max(np.abs(trajectory(ours, start, counterexample, 4000)[-1])) < 1e-8

            constants = np.array([1.0, 1, 1, 1, 1, 50])
            gradient, total = heterogeneous(constants)
            alpha, norms, steps = top_1.alpha(10), {}, {}
            for analysis in ("arithmetic", "quadratic"):
                steps[analysis] = optimizers.ef21_step_size(
                    total, constants, alpha, analysis=analysis
                )
                ours = optimizers.ef21(steps[analysis], top_1, num_clients=6)
                x = trajectory(ours, jnp.zeros(10), gradient, 3000)
                norms[analysis] = np.sum(gradient(x[-1]).mean(0) ** 2)
            assert steps["arithmetic"] / steps["quadratic"] == pytest.approx(2.2, abs=0.05)
            assert norms["arithmetic"] < 1e-15
            assert norms["arithmetic"] < 1e-5 * norms["quadratic"]

    @pytest.mark.parametrize("name", ["top_k", "block_top_k", "rand_k", "sign"])
    def test_weighted_and_plain_are_the_same_for_homogeneous_compressors(self, name):
        """g_i of one is n w_i times g_i of the other, and so is all that follows."""
        constants = np.array([1.0, 2, 3, 10])
        with jax.enable_x64(True):
            gradient, _ = heterogeneous(constants)
            options = {"num_clients": 4, "key": jax.random.PRNGKey(0)}
            runs = [
                trajectory(
                    optimizers.ef21(2e-3, COMPRESSORS[name], weights=weights, **options),
                    jnp.zeros(10),
                    gradient,
                    300,
                )
                for weights in (None, constants)
            ]
            atol = 1e-7 if name == "sign" else 1e-12  # the scale travels in float32
            np.testing.assert_allclose(*runs, rtol=0, atol=atol)
            assert np.max(np.abs(runs[0][-1])) > 0.1
            natural = optimizers.ef21(2e-3, COMPRESSORS["natural"], weights=constants, **options)
            x = trajectory(natural, jnp.zeros(10), gradient, 300)
            plain = optimizers.ef21(2e-3, COMPRESSORS["natural"], **options)
            assert np.max(np.abs(x - trajectory(plain, jnp.zeros(10), gradient, 300))) > 1e-6

    @pytest.mark.parametrize("weights", [None, WEIGHTS])
    def test_without_compression_it_is_gradient_descent(self, weights):
        gradient, _ = heterogeneous(np.linspace(1, 2, 8))
        identity = optimizers.identity_compressor()
        ours = optimizers.ef21(0.1, identity, num_clients=8, weights=weights)
        ours = trajectory(ours, jnp.zeros(10), gradient, 20)
        descent = trajectory(optax.sgd(0.1), jnp.zeros(10), lambda x, t: gradient(x).mean(0), 20)
        np.testing.assert_allclose(ours, descent, rtol=1e-5, atol=1e-6)
        classical = optimizers.ef14(0.1, identity, num_clients=8)
        classical = trajectory(classical, jnp.zeros(10), gradient, 20)
        np.testing.assert_allclose(classical, descent, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("name", COMPRESSORS)
    def test_every_compressor_converges(self, name):
        gradient, total = heterogeneous(np.array([1.0, 2, 3]))
        step = optimizers.ef21_step_size(total, np.array([1.0, 2, 3]), COMPRESSORS[name].alpha(10))
        ours = optimizers.ef21(step, COMPRESSORS[name], num_clients=3, key=jax.random.PRNGKey(0))
        x = trajectory(ours, jnp.zeros(10), gradient, 1500)
        before, after = (np.sum(gradient(x[t]).mean(0) ** 2) for t in (0, -1))
        assert after < 1e-6 * before

    def test_classical_feedback_keeps_a_distance(self):
        """Of the order of the step, where the functions differ; EF21 keeps none."""
        gradient, total = heterogeneous(np.array([1.0, 2, 3]))
        top_1, ends = optimizers.top_k_compressor(1), {}
        step = float(optimizers.ef21_step_size(total, np.array([1.0, 2, 3]), 0.1))
        for name, optimizer in (("ef21", optimizers.ef21), ("ef14", optimizers.ef14)):
            x = trajectory(optimizer(step, top_1, num_clients=3), jnp.zeros(10), gradient, 4000)
            ends[name] = np.linalg.norm(gradient(x[-1]).mean(0))
        assert ends["ef21"] < 1e-5
        assert 1e-4 < ends["ef14"] < 1


class TestNumbers:
    @pytest.mark.parametrize("compress", [lambda v: largest(v, 2), mean_sign], ids=["top", "sign"])
    @pytest.mark.parametrize("weights", [None, WEIGHTS[:3]], ids=["plain", "weighted"])
    def test_twenty_steps_of_ef21(self, compress, weights):
        """Against the algorithm in float64, client by client, on the same gradients."""
        rng = np.random.default_rng(3)
        gradients = rng.normal(size=(20, 3, 12)).astype(np.float32)
        w = np.full(3, 1 / 3) if weights is None else weights / weights.sum()
        x, g = np.zeros(12), np.zeros((3, 12))
        expected = [x]
        for gradient in np.float64(gradients):
            for i in range(3):
                g[i] += compress(gradient[i] / (3 * w[i]) - g[i])
            x = x - 0.1 * (w @ g + 0.01 * x)
            expected.append(x)
        compressor = COMPRESSORS["sign" if compress is mean_sign else "top_k"]
        ours = optimizers.ef21(0.1, compressor, num_clients=3, weights=weights, weight_decay=0.01)
        kernel = lambda x, t: {"w": jnp.asarray(gradients)[t].reshape(3, 3, 4)}
        ours = trajectory(ours, {"w": jnp.zeros((3, 4))}, kernel, 20)["w"]
        np.testing.assert_allclose(ours.reshape(21, 12), np.stack(expected), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("clients", [1, 3])
    def test_twenty_steps_of_ef14(self, clients):
        rng = np.random.default_rng(3)
        gradients = rng.normal(size=(20, clients, 12)).astype(np.float32)
        x, e = np.zeros(12), np.zeros((clients, 12))
        expected = [x]
        for gradient in np.float64(gradients):
            sent = np.stack([largest(v, 2) for v in e + gradient])
            e = e + gradient - sent
            x = x - 0.1 * sent.mean(0)
            expected.append(x)
        one = {} if clients == 1 else {"num_clients": clients}
        ours = optimizers.ef14(0.1, optimizers.top_k_compressor(2), **one)
        gradient = lambda x, t: jnp.asarray(gradients[:, 0] if clients == 1 else gradients)[t]
        ours = trajectory(ours, jnp.zeros(12), gradient, 20)
        np.testing.assert_allclose(ours, np.stack(expected), rtol=1e-5, atol=1e-6)

    def test_messages_are_all_that_the_server_needs(self):
        """Clients as processes of their own: the sum of what they send is the server's g."""
        compressor, rng = COMPRESSORS["rand_k"], np.random.default_rng(0)
        client = server = jnp.zeros(10)
        for t in range(5):
            gradient, key = jnp.asarray(rng.normal(size=10), jnp.float32), jax.random.key(t)
            message, client = optimizers.ef21_client_update(client, gradient, compressor, key)
            assert message.shape == (5,)
            server += compressor.decompress(message, server, jax.random.fold_in(key, 0))
            np.testing.assert_array_equal(server, client)
            assert np.sum(np.isclose(client, gradient)) == 5

    def test_the_first_step_can_send_the_gradient_in_full(self):
        first, second = random_tree(1, 3), random_tree(2, 3)
        estimate = lambda initial: optimizers.ef21_gradient(
            COMPRESSORS["top_k"], num_clients=3, initial=initial
        )
        update = jax.jit(estimate("gradient").update)
        full, state = update(first, estimate("gradient").init(random_tree()))
        means = jax.tree.map(lambda x: x.mean(0), first)
        chex.assert_trees_all_close(full, means, rtol=1e-5, atol=1e-7)
        chex.assert_trees_all_equal(state.client, first)
        ours, after = update(second, state)
        expected, by_hand = jax.jit(estimate("compressed").update)(second, state)
        chex.assert_trees_all_close((ours, after), (expected, by_hand), rtol=1e-6)
        assert int(np.sum(after.client["kernel"] != state.client["kernel"])) == 3 * 2

    def test_clients_leaves_and_steps_draw_with_keys_of_their_own(self):
        ones = {"a": jnp.ones((4, 40)), "b": jnp.ones((4, 40))}
        estimate = optimizers.ef21_gradient(
            optimizers.rand_k_compressor(10), num_clients=4, key=jax.random.key(3)
        )
        update = jax.jit(estimate.update)
        state, patterns = estimate.init({"a": jnp.ones(40), "b": jnp.ones(40)}), set()
        for _ in range(3):
            _, after = update(ones, state)
            drawn = np.concatenate([np.asarray(x) for x in after.client.values()])
            patterns |= {row.tobytes() for row in drawn}
            state = state._replace(count=after.count)
        assert len(patterns) == 3 * 8

    def test_step_sizes(self):
        constants, step = np.array([1.0, 3.0, 8.0]), optimizers.ef21_step_size
        for alpha in (1e-6, 0.1, 0.9, 1 - 1e-3):
            root = np.sqrt(1 - alpha)
            xi = root / (1 - root)
            np.testing.assert_allclose(step(2.0, constants, alpha), 1 / (2 + 4 * xi), rtol=2e-5)
            quadratic = step(2.0, constants, alpha, analysis="quadratic")
            expected = 1 / (2 + np.sqrt(74 / 3) * xi)
            np.testing.assert_allclose(quadratic, expected, rtol=2e-5)
            assert quadratic < step(2.0, constants, alpha)
            same = [
                step(2.0, np.full(3, 0.7), alpha, analysis=a) for a in ("arithmetic", "quadratic")
            ]
            np.testing.assert_allclose(*same, rtol=1e-6)
        assert step(2.0, constants, 1.0) == 0.5
        assert step(1.0, np.full(2, 1e25), 0.75, analysis="quadratic") == pytest.approx(1e-25)

    def test_clones_have_nearly_equal_constants(self):
        rng, n = np.random.default_rng(0), 12
        for _ in range(20):
            smoothness = np.exp(3 * rng.normal(size=n))
            counts, mean = np.asarray(optimizers.clone_counts(smoothness)), smoothness.mean()
            np.testing.assert_array_equal(counts, np.ceil(np.float32(smoothness / mean)))
            total = counts.sum()
            assert n < total <= 2 * n
            clones = np.repeat(total * smoothness / (n * counts), counts)
            np.testing.assert_allclose(clones.mean(), mean)
            assert np.sqrt(np.mean(clones**2)) <= np.sqrt(2) * mean * (1 + 1e-6)
        for n in (1, 3, 7, 49):  # whose means are rounded
            np.testing.assert_array_equal(optimizers.clone_counts(np.full(n, 0.1)), 1)


class TestParticipation:
    def test_clients_that_stay_away_send_nothing(self):
        gradients, later = random_tree(1, 3), random_tree(2, 3)
        estimate = optimizers.ef21_gradient(COMPRESSORS["top_k"], num_clients=3)
        update = jax.jit(lambda *args, there: estimate.update(*args, participates=there))
        _, before = update(gradients, estimate.init(random_tree()), there=jnp.array([True] * 3))
        _, everyone = update(later, before, there=jnp.array([True] * 3))
        g, after = update(later, before, there=jnp.array([True, False, True]))
        for name in ("kernel", "bias"):
            rows = after.client[name]
            np.testing.assert_array_equal(rows[1], before.client[name][1])
            np.testing.assert_array_equal(rows[::2], everyone.client[name][::2])
            np.testing.assert_allclose(g[name], rows.mean(0), rtol=1e-6, atol=1e-7)

    def test_one_client_and_a_gradient_that_is_not_finite(self):
        """It would stay for ever; a client can stay away instead."""
        optimizer = optimizers.ef21(0.1)
        update = jax.jit(lambda *args, there=True: optimizer.update(*args, participates=there))
        x, bad = random_tree(), jax.tree.map(lambda x: x * jnp.nan, random_tree())
        good, state = update(random_tree(1), optimizer.init(x))
        kept, after = update(bad, state, there=False)
        chex.assert_trees_all_equal(kept, good)
        chex.assert_trees_all_equal(after[0].client, state[0].client)
        _, poisoned = update(bad, state)
        still, _ = update(random_tree(2), poisoned)
        assert not np.all(np.isfinite(still["kernel"]))


def collectives(text):
    """(operation, types of its results) of the collectives in a compiled program."""
    operations = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= (.*?) ({operations})(?:-start)?\(", text)
    return [(name, re.findall(r"(\w+?)\[([\d,]*)\]", types)) for types, name in found]


def gathered_bytes(text):
    width = {"u8": 1, "u16": 2, "u32": 4, "s32": 4, "f32": 4}
    return sum(
        width[dtype] * int(np.prod([int(d) for d in shape.split(",") if d]))
        for name, types in collectives(text)
        if name == "all-gather"
        for dtype, shape in types
    )


def message_bytes(compressor, tree):
    key, total = jax.random.key(0), 0
    for x in jax.tree.leaves(tree):
        message = jax.eval_shape(compressor.compress, x, key)
        total += sum(m.size * m.dtype.itemsize for m in jax.tree.leaves(message))
    return total


def make_mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((8,), ("data",), axis_types=(axis_type,))


def place(mesh, tree, specs):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def on_mesh(optimizer, mesh, specs, gradient, steps):
    """`steps` steps of all workers, each with its own data: (x, state, data) → (x, state)."""

    def run(x, state, data):
        own = jax.tree.map(lambda d: d[0], data)

        def one(carry, t):
            x, state = carry
            updates, state = optimizer.update(gradient(x, own), state, x)
            return (optax.apply_updates(x, updates), state), None

        return jax.lax.scan(one, (x, state), None, length=steps)[0]

    in_specs = (P(), specs, P("data"))
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=(P(), specs)))


class TestShardMap:
    @pytest.mark.parametrize(
        ("method", "name"),
        [*(("ef21", name) for name in COMPRESSORS), ("ef14", "top_k"), ("ef14", "rand_k")],
    )
    @pytest.mark.optimized
    def test_workers_do_what_stacked_clients_do_and_gather_messages_only(self, method, name):
        options = {"key": jax.random.PRNGKey(1), "compressor": COMPRESSORS[name]}
        if method == "ef21":
            options |= {"weights": WEIGHTS}
        build = lambda **form: getattr(optimizers, method)(0.05, num_clients=8, **form, **options)
        mesh = make_mesh()
        x, centres = random_tree(shapes=FILLED), random_tree(1, 8, FILLED)
        optimizer = build(axis_name="data")
        state = optimizer.init(x)
        gradient = lambda x, centre: jax.tree.map(jnp.subtract, x, centre)
        specs = optimizers.error_feedback_specs(state, "data")
        run = on_mesh(optimizer, mesh, specs, gradient, 10)
        ours, after = run(x, state, centres)
        expected = trajectory(build(), x, lambda x, t: gradient(x, centres), 10)
        chex.assert_trees_all_close(
            ours, jax.tree.map(lambda x: x[-1], expected), rtol=1e-5, atol=1e-6
        )
        for leaf in jax.tree.leaves(after[0].client):
            assert {s.data.shape for s in leaf.addressable_shards} == {(1, *leaf.shape[1:])}
        text = run.lower(x, state, centres).compile().as_text()
        assert {name for name, _ in collectives(text)} == {"all-gather"}
        assert gathered_bytes(text) == 8 * message_bytes(COMPRESSORS[name], x)

    @pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
    @pytest.mark.optimized
    def test_a_training_step_and_its_checkpoint(self, axis_type, tmp_path):
        """The gradient of each worker's share of the batch, and adam behind EF21. Nothing dense
        is exchanged: but the messages, only the loss."""
        rng, mesh = np.random.default_rng(0), make_mesh(axis_type)
        inputs = rng.normal(size=(32, 5, 6)).astype(np.float32)
        targets = np.tanh(inputs).sum(axis=(1, 2))
        params = {"w": jnp.zeros((5, 6)), "b": jnp.zeros(())}
        compressor = optimizers.top_k_compressor(3)
        build = lambda **form: optax.chain(
            optimizers.ef21_gradient(compressor, num_clients=8, **form), optax.adam(0.05)
        )
        optimizer = build(axis_name="data")

        def loss(params, inputs, targets):
            outputs = jnp.einsum("nij,ij->n", inputs, params["w"]) + params["b"]
            return jnp.mean((outputs - targets) ** 2)

        def step(params, state, inputs, targets):
            own = jax.lax.pcast(params, "data", to="varying")
            value, gradients = jax.value_and_grad(loss)(own, inputs, targets)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, jax.lax.pmean(value, "data")

        specs = optimizers.error_feedback_specs(jax.eval_shape(optimizer.init, params), "data")
        everywhere = jax.tree.map(lambda _: P(), params)
        carry = place(mesh, (params, optimizer.init(params)), (everywhere, specs))
        batch = place(mesh, (inputs, targets), (P("data"), P("data")))
        train = (
            jax.jit(
                jax.shard_map(
                    step,
                    mesh=mesh,
                    in_specs=(everywhere, specs, P("data"), P("data")),
                    out_specs=(everywhere, specs, P()),
                )
            )
            .lower(*carry, *batch)
            .compile()
        )
        text = train.as_text()
        assert gathered_bytes(text) == 8 * message_bytes(compressor, params)
        assert [c for c in collectives(text) if c[0] != "all-gather"] == [
            ("all-reduce", [("f32", "")])
        ]

        def run(carry, steps):
            losses = []
            for _ in range(steps):
                *carry, value = train(*carry, *batch)
                losses.append(float(value))
            return carry, losses

        middle, losses = run(carry, 20)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "step", middle)
            checkpointer.wait_until_finished()
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, middle)
            restored = checkpointer.restore(tmp_path / "step", like)
        end, later = run(middle, 20)
        chex.assert_trees_all_equal(run(restored, 20)[0], end)
        assert later[-1] < 0.1 * losses[0]

        shares = (inputs.reshape(8, 4, 5, 6), targets.reshape(8, 4))
        gradients = jax.vmap(jax.grad(loss), (None, 0, 0))
        expected = trajectory(build(), params, lambda x, t: gradients(x, *shares), 40)
        chex.assert_trees_all_close(
            end[0], jax.tree.map(lambda x: x[-1], expected), rtol=1e-3, atol=1e-4
        )

    def test_init_inside_participation_and_a_full_first_gradient(self):
        mesh = make_mesh()
        x, centres = random_tree(shapes=FILLED), random_tree(1, 8, FILLED)
        options = {"compressor": COMPRESSORS["top_k"], "initial": "gradient"}
        estimate = optimizers.ef21_gradient(axis_name="data", **options)
        there = np.arange(8) % 3 > 0
        specs = optimizers.error_feedback_specs(jax.eval_shape(estimate.init, x), "data")
        assert set(jax.tree.leaves(specs.client)) == {P("data")}
        assert set(jax.tree.leaves(specs._replace(client=None))) == {P()}
        init = jax.jit(jax.shard_map(estimate.init, mesh=mesh, in_specs=P(), out_specs=specs))
        stacked = optimizers.ef21_gradient(num_clients=8, **options)
        chex.assert_trees_all_equal(init(x).client, stacked.init(x).client)

        def update(gradients, state, there):
            own = jax.tree.map(lambda g: g[0], gradients)
            return estimate.update(own, state, participates=there[0])

        update = jax.jit(
            jax.shard_map(
                update, mesh=mesh, in_specs=(P("data"), specs, P("data")), out_specs=(P(), specs)
            )
        )
        ours, state = update(centres, init(x), there)
        ours, state = update(random_tree(2, 8, FILLED), state, there)
        expected, theirs = stacked.update(centres, stacked.init(x), participates=there)
        expected, theirs = stacked.update(random_tree(2, 8, FILLED), theirs, participates=there)
        chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(state.client, theirs.client, rtol=1e-6, atol=1e-6)

    def test_state_of_another_mesh_is_refused(self):
        mesh, x = make_mesh(), random_tree(shapes=FILLED)
        optimizer = optimizers.ef21(0.1, axis_name="data", num_clients=16)
        state = optimizer.init(x)
        specs = optimizers.error_feedback_specs(state, "data")
        run = on_mesh(optimizer, mesh, specs, lambda x, centre: x, 1)
        with pytest.raises(ValueError, match=r"client state must have shape \(1,.*got \(2,"):
            run(x, state, random_tree(1, 8, FILLED))


def test_state_is_no_larger_than_it_has_to_be():
    """One array per client and parameter; another for the server, where the clients are apart."""
    x = random_tree(dtype=jnp.bfloat16)
    shapes = lambda **form: [
        leaf.shape
        for leaf in jax.tree.leaves(optimizers.ef21_gradient(COMPRESSORS["sign"], **form).init(x))
    ]
    own = [(), *sorted(SHAPES.values(), key=list(SHAPES.values()).index)]
    assert sorted(shapes()) == sorted(own)
    stacked = [(3, *shape) for shape in SHAPES.values()]
    assert sorted(shapes(num_clients=3)) == sorted([(), *stacked])
    apart = shapes(axis_name="data", num_clients=3)
    assert sorted(apart) == sorted([(), *stacked, *SHAPES.values()])
    state = optimizers.ef21_gradient(COMPRESSORS["sign"]).init(x)
    assert state.client["kernel"].dtype == jnp.float32


def update_with(optimizer, gradients, params=None, **extra_args):
    params = random_tree() if params is None else params
    return optimizer.update(gradients, optimizer.init(params), **extra_args)


TOP, RAND = COMPRESSORS["top_k"], COMPRESSORS["rand_k"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: optimizers.ef21(0.1, num_clients=0), ValueError, "num_clients must be an integer"),
        (lambda: optimizers.ef14(0.1, num_clients=1.5), ValueError, "num_clients must be an int"),
        (lambda: optimizers.ef21(0.1, weights=[1.0, -1.0]), ValueError, "weights must be in"),
        (lambda: optimizers.ef21(0.1, weights=[1.0, np.inf]), ValueError, "weights must be in"),
        (lambda: optimizers.ef21(0.1, initial="zero"), ValueError, "initial must be 'compressed'"),
        (lambda: optimizers.ef21(0.1, RAND), ValueError, "key must be given"),
        (lambda: optimizers.ef14(0.1, RAND), ValueError, "key must be given"),
        (
            lambda: optimizers.ef21_client_update(jnp.zeros(3), jnp.ones(3), RAND),
            ValueError,
            "key must be given",
        ),
        (
            lambda: optimizers.ef21_client_update(jnp.zeros(3), jnp.ones(4), TOP),
            ValueError,
            "gradient must have shape",
        ),
        (
            lambda: update_with(
                optimizers.ef21_gradient(TOP, num_clients=3, weights=np.ones(2)), random_tree(1, 3)
            ),
            ValueError,
            r"weights must have shape \(3,\)",
        ),
        (
            lambda: update_with(optimizers.ef21_gradient(TOP, num_clients=3), random_tree(1)),
            ValueError,
            r"updates\['bias'\] must have shape \(3,\), got \(\)",
        ),
        (
            lambda: update_with(
                optimizers.ef21(0.1, num_clients=3),
                random_tree(1, 3),
                participates=np.ones(2, bool),
            ),
            ValueError,
            r"participates must broadcast to shape \(3,\)",
        ),
        (
            lambda: optimizers.ef21_step_size(1.0, np.ones(2), 0.0),
            ValueError,
            r"alpha must be in \(0, 1\]",
        ),
        (
            lambda: optimizers.ef21_step_size(1.0, np.ones(2), 1.1),
            ValueError,
            r"alpha must be in \(0, 1\]",
        ),
        (
            lambda: optimizers.ef21_step_size(0.0, np.ones(2), 1.0),
            ValueError,
            r"^smoothness must be in",
        ),
        (
            lambda: optimizers.ef21_step_size(1.0, np.zeros(2), 1.0),
            ValueError,
            "client_smoothness must be in",
        ),
        (
            lambda: optimizers.ef21_step_size(1.0, 1.0, 1.0),
            ValueError,
            r"client_smoothness must have shape \(n,\)",
        ),
        (
            lambda: optimizers.ef21_step_size(1.0, np.ones(2), 1.0, analysis="geometric"),
            ValueError,
            "analysis must be 'arithmetic'",
        ),
        (lambda: optimizers.clone_counts([1.0, 0.0]), ValueError, "client_smoothness must be in"),
    ],
)
def test_bad_input_raises(call, error, message):
    with pytest.raises(error, match=message):
        call()
