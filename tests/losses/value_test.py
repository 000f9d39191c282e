from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import norm

from jaxref import losses
from jaxref.losses import HLGauss

PEER = np.load(Path(__file__).parents[1] / "oracles" / "value_learning.npz")
LOSSES = {
    "hl_gauss": losses.hl_gauss_loss,
    "two_hot": losses.two_hot_loss,
    "categorical": lambda f, y, **keywords: losses.categorical_distributional_loss(
        f, jnp.eye(f.shape[-1])[:1].repeat(len(f), 0), y, 0.0, **keywords
    ),
}


@partial(jax.jit, static_argnames=("name",))
def value_and_gradient(logits, values, where=True, *, name, low=-10.0, high=10.0, **keywords):
    def loss(f):
        return LOSSES[name](f, values, min_value=low, max_value=high, where=where, **keywords)

    found, vjp = jax.vjp(loss, logits)
    return found, vjp(jnp.ones_like(found))[0]


def softmax64(z):
    e = np.exp(np.float64(z) - np.max(z, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class TestNumbers:
    @pytest.mark.parametrize("ratio", [0.75, 2.0])
    def test_hl_gauss_matches_its_package(self, ratio):
        found, gradient = value_and_gradient(
            PEER["logits"], PEER["values"], name="hl_gauss", smoothing_ratio=ratio
        )
        np.testing.assert_allclose(found, PEER[f"hl_gauss_{ratio}"], rtol=1e-5)
        expected = PEER[f"hl_gauss_{ratio}_grad"]
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=2e-6)

    def test_histograms_match_scipy_beyond_the_range_too(self):
        values = np.float32([-0.3, 1.0, 2.5, 7.0, -np.inf, 0.5])
        edges, sigma = np.linspace(-1, 3, 9), 1.5 * 0.5
        y = np.clip(np.float64(values), -1, 3)[:, None]
        mass = np.diff(norm.cdf((edges - y) / sigma))
        support = HLGauss(-1.0, 3.0, bins=8, smoothing_ratio=1.5)
        p = jax.jit(support.encode)(values)
        np.testing.assert_allclose(p, mass / mass.sum(-1, keepdims=True), atol=1e-6)
        np.testing.assert_allclose(support.edges, edges, rtol=1e-6)
        np.testing.assert_allclose(support.centers, (edges[1:] + edges[:-1]) / 2, atol=1e-6)
        np.testing.assert_allclose(support.decode(p), p @ support.centers, rtol=1e-5)

    def test_two_atoms_and_the_projection_match_rlax(self):
        atoms, scalars = PEER["atoms"], PEER["scalars"]
        p = jax.jit(losses.two_hot_encode)(scalars, atoms)
        np.testing.assert_allclose(p, PEER["two_hot"], atol=1e-6)
        np.testing.assert_allclose(
            losses.two_hot_decode(p, atoms), np.clip(scalars, -2, 4), rtol=1e-6
        )
        transition = PEER["next_probs"], PEER["rewards"], PEER["discounts"]
        project = partial(losses.categorical_td_targets, min_value=-2.0, max_value=2.0)
        np.testing.assert_allclose(jax.jit(project)(*transition), PEER["projected"], atol=1e-6)

    def test_cross_entropies_of_the_encodings(self):
        logits, values = PEER["logits"], PEER["values"]
        log_p = np.log(softmax64(logits))
        atoms = np.linspace(-10, 10, 51, dtype="f")
        hot = jax.jit(losses.two_hot_encode)(values, atoms)
        for name in ("two_hot", "categorical"):  # with γ = 0, the return is the reward
            found, gradient = value_and_gradient(logits, values, name=name)
            np.testing.assert_allclose(found, -np.sum(hot * log_p, -1), rtol=1e-5)
            np.testing.assert_allclose(gradient, np.exp(log_p) - hot, atol=1e-5)


class TestClaims:
    @pytest.mark.claim("hl-gauss-value-classification")
    def test_classes_hold_numbers_and_bound_gradients_under_noise_that_sweeps_a_regression_away(
        self,
    ):
        """Encoding and back; gradients of any target; and two small networks, trained alike on a
        sine with noise of Student's t of 1.1 degrees of freedom, whose tails the range cuts."""
        y = np.linspace(-8, 8, 401, dtype="f")
        atoms = np.linspace(-10, 10, 51, dtype="f")
        smooth, sharp = HLGauss(-10.0, 10.0), HLGauss(-10.0, 10.0, smoothing_ratio=0.25)

        @jax.jit
        def there_and_back(y):
            two_hot = losses.two_hot_decode(losses.two_hot_encode(y, atoms), atoms)
            p = smooth.encode(y)
            return two_hot, p.sum(-1), smooth.decode(p), sharp.decode(sharp.encode(y))

        exact, mass, close, off = there_and_back(y)
        np.testing.assert_allclose(exact, y, atol=2e-6)
        np.testing.assert_allclose(mass, 1, atol=1e-6)
        np.testing.assert_allclose(close, y, atol=1e-5)
        np.testing.assert_allclose(np.abs(off - y).max(), 0.036, atol=2e-3)

        for scale in (1.0, 1e4):
            _, gradient = value_and_gradient(
                PEER["logits"],
                scale * PEER["values"],
                name="hl_gauss",
                low=-10 * scale,
                high=10 * scale,
            )
            assert np.all(np.linalg.norm(gradient, axis=-1) <= np.sqrt(2))

        rng = np.random.default_rng(0)
        x = rng.uniform(-1, 1, size=(128, 1)).astype("f")
        clean = 3 * np.sin(3 * x[:, 0])
        noisy = (clean + rng.standard_t(1.1, size=128)).astype("f")
        hidden = [np.float32(3 * rng.normal(size=(1, 16))), np.float32(rng.normal(size=16))]

        def train(loss, read, outputs):
            def predict(params, x):
                return jnp.tanh(x @ params[0] + params[1]) @ params[2]

            optimizer = optax.adam(0.05)
            params = [*hidden, np.zeros((16, outputs), "f")]

            @jax.jit
            def fit(params, x, noisy):
                def step(carry, _):
                    params, state = carry
                    gradient = jax.grad(lambda w: loss(predict(w, x), noisy).mean())(params)
                    updates, state = optimizer.update(gradient, state)
                    return (optax.apply_updates(params, updates), state), None

                start = params, optimizer.init(params)
                (params, _), _ = jax.lax.scan(step, start, length=100)
                return read(predict(params, x))

            return np.sqrt(np.mean((fit(params, x, noisy) - clean) ** 2))

        ours = train(
            partial(losses.hl_gauss_loss, min_value=-10.0, max_value=10.0),
            lambda f: smooth.decode(jax.nn.softmax(f)),
            51,
        )
        plain = train(lambda f, y: (f[:, 0] - y) ** 2, lambda f: f[:, 0], 1)
        assert ours < 0.5 * plain

    def test_without_smoothing_it_is_the_bin_of_the_value(self):
        values = np.float32([-1, -0.6, -0.5, 0.49, 0.99, 1, 5, np.nan])
        support = HLGauss(-1.0, 1.0, bins=4, smoothing_ratio=0.0)
        p = np.array(jax.jit(support.encode)(values))
        np.testing.assert_array_equal(p[:7].argmax(-1), [0, 0, 1, 2, 3, 3, 3])
        np.testing.assert_array_equal(p[:7].max(-1), 1)
        assert np.all(np.isnan(p[7]))
        nearly = jax.jit(HLGauss(-1.0, 1.0, bins=4, smoothing_ratio=1e-3).encode)(values)
        inside = [1, 3, 4]  # away from the edges
        np.testing.assert_allclose(nearly[np.array(inside)], p[inside], atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
class TestContract:
    def test_excluded_values_vmap_and_targets_without_gradient(self, name):
        logits, values = PEER["logits"][:4], PEER["values"][:4]
        where = np.array([True, False, True, False])
        poisoned = np.where(where[:, None], logits, np.nan), np.where(where, values, np.nan)
        found, gradient = value_and_gradient(*poisoned, where, name=name)
        expected, slope = value_and_gradient(logits, values, np.ones(4, bool), name=name)
        np.testing.assert_allclose(found, np.where(where, expected, 0), rtol=1e-6)
        np.testing.assert_allclose(gradient, slope * where[:, None], rtol=1e-6)

        @jax.jit
        def more(logits, values, low):
            def loss(f, y, low=-10.0):
                return LOSSES[name](f, y, min_value=low, max_value=low + 20)

            slope = jax.grad(lambda y: loss(logits, y).sum())(values)
            return jax.vmap(loss)(logits[:, None], values[:, None], low)[:, 0], slope

        mapped, slope = more(logits, values, np.full(4, -10.0, "f"))
        np.testing.assert_allclose(mapped, expected, rtol=1e-5)
        np.testing.assert_array_equal(slope, 0)

    def test_extremes_and_half_precision(self, name):
        far = 1e4 * np.sign(PEER["logits"][:4])
        values = np.float32([1e30, -1e30, 10, -10])
        found, gradient = value_and_gradient(far, values, np.ones(4, bool), name=name)
        assert np.all(np.isfinite(found))
        assert np.all(np.isfinite(gradient))
        half = jnp.asarray(PEER["logits"][:4], jnp.bfloat16)
        values, where = PEER["values"][:4], np.ones(4, bool)
        found, _ = value_and_gradient(half, values, where, name=name)
        assert found.dtype == jnp.bfloat16
        expected, _ = value_and_gradient(np.asarray(half, "f"), values, where, name=name)
        np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))

    def test_bad_input_is_named(self, name):
        logits, values = PEER["logits"], PEER["values"]

        def loss(*arguments, **keywords):  # traced alone
            jax.eval_shape(lambda: LOSSES[name](*arguments, **keywords))

        with pytest.raises(ValueError, match="min_value must be below max_value"):
            loss(logits, values, min_value=1.0, max_value=1.0)
        with pytest.raises(ValueError, match="max_value must be in"):
            loss(logits, values, min_value=1.0, max_value=np.inf)
        with pytest.raises(ValueError, match="must be an integer of at least 2"):
            loss(logits[:, :1], values, min_value=0.0, max_value=1.0)
        with pytest.raises(ValueError, match=r"(values|rewards) must"):
            loss(logits, values[:4], min_value=0.0, max_value=1.0)
        with pytest.raises(TypeError, match="logits must have a floating-point type"):
            loss(logits.astype(int), values, min_value=0.0, max_value=1.0)


class TestEncodings:
    def test_types_and_atoms_of_each_row(self):
        atoms = np.sort(np.random.default_rng(0).normal(size=(3, 4))).astype("f")
        values = atoms[:, 0] + np.float32([0, 0.1, 9])
        p = np.asarray(jax.jit(jax.vmap(losses.two_hot_encode))(values, atoms))
        np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-6)
        mean = np.minimum(values, atoms[:, -1])
        np.testing.assert_allclose(np.sum(p * atoms, -1), mean, rtol=1e-5)
        np.testing.assert_array_equal(p[2], [0, 0, 0, 1])
        half = jax.ShapeDtypeStruct((3,), jnp.bfloat16)
        whole = jax.ShapeDtypeStruct((3,), jnp.int32)
        for encode in (HLGauss(0.0, 1.0).encode, partial(losses.two_hot_encode, atoms=atoms[0])):
            assert jax.eval_shape(encode, half).dtype == jnp.bfloat16
            assert jax.eval_shape(encode, whole).dtype == jnp.float32
        missing = jax.jit(jax.vmap(losses.two_hot_encode))(np.full(3, np.nan, "f"), atoms)
        assert np.all(np.isnan(missing))

    def test_bad_input_is_named(self):
        for atoms in ([0.0, 2.0, 1.0], [0.0, 1.0, 1.0], [2.0, 1.0], [0.0, np.nan]):
            with pytest.raises(ValueError, match="atoms must be in ascending order"):
                losses.two_hot_encode(0.5, np.array(atoms))
            with pytest.raises(ValueError, match="atoms must be in ascending order"):
                losses.two_hot_decode(np.ones(len(atoms)), np.array(atoms))
        with pytest.raises(ValueError, match=r"atoms must have shape \[m\]"):
            losses.two_hot_encode(0.5, np.ones(1))
        with pytest.raises(ValueError, match=r"probabilities must have shape \(2,\)"):
            losses.two_hot_decode(np.ones(3), np.array([0.0, 1.0]))
        with pytest.raises(ValueError, match="bins must be an integer of at least 2"):
            HLGauss(0.0, 1.0, bins=1)
        with pytest.raises(ValueError, match="smoothing_ratio must be in"):
            HLGauss(0.0, 1.0, smoothing_ratio=-0.5)
        with pytest.raises(ValueError, match="discounts must broadcast"):
            losses.categorical_td_targets(
                np.ones((2, 3)) / 3, np.zeros(2), np.ones(3), min_value=0.0, max_value=1.0
            )
