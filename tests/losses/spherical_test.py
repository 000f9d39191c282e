import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from jaxref import losses
from jaxref.losses import spherical

DENSE = {
    "z": losses.spherical_z_loss,
    "taylor": losses.log_taylor_softmax_loss,
    "spherical": losses.log_spherical_softmax_loss,
}
OF_STATISTICS = {
    "z": spherical.z_of_statistics,
    "taylor": spherical.taylor_of_statistics,
    "spherical": spherical.spherical_of_statistics,
}


def random_batch(shape=(4, 5), seed=0):
    rng = np.random.default_rng(seed)
    return (2 * rng.normal(size=shape)).astype("f"), rng.integers(shape[-1], size=shape[:-1])


def literal(name, o, labels, *, a=1.0, b=0.0, epsilon=1e-2):
    """The papers' formulas, one example at a time in float64."""
    values = []
    for row, c in zip(np.asarray(o, np.float64), labels):
        if name == "z":
            z = (row[c] - row.mean()) / row.std()
            values.append(np.log1p(np.exp(a * (b - z))) / a)
        elif name == "taylor":
            parabolas = 1 + row + row**2 / 2
            values.append(-np.log(parabolas[c] / parabolas.sum()))
        else:
            values.append(-np.log((row[c] ** 2 + epsilon) / (row**2 + epsilon).sum()))
    return np.array(values)


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_match_the_formulas_in_float64(self):
        logits, labels = random_batch()
        for name, options in (
            ("z", {}),
            ("z", {"a": 3.0, "b": 1.5}),
            ("taylor", {}),
            ("spherical", {}),
            ("spherical", {"epsilon": 0.5}),
        ):
            ours = self.variant(lambda o, c, n=name, k=options: DENSE[n](o, c, **k))
            expected = literal(name, logits, labels, **options)
            np.testing.assert_allclose(ours(logits, labels), expected, rtol=1e-5)


@pytest.mark.parametrize("name", DENSE)
def test_gradients_against_finite_differences(name):
    logits, labels = random_batch()
    with jax.enable_x64(True):
        check_grads(
            lambda o: DENSE[name](o, labels), (logits.astype(float),), order=1, modes=["rev", "fwd"]
        )


@pytest.mark.parametrize("name", DENSE)
def test_are_functions_of_three_statistics(name):
    """So are their values from the statistics, and all gradients but along o, 1 and the label are
    0: outputs that share s, q and o_c share the loss."""
    logits, labels = random_batch()
    target = np.take_along_axis(logits, labels[:, None], 1)[:, 0]
    of_statistics = OF_STATISTICS[name](
        *map(jnp.asarray, (target, logits.sum(1), np.square(logits).sum(1))), 5
    )
    values, vjp = jax.vjp(lambda o: DENSE[name](o, labels), logits)
    np.testing.assert_allclose(of_statistics, values, rtol=2e-5)
    (gradient,) = vjp(np.ones(4, "f"))
    for o, c, g in zip(logits, labels, gradient):
        span = np.stack([o, np.ones(5), np.eye(5)[c]], axis=1)
        residual = np.linalg.lstsq(span, g, rcond=None)[1]
        np.testing.assert_allclose(residual, 0, atol=1e-10)


def test_squared_error_is_spherical():
    logits, labels = random_batch()
    target = np.take_along_axis(logits, labels[:, None], 1)[:, 0]
    ours = spherical.squared_of_statistics(target, logits.sum(1), np.square(logits).sum(1), 5)
    expected = 2 * optax.losses.l2_loss(logits, np.eye(5)[labels]).sum(1)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


class TestZLoss:
    def test_gradient_has_no_part_along_the_outputs_and_one(self):
        logits, labels = random_batch()
        gradient = jax.grad(lambda o: losses.spherical_z_loss(o, labels).sum())(logits)
        np.testing.assert_allclose(gradient.sum(1), 0, atol=1e-6)
        np.testing.assert_allclose((gradient * logits).sum(1), 0, atol=1e-6)
        assert np.all(np.abs(gradient).max(1) > 1e-3)

    def test_distributions_are_expectations(self):
        logits, _ = random_batch()
        q = np.random.default_rng(1).dirichlet(np.ones(5), 4).astype("f")
        each = np.stack([losses.spherical_z_loss(logits, np.full(4, k)) for k in range(5)], axis=1)
        ours = losses.spherical_z_loss(logits, q)
        np.testing.assert_allclose(ours, (q * each).sum(1), rtol=1e-5)

    def test_equal_outputs_have_no_gradient_whatever_their_rounding(self):
        equal = np.array([[0.1] * 7, [1e4] * 7, [-3.3e-6] * 7, [0.0] * 7], "f")
        options = {"a": 2.0, "b": 0.7}
        value, gradient = jax.value_and_grad(
            lambda o: losses.spherical_z_loss(o, np.arange(4), **options).sum()
        )(equal)
        np.testing.assert_allclose(value, 4 * np.log1p(np.exp(1.4)) / 2, rtol=1e-6)
        np.testing.assert_array_equal(gradient, 0)
        sums = [7 * equal[:, 0], 7 * np.square(equal[:, 0])]
        ours = spherical.z_of_statistics(equal[:, 0], *map(jnp.asarray, sums), 7, **options)
        np.testing.assert_allclose(ours.sum(), value, rtol=1e-6)

    def test_sharp_loss_is_the_hinge_at_the_shift(self):
        logits, labels = random_batch()
        z = (logits - logits.mean(1, keepdims=True)) / logits.std(1, keepdims=True)
        hinge = np.maximum(0.5 - np.take_along_axis(z, labels[:, None], 1)[:, 0], 0)
        ours = losses.spherical_z_loss(logits, labels, a=1e4, b=0.5)
        np.testing.assert_allclose(ours, hinge, atol=1e-4)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (losses.spherical_z_loss, {"a": 0.0}, "a must be in"),
        (losses.spherical_z_loss, {"b": float("nan")}, "b must be in"),
        (losses.spherical_z_loss, {"epsilon": -1.0}, "epsilon must be in"),
        (losses.log_spherical_softmax_loss, {"epsilon": 0.0}, "epsilon must be in"),
    ],
)
def test_bad_hyperparameters(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(*random_batch(), **options)
