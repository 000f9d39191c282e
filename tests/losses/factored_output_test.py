from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxref import losses
from jaxref.losses import factored_output
from jaxref.losses.factored_output import FactoredOutputState

CLASSES, FEATURES = 50, 6

SQUARED = "squared"


def squared_loss(outputs, labels):
    return jnp.square(outputs - jax.nn.one_hot(labels, outputs.shape[-1])).sum(-1)


DENSE = {
    "z": losses.spherical_z_loss,
    "taylor": losses.log_taylor_softmax_loss,
    "spherical": losses.log_spherical_softmax_loss,
    SQUARED: squared_loss,
}
RATES = {"z": 3.0, "taylor": 0.5, "spherical": 0.5, SQUARED: 0.05}


def weights_and_batch(batch=4, dtype=np.float32, seed=0, shape=None):
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(CLASSES, FEATURES)).astype(dtype)
    shape = shape or (batch,)
    hidden = (0.5 * rng.normal(size=(*shape, FEATURES))).astype(dtype)
    labels = rng.integers(CLASSES, size=shape)
    if batch > 2:
        labels.flat[1] = labels.flat[2] = labels.flat[0]  # the same class three times
    return weights, hidden, labels


@partial(jax.jit, static_argnums=0)
def dense_step(name, weights, hidden, labels, rate, **hyperparameters):
    """Losses, their gradient with respect to `hidden`, and W after the step, from all outputs."""

    def mean(weights, hidden):
        values = DENSE[name](hidden @ weights.T, labels, **hyperparameters)
        return values.mean(), values

    (for_weights, for_hidden), values = jax.grad(mean, argnums=(0, 1), has_aux=True)(
        jnp.asarray(weights), jnp.asarray(hidden)
    )
    return values, for_hidden, weights - rate * for_weights


@partial(jax.jit, static_argnames=("loss", "learning_rate", "a", "b"))
def factored_step(state, hidden, labels, **options):
    """The same of `factored_output_loss`, with the state in place of W."""

    def mean(hidden):
        values, after = losses.factored_output_loss(hidden, labels, state, **options)
        return values.mean(), (values, after)

    gradient, (values, after) = jax.grad(mean, has_aux=True)(jnp.asarray(hidden))
    return values, gradient, after


def assert_consistent(state, tolerance):
    """Q, m and U⁻¹ are what W and U say."""
    weights = np.asarray(losses.factored_output_weights(state), np.float64)
    gram = weights.T @ weights
    np.testing.assert_allclose(state.gram, gram, atol=tolerance * np.abs(gram).max())
    total = np.abs(weights).sum(0).max()
    np.testing.assert_allclose(state.total, weights.sum(0), atol=tolerance * total)
    product = np.asarray(state.mixing, np.float64) @ np.asarray(state.mixing_inverse, np.float64)
    np.testing.assert_allclose(product, np.eye(len(product)), atol=10 * tolerance)


class TestNumbers:
    @pytest.mark.parametrize(
        ("name", "batch", "dtype"),  # fewer examples than features, and more
        [
            ("z", 1, np.float64),
            ("z", 4, np.float64),
            ("z", 9, np.float64),
            ("z", 4, np.float32),
            ("taylor", 4, np.float64),
            ("spherical", 9, np.float64),
            ("squared", 4, np.float64),
            ("squared", 9, np.float32),
        ],
    )
    def test_three_steps_are_those_of_dense_descent(self, name, batch, dtype):
        tolerance = 1e-5 if dtype == np.float32 else 1e-10
        with jax.enable_x64(True):
            weights, _, _ = weights_and_batch(batch, dtype)
            state = losses.factored_output_init(weights)
            assert state.gram.dtype == dtype
            step = partial(factored_step, loss=name, learning_rate=RATES[name])
            for seed in range(3):
                _, hidden, labels = weights_and_batch(batch, dtype, seed)
                expected = dense_step(name, weights, hidden, labels, RATES[name])
                values, gradient, state = step(state, hidden, labels)
                weights = np.asarray(expected[2])
                np.testing.assert_allclose(values, expected[0], rtol=tolerance)
                np.testing.assert_allclose(gradient, expected[1], atol=tolerance)
            ours = losses.factored_output_weights(state)
            np.testing.assert_allclose(ours, weights, atol=tolerance)
            assert_consistent(state, tolerance)
            assert (state.step, state.refused) == (3, 0)

    def test_statistics_are_those_of_the_outputs(self):
        weights, hidden, labels = weights_and_batch(shape=(2, 3))
        labels[1, 2] = CLASSES
        state = losses.factored_output_init(weights)
        _, _, state = factored_step(state, hidden, labels, learning_rate=3.0)
        outputs = hidden @ np.asarray(losses.factored_output_weights(state)).T
        target, total, squares = losses.spherical_statistics(hidden, labels, state)
        known = np.minimum(labels, CLASSES - 1)
        expected = np.take_along_axis(outputs, known[..., None], -1)[..., 0]
        np.testing.assert_allclose(target, np.where(labels < CLASSES, expected, np.nan), rtol=1e-4)
        np.testing.assert_allclose(total, outputs.sum(-1), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(squares, np.square(outputs).sum(-1), rtol=1e-4)

    def test_any_gradients_of_the_statistics_make_a_step(self):
        weights, hidden, labels = weights_and_batch(5)
        y, s, q = np.random.default_rng(3).normal(size=(3, 5)).astype("f") / 10
        state = losses.factored_output_update(
            losses.factored_output_init(weights), hidden, labels, (y, s, q), 0.5
        )
        outputs = hidden @ weights.T
        of_outputs = s[:, None] + 2 * q[:, None] * outputs + y[:, None] * np.eye(CLASSES)[labels]
        expected = weights - 0.5 * of_outputs.T @ hidden
        np.testing.assert_allclose(
            losses.factored_output_weights(state), expected, rtol=1e-4, atol=1e-5
        )

    def test_log_probabilities_are_those_that_the_loss_trains(self):
        weights, hidden, _ = weights_and_batch(shape=(2, 3))
        state = losses.factored_output_init(weights)
        state = state._replace(shift=state.shift + 0.5)
        outputs = hidden @ weights.T + 0.5 * hidden.sum(-1, keepdims=True)
        every = np.arange(CLASSES)
        for loss, options, dense in (
            ("taylor", {}, losses.log_taylor_softmax_loss),
            (
                "spherical",
                {"epsilon": 0.3},
                partial(losses.log_spherical_softmax_loss, epsilon=0.3),
            ),
            ("z", {}, losses.softmax_cross_entropy),
        ):
            log_p = losses.factored_output_log_probabilities(hidden, state, loss=loss, **options)
            rows = np.repeat(outputs[..., None, :], CLASSES, axis=-2)
            expected = -dense(rows, np.broadcast_to(every, rows.shape[:-1]))
            np.testing.assert_allclose(log_p, expected, rtol=1e-4, atol=1e-5)

    def test_hyperparameters_and_functions_of_the_statistics(self):
        weights, hidden, labels = weights_and_batch()
        state = losses.factored_output_init(weights)
        ours = factored_step(state, hidden, labels, learning_rate=2.0, a=2.0, b=1.0)
        expected = dense_step("z", weights, hidden, labels, 2.0, a=2.0, b=1.0)
        np.testing.assert_allclose(ours[0], expected[0], rtol=1e-5)
        np.testing.assert_allclose(
            losses.factored_output_weights(ours[2]), expected[2], rtol=1e-4, atol=1e-5
        )
        own = factored_step(
            state,
            hidden,
            labels,
            learning_rate=0.1,
            loss=lambda target, total, squares, number: (squares - 2 * target + 1) / number,
        )
        expected = dense_step(SQUARED, weights, hidden, labels, 0.1 / CLASSES)
        np.testing.assert_allclose(own[0], expected[0] / CLASSES, rtol=1e-5)
        np.testing.assert_allclose(
            losses.factored_output_weights(own[2]), expected[2], rtol=1e-4, atol=1e-5
        )


class TestClaims:
    @pytest.mark.claim("z-loss")
    def test_invariant_and_exact_without_any_array_of_the_classes_size(self):
        with jax.enable_x64(True):
            weights, hidden, labels = weights_and_batch(5, np.float64)
            outputs = hidden @ weights.T
            values = losses.spherical_z_loss(outputs, labels)
            scaled = losses.spherical_z_loss(7.5 * outputs - 3, labels)
            np.testing.assert_allclose(scaled, values, rtol=1e-10)
            bound = np.log1p(np.exp(-np.sqrt(CLASSES - 1)))
            assert np.all(values > bound)
            alone = losses.spherical_z_loss(4 * np.eye(CLASSES)[labels] + 2, labels)
            np.testing.assert_allclose(alone, bound, rtol=1e-10)

            step = partial(factored_step, learning_rate=20.0)
            state = losses.factored_output_init(weights)
            for _ in range(20):
                before = values
                values, _, state = step(state, hidden, labels)
                weights = dense_step("z", weights, hidden, labels, 20.0)[2]
            assert values.mean() < before.mean()
            np.testing.assert_allclose(
                losses.factored_output_weights(state), weights, rtol=1e-10, atol=1e-10
            )
            jaxpr = jax.make_jaxpr(partial(factored_step, learning_rate=20.0))(
                state, hidden, labels
            )
            # the labels' rows change in place, and the loop over V makes no pass but to stabilise
            computing = set(sized(jaxpr.jaxpr, CLASSES)) - {"stop_gradient"}
            assert computing == {"scatter-add", "while"}


def sized(jaxpr, size):
    """What computes arrays with an axis of this size."""
    found = []
    for equation in jaxpr.eqns:
        inner = [x for x in equation.params.values() if hasattr(x, "jaxpr")]
        if equation.primitive.name != "while" and inner:
            for closed in inner:
                found += sized(closed.jaxpr, size)
        elif any(size in v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape")):
            found.append(equation.primitive.name)
    return found


class TestStability:
    @pytest.mark.parametrize("every", [20, 10**6, None])
    def test_the_spectrum_of_u_is_held_and_w_is_right_for_it(self, every, monkeypatch):
        """Squared error shrinks W to a fit of the labels, and U with it, until it is nothing."""
        if every is None:
            monkeypatch.setattr(factored_output, "_stabilized", lambda state, every: state)
        weights, _, _ = weights_and_batch(3)
        rng = np.random.default_rng(1)
        scales = np.array([2.0, 1.0, 1.0, 0.7, 0.5, 0.5])
        hidden = (scales * rng.normal(size=(400, 3, FEATURES))).astype("f")
        labels = rng.integers(CLASSES, size=(400, 3))

        @jax.jit
        def run(weights):
            def both(carry, batch):
                state, dense = carry
                _, state = losses.factored_output_loss(
                    *batch, state, loss=SQUARED, learning_rate=0.03, stabilize_every=every or 100
                )
                return (state, dense_step(SQUARED, dense, *batch, 0.03)[2]), state.mixing

            first = losses.factored_output_init(weights), weights
            return jax.lax.scan(both, first, (hidden, labels))

        (state, dense), mixings = run(weights)
        spectra = np.linalg.svd(np.asarray(mixings), compute_uv=False)
        ours = losses.factored_output_weights(state)
        if every is None:
            assert spectra.min() < 1e-4
            assert not np.allclose(ours, dense, atol=1e-2)
        else:
            assert 0.1 < spectra.min() < 0.5  # it was left, and not for long
            np.testing.assert_allclose(ours, dense, atol=1e-5)
            assert_consistent(state, 1e-4)

    def test_drift_over_a_thousand_steps_of_the_z_loss(self):
        weights, _, _ = weights_and_batch()
        rng = np.random.default_rng(1)
        hidden = 0.3 * rng.normal(size=(1000, 8, FEATURES)).astype("f")
        labels = rng.integers(CLASSES, size=(1000, 8))

        @jax.jit
        def run(state):
            def step(state, batch):
                values, state = losses.factored_output_loss(*batch, state, learning_rate=3.0)
                return state, values.mean()

            return jax.lax.scan(step, state, (hidden, labels))

        state, values = run(losses.factored_output_init(weights))
        assert np.all(np.isfinite(values))
        assert state.refused == 0
        assert_consistent(state, 2e-4)
        anew = losses.factored_output_init(losses.factored_output_weights(state))
        assert_consistent(anew, 1e-6)

    def test_a_step_that_would_lose_a_direction_is_refused(self):
        weights, hidden, labels = weights_and_batch(1)
        hidden = np.array([[0.0, 0.6, 0.0, 0.8, 0.0, 0.0]], "f")
        before = losses.factored_output_init(weights)
        update = jax.jit(losses.factored_output_update)
        one, zero = np.ones(1, "f"), np.zeros(1, "f")
        for rate in (0.5, 0.499995):  # 2 η g_q |h|² is 1, or about
            after = update(before, hidden, labels, (one, one, one), rate)
            jax.tree.map(np.testing.assert_array_equal, after[:6], before[:6])
            assert (after.step, after.refused) == (1, 1)
        near = update(before, hidden, labels, (one, one, one), 0.45)
        assert near.refused == 0
        assert_consistent(near, 1e-5)
        for gradients, h in (
            ((np.nan * one, zero, zero), hidden),
            ((one, np.inf * one, zero), hidden),
            ((one, one, one), np.nan * hidden),
        ):
            after = update(before, h, labels, gradients, 0.1)
            jax.tree.map(np.testing.assert_array_equal, after[:6], before[:6])
            assert after.refused == 1


class TestState:
    def test_schedules_are_of_the_states_count(self):
        weights, hidden, labels = weights_and_batch()
        state = losses.factored_output_init(weights)
        step = partial(factored_step, learning_rate=lambda t: 2.0 / (t + 1))
        for rate in (2.0, 1.0):
            weights = dense_step("z", weights, hidden, labels, rate)[2]
            _, _, state = step(state, hidden, labels)
        np.testing.assert_allclose(losses.factored_output_weights(state), weights, atol=1e-5)

    def test_has_no_gradient_and_returns_as_it_was_saved(self):
        weights, hidden, labels = weights_and_batch()
        state = losses.factored_output_init(weights)

        def norm(weights, hidden):
            after = losses.factored_output_loss(
                hidden, labels, losses.factored_output_init(weights), learning_rate=1.0
            )[1]
            return sum(jnp.sum(x) for x in after[:6])

        for gradient in jax.grad(norm, argnums=(0, 1))(weights, hidden):
            np.testing.assert_array_equal(gradient, 0)
        leaves, structure = jax.tree.flatten(state)
        assert len(leaves) == len(FactoredOutputState._fields)
        again = jax.tree.unflatten(structure, [np.array(leaf) for leaf in leaves])
        step = partial(factored_step, learning_rate=1.0)
        jax.tree.map(
            np.testing.assert_array_equal,
            step(state, hidden, labels),
            step(again, hidden, labels),
        )

    @pytest.mark.optimized
    def test_a_donated_state_is_changed_where_it_lies(self):
        classes, features = 20_000, 16
        state = losses.factored_output_init(
            num_classes=classes, features=features, key=jax.random.key(0)
        )
        place = state.factors.unsafe_buffer_pointer()
        hidden, labels = jnp.ones((4, features)), jnp.arange(4)
        step = jax.jit(
            lambda state, h, c: losses.factored_output_loss(h, c, state, learning_rate=1.0),
            donate_argnums=0,
        )
        memory = step.lower(state, hidden, labels).compile().memory_analysis()
        assert memory.temp_size_in_bytes < state.factors.nbytes
        for _ in range(2):
            _, state = step(state, hidden, labels)
        assert state.factors.unsafe_buffer_pointer() == place

    def test_weights_outlive_the_donation_of_the_state(self):
        weights = jnp.ones((3, 2))
        state = losses.factored_output_init(weights)
        jax.jit(lambda state: state, donate_argnums=0)(state)
        np.testing.assert_array_equal(weights, 1)

    def test_random_weights(self):
        make = partial(losses.factored_output_init, num_classes=2000, features=25)
        state = make(key=jax.random.key(0))
        np.testing.assert_allclose(state.factors.std(), 0.2, rtol=0.02)
        np.testing.assert_allclose(
            make(key=jax.random.key(0), stddev=3.0).factors.std(), 3, rtol=0.02
        )
        assert_consistent(state, 1e-5)

    def test_sharded_batch(self):
        weights, hidden, labels = weights_and_batch(16)
        state = losses.factored_output_init(weights)
        step = partial(factored_step, learning_rate=3.0)
        expected = step(state, hidden, labels)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        batch = jax.device_put((hidden, labels), NamedSharding(mesh, PartitionSpec("data")))
        spread = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
        ours = step(spread, *batch)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ours, expected)


class TestEdges:
    def test_ids_that_are_no_class_take_no_part(self):
        weights, hidden, labels = weights_and_batch(3)
        state = losses.factored_output_init(weights)
        step = partial(factored_step, learning_rate=3.0)

        @jax.jit
        @jax.grad
        def known_gradient(hidden, labels):
            return jnp.sum(losses.factored_output_loss(hidden, labels, state, learning_rate=1.0)[0])

        for id in (-1, CLASSES):
            values, _, after = step(state, hidden, np.where(np.arange(3) == 1, id, labels))
            np.testing.assert_array_equal(np.isnan(values), [False, True, False])
            gradient = known_gradient(hidden, np.where(np.arange(3) == 1, id, labels))
            assert np.all(np.isfinite(gradient))
            np.testing.assert_array_equal(gradient[1], 0)
            few = dense_step("z", weights, hidden[[0, 2]], labels[[0, 2]], 2.0)
            np.testing.assert_allclose(
                losses.factored_output_weights(after), few[2], rtol=1e-4, atol=1e-5
            )

    def test_equal_rows_zero_states_and_empty_batches_are_finite(self):
        _, hidden, labels = weights_and_batch(3)
        for weights in (np.ones((CLASSES, FEATURES), "f"), np.zeros((CLASSES, FEATURES), "f")):
            state = losses.factored_output_init(weights)
            values, gradient, after = factored_step(state, hidden, labels, learning_rate=1.0)
            np.testing.assert_allclose(values, np.log(2), rtol=1e-5)
            np.testing.assert_array_equal(gradient, 0)
            np.testing.assert_array_equal(losses.factored_output_weights(after), weights)
        values, gradient, after = factored_step(
            state, 0 * hidden, labels, learning_rate=1.0, loss="taylor"
        )
        np.testing.assert_allclose(values, np.log(CLASSES), rtol=1e-6)
        values, state = losses.factored_output_loss(
            hidden[:0], labels[:0], state, learning_rate=1.0
        )
        assert values.shape == (0,)
        assert state.refused == 0
        one = losses.factored_output_init(np.ones((1, FEATURES), "f"))
        values, _, one = factored_step(one, hidden, 0 * labels, learning_rate=1.0)
        np.testing.assert_allclose(values, np.log(2), rtol=1e-6)

    def test_half_precision_hidden_states(self):
        weights, hidden, labels = weights_and_batch()
        state = losses.factored_output_init(weights.astype(jnp.bfloat16))
        assert state.factors.dtype == jnp.float32
        for dtype in (jnp.bfloat16, jnp.float16):
            half = jnp.asarray(hidden, dtype)
            values, gradient, after = factored_step(state, half, labels, learning_rate=1.0)
            assert values.dtype == gradient.dtype == dtype
            assert after.gram.dtype == jnp.float32
            full = factored_step(state, half.astype("f"), labels, learning_rate=1.0)
            np.testing.assert_array_equal(values, full[0].astype(dtype))
            jax.tree.map(np.testing.assert_array_equal, after, full[2])

    def test_bad_input_is_named(self):
        weights, hidden, labels = weights_and_batch()
        state = losses.factored_output_init(weights)
        loss = partial(losses.factored_output_loss, learning_rate=1.0)
        for error, message, call in (
            (ValueError, "hidden must have shape", lambda: loss(hidden[:, :-1], labels, state)),
            (ValueError, "hidden must have shape", lambda: loss(hidden, labels[:-1], state)),
            (TypeError, "hidden must have a floating", lambda: loss(labels, labels, state)),
            (TypeError, "labels must be integer", lambda: loss(hidden, labels * 1.0, state)),
            (ValueError, "loss must be one of z,", lambda: loss(hidden, labels, state, loss="x")),
            (TypeError, "unexpected keyword", lambda: loss(hidden, labels, state, alpha=1.0)),
            (ValueError, "a must be in", lambda: loss(hidden, labels, state, a=0.0)),
            (
                ValueError,
                "learning_rate must be in",
                lambda: loss(hidden, labels, state, learning_rate=-1.0),
            ),
            (
                ValueError,
                "stabilize_every must be in",
                lambda: loss(hidden, labels, state, stabilize_every=0),
            ),
            (
                ValueError,
                "the value of loss must have shape",
                lambda: loss(hidden, labels, state, loss=lambda c, s, q, d: jnp.sum(c)),
            ),
            (
                ValueError,
                "g_s must have shape",
                lambda: losses.factored_output_update(
                    state, hidden, labels, (np.ones(4), np.ones(3), np.ones(4)), 1.0
                ),
            ),
            (ValueError, "weights must have shape", lambda: losses.factored_output_init(hidden[0])),
            (
                TypeError,
                "weights must have a floating",
                lambda: losses.factored_output_init(labels[None]),
            ),
            (ValueError, "weights, or num_classes", losses.factored_output_init),
            (
                ValueError,
                "weights have sizes",
                lambda: losses.factored_output_init(weights, num_classes=3),
            ),
        ):
            with pytest.raises(error, match=message):
                call()
