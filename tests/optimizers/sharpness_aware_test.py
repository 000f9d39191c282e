import math
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref.optimizers import sam_perturbation, sam_value_and_grad, sharpness

ORACLE = Path(__file__).parents[1] / "oracles" / "sharpness_aware.npz"
NORMS = (1, 1.5, 2, 3, math.inf)


def random_tree(seed=0, scale=1.0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {"hidden": (3, 4), "out": (4,)}
    return {k: jnp.asarray(scale * rng.normal(size=s), dtype) for k, s in shapes.items()}


def random_batch(seed=1, size=16):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((size, 3), (size,)))


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def loss(w, x, y):
    return jnp.mean((jnp.tanh(x @ w["hidden"]) @ w["out"] - y) ** 2)


def literal(w, batch, rho, eta=None):
    """∇L(w + e) with e written out for p = 2; ASAM's where eta is given."""
    g = jax.grad(loss)(w, *batch)
    t = jax.tree.map(lambda w: 1.0 if eta is None else jnp.abs(w) + eta, w)
    norm = np.linalg.norm(flat(jax.tree.map(jnp.multiply, t, g)))
    moved = jax.tree.map(lambda w, t, g: w + rho * t**2 * g / norm, w, t, g)
    return jax.grad(loss)(moved, *batch)


def assert_close(ours, expected, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    chex.assert_trees_all_close(ours, expected, rtol=rtol, atol=atol)


def all_reduced(text):
    """The shapes of all that the program reduces over devices, ("f32[3,4]", ...)."""
    lines = [
        line for line in text.splitlines() if " all-reduce(" in line or "all-reduce-start(" in line
    ]
    shapes = [line.split("=", 1)[1].split(" all-reduce")[0] for line in lines]
    return [part.split("{")[0] for shape in shapes for part in shape.strip(" ()").split(", ")]


class NumbersTest(chex.TestCase):
    @parameterized.parameters(
        ("sam", {"rho": 0.3}), ("adaptive", {"rho": 0.5, "adaptive": True, "eta": 0.0})
    )
    def test_agrees_with_pytorch_optimizer(self, name, setting):
        with np.load(ORACLE) as stored:
            data = {key: jnp.asarray(stored[key]) for key in stored.files}
        optimizer = optax.sgd(0.03, momentum=0.9)
        gradient = sam_value_and_grad(loss, **setting)

        def step(carry, batch):
            w, state = carry
            updates, state = optimizer.update(gradient(w, *batch)[1], state)
            w = optax.apply_updates(w, updates)
            return (w, state), jnp.concatenate([w["hidden"].ravel(), w["out"]])

        w = {"hidden": data["hidden"], "out": data["out"]}
        batches = data["inputs"], data["targets"]
        ours = jax.jit(lambda c: jax.lax.scan(step, c, batches))((w, optimizer.init(w)))[1]
        np.testing.assert_allclose(ours, data[name], rtol=1e-5, atol=1e-6)

    def test_agrees_with_optax(self):
        """optax.contrib.sam in opaque mode, optax 0.2.8, 20 steps of Adam on batches in turn."""
        base, rho = optax.adam(0.03), 0.2
        theirs = optax.contrib.sam(
            base,
            optax.chain(optax.contrib.normalize(), optax.sgd(rho)),
            sync_period=2,
            opaque_mode=True,
        )
        gradient = sam_value_and_grad(loss, rho)
        x = y = random_tree()
        state, their_state = base.init(x), theirs.init(y)

        @jax.jit
        def step(x, state, y, their_state, batch):
            updates, state = base.update(gradient(x, *batch)[1], state)
            at = lambda w, _: jax.grad(loss)(w, *batch)
            their_updates, their_state = theirs.update(at(y, 0), their_state, y, grad_fn=at)
            x, y = optax.apply_updates(x, updates), optax.apply_updates(y, their_updates)
            return x, state, y, their_state

        for seed in range(20):
            x, state, y, their_state = step(x, state, y, their_state, random_batch(seed))
        assert_close(x, y, atol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(None, 0.01, 0.5)
    def test_value_and_gradient_by_the_formula(self, eta):
        w, batch = random_tree(), random_batch()
        adaptive = {} if eta is None else {"adaptive": True, "eta": eta}
        value, gradient = self.variant(sam_value_and_grad(loss, 0.7, **adaptive))(w, *batch)
        np.testing.assert_allclose(value, loss(w, *batch), rtol=1e-6)
        assert_close(gradient, literal(w, batch, 0.7, eta))

    def test_adaptive_leaves_are_chosen(self):
        """As the ASAM authors do, who leave T = 1 for biases."""
        w, g = random_tree(), random_tree(1)
        t = {"hidden": jnp.abs(w["hidden"]) + 0.1, "out": jnp.ones(4)}
        norm = np.linalg.norm(flat(jax.tree.map(jnp.multiply, t, g)))
        expected = jax.tree.map(lambda t, g: 0.5 * t**2 * g / norm, t, g)
        for matrices in ({"hidden": True, "out": False}, lambda w: {"hidden": True, "out": False}):
            assert_close(sam_perturbation(g, 0.5, w, adaptive=matrices, eta=0.1), expected)

    def test_masked_leaves_stay_and_have_gradients(self):
        w, batch = random_tree(), random_batch()
        _, g = jax.value_and_grad(loss)(w, *batch)
        e = sam_perturbation(g, 0.5, mask={"hidden": True, "out": False})
        assert_close(
            e, {"hidden": 0.5 * g["hidden"] / jnp.linalg.norm(g["hidden"]), "out": 0 * w["out"]}
        )
        _, ours = sam_value_and_grad(loss, 0.5, mask=lambda w: {"hidden": True, "out": False})(
            w, *batch
        )
        assert_close(ours, jax.grad(loss)(optax.tree.add(w, e), *batch))

    def test_sharpness_by_hand_and_at_the_limit(self):
        """½ wᵀAw near its minimum: the first step may miss, many find ½ rho² λ_max."""
        a = jnp.diag(jnp.array([1.0, 5.0, 2.0]))
        quadratic = lambda w: w @ a @ w / 2
        w = jnp.array([3e-3, 1e-5, 0.0])
        once, often = (sharpness(quadratic, w, 0.5, steps=n) for n in (1, 20))
        e = 0.5 * a @ w / jnp.linalg.norm(a @ w)
        np.testing.assert_allclose(once, quadratic(w + e) - quadratic(w), rtol=1e-5)
        np.testing.assert_allclose(once, 0.125, rtol=0.02)
        np.testing.assert_allclose(often, 0.125 * 5, rtol=0.01)


class TestClaims:
    @pytest.mark.claim("sharpness-aware-minimization")
    def test_the_worst_point_nearby_its_gradient_and_the_flat_minima_it_leads_to(self):
        """On ½ wᵀAw the gradient is A(w + rho Aw/‖Aw‖). Its first-order problem is solved: no e of
        norm rho has a larger ⟨g, e⟩. And on labels of which a fifth are wrong, it ends where the
        Hessian is less than a third as large, with fewer wrong labels learnt and better on new data
        than plain descent does."""
        rng = np.random.default_rng(0)
        root = rng.normal(size=(5, 5))
        a, w = jnp.asarray(root @ root.T, jnp.float32), jnp.asarray(rng.normal(size=5), jnp.float32)
        _, ours = sam_value_and_grad(lambda w: w @ a @ w / 2, 0.3)(w)
        np.testing.assert_allclose(ours, a @ (w + 0.3 * a @ w / jnp.linalg.norm(a @ w)), rtol=1e-5)

        g, others = random_tree(), rng.normal(size=(1000, 16))
        for p in NORMS:
            q = {1: math.inf, math.inf: 1}.get(p) or p / (p - 1)
            e = flat(sam_perturbation(g, 0.3, p=p))
            np.testing.assert_allclose(np.linalg.norm(e, p), 0.3, rtol=1e-5)
            np.testing.assert_allclose(flat(g) @ e, 0.3 * np.linalg.norm(flat(g), q), rtol=1e-5)
            scaled = 0.3 * others / np.linalg.norm(others, p, axis=1, keepdims=True)
            assert np.all(scaled @ flat(g) < flat(g) @ e)

        data = jax.tree.map(lambda *x: jnp.stack(x), *map(label_noise_data, range(3)))
        each = jax.vmap(jax.vmap(label_noise_outcome, (None, 0)), (0, None))
        curvature, learnt, accuracy = jax.jit(each)(data, jnp.array([0.0, 0.3]))
        assert np.all(curvature[:, 1] < 0.3 * curvature[:, 0])
        assert np.all(learnt[:, 1] < 0.6 * learnt[:, 0])
        assert np.all(accuracy[:, 1] > accuracy[:, 0] + 0.05)

    @pytest.mark.parametrize("setting", [{}, {"p": math.inf}, {"p": 1}, {"adaptive": True}])
    def test_radius_zero_is_the_gradient_exactly(self, setting):
        w, batch = random_tree(), random_batch()
        ours = jax.jit(sam_value_and_grad(loss, 0.0, **setting))(w, *batch)
        expected = jax.jit(jax.value_and_grad(loss))(w, *batch)
        chex.assert_trees_all_equal(ours, expected)

    def test_adaptive_perturbation_ignores_the_scale_of_a_layer(self):
        """(c W, v / c) is the same network: e of the one is c e of the other, and 1 / c."""
        batch, c = random_batch(), 8.0
        relu = lambda w, x, y: jnp.mean((jax.nn.relu(x @ w["hidden"]) @ w["out"] - y) ** 2)
        w = random_tree()
        same = {"hidden": c * w["hidden"], "out": w["out"] / c}
        for adaptive, equal in ((True, True), (False, False)):
            moved = []
            for v in (w, same):
                g = jax.grad(relu)(v, *batch)
                moved.append(sam_perturbation(g, 0.5, v, adaptive=adaptive, eta=0.0))
            back = {"hidden": moved[1]["hidden"] / c, "out": moved[1]["out"] * c}
            assert np.allclose(flat(back), flat(moved[0]), rtol=1e-4, atol=1e-6) is equal

    def test_steps_do_not_lower_the_sharpness_of_a_convex_loss(self):
        inputs, _ = random_batch(3, 12)
        convex = lambda w: jnp.mean(jax.nn.logsumexp(3 * inputs @ w, axis=0))
        w = random_tree()["hidden"]
        for p in (2, math.inf):
            once, often = (float(sharpness(convex, w, 0.5, steps=n, p=p)) for n in (1, 4))
            assert 0 < once <= often + 1e-6


def half_moons(rng, count):
    labels, angle = rng.integers(2, size=count), rng.uniform(0, np.pi, size=count)
    x = np.stack([np.cos(angle), np.sin(angle)], 1) * np.where(labels, -1, 1)[:, None]
    x += labels[:, None] * np.array([1.0, 0.5]) + 0.2 * rng.normal(size=(count, 2))
    return x.astype(np.float32), labels


def label_noise_data(seed, examples=100, epochs=1000, batch=20):
    """Half-moons of which a fifth have the wrong label, clean new ones, weights, batches of ids."""
    rng = np.random.default_rng(seed)
    (x, truth), new = half_moons(rng, examples), half_moons(rng, 2000)
    wrong = rng.uniform(size=examples) < 0.2
    gains = {(2, 16): 2.0, (16, 16): 0.25, (16, 2): 0.25}
    weights = [(g * rng.normal(size=s)).astype(np.float32) for s, g in gains.items()]
    orders = np.stack([rng.permutation(examples) for _ in range(epochs)]).reshape(-1, batch)
    return x, np.where(wrong, 1 - truth, truth), wrong, *new, weights, orders


def label_noise_outcome(data, rho):
    """The Hessian's top eigenvalue, the share of wrong labels learnt and the accuracy on new data
    of a small network after training with SAM."""
    x, labels, wrong, new_x, new_labels, weights, orders = data

    def outputs(w, x):
        for kernel, bias in w[:-1]:
            x = jnp.tanh(x @ kernel + bias)
        return x @ w[-1][0] + w[-1][1]

    def loss(w, x, labels):
        targets = 0.9 * jax.nn.one_hot(labels, 2) + 0.05
        return jnp.mean(optax.losses.softmax_cross_entropy(outputs(w, x), targets))

    def step(w, ids):
        _, g = sam_value_and_grad(loss, rho)(w, x[ids], labels[ids])
        return jax.tree.map(lambda w, g: w - 0.3 * g, w, g), None

    w, _ = jax.lax.scan(step, [(k, jnp.zeros(k.shape[1])) for k in weights], orders)
    vector, unravel = jax.flatten_util.ravel_pytree(w)
    hessian = jax.hessian(lambda v: loss(unravel(v), x, labels))(vector)
    right = lambda x, labels: outputs(w, x).argmax(-1) == labels
    learnt, accuracy = jnp.mean(right(x, labels), where=wrong), jnp.mean(right(new_x, new_labels))
    return jnp.linalg.eigvalsh(hessian)[-1], learnt, accuracy


class TestBatches:
    def test_micro_batches_perturb_by_their_own_gradients(self):
        """Micro-batch i has rows i, i + n, ...; the results are means over them."""
        w, (x, y) = random_tree(), random_batch()
        value, gradient = jax.jit(sam_value_and_grad(loss, 0.7, micro_batches=4))(w, x, y)
        parts = [literal(w, (x[i::4], y[i::4]), 0.7) for i in range(4)]
        assert_close(gradient, jax.tree.map(lambda *g: sum(g) / 4, *parts))
        np.testing.assert_allclose(value, loss(w, x, y), rtol=1e-6)
        _, whole = sam_value_and_grad(loss, 0.7)(w, x, y)
        assert np.linalg.norm(flat(gradient) - flat(whole)) > 0.01 * np.linalg.norm(flat(whole))

    def test_keys_are_split_and_other_arguments_are_shared(self):
        def noisy(w, batch, scale, *, key, power):
            x, y = batch
            keep = jax.random.bernoulli(key, 0.5, x.shape)
            return loss(w, scale * keep * x, y) ** power

        w, (x, y) = random_tree(), random_batch()
        key, rest = jax.random.key(5), {"power": 2}
        ours = sam_value_and_grad(noisy, 0.7, micro_batches=2)
        value, gradient = ours(w, (x, y), jnp.array(2.0), key=key, **rest)
        alone = [
            sam_value_and_grad(noisy, 0.7)(w, (x[i::2], y[i::2]), 2.0, key=k, **rest)
            for i, k in enumerate(jax.random.split(key, 2))
        ]
        expected = jax.tree.map(lambda a, b: (a + b) / 2, *alone)
        assert_close((value, gradient), expected)

    def test_both_passes_have_the_same_dropout(self):
        keep = lambda key: jax.random.bernoulli(key, 0.5, (16, 3))
        dropped = lambda w, x, y, key: loss(w, keep(key) * x, y)
        w, (x, y), key = random_tree(), random_batch(), jax.random.key(3)
        _, ours = sam_value_and_grad(dropped, 0.7)(w, x, y, key)
        assert_close(ours, literal(w, (keep(key) * x, y), 0.7))

    def test_aux_is_of_the_clean_pass(self):
        with_aux = lambda w, x, y: (loss(w, x, y), {"w": w, "mean": jnp.mean(x, axis=0)})
        w, (x, y) = random_tree(), random_batch()
        (value, aux), gradient = sam_value_and_grad(with_aux, 0.7, has_aux=True)(w, x, y)
        assert_close((value, gradient), sam_value_and_grad(loss, 0.7)(w, x, y))
        chex.assert_trees_all_equal(aux["w"], w)
        several = sam_value_and_grad(with_aux, 0.7, has_aux=True, micro_batches=4)
        (value, aux), gradient = several(w, x, y)
        assert_close((value, gradient), sam_value_and_grad(loss, 0.7, micro_batches=4)(w, x, y))
        assert_close(aux["mean"], jnp.stack([jnp.mean(x[i::4], axis=0) for i in range(4)]))

    def test_accumulation_outside_is_the_mean_of_the_sam_gradients(self):
        w, gradient = random_tree(), sam_value_and_grad(loss, 0.7)
        optimizer = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=2)
        state, v = optimizer.init(w), w
        gradients = [gradient(w, *random_batch(seed))[1] for seed in (1, 2)]
        for g in gradients:
            updates, state = optimizer.update(g, state, v)
            v = optax.apply_updates(v, updates)
        assert_close(v, jax.tree.map(lambda w, a, b: w - 0.05 * (a + b), w, *gradients))


class TestSharding:
    def mapped(self, function, *, check_vma=True):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": P()}
        return jax.jit(jax.shard_map(function, mesh=mesh, check_vma=check_vma, **specs))

    @pytest.mark.parametrize("check_vma", [True, False])
    def test_shards_perturb_by_their_own_gradients(self, check_vma):
        w, (x, y) = random_tree(), random_batch()
        sam = sam_value_and_grad(loss, 0.7, axis_name="data")
        value, gradient = self.mapped(sam, check_vma=check_vma)(w, x, y)
        parts = [literal(w, (x[i : i + 2], y[i : i + 2]), 0.7) for i in range(0, 16, 2)]
        assert_close(gradient, jax.tree.map(lambda *g: sum(g) / 8, *parts))
        np.testing.assert_allclose(value, loss(w, x, y), rtol=1e-6)

    def test_synced_shards_perturb_by_the_gradient_of_all(self):
        w, batch = random_tree(), random_batch()
        sam = sam_value_and_grad(loss, 0.7, axis_name="data", sync_perturbation=True)
        assert_close(self.mapped(sam)(w, *batch), sam_value_and_grad(loss, 0.7)(w, *batch))

    @pytest.mark.parametrize(("sync", "count"), [(False, 1), (True, 2)])
    @pytest.mark.parametrize("micro_batches", [1, 2])
    @pytest.mark.optimized
    def test_communicates_one_gradient_and_one_more_where_synced(self, sync, count, micro_batches):
        """Read in the compiled program, where a loop's body stands once."""
        line = lambda w, x, y: jnp.mean((x @ w - y) ** 2)
        x, y = random_batch(size=32)
        sam = sam_value_and_grad(
            line, axis_name="data", sync_perturbation=sync, micro_batches=micro_batches
        )
        text = self.mapped(sam).lower(jnp.ones(3), x, y).compile().as_text()
        assert sorted(all_reduced(text)) == ["f32[3]"] * count + ["f32[]"]
        for collective in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
            assert collective not in text

    def test_micro_batches_on_shards(self):
        w, (x, y) = random_tree(), random_batch(size=32)
        sam = sam_value_and_grad(loss, 0.7, axis_name="data", micro_batches=2)
        _, gradient = self.mapped(sam)(w, x, y)
        rows = [np.arange(start, start + 4)[i::2] for start in range(0, 32, 4) for i in range(2)]
        parts = [literal(w, (x[r], y[r]), 0.7) for r in rows]
        assert_close(gradient, jax.tree.map(lambda *g: sum(g) / 16, *parts))

    def test_named_axis_of_vmap_and_params_that_vary_already(self):
        w, (x, y) = random_tree(), random_batch()
        sam = sam_value_and_grad(loss, 0.7, axis_name="data")
        expected = self.mapped(sam)(w, x, y)
        mapped = jax.vmap(sam, in_axes=(None, 0, 0), axis_name="data")
        ours = mapped(w, x.reshape(8, 2, 3), y.reshape(8, 2))
        assert_close(jax.tree.map(lambda x: x[3], ours), expected)
        varying = lambda w, x, y: sam(jax.lax.pcast(w, "data", to="varying"), x, y)
        assert_close(self.mapped(varying)(w, x, y), expected)

    @pytest.mark.optimized
    def test_sharded_batch_and_params_under_jit(self):
        """No axis name: the gradient of the whole batch; micro-batches stay on their devices."""
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
        w, (x, y) = random_tree(), random_batch(size=32)
        sharded = {"hidden": put(w["hidden"]), "out": put(jnp.tile(w["out"], 2), "data")}
        wide = lambda w, x, y: loss(w | {"out": w["out"][:4] + w["out"][4:]}, x, y)
        for n in (1, 4):
            sam = sam_value_and_grad(wide, 0.7, micro_batches=n)
            ours = jax.jit(sam)(sharded, put(x, "data"), put(y, "data"))
            assert_close(ours, jax.jit(sam)(w | {"out": jnp.tile(w["out"], 2)}, x, y))
        replicated = jax.tree.map(put, w)
        program = jax.jit(sam_value_and_grad(loss, micro_batches=4))
        text = program.lower(replicated, put(x, "data"), put(y, "data")).compile().as_text()
        for collective in ("all-gather", "all-to-all", "collective-permute"):
            assert collective not in text

    def test_vmap(self):
        trees, batches = [random_tree(0), random_tree(1)], [random_batch(2), random_batch(3)]
        stack = lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
        sam = sam_value_and_grad(loss, 0.7)
        ours = jax.vmap(lambda w, b: sam(w, *b))(stack(*trees), stack(*batches))
        assert_close(ours, stack(*(sam(w, *b) for w, b in zip(trees, batches))))


class TestEdges:
    @pytest.mark.parametrize("p", NORMS)
    def test_zero_gradients_and_empty_leaves(self, p):
        zeros = {"scalar": jnp.zeros(()), "empty": jnp.zeros((0, 3)), "none": {}}
        for adaptive in (False, True):
            e = sam_perturbation(zeros, 0.5, zeros, p=p, adaptive=adaptive)
            assert_close(e, zeros, atol=0)
        flat_loss = lambda w: 0 * w["scalar"] + jnp.sum(w["empty"])
        value, gradient = sam_value_and_grad(flat_loss, 0.5, p=p)(zeros)
        assert value == gradient["scalar"] == 0
        assert sharpness(flat_loss, zeros, 0.5, p=p) == 0
        one = zeros | {"scalar": jnp.array(-2.0)}
        assert_close(sam_perturbation(one, 0.5, p=p), zeros | {"scalar": jnp.array(-0.5)})

    @pytest.mark.parametrize("p", NORMS)
    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_no_size_under_or_overflows(self, p, scale):
        expected = sam_perturbation(random_tree(), 0.5, p=p)
        assert_close(sam_perturbation(random_tree(scale=scale), 0.5, p=p), expected)

    def test_ties_share_the_perturbation_of_the_l1_ball(self):
        e = sam_perturbation({"a": jnp.array([2.0, 1.0]), "b": jnp.array([-2.0])}, 0.5, p=1)
        assert_close(e, {"a": jnp.array([0.25, 0.0]), "b": jnp.array([-0.25])})

    def test_bfloat16(self):
        """e is computed in float32 and rounded once, and so is w + e."""
        w, g = random_tree(0, dtype=jnp.bfloat16), random_tree(1, dtype=jnp.bfloat16)
        wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
        narrow = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
        ours = sam_perturbation(g, 0.5, w, adaptive=True)
        expected = sam_perturbation(wide(g), 0.5, wide(w), adaptive=True)
        chex.assert_trees_all_equal(ours, narrow(expected))
        linear = lambda w: optax.tree.vdot(wide(w), wide(g))
        square = lambda w: linear(w) ** 2 / 2
        _, gradient = sam_value_and_grad(square, 0.5)(w)
        e = sam_perturbation(wide(jax.grad(square)(w)), 0.5)
        moved = narrow(optax.tree.add(wide(w), e))
        chex.assert_trees_all_equal(gradient, jax.grad(square)(moved))
        micro = sam_value_and_grad(lambda w, x: jnp.mean(x) * square(w), 0.5, micro_batches=2)
        assert jax.tree.leaves(micro(w, jnp.ones(4))[1])[0].dtype == jnp.bfloat16

    def test_not_finite_gradients_are_not_hidden(self):
        root = lambda w: jnp.sum(jnp.sqrt(w))
        value, gradient = sam_value_and_grad(root)(jnp.array([0.0, 4.0]))
        assert value == 2
        assert not np.all(np.isfinite(gradient))
        value, _ = sam_value_and_grad(root)(jnp.array([jnp.nan, 4.0]))
        assert np.isnan(value)

    def test_traced_radius(self):
        w, batch = random_tree(), random_batch()
        ours = jax.jit(lambda rho: sam_value_and_grad(loss, rho)(w, *batch))(0.7)
        assert_close(ours, sam_value_and_grad(loss, 0.7)(w, *batch))

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"rho": -0.1}, r"rho must be in \[0, inf\)"),
            ({"rho": math.nan}, "rho must be in"),
            ({"rho": math.inf}, "rho must be in"),
            ({"p": 0.5}, r"p must be in \[1, inf\)"),
            ({"p": math.nan}, "p must be in"),
            ({"eta": -1.0}, "eta must be in"),
        ],
    )
    def test_numbers_out_of_range(self, setting, message):
        for call in (
            lambda: sam_value_and_grad(loss, **setting),
            lambda: sam_perturbation(random_tree(), **setting),
            lambda: sharpness(loss, random_tree(), **setting),
        ):
            with pytest.raises(ValueError, match=message):
                call()

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda: sam_value_and_grad(loss, "0.1"), TypeError, "rho must be a real number"),
            (
                lambda: sam_value_and_grad(loss, sync_perturbation=True),
                ValueError,
                "axis_name must be given with sync_perturbation",
            ),
            (
                lambda: sam_value_and_grad(loss, micro_batches=0),
                ValueError,
                "micro_batches must be an integer of at least 1, got 0",
            ),
            (
                lambda: sam_value_and_grad(loss, micro_batches=3)(random_tree(), *random_batch()),
                ValueError,
                r"multiple of micro_batches = 3, got \[16\]",
            ),
            (
                lambda: sam_value_and_grad(loss, micro_batches=2)(
                    random_tree(), random_batch()[0], jnp.zeros(6)
                ),
                ValueError,
                r"one length.* got \[6, 16\]",
            ),
            (
                lambda: sharpness(loss, random_tree(), steps=0),
                ValueError,
                "steps must be an integer of at least 1, got 0",
            ),
            (
                lambda: sam_perturbation(random_tree(), adaptive=True),
                ValueError,
                "params must be given where adaptive",
            ),
            (
                lambda: sam_perturbation(random_tree(), 0.1, {"hidden": jnp.ones((3, 4))}),
                ValueError,
                "params must have the tree structure",
            ),
            (
                lambda: sam_perturbation(jnp.ones(3), 0.1, jnp.ones(2)),
                ValueError,
                r"params must have shape \(3,\), got \(2,\)",
            ),
            (lambda: sam_value_and_grad(loss)(jnp.ones(3, int)), TypeError, "int"),
        ],
    )
    def test_bad_input_raises(self, call, error, message):
        with pytest.raises(error, match=message):
            call()
