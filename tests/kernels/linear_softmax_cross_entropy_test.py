from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from jaxref.kernels import linear_softmax_cross_entropy
from jaxref.kernels import linear_softmax_cross_entropy_xla as MODULE
from tests.kernels.linear_head import literal, random_head


@pytest.fixture(autouse=True)
def narrow_blocks(monkeypatch):
    """Blocks of at most 8 columns or 4 rows, so that small heads have several."""
    monkeypatch.setattr(MODULE, "_MIN_BLOCK_WIDTH", 8)
    monkeypatch.setattr(MODULE, "_BLOCK_BYTES", 0)
    monkeypatch.setattr(MODULE, "_BLOCK_ROWS", 4)


@jax.jit
def losses_and_gradients(hidden, kernel, labels, cotangents, z_loss=0.0, where=None):
    loss = lambda h, w: linear_softmax_cross_entropy(h, w, labels, z_loss=z_loss, where=where)
    losses, vjp = jax.vjp(loss, hidden, kernel)
    return losses, *vjp(cotangents)


def assert_all_close(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


class NumbersTest(chex.TestCase):
    """Against the logits in float64, and against optax."""

    @parameterized.parameters(
        ((6,), 5, 19),  # the last block is narrower
        ((2, 3), 4, 16),  # it is not
        ((7,), 3, 8),  # one block: the plain path
        ((4,), 3, 1),
        ((), 5, 19),
        ((3,), 1, 9),
    )
    def test_values_and_gradients_match_the_formula(self, tokens, features, vocabulary):
        args = random_head(tokens, features, vocabulary)
        for z_loss in (0.0, 0.1):
            ours, theirs = losses_and_gradients(*args, z_loss), literal(*args, z_loss)
            assert_all_close(ours, theirs, rtol=1e-5, atol=2e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_values_with_and_without_jit(self):
        args = random_head()
        ours = self.variant(linear_softmax_cross_entropy)(*args[:3])
        np.testing.assert_allclose(ours, literal(*args)[0], rtol=1e-5)

    def test_the_mean_matches_optax(self):
        hidden, kernel, labels, _ = random_head((32,), 8, 100)
        optax_losses = lambda h, w: optax.losses.softmax_cross_entropy_with_integer_labels(
            h @ w, labels
        )
        our_losses = lambda h, w: linear_softmax_cross_entropy(h, w, labels)
        ours, theirs = (
            jax.jit(jax.value_and_grad(lambda h, w: losses(h, w).mean(), (0, 1)))(hidden, kernel)
            for losses in (our_losses, optax_losses)
        )
        chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-7)

    def test_first_and_second_derivatives_in_float64(self):
        with jax.enable_x64(True):
            hidden, kernel, labels, _ = random_head((3,), 4, dtype=np.float64)
            loss = jax.jit(lambda h, w: linear_softmax_cross_entropy(h, w, labels, z_loss=0.1))
            assert loss(hidden, kernel).dtype == np.float64
            check_grads(loss, (hidden, kernel), order=2, modes=["rev"])

    def test_gradient_of_z_loss_weight(self):
        hidden, kernel, labels, _ = random_head()
        loss = lambda z: linear_softmax_cross_entropy(hidden, kernel, labels, z_loss=z).sum()
        log_z = np.log(np.exp(hidden @ kernel).sum(-1))
        np.testing.assert_allclose(jax.jit(jax.grad(loss))(0.1), (log_z**2).sum(), rtol=1e-5)


class TestMemory:
    def compiled_steps(self, tokens, features, vocabulary):
        """A step of the mean with our losses and with optax's, compiled but never run."""
        shapes = (
            jax.ShapeDtypeStruct((tokens, features), np.float32),
            jax.ShapeDtypeStruct((features, vocabulary), np.float32),
            jax.ShapeDtypeStruct((tokens,), np.int32),
        )
        plain = lambda h, w, y: optax.losses.softmax_cross_entropy_with_integer_labels(h @ w, y)
        by_tokens = partial(linear_softmax_cross_entropy, blocks="tokens")
        for losses in (linear_softmax_cross_entropy, by_tokens, plain):
            mean = lambda h, w, y: losses(h, w, y).mean()
            yield jax.jit(jax.value_and_grad(mean, (0, 1))).lower(*shapes).compile()

    def test_a_step_needs_a_small_fraction_of_the_plain_memory(self, monkeypatch):
        monkeypatch.undo()  # the blocks that users get
        steps = self.compiled_steps(4096, 512, 131072)
        ours, by_tokens, plain = (step.memory_analysis().temp_size_in_bytes for step in steps)
        assert ours <= plain / 64
        assert by_tokens <= plain / 24

    def test_small_logits_cost_no_more_than_plain(self, monkeypatch):
        monkeypatch.undo()
        steps = self.compiled_steps(2048, 160, 256)
        *ours, plain = (step.cost_analysis() for step in steps)
        for cost in ours:
            assert cost["flops"] <= 1.01 * plain["flops"]
            assert cost["bytes accessed"] <= 1.01 * plain["bytes accessed"]

    @pytest.mark.parametrize(
        ("tokens", "vocabulary", "width"),
        [
            (4096, 131072, 2048),
            (1024, 131072, 8192),
            (10**6, 131072, 2048),
            (2048, 256, 256),
            (64, 131072, 131072),
            (0, 131072, 131072),
        ],
    )
    def test_block_width(self, monkeypatch, tokens, vocabulary, width):
        monkeypatch.undo()
        assert MODULE._block_width(tokens, vocabulary) == width


class TestByTokens:
    """Blocks of tokens: gradients made in the forward pass, corrected in the backward one."""

    @staticmethod
    def compute(hidden, kernel, labels, cotangents, z_loss=0.0, where=None):
        def run(hidden, kernel, z_loss):
            return linear_softmax_cross_entropy(
                hidden, kernel, labels, z_loss=z_loss, where=where, blocks="tokens"
            )

        losses, vjp = jax.vjp(run, hidden, kernel, z_loss)
        return losses, *vjp(cotangents)

    @pytest.mark.parametrize("tokens", [(8,), (3, 3), (2,), ()])  # even, uneven, one block
    @pytest.mark.parametrize("z_loss", [0.0, 0.1])
    @pytest.mark.parametrize("common", [True, False])
    def test_values_and_gradients_match_the_formula(self, tokens, z_loss, common):
        hidden, kernel, labels, cotangents = random_head(tokens)
        if common:  # the backward pass only scales
            cotangents = np.full_like(cotangents, 0.3)
        args = hidden, kernel, labels, cotangents
        *ours, d_z_loss = jax.jit(self.compute, static_argnums=4)(*args, z_loss)
        assert_all_close(ours, literal(*args, z_loss), rtol=1e-5, atol=2e-6)
        log_z = np.log(np.exp(hidden @ kernel).sum(-1))
        np.testing.assert_allclose(d_z_loss, (cotangents * log_z**2).sum(), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("common", [True, False])
    def test_tokens_that_do_not_count(self, common):
        hidden, kernel, labels, cotangents = random_head((9,))
        cotangents = np.full_like(cotangents, -0.5) if common else cotangents
        where = np.arange(9) % 3 != 1
        labels[4], labels[2] = 99, -1  # one masked, one not
        hidden[1] = np.nan  # masked
        live = where & (np.arange(9) != 2)
        expected = literal(hidden[live], kernel, labels[live], cotangents[live])
        losses, d_hidden, d_kernel, _ = self.compute(
            hidden, kernel, labels, cotangents, where=where
        )
        assert np.isnan(losses[2])
        assert np.all(losses[~where] == 0)
        assert np.all(d_hidden[~live] == 0)
        assert_all_close((losses[live], d_hidden[live], d_kernel), expected, rtol=1e-5, atol=2e-6)

    def test_no_token_counts(self):
        args = random_head()
        for result in self.compute(*args, where=np.zeros(6, bool)):
            assert np.all(result == 0)

    def test_vmap_over_hidden_and_kernel(self):
        each = [random_head((5,), seed=seed) for seed in range(3)]
        together = jax.vmap(lambda *args: self.compute(*args)[:3])(*map(np.stack, zip(*each)))
        for i, args in enumerate(each):
            assert_all_close([x[i] for x in together], literal(*args), rtol=1e-5, atol=2e-6)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision(self, dtype):
        args = [jnp.asarray(x) for x in random_head((9,))]
        half = [x.astype(dtype) if x.dtype == jnp.float32 else x for x in args]
        *ours, _ = self.compute(*half)
        expected = literal(*(np.asarray(x, np.float64) for x in half[:2]), args[2], half[3])
        for a, b in zip(ours, expected):
            assert a.dtype == dtype
            np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0.02, atol=0.02)

    @pytest.mark.parametrize("size", [1e4, -1e4, 0.0])
    def test_extreme_and_equal_logits(self, size):
        hidden, kernel = np.ones((5, 1), np.float32), np.full((1, 19), size, np.float32)
        kernel[0, ::2] *= -1
        for result in self.compute(hidden, kernel, np.arange(5), np.ones(5, np.float32)):
            assert np.all(np.isfinite(result))

    def test_hessian_vector_product(self):
        with jax.enable_x64(True):
            hidden, kernel, labels, _ = random_head((5,), dtype=np.float64)
            products = [
                jax.jvp(
                    jax.grad(
                        lambda w: linear_softmax_cross_entropy(
                            hidden, w, labels, blocks=blocks
                        ).mean()
                    ),
                    (kernel,),
                    (np.cos(kernel),),
                )[1]
                for blocks in ("tokens", "vocabulary")
            ]
            np.testing.assert_allclose(*products, rtol=1e-9, atol=1e-12)


class TestDefaultBlocks:
    """By tokens where one device computes and the kernel's gradient needs no copy in float32."""

    @pytest.mark.parametrize(
        ("devices", "dtype", "implementation", "by_tokens"),
        [
            (1, jnp.float32, None, True),
            (1, jnp.bfloat16, None, False),
            (8, jnp.float32, None, False),
            (1, jnp.float32, "pallas_tpu", False),
        ],
    )
    def test_default(self, monkeypatch, devices, dtype, implementation, by_tokens):
        calls = []
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        monkeypatch.setattr(MODULE, "by_tokens", lambda h, *_: calls.append(1) or h[:, 0])
        hidden, kernel, labels, _ = random_head(dtype=dtype)
        jax.eval_shape(
            partial(linear_softmax_cross_entropy, implementation=implementation),
            *(hidden, kernel, labels),
        )
        assert bool(calls) == by_tokens


@pytest.mark.parametrize("vocabulary", [19, 8], ids=["blocked", "plain"])
class TestTokensWithoutALoss:
    def test_labels_out_of_range_give_nan_and_no_gradient(self, vocabulary):
        hidden, kernel, labels, cotangents = random_head(vocabulary=vocabulary)
        lost = np.array([False, True, False, True, False, False])
        expected = literal(hidden, kernel, labels, np.where(lost, 0, cotangents))
        for low, high in ((-1, vocabulary), (-(2**31), 2**31 - 1)):
            bad = labels.copy()
            bad[1], bad[3] = low, high
            ours = losses_and_gradients(hidden, kernel, bad, cotangents)
            np.testing.assert_array_equal(np.isnan(ours[0]), lost)
            np.testing.assert_allclose(ours[0][~lost], expected[0][~lost], rtol=1e-5, atol=1e-6)
            assert_all_close(ours[1:], expected[1:], rtol=1e-5, atol=1e-6)
            assert np.all(ours[1][lost] == 0)

    def test_masked_tokens_count_for_nothing(self, vocabulary):
        hidden, kernel, labels, cotangents = random_head(vocabulary=vocabulary)
        where = np.array([True, False, True, True, False, False])
        expected = literal(hidden, kernel, labels, np.where(where, cotangents, 0), z_loss=0.1)
        labels[1], labels[4] = -1, vocabulary
        hidden[4], hidden[5] = np.nan, np.inf
        ours = losses_and_gradients(hidden, kernel, labels, cotangents, where=where, z_loss=0.1)
        np.testing.assert_array_equal(ours[0][~where], 0)
        np.testing.assert_allclose(ours[0][where], expected[0][where], rtol=1e-5)
        np.testing.assert_allclose(ours[1][where], expected[1][where], rtol=1e-5, atol=1e-6)
        assert np.all(ours[1][~where] == 0)
        np.testing.assert_allclose(ours[2], expected[2], rtol=1e-5, atol=1e-6)

    def test_mask_broadcasts_and_may_be_empty(self, vocabulary):
        hidden, kernel, labels, cotangents = random_head((2, 3), vocabulary=vocabulary)
        where = np.array([[True], [False]])
        args = hidden, kernel, labels, cotangents
        ours = losses_and_gradients(*args, where=where)
        full = losses_and_gradients(*args, where=np.repeat(where, 3, axis=1))
        chex.assert_trees_all_equal(ours, full)
        for x in losses_and_gradients(*args, where=False):
            assert np.all(x == 0)


class TestTransformations:
    def test_vmap(self):
        hidden, kernel, labels, cotangents = random_head((3, 4))
        kernels = np.stack([kernel, 2 * kernel, -kernel])
        ours = jax.vmap(losses_and_gradients)(hidden, kernels, labels, cotangents)
        theirs = [literal(*each) for each in zip(hidden, kernels, labels, cotangents)]
        assert_all_close(ours, map(np.stack, zip(*theirs)), rtol=1e-5, atol=2e-6)

    @pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
    @pytest.mark.parametrize(
        ("tokens", "weights"),
        [
            (("data",), ()),
            (("data",), (None, "tensor")),
            ((None, ("data", "tensor")), ("data",)),
            ((None, None, "tensor"), ("tensor",)),
        ],
    )
    def test_sharded(self, axis_type, tokens, weights):
        hidden, kernel, labels, cotangents = random_head((4, 8), 8, 40)
        mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(axis_type,) * 2)
        put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        ours = losses_and_gradients(
            put(hidden, tokens),
            put(kernel, weights),
            put(labels, tokens[:2]),
            put(cotangents, tokens[:2]),
        )
        for x, spec in zip(ours[:2], (tokens[:2], tokens)):
            expected = NamedSharding(mesh, PartitionSpec(*spec))
            assert x.sharding.is_equivalent_to(expected, x.ndim)
        theirs = literal(hidden, kernel, labels, cotangents)
        assert_all_close(ours, theirs, rtol=1e-5, atol=2e-6)

    @pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
    def test_sharded_tokens_stay_where_they_are(self, axis_type):
        """No collective but sums: of the blocks of the kernel's gradient, and of the mean."""
        hidden, kernel, labels, _ = random_head((16, 4), 8, 64)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
        rows, everywhere = (NamedSharding(mesh, PartitionSpec(*s)) for s in (["data"], []))
        step = jax.jit(
            jax.value_and_grad(lambda *a: linear_softmax_cross_entropy(*a).mean(), (0, 1))
        )
        program = step.lower(
            jax.device_put(hidden, rows),
            jax.device_put(kernel, everywhere),
            jax.device_put(labels, rows),
        ).compile()
        text = program.as_text()
        for collective in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
            assert collective not in text
        reduced = {
            line.split("all-reduce(")[0].split()[-1]
            for line in text.splitlines()
            if " all-reduce(" in line
        }
        assert reduced == {"f32[8,8]{1,0}", "f32[]"}

    def test_inside_shard_map(self):
        args = random_head((16,))
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        rows, everywhere = PartitionSpec("data"), PartitionSpec()

        def step(hidden, kernel, labels, cotangents):
            kernel = jax.lax.pcast(kernel, "data", to="varying")
            losses, d_hidden, d_kernel = losses_and_gradients(hidden, kernel, labels, cotangents)
            return losses, d_hidden, jax.lax.psum(d_kernel, "data")

        ours = jax.jit(
            jax.shard_map(
                step,
                mesh=mesh,
                in_specs=(rows, everywhere, rows, rows),
                out_specs=(rows, rows, everywhere),
            )
        )(*args)
        assert_all_close(ours, literal(*args), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("vocabulary", [19, 8], ids=["blocked", "plain"])
class TestEdges:
    @pytest.mark.parametrize("size", [1e4, -1e4, 1e20, 0.0])
    def test_extreme_and_equal_logits(self, vocabulary, size):
        """Their differences to the largest are exact, so the results are too."""
        kernel = np.zeros((2, vocabulary), np.float32)
        kernel[0, 1], kernel[0, -1] = 1, -1
        hidden = np.array([[size, 0], [0, 1], [0, 0]], np.float32)
        for label in (0, 1, vocabulary - 1):
            args = hidden, kernel, np.full(3, label), np.ones(3, np.float32)
            ours = losses_and_gradients(*args)
            assert_all_close(ours, literal(*args), rtol=1e-6, atol=1e-6 * max(abs(size), 1))
            chex.assert_tree_all_finite(losses_and_gradients(*args, z_loss=1e-4))

    def test_a_large_log_z_does_not_blur_the_softmax(self, vocabulary):
        """Adding 1e4 to all logits changes neither the losses nor the gradients of the rest."""
        hidden, kernel, labels, cotangents = random_head(features=3, vocabulary=vocabulary)
        hidden, kernel = np.round(4 * hidden) / 4, np.round(4 * kernel) / 4  # exact in float32
        hidden[:, 2], kernel[2] = 100, 0
        plain = losses_and_gradients(hidden, kernel, labels, cotangents)
        larger = kernel.copy()  # a dispatched computation may still be reading the first one
        larger[2] = 100
        shifted = losses_and_gradients(hidden, larger, labels, cotangents)
        np.testing.assert_allclose(shifted[0], plain[0], rtol=1e-5)
        np.testing.assert_allclose(shifted[1][:, :2], plain[1][:, :2], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(shifted[2][:2], plain[2][:2], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("tokens", [(0,), (2, 0)])
    def test_no_tokens(self, vocabulary, tokens):
        losses, d_hidden, d_kernel = losses_and_gradients(*random_head(tokens, 5, vocabulary))
        assert losses.shape == tokens
        assert d_hidden.shape == (*tokens, 5)
        assert np.all(d_kernel == 0)

    @pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 8e-3), (jnp.float16, 1e-3)])
    def test_half_precision(self, vocabulary, dtype, tolerance):
        hidden, kernel, labels, cotangents = random_head((40,), 16, vocabulary)
        args = jnp.asarray(hidden, dtype), jnp.asarray(kernel, dtype), labels
        ours = losses_and_gradients(*args, jnp.asarray(cotangents, dtype))
        theirs = literal(*args, jnp.asarray(cotangents, dtype))
        for a, b in zip(ours, theirs):
            assert a.dtype == dtype
            error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
            assert error < tolerance

    def test_float16_keeps_the_tail_of_the_softmax(self, vocabulary):
        """Cotangents of a mean over many tokens times small probabilities are below its range."""
        hidden, kernel, labels, _ = random_head(vocabulary=vocabulary)
        hidden, kernel = hidden.astype(np.float16) / 1024, kernel.astype(np.float16) * 1024
        cotangents = np.full(6, 2.0**-20, np.float16)
        _, d_hidden, _ = losses_and_gradients(hidden, kernel, labels, cotangents)
        _, expected, _ = literal(hidden, kernel, labels, cotangents)
        np.testing.assert_allclose(d_hidden, expected, rtol=2e-3, atol=1e-6)

    def test_mixed_types_and_small_label_types(self, vocabulary):
        hidden, kernel, labels, cotangents = random_head(vocabulary=vocabulary)
        ours = losses_and_gradients(
            jnp.asarray(hidden, jnp.bfloat16),
            kernel,
            labels.astype(np.uint8),
            jnp.asarray(cotangents, jnp.bfloat16),
        )
        assert [x.dtype for x in ours] == [jnp.bfloat16, jnp.bfloat16, np.float32]
        theirs = literal(hidden, kernel, labels, cotangents)
        assert_all_close((x.astype(np.float32) for x in ours), theirs, rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"hidden": np.zeros((6, 4), np.float32)}, ValueError, r"kernel must have shape \(4,"),
        ({"hidden": np.float32(1)}, ValueError, "hidden must have a feature axis"),
        ({"hidden": np.zeros((6, 5), int)}, TypeError, "hidden must have a floating-point type"),
        ({"kernel": np.zeros((5, 9), int)}, TypeError, "kernel must have a floating-point type"),
        ({"kernel": np.zeros((1, 5, 9), np.float32)}, ValueError, "kernel must have shape"),
        ({"kernel": np.zeros((5, 0), np.float32)}, ValueError, "at least one column"),
        ({"labels": np.zeros(6, np.float32)}, TypeError, "labels must be integer ids"),
        ({"labels": np.zeros(6, bool)}, TypeError, "labels must be integer ids"),
        ({"labels": np.zeros((6, 1), int)}, ValueError, "labels must have shape"),
        ({"where": np.ones((6, 1), bool)}, ValueError, "where must broadcast"),
        ({"z_loss": -1e-4}, ValueError, "z_loss must be in"),
        ({"blocks": "rows"}, ValueError, "blocks must be None or one of"),
        ({"implementation": "triton"}, ValueError, r"implementation must be None or one of"),
        ({"implementation": "pallas_tpu", "blocks": "tokens"}, ValueError, "for a Pallas kernel"),
        (
            {
                "hidden": np.zeros((6, 16385), np.float32),
                "kernel": np.zeros((16385, 2), np.float32),
                "implementation": "pallas_tpu",
            },
            ValueError,
            "hidden must have at most 16384 features",
        ),
        ({"axis_name": "tensor", "blocks": "tokens"}, ValueError, "or with an axis_name"),
    ],
)
def test_bad_input_is_named(changed, error, message):
    hidden, kernel, labels, _ = random_head()
    args = {"hidden": hidden, "kernel": kernel, "labels": labels} | changed
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: linear_softmax_cross_entropy(**args))


def test_xla_is_the_default():
    hidden, kernel, labels, _ = random_head()
    np.testing.assert_array_equal(
        linear_softmax_cross_entropy(hidden, kernel, labels, implementation="xla"),
        linear_softmax_cross_entropy(hidden, kernel, labels),
    )
