from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.sharding import Mesh, PartitionSpec

from jaxref.kernels import linear_softmax_cross_entropy
from jaxref.losses import earth_mover
from jaxref.losses.cross_entropy import softmax_cross_entropy
from jaxref.losses.earth_mover import (
    earth_mover_language_loss,
    emo_loss,
    linear_earth_mover_loss,
    linear_emo_loss,
)

MODES = ("mle", "emo")


def batch(tokens=(2, 3), features=4, vocabulary=11, width=3, seed=0):
    """Hidden states, kernel, labels and cost embedding of random numbers. The embedding of the
    first word is zero, and the last token's label is that word."""
    rng = np.random.default_rng(seed)
    embedding = rng.normal(size=(vocabulary, width)).astype("f") * np.arange(vocabulary)[:, None]
    hidden = rng.normal(size=(*tokens, features)).astype("f")
    kernel = rng.normal(size=(features, vocabulary)).astype("f")
    labels = rng.integers(vocabulary, size=tokens)
    labels[..., -1] = 0
    return hidden, kernel, labels, embedding


def literal_costs(embedding):
    """c(i, j) of all pairs of words in float64."""
    e = embedding.astype(float)
    size = np.linalg.norm(e, axis=1)
    costs = np.ones((len(e), len(e)))
    for i in range(len(e)):
        for j in range(len(e)):
            if i == j:
                costs[i, j] = 0
            elif size[i] > 0 and size[j] > 0:
                costs[i, j] = 1 - e[i] @ e[j] / (size[i] * size[j])
    return costs


def literal(f, y, costs):
    """Distances and cross-entropies of tokens, and both gradients, in float64."""
    f = f.astype(float)
    distance, entropy = np.zeros(y.shape), np.zeros(y.shape)
    of_distance, of_entropy = np.zeros(f.shape), np.zeros(f.shape)
    for t in np.ndindex(y.shape):
        p = np.exp(f[t] - f[t].max()) / np.sum(np.exp(f[t] - f[t].max()))
        distance[t] = sum(p[j] * costs[y[t], j] for j in range(len(p)))
        entropy[t] = -np.log(p[y[t]])
        of_distance[t] = p * (costs[y[t]] - distance[t])
        of_entropy[t] = p - np.eye(len(p))[y[t]]
    return distance, entropy, of_distance, of_entropy


def optimal_transport(p, q, costs):
    """The cheapest plan between two distributions, by a linear program."""
    n = len(p)
    rows, columns = np.kron(np.eye(n), np.ones(n)), np.kron(np.ones(n), np.eye(n))
    return scipy.optimize.linprog(
        costs.ravel(), A_eq=np.concatenate([rows, columns]), b_eq=np.concatenate([p, q])
    ).fun


def with_gradient(loss, argnums=0):
    """A function of the arguments, for the losses and the gradients of their sum."""

    def total(*arguments):
        losses = loss(*arguments)
        return jnp.sum(losses), losses

    return jax.jit(jax.grad(total, argnums, has_aux=True))


class TestDistance:
    def test_matches_the_literal_formula(self):
        hidden, kernel, y, embedding = batch()
        f = hidden @ kernel
        distance, _, slopes, _ = literal(f, y, literal_costs(embedding))
        loss = with_gradient(lambda f, e: earth_mover_language_loss(f, y, e), (0, 1))
        (gradient, of_embedding), found = loss(f, embedding)
        np.testing.assert_allclose(found, distance, rtol=1e-5)
        np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(of_embedding, 0)
        moved = earth_mover_language_loss(np.moveaxis(f, -1, 0), y, embedding, axis=0)
        np.testing.assert_allclose(moved, distance, rtol=1e-5)

    def test_distributions(self):
        hidden, kernel, y, embedding = batch()
        f, costs = hidden @ kernel, literal_costs(embedding)
        q = np.random.default_rng(1).dirichlet(np.ones(11), size=y.shape).astype("f")
        p = jax.nn.softmax(f)
        for axis in (-1, 0):
            found = earth_mover_language_loss(
                np.moveaxis(f, -1, axis), np.moveaxis(q, -1, axis), embedding, axis=axis
            )
            expected = np.einsum("abi,ij,abj->ab", q, costs, p)
            np.testing.assert_allclose(found, expected, rtol=1e-5)
        one_hot = earth_mover_language_loss(f, np.eye(11, dtype="f")[y], embedding)
        by_id = earth_mover_language_loss(f, y, embedding)
        np.testing.assert_allclose(one_hot, by_id, rtol=1e-5, atol=1e-6)

    def test_a_certain_model_is_not_lost_in_rounding(self):
        """1 - cos of the mean embedding would be off by more than this distance."""
        embedding, labels = batch()[3], np.arange(11)
        f = np.where(np.eye(11), 0, np.log(1e-9)).astype("f")
        distance, *_ = literal(f, labels, literal_costs(embedding))
        assert np.all(distance < 2e-8)
        found = earth_mover_language_loss(f, labels, embedding)
        np.testing.assert_allclose(found, distance, rtol=1e-5)

    def test_small_ids_of_large_vocabularies(self):
        hidden, kernel, y, embedding = batch(vocabulary=300)
        ids, f = (y % 128).astype(np.int8), hidden @ kernel
        distance, *_ = literal(f, ids, literal_costs(embedding))
        found = earth_mover_language_loss(f, ids, embedding)
        np.testing.assert_allclose(found, distance, rtol=1e-5)
        found = jax.jit(linear_earth_mover_loss)(hidden, kernel, ids, embedding)
        np.testing.assert_allclose(found, distance, rtol=1e-4)

    @pytest.mark.claim("emo-earth-mover-lm")
    def test_is_the_cost_of_transport_and_so_knows_near_words_from_far_ones(self):
        """Equal to a linear program's for one label, above it for several, 1 - p_y for words at
        right angles. A model of noisy words, trained to its end, has less mass on the noise and
        more on words like the label than after training by cross-entropy."""
        hidden, kernel, y, embedding = batch((4,), vocabulary=6)
        embedding[0] = [1, -1, 2]
        f, costs = hidden @ kernel, literal_costs(embedding)
        p = np.asarray(jax.nn.softmax(f), float)
        found = earth_mover_language_loss(f, y, embedding)
        expected = [optimal_transport(a, np.eye(6)[b], costs) for a, b in zip(p, y, strict=True)]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        q = np.random.default_rng(2).dirichlet(np.ones(6), size=4)
        found = earth_mover_language_loss(f, q.astype("f"), embedding)
        least = [optimal_transport(a, b / b.sum(), costs) for a, b in zip(p, q, strict=True)]
        assert np.all(found > np.add(least, 1e-3))

        apart = earth_mover_language_loss(f, y, 3 * np.eye(6, dtype="f"))
        np.testing.assert_allclose(apart, 1 - p[np.arange(4), y], rtol=1e-5)
        scaled = earth_mover_language_loss(f, y, embedding * np.arange(1, 7)[:, None])
        np.testing.assert_allclose(scaled, earth_mover_language_loss(f, y, embedding), rtol=1e-5)

        words = jnp.array([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0], [-1.0, 1.0], [-1.0, -1.0]])
        corpus = jnp.array([0.55, 0.15, 0.1, 0.1, 0.1])  # two words alike, and noise

        @jax.jit
        def fitted(weight):
            def loss(f):
                every = jnp.broadcast_to(f, (5, 5)), jnp.arange(5)
                plain = softmax_cross_entropy(*every)
                moved = emo_loss(*every, words)
                return jnp.sum(corpus * (weight * moved + (1 - weight) * plain))

            step = lambda _, f: f - jax.grad(loss)(f)
            return jax.nn.softmax(jax.lax.fori_loop(0, 500, step, jnp.zeros(5)))

        by_entropy, by_distance = fitted(0.0), fitted(1.0)
        np.testing.assert_allclose(by_entropy, corpus, atol=1e-3)
        assert by_distance[1] > 1.1 * corpus[1]
        assert np.all(by_distance[2:] < 0.9 * corpus[2:])


class TestCombination:
    def test_matches_the_literal_formula(self):
        hidden, kernel, y, embedding = batch()
        f = hidden @ kernel
        d, n, of_d, of_n = literal(f, y, literal_costs(embedding))
        ratio = (n / (d + 1e-10))[..., None]
        expected = {
            "mle": (n, (of_n + ratio * of_d) / 2),
            "emo": (2 * d, of_d + of_n / ratio),
        }
        for mode in MODES:
            slopes, found = with_gradient(partial(emo_loss, mode=mode))(f, y, embedding)
            np.testing.assert_allclose(found, expected[mode][0], rtol=1e-5)
            np.testing.assert_allclose(slopes, expected[mode][1], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(emo_loss(f, y, embedding), n, rtol=1e-5)
        wide = emo_loss(f, y, embedding, mode="emo", epsilon=2.0)
        np.testing.assert_allclose(wide, d + d / (n + 2) * n, rtol=1e-5)


class TestLinear:
    @pytest.fixture(autouse=True)
    def small_blocks(self, monkeypatch):
        monkeypatch.setattr(earth_mover, "_BLOCK_WIDTH", 4)

    @pytest.mark.parametrize("vocabulary", [11, 8, 3])
    def test_is_the_loss_of_the_logits(self, vocabulary):
        """Three blocks, two whole ones, and one that is narrower; tokens that do not count."""
        hidden, kernel, y, embedding = batch(vocabulary=vocabulary)
        where = np.array([True, False, True])
        y[0, 0] = vocabulary  # of no word
        weights = np.random.default_rng(3).normal(size=(3, *y.shape)).astype("f")

        def of_logits(hidden, kernel):
            f = hidden @ kernel
            losses = [
                earth_mover_language_loss(f, y, embedding, where=where),
                *(emo_loss(f, y, embedding, mode=mode, where=where) for mode in MODES),
            ]
            return weights * jnp.stack(losses)

        def linear(hidden, kernel):
            given = hidden, kernel, y, embedding
            losses = [
                linear_earth_mover_loss(*given, where=where),
                *(linear_emo_loss(*given, mode=mode, where=where) for mode in MODES),
            ]
            return weights * jnp.stack(losses)

        ours = with_gradient(linear, (0, 1))(np.where(where[:, None], hidden, np.nan), kernel)
        theirs = with_gradient(of_logits, (0, 1))(hidden, kernel)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ours, theirs)
        assert np.all(ours[1][:, :, 1] == 0)
        assert np.all(ours[0][0][:, 1] == 0)

    def test_values_are_those_of_its_parts(self):
        hidden, kernel, y, embedding = batch()

        @jax.jit
        def values(e):
            given = hidden, kernel, y, e
            modes = [linear_emo_loss(*given, mode=mode) for mode in MODES]
            return modes, linear_softmax_cross_entropy(*given[:3]), linear_earth_mover_loss(*given)

        (mle, emo), entropy, distance = values(embedding)
        np.testing.assert_allclose(mle, entropy, rtol=1e-5)
        np.testing.assert_allclose(emo, 2 * distance, rtol=1e-5)
        of_embedding = jax.jit(jax.grad(lambda e: linear_emo_loss(hidden, kernel, y, e).sum()))
        np.testing.assert_array_equal(of_embedding(embedding), 0)

    def test_sharded_tokens(self):
        hidden, kernel, y, embedding = batch((16,))
        rows, whole = PartitionSpec("data"), PartitionSpec()

        def local(hidden, kernel, y, embedding):
            return linear_emo_loss(hidden, kernel, y, embedding, mode="emo")

        sharded = jax.shard_map(
            local,
            mesh=Mesh(np.array(jax.devices()), ("data",)),
            in_specs=(rows, whole, rows, whole),
            out_specs=rows,
        )
        found, expected = (
            with_gradient(f, (0, 1))(hidden, kernel, y, embedding) for f in (sharded, local)
        )
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)

    def test_vmap_no_tokens_and_one_word(self):
        hidden, kernel, y, embedding = batch()
        mapped = jax.jit(jax.vmap(lambda k: linear_emo_loss(hidden, k, y, embedding)))
        expected = emo_loss(hidden @ -kernel, y, embedding)
        np.testing.assert_allclose(mapped(jnp.stack([kernel, -kernel]))[1], expected, rtol=1e-5)
        nothing = linear_emo_loss(hidden[:0], kernel, y[:0], embedding)
        assert nothing.shape == (0, 3)
        one = jax.jit(linear_emo_loss)(hidden, kernel[:, :1], 0 * y, embedding[:1])
        np.testing.assert_array_equal(one, 0)


class TestMemory:
    @pytest.mark.optimized
    def test_a_linear_loss_needs_a_fraction_of_the_logits(self):
        """And hardly more for twice as many words. Counted in the program, which is not run."""
        tokens, features = 1024, 8

        def temporary(vocabulary):
            def total(*arguments):
                return jnp.sum(linear_emo_loss(*arguments))

            compiled = jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(
                jax.ShapeDtypeStruct((tokens, features), jnp.float32),
                jax.ShapeDtypeStruct((features, vocabulary), jnp.float32),
                jax.ShapeDtypeStruct((tokens,), jnp.int32),
                jax.ShapeDtypeStruct((vocabulary, features), jnp.float32),
            )
            return compiled.compile().memory_analysis().temp_size_in_bytes

        few, many = temporary(32_768), temporary(65_536)
        logits = 4 * tokens * 65_536
        assert many < logits / 4
        assert many - few < 2 * 4 * features * 65_536


def of_logits(loss):
    """A linear loss's counterpart, as a function of what that takes."""
    return lambda h, k, y, e, **options: loss(jnp.matmul(h, k), y, e, **options)


@pytest.mark.parametrize(
    "loss",
    [
        of_logits(earth_mover_language_loss),
        partial(of_logits(emo_loss), mode="mle"),
        partial(of_logits(emo_loss), mode="emo"),
        linear_earth_mover_loss,
        partial(linear_emo_loss, mode="mle"),
        partial(linear_emo_loss, mode="emo"),
    ],
    ids=["distance", "mle", "emo", "linear distance", "linear mle", "linear emo"],
)
class TestEdges:
    def test_far_logits_and_degenerate_embeddings(self, loss):
        hidden, kernel, y, embedding = batch()
        slopes = with_gradient(loss, (0, 1))
        directions = np.random.default_rng(0).normal(size=(24, 1, 3))
        alike = (np.linspace(1, 2, 11)[:, None] * directions).astype("f")
        for h in (hidden, 1e4 * np.sign(hidden), 0 * hidden):
            for e in (embedding, 1e15 * embedding, 0 * embedding, *alike):
                gradients, values = slopes(h, kernel, y, e)
                assert np.all(np.isfinite(values) & (values >= 0))
                assert all(np.all(np.isfinite(gradient)) for gradient in gradients)

    def test_what_does_not_count_and_what_does_not_exist(self, loss):
        hidden, kernel, y, embedding = batch()
        where = np.array([True, False, True])
        slopes = with_gradient(partial(loss, where=where))
        lost = np.where(where[:, None], hidden, np.nan), kernel, np.where(where, y, -1)
        found, expected = slopes(*lost, embedding), slopes(hidden, kernel, y, embedding)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        unknown = np.where(where, y, -1)
        unknown[1, 2] = 11
        of_hidden, values = slopes(hidden, kernel, unknown, embedding)
        np.testing.assert_array_equal(np.isnan(values), unknown == 11)
        np.testing.assert_array_equal(of_hidden[1, :2], expected[0][1, :2])

    def test_half_precision_computes_in_float32(self, loss):
        """Products of the hidden states, each of which has one feature, are exact."""
        _, kernel, y, embedding = batch()
        slopes = with_gradient(loss)
        for dtype in (jnp.bfloat16, jnp.float16):
            given = [jnp.asarray(x, dtype) for x in (np.eye(4)[:3], kernel, embedding)]
            wide = [x.astype(jnp.float32) for x in given]
            (of_hidden, found), (_, full) = (slopes(h, k, y[0], e) for h, k, e in (given, wide))
            assert found.dtype == of_hidden.dtype == dtype
            np.testing.assert_array_equal(found, full.astype(dtype))

    def test_bad_input(self, loss):
        hidden, kernel, y, embedding = batch()
        with pytest.raises(ValueError, match=r"cost_embedding must have shape \(11, width\)"):
            loss(hidden, kernel, y, embedding[1:])
        with pytest.raises(TypeError, match="cost_embedding must have a floating-point type"):
            loss(hidden, kernel, y, embedding.astype(int))
        with pytest.raises(ValueError, match="labels must have shape"):
            loss(hidden, kernel, y[1:], embedding)
        with pytest.raises(ValueError, match="where must broadcast"):
            loss(hidden, kernel, y, embedding, where=np.ones(4, bool))


def test_bad_input_of_some():
    hidden, kernel, y, embedding = batch()
    f = hidden @ kernel
    for loss, given in ((emo_loss, (f, y, embedding)), (linear_emo_loss, batch())):
        with pytest.raises(ValueError, match=r"mode must be one of \('mle', 'emo'\), got 'emd'"):
            loss(*given, mode="emd")
        with pytest.raises(ValueError, match=r"epsilon must be in \(0, inf\), got 0"):
            loss(*given, epsilon=0)
    with pytest.raises(TypeError, match="logits must have a floating-point type"):
        earth_mover_language_loss(f.astype(int), y, embedding)
    with pytest.raises(TypeError, match="labels must be integer ids or a distribution, got bool"):
        earth_mover_language_loss(f, y > 0, embedding)
    with pytest.raises(ValueError, match="axis must name axes of an array with 3 dimensions"):
        earth_mover_language_loss(f, y, embedding, axis=3)
    with pytest.raises(TypeError, match="labels must be integer ids, got float32"):
        linear_emo_loss(hidden, kernel, y.astype("f"), embedding)
    with pytest.raises(ValueError, match="kernel must have shape"):
        linear_emo_loss(hidden, kernel.T, y, embedding)
    with pytest.raises(ValueError, match="with at least one word"):
        linear_emo_loss(hidden, kernel[:, :0], y, embedding[:0])
