from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from jax.sharding import AxisType, PartitionSpec

from jaxref.kernels import linear_softmax_cross_entropy
from jaxref.losses.token_weights import (
    importance_sampling_diagnostics,
    prior_loss,
    reference_token_weights,
)

RNG = np.random.default_rng(0)
LOG_PROBS = np.log(RNG.uniform(0.01, 0.99, size=(8, 10))).astype("f")
LOG_PROBS[2, :3] = [0.0, -1e-6, -np.inf]
WHERE = RNG.uniform(size=(8, 10)) < 0.7
LOGITS = RNG.normal(size=(8, 10, 6)).astype("f")
LABELS = RNG.integers(6, size=(8, 10))
CHOICES = [(w, n) for w in ("complement", "inverse") for n in ("sequence", "batch", None)]


@partial(jax.jit, static_argnames=("floor", "ceiling"))
def _all_weights(log_probs, exponent, where, floor, ceiling):
    options = {"exponent": exponent, "floor": floor, "ceiling": ceiling, "where": where}
    return [
        reference_token_weights(log_probs, weighting=weighting, normalise=normalise, **options)
        for weighting, normalise in CHOICES
    ]


def all_weights(log_probs, exponent, where=True, floor=0.0, ceiling=10.0):
    return dict(zip(CHOICES, _all_weights(log_probs, exponent, where, floor, ceiling)))


def literal_weights(weighting, normalise, exponent, floor, ceiling):
    with np.errstate(divide="ignore"):
        p = np.exp(np.float64(LOG_PROBS))
        s = (1 - p) ** exponent if weighting == "complement" else p**-exponent
    s = np.where(WHERE, np.clip(s, floor, ceiling), 0)
    if normalise is None:
        return s
    axis = {"sequence": -1, "batch": None}[normalise]
    count = lambda x: x.sum(axis=axis, keepdims=True)
    return s * count(WHERE) / count(s)


class TestWeights:
    def test_match_the_formula(self):
        masked = np.where(WHERE, LOG_PROBS, np.nan)
        for exponent, floor, ceiling in ((1.0, 0.0, 10.0), (2.5, 0.1, 4.0), (0.0, 0.0, 10.0)):
            found = all_weights(masked, exponent, WHERE, floor, ceiling)
            for choice, weights in found.items():
                expected = literal_weights(*choice, exponent, floor, ceiling)
                np.testing.assert_allclose(weights, expected, rtol=2e-5)

    def test_means_are_1_and_what_is_certain_counts_for_nothing(self):
        found = all_weights(LOG_PROBS, 1.0, WHERE)
        for choice in CHOICES:
            mean = np.mean(found[choice], axis=-1, where=WHERE)
            if choice[1] == "sequence":
                np.testing.assert_allclose(mean, 1, rtol=1e-5)
            elif choice[1] == "batch":
                np.testing.assert_allclose(np.mean(found[choice], where=WHERE), 1, rtol=1e-5)
        plain = all_weights(LOG_PROBS, 1.0)
        assert plain["complement", "sequence"][2, 0] == 0
        assert plain["complement", "sequence"][2, 1] > 0
        order = np.argsort(LOG_PROBS[0])
        for choice in (("complement", "sequence"), ("inverse", None)):
            steps = np.diff(np.asarray(plain[choice])[0][order])
            assert np.all(steps[np.exp(LOG_PROBS[0][order][1:]) > 0.1] < 0)

    def test_edges(self):
        certain = np.zeros((8, 10), "f")
        for choice, weights in all_weights(certain, 1.0, WHERE).items():
            even = choice[0] == "inverse" or choice[1] is not None
            np.testing.assert_array_equal(weights, WHERE * float(even))
        for weights in all_weights(LOG_PROBS, 1.0, False).values():
            np.testing.assert_array_equal(weights, 0)
        # scores of 1e-60 have shares all the same
        small = np.log1p(-np.float32(1e-6)) * np.array([1, 2, 4, 1, 1, 1, 1, 1, 1, 1], "f")
        small = np.tile(small, (8, 1))
        found = np.asarray(all_weights(small, 10.0)["complement", "sequence"][0])
        np.testing.assert_allclose(found[2] / found[1], 2.0**10, rtol=1e-3)
        far = all_weights(np.full((8, 10), -1e4, "f"), 2.0)
        for choice, weights in far.items():
            raw = 10.0 if choice[0] == "inverse" else 1.0
            np.testing.assert_allclose(weights, raw if choice[1] is None else 1.0, rtol=1e-6)
        half = reference_token_weights(jnp.asarray(LOG_PROBS, jnp.bfloat16))
        assert half.dtype == jnp.bfloat16
        expected = all_weights(LOG_PROBS, 1.0)["complement", "sequence"]
        np.testing.assert_allclose(half.astype("f"), expected, atol=0.1)

    def test_shards_share_the_sum_of_the_batch(self):
        rows = PartitionSpec("data")
        weights = jax.shard_map(
            lambda x, where: reference_token_weights(
                x, where=where, normalise="batch", axis_name="data"
            ),
            mesh=jax.make_mesh((8,), ("data",), (AxisType.Auto,)),
            in_specs=rows,
            out_specs=rows,
        )
        expected = all_weights(LOG_PROBS, 1.0, WHERE)["complement", "batch"]
        np.testing.assert_allclose(jax.jit(weights)(LOG_PROBS, WHERE), expected, rtol=1e-5)

    def test_bad_input(self):
        for options, message in (
            ({"exponent": -1.0}, r"exponent must be in \[0"),
            ({"weighting": "linear"}, "weighting must be one of"),
            ({"normalise": "token"}, "normalise must be one of"),
            ({"floor": 2.0, "ceiling": 1.0}, r"ceiling must be in \[2"),
            ({"ceiling": 0.0}, r"ceiling must be in \(0"),
            ({"where": np.ones(3, bool)}, "where must broadcast"),
        ):
            with pytest.raises(ValueError, match=message):
                reference_token_weights(LOG_PROBS, **options)
        with pytest.raises(ValueError, match=r"must be at most 0, got 0\.5"):
            reference_token_weights(np.array([-1.0, 0.5], "f"))
        with pytest.raises(TypeError, match="must have a floating-point type"):
            reference_token_weights(np.array([-1, -2]))
        with pytest.raises(ValueError, match="reference_log_probs must have shape"):
            prior_loss(LOGITS, LABELS, LOG_PROBS[0])
        with pytest.raises(TypeError, match="labels must be integer ids"):
            prior_loss(LOGITS, LABELS / 2, LOG_PROBS)


class TestLoss:
    def test_value_and_gradients(self):
        labels = np.where(WHERE, LABELS, -100)

        @jax.jit
        def both(logits, log_probs):
            loss = partial(prior_loss, exponent=1.5, where=WHERE)
            value, pull = jax.vjp(lambda f, r: loss(f, labels, r), logits, log_probs)
            moved = loss(jnp.moveaxis(logits, -1, 0), labels, log_probs, axis=0)
            return value, moved, pull(jnp.ones_like(value))

        value, moved, (slope, of_reference) = both(LOGITS, LOG_PROBS)
        weights = literal_weights("complement", "sequence", 1.5, 0.0, 10.0)
        log_p = scipy.special.log_softmax(np.float64(LOGITS), axis=-1)
        onehot = np.eye(6)[LABELS]
        np.testing.assert_allclose(value, -weights * np.sum(onehot * log_p, -1), rtol=1e-4)
        np.testing.assert_allclose(moved, value, rtol=1e-5)
        expected = weights[..., None] * (np.exp(log_p) - onehot)
        np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(of_reference, 0)

    def test_exponent_0_is_cross_entropy_and_the_kernel_has_the_same_losses(self):
        plain = optax.losses.softmax_cross_entropy_with_integer_labels(LOGITS, LABELS)
        even = jax.jit(prior_loss)(LOGITS, LABELS, LOG_PROBS, exponent=0.0, where=WHERE)
        np.testing.assert_allclose(even, np.where(WHERE, plain, 0), rtol=1e-5)
        hidden, kernel = RNG.normal(size=(8, 10, 4)), RNG.normal(size=(4, 6))

        @jax.jit
        def losses(hidden, kernel):
            weights = reference_token_weights(LOG_PROBS)
            fused = weights * linear_softmax_cross_entropy(hidden, kernel, LABELS)
            return fused, prior_loss(hidden @ kernel, LABELS, LOG_PROBS)

        fused, found = losses(hidden.astype("f"), kernel.astype("f"))
        np.testing.assert_allclose(fused, found, rtol=1e-4, atol=1e-5)

    @pytest.mark.claim("prior-token-weighting")
    def test_weights_teach_what_only_the_image_tells_at_the_price_of_the_rest(self):
        """Captions of which a fifth of the tokens are attributes of the image and the others nearly
        follow from the one before: in as many steps, weights by a text model that knows the law of
        the words get more attributes right, and a higher loss on the words, the more so the higher
        the exponent."""
        words, values, slots, length = 16, 8, 3, 15

        def captions(key, number):
            of_image, of_chain, of_noise = jax.random.split(key, 3)
            image = jax.random.randint(of_image, (number, slots), 0, values)
            noise = jax.random.randint(of_chain, (number, length), 0, words)
            follows = jax.random.bernoulli(of_noise, 0.9, (number, length))
            is_image = jnp.arange(length) % 5 == 4

            def step(previous, at):
                t, noise, follows = at
                likely = jnp.where(previous < words, (5 * previous + 3) % words, 0)
                word = jnp.where(follows, likely, noise)
                token = jnp.where(is_image[t], words + image[:, t // 5], word)
                p = jnp.where(word == likely, 0.9, 0.0) + 0.1 / words
                return token, (previous, token, jnp.where(is_image[t], 1 / values, p))

            times = (jnp.arange(length), noise.T, follows.T)
            _, columns = jax.lax.scan(step, jnp.zeros(number, jnp.int32), times)
            return image, *(column.T for column in columns)

        def logits(params, image, previous):
            h = params["word"][previous] + params["time"]
            h += jnp.einsum("nsv,svf->nf", jax.nn.one_hot(image, values), params["image"])[:, None]
            return jnp.tanh(h) @ params["out"]

        optimizer = optax.adam(0.01)

        def trained(exponent):
            keys = jax.random.split(jax.random.key(1), 4)
            shapes = {
                "word": (words + values, 24),
                "time": (length, 24),
                "image": (slots, values, 24),
                "out": (24, words + values),
            }
            params = {
                name: 0.3 * jax.random.normal(key, shape)
                for key, (name, shape) in zip(keys, shapes.items())
            }

            def step(carry, key):
                params, state = carry
                image, previous, tokens, p = captions(key, 32)
                loss = lambda params: jnp.mean(
                    prior_loss(
                        logits(params, image, previous), tokens, jnp.log(p), exponent=exponent
                    )
                )
                updates, state = optimizer.update(jax.grad(loss)(params), state)
                return (optax.apply_updates(params, updates), state), None

            steps = jax.random.split(jax.random.key(2), 150)
            (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), steps)
            image, previous, tokens, _ = captions(jax.random.key(3), 512)
            found = logits(params, image, previous)
            is_image = tokens >= words
            right = jnp.mean(jnp.argmax(found, axis=-1) == tokens, where=is_image)
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(found, tokens)
            return right, jnp.mean(losses, where=~is_image)

        right, loss = jax.jit(jax.vmap(trained))(jnp.array([0.0, 0.5, 1.0]))
        assert np.all(np.diff(right) > 0.05)
        assert loss[0] < loss[1] < loss[0] + 0.25 < loss[2] < loss[0] + 0.75


class TestDiagnostics:
    def test_match_the_formula(self):
        weights = RNG.gamma(1.0, size=(4, 9)).astype("f")
        where = RNG.uniform(size=(4, 9)) < 0.6
        masked = np.where(where, weights, np.nan)
        size, maximum = importance_sampling_diagnostics(masked, axis=-1, where=where)
        kept = np.where(where, np.float64(weights), 0)
        expected = kept.sum(-1) ** 2 / np.sum(kept**2, -1)
        np.testing.assert_allclose(size, expected, rtol=1e-5)
        np.testing.assert_allclose(maximum, kept.max(-1), rtol=1e-6)

    def test_edges(self):
        for weights, where, expected in (
            (np.full(5, 1e-30), True, (5, 1e-30)),
            (np.full(5, 1e30), True, (5, 1e30)),
            (np.eye(5)[2], True, (1, 1)),
            (np.ones(5), False, (0, 0)),
            (np.zeros(5), True, (0, 0)),
        ):
            found = importance_sampling_diagnostics(weights.astype("f"), where=where)
            np.testing.assert_allclose(found, expected, rtol=1e-6)
        with pytest.raises(TypeError, match="weights must have a floating-point type"):
            importance_sampling_diagnostics(np.arange(3))
