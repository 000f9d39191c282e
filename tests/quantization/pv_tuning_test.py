import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxref.quantization import (
    CodebookWeight,
    codebook_dequantize,
    codebook_quantize,
    dequantize_codebooks,
    nearest_codes,
    pv_exact,
    pv_tuning,
    pv_v_step,
)

TORCH = np.load(Path(__file__).parents[1] / "oracles" / "pv_tuning.npz")
KEY = jax.random.key(0)


def from_torch(codes, codebooks, scales):
    """The authors' layout, outputs first, in ours."""
    codebooks = codebooks.reshape(*codebooks.shape[:2], -1)
    return CodebookWeight(np.swapaxes(codes, 0, 1), codebooks, scales.reshape(1, -1))


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def quadratic(d, seed):
    """phi = ½ (x - x*)ᵀ A (x - x*), and A and x*."""
    rng = np.random.default_rng(seed)
    root, optimum = rng.normal(size=(d, d)), rng.normal(size=d)
    curvature = (root @ root.T / d + 0.1 * np.eye(d)).astype(np.float32)
    optimum = optimum.astype(np.float32)
    return (lambda x: 0.5 * (x - optimum) @ curvature @ (x - optimum)), curvature, optimum


class TestNumbers:
    @pytest.mark.parametrize(
        ("case", "options"),
        [
            ("beam", {"max_code_change": 1.0}),
            ("greedy", {"max_code_change": 1.0, "beam_size": 1}),
            ("limited", {"max_code_change": 0.2}),
            ("trusted", {"max_code_change": 0.5, "trust_ratio": 0.3}),
            ("forced", {"max_code_change": 0.3, "force_update": True}),
        ],
    )
    def test_search_matches_the_authors(self, case, options):
        weight = from_torch(TORCH["codes"], TORCH["codebooks"], TORCH["scales"])
        target = TORCH["target"].T
        ours = pv_v_step(*weight, target, **options)
        assert ours.dtype == jnp.int32
        np.testing.assert_array_equal(ours.swapaxes(0, 1), TORCH[case])
        if "trust_ratio" not in options and not options.get("force_update"):
            everywhere = nearest_codes(
                target, *weight[1:], codes=weight.codes, beam_size=options.get("beam_size", 5)
            )
            changed = np.any(ours != weight.codes, axis=-1)
            np.testing.assert_array_equal(ours[changed], everywhere[changed])

    @pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
    def test_steps_match_the_authors(self, decay):
        params = from_torch(*(TORCH[f"start_{part}"] for part in ("codes", "codebooks", "scales")))
        params = jax.tree.map(jnp.asarray, params)
        tuner = pv_tuning(
            0.03, code_learning_rate=0.6, max_code_change=1.0, delta_decay=decay, beam_size=1
        )
        loss = lambda w: jnp.mean(jnp.square(TORCH["x"] @ w - TORCH["y"]))

        def step(carry, _):
            params, state = carry
            gradient = jax.grad(loss)(dequantize_codebooks(params))
            return tuner.update(gradient, state, params), None

        start = (params, tuner.init(params))
        (ours, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=4))(start)
        peer = from_torch(
            *(TORCH[f"end_{part}_{decay}"] for part in ("codes", "codebooks", "scales"))
        )
        assert np.any(ours.codes != params.codes)
        np.testing.assert_array_equal(ours.codes, peer.codes)
        np.testing.assert_allclose(ours.codebooks, peer.codebooks, rtol=2e-4, atol=1e-5)
        np.testing.assert_allclose(ours.scales, peer.scales, rtol=2e-4)
        if decay == 1:
            np.testing.assert_allclose(state.buffers[0], codebook_dequantize(*ours), rtol=1e-6)

    def test_kernel_is_the_sum_over_codebooks_group_by_group(self):
        codes = np.random.default_rng(0).integers(0, 4, size=(3, 5, 2))
        books, scales = gaussian(2, 4, 2), gaussian(3, 5, seed=1)
        expected = np.zeros((6, 5))
        for i, j in np.ndindex(3, 5):
            group = sum(np.float64(books[m, codes[i, j, m]]) for m in range(2))
            expected[2 * i : 2 * i + 2, j] = scales[i, j] * group
        np.testing.assert_allclose(codebook_dequantize(codes, books, scales), expected, rtol=1e-5)
        restored = dequantize_codebooks({"w": CodebookWeight(codes, books), "b": gaussian(5)})
        np.testing.assert_allclose(
            restored["w"] * np.repeat(scales, 2, axis=0), expected, rtol=1e-5, atol=1e-6
        )
        np.testing.assert_array_equal(restored["b"], gaussian(5))

    def test_a_beam_as_wide_as_the_codebook_is_exact(self):
        target, books = gaussian(4, 6), gaussian(2, 3, 2, seed=1)
        codes = nearest_codes(target, books, beam_size=3)
        groups = target.reshape(2, 2, 6).swapaxes(1, 2)
        errors = [
            np.sum((groups - books[0, i] - books[1, j]) ** 2, -1)
            for i, j in itertools.product(range(3), repeat=2)
        ]
        best = np.min(errors, axis=0)
        ours = np.sum((groups - books[0][codes[..., 0]] - books[1][codes[..., 1]]) ** 2, -1)
        np.testing.assert_allclose(ours, best, rtol=1e-5)
        # forced from there, each group takes the second best
        forced = pv_v_step(
            codes, books, None, target, max_code_change=1.0, force_update=True, beam_size=3
        )
        assert np.all(np.any(forced != codes, axis=-1))
        ours = np.sum((groups - books[0][forced[..., 0]] - books[1][forced[..., 1]]) ** 2, -1)
        np.testing.assert_allclose(ours, np.sort(errors, axis=0)[1], rtol=1e-5)

    def test_k_means_beats_its_start_and_more_codebooks_fit_better(self):
        w = gaussian(32, 8)
        loss = lambda q: float(jnp.mean(jnp.square(codebook_dequantize(*q) - w)))
        options = {"codebook_size": 8, "group_size": 2, "key": KEY}
        one = codebook_quantize(w, **options)
        assert loss(one) < 0.8 * loss(codebook_quantize(w, iterations=0, **options))
        assert loss(codebook_quantize(w, num_codebooks=2, **options)) < 0.5 * loss(one)
        np.testing.assert_allclose(one.scales[0], np.linalg.norm(w, axis=0), rtol=1e-5)
        # 128 codes of 3 bits, and 16 and 8 values of 32
        assert one.bits_per_weight == (128 * 3 + 24 * 32) / 256
        # Lloyd's fixed point: each entry is the mean of its groups
        settled = codebook_quantize(w, iterations=60, **options)
        groups = (w / settled.scales).reshape(16, 2, 8).swapaxes(1, 2).reshape(-1, 2)
        codes = np.asarray(settled.codes).ravel()
        means = [groups[codes == k].mean(0) for k in range(8)]
        np.testing.assert_allclose(settled.codebooks[0], means, rtol=1e-4, atol=1e-6)


class TestClaims:
    @pytest.mark.claim("pv-tuning")
    def test_never_ascends_and_moves_where_small_steps_round_back(self):
        """The exact algorithm beside brute force, and V steps of one weight beside one of all."""
        optima = []
        for seed, values in ((0, 2), (1, 3)):
            phi, curvature, optimum = quadratic(6, seed)
            levels = np.linspace(-1, 1, values).astype(np.float32)
            trace = pv_exact(phi, np.resize(levels, 6), values, steps=6)
            assert np.all(np.diff(trace.losses) <= 1e-6)
            assert trace.losses[-1] < 0.5 * trace.losses[0]
            assert trace.losses[-1] == trace.losses[-3]  # neither step improves it
            assert len(np.unique(trace.x)) <= values
            best = np.inf
            for codes in itertools.product(range(values), repeat=6):
                shares = np.eye(values)[list(codes)]
                fit = np.linalg.lstsq(
                    shares.T @ curvature @ shares, shares.T @ curvature @ optimum, rcond=None
                )[0]
                best = min(best, float(phi(np.float32(shares @ fit))))
            assert trace.losses[-1] > best - 1e-5
            optima.append(trace.losses[-1] < best + 1e-5)
        assert any(optima)

        # one steep direction bounds the step of all: 1/L rounds back to where each weight was
        scale = np.array([1.0, 30.0, 1.0, 1.0], np.float32)[:, None]
        optimum = np.array([0.9, 0.02, 0.1, 0.8], np.float32)[:, None]
        phi = lambda w: 0.5 * jnp.sum(scale * jnp.square(w - optimum))
        codes, book = jnp.zeros((4, 1, 1), int), jnp.array([[[0.0], [1.0]]])
        slope = jax.grad(phi)(codebook_dequantize(codes, book))
        stalled = pv_v_step(codes, book, None, -slope / 30, max_code_change=1.0)
        np.testing.assert_array_equal(stalled, codes)
        before = phi(codebook_dequantize(codes, book))
        for _ in range(3):  # of one weight, by its own curvature
            kernel = codebook_dequantize(codes, book)
            target = kernel - jax.grad(phi)(kernel) / scale
            codes = pv_v_step(codes, book, None, target, max_code_change=0.25)
            after = phi(codebook_dequantize(codes, book))
            assert after <= before
            before = after
        np.testing.assert_array_equal(codes.ravel(), [1, 0, 0, 1])


class TestContract:
    def test_a_tree_with_plain_and_coded_weights(self):
        x, w = gaussian(16, 8), gaussian(8, 4, seed=1)
        params = {
            "w": codebook_quantize(w, codebook_size=12, group_size=2, key=KEY),
            "bias": jnp.zeros(4),
        }
        tuner = pv_tuning(
            optax.constant_schedule(0.01), code_learning_rate=0.4, max_code_change=0.1
        )
        loss = lambda p: jnp.mean(jnp.square(x @ p["w"] + p["bias"] - 1))

        @jax.jit
        def step(params, state):
            value, gradient = jax.value_and_grad(loss)(dequantize_codebooks(params))
            return *tuner.update(gradient, state, params), value

        state, values = tuner.init(params), []
        gradient = jax.grad(loss)(dequantize_codebooks(params))
        after, *_ = step(params, state)
        adam = optax.adam(0.01, b1=0.9, b2=0.95, eps=1e-6)
        change, _ = adam.update(gradient["bias"], adam.init(params["bias"]))
        np.testing.assert_allclose(after["bias"], change, rtol=1e-5)
        moved = np.count_nonzero(np.any(after["w"].codes != params["w"].codes, axis=-1))
        assert 0 < moved <= 2  # a tenth of 16, rounded up
        for _ in range(60):
            params, state, value = step(params, state)
            values.append(float(value))
        assert np.mean(values[-10:]) < 0.8 * values[0]
        with pytest.raises(ValueError, match="gradients must be with respect to"):
            tuner.update({"w": gradient["w"]}, state, params)

    def test_half_precision_zero_columns_and_few_groups(self):
        w = jnp.asarray(gaussian(4, 3), jnp.bfloat16).at[:, 1].set(0)
        q = codebook_quantize(w, codebook_size=32, group_size=2, key=KEY)  # of 6 groups
        restored = codebook_dequantize(*q)
        assert restored.dtype == q.scales.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(restored), np.float32(w), atol=0.02)
        tuner = pv_tuning()
        params, state = tuner.update(jnp.ones_like(w), tuner.init(q), q)
        assert state.buffers[0].dtype == jnp.float32
        assert np.all(np.isfinite(np.float32(codebook_dequantize(*params))))
        one = codebook_quantize(np.full((1, 1), 2.0, "f"), codebook_size=2, group_size=1, key=KEY)
        np.testing.assert_array_equal(codebook_dequantize(*one), [[2.0]])


CODES, BOOK, TARGET = np.zeros((2, 3, 1), int), gaussian(1, 4, 2), gaussian(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: codebook_dequantize(CODES + 4, BOOK), ValueError, r"codes must be in \[0, 3\]"),
        (lambda: codebook_dequantize(CODES * 1.0, BOOK), TypeError, "codes must be integers"),
        (lambda: codebook_dequantize(CODES[..., 0], BOOK), ValueError, "codes must have shape"),
        (lambda: codebook_dequantize(CODES, BOOK[0]), ValueError, "codebooks must have shape"),
        (lambda: codebook_dequantize(CODES, BOOK, np.ones(2, "f")), ValueError, "scales must br"),
        (lambda: nearest_codes(gaussian(5, 3), BOOK), ValueError, "target must have shape"),
        (lambda: nearest_codes(TARGET, BOOK, beam_size=0), ValueError, "beam_size must be"),
        (
            lambda: pv_v_step(CODES, BOOK, None, TARGET, max_code_change=0.0),
            ValueError,
            r"max_code_change must be in \(0, 1\]",
        ),
        (
            lambda: pv_v_step(CODES, BOOK, None, TARGET, trust_ratio=0.0),
            ValueError,
            "trust_ratio must be",
        ),
        (lambda: pv_v_step(CODES, BOOK, None, TARGET[:2]), ValueError, "codes must have shape"),
        (lambda: pv_tuning(delta_decay=1.5), ValueError, "delta_decay must be in"),
        (lambda: pv_tuning(code_b2=1.0), ValueError, "code_b2 must be in"),
        (lambda: pv_tuning(-1.0), ValueError, "learning_rate must be in"),
        (lambda: pv_exact(jnp.sum, np.arange(3.0), 2, 1), ValueError, "at most 2 distinct values"),
        (lambda: pv_exact(jnp.sum, np.zeros(30), 4, 1), ValueError, "at most 2"),
        (
            lambda: codebook_quantize(TARGET, codebook_size=4, group_size=3, key=KEY),
            ValueError,
            "group_size = 3 dividing in",
        ),
        (
            lambda: codebook_quantize(TARGET, codebook_size=1, group_size=1, key=KEY),
            ValueError,
            "codebook_size must be",
        ),
        (
            lambda: codebook_quantize(TARGET * np.inf, codebook_size=4, group_size=2, key=KEY),
            ValueError,
            "w must be finite",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
