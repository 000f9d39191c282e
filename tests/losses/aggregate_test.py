from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxref import losses

LOSSES = {
    "bag": losses.bag_level_loss,
    "instance": losses.instance_level_loss,
    "between": partial(losses.interpolated_aggregate_loss, rho=0.3),
}


def random_bags(n=12, bags=4, seed=0):
    """Predictions, responses and ids of bags that differ in size."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.r_[np.arange(bags), rng.integers(bags, size=n - bags)])
    f, y = rng.normal(size=n).astype(np.float32), rng.normal(size=bags).astype(np.float32)
    return f, y, ids


def literal(name, f, y, ids):
    f, y = np.float64(f), np.float64(y)
    bag = np.array([(f[ids == a].mean() - y[a]) ** 2 for a in range(len(y))])
    instance = np.array([np.mean((f[ids == a] - y[a]) ** 2) for a in range(len(y))])
    return {"bag": bag, "instance": instance, "between": 0.7 * bag + 0.3 * instance}[name]


def linear_data(rng, n, d, k, noise_std, signal_norm=1.0):
    """Isotropic features, mean responses of random bags, and the coefficients behind them."""
    x, theta = rng.normal(size=(n, d)), rng.normal(size=d)
    theta *= signal_norm / np.linalg.norm(theta)
    y = x @ theta + noise_std * rng.normal(size=n)
    ids = np.arange(n) // k
    return x.astype(np.float32), y.reshape(-1, k).mean(1).astype(np.float32), ids, theta


@pytest.mark.parametrize("name", LOSSES)
class TestContract:
    def test_matches_the_formula_and_its_finite_differences(self, name):
        f, y, ids = random_bags()
        values, vjp = jax.vjp(lambda f: jax.jit(LOSSES[name])(f, y, ids), f)
        np.testing.assert_allclose(values, literal(name, f, y, ids), rtol=1e-5)
        direction = np.random.default_rng(1).normal(size=12)
        sides = [literal(name, f + s * 1e-6 * direction, y, ids).sum() for s in (1, -1)]
        slope = vjp(np.ones(4, "f"))[0] @ direction
        np.testing.assert_allclose(slope, (sides[0] - sides[1]) / 2e-6, rtol=1e-3)

    def test_any_loss_of_several_outputs(self, name):
        rng = np.random.default_rng(0)
        logits, ids = rng.normal(size=(12, 3)).astype(np.float32), random_bags()[2]
        shares = rng.dirichlet(np.ones(3), size=4).astype(np.float32)
        loss_fn = optax.softmax_cross_entropy
        values = LOSSES[name](logits, shares, ids, loss_fn=loss_fn)
        means = np.stack([logits[ids == a].mean(0) for a in range(4)])
        bag = loss_fn(means, shares)
        instance = np.stack([loss_fn(logits, shares[ids])[ids == a].mean() for a in range(4)])
        blend = {"bag": bag, "instance": instance, "between": 0.7 * bag + 0.3 * instance}
        np.testing.assert_allclose(values, blend[name], rtol=1e-5)

    def test_shards_give_value_and_gradient_of_the_whole(self, name):
        f, y, ids = random_bags(16)
        axes, weights = ("data", "fsdp"), np.arange(1.0, 5, dtype=np.float32)
        mesh = jax.make_mesh((4, 2), axes, axis_types=(AxisType.Auto,) * 2)
        spread = PartitionSpec(axes)
        sharded = jax.shard_map(
            partial(LOSSES[name], axis_name=axes),
            mesh=mesh,
            in_specs=(spread, PartitionSpec(), spread),
            out_specs=PartitionSpec(),
        )
        found, expected = (
            jax.jit(jax.value_and_grad(lambda f: weights @ loss(f, y, ids)))(f)
            for loss in (sharded, LOSSES[name])
        )
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-6)

    def test_samples_that_do_not_count_and_empty_bags(self, name):
        f, y, ids = random_bags()
        where = (np.arange(12) < 9) & (ids != 2)
        poisoned, lost = np.where(where, f, np.nan), np.where(where, ids, 99)
        values, vjp = jax.vjp(lambda f: LOSSES[name](f, y, lost, where=where), poisoned)
        alone = LOSSES[name](f[where], y, ids[where])
        np.testing.assert_allclose(values, alone, rtol=1e-5)
        assert values[2] == 0
        gradient = vjp(np.ones(4, "f"))[0]
        assert np.all(gradient[~where] == 0)
        assert np.all(np.isfinite(gradient))
        assert np.all(LOSSES[name](f[:0], y, ids[:0]) == 0)
        outside = jax.jit(LOSSES[name])(f, y, np.where(where, ids, [-1, 4] * 6))
        np.testing.assert_allclose(outside, alone, rtol=1e-5)

    def test_half_precision_extremes_and_bad_input(self, name):
        f, y, ids = random_bags()
        half = jnp.asarray(f, jnp.bfloat16)
        values = LOSSES[name](half, y, ids)
        assert values.dtype == jnp.bfloat16
        expected = LOSSES[name](half.astype(jnp.float32), y, ids).astype(jnp.bfloat16)
        np.testing.assert_array_equal(values, expected)
        for size in (1e4, -1e4, 0.0):
            loss = lambda f: LOSSES[name](f, y, ids).sum()
            value, slope = jax.value_and_grad(loss)(np.full(12, size, np.float32))
            assert np.isfinite(value)
            assert np.all(np.isfinite(slope))
        with pytest.raises(ValueError, match=r"segment_ids must have shape \(12,\)"):
            LOSSES[name](f, y, ids[:3])
        with pytest.raises(ValueError, match="segment_ids must be in"):
            LOSSES[name](f, y, ids + 1)
        with pytest.raises(ValueError, match="where must broadcast"):
            LOSSES[name](f, y, ids, where=np.ones(3, bool))
        with pytest.raises(TypeError, match="segment_ids must be integers"):
            LOSSES[name](f, y, f)
        with pytest.raises(TypeError, match="predictions must have a floating-point type"):
            LOSSES[name](ids, y, ids)


class TestRegression:
    @pytest.mark.parametrize("rho", [0.0, 0.4, 1.0])
    def test_is_the_minimum_of_the_loss_and_least_squares_at_both_ends(self, rho):
        rng = np.random.default_rng(0)
        x, y, ids, _ = linear_data(rng, 40, 5, 4, 0.3)
        theta = jax.jit(partial(losses.aggregate_ridge_regression, rho=rho))(x, y, ids)
        loss = lambda t: losses.interpolated_aggregate_loss(x @ t, y, ids, rho=rho).mean()
        assert np.abs(jax.grad(loss)(theta)).max() < 1e-5
        means = x.reshape(10, 4, 5).mean(1)
        if rho != 0.4:
            design, targets = (means, y) if rho == 0 else (x, y[ids])
            expected = np.linalg.lstsq(np.float64(design), np.float64(targets), rcond=None)[0]
            np.testing.assert_allclose(theta, expected, rtol=1e-4, atol=1e-5)

    def test_bags_of_other_sizes_count_alike_and_few_of_them_give_the_least_norm(self):
        rng = np.random.default_rng(0)
        _, y, ids = random_bags()
        x = rng.normal(size=(12, 3)).astype(np.float32)
        theta = losses.aggregate_ridge_regression(x, y, ids, rho=0.4)
        loss = lambda t: losses.interpolated_aggregate_loss(x @ t, y, ids, rho=0.4).mean()
        assert np.abs(jax.grad(loss)(theta)).max() < 1e-5
        x = rng.normal(size=(12, 6)).astype(np.float32)
        means = np.stack([x[ids == a].mean(0) for a in range(4)])
        theta = losses.aggregate_ridge_regression(x, y, ids, rho=0.0)
        np.testing.assert_allclose(theta, np.linalg.pinv(means) @ y, rtol=1e-3, atol=1e-4)


class TestClaims:
    @pytest.mark.claim("aggregate-response-losses")
    def test_instances_add_a_penalty_on_variance_that_pays_where_noise_is_strong(self):
        f, y, ids = random_bags()
        spread = [np.var(np.float64(f)[ids == a]) for a in range(4)]
        for rho in (0.0, 0.3, 1.0):
            difference = losses.interpolated_aggregate_loss(
                f, y, ids, rho=rho
            ) - losses.bag_level_loss(f, y, ids)
            np.testing.assert_allclose(difference, rho * np.array(spread), rtol=1e-4, atol=1e-6)

        fit = jax.jit(losses.aggregate_ridge_regression)

        def risks(noise_std, signal_norm):
            """Excess risk at ρ = 0, some in between, and 1; 75 equations for 30 unknowns."""
            total = np.zeros(4)
            for seed in range(4):
                rng = np.random.default_rng(seed)
                *data, theta = linear_data(rng, 300, 30, 4, noise_std, signal_norm)
                fits = [fit(*data, rho=jnp.float32(rho)) for rho in (0.0, 0.02, 0.2, 1.0)]
                total += [np.sum((found - theta) ** 2) / 4 for found in fits]
            return total

        noisy, clean = risks(2.0, 0.5), risks(0.1, 1.0)
        assert noisy[3] < 0.5 * noisy[0]
        assert clean[0] < 0.5 * clean[3]
        middle = risks(0.7, 1.0)
        assert middle[1:3].min() < min(middle[0], middle[3])

    def test_risk_of_bag_means_is_that_of_fewer_samples(self):
        for n, d, k in ((800, 40, 4), (800, 80, 20)):
            found = []
            for seed in range(4):
                *data, theta = linear_data(np.random.default_rng(seed), n, d, k, 0.7)
                fit = losses.aggregate_ridge_regression(*data, rho=0.0)
                found.append(np.sum((fit - theta) ** 2))
            expected = losses.bag_level_risk(d / n, k, 0.7, 1.0)
            np.testing.assert_allclose(np.mean(found), expected, rtol=0.2)

    def test_risk_by_hand(self):
        np.testing.assert_allclose(losses.bag_level_risk(0.1, 4, 0.7, 9.0), 0.49 * 0.4 / 0.6, 1e-5)
        expected = 4 * (1 - 1 / 2) + 0.49 / 1
        np.testing.assert_allclose(losses.bag_level_risk(0.1, 20, 0.7, 2.0), expected, 1e-5)
        assert np.isinf(losses.bag_level_risk(0.25, 4, 0.7, 1.0))


class TestPrivacy:
    def test_noise_is_laplace_of_the_scale_that_epsilon_asks_for(self):
        ids = np.repeat(np.arange(2000), np.where(np.arange(2000) < 1000, 2, 5))
        y = np.random.default_rng(0).normal(size=7000)
        release = lambda epsilon, key: losses.private_bag_responses(
            y, ids, num_bags=2000, key=jax.random.key(key), epsilon=epsilon, clip=1.0
        )
        limit = np.sqrt(np.log(7000))
        exact = np.bincount(ids, np.clip(y, -limit, limit)) / np.bincount(ids)
        np.testing.assert_allclose(release(1e7, 0), exact, atol=1e-4)
        noise = release(0.5, 1) - exact
        for bags, size in ((slice(1000), 2), (slice(1000, None), 5)):
            scale = (
                2 * limit / (size * 0.5)
            )  # the mean size of Laplace noise; its deviation √2 of it
            np.testing.assert_allclose(np.abs(noise[bags]).mean(), scale, rtol=0.1)
            np.testing.assert_allclose(noise[bags].std(), np.sqrt(2) * scale, rtol=0.15)
        assert np.any(release(0.5, 2) != release(0.5, 1))

    def test_clips_masks_and_names_bad_input(self):
        y, ids = np.array([100.0, -100.0, 1.0, np.nan]), np.array([0, 1, 1, 9])
        private = partial(
            losses.private_bag_responses, num_bags=3, key=jax.random.key(0), epsilon=1e8, clip=2.0
        )
        limit = 2 * np.sqrt(np.log(3))
        ours = private(y, ids, where=np.array([1, 1, 1, 0], bool))
        np.testing.assert_allclose(ours, [limit, (1 - limit) / 2, 0], atol=1e-5)
        with pytest.raises(ValueError, match="segment_ids must be in"):
            private(y, ids)
        for bad in ({"epsilon": 0.0}, {"clip": -1.0}, {"num_bags": 0}):
            with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
                private(y[:3], ids[:3], **bad)
        with pytest.raises(ValueError, match=r"responses must have shape \[n\]"):
            private(y[None], ids)


def test_bad_numbers_are_named():
    f, y, ids = random_bags()
    with pytest.raises(ValueError, match="rho must be in"):
        losses.interpolated_aggregate_loss(f, y, ids, rho=1.1)
    with pytest.raises(ValueError, match="rho must be in"):
        losses.aggregate_ridge_regression(f[:, None], y, ids, rho=-0.1)
    with pytest.raises(ValueError, match=r"features must have shape \[n, d\]"):
        losses.aggregate_ridge_regression(f, y, ids, rho=0.5)
    for bad in ({"psi": 0.0}, {"bag_size": 0}, {"noise_std": -1.0}, {"signal_norm": -1.0}):
        arguments = {"psi": 0.1, "bag_size": 2, "noise_std": 1.0, "signal_norm": 1.0} | bad
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be in"):
            losses.bag_level_risk(**arguments)
