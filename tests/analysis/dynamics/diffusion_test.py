import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from sklearn.datasets import load_digits

from jaxref.analysis import fit_ultra_slow_diffusion, weight_distance


class TestWeightDistance:
    def test_is_the_norm_of_the_difference_over_all_leaves(self):
        rng = np.random.default_rng(0)
        trees = [{"a": rng.normal(size=(3, 2)), "b": [rng.normal(size=4)]} for _ in range(2)]
        flat = [np.concatenate([t["a"].ravel(), t["b"][0]]) for t in trees]
        expected = np.linalg.norm(flat[0] - flat[1])
        for distance in (weight_distance, jax.jit(weight_distance)):
            np.testing.assert_allclose(distance(*trees), expected, rtol=1e-6)

    def test_gradient_is_the_direction_and_zero_at_the_start(self):
        w, w_0 = np.float32([3, 1]), np.float32([0, 5])
        np.testing.assert_allclose(jax.grad(weight_distance)(w, w_0), [0.6, -0.8], rtol=1e-6)
        assert weight_distance(w, w) == 0
        np.testing.assert_array_equal(jax.grad(weight_distance)(w, w), 0)

    def test_half_precision_is_summed_in_float32(self):
        w = jnp.full(10_000, 0.1, jnp.bfloat16)
        distance = weight_distance(w, 0 * w)
        assert distance.dtype == jnp.float32
        np.testing.assert_allclose(distance, 100 * w[0].astype(jnp.float32), rtol=1e-5)

    def test_other_trees_raise(self):
        w = {"a": np.ones(2, "f")}
        with pytest.raises(ValueError, match=r"params\['a'\] must have shape \(2,\)"):
            weight_distance({"a": np.ones(3, "f")}, w)
        with pytest.raises(ValueError, match="params must have the tree structure"):
            weight_distance({"b": np.ones(2, "f")}, w)


class TestFit:
    def test_matches_scipy(self):
        rng = np.random.default_rng(0)
        steps = np.unique(np.geomspace(1, 1000, 20).astype(int))
        distances = 0.3 + 2 * np.log(steps) + 0.2 * np.abs(rng.normal(size=steps.size))
        fit = fit_ultra_slow_diffusion(steps, distances)
        expected = scipy.stats.linregress(np.log(steps), distances)
        np.testing.assert_allclose(fit[:2], [expected.slope, expected.intercept], rtol=1e-9)
        np.testing.assert_allclose(fit.r_squared, expected.rvalue**2, rtol=1e-9)

    def test_equal_distances_and_exact_ones(self):
        assert fit_ultra_slow_diffusion([1, 2, 3], [0.1] * 3) == pytest.approx((0, 0.1, 1))
        steps = [2, 20, 200]
        exact = fit_ultra_slow_diffusion(steps, 3 * np.log(steps) + 1)
        assert exact == pytest.approx((3, 1, 1))

    def test_high_rate_descent_drifts_with_the_logarithm_of_the_steps(self):
        """The marked claim is in tests/norms/batch_test.py."""
        digits = load_digits()
        images, labels = digits.data.astype("f") / 16, digits.target
        keys = jax.random.split(jax.random.key(0), 2)
        start = {
            "hidden": jax.random.normal(keys[0], (64, 32)) / 8,
            "head": jax.random.normal(keys[1], (32, 10)) / np.sqrt(32),
        }

        def loss(params, batch):
            logits = jax.nn.relu(jnp.asarray(images)[batch] @ params["hidden"]) @ params["head"]
            targets = jnp.asarray(labels)[batch]
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        def step(params, batch):
            gradients = jax.grad(loss)(params, batch)
            params = jax.tree.map(lambda w, g: w - 0.3 * g, params, gradients)
            return params, weight_distance(params, start)

        batches = np.random.default_rng(1).integers(len(labels), size=(1000, 16))
        _, distances = jax.jit(lambda p: jax.lax.scan(step, p, batches))(start)
        steps = np.unique(np.geomspace(10, 1000, 30).astype(int))  # after the first fall
        distances = np.asarray(distances)[steps - 1]
        in_log = fit_ultra_slow_diffusion(steps, distances)
        in_steps = np.corrcoef(steps, distances)[0, 1] ** 2
        assert in_log.r_squared > 0.98
        assert in_log.r_squared > in_steps + 0.1
        assert in_log.slope > 0

    @pytest.mark.parametrize(
        ("steps", "distances", "message"),
        [
            ([1, 1], [1.0, 2.0], "steps must hold at least two different steps"),
            ([[1, 2]], [[1.0, 2.0]], "steps must hold at least two different steps"),
            ([0, 1], [1.0, 2.0], "steps must be in"),
            ([1, 2], [1.0, -2.0], "distances must be in"),
            ([1, 2], [1.0, float("nan")], "distances must be in"),
            ([1, 2], [1.0, 2.0, 3.0], r"distances must have shape \(2,\)"),
        ],
    )
    def test_bad_input_is_named(self, steps, distances, message):
        with pytest.raises(ValueError, match=message):
            fit_ultra_slow_diffusion(steps, distances)
