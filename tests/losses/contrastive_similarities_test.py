from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxref import losses
from jaxref.analysis import penalty_entropy, relative_penalty, tolerance, uniformity

PEER = np.load(Path(__file__).parents[1] / "oracles" / "contrast.npz")
S, INDEX = PEER["similarities"], PEER["index"]
POSITIVE = np.arange(9) == INDEX[:, None]
LOSSES = {
    "info_nce": losses.info_nce_loss,
    "hard": losses.hard_contrastive_loss,
    "simple": losses.simple_contrastive_loss,
    "hard_simple": losses.hard_simple_contrastive_loss,
}


@partial(jax.jit, static_argnames=("name", "temperature"))
def run(name, s, index=INDEX, where=None, **options):
    """Losses and the gradient of their sum."""

    def total(s):
        values = LOSSES[name](s, index, where=where, **options)
        return values.astype("f").sum(), values

    (_, values), gradient = jax.value_and_grad(total, has_aux=True)(s)
    return values, gradient


class TestNumbers:
    def test_info_nce_is_cross_entropy(self):
        values, gradient = run("info_nce", S, temperature=0.2)
        np.testing.assert_allclose(values, PEER["losses"], rtol=1e-5)
        np.testing.assert_allclose(gradient, PEER["grad"], rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("chosen", [{"hard_fraction": 0.3}, {"threshold": 0.1}], ids=str)
    def test_others_match_the_literal_formulas(self, chosen):
        s = np.float64(S)
        s[2, 5:] = s[2, 4]  # ties count alike
        where = np.arange(9) != (INDEX[:, None] + 2) % 9
        for i, row in enumerate(s):
            negatives = row[where[i] & ~POSITIVE[i]]
            cut = chosen.get("threshold")
            if cut is None:
                cut = np.quantile(np.float32(negatives), 1 - chosen["hard_fraction"]) - 1e-6
            hard, others = negatives[negatives >= cut], row[where[i] & ~POSITIVE[i]]
            positive = row[INDEX[i]]
            total = scipy.special.logsumexp([*hard / 0.4, positive / 0.4])
            expected = {
                "hard": total - positive / 0.4,
                "hard_simple": 0.7 * hard.sum() - positive,
                "simple": 0.7 * others.sum() - positive,
            }
            options = {"hard": {"temperature": 0.4}}
            for name, value in expected.items():
                options = {"temperature": 0.4} if name == "hard" else {"weight": 0.7}
                options |= {} if name == "simple" else chosen
                found, _ = run(name, s.astype("f"), where=where, **options)
                np.testing.assert_allclose(found[i], value, rtol=1e-5, atol=1e-6)

    def test_hard_losses_of_all_negatives_are_the_plain_ones(self):
        every = {"hard_fraction": 1.0}
        for hard, plain, options in (
            ("hard", "info_nce", {"temperature": 0.3}),
            ("hard_simple", "simple", {"weight": 0.5}),
        ):
            found, expected = run(hard, S, **every, **options), run(plain, S, **options)
            np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
            np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-6)


class TestClaims:
    @pytest.mark.claim("contrastive-loss-behaviour")
    def test_temperature_shares_the_push_between_one_negative_and_all(self):
        """The gradients are those of the formulas, with the limits of the temperature, and a linear
        encoder of clustered inputs trades uniformity for tolerance as it rises."""
        penalty, entropy = jax.jit(relative_penalty), jax.jit(penalty_entropy)
        entropies = []
        for temperature in (0.07, 0.3, 1.0):
            _, gradient = run("info_nce", S, temperature=temperature)
            pull = -gradient[POSITIVE]
            others = (1 - scipy.special.softmax(S / temperature, axis=1)[POSITIVE]) / temperature
            np.testing.assert_allclose(pull, others, rtol=1e-4)
            shares = penalty(S, INDEX, temperature=temperature)
            ratio = np.where(POSITIVE, 0, gradient / pull[:, None])
            np.testing.assert_allclose(shares, ratio, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-5)
            entropies.append(entropy(S, INDEX, temperature=temperature))
        assert np.all(np.diff(entropies, axis=0) > 0)
        hardest, positive = np.where(POSITIVE, -2, S).max(axis=1), S[POSITIVE]
        cold, hot = (run("info_nce", S, temperature=t)[0] for t in (1e-3, 1e3))
        np.testing.assert_allclose(1e-3 * cold, np.maximum(hardest - positive, 0), atol=3e-3)
        np.testing.assert_allclose(1e3 * (hot - np.log(9)), S.mean(axis=1) - positive, atol=2e-3)

        rng = np.random.default_rng(0)
        labels = np.repeat(np.arange(4), 6)
        x = rng.normal(size=(4, 8))[labels] + 0.5 * rng.normal(size=(24, 8))
        views = (x + 0.3 * rng.normal(size=(2, 24, 8))).astype("f")

        @jax.jit
        @jax.vmap
        def trained(temperature):
            def loss(w):
                a, b = (v / jnp.linalg.norm(v, axis=1, keepdims=True) for v in views @ w)
                return losses.info_nce_loss(a @ b.T, jnp.arange(24), temperature=temperature).mean()

            step = lambda w, _: (w - temperature * jax.grad(loss)(w), None)
            w, _ = jax.lax.scan(step, jnp.eye(8), length=150)
            return uniformity(views[0] @ w), tolerance(views[0] @ w, labels)

        even, tolerant = trained(jnp.array([0.2, 0.5, 1.0]))
        assert np.all(np.diff(even) > 0.05)
        assert np.all(np.diff(tolerant) > 0.05)


class TestEdges:
    @pytest.mark.parametrize("name", LOSSES)
    def test_lost_positives_empty_rows_extremes_and_half_precision(self, name):
        s = S.copy()
        s[0], s[1, :3] = 1e4, [-1e4, 1e4, 0]
        index = np.array([0, 0, 9, -1, 3])
        where = np.ones((5, 9), bool)
        where[4] = False
        values, gradient = run(name, s, index, where)
        np.testing.assert_array_equal(np.isnan(values), [False, False, True, True, False])
        assert values[4] == 0
        assert np.all(np.isfinite(gradient)[np.array([0, 1, 4])])
        where[4] = np.arange(9) > 4  # among which the positive is not
        assert np.isnan(run(name, s, index, where)[0][4])
        where[4] = np.arange(9) == 3
        alone = run(name, s, index, where)[0][4]
        np.testing.assert_allclose(alone, 0 if "simple" not in name else -s[4, 3], atol=1e-6)
        half, _ = run(name, jnp.asarray(S, jnp.float16), where=np.ones((5, 9), bool))
        assert half.dtype == jnp.float16

    def test_bad_input(self):
        for loss in LOSSES.values():
            with pytest.raises(ValueError, match=r"positive_index must have shape \(5,\)"):
                loss(S, INDEX[:4])
            with pytest.raises(TypeError, match="positive_index must be integers, got float"):
                loss(S, np.ones(5, "f"))
            with pytest.raises(TypeError, match="similarities must have a floating-point type"):
                loss(S.astype(int), INDEX)
            with pytest.raises(ValueError, match=r"similarities must have shape \[..., candidates"):
                loss(S[:, :0], INDEX)
        with pytest.raises(ValueError, match="temperature must be in"):
            losses.info_nce_loss(S, INDEX, temperature=0)
        with pytest.raises(ValueError, match="hard_fraction must be in"):
            losses.hard_contrastive_loss(S, INDEX, hard_fraction=0)
        with pytest.raises(ValueError, match="threshold must broadcast to shape"):
            losses.hard_simple_contrastive_loss(S, INDEX, threshold=np.ones(3))
        with pytest.raises(ValueError, match="weight must be in"):
            losses.simple_contrastive_loss(S, INDEX, weight=-1)
