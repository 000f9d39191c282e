from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref import losses
from jaxref.optimizers import align_gradients

PEER = np.load(Path(__file__).parents[1] / "oracles" / "distillation.npz")
LOSSES = {
    "soft": losses.soft_label_distillation_loss,
    "binary": losses.binary_kl_logit_loss,
    "norm": losses.binary_kl_norm_logit_loss,
}


def value_and_gradient(student, teacher, where=None, *, name, temperature=2.0):
    """The losses, and the gradient of their sum."""
    where = np.ones(np.shape(student), bool) if where is None else where
    return _value_and_gradient(student, teacher, where, temperature, name)


@partial(jax.jit, static_argnums=4)
def _value_and_gradient(student, teacher, where, temperature, name):
    def loss(s):
        return LOSSES[name](s, teacher, temperature=temperature, where=where)

    values, vjp = jax.vjp(loss, student)
    return values, vjp(jnp.ones_like(values))[0]


def softmax64(z):
    e = np.exp(np.float64(z) - np.max(z, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid64(z):
    return 1 / (1 + np.exp(-np.float64(z)))


@pytest.mark.parametrize("name", LOSSES)
class TestLogits:
    def test_values_and_gradients_match_torch_and_the_release(self, name):
        for temperature in (1.0, 4.0):
            values, gradient = value_and_gradient(
                PEER["student"], PEER["teacher"], name=name, temperature=temperature
            )
            case = f"{name}_{temperature}"
            np.testing.assert_allclose(values, PEER[case], rtol=1e-5)
            np.testing.assert_allclose(gradient, PEER[f"{case}_grad"], rtol=1e-4, atol=1e-6)

    def test_axis_vmap_and_the_teacher_without_gradient(self, name):
        loss = partial(LOSSES[name], temperature=2.0)

        @jax.jit
        def found(student, teacher):
            moved = loss(student.T, teacher.T, axis=0)
            mapped, slope = jax.vmap(jax.value_and_grad(loss, argnums=1))(student, teacher)
            return moved, mapped, slope

        moved, mapped, slope = found(PEER["student"], PEER["teacher"])
        expected, _ = value_and_gradient(PEER["student"], PEER["teacher"], name=name)
        np.testing.assert_allclose(moved, expected, rtol=1e-5)
        np.testing.assert_allclose(mapped, expected, rtol=1e-5)
        np.testing.assert_array_equal(slope, 0)

    def test_excluded_classes_and_examples_count_for_nothing(self, name):
        student, teacher = PEER["student"], PEER["teacher"]
        where = np.ones((4, 5), bool)
        where[:, 3:], where[1] = False, False
        poisoned = np.where(where, student, np.nan), np.where(where, teacher, np.inf)
        values, gradient = value_and_gradient(*poisoned, where, name=name)
        few, few_gradient = value_and_gradient(
            student, teacher, np.broadcast_to(np.arange(5) < 3, (4, 5)), name=name
        )
        np.testing.assert_allclose(values, np.where(where[:, 0], few, 0), rtol=1e-5)
        np.testing.assert_array_equal(gradient[~where], 0)
        np.testing.assert_allclose(gradient, few_gradient * where, rtol=1e-4, atol=1e-6)
        alone = np.broadcast_to(np.arange(5) == 2, (4, 5))
        values, _ = value_and_gradient(student, student, alone, name=name)
        np.testing.assert_array_equal(values, 0)

    def test_excluded_classes_as_if_they_were_not_there(self, name):
        student, teacher = PEER["student"], PEER["teacher"]
        where = np.broadcast_to(np.arange(5) < 3, (4, 5))
        values, _ = value_and_gradient(student, teacher, where, name=name)
        few = TestLogits.literal(student[:, :3], teacher[:, :3], name)
        np.testing.assert_allclose(values, few, rtol=1e-5)

    @staticmethod
    def literal(student, teacher, name):
        """The loss at temperature 2, in float64."""
        s, t = (np.float64(z) / 2 for z in (student, teacher))
        if name == "soft":
            log_ratio = np.log(softmax64(t)) - np.log(softmax64(s))
            return 4 * np.sum(softmax64(t) * log_ratio, -1)
        if name == "binary":
            p, q = sigmoid64(s), sigmoid64(t)
            return 4 * np.sum(q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p)), -1)
        return 4 * np.sum(np.log(np.cosh((s - t) / 2)), -1)

    def test_close_logits_to_relative_precision(self, name):
        """Losses of 1e-8, where a float32 sum of p log(p / q) has an error of 1e-7."""
        teacher = PEER["teacher"]
        for size, rtol in ((1e-4, 1e-3), (0.2, 1e-5)):
            student = teacher + size * np.float32([1, -2, 0, 3, 1])
            values, _ = value_and_gradient(student, teacher, name=name)
            expected = self.literal(student, teacher, name)
            np.testing.assert_allclose(values, expected, rtol=rtol)
        same, slope = value_and_gradient(teacher, teacher, name=name)
        np.testing.assert_array_equal(same, 0)
        np.testing.assert_allclose(slope, 0, atol=1e-7)

    def test_extreme_logits_no_example_and_half_precision(self, name):
        far = 1e4 * np.float32([[1, -1, 0, 0, 1], [-1, 1, 0, 0, 0], [1] * 5, [0] * 5])
        for temperature in (0.1, 50.0):
            values, gradient = value_and_gradient(
                far, np.roll(far, 1, 0), name=name, temperature=temperature
            )
            assert np.all(np.isfinite(values))
            assert np.all(values >= 0)
            assert np.all(np.isfinite(gradient))
        nothing = jax.ShapeDtypeStruct((0, 5), jnp.float32)
        assert jax.eval_shape(LOSSES[name], nothing, nothing).shape == (0,)
        half = [jnp.asarray(PEER[k], jnp.bfloat16) for k in ("student", "teacher")]
        ours, _ = value_and_gradient(*half, name=name)
        assert ours.dtype == jnp.bfloat16
        expected, _ = value_and_gradient(*(np.asarray(x, "f") for x in half), name=name)
        np.testing.assert_array_equal(ours, expected.astype(jnp.bfloat16))

    def test_bad_input_is_named(self, name):
        student, teacher = PEER["student"], PEER["teacher"]
        with pytest.raises(ValueError, match="temperature must be in"):
            LOSSES[name](student, teacher, temperature=0.0)
        with pytest.raises(ValueError, match="teacher_logits must have shape"):
            LOSSES[name](student, teacher[:, :4])
        with pytest.raises(ValueError, match="student_logits must have at least one class"):
            LOSSES[name](student[:, :0], teacher[:, :0])
        with pytest.raises(TypeError, match="teacher_logits must have a floating-point type"):
            LOSSES[name](student, teacher.astype(int))
        with pytest.raises(ValueError, match="where must broadcast"):
            LOSSES[name](student, teacher, where=np.ones(4, bool))


class TestSoftLabels:
    def test_tends_to_the_centred_square_distance_as_the_temperature_grows(self):
        student, teacher = PEER["student"], PEER["teacher"]
        difference = np.float64(student) - teacher
        centred = difference - difference.mean(-1, keepdims=True)
        values, gradient = value_and_gradient(student, teacher, name="soft", temperature=1e5)
        np.testing.assert_allclose(values, np.square(centred).sum(-1) / 10, rtol=1e-3)
        np.testing.assert_allclose(gradient, centred / 5, rtol=1e-3, atol=1e-4)

    def test_does_not_see_a_constant(self):
        shifted = PEER["teacher"] + 3
        values, _ = value_and_gradient(shifted, PEER["teacher"], name="soft")
        np.testing.assert_allclose(values, 0, atol=1e-10)


class TestDualHead:
    @pytest.mark.claim("dual-head-distillation")
    def test_logits_say_what_a_softmax_hides_and_heads_and_gradients_stay_apart(self):
        student, teacher = np.zeros((2, 4, 5), "f")
        student[0, :3], teacher[0, :3] = [-2, -1, 0], [2, 3, 4]
        student[1, 0], teacher[1, 0] = 20, 25
        where = np.zeros((4, 5), bool)
        where[0, :3] = where[1, 0] = True
        found = {k: value_and_gradient(student, teacher, where, name=k) for k in LOSSES}
        np.testing.assert_allclose(found["soft"][0][0], 0, atol=1e-10)
        np.testing.assert_allclose(found["binary"][0][0], 4.791, atol=1e-3)
        np.testing.assert_allclose(found["binary"][1][1, 0], -8.3e-5, rtol=0.01)
        np.testing.assert_allclose(found["norm"][1][1, 0], -0.848, atol=1e-3)

        rng = np.random.default_rng(0)
        body, head = rng.normal(size=(2, 4, 4)).astype("f")
        params = {"body": body, "main": head, "auxiliary": -head}  # heads that want the opposite
        x, labels = rng.normal(size=(6, 4)).astype("f"), np.arange(6) % 4

        def loss(params, weights):
            h = jnp.tanh(x @ params["body"])
            return losses.dual_head_distillation_loss(
                h @ params["main"],
                h @ params["auxiliary"],
                4 * np.eye(4, dtype="f")[labels],
                labels,
                classification_weight=weights[0],
                distillation_weight=weights[1],
            ).mean()

        @jax.jit
        def gradients(params):
            return jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, jnp.eye(2))

        both = jax.tree.map(np.asarray, gradients(params))
        task, distillation = ({k: g[i] for k, g in both.items()} for i in (0, 1))
        np.testing.assert_array_equal(distillation["main"], 0)
        np.testing.assert_array_equal(task["auxiliary"], 0)
        assert np.vdot(distillation["body"], task["body"]) < -1e-3
        aligned = jax.jit(align_gradients)(task, distillation)
        along = sum(np.vdot(aligned[k] - task[k], task[k]) for k in task)
        np.testing.assert_allclose(along, 0, atol=1e-6)
        np.testing.assert_array_equal(aligned["auxiliary"], distillation["auxiliary"])

    def test_is_the_weighted_sum_of_its_two_terms(self):
        main, teacher = PEER["student"], PEER["teacher"]
        auxiliary = main[::-1]
        labels = np.array([0, 4, 2, -1])
        weights = {"classification_weight": 0.5, "distillation_weight": 3.0}

        @jax.jit
        def found(*arguments):
            return [
                losses.dual_head_distillation_loss(
                    *arguments, labels, temperature=4.0, norm=norm, **weights
                )
                for norm in (True, False)
            ]

        picked = np.take_along_axis(softmax64(main), labels[:, None], -1)[:, 0]
        for ours, name in zip(found(main, auxiliary, teacher), ("norm", "binary")):
            distillation, _ = value_and_gradient(auxiliary, teacher, name=name, temperature=4.0)
            expected = -0.5 * np.log(picked) + 3 * np.asarray(distillation)
            np.testing.assert_allclose(ours[:3], expected[:3], rtol=1e-5)
            assert np.isnan(ours[3])
        half = jax.ShapeDtypeStruct((4, 5), jnp.bfloat16)
        assert jax.eval_shape(found, half, half, half)[0].dtype == jnp.bfloat16

    def test_bad_input_is_named(self):
        z, labels = PEER["student"], np.zeros(4, int)
        with pytest.raises(ValueError, match="distillation_weight must be in"):
            losses.dual_head_distillation_loss(z, z, z, labels, distillation_weight=-1.0)
        with pytest.raises(ValueError, match="auxiliary_logits must have shape"):
            losses.dual_head_distillation_loss(z, z[:, :3], z, labels)
        with pytest.raises(ValueError, match="labels must have shape"):
            losses.dual_head_distillation_loss(z, z, z, labels[:2])
