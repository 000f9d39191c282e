import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from scipy.optimize import brentq
from scipy.stats import norm, zscore

from jaxref import losses

z_error_mask = jax.jit(losses.z_error_mask)
z_error_loss = jax.jit(losses.z_error_loss)
classify = jax.jit(losses.z_error_classification_loss)


def outlier_batch(n=40, seed=0):
    """Predictions, and targets of which a few are far off."""
    rng = np.random.default_rng(seed)
    predictions = rng.normal(size=n).astype("f")
    targets = predictions + 0.3 * rng.normal(size=n).astype("f") + 0.5
    targets[:3] += (8, -9, 10)
    return predictions, targets


def labelled_batch(n=60, seed=0):
    """Logits and labels of two classes, a few of them wrong."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=n)
    logits = (2 * labels - 1) * 3 + rng.normal(size=n)
    labels[:4] = 1 - labels[:4]
    return logits.astype("f"), labels


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_mask_and_loss_match_scipy(self):
        predictions, targets = outlier_batch()
        expected = zscore(predictions.astype(float) - targets, ddof=1)
        included = abs(expected) <= 1.5
        assert 0 < (~included).sum() < 10
        for base, each in (
            (losses.squared_error, (predictions - targets) ** 2),
            (optax.losses.huber_loss, optax.losses.huber_loss(predictions, targets)),
        ):
            run = self.variant(
                jax.value_and_grad(
                    lambda y: losses.z_error_loss(y, targets, threshold=1.5, base_loss=base),
                    has_aux=True,
                )
            )
            (value, mask), gradient = run(predictions)
            np.testing.assert_allclose(mask.z, expected, rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(mask.included, included)
            np.testing.assert_allclose(value, each[included].mean(), rtol=1e-5)
            assert np.all(gradient[~included] == 0)
            plain = jax.grad(lambda y: base(y[included], targets[included]).mean())(predictions)
            np.testing.assert_allclose(gradient, plain, rtol=1e-5, atol=1e-7)

    def test_classification_matches_a_loop_over_classes(self):
        logits, labels = labelled_batch()
        several = np.stack([0.1 * logits, logits, -logits], -1)
        ids = np.where(np.arange(60) % 3 == 0, 2, labels)
        binary = optax.losses.sigmoid_binary_cross_entropy(logits, labels)
        softmax = optax.losses.softmax_cross_entropy_with_integer_labels(several, ids)
        for space in ("logit", "probability"):
            in_space = space == "probability"
            p = np.asarray(jax.nn.softmax(several) if in_space else several)
            own = np.take_along_axis(p, ids[:, None], -1)[:, 0]
            u = np.asarray(jax.nn.sigmoid(logits) if in_space else logits)
            for scores, y, outputs, each in (
                (logits, labels, u, binary),
                (several, ids, own, softmax),
            ):
                z = np.zeros(60)
                for c in np.unique(y):
                    z[y == c] = zscore(outputs[y == c].astype(float), ddof=1)
                included = abs(z) <= 1.7
                loss = lambda f, y: losses.z_error_classification_loss(
                    f, y, threshold=1.7, space=space
                )
                (value, mask), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(scores, y)
                np.testing.assert_allclose(mask.z, z, rtol=2e-4, atol=1e-4)
                np.testing.assert_array_equal(mask.included, included)
                np.testing.assert_allclose(value, each[included].mean(), rtol=1e-5)
                assert np.all(gradient[~included] == 0)
                assert np.all(np.abs(gradient[included]).sum(-1) > 0)

    def test_decision_threshold_is_where_scipy_finds_the_densities_equal(self):
        rng = np.random.default_rng(0)
        decide = jax.jit(losses.gaussian_decision_threshold, static_argnames="use_priors")
        for low, high in ((0.5, 2.0), (2.0, 0.5), (1.0, 1.0)):
            labels = (rng.random(200) < 0.3).astype(int)
            outputs = np.where(labels, 2 + high * rng.normal(size=200), low * rng.normal(size=200))
            outputs -= 5
            m = [outputs[labels == c].mean() for c in (0, 1)]
            s = [outputs[labels == c].std(ddof=1) for c in (0, 1)]
            for use_priors in (False, True):
                w = (1 - labels.mean(), labels.mean()) if use_priors else (1, 1)
                gap = lambda x: np.diff(np.log(w) + norm.logpdf(x, m, s))[0]
                ours = decide(outputs.astype("f"), labels, use_priors=use_priors)
                np.testing.assert_allclose(ours, brentq(gap, *m), atol=1e-4)
                turned = decide(-outputs.astype("f"), labels, use_priors=use_priors)
                np.testing.assert_allclose(turned, -ours, atol=1e-4)


class TestClaims:
    @pytest.mark.claim("z-error-loss")
    def test_one_outlier_can_be_left_out_of_six_but_not_of_five(self):
        """No |z| exceeds (n - 1) / √n, which a single outlier reaches however large it is; and no
        shift or scale of the errors changes who is left out."""
        for n in (2, 5, 6, 30):
            for size in (1.0, 1e6):
                mask = z_error_mask((size * (np.arange(n) == 0)).astype("f"))
                np.testing.assert_allclose(mask.z[0], (n - 1) / n**0.5, rtol=1e-4)
                assert mask.included[0] == (n <= 5)
                assert np.all(mask.included[1:])
        rng = np.random.default_rng(0)
        errors = rng.standard_t(2, size=(50, 20)).astype("f")
        masks = [jax.vmap(z_error_mask)(x) for x in (errors, 50 * errors, errors + 3, -errors)]
        assert np.all(abs(masks[0].z) <= 19 / 20**0.5)
        assert (~masks[0].included).sum() > 20
        for mask in masks[1:]:
            np.testing.assert_array_equal(mask.included, masks[0].included)

    def test_regression_with_gross_errors_ends_nearer_to_the_truth(self):
        rng = np.random.default_rng(0)
        x = rng.normal(size=(640, 4)).astype("f")
        truth = np.array([1.0, -2.0, 0.5, 3.0], np.float32)
        y = x @ truth + 0.1 * rng.normal(size=640).astype("f")
        y += np.where(rng.random(640) < 0.05, 30, 0).astype("f")
        schedule = optax.linear_schedule(4.0, 2.0, 100)

        @jax.jit
        def train(threshold_of_step):
            def step(w, i):
                batch = jax.lax.dynamic_slice_in_dim(jnp.arange(640), i % 10 * 64, 64)
                loss = lambda w: losses.z_error_loss(
                    jnp.asarray(x)[batch] @ w, jnp.asarray(y)[batch], threshold=threshold_of_step[i]
                )[0]
                return w - 0.1 * jax.grad(loss)(w), None

            return jax.lax.scan(step, jnp.zeros(4), jnp.arange(200))[0]

        ours = train(jax.vmap(schedule)(jnp.arange(200)))
        plain = train(jnp.full(200, jnp.inf))
        error = lambda w: np.linalg.norm(w - truth)
        assert error(ours) < error(plain) / 5


class TestSets:
    def test_shards_are_one_batch(self):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        where = np.random.default_rng(1).random(40) < 0.8
        predictions, targets = outlier_batch()
        logits, labels = labelled_batch(40)
        labels[~where] = -1

        def both(y_hat, f, y, ids, where, axis_name=None):
            options = {"where": where, "axis_name": axis_name, "threshold": 1.5}
            regression, mask = losses.z_error_loss(y_hat, y, **options)
            classification, by_class = losses.z_error_classification_loss(f, ids, **options)
            decision = losses.gaussian_decision_threshold(f, ids, where=where, axis_name=axis_name)
            return regression + classification, (mask, by_class), decision

        sharded = jax.shard_map(
            lambda *arguments: both(*arguments, "data"),
            mesh=mesh,
            in_specs=(P("data"),) * 5,
            out_specs=(P(), P("data"), P()),
        )

        def evaluate(f):
            def total(y_hat, logits):
                value, masks, decision = f(y_hat, logits, targets, labels, where)
                return value, (masks, decision)

            return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(predictions, logits)

        chex.assert_trees_all_close(evaluate(both), evaluate(sharded), rtol=1e-4, atol=1e-6)

    def test_missing_entries_count_for_nothing(self):
        where = np.arange(40) < 25
        predictions, targets = outlier_batch()
        poisoned = np.where(where, predictions, np.nan)
        value, mask = z_error_loss(poisoned, targets, where=where)
        expected, whole = z_error_loss(predictions[:25], targets[:25])
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_array_equal(mask.included, [*whole.included, *[False] * 15])
        assert np.all(mask.z[25:] == 0)
        gradient = jax.grad(lambda y: z_error_loss(y, targets, where=where)[0])(poisoned)
        assert np.all(gradient[25:] == 0)
        assert np.all(np.isfinite(gradient))
        logits, labels = labelled_batch(40)
        labels[25:] = 7
        value, mask = classify(np.where(where, logits, np.nan), labels, where=where)
        expected, whole = classify(logits[:25], labels[:25])
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_array_equal(mask.included, [*whole.included, *[False] * 15])


class TestContract:
    def test_an_endless_threshold_is_the_mean_of_the_base_loss(self):
        predictions, targets = outlier_batch()
        value, mask = losses.z_error_loss(predictions, targets, threshold=np.inf)
        np.testing.assert_allclose(value, ((predictions - targets) ** 2).mean(), rtol=1e-5)
        assert mask.included.all()
        logits, labels = labelled_batch()
        value, _ = losses.z_error_classification_loss(logits, labels == 1, threshold=np.inf)
        expected = optax.losses.sigmoid_binary_cross_entropy(logits, labels).mean()
        np.testing.assert_allclose(value, expected, rtol=1e-5)

    @pytest.mark.optimized  # else XLA's older emitters lose a comparison here
    def test_extremes_small_batches_and_types(self):
        run = jax.jit(
            jax.value_and_grad(losses.z_error_loss, has_aux=True), static_argnames="threshold"
        )
        for n in (0, 1, 3):
            for size in (0.0, 0.1, 1e4):
                ones = np.full(n, size, np.float32)
                (value, mask), gradient = run(ones, np.zeros(n, np.float32))
                np.testing.assert_allclose(value, size**2 if n else 0, rtol=1e-5)
                assert mask.included.all()
                assert np.all(np.isfinite(gradient))
        slope = jax.grad(lambda e: jnp.sum(losses.z_error_mask(e).z ** 2))(jnp.arange(3.0))
        np.testing.assert_array_equal(slope, 0)
        half = run(jnp.ones(3, jnp.bfloat16), np.zeros(3))
        assert half[0][0].dtype == jnp.float32
        assert half[1].dtype == jnp.bfloat16
        for logits, labels in (
            (np.array([1e4, -1e4, 0.0], np.float32), np.array([0, 1, 1])),
            (np.full(3, 1e4, np.float32), np.zeros(3, int)),
            (np.zeros((3, 1), np.float32), np.zeros(3, int)),
        ):
            value, mask = classify(logits, labels)
            assert np.isfinite(value)
            assert mask.included.all()
        assert np.isnan(classify(np.ones(3, "f"), np.array([0, 1, 2]))[0])
        nothing = losses.z_error_classification_loss(
            np.ones(3, "f"), np.ones(3, int), where=np.zeros(3, bool)
        )
        assert nothing[0] == 0

    def test_decision_threshold_without_spread_or_crossing(self):
        decide = jax.jit(losses.gaussian_decision_threshold)
        labels = np.array([0, 0, 1, 1])
        for outputs, expected in (
            ([0.0, 0.0, 1.0, 1.0], 0.5),
            ([0.0, 0.0, 0.0, 0.0], 0.0),
            ([-1.0, 1.0, 5.0, 5.0], 5.0),
        ):
            ours = decide(np.array(outputs, np.float32), labels)
            np.testing.assert_allclose(ours, expected, atol=1e-3)
        # the wide class is likelier at both means: as many deviations to either
        outputs = np.array([-10.0, 10.0, 0.05, 0.15], np.float32)
        s = [np.std(outputs[i : i + 2], ddof=1) for i in (0, 2)]
        wide = losses.gaussian_decision_threshold(outputs, labels)
        np.testing.assert_allclose(wide, 0.1 * s[0] / (s[0] + s[1]), rtol=1e-4)
        assert np.isnan(decide(outputs, np.zeros(4, int)))

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda x: losses.z_error_mask(x, threshold=0.0), ValueError, "threshold must be in"),
            (lambda x: losses.z_error_mask(x, epsilon=-1.0), ValueError, "epsilon must be in"),
            (lambda x: losses.z_error_loss(x, x[:2]), ValueError, "targets must have shape"),
            (lambda x: losses.z_error_loss(x.astype(int), x), TypeError, "predictions must have"),
            (
                lambda x: losses.z_error_classification_loss(x, x > 0, space="odds"),
                ValueError,
                "space must be 'logit' or 'probability'",
            ),
            (
                lambda x: losses.z_error_classification_loss(x, x),
                TypeError,
                "labels must be integer ids",
            ),
            (
                lambda x: losses.z_error_classification_loss(x, x[:2] > 0),
                ValueError,
                "logits must have shape",
            ),
            (
                lambda x: losses.gaussian_decision_threshold(x, x[:2]),
                ValueError,
                "labels must have shape",
            ),
            (
                lambda x: losses.z_error_mask(x, where=np.ones(4, bool)),
                ValueError,
                "where must broadcast",
            ),
        ],
    )
    def test_bad_input_is_named(self, call, error, message):
        with pytest.raises(error, match=message):
            call(np.ones(3, np.float32))
