import contextlib
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxref import losses
from jaxref.train import align, alignment, continuation, loop, rewards
from jaxref.train.config import ConfigError, saved_config, with_overrides
from jaxref.train.records import read_metrics
from jaxref.train.rewards import parses

BASE = (
    "length=48",
    "sample.prompt=def ",
    "align.prompt_length=24",
    "align.steps=3",
    "align.prompts=2",
    "align.samples=8",
    "align.validation_samples=24",
)


def printed(function, *args):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        function(*args)
    return out.getvalue()


class TestRewards:
    def test_definitions_that_end_and_that_do_not(self):
        header = b"def f(x, y):\n"
        for text, end, reward in (
            (b"    return x\n\n\ndef g(", 15, 1),
            (b"    return x\nimport y", 13, 1),
            (b"    return x\n    retu", None, 1),
            (b"    return x +\n\n\ndef g(", 17, 0),
            (b"    return x\0more", 12, 1),
            (b"return x\n", 0, 0),
            (b"    '''never closed\n", None, 0),
            (b"    x = 1\n  y = 2\n", None, 0),
            (b"\xff\xfe", 0, 0),
            (b"    '\\d'\n", None, 1),
            (b"    " + b"(" * 300 + b"\n", None, 0),
            (b"", None, 0),
        ):
            assert rewards.body_length(text) == end, text
            assert parses(header, text) == reward, text

    def test_headers_are_complete_lines_of_the_first_column(self):
        text = b"x\ndef f(a,\n  b):\n    def g():\nclass A:\nclass Long(Name):\ndef h(): return\n"
        assert rewards.definition_headers(text, 10) == [b"class A:\n"]


def rollouts(seed=0, prompts=3, samples=4, length=6):
    rng = np.random.default_rng(seed)
    rows = prompts * samples
    old = rng.normal(-2, 0.5, size=(rows, length))
    return {
        "where": np.arange(length) < rng.integers(1, length + 1, size=(rows, 1)),
        "rewards": rng.integers(0, 2, rows).astype("f"),
        "old_log_probs": old.astype("f"),
        "reference_log_probs": (old + rng.normal(0, 0.2, size=old.shape)).astype("f"),
        "progress": np.full(rows, 1.0, "f"),
    }


def policy(batch, seed=1):
    rng = np.random.default_rng(seed)
    log_probs = batch["old_log_probs"] + rng.normal(0, 0.3, size=batch["where"].shape)
    return log_probs.astype("f"), rng.uniform(0.1, 2, size=log_probs.shape).astype("f")


def of_groups(batch, samples=4):
    """GRPO's advantages, by hand."""
    groups = np.float64(batch["rewards"]).reshape(-1, samples)
    deviation = groups.std(axis=1, ddof=1, keepdims=True)
    return ((groups - groups.mean(axis=1, keepdims=True)) / (deviation + 1e-6)).ravel()


class TestLosses:
    def test_grpo_by_hand(self):
        batch = rollouts()
        log_probs, entropy = policy(batch)
        found = alignment.grpo(samples=4, beta=0.5).loss(log_probs, entropy, batch)
        total = 0.0
        for i, advantage in enumerate(of_groups(batch)):
            where = batch["where"][i]
            ratio = np.exp(np.float64(log_probs[i]) - batch["old_log_probs"][i])
            surrogate = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
            d = np.float64(batch["reference_log_probs"][i]) - log_probs[i]
            total += np.mean((-surrogate + 0.5 * (np.exp(d) - d - 1))[where])
        np.testing.assert_allclose(found, total / 12, rtol=1e-5)

    def test_f_dpo_is_the_mean_over_all_pairs_of_a_prompt(self):
        batch = rollouts()
        log_probs, entropy = policy(batch)
        ours, reference = (
            np.sum(np.float64(x), axis=1, where=batch["where"])
            for x in (log_probs, batch["reference_log_probs"])
        )
        expected = [
            -np.log(scipy.special.expit(0.3 * (ours[i] - reference[i] - ours[j] + reference[j])))
            for i in range(12)
            for j in range(12)
            if i // 4 == j // 4 and batch["rewards"][i] > batch["rewards"][j]
        ]
        found = alignment.dpo(samples=4, beta=0.3).loss(log_probs, entropy, batch)
        np.testing.assert_allclose(found, np.mean(expected), rtol=1e-5)
        other = alignment.f_dpo(samples=4, beta=0.3, divergence="jensen_shannon")
        assert abs(other.loss(log_probs, entropy, batch) - found) > 1e-3

    def test_d3s_ends_as_the_mean_over_all_tokens_and_starts_from_few(self):
        batch = rollouts()
        log_probs, entropy = policy(batch)
        loss = alignment.d3s(samples=4).loss
        every = losses.clipped_policy_loss(
            log_probs,
            batch["old_log_probs"],
            of_groups(batch)[:, None].astype("f"),
            where=batch["where"],
        )
        expected = every[batch["where"]].mean()
        np.testing.assert_allclose(loss(log_probs, entropy, batch), expected, rtol=1e-5)
        at_first = batch | {"progress": np.zeros(12, "f")}
        slope = jax.grad(loss)(log_probs, entropy, at_first)
        assert np.sum(np.any(slope != 0, axis=1)) <= 3  # a quarter of the rollouts

    def test_hapo_and_pcpg_are_those_of_their_advantages(self):
        batch = rollouts()
        log_probs, entropy = policy(batch)
        options = {"clip_strength": 0.0, "advantage_strength": 0.0, "dual_clip": None}
        found = alignment.hapo(samples=4, **options).loss(log_probs, entropy, batch)
        of_tokens = losses.token_level_group_advantage(
            batch["rewards"], np.arange(12) // 4, num_groups=3, where=batch["where"]
        )
        plain = losses.clipped_policy_loss(
            log_probs, batch["old_log_probs"], of_tokens, where=batch["where"]
        )
        np.testing.assert_allclose(found, plain[batch["where"]].mean(), rtol=1e-5)
        single = alignment.pcpg(samples=4, kernel_size=1, stride=1)
        expected = np.sum(-log_probs * of_groups(batch)[:, None], axis=1, where=batch["where"])
        found = single.loss(log_probs, entropy, batch)
        np.testing.assert_allclose(found, expected.mean(), rtol=1e-4)

    @pytest.mark.parametrize("method", ["grpo", "hapo", "d3s", "pcpg", "dpo", "f_dpo"])
    def test_nothing_is_learned_from_rewards_that_are_alike(self, method):
        batch = rollouts()
        batch |= {"rewards": np.ones(12, "f"), "reference_log_probs": batch["old_log_probs"]}
        where = batch["where"].copy()
        where[0] = False  # nothing was written
        entropy = policy(batch)[1]
        loss = getattr(alignment, method)(samples=4).loss
        value, slope = jax.value_and_grad(loss)(
            batch["old_log_probs"], entropy, batch | {"where": where}
        )
        np.testing.assert_allclose(value, 0, atol=1e-6)
        np.testing.assert_allclose(slope, 0, atol=1e-6)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A file of definitions."""
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("source") / "source.py"
    names = ["first", "total", "mean", "of"]
    bodies = [f"def {draw.choice(names)}(x):\n    return x + {i % 9}\n\n\n" for i in range(600)]
    path.write_text("".join(bodies))
    return path


@pytest.fixture(scope="module")
def config(tiny_config, source):
    return tiny_config(*BASE, f"data.name=text:{source}", "steps=8", "average_decay=0.5")


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """The working directory of a trained run."""
    workdir = tmp_path_factory.mktemp("align") / "run"
    printed(loop.train, config, workdir)
    return workdir


@pytest.fixture(autouse=True)
def even_bytes(devices, monkeypatch):
    """On one of eight devices, rewarded for an even first byte: that is learned in a few steps."""
    monkeypatch.setattr(rewards, "parses", lambda header, text: float(text[0] % 2 == 0))


@pytest.mark.slow
class TestRun:
    def test_a_reward_is_learned_and_the_run_is_one_of_its_own(self, config, run):
        config = with_overrides(config, ["align.steps=12", "align.learning_rate=0.03"])
        out = printed(align.align, config, run)
        directory = run / "aligned" / "grpo"
        rows = read_metrics(directory)
        assert [row["step"] for row in rows] == list(range(1, 13))
        assert rows[0]["divergence"] == pytest.approx(0, abs=1e-4)
        assert rows[-1]["divergence"] > 0.05
        assert np.mean([row["reward"] for row in rows[-4:]]) > 0.8
        assert (directory / "alignment.png").exists()
        assert (directory / "samples.txt").read_text().startswith("# before\ndef ")
        before, after = (float(x[:-1]) for x in out.split("headers")[1].split()[:2])
        assert before < 70 < after
        again = printed(align.align, config, run)
        assert again.splitlines()[-1] == out.splitlines()[-1]
        shown = printed(loop.evaluate, saved_config(directory), directory)
        assert shown.startswith("Step 12: validation")
        with pytest.raises(ValueError, match=r"align\.prompts: workdir has 2, you asked for 3"):
            align.align(with_overrides(config, ["align.prompts=3"]), run)

    def test_one_that_was_ended_continues_as_if_it_was_not(self, config, run, monkeypatch):
        """With the scale of the last step's entropies, which hapo draws by."""
        config = with_overrides(config, ["align.method=hapo"])
        printed(align.align, with_overrides(config, ["align.name=whole"]), run)

        @contextlib.contextmanager
        def after_two():
            yield lambda step: step == 2

        with monkeypatch.context() as patch:
            patch.setattr(continuation, "termination", after_two)
            out = printed(align.align, with_overrides(config, ["align.name=parts"]), run)
        assert out.startswith("Terminated and saved in")
        printed(align.align, with_overrides(config, ["align.name=parts"]), run)
        whole, parts = (read_metrics(run / "aligned" / name) for name in ("whole", "parts"))
        assert whole == parts
        assert len(whole) == 3

    def test_on_eight_devices(self, config, run, devices):
        """As on one, with parameters and batch in parts."""
        config = with_overrides(config, ["align.steps=1"])
        printed(align.align, with_overrides(config, ["align.name=one"]), run)
        devices(8)
        parts = ["align.name=eight", "mesh.fsdp=2", "mesh.tensor=2"]
        printed(align.align, with_overrides(config, parts), run)
        (one,), (eight,) = (read_metrics(run / "aligned" / name) for name in ("one", "eight"))
        assert one["reward"] == eight["reward"]
        for name in ("loss", "gradient_norm", "divergence"):
            assert eight[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name

    def test_bad_input(self, config, run):
        for overrides, error, message in (
            (["align.method=grop"], ConfigError, "did you mean grpo"),
            (["align.method.samples=3"], ConfigError, "follows from align.samples"),
            (["align.samples=1"], ValueError, r"align\.samples must be in \[2, inf\)"),
            (["align.temperature=0.0"], ValueError, r"align\.temperature must be in"),
            (["align.prompt_length=40"], ConfigError, "must leave at least 16 of the 48"),
            (["align.prompt_length=5"], ConfigError, "continues definitions of Python"),
            (["accumulate=2"], ConfigError, "accumulate must be 1 for --mode=align"),
            (["data.name=digits"], ConfigError, "is for models of text as bytes"),
        ):
            with pytest.raises(error, match=message):
                align.align(with_overrides(config, overrides), run)


def test_the_first_state_is_the_average_of_the_run(config, run):
    data = loop.load(config)
    begun = continuation.Continuation(
        config, run, "aligned/first", "align", data, lambda model, batch, key: jnp.zeros(1)
    )
    restored, _ = loop.restore(config, data, loop.build_program(config, data), run)
    for a, e in zip(jax.tree.leaves(begun.state.params), jax.tree.leaves(restored.average)):
        np.testing.assert_array_equal(a, e)
    assert begun.state.average is None
