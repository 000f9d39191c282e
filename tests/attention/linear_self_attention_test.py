import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads
from sklearn.linear_model import Ridge

from jaxref.attention import (
    gradient_descent_attention_weights,
    linear_self_attention,
    one_step_gradient_descent_predictor,
    optimal_in_context_step_size,
    ridge_predictor,
)
from jaxref.data import linear_regression_prompts

COVARIANCE = np.array([[1.5, 0.5], [0.5, 0.5]], "f")


def random_layer(size=4, key_size=3, tokens=6, batch=2, seed=0):
    """Tokens, W_Q, W_K and W_V."""
    rng = np.random.default_rng(seed)
    shapes = ((batch, tokens, size), (key_size, size), (key_size, size), (size, size))
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def linear_self_attention64(tokens, w_query, w_key, w_value, mask_query):
    """The paper's sum over matrices, token by token, in float64."""
    tokens, w_query, w_key, w_value = (
        np.asarray(x, np.float64) for x in (tokens, w_query, w_key, w_value)
    )
    output = tokens[:, -1].copy()
    for b, example in enumerate(tokens):
        for v in example[:-1] if mask_query else example:
            output[b] += w_value @ v * (v @ w_key.T @ w_query @ example[-1])
    return output


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_layer_matches_the_formula(self):
        layer = random_layer()
        for mask_query in (True, False):
            attend = self.variant(lambda *a, m=mask_query: linear_self_attention(*a, mask_query=m))
            expected = linear_self_attention64(*layer, mask_query)
            np.testing.assert_allclose(attend(*layer), expected, rtol=1e-4, atol=1e-4)

    def test_gradients_against_finite_differences(self):
        with jax.enable_x64(True):
            layer = [x.astype(np.float64) for x in random_layer(3, 2, 3, 1)]
            check_grads(jax.jit(linear_self_attention), layer, order=2, modes=["rev"])
            x, y, query = layer[0][:, :, :2], layer[0][:, :, 2], layer[0][:, 0, :2]
            predict = jax.jit(one_step_gradient_descent_predictor)
            check_grads(predict, (x, y, query, 0.1, np.eye(2) + 0.1), order=1, modes=["rev"])
            check_grads(jax.jit(ridge_predictor), (x, y, query, 0.5), order=1, modes=["rev"])

    def test_one_step_is_a_gradient_step(self):
        prompts = linear_regression_prompts(jax.random.key(0), 3, 5, 2, noise_variance=0.1)
        m = np.random.default_rng(0).normal(size=(2, 2)).astype("f")
        loss = lambda w, x, y: jnp.sum((x @ w - y) ** 2) / 2
        for i in range(3):
            x, y = prompts.x[i], prompts.y[i]
            w = -0.1 * jax.grad(loss)(jnp.zeros(2), x, y)
            for preconditioner, direction in ((None, np.eye(2)), (m, m)):
                ours = one_step_gradient_descent_predictor(
                    x, y, prompts.x_query[i], 0.1, preconditioner
                )
                expected = w @ direction @ prompts.x_query[i]
                np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)

    def test_ridge_matches_sklearn_and_the_least_norm_fit(self):
        for examples in (2, 6):
            prompts = linear_regression_prompts(
                jax.random.key(1), 2, examples, 4, noise_variance=0.1
            )
            ours = ridge_predictor(prompts.x, prompts.y, prompts.x_query, 0.7)
            plain = ridge_predictor(prompts.x, prompts.y, prompts.x_query, 0.0)
            for i in range(2):
                x, y, query = (
                    np.asarray(a[i], np.float64) for a in (prompts.x, prompts.y, prompts.x_query)
                )
                fit = Ridge(alpha=0.7, fit_intercept=False).fit(x, y)
                np.testing.assert_allclose(ours[i], fit.coef_ @ query, rtol=1e-4, atol=1e-5)
                least = np.linalg.lstsq(x, y, rcond=None)[0]
                np.testing.assert_allclose(plain[i], least @ query, rtol=1e-3, atol=1e-4)


def optimum_of_samples(prompts, preconditioner=None):
    """The step size with the least mean square error to the noiseless target, and that error."""
    unit = one_step_gradient_descent_predictor(
        prompts.x, prompts.y, prompts.x_query, 1.0, preconditioner
    )
    target = jnp.sum(prompts.weights * prompts.x_query, axis=-1)
    step = jnp.mean(unit * target) / jnp.mean(unit**2)
    return float(step), float(jnp.mean((step * unit - target) ** 2))


class TestClaims:
    @pytest.mark.claim("linear-self-attention-gradient-descent")
    def test_trained_attention_is_one_step_of_the_best_gradient_descent(self):
        """The constructed layer is the step exactly, its best size is 1/(n + d + 1 + σ²), and
        training from random weights finds both, preconditioned by the inverse covariance."""
        n, d, noise = 8, 2, 0.5
        step = optimal_in_context_step_size(n, d, noise)
        least = d - n * d * step
        for covariance in (None, COVARIANCE):
            precision = None if covariance is None else np.linalg.inv(covariance)
            options = {"noise_variance": noise, "covariance": covariance}
            prompts = linear_regression_prompts(jax.random.key(0), 50_000, n, d, **options)
            *weights, readout = gradient_descent_attention_weights(d, step, precision)
            attended = linear_self_attention(prompts.tokens, *weights) @ readout
            descended = one_step_gradient_descent_predictor(
                prompts.x, prompts.y, prompts.x_query, step, precision
            )
            np.testing.assert_allclose(attended, descended, rtol=1e-4, atol=1e-5)
            best, error = optimum_of_samples(prompts, precision)
            np.testing.assert_allclose(best, step, rtol=0.02)
            np.testing.assert_allclose(error, least, rtol=0.05)

            def loss(parameters, key, options=options):
                batch = linear_regression_prompts(key, 512, n, d, **options)
                *layer, readout = parameters
                prediction = linear_self_attention(batch.tokens, *layer) @ readout
                return jnp.mean((prediction - batch.y_query) ** 2)

            optimizer = optax.adam(optax.cosine_decay_schedule(0.04, 250))

            def train_step(carry, key, loss=loss, optimizer=optimizer):
                parameters, state = carry
                updates, state = optimizer.update(jax.grad(loss)(parameters, key), state)
                return (optax.apply_updates(parameters, updates), state), None

            rng = np.random.default_rng(0)
            shapes = ((d + 1, d + 1),) * 3 + ((d + 1,),)
            start = [jnp.asarray(0.3 * rng.normal(size=s), jnp.float32) for s in shapes]
            keys = jax.random.split(jax.random.key(1), 250)
            (trained, _), _ = jax.jit(
                lambda start, train_step=train_step: jax.lax.scan(
                    train_step, (start, optimizer.init(start)), keys
                )
            )(start)
            *layer, readout = trained
            prediction = linear_self_attention(prompts.tokens, *layer) @ readout
            reached = float(jnp.mean((prediction - prompts.y_query) ** 2))
            assert reached < 1.03 * (least + noise)
            learnt = (layer[1].T @ layer[0] * (readout @ layer[2])[-1])[:d, :d]
            expected = step * (np.eye(d) if precision is None else precision)
            np.testing.assert_allclose(learnt, expected, atol=0.15 * np.abs(expected).max())

    def test_known_optima(self):
        np.testing.assert_allclose(optimal_in_context_step_size(10, 4), 1 / 15, rtol=1e-6)
        np.testing.assert_allclose(optimal_in_context_step_size(10, 4, 0.5), 1 / 15.5, rtol=1e-6)

    def test_nonlinear_targets_only_change_the_step(self):
        prompts = linear_regression_prompts(
            jax.random.key(2), 100_000, 8, 2, nonlinearity=lambda t: t + jnp.sin(3 * t)
        )
        moment = jnp.einsum("bn,bnd->bd", prompts.y, prompts.x)
        # The best M of all: E[x_q x_qᵀ]-weighted least squares of y_q on the outer products.
        outer = jnp.einsum("bd,be->bde", moment, prompts.x_query).reshape(-1, 4)
        best = np.linalg.lstsq(outer, prompts.y_query, rcond=None)[0].reshape(2, 2)
        np.testing.assert_allclose(best, best[0, 0] * np.eye(2), atol=0.05 * best[0, 0])

    def test_ridge_is_better_than_any_step(self):
        prompts = linear_regression_prompts(jax.random.key(3), 4_000, 8, 2, noise_variance=0.5)
        ridge = jax.jit(ridge_predictor)(prompts.x, prompts.y, prompts.x_query, 0.5)
        target = jnp.sum(prompts.weights * prompts.x_query, axis=-1)
        assert jnp.mean((ridge - target) ** 2) < 0.7 * optimum_of_samples(prompts)[1]


class TestTransformationsAndEdges:
    def test_vmap_and_sharded_batch(self):
        tokens, *weights = random_layer(batch=8)
        attend = jax.jit(lambda t: linear_self_attention(t, *weights))
        expected = attend(tokens)
        np.testing.assert_allclose(jax.vmap(attend)(tokens), expected, rtol=1e-5, atol=1e-5)
        sharding = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
        ours = attend(jax.device_put(tokens, sharding))
        assert ours.sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)

    def test_extreme_inputs_and_half_precision(self):
        tokens, *weights = random_layer()
        assert np.all(np.isfinite(linear_self_attention(1e4 * tokens, *weights)))
        for dtype in (jnp.bfloat16, jnp.float16):
            half = jnp.asarray(tokens, dtype)
            ours = linear_self_attention(half, *weights)
            assert ours.dtype == dtype
            exact = linear_self_attention(half.astype(jnp.float32), *weights)
            np.testing.assert_array_equal(ours, exact.astype(dtype))
        x, y = np.ones((1, 3, 2), "f"), np.ones((1, 3), "f")  # equal examples
        for variance, expected in ((0.0, 1.0), (1e-3, 1.0)):
            ours = ridge_predictor(x, y, x[:, 0], variance)
            np.testing.assert_allclose(ours, expected, rtol=1e-3)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({0: np.ones((2, 1, 4), "f")}, ValueError, "tokens must have shape"),
            ({0: np.ones((2, 6, 4), int)}, TypeError, "tokens must have a floating-point"),
            ({1: np.ones((3, 5), "f")}, ValueError, r"w_query must have shape \(3, 4\)"),
            ({1: np.ones(4, "f")}, ValueError, r"w_query must have shape \[key_size"),
            ({2: np.ones((2, 4), "f")}, ValueError, r"w_key must have shape \(3, 4\)"),
            ({3: np.ones((3, 4), "f")}, ValueError, r"w_value must have shape \(4, 4\)"),
        ],
    )
    def test_bad_layers_are_named(self, change, error, message):
        arguments = dict(enumerate(random_layer())) | change
        with pytest.raises(error, match=message):
            linear_self_attention(*arguments.values())

    def test_bad_prompts_are_named(self):
        x, y, query = np.ones((2, 3, 4), "f"), np.ones((2, 3), "f"), np.ones((2, 4), "f")
        with pytest.raises(ValueError, match="x must have shape"):
            ridge_predictor(x[:, :0], y[:, :0], query, 1.0)
        with pytest.raises(ValueError, match=r"y must have shape \(2, 3\)"):
            ridge_predictor(x, y[:1], query, 1.0)
        with pytest.raises(ValueError, match=r"x_query must have shape \(2, 4\)"):
            one_step_gradient_descent_predictor(x, y, query[0], 1.0)
        with pytest.raises(ValueError, match="noise_variance must be in"):
            ridge_predictor(x, y, query, -1.0)
        with pytest.raises(ValueError, match=r"preconditioner must have shape \(4, 4\)"):
            one_step_gradient_descent_predictor(x, y, query, 1.0, np.eye(3, dtype="f"))
        with pytest.raises(ValueError, match=r"preconditioner must have shape \(2, 2\)"):
            gradient_descent_attention_weights(2, 1.0, np.eye(3, dtype="f"))
        with pytest.raises(ValueError, match="num_examples must be in"):
            optimal_in_context_step_size(0, 4)
