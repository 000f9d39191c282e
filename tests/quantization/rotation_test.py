import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
from absl.testing import parameterized

from jaxref.quantization import (
    cayley_update,
    hadamard_matrix,
    quantization_space_utilization_rate,
    stiefel_adam,
    weight_outlier_minimization_init,
)


def random_rotation(n, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0].astype(np.float32)


def random_covariance(d, seed=0):
    rotation = random_rotation(d, seed)
    spread = np.random.default_rng(seed).uniform(0.2, 3.0, size=d)
    return (rotation * spread @ rotation.T).astype(np.float32)


def log_rate64(mean, covariance, confidence, extent):
    """The definition by float64 loops, as log."""
    d = len(mean)
    c = scipy.stats.chi2.ppf(confidence, d)
    lengths, axes = np.linalg.eigh(covariance.astype(np.float64))
    log_volume = d / 2 * np.log(np.pi) - scipy.special.gammaln(d / 2 + 1)
    log_volume += d / 2 * np.log(c) + 0.5 * sum(np.log(length) for length in lengths)
    ends = []
    for j in range(d):
        reach = np.sqrt(c * lengths[-1]) * abs(axes[j, -1])
        if extent == "exact":
            reach = np.sqrt(c * sum(lengths[i] * axes[j, i] ** 2 for i in range(d)))
        ends.append((mean[j] - reach, mean[j] + reach))
    return log_volume - d * np.log(max(high for _, high in ends) - min(low for low, _ in ends))


class TestHadamardMatrix:
    @pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 60, 76])
    def test_orthogonal_with_entries_of_one_size(self, n):
        matrix = np.asarray(hadamard_matrix(n), np.float64)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(n), atol=1e-6)
        np.testing.assert_allclose(np.abs(matrix), n**-0.5, rtol=1e-6)

    def test_powers_of_two_are_scipys(self):
        np.testing.assert_allclose(
            4 * hadamard_matrix(16), scipy.linalg.hadamard(16).astype(float), rtol=1e-6
        )
        assert hadamard_matrix(2, dtype=jnp.bfloat16).dtype == jnp.bfloat16

    def test_bad_input(self):
        for n in (3, 6, 14, 52, 92):
            with pytest.raises(ValueError, match=f"n must be .*, got {n}"):
                hadamard_matrix(n)
        with pytest.raises(ValueError, match="n must be in"):
            hadamard_matrix(0)
        with pytest.raises(TypeError, match="n must be an int"):
            hadamard_matrix(4.0)
        with pytest.raises(TypeError, match="dtype must be a floating-point type, got int32"):
            hadamard_matrix(4, dtype=jnp.int32)


class TestQuantizationSpaceUtilizationRate(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters("principal", "exact")
    def test_matches_the_definition(self, extent):
        mean = np.random.default_rng(1).normal(size=5).astype(np.float32)
        covariance = random_covariance(5)
        rate = self.variant(
            lambda m, c: quantization_space_utilization_rate(
                mean=m, covariance=c, confidence=0.9, extent=extent, log=True
            )
        )
        expected = log_rate64(mean, covariance, 0.9, extent)
        np.testing.assert_allclose(rate(mean, covariance), expected, rtol=1e-5)

    def test_of_samples_is_that_of_their_moments(self):
        x = np.random.default_rng(0).normal(size=(4, 50, 3)).astype(np.float32) + 1
        flat = x.reshape(-1, 3).astype(np.float64)
        expected = log_rate64(flat.mean(0), np.cov(flat.T, bias=True), 0.99, "principal")
        rate = quantization_space_utilization_rate(x)
        np.testing.assert_allclose(rate, np.exp(expected), rtol=1e-4)

    def test_exact_rate_is_at_most_that_of_the_ball(self):
        ball = np.pi**2 / scipy.special.gamma(3) / 2**4
        rate = jax.jit(
            lambda c, m: quantization_space_utilization_rate(covariance=c, mean=m, extent="exact")
        )
        constant = jnp.full(4, 0.7)
        for scale in (1e-3, 1.0, 1e3):
            value = rate(scale * jnp.eye(4), scale**0.5 * jnp.zeros(4))
            np.testing.assert_allclose(value, ball, rtol=1e-4)
        np.testing.assert_allclose(rate(jnp.eye(4), constant), ball, rtol=1e-4)
        stretched = jnp.diag(jnp.array([1.0, 1.0, 1.0, 1.3]))
        correlated = jnp.eye(4) + 0.3 * (jnp.ones((4, 4)) - jnp.eye(4))
        assert rate(stretched, constant) < 0.99 * ball
        assert rate(correlated, constant) < 0.99 * ball
        assert rate(jnp.eye(4), jnp.arange(4.0)) < 0.99 * ball

    def test_confidence_only_matters_where_means_differ(self):
        covariance = random_covariance(4)
        for mean, changes in ((jnp.full(4, 2.0), False), (jnp.arange(4.0), True)):
            low, high = (
                quantization_space_utilization_rate(mean=mean, covariance=covariance, confidence=c)
                for c in (0.5, 0.999)
            )
            assert bool(abs(low / high - 1) > 1e-3) == changes

    def test_hadamard_is_the_best_rotation_of_the_longest_axis(self):
        covariance = jnp.diag(jnp.array([9.0, 2.0, 1.0, 1.0]))
        rate = jax.jit(
            lambda r: quantization_space_utilization_rate(covariance=r @ covariance @ r.T)
        )
        best = rate(hadamard_matrix(4))
        assert all(rate(random_rotation(4, seed)) < best for seed in range(8))

    def test_singular_is_zero_and_many_dimensions_are_finite(self):
        rank_one = jnp.ones((3, 3))
        assert quantization_space_utilization_rate(covariance=rank_one) == 0
        assert quantization_space_utilization_rate(covariance=jnp.zeros((3, 3))) == 0
        few = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
        assert quantization_space_utilization_rate(few, log=True) == -jnp.inf
        log_rate = quantization_space_utilization_rate(covariance=jnp.eye(256), log=True)
        assert jnp.isfinite(log_rate)

    def test_bad_input(self):
        rate = quantization_space_utilization_rate
        with pytest.raises(ValueError, match="one of x and covariance must be given, got none"):
            rate()
        with pytest.raises(ValueError, match="one of x and covariance must be given, got both"):
            rate(jnp.ones((2, 2)), covariance=jnp.eye(2))
        with pytest.raises(ValueError, match="x must be finite"):
            rate(jnp.full((3, 2), jnp.nan))
        assert jnp.isnan(jax.jit(rate)(jnp.full((3, 2), jnp.nan)))
        with pytest.raises(ValueError, match="extent must be one of"):
            rate(covariance=jnp.eye(2), extent="box")
        with pytest.raises(ValueError, match="confidence must be in"):
            rate(covariance=jnp.eye(2), confidence=1.0)
        with pytest.raises(ValueError, match=r"covariance must have shape \(2, 2\)"):
            rate(covariance=jnp.ones((2, 3)))
        with pytest.raises(ValueError, match=r"mean must have shape \(2,\)"):
            rate(covariance=jnp.eye(2), mean=jnp.ones(3))
        with pytest.raises(ValueError, match="x must have shape"):
            rate(jnp.ones(3))
        with pytest.raises(TypeError, match="x must have a floating-point type"):
            rate(jnp.ones((3, 2), int))


class TestWeightOutlierMinimization:
    def test_every_input_channel_gets_the_same_energy(self):
        rng = np.random.default_rng(0)
        kernels = [rng.normal(size=(8, n)).astype(np.float32) for n in (5, 9)]
        kernels[0][2] *= 30
        rotation = weight_outlier_minimization_init(kernels)
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(8), atol=1e-5)
        energy = sum(np.sum((rotation.T @ k) ** 2, axis=1) for k in kernels)
        np.testing.assert_allclose(energy, sum((k**2).sum() for k in kernels) / 8, rtol=1e-4)

    def test_heads_have_rotations_of_their_own(self):
        stack = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 6)), jnp.float32)
        rotations = weight_outlier_minimization_init([stack])
        for head in range(3):
            one = weight_outlier_minimization_init([stack[head]])
            np.testing.assert_allclose(np.abs(rotations[head]), np.abs(one), atol=1e-4)
        zero = weight_outlier_minimization_init([jnp.zeros((4, 2))])
        np.testing.assert_allclose(zero @ zero.T, np.eye(4), atol=1e-6)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="weights must hold at least one kernel"):
            weight_outlier_minimization_init([])
        with pytest.raises(ValueError, match=r"weights\[1\] must have shape \(4, 3\)"):
            weight_outlier_minimization_init([jnp.ones((4, 2)), jnp.ones((3, 3))])
        with pytest.raises(ValueError, match="weights must be finite"):
            weight_outlier_minimization_init([jnp.full((4, 2), jnp.nan)])
        with pytest.raises(ValueError, match="n must be a power of 2"):
            weight_outlier_minimization_init([jnp.ones((6, 2))])
        with pytest.raises(ValueError, match="weights must have shape"):
            weight_outlier_minimization_init([jnp.ones(4)])


class TestCayleyUpdate(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_matches_the_formula_and_stays_orthogonal(self):
        rotations = np.stack([random_rotation(4, seed) for seed in range(3)])
        gradients = np.random.default_rng(5).normal(size=(3, 4, 4)).astype(np.float32)
        update = self.variant(lambda r, g: cayley_update(r, g, 0.3))
        for turned in (update(rotations, gradients), jax.vmap(update)(rotations, gradients)):
            for r, g, ours in zip(rotations.astype(float), gradients.astype(float), turned):
                skew = 0.15 * (g @ r.T - r @ g.T)
                expected = np.linalg.inv(np.eye(4) + skew) @ (np.eye(4) - skew) @ r
                np.testing.assert_allclose(ours, expected, atol=2e-6)
                np.testing.assert_allclose(ours @ ours.T, np.eye(4), atol=2e-6)
                np.testing.assert_allclose(np.linalg.det(ours), np.linalg.det(r), rtol=1e-4)

    def test_goes_down_and_back(self):
        target = random_rotation(5, 3)
        target[0] *= np.linalg.det(target)
        rotation = jnp.eye(5)
        gradient = jax.grad(lambda r: jnp.sum(jnp.square(r - target)))(rotation)
        turned = cayley_update(rotation, gradient, 0.05)
        assert jnp.sum((turned - target) ** 2) < jnp.sum((rotation - target) ** 2)
        skew = gradient @ rotation.T - rotation @ gradient.T
        np.testing.assert_allclose(
            cayley_update(turned, skew @ turned / 2, -0.05), rotation, atol=1e-5
        )
        assert cayley_update(rotation.astype(jnp.bfloat16), gradient, 0.1).dtype == jnp.bfloat16

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"rotation must have shape \[..., n, n\]"):
            cayley_update(jnp.ones((2, 3)), jnp.ones((2, 3)), 0.1)
        with pytest.raises(ValueError, match=r"gradient must have shape \(2, 2\)"):
            cayley_update(jnp.eye(2), jnp.eye(3), 0.1)
        with pytest.raises(TypeError, match="gradient must have a floating-point type"):
            cayley_update(jnp.eye(2), jnp.ones((2, 2), int), 0.1)


def stiefel_adam64(rotation, gradients, rate, b1, b2, eps):
    r = rotation.astype(np.float64)
    m, v = np.zeros_like(r), 0.0
    tangent = lambda r, x: 0.5 * (x - r @ x.T @ r)
    for t, g in enumerate(gradients, 1):
        g = tangent(r, g.astype(np.float64))
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * np.sum(g**2)
        direction = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        skew = rate / 4 * (direction @ r.T - r @ direction.T)
        r = np.linalg.inv(np.eye(len(r)) + skew) @ (np.eye(len(r)) - skew) @ r
        m = tangent(r, m)
    return r


class TestStiefelAdam:
    def test_matches_the_formula(self):
        rotation = random_rotation(4)
        gradients = np.random.default_rng(2).normal(size=(6, 4, 4)).astype(np.float32)
        optimizer = stiefel_adam(0.2, b1=0.8, b2=0.9, eps=1e-3)
        params = {"a": jnp.stack([rotation, rotation]), "b": jnp.asarray(rotation)}
        state = optimizer.init(params)
        update = jax.jit(optimizer.update)
        for g in gradients:
            updates, state = update({"a": jnp.stack([g, -g]), "b": jnp.asarray(g)}, state, params)
            params = optax.apply_updates(params, updates)
        for ours, sign in ((params["a"][0], 1), (params["a"][1], -1), (params["b"], 1)):
            expected = stiefel_adam64(rotation, sign * gradients, 0.2, 0.8, 0.9, 1e-3)
            np.testing.assert_allclose(ours, expected, atol=2e-5)

    def test_finds_a_rotation_and_stays_orthogonal(self):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 6)), jnp.float32)
        target = random_rotation(6, 7)
        target[:, 0] *= np.linalg.det(target)
        optimizer = stiefel_adam(optax.cosine_decay_schedule(0.2, 150))
        loss = lambda r: jnp.mean(jnp.square(x @ (r - target)))

        @jax.jit
        def train(rotation):
            def step(carry, _):
                rotation, state = carry
                updates, state = optimizer.update(jax.grad(loss)(rotation), state, rotation)
                return (optax.apply_updates(rotation, updates), state), None

            return jax.lax.scan(step, (rotation, optimizer.init(rotation)), length=150)[0][0]

        rotation = train(jnp.eye(6))
        assert loss(rotation) < 1e-4 < loss(jnp.eye(6))
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(6), atol=1e-5)

    def test_zero_gradients_do_not_move(self):
        optimizer = stiefel_adam(0.1, eps=0.0)
        rotation = jnp.asarray(random_rotation(3))
        updates, _ = optimizer.update(jnp.zeros((3, 3)), optimizer.init(rotation), rotation)
        np.testing.assert_allclose(updates, np.zeros((3, 3)), atol=1e-6)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="b1 must be in"):
            stiefel_adam(0.1, b1=1.0)
        with pytest.raises(ValueError, match="learning_rate must be in"):
            stiefel_adam(-0.1)
        optimizer = stiefel_adam(0.1)
        with pytest.raises(ValueError, match=r"params\['w'\] must have shape \[..., n, n\]"):
            optimizer.init({"w": jnp.ones((2, 3))})
        with pytest.raises(ValueError, match="params must be passed to update"):
            optimizer.update(jnp.eye(2), optimizer.init(jnp.eye(2)))
        with pytest.raises(ValueError, match="updates must have shape"):
            optimizer.update(jnp.eye(3), optimizer.init(jnp.eye(2)), jnp.eye(2))
