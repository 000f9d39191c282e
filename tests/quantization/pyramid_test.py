import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxref.quantization import (
    QuantSpec,
    beta_amplitude_codebook,
    fake_quantize,
    pyramid_bits_per_weight,
    pyramid_count,
    pyramid_decode,
    pyramid_dequantize,
    pyramid_encode,
    pyramid_project,
    pyramid_quantize,
    pyramid_quantize_hessian,
)
from jaxref.quantization.pyramid import PyramidTensor

KEY = jax.random.key(0)


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pyramid(n, k):
    """All points, by trying every integer vector."""
    every = itertools.product(range(-k, k + 1), repeat=n)
    return np.array([p for p in every if sum(map(abs, p)) == k])


def fischer_order(n, k):
    """All points in the order of the enumeration, from its definition."""
    if n == 0:
        return [()] if k == 0 else []
    heads = [0] + [s * v for v in range(1, k + 1) for s in (1, -1)]
    return [(head, *rest) for head in heads for rest in fischer_order(n - 1, k - abs(head))]


def cosine(x, p):
    p = np.float64(p)
    return (x * p).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(p, axis=-1)


def restored_by_hand(q, size):
    """The kernel of a `PyramidTensor` from its bits, in Python integers and float64."""
    n, k, b = q.group_size, q.pulses, q.amplitude_bits
    width = (pyramid_count(n, k) - 1).bit_length()
    order, levels = fischer_order(n, k), beta_amplitude_codebook(n, size, b)
    w = np.zeros((size, q.shape[1]))
    for j in range(q.shape[1]):
        stream = int.from_bytes(np.asarray(q.codes[j]).tobytes(), "little")
        for start in range(0, size, n):
            point = np.array(order[stream & (2**width - 1)])
            level = levels[(stream >> width) & (2**b - 1)]
            stream >>= width + b
            direction = point / np.linalg.norm(point)
            w[start : start + n, j] = float(q.norms[j]) * level * direction
    return w


class TestNumbers(chex.TestCase):
    def test_counts(self):
        for n, k in itertools.product(range(1, 5), range(4)):
            assert pyramid_count(n, k) == len(pyramid(n, k))
        assert [pyramid_count(*size) for size in ((0, 0), (0, 2), (3, 2), (2, 5))] == [1, 0, 18, 20]
        # the sum over the number i of nonzero entries: places, compositions, signs
        binomial = scipy.special.comb
        expected = sum(
            int(binomial(64, i, exact=True)) * int(binomial(39, i - 1, exact=True)) * 2**i
            for i in range(1, 41)
        )
        assert pyramid_count(64, 40) == expected

    def test_indices_are_those_of_the_enumeration(self):
        for n, k in ((4, 3), (1, 3), (3, 1)):
            points = np.array(fischer_order(n, k))
            codes = pyramid_encode(points, k)
            numbers = [int.from_bytes(code.tobytes(), "little") for code in np.asarray(codes)]
            assert numbers == list(range(len(points)))
            np.testing.assert_array_equal(pyramid_decode(codes, n, k), points)

    def test_indices_of_many_bits(self):
        points = np.asarray(pyramid_project(gaussian(5, 24), 40, refine=False))
        codes = jax.jit(lambda p: pyramid_encode(p, 40))(points)
        assert codes.shape == (5, 10)

        def literal(p, k):
            index = 0
            for i, value in enumerate(map(int, p)):
                before = [0] + [s * v for v in range(1, k + 1) for s in (1, -1)]
                for other in before[: before.index(value)]:
                    index += pyramid_count(len(p) - i - 1, k - abs(other))
                k -= abs(value)
            return index

        for code, point in zip(np.asarray(codes), points):
            assert int.from_bytes(code.tobytes(), "little") == literal(point, 40)
        np.testing.assert_array_equal(jax.jit(lambda c: pyramid_decode(c, 24, 40))(codes), points)

    def test_projection_is_the_nearest_point_and_refined_the_best_direction(self):
        points, x = pyramid(4, 3), gaussian(2000, 4)
        scaled = 3 * x / np.abs(x).sum(-1, keepdims=True)
        nearest = np.argmin(((points[None] - scaled[:, None]) ** 2).sum(-1), -1)
        plain = jax.jit(lambda x: pyramid_project(x, 3, refine=False))(x)
        np.testing.assert_array_equal(plain, points[nearest])
        directions = points / np.linalg.norm(points, axis=-1, keepdims=True)
        best = (x @ directions.T).max(-1) / np.linalg.norm(x, axis=-1)
        refined = jax.jit(lambda x: pyramid_project(x, 3))(x)
        np.testing.assert_allclose(cosine(x, refined), best, rtol=1e-5)
        assert np.mean(cosine(x, plain) < best - 1e-4) > 0.1

    @chex.variants(with_jit=True, without_jit=True)
    def test_bits_are_what_they_say(self):
        w = gaussian(10, 3)
        q = pyramid_quantize(w, pulses=3, group_size=4, amplitude_bits=3, rotate=False)
        expected = restored_by_hand(q, 12)[:10]
        np.testing.assert_allclose(self.variant(pyramid_dequantize)(q), expected, rtol=1e-5)
        # by hand: groups of the padded column, directions and the nearest lengths
        padded = np.pad(w, [(0, 2), (0, 0)]).T.reshape(3, 3, 4)
        points = np.asarray(pyramid_project(padded, 3))
        norms = np.asarray(q.norms, np.float64)
        np.testing.assert_allclose(norms, np.linalg.norm(w, axis=0), rtol=2**-8)
        share = (padded * points).sum(-1) / np.linalg.norm(points, axis=-1) / norms[:, None]
        levels = beta_amplitude_codebook(4, 12, 3)
        chosen = levels[np.abs(share[..., None] - levels).argmin(-1)]
        unit = points / np.linalg.norm(points, axis=-1, keepdims=True)
        by_hand = (norms[:, None] * chosen)[..., None] * unit
        np.testing.assert_allclose(by_hand.reshape(3, 12).T[:10], expected, rtol=1e-5)

    def test_rotation_is_orthogonal_and_undone(self):
        w = gaussian(24, 2)  # blocks of 8
        rotated = pyramid_quantize(w, pulses=12, group_size=4, amplitude_bits=8, key=KEY)
        assert np.mean((pyramid_dequantize(rotated) - w) ** 2) < 0.01
        np.testing.assert_allclose(rotated.norms, np.linalg.norm(w, axis=0), rtol=2**-8)
        assert len(np.unique(np.unpackbits(np.asarray(rotated.signs)))) == 2

    def test_lengths_have_the_least_error_under_their_law(self):
        levels = beta_amplitude_codebook(16, 256, 3)
        draws = np.sqrt(scipy.stats.beta(8, 120).rvs(200_000, random_state=0))
        nearest = np.abs(draws[:, None] - levels).argmin(-1)
        means = [draws[nearest == i].mean() for i in range(8)]
        np.testing.assert_allclose(levels, means, rtol=5e-3)
        quantiles = beta_amplitude_codebook(16, 256, 3, method="quantile")
        np.testing.assert_allclose(
            quantiles, np.quantile(draws, (np.arange(8) + 0.5) / 8), rtol=5e-3
        )
        error = lambda levels: np.mean(np.abs(draws[:, None] - levels).min(-1) ** 2)
        assert error(levels) < 0.95 * error(quantiles)
        np.testing.assert_array_equal(beta_amplitude_codebook(16, 16, 2), 1)

    def test_hessian_version_is_the_literal_feeding_forward(self):
        """Group by group in float64, with the inverse of the Hessian of what is left."""
        w, x = gaussian(12, 2), gaussian(40, 12, seed=1) * np.linspace(0.2, 3, 12)
        hessian = (x.T @ x).astype(np.float32)
        options = {"pulses": 4, "group_size": 4, "amplitude_bits": 4, "rotate": False}
        q = pyramid_quantize_hessian(w, hessian, **options)
        damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(12)
        left, expected = np.float64(w), np.zeros((12, 2))
        levels, norms = beta_amplitude_codebook(4, 12, 4), np.asarray(q.norms, np.float64)
        for start in range(0, 12, 4):
            own = slice(start, start + 4)
            inverse = np.linalg.inv(damped[start:, start:])
            schur = np.linalg.inv(inverse[:4, :4])
            for j in range(2):
                group = left[own, j].copy()
                p = np.float64(pyramid_project(jnp.asarray(group, jnp.float32), 4))
                p /= np.linalg.norm(p)
                length = (group @ schur @ p) / (p @ schur @ p)
                level = levels[np.abs(levels - length / norms[j]).argmin()]
                expected[own, j] = norms[j] * level * p
                error = group - expected[own, j]
                left[start + 4 :, j] -= inverse[4:, :4] @ schur @ error
        np.testing.assert_allclose(pyramid_dequantize(q), expected, rtol=1e-4)


class TestClaims:
    @pytest.mark.claim("pyramid-vector-quantization")
    def test_lengths_obey_the_beta_law_and_2_7_bits_beat_3_uniform_ones(self):
        """The error of Gaussian groups at K = 8, 16, 32, and a kernel with outliers."""
        w = gaussian(256, 96)
        groups = w.T.reshape(96, 16, 16)
        for pulses, expected in ((8, 0.166), (16, 0.053), (32, 0.014)):
            plain = pyramid_project(groups, pulses, refine=False)
            loss = np.sum((groups * np.sin(np.arccos(cosine(groups, plain)))[..., None]) ** 2)
            np.testing.assert_allclose(loss / np.sum(w**2), expected, rtol=0.05)

        planted = w.copy()
        planted[::50] *= 8
        three_bits = QuantSpec(bits=3, granularity="block", axis=0, block_size=128)
        for kernel, times in ((w, 0.75), (planted, 0.2)):
            q = pyramid_quantize(kernel, pulses=16, key=KEY)
            assert 8 * q.nbytes / q.size < 2.72
            ours = np.sum((pyramid_dequantize(q) - kernel) ** 2)
            assert ours < times * np.sum((fake_quantize(kernel, three_bits) - kernel) ** 2)
            assert ours < 0.056 * np.sum(kernel**2)
            blocks = np.float64(kernel.T.reshape(96, 16, 16))
            signs = 1 - 2.0 * np.unpackbits(np.asarray(q.signs))[:, None]
            turned = scipy.linalg.hadamard(256) @ (signs * kernel) / 16
            turned = turned.T.reshape(96, 16, 16)
            law = scipy.stats.beta(16 / 2, (256 - 16) / 2).cdf
            share = lambda x: (np.square(x).sum(-1) / np.square(x).sum((-2, -1))[:, None])[:, 0]
            assert scipy.stats.kstest(share(turned), law).pvalue > 0.01
        assert scipy.stats.kstest(share(blocks), law).pvalue < 1e-3  # outliers, not rotated

    def test_hessian_version_loses_less_of_the_outputs(self):
        w, basis = gaussian(32, 8), np.linalg.qr(gaussian(32, 32, seed=2))[0]
        x = (gaussian(256, 32, seed=1) * np.logspace(-1, 0.5, 32)) @ basis
        loss = lambda q: np.sum((x @ (pyramid_dequantize(q) - w)) ** 2)
        plain = loss(pyramid_quantize(w, pulses=16, key=KEY))
        assert loss(pyramid_quantize_hessian(w, x.T @ x, pulses=16, key=KEY)) < 0.7 * plain


class TestContract:
    def test_storage_is_what_the_formula_says(self):
        for pulses, bits in ((8, 1.8125), (32, 3.5)):
            assert pyramid_bits_per_weight(16, pulses, 4) == bits
            q = jax.eval_shape(
                lambda w, k=pulses: pyramid_quantize(w, pulses=k, key=KEY), gaussian(256, 64)
            )
            signs = 256 / q.size
            expected = pyramid_bits_per_weight(16, pulses, 4, row_size=256) + signs
            np.testing.assert_allclose(8 * q.nbytes / q.size, expected, rtol=1e-6)

    def test_jit_sharding_and_half_precision(self):
        w = gaussian(32, 8)
        quantize = lambda w: pyramid_quantize(w, pulses=16, key=KEY)
        expected = quantize(w)
        mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))
        placed = jax.device_put(w, NamedSharding(mesh, PartitionSpec(None, "tensor")))
        jax.tree.map(np.testing.assert_array_equal, quantize(placed), expected)
        half = quantize(jnp.asarray(w, jnp.bfloat16))
        restored = pyramid_dequantize(half)
        assert restored.dtype == jnp.bfloat16
        assert np.mean((np.float32(restored) - w) ** 2) < 0.1

    @pytest.mark.parametrize("size", [1e37, 1e-30])
    def test_extreme_sizes(self, size):
        w = gaussian(32, 8)
        w = w / np.abs(w).max()
        scaled = (size * w).astype(np.float32)
        restored = np.float64(pyramid_dequantize(pyramid_quantize(scaled, pulses=16, key=KEY)))
        assert np.mean((restored / size - w) ** 2) < 0.1 * np.mean(w**2)

    def test_zeros_constants_and_single_entries(self):
        w = np.zeros((32, 8), np.float32)
        w[:, 1] = 0.7
        restored = pyramid_dequantize(pyramid_quantize(w, pulses=16, key=KEY))
        assert np.all(restored[:, np.arange(8) != 1] == 0)
        assert np.mean((restored - w) ** 2) < 0.15 * np.mean(w**2)
        w = w * 0
        zeros = pyramid_quantize_hessian(w, np.zeros((32, 32), "f"), pulses=16, key=KEY)
        zeros = pyramid_dequantize(zeros)
        assert np.all(zeros == 0)
        one = pyramid_quantize(np.full((1, 1), -0.5, "f"), pulses=1, group_size=1, rotate=False)
        np.testing.assert_array_equal(pyramid_dequantize(one), [[-0.5]])
        np.testing.assert_array_equal(pyramid_project(np.zeros((2, 3), "f"), 5)[0], [5, 0, 0])
        equal = pyramid_project(np.full((4,), 3.0, "f"), 6)
        assert sorted(map(int, equal)) == [1, 1, 2, 2]

    def test_singular_hessians_need_damping(self):
        w, x = gaussian(32, 8), gaussian(4, 32, seed=1)  # fewer samples than inputs
        restored = pyramid_dequantize(pyramid_quantize_hessian(w, x.T @ x, pulses=16, key=KEY))
        assert np.mean((x @ (restored - w)) ** 2) < 0.1 * np.mean((x @ w) ** 2)
        with pytest.raises(ValueError, match="hessian must be positive definite"):
            pyramid_quantize_hessian(
                w, 0 * x.T @ x - np.eye(32, dtype="f"), pulses=4, damping=0.0, key=KEY
            )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pyramid_count(-1, 2), ValueError, "n must be in"),
        (lambda: pyramid_project(np.ones(3, "f"), 0), ValueError, "k must be at least 1"),
        (lambda: pyramid_project(np.ones((2, 0), "f"), 1), ValueError, "at least one entry"),
        (lambda: pyramid_project(np.ones(3, int), 2), TypeError, "x must have a floating-point"),
        (lambda: pyramid_encode(np.ones(3, int), 2), ValueError, "magnitudes that sum to k = 2"),
        (lambda: pyramid_encode(np.ones(3, "f"), 3), TypeError, "p must be integers"),
        (lambda: pyramid_decode(np.ones(3, int), 3, 2), TypeError, "index must be uint8"),
        (lambda: pyramid_decode(np.ones(3, np.uint8), 3, 2), ValueError, "index must have shape"),
        (lambda: beta_amplitude_codebook(16, 8, 4), ValueError, "row_size must be in"),
        (lambda: beta_amplitude_codebook(16, 32, 9), ValueError, "bits must be in"),
        (lambda: beta_amplitude_codebook(16, 32, 4, method="k"), ValueError, "method must be"),
        (lambda: pyramid_bits_per_weight(16, 8, 4, row_size=0), ValueError, "row_size must be"),
        (lambda: pyramid_quantize(gaussian(4, 2), pulses=4), ValueError, "key must be given"),
        (lambda: pyramid_quantize(gaussian(4), pulses=4, key=KEY), ValueError, "w must have shape"),
        (lambda: pyramid_quantize(gaussian(4, 2), pulses=0, key=KEY), ValueError, "pulses must"),
        (lambda: pyramid_quantize(gaussian(4, 2), pulses=1.5, key=KEY), TypeError, "pulses must"),
        (
            lambda: pyramid_quantize(gaussian(4, 2) + np.nan, pulses=4, key=KEY),
            ValueError,
            "w must be finite",
        ),
        (
            lambda: pyramid_quantize_hessian(
                gaussian(4, 2), np.eye(3, dtype="f"), pulses=2, key=KEY
            ),
            ValueError,
            r"hessian must have shape \(4, 4\)",
        ),
        (lambda: pyramid_dequantize(np.ones(2)), TypeError, "q must be a PyramidTensor"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_pyramid_tensor_is_a_pytree():
    q = pyramid_quantize(gaussian(4, 2), pulses=2, group_size=4, key=KEY)
    again = jax.tree.unflatten(jax.tree.structure(q), jax.tree.leaves(q))
    assert isinstance(again, PyramidTensor)
    assert (again.shape, again.size) == ((4, 2), 8)
