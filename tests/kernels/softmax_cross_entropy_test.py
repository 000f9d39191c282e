import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from jax.sharding import PartitionSpec as P

from jaxref import losses
from jaxref.kernels import softmax_cross_entropy
from tests.kernels.ahead_of_time import (
    TOPOLOGIES,
    compile_for_tpu,
    lower_for_gpu,
    needs_tpu_compiler,
)
from tests.kernels.platforms import ANYWHERE, small_tiles  # noqa: F401

everywhere = pytest.mark.parametrize("implementation", ANYWHERE)
OPTIONS = (
    {},
    {"label_smoothing": 0.1, "z_loss": 0.01},
    {"soft_cap": 5.0, "label_smoothing": 0.3},
)


def literal(logits, labels, g, *, label_smoothing=0.0, z_loss=0.0, soft_cap=None):
    """Losses, and the gradients of Σ g L at logits and distributions, in float64."""
    raw, slope = np.float64(logits), 1.0
    if soft_cap is not None:
        raw = soft_cap * np.tanh(raw / soft_cap)
        slope = 1 - (raw / soft_cap) ** 2
    is_ids = np.issubdtype(np.asarray(labels).dtype, np.integer)
    p = np.eye(raw.shape[-1])[labels] if is_ids else np.float64(labels)
    s, g = label_smoothing, np.float64(g)[..., None]
    q = (1 - s) * p + s / raw.shape[-1]
    log_z = scipy.special.logsumexp(raw, axis=-1, keepdims=True)
    value = (q * (log_z - raw)).sum(-1) + z_loss * log_z[..., 0] ** 2
    d_log_z = q.sum(-1, keepdims=True) + 2 * z_loss * log_z
    d_logits = g * slope * (d_log_z * np.exp(raw - log_z) - q)
    return value, d_logits, (1 - s) * g * (log_z - raw)


def computed(implementation, logits, labels, g, **options):
    loss = functools.partial(softmax_cross_entropy, implementation=implementation, **options)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        value, vjp = jax.vjp(lambda x: loss(x, labels), logits)
    else:
        value, vjp = jax.vjp(loss, logits, labels)
    return value, *vjp(jnp.asarray(g, value.dtype))


def example(shape=(6, 300), *, soft=False, scale=3.0, offset=0.0, dtype=np.float32):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(scale * rng.normal(size=shape) + offset, dtype)
    labels = jnp.asarray(rng.integers(shape[-1], size=shape[:-1]))
    if soft:
        labels = jnp.asarray(rng.dirichlet(np.ones(shape[-1]), size=shape[:-1]), np.float32)
    return logits, labels, jnp.asarray(rng.normal(size=shape[:-1]), np.float32)


@pytest.mark.usefixtures("small_tiles")
class TestNumbers:
    @everywhere
    @pytest.mark.parametrize("options", OPTIONS, ids=["plain", "smoothed", "capped"])
    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "distributions"])
    def test_values_and_gradients_match_the_formula(self, implementation, options, soft):
        args = example(soft=soft)
        for ours, exact in zip(
            computed(implementation, *args, **options), literal(*args, **options)
        ):
            np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=2e-6)

    @everywhere
    @pytest.mark.parametrize("offset", [1e4, -1e4])
    def test_far_from_zero(self, implementation, offset):
        args = example((3, 200), offset=offset)
        options = {"label_smoothing": 0.2}
        for ours, exact in zip(
            computed(implementation, *args, **options), literal(*args, **options)
        ):
            np.testing.assert_allclose(ours, exact, rtol=2e-6, atol=2e-6)

    @everywhere
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision(self, implementation, dtype):
        logits, labels, g = example((4, 150), dtype=dtype)
        g = g.astype(dtype)
        step = float(jnp.finfo(dtype).eps)
        ours = computed(implementation, logits, labels, g, label_smoothing=0.1)
        assert all(x.dtype == dtype for x in ours)
        for x, exact in zip(ours, literal(logits, labels, g, label_smoothing=0.1)):
            np.testing.assert_allclose(np.float64(x), exact, rtol=step, atol=step / 50)

    def test_is_the_loss_of_the_losses_room_and_of_optax(self):
        logits, labels, _ = example((2, 3, 7))
        ours = softmax_cross_entropy(logits, labels, label_smoothing=0.1)
        room = losses.softmax_cross_entropy(logits, labels, label_smoothing=0.1)
        np.testing.assert_allclose(ours, room, rtol=1e-5)
        plain = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        np.testing.assert_allclose(softmax_cross_entropy(logits, labels), plain, rtol=1e-5)


@pytest.mark.usefixtures("small_tiles")
class TestEdges:
    @everywhere
    def test_ids_that_are_no_class_give_nan_in_their_row_alone(self, implementation):
        logits, _, g = example((5, 140))
        labels = jnp.array([0, -1, 139, 140, 7])
        value, d_logits = computed(implementation, logits, labels, g, label_smoothing=0.1)
        wrong = np.array([False, True, False, True, False])
        np.testing.assert_array_equal(np.isnan(value), wrong)
        assert np.all(d_logits[wrong] == 0)
        good = literal(logits[~wrong], labels[~wrong], g[~wrong], label_smoothing=0.1)
        np.testing.assert_allclose(value[~wrong], good[0], rtol=1e-5)
        np.testing.assert_allclose(d_logits[~wrong], good[1], atol=1e-6)

    @everywhere
    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "distributions"])
    def test_classes_that_are_not_admitted(self, implementation, soft):
        logits, labels, g = example((4, 140), soft=soft)
        where = np.random.default_rng(5).random((4, 140)) < 0.6
        if soft:
            labels = labels * where
        else:
            where[jnp.arange(3), labels[:3]] = True
            where[3, labels[3]] = False
        where[0] = False
        options = {"label_smoothing": 0.1, "z_loss": 0.01}
        value, d_logits, *d_labels = computed(
            implementation, logits, labels, g, where=where, **options
        )
        expected = losses.softmax_cross_entropy(
            logits, labels, label_smoothing=0.1, where=jnp.asarray(where)
        )
        log_z = scipy.special.logsumexp(np.where(where, logits, -1e300), axis=-1)
        expected += 0.01 * np.where(where.any(-1), log_z, 0) ** 2
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        assert value[0] == 0
        assert np.all(d_logits[0] == 0)
        assert np.all(np.isfinite(d_logits))
        assert np.all(np.asarray(d_logits)[~where] == 0)
        assert all(np.all(np.isfinite(x)) for x in d_labels)
        assert soft or np.isnan(value[3])

    @everywhere
    def test_an_impossible_label_costs_infinitely_much(self, implementation):
        logits = jnp.array([[0.0, -jnp.inf, 1.0]])
        value, d_logits = computed(implementation, logits, jnp.array([1]), jnp.ones(1))
        assert value[0] == np.inf
        np.testing.assert_allclose(d_logits, [[0.26894143, 0.0, 0.7310586]], rtol=1e-5)
        value, _ = computed(implementation, logits, jnp.array([2]), jnp.ones(1))
        np.testing.assert_allclose(value, [0.31326166], rtol=1e-6)

    @everywhere
    def test_one_class_and_no_rows(self, implementation):
        value, d_logits = computed(implementation, jnp.ones((3, 1)), jnp.zeros(3, int), jnp.ones(3))
        assert np.all(value == 0)
        assert np.all(d_logits == 0)
        empty = softmax_cross_entropy(
            jnp.zeros((2, 0, 5)), jnp.zeros((2, 0), int), implementation=implementation
        )
        assert empty.shape == (2, 0)

    def test_classes_along_any_axis(self):
        logits, labels, g = example((4, 9, 2), soft=True)
        moved, over = jnp.moveaxis(logits, -1, 0), jnp.moveaxis(labels, -1, 0)
        for x, y in zip(computed(None, moved, over, g, axis=0), computed(None, logits, labels, g)):
            x = jnp.moveaxis(x, 0, -1) if x.ndim == 3 else x
            np.testing.assert_allclose(x, y, rtol=1e-6)

    def test_bad_input(self):
        logits, labels, _ = example((2, 5))
        call = functools.partial(softmax_cross_entropy, logits, labels)
        for options, match in (
            ({"label_smoothing": 1.5}, "label_smoothing"),
            ({"z_loss": -1.0}, "z_loss"),
            ({"soft_cap": 0.0}, "soft_cap"),
            ({"axis": 3}, "axis"),
            ({"where": jnp.ones(3, bool)}, "where"),
            ({"implementation": "triton"}, "implementation"),
        ):
            with pytest.raises(ValueError, match=match):
                call(**options)
        with pytest.raises(ValueError, match="labels"):
            softmax_cross_entropy(logits, labels[:1])
        with pytest.raises(ValueError, match="at least one class"):
            softmax_cross_entropy(jnp.zeros((2, 0)), labels)
        with pytest.raises(TypeError, match="labels must be integer ids or a distribution"):
            softmax_cross_entropy(logits, jnp.ones(2, bool))
        with pytest.raises(TypeError, match="logits must have a floating-point type"):
            softmax_cross_entropy(labels, labels)


@pytest.mark.usefixtures("small_tiles")
class TransformationsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_with_and_without_jit(self):
        logits, labels, g = example((3, 140))
        value = self.variant(functools.partial(softmax_cross_entropy, z_loss=0.1))(logits, labels)
        np.testing.assert_allclose(value, literal(logits, labels, g, z_loss=0.1)[0], rtol=1e-5)

    def test_vmap(self):
        logits, labels, g = example((3, 2, 140))
        for implementation in ANYWHERE:
            each = jax.vmap(functools.partial(computed, implementation))(logits, labels, g)
            for ours, exact in zip(each, literal(logits, labels, g)):
                np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("small_tiles")
class TestVocabularyParallel:
    def spread(self, implementation, soft, **options):
        """The loss of logits whose classes are spread over four devices, their rows over two."""
        mesh = jax.make_mesh(
            (2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
        )
        loss = functools.partial(
            softmax_cross_entropy, axis_name="tensor", implementation=implementation, **options
        )
        return jax.shard_map(
            loss,
            mesh=mesh,
            in_specs=(P("data", "tensor"), P("data", "tensor") if soft else P("data")),
            out_specs=P("data"),
            check_vma=implementation != "pallas_gpu_interpret",  # which its interpreter cannot
        )

    @everywhere
    @pytest.mark.parametrize("soft", [False, True], ids=["ids", "distributions"])
    def test_equals_the_whole(self, implementation, soft):
        logits, labels, g = example((4, 560), soft=soft, offset=100.0)
        options = {"label_smoothing": 0.1, "z_loss": 0.01}
        spread = self.spread(implementation, soft, **options)

        @jax.jit
        def run(logits, labels, g):
            value, vjp = jax.vjp(lambda x: spread(x, labels), logits)
            return value, *vjp(g)

        for ours, exact in zip(run(logits, labels, g), literal(logits, labels, g, **options)):
            np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=2e-6)

    def test_ids_outside_of_all_shards_and_rows_that_some_shards_lack(self):
        logits, _, _ = example((4, 8))
        logits = logits.at[1, :4].set(-jnp.inf).at[2].set(-jnp.inf)
        labels = jnp.array([8, 7, 1, 3])
        value = jax.jit(self.spread(None, False))(logits, labels)
        assert np.isnan(value[0])
        np.testing.assert_allclose(value[1], softmax_cross_entropy(logits[1], labels[1]), rtol=1e-6)
        assert value[2] == 0

    @pytest.mark.optimized
    def test_exchanges_numbers_per_row_alone(self):
        rows, classes = 64, 4096
        step = jax.jit(
            jax.grad(lambda x, ids: self.spread(None, False, label_smoothing=0.1)(x, ids).sum())
        )
        mesh = jax.make_mesh(
            (2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
        )
        logits = jax.ShapeDtypeStruct(
            (rows, classes), jnp.float32, sharding=jax.NamedSharding(mesh, P("data", "tensor"))
        )
        labels = jax.ShapeDtypeStruct(
            (rows,), jnp.int32, sharding=jax.NamedSharding(mesh, P("data"))
        )
        text = step.lower(logits, labels).compile().as_text()
        assert "all-gather" not in text
        assert "all-to-all" not in text
        reduced = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
        assert reduced
        for shapes in reduced:
            for dims in re.findall(r"\[([\d,]*)\]", shapes):
                assert np.prod([int(d) for d in dims.split(",") if d]) <= rows / 2


def forward_and_backward(implementation):
    return jax.value_and_grad(
        lambda x, ids: softmax_cross_entropy(
            x, ids, label_smoothing=0.1, z_loss=1e-4, soft_cap=30.0, implementation=implementation
        ).mean()
    )


SHAPES = jax.ShapeDtypeStruct((2048, 32000), jnp.bfloat16), jax.ShapeDtypeStruct((2048,), jnp.int32)


class TestCompilation:
    @needs_tpu_compiler
    @pytest.mark.parametrize("chip", TOPOLOGIES)
    def test_for_tpus_ahead_of_time(self, chip, record_property):
        compiled = compile_for_tpu(chip, forward_and_backward("pallas_tpu"), *SHAPES)
        used = compiled.memory_analysis().temp_size_in_bytes
        record_property("temporary bytes", used)
        assert used < SHAPES[0].size * 2 / 4  # the logits would take four times that

    def test_for_gpus(self):
        assert "triton" in lower_for_gpu(forward_and_backward("pallas_gpu"), *SHAPES)
