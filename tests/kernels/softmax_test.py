import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.sharding import PartitionSpec as P

from jaxref import kernels
from tests.kernels.ahead_of_time import (
    TOPOLOGIES,
    compile_for_tpu,
    lower_for_gpu,
    needs_tpu_compiler,
)
from tests.kernels.platforms import ANYWHERE, small_tiles  # noqa: F401

LITERAL = {
    "softmax": lambda x: scipy.special.softmax(x, axis=-1),
    "log_softmax": lambda x: scipy.special.log_softmax(x, axis=-1),
    "logsumexp": lambda x: scipy.special.logsumexp(x, axis=-1),
    "two_pass_softmax": lambda x: scipy.special.softmax(x, axis=-1),
}
everywhere = pytest.mark.parametrize("implementation", ANYWHERE)
every_function = pytest.mark.parametrize("name", LITERAL)


def pulled_back(name, x, g):
    """The gradients of Σ g y in float64, from the functions' derivatives."""
    p = scipy.special.softmax(x, axis=-1)
    if name == "logsumexp":
        return g[..., None] * p
    if name == "log_softmax":
        return g - p * g.sum(-1, keepdims=True)
    return p * (g - (p * g).sum(-1, keepdims=True))


def value_and_pull_back(name, implementation, x, g, **options):
    function = getattr(kernels, name)
    y, vjp = jax.vjp(lambda x: function(x, implementation=implementation, **options), x)
    return y, vjp(g.astype(y.dtype))[0]


def random_rows(name, shape, *, scale=4.0, offset=0.0, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(scale * rng.normal(size=shape) + offset, dtype)
    g = rng.normal(size=shape[:-1] if name == "logsumexp" else shape)
    return x, jnp.asarray(g, np.float32)


@pytest.mark.usefixtures("small_tiles")
class TestNumbers:
    @every_function
    @everywhere
    @pytest.mark.parametrize("shape", [(5, 300), (2, 3, 128), (1, 1)])
    def test_values_and_gradients_match_scipy(self, name, implementation, shape):
        x, g = random_rows(name, shape)
        y, dx = value_and_pull_back(name, implementation, x, g)
        exact = np.float64(x)
        np.testing.assert_allclose(y, LITERAL[name](exact), rtol=2e-6, atol=2e-7)
        expected = pulled_back(name, exact, np.float64(g))
        np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-6)

    @every_function
    @everywhere
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_computes_half_precision_in_float32(self, name, implementation, dtype):
        x, g = random_rows(name, (3, 200), dtype=dtype)
        y, dx = value_and_pull_back(name, implementation, x, g)
        assert y.dtype == dx.dtype == dtype
        step = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(
            np.float64(y), LITERAL[name](np.float64(x)), rtol=step, atol=1e-6
        )
        expected = pulled_back(name, np.float64(x), np.float64(g.astype(dtype)))
        # a gradient is a difference, of terms that the values' own rounding has reached
        np.testing.assert_allclose(np.float64(dx), expected, rtol=4 * step, atol=4 * step)

    @every_function
    @everywhere
    @pytest.mark.parametrize("offset", [1e4, -1e4])
    def test_far_from_zero(self, name, implementation, offset):
        x, g = random_rows(name, (2, 150), offset=offset)
        y, dx = value_and_pull_back(name, implementation, x, g)
        np.testing.assert_allclose(y, LITERAL[name](np.float64(x)), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(
            dx, pulled_back(name, np.float64(x), np.float64(g)), rtol=1e-5, atol=1e-6
        )

    @every_function
    def test_double_precision(self, name):
        with jax.enable_x64(True):
            x, g = random_rows(name, (3, 40), dtype=np.float64)
            y, dx = value_and_pull_back(name, None, x, g.astype(np.float64))
            np.testing.assert_allclose(y, LITERAL[name](np.asarray(x)), rtol=1e-13)
            np.testing.assert_allclose(
                dx, pulled_back(name, np.asarray(x), np.float64(g)), atol=1e-13
            )

    @pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
    def test_forward_mode_and_second_derivatives(self, name):
        x, _ = random_rows(name, (2, 5), scale=1.0)
        function = getattr(kernels, name)
        ours, theirs = (
            jax.hessian(lambda x: jnp.sum(jnp.sin(f(x)))) for f in (function, reference(name))
        )
        np.testing.assert_allclose(ours(x), theirs(x), atol=1e-5)


def reference(name):
    if name == "logsumexp":
        return lambda x: jax.scipy.special.logsumexp(x, axis=-1)
    return getattr(jax.nn, name)


@pytest.mark.usefixtures("small_tiles")
class TestEdges:
    @everywhere
    def test_rows_without_entries_and_without_numbers(self, implementation):
        x = np.random.default_rng(0).normal(size=(4, 140)).astype(np.float32)
        x[0], x[1, :130], x[2, 3], x[3, 139] = -np.inf, -np.inf, np.nan, np.inf
        for name in LITERAL:
            g = np.ones(x.shape[:1] if name == "logsumexp" else x.shape, np.float32)
            y, dx = value_and_pull_back(name, implementation, jnp.asarray(x), jnp.asarray(g))
            assert np.all(y[0] == (0 if "softmax" in name and "log" not in name else -np.inf)), name
            assert np.all(np.isnan(y[2:])), name
            np.testing.assert_allclose(y[1], LITERAL[name](np.float64(x[1])), atol=1e-6)
            assert np.all(np.isfinite(dx[:2])), name
            if name != "log_softmax":
                assert np.all(dx[0] == 0), name

    @every_function
    @everywhere
    def test_along_any_axis_where_a_mask_says(self, name, implementation):
        x, g = random_rows(name, (3, 140, 2), seed=1)
        where = np.random.default_rng(2).random((140, 2)) < 0.5
        where[:, 1] = False
        if name == "logsumexp":
            g = jnp.ones((3, 2))
        y, dx = value_and_pull_back(name, implementation, x, g, axis=1, where=where)
        masked = np.where(where[:, 0], np.float64(x[..., 0]), -np.inf)
        taken = y[..., 0]
        np.testing.assert_allclose(taken, LITERAL[name](masked), rtol=2e-6, atol=1e-6)
        assert np.all(np.isfinite(dx))
        assert np.all(dx[:, ~where[:, 0], 0] == 0)
        assert np.all(dx[..., 1] == 0)

    @every_function
    @pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (3, 0)])
    def test_empty_arrays(self, name, shape):
        y = getattr(kernels, name)(jnp.zeros(shape))
        assert y.shape == (shape[:-1] if name == "logsumexp" else shape)

    @every_function
    def test_bad_input(self, name):
        function = getattr(kernels, name)
        with pytest.raises(TypeError, match="x must have a floating-point type"):
            function(jnp.arange(3))
        with pytest.raises(ValueError, match="axis"):
            function(jnp.zeros((2, 3)), axis=2)
        with pytest.raises(ValueError, match="where"):
            function(jnp.zeros((2, 3)), where=jnp.ones((2,), bool))
        with pytest.raises(ValueError, match=r"implementation .* got 'cuda'"):
            function(jnp.zeros((2, 3)), implementation="cuda")
        with pytest.raises(ValueError, match=r"'pallas' needs a TPU or a GPU"):
            function(jnp.zeros((2, 3)), implementation="pallas")


@pytest.mark.usefixtures("small_tiles")
class TransformationsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_with_and_without_jit(self):
        x, _ = random_rows("softmax", (3, 70))
        for name in LITERAL:
            y = self.variant(getattr(kernels, name))(x)
            np.testing.assert_allclose(y, LITERAL[name](np.float64(x)), rtol=2e-6, atol=1e-6)

    def test_vmap(self):
        x, _ = random_rows("softmax", (3, 2, 130))
        for implementation in ANYWHERE:
            for name in ("softmax", "logsumexp"):
                function = lambda x: getattr(kernels, name)(x, implementation=implementation)
                np.testing.assert_allclose(jax.vmap(function)(x), function(x), rtol=1e-6)

    def test_sharded_batch(self):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        x, g = random_rows("softmax", (16, 130))
        place = jax.NamedSharding(mesh, P("data"))
        x, g = jax.device_put((x, g), place)
        for implementation in ANYWHERE:
            whole = jax.shard_map(
                lambda x: kernels.softmax(x, implementation=implementation),
                mesh=mesh,
                in_specs=P("data"),
                out_specs=P("data"),
                # the interpreter of GPU kernels does not know of varying axes
                check_vma=implementation != "pallas_gpu_interpret",
            )
            y, dx = jax.jit(lambda x, g: (lambda y, vjp: (y, *vjp(g)))(*jax.vjp(whole, x)))(x, g)
            np.testing.assert_allclose(y, LITERAL["softmax"](np.float64(x)), rtol=2e-6, atol=1e-7)
            np.testing.assert_allclose(
                dx, pulled_back("softmax", np.float64(x), np.float64(g)), atol=1e-6
            )


def forward_and_backward(name, implementation):
    def run(x):
        y, vjp = jax.vjp(lambda x: getattr(kernels, name)(x, implementation=implementation), x)
        return y, vjp(y)[0]

    return run


class TestCompilation:
    @needs_tpu_compiler
    @every_function
    @pytest.mark.parametrize("chip", TOPOLOGIES)
    def test_for_tpus_ahead_of_time(self, name, chip, record_property):
        run = forward_and_backward(name, "pallas_tpu")
        for shape, dtype in (((1024, 512), jnp.float32), ((264, 32000), jnp.bfloat16)):
            x = jax.ShapeDtypeStruct(shape, dtype)
            used = compile_for_tpu(chip, run, x).memory_analysis().temp_size_in_bytes
            record_property(f"temporary bytes {shape}", used)
            assert used < x.size * x.dtype.itemsize  # statistics of rows at most

    @needs_tpu_compiler
    @pytest.mark.parametrize("chip", TOPOLOGIES)
    def test_long_rows_for_tpus(self, chip):
        x = jax.ShapeDtypeStruct((8, 2**20), jnp.float32)
        compile_for_tpu(chip, forward_and_backward("softmax", "pallas_tpu"), x)

    @every_function
    def test_for_gpus(self, name):
        for shape in ((4096, 512), (8, 2**20)):
            x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
            text = lower_for_gpu(forward_and_backward(name, "pallas_gpu"), x)
            assert "triton" in text
