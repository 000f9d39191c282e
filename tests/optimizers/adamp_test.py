import math
from functools import partial
from pathlib import Path
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxref import optimizers

ORACLE = Path(__file__).parents[1] / "oracles" / "adamp.npz"
SHAPES = {"matrix": (3, 4), "kernel": (2, 1, 2, 2), "bias": (3,)}  # channels first
ADAMP = {"b1": 0.8, "b2": 0.95, "weight_decay": 0.3, "delta": 0.2, "wd_ratio": 0.3}
SGDP = {"momentum": 0.8, "dampening": 0.1, "weight_decay": 0.3, "delta": 0.2}
RUNS = {
    "adamp": partial(optimizers.adamp, 0.02, **ADAMP),
    "adamp_nesterov": partial(optimizers.adamp, 0.02, **ADAMP, nesterov=True),
    "sgdp": partial(optimizers.sgdp, 0.02, **SGDP),
    "sgdp_nesterov": partial(optimizers.sgdp, 0.02, **SGDP, nesterov=True),
}
PEERS = {
    "adamp": ("adamp", "pytorch_optimizer"),
    "adamp_nesterov": ("adamp", "pytorch_optimizer"),
    "sgdp": ("pytorch_optimizer",),
    "sgdp_nesterov": ("adamp", "pytorch_optimizer"),
}


def leaves_of(rows):
    """The named leaves of rows that hold them one after the other."""
    ends = np.cumsum([math.prod(shape) for shape in SHAPES.values()])
    parts = np.split(rows, ends[:-1], axis=1)
    return {
        name: jnp.asarray(part.reshape(-1, *shape))
        for (name, shape), part in zip(SHAPES.items(), parts)
    }


def trajectory(optimizer, x, gradient, steps):
    """The parameters after every step along `gradient(x, t)`."""

    def one(carry, t):
        x, state = carry
        updates, state = optimizer.update(gradient(x, t), state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), x

    carry = (x, optimizer.init(x))
    return jax.jit(lambda c: jax.lax.scan(one, c, jnp.arange(steps)))(carry)[1]


def random_kernel(seed=0, shape=(6, 3)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tangent(g, w, axes):
    """The gradient without its part along w, in float64."""
    g, w = np.float64(g), np.float64(w)
    along = np.sum(g * w, axes, keepdims=True) / np.sum(w * w, axes, keepdims=True)
    return jnp.asarray(g - along * w, jnp.float32)


class NumbersTest(chex.TestCase):
    @parameterized.parameters(*((run, peer) for run in PEERS for peer in PEERS[run]))
    def test_agrees_with_pytorch(self, run, peer):
        """adamp 0.3.0 and pytorch_optimizer 4.1.0, over steps that project each channel, the
        whole array, and nothing."""
        with np.load(ORACLE) as stored:
            gradients = leaves_of(stored[f"{run}/gradients"])
            x = jax.tree.map(lambda x: x[0], leaves_of(stored["start"]))
            expected = leaves_of(stored[f"{run}/{peer}"])
        optimizer = RUNS[run](channel_axis=0)
        update, state = jax.jit(optimizer.update), optimizer.init(x)
        for t in range(20):
            updates, state = update(jax.tree.map(lambda g: g[t], gradients), state, x)
            x = optax.apply_updates(x, updates)
            if t % 5 == 4:
                peers = jax.tree.map(lambda x: x[t // 5], expected)
                chex.assert_trees_all_close(x, peers, rtol=1e-5, atol=1e-6)

    def test_channels_are_last_by_default_and_may_depend_on_the_path(self):
        g, x = random_kernel(1, (4, 2, 3)), random_kernel(2, (4, 2, 3))
        g = tangent(g, x, (0, 1))

        def step(optimizer, move=lambda x: x):
            params, gradient = {"a": {"b": move(x)}}, {"a": {"b": move(g)}}
            update = jax.jit(optimizer.update)
            return update(gradient, optimizer.init(params), params)[0]["a"]["b"]

        paths = []
        by_path = lambda axis: lambda path: paths.append(path) or axis
        ours = step(optimizers.adamp(0.1))
        np.testing.assert_allclose(np.sum(ours * x, (0, 1)), 0, atol=1e-6)
        for axis, move in [
            (0, lambda x: jnp.moveaxis(x, -1, 0)),
            (1, lambda x: jnp.moveaxis(x, -1, 1)),
            ((1, 2), lambda x: x.reshape(8, 1, 3)),
        ]:
            moved = step(optimizers.adamp(0.1, channel_axis=axis), move)
            np.testing.assert_allclose(moved, move(ours), atol=1e-6)
            moved = step(optimizers.adamp(0.1, channel_axis=by_path(axis)), move)
            np.testing.assert_allclose(moved, move(ours), atol=1e-6)
        assert set(paths) == {"a/b"}
        np.testing.assert_array_equal(step(optimizers.adamp(0.1, channel_axis=by_path(None))), ours)

    @parameterized.parameters((96, 5), (7, 5), (1, 5), (40, 1))
    def test_every_length_of_the_rows(self, inputs, outputs):
        """The sums run in parts, whose number depends on the length."""
        w, g = random_kernel(1, (inputs, outputs)), random_kernel(2, (inputs, outputs))
        cosine = np.sum(g * w, 0) / np.linalg.norm(g, axis=0) / np.linalg.norm(w, axis=0)
        threshold = np.max(np.abs(cosine)) * np.sqrt(inputs)
        for delta in (0.999 * threshold, 1.001 * threshold):
            optimizer = optimizers.sgdp(1.0, delta=delta, weight_decay=0.5, wd_ratio=0.1)
            ours, _ = jax.jit(optimizer.update)(g, optimizer.init(w), w)
            projected = g - w * np.sum(g * w, 0) / np.sum(w * w, 0) + 0.05 * w
            whole = np.sum(g * w) / np.linalg.norm(g) / np.linalg.norm(w)
            by_array = g - w * np.sum(g * w) / np.sum(w * w) + 0.05 * w
            missed = by_array if abs(whole) * np.sqrt(w.size) < delta else g + 0.5 * w
            expected = projected if delta > threshold else missed
            np.testing.assert_allclose(ours, -expected, rtol=1e-5, atol=1e-5)

    @parameterized.parameters("adamp", "sgdp_nesterov")
    def test_accelerators_take_the_same_steps(self, name):
        """What the CPU does in a way of its own, done as everywhere else."""
        w = {"rows": random_kernel(1, (64, 3)), "array": random_kernel(2), "none": random_kernel(3)}
        g = jax.tree.map(jnp.cos, w)
        g["rows"] = tangent(g["rows"], w["rows"], 0)
        g["array"] = tangent(g["array"], w["array"], (0, 1))
        optimizer = RUNS[name]()
        ours = jax.jit(optimizer.update)(g, optimizer.init(w), w)[0]
        elsewhere = lambda *x, cpu, default: default(*x)
        with mock.patch.object(jax.lax, "platform_dependent", elsewhere):
            theirs = jax.jit(lambda *x: optimizer.update(*x))(g, optimizer.init(w), w)[0]
        chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)

    def test_projection_by_hand(self):
        p, w = jnp.array([[3.0, 1.0], [4.0, 2.0]]), jnp.array([[3.0, 0.0], [4.0, 0.0]])
        expected = [[0.0, 1.0], [0.0, 2.0]]
        ours = optimizers.project_out_radial(p, w, axes=0)
        np.testing.assert_allclose(ours, expected, atol=1e-6)
        ours = optimizers.project_out_radial(p[:, 0], w[:, 0], eps=5.0)
        np.testing.assert_allclose(ours, [3 * 0.75, 4 * 0.75], rtol=1e-6)
        ours = optimizers.project_out_radial(p, w)
        np.testing.assert_allclose(ours, expected, atol=1e-6)
        assert optimizers.project_out_radial(p.astype(jnp.bfloat16), w).dtype == jnp.bfloat16

    def test_momentum_of_sgdp_is_not_projected(self):
        x, gradients = random_kernel(), [random_kernel(seed) for seed in (1, 2)]
        optimizer = optimizers.sgdp(0.1, momentum=0.9, delta=1e9)
        state = optimizer.init(x)
        for g in gradients:
            _, state = jax.jit(optimizer.update)(g, state, x)
        found = [s for s in jax.tree.leaves(state) if jnp.shape(s) == x.shape]
        np.testing.assert_allclose(found, [0.9 * gradients[0] + gradients[1]], rtol=1e-6)


class TestClaims:
    @pytest.mark.claim("adamp")
    def test_scale_invariant_weights_grow_no_more_than_by_their_steps(self):
        """On f(w/‖w‖) the gradient is orthogonal to w, the momentum is not. Projected steps are,
        so that ‖w‖² grows by lr²‖p‖² alone; without, it grows faster."""
        target = random_kernel(5, (20, 8))

        def gradient(w, t):
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), t), w.shape)
            unit = lambda w: w / jnp.linalg.norm(w, axis=0)
            return jax.grad(lambda w: -jnp.vdot(unit(w), target + noise))(w)

        start = random_kernel(6, (20, 8))
        square = lambda w: np.sum(np.square(np.float64(w)), axis=-2)
        for projected, plain in [
            (optimizers.adamp(0.02), optimizers.adamw(0.02, weight_decay=0.0)),
            (optimizers.sgdp(0.05, momentum=0.9), optax.sgd(0.05, momentum=0.9)),
        ]:
            w = np.concatenate([start[None], trajectory(projected, start, gradient, 200)])
            steps = np.diff(np.float64(w), axis=0)
            np.testing.assert_allclose(np.sum(w[:-1] * steps, axis=1), 0, atol=2e-5)
            growth = square(w[-1]) - square(start)
            np.testing.assert_allclose(growth, np.sum(square(steps), axis=0), rtol=1e-3)
            others = trajectory(plain, start, gradient, 200)
            assert np.sum(square(others[-1]) - square(start)) > 3 * np.sum(growth)

    @pytest.mark.parametrize(
        ("projected", "plain"),
        [
            (
                optimizers.adamp(0.02, weight_decay=0.3, delta=0.0),
                optimizers.adamw(0.02, weight_decay=0.3),
            ),
            (
                optimizers.sgdp(0.02, 0.9, weight_decay=0.03, delta=0.0),
                optimizers.sgdw(0.02, 0.9, weight_decay=0.3),
            ),
        ],
        ids=["adamp", "sgdp"],
    )
    def test_without_threshold_nothing_is_projected(self, projected, plain):
        gradient = lambda x, t: jax.tree.map(lambda x: jnp.sin(x + t), x)
        start = {"kernel": random_kernel(), "bias": random_kernel(1, (4,))}
        ours = trajectory(projected, start, gradient, 10)
        chex.assert_trees_all_close(ours, trajectory(plain, start, gradient, 10), rtol=1e-5)

    def test_biases_and_scalars_are_never_projected(self):
        x = {"bias": jnp.array([1.0, 2.0]), "scalar": jnp.array(3.0)}
        gradient = {"bias": jnp.array([2.0, -1.0]), "scalar": jnp.array(0.0)}
        ours, plain = (
            optimizers.adamp(0.1, weight_decay=0.5),
            optimizers.adamw(0.1, weight_decay=0.5),
        )
        expected, _ = plain.update(gradient, plain.init(x), x)
        updates, _ = ours.update(gradient, ours.init(x), x)
        chex.assert_trees_all_close(updates, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamp", "sgdp_nesterov"])
class TestTransformations:
    def test_decay_of_projected_weights_is_reduced_and_masked(self, name):
        """wd_ratio (SGDP: over 1 - momentum) of it where the test passes; the mask is obeyed."""
        x = {"fires": random_kernel(1), "fails": random_kernel(2), "masked": random_kernel(3)}
        gradient = {
            "fires": tangent(random_kernel(4), x["fires"], 0),
            "fails": x["fails"],
            "masked": x["masked"],
        }
        mask = {"fires": True, "fails": True, "masked": False}

        def step(**changes):
            optimizer = RUNS[name](mask=mask, wd_ratio=0.2, **changes)
            return jax.jit(optimizer.update)(gradient, optimizer.init(x), x)[0]

        scheduled = step(weight_decay=lambda count: 0.3 / (1 + count))
        chex.assert_trees_all_equal(scheduled, step())
        difference = jax.tree.map(jnp.subtract, step(weight_decay=0.0), step())
        full = 0.02 * 0.3 / (1 if name.startswith("adamp") else 1 - 0.8)
        strength = {"fires": 0.2 * full, "fails": full, "masked": 0.0}
        expected = jax.tree.map(jnp.multiply, strength, x)
        chex.assert_trees_all_close(difference, expected, rtol=1e-4, atol=1e-6)

    def test_vmap_of_mixed_outcomes(self, name):
        """Members of a batch whose tests differ: no branch can be taken for all."""
        w, g = random_kernel(1, (3, 6, 3)), random_kernel(2, (3, 6, 3))
        g = jnp.stack([tangent(g[0], w[0], 0), tangent(g[1], w[1], (0, 1)), g[2]])
        optimizer = RUNS[name]()
        update = lambda g, w: optimizer.update(g, optimizer.init(w), w)[0]
        alone = jnp.stack([*map(jax.jit(update), g, w)])
        np.testing.assert_allclose(jax.jit(jax.vmap(update))(g, w), alone, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
    @pytest.mark.optimized
    def test_sharded_sums_move_no_weights(self, name, axis_type):
        """Rows over eight devices: the same steps, and no collective that moves a leaf."""
        mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
        w = random_kernel(1, (256, 3))
        g = tangent(random_kernel(2, (256, 3)), w, 0)
        optimizer = RUNS[name]()
        expected, _ = jax.jit(optimizer.update)(g, optimizer.init(w), w)
        g, w = jax.device_put((g, w), NamedSharding(mesh, PartitionSpec("data")))
        update = jax.jit(optimizer.update).lower(g, optimizer.init(w), w).compile()
        ours, _ = update(g, optimizer.init(w), w)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
        assert "all-reduce" in update.as_text()
        for collective in ("all-gather", "all-to-all", "collective-permute"):
            assert collective not in update.as_text()

    def test_accelerators_get_plain_sums_and_no_branches(self, name):
        """Interleaved parts and a branch on the test are for the CPU alone."""
        w = random_kernel()
        optimizer = RUNS[name]()

        def found(platform):
            exported = jax.export.export(jax.jit(optimizer.update), platforms=[platform])
            module = exported(w, optimizer.init(w), w).mlir_module()
            return [sign in module for sign in ("stablehlo.slice", "(tensor<i1>) -> tensor<i32>")]

        assert found("cpu") == [True, True]
        assert found("tpu") == found("cuda") == [False, False]

    def test_zero_weights_and_zero_gradients(self, name):
        x = {"w": random_kernel(), "zeros": jnp.zeros((4, 2)), "some": jnp.array([[0.0, 1.0]] * 4)}
        zeros = jax.tree.map(jnp.zeros_like, x)
        optimizer = RUNS[name]()
        update = jax.jit(optimizer.update)
        for gradient in (zeros, jax.tree.map(jnp.cos, x)):
            updates, state = update(gradient, optimizer.init(x), x)
            chex.assert_tree_all_finite((updates, state))
        assert np.all(updates["zeros"] < 0)  # nothing lies along zero weights

    def test_no_gradient_that_is_not_finite_reaches_other_weights(self, name):
        x = {"w": random_kernel(), "other": random_kernel(1)}
        gradient = {"w": random_kernel(2).at[0, 0].set(jnp.nan), "other": random_kernel(3)}
        optimizer = RUNS[name]()
        updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(x), x)
        assert np.sum(~np.isfinite(updates["w"])) == 1
        chex.assert_tree_all_finite(updates["other"])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: optimizers.adamp(0.1, b1=1.0), ValueError, r"b1 must be in \[0, 1\)"),
        (lambda: optimizers.adamp(0.1, b2=-0.1), ValueError, "b2 must be in"),
        (lambda: optimizers.adamp(0.1, eps=-1.0), ValueError, "eps must be in"),
        (lambda: optimizers.adamp(0.1, delta=-1.0), ValueError, "delta must be in"),
        (lambda: optimizers.adamp(0.1, wd_ratio=1.5), ValueError, r"wd_ratio must be in \[0, 1\]"),
        (lambda: optimizers.adamp(0.1, mu_dtype=jnp.int8), TypeError, "mu_dtype must be"),
        (lambda: optimizers.sgdp(0.1, 1.0), ValueError, r"momentum must be in \[0, 1\)"),
        (lambda: optimizers.sgdp(0.1, dampening=2.0), ValueError, "dampening must be in"),
        (lambda: optimizers.sgdp(0.1, eps=jnp.nan), ValueError, "eps must be in"),
        (lambda: optimizers.sgdp(0.1, mu_dtype=jnp.int8), TypeError, "mu_dtype must be"),
        (
            lambda: optimizers.project_out_radial(jnp.ones(2), jnp.ones(3)),
            ValueError,
            "params must have shape",
        ),
        (
            lambda: optimizers.project_out_radial(jnp.ones(2), jnp.ones(2), axes=1),
            ValueError,
            "axes must name axes",
        ),
        (
            lambda: optimizers.project_out_radial(jnp.ones(2), jnp.ones(2), eps=-1.0),
            ValueError,
            "eps must be in",
        ),
    ],
)
def test_bad_input_raises(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", RUNS)
def test_bad_trees_raise(name):
    x = random_kernel()
    optimizer = RUNS[name]()
    with pytest.raises(ValueError, match="params must be passed to update"):
        optimizer.update(x, optimizer.init(x))
    optimizer = RUNS[name](channel_axis=2)
    with pytest.raises(ValueError, match="channel_axis must name axes"):
        optimizer.update(x, optimizer.init(x), x)
