from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from sklearn.metrics import f1_score, jaccard_score

from jaxref import losses, metrics

PEER = np.load(Path(__file__).parents[1] / "oracles" / "segmentation.npz")


def random_sets(shape=(4, 30), seed=0, active=0.3):
    rng = np.random.default_rng(seed)
    return rng.uniform(size=shape).astype(np.float32), rng.uniform(size=shape) < active


def weighted(loss):
    """The sum of losses that the stored gradients belong to."""
    return jnp.sum(loss.ravel() * jnp.arange(1.0, loss.size + 1))


class NumbersTest(chex.TestCase):
    """Against MONAI and the authors' code, as stored by tests/oracles/segmentation.py."""

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(
        ("dice", "dice_loss", {"reduce_axes": (1, 2)}),
        ("dice_batch", "dice_loss", {"reduce_axes": (0, 1, 2)}),
        ("dice_squared", "dice_loss", {"reduce_axes": (1, 2), "squared_denominator": True}),
        ("jaccard", "jaccard_loss", {"reduce_axes": (1, 2), "smooth": 0.5}),  # s / 2 there
        (
            "tversky",
            "tversky_loss",
            {"reduce_axes": (1, 2), "false_positive_weight": 0.3, "false_negative_weight": 0.7},
        ),
    )
    def test_values_and_gradients_match_monai(self, name, loss, arguments):
        def run(p):
            values = getattr(losses, loss)(p, PEER["labels"], **arguments)
            return weighted(values), values

        (_, values), gradient = self.variant(jax.value_and_grad(run, has_aux=True))(
            PEER["probabilities"]
        )
        np.testing.assert_allclose(values, PEER[name], rtol=1e-5)
        expected = np.moveaxis(PEER[f"{name}_gradient"], 1, -1)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)

    def test_focal_tversky_matches_the_authors(self):
        run = jax.jit(jax.value_and_grad(losses.focal_tversky_loss))
        value, gradient = run(PEER["volume"], PEER["vessels"])
        np.testing.assert_allclose(value, PEER["focal_tversky"], rtol=1e-5)
        np.testing.assert_allclose(gradient, PEER["focal_tversky_gradient"], rtol=1e-4, atol=1e-8)


class TestRelations:
    """Each loss is what another becomes at some value of its parameters."""

    p, y = random_sets()

    def close(self, a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5)

    def test_tversky_is_dice_at_one_half_and_jaccard_at_one(self):
        axes = {"reduce_axes": 1}
        dice = losses.dice_loss(self.p, self.y, smooth=2.0, **axes)
        self.close(losses.tversky_loss(self.p, self.y, smooth=1.0, **axes), dice)
        jaccard = losses.jaccard_loss(self.p, self.y, smooth=1.0, **axes)
        ones = {"false_positive_weight": 1.0, "false_negative_weight": 1.0}
        self.close(losses.tversky_loss(self.p, self.y, smooth=1.0, **ones, **axes), jaccard)
        self.close(jaccard, 2 * dice / (1 + dice))

    def test_focal_tversky_at_gamma_one_is_tversky(self):
        weights = {"false_positive_weight": 0.2, "false_negative_weight": 0.8}
        focal = losses.focal_tversky_loss(self.p, self.y, false_negative_weight=0.8, gamma=1.0)
        self.close(focal, losses.tversky_loss(self.p, self.y, **weights))
        squared = losses.focal_tversky_loss(self.p, self.y, false_negative_weight=0.8, gamma=2.0)
        self.close(squared, focal**2)

    def test_log_cosh_dice_is_at_most_half_of_its_square(self):
        dice = losses.dice_loss(self.p, self.y, reduce_axes=1)
        log_cosh = losses.log_cosh_dice_loss(self.p, self.y, reduce_axes=1)
        self.close(log_cosh, np.log(np.cosh(np.float64(dice))))
        assert np.all(log_cosh < dice**2 / 2)
        nearly = losses.log_cosh_dice_loss(jnp.array([0.999]), jnp.array([1]), smooth=0.0)
        np.testing.assert_allclose(nearly, (1 - 2 * 0.999 / 1.999) ** 2 / 2, rtol=1e-4)

    def test_hard_predictions_give_one_minus_the_scores_of_scikit_learn(self):
        hard = (self.p > 0.6).astype(np.float32)
        dice = losses.dice_loss(hard, self.y, smooth=0.0, reduce_axes=1)
        jaccard = losses.jaccard_loss(hard, self.y, smooth=0.0, reduce_axes=1)
        for i in range(4):
            self.close(dice[i], 1 - f1_score(self.y[i], hard[i]))
            self.close(jaccard[i], 1 - jaccard_score(self.y[i], hard[i]))


class TestClaims:
    @pytest.mark.claim("segmentation-loss-survey")
    def test_the_overlap_losses_are_one_family_and_lovasz_meets_it_on_hard_predictions(self):
        """Dice is Tversky at 1/2, Jaccard is 2 D / (1 + D) of it and Lovász on 0 and 1; half way
        between two hard predictions Lovász, being convex, is no more than their mean, where
        Jaccard's relaxation is more."""
        _, y = random_sets((40,))
        a, b = ((random_sets((40,), seed)[0] < 0.4).astype(np.float32) for seed in (1, 2))
        ids = y.astype(int)

        def values(p):
            dice = losses.dice_loss(p, y, smooth=0.0)
            jaccard = losses.jaccard_loss(p, y, smooth=0.0)
            # the class of interest alone: the other column counts for nothing
            foreground = jnp.array([False, True])
            lovasz = losses.lovasz_softmax_loss(jnp.stack([1 - p, p], -1), ids, where=foreground)
            tversky = losses.tversky_loss(p, y, smooth=0.0)
            return jnp.array([dice, tversky, jaccard, lovasz])

        at_a, at_b, between = jax.jit(jax.vmap(values))(jnp.stack([a, b, (a + b) / 2]))
        for dice, tversky, jaccard, _ in (at_a, at_b, between):
            np.testing.assert_allclose(tversky, dice, rtol=1e-6)
            np.testing.assert_allclose(jaccard, 2 * dice / (1 + dice), rtol=1e-6)
        for hard, p in ((at_a, a), (at_b, b)):
            np.testing.assert_allclose(hard[2:], 1 - jaccard_score(y, p), rtol=1e-5)
        assert between[3] <= (at_a[3] + at_b[3]) / 2 + 1e-6

    @pytest.mark.claim("dice-sound-event-detection")
    def test_dice_ignores_silence_and_detects_rare_events_better_than_cross_entropy(self):
        """Correctly rejected frames change nothing; and frames with 3 % activity in each of 4
        classes, a linear detector, equal steps: F1 and error rate on new frames."""
        p, y = random_sets((1, 20, 4))
        silence = ((0, 0), (0, 500), (0, 0))
        longer = np.pad(p, silence), np.pad(y, silence)
        dice, padded = losses.dice_loss(p, y), losses.dice_loss(*longer)
        np.testing.assert_allclose(padded, dice, rtol=1e-6)
        logit = lambda p: np.log(np.maximum(p, 1e-6) / (1 - p))
        short, long = (
            optax.losses.sigmoid_binary_cross_entropy(logit(a), b).mean()
            for a, b in ((p, y), longer)
        )
        assert long < short / 10

        def frames(seed):
            rng = np.random.default_rng(seed)
            active = rng.uniform(size=(1, 1200, 4)) < 0.03
            features = active @ np.eye(4, 12) * 3.0 + rng.normal(size=(1, 1200, 12))
            return features.astype(np.float32), active

        features, active = frames(3)

        @jax.jit
        def train(dice_weight):
            def loss(w):
                z = features @ w[:-1] + w[-1]
                entropy = optax.losses.sigmoid_binary_cross_entropy(z, active).mean()
                overlap = losses.dice_loss(jax.nn.sigmoid(z), active)
                return dice_weight * overlap + (1 - dice_weight) * entropy

            step = lambda _, w: w - 3.0 * jax.grad(loss)(w)
            return jax.lax.fori_loop(0, 100, step, jnp.zeros((13, 4)))

        def scores(w):
            features, active = frames(4)
            p = jax.nn.sigmoid(features @ w[:-1] + w[-1])
            arguments = {"frames_per_segment": 1}
            return (
                metrics.segment_based_f1(p, active, **arguments),
                metrics.segment_based_error_rate(p, active, **arguments),
            )

        with_dice, with_entropy = scores(train(1.0)), scores(train(0.0))
        assert with_dice[0] > with_entropy[0] + 0.1
        assert with_dice[1] < with_entropy[1] - 0.1

    def test_the_set_matters(self):
        """The mean of Dice losses of single entries is not the Dice loss of all of them: with
        little smoothing it is deaf to every negative."""
        p, y = random_sets((200,), active=0.05)
        loss = lambda p, axes: jnp.mean(losses.dice_loss(p, y, reduce_axes=axes, smooth=1e-3))
        each, whole = (jax.grad(loss)(p, axes) for axes in ((), None))
        false_alarms = ~y & (p > 0.2)
        assert np.abs(each[false_alarms]).max() < 2e-4
        assert np.all(whole[false_alarms] > 4e-4)


class TestContract:
    """More is in segmentation_contract_test.py, over all segmentation losses."""

    def test_reduce_axes_and_ids(self):
        rng = np.random.default_rng(0)
        p, ids = (
            rng.dirichlet(np.ones(3), size=(2, 4, 5)).astype("f"),
            rng.integers(3, size=(2, 4, 5)),
        )
        for axes, shape in ((None, ()), ((0, 1, 2), (3,)), ((1, 2), (2, 3)), ((), (2, 4, 5, 3))):
            values = losses.dice_loss(p, ids, reduce_axes=axes)
            assert values.shape == shape
            np.testing.assert_allclose(
                values, losses.dice_loss(p, np.eye(3)[ids], reduce_axes=axes), rtol=1e-6
            )
        per_class = losses.dice_loss(p, ids, reduce_axes=(0, 1, 2))
        one = losses.dice_loss(p[..., 1], ids == 1)
        np.testing.assert_allclose(per_class[1], one, rtol=1e-6)

    def test_masked_entries_are_as_good_as_not_there(self):
        p, y = random_sets((30,))
        where = np.arange(30) < 20
        for loss in (losses.dice_loss, losses.jaccard_loss, losses.focal_tversky_loss):
            np.testing.assert_allclose(loss(p, y, where=where), loss(p[:20], y[:20]), rtol=1e-6)

    def test_a_perfect_focal_tversky_has_a_finite_slope(self):
        y = jnp.array([1.0, 0.0, 1.0])
        value, gradient = jax.value_and_grad(losses.focal_tversky_loss)(y, y)
        assert value == 0
        assert np.all(np.isfinite(gradient))
        assert np.all(gradient != 0)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda p, y: losses.dice_loss(p, y, smooth=-1.0), "smooth must be in"),
        (lambda p, y: losses.dice_loss(p, y, reduce_axes=2), "reduce_axes must name axes"),
        (lambda p, y: losses.dice_loss(p, y[:2]), "targets must have shape"),
        (lambda p, y: losses.dice_loss(p, y[:, 0]), "targets must have shape"),
        (
            lambda p, y: losses.tversky_loss(p, y, false_positive_weight=-0.1),
            "false_positive_weight must be in",
        ),
        (
            lambda p, y: losses.focal_tversky_loss(p, y, false_negative_weight=1.1),
            "false_negative_weight must be in",
        ),
        (lambda p, y: losses.focal_tversky_loss(p, y, gamma=0.0), "gamma must be in"),
    ],
)
def test_hyperparameters_out_of_range_raise(loss, message):
    p, y = random_sets((3, 4))
    with pytest.raises(ValueError, match=message):
        loss(p, y)
