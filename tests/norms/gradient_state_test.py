"""What the norms whose backward pass advances state owe their callers, whatever their formula."""

from functools import partial
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref.norms import (
    apply_gradient_state,
    power_norm,
    power_norm_init,
    unified_norm,
    unified_norm_init,
)

FEATURES = 3
NORMS = {
    "power_norm": (partial(power_norm, warmup_steps=1, groups=3), power_norm_init(FEATURES)),
    "unified_norm": (
        partial(unified_norm, warmup_steps=1, outlier_filtration=True),
        unified_norm_init(FEATURES, (2, 2)),
    ),
}
each_norm = pytest.mark.parametrize("name", NORMS)
close = partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-5)


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(1, 2, size=shape).astype(np.float32)


def at_work(name, batch=8):
    """The norm with a state from amid training (each field another value), and its arguments."""
    norm, state = NORMS[name]
    rng = np.random.default_rng(7)
    some = lambda a: a + jnp.asarray(rng.uniform(0.5, 1.5, size=a.shape), a.dtype)
    state = jax.tree.map(lambda a: some(a) if a.ndim else a + 5, state)
    return norm, (random((batch, 2, FEATURES)), state, random(FEATURES, 1), random(FEATURES, 2))


def gradients(norm, x, state, scale, bias, cotangent):
    """y, the gradients, and the complete next state."""

    def loss(x, scale, bias, state):
        y, following = norm(x, state, scale, bias, training=True)
        return jnp.sum(y * cotangent), (y, following)

    slope = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True, allow_int=True)
    (*found, gradient), (y, following) = slope(x, scale, bias, state)
    return y, found, apply_gradient_state(following, gradient)


def jitted(norm, *arguments):
    return jax.jit(partial(gradients, norm))(*arguments)


@each_norm
class TestTransformations:
    def test_jit_sharded_batch_and_remat(self, name):
        norm, arguments = at_work(name)
        cotangent = random((8, 2, FEATURES), 3)
        expected = jitted(norm, *arguments, cotangent)
        sharding = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
        remat = jax.checkpoint(partial(norm, training=True))
        rematted = lambda *a, training: remat(*a)
        x, *rest = arguments
        placed = jax.device_put((x, cotangent), sharding)
        for function in (norm, rematted):
            ours = jitted(function, placed[0], *rest, placed[1])
            close(ours, expected)
            assert ours[0].sharding.is_equivalent_to(sharding, 3)

    def test_scan_over_stacked_layers(self, name):
        norm, (x, state, scale, bias) = at_work(name)
        layers = 3
        stack = lambda tree: jax.tree.map(
            lambda a: jnp.stack([a * (1 + i) for i in range(layers)]), tree
        )
        states, scales, biases = stack(state), stack(scale / 3), stack(bias)
        cotangent = random(x.shape, 3)

        def scanned(x, states, scales, biases, training):
            def layer(x, parameters):
                return norm(x, *parameters, training=training)

            return jax.lax.scan(layer, x, (states, scales, biases))

        def unrolled(x, states, scales, biases, training):
            following = []
            for i in range(layers):
                x, one = norm(
                    x, jax.tree.map(lambda a: a[i], states), scales[i], biases[i], training=training
                )
                following.append(one)
            return x, jax.tree.map(lambda *a: jnp.stack(a), *following)

        arguments = (x, states, scales, biases, cotangent)
        ours, expected = (jitted(f, *arguments) for f in (scanned, unrolled))
        close(ours, expected, rtol=1e-3)

    @pytest.mark.parametrize("check_vma", [True, False])
    @pytest.mark.parametrize("masked", [False, True])
    def test_shard_map_sees_the_whole_batch(self, name, check_vma, masked):
        """Differentiated from outside, and from within: there, as for parameters, jax sums the
        gradients over the shards, or, without its check, the caller does."""
        norm, (x, *rest) = at_work(name)
        cotangent = random(x.shape, 3)
        where = np.arange(16).reshape(8, 2, 1) < (5 if masked else 16)  # shards without any
        axes = ("data", "fsdp")
        mesh = jax.make_mesh((4, 2), axes, axis_types=(AxisType.Auto,) * 2)
        expected = jitted(partial(norm, where=where), x, *rest, cotangent)
        spread = P(axes)

        def outside(x, state, scale, bias, training):
            return jax.shard_map(
                lambda x, where, *a: norm(x, *a, training=True, where=where, axis_name=axes),
                mesh=mesh,
                in_specs=(spread, spread, P(), P(), P()),
                out_specs=(spread, P()),
                check_vma=check_vma,
            )(x, where, state, scale, bias)

        close(jitted(outside, x, *rest, cotangent), expected)

        def inside(x, where, state, scale, bias, cotangent):
            local = partial(norm, where=where, axis_name=axes)
            fields = {name: getattr(state, name) for name in state.backward_fields}

            def loss(x, scale, bias, fields):
                y, following = local(x, state._replace(**fields), scale, bias, training=True)
                return jnp.sum(y * cotangent), (y, following)

            (dx, *summed), (y, following) = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(
                x, scale, bias, fields
            )
            if not check_vma:
                summed = jax.lax.psum(summed, axes)
            dscale, dbias, fields = summed
            following = apply_gradient_state(following, SimpleNamespace(**fields))
            return y, [dx, dscale, dbias], following

        ours = jax.jit(
            jax.shard_map(
                inside,
                mesh=mesh,
                in_specs=(spread, spread, P(), P(), P(), spread),
                out_specs=(spread, [spread, P(), P()], P()),
                check_vma=check_vma,
            )
        )(x, where, *rest, cotangent)
        close(ours, expected)

    def test_vmap_with_and_without_a_named_axis(self, name):
        norm, (x, *rest) = at_work(name)
        cotangent = random(x.shape, 3)

        def spread(x, state, scale, bias, training):
            mapped = jax.vmap(
                lambda x: norm(x, state, scale, bias, training=True, axis_name="v"), axis_name="v"
            )
            y, states = mapped(x.reshape(4, 2, 2, FEATURES))
            return y.reshape(x.shape), jax.tree.map(lambda a: a[0], states)

        expected = jitted(norm, x, *rest, cotangent)
        close(jitted(spread, x, *rest, cotangent), expected)
        each = jax.jit(jax.vmap(partial(gradients, norm), (0, None, None, None, None)))
        ours = each(np.stack([3 * x, x]), *rest, cotangent)
        close(jax.tree.map(lambda a: a[1], ours), expected)


@each_norm
class TestMask:
    def test_masked_entries_count_for_nothing_and_come_out_zero(self, name):
        norm, (x, *rest) = at_work(name)
        cotangent = random(x.shape, 3)
        where = np.arange(8).reshape(8, 1, 1) < 5
        run = jax.jit(partial(gradients, partial(norm, where=where)))
        expected = jitted(norm, x[:5], *rest, cotangent[:5])
        for poison in (1e30, np.nan):
            poisoned = np.where(where, x, poison).astype("f")
            y, (dx, *summed), state = run(poisoned, *rest, cotangent)
            close((y[:5], [dx[:5], *summed], state), expected)
            assert np.all(y[5:] == 0)
            assert np.all(dx[5:] == 0)
        evaluate = partial(norm, x, *rest, training=False)
        evaluated = np.where(where, evaluate()[0], 0)
        np.testing.assert_array_equal(evaluate(where=where)[0], evaluated)

    def test_a_batch_of_padding_is_no_step(self, name):
        norm, (x, state, *rest) = at_work(name)
        run = jax.jit(partial(gradients, partial(norm, where=np.zeros((8, 1, 1), bool))))
        for before in (state, NORMS[name][1]):
            y, found, following = run(x, before, *rest, random(x.shape, 3))
            chex.assert_trees_all_equal(following, before)
            assert np.all(y == 0)
            assert all(np.all(gradient == 0) for gradient in found)

    def test_a_channel_of_padding_keeps_its_statistics(self, name):
        norm, (x, state, *rest) = at_work(name)
        where = np.arange(FEATURES) != 1
        options = {"groups": None} if name == "power_norm" else {"outlier_filtration": False}
        norm = partial(norm, where=where, **options)
        *_, following = jitted(norm, x, state, *rest, random(x.shape, 3))
        assert following.step == state.step + 1
        chex.assert_tree_all_finite(following)
        if name == "power_norm":
            np.testing.assert_array_equal(following.psi_squared != state.psi_squared, where)
            np.testing.assert_array_equal(following.nu != state.nu, where)
        else:
            row = following.step % 2
            np.testing.assert_array_equal(following.x2_buffer[row, 1], state.running_var[1])
            np.testing.assert_array_equal(following.gz_buffer[row, 1], state.gz_ema[1])


@each_norm
class TestEdges:
    @pytest.mark.parametrize("epsilon", [0.0, 1e-5])
    def test_extreme_and_constant_batches_stay_finite(self, name, epsilon):
        norm, (x, state, *rest) = at_work(name)
        run = jax.jit(partial(gradients, partial(norm, epsilon=epsilon)))
        for size in (0.0, 1e-15, 1e4):
            for before in (state, NORMS[name][1]):
                for batch in (size * x, np.full_like(x, size)):
                    found = run(batch.astype("f"), before, *rest, np.ones_like(x))
                    chex.assert_tree_all_finite(found)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_computes_in_float32(self, name, dtype):
        norm, (x, state, *rest) = at_work(name)
        half = jnp.asarray(300 * x, dtype)  # squares overflow float16
        y, (dx, dscale, _), following = jitted(norm, half, state, *rest, np.ones_like(x))
        wide = jitted(norm, half.astype(jnp.float32), state, *rest, np.ones_like(x))
        assert (y.dtype, dx.dtype, dscale.dtype) == (dtype, dtype, jnp.float32)
        np.testing.assert_array_equal(y, wide[0].astype(dtype))
        chex.assert_trees_all_equal_shapes_and_dtypes(following, state)
        close(following, wide[2], rtol=1e-2, atol=1e-3)

    def test_the_state_keeps_its_types_under_float64(self, name):
        norm, (x, state, *rest) = at_work(name)
        with jax.enable_x64(True):
            y, _, following = jitted(norm, x.astype(np.float64), state, *rest, np.ones_like(x))
        assert y.dtype == np.float64
        chex.assert_trees_all_equal_shapes_and_dtypes(following, state)
