import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxref.quantization import (
    DenseAndSparse,
    QuantSpec,
    dequantize,
    fake_quantize,
    post_quantization_integral,
    quantize,
    requant,
    restore_dense_and_sparse,
    select_outliers,
    self_adaptive_outlier_ratios,
    stepwise_significant_detach,
    taylor_sensitivity,
)
from jaxref.quantization.sensitivity import _allocate

TWO_BITS = QuantSpec(bits=2, granularity="channel", axis=1)
FOUR_BITS = QuantSpec(bits=4, granularity="channel", axis=1)


def total(tree):
    return float(sum(jnp.sum(leaf) for leaf in jax.tree.leaves(tree)))


def two_layers(seed=0):
    rng = np.random.default_rng(seed)
    params = {"a": rng.normal(size=(6, 8)) / 2, "b": rng.normal(size=(8, 2)) / 2}
    data = {"x": rng.normal(size=(3, 4, 6)), "y": rng.normal(size=(3, 4, 2))}
    cast = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
    return cast(params), cast(data)


def loss(params, batch):
    return jnp.mean(jnp.square(jnp.tanh(batch["x"] @ params["a"]) @ params["b"] - batch["y"]))


def gradient64(a, b, x, y):
    """Of `loss` over all batches, by hand in float64."""
    x, y = x.reshape(-1, 6), y.reshape(-1, 2)
    hidden = np.tanh(x @ a)
    error = 2 * (hidden @ b - y) / y.size
    return x.T @ (error @ b.T * (1 - hidden**2)), hidden.T @ error


class TestNumbers:
    @pytest.mark.parametrize(("rule", "offset"), [("midpoint", 0.5), ("right", 1.0)])
    def test_integral_is_the_literal_sum_over_the_path(self, rule, offset):
        params, batches = two_layers()
        quantized = jax.tree.map(lambda w: fake_quantize(w, TWO_BITS), params)
        options = {"intervals": 5, "rule": rule, "batches": batches}
        signed = jax.jit(
            lambda w, q: post_quantization_integral(loss, w, q, absolute=False, **options)
        )(params, quantized)
        w = {name: np.float64(leaf) for name, leaf in params.items()}
        change = {name: np.float64(quantized[name]) - w[name] for name in w}
        slope = {"a": 0, "b": 0}
        for n in range(5):
            here = [w[name] + (n + offset) / 5 * change[name] for name in ("a", "b")]
            g = gradient64(*here, np.float64(batches["x"]), np.float64(batches["y"]))
            slope = {"a": slope["a"] + g[0] / 5, "b": slope["b"] + g[1] / 5}
        for name in w:
            expected = slope[name] * change[name]
            np.testing.assert_allclose(signed[name], expected, rtol=2e-4, atol=1e-7)
        magnitudes = post_quantization_integral(loss, params, quantized, **options)
        jax.tree.map(
            lambda m, s: np.testing.assert_allclose(m, np.abs(s), rtol=1e-4, atol=1e-7),
            magnitudes,
            signed,
        )

    def test_taylor_is_the_slope_and_curvature_along_the_change(self):
        params, batches = two_layers()
        quantized = jax.tree.map(lambda w: fake_quantize(w, FOUR_BITS), params)
        w = [np.float64(params[name]) for name in ("a", "b")]
        change = [np.float64(quantized[name]) - old for name, old in zip(("a", "b"), w)]
        data = (np.float64(batches["x"]), np.float64(batches["y"]))
        slope = gradient64(*w, *data)
        h = 1e-5
        ahead, behind = (
            gradient64(*(old + s * d for old, d in zip(w, change)), *data) for s in (h, -h)
        )
        for order in (1, 2):
            ours = taylor_sensitivity(loss, params, quantized, order=order, batches=batches)
            for i, name in enumerate(("a", "b")):
                curvature = (ahead[i] - behind[i]) / (2 * h) if order == 2 else 0
                expected = (slope[i] + 0.5 * curvature) * change[i]
                np.testing.assert_allclose(ours[name], expected, rtol=2e-3, atol=1e-7)

    def test_allocation_is_the_cheapest_of_all(self):
        rng = np.random.default_rng(0)
        counts = np.array([0, 1, 2, 4])[:, None] * np.array([10, 3, 7])
        for _ in range(5):
            costs = np.sort(rng.exponential(size=(4, 3)), axis=0)[::-1]
            chosen = _allocate(costs, counts, 20)
            everything = np.array(np.meshgrid(*[range(4)] * 3)).reshape(3, -1)
            fits = counts[everything, np.arange(3)[:, None]].sum(0) <= 20
            cheapest = costs[everything, np.arange(3)[:, None]].sum(0)[fits].min()
            np.testing.assert_allclose(costs[chosen, range(3)].sum(), cheapest)
            assert counts[chosen, range(3)].sum() <= 20


class TestClaims:
    @pytest.mark.claim("post-quantization-integral")
    def test_sums_to_the_change_and_knows_which_weights_to_put_back(self):
        rng = np.random.default_rng(1)
        curvature = rng.normal(size=(12, 12))
        curvature = (curvature + curvature.T).astype(np.float32)
        quadratic = lambda w: 0.5 * w @ curvature @ w + jnp.sum(w)
        w, q = rng.normal(size=(2, 12)).astype(np.float32)
        for intervals in (1, 3):
            parts = post_quantization_integral(quadratic, w, q, intervals=intervals, absolute=False)
            np.testing.assert_allclose(total(parts), quadratic(q) - quadratic(w), rtol=1e-5)

        # a trained network: 3 bits change its loss far beyond what slope and curvature say
        x = rng.normal(size=(256, 16)).astype(np.float32)
        labels = np.argmax(np.sin(2 * x @ rng.normal(size=(16, 8))) @ rng.normal(size=(8, 4)), -1)
        params = {
            "a": jnp.asarray(rng.normal(size=(16, 48)) / 4, jnp.float32),
            "b": jnp.asarray(rng.normal(size=(48, 4)) / 7, jnp.float32),
        }

        @jax.jit
        def risk(p):
            log_p = jax.nn.log_softmax(jnp.tanh(x @ p["a"]) @ p["b"])
            return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], 1))

        descend = lambda p, _: (jax.tree.map(lambda w, g: w - 0.5 * g, p, jax.grad(risk)(p)), None)
        params = jax.jit(lambda p: jax.lax.scan(descend, p, length=1500)[0])(params)
        quantized = jax.tree.map(lambda w: fake_quantize(w, TWO_BITS), params)
        change = float(risk(quantized) - risk(params))
        signed = {
            n: post_quantization_integral(risk, params, quantized, intervals=n, absolute=False)
            for n in (2, 8, 32)
        }
        error = [abs(total(parts) - change) for parts in signed.values()]
        assert error[1] < error[0] / 6
        assert error[2] < 2e-3 * change
        first, second = (
            taylor_sensitivity(risk, params, quantized, order=order) for order in (1, 2)
        )
        assert abs(total(first)) < 0.01 * change
        assert abs(total(second)) < 0.2 * change

        def with_some_put_back(scores, ratio=0.02):
            kept = select_outliers(scores, ratio)
            return float(risk(jax.tree.map(jnp.where, kept, params, quantized)))

        magnitude = lambda tree: jax.tree.map(jnp.abs, tree)
        ours = with_some_put_back(magnitude(signed[32]))
        noise = jax.tree.map(lambda w: jnp.asarray(rng.uniform(size=w.shape)), params)
        moved = jax.tree.map(jnp.subtract, quantized, params)
        for scores in (magnitude(first), magnitude(moved), noise):
            assert ours < with_some_put_back(scores)
        kept = stepwise_significant_detach(risk, params, quantized, ratio=0.02, steps=4)
        stepwise = float(risk(jax.tree.map(jnp.where, kept, params, quantized)))
        assert stepwise < ours  # which saw only the path to weights that are all quantized


class TestSelection:
    def test_largest_of_the_tree_and_ties_by_index(self):
        scores = {"a": jnp.array([1.0, 2.0, 2.0]), "b": jnp.array([[2.0], [3.0]])}
        kept = select_outliers(scores, 0.6)
        np.testing.assert_array_equal(kept["a"], [False, True, True])
        np.testing.assert_array_equal(kept["b"], [[False], [True]])
        assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(select_outliers(scores, 0)))
        assert all(jnp.all(leaf) for leaf in jax.tree.leaves(select_outliers(scores, 1)))

    def test_each_step_sees_what_the_last_put_back(self):
        # of two weights that do the same, only one is worth putting back
        w, q = jnp.array([1.0, 1.0, 0.5]), jnp.zeros(3)
        fit = lambda w: jnp.square(w[0] + w[1] - 1.0) + 0.2 * jnp.square(w[2] - 0.5)
        kept = stepwise_significant_detach(fit, w, q, ratio=2 / 3, steps=2)
        first = jax.tree.leaves(post_quantization_integral(fit, w, q))[0]
        literal = np.zeros(3, bool)
        for _ in range(2):
            mixed = np.where(literal, w, q).astype(np.float32)
            scores = np.array(post_quantization_integral(fit, w, mixed))
            literal[np.argmax(np.where(literal, -1, scores))] = True
        np.testing.assert_array_equal(kept, literal)
        assert kept.sum() == 2
        # those that change nothing come last, but they come
        all_kept = stepwise_significant_detach(lambda w: w[0], w, q, ratio=1.0, steps=3)
        np.testing.assert_array_equal(all_kept, True)
        np.testing.assert_allclose(
            first, post_quantization_integral(fit, w, q, intervals=1), atol=1e-6
        )


class TestRequant:
    def make(self, quantize_fn=lambda w: quantize(w, FOUR_BITS), **options):
        params, batches = two_layers()
        params["a"] = params["a"].at[2, 3].set(8.0)
        options = {"intervals": 4, "batches": batches, "steps": 2} | options
        return params, batches, requant(loss, params, quantize_fn, **options)

    def test_outliers_leave_the_range_and_significant_weights_come_back(self):
        params, batches, q = self.make(outlier_ratio=1 / 64, significant_ratio=4 / 64)
        everything = lambda p: float(jnp.mean(jax.vmap(lambda b: loss(p, b))(batches)))
        restored = restore_dense_and_sparse(q)
        assert q["a"].sparse.nse + q["b"].sparse.nse == 5
        assert [2, 3] in q["a"].sparse.indices.tolist()
        for name, leaf in q.items():
            index = tuple(np.asarray(leaf.sparse.indices).T)
            np.testing.assert_allclose(restored[name][index], params[name][index], rtol=1e-6)
            np.testing.assert_allclose(
                restored[name], dequantize(leaf.dense) + leaf.sparse.todense(), rtol=1e-6
            )
        column = q["a"].dense.scale[0, 3]
        assert column < 0.3 < quantize(params["a"], FOUR_BITS).scale[0, 3]
        plain = jax.tree.map(lambda w: fake_quantize(w, FOUR_BITS), params)
        gap = lambda p: abs(everything(p) - everything(params))
        assert gap(restored) < 0.5 * gap(plain)
        entry = 4 + 2 * 4
        assert q["a"].nbytes == q["a"].dense.nbytes + entry * q["a"].sparse.nse

    def test_nothing_kept_is_plain_quantization(self):
        params, _, q = self.make(outlier_ratio=0, significant_ratio=0)
        for name, leaf in restore_dense_and_sparse(q).items():
            np.testing.assert_array_equal(leaf, fake_quantize(params[name], FOUR_BITS))
            assert q[name].sparse.nse == 0

    def test_any_quantizer_and_jit(self):
        half = lambda w: jnp.round(4 * w) / 4
        params, _, q = self.make(half, outlier_ratio=0, significant_ratio=1.0)
        assert isinstance(q["a"], DenseAndSparse)
        restored = jax.jit(restore_dense_and_sparse)(q)
        jax.tree.map(lambda x, w: np.testing.assert_allclose(x, w, atol=1e-6), restored, params)

    def test_outliers_go_where_they_matter(self):
        params, batches = two_layers()
        params["b"] = params["b"].at[1, 0].set(6.0)
        ratios = self_adaptive_outlier_ratios(
            loss,
            params,
            lambda w: fake_quantize(w, FOUR_BITS),
            total_ratio=1 / 64,
            candidates=[0.0, 1 / 16],
            intervals=4,
            batches=batches,
        )
        assert ratios == {"a": 0.0, "b": 1 / 16}


class TestContract:
    def test_equal_weights_score_0(self):
        params, batches = two_layers()
        quantized = dict(params, b=fake_quantize(params["b"], TWO_BITS))
        scores = post_quantization_integral(loss, params, quantized, intervals=2, batches=batches)
        assert np.all(scores["a"] == 0)
        assert np.any(scores["b"] > 0)

    def test_half_precision_and_sharded(self):
        w = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
        q = np.round(w)
        integral = jax.jit(
            lambda w, q: post_quantization_integral(lambda w: jnp.sum(w**4), w, q, intervals=2)
        )
        half = integral(jnp.asarray(w, jnp.bfloat16), jnp.asarray(q, jnp.bfloat16))
        assert half.dtype == jnp.float32
        np.testing.assert_allclose(
            half, integral(jnp.asarray(w, jnp.bfloat16).astype("f"), q), rtol=1e-6
        )
        mesh = jax.make_mesh((8,), ("data",))
        placed = jax.device_put(w, NamedSharding(mesh, PartitionSpec("data")))
        np.testing.assert_allclose(integral(placed, q), integral(w, q), rtol=1e-6)


ONES = np.ones(3, "f")
SQUARE = lambda w: jnp.sum(w**2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: taylor_sensitivity(SQUARE, ONES, ONES, order=3), ValueError, "order must be"),
        (lambda: taylor_sensitivity(SQUARE, ONES, ONES[:2]), ValueError, "w_quantized must have"),
        (
            lambda: post_quantization_integral(SQUARE, ONES, ONES, intervals=0),
            ValueError,
            "intervals must be an integer of at least 1",
        ),
        (
            lambda: post_quantization_integral(SQUARE, ONES, ONES, rule="left"),
            ValueError,
            "rule must be",
        ),
        (
            lambda: post_quantization_integral(SQUARE, np.ones(3, int), ONES),
            TypeError,
            "w must have a floating-point type",
        ),
        (lambda: select_outliers(ONES, 1.5), ValueError, "ratio must be in"),
        (
            lambda: stepwise_significant_detach(SQUARE, ONES, ONES, ratio=0.5, steps=0),
            ValueError,
            "steps must be",
        ),
        (
            lambda: self_adaptive_outlier_ratios(
                SQUARE, ONES, jnp.round, total_ratio=0.1, candidates=[0.2]
            ),
            ValueError,
            "candidates must have a ratio of at most",
        ),
        (lambda: requant(SQUARE, ONES, jnp.round, outlier_ratio=2.0), ValueError, "outlier_ratio"),
        (lambda: requant(SQUARE, np.ones(3, int), jnp.round), TypeError, "params must have"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
