from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref.losses.pseudo_convolutional_policy import (
    edit_distance_reward,
    pcpg_loss,
    prefix_edit_distance,
    pseudo_convolutional_policy_gradient_loss,
)
from jaxref.metrics.text import token_error_rate

distances = jax.jit(prefix_edit_distance)
reward = jax.jit(edit_distance_reward, static_argnames="normalise")
pcpg = jax.jit(pseudo_convolutional_policy_gradient_loss, static_argnames=("kernel_size", "stride"))


def levenshtein(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = np.arange(len(a) + 1), np.arange(len(b) + 1)
    for i in range(len(a)):
        for j in range(len(b)):
            table[i + 1, j + 1] = min(
                table[i, j] + (a[i] != b[j]), table[i, j + 1] + 1, table[i + 1, j] + 1
            )
    return table[-1, -1]


def sequences(seed=0, shape=(12,), length=9, reference_length=7):
    rng = np.random.default_rng(seed)
    y, r = (rng.integers(3, size=(*shape, n)) for n in (length, reference_length))
    masks = [
        np.arange(x.shape[-1]) < rng.integers(x.shape[-1] + 1, size=(*shape, 1)) for x in (y, r)
    ]
    return y, r, *masks


def literal_windows(length, kernel_size, stride):
    """Row j has ones at the positions of window j, of the fewest that cover all."""
    rows, start = [], 0
    while True:
        rows.append((np.arange(length) >= start) & (np.arange(length) < start + kernel_size))
        if start + kernel_size >= length:
            return np.array(rows, float)
        start += stride


class TestDistance:
    def test_every_prefix_matches_the_table(self):
        y, r, is_token, is_wanted = sequences()
        is_wanted[0] = False
        found = distances(y, r)
        expected = [[levenshtein(a[:t], b) for t in range(10)] for a, b in zip(y, r)]
        np.testing.assert_array_equal(found, expected)
        final = token_error_rate(list(y), list(r)) * r.size
        np.testing.assert_allclose(found[:, -1].sum(), final)

        found = distances(y, r, hypothesis_where=is_token, reference_where=is_wanted)
        expected = [
            [levenshtein(a[:t][m[:t]], b[n]) for t in range(10)]
            for a, b, m, n in zip(y, r, is_token, is_wanted)
        ]
        np.testing.assert_array_equal(found, expected)

    def test_gaps_leading_axes_and_single_sequences(self):
        y, r, *_ = sequences(1, shape=(2, 3))
        rng = np.random.default_rng(2)
        is_token, is_wanted = (rng.uniform(size=x.shape) < 0.7 for x in (y, r))
        found = distances(y, r, hypothesis_where=is_token, reference_where=is_wanted)
        for i in np.ndindex(2, 3):
            a, b = y[i][is_token[i]], r[i][is_wanted[i]]
            assert found[i][-1] == levenshtein(a, b)
        one = jax.jit(jax.vmap(jax.vmap(prefix_edit_distance)))(y, r)
        np.testing.assert_array_equal(one, distances(y, r))
        empty = np.zeros(0, int)
        np.testing.assert_array_equal(distances(y[0, 0], empty), np.arange(10))
        np.testing.assert_array_equal(distances(empty, r[0, 0]), [7])

    def test_rewards_add_up_to_the_error_rate(self):
        y, r, is_token, is_wanted = sequences(3)
        masks = {"hypothesis_where": is_token, "reference_where": is_wanted}
        found = reward(y, r, **masks)
        assert set(np.unique(found)) == {-1, 0, 1}
        np.testing.assert_array_equal(found[~is_token], 0)
        lengths = is_wanted.sum(axis=1)
        final = np.array([levenshtein(a[m], b[n]) for a, b, m, n in zip(y, r, *masks.values())])
        np.testing.assert_array_equal(found.sum(axis=1), lengths - final)
        rate = reward(y, r, normalise=True, **masks).sum(axis=1)
        expected = (lengths - final) / np.maximum(lengths, 1)
        np.testing.assert_allclose(rate, expected, rtol=1e-5, atol=1e-6)


class TestLoss:
    @pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (3, 1), (5, 2), (4, 3), (9, 5)])
    @pytest.mark.parametrize("length", [1, 8])
    def test_loss_and_gradient_match_the_windows(self, kernel_size, stride, length):
        rng = np.random.default_rng(4)
        log_probs, rewards = rng.normal(-2, 1, size=(2, 3, length)).astype("f")
        where = rng.uniform(size=(3, length)) < 0.8
        where[0] = False
        value, pull = jax.vjp(
            lambda x: pcpg(x, rewards, kernel_size=kernel_size, stride=stride, where=where),
            np.where(where, log_probs, np.nan),
        )
        windows = literal_windows(length, kernel_size, stride)
        products = windows.T @ windows
        r = np.where(where, rewards, 0)
        expected = -np.sum(r @ products * np.where(where, log_probs, 0), axis=1)
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)
        (slope,) = pull(jnp.ones(3))
        np.testing.assert_allclose(slope, np.where(where, -r @ products, 0), rtol=1e-4, atol=1e-5)

    def test_has_both_policy_gradients_as_its_ends(self):
        rng = np.random.default_rng(5)
        log_probs, rewards = rng.normal(-2, 1, size=(2, 4, 6)).astype("f")
        steps = pcpg(log_probs, rewards, kernel_size=1, stride=1)
        np.testing.assert_allclose(steps, -np.sum(rewards * log_probs, axis=1), rtol=1e-5)
        for kernel_size in (6, 11):
            whole = pcpg(log_probs, rewards, kernel_size=kernel_size, stride=3)
            expected = -rewards.sum(axis=1) * log_probs.sum(axis=1)
            np.testing.assert_allclose(whole, expected, rtol=1e-5)

    def test_good_samples_become_likelier_and_rewards_have_no_gradient(self):
        log_probs = np.full(6, -1.0, "f")
        for sign in (1.0, -1.0):
            rewards = np.full(6, sign, "f")
            slopes = jax.grad(lambda *x: pcpg(*x), (0, 1))(log_probs, rewards)
            assert np.all(sign * slopes[0] < 0)
            np.testing.assert_array_equal(slopes[1], 0)

    @pytest.mark.claim("pseudo-convolutional-policy-gradient")
    def test_windows_of_rewards_lower_the_error_rate_that_cross_entropy_leaves(self):
        """Four references share an input: the likeliest is alone, the others are near each other.
        Cross-entropy learns their shares, and the greedy sequence is the likeliest; so it is
        with the rewards of single steps, which know of no later token. Windows that overlap learn
        the sequence with the least expected edit distance. All 125 samples are weighed by their
        probability, so that nothing is random."""
        references = np.array([[0, 0, 0], [1, 4, 4], [2, 4, 4], [3, 4, 4]])
        shares = np.array([0.28, 0.24, 0.24, 0.24], "f")
        samples = np.indices((5, 5, 5)).reshape(3, -1).T
        rewards = sum(
            share * edit_distance_reward(samples, np.broadcast_to(reference, samples.shape))
            for share, reference in zip(shares, references)
        )

        def log_probs(tables, y):
            rows = tables[0][None], tables[1][y[:, 0]], tables[2][y[:, 0], y[:, 1]]
            logits = jnp.stack([jnp.broadcast_to(row, (len(y), 5)) for row in rows], axis=1)
            return jnp.take_along_axis(jax.nn.log_softmax(logits), y[..., None], axis=2)[..., 0]

        @partial(jax.jit, static_argnames=("kernel_size", "stride"))
        def greedy(weight, kernel_size=2, stride=1):
            def loss(tables):
                sampled = log_probs(tables, samples)
                chance = jax.lax.stop_gradient(jnp.exp(sampled.sum(axis=1)))
                options = {"kernel_size": kernel_size, "stride": stride}
                drawn = chance @ pseudo_convolutional_policy_gradient_loss(
                    sampled, rewards, **options
                )
                labelled = -shares @ log_probs(tables, references).sum(axis=1)
                return (1 - weight) * labelled + weight * drawn

            step = lambda _, tables: jax.tree.map(
                lambda x, slope: x - 0.5 * slope, tables, jax.grad(loss)(tables)
            )
            start = [jnp.zeros((5,) * n) for n in (1, 2, 3)]
            tables = jax.lax.fori_loop(0, 400, step, start)
            first = jnp.argmax(tables[0])
            second = jnp.argmax(tables[1][first])
            return jnp.stack([first, second, jnp.argmax(tables[2][first, second])])

        found = [greedy(0.0), greedy(0.5, kernel_size=1, stride=1), greedy(0.5)]
        rates = [
            sum(share * levenshtein(y, r) for share, r in zip(shares, references)) / 3
            for y in found
        ]
        np.testing.assert_allclose(rates, [0.72, 0.72, 0.44], rtol=1e-5)

    def test_whole_objective_is_the_weighted_sum(self):
        rng = np.random.default_rng(6)
        labels = rng.normal(-2, 1, size=(3, 4)).astype("f")
        sampled, rewards = rng.normal(-2, 1, size=(2, 3, 7)).astype("f")
        is_label, where = np.arange(4) < [[0], [2], [4]], np.arange(7) < [[7], [0], [3]]
        value = jax.jit(partial(pcpg_loss, weight=0.3))(
            np.where(is_label, labels, np.nan), sampled, rewards, label_where=is_label, where=where
        )
        expected = -0.7 * np.sum(labels, axis=1, where=is_label)
        expected += 0.3 * pcpg(sampled, rewards, where=where)
        np.testing.assert_allclose(value, expected, rtol=1e-5)

    def test_extremes_and_half_precision(self):
        log_probs, rewards = np.array([-1e4, 0, -1e4], "f"), np.array([1, -1, 1], "f")
        value, pull = jax.vjp(lambda x: pcpg(x, rewards), log_probs)
        assert value == 2e4
        np.testing.assert_array_equal(pull(jnp.float32(1))[0], -np.ones(3))
        assert pcpg(np.zeros((2, 0), "f"), np.zeros((2, 0), "f")).shape == (2,)
        half = pcpg(jnp.full(300, -1.0, jnp.bfloat16), jnp.ones(300, jnp.bfloat16), kernel_size=300)
        assert half.dtype == jnp.bfloat16
        np.testing.assert_allclose(half.astype("f"), 9e4, rtol=1e-2)

    def test_bad_input(self):
        x, y = np.zeros((2, 3), "f"), np.zeros((2, 3), int)
        loss = pseudo_convolutional_policy_gradient_loss
        with pytest.raises(ValueError, match=r"stride must be in \[1, 2\], got 3"):
            loss(x, x, kernel_size=2, stride=3)
        with pytest.raises(ValueError, match="kernel_size must be in"):
            loss(x, x, kernel_size=0)
        with pytest.raises(ValueError, match="rewards must have shape"):
            loss(x, x[0])
        with pytest.raises(TypeError, match="rewards must have a floating-point type"):
            loss(x, y)
        with pytest.raises(TypeError, match="hypothesis must be integers, got float32"):
            prefix_edit_distance(x, y)
        with pytest.raises(ValueError, match="reference must have shape"):
            prefix_edit_distance(y, y[0])
        with pytest.raises(ValueError, match=r"weight must be in \[0, 1\], got 2"):
            pcpg_loss(x, x, x, weight=2.0)
        with pytest.raises(ValueError, match="leading axes of sampled_log_probs"):
            pcpg_loss(x[0], x, x)
