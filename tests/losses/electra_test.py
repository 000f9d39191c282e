from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import Mesh, PartitionSpec

from jaxref.core.reductions import masked_mean
from jaxref.losses.cross_entropy import binary_cross_entropy
from jaxref.losses.electra import electra_corrupt, electra_loss, sample_masked_positions

SPECIAL = (0, 1, 2)


def batch(shape=(3, 7), vocabulary=6, seed=0):
    """Logits of both models, tokens, mask, labels and padding, of random numbers."""
    rng = np.random.default_rng(seed)
    where = np.arange(shape[-1]) < rng.integers(3, shape[-1] + 1, size=shape[:-1])[..., None]
    return (
        rng.normal(size=(*shape, vocabulary)).astype("f"),
        rng.normal(size=shape).astype("f"),
        rng.integers(vocabulary, size=shape),
        rng.uniform(size=shape) < 0.4,
        rng.uniform(size=shape) < 0.3,
        where,
    )


def literal(g, d, x, masked, replaced, where, generator_weight, discriminator_weight):
    """The two means and both gradients in float64, one token at a time."""
    g, d = g.astype(float), d.astype(float)
    of_g, of_d = np.zeros_like(g), np.zeros_like(d)
    language, detection = [], []
    count = np.sum(masked & where), np.sum(where)
    for t in np.ndindex(x.shape):
        if not where[t]:
            continue
        probability = 1 / (1 + np.exp(-d[t]))
        detection.append(-np.log(probability if replaced[t] else 1 - probability))
        of_d[t] = discriminator_weight * (probability - replaced[t]) / count[1]
        if masked[t]:
            p = np.exp(g[t]) / np.sum(np.exp(g[t]))
            language.append(-np.log(p[x[t]]))
            of_g[t] = generator_weight * (p - np.eye(len(p))[x[t]]) / count[0]
    return np.mean(language), np.mean(detection), of_g, of_d


class TestMaskedPositions:
    def test_counts_and_candidates(self):
        """Every sequence has its own number, of tokens that exist, special ones included; none is
        special or padding; all that remain are taken where they are too few."""
        length, rows = 40, 60
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, 20, size=(rows, length))
        tokens[:5] = rng.integers(0, 4, size=(5, length))  # few candidates, and for one row none
        tokens[0] = 1
        sizes = rng.integers(0, length + 1, size=rows)
        where = np.arange(length) < sizes[:, None]
        candidates = where & ~np.isin(tokens, SPECIAL)
        sample = jax.jit(
            partial(sample_masked_positions, special_ids=SPECIAL),
            static_argnames="max_predictions",
        )
        for probability, most in ((0.15, None), (0.5, None), (0.5, 7)):
            masked = sample(
                tokens,
                key=jax.random.key(1),
                mask_probability=probability,
                max_predictions=most,
                where=where,
            )
            k = np.maximum(1, np.round(np.float32(probability) * sizes.astype("f")))
            k = np.minimum(k, most or length)
            np.testing.assert_array_equal(masked.sum(axis=1), np.minimum(k, candidates.sum(axis=1)))
            assert not np.any(masked & ~candidates)

    def test_every_candidate_is_as_likely(self):
        tokens = np.array([0, 9, 8, 7, 1, 9, 9, 5, 4, 2])
        keys = jax.random.split(jax.random.key(2), 6000)
        sample = partial(sample_masked_positions, special_ids=SPECIAL, mask_probability=0.3)
        masks = jax.jit(jax.vmap(lambda key: sample(tokens, key=key)))(keys)
        often = np.sum(masks, axis=0)
        candidates = ~np.isin(tokens, SPECIAL)
        assert often[~candidates].sum() == 0
        share = 3 / 7
        error = 4 * np.sqrt(6000 * share * (1 - share))
        assert np.all(np.abs(often[candidates] - 6000 * share) < error)
        both = np.sum(masks[:, 1] & masks[:, 2])  # without replacement
        assert abs(both / 6000 - share * 2 / 6) < 0.03

    def test_bad_input(self):
        sample = partial(sample_masked_positions, key=jax.random.key(0), special_ids=())
        assert sample(np.zeros((2, 0), int)).shape == (2, 0)
        with pytest.raises(TypeError, match="tokens must be integers, got float32"):
            sample(np.zeros(3, "f"))
        with pytest.raises(ValueError, match=r"tokens must have shape \[..., length\], got \(\)"):
            sample(3)
        with pytest.raises(ValueError, match=r"mask_probability must be in \(0, 1\], got 0"):
            sample(np.arange(3), mask_probability=0)
        with pytest.raises(ValueError, match="max_predictions must be in"):
            sample(np.arange(3), max_predictions=0)
        with pytest.raises(ValueError, match="where must broadcast"):
            sample(np.arange(3), where=np.ones(4, bool))


class TestCorrupt:
    def test_samples_the_generator_at_masked_positions(self):
        rng = np.random.default_rng(3)
        draws, vocabulary, temperature = 20_000, 5, 0.7
        g = rng.normal(size=vocabulary)
        tokens = np.broadcast_to([2, 3], (draws, 2))
        masked = np.array([True, False])
        logits = np.broadcast_to(g, (draws, 2, vocabulary)).astype("f")
        corrupted, replaced = jax.jit(partial(electra_corrupt, temperature=temperature))(
            tokens, masked, logits, key=jax.random.key(4)
        )
        np.testing.assert_array_equal(corrupted[:, 1], 3)
        np.testing.assert_array_equal(replaced, corrupted != tokens)  # a lucky guess is original
        p = np.exp(g / temperature) / np.sum(np.exp(g / temperature))
        counts = np.bincount(corrupted[:, 0], minlength=vocabulary)
        assert scipy.stats.chisquare(counts, draws * p).pvalue > 1e-3
        assert abs(np.mean(replaced[:, 0]) - (1 - p[2])) < 4 * np.sqrt(p[2] / draws)

    def test_low_temperature_and_certain_generators(self):
        g, _, tokens, *_ = batch()
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
            logits = jnp.asarray(g, dtype)
            cold, _ = electra_corrupt(
                tokens, True, logits, key=jax.random.key(0), temperature=1e-38
            )
            np.testing.assert_array_equal(cold, np.argmax(logits, axis=-1))
            certain = jnp.asarray(1e4 * (2 * np.eye(6)[tokens] - 1), dtype)
            same, replaced = electra_corrupt(tokens, True, certain, key=jax.random.key(0))
            np.testing.assert_array_equal(same, tokens)
            assert not replaced.any()
        unread = np.full_like(g, np.nan)
        same, replaced = electra_corrupt(tokens, False, unread, key=jax.random.key(0))
        np.testing.assert_array_equal(same, tokens)
        assert not replaced.any()

    def test_small_ids_hold_what_is_drawn(self):
        tokens = np.zeros(2, np.int8)
        logits = np.where(np.arange(1000) == 900, 1e4, 0.0).astype("f") * np.ones((2, 1), "f")
        corrupted, _ = electra_corrupt(
            tokens, np.array([True, False]), logits, key=jax.random.key(0)
        )
        np.testing.assert_array_equal(corrupted, [900, 0])

    def test_bad_input(self):
        g, _, tokens, masked, *_ = batch()
        corrupt = partial(electra_corrupt, key=jax.random.key(0))
        with pytest.raises(TypeError, match="tokens must be integers"):
            corrupt(g[..., 0], masked, g)
        with pytest.raises(TypeError, match="masked must be boolean, got int"):
            corrupt(tokens, masked.astype(int), g)
        with pytest.raises(TypeError, match="generator_logits must have a floating-point type"):
            corrupt(tokens, masked, g.astype(int))
        with pytest.raises(ValueError, match="generator_logits must have shape"):
            corrupt(tokens, masked, g[:, 1:])
        with pytest.raises(ValueError, match="masked must broadcast"):
            corrupt(tokens, masked[:, 1:], g)
        with pytest.raises(ValueError, match=r"temperature must be in \(0, inf\), got 0"):
            corrupt(tokens, masked, g, temperature=0)


class TestLoss:
    def test_matches_the_literal_formula(self):
        g, d, x, masked, replaced, where = batch()
        weights = {"generator_weight": 0.7, "discriminator_weight": 20.0}

        def loss(g, d):
            return electra_loss(g, d, x, masked, replaced, where=where, **weights)

        (value, terms), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
            g, d
        )
        language, detection, of_g, of_d = literal(
            g, d, x, masked, replaced, where, *weights.values()
        )
        np.testing.assert_allclose(terms, (language, detection), rtol=1e-5)
        np.testing.assert_allclose(value, 0.7 * language + 20 * detection, rtol=1e-5)
        np.testing.assert_allclose(gradients[0], of_g, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(gradients[1], of_d, rtol=1e-4, atol=1e-6)
        default, _ = electra_loss(g, d, x, masked, replaced, where=where)
        np.testing.assert_allclose(default, language + 50 * detection, rtol=1e-5)

    @pytest.mark.claim("electra")
    def test_all_tokens_teach_the_discriminator_and_nothing_of_it_teaches_the_generator(self):
        """The discriminator's loss has a gradient at every token, the generator's at the masked
        ones, and none of the discriminator's reaches the generator. Learning from all tokens finds
        replaced ones better than learning from the masked ones for as many steps."""
        rng = np.random.default_rng(5)
        x = jnp.asarray(rng.integers(6, size=(2, 20)))
        table = jnp.asarray(rng.normal(size=(6, 6)), jnp.float32)
        masked = sample_masked_positions(x, key=jax.random.key(0), special_ids=())

        def both(generator, discriminator, shift, generator_weight, discriminator_weight):
            g = generator[x]
            corrupted, replaced = electra_corrupt(x, masked, g, key=jax.random.key(1))
            d = discriminator[corrupted] + shift
            return electra_loss(
                g,
                d,
                x,
                masked,
                replaced,
                generator_weight=generator_weight,
                discriminator_weight=discriminator_weight,
            )[0]

        slopes = partial(jax.jit(jax.grad(both, argnums=(0, 1, 2))), table, table[0])
        zeros = jnp.zeros(x.shape)
        alone = slopes(zeros, 0.0, 50.0)
        np.testing.assert_array_equal(alone[0], 0)
        assert np.all(alone[2] != 0)
        without, whole = slopes(zeros, 1.0, 0.0), slopes(zeros, 1.0, 50.0)
        np.testing.assert_array_equal(whole[0], without[0])
        assert np.any(whole[0] != 0)
        of_logits = jax.jit(jax.grad(lambda g: electra_loss(g, zeros, x, masked, masked)[0]))
        np.testing.assert_array_equal(np.any(of_logits(table[x]) != 0, axis=-1), masked)

        untrained = electra_loss(table[x], zeros, x, masked, masked)[1]
        np.testing.assert_allclose(untrained.replaced_token_detection, np.log(2), rtol=1e-6)
        assert trained(True) > 0.85
        assert trained(False) < 0.75

    def test_sharded_tokens(self):
        g, d, x, masked, replaced, where = batch((16, 5))
        expected = electra_loss(g, d, x, masked, replaced, where=where)
        rows = PartitionSpec("data")

        def local(g, d, x, masked, replaced, where):
            return electra_loss(g, d, x, masked, replaced, where=where, axis_name="data")

        sharded = jax.shard_map(
            local,
            mesh=Mesh(np.array(jax.devices()), ("data",)),
            in_specs=rows,
            out_specs=PartitionSpec(),
        )
        found = jax.jit(sharded)(g, d, x, masked, replaced, where)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), found, expected)

    def test_nothing_masked_extremes_and_padding(self):
        g, d, x, masked, replaced, where = batch()
        gradient = jax.jit(jax.value_and_grad(electra_loss, argnums=(0, 1), has_aux=True))

        def all_finite(tree):
            return all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(tree))

        (_, terms), slopes = gradient(g, d, x, np.zeros_like(masked), replaced)
        assert terms.masked_language_modelling == 0
        np.testing.assert_array_equal(slopes[0], 0)
        nothing = gradient(g, d, x, masked, replaced, where=np.zeros_like(where))
        assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(nothing))
        for size in (1e4, -1e4):
            assert all_finite(
                gradient(np.sign(g) * 1e4, np.full_like(d, size), x, masked, replaced)
            )
        lost = np.where(where[..., None], g, np.nan), np.where(where, d, np.nan)
        ours = gradient(*lost, np.where(where, x, 99), masked, replaced, where=where)
        jax.tree.map(
            np.testing.assert_array_equal,
            ours,
            gradient(g, d, x, masked, replaced, where=where),
        )
        unknown = np.where(masked, 99, x)
        assert np.isnan(electra_loss(g, d, unknown, masked, replaced)[0])
        unseen = np.where(masked, x, 99)
        assert np.isfinite(electra_loss(g, d, unseen, masked, replaced)[0])

    def test_half_precision_computes_in_float32(self):
        g, d, x, masked, replaced, where = batch()
        for dtype in (jnp.bfloat16, jnp.float16):
            half = jnp.asarray(g, dtype), jnp.asarray(d, dtype)
            value, _ = electra_loss(*half, x, masked, replaced, where=where)
            assert value.dtype == jnp.float32
            full = (z.astype(jnp.float32) for z in half)
            assert value == electra_loss(*full, x, masked, replaced, where=where)[0]

    def test_bad_input(self):
        g, d, x, masked, replaced, where = batch()
        with pytest.raises(TypeError, match="generator_logits must have a floating-point type"):
            electra_loss(g.astype(int), d, x, masked, replaced)
        with pytest.raises(TypeError, match="discriminator_logits must have a floating-point type"):
            electra_loss(g, d.astype(int), x, masked, replaced)
        with pytest.raises(TypeError, match="tokens must be integers"):
            electra_loss(g, d, d, masked, replaced)
        with pytest.raises(TypeError, match="is_replaced must be boolean"):
            electra_loss(g, d, x, masked, replaced.astype("f"))
        for name, arguments in (
            ("generator_logits", (g[1:], d, x, masked, replaced)),
            ("discriminator_logits", (g, d[..., None], x, masked, replaced)),
            ("is_replaced", (g, d, x, masked, replaced[1:])),
        ):
            with pytest.raises(ValueError, match=f"{name} must have shape"):
                electra_loss(*arguments)
        with pytest.raises(ValueError, match="masked must broadcast"):
            electra_loss(g, d, x, masked[1:], replaced)
        with pytest.raises(ValueError, match="where must broadcast"):
            electra_loss(g, d, x, masked, replaced, where=where[1:])
        with pytest.raises(ValueError, match="discriminator_weight must be in"):
            electra_loss(g, d, x, masked, replaced, discriminator_weight=-1.0)


@jax.jit
def trained(on_all_tokens):
    """How often a replaced token scores higher than an original one, by a table of pairs of
    neighbours that learned from a uniform generator's replacements in chains of a toy language."""
    words = 64

    def corrupted_chains(key):
        starts, steps, positions, words_drawn = jax.random.split(key, 4)
        first = jax.random.randint(starts, (16, 1), 0, words)
        x = (first + jnp.cumsum(jax.random.randint(steps, (16, 32), 1, 3), axis=1)) % words
        masked = sample_masked_positions(x, key=positions, special_ids=())
        uniform = jnp.zeros((16, 32, words))
        return masked, *electra_corrupt(x, masked, uniform, key=words_drawn)

    def scores(table, x):
        return table[jnp.roll(x, 1, axis=1), x]

    def loss(table, key):
        masked, x, replaced = corrupted_chains(key)
        losses = binary_cross_entropy(scores(table, x), replaced)
        return masked_mean(losses, where=masked | on_all_tokens)

    def step(table, key):
        return table - 100 * jax.grad(loss)(table, key), None

    keys = jax.random.split(jax.random.key(6), 41)
    table, _ = jax.lax.scan(step, jnp.zeros((words, words)), keys[1:])
    _, x, replaced = corrupted_chains(keys[0])
    s, replaced = scores(table, x).ravel(), replaced.ravel()
    difference = s[:, None] - s
    pairs = replaced[:, None] & ~replaced
    return masked_mean((difference > 0) + (difference == 0) / 2, where=pairs)
