import contextlib
import csv
import io
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from jaxref.nn import Linear, QuantizedLinear, collect_hessians
from jaxref.quantization import QTensor
from jaxref.train import loop, program, quantize
from jaxref.train.checkpoints import CheckpointError
from jaxref.train.config import ConfigError, with_overrides
from jaxref.train.configs.default import get_config
from jaxref.train.quantized import directory, load_quantized, run_quantized, save_quantized
from jaxref.train.quantizers import QUANTIZERS, checkpoint_name, quantizer

GPTQ = ("quantize.method=gptq", "quantize.block_size=8", "quantize.calibration_batches=2")


def printed(function, *args):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        function(*args)
    return out.getvalue()


def options_of(method, **options):
    config = get_config().quantize
    config.update(method=method, **options)
    return config


def compile_with_little_effort():
    """A third of the time, of which this file would take much: `compile_quickly` undoes it."""
    jax.config.update("jax_disable_most_optimizations", True)


@contextlib.contextmanager
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        make_mesh = program.make_mesh
        patch.setattr(program, "make_mesh", lambda sizes, _: make_mesh(sizes, jax.devices()[:1]))
        compile_with_little_effort()
        yield


@pytest.fixture(autouse=True)
def one_device_quickly(devices, compile_quickly):
    """All of this file is on the first of the eight devices."""
    compile_with_little_effort()


@pytest.fixture(scope="module")
def config(tiny_config):
    # All kernels of one shape: each method is compiled once.
    return tiny_config("average_decay=0.5", "model.mlp_features=16", *GPTQ)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """The working directory of a trained run with a quantized model, and what that printed."""
    workdir = tmp_path_factory.mktemp("quantize") / "run"
    with one_device():
        printed(loop.train, config, workdir)
        return workdir, printed(quantize.quantize, config, workdir)


@pytest.fixture(scope="module")
def trained(config, run):
    """The run's data, its program and its model."""
    data = loop.load(config)
    with one_device():
        built = loop.build_program(config, data)
    state, _ = loop.restore(config, data, built, run[0])
    return data, built, lambda: built.model(state.average, state.model_state)


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


class TestMode:
    def test_a_model_that_writes_nothing_is_timed_as_it_reads(self, tiny_config, tmp_path):
        config = tiny_config("objective=electra", *GPTQ)
        printed(loop.train, config, tmp_path)
        assert "tokens/s" in printed(quantize.quantize, config, tmp_path)
        (path,) = (tmp_path / "quantized").glob("*/result.json")
        result = json.loads(path.read_text())
        assert min(result["speed_before"], result["speed_after"]) > 0

    def test_what_is_written_and_printed(self, config, run):
        workdir, out = run
        name = "gptq-4bit-block_size=8-calibration_batches=2"
        path = workdir / "quantized" / name
        assert path == directory(workdir, config.quantize)
        assert out.startswith(f"Quantized model: {path}\n")
        result = json.loads((path / "result.json").read_text())
        row = out.splitlines()[-1].split()
        assert row[0] == name
        # 4 bits, and 32 of a scale for every 8 inputs
        assert (row[1], row[2]) == ("8.00", "25.0%")
        assert (result["matrices"], result["weights"]) == (7, 7 * 16 * 16)
        assert row[3].replace(",", "") == str(result["bytes_on_disk"])
        files = [p for p in (path / "1" / "state").rglob("*") if p.is_file()]
        assert result["bytes_on_disk"] == sum(p.stat().st_size for p in files)
        assert result["loss_after"] != result["loss_before"]
        assert abs(result["loss_after"] / result["loss_before"] - 1) < 0.05
        assert result["speed_unit"] == "tokens/s"
        assert min(result["speed_before"], result["speed_after"]) > 0
        with (workdir / "quantized" / "table.csv").open() as file:
            [line] = csv.DictReader(file)
        assert (line["name"], float(line["loss_after"])) == (name, result["loss_after"])

    def test_evaluating_and_sampling_run_what_was_written(self, config, run):
        workdir, _ = run
        path = directory(workdir, config.quantize)
        result = json.loads((path / "result.json").read_text())
        described = printed(loop.evaluate, config, workdir)
        expected = f"Step 12, {path.name}: validation {result['loss_after']:.3f} nats / "
        assert described.startswith(expected)
        plain = with_overrides(config, ["quantize.method="])
        assert printed(loop.evaluate, plain, workdir).startswith(
            f"Step 12: validation {result['loss_before']:.3f} nats / "
        )
        sampled = printed(loop.print_sample, config, workdir)
        assert sampled.startswith("the ")
        assert printed(loop.print_sample, config, workdir) == sampled

    def test_restored_bit_for_bit_and_evaluated_as_in_memory(self, config, run, trained):
        data, built, model = trained
        unseen = data._replace(validation=data.validation[:0])  # calibration does not look at it
        made = quantize.quantized_model(config, unseen, built, model())
        restored, step = load_quantized(directory(run[0], config.quantize), built)
        assert step == 12
        assert_same_bits(*(nnx.to_pure_dict(nnx.state(model)) for model in (restored, made)))
        layer = restored.blocks[0].mlp.function.up
        assert isinstance(layer, QuantizedLinear)
        assert isinstance(layer.weight.get_value(), QTensor)
        assert type(restored.output) is Linear  # read by the loss
        in_memory = run_quantized(built, made, step)
        loss = loop.Validation(config, data, in_memory[0]).loss(in_memory[1])
        written = json.loads(next((run[0] / "quantized").glob("*/result.json")).read_text())
        assert loss == written["loss_after"]

    @pytest.mark.parametrize("method", sorted({*QUANTIZERS} - {"gptq", "round_to_nearest"}))
    def test_every_method_there_and_back(self, config, trained, tmp_path, method):
        data, built, model = trained
        section = options_of(method)
        _, options = quantizer(section)
        for name, value in (("calibration_batches", 1), ("calibration_rows", 16), ("steps", 20)):
            if name in checkpoint_name_keys(method):
                options[name] = value
        if method == "power":
            options.low_rank = 2
        changed = config.copy_and_resolve_references()
        changed.quantize = options
        made = quantize.quantized_model(changed, data, built, model())
        assert save_quantized(tmp_path / "model", made, step=3, config=changed) > 0
        restored, step = load_quantized(tmp_path / "model", built)
        assert step == 3
        assert_same_bits(*(nnx.to_pure_dict(nnx.state(m)) for m in (restored, made)))
        layer = restored.blocks[0].attention.function.query
        assert layer.activations == QUANTIZERS[method].activations
        kernel, expected = (
            np.asarray(m.blocks[0].attention.function.query.kernel[...])
            for m in (restored, model())
        )
        error = np.linalg.norm(kernel - expected) / np.linalg.norm(expected)
        assert error < {2: 0.7, 4: 0.3, 8: 0.05}[options.bits]

    def test_gptq_makes_up_for_the_errors_of_rounding(self, config, trained):
        """On inputs that are nearly in a plane, through all of the path."""
        data, built, model = trained

        def correlated():
            made = model()
            table = made.embed.embedding
            directions = jax.random.normal(jax.random.key(0), (2, table.shape[1]))
            table[...] = jax.random.normal(jax.random.key(1), (table.shape[0], 2)) @ directions
            return made

        tokens = jnp.asarray(data.validation[:256], jnp.int32).reshape(16, 16)
        states = jax.jit(lambda m: m.hidden(tokens))
        expected, errors = states(correlated()), {}
        for method in ("gptq", "round_to_nearest"):
            changes = [f"quantize.method={method}", "quantize.bits=3", "quantize.block_size=0"]
            if method != "gptq":
                changes += ["quantize.calibration_batches=32"]
            changed = with_overrides(config, changes)
            made = quantize.quantized_model(changed, data, built, correlated())
            errors[method] = float(jnp.mean(jnp.square(states(made) - expected)))
        assert errors["gptq"] < 0.7 * errors["round_to_nearest"]


def checkpoint_name_keys(method):
    needs = QUANTIZERS[method].needs
    calibration = {None: set(), "moments": {"calibration_batches"}}.get(
        needs, {"calibration_batches", "calibration_rows"}
    )
    return {*QUANTIZERS[method].options, *calibration}


class TestCrashes:
    @pytest.fixture
    def copy(self, run, tmp_path):
        return shutil.copytree(run[0], tmp_path / "copy")

    def test_a_half_written_model_is_not_chosen(self, config, copy, trained):
        path = directory(copy, config.quantize)
        half = path / f"2{ocp.utils.TMP_DIR_SUFFIX}0"
        shutil.copytree(path / "1", half)
        shutil.rmtree(half / "manifest")
        (half / "state" / "manifest.ocdbt").unlink()
        _, built, _ = trained
        restored, _ = load_quantized(path, built)
        shutil.rmtree(path / "1")
        with pytest.raises(CheckpointError, match="holds no quantized model gptq-4bit"):
            load_quantized(path, built)
        save_quantized(path, restored, step=12, config=config)
        assert sorted(p.name for p in path.iterdir()) == ["1", "result.json"]

    def test_a_new_model_takes_the_place_of_the_old_one(self, config, copy, trained):
        path = directory(copy, config.quantize)
        restored, _ = load_quantized(path, trained[1])
        save_quantized(path, restored, step=13, config=config)
        assert sorted(p.name for p in path.iterdir()) == ["2", "result.json"]
        assert load_quantized(path, trained[1])[1] == 13

    def test_damage_is_found(self, config, copy, trained):
        path = directory(copy, config.quantize)
        manifest = path / "1" / "manifest" / "metadata"
        manifest.write_text(manifest.read_text().replace('"bits": 4', '"bits": 3', 1))
        with pytest.raises(CheckpointError, match="manifest is not what was written"):
            load_quantized(path, trained[1])

    def test_of_another_model(self, config, copy, tiny_config, trained):
        path = directory(copy, config.quantize)
        wider = loop.build_program(tiny_config("model.features=32"), trained[0])
        with pytest.raises(ValueError, match="is of another state"):
            load_quantized(path, wider)


class TestConfiguration:
    def test_names(self):
        assert checkpoint_name(options_of("gptq")) == "gptq-4bit"
        assert checkpoint_name(options_of("round_to_nearest")) == "round_to_nearest-8bit"
        named = checkpoint_name(options_of("nupes", bits=3, block_size=0, low_rank=4))
        assert named == "nupes-3bit-block_size=0-low_rank=4"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"method": "gtpq"}, r"quantize.method: there is no 'gtpq'; did you mean gptq"),
            ({"method": "int8", "bits": 4}, r"quantize.bits: int8 has 8, got 4"),
            ({"method": "lnq", "bits": 9}, r"quantize.bits: lnq has 2, 3, 4, got 9"),
            (
                {"method": "lnq", "block_size": 32},
                r"quantize.block_size has no meaning for lnq, which reads quantize.bits, ",
            ),
        ],
    )
    def test_what_cannot_be_is_named(self, options, message):
        with pytest.raises(ConfigError, match=message):
            checkpoint_name(options_of(**options))

    def test_a_model_that_is_not_there(self, config, run):
        other = with_overrides(config, ["quantize.bits=3"])
        message = r"holds no quantized model gptq-3bit.*, but gptq-4bit.*; --mode=quantize with "
        with pytest.raises(CheckpointError, match=message):
            loop.evaluate(other, run[0])

    def test_no_method(self, config, run):
        with pytest.raises(ConfigError, match=r"needs a method: --config.quantize.method=gptq"):
            quantize.quantize(with_overrides(config, ["quantize.method="]), run[0])

    def test_scanned_layers_are_taken_apart_and_calibrated_in_turn(self, tiny_config, monkeypatch):
        """Each with those before it quantized already."""
        scanned = ("model.num_layers=2", "model.scan_layers=true", "model.mlp_features=16")
        config = tiny_config(*scanned, *GPTQ)
        data = loop.load(config)
        built = loop.build_program(config, data)
        model, seen = built.model(built.init(jax.random.key(0)).params), []

        def watched(model, *args, **kwargs):
            seen.append([type(block.mlp.function.up).__name__ for block in model.blocks])
            return collect_hessians(model, *args, **kwargs)

        monkeypatch.setattr(quantize, "collect_hessians", watched)
        made = quantize.quantized_model(config, data, built, model)
        assert seen == [["Linear", "Linear"], ["QuantizedLinear", "Linear"]]
        assert [type(b.mlp.function.up).__name__ for b in made.blocks] == ["QuantizedLinear"] * 2
        assert [block.depth for block in made.blocks] == [None, None]

    def test_the_table(self):
        numbers = (14, 786432, 4.5, 0.1406, 600000, 1.4208, 1.4278, 400.2, 380.4, "tokens/s", 9.0)
        result = quantize.Result("gptq-4bit", 600, *numbers)
        header, row = quantize.table([result]).splitlines()
        assert re.split(r"\s{2,}", row) == [
            *("gptq-4bit", "4.50", "14.1%", "600,000", "1.4208 -> 1.4278", "+0.49%", "400 -> 380")
        ]
        assert len(header) == len(row)
        assert header.split()[-1] == "tokens/s"
