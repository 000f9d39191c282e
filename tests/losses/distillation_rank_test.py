from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref import losses

PLD = losses.plackett_luce_distillation_loss


def random_batch(examples=4, classes=5, seed=0):
    rng = np.random.default_rng(seed)
    student, teacher = (2 * rng.normal(size=(2, examples, classes))).astype("f")
    return student, teacher, rng.integers(classes, size=examples)


def softmax64(z):
    e = np.exp(np.float64(z) - np.max(z, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def literal(student, teacher, label, weights=None, temperature=1.0):
    """Loss and gradient of one example: a choice at a time, in float64."""
    s, t = np.float64(student), np.float64(teacher) / temperature
    order = [label, *sorted(set(range(len(t))) - {label}, key=lambda i: (-t[i], i))]
    a = softmax64(t)[order] if weights is None else weights
    loss, gradient = 0.0, np.zeros_like(s)
    for k, chosen in enumerate(order):
        left = order[k:]
        p = softmax64(s[left])
        loss -= a[k] * np.log(p[0])
        gradient[left] += a[k] * p
        gradient[chosen] -= a[k]
    return loss, gradient


@partial(jax.jit, static_argnames="axis")
def value_and_gradient(student, teacher, labels, where, weights, temperature=1.0, axis=-1):
    def loss(s):
        return PLD(
            s,
            teacher,
            labels,
            teacher_temperature=temperature,
            weights=weights,
            axis=axis,
            where=where,
        )

    values, vjp = jax.vjp(loss, student)
    return values, vjp(jnp.ones_like(values))[0]


def found(student, teacher, labels, where=None, weights=None, **keywords):
    where = np.ones(student.shape, bool) if where is None else where
    return value_and_gradient(student, teacher, labels, where, weights, **keywords)


class TestNumbers:
    @pytest.mark.parametrize("temperature", [1.0, 3.0])
    def test_values_and_gradients_match_the_formula(self, temperature):
        student, teacher, labels = random_batch()
        teacher[0, 3] = teacher[0, 1]  # equal classes go by their ids
        values, gradient = found(student, teacher, labels, temperature=temperature)
        for i in range(4):
            loss, slope = literal(student[i], teacher[i], labels[i], temperature=temperature)
            np.testing.assert_allclose(values[i], loss, rtol=1e-5)
            np.testing.assert_allclose(gradient[i], slope, rtol=1e-4, atol=1e-6)

    def test_along_another_axis_and_excluded_classes(self):
        student, teacher, labels = random_batch()
        labels = labels % 3
        where = np.broadcast_to(np.arange(5) < 3, (4, 5)).copy()
        where[2] = False
        poisoned = [np.where(where, z, np.nan).T for z in (student, teacher)]
        values, gradient = found(*poisoned, labels, where.T, axis=0)
        for i in (0, 1, 3):
            loss, slope = literal(student[i, :3], teacher[i, :3], labels[i])
            np.testing.assert_allclose(values[i], loss, rtol=1e-5)
            np.testing.assert_allclose(gradient[:3, i], slope, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(gradient[~where.T], 0)
        assert values[2] == 0


class TestClaims:
    @pytest.mark.claim("plackett-luce-distillation")
    def test_one_list_loss_holds_cross_entropy_list_mle_and_the_teachers_order(self):
        student, teacher, labels = random_batch()
        log_p = np.log(softmax64(student))
        cross_entropy = -log_p[np.arange(4), labels]

        # two classes: the teacher's probability of the label times cross-entropy
        two, certain = student[:, :2], softmax64(teacher[:, :2])[np.arange(4), labels % 2]
        expected = -certain * np.log(softmax64(two))[np.arange(4), labels % 2]
        values, _ = found(two, teacher[:, :2], labels % 2)
        np.testing.assert_allclose(values, expected, rtol=1e-5)

        first, _ = found(student, teacher, labels, weights=np.eye(5, dtype="f")[0])
        np.testing.assert_allclose(first, cross_entropy, rtol=1e-5)
        order = jax.jit(losses.teacher_optimal_permutation)(teacher, labels)
        list_mle = jax.jit(losses.list_mle_loss)(student, order)
        uniform, _ = found(student, teacher, labels, weights=np.full(5, 0.2, "f"))
        np.testing.assert_allclose(uniform, list_mle / 5, rtol=1e-5)

        values, gradient = found(student, teacher, labels)
        np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-6)
        shifted, _ = found(student + 3, teacher - 2, labels)
        np.testing.assert_allclose(shifted, values, rtol=1e-5)
        scaled, _ = found(2 * student, teacher, labels)
        assert np.all(np.abs(scaled - values) > 1e-2)

        @jax.jit
        def descend(student):
            total = lambda s: PLD(s, teacher, labels, teacher_temperature=4.0).sum()
            step = lambda s, _: (s - 2 * jax.grad(total)(s), None)
            return jax.lax.scan(step, student, length=200)[0]

        np.testing.assert_array_equal(np.argsort(-descend(student), -1), order)

    def test_the_loss_is_convex(self):
        student, teacher, labels = random_batch()
        other = random_batch(seed=1)[0]
        ends = [found(z, teacher, labels)[0] for z in (student, other)]
        middle = found((student + other) / 2, teacher, labels)[0]
        assert np.all(middle < (ends[0] + ends[1]) / 2)


class TestEdges:
    def test_unknown_labels_are_nan_in_their_row(self):
        student, teacher, labels = random_batch()
        labels[1], labels[3] = 5, -1
        values, _ = found(student, teacher, labels)
        np.testing.assert_array_equal(np.isnan(values), [False, True, False, True])
        where = np.ones((4, 5), bool)
        where[0, labels[0]] = False
        assert np.isnan(found(student, teacher, labels, where)[0][0])

    def test_extreme_logits_one_class_and_half_precision(self):
        far = 1e4 * np.float32([[1, -1, 0, 0, 1], [-1, 1, 0, 0, 0], [1] * 5, [0] * 5])
        for teacher in (far, -far, np.roll(far, 1, 0)):
            values, gradient = found(far, teacher, np.array([0, 0, 1, 2]))
            assert np.all(np.isfinite(values))
            assert np.all(np.isfinite(gradient))
        student, teacher, labels = random_batch()
        only = np.arange(5) == labels[:, None]
        np.testing.assert_array_equal(found(student, teacher, labels, only)[0], 0)
        half = [jnp.asarray(z, jnp.bfloat16) for z in (student, teacher)]
        values, _ = found(*half, labels)
        assert values.dtype == jnp.bfloat16
        wide, _ = found(*(np.asarray(z, "f") for z in half), labels)
        np.testing.assert_array_equal(values, wide.astype(jnp.bfloat16))

    def test_lists_of_any_order_and_ids_outside_of_them(self):
        order = np.array([[2, 0, 1], [0, 3, 1], [-1, 0, 1]])
        scores = np.float32([[0, 1, 3], [0, 1, 2], [0, 1, 2]])
        values = np.asarray(jax.jit(losses.list_mle_loss)(scores, order))
        expected = -np.log(np.exp(3) / (1 + np.e + np.exp(3))) - np.log(1 / (1 + np.e))
        np.testing.assert_allclose(values[0], expected, rtol=1e-5)
        assert np.all(np.isnan(values[1:]))

    def test_bad_input_is_named(self):
        student, teacher, labels = random_batch()

        def loss(*arguments, **keywords):  # traced alone
            jax.eval_shape(lambda: PLD(*arguments, **keywords))

        with pytest.raises(TypeError, match="labels must be integer ids"):
            loss(student, teacher, np.float32(labels))
        with pytest.raises(ValueError, match="labels must have shape"):
            loss(student, teacher, labels[:2])
        with pytest.raises(ValueError, match="teacher_logits must have shape"):
            loss(student, teacher[:, :4], labels)
        with pytest.raises(ValueError, match="teacher_temperature must be in"):
            loss(student, teacher, labels, teacher_temperature=0.0)
        with pytest.raises(ValueError, match="weights must be in"):
            loss(student, teacher, labels, weights=np.full(5, -1.0))
        with pytest.raises(ValueError, match="weights must broadcast"):
            loss(student, teacher, labels, weights=np.ones(4))
        with pytest.raises(ValueError, match="where must broadcast"):
            loss(student, teacher, labels, where=np.ones(4, bool))
        with pytest.raises(TypeError, match="permutation must be integers"):
            losses.list_mle_loss(student, teacher)
        with pytest.raises(ValueError, match="permutation must have shape"):
            losses.list_mle_loss(student, labels)
