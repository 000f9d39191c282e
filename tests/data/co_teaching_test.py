from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxref.data import co_teaching_losses, co_teaching_select, forget_rate_schedule
from jaxref.nn import nested_dropout, nested_dropout_distribution

PEER = np.load(Path(__file__).parents[1] / "oracles" / "nested_co_teaching.npz")
LOSSES = np.random.default_rng(0).exponential(size=(2, 24)).astype("f")
select = jax.jit(co_teaching_select)
teach = jax.jit(co_teaching_losses)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class TestNumbers:
    @pytest.mark.parametrize("rate", [0.0, 0.3, 0.55])
    def test_selection_and_losses_match_the_release(self, rate):
        """Each model chooses on its half of the batch, by four features after evaluation with five,
        and is trained on the other's half."""
        x, kernels = PEER["features"].astype("f"), PEER["kernels"].astype("f")
        labels = PEER["labels"]

        @jax.jit
        def losses_and_gradients(kernels):
            own = [
                cross_entropy(nested_dropout(x[i], keep=5) @ kernels[i], labels[i])
                for i in range(2)
            ]

            def losses(kernels):
                trained = [
                    cross_entropy(nested_dropout(x[1 - i], keep=4) @ kernels[i], labels[1 - i])
                    for i in range(2)
                ]
                options = {"selection_losses_a": own[0], "selection_losses_b": own[1]}
                return jnp.stack(co_teaching_losses(*trained, rate, **options))

            chosen = [co_teaching_select(values, rate) for values in own]
            return losses(kernels), jax.grad(lambda k: losses(k).sum())(kernels), chosen

        values, slopes, chosen = losses_and_gradients(kernels)
        for ours, theirs in zip(chosen, PEER[f"chosen_{rate}"]):
            np.testing.assert_array_equal(np.flatnonzero(ours), theirs)
        np.testing.assert_allclose(values, PEER[f"losses_{rate}"], rtol=1e-5)
        np.testing.assert_allclose(slopes, PEER[f"gradients_{rate}"], rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("epochs", [0, 1, 2, 5])
    def test_schedule_matches_the_release(self, epochs):
        expected = np.full(8, 0.2)
        expected[:epochs] = np.linspace(0, 0.2, epochs)
        ours = forget_rate_schedule(0.2, epochs)(np.arange(8))
        np.testing.assert_allclose(ours, expected, rtol=1e-6)

    def test_nothing_forgotten_is_the_plain_mean(self):
        values = teach(*LOSSES, 0.0)
        np.testing.assert_allclose(values, LOSSES.mean(-1), rtol=1e-5)
        order = np.random.default_rng(1).permutation(24)
        chosen = np.asarray(select(LOSSES[0], 0.4))
        np.testing.assert_array_equal(select(LOSSES[0][order], 0.4), chosen[order])


class TestClaims:
    @pytest.mark.claim("nested-co-teaching")
    def test_two_compressed_models_see_through_wrong_labels(self):
        """Sixty features, of which three tell the class, and 40 percent of the labels flipped: two
        linear networks that memorise them guess, on true labels, little better than the labels
        they saw; a nested bottleneck helps, and with co-teaching they are right."""
        rng = np.random.default_rng(0)

        def sample(n):
            labels = rng.integers(2, size=n)
            x = rng.normal(size=(n, 60))
            x[:, :3] += 1.2 * (2 * labels[:, None] - 1)
            return jnp.array(x), labels

        (x, labels), (unseen, truth) = sample(300), sample(2000)
        wrong = rng.random(300) < 0.4
        noisy = jnp.array(np.where(wrong, 1 - labels, labels))

        @jax.jit
        def train(probabilities, forget_rate):
            def step(models, i):
                key = jax.random.fold_in(jax.random.key(0), i)

                def loss(models):
                    losses = []
                    for model in models:
                        features = x @ model["hidden"]
                        kept = nested_dropout(features, key=key, probabilities=probabilities)
                        losses.append(cross_entropy(kept @ model["head"], noisy))
                    rate = forget_rate * forget_rate_schedule(0.9)(i // 10) / 0.9
                    return sum(co_teaching_losses(*losses, rate))

                slopes = jax.grad(loss)(models)
                return jax.tree.map(lambda p, g: p - 0.3 * g, models, slopes), None

            keys = jax.random.split(jax.random.key(1), 4).reshape(2, 2)
            models = [
                {
                    "hidden": jax.random.normal(a, (60, 16)) / np.sqrt(60),
                    "head": 0.1 * jax.random.normal(b, (16, 2)),
                }
                for a, b in keys
            ]
            models, _ = jax.lax.scan(step, models, jnp.arange(200))
            logits = sum(unseen @ m["hidden"] @ m["head"] for m in models)
            own = cross_entropy(x @ models[0]["hidden"] @ models[0]["head"], noisy)
            return jnp.mean(jnp.argmax(logits, -1) == truth), co_teaching_select(own, 0.4)

        everything = jnp.zeros(16).at[-1].set(1.0)
        nested = nested_dropout_distribution(16, std=4.0)
        plain, _ = train(everything, 0.0)
        compressed, _ = train(nested, 0.0)
        ours, chosen = train(nested, 0.4)
        assert plain < 0.7
        assert compressed > plain + 0.01
        assert ours > 0.9
        assert np.mean(~wrong[chosen]) > 0.9


class TestSets:
    def test_eight_devices_choose_in_the_whole_batch(self):
        where = np.arange(24) % 5 > 0

        def losses(a, b, where, axis_name=None):
            pair = co_teaching_losses(a, b, 0.4, where=where, axis_name=axis_name)
            return jnp.stack(pair)

        sharded = jax.shard_map(
            partial(losses, axis_name="data"),
            mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(P("data"),) * 3,
            out_specs=P(),
        )

        def evaluate(f):
            total = lambda a, b: f(a, b, where) @ np.array([1.0, 2.0], "f")
            return jax.jit(jax.value_and_grad(total, (0, 1)))(*LOSSES)

        found, expected = evaluate(sharded), evaluate(losses)
        for ours, whole in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
            np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-7)
        assert np.count_nonzero(expected[1][0]) == int(0.6 * where.sum())


class TestEdges:
    def test_ties_missing_examples_and_counts(self):
        equal = select(np.ones(24, "f"), 0.25)
        np.testing.assert_array_equal(equal, np.arange(24) < 18)
        assert select(np.arange(10, dtype="f"), 0.3).sum() == 7
        where = np.arange(24) < 10
        poisoned = np.where(where, LOSSES[0], np.nan)
        chosen = select(poisoned, 0.3, where=where)
        np.testing.assert_array_equal(chosen[:10], select(LOSSES[0, :10], 0.3))
        assert not np.any(chosen[10:])
        value, slope = jax.jit(
            jax.value_and_grad(lambda a: co_teaching_losses(a, LOSSES[1], 0.3, where=where)[0])
        )(poisoned)
        assert np.isfinite(value)
        assert np.all(slope[10:] == 0)
        none = np.zeros(24, bool)
        assert teach(*LOSSES, 0.3, where=none) == (0, 0)
        half = teach(*jnp.asarray(LOSSES, jnp.bfloat16), 0.3)
        assert half[0].dtype == jnp.bfloat16

    def test_bad_input_is_named(self):
        for rate in (1.0, -0.1):
            with pytest.raises(ValueError, match="forget_rate must be in"):
                co_teaching_select(LOSSES, rate)
            with pytest.raises(ValueError, match="forget_rate must be in"):
                forget_rate_schedule(rate)
        with pytest.raises(TypeError, match="losses must have a floating-point type"):
            co_teaching_select(np.arange(3), 0.1)
        with pytest.raises(ValueError, match="losses_b must have shape"):
            co_teaching_losses(LOSSES[0], LOSSES[1, :3], 0.1)
        with pytest.raises(ValueError, match="selection_losses_a must have shape"):
            co_teaching_losses(*LOSSES, 0.1, selection_losses_a=LOSSES[0, :3])
        with pytest.raises(ValueError, match="warmup_epochs must be in"):
            forget_rate_schedule(0.1, -1)
