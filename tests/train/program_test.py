import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxref import losses
from jaxref.nn import AuxiliaryLoss, GradientState
from jaxref.optimizers import ScaleByAdamState
from jaxref.parallel import make_mesh
from jaxref.train.components import build_method, build_schedule
from jaxref.train.config import ConfigError, load_config
from jaxref.train.losses import build_loss
from jaxref.train.methods.frame import Problem
from jaxref.train.program import build, split_model

SGD = ("optimizer.name=sgd", "schedule.name=constant_schedule", "schedule.value=0.5")


def random_batch(seed, rows=8, length=16):
    tokens = np.random.default_rng(seed).integers(0, 256, (rows, length + 1), np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def repeated_batch(seed, rows=8, length=16):
    """Bytes that can be learnt: each follows from the one before."""
    start = np.random.default_rng(seed).integers(0, 7, (rows, 1))
    tokens = (100 + (start + np.arange(length + 1)) % 7).astype(np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def take(program, steps, state=None, batch=random_batch):
    """The state after some steps, and the metrics of each."""
    state = program.init(jax.random.key(0)) if state is None else state
    history = []
    for i in range(steps):
        state, metrics = program.step(state, program.put(batch(i)))
        history.append(metrics)
    return state, history


def trace_step(program, batch):
    """Raises what the first step would raise."""
    return jax.eval_shape(program.step, program.abstract_state, batch)


def on_one_device(config):
    with pytest.MonkeyPatch.context() as patch:
        mesh = lambda sizes, _: make_mesh(sizes, jax.devices()[:1])
        patch.setitem(build.__globals__, "make_mesh", mesh)
        return build(config, 256)


def copied(tree):
    """A copy, as `step` donates the state that it is given."""
    return jax.tree.map(jnp.copy, tree)


def difference(a, b):
    return jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), a, b)


def assert_close(actual, expected, **tolerance):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, **tolerance), actual, expected)


def assert_same_bits(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


@pytest.fixture
def compilations():
    """`compilations(name)`: how often a function of this name was compiled during the test."""
    names = []

    def listen(event, duration, **details):
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            names.append(details["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda name: names.count(f"jit({name})")
    jax.monitoring.unregister_event_duration_listener(listen)


class TestStep:
    def test_it_learns(self, tiny_config, devices):
        program = build(tiny_config("steps=40"), 256)
        _, history = take(program, 40, batch=repeated_batch)
        assert math.log(256) - 0.1 < history[0].loss < math.log(256) + 2
        assert history[-1].loss < 1.5

    def test_gradient_is_that_of_the_mean_loss(self, tiny_config, devices):
        """One step of gradient descent, from the model and `jax.grad` alone."""
        program = build(tiny_config(*SGD, "clip_norm=0"), 256)
        before = copied(program.init(jax.random.key(0)))
        batch = random_batch(0)

        def mean_loss(params):
            logits = nnx.merge(program.graphdef, params)(batch["inputs"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

        loss, gradient = jax.jit(jax.value_and_grad(mean_loss))(before.params)
        after, [metrics] = take(program, 1, copied(before))
        assert_close(metrics.loss, loss, rtol=1e-6)
        assert_close(metrics.gradient_norm, optax.global_norm(gradient), rtol=1e-5)
        expected = jax.tree.map(lambda p, g: p - 0.5 * g, before.params, gradient)
        assert_close(after.params, expected, rtol=1e-5, atol=1e-6)

    def test_accumulated_micro_batches_are_one_batch(self, tiny_config, devices):
        whole, history = take(build(tiny_config(*SGD), 256), 3)
        parts, parts_history = take(build(tiny_config(*SGD, "accumulate=4"), 256), 3)
        assert_close(parts_history, history, rtol=1e-5)
        assert_close(parts.params, whole.params, rtol=1e-5, atol=1e-6)

    def test_clipping(self, tiny_config, devices):
        def move(clip_norm):
            program = build(tiny_config(*SGD, f"clip_norm={clip_norm}"), 256)
            before = copied(program.init(jax.random.key(0)))
            after, [metrics] = take(program, 1, copied(before))
            return difference(after.params, before.params), metrics.gradient_norm

        free, norm = move(0)
        clipped, clipped_norm = move(0.1)
        assert norm > 0.2
        assert clipped_norm == norm  # reported as it was before clipping
        assert_close(optax.global_norm(free), 0.5 * norm, rtol=1e-4)
        assert_close(optax.global_norm(clipped), 0.5 * 0.1, rtol=1e-4)
        assert_close(clipped, jax.tree.map(lambda x: x * 0.1 / norm, free), atol=1e-6)
        loose, _ = move(100)
        assert_close(loose, free, atol=1e-6)

    def test_remat_changes_nothing_but_the_program(self, tiny_config, devices):
        outcomes, programs = [], []
        for remat in ("false", "true"):
            program = build(tiny_config(f"model.remat={remat}", "model.dropout=0.1"), 256)
            state = program.abstract_state
            batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, random_batch(0)))
            programs.append(str(jax.make_jaxpr(program.step)(state, batch)))
            outcomes.append(take(program, 3))
        assert "remat" not in programs[0]
        assert "remat" in programs[1]
        (plain, plain_history), (remat, remat_history) = outcomes
        assert_close(remat_history, plain_history, rtol=1e-5)
        assert_close(remat.params, plain.params, atol=1e-4)

    def test_bfloat16(self, tiny_config, devices):
        _, [reference] = take(build(tiny_config(), 256), 1)
        program = build(tiny_config("dtype=bfloat16", "steps=20"), 256)
        state, history = take(program, 20, batch=repeated_batch)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}
        model = nnx.merge(program.graphdef, state.params)
        assert jax.eval_shape(model.hidden, random_batch(0)["inputs"]).dtype == jnp.bfloat16
        assert history[-1].loss < history[0].loss - 2
        _, [first] = take(program, 1)
        assert_close(first.loss, reference.loss, rtol=0.02)
        assert first.loss != reference.loss

    def test_average_of_the_weights(self, tiny_config, devices):
        program = build(tiny_config("average_decay=0.8"), 256)
        state = program.init(jax.random.key(0))
        average = copied(state.params)
        assert_same_bits(state.average, average)
        for i in range(3):
            state, _ = program.step(state, program.put(random_batch(i)))
            average = jax.tree.map(lambda a, p: 0.8 * a + 0.2 * p, average, state.params)
            assert_close(state.average, average, atol=1e-6)
        assert optax.global_norm(difference(state.average, state.params)) > 1e-3

    def test_dropout(self, tiny_config, devices):
        program = build(tiny_config("model.dropout=0.5"), 256)
        state = program.init(jax.random.key(0))
        batch = program.put(random_batch(0))

        def loss(state):
            return float(program.step(copied(state), batch)[1].loss)

        first = loss(state)
        assert loss(state) == first
        assert loss(state._replace(step=state.step + 1)) != first
        assert loss(state._replace(key=jax.random.key(5))) != first
        where = program.put({"where": np.ones((8, 16), bool)})
        evaluated = program.evaluate(state.params, batch | where)
        assert_same_bits(evaluated, program.evaluate(state.params, batch | where))

    def test_one_program_for_each_shape(self, tiny_config, devices, compilations):
        program = build(tiny_config("average_decay=0.5"), 256)
        state, _ = take(program, 3)
        assert compilations("step") == 1
        restored = jax.tree.map(
            lambda x, a: (
                jax.device_put(np.asarray(x), a.sharding) if x.dtype == a.dtype == np.float32 else x
            ),
            state,
            program.abstract_state,
        )
        state, _ = take(program, 1, restored)
        assert compilations("step") == 1
        take(program, 1, state, batch=lambda i: random_batch(i, length=8))
        assert compilations("step") == 2

    def test_abstract_state_is_what_init_makes(self, tiny_config, devices):
        program = build(tiny_config("average_decay=0.5"), 256)
        state = program.init(jax.random.key(0))
        describe = lambda x: (x.shape, x.dtype, x.sharding)
        assert jax.tree.map(describe, program.abstract_state) == jax.tree.map(describe, state)


class TestNonFinite:
    @pytest.fixture
    def program(self, tiny_config, devices):
        return build(tiny_config("average_decay=0.5"), 256)

    def planted(self, program, value):
        """A state after a step, with one entry of one parameter replaced."""
        state, _ = take(program, 1)
        kernel = state.params["blocks"][0]["mlp"]["function"]["up"]["kernel"]
        sound = copied(kernel)
        state.params["blocks"][0]["mlp"]["function"]["up"]["kernel"] = kernel.at[3, 5].set(value)
        return state, sound

    def test_step_is_skipped_and_counted(self, program):
        state, sound = self.planted(program, np.nan)
        before = copied(state)
        for count in (1, 2):
            state, metrics = program.step(state, program.put(random_batch(count)))
            assert np.isnan(metrics.loss)
            assert (state.nonfinite, state.nonfinite_in_row, state.step) == (
                count,
                count,
                1 + count,
            )
            for name in ("params", "opt_state", "average"):
                assert_same_bits(getattr(state, name), getattr(before, name))
        state.params["blocks"][0]["mlp"]["function"]["up"]["kernel"] = sound
        state, metrics = program.step(state, program.put(random_batch(3)))
        assert np.isfinite(metrics.loss)
        assert (state.nonfinite, state.nonfinite_in_row, state.step) == (2, 0, 4)
        assert optax.global_norm(difference(state.average, before.average)) > 0

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_parameters_are_named(self, program, value):
        state, _ = self.planted(program, value)
        of_parameters, of_gradients = program.nonfinite_parameters(
            state, program.put(random_batch(1))
        )
        flags = jax.tree_util.tree_leaves_with_path(of_parameters)
        found = [jax.tree_util.keystr(path) for path, flag in flags if flag]
        assert found == ["['blocks'][0]['mlp']['function']['up']['kernel']"]
        assert any(jax.tree.leaves(of_gradients))

    def test_gradients_are_named_where_all_parameters_are_finite(self, program):
        state, _ = take(program, 1)
        kernel = state.params["output"]["kernel"]
        state.params["output"]["kernel"] = jnp.full_like(kernel, 3e38)
        flags = program.nonfinite_parameters(state, program.put(random_batch(1)))
        of_parameters, of_gradients = map(jax.tree.leaves, flags)
        assert not any(of_parameters)
        assert any(of_gradients)

    def test_none_are_named_where_all_is_well(self, program):
        state, _ = take(program, 1)
        flags = program.nonfinite_parameters(state, program.put(random_batch(1)))
        assert not any(jax.tree.leaves(flags))


class TestEvaluate:
    def test_sums_over_the_tokens_that_count(self, tiny_config, devices):
        """Cross-entropy, whatever the training loss."""
        program = build(tiny_config("loss.name=squentropy"), 256)
        params = program.init(jax.random.key(0)).params
        batch = random_batch(0) | {"where": np.arange(8 * 16).reshape(8, 16) % 3 == 0}
        nats, count, _ = program.evaluate(params, program.put(batch))
        logits = nnx.merge(program.graphdef, params)(batch["inputs"])
        expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        assert count == batch["where"].sum()
        assert_close(nats, expected[batch["where"]].sum(), rtol=1e-5)


# Statistics that the forward pass moves, and some that the backward pass does.
STATISTICS = (
    "model.norm.name=power_norm",
    "model.norm.warmup_steps=1",
    "model.final_norm.name=batch_norm",
)


def cross_entropy(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])


def step_by_calls(model, batches, parts):
    """Gradient descent at rate 0.5, each batch in parts, by nothing but calls of the model."""

    @nnx.jit
    def gradient(model, batch):
        mean_loss = lambda model: cross_entropy(model(batch["inputs"]), batch).mean()
        differentiated = nnx.DiffState(0, nnx.Any(nnx.Param, GradientState))
        both = nnx.grad(mean_loss, argnums=differentiated)(model)
        gradient, following = nnx.split_state(both, nnx.Param, GradientState)
        nnx.update(model, following)
        return gradient

    for batch in batches:
        rows = lambda i, batch=batch: {name: array[i::parts] for name, array in batch.items()}
        gradients = [gradient(model, rows(i)) for i in range(parts)]
        descend = lambda p, *g: p - 0.5 * sum(g) / parts
        nnx.update(model, jax.tree.map(descend, nnx.state(model, nnx.Param), *gradients))


class TestModelState:
    @pytest.fixture(scope="class")
    def program(self, tiny_config):
        return on_one_device(tiny_config(*STATISTICS, *SGD, "clip_norm=0"))

    @pytest.mark.parametrize("parts", [1, 2])
    def test_it_moves_as_calls_of_the_model_move_it(self, tiny_config, program, parts):
        if parts > 1:
            accumulate = f"accumulate={parts}"
            program = on_one_device(tiny_config(*STATISTICS, *SGD, "clip_norm=0", accumulate))
        before = copied(program.init(jax.random.key(0)))
        after, _ = take(program, 2, copied(before))
        model = program.merge(before.params, before.model_state)
        step_by_calls(model, [random_batch(0), random_batch(1)], parts)
        params, backward, _, statistics = map(nnx.to_pure_dict, split_model(model)[1:])
        assert_close(after.params, params, rtol=1e-4, atol=1e-5)
        assert_close(after.model_state.statistics, statistics, rtol=1e-4, atol=1e-5)
        assert_close(after.model_state.backward, backward, rtol=1e-3, atol=1e-6)
        norm = after.model_state.statistics["blocks"][0]["mlp"]["input_norm"]["state"]
        assert norm["step"] == 2 * parts
        moved = difference(after.model_state, before.model_state)
        assert all(np.any(leaf) for leaf in jax.tree.leaves(moved))

    def test_evaluation_uses_it_and_leaves_it(self, program):
        state, _ = take(program, 2)
        batch = random_batch(5) | {"where": np.ones((8, 16), bool)}
        before = copied(state.model_state)
        nats, count, _ = program.evaluate(state.params, program.put(batch), state.model_state)
        assert_same_bits(state.model_state, before)
        model = program.model(state.params, state.model_state)
        alone = jax.jit(jax.vmap(lambda row: model(row[None])[0]))  # no row sees another
        assert_close(nats / count, cross_entropy(alone(batch["inputs"]), batch).mean(), rtol=1e-5)
        fresh = program.init(jax.random.key(0)).model_state
        other, *_ = program.evaluate(state.params, program.put(batch), fresh)
        assert abs(other - nats) > 1

    def test_a_step_that_is_not_finite_leaves_it(self, program):
        state, _ = take(program, 1)
        state.params["output"]["kernel"] = jnp.full_like(state.params["output"]["kernel"], np.nan)
        before = copied(state.model_state)
        state, _ = program.step(state, program.put(random_batch(1)))
        assert state.nonfinite == 1
        assert_same_bits(state.model_state, before)
        flags = program.nonfinite_parameters(state, program.put(random_batch(1)))
        assert sum(map(bool, jax.tree.leaves(flags[0]))) == 1

    def test_on_eight_devices_it_is_that_of_the_whole_batch(self, tiny_config, program):
        expected, _ = take(program, 2)
        spread = build(tiny_config(*STATISTICS, *SGD, "clip_norm=0", "mesh.data=8"), 256)
        state, _ = take(spread, 2)
        assert spread.mesh.size == 8
        assert_close(state.model_state.statistics, expected.model_state.statistics, rtol=1e-4)
        assert_close(
            state.model_state.backward, expected.model_state.backward, rtol=1e-3, atol=1e-6
        )
        assert_close(state.params, expected.params, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("method", ["sam", "mesa"])
    def test_methods_of_their_own_losses_say_that_they_cannot_move_it(
        self, tiny_config, devices, method
    ):
        program = build(tiny_config(*STATISTICS, f"optimizer.name={method}"), 256)
        message = (
            f"optimizer.name={method} evaluates the loss in its own way and cannot move the "
            "statistics that model.name=Transformer or loss.name="
        )
        with pytest.raises(ConfigError, match=message):
            trace_step(program, random_batch(0))


class TestAuxiliaryLoss:
    EXPERTS = ("model.mlp.name=MixtureOfExperts", "model.mlp.balance_coefficient=10.0")

    def test_is_part_of_the_training_loss_alone(self, tiny_config, devices):
        """Of layers that are stacked in one, each owes its own."""
        layers = ("model.num_layers=2", "model.scan_layers=true")
        program = build(tiny_config(*self.EXPERTS, *layers, *SGD), 256)
        state = program.init(jax.random.key(0))
        batch = random_batch(0)

        @jax.jit
        def parts(params):
            model = program.merge(params, state.model_state)
            losses = cross_entropy(model(batch["inputs"], key=jax.random.key(0)), batch)
            return losses.mean(), jax.tree.leaves(nnx.state(model, AuxiliaryLoss))

        task, [owed] = parts(state.params)
        assert owed.shape == (2,)
        assert np.all(owed > 9)  # about 1 each, times the coefficient
        _, [metrics] = take(program, 1, state)
        assert_close(metrics.loss, task + owed.sum(), atol=0.2)  # the router draws other noise
        where = {"where": np.ones((8, 16), bool)}
        evaluated = jax.make_jaxpr(program.evaluate)(program.abstract_state.params, batch | where)
        assert "cumsum" not in str(evaluated)  # of the places that experts have in training

    def test_methods_that_read_logits_say_that_they_would_leave_it_out(self, tiny_config, devices):
        program = build(tiny_config(*self.EXPERTS, "optimizer.name=mesa"), 256)
        with pytest.raises(ConfigError, match=r"mesa reads logits and would leave out the auxili"):
            trace_step(program, random_batch(0))


class TestImages:
    """A run on random images of 4 x 4 pixels in three classes."""

    VIT = (
        "model.name=VisionTransformer",
        "model.patch_size=2",
        "model.num_layers=1",
        "model.features=8",
        "model.num_heads=2",
        "model.mlp_features=8",
    )

    def program(self, *overrides):
        config = load_config("configs/digits.py", ["batch_size=8", *overrides])
        return build(config, num_examples=8, image_shape=(4, 4, 1), num_classes=3)

    @staticmethod
    def batch(seed):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 3, 8, np.int32)
        images = rng.normal(labels[:, None, None, None], 0.1, (8, 4, 4, 1)).astype(np.float32)
        return {"inputs": images, "targets": labels, "ids": np.arange(8, dtype=np.int32)}

    def test_it_learns_and_counts_what_is_right(self, devices):
        program = self.program(*self.VIT, "steps=30", "schedule.peak_value=0.1")
        state, history = take(program, 5, batch=self.batch)
        batch = self.batch(99) | {"where": np.arange(8) < 6}
        nats, count, correct = program.evaluate(state.params, program.put(batch))
        logits = jax.jit(program.model(state.params))(batch["inputs"])
        assert_close(nats, cross_entropy(logits, batch)[:6].sum(), rtol=1e-5)
        assert count == 6
        assert correct == np.sum((logits.argmax(-1) == batch["targets"])[:6])
        assert correct < 6
        _, more = take(program, 25, state, batch=self.batch)
        assert more[-1].loss < history[0].loss / 2

    def test_rows_are_weighed_by_the_part_of_the_data_that_they_are_from(self, devices):
        sources = ("optimizer.name=scalebio", "optimizer.num_sources=2")
        state, _ = trace_step(self.program(*self.VIT, *sources), self.batch(0))
        assert state.opt_state.outer_params.shape == (2,)

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (
                ["model.name=Transformer"],
                r"model.name=Transformer is not a model of images, which data.name=digits is: it "
                r"takes no image_shape and no num_classes",
            ),
            (
                ["loss.name=linear_softmax_cross_entropy"],
                r"loss.name=linear_softmax_cross_entropy reads the hidden states of a language "
                r"model, and model.name=ResNet is none; choose a loss of logits",
            ),
            (["model.depth=3"], r"depth must be one of .* got 3"),
            (["model.num_classes=3"], r"model.num_classes follows from the data"),
        ],
    )
    def test_what_cannot_be_is_named(self, devices, overrides, message):
        with pytest.raises(ValueError, match=message):
            self.program(*overrides)

    def test_models_of_images_do_not_read_text(self, devices):
        message = (
            r"model.name=ResNet is not a model of text, which data.name=python_stdlib is: it takes "
            r"no vocab_size and no max_length"
        )
        with pytest.raises(ConfigError, match=message):
            build(load_config(overrides=["model.name=ResNet"]), 256)


class TestComponents:
    @pytest.mark.parametrize(
        ("loss", "others", "expected"),
        [
            (
                "loss.name=poly_cross_entropy loss.epsilon=2.0",
                "model.norm.name=layer_norm model.query_key_norm.name=none",
                lambda logits, labels: losses.poly_cross_entropy(logits, labels, epsilon=2.0),
            ),
            (
                "loss.name=squentropy",
                "model.gated=true model.activation.name=silu model.positions=learned "
                "model.tie_embeddings=true model.norm_placement=post optimizer.name=lion_k "
                "optimizer.kappa=l2",
                losses.squentropy,
            ),
            (
                "loss.name=softmax_cross_entropy_with_integer_labels",
                "model.positions=none model.norm_placement=peri model.num_kv_heads=2 "
                "optimizer.name=adafactor schedule.name=cosine_decay_schedule "
                "schedule.init_value=0.1",
                optax.softmax_cross_entropy_with_integer_labels,
            ),
        ],
    )
    def test_training_with_what_is_chosen(self, tiny_config, devices, loss, others, expected):
        program = build(tiny_config(*loss.split(), *others.split()), 256)
        before = copied(program.init(jax.random.key(0)))
        batch = random_batch(0)
        logits = nnx.merge(program.graphdef, before.params)(batch["inputs"])
        after, history = take(program, 2, copied(before))
        assert_close(history[0].loss, expected(logits, batch["targets"]).mean(), rtol=1e-5)
        moved = difference(after.params, before.params)
        assert all(np.any(leaf) and np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(moved))

    def test_losses_may_ask_for_a_key(self, tiny_config, monkeypatch):
        def noisy_loss(logits, labels, *, key):
            return logits[..., 0] + labels + jax.random.uniform(key, labels.shape)

        monkeypatch.setattr(losses, "noisy_loss", noisy_loss, raising=False)
        monkeypatch.setattr(losses, "__all__", [*losses.__all__, "noisy_loss"])
        loss = build_loss(tiny_config("loss.name=noisy_loss"))
        used = []

        def model(tokens, key):
            used.append(key)
            return jnp.zeros((*tokens.shape, 4))

        batch = random_batch(0)
        first, again, other = (loss(model, batch, jax.random.key(i)) for i in (0, 0, 1))
        noise = first - batch["targets"]
        assert np.all((noise >= -1e-5) & (noise <= 1))
        assert_same_bits(again, first)
        assert not np.array_equal(other, first)
        assert not np.array_equal(
            jax.random.uniform(used[0], noise.shape), noise
        )  # the model's is another one

    def test_schedule_follows_the_number_of_steps(self, tiny_config):
        schedule = build_schedule(tiny_config("steps=200", "schedule.peak_value=0.4"))
        assert_close([schedule(i) for i in (0, 10, 20, 200)], [0, 0.2, 0.4, 0], atol=1e-6)
        assert_close(schedule(110), 0.2, atol=1e-6)
        explicit = ("schedule.warmup_steps=5", "schedule.decay_steps=50")
        schedule = build_schedule(tiny_config("steps=200", "schedule.peak_value=0.4", *explicit))
        assert_close([schedule(5), schedule(50)], [0.4, 0], atol=1e-6)
        linear = ("schedule.name=linear_schedule", "schedule.init_value=1", "schedule.end_value=0")
        schedule = build_schedule(tiny_config("steps=200", *linear))
        assert_close([schedule(50), schedule(200)], [0.75, 0])

    def test_optimizer_follows_the_schedule(self, tiny_config):
        config = tiny_config("optimizer.name=sgd", "clip_norm=0")
        method = build_method(config, lambda step: 0.1 * step)
        problem = Problem(
            token_losses=lambda params, batch, key: params @ batch,
            logits=None,
            losses_of_logits=None,
        )
        gradient = jnp.array([1.0, -2.0])
        state = method.init(gradient)
        for step in range(3):
            after = method.update(problem, gradient, state, gradient, jax.random.key(0), step)
            assert_close(after.params, (1 - 0.1 * step) * gradient, rtol=1e-6)
            assert_close([after.loss, after.gradient_norm], [5, 5**0.5])
            state = after.state

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ("optimizer.name=clip", r"optimizer.name: clip takes no learning_rate"),
            ("optimizer.name=none", r"optimizer.name: .* has no None"),
            ("optimizer.learning_rate=0.1", r"optimizer.learning_rate follows from schedule"),
            ("optimizer.b7=0.1", r"takes no argument 'b7'; did you mean b\d, b\d"),
            ("loss.epsilon=0.1", r"linear_softmax_cross_entropy takes no argument 'epsilon'"),
            ("model.max_length=8", r"model.max_length follows from length"),
            ("model.vocab_size=8", r"model.vocab_size follows from data.vocab_size"),
            ("model.dtype=bfloat16", r"model.dtype follows from dtype"),
            ("model.features=0", r"features must be in"),
            ("model.num_heads=3", r"num_heads must divide features = 16"),
            ("model.positions=absolute", r"positions must be one of .*rotary.*'absolute'"),
            ("model.dropout=1.0", r"dropout must be in \[0, 1\)"),
            ("steps=0", r"steps must be in \[1, inf\), got 0"),
            ("accumulate=0", r"accumulate must be in"),
            ("log_every=0", r"log_every must be in"),
            ("validate_every=-1", r"validate_every must be in"),
            ("checkpoint_every=0", r"checkpoint_every must be in"),
            ("max_nonfinite_steps=0", r"max_nonfinite_steps must be in"),
            ("clip_norm=-1", r"clip_norm must be in \[0, inf\)"),
            ("average_decay=1", r"average_decay must be in \[0, 1\)"),
            ("dtype=float64", r"dtype must be float32 or bfloat16, got 'float64'"),
            ("accumulate=3", r"batch_size 8 must be a multiple of accumulate = 3"),
        ],
    )
    def test_what_cannot_be_is_named(self, tiny_config, devices, overrides, message):
        with pytest.raises(ValueError, match=message):
            build(tiny_config(*overrides.split()), 256)

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ("mesh.data=3", r"mesh data=3 does not divide the 8 devices"),
            ("mesh.fsdp=3", r"does not divide the 8 devices"),
            ("mesh.data=0", r"mesh sizes must be positive, and at most one -1"),
            ("mesh.fsdp=-1", r"at most one -1"),
            ("batch_size=4", r"batch_size 4 must be a multiple of accumulate x mesh.data = 1 x 8"),
            ("mesh.tensor=8", r"'kv_heads' of size 4 cannot be split 8 ways"),
        ],
    )
    def test_meshes_that_do_not_fit(self, tiny_config, overrides, message):
        with pytest.raises(ValueError, match=message):
            build(tiny_config(*overrides.split()), 256)

    def test_configuration_errors_are_value_errors(self):
        assert issubclass(ConfigError, ValueError)


def on_mesh(tiny_config, sizes, *overrides):
    axes = [f"mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), sizes)]
    return build(tiny_config("steps=20", *axes, *overrides), 256)


class TestMesh:
    @pytest.fixture(scope="class")
    def one_device(self, tiny_config):
        """Metrics and evaluation after 20 steps on one device, by optimizer."""
        outcomes = {}

        def outcome(*overrides):
            if overrides not in outcomes:
                program = on_one_device(tiny_config("steps=20", *overrides))
                outcomes[overrides] = take(program, 20, batch=repeated_batch)
            return outcomes[overrides]

        return outcome

    @pytest.mark.parametrize(
        ("sizes", "overrides"),
        [
            ((2, 2, 2), ("accumulate=2", "average_decay=0.5", "model.dropout=0.1")),
            ((2, 2, 2), ("optimizer.name=lion", "schedule.peak_value=1e-3")),
        ],
    )
    def test_losses_are_those_of_one_device(
        self, tiny_config, one_device, compilations, sizes, overrides
    ):
        _, expected = one_device(*overrides)
        before = compilations("step")
        program = on_mesh(tiny_config, sizes, *overrides)
        state, history = take(program, 20, batch=repeated_batch)
        losses, expected_losses = ([float(m.loss) for m in h] for h in (history, expected))
        assert expected_losses[-1] < expected_losses[0] - 0.5
        np.testing.assert_allclose(losses, expected_losses, rtol=0, atol=1e-4)
        assert compilations("step") - before == 1
        assert int(state.nonfinite) == 0

    def test_parameters_and_optimizer_are_sharded(self, tiny_config):
        program = on_mesh(tiny_config, (2, 2, 2), "average_decay=0.5")
        first = program.init(jax.random.key(0))
        shards = lambda x: {shard.data.shape for shard in x.addressable_shards}
        described = jax.tree.map(lambda x: str(shards(x)), first)
        state, _ = take(program, 1, first)
        assert jax.tree.map(lambda x: str(shards(x)), state) == described
        [moments] = [
            s for s in jax.tree.leaves(state.opt_state, is_leaf=self.is_adam) if self.is_adam(s)
        ]
        for tree in (state.params, state.average, moments.mu, moments.nu):
            block = tree["blocks"][0]
            assert shards(tree["embed"]["embedding"]) == {(128, 8)}
            assert shards(block["mlp"]["function"]["up"]["kernel"]) == {(8, 16)}
            assert shards(block["mlp"]["function"]["down"]["kernel"]) == {(16, 8)}
            assert shards(block["attention"]["function"]["query"]["kernel"]) == {(8, 2, 4)}
            assert shards(tree["final_norm"]["scale"]) == {(16,)}  # norms are everywhere
        assert shards(moments.count) == {()}
        assert shards(program.put(random_batch(0))["inputs"]) == {(2, 16)}

    @staticmethod
    def is_adam(node):
        return isinstance(node, ScaleByAdamState)

    def test_same_start_on_every_mesh(self, tiny_config, devices):
        devices(8)
        everywhere = on_mesh(tiny_config, (2, 2, 2)).init(jax.random.key(3)).params
        devices(1)
        alone = on_mesh(tiny_config, (1, 1, 1)).init(jax.random.key(3)).params
        assert_close(everywhere, alone, rtol=1e-6)
