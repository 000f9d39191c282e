from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

from jaxref.adaptation import class_correlation_loss, core_adapt_step
from jaxref.norms import alpha_batch_norm, batch_norm, batch_norm_init
from jaxref.optimizers import norm_parameters_only, train_only


def random_logits(shape=(6, 4), seed=0):
    return (3 * np.random.default_rng(seed).normal(size=shape)).astype("f")


def literal_loss(logits, normalize):
    """The matrix, its rows over their sums, and what is off the diagonal, in float64."""
    logits = logits.astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    correlation = np.zeros((p.shape[1], p.shape[1]))
    for row in p:
        correlation += np.outer(row, row)
    count = len(p)
    if normalize:
        correlation /= correlation.sum(1, keepdims=True) + 1e-8
        count = p.shape[1]
    return (correlation.sum() - np.trace(correlation)) / count


class NumbersTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_matches_the_matrix_and_so_does_the_gradient(self):
        logits = random_logits()
        for normalize in (True, False):
            loss = partial(class_correlation_loss, normalize=normalize)
            value, gradient = self.variant(jax.value_and_grad(loss))(logits)
            np.testing.assert_allclose(value, literal_loss(logits, normalize), rtol=1e-5)
            for i in np.ndindex(logits.shape):
                step = np.zeros(logits.shape)
                step[i] = 1e-5
                slope = literal_loss(logits + step, normalize)
                slope -= literal_loss(logits - step, normalize)
                np.testing.assert_allclose(gradient[i], slope / 2e-5, rtol=1e-3, atol=1e-6)

    def test_pixels_are_examples(self):
        logits = random_logits((2, 3, 5, 4))
        flat = class_correlation_loss(logits.reshape(-1, 4))
        np.testing.assert_allclose(class_correlation_loss(logits), flat, rtol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
class TestLoss:
    def test_is_zero_for_certain_predictions_alone(self, normalize):
        loss = partial(class_correlation_loss, normalize=normalize)
        for ids in ([0, 1, 2, 1], [2, 2, 2, 2]):
            assert abs(loss(1e4 * np.eye(3, dtype="f")[ids])) < 1e-6
        assert loss(np.zeros((4, 3), "f")) == pytest.approx(2 / 3)
        assert loss(np.float32([[1e4, 0, 0], [1, 1, 0]])) > 0.1

    def test_order_of_the_examples_and_names_of_the_classes_do_not_matter(self, normalize):
        logits = random_logits()
        loss = partial(class_correlation_loss, normalize=normalize)
        for other in (logits[::-1], logits[:, ::-1], logits + 5):
            np.testing.assert_allclose(loss(other), loss(logits), rtol=1e-5)

    def test_one_class_extremes_and_types(self, normalize):
        loss = partial(class_correlation_loss, normalize=normalize)
        assert loss(np.ones((3, 1), "f")) == 0
        for logits in (1e4 * random_logits(), np.zeros((2, 3), "f"), np.full((1, 3), -1e4, "f")):
            chex.assert_tree_all_finite(jax.value_and_grad(loss)(logits))
        half = jnp.asarray(random_logits(), jnp.bfloat16)
        assert loss(half).dtype == jnp.float32
        np.testing.assert_array_equal(loss(half), loss(half.astype(jnp.float32)))

    def test_spread_over_devices_it_is_that_of_the_whole(self, normalize):
        logits = random_logits((16, 4))
        mesh = jax.make_mesh((8,), ("data",))
        placed = jax.device_put(logits, NamedSharding(mesh, P("data")))
        loss = partial(class_correlation_loss, normalize=normalize)
        sharded = jax.shard_map(
            partial(loss, axis_name="data"), mesh=mesh, in_specs=P("data"), out_specs=P()
        )
        expected = jax.value_and_grad(loss)(logits)
        ours = jax.jit(jax.value_and_grad(sharded))(placed)
        chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_per_example_form_is_the_mean_gini_impurity():
    p = jax.nn.softmax(random_logits())
    impurity = np.mean(1 - np.sum(np.square(p), axis=1))
    ours = class_correlation_loss(random_logits(), normalize=False)
    np.testing.assert_allclose(ours, impurity, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3,), (0, 3), (3, 0)])
def test_logits_without_examples_or_classes_raise(shape):
    with pytest.raises(ValueError, match=r"logits must have shape \[..., examples, classes\]"):
        class_correlation_loss(np.zeros(shape, "f"))


def test_integer_logits_raise():
    with pytest.raises(TypeError, match="logits must have a floating-point type"):
        class_correlation_loss(np.zeros((2, 3), int))


SOURCE = np.zeros(5, "f"), np.ones(5, "f")


def small_model(seed=0):
    """Parameters and logits of a network with one alpha-BN."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype("f")
    params = {
        "hidden": {"kernel": normal(3, 5), "bias": normal(5)},
        "norm": {"scale": 1 + 0.1 * normal(5), "bias": normal(5)},
        "head": {"kernel": normal(5, 4)},
    }

    def apply_fn(params, x):
        x = x @ params["hidden"]["kernel"] + params["hidden"]["bias"]
        x = alpha_batch_norm(x, *SOURCE, **params["norm"], alpha=0.5)
        return jax.nn.relu(x) @ params["head"]["kernel"]

    return params, apply_fn


class TestStep:
    def test_is_one_step_on_the_norms_with_predictions_from_before_it(self):
        (params, apply_fn), x = small_model(), random_logits((6, 3))
        optimizer = optax.sgd(0.5)
        state = train_only(optimizer, norm_parameters_only).init(params)
        step = jax.jit(partial(core_adapt_step, apply_fn=apply_fn, optimizer=optimizer))
        after, _, predictions = step(params, state, x)
        np.testing.assert_allclose(predictions, jax.nn.softmax(apply_fn(params, x)), rtol=1e-5)
        gradients = jax.grad(lambda p: class_correlation_loss(apply_fn(p, x)))(params)
        for name in ("scale", "bias"):
            expected = params["norm"][name] - 0.5 * gradients["norm"][name]
            np.testing.assert_allclose(after["norm"][name], expected, rtol=1e-5, atol=1e-6)
            assert np.all(after["norm"][name] != params["norm"][name])
        for frozen in ("hidden", "head"):
            chex.assert_trees_all_equal(after[frozen], params[frozen])

    def test_state_is_carried_and_other_parameters_can_be_trained(self):
        (params, apply_fn), x = small_model(), random_logits((6, 3))
        optimizer = optax.adamw(0.1, weight_decay=0.1)
        mask = {"hidden": False, "norm": False, "head": True}
        state = train_only(optimizer, mask).init(params)
        for _ in range(2):
            after, state, _ = core_adapt_step(params, state, x, apply_fn, optimizer, mask)
        assert optax.tree.get(state, "count") == 2
        chex.assert_trees_all_equal(after["norm"], params["norm"])
        assert np.all(after["head"]["kernel"] != params["head"]["kernel"])

    def test_a_batch_over_eight_devices_is_one_batch(self):
        (params, apply_fn), x = small_model(), random_logits((16, 3))
        optimizer = optax.sgd(0.5)
        state = train_only(optimizer, norm_parameters_only).init(params)
        step = jax.jit(partial(core_adapt_step, apply_fn=apply_fn, optimizer=optimizer))
        mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
        placed = jax.device_put(x, NamedSharding(mesh, P("data")))
        ours, expected = step(params, state, placed), step(params, state, x)
        chex.assert_trees_all_close(ours[::2], expected[::2], rtol=1e-4, atol=1e-5)

    def test_without_a_norm_raises(self):
        params, optimizer = {"head": {"kernel": jnp.eye(3)}}, optax.sgd(0.1)
        state = train_only(optimizer, {"head": True}).init(params)
        with pytest.raises(ValueError, match="params must have a leaf named one of"):
            core_adapt_step(params, state, jnp.eye(3), lambda p, x: x, optimizer)


def test_adapting_lowers_the_loss_and_raises_the_accuracy():
    """On digits that are brighter than those of training; the marked claim is in
    tests/norms/test_time_test.py."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = digits.data[order].astype("f") / 16, digits.target[order]
    rng = np.random.default_rng(1)
    params = {
        "kernel": (rng.normal(size=(64, 32)) / 8).astype("f"),
        "norm": {"scale": np.ones(32, "f"), "bias": np.zeros(32, "f")},
        "head": (0.1 * rng.normal(size=(32, 10))).astype("f"),
    }

    def logits_of(params, x, norm):
        return jax.nn.relu(norm(x @ params["kernel"], **params["norm"])) @ params["head"]

    def train_loss(params):
        norm = lambda x, **p: batch_norm(x, source, **p, training=True)[0]
        logits = logits_of(params, images[:1200], norm)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[:1200]).mean()

    source, optimizer = batch_norm_init(32), optax.adam(3e-2)

    def train(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(train_loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda c: jax.lax.scan(train, c, length=60))(
        (params, optimizer.init(params))
    )
    hidden = images[:1200] @ params["kernel"]
    mean, var = hidden.mean(0), hidden.var(0)
    norm = lambda x, **p: alpha_batch_norm(x, mean, var, **p, alpha=0.5)
    apply_fn = lambda params, x: logits_of(params, x, norm)
    test, noise = images[1200:1776], 0.1 * rng.normal(size=(576, 64)).astype("f")

    @jax.jit
    def run(learning_rate, stream):
        adapt = optax.sgd(learning_rate)

        def step(carry, x):
            params, state, predictions = core_adapt_step(*carry, x, apply_fn, adapt)
            return (params, state), (predictions, class_correlation_loss(apply_fn(params, x)))

        start = params, train_only(adapt, norm_parameters_only).init(params)
        _, (predictions, losses) = jax.lax.scan(step, start, stream.reshape(-1, 32, 64))
        correct = predictions.reshape(576, 10).argmax(-1) == labels[1200:1776]
        return correct.mean(), losses.mean()

    frozen, adapted = run(0.0, test), run(3.0, test)
    assert frozen[0] > 0.93
    assert adapted[0] > frozen[0] - 0.01
    assert adapted[1] < 0.9 * frozen[1]
    frozen, adapted = run(0.0, test + noise + 0.3), run(3.0, test + noise + 0.3)
    assert adapted[0] > frozen[0] + 0.03
    assert adapted[1] < 0.8 * frozen[1]
