from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref import norms
from jaxref.norms import EvoNormState, evonorm_b0, evonorm_b0_init, evonorm_s0

TIMM = np.load(Path(__file__).parents[1] / "oracles" / "evonorm.npz")
BATCH = ("evonorm_b0", "evonorm_b1", "evonorm_b2")
SAMPLE = ("evonorm_s0", "evonorm_s1", "evonorm_s2")
STATE = EvoNormState(jnp.array([0.5, 1.0, 2.0, 4.0]))
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(1, 2, size=shape).astype(np.float32)


def in_training(name, **options):
    """The layer as y of x and its parameters, whatever its kind."""
    layer = getattr(norms, name)
    if name in BATCH:
        return lambda x, *a: layer(x, STATE, *a, training=True, **options)[0]
    return lambda x, *a: layer(x, *a, groups=2, **options)


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters("evonorm_b0", "evonorm_s2")
    def test_variants(self, name):
        parameters = [TIMM[key] for key in ("scale", "bias", "v")[: 3 if name[-1] == "0" else 2]]
        ours = self.variant(in_training(name, epsilon=1e-3))(TIMM["x"], *parameters)
        close(ours, TIMM[f"{name}_y"])

    @parameterized.parameters(*BATCH, *SAMPLE)
    def test_values_and_gradients_match_timm(self, name):
        names = ("x", "scale", "bias", "v")[: 4 if name[-1] == "0" else 3]
        layer = jax.jit(lambda *a: jax.vjp(in_training(name, epsilon=1e-3), *a[:-1])[1](a[-1]))
        arguments = [TIMM[key] for key in names]
        close(in_training(name, epsilon=1e-3)(*arguments), TIMM[f"{name}_y"])
        for key, gradient in zip(names, layer(*arguments, TIMM["cotangent"])):
            if key != "bias":
                close(gradient, TIMM[f"{name}_grad_{key}"])

    @parameterized.parameters(*BATCH)
    def test_running_variance_and_evaluation_match_timm(self, name):
        """timm keeps the unbiased variance, 18 / 17 times the biased one."""
        layer = partial(getattr(norms, name), epsilon=1e-3)
        arguments = [TIMM[key] for key in ("scale", "bias", "v")[: 3 if name[-1] == "0" else 2]]
        _, state = layer(TIMM["x"], evonorm_b0_init(4), *arguments, training=True)
        close(0.9 + (state.var - 0.9) * 18 / 17, TIMM[f"{name}_var"])
        timm = EvoNormState(TIMM[f"{name}_var"])
        y, unchanged = layer(TIMM["x"], timm, *arguments, training=False)
        close(y, TIMM[f"{name}_evaluated"])
        assert unchanged is timm


class TestClaims:
    @pytest.mark.claim("evonorm")
    def test_one_layer_is_both_a_norm_that_does_not_centre_and_an_activation(self):
        """B0: linear below and saturated above; S0: from x/2 over the deviation, at v = 0, to that
        of ReLU."""
        x = random((8, 4, 4, 4))
        x[0] += 30
        deviation = np.sqrt(x.var((0, 1, 2)) + 1e-5)
        train = lambda v: evonorm_b0(x, STATE, v=np.full(4, v, "f"), training=True)[0]
        own = np.sqrt(x.var((1, 2), keepdims=True) + 1e-5)
        below = x + own < deviation
        assert 0.5 < below.mean() < 0.9
        np.testing.assert_allclose(train(1)[below], (x / deviation)[below], rtol=1e-4)
        above = x > 5 * own
        assert above.any()
        assert np.all((train(1)[above] > 0.8) & (train(1)[above] < 1))
        assert np.all(train(1) < 1)
        np.testing.assert_allclose(train(0), x / np.maximum(deviation, own), rtol=1e-4)

        split = x.reshape(8, 4, 4, 2, 2)
        group = np.sqrt(split.var((1, 2, 4), keepdims=True) + 1e-5)
        sample = lambda v: evonorm_s0(x, v=np.full(4, v, "f"), groups=2).reshape(split.shape)
        np.testing.assert_allclose(sample(0), split / group / 2, rtol=1e-4)
        np.testing.assert_allclose(sample(1e4), np.maximum(split, 0) / group, rtol=1e-3, atol=1e-4)

    def test_evaluation_with_the_variance_of_the_batch_is_training(self):
        x = random((4, 3, 4))
        state = EvoNormState(x.var((0, 1)))
        for name in BATCH:
            layer = getattr(norms, name)
            trained, _ = layer(x, STATE, training=True)
            close(layer(x, state, training=False)[0], trained)

    def test_an_example_sees_the_others_in_the_batch_series_only(self):
        x = random((4, 3, 4))
        for name in (*BATCH, *SAMPLE):
            y, alone = (in_training(name)(a)[:1] for a in (x, x[:1]))
            assert np.allclose(y, alone, atol=1e-5) == (name in SAMPLE)

    def test_the_second_and_third_of_the_sample_series_agree_on_groups_of_mean_zero(self):
        x = random((3, 5, 2, 2))
        x -= x.mean((1, 3), keepdims=True)
        x = x.reshape(3, 5, 4)
        ours = norms.evonorm_s1(x, groups=2)
        close(ours, norms.evonorm_s2(x, groups=2))
        close(evonorm_s0(7 * x, v=np.full(4, 1 / 7, "f"), groups=2, epsilon=1e-12), ours)


class TestTransformations:
    @pytest.mark.parametrize("name", BATCH)
    def test_spread_batch_sees_the_whole(self, name):
        x, cotangent = random((8, 2, 4)), random((8, 2, 4), 1)
        scale, bias = random(4, 2), random(4, 3)
        layer = getattr(norms, name)

        def gradients(layer, x, scale, bias):
            loss = lambda *a: (lambda y, state: (jnp.sum(y * cotangent), (y, state)))(*layer(*a))
            return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, scale, bias)

        def whole(x, scale, bias):
            return layer(x, STATE, scale, bias, training=True)

        def spread(x, scale, bias, axes):
            return layer(x, STATE, scale, bias, training=True, axis_name=axes)

        expected = jax.jit(partial(gradients, whole))(x, scale, bias)
        mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
        axes = ("data", "fsdp")
        sharded = jax.shard_map(
            partial(spread, axes=axes),
            mesh=mesh,
            in_specs=(P(axes), P(), P()),
            out_specs=(P(axes), P()),
        )
        mapped = jax.vmap(partial(spread, axes="v"), (0, None, None), (0, None), axis_name="v")

        def unfolded(x, scale, bias):
            y, state = mapped(x.reshape(4, 2, 2, 4), scale, bias)
            return y.reshape(x.shape), state

        for function in (sharded, unfolded):
            ours = jax.jit(partial(gradients, function))(x, scale, bias)
            chex.assert_trees_all_close(ours, expected, rtol=1e-4, atol=1e-5)
        placed = jax.device_put(x, NamedSharding(mesh, P(axes)))
        ours = jax.jit(partial(gradients, whole))(placed, scale, bias)
        chex.assert_trees_all_close(ours, expected, rtol=1e-4, atol=1e-5)

    def test_vmap_over_networks(self):
        xs = random((2, 4, 3, 4))
        for name in ("evonorm_b0", "evonorm_s0"):
            ours = jax.vmap(in_training(name))(xs)
            close(ours[1], in_training(name)(xs[1]))

    def test_no_gradient_reaches_the_state(self):
        x = random((4, 3, 4))
        moved = lambda x: evonorm_b0(x, STATE, training=True)[1].var.sum()
        assert np.all(jax.grad(moved)(x) == 0)


@pytest.mark.parametrize("name", [*BATCH, *SAMPLE])
class TestEdges:
    def test_extreme_constant_and_single_entries_stay_finite(self, name):
        slope = jax.jit(jax.value_and_grad(lambda x: jnp.sum(in_training(name)(x) ** 2)))
        x = random((2, 3, 4))
        for size in (0.0, 1e-15, 1e4):
            for batch in (size * x, np.full_like(x, size), np.full_like(x, -size)):
                chex.assert_tree_all_finite(slope(batch.astype("f")))
        for shape in ((1, 4), (1, 1, 1, 4), (2, 2, 1, 2, 4)):
            assert in_training(name)(random(shape)).shape == shape

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_computes_in_float32(self, name, dtype):
        half = jnp.asarray(300 * random((2, 3, 4)), dtype)  # squares overflow float16
        ours = in_training(name)(half)
        assert ours.dtype == dtype
        expected = in_training(name)(half.astype(jnp.float32))
        np.testing.assert_array_equal(ours, expected.astype(dtype))

    def test_bad_input_is_named(self, name):
        layer = in_training(name)
        with pytest.raises(ValueError, match=r"scale must have shape \(4,\)"):
            layer(random((2, 4)), np.ones(3, "f"))
        with pytest.raises(TypeError, match="bias must have a floating-point"):
            layer(random((2, 4)), None, np.ones(4, int))
        with pytest.raises(ValueError, match=r"x must have shape \[batch"):
            layer(random(4))
        with pytest.raises(TypeError, match="x must have a floating-point"):
            layer(np.ones((2, 4), int))
        with pytest.raises(ValueError, match=r"epsilon must be in \(0, inf\)"):
            in_training(name, epsilon=0.0)(random((2, 4)))
        if name in BATCH:
            with pytest.raises(ValueError, match=r"state.var must have shape \(3,\)"):
                layer(random((2, 3)))
            with pytest.raises(ValueError, match="momentum"):
                in_training(name, momentum=1.5)(random((2, 4)))
        else:
            with pytest.raises(ValueError, match="groups must be a divisor"):
                layer(random((2, 3)))
        if name[-1] == "0":
            with pytest.raises(ValueError, match=r"v must have shape \(4,\)"):
                layer(random((2, 4)), None, None, np.ones(3, "f"))


def test_no_features_are_named():
    with pytest.raises(ValueError, match="features must be in"):
        evonorm_b0_init(0)
