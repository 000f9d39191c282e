"""What every loss of the room owes its caller, whatever its formula.

Losses are found by the names of their first two arguments, so that a new one is tested without
being listed here: (logits, labels) over a class axis, (logits, targets) or (scores, labels) one
decision each. Losses of the set are those that say so in their first line.
"""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxref import losses

ARGUMENTS = {"truncated_poly_loss": {"num_terms": 3}}
"""What a loss cannot be called without."""
NO_LOSSES = ("fit_temperature", "logit_margin", "in_batch_negative_similarities")
"""What takes the arguments of losses, too."""
SHIFTED = (
    "squentropy",
    "rescaled_square_loss",
    "one_versus_rest_loss",
    "log_taylor_softmax_loss",
    "log_spherical_softmax_loss",
)
"""Losses that a constant added to all logits changes."""
OF_IDS = ("dual_focal_loss",)
"""Losses that distributions as labels have no meaning for."""
SIGNED = ("label_distributionally_robust_loss",)
"""Losses that can be negative."""
NEVER_ZERO = ("spherical_z_loss",)
"""Losses whose minimum is above 0."""


NOT_ALONE = ("berhu_loss", "signal_decay_loss")
"""Losses of a prediction that depend on the others, or on its place among them."""
OF_NO_ERROR = {"poisson_loss": 1.0}
"""Losses of a prediction of 1 that is right, where that is not 0."""


def found(*named):
    """The losses of these pairs of first arguments that need no more than `ARGUMENTS` has."""
    chosen = {}
    for name in losses.__all__:
        function = getattr(losses, name)
        asked = inspect.signature(function).parameters if callable(function) else {}
        pair = tuple(asked)[:2]
        needed = {n for n, parameter in asked.items() if parameter.default is parameter.empty}
        line = (function.__doc__ or "").partition("\n")[0]
        single = "of the set" not in line and "image" not in line
        fits = single and ("axis" in asked or pair != ("logits", "labels"))
        if (
            name not in NO_LOSSES
            and pair in named
            and needed <= {*pair, *ARGUMENTS.get(name, {})}
            and fits
        ):
            chosen[name] = partial(function, **ARGUMENTS.get(name, {}))
    return chosen


def elementwise(name):
    """Whether a loss of predictions and targets has a value for each of them."""
    try:
        return getattr(losses, name)(np.ones((3, 4), "f"), np.ones((3, 4), "f")).shape == (3, 4)
    except (TypeError, ValueError):
        return False


def of_embeddings():
    """Losses of a batch of embeddings with integer labels, or of two views, as functions of one
    array of embeddings."""
    labels = np.arange(8) % 4
    chosen = {}
    for name in losses.__all__:
        function = getattr(losses, name)
        asked = inspect.signature(function).parameters if inspect.isfunction(function) else {}
        needed = [n for n, parameter in asked.items() if parameter.default is parameter.empty]
        if needed == ["embeddings", "labels"] and name not in NO_LOSSES:
            chosen[name] = partial(lambda f, x: f(x, labels), function)
        elif needed == ["view_a", "view_b"]:
            chosen[name] = partial(lambda f, x: f(x, x[::-1]), function)
        elif needed == ["image", "text", "log_temperature"]:
            chosen[name] = partial(lambda f, x: f(x, x[::-1], 1.0), function)
        elif needed == ["image", "text", "log_temperature", "bias"]:
            chosen[name] = partial(lambda f, x: f(x, x[::-1], 1.0, -1.0), function)
    return chosen


CLASSIFICATION = found(("logits", "labels"))
BINARY = found(("logits", "targets"), ("scores", "labels"))
REGRESSION = {n: f for n, f in found(("predictions", "targets")).items() if elementwise(n)}
EMBEDDINGS = of_embeddings()


def random_batch(shape=(6, 5), seed=0):
    rng = np.random.default_rng(seed)
    logits = (2 * rng.normal(size=shape)).astype("f")
    return logits, rng.integers(shape[-1], size=shape[:-1])


def value_and_gradient(loss, logits, labels, **keywords):
    values, vjp = jax.vjp(lambda z: loss(z, labels, **keywords), jnp.asarray(logits))
    return values, vjp(jnp.ones_like(values))[0]


@pytest.mark.parametrize("name", CLASSIFICATION)
class TestClassification:
    def test_axis_vmap_and_jit(self, name):
        loss = CLASSIFICATION[name]
        logits, labels = random_batch((2, 3, 5))
        expected = loss(logits, labels)
        assert expected.shape == (2, 3)
        moved = loss(np.moveaxis(logits, -1, 0), labels, axis=0)
        np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-6)
        if "normal" not in name:
            mapped = jax.jit(jax.vmap(loss))(logits, labels)
            np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-6)

    def test_ids_are_distributions_of_one_class(self, name):
        loss = CLASSIFICATION[name]
        if name in OF_IDS:
            with pytest.raises(TypeError, match="labels must be integer ids"):
                loss(random_batch()[0], np.full((6, 5), 0.2, "f"))
            return
        logits, labels = random_batch()
        by_id = value_and_gradient(loss, logits, labels)
        by_distribution = value_and_gradient(loss, logits, np.eye(5, dtype="f")[labels])
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), by_id, by_distribution
        )

    def test_excluded_classes_count_for_nothing(self, name):
        loss = CLASSIFICATION[name]
        logits, labels = random_batch()
        labels = labels % 3
        where = np.arange(5) < 3
        few, few_gradient = value_and_gradient(loss, logits[:, :3], labels)
        for poison in (1e4, -1e4):
            poisoned = np.where(where, logits, poison).astype("f")
            values, gradient = value_and_gradient(loss, poisoned, labels, where=where)
            np.testing.assert_allclose(values, few, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(gradient[:, :3], few_gradient, rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(gradient[:, 3:], 0)
        nothing = value_and_gradient(loss, logits, labels, where=np.zeros(5, bool))
        np.testing.assert_array_equal(nothing[0], 0)
        np.testing.assert_array_equal(nothing[1], 0)

    def test_ids_outside_the_range_are_nan_in_their_row(self, name):
        logits, labels = random_batch()
        labels[1], labels[3] = 5, -1
        values = CLASSIFICATION[name](logits, labels)
        np.testing.assert_array_equal(np.isnan(values), np.isin(np.arange(6), (1, 3)))

    def test_half_precision_computes_in_float32(self, name):
        loss = CLASSIFICATION[name]
        logits, labels = random_batch()
        for dtype in (jnp.bfloat16, jnp.float16):
            half = jnp.asarray(logits, dtype)
            ours = loss(half, labels)
            assert ours.dtype == dtype
            expected = loss(half.astype(jnp.float32), labels).astype(dtype)
            np.testing.assert_array_equal(ours, expected)

    def test_extreme_logits_one_class_and_no_example(self, name):
        loss = CLASSIFICATION[name]
        far = 1e4 * np.array([[1, -1, 0], [-1, 1, 0], [1, 1, 1], [0, 0, 0]], "f")
        for label in (0, 1):
            values, gradient = value_and_gradient(loss, far, np.full(4, label))
            assert np.all(np.isfinite(values)), values
            assert np.all(np.isfinite(gradient)), gradient
        assert loss(far[:0], np.zeros(0, int)).shape == (0,)
        if name != "squentropy":  # which needs a wrong class
            values, gradient = value_and_gradient(loss, far[:, :1], np.zeros(4, int))
            assert np.all(np.isfinite(values))
            assert np.all(np.isfinite(gradient))

    def test_sign_minimum_and_shift(self, name):
        loss = CLASSIFICATION[name]
        logits, labels = random_batch()
        values = loss(logits, labels)
        right = 1e3 * np.eye(5, dtype="f")[labels]
        if name == "rescaled_square_loss":
            right /= 1e3  # its target
        if name == "one_versus_rest_loss":
            right -= 500  # a decision for each class
        least = loss(right, labels)
        assert np.all(least <= values + 1e-6)
        if name not in SIGNED:
            assert np.all(values >= 0)
            if name not in NEVER_ZERO:
                np.testing.assert_allclose(least, 0, atol=1e-5)
        shifted = np.allclose(loss(logits + 3, labels), values, rtol=1e-4, atol=1e-5)
        assert shifted == (name not in SHIFTED)

    def test_sharded_batch(self, name):
        logits, labels = random_batch((16, 5))
        sharding = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
        ours = jax.jit(CLASSIFICATION[name])(*jax.device_put((logits, labels), sharding))
        np.testing.assert_allclose(ours, CLASSIFICATION[name](logits, labels), rtol=1e-5, atol=1e-6)

    def test_bad_input_is_named(self, name):
        loss = CLASSIFICATION[name]
        logits, labels = random_batch()
        with pytest.raises(TypeError, match="logits must have a floating-point type"):
            loss(logits.astype(int), labels)
        with pytest.raises(ValueError, match="labels must"):
            loss(logits, labels[:-1])
        with pytest.raises(ValueError, match="where must broadcast"):
            loss(logits, labels, where=np.ones((6, 4), bool))


@pytest.mark.parametrize("name", BINARY)
class TestBinary:
    def test_masks_types_and_transformations(self, name):
        loss = BINARY[name]
        logits, _ = random_batch()
        targets = np.random.default_rng(1).integers(2, size=logits.shape)
        expected, gradient = value_and_gradient(loss, logits, targets)
        assert expected.shape == logits.shape
        assert np.all(np.isfinite(gradient))
        np.testing.assert_allclose(jax.jit(jax.vmap(loss))(logits, targets), expected, rtol=1e-5)
        where = np.arange(5) < 3
        poisoned = np.where(where, logits, 1e4).astype("f")
        values, masked = value_and_gradient(loss, poisoned, targets, where=where)
        np.testing.assert_allclose(values, np.where(where, expected, 0), rtol=1e-5)
        np.testing.assert_allclose(masked, np.where(where, gradient, 0), rtol=1e-5)
        for dtype in (jnp.bfloat16, jnp.float16):
            half = jnp.asarray(logits, dtype)
            assert loss(half, targets).dtype == dtype
            full = loss(half.astype(jnp.float32), targets).astype(dtype)
            np.testing.assert_array_equal(loss(half, targets), full)

    def test_extremes_and_bad_input(self, name):
        loss = BINARY[name]
        for target in (0, 1):
            far = np.array([-1e4, 0, 1e4], "f")
            values, gradient = value_and_gradient(loss, far, np.full(3, target))
            assert np.all(np.isfinite(values))
            assert np.all(np.isfinite(gradient))
        first, second = list(inspect.signature(loss).parameters)[:2]
        with pytest.raises(TypeError, match=f"{first} must have a floating-point type"):
            loss(np.arange(3), np.ones(3))
        with pytest.raises(ValueError, match=f"{second} must"):
            loss(far, np.ones((2, 3)))
        with pytest.raises(ValueError, match="where must broadcast"):
            loss(far, np.ones(3), where=np.ones(4, bool))


@pytest.mark.parametrize("name", REGRESSION)
class TestRegression:
    def test_masks_types_and_transformations(self, name):
        loss = REGRESSION[name]
        rng = np.random.default_rng(0)
        predictions, targets = rng.uniform(0.5, 3, size=(2, 4, 5)).astype("f")
        expected, gradient = value_and_gradient(loss, predictions, targets)
        if name not in NOT_ALONE:
            mapped = jax.jit(jax.vmap(loss))(predictions, targets)
            np.testing.assert_allclose(mapped, expected, rtol=1e-5)
        where = np.arange(5) < 3
        poisoned = np.where(where, predictions, np.nan).astype("f")
        lost = np.where(where, targets, np.nan).astype("f")
        values, masked = value_and_gradient(loss, poisoned, lost, where=where)
        np.testing.assert_allclose(values, np.where(where, expected, 0), rtol=1e-5)
        np.testing.assert_allclose(masked, np.where(where, gradient, 0), rtol=1e-5)
        for dtype in (jnp.bfloat16, jnp.float16):
            half = jnp.asarray(predictions, dtype)
            assert loss(half, targets).dtype == dtype
            full = loss(half.astype(jnp.float32), targets).astype(dtype)
            np.testing.assert_array_equal(loss(half, targets), full)

    def test_no_error_far_errors_and_bad_input(self, name):
        loss = REGRESSION[name]
        ones = np.ones((2, 3), "f")
        for predictions in (ones, 1e6 * ones):
            values, gradient = value_and_gradient(loss, predictions, ones)
            assert np.all(np.isfinite(values))
            assert np.all(np.isfinite(gradient))
        least = loss(ones, ones)
        np.testing.assert_allclose(least, OF_NO_ERROR.get(name, 0), atol=1e-6)
        if name not in ("bias_error",):
            assert np.all(loss(1.5 * ones, ones) > least)
        assert loss(ones[:0], ones[:0]).shape == (0, 3)
        with pytest.raises(TypeError, match="predictions must have a floating-point type"):
            loss(ones.astype(int), ones)
        with pytest.raises(ValueError, match="targets must"):
            loss(ones, np.ones((3, 3), "f"))
        with pytest.raises(ValueError, match="where must broadcast"):
            loss(ones, ones, where=np.ones(4, bool))


@pytest.mark.parametrize("name", EMBEDDINGS)
class TestEmbeddings:
    def test_types_zero_vectors_and_one_place(self, name):
        loss = jax.jit(EMBEDDINGS[name])
        x = np.random.default_rng(0).normal(size=(8, 5)).astype("f")
        for dtype in (jnp.bfloat16, jnp.float16):
            half = jnp.asarray(x, dtype)
            ours = loss(half)
            assert ours.dtype == dtype
            full = loss(half.astype(jnp.float32)).astype(dtype)
            np.testing.assert_array_equal(ours, full)
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(EMBEDDINGS[name](x))))
        some = np.where(np.arange(8)[:, None] < 3, 0, x).astype("f")
        for place in (some, np.zeros_like(x), np.ones_like(x), 1e12 * x):
            assert np.all(np.isfinite(loss(place)))
            assert np.all(np.isfinite(gradient(place)))
