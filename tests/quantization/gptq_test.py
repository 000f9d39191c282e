import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxref.quantization import (
    QuantSpec,
    dequantize,
    gptq_quantize,
    hessian,
    hessian_init,
    hessian_update,
    quantize,
)
from jaxref.quantization.gptq import inverse_factor, round_with_feedback

# The literal loop runs in float64, the library in float32: entries that lie half-way between two
# levels could differ, and with seed 0 none does.


def random_layer(inputs=24, outputs=6, samples=40, seed=0):
    """Correlated inputs of unequal size, one of them dead, and a kernel."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(inputs, inputs)) / np.sqrt(inputs) + np.eye(inputs)
    x = rng.normal(size=(samples, inputs)) @ mixing * 10.0 ** rng.uniform(-1, 1, inputs)
    x[:, 3] = 0
    return x.astype(np.float32), rng.normal(size=(inputs, outputs)).astype(np.float32)


def hessian_of(x):
    return hessian(hessian_update(hessian_init(x.shape[-1]), x))


def scales64(w, spec):
    """Scale and zero point of every column, from all of its entries."""
    q_min, q_max = spec.code_range
    if spec.symmetric:
        return np.abs(w).max(axis=0) / q_max, np.zeros(w.shape[1])
    low, high = np.minimum(w.min(axis=0), 0), np.maximum(w.max(axis=0), 0)
    scale = (high - low) / (q_max - q_min)
    return scale, q_min - np.rint(low / scale)


def gptq64(w, x, spec, damping, order=None, static=False):
    """The paper's algorithm without lazy blocks, in float64: codes and dequantized values."""
    w, x = w.astype(np.float64), x.astype(np.float64)
    h = 2 * x.T @ x / len(x)
    inputs = len(w)
    order = np.arange(inputs) if order is None else order
    dead = np.diag(h) == 0
    w[dead] = 0
    h += np.diag(np.where(dead, 1, damping * np.diag(h)[~dead].mean()))
    h = h[order][:, order]
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    group = spec.block_size or inputs
    original, remaining = w.copy(), w[order]
    codes, values = np.zeros(w.shape, int), np.zeros(w.shape)
    for j in range(inputs):
        i = order[j]
        if static or spec.block_size is None:
            first = i // group * group
            scale, zero = scales64(original[first : first + group], spec)
        elif j % group == 0:
            scale, zero = scales64(remaining[j : j + group], spec)
        codes[i] = np.clip(np.rint(remaining[j] / scale) + zero, *spec.code_range)
        values[i] = scale * (codes[i] - zero)
        error = (remaining[j] - values[i]) / upper[j, j]
        remaining[j + 1 :] -= np.outer(upper[j, j + 1 :], error)
    return codes, values


CASES = {
    "channel": ({"granularity": "channel", "axis": 1, "bits": 4}, {}),
    "channel, asymmetric, ordered": (
        {"granularity": "channel", "axis": 1, "bits": 3, "symmetric": False},
        {"activation_order": True, "damping": 0.1},
    ),
    "groups when reached": ({"granularity": "block", "axis": 0, "block_size": 8, "bits": 4}, {}),
    "groups when reached, asymmetric": (
        {"granularity": "block", "axis": 0, "block_size": 10, "bits": 2, "symmetric": False},
        {},
    ),
    "static groups": (
        {"granularity": "block", "axis": 0, "block_size": 7, "bits": 3},
        {"static_groups": True},
    ),
    "static groups, ordered": (
        {"granularity": "block", "axis": 0, "block_size": 8, "bits": 4, "symmetric": False},
        {"activation_order": True},
    ),
}


class TestNumbers(chex.TestCase):
    @parameterized.named_parameters((name.replace(",", ""), name) for name in CASES)
    def test_matches_literal_loop(self, name):
        spec, options = CASES[name]
        spec = QuantSpec(**spec)
        x, w = random_layer()
        order = None
        if options.get("activation_order"):
            order = np.argsort(-(x.astype(np.float64) ** 2).sum(axis=0), kind="stable")
        static = bool({"activation_order", "static_groups"} & set(options))
        codes, values = gptq64(w, x, spec, options.get("damping", 0.01), order, static)
        q = gptq_quantize(w, hessian_of(x), spec, **options)
        np.testing.assert_array_equal(q.codes, codes)
        np.testing.assert_allclose(dequantize(q), values, rtol=1e-3, atol=1e-4)

    def test_loop_in_blocks_is_the_plain_loop(self):
        """Over three blocks, with a rounding that is smooth and looks across their ends."""
        x, w = random_layer(inputs=300, outputs=3, samples=600)
        factor, _ = inverse_factor(hessian_of(x), 0.01)

        def round_row(j, row, ahead, last):
            rounded = 0.5 * row + 0.1 * jnp.mean(ahead(20), axis=0) + 0.01 * last + 0.001 * j
            return rounded, rounded

        rounded, errors, last = jax.jit(
            lambda w, u: round_with_feedback(w, u, round_row, jnp.zeros(3))
        )(w, factor)
        upper, rest, before = np.float64(factor), np.pad(w, [(0, 20), (0, 0)]).astype(float), 0
        expected, expected_errors = np.zeros(w.shape), np.zeros(w.shape)
        for j in range(300):
            before = 0.5 * rest[j] + 0.1 * rest[j : j + 20].mean(axis=0) + 0.01 * before + 0.001 * j
            expected[j], expected_errors[j] = before, (rest[j] - before) / upper[j, j]
            rest[j + 1 : 300] -= np.outer(upper[j, j + 1 :], expected_errors[j])
        size = np.abs(expected).max()
        np.testing.assert_allclose(rounded, expected, atol=1e-4 * size)
        np.testing.assert_allclose(errors, expected_errors, rtol=1e-2, atol=1e-4 * size)
        np.testing.assert_array_equal(last, rounded[-1])

    @chex.variants(with_jit=True, without_jit=True)
    def test_hessian(self):
        x, _ = random_layer()
        batches = x.reshape(4, 2, 5, -1)

        def streamed(batches):
            state = hessian_init(batches.shape[-1])
            for batch in batches:
                state = hessian_update(state, batch)
            return hessian(state), state.count

        h, count = self.variant(streamed)(batches)
        x = x.astype(np.float64)
        np.testing.assert_allclose(h, 2 * x.T @ x / len(x), rtol=1e-5, atol=1e-4)
        assert count == 40


class TestClaims:
    @pytest.mark.claim("gptq")
    def test_outputs_change_less_than_with_rounding_to_nearest(self):
        """At most half as much, at 2, 3 and 4 bits, for inputs that a few directions dominate."""
        rng = np.random.default_rng(0)
        x = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 24)) + 0.1 * rng.normal(size=(200, 24))
        x, w = x.astype(np.float32), rng.normal(size=(24, 16)).astype(np.float32)
        for bits in (2, 3, 4):
            spec = QuantSpec(bits=bits, granularity="channel", axis=1)
            gptq, nearest = gptq_quantize(w, hessian_of(x), spec), quantize(w, spec)
            losses = [np.mean((x @ (w - dequantize(q))) ** 2) for q in (gptq, nearest)]
            assert losses[0] < 0.5 * losses[1], losses

    def test_errors_of_the_loop_are_the_whole_loss(self):
        """Σ e² = tr (W - Q)ᵀ H' (W - Q), however the rows are rounded."""
        x, w = random_layer(inputs=20, outputs=3)
        h = hessian_of(x) + jnp.eye(20)
        factor, _ = inverse_factor(h, 0.0)
        np.testing.assert_allclose(factor.T @ factor, np.linalg.inv(h), atol=1e-4, rtol=1e-4)
        rounded, errors, count = round_with_feedback(
            jnp.asarray(w), factor, lambda j, row, ahead, carry: (jnp.floor(row), carry + 1), 0
        )
        assert count == 20
        np.testing.assert_array_equal(rounded, np.floor(rounded))
        loss = np.trace((w - rounded).T @ h @ (w - rounded))
        np.testing.assert_allclose(np.sum(errors**2), loss, rtol=1e-4)


@pytest.mark.parametrize("activation_order", [False, True])
def test_vmap_and_a_sharded_layer_change_nothing(activation_order):
    x, w = random_layer(outputs=8)
    spec = QuantSpec(granularity="block", axis=0, block_size=8, bits=4)
    h = hessian_of(x)
    expected = gptq_quantize(w, h, spec, activation_order=activation_order)

    @jax.jit
    def both(w, h):
        quantized = jax.vmap(
            lambda w, h: gptq_quantize(w, h, spec, activation_order=activation_order)
        )(jnp.stack([-w, w]), jnp.stack([h, h]))
        return jax.tree.map(lambda leaf: leaf[1], quantized)

    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    w = jax.device_put(w, NamedSharding(mesh, PartitionSpec(None, "model")))
    got = both(w, h)
    np.testing.assert_array_equal(got.codes, expected.codes)
    np.testing.assert_allclose(got.scale, expected.scale, rtol=1e-5)
    assert got.spec == expected.spec


def test_whole_inputs_as_groups_are_channels():
    x, w = random_layer()
    channel = gptq_quantize(w, hessian_of(x), QuantSpec(granularity="channel", axis=1, bits=4))
    block = QuantSpec(granularity="block", axis=0, block_size=100, bits=4)
    grouped = gptq_quantize(w, hessian_of(x), block)
    np.testing.assert_array_equal(grouped.codes, channel.codes)
    assert grouped.scale.shape == channel.scale.shape


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(granularity="channel", axis=0, symmetric=False),
        QuantSpec(granularity="block", axis=1, block_size=4, bits=3),
        QuantSpec(granularity="block", axis=0, block_size=5, bits=3),
    ],
)
def test_independent_inputs_are_rounded_to_nearest(spec):
    _, w = random_layer()
    got, nearest = gptq_quantize(w, jnp.eye(24), spec), quantize(w, spec)
    np.testing.assert_array_equal(got.codes, nearest.codes)
    np.testing.assert_allclose(got.scale, nearest.scale)
    assert got.spec == nearest.spec


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_kernels(dtype):
    x, w = random_layer()
    spec = QuantSpec(granularity="channel", axis=1, bits=4)
    w = jnp.asarray(w, dtype)
    q = gptq_quantize(w, hessian_of(x), spec)
    assert q.dtype == dtype
    expected = gptq_quantize(w.astype(jnp.float32), hessian_of(x), spec)
    np.testing.assert_array_equal(q.codes, expected.codes)


def test_fewer_samples_than_inputs_and_no_samples():
    x, w = random_layer(samples=5)
    spec = QuantSpec(granularity="channel", axis=1, bits=4)
    q = dequantize(gptq_quantize(w, hessian_of(x), spec))
    nearest = dequantize(quantize(w, spec))
    assert np.sum((x @ (w - q)) ** 2) < 0.8 * np.sum((x @ (w - nearest)) ** 2)
    # Every input is dead.
    np.testing.assert_array_equal(dequantize(gptq_quantize(w, hessian_of(x[:0]), spec)), 0)


def test_degenerate_kernels():
    x, w = random_layer()
    h = hessian_of(x)
    spec = QuantSpec(granularity="channel", axis=1, bits=4)
    w[:, 0], w[:, 1] = 0, 1
    q = dequantize(gptq_quantize(w, h, spec))
    np.testing.assert_array_equal(q[:, 0], 0)
    np.testing.assert_array_equal(q[3], 0)
    np.testing.assert_allclose(np.delete(q[:, 1], 3), 1, rtol=1e-6)
    one = gptq_quantize(jnp.array([[-3.0]]), jnp.array([[2.0]]), spec)
    np.testing.assert_allclose(dequantize(one), -3, rtol=1e-6)


def test_bad_input_is_named():
    x, w = random_layer(samples=5)
    h, spec = hessian_of(x), QuantSpec(granularity="channel", axis=1)
    with pytest.raises(ValueError, match=r"hessian must have shape \(24, 24\), got \(23, 23\)"):
        gptq_quantize(w, h[1:, 1:], spec)
    with pytest.raises(ValueError, match=r"weight must have shape \[in, out\]"):
        gptq_quantize(w[0], h, spec)
    with pytest.raises(TypeError, match="weight must have a floating-point type"):
        gptq_quantize(w.astype(int), h, spec)
    with pytest.raises(TypeError, match="spec must be a QuantSpec, got int"):
        gptq_quantize(w, h, 4)
    with pytest.raises(ValueError, match="axis must name axes"):
        gptq_quantize(w, h, QuantSpec(granularity="channel", axis=2))
    with pytest.raises(ValueError, match=r"damping must be in \[0, inf\), got -1"):
        gptq_quantize(w, h, spec, damping=-1)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="weight must be finite"):
            gptq_quantize(np.where(w == w[2, 1], bad, w), h, spec)
        with pytest.raises(ValueError, match="hessian must be finite"):
            gptq_quantize(w, h.at[0, 0].set(bad), spec)
    with pytest.raises(ValueError, match="hessian must be positive definite with its damping"):
        gptq_quantize(w, -h, spec)
    unknown = jax.jit(lambda w, h: gptq_quantize(w, h, spec))
    assert np.isnan(dequantize(unknown(w, -h))).all()
    assert np.isnan(dequantize(unknown(np.where(w == w[2, 1], np.nan, w), h))[:, 1]).all()
    state = hessian_init(24)
    with pytest.raises(ValueError, match=r"inputs must have shape \[..., 24\], got \(5, 23\)"):
        hessian_update(state, x[:, 1:])
    with pytest.raises(TypeError, match="inputs must have a floating-point type"):
        hessian_update(state, x.astype(int))
    with pytest.raises(ValueError, match="features must be in"):
        hessian_init(0)
