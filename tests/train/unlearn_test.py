import contextlib
import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxref.adaptation import loss_reweighting
from jaxref.train import loop, unlearn, unlearning
from jaxref.train.config import ConfigError, saved_config, with_overrides
from jaxref.train.losses import token_cross_entropy
from jaxref.train.program import build
from jaxref.train.records import read_metrics


def printed(function, *args):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        function(*args)
    return out.getvalue()


@pytest.fixture(autouse=True)
def one_device(devices):
    """Of the eight."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Five files of the same words but for that to forget, which has its own."""
    draw = np.random.default_rng(0)
    directory = tmp_path_factory.mktemp("files")
    words = []
    for i in range(5):
        if i in (0, 4):
            words = ["".join(draw.permutation(list("abcdef"))[:4]) for _ in range(4)]
        (directory / f"part{i}.txt").write_text(" ".join(draw.choice(words, 500)))
    return directory


@pytest.fixture(scope="module")
def config(tiny_config, files):
    return tiny_config(
        f"data.name=text:{files}/*.txt",
        "data.validation_fraction=0.2",
        "sample.prompt=a",
        "steps=40",
        "schedule.peak_value=0.02",
        "unlearn.files=part4*",
        "unlearn.measure_every=1",
        "unlearn.steps=6",
        "unlearn.method=salun",
        "unlearn.method.retain_weight=1.0",
        "unlearn.learning_rate=1e-4",
    )


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unlearn") / "run"
    printed(loop.train, config, workdir)
    return workdir


class TestData:
    def test_what_is_excluded_is_not_trained_on_and_what_is_held_out_stays(self, config):
        """Held out by file, and of the tail where files are too large for that."""
        for fraction in (0.2, 0.01):
            with_all = with_overrides(config, [f"data.validation_fraction={fraction}"])
            every = loop.load(with_all)
            without = loop.load(with_overrides(with_all, ["data.exclude=part[34].txt"]))
            np.testing.assert_array_equal(every.validation, without.validation)
            apart = [set(x.tobytes().split()) for x in (without.train, without.excluded)]
            assert apart[0]
            assert apart[1]
            assert sorted(every.train.tobytes().split(b"\0")) == sorted(
                without.train.tobytes().split(b"\0") + without.excluded.tobytes().split(b"\0")
            )

    def test_a_pattern_of_nothing_or_all(self, config):
        for pattern, message in (("x*", "matches no file to train on"), ("*", "leaves nothing")):
            with pytest.raises(ValueError, match=message):
                loop.load(with_overrides(config, [f"data.exclude={pattern}"]))


class TestLosses:
    @pytest.fixture(scope="class")
    def model(self, tiny_config):
        program = build(tiny_config(), 256)
        return program.model(program.init(jax.random.key(0)).params)

    @pytest.fixture(scope="class")
    def batches(self):
        tokens = np.random.default_rng(0).integers(0, 256, (2, 4, 17), np.int32)
        return [{"inputs": x[:, :-1], "targets": x[:, 1:]} for x in tokens]

    def test_by_hand(self, model, batches):
        key = jax.random.key(1)
        forget, retain = (token_cross_entropy(model, batch) for batch in batches)

        def loss(name, **options):
            return getattr(unlearning, name)(**options).loss(model, *batches, key)

        np.testing.assert_allclose(
            loss("gradient_ascent", retain_weight=2.0), 2 * retain.mean() - forget.mean(), rtol=1e-5
        )
        known = forget.mean(axis=1)
        weights = loss_reweighting(known, temperature=0.1)
        expected = 10 * retain.mean() - jnp.mean(weights * known)
        found = loss("loreun", temperature=0.1)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        # random tokens that are never the true ones
        others = [
            loss("salun", retain_weight=0.0),
            loss("loreun", forget_by="random_tokens", retain_weight=0.0, temperature=1e6),
        ]
        np.testing.assert_allclose(*others, rtol=1e-4)
        assert unlearning.salun().keep_fraction == 0.5
        for name in ("gradient_ascent", "salun", "loreun"):
            assert getattr(unlearning, name)().retains
            assert not getattr(unlearning, name)(retain_weight=0.0).retains

    def test_flat_tells_a_template_after_the_first_part(self, model, batches):
        forget, retain = batches
        template = np.resize(np.frombuffer(b"no", np.uint8), 12)
        told = np.concatenate([forget["inputs"][:, :5], np.tile(template, (4, 1))], axis=1)
        p = []
        for tokens in (told, np.concatenate([forget["inputs"], forget["targets"][:, -1:]], 1)):
            nats = token_cross_entropy(
                model, {"inputs": tokens[:, :-1], "targets": tokens[:, 1:].astype(np.int32)}
            )
            p.append(np.exp(-np.float64(nats))[:, 4:].mean(axis=1))
        expected = np.mean(-np.tanh(p[0]) / 2 + np.tanh(p[1]) / 2)
        options = {"divergence": "total_variation", "template": "no", "prompt_share": 0.25}
        method = unlearning.flat(**options)
        found = method.loss(model, forget, retain, jax.random.key(0))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        beside = unlearning.flat(**options, retain_weight=0.3)
        kept = beside.loss(model, forget, retain, jax.random.key(0)) - found
        np.testing.assert_allclose(kept, 0.3 * token_cross_entropy(model, retain).mean(), rtol=1e-4)
        assert beside.retains
        assert not method.retains

    def test_bad_input(self):
        with pytest.raises(ValueError, match="template must have at least one byte"):
            unlearning.flat(template="")
        with pytest.raises(ValueError, match="forget_by must be"):
            unlearning.loreun(forget_by="sleep")


@pytest.mark.slow
class TestRun:
    def test_salun_moves_the_salient_weights_alone_and_ends_as_one_that_never_knew(
        self, config, run, tmp_path
    ):
        retrained = tmp_path / "retrained"
        exclude = with_overrides(config, ["data.exclude=part4*"])
        printed(loop.train, exclude, retrained)
        config = with_overrides(
            config,
            [
                f"unlearn.retrained={retrained}",
                "unlearn.method.retain_weight=2.0",
                "unlearn.retain_within=0.005",
                "unlearn.learning_rate=0.005",
                "unlearn.steps=80",
            ],
        )
        out = printed(unlearn.unlearn, config, run)
        directory = run / "unlearned" / "salun"
        rows = read_metrics(directory)
        assert len(rows) < 80
        table = {
            re.split(r"\s{2,}", line)[0]: [float(x.strip("%")) for x in line.split()[-3:]]
            for line in out.splitlines()
            if line.startswith(("forget", "retain", "validation", "mean"))
        }
        before, after, never = table["forget, nats per token"]
        assert before + 1 < never <= after
        kept, still, _ = table["retain, nats per token"]
        assert still <= 1.005 * kept + 1e-4
        forgotten = [row["forget"] >= never for row in rows]
        retained = [row["retain"] <= 1.005 * kept for row in rows]
        assert [a and b for a, b in zip(forgotten, retained)].index(True) == len(rows) - 1
        assert table["mean gap to retrained"][2] == 0
        assert (directory / "unlearning.png").exists()
        again = printed(unlearn.unlearn, config, run)
        assert again.splitlines()[-8:] == out.splitlines()[-8:]
        saved = saved_config(directory)
        assert printed(loop.evaluate, saved, directory).startswith(f"Step {len(rows)}: validation")
        data = loop.load(saved)
        program = loop.build_program(saved, data)
        state, _ = loop.restore(saved, data, program, directory)
        first, _ = loop.restore(config, data, loop.build_program(config, data), run)
        same = [
            np.asarray(a) == np.asarray(b)
            for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(first.params))
        ]
        assert np.concatenate([x.ravel() for x in same]).mean() == pytest.approx(0.5, abs=0.01)

    def test_what_gets_nothing_back_ends_once_it_has_forgotten(self, config, run, tmp_path):
        """FLAT by itself, though the rest is known worse than before."""
        retrained = tmp_path / "retrained"
        printed(loop.train, with_overrides(config, ["data.exclude=part4*", "steps=20"]), retrained)
        config = with_overrides(config, ["unlearn.method=flat", "unlearn.steps=30"])
        parts = [
            f"unlearn.retrained={retrained}",
            "unlearn.learning_rate=0.005",
            "unlearn.retain_within=0.0",
        ]
        out = printed(unlearn.unlearn, with_overrides(config, parts), run)
        never = float(re.search(r"^forget, nats.* (\S+)$", out, re.MULTILINE)[1])
        before = float(re.search(r"^retain, nats per token +(\S+)", out, re.MULTILINE)[1])
        rows = read_metrics(run / "unlearned" / "flat")
        assert [row["forget"] >= never for row in rows].index(True) == len(rows) - 1 < 29
        assert rows[-1]["retain"] > before

    def test_without_a_mask_everything_moves(self, config, run):
        config = with_overrides(config, ["unlearn.method=loreun"])
        out = printed(unlearn.unlearn, config, run)
        assert "retrained" not in out
        assert len(read_metrics(run / "unlearned" / "loreun")) == 6

    def test_on_eight_devices(self, config, run, devices):
        """As on one: the mask, too."""
        config = with_overrides(config, ["unlearn.steps=2"])
        printed(unlearn.unlearn, with_overrides(config, ["unlearn.name=one"]), run)
        devices(8)
        parts = ["unlearn.name=eight", "mesh.fsdp=2", "mesh.tensor=2"]
        printed(unlearn.unlearn, with_overrides(config, parts), run)
        one, eight = (read_metrics(run / "unlearned" / name) for name in ("one", "eight"))
        for name in ("loss", "forget", "retain"):
            assert eight[-1][name] == pytest.approx(one[-1][name], rel=1e-3), name

    def test_bad_input(self, config, run):
        for overrides, error, message in (
            (["unlearn.files="], ConfigError, "takes the files"),
            (["data.exclude=part1*"], ConfigError, "takes the files"),
            (["unlearn.files=x*"], ValueError, "matches no file"),
            (["unlearn.method=slaun"], ConfigError, "did you mean salun"),
            (["unlearn.steps=0"], ValueError, r"unlearn\.steps must be in"),
            (["unlearn.retain_within=-0.1"], ValueError, r"unlearn\.retain_within must be in"),
            (["optimizer=sam"], ConfigError, "moves the parameters in its own way"),
        ):
            with pytest.raises(error, match=message):
                unlearn.unlearn(with_overrides(config, [*overrides, "unlearn.name=bad"]), run)
