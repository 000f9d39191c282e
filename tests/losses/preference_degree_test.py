from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from jaxref.losses.preference import f_dpo_loss
from jaxref.losses.preference_degree import (
    degree_dataset,
    remove_key_content,
    self_supervised_preference_loss,
)

VOCABULARY, KEYS, LENGTH = 24, 8, 10


def literal_removal(tokens, importance, fraction, where):
    """One response with Python's lists."""
    places = [i for i in range(len(tokens)) if where[i]]
    keys = sorted((i for i in places if importance[i] > 0), key=lambda i: -importance[i])
    removed = keys[: int(np.ceil(round(fraction * len(keys), 6)))]
    return [tokens[i] for i in places if i not in removed]


class TestRemoval:
    def test_matches_the_literal_removal(self):
        """With ties, tokens that are not there, and every third of every number of keys."""
        rng = np.random.default_rng(0)
        tokens = rng.integers(1, 100, size=(20, 12))
        importance = np.maximum(rng.integers(-3, 4, size=(20, 12)), 0)
        importance[:2] = [[0] * 12, [1] * 12]
        where = rng.uniform(size=(20, 12)) < 0.8
        where[2] = False
        examples = jax.jit(degree_dataset)(tokens, importance, where=where)
        assert examples.tokens.shape == examples.where.shape == (20, 4, 12)
        for i in range(20):
            for k in range(4):
                rest = literal_removal(tokens[i], importance[i], k / 3, where[i])
                padded = rest + [0] * (12 - len(rest))
                np.testing.assert_array_equal(examples.tokens[i, k], padded)
                np.testing.assert_array_equal(examples.where[i, k], np.arange(12) < len(rest))
                assert examples.degrees[i, k] == k
            assert (examples.known[i] == np.any(importance[i][where[i]] > 0)).all()

    def test_nothing_and_everything(self):
        """No key content is the response itself; all of it leaves the rest in its order."""
        rng = np.random.default_rng(1)
        tokens, importance = rng.integers(50, size=9), np.array([0, 2, 0, 1, 0, 0, 5, 0, 3.0])
        same, there = remove_key_content(tokens, importance, 0.0)
        np.testing.assert_array_equal(same, tokens)
        assert there.all()
        rest, there = remove_key_content(tokens, importance, 1.0, padding_id=-7)
        np.testing.assert_array_equal(rest[:5], tokens[importance == 0])
        np.testing.assert_array_equal(rest[5:], -7)
        np.testing.assert_array_equal(there, np.arange(9) < 5)

    def test_fractions_are_not_rounded_up_twice(self):
        fractions, keys = np.array([0.6, 0.3, 7 / 13]), np.array([25, 50, 13])
        importance = np.arange(50) < keys[:, None]
        _, there = remove_key_content(np.ones((3, 50), int), importance, fractions)
        np.testing.assert_array_equal(50 - there.sum(axis=1), [15, 15, 7])

    def test_bad_input(self):
        tokens, importance = np.arange(4), np.ones(4)
        with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\], got 1.5"):
            remove_key_content(tokens, importance, 1.5)
        with pytest.raises(ValueError, match="importance must have shape"):
            remove_key_content(tokens, importance[:3], 0.5)
        with pytest.raises(TypeError, match="tokens must be integers, got float"):
            remove_key_content(tokens / 2, importance, 0.5)
        with pytest.raises(ValueError, match="fraction must broadcast"):
            remove_key_content(tokens, importance, np.ones(2))
        for fractions in ((0.0,), (0.0, 0.5, 0.5), (1.0, 0.0)):
            with pytest.raises(ValueError, match="fractions must be at least two and increase"):
                degree_dataset(tokens, importance, fractions=fractions)


def batch(seed=0):
    """Losses of three pairs, logits of four degrees in two and in four versions, and degrees."""
    rng = np.random.default_rng(seed)
    logits = [rng.normal(size=(3, n, 4)).astype("f") for n in (2, 4)]
    degrees = [rng.integers(4, size=(3, n)) for n in (2, 4)]
    return rng.normal(size=3).astype("f"), logits[0], degrees[0], logits[1], degrees[1]


class TestLoss:
    def test_matches_the_formula(self):
        alignment, *arguments = batch()
        where = np.array([[True, False], [True, True], [False, False]])
        loss = partial(self_supervised_preference_loss, chosen_weight=0.3, rejected_weight=0.7)

        def literal(alignment, chosen, rejected):
            total = np.float64(alignment)
            for i in range(3):
                told = [
                    [-np.log(scipy.special.softmax(row)[k]) for row, k in zip(rows, degrees)]
                    for rows, degrees in (
                        (chosen[i], arguments[1][i]),
                        (rejected[i], arguments[3][i]),
                    )
                ]
                counted = [x for x, counts in zip(told[0], where[i]) if counts]
                total[i] += 0.3 * (np.mean(counted) if counted else 0) + 0.7 * np.mean(told[1])
            return total

        def of_logits(alignment, chosen, rejected):
            return loss(alignment, chosen, arguments[1], rejected, arguments[3], chosen_where=where)

        inputs = [alignment, np.float64(arguments[0]), np.float64(arguments[2])]
        value, pull = jax.vjp(jax.jit(of_logits), alignment, arguments[0], arguments[2])
        np.testing.assert_allclose(value, literal(*inputs), rtol=1e-5)
        slopes = pull(jnp.ones(3))
        for i, place in ((1, (0, 0, 2)), (1, (1, 1, 3)), (2, (2, 3, 0)), (1, (2, 0, 0))):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [np.array(x, np.float64) for x in inputs]
                moved[i][place] += step
                ends.append(literal(*moved).sum())
            expected = (ends[0] - ends[1]) / 2e-5
            np.testing.assert_allclose(slopes[i][place], expected, rtol=1e-3, atol=1e-5)

    def test_without_weights_nothing_is_added(self):
        alignment, *arguments = batch()
        loss = jax.jit(partial(self_supervised_preference_loss, alignment))
        bare = loss(*arguments, chosen_weight=0.0, rejected_weight=0.0)
        np.testing.assert_array_equal(bare, alignment)
        zeros = [np.zeros_like(x) if x.dtype == np.float32 else x for x in arguments]
        added = loss(*zeros, chosen_weight=0.3, rejected_weight=0.2)
        np.testing.assert_allclose(added - alignment, 0.5 * np.log(4), rtol=1e-5)
        swapped = loss(*arguments[2:], *arguments[:2], chosen_weight=0.2, rejected_weight=0.3)
        given = loss(*arguments, chosen_weight=0.3, rejected_weight=0.2)
        np.testing.assert_allclose(swapped, given, rtol=1e-6)

    @pytest.mark.claim("self-supervised-preference-optimization")
    def test_degrees_of_degraded_responses_teach_what_few_pairs_do_not(self):
        """A policy of tokens and a classifier of degrees share embeddings. A response is better by
        each of its key tokens; of 16 pairs, DPO learns a reward whose rank correlation with their
        number is 0.6 in new responses, and that with degrees is above 0.75, in every one of four
        draws. Degrees that are shuffled do not help."""
        pairs, starts = [], []
        for seed in range(4):
            rng = np.random.default_rng(seed)
            drawn = rng.integers(VOCABULARY, size=(200, 2, LENGTH))
            numbers = np.sum(drawn < KEYS, axis=-1)
            best_first = np.take_along_axis(drawn, np.argsort(-numbers)[..., None], axis=1)
            pairs.append(best_first[numbers[:, 0] != numbers[:, 1]][:16])
            sizes = {"tokens": (VOCABULARY, 6), "policy": 6, "degree": (6, 4)}
            starts.append({name: 0.3 * rng.normal(size=size) for name, size in sizes.items()})
        pairs = np.stack(pairs)
        starts = jax.tree.map(lambda *x: np.stack(x).astype("f"), *starts)
        new = np.random.default_rng(9).integers(VOCABULARY, size=(200, LENGTH))

        def log_prob(p, responses):
            return jnp.sum(jax.nn.log_softmax(p["tokens"] @ p["policy"])[responses], axis=-1)

        def degree_logits(p, examples):
            states = jnp.sum(p["tokens"][examples.tokens] * examples.where[..., None], axis=-2)
            return states @ p["degree"]

        def trained(pairs, start, key, weight, shuffled):
            examples = degree_dataset(pairs, pairs < KEYS)
            shuffle = partial(jax.random.permutation, axis=-1, independent=True)
            degrees = jnp.where(shuffled, shuffle(key, examples.degrees), examples.degrees)
            chosen, rejected = (jax.tree.map(lambda x, i=i: x[:, i], examples) for i in range(2))

            def loss(p):
                ours, theirs = log_prob(p, pairs), log_prob(start, pairs)
                aligned = f_dpo_loss(*ours.T, *theirs.T, beta=1.0)
                return jnp.mean(
                    self_supervised_preference_loss(
                        aligned,
                        degree_logits(p, chosen),
                        degrees[:, 0],
                        degree_logits(p, rejected),
                        degrees[:, 1],
                        chosen_weight=weight,
                        rejected_weight=weight,
                        chosen_where=chosen.known,
                        rejected_where=rejected.known,
                    )
                )

            step = lambda _, p: jax.tree.map(lambda a, b: a - 0.1 * b, p, jax.grad(loss)(p))
            found = jax.lax.fori_loop(0, 300, step, start)
            return log_prob(found, new) - log_prob(start, new)

        keys = jax.random.split(jax.random.key(0), 4)
        seeds = jax.vmap(trained, in_axes=(0, 0, 0, None, None))
        arms = jax.jit(jax.vmap(seeds, in_axes=(None, None, None, 0, 0)))
        rewards = arms(pairs, starts, keys, np.array([0, 1, 1.0], "f"), np.array([0, 0, 1]) > 0)
        numbers = np.sum(new < KEYS, axis=-1)
        plain, known, shuffled = np.apply_along_axis(
            lambda x: scipy.stats.spearmanr(x, numbers)[0], -1, np.asarray(rewards)
        )
        assert 0.45 < plain.mean() < 0.7
        assert np.all(known > 0.75)
        assert np.all(known > plain + 0.1)
        assert abs(shuffled.mean() - plain.mean()) < 0.1


class TestEdges:
    def test_nothing_known_far_and_half(self):
        alignment, chosen, degrees, *rejected = batch()
        chosen[0], chosen[1] = np.nan, 1e4 * np.sign(chosen[1])
        where = np.array([[False], [True], [True]])
        loss = jax.jit(partial(self_supervised_preference_loss, rejected_where=False))
        value, pull = jax.vjp(
            lambda x: loss(alignment, x, degrees, *rejected, chosen_where=where), chosen
        )
        assert value[0] == alignment[0]
        slope = pull(jnp.ones(3))[0]
        np.testing.assert_array_equal(slope[0], 0)
        assert np.all(np.isfinite(value))
        assert np.all(np.isfinite(slope))
        half = jnp.asarray(alignment, jnp.bfloat16), jnp.asarray(rejected[0], jnp.bfloat16)
        found = self_supervised_preference_loss(*half, rejected[1], *rejected)
        assert found.dtype == jnp.bfloat16
        outside = np.array([[4, 0], [-1, 0], [9, 0]])
        assert np.isnan(loss(alignment, np.zeros((3, 2, 4), "f"), outside, *rejected)).all()

    def test_bad_input(self):
        alignment, *arguments = batch()
        loss = partial(self_supervised_preference_loss, alignment)
        with pytest.raises(ValueError, match="chosen_weight must be in"):
            loss(*arguments, chosen_weight=-1)
        with pytest.raises(ValueError, match=r"rejected_degrees must have shape \(3, 4\)"):
            loss(*arguments[:3], arguments[1])
        with pytest.raises(ValueError, match="chosen_where must broadcast"):
            loss(*arguments, chosen_where=np.ones((3, 4), bool))
        with pytest.raises(TypeError, match="chosen_degree_logits must have a floating-point type"):
            loss(arguments[0].astype(int), *arguments[1:])
