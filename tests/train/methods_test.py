import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxref import optimizers
from jaxref.train import methods
from jaxref.train.config import ConfigError
from jaxref.train.program import build

ROWS, LENGTH = 8, 16
BASE = ("schedule.name=constant_schedule", "schedule.value=0.01", "steps=30")

# A learning rate at which each moves within 30 steps, and what else it needs.
SETTINGS = {
    "sgdw": "schedule.value=0.3",
    "sgdwr": "schedule.value=0.3",
    "sgdp": "schedule.value=0.3",
    "ef14": "optimizer.compressor.name=sign_compressor",
    "momo": "schedule.value=1.0",
    "momentum_8bit": "schedule.value=0.3",
    "exadam": "schedule.value=0.001",
    "distillation_oriented": "schedule.value=0.1",
    "fisher_newton": "schedule.value=1.0",
    "spsa": "schedule.value=3e-4 optimizer.num_samples=8",
    "target_surrogates": "schedule.value=2.0",
    "saf": "optimizer.start_epoch=0 optimizer.lag=1",
}


def is_optimizer(function):
    if not inspect.isfunction(function):
        return False
    signature = inspect.signature(function)
    returned = signature.return_annotation
    return (
        "learning_rate" in signature.parameters
        and isinstance(returned, type)
        and issubclass(returned, optax.GradientTransformation)
    )


# All that the room has, and the methods; a transformation that needs a second gradient is one of
# those.
OPTIMIZERS = sorted(
    {name for name in optimizers.__all__ if is_optimizer(getattr(optimizers, name))}
    | set(methods.__all__)
)
OPTIMIZERS.remove("distillation_oriented_sgd")


def batch(seed):
    """Bytes that can be learnt: each follows from the one before. Every row has its own id."""
    start = np.random.default_rng(seed).integers(0, 7, (ROWS, 1))
    tokens = (100 + (start + np.arange(LENGTH + 1)) % 7).astype(np.int32)
    ids = np.arange(ROWS, dtype=np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "ids": ids}


def program_of(tiny_config, name, *overrides):
    settings = SETTINGS.get(name, "").split()
    return build(tiny_config(*BASE, f"optimizer.name={name}", *settings, *overrides), 256, ROWS)


def take(program, steps):
    """The state after some steps, and the losses."""
    state, losses = program.init(jax.random.key(0)), []
    for i in range(steps):
        state, metrics = program.step(state, program.put(batch(i)))
        losses.append(float(metrics.loss))
    return state, losses


def assert_close(actual, expected, **tolerance):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, **tolerance), actual, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_the_main_job(tiny_config, devices, name):
    state, losses = take(program_of(tiny_config, name), 30)
    assert state.nonfinite == 0
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - (0.01 if name == "spsa" else 0.1)


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("sam", "optimizer.rho=0"),
        ("saf", "optimizer.weight=0"),
        ("mesa", "optimizer.weight=0"),
        ("ef21", "optimizer.compressor.name=identity_compressor"),
        ("ef14", "optimizer.compressor.name=identity_compressor"),
    ],
)
def test_without_its_own_part_a_method_is_its_base(tiny_config, devices, name, off):
    devices(8 if name.startswith("ef") else 1)
    base = ("optimizer.base.name=lion", "optimizer.base.weight_decay=0.1")
    ours, _ = take(program_of(tiny_config, name, *off.split(), *base, "mesh.data=-1"), 3)
    plain = program_of(tiny_config, "lion", "optimizer.weight_decay=0.1", "mesh.data=-1")
    assert_close(ours.params, take(plain, 3)[0].params, rtol=1e-4, atol=1e-5)


def test_distillation_without_a_gap_or_a_teacher_is_sgd(tiny_config, devices):
    off = ("optimizer.delta=0", "optimizer.weight=0", "optimizer.weight_decay=0", "clip_norm=0")
    ours, _ = take(program_of(tiny_config, "distillation_oriented", *off), 3)
    sgd = program_of(
        tiny_config, "sgd", "schedule.value=0.1", "optimizer.momentum=0.9", "clip_norm=0"
    )
    assert_close(ours.params, take(sgd, 3)[0].params, rtol=1e-4, atol=1e-5)


class TestDevices:
    def test_sam_on_each_device_is_sam_on_each_micro_batch(self, tiny_config, devices):
        """Eight devices with a row each, and one device that takes the rows one after the other."""
        devices(8)
        settings = ("optimizer.rho=0.5", "optimizer.base.name=sgd", "schedule.value=0.3")
        each = program_of(tiny_config, "sam", "optimizer.per_device=True", "mesh.data=8", *settings)
        ours, _ = take(each, 3)
        devices(1)
        one_by_one, _ = take(program_of(tiny_config, "sam", "accumulate=8", *settings), 3)
        together, _ = take(program_of(tiny_config, "sam", *settings), 3)
        assert_close(ours.params, one_by_one.params, rtol=1e-4, atol=1e-5)
        largest = lambda a, b: max(
            float(jnp.max(jnp.abs(x - np.asarray(y))))
            for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params))
        )
        assert largest(one_by_one, together) > 1e-3

    def test_error_feedback_exchanges_messages_and_keeps_states_apart(self, tiny_config, devices):
        devices(8)
        top_k = ("optimizer.compressor.name=top_k_compressor", "optimizer.compressor.k=0.01")
        program = program_of(tiny_config, "ef21", "mesh.data=8", *top_k)
        state, losses = take(program, 20)
        assert losses[-1] < losses[0] - 0.3
        text = program.step.lower(state, program.put(batch(0))).compile().as_text()
        sizes = {
            collective: sum(
                np.prod([int(n) for n in shape.split(",") if n], dtype=int)
                for line in re.findall(rf"= (.*) {collective}\(", text)
                for shape in re.findall(r"\w+\[([\d,]*)\]", line)
            )
            for collective in ("all-reduce", "all-gather")
        }
        entries = sum(x.size for x in jax.tree.leaves(state.params))
        assert sizes["all-reduce"] < 100  # loss, and norms by leaf
        assert sizes["all-gather"] < 0.3 * entries  # a hundredth, twice, of eight devices
        clients = state.opt_state[0].client
        for leaf, param in zip(jax.tree.leaves(clients), jax.tree.leaves(state.params)):
            assert leaf.shape == (8, *param.shape)
            assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {1}

    def test_spsa_on_devices_exchanges_bytes(self, tiny_config, devices):
        devices(8)
        program = program_of(tiny_config, "spsa", "mesh.data=8", "optimizer.num_samples=1")
        state, _ = take(program, 2)
        text = program.step.lower(state, program.put(batch(0))).compile().as_text()
        assert re.findall(r"= (\S+) all-gather\(", text) == ["u8[8]{0}"] or re.search(
            r"u8\[8,1\]\S* all-gather\(", text
        )
        for leaf in jax.tree.leaves(state.params):
            shards = [np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards]
            assert len(set(shards)) == 1

    def test_saf_splits_its_memory_and_fills_it_up(self, tiny_config, devices):
        devices(8)
        program = program_of(tiny_config, "saf", "mesh.data=4", "mesh.fsdp=2")
        memory = take(program, 2)[0].opt_state.past
        assert {shard.data.shape for shard in memory.logits.addressable_shards} == {
            (1, 1, LENGTH, 256)
        }

    @pytest.mark.parametrize("name", ["spsa", "sam"])
    def test_whole_parameters_are_asked_for(self, tiny_config, devices, name):
        devices(8)
        per_device = ("optimizer.per_device=True",) if name == "sam" else ()
        program = program_of(tiny_config, name, "mesh.data=4", "mesh.fsdp=2", *per_device)
        with pytest.raises(ValueError, match=r"whole parameters on each.*got \{'fsdp': 2\}"):
            take(program, 1)


def test_saf_follows_the_epochs(tiny_config, devices):
    """Each epoch is one step here: the term is off until outputs of `lag` epochs ago exist."""
    setting = ("optimizer.lag=2", "optimizer.start_epoch=-1", "optimizer.weight=100")
    near, _ = take(program_of(tiny_config, "saf", *setting), 2)
    far, _ = take(program_of(tiny_config, "saf", *setting, "optimizer.weight=0"), 2)
    assert_close(near.params, far.params, rtol=0, atol=1e-6)
    near, _ = take(program_of(tiny_config, "saf", *setting), 4)
    far, _ = take(program_of(tiny_config, "saf", *setting, "optimizer.weight=0"), 4)
    with pytest.raises(AssertionError):
        assert_close(near.params, far.params, rtol=0, atol=1e-4)


def test_scalebio_weighs_parts_of_the_corpus(tiny_config, devices):
    """Half of the corpus is noise in training; validation rows are always clean."""
    setting = ("optimizer.num_sources=2", "optimizer.outer_learning_rate=0.1")
    program = program_of(tiny_config, "scalebio", *setting)
    state = program.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    for i in range(60):
        data = batch(i)
        noisy = (np.arange(ROWS) >= 4) & (np.arange(ROWS) % 4 != 0)
        noise = rng.integers(0, 256, (ROWS, LENGTH), np.int32)
        data["targets"] = np.where(noisy[:, None], noise, data["targets"])
        state, _ = program.step(state, program.put(data))
    clean, noise = jax.nn.softmax(state.opt_state.outer_params)
    assert clean > 0.6 > noise


@pytest.mark.parametrize("name", ["ef21", "spsa"])
def test_devices_cut_their_rows_into_micro_batches(tiny_config, devices, name):
    devices(2)
    setting = ("mesh.data=2", "clip_norm=0", *SETTINGS.get(name, "").split())
    setting += ("optimizer.base.name=sgd",) if name == "ef21" else ("optimizer.num_samples=1",)
    whole, _ = take(program_of(tiny_config, name, *setting), 2)
    cut, _ = take(program_of(tiny_config, name, *setting, "accumulate=2"), 2)
    assert_close(cut.params, whole.params, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("compressor", ["rand_k_compressor", "natural_compressor"])
def test_compressors_that_draw_have_a_key(tiny_config, devices, compressor):
    k = ("optimizer.compressor.k=0.2",) if compressor == "rand_k_compressor" else ()
    setting = (f"optimizer.compressor.name={compressor}", *k)
    one, losses = take(program_of(tiny_config, "ef21", *setting), 10)
    assert losses[-1] < losses[0] - 0.1
    other, _ = take(program_of(tiny_config, "ef21", *setting, "optimizer.seed=1"), 10)
    with pytest.raises(AssertionError):
        assert_close(one.params, other.params, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("spsa", "optimizer.num_samples=3", "num_samples must divide the 8 rows.*got 3"),
        ("spsa", "optimizer.num_samples=0", "num_samples must be in .*got 0"),
        ("scalebio", "optimizer.outer_every=3", "outer_every must divide the batch size 8, got 3"),
        ("scalebio", "optimizer.outer_learning_rate=-1", "outer_learning_rate must be in .*-1"),
        ("distillation_oriented", "optimizer.weight=-1", "weight must be in .*got -1"),
    ],
)
def test_bad_input_of_methods_is_named(tiny_config, devices, name, setting, message):
    with pytest.raises(ValueError, match=message):
        take(program_of(tiny_config, name, *setting.split()), 1)


def test_methods_that_remember_examples_ask_how_many(tiny_config, devices):
    with pytest.raises(ValueError, match="num_examples must be given for saf, got None"):
        build(tiny_config("optimizer.name=saf"), 256)


@pytest.mark.parametrize("name", ["saf", "target_surrogates", "scalebio", "fisher_newton"])
def test_methods_that_need_the_whole_batch_say_so(tiny_config, devices, name):
    program = program_of(tiny_config, name, "accumulate=2")
    with pytest.raises(ValueError, match=f"accumulate must be 1 with optimizer.name={name}"):
        take(program, 1)


def test_saf_says_when_the_corpus_is_too_large(tiny_config, devices):
    with pytest.raises(ValueError, match=r"max_memory must be at least 2.46e\+12 bytes a device"):
        build(tiny_config("optimizer.name=saf"), 256, 10**8)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("optimizer.name=sam optimizer.base.name=adamv", r"optimizer.base.name: .* adamw"),
        ("optimizer.name=sam optimizer.base.b3=1", r"optimizer.base.*name"),
        ("optimizer.name=sam optimizer.rhho=1", r"takes no argument 'rhho'; did you mean rho"),
        ("optimizer.name=sam optimizer.mesh=1", r"optimizer.mesh follows from the run"),
        ("optimizer.name=ef21 optimizer.compressor.name=top_k", r"did you mean .*top_k_compressor"),
    ],
)
def test_mistakes_in_the_configuration_are_named(tiny_config, devices, overrides, message):
    with pytest.raises(ConfigError, match=message):
        build(tiny_config(*overrides.split()), 256, ROWS)


def test_losses_that_read_logits_are_used_as_they_are(tiny_config, devices):
    program = program_of(
        tiny_config,
        "mesa",
        "loss.name=squentropy",
        "optimizer.weight=0",
        "optimizer.base.name=lion",
    )
    plain = program_of(tiny_config, "lion", "loss.name=squentropy")
    ours, theirs = take(program, 3), take(plain, 3)
    assert_close(ours[0].params, theirs[0].params, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5)
