from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref import losses

PEER = np.load(Path(__file__).parents[1] / "oracles" / "segmentation.npz")


def vessel_with_gap():
    """A straight vessel along the second axis, and a prediction that lacks three voxels of it."""
    truth = np.zeros((1, 5, 9, 5), np.float32)
    truth[:, 2, :, 2] = 1
    gap = truth.copy()
    gap[:, 2, 3:6, 2] = 0
    return gap, truth


class TestNumbers:
    def test_matches_the_authors_training_step(self):
        """Two levels of deep supervision, three projections, value and gradient."""
        loss = lambda p: losses.spockmip_loss([p, PEER["coarse"]], PEER["vessels"])
        value, gradient = jax.jit(jax.value_and_grad(loss))(PEER["volume"])
        np.testing.assert_allclose(value, PEER["spockmip"], rtol=1e-5)
        np.testing.assert_allclose(gradient, PEER["spockmip_gradient"], rtol=1e-3, atol=1e-7)

    def test_projections_given_apart_are_compared_with(self):
        p, y = PEER["volume"], PEER["vessels"]
        whole = [np.maximum(y.max(axis), 0) for axis in (1, 3)]
        ours = losses.projection_loss(p, target_projections=whole, axes=(1, 3))
        np.testing.assert_allclose(ours, losses.projection_loss(p, y, axes=(1, 3)), rtol=1e-6)
        beyond = [np.ones_like(projection) for projection in whole]
        seen = losses.projection_loss(p, target_projections=beyond, axes=(1, 3))
        full = [
            losses.focal_tversky_loss(p.max(axis)[0], beyond[i][0]) for i, axis in ((0, 1), (1, 3))
        ]
        np.testing.assert_allclose(seen[0], sum(full), rtol=1e-5)

    def test_the_gradient_of_a_projection_goes_to_the_maximum(self):
        volume = np.random.default_rng(0).permutation(24).reshape(2, 3, 4).astype(np.float32)
        gradient = jax.grad(lambda v: losses.maximum_intensity_projection(v, axis=1).sum())(volume)
        assert np.array_equal(gradient, volume == volume.max(1, keepdims=True))
        tied = jax.grad(lambda v: losses.maximum_intensity_projection(v, axis=0))(jnp.ones(4))
        np.testing.assert_allclose(tied, 0.25)


class TestClaims:
    @pytest.mark.claim("spockmip")
    def test_a_gap_shows_from_the_side_and_not_along_the_vessel(self):
        """Along the vessel the projections agree, from either side they do not; every voxel of the
        gap is pulled up by the side views, and the loss is 0 for the vessel itself alone."""
        gap, truth = vessel_with_gap()
        run = jax.jit(losses.projection_loss, static_argnames="axes")
        assert run(gap, truth, axes=2) == 0
        assert run(gap, truth, axes=1) > 0.2
        np.testing.assert_allclose(
            run(gap, truth, axes=(1, 2, 3)), 2 * run(gap, truth, axes=1), rtol=1e-6
        )
        assert run(truth, truth, axes=(1, 2, 3)) == 0
        faint = gap + 0.1 * (truth - gap)
        pull = jax.grad(lambda p: run(p, truth, axes=(1, 2, 3)).sum())(faint)
        assert np.all(pull[(truth - gap) == 1] < 0)
        along = jax.grad(lambda p: run(p, truth, axes=2).sum())(faint)
        assert np.all(along[(truth - gap) == 1] == 0)

    def test_base_loss_of_half_weights_without_power_is_dice(self):
        p, y = PEER["volume"], PEER["vessels"]
        base = partial(losses.focal_tversky_loss, false_negative_weight=0.5, gamma=1.0)
        ours = losses.spockmip_loss(p, y, base_loss=base, projection_weight=0.0)
        np.testing.assert_allclose(ours, 0.7 * losses.dice_loss(p, y, smooth=2.0), rtol=1e-6)


class TestEdges:
    def test_no_vessel_at_all(self):
        nothing = jnp.zeros((2, 3, 3, 3))
        value, gradient = jax.value_and_grad(losses.spockmip_loss)(nothing, nothing)
        assert value == 0
        assert np.all(np.isfinite(gradient))

    def test_images_project_to_lines(self):
        p, y = PEER["volume"][:, 0], PEER["vessels"][:, 0]
        line = losses.focal_tversky_loss(p[1].max(-1), y[1].max(-1))
        np.testing.assert_allclose(losses.projection_loss(p, y)[1], line, rtol=1e-6)

    def test_masked_voxels_are_not_seen(self):
        volume = jnp.array([[-3, 2], [-1, -2], [7, 8]])
        where = jnp.array([[True, False], [True, True], [False, False]])
        seen = losses.maximum_intensity_projection(volume, axis=1, where=where)
        assert np.array_equal(seen, [-3, -1, 0])
        p, y = PEER["volume"], PEER["vessels"]
        where = np.arange(8) < 5
        ours = losses.spockmip_loss(p, y, where=where, axes=(1, 2))
        kept = losses.spockmip_loss(p[..., :5], y[..., :5], axes=(1, 2))
        np.testing.assert_allclose(ours, kept, rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda p, y: losses.maximum_intensity_projection(p, axis=4), "axis must name axes"),
        (lambda p, y: losses.projection_loss(p), "one of targets and target_projections"),
        (lambda p, y: losses.projection_loss(p, y, axes=0), "axes must not have the batch"),
        (lambda p, y: losses.projection_loss(p, y[:1]), "targets must have shape"),
        (
            lambda p, y: losses.projection_loss(p, target_projections=[y[:, 0]], axes=(1, 2)),
            "one array for each of 2 axes",
        ),
        (
            lambda p, y: losses.projection_loss(p, target_projections=[y[:, 0]], axes=2),
            "targets must have shape",
        ),
        (lambda p, y: losses.spockmip_loss([p] * 4, y), "level_weights must have 4"),
        (lambda p, y: losses.spockmip_loss(p[:, :3], y), "shape that divides"),
        (lambda p, y: losses.spockmip_loss(p, y, volume_weight=-1.0), "volume_weight must be"),
    ],
)
def test_bad_input_is_named(loss, message):
    with pytest.raises(ValueError, match=message):
        loss(PEER["volume"], PEER["vessels"])
