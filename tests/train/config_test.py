import inspect
import json
from functools import partial

import jax
import optax
import pytest
from ml_collections import ConfigDict

import jaxref.losses
from jaxref import attention, kernels, losses, models, nn, norms, optimizers
from jaxref.train.config import (
    OPTIONAL,
    ROOMS,
    ConfigError,
    from_json,
    load_config,
    resolve,
    with_overrides,
)
from jaxref.train.configs.default import get_config

ELSEWHERE = {"optimizer.base", "optimizer.compressor", "model.final_norm", "model.conv"}
IN_DEFAULT = [section for section in ROOMS if section not in ELSEWHERE]


def load(*overrides):
    return load_config(overrides=overrides)


@pytest.fixture
def file(tmp_path):
    """`file(source)`: a Python file with it."""

    def write(source):
        path = tmp_path / "my_config.py"
        path.write_text(source)
        return path

    return write


def returning(**keys):
    return (
        f"from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({keys})\n"
    )


def test_without_arguments_it_is_the_main_jobs():
    assert load_config().to_dict() == get_config().to_dict()


class TestOverrides:
    def test_values_take_the_type_of_the_default(self):
        config = load(
            "steps=20",
            "clip_norm=2",
            "schedule.peak_value=1",
            "model.gated=true",
            "mesh.data=-1",
            "dtype=bfloat16",
        )
        assert (config.steps, config.model.gated, config.mesh.data) == (20, True, -1)
        assert isinstance(config.clip_norm, float)
        assert isinstance(config.schedule.peak_value, float)
        assert config.dtype == "bfloat16"

    @pytest.mark.parametrize("text", ["class A", "# ", "True", "none", "1e3", "[1,  2]", "'a'", ""])
    def test_strings_are_taken_as_they_are_typed(self, text):
        assert load(f"sample.prompt={text}").sample.prompt == text

    def test_new_arguments_are_literals_or_else_strings(self):
        config = load(
            "optimizer.b1=0.5", "optimizer.mu_dtype=bfloat16", "optimizer.mask=None", "loss.a=[1,2]"
        )
        assert (config.optimizer.b1, config.optimizer.mu_dtype) == (0.5, "bfloat16")
        assert config.optimizer.mask is None
        assert list(config.loss.a) == [1, 2]

    def test_later_ones_win_and_values_may_hold_an_equals_sign(self):
        config = load("steps=5", "steps=7", "data.name=text:a=b.txt")
        assert (config.steps, config.data.name) == (7, "text:a=b.txt")

    def test_a_section_may_be_given_as_a_dictionary(self):
        assert load("mesh={'fsdp': 2}").mesh == load("mesh.fsdp=2").mesh
        assert load("mesh.fsdp=2").mesh.data == -1

    def test_given_configuration_is_left_alone(self):
        config = load_config()
        assert with_overrides(config, ["steps=3"]).steps == 3
        assert config.to_dict() == get_config().to_dict()

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("stps=3", r"unknown configuration key 'stps'; did you mean steps"),
            ("optimzer.name=lion", r"unknown configuration key 'optimzer'; did you mean optimizer"),
            ("mesh.tensr=3", r"unknown configuration key 'mesh.tensr'; did you mean tensor\?"),
            ("sample.zzz=3", r"'sample.zzz'; there are cache, length, prompt, seed, temperature"),
            ("steps", r"--config.steps needs a value: --config.steps=VALUE"),
            ("steps=ten", r"steps must be int like its default 600, got 'ten'"),
            ("steps=1.5", r"steps must be int like its default 600, got 1.5"),
            ("steps=true", r"steps must be int"),
            ("steps=none", r"steps must be int"),
            ("steps.more=3", r"steps must be int"),
            ("clip_norm=big", r"clip_norm must be float like its default 1.0, got 'big'"),
            ("data.name.more=3", r"data.name must be str"),
            ("model.num_layers=2.5", r"model.num_layers must be int"),
            ("model.gated=yes", r"model.gated must be bool"),
            ("schedule.peak_value=high", r"schedule.peak_value must be float"),
            ("sample=3", r"sample is a section; set one of its keys: sample\.\w+"),
        ],
    )
    def test_what_cannot_be_is_named(self, override, message):
        with pytest.raises(ConfigError, match=message):
            load(override)

    def test_key_with_a_value_and_keys_below(self):
        with pytest.raises(ConfigError, match="'sample' is given a value of its own"):
            load("sample=3", "sample.length=4")

    def test_the_value_of_a_component_is_its_name(self):
        config = load("optimizer=lion", "optimizer.b1=0.8", "model.query_key_norm=none")
        assert config.optimizer.to_dict() == {"name": "lion", "b1": 0.8}
        assert config.model.query_key_norm.name is None


class TestFile:
    def test_overrides_win_over_the_file_and_the_file_over_the_main_job(self, file):
        path = file(returning(steps=5, seed=7, model={"num_layers": 1}))
        config = load_config(path, ["steps=9"])
        assert (config.steps, config.seed, config.model.num_layers) == (9, 7, 1)
        assert config.length == get_config().length
        assert config.model.norm.name == get_config().model.norm.name

    def test_components_of_files_drop_the_arguments_of_the_default(self, file):
        path = file(returning(optimizer={"name": "sgd", "momentum": 0.9}))
        assert load_config(path).optimizer.to_dict() == {"name": "sgd", "momentum": 0.9}
        config = load_config(path, ["optimizer.nesterov=true"])
        assert config.optimizer.to_dict() == {"name": "sgd", "momentum": 0.9, "nesterov": True}
        assert load_config(path, ["optimizer.name=lion"]).optimizer.to_dict() == {"name": "lion"}

    def test_file_may_change_the_main_jobs(self, file):
        path = file(
            "from jaxref.train.configs import default\n"
            "def get_config():\n  c = default.get_config()\n  c.steps = 3\n  return c\n"
        )
        assert load_config(path).to_dict() == get_config().to_dict() | {"steps": 3}

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("x = 1", r"must define get_config\(\) -> ml_collections.ConfigDict"),
            ("def get_config():\n  return {}", r"must define get_config\(\) -> "),
            ("def get_config(:", r"SyntaxError"),
            ("import nothing_such", r"ModuleNotFoundError: No module named 'nothing_such'"),
            ("def get_config():\n  return 1 / 0", r"ZeroDivisionError: division by zero"),
            (returning(stepz=3), r"unknown configuration key 'stepz'; did you mean steps"),
            (returning(steps="many"), r"steps must be int like its default 600, got 'many'"),
        ],
    )
    def test_bad_files(self, file, source, message):
        with pytest.raises(ConfigError, match=message):
            load_config(file(source))

    def test_files_of_the_training_program_are_found_from_anywhere(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        config = load_config("configs/digits.py", ["steps=3"])
        assert (config.data.name, config.steps) == ("digits", 3)
        assert config.sample.to_dict() == get_config().sample.to_dict()
        (tmp_path / "configs").mkdir()
        (tmp_path / "configs" / "digits.py").write_text(returning(seed=7))
        assert load_config("configs/digits.py").seed == 7  # the user's own comes first

    def test_no_such_file(self, tmp_path):
        with pytest.raises(ConfigError, match=r"--config: there is no file .*nothing.py"):
            load_config(tmp_path / "nothing.py")
        (tmp_path / "notes.txt").write_text("")
        with pytest.raises(ConfigError, match=r"notes.txt is not a Python file"):
            load_config(tmp_path / "notes.txt")


class TestComponents:
    @pytest.mark.parametrize(
        ("section", "name", "function"),
        [
            ("loss", "linear_softmax_cross_entropy", kernels.linear_softmax_cross_entropy),
            ("loss", "poly_cross_entropy", losses.poly_cross_entropy),
            ("loss", "squentropy", losses.squentropy),
            ("loss", "kl_divergence", optax.losses.kl_divergence),
            ("model.norm", "layer_norm", norms.layer_norm),
            ("model.query_key_norm", "layer_norm", norms.layer_norm),
            ("model.attention", "dot_product_attention", attention.dot_product_attention),
            ("model.activation", "silu", jax.nn.silu),
            ("model.final_norm", "batch_norm", norms.batch_norm),
            ("model.linear", "ParameterAttention", nn.ParameterAttention),
            ("model.mlp", "MixtureOfExperts", nn.MixtureOfExperts),
            ("model.conv", "WeightStandardizedConv", nn.WeightStandardizedConv),
            ("optimizer", "lion", optimizers.lion),
            ("optimizer", "lion_k", optimizers.lion_k),
            ("optimizer", "adamw", getattr(optimizers, "adamw", optax.adamw)),
            ("schedule", "constant_schedule", optax.constant_schedule),
        ],
    )
    def test_chosen_by_public_name(self, section, name, function):
        chosen = resolve(load(f"{section}.name={name}"), section)
        assert getattr(chosen, "func", chosen) is function

    def test_another_name_drops_the_defaults_arguments(self):
        config = load("schedule.name=constant_schedule", "schedule.value=0.1")
        assert config.schedule.to_dict() == {"name": "constant_schedule", "value": 0.1}
        assert resolve(config, "schedule")()(7) == 0.1

    def test_the_same_name_keeps_them(self):
        name = get_config().schedule.name
        config = load(f"schedule.name={name}", "schedule.end_value=0.1")
        assert config.schedule.to_dict() == get_config().schedule.to_dict() | {"end_value": 0.1}

    def test_any_keyword_of_the_function_is_bound(self):
        bound = resolve(load("optimizer.name=adam", "optimizer.eps_root=1e-3"), "optimizer")
        assert isinstance(bound, partial)
        assert bound.keywords == {"eps_root": 1e-3}

    def test_arguments_may_be_dictionaries(self):
        config = load(
            "schedule.name=piecewise_constant_schedule",
            "schedule.init_value=1.0",
            "schedule.boundaries_and_scales={10: 0.5}",
        )
        schedule = resolve(config, "schedule")()
        assert (schedule(9), schedule(11)) == (1.0, 0.5)

    def test_model_is_made_of_components(self):
        config = load(
            "model.norm.name=layer_norm",
            "model.norm.epsilon=1e-3",
            "model.query_key_norm.name=none",
            "model.activation.name=silu",
        )
        model = resolve(config, "model")(vocab_size=4, max_length=8)
        assert model.norm.func is norms.layer_norm
        assert model.norm.keywords == {"epsilon": 1e-3}
        assert model.query_key_norm is None
        assert model.activation is jax.nn.silu
        assert isinstance(model, models.Transformer.Config)

    def test_another_model_takes_components_too(self, monkeypatch):
        class Other:
            def __init__(self, width, norm):
                self.width, self.norm = width, norm

        monkeypatch.setattr(models, "Other", Other, raising=False)
        monkeypatch.setattr(models, "__all__", [*models.__all__, "Other"])
        config = load(
            "model.name=Other",
            "model.width=3",
            "model.norm.name=layer_norm",
            "model.norm.epsilon=1e-3",
        )
        other = resolve(config, "model")()
        assert other.width == 3
        assert other.norm.keywords == {"epsilon": 1e-3}

    def test_what_a_room_gets_can_be_chosen_at_once(self, monkeypatch):
        def brand_new_loss(logits, labels, *, strength=1.0):
            return strength

        monkeypatch.setattr(jaxref.losses, "brand_new_loss", brand_new_loss, raising=False)
        monkeypatch.setattr(jaxref.losses, "__all__", [*losses.__all__, "brand_new_loss"])
        config = load("loss.name=brand_new_loss", "loss.strength=3")
        assert resolve(config, "loss")(0, 0) == 3
        with pytest.raises(ConfigError, match="did you mean brand_new_loss"):
            resolve(load("loss.name=brandnew_loss"), "loss")

    def test_rooms_are_looked_into_before_optax(self):
        assert optimizers.lion is not optax.lion
        assert resolve(load("optimizer.name=lion"), "optimizer") is optimizers.lion

    @pytest.mark.parametrize("section", ROOMS)
    def test_unknown_name(self, section):
        with pytest.raises(ConfigError, match=rf"{section}.name: .* has no 'zzzz'; there are \w+"):
            resolve(load(f"{section}.name=zzzz"), section)

    @pytest.mark.parametrize("section", sorted(set(ROOMS) - set(OPTIONAL)))
    def test_only_norms_may_be_none(self, section):
        with pytest.raises(ConfigError, match=rf"{section}.name: .* has no None"):
            resolve(load(f"{section}.name=none"), section)

    @pytest.mark.parametrize("section", OPTIONAL)
    def test_none_is_handed_on(self, section):
        model = resolve(load(f"{section}.name=none"), "model")
        assert model.keywords[section.removeprefix("model.")] is None

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("loss.name=poly_cross_entrpy", "has no 'poly_cross_entrpy'; did you mean poly_cross"),
            ("optimizer.name=Lion", "has no 'Lion'; did you mean .*lion"),
            ("optimizer.name=__name__", "has no '__name__'"),
            ("model.norm.name=layernorm", "model.norm.name: .* did you mean layer_norm"),
            ("model.activation.name=gleu", "model.activation.name: .* did you mean .*gelu"),
            ("optimizer.weight_deacy=1", "takes no argument 'weight_deacy'; did you mean weight_d"),
            ("model.featres=1", "model.name=Transformer takes no argument 'featres'; .*features"),
            ("model.norm.eps=1", "model.norm.name=.* takes no argument 'eps'; .*epsilon"),
            ("loss.deep.er=1", "takes no argument 'deep'"),
        ],
    )
    def test_near_matches(self, override, message):
        config = load(override)
        with pytest.raises(ConfigError, match=message):
            [resolve(config, section) for section in IN_DEFAULT]

    def test_arguments_that_the_caller_gives(self):
        with pytest.raises(ConfigError, match=r"optimizer.b1 follows from the moon; set that inst"):
            resolve(load("optimizer.b1=0.1"), "optimizer", {"b1": "the moon"})

    @pytest.mark.parametrize("section", IN_DEFAULT)
    def test_defaults_exist(self, section):
        function = resolve(load_config(), section)
        assert all(
            key in inspect.signature(function).parameters
            for key in get_config()[section.split(".")[0]]
            if section == "model" and key != "name"
        )


class TestJson:
    def test_there_and_back(self):
        config = load("model.query_key_norm.name=none", "optimizer.name=lion", "optimizer.b1=0.5")
        again = from_json(json.dumps(config.to_dict()))
        assert again.to_dict() == config.to_dict()
        assert isinstance(again, ConfigDict)
        changed = with_overrides(again, ["model.query_key_norm.name=rms_norm", "steps=3"])
        assert (changed.model.query_key_norm.name, changed.steps) == ("rms_norm", 3)

    def test_what_an_older_program_did_not_write(self):
        saved = load("optimizer.name=lion", "optimizer.b1=0.5").to_dict()
        del saved["align"], saved["unlearn"]["retain_within"]
        again = from_json(json.dumps(saved))
        assert again.align.to_dict() == get_config().align.to_dict()
        assert again.unlearn.to_dict() == get_config().unlearn.to_dict()
        assert again.optimizer.to_dict() == {"name": "lion", "b1": 0.5}

    def test_damaged(self):
        with pytest.raises(ConfigError, match=r"config.json .* is not valid JSON"):
            from_json('{"steps": ')
