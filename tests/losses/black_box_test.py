from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxref import losses

P, Q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
SQUARES = {(tuple(2 * row), (0, 0, 0)): 1.0 for row in np.eye(3, dtype=int)}
SQUARES |= {(tuple(row), tuple(row)): -2.0 for row in np.eye(3, dtype=int)}


def every_sample(length, symbols=3):
    """All sequences of draws, and how likely each is under given probabilities."""
    samples = np.array(list(product(range(symbols), repeat=length)), np.int32)
    return samples, lambda p: np.prod(np.asarray(p)[samples], axis=-1)


def counts_of(samples):
    return np.sum(samples[..., None] == np.arange(3), axis=-2)


def every_pair(n, m):
    """All draws of n of the model with all of m of the targets, and the likelihood of both."""
    (x, of_x), (y, of_y) = every_sample(n), every_sample(m)
    pairs = np.repeat(x, len(y), axis=0), np.tile(y, (len(x), 1))
    return pairs, lambda p, q: np.outer(of_x(p), of_y(q)).ravel()


class TestNumbers:
    def test_monomials_are_unbiased_over_all_draws(self):
        samples, likelihood = every_sample(4)
        for exponents in ((0, 0, 0), (1, 0, 0), (2, 0, 1), (0, 4, 0), (1, 1, 2)):
            estimates = losses.power_estimator(counts_of(samples), exponents)
            expected = np.prod(P ** np.array(exponents))
            np.testing.assert_allclose(likelihood(P) @ estimates, expected, rtol=1e-5)

    def test_squared_loss_by_pairs_by_counts_and_as_a_polynomial(self):
        (x, y), _ = every_pair(3, 2)
        by_pairs = losses.black_box_squared_loss(x, y)
        by_counts = losses.black_box_squared_loss(x, y, num_categories=3)
        np.testing.assert_allclose(by_counts, by_pairs, atol=1e-6)
        ours = losses.black_box_polynomial_loss(counts_of(x), counts_of(y), SQUARES)
        np.testing.assert_allclose(ours, by_pairs, atol=1e-6)
        many = losses.black_box_squared_loss(x[7] * 10**8, y[7] * 10**8)
        np.testing.assert_allclose(many, by_pairs[7], atol=1e-6)

    def test_a_fourth_power_from_four_draws_of_each(self):
        (x, y), likelihood = every_pair(4, 4)
        rows = np.eye(3, dtype=int)
        fourth = {
            (tuple((4 - j) * row), tuple(j * row)): float(sign)
            for row in rows
            for j, sign in enumerate((1, -4, 6, -4, 1))
        }
        values = losses.black_box_polynomial_loss(counts_of(x), counts_of(y), fourth)
        expected = np.sum((P - Q) ** 4)
        np.testing.assert_allclose(likelihood(P, Q) @ values, expected, rtol=1e-3)


class TestClaims:
    @pytest.mark.claim("black-box-proper-losses")
    def test_the_unbiased_loss_is_least_at_the_targets_distribution_and_the_plug_in_is_not(self):
        """Expectations over all draws of three of the model and two of the targets."""
        (x, y), likelihood = every_pair(3, 2)
        with jax.enable_x64(True):
            c, d = (jnp.asarray(counts_of(z), jnp.float64) for z in (x, y))
            unbiased = np.asarray(losses.black_box_polynomial_loss(c, d, SQUARES))
        plug_in = np.sum((counts_of(x) / 3 - counts_of(y) / 2) ** 2, axis=-1)
        exact = likelihood(P, Q) @ unbiased
        np.testing.assert_allclose(exact, np.sum((P - Q) ** 2) - np.sum(Q**2), rtol=1e-12)
        grid = [(i / 20, j / 20, 1 - (i + j) / 20) for i in range(21) for j in range(21 - i)]

        def best(values):
            return grid[np.argmin([likelihood(p, Q) @ values for p in grid])]

        np.testing.assert_allclose(best(unbiased), Q, atol=1e-9)
        assert np.max(np.abs(np.subtract(best(plug_in), Q))) > 0.05

    def test_cross_entropy_needs_a_number_of_draws_that_is_random(self):
        """-log p is no polynomial; drawing until the target appears, or a Poisson number, has it
        as its expectation."""
        size, p = 6000, jnp.asarray(P, jnp.float32)
        targets = jnp.arange(size, dtype=jnp.int32) % 3
        sample_fn = lambda key: jax.random.categorical(key, jnp.log(p), shape=(size,))
        poisson = jax.jit(
            lambda key: losses.random_size_cross_entropy(sample_fn, targets, key=key, rate=16.0)
        )(jax.random.key(0))
        draws = jax.random.categorical(jax.random.key(1), jnp.log(p), shape=(size, 100))
        sequential = losses.sequential_cross_entropy(draws, targets)
        for symbol in range(3):
            of_symbol = targets == symbol
            for values, tolerance in ((sequential, 0.1), (poisson, 0.15)):
                mean = values[of_symbol].mean()
                np.testing.assert_allclose(mean, -np.log(P[symbol]), atol=tolerance)

    def test_fixed_numbers_of_draws_bound_the_degree(self):
        with pytest.raises(ValueError, match="number_of_draws must be in"):
            losses.power_estimator(np.array([1, 0, 0]), (2, 0, 0))
        with pytest.raises(ValueError, match="number_of_model_samples must be in"):
            losses.black_box_squared_loss(np.zeros(1, int), np.zeros(3, int))
        unknown = jax.jit(lambda c: losses.power_estimator(c, (2, 0, 0)))(jnp.array([1, 0, 0]))
        assert np.isnan(unknown)


class TestContract:
    def test_sequential_by_hand_and_its_edges(self):
        draws = jnp.array([[3, 3, 1, 3], [1, 2, 2, 2], [2, 2, 2, 1], [0, 0, 0, 0]])
        ours = losses.sequential_cross_entropy(draws, jnp.ones(4, int))
        np.testing.assert_allclose(ours, [1.5, 0, 1 + 1 / 2 + 1 / 3, np.inf], rtol=1e-6)
        one = losses.sequential_cross_entropy(draws[:, :1], jnp.ones(4, int))
        np.testing.assert_array_equal(one, [np.inf, 0, np.inf, np.inf])
        none = losses.sequential_cross_entropy(draws[:, :0], jnp.ones(4, int))
        assert np.all(np.isinf(none))

    def test_random_size_is_zero_for_a_certain_target(self):
        sample_fn = lambda key: jnp.zeros(50, int)
        loss = lambda y: losses.random_size_cross_entropy(
            sample_fn, jnp.full(50, y), key=jax.random.key(0), rate=5.0
        )
        assert np.all(loss(0) == 0)
        never = loss(1)  # grows with the number of draws, without bound
        sizes = jax.random.poisson(jax.random.split(jax.random.key(0))[0], 5.0, (50,))
        assert np.all(np.isfinite(never))
        assert np.all((never == 0) == (sizes == 0))
        order = np.argsort(sizes)
        assert np.all(np.diff(never[order]) >= 0)

    def test_sharded_mapped_and_unknown_ids(self):
        rng = np.random.default_rng(0)
        x, y = rng.integers(3, size=(8, 5)), rng.integers(3, size=(8, 4))
        loss = jax.jit(lambda x, y: losses.black_box_squared_loss(x, y, num_categories=3))
        expected = losses.black_box_squared_loss(x, y)
        rows = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
        np.testing.assert_allclose(loss(*jax.device_put((x, y), rows)), expected, atol=1e-6)
        np.testing.assert_allclose(jax.vmap(loss)(x, y), expected, atol=1e-6)
        x[0, 0], y[1, 1] = 3, -1
        np.testing.assert_array_equal(np.isnan(loss(x, y)), np.arange(8) < 2)

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda x: losses.power_estimator(x, (1, 1)), ValueError, "counts must have shape"),
            (lambda x: losses.power_estimator(-x, (1, 0, 0)), ValueError, "counts must be in"),
            (lambda x: losses.power_estimator(x, (-1, 1, 0)), ValueError, "exponents must be in"),
            (lambda x: losses.black_box_polynomial_loss(x, x, {}), ValueError, "at least one mono"),
            (
                lambda x: losses.black_box_squared_loss(x, x[None]),
                ValueError,
                "target_samples must have shape",
            ),
            (lambda x: losses.black_box_squared_loss(1.0 * x, x), TypeError, "must be integers"),
            (
                lambda x: losses.black_box_squared_loss(x, x, num_categories=0),
                ValueError,
                "num_categories must be in",
            ),
            (
                lambda x: losses.random_size_cross_entropy(
                    lambda key: x, x, key=jax.random.key(0), rate=0.0
                ),
                ValueError,
                "rate must be in",
            ),
            (
                lambda x: losses.sequential_cross_entropy(x, x),
                ValueError,
                "target_samples must have shape",
            ),
        ],
    )
    def test_bad_input_is_named(self, call, error, message):
        with pytest.raises(error, match=message):
            call(np.array([3, 2, 1]))
