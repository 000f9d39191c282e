"""All implementations of blocks of vocabulary on one base, and what compilers make of them."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxref.kernels import (
    linear_softmax_cross_entropy,
    linear_softmax_cross_entropy_gpu,
    linear_softmax_cross_entropy_tpu,
    linear_softmax_cross_entropy_xla,
)
from tests.kernels.ahead_of_time import (
    TOPOLOGIES,
    compile_for_tpu,
    lower_for_gpu,
    needs_tpu_compiler,
)
from tests.kernels.linear_head import literal, random_head

IMPLEMENTATIONS = ("xla", "pallas_tpu_interpret", "pallas_gpu_interpret")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    """An implementation with blocks so small that small heads have several, the last ones cut."""
    monkeypatch.setattr(linear_softmax_cross_entropy_xla, "_MIN_BLOCK_WIDTH", 100)
    monkeypatch.setattr(linear_softmax_cross_entropy_xla, "_BLOCK_BYTES", 0)
    monkeypatch.setattr(linear_softmax_cross_entropy_tpu, "_BLOCK", (16, 128))
    monkeypatch.setattr(linear_softmax_cross_entropy_tpu, "_FEATURES", 8)
    monkeypatch.setattr(linear_softmax_cross_entropy_gpu, "_BLOCK", (32, 32, 32))
    monkeypatch.setattr(linear_softmax_cross_entropy_gpu, "_GROUP", 2)
    return request.param


def compute(*args, implementation, z_loss=0.1):
    """Losses and gradients of `hidden, kernel, labels, cotangents, where`."""
    # given as an argument, z_loss is traced, and all values of it share a program
    return compute_jitted(*args, z_loss, implementation=implementation)


@partial(jax.jit, static_argnames="implementation")
def compute_jitted(hidden, kernel, labels, cotangents, where, z_loss, *, implementation):

    def losses(hidden, kernel):
        return linear_softmax_cross_entropy(
            hidden,
            kernel,
            labels,
            z_loss=z_loss,
            where=where,
            blocks="vocabulary",
            implementation=implementation,
        )

    values, vjp = jax.vjp(losses, hidden, kernel)
    return values, *vjp(cotangents)


def assert_all_close(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


class TestNumbers:
    @pytest.mark.parametrize(
        ("tokens", "features", "vocabulary"),
        [
            ((40,), 20, 300),  # several blocks of each, none of them whole
            ((2, 8), 16, 256),  # all of them whole
            ((3,), 5, 40),  # less than a block
            ((4,), 3, 1),
            ((), 5, 130),
        ],
    )
    def test_values_and_gradients_match_the_formula(
        self, implementation, tokens, features, vocabulary
    ):
        args = random_head(tokens, features, vocabulary)
        ours = compute(*args, np.ones(tokens, bool), implementation=implementation)
        assert_all_close(ours, literal(*args, z_loss=0.1), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 8e-3), (jnp.float16, 1e-3)])
    def test_half_precision(self, implementation, dtype, tolerance):
        hidden, kernel, labels, cotangents = random_head((40,), 20, 300)
        hidden, kernel, cotangents = (
            jnp.asarray(x, dtype) for x in (hidden, kernel / 4, cotangents)
        )
        args = hidden, kernel, labels, cotangents
        ours = compute(*args, np.ones(40, bool), implementation=implementation)
        for a, b in zip(ours, literal(*args, z_loss=0.1)):
            assert a.dtype == dtype
            error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
            assert error < tolerance

    def test_mixed_types(self, implementation):
        hidden, kernel, labels, cotangents = random_head((5,), 6, 130)
        kernel = jnp.asarray(kernel, jnp.bfloat16)
        args = hidden, kernel, labels.astype(np.int16), cotangents
        ours = compute(*args, np.ones(5, bool), implementation=implementation)
        assert [x.dtype for x in ours] == [jnp.float32, jnp.float32, jnp.bfloat16]
        theirs = literal(hidden, np.asarray(kernel, np.float64), labels, cotangents, 0.1)
        assert_all_close(ours[:2], theirs[:2], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(ours[2].astype(np.float32), theirs[2], rtol=0.01, atol=0.01)

    def test_vmap(self, implementation):
        each = [random_head((20,), 8, 140, seed=seed) for seed in range(2)]
        stacked = [np.stack(x) for x in zip(*each)]
        where = np.ones((2, 20), bool)
        ours = jax.vmap(partial(compute, implementation=implementation))(*stacked, where)
        for i, args in enumerate(each):
            assert_all_close([x[i] for x in ours], literal(*args, 0.1), rtol=1e-5, atol=1e-5)


class TestEdges:
    def test_tokens_without_a_loss(self, implementation):
        hidden, kernel, labels, cotangents = random_head((40,), 20, 300)
        lost, masked = np.zeros((2, 40), bool)
        lost[[0, 17, 39]] = True
        masked[[1, 17, 20]] = True
        expected = literal(hidden, kernel, labels, np.where(lost | masked, 0, cotangents), 0.1)
        labels[[0, 17, 39, 1]] = -1, 300, 2**31 - 1, -(2**31)
        hidden[20] = np.nan
        ours = compute(hidden, kernel, labels, cotangents, ~masked, implementation=implementation)
        np.testing.assert_array_equal(np.isnan(ours[0]), lost & ~masked)
        assert np.all(ours[0][masked] == 0)
        assert np.all(ours[1][lost | masked] == 0)
        live = ~(lost | masked)
        ours = ours[0][live], ours[1][live], ours[2]
        expected = expected[0][live], expected[1][live], expected[2]
        assert_all_close(ours, expected, rtol=1e-5, atol=1e-5)

    def test_all_masked(self, implementation):
        args = random_head((40,), 20, 300)
        for x in compute(*args, np.zeros(40, bool), implementation=implementation):
            assert np.all(x == 0)

    @pytest.mark.parametrize("tokens", [(0,), (2, 0)])
    def test_no_tokens(self, implementation, tokens):
        args = random_head(tokens, 5, 130)
        losses, d_hidden, d_kernel = compute(
            *args, np.zeros(tokens, bool), implementation=implementation
        )
        assert losses.shape == tokens
        assert d_hidden.shape == (*tokens, 5)
        assert np.all(d_kernel == 0)

    @pytest.mark.parametrize("size", [1e4, -1e4, 0.0])
    def test_extreme_and_equal_logits(self, implementation, size):
        """Their differences to the largest are exact, so the results are too."""
        kernel = np.zeros((20, 300), np.float32)
        kernel[0, 1], kernel[0, 290:] = 1, -1
        hidden = np.zeros((40, 20), np.float32)
        hidden[::2, 0], hidden[1::2, 1] = size, 1
        args = hidden, kernel, np.arange(40) % 3 * 145, np.ones(40, np.float32)
        ours = compute(*args, np.ones(40, bool), implementation=implementation, z_loss=0.0)
        assert_all_close(ours, literal(*args), rtol=1e-5, atol=1e-5 * max(abs(size), 1))


class TestVocabularyOverDevices:
    """Batch over "data", vocabulary over "tensor"."""

    @staticmethod
    def spread(implementation, *, check=True, axis_name="tensor"):
        """The losses of whole arrays, computed by shards."""
        mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
        rows = PartitionSpec("data")

        def losses(hidden, kernel, labels, where):
            return linear_softmax_cross_entropy(
                hidden,
                kernel,
                labels,
                z_loss=0.1,
                where=where,
                axis_name=axis_name,
                implementation=implementation,
            )

        return jax.shard_map(
            losses,
            mesh=mesh,
            in_specs=(rows, PartitionSpec(None, axis_name), rows, rows),
            out_specs=rows,
            check_vma=check,
        )

    @pytest.mark.parametrize("check", [True, False])
    def test_values_and_gradients_are_those_of_the_whole(self, implementation, check):
        if check and implementation != "xla":
            pytest.skip("jax interprets kernels only without the check of varying axes")
        hidden, kernel, labels, cotangents = random_head((40,), 20, 4 * 140)
        where = np.arange(40) != 7
        expected = literal(hidden, kernel, labels, np.where(where, cotangents, 0), 0.1)
        spread = self.spread(implementation, check=check)

        @jax.jit
        def step(hidden, kernel, labels, where):
            losses, vjp = jax.vjp(lambda h, w: spread(h, w, labels, where), hidden, kernel)
            return losses, *vjp(cotangents)

        ours = step(hidden, kernel, labels, where)
        assert ours[0][7] == 0
        np.testing.assert_allclose(ours[0][where], expected[0][where], rtol=1e-5)
        assert_all_close(ours[1:], expected[1:], rtol=1e-5, atol=1e-5)
        labels[3], labels[30] = -1, 560
        losses = step(hidden, kernel, labels, where)[0]
        np.testing.assert_array_equal(np.nonzero(np.isnan(losses))[0], [3, 30])

    def test_only_numbers_per_row_are_exchanged(self, implementation):
        """20 rows, 20 features and 140 columns in each device."""
        args = *random_head((40,), 20, 4 * 140)[:3], np.ones(40, bool)
        spread = jax.jit(self.spread(implementation, check=False))
        lines = spread.lower(*args).compile().as_text().splitlines()
        collectives = [line for line in lines if "channel_id" in line]
        assert collectives
        for line in collectives:
            assert " all-reduce(" in line
            result = line.split(" all-reduce(")[0].split("=", 1)[1]
            assert set(result.replace("(", " ").replace(")", " ").replace(",", " ").split()) <= {
                "f32[20]{0}"
            }

    @pytest.mark.parametrize("platform", ["gpu", "tpu"])
    def test_kernels_vary_over_the_axes_of_their_operands(self, platform):
        """Gradients of hidden and kernel with the check of varying axes, as far as lowering."""
        args = *random_head((512,), 32, 4 * 4096)[:3], np.ones(512, bool)
        losses = self.spread(f"pallas_{platform}")
        step = jax.jit(jax.grad(lambda *args: losses(*args).mean(), (0, 1)))
        lowered = step.trace(*args).lower(
            lowering_platforms=({"gpu": "cuda"}.get(platform, platform),)
        )
        assert "linear_softmax_statistics" in lowered.as_text()


HEAD = 8192, 4096, 131072


def abstract_head(tokens, features, vocabulary, dtype=jnp.bfloat16):
    return (
        jax.ShapeDtypeStruct((tokens, features), dtype),
        jax.ShapeDtypeStruct((features, vocabulary), dtype),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    )


def mean_step(losses):
    """The mean of the losses and both gradients, as a training step has them."""
    return jax.value_and_grad(lambda *args: losses(*args).astype(jnp.float32).mean(), (0, 1))


class TestAheadOfTime:
    """A language-model head in bfloat16 whose logits take 2 GiB."""

    @staticmethod
    @functools.cache
    def plain_memory():
        """Of a TPU v5e, which of the four needs the least."""
        losses = lambda h, w, y: optax.losses.softmax_cross_entropy_with_integer_labels(h @ w, y)
        compiled = compile_for_tpu("v5e", mean_step(losses), *abstract_head(*HEAD))
        return compiled.memory_analysis().temp_size_in_bytes

    @needs_tpu_compiler
    @pytest.mark.slow
    @pytest.mark.parametrize("chip", TOPOLOGIES)
    def test_tpu_memory_is_a_small_fraction_of_the_plain(self, chip):
        step = mean_step(partial(linear_softmax_cross_entropy, implementation="pallas_tpu"))
        compiled = compile_for_tpu(chip, step, *abstract_head(*HEAD))
        assert compiled.memory_analysis().temp_size_in_bytes <= self.plain_memory() / 16

    @needs_tpu_compiler
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("chip", "shape", "dtypes"),
        [
            ("tpu7x", (2048, 16384, 32768), (jnp.bfloat16, jnp.bfloat16)),
            ("tpu7x", (2048, 16384, 32768), (jnp.float32, jnp.float32)),
            ("v5p", (2048, 2048, 32768), (jnp.float32, jnp.float32)),
            ("v5p", (2000, 4100, 32000), (jnp.bfloat16, jnp.float32)),
            ("v5e", (100, 33, 501), (jnp.float16, jnp.float16)),
        ],
    )
    def test_tpu_takes_any_shape(self, chip, shape, dtypes):
        step = mean_step(partial(linear_softmax_cross_entropy, implementation="pallas_tpu"))
        hidden, kernel, labels = abstract_head(*shape)
        hidden, kernel = hidden.update(dtype=dtypes[0]), kernel.update(dtype=dtypes[1])
        compile_for_tpu(chip, step, hidden, kernel, labels)

    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [
            (HEAD, jnp.bfloat16),
            ((100, 33, 501), jnp.float32),
            ((100, 33, 501), jnp.float16),
        ],
    )
    def test_gpu_lowering(self, shape, dtype):
        step = mean_step(partial(linear_softmax_cross_entropy, implementation="pallas_gpu"))
        program = lower_for_gpu(step, *abstract_head(*shape, dtype))
        for name in ("linear_softmax_statistics", "linear_softmax_logit_gradient"):
            assert name in program
        if shape == HEAD:
            assert "8192x131072x" not in program  # no array has the logits' shape
