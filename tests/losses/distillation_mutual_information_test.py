from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxref import losses

PEER = np.load(Path(__file__).parents[1] / "oracles" / "distillation.npz")
BOUND = losses.mutual_information_lower_bound


@partial(jax.jit, static_argnames="kind")
def value_and_gradient(scores, log_baseline=None, alpha=0.5, kind="interpolated"):
    bound = partial(BOUND, kind=kind, log_baseline=log_baseline, alpha=alpha)
    return jax.value_and_grad(bound)(scores)


class TestNumbers:
    def test_the_loss_matches_the_release(self):
        loss = jax.jit(jax.value_and_grad(losses.mi_alpha_loss))
        for alpha in (0.1, 0.5, 0.9):
            value, gradient = loss(PEER["scores"], PEER["log_baseline"], alpha=alpha)
            np.testing.assert_allclose(value, -PEER[f"mi_{alpha}"], rtol=1e-5)
            expected = -PEER[f"mi_{alpha}_grad"]
            np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("kind", ["tuba", "nwj"])
    def test_bounds_match_the_release(self, kind):
        baseline = PEER["log_baseline"] if kind == "tuba" else None
        value, gradient = value_and_gradient(PEER["scores"], baseline, kind=kind)
        np.testing.assert_allclose(value, PEER[kind], rtol=1e-5)
        np.testing.assert_allclose(gradient, PEER[f"{kind}_grad"], rtol=1e-4, atol=1e-6)

    def test_infonce_matches_the_formula(self):
        f = np.float64(PEER["scores"])
        expected = np.log(6) + np.mean(np.diag(f) - np.log(np.exp(f).sum(1)))
        value, gradient = value_and_gradient(PEER["scores"], kind="infonce")
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        softmax = np.exp(f) / np.exp(f).sum(1, keepdims=True)
        np.testing.assert_allclose(gradient, (np.eye(6) - softmax) / 6, rtol=1e-4, atol=1e-6)


class TestClaims:
    @pytest.mark.claim("distiller-mi-alpha")
    def test_alpha_trades_the_variance_of_the_bound_for_its_bias(self):
        """Gaussians with correlation 0.9 in 4 dimensions, 3.32 nats apart from independence, with
        the critic that makes every bound tight: 100 batches of 64."""
        rng = np.random.default_rng(0)
        y, noise = rng.normal(size=(2, 100, 64, 1, 4)).astype("f")
        x = np.swapaxes(0.9 * y + np.sqrt(0.19) * noise, 1, 2)
        # log p(x | y) - log p(x)
        scores = np.sum(x**2 / 2 - (x - 0.9 * y) ** 2 / 0.38, -1) - 2 * np.log(0.19)
        bounds = jax.jit(jax.vmap(lambda f, alpha: BOUND(f, alpha=alpha), in_axes=(0, None)))
        found = [np.asarray(bounds(scores, alpha)) for alpha in (0.0, 0.5, 1.0)]
        means, spreads = ([f(x) for x in found] for f in (np.mean, np.std))
        np.testing.assert_allclose(means, [3.34, 3.15, 2.82], atol=0.1)
        np.testing.assert_allclose(spreads, [0.33, 0.21, 0.17], atol=0.06)

    def test_alpha_0_is_tuba_and_alpha_1_does_not_see_the_rows_level(self):
        scores, baseline = PEER["scores"], PEER["log_baseline"]
        tuba, slope = value_and_gradient(scores, baseline, kind="tuba")
        ours, gradient = value_and_gradient(scores, baseline, 0.0)
        np.testing.assert_allclose(ours, tuba, rtol=1e-6)
        np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-6)
        value, _ = value_and_gradient(scores, baseline, 1.0)
        moved, _ = value_and_gradient(scores + 5 * baseline[:, None], -baseline, 1.0)
        np.testing.assert_allclose(moved, value, rtol=1e-5)

    def test_bounds_on_the_bound(self):
        for size in (0.0, 3.0, 1e4):
            for alpha in (0.1, 0.5, 1.0):
                value, gradient = value_and_gradient(
                    size * PEER["scores"], PEER["log_baseline"], alpha
                )
                limit = np.log(5) if alpha == 1 else 1 + np.log(5 / alpha)
                assert value <= limit + 1e-4
                assert np.isfinite(value)
                assert np.all(np.isfinite(gradient))


class TestTransformations:
    def test_rows_over_eight_devices(self):
        rng = np.random.default_rng(0)
        scores = (rng.normal(size=(8, 8)) + 2 * np.eye(8)).astype("f")
        baseline = rng.normal(size=8).astype("f")

        def bounds(scores, baseline, axis_name=None):
            keywords = {"axis_name": axis_name}
            return jnp.stack(
                [
                    losses.mi_alpha_loss(scores, baseline, alpha=0.7, **keywords),
                    BOUND(scores, kind="infonce", **keywords),
                ]
            )

        sharded = jax.shard_map(
            partial(bounds, axis_name="data"),
            mesh=jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
            in_specs=(PartitionSpec("data"), PartitionSpec("data")),
            out_specs=PartitionSpec(),
        )

        def run(f):
            def total(*arguments):
                values = f(*arguments)
                return values @ np.float32([1, 3]), values

            return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(
                scores, baseline
            )

        ((_, found), found_slopes), ((_, expected), slopes) = run(sharded), run(bounds)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        for mine, theirs in zip(found_slopes, slopes):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


class TestEdges:
    @pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
    def test_extreme_and_equal_scores_stay_finite(self, alpha):
        for size in (1e4, -1e4, 0.0):
            value, gradient = value_and_gradient(
                np.full((6, 6), size, "f") * np.eye(6, dtype="f"), np.zeros(6, "f"), alpha
            )
            assert np.isfinite(value)
            assert np.all(np.isfinite(gradient))

    def test_one_score_that_makes_up_its_row(self):
        """What is left without it is 30 nats below, where a difference of sums would be 0."""
        scores = np.float32([[30, 0, 1], [0, 30, 2], [1, 2, 30]])
        f = np.float64(scores)
        others = [[np.log(np.mean(np.exp(np.delete(f[i], j)))) for j in range(3)] for i in range(3)]
        off = ~np.eye(3, dtype=bool)
        joint = np.diag(f)[:, None] - others
        marginal = np.exp(f - np.diag(others)[:, None])
        expected = 1 + joint[off].mean() - marginal[off].mean()
        value, _ = value_and_gradient(scores, None, 1.0)
        np.testing.assert_allclose(value, expected, atol=1e-5)

    def test_half_precision_and_bad_input(self):
        scores = PEER["scores"]
        half = jnp.asarray(scores, jnp.bfloat16)
        ours, _ = value_and_gradient(half, PEER["log_baseline"])
        assert ours.dtype == jnp.bfloat16
        with pytest.raises(ValueError, match=r"scores must have shape \[K, K\]"):
            BOUND(scores[:4])
        with pytest.raises(ValueError, match="at least two pairs"):
            BOUND(scores[:1, :1])
        with pytest.raises(ValueError, match="kind must be one of"):
            BOUND(scores, kind="js")
        with pytest.raises(ValueError, match="alpha must be in"):
            BOUND(scores, alpha=1.5)
        with pytest.raises(ValueError, match="log_baseline must have shape"):
            losses.mi_alpha_loss(scores, np.zeros(5))
        with pytest.raises(ValueError, match="log_baseline must be None"):
            BOUND(scores, kind="nwj", log_baseline=np.zeros(6))
        with pytest.raises(TypeError, match="scores must have a floating-point type"):
            BOUND(scores.astype(int))
