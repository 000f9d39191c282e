from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxref import losses
from jaxref.core.reductions import masked_mean

hashed = jax.jit(losses.goldfish_mask, static_argnames=("k", "context_width", "seed"))


def literal_mask(tokens, k, width, seed):
    """The hash of every window with Python's integers."""
    kept = []
    for i in range(len(tokens)):
        x = 0
        for token in tokens[max(i - width + 1, 0) : i + 1]:
            x = (x * 0x01000193 + int(token) + 1) % 2**32
        x ^= seed
        x ^= x >> 16
        x = x * 0x85EBCA6B % 2**32
        x ^= x >> 13
        x = x * 0xC2B2AE35 % 2**32
        x ^= x >> 16
        kept.append(i < width - 1 or x >= 2**32 // k)
    return kept


class TestMask:
    def test_matches_the_literal_hash(self):
        tokens = np.random.default_rng(0).integers(0, 50_000, size=(2, 60))
        for k, width, seed in ((2, 4, 7), (3, 13, 2971215073)):
            found = hashed(tokens, k=k, context_width=width, seed=seed)
            expected = [literal_mask(row, k, width, seed) for row in tokens]
            np.testing.assert_array_equal(found, expected)

    def test_one_of_k_is_dropped(self):
        tokens = np.random.default_rng(1).integers(0, 1000, size=(4, 10_000))
        for k in (2, 4, 50):
            for mask in (
                hashed(tokens, k=k, context_width=13)[:, 12:],
                losses.goldfish_mask(tokens, k=k, strategy="random", key=jax.random.key(k)),
            ):
                error = 3 * np.sqrt((1 - 1 / k) / k / mask.size)
                assert abs(np.mean(~mask) - 1 / k) < error

    def test_static_counts(self):
        for length, k, start in ((10, 4, 0), (10, 3, 2), (7, 2, 5)):
            mask = losses.goldfish_mask(np.zeros(length, int), k=k, strategy="static", start=start)
            np.testing.assert_array_equal(np.nonzero(~mask)[0], np.arange(start, length, k))

    def test_bad_input(self):
        tokens = np.arange(5)
        for options, message in (
            ({"k": 1}, r"k must be in \[2, inf\), got 1"),
            ({"context_width": 0}, "context_width must be in"),
            ({"strategy": "bloom"}, "strategy must be one of"),
            ({"strategy": "random"}, "key must be given"),
        ):
            with pytest.raises(ValueError, match=message):
                losses.goldfish_mask(tokens, **options)
        with pytest.raises(TypeError, match="tokens must be integers, got float"):
            losses.goldfish_mask(tokens / 2)
        with pytest.raises(ValueError, match="labels must have shape"):
            losses.goldfish_loss(np.zeros((4, 9), "f"), tokens)


class TestLoss:
    def test_is_cross_entropy_of_what_is_kept(self):
        rng = np.random.default_rng(2)
        logits, labels = rng.normal(size=(3, 20, 7)).astype("f"), rng.integers(7, size=(3, 20))
        where = rng.uniform(size=(3, 20)) < 0.8
        loss = partial(losses.goldfish_loss, k=3, context_width=2)
        (value, kept), pull = jax.vjp(jax.jit(partial(loss, labels=labels, where=where)), logits)
        np.testing.assert_array_equal(kept, hashed(labels, k=3, context_width=2) & where)
        plain = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        np.testing.assert_allclose(value, np.where(kept, plain, 0), rtol=1e-5)
        (slope,) = pull((jnp.ones_like(value), np.zeros(kept.shape, jax.dtypes.float0)))
        np.testing.assert_array_equal(np.any(slope != 0, axis=-1), kept)
        nothing, kept = loss(logits, labels, where=False)
        assert masked_mean(nothing, where=kept) == 0

    @pytest.mark.claim("goldfish-loss")
    def test_a_passage_that_is_repeated_cannot_be_recited(self):
        """The same tokens of a passage are dropped wherever it stands, so that a table that knows
        every position of ten passages recites all of them after plain training, and none after
        the goldfish's, however often they come."""
        rng = np.random.default_rng(3)
        passages = rng.integers(0, 32, size=(10, 40))
        offset = np.concatenate([rng.integers(0, 32, size=(10, 9)), passages], axis=1)
        mask = hashed(passages, k=4, context_width=13)
        np.testing.assert_array_equal(
            hashed(offset, k=4, context_width=13)[:, 9 + 12 :], mask[:, 12:]
        )

        @jax.jit
        def trained(weight):
            def loss(table):
                values, kept = losses.goldfish_loss(table, passages)
                plain = losses.softmax_cross_entropy(table, passages)
                return weight * masked_mean(values, where=kept) + (1 - weight) * plain.mean()

            step = lambda _, table: table - 100 * jax.grad(loss)(table)
            return jax.lax.fori_loop(0, 100, step, jnp.zeros((10, 40, 32)))

        recited = [np.all(np.argmax(trained(w), axis=-1) == passages, axis=1) for w in (0.0, 1.0)]
        assert recited[0].all()
        assert not recited[1].any()
        right = np.argmax(trained(1.0), axis=-1) == passages
        assert right[np.asarray(mask)].all()
