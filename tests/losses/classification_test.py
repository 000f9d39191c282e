from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from jaxref import losses
from jaxref.data import boundary_mask

GRIDFORMER = np.load(Path(__file__).parents[1] / "oracles" / "gridformer.npz")
LOSSES = {
    "poly_cross_entropy": losses.poly_cross_entropy,
    "truncated_poly_loss": lambda *a, **k: losses.truncated_poly_loss(*a, num_terms=3, **k),
    "squentropy": losses.squentropy,
    "rescaled_square_loss": losses.rescaled_square_loss,
}


def random_batch(shape=(6, 5), seed=0, scale=2.0):
    """Logits, integer labels and soft labels over the last axis."""
    rng = np.random.default_rng(seed)
    logits = (scale * rng.normal(size=shape)).astype(np.float32)
    labels = rng.integers(shape[-1], size=shape[:-1])
    soft = rng.dirichlet(np.ones(shape[-1]), size=shape[:-1]).astype(np.float32)
    return logits, labels, soft


def softmax64(logits):
    z = np.asarray(logits, np.float64)
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class NumbersTest(chex.TestCase):
    """Against optax where it has the loss, and literal float64 transcriptions."""

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(-1.0, 0.0, 2.0)
    def test_poly_cross_entropy_matches_optax(self, epsilon):
        logits, labels, soft = random_batch()
        ours = self.variant(lambda z, y: losses.poly_cross_entropy(z, y, epsilon=epsilon))
        for target, distribution in ((labels, np.eye(5)[labels]), (soft, soft)):
            theirs = optax.losses.poly_loss_cross_entropy(logits, distribution, epsilon=epsilon)
            np.testing.assert_allclose(ours(logits, target), theirs, rtol=1e-5, atol=1e-6)

    def test_poly_cross_entropy_gradient_matches_optax(self):
        logits, _, soft = random_batch()
        ours = jax.grad(lambda z: losses.poly_cross_entropy(z, soft, epsilon=2.0).sum())(logits)
        theirs = jax.grad(lambda z: optax.losses.poly_loss_cross_entropy(z, soft).sum())(logits)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)

    def test_poly_n_matches_the_formula(self):
        logits, labels, _ = random_batch()
        p = np.take_along_axis(softmax64(logits), labels[:, None], -1)[:, 0]
        expected = -np.log(p) + 0.7 * (1 - p) - 0.2 * (1 - p) ** 2 + 1.5 * (1 - p) ** 3
        ours = losses.poly_cross_entropy(logits, labels, epsilon=(0.7, -0.2, 1.5))
        np.testing.assert_allclose(ours, expected, rtol=1e-5)

    def test_label_smoothing_is_the_smoothed_distribution(self):
        logits, labels, _ = random_batch()
        smoothed = 0.9 * np.eye(5, dtype=np.float32)[labels] + 0.1 / 5
        np.testing.assert_allclose(
            losses.poly_cross_entropy(logits, labels, label_smoothing=0.1),
            losses.poly_cross_entropy(logits, smoothed),
            rtol=1e-6,
        )

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters((0.0, None), (2.0, 0.25), (0.5, 0.75))
    def test_focal_matches_optax_and_the_formula(self, gamma, alpha):
        logits = random_batch()[0]
        targets = np.random.default_rng(1).integers(2, size=logits.shape)
        ours = self.variant(
            lambda z, t, e: losses.poly1_focal_loss(z, t, epsilon=e, gamma=gamma, alpha=alpha)
        )
        focal = optax.losses.sigmoid_focal_loss(logits, targets, gamma=gamma, alpha=alpha)
        np.testing.assert_allclose(ours(logits, targets, 0.0), focal, rtol=1e-5, atol=1e-7)
        p = 1 / (1 + np.exp(-logits.astype(np.float64)))
        miss = np.where(targets == 1, 1 - p, p)
        weight = 1.0 if alpha is None else np.where(targets == 1, alpha, 1 - alpha)
        expected = weight * miss**gamma * (-np.log1p(-miss) + 1.5 * miss)
        np.testing.assert_allclose(ours(logits, targets, 1.5), expected, rtol=1e-5, atol=1e-7)

    @chex.variants(with_jit=True, without_jit=True)
    def test_margin_binary_cross_entropy_matches_the_release(self):
        logits = GRIDFORMER["margin_logits"]
        for i, j in np.ndindex(2, 2):
            margin, targets = 2.0 * i, np.full(7, j)
            ours = self.variant(
                lambda z, t: losses.margin_binary_cross_entropy(z, t, margin=margin)
            )
            values, vjp = jax.vjp(lambda z: ours(z, targets), logits)
            expected = GRIDFORMER["margin_losses"][i, j]
            np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-12)
            (gradient,) = vjp(np.ones(7, "f"))
            expected = GRIDFORMER["margin_gradients"][i, j]
            np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-12)

    @chex.variants(with_jit=True, without_jit=True)
    def test_squentropy_matches_the_formula(self):
        logits, labels, _ = random_batch()
        z = logits.astype(np.float64)
        wrong = np.arange(5) != labels[:, None]
        nll = -np.log(softmax64(z)[~wrong])
        expected = nll + 0.5 * (z**2 * wrong).sum(-1) / 4
        ours = self.variant(lambda z, y: losses.squentropy(z, y, square_weight=0.5))
        np.testing.assert_allclose(ours(logits, labels), expected, rtol=1e-5)

    def test_squentropy_soft_labels_are_the_expectation(self):
        logits, _, soft = random_batch()
        each = jnp.stack([losses.squentropy(logits, jnp.full(6, k)) for k in range(5)], axis=-1)
        np.testing.assert_allclose(
            losses.squentropy(logits, soft), (soft * each).sum(-1), rtol=1e-5
        )

    def test_rescaled_square_loss_matches_the_formula(self):
        logits, labels, _ = random_batch()
        z, hot = logits.astype(np.float64), np.eye(5)[labels]
        expected = np.mean(hot * 3 * (z - 4) ** 2 + (1 - hot) * z**2, axis=-1)
        ours = losses.rescaled_square_loss(logits, labels, true_class_weight=3, target_scale=4)
        np.testing.assert_allclose(ours, expected, rtol=1e-5)


class TestClaims:
    @pytest.mark.claim("polyloss")
    def test_poly1_reweighs_the_cross_entropy_gradient_by_one_plus_epsilon_p(self):
        logits, labels, _ = random_batch()
        softmax, hot = softmax64(logits), np.eye(5)[labels]
        p = (softmax * hot).sum(-1, keepdims=True)
        for epsilon in (-1.0, 0.0, 2.0):
            gradient = jax.grad(
                lambda z: losses.poly_cross_entropy(z, labels, epsilon=epsilon).sum()
            )(logits)
            np.testing.assert_allclose(gradient, (1 + epsilon * p) * (softmax - hot), atol=1e-6)

    def test_epsilon_minus_one_cancels_the_leading_term(self):
        miss = np.array([1e-1, 1e-2, 1e-3])
        logits = jnp.array(np.stack([np.log1p(-miss), np.log(miss)], -1), jnp.float32)
        loss = losses.poly_cross_entropy(logits, jnp.zeros(3, int), epsilon=-1.0)
        series = sum(miss**j / j for j in range(2, 60))
        np.testing.assert_allclose(loss, series, rtol=2e-2, atol=2e-7)

    def test_truncated_series_converges_to_cross_entropy_from_below(self):
        logits, labels, _ = random_batch()
        cross_entropy = losses.poly_cross_entropy(logits, labels, epsilon=0.0)
        gaps = [
            np.max(cross_entropy - losses.truncated_poly_loss(logits, labels, num_terms=n))
            for n in (1, 10, 100, 4000)
        ]
        assert gaps[0] > gaps[1] > gaps[2] > gaps[3]
        assert abs(gaps[3]) < 1e-4

    def test_positive_epsilon_raises_confidence(self):
        """One linear classifier, fitted at each epsilon to the same overlapping classes."""
        rng = np.random.default_rng(0)
        labels = rng.integers(3, size=300)
        features = jnp.array(rng.normal(size=(300, 4)) + 1.5 * np.eye(3, 4)[labels])

        @jax.jit
        def confidence(epsilon):
            loss = lambda w: losses.poly_cross_entropy(features @ w, labels, epsilon=epsilon).mean()
            w = jax.lax.fori_loop(0, 200, lambda _, w: w - jax.grad(loss)(w), jnp.zeros((4, 3)))
            return jnp.mean(jnp.max(jax.nn.softmax(features @ w), axis=-1))

        low, plain, high = (confidence(e) for e in (-0.9, 0.0, 2.0))
        assert low < plain - 0.02
        assert high > plain + 0.02

    @pytest.mark.claim("squentropy")
    def test_squentropy_calibrates_small_data_fits_and_steadies_them_over_seeds(self):
        """Overlapping Gaussians, 60 examples, linear fit: expected calibration error on held-out
        data is lower than cross-entropy's for the mean of five seeds, accuracy is not."""

        def sample(rng, n):
            labels = rng.integers(4, size=n)
            return rng.normal(size=(n, 20)) + 1.2 * np.eye(4, 20)[labels], labels

        @jax.jit
        def fit(features, labels, square_weight):
            loss = lambda w: losses.squentropy(
                features @ w, labels, square_weight=square_weight
            ).mean()
            step = lambda _, w: w - 0.2 * jax.grad(loss)(w)
            return jax.lax.fori_loop(0, 2000, step, jnp.zeros((20, 4)))

        def evaluate(square_weight, seed):
            rng = np.random.default_rng(seed)
            features, labels = sample(rng, 60)
            held_out, truth = sample(rng, 2000)
            probs = softmax64(held_out @ fit(features, labels, square_weight))
            confidence, correct = probs.max(-1), probs.argmax(-1) == truth
            bins = np.minimum((confidence * 10).astype(int), 9)
            ece = sum(
                abs(confidence[bins == b].sum() - correct[bins == b].sum()) for b in range(10)
            )
            return ece / len(truth), correct.mean()

        ours = np.array([evaluate(1.0, seed) for seed in range(5)])
        plain = np.array([evaluate(0.0, seed) for seed in range(5)])
        assert ours[:, 0].mean() < plain[:, 0].mean() - 0.05
        assert ours[:, 1].mean() > plain[:, 1].mean() - 0.01
        assert ours[:, 0].std() < plain[:, 0].std()

    def test_squentropy_gradient_and_lower_bound(self):
        logits, labels, _ = random_batch()
        hot = np.eye(5)[labels]
        gradient = jax.grad(lambda z: losses.squentropy(z, labels).sum())(logits)
        np.testing.assert_allclose(
            gradient, softmax64(logits) - hot + 2 * logits * (1 - hot) / 4, atol=1e-6
        )
        plain = losses.squentropy(logits, labels, square_weight=0.0)
        assert np.all(losses.squentropy(logits, labels) > plain)
        only_true = logits * hot.astype(np.float32)
        np.testing.assert_allclose(
            losses.squentropy(only_true, labels),
            losses.squentropy(only_true, labels, square_weight=0.0),
            rtol=1e-6,
        )

    def test_margin_shifts_the_logit_and_leaves_an_even_chance_at_zero(self):
        """The marked claim of GridFormer is in tests/attention/point_grid_test.py."""
        z = np.linspace(-3, 3, 61, dtype=np.float32)
        yes, no = (losses.margin_binary_cross_entropy(z, np.full(61, t)) for t in (1, 0))
        plain = optax.losses.sigmoid_binary_cross_entropy
        np.testing.assert_allclose(yes, plain(z - 2, 1.0), rtol=1e-5)
        np.testing.assert_allclose(no, plain(z + 2, 0.0), rtol=1e-5)
        assert np.argmin(yes + no) == 30  # where z is 0
        for margin in (0.0, 2.0):
            loss = lambda z: losses.margin_binary_cross_entropy(z, 1, margin=margin)
            np.testing.assert_allclose(jax.grad(loss)(0.0), -1 / (1 + np.exp(-margin)), rtol=1e-6)
        between = losses.margin_binary_cross_entropy(z, np.full(61, 0.3))
        np.testing.assert_allclose(between, plain(z + 0.8, 0.3), rtol=1e-5)

    def test_a_second_stage_with_margin_at_the_boundary_sharpens_an_occupancy_field(self):
        """A field of Gaussian bumps on a line, trained on all points, and then on those near the
        two ends of the interval that is occupied."""
        x = np.linspace(0, 1, 201, dtype=np.float32)
        occupied = abs(x - 0.45) < 0.15
        bumps = jnp.exp(-(((x[:, None] - np.linspace(0, 1, 21)) / 0.05) ** 2))
        kept = boundary_mask(x[:, None], occupied)
        assert 50 < kept.sum() < 80

        @jax.jit
        def train(weights, margin, where):
            def loss(weights):
                return losses.margin_binary_cross_entropy(
                    bumps @ weights, occupied, margin=margin, where=where
                ).sum()

            step = lambda _, weights: weights - jax.grad(loss)(weights) / where.sum()
            return jax.lax.fori_loop(0, 50, step, weights)

        def undecided(weights):
            p = jax.nn.sigmoid(bumps @ weights)
            return np.sum(abs(p - 0.5) < 0.3)

        first = train(jnp.zeros(21), 0.0, jnp.ones(201, bool))
        without, second = (train(first, margin, kept) for margin in (0.0, 2.0))
        assert undecided(second) < undecided(without) - 4 < undecided(first) - 8


@pytest.mark.parametrize("name", LOSSES)
class TestContract:
    """What every loss of the file owes its caller."""

    def test_axis_and_vmap(self, name):
        logits, labels, _ = random_batch((3, 4, 5))
        expected = LOSSES[name](logits, labels)
        assert expected.shape == (3, 4)
        moved = LOSSES[name](np.moveaxis(logits, -1, 1), labels, axis=1)
        np.testing.assert_allclose(moved, expected, rtol=1e-6)
        np.testing.assert_allclose(jax.vmap(LOSSES[name])(logits, labels), expected, rtol=1e-6)

    def test_gradient_against_finite_differences(self, name):
        logits, _, soft = random_batch((2, 4), scale=1.0)
        with jax.enable_x64(True):
            check_grads(
                lambda z: LOSSES[name](z, soft.astype(np.float64)),
                (logits.astype(np.float64),),
                order=1,
                modes=["rev", "fwd"],
            )

    def test_sharded_batch(self, name):
        logits, labels, _ = random_batch((16, 5))
        mesh = jax.make_mesh((8,), ("data",))
        rows = NamedSharding(mesh, PartitionSpec("data"))
        ours = jax.jit(LOSSES[name])(jax.device_put(logits, rows), jax.device_put(labels, rows))
        assert ours.sharding.is_equivalent_to(rows, 1)
        np.testing.assert_allclose(ours, LOSSES[name](logits, labels), rtol=1e-6)

    def test_masked_classes_count_for_nothing(self, name):
        logits, _, _ = random_batch((6, 5))
        labels = np.arange(6) % 3
        where = np.arange(5) < 3
        poisoned = np.where(where, logits, 1e30).astype(np.float32)
        ours, gradient = jax.vjp(lambda z: LOSSES[name](z, labels, where=where), poisoned)
        np.testing.assert_allclose(ours, LOSSES[name](logits[:, :3], labels), rtol=1e-5)
        assert np.all(gradient(jnp.ones(6))[0][:, 3:] == 0)

    def test_masked_examples_are_zero_with_zero_gradient(self, name):
        logits, labels, _ = random_batch((4, 5))
        labels[1] = -1
        where = np.array([[True], [False], [True], [False]])
        ours, vjp = jax.vjp(lambda z: LOSSES[name](z, labels, where=where), logits)
        expected = LOSSES[name](logits, np.abs(labels))
        np.testing.assert_allclose(ours, np.where(where[:, 0], expected, 0), rtol=1e-6)
        assert np.all(vjp(jnp.ones(4))[0][1::2] == 0)

    def test_out_of_range_labels_give_nan_in_their_row_only(self, name):
        logits, labels, _ = random_batch((4, 5))
        labels[1], labels[2] = -1, 5
        assert np.array_equal(np.isnan(LOSSES[name](logits, labels)), [False, True, True, False])

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_computes_in_float32(self, name, dtype):
        logits, labels, _ = random_batch()
        half = jnp.asarray(logits, dtype)
        ours = LOSSES[name](half, labels)
        assert ours.dtype == dtype
        expected = LOSSES[name](half.astype(jnp.float32), labels).astype(dtype)
        np.testing.assert_array_equal(ours, expected)

    @pytest.mark.parametrize("size", [1e4, -1e4, 0.0])
    def test_extreme_and_equal_logits_stay_finite(self, name, size):
        logits = np.array([[size, 0.0, -size], [size, size, size]], np.float32)
        for label in range(3):
            loss = lambda z: LOSSES[name](z, jnp.full(2, label)).sum()
            value, gradient = jax.value_and_grad(loss)(logits)
            assert np.isfinite(value)
            assert np.all(np.isfinite(gradient))

    def test_bad_input_is_named(self, name):
        logits, labels, _ = random_batch()
        with pytest.raises(ValueError, match="labels must have shape"):
            LOSSES[name](logits, labels[:3])
        with pytest.raises(ValueError, match="where must broadcast"):
            LOSSES[name](logits, labels, where=np.ones((6, 4), bool))
        with pytest.raises(ValueError, match="axis"):
            LOSSES[name](logits, labels, axis=2)
        with pytest.raises(TypeError, match="logits must have a floating-point type"):
            LOSSES[name](logits.astype(int), labels)
        with pytest.raises(TypeError, match="labels must be integer ids"):
            LOSSES[name](logits, labels.astype(bool))


def test_focal_edges():
    for size in (1e4, -1e4, 0.0):
        for gamma in (0.0, 0.5, 2.0):
            loss = lambda z: losses.poly1_focal_loss(z, jnp.array([0, 1]), gamma=gamma).sum()
            value, gradient = jax.value_and_grad(loss)(jnp.array([size, size]))
            assert np.isfinite(value)
            assert np.all(np.isfinite(gradient))
    masked = losses.poly1_focal_loss(jnp.ones(2), jnp.ones(2), where=jnp.array([True, False]))
    assert masked[0] > 0
    assert masked[1] == 0


def test_margin_edges():
    where = np.array([True, False, True, True])
    logits = jnp.array([1e4, jnp.nan, -1e4, 0.0])
    for targets in (np.ones(4, bool), np.zeros(4, int), np.full(4, 0.5)):
        loss = lambda z: losses.margin_binary_cross_entropy(z, targets, where=where)
        values, vjp = jax.vjp(loss, logits)
        (gradient,) = vjp(jnp.ones(4))
        assert np.all(np.isfinite(values))
        assert np.all(np.isfinite(gradient[where]))
        assert values[1] == 0
    half = logits[2:].astype(jnp.bfloat16)
    values = losses.margin_binary_cross_entropy(half, targets[2:])
    assert values.dtype == jnp.bfloat16
    expected = losses.margin_binary_cross_entropy(half.astype(jnp.float32), targets[2:])
    np.testing.assert_array_equal(values, expected.astype(jnp.bfloat16))
    with pytest.raises(TypeError, match="logits must have a floating-point type"):
        losses.margin_binary_cross_entropy(np.zeros(3, int), np.zeros(3))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda z, y: losses.poly_cross_entropy(z, y, epsilon=-1.1), "epsilon must be in"),
        (lambda z, y: losses.poly_cross_entropy(z, y, epsilon=(0.0, -0.6)), "epsilon must be in"),
        (lambda z, y: losses.poly_cross_entropy(z, y, label_smoothing=1.5), "label_smoothing"),
        (lambda z, y: losses.poly1_focal_loss(z, z, gamma=-1.0), "gamma must be in"),
        (lambda z, y: losses.poly1_focal_loss(z, z, alpha=2.0), "alpha must be in"),
        (lambda z, y: losses.poly1_focal_loss(z, z[:1, :2]), "targets must broadcast"),
        (lambda z, y: losses.margin_binary_cross_entropy(z, z, margin=-1.0), "margin must be in"),
        (lambda z, y: losses.margin_binary_cross_entropy(z, y), "targets must broadcast"),
        (lambda z, y: losses.truncated_poly_loss(z, y, num_terms=0), "num_terms"),
        (lambda z, y: losses.squentropy(z[:, :1], y * 0), "two classes"),
        (lambda z, y: losses.squentropy(z, y, square_weight=jnp.nan), "square_weight"),
        (lambda z, y: losses.rescaled_square_loss(z, y, target_scale=0.0), "target_scale"),
    ],
)
def test_hyperparameters_out_of_range_raise(loss, message):
    logits, labels, _ = random_batch()
    with pytest.raises(ValueError, match=message):
        loss(logits, labels)
