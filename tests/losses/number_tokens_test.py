from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxref import losses

PEER = np.load(Path(__file__).parents[1] / "oracles" / "number_tokens.npz")
VALUES = losses.number_token_values(PEER["vocabulary"].tolist())
FORMS = {
    "wasserstein": {},
    "square": {"kind": "dot"},
    "absolute": {"kind": "dot", "p": 1},
    "huber": {"kind": "dot", "delta": 1.0},
}
FORMS_OF_PAPER = ("wasserstein", "square")
ALL = np.ones((3, 6), bool)
both = pytest.mark.parametrize("form", FORMS_OF_PAPER)


@cache
def evaluated(form, loss=losses.number_token_loss, **options):
    """The value and gradient, compiled once for the tests, of logits and labels of one shape."""

    def evaluate(logits, labels, where):
        function = partial(loss, token_values=VALUES, where=where, **FORMS[form], **options)
        value, vjp = jax.vjp(lambda z: function(z, labels), logits)
        return value, vjp(jnp.ones_like(value))[0]

    return jax.jit(evaluate)


def softmax64(logits):
    p = np.exp(np.float64(logits) - np.max(logits, axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


class TestNumbers:
    @pytest.mark.parametrize("form", FORMS)
    def test_values_and_gradients_match_ntloss(self, form):
        value, gradient = evaluated(form)(PEER["logits"], PEER["labels"], ALL)
        np.testing.assert_allclose(value, PEER[f"{form}_value"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradient, PEER[f"{form}_gradient"], rtol=1e-4, atol=1e-6)
        assert np.all(gradient[..., np.isnan(VALUES)] == 0)

    def test_cross_entropy_is_added(self):
        logits, labels = PEER["logits"], PEER["labels"]
        log_p = np.log(softmax64(logits))
        tokens = -np.take_along_axis(log_p, np.maximum(labels, 0)[..., None], -1)[..., 0]
        tokens *= labels >= 0
        loss = evaluated("wasserstein", losses.number_token_cross_entropy, number_weight=0.7)
        value, gradient = loss(logits, labels, ALL)
        np.testing.assert_allclose(value, tokens + 0.7 * PEER["wasserstein_value"], rtol=1e-5)
        slope = (softmax64(logits) - np.eye(14)[np.maximum(labels, 0)]) * (labels >= 0)[..., None]
        slope += 0.7 * PEER["wasserstein_gradient"]
        np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-6)

    @both
    def test_distributions_as_labels(self, form):
        """Weighed by their mass on numbers; one label alone is its id."""
        logits = PEER["logits"]
        q = np.random.default_rng(0).dirichlet(np.ones(14), size=(3, 6)).astype("f")
        q[0] = np.eye(14)[PEER["labels"][1]]
        logits = np.stack([logits[1], logits[1], logits[2]])
        value, gradient = evaluated(form)(logits, q, ALL)
        np.testing.assert_allclose(value[0], PEER[f"{form}_value"][1], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(gradient[0], PEER[f"{form}_gradient"][1], rtol=1e-4, atol=1e-6)
        numbers = ~np.isnan(VALUES)
        p, v, q = softmax64(logits[2][:, numbers]), VALUES[numbers], q[2][:, numbers]
        mass = q.sum(-1)
        if form == "square":
            expected = mass * ((q @ v) / mass - p @ v) ** 2
        else:
            pairs = zip(mass, p, q)
            expected = [m * scipy.stats.wasserstein_distance(v, v, a, b) for m, a, b in pairs]
        np.testing.assert_allclose(value[2], expected, rtol=1e-4)

    def test_values_of_tokens(self):
        found = losses.number_token_values(["a", "▁7", "Ġ12", "-3", "+0.5", "1e3", "٣", ".5", "1."])
        np.testing.assert_array_equal(found, [np.nan, 7, 12, -3, 0.5] + [np.nan] * 4)
        found = losses.number_token_values({"3": 4, "b": 0, "10": 1})
        np.testing.assert_array_equal(found, [np.nan, 10, np.nan, np.nan, 3])
        assert losses.number_token_values([]).shape == (0,)
        with pytest.raises(ValueError, match="vocabulary must be in"):
            losses.number_token_values({"1": -1})


class TestClaims:
    @pytest.mark.claim("number-token-loss")
    def test_distance_matters_and_only_the_wasserstein_form_is_least_at_the_label_alone(self):
        """Digits: 0 and 8 average to 4; then regression written out, over five data sets."""
        mass = np.zeros((3, 6, 14))
        shares = [(0, 0.5), (8, 0.5)], [(3, 1)], [(5, 1)], [(9, 1)]
        for i, share in enumerate(shares):
            for digit, part in share:
                mass[0, i, np.flatnonzero(digit == VALUES)] = part
        labels = np.full((3, 6), np.flatnonzero(VALUES == 4)[0])
        logits = np.log(mass + 1e-30).astype("f")
        distance, square = (evaluated(form)(logits, labels, ALL)[0] for form in FORMS_OF_PAPER)
        np.testing.assert_allclose(distance[0, :4], [4, 1, 1, 5], rtol=1e-5)
        np.testing.assert_allclose(square[0, :4], [0, 1, 1, 25], rtol=1e-5, atol=1e-6)
        digits = losses.number_token_values([*"0123456789", "a", "b"])
        rng = np.random.default_rng(0)
        weights = rng.normal(size=(5, 4, 1)) / 2
        x = rng.normal(size=(5, 460, 4)).astype("f")
        numbers = 4.5 + 2.2 * (x @ weights)[..., 0] + 0.5 * rng.normal(size=(5, 460))
        y = np.clip(np.round(numbers), 0, 9).astype(int)

        @jax.jit
        def trained(number_weight):
            def loss(w):
                logits = jnp.einsum("snf,sfv->snv", x[:, :60], w)
                return losses.number_token_cross_entropy(
                    logits, y[:, :60], digits, number_weight=number_weight
                ).sum()

            step = lambda _, w: w - 0.5 / 60 * jax.grad(loss)(w)
            return jax.lax.fori_loop(0, 200, step, jnp.zeros((5, 4, 12)))

        def error(number_weight):
            best = np.argmax((x[:, 60:] @ trained(number_weight))[..., :10], axis=-1)
            return np.abs(best - y[:, 60:]).mean(axis=1)

        plain, with_numbers = error(0.0), error(0.3)
        assert np.mean(with_numbers) < 0.98 * np.mean(plain)
        assert np.sum(with_numbers < plain) >= 4

    def test_wasserstein_form_is_the_distance_of_scipy(self):
        logits, labels = PEER["logits"][1], PEER["labels"][1]
        numbers = np.flatnonzero(~np.isnan(VALUES))
        expected = [
            scipy.stats.wasserstein_distance(VALUES[numbers], [VALUES[y]], softmax64(z[numbers]))
            if y in numbers
            else 0
            for z, y in zip(logits, labels)
        ]
        np.testing.assert_allclose(PEER["wasserstein_value"][1], expected, rtol=1e-5)


class TestEdges:
    @both
    def test_labels_that_are_no_numbers_masks_and_unknown_ids(self, form):
        logits = np.zeros((3, 6, 14), "f")
        logits[0, 4:] = np.nan
        labels = np.zeros((3, 6), int)
        labels[0] = [0, -100, 14, -1, 1, -100]
        where = np.arange(18).reshape(3, 6) < 4
        value, gradient = evaluated(form)(logits, labels, where)
        np.testing.assert_array_equal(value[0], [0, 0, np.nan, np.nan, 0, 0])
        assert np.all(gradient[0, np.array([0, 1, 4, 5])] == 0)
        assert np.all(gradient[1:] == 0)

    def test_cross_entropy_of_the_same(self):
        logits = np.zeros((3, 6, 14), "f")
        logits[2] = np.nan
        labels = np.zeros((3, 6), int)
        labels[0] = [0, -100, 14, -1, 1, -100]
        loss = evaluated("wasserstein", losses.number_token_cross_entropy, number_weight=0.7)
        value, gradient = loss(logits, labels, np.array([[True], [True], [False]]) & ALL)
        expected = [np.log(14), 0, np.nan, np.nan, np.log(14) + 0.7 * 3.1, 0]
        np.testing.assert_allclose(value[0], expected, rtol=1e-5)  # 7 against 0 to 9
        assert np.all(value[2] == 0)
        assert np.all(gradient[2] == 0)

    @both
    def test_extreme_logits(self, form):
        at, label = np.array([4, 7]), 4
        logits = np.full((3, 6, 14), -1e4, "f")
        logits[0, [0, 1], at] = 1e4
        value, gradient = evaluated(form)(logits, np.full((3, 6), label), ALL)
        expected = abs(VALUES[at] - VALUES[label]) ** (2 if form == "square" else 1)
        np.testing.assert_allclose(value[0, :2], expected, atol=1e-6)
        assert np.all(np.isfinite(gradient))

    def test_half_precision_computes_in_float32_and_no_position_is_none(self):
        half = jnp.asarray(PEER["logits"], jnp.float16)
        ours = evaluated("wasserstein")(half, PEER["labels"], ALL)[0]
        wide = evaluated("wasserstein")(np.asarray(half, "f"), PEER["labels"], ALL)[0]
        assert ours.dtype == jnp.float16
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(wide, np.float16))
        loss = partial(losses.number_token_loss, token_values=VALUES)
        assert jax.eval_shape(loss, half[:, :0], PEER["labels"][:, :0]).shape == (3, 0)

    def test_bad_input_is_named(self):
        loss = losses.number_token_loss
        logits, labels = PEER["logits"], PEER["labels"]
        with pytest.raises(ValueError, match=r"logits must have shape \(3, 6, 13\)"):
            loss(logits, labels, VALUES[:-1])
        with pytest.raises(ValueError, match=r"token_values must have shape \[tokens\]"):
            loss(logits, labels, VALUES[None])
        with pytest.raises(ValueError, match="token_values must have at least two numbers, got 1"):
            loss(logits, labels, np.where(VALUES == 3, VALUES, np.nan))
        with pytest.raises(ValueError, match="token_values must be in"):
            loss(logits, labels, np.where(VALUES == 3, np.inf, VALUES))
        with pytest.raises(TypeError, match="token_values must be known"):
            jax.jit(loss)(logits, labels, VALUES)
        with pytest.raises(ValueError, match=r"labels must have shape \(3, 6\)"):
            loss(logits, labels[0], VALUES)
        with pytest.raises(TypeError, match="labels must be integer ids or a distribution"):
            loss(logits, labels > 3, VALUES)
        with pytest.raises(TypeError, match="logits must have a floating-point type"):
            loss(logits.astype(int), labels, VALUES)
        with pytest.raises(ValueError, match="where must broadcast"):
            loss(logits, labels, VALUES, where=np.ones((3, 5), bool))
        with pytest.raises(ValueError, match="kind must be 'wasserstein' or 'dot'"):
            loss(logits, labels, VALUES, kind="mse")
        for name, value in {"p": 0.5, "delta": 0.0}.items():
            with pytest.raises(ValueError, match=f"{name} must be in"):
                loss(logits, labels, VALUES, **{name: value})
        with pytest.raises(ValueError, match="number_weight must be in"):
            losses.number_token_cross_entropy(logits, labels, VALUES, number_weight=-1.0)
