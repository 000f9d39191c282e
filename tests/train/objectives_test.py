import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxref import data, losses
from jaxref.train import loop
from jaxref.train.config import ConfigError, load_config
from jaxref.train.objectives.frame import weighted
from jaxref.train.program import build


@pytest.fixture(autouse=True)
def one_device(devices):
    """Of the eight."""


def built(tiny_config, *overrides):
    config = tiny_config("batch_size=4", *overrides)
    return build(config, 256, 100)


def some_text(rows=4, length=16, seed=0):
    tokens = np.random.default_rng(seed).integers(32, 127, (rows, length + 1), np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "ids": np.arange(rows, dtype=np.int32),
    }


def logits_of(program, state, batch):
    return jax.jit(lambda params: program.model(params)(batch["inputs"]))(state.params)


def first_loss(program, batch, steps=1):
    """The loss of the last of some steps, all at the first parameters, and these."""
    state = program.init(jax.random.key(0))
    kept = jax.tree.map(jnp.copy, state)
    for _ in range(steps):
        state = state._replace(params=jax.tree.map(jnp.copy, kept.params))
        state, metrics = program.step(state, program.put(batch))
    return float(metrics.loss), kept


def cross_entropy(logits, batch):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])


class TestOfTheNextToken:
    def test_goldfish_is_the_mean_over_the_tokens_that_it_keeps(self, tiny_config):
        batch = some_text()
        options = ("objective=goldfish", "objective.k=3", "objective.context_width=2")
        program = built(tiny_config, *options)
        loss, state = first_loss(program, batch)
        kept = losses.goldfish_mask(batch["targets"], k=3, context_width=2)
        expected = cross_entropy(logits_of(program, state, batch), batch)
        assert 0 < kept.mean() < 1
        np.testing.assert_allclose(loss, expected[kept].mean(), rtol=1e-5)

    def test_emo_is_that_of_the_logits(self, tiny_config):
        batch = some_text()
        program = built(tiny_config, "objective=emo", "objective.mode=emo")
        loss, state = first_loss(program, batch)
        embedding = program.model(state.params).output_kernel().T
        logits = logits_of(program, state, batch)
        expected = losses.emo_loss(logits, batch["targets"], embedding, mode="emo")
        np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)

    def test_sequences_are_reweighted_after_the_warm_up(self, tiny_config):
        batch = some_text()
        batch["targets"][0] = batch["inputs"][0]  # one sequence apart from the others
        program = built(tiny_config, "objective=reweighted", "objective.temperature=0.2")
        at_first, state = first_loss(program, batch)
        later, _ = first_loss(program, batch, steps=3)  # of 12, one is warm-up
        of_sequence = cross_entropy(logits_of(program, state, batch), batch).mean(axis=1)
        weights = data.loss_based_weights(of_sequence, temperature=0.2)
        np.testing.assert_allclose(later, jnp.sum(weights * of_sequence), rtol=1e-5)
        np.testing.assert_allclose(at_first, of_sequence.mean(), rtol=1e-3)
        assert abs(later - at_first) > 1e-2

    def test_weights_of_tokens(self):
        values = jnp.arange(6.0).reshape(2, 3)
        weights = jnp.array([[1.0], [3.0]])
        np.testing.assert_allclose(weighted(values, weights).mean(), (1 * 1 + 3 * 4) / 4)
        assert not np.any(weighted(values, jnp.zeros((2, 1))))


class TestBlanks:
    def test_codegen_mixture_goes_on_or_fills_blanks(self, tiny_config):
        batch = some_text()
        of_share = {}
        for share in (0.0, 1.0):
            program = built(
                tiny_config, "objective=codegen_mixture", f"objective.causal_probability={share}"
            )
            of_share[share], state = first_loss(program, batch)
            assert program.model(state.params).config.vocab_size == 256 + 16
        logits = logits_of(program, state, batch)
        np.testing.assert_allclose(of_share[1.0], cross_entropy(logits, batch).mean(), rtol=1e-5)
        assert abs(of_share[0.0] - of_share[1.0]) > 1e-3

    def test_glm_reads_its_blanks_with_prefix_and_positions(self, tiny_config):
        """Against the model called with the examples of the same keys."""
        batch = some_text()
        program = built(tiny_config, "objective=glm_blank")
        assert program.objective.architecture == "prefix"
        state = program.init(jax.random.key(0))
        model = program.model(state.params)
        make = partial(
            data.blank_infilling_example,
            mask_id=256,
            gmask_id=257,
            start_id=258,
            end_id=259,
            output_length=16,
        )
        keys = jax.random.split(jax.random.key(0), 4)
        example = jax.vmap(make)(keys, batch["inputs"][:, :-6])  # room for two spans and the ends
        logits = model(
            example.tokens,
            prefix_lengths=example.context_length,
            positions=example.rotary_positions,
        )
        nats = optax.losses.softmax_cross_entropy_with_integer_labels(logits, example.targets)
        where = np.ones((4, 16), bool)
        where[3] = False
        measured = program.evaluate(state.params, program.put(batch | {"where": where}))
        kept = np.asarray(example.where) & where
        assert measured.examples == kept.sum() > 0
        np.testing.assert_allclose(measured.loss, nats[kept].sum(), rtol=1e-5)
        asked = program.objective.asked(np.array([1, 2, 300]))
        np.testing.assert_array_equal(asked, [1, 2, 257, 258])


class TestElectra:
    def test_the_discriminator_does_not_teach_the_generator(self, tiny_config):
        """Without a weight of its own the generator stays where it was, but for the embeddings,
        which are the discriminator's."""
        options = ("objective=electra", "optimizer.weight_decay=0.0")
        moved = {}
        for weight in (0.0, 1.0):
            program = built(tiny_config, *options, f"objective.generator_weight={weight}")
            state = program.init(jax.random.key(0))
            before = jax.tree.map(jnp.copy, state.params)
            for i in range(2):
                state, _ = program.step(state, program.put(some_text(seed=i)))
            blocks = state.params["generator"]["blocks"], before["generator"]["blocks"]
            moved[weight] = optax.global_norm(jax.tree.map(jnp.subtract, *blocks))
        assert moved[0.0] == 0 < moved[1.0]

    def test_generator_is_narrow_and_shares_the_embeddings(self, tiny_config):
        program = built(tiny_config, "objective=electra", "objective.generator_size=0.5")
        state = program.init(jax.random.key(0))
        model = program.model(state.params)
        assert model.generator.config.features == 8
        assert model.generator.config.num_heads == 2
        assert model.generator.embed.embed is model.generator.output.embed is model.embed
        assert model.generator.output_kernel().shape == (8, 256 + 8)
        shapes = [x.shape for x in jax.tree.leaves(state.params)]
        assert shapes.count((264, 16)) == 1
        batch = program.put(some_text() | {"where": np.ones((4, 16), bool)})
        measured = program.evaluate(state.params, batch)
        assert measured.examples == 64
        assert 0 <= measured.correct <= 64

    def test_loss_is_that_of_the_paper(self, tiny_config):
        """Of a generator and a discriminator whose logits are 0: logs of vocabulary and of 2."""
        program = built(tiny_config, "objective=electra", "objective.generator_weight=2.0")
        state = program.init(jax.random.key(0))
        zero = lambda tree: jax.tree.map(jnp.zeros_like, tree)
        params = state.params | {"output": zero(state.params["output"])}
        generator = params["generator"]
        params["generator"] = generator | {"output": zero(generator["output"])}
        _, metrics = program.step(state._replace(params=params), program.put(some_text()))
        expected = 50 * np.log(2) + 2 * np.log(264)
        np.testing.assert_allclose(metrics.loss, expected, rtol=1e-5)


class TestRuns:
    def test_a_reader_is_measured_otherwise_and_writes_nothing(self, tiny_config, tmp_path, capsys):
        config = tiny_config("objective=electra")
        loop.train(config, tmp_path)
        out = capsys.readouterr().out
        for shown in ("nats / ", "bits per token, replaced or not", "right"):
            assert shown in out
        assert "lzma" not in out
        assert (tmp_path / "loss.png").exists()
        assert not (tmp_path / "sample.txt").exists()
        loop.train(config, tmp_path)
        assert "This run is finished" in capsys.readouterr().out
        with pytest.raises(ConfigError, match=r"objective\.name=electra trains one that reads"):
            loop.print_sample(config, tmp_path)

    def test_a_model_of_blanks_goes_on_with_a_text(self, tiny_config, tmp_path, capsys):
        loop.train(tiny_config("objective=glm_blank", "sample.length=40"), tmp_path)
        assert "bits per token of a blank" in capsys.readouterr().out
        assert (tmp_path / "sample.txt").read_text().startswith("the ")

    def test_weights_by_another_run(self, tiny_config, tmp_path, capsys):
        """What a reference is sure of is learned less."""
        loop.train(tiny_config("steps=8"), tmp_path / "reference")
        given = ("objective=prior", f"objective.reference={tmp_path / 'reference'}")
        loop.train(tiny_config(*given), tmp_path / "run")
        rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
        assert rows[-1]["validation_loss"] < rows[5]["validation_loss"]
        config = tiny_config(*given)
        program = loop.build_program(config, loop.load(config))
        assert program.abstract_batch["reference_log_probs"].shape == (8, 16)
        for other, name in (("length=8", "length"), ("data.vocab_size=300", r"data\.vocab_size")):
            with pytest.raises(ConfigError, match=f"{name} must be that of the reference"):
                loop.train(tiny_config(*given, other), tmp_path / "other")
        with pytest.raises(ConfigError, match=r"objective\.reference must be the directory"):
            loop.build_program(tiny_config("objective=prior"), loop.load(config))


class TestConfiguration:
    def test_a_name_alone_is_a_components_name(self):
        config = load_config("configs/lm_objectives.py", ["objective=emo", "optimizer=lion"])
        assert config.objective.to_dict() == {"name": "emo"}
        assert config.optimizer.to_dict() == {"name": "lion"}
        assert load_config("configs/lm_objectives.py").objective.name == "goldfish"

    def test_what_does_not_go_together(self, tiny_config):
        for overrides, message in (
            (["objective=goldfsh"], "did you mean goldfish"),
            (["objective=emo", "loss=z_loss"], "objective.name=emo has losses of its own"),
            (["objective=electra", "model.architecture=decoder"], "follows from objective.name"),
            (["objective=goldfish", "objective.tokens=3"], "takes no argument 'tokens'"),
            (["objective=goldfish", "objective.token_losses=x"], "follows from the run"),
        ):
            with pytest.raises(ConfigError, match=message):
                built(tiny_config, *overrides)
        images = load_config("configs/digits.py", ["objective=goldfish"])
        with pytest.raises(ConfigError, match=r"objective\.name=goldfish is of text"):
            loop.build_program(images, loop.load(images))
