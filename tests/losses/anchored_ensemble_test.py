from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from scipy.stats import norm

from jaxref import losses


def random_ensemble(members=3, batch=8):
    rng = np.random.default_rng(0)
    params, anchors = (
        {
            "w": rng.normal(size=(members, 4, 2)).astype("f"),
            "b": rng.normal(size=(members, 2)).astype("f"),
        }
        for _ in range(2)
    )
    x = rng.normal(size=(batch, 4)).astype("f")
    y = rng.normal(size=(batch, 2)).astype("f")
    return params, anchors, x, y, {"w": np.float32(0.5), "b": np.array([1.0, 2.0], "f")}


def linear_loss(params, anchors, x, y, prior_std, variances=0.3, **options):
    means = jnp.einsum("bi,mio->mbo", x, params["w"]) + params["b"][:, None]
    return losses.anchored_ensemble_loss(
        means, variances, y, params, anchors, prior_std, dataset_size=20, **options
    )


class TestLoss:
    def test_values_and_gradients_match_float64(self):
        params, anchors, x, y, stds = random_ensemble()
        where = np.arange(8) < 6
        poisoned = np.where(where[:, None], y, np.nan).astype("f")
        loss = jax.jit(partial(linear_loss, prior_std=stds, where=where))
        values, vjp = jax.vjp(lambda p, a: loss(p, a, x, poisoned), params, anchors)
        slopes, to_anchors = vjp(jnp.ones(3))
        for j in range(3):
            w, b = (np.float64(params[n][j]) for n in ("w", "b"))
            e = x[:6] @ w + b - y[:6]
            off = [(w - anchors["w"][j]) / 0.5, (b - anchors["b"][j]) / [1, 2]]
            held = sum((z**2).sum() for z in off)
            expected = 0.5 * (np.log(0.3) + e**2 / 0.3).sum() / 6 + held / 40
            np.testing.assert_allclose(values[j], expected, rtol=1e-5)
            slope = x[:6].T @ e / 0.3 / 6 + off[0] / 0.5 / 20
            np.testing.assert_allclose(slopes["w"][j], slope, rtol=1e-4, atol=1e-5)
        assert not np.any(to_anchors["w"])
        none = loss(params, anchors, x, np.full_like(y, np.nan), where=np.zeros(8, bool))
        assert np.all(none < values)
        assert np.all(none > 0)

    def test_batch_over_eight_devices(self):
        params, anchors, x, y, stds = random_ensemble()
        data = PartitionSpec("data")
        sharded = jax.shard_map(
            lambda p, x, y: linear_loss(p, anchors, x, y, stds, axis_name="data"),
            mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(PartitionSpec(), data, data),
            out_specs=PartitionSpec(),
        )
        whole = lambda p, x, y: linear_loss(p, anchors, x, y, stds)
        found, expected = (
            jax.jit(jax.value_and_grad(lambda p, x, y, f=f: f(p, x, y).sum()))(params, x, y)
            for f in (sharded, whole)
        )
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found, expected)

    @pytest.mark.claim("anchored-bayesian-ensemble-forecasting")
    def test_members_of_a_linear_model_are_spread_as_its_posterior(self):
        """The members' minima are at A⁻¹ (X'y / v + P a) for the anchors a, spread by A⁻¹ P A⁻¹,
        and with perturbed targets by A⁻¹, where A = X'X / v + P is the posterior's precision.
        Doubt grows away from the data, and the noise does not."""
        rng = np.random.default_rng(0)
        members, n, noise = 2000, 20, 0.2
        x = rng.normal(size=(n, 2)) * [1, 0.3]
        y = x @ [1.0, -2.0] + np.sqrt(noise) * rng.normal(size=n)
        stds = np.array([0.7, 1.5])
        prior = {"w": jnp.zeros(2)}, {"w": stds}
        anchors = losses.sample_anchors(*prior, members=members, key=jax.random.key(0))
        posterior = np.linalg.inv(x.T @ x / noise + np.diag(stds**-2))

        @jax.jit
        def slope(w, targets):
            def total(w):
                means = jnp.einsum("ni,mi->mn", x, w)
                return losses.anchored_ensemble_loss(
                    means, noise, targets, {"w": w}, anchors, {"w": stds}, dataset_size=n
                ).sum()

            return jax.grad(total)(w)

        perturbed = y + np.sqrt(noise) * rng.normal(size=(members, n))
        ridge = posterior @ x.T @ y / noise
        for targets, covariance in (
            (np.tile(y, (members, 1)), posterior @ np.diag(stds**-2.0) @ posterior),
            (perturbed, posterior),
        ):
            minima = (targets @ x / noise + anchors["w"] / stds**2) @ posterior
            assert np.abs(slope(0 * minima, targets)).max() > 1
            np.testing.assert_allclose(slope(minima, targets), 0, atol=1e-4)
            error = 4 * np.sqrt(np.diag(covariance) / members)
            assert np.all(np.abs(minima.mean(0) - ridge) < error)
            scale = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
            np.testing.assert_allclose(np.cov(minima.T) / scale, covariance / scale, atol=0.12)
        places = np.array([[0.0, 0.1], [3.0, 1.0]])
        moments = losses.ensemble_predictive_moments(minima @ places.T, jnp.full((1, 1), noise))
        assert moments.epistemic[1] > 20 * moments.epistemic[0]
        np.testing.assert_allclose(moments.aleatoric, noise, rtol=1e-5)


class TestAnchors:
    def test_are_drawn_once_for_each_member_at_the_priors_scale(self):
        params = {"a": jnp.zeros((50, 20), jnp.bfloat16), "b": [jnp.zeros(1000)]}
        anchors = losses.sample_anchors(
            params, {"a": 0.1, "b": [3.0]}, members=2, key=jax.random.key(1)
        )
        assert anchors["a"].dtype == jnp.bfloat16
        np.testing.assert_allclose(jnp.std(anchors["a"].astype("f")), 0.1, rtol=0.1)
        np.testing.assert_allclose(jnp.std(anchors["b"][0]), 3, rtol=0.1)
        assert abs(np.corrcoef(anchors["b"][0])[0, 1]) < 0.1

    def test_bad_input_is_named(self):
        params, anchors, x, y, stds = random_ensemble()
        draw = partial(losses.sample_anchors, params, key=jax.random.key(0))
        loss = partial(linear_loss, params, anchors, x, y)
        for message, call in (
            ("members must be in", lambda: draw(1.0, members=0)),
            ("prior_std must be in", lambda: draw(0.0, members=1)),
            ("prior_std must be a number or a tree", lambda: draw({"w": 1.0}, members=1)),
            ("prior_std must broadcast", lambda: draw({"w": np.ones(3), "b": 1.0}, members=1)),
            ("prior_std must be in", lambda: loss(-1.0)),
            ("where must broadcast", lambda: loss(stds, where=np.ones(5, bool))),
            ("variances must broadcast", lambda: loss(stds, variances=np.ones(5, "f"))),
            ("anchors", lambda: linear_loss(params, {"w": anchors["w"]}, x, y, stds)),
            ("targets must broadcast", lambda: linear_loss(params, anchors, x, y[:5], stds)),
            (
                "params must have a leading axis of 2 members",
                lambda: losses.anchored_ensemble_loss(
                    x[:2], 1.0, x[0], params, anchors, stds, dataset_size=2
                ),
            ),
            (
                "dataset_size must be in",
                lambda: losses.anchored_ensemble_loss(
                    x, 1.0, x[0], params, anchors, stds, dataset_size=0
                ),
            ),
        ):
            with pytest.raises(ValueError, match=message):
                call()
        with pytest.raises(TypeError, match="params must have a floating-point type"):
            losses.sample_anchors({"w": jnp.zeros(2, int)}, 1.0, members=1, key=jax.random.key(0))


class TestPredictions:
    def test_variance_is_that_of_the_mixture_and_one_member_has_no_doubt(self):
        rng = np.random.default_rng(0)
        means, variances = rng.normal(size=(5, 4)), rng.uniform(0.1, 2, size=(5, 4))
        of_members = jax.jit(losses.ensemble_predictive_moments, static_argnames="axis")
        moments = of_members(means.astype("f"), variances.astype("f"))
        second = (variances + means**2).mean(0)
        np.testing.assert_allclose(moments.variance, second - means.mean(0) ** 2, rtol=1e-5)
        np.testing.assert_allclose(moments.epistemic, means.var(0), rtol=1e-5)
        moved = of_members(means.T.astype("f"), variances.T.astype("f"), axis=1)
        np.testing.assert_allclose(moved.variance, moments.variance, rtol=1e-6)
        single = of_members(means[:1].astype("bfloat16"), np.ones(1, "f"))
        assert np.all(single.epistemic == 0)
        assert single.mean.dtype == jnp.bfloat16

    def test_mixture_matches_scipy_and_stays_finite_far_away(self):
        rng = np.random.default_rng(0)
        means, variances = rng.normal(size=(5, 4)), rng.uniform(0.1, 2, size=(5, 4))
        y = rng.normal(size=4)
        expected = -np.log(norm.pdf(y, means, np.sqrt(variances)).mean(0))
        loss = jax.jit(losses.mixture_negative_log_likelihood, static_argnames="axis")
        means, variances, y = (z.astype("f") for z in (means, variances, y))
        np.testing.assert_allclose(loss(means, variances, y), expected, rtol=1e-4)
        far = jax.vmap(jax.value_and_grad(loss, argnums=(0, 1, 2)), (1, 1, 0))(
            means, 1e-3 * variances, y + 1e4
        )
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(far))
        for message, arguments, options in (
            ("targets must have shape", (means, variances, y[:3]), {}),
            ("axis must name axes", (means, variances, y), {"axis": 2}),
            ("means must have at least one member", (means[:0], variances[:0], y), {}),
        ):
            with pytest.raises(ValueError, match=message):
                loss(*arguments, **options)


class TestRollout:
    def test_feeds_back_means_or_draws(self):
        decay = lambda history, control: (
            0.5 * history[-1] + 0.25 * history[0] + control["u"],
            0.04,
        )
        history = np.array([[1.0, 2.0], [3.0, 4.0]], "f")
        controls = {"u": np.arange(6, dtype="f").reshape(3, 2)}
        run = jax.jit(partial(losses.autoregressive_rollout, decay))
        rollout = run(history, controls)
        window = [*history]
        for t in range(3):
            window.append(0.5 * window[-1] + 0.25 * window[-2] + controls["u"][t])
        np.testing.assert_allclose(rollout.means, window[2:], rtol=1e-6)
        np.testing.assert_array_equal(rollout.values, rollout.means)
        still = lambda history, _: (history[-1], 0.04)
        walk = losses.autoregressive_rollout(
            still, np.zeros((1, 1000), "f"), horizon=4, key=jax.random.key(0)
        )
        np.testing.assert_allclose(walk.values.std(1), 0.2 * np.sqrt(np.arange(1, 5)), rtol=0.1)
        np.testing.assert_array_equal(walk.means[1:], walk.values[:-1])

    def test_bad_input_is_named(self):
        still = lambda history, _: (history[-1], 1.0)
        run = partial(losses.autoregressive_rollout, still)
        for message, call in (
            ("horizon must be given", lambda: run(np.ones(3, "f"))),
            ("horizon must be in", lambda: run(np.ones(3, "f"), horizon=0)),
            ("controls must be known for 2", lambda: run(np.ones(3, "f"), np.ones(3), horizon=2)),
            (r"history must have shape \[length", lambda: run(np.ones(0, "f"), horizon=1)),
        ):
            with pytest.raises(ValueError, match=message):
                call()
        with pytest.raises(TypeError, match="history must have a floating-point type"):
            run(np.arange(3), horizon=1)
