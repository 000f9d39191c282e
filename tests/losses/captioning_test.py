from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref import losses

PEER = np.load(Path(__file__).parents[1] / "oracles" / "distillation.npz")
SER = losses.sentence_embedding_regression_loss
KINDS = ("cosine", "smooth_l1", "mse")


def value_and_gradient(kind, predicted, target, where=None):
    where = np.ones(predicted.shape[:-1], bool) if where is None else where
    return _value_and_gradient(kind, predicted, target, where)


@jax.jit(static_argnums=0)
def _value_and_gradient(kind, predicted, target, where):
    values, vjp = jax.vjp(lambda e: SER(e, target, kind=kind, where=where), predicted)
    return values, vjp(jnp.ones_like(values))[0]


def captions(seed=0):
    """Two captions of up to 4 tokens out of 5, states of 3 features, embeddings of 2."""
    rng = np.random.default_rng(seed)
    exists = np.array([[True, True, True, False], [True, True, False, False]])
    return {
        "logits": rng.normal(size=(2, 4, 5)).astype("f"),
        "labels": np.where(exists, rng.integers(5, size=(2, 4)), -100),
        "hidden": rng.normal(size=(2, 4, 3)).astype("f"),
        "target_embedding": rng.normal(size=(2, 2)).astype("f"),
        "weights": rng.normal(size=(3, 2)).astype("f"),
        "where": exists,
    }


@jax.jit
def run(batch, embedding_weight=0.7):
    """The losses, and the gradients of their sum with respect to all that is learned."""

    def total(logits, hidden, weights):
        values = losses.captioning_multitask_loss(
            logits,
            batch["labels"],
            hidden,
            lambda h: h @ weights,
            batch["target_embedding"],
            embedding_weight=embedding_weight,
            label_smoothing=0.1,
            where=batch["where"],
        )
        return values.sum(), values

    learned = [batch[k] for k in ("logits", "hidden", "weights")]
    (_, values), gradients = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(*learned)
    return values, gradients


def literal(batch, i, embedding_weight):
    n = batch["where"][i].sum()
    z = np.float64(batch["logits"][i, :n])
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    q = 0.9 * np.eye(5)[batch["labels"][i, :n]] + 0.02
    e_hat = np.float64(batch["hidden"][i, :n]).mean(0) @ batch["weights"]
    e = batch["target_embedding"][i]
    cosine = e_hat @ e / np.linalg.norm(e_hat) / np.linalg.norm(e)
    return -np.sum(q * log_p) / n + embedding_weight * (1 - cosine)


class TestNumbers:
    @pytest.mark.parametrize("kind", KINDS)
    def test_terms_match_torch(self, kind):
        predicted, target = PEER["state"], PEER["teacher_state"]
        values, gradient = value_and_gradient(kind, predicted, target)
        if kind == "mse":
            expected, slope = np.mean((predicted - target) ** 2, -1), (predicted - target) / 2
        else:
            expected, slope = PEER[kind], PEER[f"{kind}_grad"]
        np.testing.assert_allclose(values, expected, rtol=1e-5)
        np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-6)

    def test_whole_loss_matches_the_formula(self):
        batch = captions()
        for weight in (0.0, 0.7):
            values, _ = run(batch, weight)
            expected = [literal(batch, i, weight) for i in (0, 1)]
            np.testing.assert_allclose(values, expected, rtol=1e-5)


class TestClaims:
    @pytest.mark.claim("sentence-embedding-regression")
    def test_the_term_shrinks_overfitting_where_weight_decay_is_low_and_not_where_it_is_high(self):
        """Captions of 3 words of 12 about one of 4 topics, from 24 noisy recordings: the gap of
        cross-entropy between training and validation after 150 steps of descent, four seeds."""

        def sample(rng, means, table, number):
            topic = rng.integers(4, size=number)
            recordings = means[topic] + rng.normal(size=(number, 16))
            words = (rng.uniform(size=(number, 3, 1)) > np.cumsum(table[topic], -1)[:, None]).sum(
                -1
            )
            return np.float32(recordings), words, np.float32(np.eye(4)[topic])

        sets = []
        for seed in range(4):
            rng = np.random.default_rng(seed)
            world = rng.normal(size=(4, 16)), rng.dirichlet(np.full(12, 0.3), size=4)
            sets.append([sample(rng, *world, 24), sample(rng, *world, 100)])
        training, validation = (jax.tree.map(lambda *x: np.stack(x), *s) for s in zip(*sets))
        rng = np.random.default_rng(9)
        sizes = {"encoder": (16, 8), "decoder": (8, 36), "projection": (8, 4)}
        start = {k: np.float32(0.3 * rng.normal(size=size)) for k, size in sizes.items()}

        def loss(params, recordings, words, embedding, weight):
            h = jnp.tanh(recordings @ params["encoder"])
            return losses.captioning_multitask_loss(
                (h @ params["decoder"]).reshape(-1, 3, 12),
                words,
                jnp.broadcast_to(h[:, None], (len(h), 3, 8)),
                lambda pooled: pooled @ params["projection"],
                embedding,
                embedding_weight=weight,
            ).mean()

        @jax.jit
        @partial(jax.vmap, in_axes=(0, 0, None, None))
        @partial(jax.vmap, in_axes=(None, None, 0, 0))
        def gap(training, validation, weight, decay):
            def step(params, _):
                gradient = jax.grad(loss)(params, *training, weight)
                return jax.tree.map(lambda w, g: w - g - decay * w, params, gradient), None

            params, _ = jax.lax.scan(step, start, length=150)
            return loss(params, *validation, 0.0) - loss(params, *training, 0.0)

        weights, decays = np.float32([0, 8, 0, 8]), np.float32([0, 0, 0.1, 0.1])
        gaps = gap(training, validation, weights, decays)
        assert np.all(gaps[:, 1] < gaps[:, 0] - 0.3)
        np.testing.assert_allclose(gaps[:, 3], gaps[:, 2], atol=0.15)

    def test_cosine_term_sees_directions_alone(self):
        rng = np.random.default_rng(0)
        e = rng.normal(size=(2, 3, 4)).astype("f")
        values, _ = value_and_gradient("cosine", e[0], e[1])
        unit = e / np.linalg.norm(e, axis=-1, keepdims=True)
        np.testing.assert_allclose(values, np.square(unit[0] - unit[1]).sum(-1) / 2, rtol=1e-5)
        scaled, _ = value_and_gradient("cosine", 1e-20 * e[0], 1e15 * e[1])
        np.testing.assert_allclose(scaled, values, rtol=1e-5)
        same, _ = value_and_gradient("cosine", 3 * e[0], e[0])
        np.testing.assert_allclose(same, 0, atol=1e-6)
        opposite, _ = value_and_gradient("cosine", -e[0], e[0])
        np.testing.assert_allclose(opposite, 2, rtol=1e-6)

    def test_padding_and_cross_entropy_leave_the_projection_alone(self):
        batch = captions()
        values, gradients = run(batch)
        exists = batch["where"][..., None]
        poisoned = {k: np.where(exists, batch[k], np.nan) for k in ("logits", "hidden")}
        again, same = run(batch | poisoned)
        np.testing.assert_allclose(again, values, rtol=1e-6)
        for mine, theirs in zip(same, gradients):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(same[0][~batch["where"]], 0)
        np.testing.assert_array_equal(same[1][~batch["where"]], 0)
        _, without = run(batch, 0.0)
        np.testing.assert_array_equal(without[1], 0)
        np.testing.assert_array_equal(without[2], 0)
        assert np.all(gradients[2] != 0)


class TestEdges:
    def test_sentences_without_tokens_and_unknown_words(self):
        batch = captions()
        where = batch["where"].copy()
        where[0] = False
        values, gradients = run(batch | {"where": where})
        assert values[0] == 0
        np.testing.assert_allclose(values[1], literal(batch, 1, 0.7), rtol=1e-5)
        for gradient in gradients:
            assert np.all(np.isfinite(gradient))
        labels = batch["labels"].copy()
        labels[0, 1] = 5
        assert np.isnan(run(batch | {"labels": labels})[0][0])

    @pytest.mark.parametrize("kind", KINDS)
    def test_zeros_extremes_masks_and_half_precision(self, kind):
        predicted, target = np.zeros((2, 3, 4), "f"), 1e4 * np.sign(PEER["state"])
        values, gradient = value_and_gradient(kind, predicted, target)
        assert np.all(np.isfinite(values))
        assert np.all(np.isfinite(gradient))
        if kind == "cosine":
            np.testing.assert_array_equal(values, 1)
            np.testing.assert_array_equal(gradient, 0)
        where = PEER["token_mask"]
        poisoned = np.where(where[..., None], PEER["state"], np.nan)
        values, gradient = value_and_gradient(kind, poisoned, PEER["teacher_state"], where)
        every, _ = value_and_gradient(kind, PEER["state"], PEER["teacher_state"])
        np.testing.assert_allclose(values, np.where(where, every, 0), rtol=1e-6)
        np.testing.assert_array_equal(gradient[~where], 0)
        half = jnp.asarray(PEER["state"], jnp.bfloat16)
        ours, _ = value_and_gradient(kind, half, PEER["teacher_state"])
        wide, _ = value_and_gradient(kind, np.asarray(half, "f"), PEER["teacher_state"])
        np.testing.assert_array_equal(ours, wide.astype(jnp.bfloat16))

    def test_bad_input_is_named(self):
        batch = captions()
        arguments = [batch[k] for k in ("logits", "labels", "hidden")]
        target = batch["target_embedding"]

        def loss(*arguments, **keywords):  # traced alone
            jax.eval_shape(lambda: losses.captioning_multitask_loss(*arguments, **keywords))

        with pytest.raises(ValueError, match="kind must be one of"):
            SER(target, target, kind="l1")
        with pytest.raises(ValueError, match=r"target must have shape \(2, 2\)"):
            SER(target, target[:, :1])
        with pytest.raises(ValueError, match=r"target_embedding must have shape \(2, 3\)"):
            loss(*arguments, lambda h: h, target)
        with pytest.raises(ValueError, match="hidden must have shape"):
            loss(*arguments[:2], batch["hidden"][:, :2], lambda h: h, target)
        with pytest.raises(ValueError, match="embedding_weight must be in"):
            loss(*arguments, lambda h: h, target, embedding_weight=-1.0)
        with pytest.raises(ValueError, match="label_smoothing must be in"):
            loss(*arguments, lambda h: h, target, label_smoothing=2.0)
        with pytest.raises(ValueError, match="where must broadcast"):
            loss(*arguments, lambda h: h, target, where=np.ones(3, bool))
        with pytest.raises(TypeError, match="predicted must have a floating-point type"):
            SER(target.astype(int), target)
