from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref import norms
from jaxref.nn import Norm
from jaxref.norms import BatchNormState

TORCH = np.load(Path(__file__).parents[1] / "oracles" / "batch_norms.npz")
TORCH_STATE = BatchNormState(TORCH["mean"], TORCH["var"])
TORCH_OPTIONS = {"momentum": 0.8, "epsilon": 1e-3, "training": True}
EACH_NORM = pytest.mark.parametrize(
    "norm",
    [
        norms.batch_norm,
        partial(norms.ghost_batch_norm, ghost_batch_size=2),
        partial(norms.estimated_batch_norm, rate=0.3),
        partial(norms.batch_channel_norm, groups=2),
        partial(norms.batch_channel_norm, groups=2, estimate=True),
    ],
    ids=["batch", "ghost", "estimated", "batch_channel", "estimated_channel"],
)


def random_batch(shape=(8, 3, 4), seed=0):
    """x with channels of different moments, a state, and a scale and a bias."""
    rng = np.random.default_rng(seed)
    features = shape[-1]
    x = rng.normal(size=features) + rng.uniform(0.5, 3, size=features) * rng.normal(size=shape)
    state = BatchNormState(rng.normal(size=features).astype("f"), rng.random(features).astype("f"))
    return x.astype("f"), state, *rng.normal(size=(2, features)).astype("f")


def assert_close(ours, expected, rtol=1e-4, atol=1e-5):
    chex.assert_trees_all_close(ours, expected, rtol=rtol, atol=atol)


def value_and_gradient(f, x, weights=None):
    """The y of `f(x) = (y, state)`, and the gradient of its sum, weighted or not."""
    weights = np.ones_like(x) if weights is None else weights

    def loss(x):
        y, _ = f(x)
        return jnp.sum(weights * y), y

    gradient, y = jax.jit(jax.grad(loss, has_aux=True))(x)
    return y, gradient


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_batch_norm_matches_torch(self):
        self.check("batch", norms.batch_norm, **TORCH_OPTIONS)

    def test_evaluation_matches_torch(self):
        options = {**TORCH_OPTIONS, "training": False}
        for norm in (norms.batch_norm, norms.ghost_batch_norm):
            self.check("evaluation", norm, variant=jax.jit, **options)
        _, state = norms.batch_norm(TORCH["x"], TORCH_STATE, **options)
        chex.assert_trees_all_equal(state, TORCH_STATE)

    def test_ghost_batch_norm_matches_torch_on_each_part_in_turn(self):
        self.check(
            "ghost", norms.ghost_batch_norm, variant=jax.jit, ghost_batch_size=2, **TORCH_OPTIONS
        )

    def test_estimated_batch_norm_matches_the_authors(self):
        self.check(
            "estimated", norms.estimated_batch_norm, variant=jax.jit, rate=0.2, training=True
        )

    @parameterized.parameters(("batch_channel", False), ("estimated_channel", True))
    def test_batch_channel_norm_matches_the_authors(self, case, estimate):
        parameters = [TORCH[name] for name in ("scale", "bias", "group_scale", "group_bias")]
        self.check(
            case,
            partial(norms.batch_channel_norm, groups=2, estimate=estimate),
            parameters,
            variant=jax.jit,
            momentum=0.8,
            training=True,
        )

    def check(self, case, norm, parameters=None, variant=None, **options):
        parameters = [TORCH["scale"], TORCH["bias"]] if parameters is None else parameters

        @(variant or self.variant)
        def ours(x, *parameters):
            f = lambda x, *p: norm(x, TORCH_STATE, *p, **options)
            y, vjp, state = jax.vjp(f, x, *parameters, has_aux=True)
            return y, vjp(TORCH["cotangent"]), state

        y, (of_x, *of_parameters), state = ours(TORCH["x"], *parameters)
        assert_close(y, TORCH[f"{case}_y"])
        assert_close(of_x, TORCH[f"{case}_grad_x"])
        for i, gradient in enumerate(of_parameters):
            assert_close(gradient, TORCH[f"{case}_grad_{i}"])
        if f"{case}_mean" in TORCH:
            assert_close(state, BatchNormState(TORCH[f"{case}_mean"], TORCH[f"{case}_var"]))


class TestClaims:
    @pytest.mark.claim("ghost-batch-normalization")
    def test_each_part_is_normalised_alone_and_the_statistics_see_one_after_the_other(self):
        x, state, scale, bias = random_batch()
        options = {"training": True, "momentum": 0.7}
        ghost = lambda x, size: jax.jit(
            partial(norms.ghost_batch_norm, ghost_batch_size=size, **options)
        )(x, state, scale, bias)
        batch_norm = jax.jit(partial(norms.batch_norm, **options))
        whole = batch_norm(x, state, scale, bias)
        assert_close(ghost(x, 8), whole)
        assert_close(ghost(x, 128), whole)  # no more examples than a ghost batch
        y, after = ghost(x, 2)
        sequential = state
        for part, y_part in zip(np.split(x, 4), np.split(y, 4)):
            alone, sequential = batch_norm(part, sequential, scale, bias)
            assert_close(y_part, alone)
            standard = (y_part - bias) / scale
            np.testing.assert_allclose(standard.mean((0, 1)), 0, atol=1e-4)
            np.testing.assert_allclose(standard.std((0, 1)), 1, atol=1e-3)
        assert_close(after, sequential)
        assert np.abs(y - whole[0]).max() > 0.1
        other = ghost(np.concatenate([x[:2], 5 + x[2:]]), 2)[0]
        np.testing.assert_array_equal(other[:2], y[:2])

    def test_batch_channel_norm_is_one_norm_after_the_other(self):
        x, state, scale, bias = random_batch()
        inner, after = norms.batch_norm(x, state, training=True)
        for channel in ((scale, bias), (scale[:2], bias[:2])):
            ours = norms.batch_channel_norm(x, state, None, None, *channel, training=True, groups=2)
            per_feature = [np.repeat(p, 4 // len(p)) for p in channel]
            assert_close(ours, (norms.group_norm(inner, *per_feature, groups=2), after))

    def test_estimates_carry_no_gradient_and_an_example_evaluates_alone(self):
        x, state, scale, bias = random_batch((3, 2, 4))
        norm = partial(norms.estimated_batch_norm, rate=0.1)
        f = lambda x: norm(x, state, scale, bias, training=True)[0].ravel()
        jacobian = jax.jit(jax.jacobian(f))(x).reshape(x.size, x.size)
        after = norm(x, state, training=True)[1]
        diagonal = np.broadcast_to(scale / np.sqrt(after.var + 1e-5), x.shape).ravel()
        assert_close(jacobian, np.diag(diagonal))
        evaluate = partial(
            norms.batch_channel_norm, state=after, training=False, groups=2, estimate=True
        )
        assert_close(evaluate(x)[0][:1], evaluate(x[:1])[0])


class TestGlobalStatistics:
    """With `axis_name`, a batch spread over devices is one batch."""

    @EACH_NORM
    def test_values_and_gradients_are_those_of_the_whole_batch(self, norm):
        x, state, scale, bias = random_batch((32, 3, 4))  # two ghost batches to a device
        weights = random_batch((32, 3, 4), seed=1)[0]
        mesh, names = jax.make_mesh((4, 2), ("data", "fsdp")), ("data", "fsdp")

        def results(run, x):
            def loss(x, scale, bias):
                y, after = run(x, scale, bias)
                return jnp.sum(weights * y), (y, after)

            return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(x, scale, bias)

        sharded = jax.shard_map(
            lambda x, *p: norm(x, state, *p, training=True, axis_name=names),
            mesh=mesh,
            in_specs=(P(names), P(), P()),
            out_specs=(P(names), P()),
        )
        whole = lambda x, *p: norm(x, state, *p, training=True)
        placed = jax.device_put(x, NamedSharding(mesh, P(names)))
        assert_close(results(sharded, placed), results(whole, x), atol=1e-4)

    @pytest.mark.parametrize("norm", [norms.batch_norm, norms.estimated_batch_norm])
    def test_masked_shards_and_vmap(self, norm):
        if norm is norms.estimated_batch_norm:
            norm = partial(norm, rate=0.3)
        x, state, scale, bias = random_batch((8, 3, 4))
        where = np.random.default_rng(1).random((8, 3, 4)) < 0.5
        where[2:4] = False  # a shard without entries
        expected = norm(x, state, scale, bias, training=True, where=where)
        shards = lambda a: a.reshape(4, 2, 3, 4)
        run = lambda x, w: norm(x, state, scale, bias, training=True, where=w, axis_name="data")
        mapped = jax.vmap(run, axis_name="data", out_axes=(0, None))
        y, after = jax.jit(mapped)(shards(x), shards(where))
        assert_close((y.reshape(x.shape), after), expected)

    @pytest.mark.optimized
    def test_ghost_batches_need_no_other_device(self):
        x, state, *_ = random_batch((16, 4))
        rows = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
        norm = lambda size: jax.jit(
            lambda x: norms.ghost_batch_norm(x, state, training=True, ghost_batch_size=size)[0]
        )
        placed = jax.device_put(x, rows)
        y = norm(2)(placed)
        assert y.sharding.is_equivalent_to(rows, 2)
        assert_close(y, norm(2)(x))
        text = {size: norm(size).lower(placed).compile().as_text() for size in (2, 16)}
        assert "all-reduce" in text[16]
        assert not any(word in text[2] for word in ("all-reduce", "all-gather", "permute"))


class TestState:
    @EACH_NORM
    def test_carries_no_gradient(self, norm):
        x, state, *_ = random_batch()
        total = lambda x, state: sum(map(jnp.sum, norm(x, state, training=True)[1]))
        for gradient in jax.tree.leaves(jax.jit(jax.grad(total, argnums=(0, 1)))(x, state)):
            np.testing.assert_array_equal(gradient, 0)

    @EACH_NORM
    def test_keeps_its_type_and_evaluation_leaves_it(self, norm):
        x = jnp.ones((8, 3, 4), jnp.bfloat16)
        y, state = norm(x, norms.batch_norm_init(4), training=True)
        assert y.dtype == jnp.bfloat16
        assert {leaf.dtype for leaf in state} == {jnp.dtype("float32")}
        chex.assert_trees_all_equal(norm(x, state, training=False)[1], state)

    def test_converges_to_the_moments_of_a_repeated_batch(self):
        x, *_ = random_batch()
        moments = BatchNormState(x.mean((0, 1)), x.var((0, 1)))
        for norm in (norms.batch_norm, partial(norms.estimated_batch_norm, rate=0.1)):
            step = jax.jit(lambda state: norm(x, state, training=True)[1])
            state = norms.batch_norm_init(4)
            for _ in range(150):
                state = step(state)
            assert_close(state, moments, rtol=1e-3, atol=1e-3)

    def test_in_a_module(self):
        x, *_ = random_batch()
        for function in (
            norms.batch_norm,
            partial(norms.ghost_batch_norm, ghost_batch_size=4),
            partial(norms.estimated_batch_norm, rate=0.1),
            partial(norms.batch_channel_norm, groups=2),
        ):
            norm = Norm(function, 4)
            asked = ("batch_scale", "batch_bias", "channel_scale", "channel_bias")
            learned = asked if "batch_channel" in repr(function) else ("scale", "bias")
            state = norms.batch_norm_init(4)
            parameters = {name: np.full(4, float(name.endswith("scale")), "f") for name in learned}
            y, after = function(x, state, **parameters, training=True)
            assert_close(norm(x), y)
            assert_close({n: v[...] for n, v in norm.state.items()}, after._asdict())
            norm.eval()
            assert_close(norm(x), function(x, after, **parameters, training=False)[0])
            assert set(nnx.to_pure_dict(nnx.state(norm, nnx.Param))) == set(learned)


class TestMask:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("estimated", [True, False])
    def test_masked_entries_count_for_nothing(self, training, estimated):
        norm = partial(norms.estimated_batch_norm, rate=0.3) if estimated else norms.batch_norm
        x, state, scale, bias = random_batch((5, 3, 4))
        where = np.arange(5)[:, None, None] < 3
        weights = random_batch((5, 3, 4), seed=1)[0]
        f = jax.jit(lambda x, **mask: norm(x, state, scale, bias, training=training, **mask))
        masked = lambda x: f(x, where=where)
        expected, expected_gradient = value_and_gradient(f, x[:3], weights[:3])
        for poison in (np.nan, np.inf, 1e30):
            poisoned = np.where(where, x, poison).astype("f")
            y, gradient = value_and_gradient(masked, poisoned, weights)
            assert_close(y[:3], expected)
            assert_close(gradient[:3], expected_gradient)
            for array in (y, gradient):
                np.testing.assert_array_equal(array[3:], 0)
            assert_close(masked(poisoned)[1], f(x[:3])[1])

    def test_a_channel_without_entries_keeps_its_statistics(self):
        x, state, scale, bias = random_batch()
        where = np.arange(4) > 0
        for norm in (norms.batch_norm, partial(norms.estimated_batch_norm, rate=0.3)):
            f = jax.jit(lambda x: norm(x, state, scale, bias, training=True, where=where))
            y, gradient = value_and_gradient(f, x)
            _, after = f(x)
            for old, new in zip(state, after):
                assert old[0] == new[0]
                assert np.all(old[1:] != new[1:])
            np.testing.assert_array_equal(y[..., 0], 0)
            assert np.all(np.isfinite(gradient))
            np.testing.assert_array_equal(gradient[..., 0], 0)


class TestEdges:
    @EACH_NORM
    @pytest.mark.parametrize("epsilon", [0.0, 1e-5])
    def test_one_example_at_one_position_and_constant_channels(self, norm, epsilon):
        _, state, scale, bias = random_batch()
        options = {"training": True, "epsilon": epsilon}
        for x in (np.float32([[0.1, -3, 1e4, 0]]), np.full((4, 3, 4), 0.1, "f")):
            if len(x) == 1 and "ghost" in repr(norm):
                options["ghost_batch_size"] = 1
            y, gradient = value_and_gradient(lambda x: norm(x, state, scale, bias, **options), x)
            assert np.all(np.isfinite(y))
            assert np.all(np.isfinite(gradient))
            if norm is norms.batch_norm or "ghost" in repr(norm):
                np.testing.assert_array_equal(y, np.broadcast_to(bias, x.shape))

    def test_a_mean_far_above_the_spread_keeps_its_precision(self):
        x = random_batch((64, 3, 4))[0] + np.float32(1e4)
        exact = x.astype(np.float64)
        expected = (exact - exact.mean((0, 1))) / np.sqrt(exact.var((0, 1)) + 1e-5)
        y, _ = norms.batch_norm(x, norms.batch_norm_init(4), training=True)
        np.testing.assert_allclose(y, expected, atol=1e-4)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_computes_in_float32(self, dtype):
        x, state, scale, bias = random_batch()
        half = jnp.asarray(300 * x, dtype)  # squares overflow float16
        norm = jax.jit(partial(norms.batch_channel_norm, training=True, groups=2))
        ours, after = norm(half, state, scale, bias)
        exact, exact_after = norm(half.astype(jnp.float32), state, scale, bias)
        np.testing.assert_array_equal(ours, exact.astype(dtype))
        assert_close(after, exact_after)

    def test_momentum_at_its_ends_and_traced(self):
        x, state, *_ = random_batch()
        norm = jax.jit(
            lambda m: norms.ghost_batch_norm(
                x, state, training=True, ghost_batch_size=2, momentum=m
            )[1]
        )
        chex.assert_trees_all_equal(norm(1.0), state)
        last = x[-2:].mean((0, 1)), x[-2:].var((0, 1))
        assert_close(tuple(norm(0.0)), last)


class TestBadInput:
    @EACH_NORM
    def test_is_named(self, norm):
        x, state, scale, _ = random_batch()
        first = "batch_scale" if "batch_channel" in repr(norm) else "scale"
        run = partial(norm, training=True)
        with pytest.raises(ValueError, match=r"x must have shape \[batch, ..., features\]"):
            run(x[0, 0], state)
        with pytest.raises(ValueError, match="hold entries"):
            run(x[:, :0], state)
        with pytest.raises(ValueError, match=r"state.var must have shape \(4,\)"):
            run(x, state._replace(var=scale[:1]))
        with pytest.raises(ValueError, match=rf"{first} must have shape \(4,\)"):
            run(x, state, scale[:2])
        with pytest.raises(TypeError, match=f"{first} must have a floating-point type"):
            run(x, state, scale.astype(int))
        with pytest.raises(ValueError, match=r"epsilon must be in \[0, inf\)"):
            run(x, state, epsilon=-1.0)
        with pytest.raises(TypeError, match="x must have a floating-point type"):
            run(x.astype(int), state)

    def test_of_one_norm_alone_is_named(self):
        x, state, _, bias = random_batch()
        with pytest.raises(ValueError, match=r"ghost_batch_size must divide the batch of 8 exampl"):
            norms.ghost_batch_norm(x, state, training=True, ghost_batch_size=3)
        with pytest.raises(ValueError, match=r"ghost_batch_size must divide .* got 2.0"):
            norms.ghost_batch_norm(x, state, training=True, ghost_batch_size=2.0)
        with pytest.raises(ValueError, match="ghost_batch_size must be in"):
            norms.ghost_batch_norm(x, state, training=True, ghost_batch_size=0)
        with pytest.raises(ValueError, match="ghost_batch_size must divide the batch of 2 exampl"):
            jax.vmap(
                lambda x: norms.ghost_batch_norm(x, state, training=True, axis_name="data")[0],
                axis_name="data",
            )(x.reshape(4, 2, 3, 4))
        with pytest.raises(ValueError, match=r"rate must be in \[0, 1\]"):
            norms.estimated_batch_norm(x, state, training=True, rate=1.5)
        with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\]"):
            norms.batch_norm(x, state, training=True, momentum=-0.1)
        with pytest.raises(ValueError, match="groups must be a divisor of the 4 features"):
            norms.batch_channel_norm(x, state, training=True)
        with pytest.raises(ValueError, match=r"channel_bias must have shape \(4,\) or \(2,\)"):
            norms.batch_channel_norm(x, state, channel_bias=bias[:3], training=True, groups=2)
        with pytest.raises(ValueError, match="where must broadcast"):
            norms.batch_norm(x, state, training=True, where=np.ones(3, bool))
        with pytest.raises(ValueError, match="features must be in"):
            norms.batch_norm_init(0)
