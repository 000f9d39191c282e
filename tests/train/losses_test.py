"""Losses that keep something, draw something or decide between two, in the program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref import losses
from jaxref.train.config import ConfigError, load_config
from jaxref.train.program import build

FACTORED = ("loss.name=factored_output_loss", "loss.loss=taylor", "loss.learning_rate=0.5")
SMALL = ("batch_size=8", "model.width=4", "model.stages=(1,)", "model.norm.name=layer_norm")


def program_and_batch(*overrides, num_classes=3):
    config = load_config("configs/digits.py", [*SMALL, *overrides])
    program = build(config, image_shape=(4, 4, 1), num_classes=num_classes, num_examples=20)
    rng = np.random.default_rng(0)
    return program, {
        "inputs": rng.normal(size=(8, 4, 4, 1)).astype("f"),
        "targets": rng.integers(num_classes, size=8).astype("i"),
        "ids": rng.permutation(20)[:8].astype("i"),
    }


def test_a_state_moves_with_the_examples_of_the_batch():
    program, batch = program_and_batch("loss.name=adaptive_ldr_loss", "loss.alpha=3.0")
    state = program.init(jax.random.key(0))
    logits = program.model(state.params, state.model_state)(batch["inputs"])
    expected, kept = losses.adaptive_ldr_loss(
        logits, batch["targets"], batch["ids"], losses.adaptive_ldr_init(20), alpha=3.0
    )
    before = jax.tree.map(jnp.copy, state.model_state)
    valid = batch | {"where": np.ones(8, bool)}
    program.evaluate(state.params, program.put(valid), state.model_state)
    jax.tree.map(np.testing.assert_array_equal, state.model_state, before)
    state, metrics = program.step(state, program.put(batch))
    np.testing.assert_allclose(metrics.loss, expected.mean(), rtol=1e-5)
    temperatures = state.model_state.statistics["loss"]["state"][0]
    np.testing.assert_allclose(temperatures, kept.temperatures, rtol=1e-5)
    assert np.count_nonzero(temperatures != 1) == 8


@pytest.mark.parametrize("name", ["two_way_partial_auc_loss", "ensemble_calibrated_loss"])
def test_losses_of_two_classes_read_the_log_odds(name):
    chosen = f"loss.name={name}"
    program, batch = program_and_batch(chosen, num_classes=2)
    state = program.init(jax.random.key(0))
    logits = program.model(state.params, state.model_state)(batch["inputs"])
    scores = logits[:, 1] - logits[:, 0]
    state, metrics = program.step(state, program.put(batch))
    assert np.isfinite(metrics.loss)
    if name == "two_way_partial_auc_loss":
        initial = losses.two_way_partial_auc_init(20)
        expected, _ = losses.two_way_partial_auc_loss(
            scores, batch["targets"], batch["ids"], initial
        )
        np.testing.assert_allclose(metrics.loss, expected, rtol=1e-4)
    with pytest.raises(ConfigError, match=f"loss.name={name} is of decisions between two classes"):
        program_and_batch(chosen)


def test_the_kind_of_a_random_loss_changes_with_the_epoch():
    chosen = ("loss.name=periodic_ensemble_calibrated_loss", "loss.period=2")
    program, batch = program_and_batch(*chosen, num_classes=2)
    state, seen = program.init(jax.random.key(0)), []
    for _ in range(6):  # of 8 of 20 examples each
        state, metrics = program.step(state, program.put(batch))
        assert np.isfinite(metrics.loss)
        kept = [x.item() for x in state.model_state.statistics["loss"]["state"].values()]
        seen.append(tuple(kept[:2]))
    lambdas, epochs = zip(*seen)
    assert epochs == (1, 1, 1, 2, 2, 3)
    assert set(lambdas[:3]) == {0.0}
    assert len({*lambdas[3:]}) == 1
    assert 0 < abs(lambdas[3]) < 1


def test_a_learned_link_trains_with_the_model_and_is_used_in_evaluation():
    program, batch = program_and_batch("loss.name=legendretron_loss", "optimizer.name=sgd")
    state = program.init(jax.random.key(0))
    params = jax.tree.map(jnp.copy, state.params)
    link = program.model(params, state.model_state).loss
    logits = program.model(params, state.model_state)(batch["inputs"])
    values = logits[:, :2] - logits[:, 2:]
    log_p = losses.legendretron_log_probabilities(values, link.kept("params"))
    expected = -np.take_along_axis(np.asarray(log_p), batch["targets"][:, None], 1)[:, 0]
    valid = program.put(batch | {"where": np.arange(8) < 6})
    measured = program.evaluate(state.params, valid, state.model_state)
    np.testing.assert_allclose(measured.loss, expected[:6].sum(), rtol=1e-5)
    right = np.argmax(log_p, -1) == batch["targets"]
    assert measured.correct == right[:6].sum()
    for _ in range(2):  # the schedule starts at 0
        state, metrics = program.step(state, program.put(batch))
    np.testing.assert_allclose(metrics.loss, expected.mean(), rtol=1e-5)
    moved = [
        np.any(a != b)
        for a, b in zip(state.params["loss"]["params"].values(), params["loss"]["params"].values())
    ]
    assert any(moved)


@pytest.mark.parametrize(
    ("method", "message"),
    [("sam", "cannot move the statistics"), ("mesa", "cannot move the statistics")],
)
def test_methods_of_their_own_losses_refuse_what_a_loss_keeps(method, message):
    program, batch = program_and_batch(
        "loss.name=adaptive_ldr_loss", f"optimizer.name={method}", "optimizer.base.name=adamw"
    )
    state = program.init(jax.random.key(0))
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(program.step, state, program.put(batch))


class TestOutputMatrix:
    """`factored_output_loss` keeps the output matrix, in the place of the model's."""

    def batch(self):
        tokens = np.random.default_rng(0).integers(0, 50, (8, 17), np.int32)
        return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}

    def test_a_step_is_the_loss_s_and_the_logits_are_of_its_matrix(self, tiny_config):
        program = build(tiny_config(*FACTORED, "average_decay=0.5"), 50)
        state = program.init(jax.random.key(0))
        assert "output" not in state.params
        batch = self.batch()
        model = program.model(state.params, state.model_state)
        kept = model.loss.kept("state")
        hidden = model.hidden(jnp.asarray(batch["inputs"]))
        expected, after = jax.jit(losses.factored_output_loss, static_argnames="loss")(
            hidden, batch["targets"], kept, loss="taylor", learning_rate=0.5
        )
        weights = losses.factored_output_weights(kept)
        logits = hidden @ weights.T
        plain = losses.log_taylor_softmax_loss(logits, batch["targets"])
        np.testing.assert_allclose(expected, plain, rtol=1e-4)
        log_p = np.asarray(model(jnp.asarray(batch["inputs"])))
        ours = -np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
        np.testing.assert_allclose(ours, plain, rtol=1e-4)
        where = np.arange(16) < 12
        valid = program.put(batch | {"where": np.broadcast_to(where, (8, 16))})
        measured = program.evaluate(state.params, valid, state.model_state)
        np.testing.assert_allclose(measured.loss, plain[:, :12].sum(), rtol=1e-4)
        assert measured.examples == 8 * 12
        state, metrics = program.step(state, program.put(batch))
        np.testing.assert_allclose(metrics.loss, expected.mean(), rtol=1e-5)
        moved = program.model(state.params, state.model_state).loss.kept("state")
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), moved, after
        )
        first = metrics.loss
        for _ in range(10):
            state, metrics = program.step(state, program.put(batch))
        assert metrics.loss < 0.9 * first
        assert state.model_state.statistics["loss"]["state"][7] == 0  # none refused

    def test_the_rate_is_the_run_s_where_none_is_given(self, tiny_config, devices):
        program = build(
            tiny_config("loss.name=factored_output_loss", "schedule.peak_value=3.0", "steps=100"),
            50,
        )
        state, batch = program.init(jax.random.key(0)), self.batch()
        loss = jax.jit(losses.factored_output_loss)
        for step in range(2):
            model = program.model(state.params, state.model_state)
            kept = model.loss.kept("state")
            hidden = model.hidden(jnp.asarray(batch["inputs"]))
            _, after = loss(hidden, batch["targets"], kept, learning_rate=program.schedule(step))
            still = np.array_equal(after.factors, kept.factors)
            assert still == (step == 0)  # the schedule starts at 0
            state, _ = program.step(state, program.put(batch))
            moved = program.model(state.params, state.model_state).loss.kept("state")
            np.testing.assert_allclose(moved.factors, after.factors, atol=1e-5)

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("model.tie_embeddings=True", "set model.tie_embeddings=False"),
            ("accumulate=2", "set accumulate=1"),
            ("optimizer.name=sam", "cannot move the statistics"),
        ],
    )
    def test_what_does_not_go_with_it(self, tiny_config, devices, override, message):
        def trace_step():
            program = build(tiny_config(*FACTORED, override), 50)
            jax.eval_shape(program.step, program.abstract_state, self.batch())

        with pytest.raises(ConfigError, match=message):
            trace_step()

    def test_images_have_no_hidden_states(self):
        with pytest.raises(ConfigError, match="reads the hidden states of a language model"):
            program_and_batch(*FACTORED)
