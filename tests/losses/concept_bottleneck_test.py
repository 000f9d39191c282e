from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from scipy import stats

from jaxref import losses

PEER = np.load(Path(__file__).parents[1] / "oracles" / "concept_bottleneck.npz")
LOGITS, CLIP = (PEER[name].astype("f") for name in ("logits", "clip"))
KEY = jax.random.key(0)
gumbel = jax.jit(jax.value_and_grad(losses.gumbel_contrastive_loss), static_argnames="hard")
diagonal = jax.jit(jax.value_and_grad(losses.diagonal_contrastive_loss))
choose = jax.jit(losses.gumbel_softmax, static_argnames=("hard", "axis"))


@partial(jax.jit, static_argnames="cubed")
def similarity(u, c, cotangent, cubed, where=None):
    loss = lambda c: losses.cubic_cosine_similarity_loss(u, c, cubed=cubed, where=where)
    value, vjp = jax.vjp(loss, c)
    return value, *vjp(cotangent)


class TestNumbers:
    def test_diagonal_loss_matches_the_release(self):
        for name, z in (("contrastive", LOGITS), ("contrastive_wide", LOGITS.T)):
            value, slope = diagonal(z)
            np.testing.assert_allclose(value, PEER[name], rtol=1e-5)
            np.testing.assert_allclose(slope, PEER[f"{name}_gradient"], rtol=1e-4, atol=1e-6)

    def test_gumbel_loss_matches_the_release_with_its_noise(self, monkeypatch):
        noise = iter(PEER["noise"].astype("f"))
        monkeypatch.setattr(jax.random, "gumbel", lambda *_: next(noise))
        loss = lambda z, t: losses.gumbel_contrastive_loss(z, key=KEY, temperature=t)
        value_and_grad = jax.jit(jax.value_and_grad(loss))
        for temperature in (0.5, 2.0):
            value, slope = value_and_grad(LOGITS, temperature)
            np.testing.assert_allclose(value, PEER[f"gumbel_{temperature}"], rtol=1e-5)
            expected = PEER[f"gumbel_{temperature}_gradient"]
            np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("power", [1, 3])
    def test_similarity_matches_the_release(self, power):
        values, slope = similarity(CLIP, LOGITS, np.full(5, 0.2, "f"), power == 3)
        np.testing.assert_allclose(values.mean(), PEER[f"similarity_{power}"], rtol=1e-4)
        expected = PEER[f"similarity_{power}_gradient"]
        np.testing.assert_allclose(slope, expected, rtol=1e-3, atol=1e-6)

    def test_hard_choices_have_the_soft_gradients(self):
        @jax.jit
        def both(z):
            found = []
            for hard in (False, True):
                choice = lambda z: losses.gumbel_softmax(z, key=KEY, temperature=0.7, hard=hard)
                value, vjp = jax.vjp(choice, z)
                found.append((value, *vjp(CLIP)))
            return found

        (soft, soft_slope), (hard, hard_slope) = both(LOGITS)
        np.testing.assert_array_equal(hard, np.eye(5)[np.argmax(soft, -1)])
        np.testing.assert_allclose(hard_slope, soft_slope, rtol=1e-6)
        value, _ = gumbel(LOGITS, key=KEY, hard=True)
        chosen = np.log(1e-10) * (7 / 8 + 4 / 5) / 2  # all but one of each column and row
        np.testing.assert_allclose(value, -chosen, rtol=1e-5)

    def test_penalty_is_the_sum_of_sizes(self):
        penalty = jax.jit(jax.value_and_grad(losses.l1_bottleneck_penalty))
        value, slope = penalty(LOGITS * (LOGITS > 0))
        np.testing.assert_allclose(value, 1e-3 * LOGITS[LOGITS > 0].sum(), rtol=1e-5)
        np.testing.assert_allclose(slope, 1e-3 * (LOGITS > 0), rtol=1e-6)


class TestClaims:
    @pytest.mark.claim("sparse-cbm")
    def test_choices_follow_the_softmax_and_a_penalty_leaves_few_concepts(self):
        """Hard choices are one-hot and as frequent as the softmax says (a chi-square test), and hot
        noise leaves even ones; a bottleneck with the L1 penalty needs far fewer weights than with
        cross-entropy alone, for the same accuracy."""
        z = np.array([0.0, 1.0, -1.0, 0.5], "f")
        hard = choose(np.tile(z, (4000, 1)), key=KEY, hard=True)
        assert set(np.unique(hard)) == {0, 1}
        np.testing.assert_array_equal(hard.sum(-1), 1)
        counts = np.asarray(hard).sum(0)
        assert stats.chisquare(counts, 4000 * np.exp(z) / np.exp(z).sum()).pvalue > 0.01
        np.testing.assert_allclose(choose(z, key=KEY, temperature=1e6), 0.25, rtol=1e-4)
        value, _ = gumbel(LOGITS, key=KEY, temperature=1e6)
        np.testing.assert_allclose(value, (np.log(8) + np.log(5)) / 2, rtol=1e-4)
        np.testing.assert_allclose(diagonal(jnp.zeros((5, 5)))[0], np.log(5), rtol=1e-6)

        rng = np.random.default_rng(0)
        labels = rng.integers(3, size=150)
        # the first three of twelve concepts tell the class, the others nothing
        concepts = jnp.array(rng.normal(size=(150, 12)) + 4 * np.eye(3, 12)[labels])

        @jax.jit
        def train(weight):
            def loss(params):
                logits = concepts @ params["concepts"] @ params["head"]
                loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
                return loss + losses.l1_bottleneck_penalty(params["concepts"], weight=weight)

            def step(params, _):
                return jax.tree.map(lambda p, g: p - 0.05 * g, params, jax.grad(loss)(params)), None

            keys = jax.random.split(KEY)
            shapes = {"concepts": (12, 12), "head": (12, 3)}
            params = {n: 0.3 * jax.random.normal(k, shapes[n]) for n, k in zip(shapes, keys)}
            params, _ = jax.lax.scan(step, params, length=200)
            logits = concepts @ params["concepts"] @ params["head"]
            return params["concepts"], jnp.mean(jnp.argmax(logits, -1) == labels)

        (sparse, accuracy), (dense, plain) = train(0.05), train(0.0)
        active = [np.mean(np.abs(w) > 0.01) for w in (sparse, dense)]
        assert active[0] < 0.4 * active[1]
        assert accuracy > plain - 0.02
        assert plain > 0.95


class TestSets:
    def test_eight_devices_see_the_whole_batch(self):
        rng = np.random.default_rng(1)
        z, u = rng.normal(size=(2, 16, 3)).astype("f")
        where = rng.random((16, 3)) < 0.8

        def loss(z, u, where, axis_name=None):
            options = {"where": where, "axis_name": axis_name}
            return jnp.stack(
                [
                    losses.gumbel_contrastive_loss(z, key=KEY, **options),
                    losses.gumbel_contrastive_loss(z, key=KEY, hard=True, **options),
                    losses.diagonal_contrastive_loss(z, **options),
                    losses.cubic_cosine_similarity_loss(u, z, **options).mean(),
                ]
            )

        sharded = jax.shard_map(
            partial(loss, axis_name="data"),
            mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(P("data"),) * 3,
            out_specs=P(),
        )

        def evaluate(f):
            def total(z, u):
                values = f(z, u, where)
                return values @ np.array([1.0, 0.3, 0.7, 2.0], "f"), values

            return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(z, u)

        (found, slopes), (expected, expected_slopes) = evaluate(sharded), evaluate(loss)
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-5)
        for ours, whole in zip(slopes, expected_slopes):
            np.testing.assert_allclose(ours, whole, rtol=1e-4, atol=1e-6)

    def test_missing_images_may_hold_anything(self):
        where = (np.arange(8) < 5)[:, None]
        poisoned = np.where(where, LOGITS, np.nan)
        value, slope = diagonal(poisoned, where=where)
        np.testing.assert_allclose(value, diagonal(LOGITS[:5])[0], rtol=1e-5)
        assert np.all(slope[5:] == 0)
        value, slope = gumbel(poisoned, key=KEY, where=where)
        assert np.isfinite(value)
        assert np.all(slope[5:] == 0)
        values, slope = similarity(CLIP, poisoned, np.ones(5, "f"), True, where=where)
        u, c = (np.float64(v[:5]) - np.float64(v[:5]).mean(0) for v in (CLIP, LOGITS))
        cosines = np.sum(u**3 * c**3, 0) / np.sqrt(np.sum(u**6, 0) * np.sum(c**6, 0))
        np.testing.assert_allclose(values, -cosines, rtol=1e-4)
        assert np.all(slope[5:] == 0)
        none = np.zeros((8, 1), bool)
        for loss in (diagonal, partial(gumbel, key=KEY)):
            value, slope = loss(poisoned, where=none)
            assert value == 0
            assert np.all(slope == 0)


class TestEdges:
    @pytest.mark.parametrize("size", [1e4, -1e4, 0.0])
    def test_extreme_and_constant_logits_stay_finite(self, size):
        z = (size * (np.arange(40).reshape(8, 5) % 3)).astype("f")
        for loss in (diagonal, partial(gumbel, key=KEY), partial(gumbel, key=KEY, hard=True)):
            value, slope = loss(z)
            assert np.isfinite(value)
            assert np.all(np.isfinite(slope))
        values, slope = similarity(CLIP, z, np.ones(5, "f"), True)
        assert np.all(np.isfinite(slope))
        if size == 0:
            assert np.all(values == 0)

    def test_axis_classes_and_half_precision(self):
        where = np.arange(5) < 3
        g = choose(np.where(where, LOGITS, np.nan), key=KEY, where=where)
        assert np.all(g[:, 3:] == 0)
        np.testing.assert_allclose(g.sum(-1), 1, rtol=1e-5)
        hard = choose(np.where(where, LOGITS, np.nan), key=KEY, where=where, hard=True)
        np.testing.assert_array_equal(hard, np.eye(5)[np.argmax(g, -1)])
        np.testing.assert_allclose(choose(LOGITS, key=KEY, axis=0).sum(0), 1, rtol=1e-5)
        half = jnp.asarray(LOGITS, jnp.bfloat16)
        assert choose(half, key=KEY, hard=True).dtype == jnp.bfloat16
        value, slope = gumbel(half, key=KEY)
        assert (value.dtype, slope.dtype) == (jnp.bfloat16, jnp.bfloat16)
        expected, _ = gumbel(half.astype("f"), key=KEY)
        np.testing.assert_allclose(np.float32(value), expected, rtol=4e-3)

    def test_bad_input_is_named(self):
        for function in (losses.gumbel_softmax, losses.gumbel_contrastive_loss):
            with pytest.raises(ValueError, match="temperature must be in"):
                function(LOGITS, key=KEY, temperature=0.0)
            with pytest.raises(ValueError, match="where must broadcast"):
                function(LOGITS, key=KEY, where=np.ones(3, bool))
            with pytest.raises(TypeError, match="logits must have a floating-point type"):
                function(np.ones((2, 2), int), key=KEY)
        with pytest.raises(ValueError, match=r"logits must have shape \[batch, concepts\]"):
            losses.diagonal_contrastive_loss(LOGITS[0])
        with pytest.raises(ValueError, match="bottleneck_logits must have shape"):
            losses.cubic_cosine_similarity_loss(CLIP, LOGITS[:3])
        with pytest.raises(ValueError, match="weight must be in"):
            losses.l1_bottleneck_penalty(LOGITS, weight=-1.0)
