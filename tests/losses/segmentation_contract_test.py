"""What every segmentation loss owes its caller, over all their files."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxref import losses, metrics

BATCH, HEIGHT, WIDTH, CLASSES = 8, 6, 5, 3
RNG = np.random.default_rng(0)
LABELS = RNG.integers(CLASSES, size=(BATCH, HEIGHT, WIDTH))
HOLES = RNG.random(LABELS.shape) < 0.15  # pixels that do not count, and whose labels are no class
IDS = np.where(HOLES, 255, LABELS)
HOT = np.eye(CLASSES, dtype=np.float32)[LABELS]
BINARY = np.where(HOLES, 0, LABELS > 0).astype(np.float32)
SIGNED = losses.signed_distance_map(np.moveaxis(HOT, -1, 1), axes=(2, 3))
SIGNED = np.moveaxis(SIGNED, 1, -1)
DISTANCE = RNG.integers(5, size=LABELS.shape).astype(np.float32)
MATRIX = np.array([[0, 1, 1], [1, 0, 0.4], [1, 0.4, 0]], np.float32)


def entries(where):
    return where[..., None]


def mean_move(a, b):
    """A network that says by how much the mass of two maps differs."""
    return jnp.eye(2, 3) + jnp.mean(a - b, axis=(1, 2))[:, None, None]


def conditional(f, ids, where, hot=HOT, **k):
    hot = hot[: len(f)]
    boundary = hot[..., 0] < 2
    return losses.conditional_boundary_loss(
        f, ids, logits=hot, boundary=boundary, classifier=jnp.sin, where=where, **k
    )


def active(z, ids, where, distance=DISTANCE, **k):
    distance = distance[: len(z)]
    return losses.active_boundary_loss(z, distance, max_boundary_fraction=0.5, where=where, **k)


# Each takes predictions, ids of the labels, a mask of the pixels and maybe the name of an axis.
OVERLAP = {
    name: lambda p, ids, where, loss=getattr(losses, name), **k: loss(
        p, ids, where=entries(where), **k
    )
    for name in (
        "dice_loss",
        "jaccard_loss",
        "tversky_loss",
        "log_cosh_dice_loss",
        "focal_tversky_loss",
        "sensitivity_specificity_loss",
        "lovasz_softmax_loss",
    )
}
OF_PROBABILITIES = OVERLAP | {
    "dice_loss without smoothing": lambda p, ids, where, **k: losses.dice_loss(
        p, ids, where=entries(where), smooth=0.0, **k
    ),
    "generalized_wasserstein_dice_loss": lambda p, ids, where, **k: (
        losses.generalized_wasserstein_dice_loss(p, ids, distance_matrix=MATRIX, where=where, **k)
    ),
    "robust_t_loss": lambda p, ids, where: losses.robust_t_loss(
        p, HOT[: len(p)], where=entries(where)
    ),
    "boundary_loss": lambda p, ids, where: losses.boundary_loss(
        p, SIGNED[: len(p)], where=entries(where)
    ),
    "hausdorff_distance_loss": lambda p, ids, where: losses.hausdorff_distance_loss(
        p, ids, where=entries(where)
    ),
    "boundary_difference_over_union_loss": lambda p, ids, where: (
        losses.boundary_difference_over_union_loss(p, ids, where=entries(where))
    ),
    "inverse_form_loss": lambda p, ids, where: losses.inverse_form_loss(
        p[..., 0], HOT[: len(p), ..., 0], transform_network=mean_move, where=where
    ),
    "spockmip_loss": lambda p, ids, where, **k: losses.spockmip_loss(
        p[..., 0], ids == 0, where=where, **k
    ),
    "conditional_boundary_loss": conditional,
}
OF_LOGITS = {
    "lovasz_hinge_loss": lambda z, ids, where, **k: losses.lovasz_hinge_loss(
        z[..., 0], ids == 0, where=where, **k
    ),
    "topk_cross_entropy": lambda z, ids, where, **k: losses.topk_cross_entropy(
        z, ids, fraction=0.3, where=where, **k
    ),
    "distance_weighted_cross_entropy": lambda z, ids, where: losses.distance_weighted_cross_entropy(
        z, ids, DISTANCE[: len(z)], where=where
    ),
    "region_mutual_information_loss": lambda z, ids, where: losses.region_mutual_information_loss(
        z, ids, pool_size=1, where=where
    ),
    "boundary_aware_loss": lambda z, ids, where: losses.boundary_aware_loss(z, ids, where=where),
    "region_wise_loss": lambda z, ids, where: losses.region_wise_loss(
        z, SIGNED[: len(z)], where=where
    ),
    "active_boundary_loss": active,
    "combo_loss": lambda z, ids, where: losses.combo_loss(z, ids, where=where),
    "exponential_logarithmic_loss": lambda z, ids, where: losses.exponential_logarithmic_loss(
        z, ids, where=where
    ),
    "unified_focal_loss": lambda z, ids, where: losses.unified_focal_loss(z, ids, where=where),
}
ALL = OF_PROBABILITIES | OF_LOGITS
OF_THE_SET = [
    *OVERLAP,
    "generalized_wasserstein_dice_loss",
    "spockmip_loss",
    "conditional_boundary_loss",
    "lovasz_hinge_loss",
    "topk_cross_entropy",
    "active_boundary_loss",
]


def predictions(name, number=2):
    """Random ones, and such as leave nothing to choose: right, wrong, none, all."""
    random = np.random.default_rng(1).normal(size=HOT[:number].shape).astype(np.float32)
    hot = HOT[:number]
    if name in OF_LOGITS:
        extremes = [2e4 * hot - 1e4, 1e4 - 2e4 * hot, 0 * hot - 1e4, 0 * hot + 1e4, 0 * hot]
        return np.stack([2 * random, *extremes])
    return np.stack([np.asarray(jax.nn.softmax(random)), hot, 1 - hot, 0 * hot, 0 * hot + 1])


@pytest.mark.parametrize("name", ALL)
def test_extremes_masks_and_gradients(name):
    """In one compiled call: the extremes, NaN where nothing counts, and nothing that counts."""
    x = predictions(name)
    ids, counts = jnp.asarray(IDS[:2]), ~HOLES[:2]
    poisoned = np.where(entries(counts), x[:1], np.nan)
    cases = np.concatenate([x, poisoned, x[:1]])
    masks = np.stack([counts] * (len(cases) - 1) + [np.zeros_like(counts)])

    @jax.jit
    @jax.vmap
    def run(x, where):
        loss = lambda x: ALL[name](x, ids, where)
        values, vjp = jax.vjp(loss, x)
        return values, vjp(jnp.ones_like(values))[0]

    values, gradients = run(cases, masks)
    assert np.isfinite(values).all()
    assert np.isfinite(gradients).all()
    np.testing.assert_allclose(values[-2], values[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradients[-2], gradients[0], rtol=1e-4, atol=1e-6)
    assert np.abs(gradients[0]).max() > 0
    assert np.all(gradients[-2][HOLES[:2]] == 0)
    assert np.all(values[-1] == 0)
    assert np.all(gradients[-1] == 0)


@pytest.mark.parametrize("name", ALL)
def test_the_result_has_the_type_of_the_predictions(name):
    for dtype in (jnp.bfloat16, jnp.float16):
        half = jnp.asarray(predictions(name)[0], dtype)
        values = jax.eval_shape(lambda x: ALL[name](x, IDS[:2], jnp.asarray(~HOLES[:2])), half)
        assert values.dtype == dtype


@pytest.mark.parametrize("name", ["tversky_loss", "lovasz_softmax_loss", "unified_focal_loss"])
def test_half_precision_computes_in_float32(name):
    half = jnp.asarray(predictions(name)[0], jnp.bfloat16)
    run = jax.jit(lambda x: ALL[name](x, IDS[:2], jnp.asarray(~HOLES[:2])))
    expected = run(half.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_allclose(run(half).astype("f"), expected.astype("f"), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "check_vma"),
    [*((name, True) for name in OF_THE_SET), ("dice_loss", False), ("topk_cross_entropy", False)],
)
def test_a_set_over_eight_devices(name, check_vma):
    """Value and gradient of a batch in eight shards are those of the whole."""
    mesh = jax.make_mesh((8,), ("data",))
    # What belongs to the images has to be spread with them.
    more = {"active_boundary_loss": [DISTANCE], "conditional_boundary_loss": [HOT]}.get(name, [])
    inputs = [predictions(name, BATCH)[0], IDS, ~HOLES, *more]
    loss = ALL[name]
    sharded = jax.shard_map(
        partial(loss, axis_name="data"),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P(),
        check_vma=check_vma,
    )
    placed = jax.device_put(inputs, NamedSharding(mesh, P("data")))
    ours = jax.jit(jax.value_and_grad(sharded))(*placed)
    whole = jax.jit(jax.value_and_grad(loss))(*map(jnp.asarray, inputs))
    np.testing.assert_allclose(ours[0], whole[0], rtol=1e-5)
    np.testing.assert_allclose(ours[1], whole[1], rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_descent_on_each_loss_finds_a_disc():
    """From noise, each loss that stands alone is lowered by steps of one size until the argmax of
    the logits overlaps with a disc by a Dice coefficient of more than 0.95."""
    grid = np.indices((16, 16))
    disc = ((grid[0] - 8) ** 2 + (grid[1] - 7) ** 2 < 22)[None]
    ids, hot = disc.astype(int), np.eye(2, dtype=np.float32)[disc.astype(int)]
    proximity = losses.boundary_proximity_map(disc[0])[None]
    regions = np.stack([losses.rectified_region_map(m[0]) for m in (~disc, disc)], -1)[None]
    matrix = 1 - np.eye(2)
    of_probabilities = {
        loss: lambda p, loss=loss: getattr(losses, loss)(p, ids)
        for loss in (
            "dice_loss",
            "jaccard_loss",
            "tversky_loss",
            "log_cosh_dice_loss",
            "focal_tversky_loss",
            "sensitivity_specificity_loss",
            "lovasz_softmax_loss",
            "hausdorff_distance_loss",
            "boundary_difference_over_union_loss",
        )
    } | {
        "generalized_wasserstein_dice_loss": lambda p: losses.generalized_wasserstein_dice_loss(
            p, ids, distance_matrix=matrix
        ),
        "robust_t_loss": lambda p: losses.robust_t_loss(p, hot),
        "spockmip_loss": lambda p: losses.spockmip_loss(p[..., 1], ids),
        "boundary and Dice": lambda p: (
            losses.dice_loss(p, ids)
            + 0.1 * losses.boundary_loss(p[0, ..., 1], losses.signed_distance_map(disc[0])).mean()
        ),
    }
    of_logits = {
        "topk_cross_entropy": lambda z: losses.topk_cross_entropy(z, ids),
        "distance_weighted_cross_entropy": lambda z: losses.distance_weighted_cross_entropy(
            z, ids, proximity
        ),
        "lovasz_hinge_loss": lambda z: losses.lovasz_hinge_loss(z[..., 1] - z[..., 0], ids),
        "region_wise_loss": lambda z: losses.region_wise_loss(z, regions),
        "region_mutual_information_loss": lambda z: losses.region_mutual_information_loss(
            z, ids, pool_size=1
        ),
        "combo_loss": lambda z: losses.combo_loss(z, ids),
        "exponential_logarithmic_loss": lambda z: losses.exponential_logarithmic_loss(z, ids),
        "unified_focal_loss": lambda z: losses.unified_focal_loss(z, ids),
    }
    every = of_logits | {
        name: lambda z, loss=loss: loss(jax.nn.softmax(z))
        for name, loss in of_probabilities.items()
    }
    start = 0.5 * np.random.default_rng(0).normal(size=hot.shape).astype(np.float32)

    @jax.jit
    def descend(z):
        def after(loss):
            def step(z, _):
                gradient = jax.grad(lambda z: jnp.sum(loss(z)))(z)
                size = jnp.sqrt(jnp.mean(jnp.square(gradient))) + 1e-12
                return z - 0.3 * gradient / size, None

            return jax.lax.scan(step, z, length=60)[0]

        return {name: after(loss) for name, loss in every.items()}

    scores = {
        name: metrics.dice_score(np.argmax(z, -1), ids, num_classes=2)[1]
        for name, z in descend(start).items()
    }
    assert metrics.dice_score(np.argmax(start, -1), ids, num_classes=2)[1] < 0.5
    assert {name: score for name, score in scores.items() if not score > 0.95} == {}


@pytest.mark.parametrize("name", ["dice_loss", "lovasz_softmax_loss", "topk_cross_entropy"])
def test_an_id_that_is_no_class_gives_nan(name):
    x, ids = predictions(name)[0], jnp.asarray(LABELS[:2]).at[0, 0, 0].set(CLASSES)
    assert np.isnan(jax.jit(ALL[name])(x, ids, jnp.ones(ids.shape, bool)))


@pytest.mark.parametrize("name", ALL)
def test_bad_input_is_named(name):
    x, ids, where = predictions(name)[0], jnp.asarray(LABELS[:2]), jnp.ones((2, 6, 5), bool)
    with pytest.raises(TypeError, match="must have a floating-point type"):
        ALL[name](x.astype(int), ids, where)
    with pytest.raises(ValueError, match=r"where must broadcast"):
        ALL[name](x, ids, jnp.ones((2, 6, 4), bool))
