"""Layer and RMS norms on one base for all implementations, and what compilers make of them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxref import kernels, norms
from jaxref.nn import Norm
from tests.kernels.ahead_of_time import (
    TOPOLOGIES,
    compile_for_tpu,
    lower_for_gpu,
    needs_tpu_compiler,
)
from tests.kernels.platforms import ANYWHERE, small_tiles  # noqa: F401

everywhere = pytest.mark.parametrize("implementation", ANYWHERE)
both = pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])


def literal(name, x, g, scale=None, bias=None, *, epsilon=1e-6):
    """The value in float64, and the gradients of Σ g y as they are derived by hand."""
    x, g = np.float64(x), np.float64(g)
    mean = partial(np.mean, axis=-1, keepdims=True)
    centred = x - mean(x) if name == "layer_norm" else x
    variance = mean(centred**2) + epsilon
    factor = 1 / np.sqrt(np.where(variance > 0, variance, 1))
    normalised = centred * factor
    h = g if scale is None else g * np.float64(scale)
    dx = h - normalised * mean(h * normalised)
    if name == "layer_norm":
        dx -= mean(h)
    results, y, rows = [factor * dx], normalised, tuple(range(x.ndim - 1))
    if scale is not None:
        results.append((g * normalised).sum(rows))
        y = y * np.float64(scale)
    if bias is not None:
        results.append(g.sum(rows))
        y = y + np.float64(bias)
    return y, *results


@partial(jax.jit, static_argnames=("name", "implementation", "epsilon"))
def compute(x, g, *parameters, name, implementation, epsilon=1e-6):
    norm = partial(getattr(kernels, name), epsilon=epsilon, implementation=implementation)
    y, vjp = jax.vjp(norm, x, *parameters)
    return y, *vjp(g)


def random_rows(name, shape, *, dtype=np.float32, parameter_dtype=np.float32, seed=0):
    """x of rows that differ in mean and spread, a cotangent, and the norm's parameters."""
    rng = np.random.default_rng(seed)
    spread, mean = rng.uniform(0.5, 3, size=(2, *shape[:-1], 1))
    x, g = mean + spread * rng.normal(size=shape), rng.normal(size=shape)
    parameters = rng.normal(size=(2 if name == "layer_norm" else 1, shape[-1]))
    return (
        *(jnp.asarray(a, dtype) for a in (x, g)),
        *(jnp.asarray(a, parameter_dtype) for a in parameters),
    )


def assert_all_close(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.float64(a), b, **tolerance)


@pytest.mark.usefixtures("small_tiles")
class TestNumbers:
    @both
    @everywhere
    @pytest.mark.parametrize(
        "shape",
        [
            (2, 9, 300),  # several tiles of each, none of them whole
            (35, 40),  # a row in a tile, several blocks of rows to a program
            (3, 1),
        ],
    )
    def test_values_and_gradients_match_the_formula(self, name, implementation, shape):
        args = random_rows(name, shape)
        ours = compute(*args, name=name, implementation=implementation)
        assert all(a.dtype == np.float32 for a in ours)
        assert_all_close(ours, literal(name, *args), rtol=1e-5, atol=1e-5)

    @everywhere
    @pytest.mark.parametrize(
        ("name", "dtype", "parameter_dtype"),
        [
            ("layer_norm", jnp.bfloat16, jnp.float32),
            ("rms_norm", jnp.float16, jnp.float16),
        ],
    )
    def test_computes_half_precision_in_float32(self, implementation, name, dtype, parameter_dtype):
        args = random_rows(name, (5, 150), dtype=dtype, parameter_dtype=parameter_dtype)
        ours = compute(*args, name=name, implementation=implementation)
        assert [a.dtype for a in ours[:2]] == [dtype] * 2
        assert {a.dtype for a in ours[2:]} == {jnp.dtype(parameter_dtype)}
        for a, b in zip(ours, literal(name, *args), strict=True):
            # rounded once, so each is off by half a step at most, small ones by a little of float32
            np.testing.assert_allclose(
                np.float64(a), b, rtol=0.51 * float(jnp.finfo(a.dtype).eps), atol=1e-5
            )

    @everywhere
    def test_without_parameters(self, implementation):
        x, g, *_ = random_rows("layer_norm", (5, 140))
        ours = compute(x, g, name="layer_norm", implementation=implementation)
        assert_all_close(ours, literal("layer_norm", x, g), rtol=1e-5, atol=1e-5)

    def test_with_a_bias_alone(self):
        x, g, _, bias = random_rows("layer_norm", (5, 40))
        y, vjp = jax.vjp(lambda x, bias: kernels.layer_norm(x, bias=bias), x, bias)
        expected = literal("layer_norm", x, g, bias=bias)
        assert_all_close((y, *vjp(g)), expected, rtol=1e-5, atol=1e-5)

    @everywhere
    def test_vmap_over_rows_and_gains(self, implementation):
        each = [random_rows("layer_norm", (5, 130), seed=seed) for seed in range(2)]
        function = partial(compute, name="layer_norm", implementation=implementation)
        ours = jax.vmap(function)(*map(jnp.stack, zip(*each)))
        for i, args in enumerate(each):
            expected = literal("layer_norm", *args)
            assert_all_close([a[i] for a in ours], expected, rtol=1e-5, atol=1e-5)

    @both
    def test_double_precision_is_left_to_xla(self, name):
        with jax.enable_x64(True):
            args = random_rows(name, (3, 20), dtype=np.float64, parameter_dtype=np.float64)
            ours = compute(*args, name=name, implementation=None)
            assert_all_close(ours, literal(name, *args), rtol=1e-12, atol=1e-12)
            with pytest.raises(ValueError, match="float64"):
                compute(*args, name=name, implementation="pallas_interpret")


@pytest.mark.usefixtures("small_tiles")
class TestEdges:
    @both
    @everywhere
    def test_rows_far_from_zero_and_without_spread(self, name, implementation):
        """With ε = 0, where a mean that is off by a rounding would be blown up."""
        x, g, *parameters = random_rows(name, (9, 150))
        x = np.array(x)
        x[0] += 1e4
        x[1] -= 1e4
        x[2], x[3], x[4] = 0.1, 1e4 + 0.1, 0
        x[5, :3], x[6] = 1e4, 1e16 * x[6]
        x[7] *= 1e-15
        args = jnp.asarray(x), g, *parameters
        ours = compute(*args, name=name, implementation=implementation, epsilon=0.0)
        y, dx, *sums = literal(name, *args, epsilon=0.0)
        np.testing.assert_allclose(ours[0], y, rtol=1e-5, atol=2e-5)
        size = np.abs(dx).max(-1, keepdims=True)
        np.testing.assert_allclose(ours[1] / size, dx / size, atol=2e-5)
        assert_all_close(ours[2:], sums, rtol=1e-5, atol=1e-4)

    @both
    def test_no_rows(self, name):
        args = random_rows(name, (0, 5))
        y, dx, *sums = compute(*args, name=name, implementation="pallas_interpret")
        assert y.shape == dx.shape == (0, 5)
        assert all(np.array_equal(total, np.zeros(5)) for total in sums)
        norm = partial(getattr(norms, name), implementation="pallas_interpret")
        assert norm(jnp.zeros((3, 0, 2)), axis=(0, 2)).shape == (3, 0, 2)

    @both
    def test_bad_input_is_named(self, name):
        norm = getattr(kernels, name)
        x = jnp.ones((2, 3))
        with pytest.raises(TypeError, match="x must have a floating-point type"):
            norm(jnp.arange(3))
        with pytest.raises(TypeError, match="scale must have a floating-point type"):
            norm(x, jnp.arange(3))
        with pytest.raises(ValueError, match=r"scale must have shape \(3,\), got \(2,\)"):
            norm(x, jnp.ones(2))
        for empty in (jnp.ones((2, 0)), jnp.ones(())):
            with pytest.raises(ValueError, match="x must have entries along its last axis"):
                norm(empty)
        with pytest.raises(ValueError, match="epsilon"):
            norm(x, epsilon=-1.0)
        with pytest.raises(TypeError, match="epsilon must be a number"):
            jax.jit(lambda epsilon: norm(x, epsilon=epsilon))(1e-6)
        with pytest.raises(ValueError, match=r"implementation .* got 'cuda'"):
            norm(x, implementation="cuda")
        with pytest.raises(ValueError, match="bias must have shape"):
            kernels.layer_norm(x, bias=jnp.ones((1, 3)))


@pytest.mark.usefixtures("small_tiles")
class TestNorms:
    """`implementation=` of `jaxref.norms`."""

    @both
    @pytest.mark.parametrize("axis", [-1, (0, 2)])
    def test_equals_the_norm(self, name, axis):
        rng = np.random.default_rng(0)
        x, g = rng.normal(size=(2, 3, 5, 70)).astype(np.float32)
        shape = (70,) if axis == -1 else (3, 70)
        parameters = rng.normal(size=(2 if name == "layer_norm" else 1, *shape)).astype("f")

        @partial(jax.jit, static_argnums=0)
        def run(implementation):
            norm = partial(
                getattr(norms, name), axis=axis, epsilon=0.1, implementation=implementation
            )
            y, vjp = jax.vjp(norm, x, *parameters)
            return y, *vjp(g)

        assert_all_close(run("pallas_interpret"), run(None), rtol=1e-5, atol=1e-5)

    def test_what_a_kernel_has_not_is_named(self):
        x = jnp.ones((2, 3))
        for norm in (norms.layer_norm, norms.rms_norm):
            with pytest.raises(ValueError, match="None or 'xla' where a mask"):
                norm(x, where=x > 0, implementation="pallas_interpret")
            with pytest.raises(ValueError, match=r"implementation .* got 'cuda'"):
                norm(x, implementation="cuda")
            with pytest.raises(ValueError, match=r"scale must have shape \(2, 3\), got \(6,\)"):
                norm(x, jnp.ones(6), axis=(0, 1), implementation="pallas_interpret")

    def test_in_a_module(self):
        x = random_rows("layer_norm", (2, 5))[0]
        kernel = Norm(partial(norms.layer_norm, implementation="pallas_interpret"), 5)
        np.testing.assert_allclose(kernel(x), Norm(norms.layer_norm, 5)(x), rtol=1e-5, atol=1e-6)


def spread(norm, *, check):
    """A norm whose rows lie on eight devices, and whose parameters on all of them."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return jax.shard_map(
        norm, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=check
    )


@pytest.mark.usefixtures("small_tiles")
class TestShardedBatch:
    @everywhere
    def test_values_and_gradients_are_those_of_the_whole(self, implementation):
        x, g, *parameters = random_rows("layer_norm", (24, 130))
        norm = partial(kernels.layer_norm, implementation=implementation)
        # the interpreter of GPU kernels does not know of varying axes
        check = implementation != "pallas_gpu_interpret"
        sharded = spread(lambda x, parameters: norm(x, *parameters), check=check)

        @jax.jit
        def step(x, parameters):
            y, vjp = jax.vjp(sharded, x, parameters)
            return y, *vjp(g)

        y, dx, sums = step(x, parameters)
        expected = literal("layer_norm", x, g, *parameters)
        assert_all_close((y, dx, *sums), expected, rtol=1e-5, atol=2e-5)

    @pytest.mark.parametrize("platform", ["gpu", "tpu"])
    def test_kernels_vary_over_the_axes_of_their_operands(self, platform):
        """With the check of varying axes, as far as lowering."""
        norm = partial(kernels.layer_norm, implementation=f"pallas_{platform}")
        sharded = spread(lambda x, parameters: norm(x, *parameters), check=True)
        for width in (60, 300):
            x, _, *parameters = random_rows("layer_norm", (64, width))
            step = jax.jit(jax.grad(lambda *args: sharded(*args).sum(), (0, 1)))
            lowered = step.trace(x, parameters).lower(
                lowering_platforms=({"gpu": "cuda"}.get(platform, platform),)
            )
            assert "layer_norm_backward" in lowered.as_text()


@both
def test_the_backward_pass_keeps_the_input_and_two_numbers_per_row(name):
    x, _, *parameters = random_rows(name, (50, 100), dtype=jnp.bfloat16)
    _, vjp = jax.vjp(getattr(kernels, name), x, *parameters)
    kept = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(vjp))
    assert kept <= 50 * 100 * 2 + 50 * 2 * 4 + 2 * 100 * 4


def forward_and_backward(name, implementation):
    def run(x, *parameters):
        norm = partial(getattr(kernels, name), implementation=implementation)
        y, vjp = jax.vjp(norm, x, *parameters)
        return y, *vjp(y)

    return run


def abstract(name, shape, dtype):
    parameter = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    return jax.ShapeDtypeStruct(shape, dtype), *[parameter] * (2 if name == "layer_norm" else 1)


class TestCompilation:
    @needs_tpu_compiler
    @pytest.mark.parametrize("chip", TOPOLOGIES)
    def test_for_tpus_ahead_of_time(self, chip, record_property):
        for name, shape, dtype in (
            ("layer_norm", (1000, 2048), jnp.bfloat16),
            ("rms_norm", (1000, 2048), jnp.float32),
            ("layer_norm", (24, 40000), jnp.float32),  # several tiles to a row
        ):
            x, *parameters = abstract(name, shape, dtype)
            run = forward_and_backward(name, "pallas_tpu")
            compiled = compile_for_tpu(chip, run, x, *parameters)
            used = compiled.memory_analysis().temp_size_in_bytes
            record_property(f"temporary bytes {name} {shape}", used)
            assert used < x.size * x.dtype.itemsize  # numbers per row, sums per block of rows

    @needs_tpu_compiler
    @pytest.mark.parametrize("chip", TOPOLOGIES)
    def test_float16_and_one_feature_for_tpus(self, chip):
        for shape in ((20, 300), (5, 1)):
            args = abstract("layer_norm", shape, jnp.float16)
            compile_for_tpu(chip, forward_and_backward("layer_norm", "pallas_tpu"), *args)

    @both
    @pytest.mark.parametrize(
        ("shape", "num_kernels"),
        [
            ((4096, 512), 2),
            ((1000, 8192), 2),
            ((8192, 10000), 3),  # rows of several tiles, whose sums over columns come first
            ((3, 1), 2),
        ],
    )
    def test_for_gpus(self, name, shape, num_kernels):
        args = abstract(name, shape, jnp.bfloat16)
        text = lower_for_gpu(forward_and_backward(name, "pallas_gpu"), *args)
        assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == num_kernels
