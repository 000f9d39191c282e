from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref import losses

PEER = np.load(Path(__file__).parents[1] / "oracles" / "distillation.npz")
STATES = {
    "hidden_mse": losses.hidden_mse_loss,
    "cosine": losses.hidden_cosine_loss,
    "patient": losses.patient_distillation_loss,
    "gram": losses.gram_distillation_loss,
    "attention_ce": losses.attention_cross_entropy_loss,
}
MASK = PEER["token_mask"]


@partial(jax.jit, static_argnums=0)
def value_and_gradient(name, student, teacher, where, cotangent):
    values, vjp = jax.vjp(lambda s: STATES[name](s, teacher, where=where), student)
    return values, vjp(cotangent)[0]


def found(name, student, teacher, where, cotangent):
    """The loss that a cotangent makes of the values, and its gradient."""
    cotangent = np.asarray(cotangent, "f")
    values, gradient = value_and_gradient(name, student, teacher, where, cotangent)
    return np.sum(values * cotangent), gradient


class TestNumbers:
    """The release takes the mean over the tokens at once."""

    def test_mean_square_over_tokens_that_exist(self):
        student, teacher = PEER["state"], PEER["teacher_state"]
        poisoned = np.where(MASK[..., None], student, np.nan)
        value, gradient = found("hidden_mse", poisoned, teacher, MASK, MASK / MASK.sum())
        np.testing.assert_allclose(value, PEER["hidden_mse"], rtol=1e-5)
        np.testing.assert_allclose(gradient, PEER["hidden_mse_grad"], rtol=1e-5, atol=1e-7)

    def test_cosine_patient_gram_and_attention(self):
        student, teacher = PEER["state"], PEER["teacher_state"]
        every, first = np.ones((2, 3), bool), np.arange(3) == 0
        cases = {
            "cosine": (student, teacher, every, every),
            "patient": (student, teacher, every, np.stack([first / 2, first / 2])),
            "gram": (student, PEER["wide_state"], every, np.full(2, 0.5)),
            "attention_ce": (
                PEER["attention"],
                PEER["teacher_attention"],
                np.ones(3, bool),
                np.full((2, 2, 3), 1 / 12),
            ),
        }
        for name, arguments in cases.items():
            value, gradient = found(name, *arguments)
            np.testing.assert_allclose(value, PEER[name].sum(), rtol=1e-5)
            expected = PEER[f"{name}_grad"]
            np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)

    def test_gram_of_the_tokens_that_exist(self):
        student, teacher = PEER["state"], PEER["wide_state"]
        poisoned = np.where(MASK[..., None], student, np.nan)
        values, gradient = value_and_gradient("gram", poisoned, teacher, MASK, np.ones(2, "f"))
        for i, n in enumerate((2, 3)):
            s, t = (np.float64(x[i, :n]) for x in (student, teacher))
            expected = np.mean((s @ s.T / 4 - t @ t.T / 6) ** 2)
            np.testing.assert_allclose(values[i], expected, rtol=1e-5)
        assert np.all(np.isfinite(gradient))
        np.testing.assert_array_equal(gradient[0, 2], 0)

    def test_attention_to_the_keys_that_exist(self):
        student, teacher = PEER["attention"], PEER["teacher_attention"]
        where = np.array([[True, True, False], [True, True, False], [False] * 3])
        poisoned = np.where(where, student, np.nan)
        values, gradient = value_and_gradient(
            "attention_ce", poisoned, teacher, where, np.ones((2, 2, 3), "f")
        )
        s, t = (np.exp(np.float64(x[..., :2, :2])) for x in (student, teacher))
        p, q = (x / x.sum(-1, keepdims=True) for x in (s, t))
        np.testing.assert_allclose(values[..., :2], -np.sum(q * np.log(p), -1), rtol=1e-5)
        np.testing.assert_array_equal(values[..., 2], 0)
        np.testing.assert_array_equal(gradient[..., ~where], 0)


@pytest.mark.parametrize("name", STATES)
class TestEdges:
    def test_zeros_extremes_half_precision_and_the_teacher_without_gradient(self, name):
        x = np.zeros((2, 3, 4), "f")
        x[0, 0], x[1, 1] = 1e4, [1e4, -1e4, 0, 0]
        shape = jax.eval_shape(STATES[name], x, x).shape
        values, gradient = value_and_gradient(name, x, x, True, np.ones(shape, "f"))
        assert np.all(np.isfinite(values))
        assert np.all(np.isfinite(gradient))
        if name != "attention_ce":
            expected = np.where(x.any(-1), 0, 1) if name == "cosine" else np.zeros(shape)
            np.testing.assert_allclose(values, expected, atol=1e-6)

        @jax.jit
        def more(student, teacher):
            half = [z.astype(jnp.bfloat16) for z in (student, teacher)]
            wide = STATES[name](*(z.astype("f") for z in half)).astype(jnp.bfloat16)
            slope = jax.grad(lambda t: STATES[name](student, t).sum())(teacher)
            return STATES[name](*half), wide, slope

        ours, wide, slope = more(PEER["state"], PEER["teacher_state"])
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(ours, wide)
        np.testing.assert_array_equal(slope, 0)

    def test_bad_input_is_named(self, name):
        x = PEER["state"]
        with pytest.raises(ValueError, match="teacher must have shape"):
            STATES[name](x, x[:, :2])
        with pytest.raises(ValueError, match="where must broadcast"):
            STATES[name](x, x, where=np.ones((2, 5), bool))
        with pytest.raises(TypeError, match="student must have a floating-point type"):
            STATES[name](x.astype(int), x)
