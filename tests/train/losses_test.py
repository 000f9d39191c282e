"""Losses that keep something, draw something or decide between two, in the program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref import losses
from jaxref.train.config import ConfigError, load_config
from jaxref.train.program import build

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
    np.testing.assert_allclose(measured.nats, expected[:6].sum(), rtol=1e-5)
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
