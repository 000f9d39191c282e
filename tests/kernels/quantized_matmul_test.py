"""Every implementation of the quantized product against the formula in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxref.kernels import (
    quantized_matmul,
    quantized_matmul_gpu,
    quantized_matmul_tpu,
    quantized_matmul_xla,
)
from jaxref.quantization import pack
from tests.kernels.ahead_of_time import (
    TOPOLOGIES,
    compile_for_tpu,
    lower_for_gpu,
    needs_tpu_compiler,
)
from tests.kernels.platforms import ANYWHERE

E4, E5 = jnp.float8_e4m3fn, jnp.float8_e5m2


class Case:
    """A format: how codes, scales and inputs look, for any sizes."""

    def __init__(self, bits=8, *, kind="int", block=None, x="float", scale="output", **options):
        self.bits, self.kind, self.block, self.x, self.scale = bits, kind, block, x, scale
        self.has_zero_point = options.get("zero_point", False)
        self.codebook, self.x_blocks = options.get("codebook"), options.get("x_blocks", False)

    def operands(self, tokens, inputs, outputs, seed=0):
        """`x, arguments`, the latter as `quantized_matmul` takes them, and both in float64."""
        rng = np.random.default_rng(seed)
        block = self.block or inputs
        blocks, low = -(-inputs // block), -(2 ** (self.bits - 1))
        repeat = lambda s: np.repeat(s, block, axis=0)[:inputs].astype(float)
        scale = rng.uniform(0.5, 2, (blocks, outputs if self.scale == "output" else 1)).astype("f")
        arguments = {"scale": scale, "block_size": self.block, "bits": self.bits}
        if self.kind == "int":
            codes = rng.integers(low, -low, (inputs, outputs)).astype("i1")
            arguments["values"] = pack(codes, self.bits)
            arguments["padding"] = -outputs % (8 // self.bits)
            weight = codes.astype(float)
        else:
            arguments["values"] = jnp.asarray(rng.normal(size=(inputs, outputs)), self.kind)
            weight = np.asarray(arguments["values"], float)
        if self.codebook is not None:
            shape = (2**self.bits, outputs) if self.codebook == "output" else (2**self.bits,)
            book = arguments["codebook"] = rng.normal(size=shape).astype("f")
            index = codes.astype(int) - low
            shared = self.codebook == "shared"
            weight = (book[index] if shared else np.take_along_axis(book, index, 0)).astype(float)
        if self.has_zero_point:
            zero = arguments["zero_point"] = rng.integers(low, -low, scale.shape).astype("i1")
            weight = weight - repeat(zero)
        weight = weight * repeat(scale)
        if self.x == "float":
            x = rng.normal(size=(tokens, inputs)).astype("f")
            return x, arguments, x.astype(float), weight
        of_token = rng.uniform(0.5, 2, (tokens, blocks if self.x_blocks else 1)).astype("f")
        arguments["x_scale"] = of_token
        if self.x == "int":
            x = rng.integers(-127, 128, (tokens, inputs)).astype("i1")
        else:
            x = jnp.asarray(rng.normal(size=(tokens, inputs)), self.x)
        wide = np.asarray(x, float)
        wide *= repeat(of_token.T).T if self.x_blocks else of_token
        return x, arguments, wide, weight


CASES = {
    "int8": Case(),
    "int8, one scale": Case(scale="all"),
    "int8, blocks, zero points": Case(block=32, zero_point=True),
    "int4, zero points": Case(4, zero_point=True),
    "int4, blocks": Case(4, block=32),
    "int2": Case(2),
    "codebooks of outputs": Case(4, codebook="output"),
    "a codebook, blocks": Case(3, codebook="shared", block=64),
    "float8": Case(kind=E4),
    "int8 · int8": Case(x="int"),
    "int8 · int8, blocks": Case(x="int", block=32, x_blocks=True),
    "int8 · int4, blocks": Case(4, x="int", block=64),
    "float8 · float8": Case(kind=E4, x=E4, scale="all"),
    "float8 · float8, blocks": Case(kind=E5, x=E4, block=32, x_blocks=True),
}

AHEAD_OF_TIME = (
    "int8, blocks, zero points",
    "int4, blocks",
    "a codebook, blocks",
    "int8 · int8",
    "float8 · float8, blocks",
)


@pytest.fixture(params=ANYWHERE)
def implementation(request, monkeypatch):
    """An implementation with tiles so small that small arrays have several, the last ones cut."""
    monkeypatch.setattr(quantized_matmul_xla, "_SLICE", 32)
    monkeypatch.setattr(quantized_matmul_tpu, "_BLOCK", (32, 128, 128))
    monkeypatch.setattr(quantized_matmul_gpu, "_BLOCK", (16, 32, 32))
    return request.param


def multiply(x, arguments, implementation):
    arguments = dict(arguments)
    defaults = {"bits": 8, "padding": 0, "block_size": None}
    static = {name: arguments.pop(name, value) for name, value in defaults.items()}
    return _multiply(x, arguments, **static, implementation=implementation)


@partial(jax.jit, static_argnames=("bits", "padding", "block_size", "implementation"))
def _multiply(x, arrays, **static):
    return quantized_matmul(x, arrays["values"], **arrays_but_values(arrays), **static)


def arrays_but_values(arrays):
    return {name: array for name, array in arrays.items() if name != "values"}


class TestNumbers:
    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    def test_the_product_of_what_the_codes_stand_for(self, case, implementation):
        x, arguments, wide, weight = case.operands(5, 200, 37)
        y = multiply(x, arguments, implementation)
        assert y.dtype == jnp.float32
        expected = wide @ weight
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-6 * np.abs(expected).max())

    @pytest.mark.parametrize("sizes", [(40, 128, 256), (1, 5, 3)])
    def test_whole_tiles_and_less_than_one(self, sizes, implementation):
        x, arguments, wide, weight = Case(4, zero_point=True).operands(*sizes)
        np.testing.assert_allclose(
            multiply(x, arguments, implementation), wide @ weight, rtol=1e-5, atol=1e-4
        )

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision(self, dtype, implementation):
        for case in (CASES["int8"], CASES["int4, blocks"]):
            x, arguments, _, weight = case.operands(3, 130, 20)
            x = jnp.asarray(x, dtype)
            y = multiply(x, arguments, implementation)
            expected = np.asarray(x, float) @ weight
            tolerance = float(jnp.finfo(dtype).eps) * np.abs(expected).max()
            assert y.dtype == dtype
            np.testing.assert_allclose(y.astype("f"), expected, atol=tolerance)

    def test_double_precision(self, monkeypatch):
        monkeypatch.setattr(quantized_matmul_xla, "_SLICE", 32)
        with jax.enable_x64(True):
            for name in ("int8", "int4, blocks", "codebooks of outputs"):
                _, arguments, wide, weight = CASES[name].operands(3, 130, 20)
                y = multiply(wide, arguments, "xla")
                assert y.dtype == jnp.float64
                np.testing.assert_allclose(y, wide @ weight, rtol=1e-12, atol=1e-12)

    def test_integer_sums_are_exact(self, implementation):
        x = np.full((1, 3000), 127, "i1")
        x[0, 1] = 126  # 3000 · 127² - 127 is no multiple of 4, as floats of its size are
        arguments = {"scale": np.ones((1, 1), "f"), "x_scale": np.ones((1, 1), "f")}
        arguments["values"] = np.full((3000, 1), 127, "i1")
        difference = [
            multiply(sign * x, arguments | {"scale": sign * arguments["scale"]}, implementation)
            for sign in (1, -1)
        ]
        total = 3000 * 127**2 - 127
        assert float(difference[0][0, 0]) == float(difference[1][0, 0]) == float(np.float32(total))


class TestGradients:
    @pytest.mark.parametrize("name", ["int4, blocks", "a codebook, blocks", "float8 · float8"])
    def test_are_those_of_the_dequantized_product(self, name, implementation):
        x, arguments, wide, weight = CASES[name].operands(5, 200, 37)
        cotangent = np.random.default_rng(1).normal(size=(5, 37)).astype("f")
        learned = {k: arguments[k] for k in ("scale", "x_scale", "codebook") if k in arguments}
        floating = name != "float8 · float8"

        def loss(learned, x):
            return jnp.vdot(multiply(x, arguments | learned, implementation), cotangent)

        ours = jax.grad(loss, (0, 1) if floating else 0)(learned, x)
        to_learned, to_x = ours if floating else (ours, None)
        if floating:
            np.testing.assert_allclose(to_x, cotangent @ weight.T, rtol=1e-4, atol=1e-4)
        # y is linear in all the scales, and in the codebook, at once
        product = np.vdot(wide @ weight, cotangent)
        for name, gradient in to_learned.items():
            assert gradient.shape == learned[name].shape
            np.testing.assert_allclose(np.vdot(gradient, learned[name]), product, rtol=1e-4)
        per_output = np.einsum("to,to->o", wide @ weight, cotangent)
        if learned["scale"].shape[1] > 1:
            ours = np.sum(to_learned["scale"] * learned["scale"], 0)
            np.testing.assert_allclose(ours, per_output, rtol=1e-4, atol=1e-3)


class TestTransformations:
    def test_leading_axes_and_vmap(self, implementation):
        x, arguments, wide, weight = CASES["int4, blocks"].operands(12, 96, 20)
        expected = (wide @ weight).reshape(2, 6, 20)
        whole = multiply(x.reshape(2, 6, 96), arguments, implementation)
        np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-4)
        mapped = jax.vmap(lambda x: multiply(x, arguments, implementation))(x.reshape(2, 6, 96))
        np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-4)

    def test_tokens_and_outputs_spread_over_devices(self, implementation):
        x, arguments, wide, weight = CASES["int4, blocks"].operands(8, 96, 16)
        mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
        product = jax.shard_map(
            lambda x, values, scale: quantized_matmul(
                x, values, scale, bits=4, block_size=32, implementation=implementation
            ),
            mesh=mesh,
            in_specs=(P("data"), P(None, "tensor"), P(None, "tensor")),
            out_specs=P("data", "tensor"),
            check_vma=implementation == "xla",  # kernels' interpreters do not know of varying axes
        )
        arrays = x, arguments["values"], arguments["scale"]
        np.testing.assert_allclose(jax.jit(product)(*arrays), wide @ weight, rtol=1e-5, atol=1e-4)
        of_x = jax.jit(jax.grad(lambda x, *rest: product(x, *rest).sum()))(*arrays)
        expected = np.broadcast_to(weight.sum(1), x.shape)
        np.testing.assert_allclose(of_x, expected, rtol=1e-4, atol=1e-4)


class TestEdges:
    def test_no_tokens_and_no_outputs(self, implementation):
        x, arguments, _, _ = CASES["int8"].operands(3, 8, 5)
        assert multiply(x[:0], arguments, implementation).shape == (0, 5)
        none = {"values": arguments["values"][:, :0], "scale": arguments["scale"][:, :0]}
        assert multiply(x, none, implementation).shape == (3, 0)

    def test_zero_scales_and_extreme_codes(self, implementation):
        values = np.array([[-128, 127], [127, -128]], "i1")
        scale = np.array([[0.0, 1e30]], "f")
        x = np.array([[1.0, 1.0], [0.0, 0.0]], "f")
        y = multiply(x, {"values": values, "scale": scale}, implementation)
        np.testing.assert_allclose(y, np.array([[0.0, -1e30], [0.0, 0.0]]), rtol=1e-6)

    def test_blocks_that_kernels_do_not_take(self, implementation):
        x, arguments, wide, weight = Case(8, block=7).operands(3, 40, 5)
        if implementation == "xla":
            y = multiply(x, arguments, implementation)
            np.testing.assert_allclose(y, wide @ weight, rtol=1e-5, atol=1e-4)
            return
        with pytest.raises(ValueError, match="block_size must suit the kernel"):
            multiply(x, arguments, implementation)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"bits": 9}, ValueError, "bits must be in"),
            ({"values": np.ones((8, 3), "u1")}, ValueError, "bits must be in"),
            ({"values": np.ones((8, 3), "u1"), "bits": 4, "padding": 2}, ValueError, "padding mus"),
            ({"values": np.ones((8, 3), "i4")}, TypeError, "values must be int8, packed uint8"),
            ({"values": np.ones((7, 3), "i1")}, ValueError, r"values must have shape \[8, out\]"),
            ({"x": np.ones((2, 8), "i4")}, TypeError, "x must be floating point, int8 or float8"),
            ({"x": np.ones((2, 8), "i1")}, ValueError, "x_scale must be given"),
            ({"x_scale": np.ones((2, 1))}, ValueError, "x_scale must be None"),
            ({"scale": np.ones((2, 3), "f")}, ValueError, r"scale must broadcast to \(1, 3\)"),
            ({"scale": np.ones(3, "f")}, ValueError, "scale must broadcast"),
            ({"block_size": 0}, ValueError, "block_size must be at least 1"),
            ({"zero_point": np.ones((1, 2), "i1")}, ValueError, "zero_point must broadcast"),
            ({"codebook": np.ones(255, "f")}, ValueError, r"codebook must have shape \(256,\)"),
            ({"dtype": "int32"}, TypeError, "dtype must be a floating-point type"),
            ({"implementation": "cuda"}, ValueError, "implementation must be None or one of"),
            (
                {"x": np.ones((2, 8), "i1"), "x_scale": np.ones((3, 1), "f")},
                ValueError,
                "x_scale must broadcast",
            ),
            (
                {"x": np.ones((2, 8), "i1"), "x_scale": np.ones((2, 2), "f")},
                ValueError,
                "x_scale must have shape",
            ),
            (
                {
                    "x": np.ones((2, 8), "i1"),
                    "x_scale": np.ones((2, 1), "f"),
                    "zero_point": np.ones((1, 3), "i1"),
                },
                ValueError,
                "zero_point must be None",
            ),
            (
                {"x": jnp.ones((2, 8), E4), "x_scale": np.ones((2, 1), "f")},
                TypeError,
                "values must be float8",
            ),
        ],
    )
    def test_bad_input_is_named(self, change, error, message):
        arguments = {
            "x": np.ones((2, 8), "f"),
            "values": np.ones((8, 3), "i1"),
            "scale": np.ones((1, 3), "f"),
        }
        with pytest.raises(error, match=message):
            quantized_matmul(**arguments | change)


class TestCompilation:
    @pytest.mark.optimized
    def test_a_cpu_holds_no_dequantized_kernel(self):
        program = jax.jit(partial(quantized_matmul, implementation="xla"))
        shapes = (
            jax.ShapeDtypeStruct((16, 4096), "float32"),
            jax.ShapeDtypeStruct((4096, 4096), "int8"),
            jax.ShapeDtypeStruct((1, 4096), "float32"),
        )
        memory = program.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
        assert memory < 4096 * 4096 * 4 / 4

    @needs_tpu_compiler
    @pytest.mark.parametrize("chip", TOPOLOGIES)
    def test_for_tpus_ahead_of_time(self, chip, record_property):
        for name in AHEAD_OF_TIME:
            case = CASES[name]
            x, arguments, _, _ = case.operands(100, 1000, 520)
            x = jnp.asarray(x, jnp.bfloat16) if case.x == "float" else x
            used = temporary_bytes(chip, x, arguments)
            record_property(name, used)
            assert used < 1000 * 520 * 2  # a dequantized kernel, in half precision

    @needs_tpu_compiler
    def test_a_tpu_holds_no_dequantized_kernel_for_one_token(self, record_property):
        x, arguments, _, _ = CASES["int4, blocks"].operands(1, 4096, 4096)
        used = temporary_bytes("v5e", jnp.asarray(x, jnp.bfloat16), arguments)
        record_property("temporary bytes", used)
        assert used < arguments["values"].nbytes / 4

    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    def test_for_gpus(self, case):
        x, arguments, _, _ = case.operands(100, 1000, 520)
        x = jnp.asarray(x, jnp.bfloat16) if case.x == "float" else x
        multiplied, *shapes = program_and_shapes("pallas_gpu", x, arguments)
        assert "triton" in lower_for_gpu(multiplied, *shapes)


def program_and_shapes(implementation, x, arguments):
    names = [name for name in arguments if hasattr(arguments[name], "shape")]
    static = {k: v for k, v in arguments.items() if k not in names}

    def multiplied(x, *arrays):
        given = dict(zip(names, arrays, strict=True)) | static
        return quantized_matmul(x, **given, implementation=implementation)

    shape = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
    return multiplied, *map(shape, (x, *(arguments[name] for name in names)))


def temporary_bytes(chip, x, arguments):
    compiled = compile_for_tpu(chip, *program_and_shapes("pallas_tpu", x, arguments))
    return compiled.memory_analysis().temp_size_in_bytes
