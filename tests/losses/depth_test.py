from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from jaxref import losses

PEER = np.load(Path(__file__).parents[1] / "oracles" / "survey_losses.npz")
MAP_LOSSES = {
    "scale_invariant_loss": losses.scale_invariant_loss,
    "scale_shift_invariant_loss": losses.scale_shift_invariant_loss,
    "edge_loss": losses.edge_loss,
}


def maps(shape=(2, 5, 6), seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.uniform(0.5, 3, size=(2, *shape)).astype("f"))


def images(shape=(2, 5, 6, 3), seed=0):
    return tuple(np.random.default_rng(seed).uniform(size=(2, *shape)).astype("f"))


def literal_scale_invariant(p, t, where):
    d = np.log(np.float64(p[where])) - np.log(np.float64(t[where]))
    return np.mean(d**2) - 0.3 * np.mean(d) ** 2


def slopes(x, where):
    """Every difference of neighbours of which both are there, along x and along y."""
    found = ([], [])
    for i, j in np.ndindex(*x.shape):
        for k, (di, dj) in enumerate(((0, 1), (1, 0))):
            if (
                i + di < x.shape[0]
                and j + dj < x.shape[1]
                and where[i, j]
                and where[i + di, j + dj]
            ):
                found[k].append(x[i + di, j + dj] - x[i, j])
    return found


def literal_scale_shift(p, t, where):
    design = np.stack([np.float64(p[where]), np.ones(where.sum())], -1)
    (s, b), *_ = np.linalg.lstsq(design, np.float64(t[where]))
    r = s * np.float64(p) + b - t
    loss = np.mean(r[where] ** 2) / 2
    for k in range(2):
        part, there = r[:: 2**k, :: 2**k], where[:: 2**k, :: 2**k]
        loss += 0.7 * sum(np.abs(x).sum() for x in slopes(part, there)) / there.sum()
    return loss


def literal_edges(p, t, where):
    return sum(np.mean(np.abs(x)) for x in slopes(np.float64(p) - t, where))


def literal_photometric(a, b):
    """Pixel by pixel, with windows of 3 by 3 in images that are continued by reflection."""
    a, b = np.float64(a), np.float64(b)
    height, width, channels = a.shape
    rows, columns = (np.abs(np.arange(-1, n + 1)) for n in (height, width))
    rows[-1], columns[-1] = height - 2, width - 2
    loss = np.zeros((height, width))
    for i, j in np.ndindex(height, width):
        for c in range(channels):
            x, y = (z[np.ix_(rows[i : i + 3], columns[j : j + 3], [c])] for z in (a, b))
            c1, c2 = 0.01**2, 0.03**2
            ssim = (2 * x.mean() * y.mean() + c1) * (
                2 * np.mean((x - x.mean()) * (y - y.mean())) + c2
            )
            ssim /= (x.mean() ** 2 + y.mean() ** 2 + c1) * (x.var() + y.var() + c2)
            loss[i, j] += (0.85 * (1 - ssim) / 2 + 0.15 * abs(a[i, j, c] - b[i, j, c])) / channels
    return loss


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(
        ("scale", losses.scale_invariant_loss, {"balance": 0.3}, literal_scale_invariant),
        (
            "scale_shift",
            losses.scale_shift_invariant_loss,
            {"gradient_weight": 0.7, "num_scales": 2},
            literal_scale_shift,
        ),
        ("edges", losses.edge_loss, {}, literal_edges),
    )
    def test_losses_of_maps_match_the_formulas(self, loss, settings, literal):
        p, t = maps()
        where = np.random.default_rng(1).uniform(size=p.shape) < 0.8
        ours = self.variant(lambda p, t, where: loss(p, t, where=where, **settings))
        poisoned = np.where(where, p, np.nan)
        expected = [literal(*arguments) for arguments in zip(p, t, where)]
        np.testing.assert_allclose(ours(poisoned, t, where), expected, rtol=2e-5)
        everything = np.ones_like(where)
        expected = [literal(*arguments) for arguments in zip(p, t, everything)]
        np.testing.assert_allclose(ours(p, t, None), expected, rtol=2e-5)

    def test_ssim_matches_pytorch_msssim(self):
        p, t = (np.moveaxis(PEER[f"ssim_loss_{x}"], 1, -1) for x in ("prediction", "target"))
        value, vjp = jax.vjp(jax.jit(lambda p: losses.ssim_loss(p, t)), p)
        # the peer has the mean of each channel
        np.testing.assert_allclose(value, PEER["ssim_loss_value"], rtol=1e-5)
        expected = np.moveaxis(PEER["ssim_loss_gradient"], 1, -1)
        np.testing.assert_allclose(vjp(jnp.ones(2))[0], expected, rtol=1e-3, atol=1e-6)

    def test_photometric_loss_and_the_least_of_several_match_the_formula(self):
        a, b = images((5, 6, 3))
        c = np.clip(b + 0.1, 0, 1)
        each = [literal_photometric(x, b) for x in (a, c)]
        np.testing.assert_allclose(losses.photometric_loss(a, b), each[0], rtol=1e-4)
        ours = losses.minimum_reprojection_loss([a, c], b)
        np.testing.assert_allclose(ours, np.minimum(*each), rtol=1e-4)
        source = np.where(np.arange(6)[:, None] < 3, b + 0.01, a).astype("f")
        still = literal_photometric(source, b)
        ours = losses.minimum_reprojection_loss([a, c], b, sources=[source, a])
        kept = np.minimum(*each) < np.minimum(still, each[0])
        np.testing.assert_allclose(ours, np.where(kept, np.minimum(*each), 0), rtol=1e-4)
        assert kept.any() != kept.all()
        bytes_ = losses.photometric_loss(255 * a, 255 * b, max_value=255)
        np.testing.assert_allclose(bytes_, each[0], rtol=1e-4)

    def test_smoothness_matches_the_formula(self):
        d, _ = maps((5, 6))
        image = images((5, 6, 3))[0]
        where = np.random.default_rng(1).uniform(size=d.shape) < 0.8
        edges = [slopes(image[..., c], where) for c in range(3)]
        expected = 0
        for k, slope in enumerate(slopes(np.float64(d), where)):
            steps = np.mean([np.abs(edge[k]) for edge in edges], axis=0)
            expected += np.mean(np.abs(slope) * np.exp(-steps))
        poisoned = np.where(where, d, np.nan)
        ours = jax.jit(losses.disparity_smoothness_loss)(poisoned, image, where=where)
        np.testing.assert_allclose(ours, expected, rtol=1e-5)

    def test_left_right_consistency_matches_interpolation(self):
        left, right = 2 * np.stack(maps((3, 7)))
        columns, terms = np.arange(7), []
        for a, b, sign in ((left, right, -1), (right, left, 1)):
            for row, other in zip(np.float64(a), b):
                terms.append(np.abs(row - np.interp(columns + sign * row, columns, other)))
        expected = np.mean(terms[:3]) + np.mean(terms[3:])
        ours = losses.left_right_consistency_loss(left, right)
        np.testing.assert_allclose(ours, expected, rtol=1e-5)

    def test_gradients_against_finite_differences(self):
        p, t = (x.astype(np.float64) for x in maps((4, 5)))
        image = np.float64(images((4, 5, 2))[0])
        with jax.enable_x64(True):

            def all_of_them(p):
                return [
                    losses.scale_invariant_loss(p, t),
                    losses.scale_shift_invariant_loss(p, t, num_scales=2),
                    losses.edge_loss(p, t),
                    losses.disparity_smoothness_loss(p, image),
                    losses.left_right_consistency_loss(p, t),
                    losses.photometric_loss(p[..., None], t[..., None]),
                ]

            check_grads(jax.jit(all_of_them), (p,), order=1, modes=["rev"], eps=1e-6)


class TestProperties:
    def test_scale_and_shift_are_free_where_they_should_be(self):
        p, t = maps()
        free = losses.scale_invariant_loss(p, t, balance=1.0)
        np.testing.assert_allclose(
            losses.scale_invariant_loss(7 * p, t, balance=1.0), free, rtol=1e-4
        )
        assert np.all(losses.scale_invariant_loss(7 * p, t) > free)
        free = losses.scale_shift_invariant_loss(p, t)
        moved = losses.scale_shift_invariant_loss(5 * p - 20, t)
        np.testing.assert_allclose(moved, free, rtol=1e-4)
        np.testing.assert_allclose(losses.edge_loss(p + 9, t), losses.edge_loss(p, t), rtol=1e-4)

    def test_an_edge_in_the_image_excuses_one_in_the_disparity(self):
        step = np.repeat(np.arange(2.0, dtype="f"), 3)[None].repeat(4, 0)
        at_edge = losses.disparity_smoothness_loss(step, 3 * step[..., None])
        elsewhere = losses.disparity_smoothness_loss(step, 3 * step.T.reshape(4, 6, 1))
        assert at_edge < 0.1 * elsewhere


@pytest.mark.parametrize("name", MAP_LOSSES)
class TestMaps:
    def test_edges_and_transformations(self, name):
        loss = MAP_LOSSES[name]
        p, t = maps((8, 4, 5))
        gradient_of = jax.jit(jax.value_and_grad(lambda p, t, where: loss(p, t, where=where).sum()))
        constant = np.full_like(p, 2)
        for prediction, target, where in (
            (t, t, np.ones_like(t, bool)),
            (constant, constant, np.ones_like(t, bool)),
            (constant, t, np.ones_like(t, bool)),
            (np.full_like(p, np.nan), t, np.zeros_like(t, bool)),
        ):
            value, gradient = gradient_of(prediction, target, where)
            chex.assert_tree_all_finite((value, gradient))
            if target is not t or prediction is t or not where.any():
                np.testing.assert_allclose(value, 0, atol=1e-5)
        expected = jax.jit(loss)(p, t)
        rows = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
        ours = jax.jit(jax.vmap(loss))(*jax.device_put((p, t), rows))
        np.testing.assert_allclose(ours, expected, rtol=1e-5)
        half, loss = p.astype(jnp.bfloat16), jax.jit(loss)
        assert loss(half, t).dtype == jnp.bfloat16
        expected = loss(half.astype("f"), t).astype(jnp.bfloat16)
        np.testing.assert_array_equal(loss(half, t), expected)

    def test_bad_input_is_named(self, name):
        loss = MAP_LOSSES[name]
        p, t = maps()
        with pytest.raises(ValueError, match="targets must have shape"):
            loss(p, t[:1])
        with pytest.raises(ValueError, match=r"predictions must have shape \[..., height"):
            loss(p[0, 0], t[0, 0])
        with pytest.raises(ValueError, match="where must broadcast"):
            loss(p, t, where=np.ones((2, 5, 5), bool))
        with pytest.raises(TypeError, match="predictions must have a floating-point type"):
            loss(p.astype(int), t)


def test_pixels_that_are_not_there_leave_their_neighbours_alone():
    a, b = images((5, 6, 3))
    where = np.ones((5, 6), bool)
    where[2, 3] = False
    poisoned = np.where(where[..., None], a, np.nan)
    value, vjp = jax.vjp(jax.jit(lambda p: losses.photometric_loss(p, b, where=where)), poisoned)
    (gradient,) = vjp(jnp.ones((5, 6)))
    chex.assert_tree_all_finite((value, gradient))
    assert value[2, 3] == 0
    assert np.all(gradient[2, 3] == 0)
    expected = losses.photometric_loss(a, b)
    np.testing.assert_allclose(value[:, :2], expected[:, :2], rtol=1e-5)
    best = losses.minimum_reprojection_loss([poisoned, a], b, where=where)
    assert best[2, 3] == 0


def test_equal_and_flat_images_have_finite_gradients():
    loss = lambda a, b: losses.photometric_loss(a, b).sum()
    gradient_of = jax.jit(jax.value_and_grad(loss))
    for a in (np.zeros((4, 4, 1), "f"), np.full((4, 4, 1), 0.5, "f")):
        value, gradient = gradient_of(a, a)
        np.testing.assert_allclose(value, 0, atol=1e-4)
        np.testing.assert_allclose(gradient, 0, atol=1e-4)
    half = a.astype(jnp.bfloat16)
    assert losses.photometric_loss(half, a).dtype == jnp.bfloat16
    assert losses.ssim_loss(half, a, window_size=3).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, i: losses.scale_invariant_loss(p, p, balance=2.0), "balance must be in"),
        (lambda p, i: losses.scale_shift_invariant_loss(p, p, num_scales=0), "num_scales"),
        (lambda p, i: losses.disparity_smoothness_loss(p, p), "images must have shape"),
        (lambda p, i: losses.left_right_consistency_loss(p, p[:1]), "right_disparities must have"),
        (lambda p, i: losses.photometric_loss(i, i, ssim_weight=2.0), "ssim_weight must be in"),
        (lambda p, i: losses.photometric_loss(i, i[:1]), "targets must have shape"),
        (lambda p, i: losses.ssim_loss(i, i), "window_size must be odd and at most 5"),
        (lambda p, i: losses.ssim_loss(i, i, window_size=3, sigma=0.0), "sigma must be in"),
        (lambda p, i: losses.minimum_reprojection_loss([], i), "at least one image"),
    ],
)
def test_bad_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call(maps()[0], images()[0])
