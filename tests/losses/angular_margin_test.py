"""Numbers, shards and edges of all softmax losses on cosines; claims are with the file of each.

One compiled program of all heads serves most of it: 8 examples, 5 features and 8 classes, of which
`where` leaves 7 for the stored numbers.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxref import losses

STORED = np.load(Path(__file__).parents[1] / "oracles" / "angular_margin.npz")
SEVEN = np.tile(np.arange(8) < 7, (8, 1))
START = losses.AdaFaceState(np.float32(20), np.float32(100))


def adaface(embeddings, class_weights, labels, state=START, **options):
    return losses.adaface_loss(embeddings, class_weights, labels, state, ema=0.3, **options)[0]


HEADS = {
    "normalized": losses.normalized_softmax_loss,
    "cosface": partial(losses.cosface_loss, scale=32.0),
    "arcface": losses.arcface_loss,
    "adaface": adaface,
    "madacos": losses.madacos_loss,
    "unpg": partial(losses.unpg_loss, head="cosface", margin=0.4, whisker=0.5),
}
OF_BATCH = ("adaface", "madacos", "unpg")
"""Heads that take the name of the axis over which the batch is spread."""


def every_head(
    embeddings, class_weights, labels, where, state=START, axis_name=None, class_axis_name=None
):
    """The losses by all heads, `[heads, batch]`."""
    arguments = embeddings, class_weights, labels
    options = {"where": where, "class_axis_name": class_axis_name}
    further = {name: {"axis_name": axis_name} if name in OF_BATCH else {} for name in HEADS}
    further["adaface"]["state"] = state
    return jnp.stack([head(*arguments, **options, **further[name]) for name, head in HEADS.items()])


def values_and_gradients(function, embeddings, class_weights, cotangent, *others):
    """The losses by all heads, and the gradients of their weighted sums."""

    def weighted(embeddings, class_weights):
        values = function(embeddings, class_weights, *others)
        return values @ cotangent, values

    gradients, values = jax.jacrev(weighted, argnums=(0, 1), has_aux=True)(
        embeddings, class_weights
    )
    return values, *gradients


run = jax.jit(partial(values_and_gradients, every_head))


def stored_batch(step):
    weights = np.concatenate([STORED["weights"], np.ones((1, 5), "f")])
    return STORED["embeddings"][step], weights, STORED["labels"]


class TestNumbers:
    def test_agree_with_their_authors_and_the_package(self):
        state = START
        for step in range(2):
            e, w, y = stored_batch(step)
            found = dict(zip(HEADS, zip(*run(e, w, STORED["cotangent"], y, SEVEN, state))))
            expected = {
                0: {name: name for name in ("normalized", "cosface", "arcface", "madacos")},
                1: {"unpg": "unpg", "madacos_loose": "madacos"},
            }[step] | {f"adaface_{step}": "adaface"}
            for stored, name in expected.items():
                for ours, end in zip(found[name], ("", "_d_e", "_d_w")):
                    theirs = STORED[stored + end]
                    np.testing.assert_allclose(
                        ours[: len(theirs)], theirs, rtol=1e-4, atol=1e-4, err_msg=stored + end
                    )
            state = losses.AdaFaceState(*STORED[f"adaface_{step}_state"].astype("f"))

    def test_state_of_adaface_agrees_with_its_authors(self):
        step = jax.jit(partial(losses.adaface_loss, ema=0.3))
        state = losses.adaface_init()
        for i in range(2):
            _, state = step(STORED["embeddings"][i], STORED["weights"], STORED["labels"], state)
            np.testing.assert_allclose(state, STORED[f"adaface_{i}_state"], rtol=1e-5)
        # one example has no deviation, and a batch without any is no step
        one = SEVEN & (np.arange(8)[:, None] == 2)
        e, w, y = stored_batch(0)
        for where, mean in ((one, 10 + np.linalg.norm(e[2]) / 2), (0 * SEVEN > 0, 20)):
            values, state = jax.jit(partial(losses.adaface_loss, ema=0.5))(
                e, w, y, START, where=where
            )
            np.testing.assert_allclose(state.mean, mean, rtol=1e-5)
            assert state.std == 100
            assert np.all(values[~where.any(1)] == 0)


class TestClaims:
    @pytest.mark.claim("adaface")
    def test_the_length_moves_the_margin_from_arcface_over_cosface_to_its_mirror(self):
        rng = np.random.default_rng(0)
        directions = rng.normal(size=(40, 4)).astype("f")
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        weights, labels = rng.normal(size=(5, 4)).astype("f"), rng.integers(5, size=40)
        cosines = directions @ (weights / np.linalg.norm(weights, axis=1, keepdims=True)).T
        theta = np.arccos(cosines[np.arange(40), labels])
        inside = (theta > 0.5) & (theta < np.pi - 0.5)
        state = losses.adaface_init(mean=20.0, std=1.0)

        @jax.jit
        def of_label(theta, length):
            """Label at an angle, and the other class at a right angle."""
            e = length * jnp.array([[jnp.cos(theta), jnp.sin(theta), 0.0]])
            w = jnp.array([[1.0, 0, 0], [0, 0, 1]])
            values, _ = losses.adaface_loss(e, w, jnp.array([0]), state, ema=0.0, scale=1.0)
            return values[0]

        @jax.jit
        def loss_and_slope(length, h):
            def total(length):
                values = losses.adaface_loss(
                    length * directions, weights, labels, state, ema=0.0, h=h
                )[0]
                return values.sum(), values

            return jax.grad(total, has_aux=True)(length)

        def expected(target):
            z = 64 * np.float64(cosines)
            z[np.arange(40), labels] = 64 * target
            top = z.max(1)
            return (top + np.log(np.exp(z - top[:, None]).sum(1)) - 64 * target)[inside]

        for length, h, target in (
            (2.0, 0.333, np.cos(theta + 0.4)),
            (20.0, 0.333, np.cos(theta) - 0.4),
            (7.0, 0.0, np.cos(theta) - 0.4),
            (90.0, 0.333, np.cos(theta - 0.4) - 0.8),
        ):
            slope, values = loss_and_slope(length, h)
            np.testing.assert_allclose(values[inside], expected(target), rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(slope, 0, atol=1e-3)  # lengths are not trained
        # long embeddings learn from hard examples, and short ones from easy ones
        both = jax.jit(jax.vmap(jax.value_and_grad(of_label), in_axes=(0, None)))
        angles = np.float32([0.6, 1.0, 1.4, 1.75, 2.2, 2.6])
        steepness = {}
        for length, q in ((2.0, -1), (90.0, 1)):
            loss, slope = both(angles, length)
            steepness[q] = slope / (1 - np.exp(-loss))  # that of the label's logit
            np.testing.assert_allclose(steepness[q], np.sin(angles - 0.4 * q), rtol=1e-3)
        np.testing.assert_array_equal(steepness[1] > steepness[-1], angles > np.pi / 2)


def mesh_of(*shape_and_names):
    shape, names = zip(*shape_and_names)
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


class TestShards:
    def test_batch_and_classes_over_eight_devices(self):
        rng = np.random.default_rng(0)
        weights = rng.normal(size=(8, 5)).astype("f")
        labels = np.array([0, 7, 3, 3, 5, 1, 6, 0])
        embeddings = (9 * (weights[labels] + rng.normal(size=(8, 5)))).astype("f")
        where = rng.uniform(size=(8, 8)) < 0.8
        where[np.arange(8), labels] = True
        where[2], labels[6] = False, -1
        sharded = jax.shard_map(
            partial(every_head, axis_name="data", class_axis_name="classes"),
            mesh=mesh_of((2, "data"), (4, "classes")),
            in_specs=(P("data"), P("classes"), P("data"), P("data", "classes"), P()),
            out_specs=P(None, "data"),
        )
        found, expected = (
            f(embeddings, weights, STORED["cotangent"], labels, where, START)
            for f in (jax.jit(partial(values_and_gradients, sharded)), run)
        )
        assert np.all(np.isnan(expected[0][:, 6]))
        assert np.all(expected[0][:, 2] == 0)
        for ours, theirs in zip(found, expected):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
        assert np.all(np.isfinite(expected[1]))
        assert np.all(np.isfinite(expected[2]))
        assert np.all(expected[1][:, [2, 6]] == 0)

    def test_classes_alone_over_eight_devices(self):
        rng = np.random.default_rng(0)
        weights, embeddings = (rng.normal(size=(n, 5)).astype("f") for n in (8, 8))
        sharded = jax.shard_map(
            partial(losses.arcface_loss, class_axis_name="classes"),
            mesh=mesh_of((8, "classes")),
            in_specs=(P(), P("classes"), P()),
            out_specs=P(),
        )
        labels = np.array([0, 7, 3, 3, 5, 8, 6, 0])
        found = jax.jit(sharded)(embeddings, weights, labels)
        everything = np.ones((8, 8), bool)
        expected = run(embeddings, weights, np.ones(8, "f"), labels, everything, START)[0]
        np.testing.assert_allclose(found, expected[list(HEADS).index("arcface")], rtol=1e-5)
        assert np.isnan(found[5])


class TestEdges:
    def test_finite_at_every_angle_and_length(self):
        corners = np.zeros((8, 5), "f")
        corners[:6, :2] = [[1, 0], [-1, 0], [0, 1], [0, -1], [1e-7, 1], [1, 1e-4]]
        labels, everything = np.array([0, 1] * 4), np.ones((8, 8), bool)
        for size in (1.0, 1e4, 1e-18, 1e30):
            for weights in (np.eye(8, 5), np.ones((8, 5)), np.zeros((8, 5))):
                for y in (labels, 0 * labels, 1 - labels):
                    for where in (everything, np.arange(8) < 1 + y[:, None]):
                        results = run(
                            size * corners, weights.astype("f"), np.ones(8, "f"), y, where, START
                        )
                        for result in results:
                            assert np.all(np.isfinite(result))

    def test_shapes_types_and_vmap(self):
        e, w, y = stored_batch(0)

        @jax.jit
        def variants(e, w, y):
            half = [HEADS[name](e.astype(jnp.bfloat16), w, y) for name in OF_BATCH]
            one = adaface(e[:1].astype(jnp.float16), w, y[:1])
            none = [HEADS[name](e[:0], w, y[:0]) for name in ("madacos", "unpg")]
            shaped = losses.arcface_loss(e.reshape(2, 4, 5), w, y.reshape(2, 4))
            mapped = jax.vmap(losses.arcface_loss, in_axes=(0, None, 0))(e, w, y)
            plain = adaface(e, w, y, training=False)
            scaled = losses.normalized_softmax_loss(e, w, y, scale=64.0)
            return half, one, none, shaped.ravel(), mapped, plain, scaled

        half, one, none, shaped, mapped, plain, scaled = variants(e, w, y)
        rounded = np.float32(e.astype(jnp.bfloat16))
        expected = run(rounded, w, np.ones(8, "f"), y, np.ones((8, 8), bool), START)[0]
        for name, values in zip(OF_BATCH, half):
            assert values.dtype == jnp.bfloat16
            of_head = expected[list(HEADS).index(name)]
            np.testing.assert_allclose(np.float32(values), of_head, rtol=5e-3, atol=1e-3)
        assert one.dtype == jnp.float16
        assert np.isfinite(one[0])
        assert all(values.shape == (0,) for values in none)
        np.testing.assert_allclose(shaped, mapped, rtol=1e-5)
        np.testing.assert_allclose(plain, scaled, rtol=1e-5)

    @pytest.mark.parametrize("name", HEADS)
    def test_bad_input_is_named(self, name):
        loss, (e, w, y) = HEADS[name], stored_batch(0)
        with pytest.raises(TypeError, match="embeddings must have a floating-point type"):
            loss(e.astype(int), w, y)
        with pytest.raises(TypeError, match="labels must be integer ids"):
            loss(e, w, y > 0)
        with pytest.raises(ValueError, match="labels must have shape"):
            loss(e, w, y[:3])
        with pytest.raises(ValueError, match=r"embeddings must have shape \(8, 4\)"):
            loss(e, w[:, :4], y)
        with pytest.raises(ValueError, match="class_weights must have shape"):
            loss(e, w[:0], y)
        with pytest.raises(ValueError, match="where must broadcast"):
            loss(e, w, y, where=np.ones((8, 3), bool))
        refused = {"margin": -0.1, "scale": 0.0, "h": -1.0, "ema": 2.0, "whisker": -1.0}
        taken = {
            "normalized": ("scale",),
            "madacos": (),
            "adaface": ("margin", "scale", "h"),
            "cosface": ("margin", "scale"),
            "arcface": ("margin", "scale"),
        }.get(name, ("margin", "scale", "whisker"))
        for option in taken:
            with pytest.raises(ValueError, match=f"{option} must be in"):
                loss(e, w, y, **{option: refused[option]})

    def test_bad_states_are_named(self):
        with pytest.raises(ValueError, match="mean must be in"):
            losses.adaface_init(mean=0.0)
        with pytest.raises(ValueError, match="std must be in"):
            losses.adaface_init(std=-1.0)
        e, w, y = stored_batch(0)
        with pytest.raises(ValueError, match=r"state\.mean must have shape"):
            adaface(e, w, y, state=losses.AdaFaceState(np.ones(8), np.float32(1)))
        with pytest.raises(ValueError, match="ema must be in"):
            losses.adaface_loss(e, w, y, START, ema=1.5)
