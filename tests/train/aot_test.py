import importlib.util
import json
import subprocess
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxref.train import aot, aot_table
from jaxref.train.chips import CHIPS, Pod, bandwidth, describe_pod
from jaxref.train.config import ConfigError, load_config
from jaxref.train.roofline import Sent, Work, active_parameters, estimate, scaled
from tests.kernels.ahead_of_time import needs_tpu_compiler

pytestmark = pytest.mark.optimized

TINY = (
    "data.name=tokens:nowhere.bin",
    "data.vocab_size=512",
    "dtype=bfloat16",
    "length=128",
    "batch_size=32",
    "accumulate=2",
    "mesh.fsdp=4",
    "mesh.tensor=2",
    "model.num_layers=3",
    "model.features=256",
    "model.num_heads=2",
    "model.mlp_features=512",
    "model.scan_layers=True",
    "model.remat=True",
)
LAYER, HEAD = 4 * 256**2 + 3 * 256 * 512, 256 * 512
"""The parameters of TINY's matrices."""


@pytest.fixture(scope="module")
def pod():
    return describe_pod("v5e:2x4")


@pytest.fixture(scope="module")
def report(pod):
    return aot.compile_step(load_config(overrides=TINY), pod, "tiny")


def work(**changes):
    """Of a chip of 512 that computes 1 s, sends 0.25 s along fsdp and 0.125 s along tensor."""
    chip = CHIPS["v5p"]
    given = {
        "chips": 512,
        "flops": chip.flops,
        "model_flops": 0.75 * chip.flops,
        "traffic": 0.5 * chip.hbm_bandwidth,
        "state_bytes": 2e9,
        "gradient_bytes": 1e9,
        "sent": [
            Sent(("fsdp",), 128, {"all-gather": 0.25 * 600e9}, 600e9),
            Sent(("tensor",), 4, {"all-reduce": 0.125 * 200e9}, 200e9),
        ],
        "tokens": 2**22,
        "rows": 8.0,
        "accumulate": 8,
    }
    return Work(**given | changes)


POD = Pod("v5p:8x8x8", CHIPS["v5p"], 1, [])


def written_report(config, *, parameters=1, temporaries=20):
    """Of a step that needs so many GiB of 16."""
    sizes = (parameters * 2**30, 2 * parameters * 2**30, 0, 0, temporaries * 2**30, 16 * 2**30)
    mesh = {"data": 1, "fsdp": 4, "expert": 1, "sequence": 1, "tensor": 2}
    return aot.Report(
        *("v5e:2x4", 1, "tiny", mesh, 10**9, 1e9, config.batch_size, 128, config.accumulate),
        *(aot.Memory(*sizes), None, {}, 1.0),
    )


@pytest.mark.slow
@needs_tpu_compiler
class TestCompiledStep:
    def test_memory_is_that_of_the_shards(self, report):
        rows = 3 * LAYER + 2 * HEAD
        norms = 3 * (2 * 256 + 2 * 128) + 256
        assert report.parameters == rows + norms
        assert report.active == report.parameters - HEAD
        sharded = 4 * rows / 8
        assert sharded <= report.memory.parameters <= sharded + 4 * norms
        assert report.memory.optimizer == pytest.approx(2 * report.memory.parameters, abs=16)
        assert report.memory.batch == pytest.approx(32 / 4 * (2 * 128 + 1) * 4, abs=64)
        assert 0 < report.memory.temporaries < report.memory.capacity == 16 * 2**30

    def test_operations_are_those_of_the_matrices(self, report):
        """Forward once more than the model's formula, all within what kernels count themselves."""
        tokens = 32 * 128
        matrices = 2 * tokens * 3 * LAYER / 8
        assert report.work.model_flops == pytest.approx(
            (3 * matrices + 6 * tokens * HEAD / 8) + 6 * 3 * 256 * 128 * tokens / 8, rel=0.01
        )
        assert 3.9 * matrices <= report.work.flops <= 4.6 * matrices + 12 * tokens * HEAD / 8

    def test_what_is_sent(self, report):
        """Along fsdp at least the parameters forward and backward in bfloat16 and the gradients, in
        each micro-batch; along tensor the stream of a device's tokens, twice each way."""
        sent = {one.axes: sum(one.kinds.values()) for one in report.work.sent}
        matrices = 3 * LAYER / 2 * 3 / 4
        assert 2 * matrices * 3 * 2 <= sent[("fsdp",)] <= 4 * 2 * matrices * 3 * 4
        stream = 32 * 128 / 4 * 256
        assert 3 * 4 * stream * 2 <= sent[("tensor",)] <= 4 * 3 * 4 * stream * 4

    def test_report_reads_plainly(self, report, pod):
        text = aot.describe(report, pod)
        assert "tiny on v5e:2x4 (8 chips)" in text
        assert "Mesh        fsdp 4 x tensor 2" in text
        assert "32 sequences of 128 tokens in 2 micro-batches" in text
        assert "model-FLOPs utilisation" in text
        scaling = aot.describe_scaling(report, pod)
        assert scaling.count("Weak scaling") == scaling.count("Strong scaling") == 1

    def test_more_chips_are_as_extrapolated(self, report, pod):
        more = aot.compile_step(
            load_config(overrides=(*TINY, "batch_size=64", "mesh.fsdp=8")), describe_pod("v5e:4x4")
        )
        expected = scaled(report.work, pod, 2, weak=True)
        assert more.work.flops == pytest.approx(expected.flops, rel=0.02)
        assert more.work.traffic == pytest.approx(expected.traffic, rel=0.2)
        for axes in (("fsdp",), ("tensor",)):
            ours, theirs = (
                next(sum(one.kinds.values()) for one in given.sent if one.axes == axes)
                for given in (expected, more.work)
            )
            # along fsdp the compiler chooses between collectives, differently in so small a step
            assert theirs == pytest.approx(ours, rel=0.25 if axes == ("fsdp",) else 0.02)


class TestRoofline:
    def test_times_by_hand(self):
        times = estimate(work(), POD)
        assert times.seconds == pytest.approx(
            {"compute": 1.0, "memory": 0.5, "fsdp": 0.25, "tensor": 0.125}
        )
        assert (times.bound_by, times.bound, times.total) == ("compute", 1.0, 1.875)
        assert times.utilisation == pytest.approx((0.75, 0.4))
        assert times.tokens_per_second == pytest.approx((2**22, 2**22 / 1.875))

    def test_weak_scaling_keeps_the_work_of_a_chip(self):
        more = scaled(work(), POD, 8, weak=True)
        assert (more.chips, more.tokens, more.flops) == (4096, 8 * 2**22, work().flops)
        fsdp, tensor = more.sent
        assert (fsdp.group_size, tensor) == (1024, work().sent[1])
        assert fsdp.seconds == pytest.approx(0.25 * (1023 / 1024) / (127 / 128))
        assert more.traffic == pytest.approx(work().traffic - 4e9 + 4e9 / 8)

    def test_slices_beyond_a_pod_reduce_gradients_over_the_network(self):
        more = scaled(work(), POD, 32, weak=True)
        assert more.chips == 16384
        assert more.sent[0].group_size == 128 * 16
        assert more.sent[-1].axes == ("data",)
        assert more.sent[-1].seconds == pytest.approx(8 * 1e9 / 16 / 6.25e9)

    def test_slices_that_there_are_exchange_smaller_shards(self):
        between = Sent(("data",), 2, {"all-reduce": 6.25e9}, 6.25e9)
        given = work(sent=[*work().sent, between])
        more = scaled(given, POD._replace(slices=2), 2, weak=True)
        assert (more.sent[-1].group_size, more.sent[-1].seconds) == (2, pytest.approx(0.5))
        most = scaled(given, POD._replace(slices=2), 64, weak=True)  # 32 within a pod, 4 slices
        assert most.sent[-1].group_size == 4
        assert most.sent[-1].seconds == pytest.approx(1 / 32 * (3 / 4) / (1 / 2))

    def test_strong_scaling_gathers_as_much_for_less_work(self):
        more = scaled(work(), POD, 4, weak=False)
        assert (more.tokens, more.flops, more.rows) == (2**22, work().flops / 4, 2.0)
        fsdp, tensor = more.sent
        assert more.accumulate == 2
        assert fsdp.seconds == pytest.approx(0.25 / 4 * (511 / 512) / (127 / 128))
        assert tensor.seconds == pytest.approx(0.125 / 4)
        single = scaled(work(rows=8.0, accumulate=1), POD, 4, weak=False)
        assert single.sent[0].seconds == pytest.approx(0.25 * (511 / 512) / (127 / 128))
        assert scaled(work(), POD, 16, weak=False) is None  # half a sequence

    def test_where_it_stops_being_bound_by_computing(self):
        given = SimpleNamespace(work=work(accumulate=1), length=4096, mesh={"fsdp": 128})
        text = aot.describe_scaling(given, POD)
        assert "Bound by computing up to 16384 chips" not in text.partition("Strong")[2]
        assert "Bound by computing up to 1024 chips, beyond by fsdp." in text.partition("Strong")[2]


class TestMemory:
    @pytest.mark.parametrize(
        ("overrides", "sizes", "words"),
        [
            (("model.remat=False",), {}, "--config.model.remat=True"),
            (("model.remat_policy=dots_saveable",), {}, "remat_policy=nothing_saveable"),
            ((), {}, "4 sequences at once: accumulate more, by --config.accumulate=4"),
            (("batch_size=8",), {}, "--config.mesh.tensor=4 or --config.mesh.sequence=2"),
            ((), {"parameters": 5}, "wants at least 15 chips of 16 GiB"),
        ],
    )
    def test_advice_goes_by_what_is_large(self, overrides, sizes, words):
        config = load_config(overrides=(*TINY, *overrides))
        assert words in "\n".join(aot.advice(written_report(config, **sizes), config))

    @needs_tpu_compiler
    def test_a_step_that_does_not_fit(self, monkeypatch, capsys):
        """The compiler's own words, of 17.9 GiB that a chip has not."""
        words = (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (17.91G) exceeds available HBM (15.75G)."
        )

        def refuse(self, **options):
            raise jax.errors.JaxRuntimeError(words)

        monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
        flags = [f"--config.{change}" for change in TINY]
        assert aot.main(["aot", "--topology=v5e:2x4", *flags]) == 1
        printed = capsys.readouterr()
        assert "total          17.91 GiB of 16 GiB" in printed.out
        assert "does not fit v5e:2x4" in printed.err
        assert "accumulate more" in printed.err


class TestBadInput:
    @pytest.mark.parametrize(
        ("topology", "slices", "words"),
        [
            ("v9:2x2", 1, r"a generation of \['v4', 'v5e'.*got 'v9:2x2'"),
            ("v5e", 1, "such as v5e:16x16"),
            ("v5e:2x4", 0, "--slices must be at least 1, got 0"),
            ("v4:2x2x1", 2, "--slices: the network between slices of v4 is not published"),
        ],
    )
    def test_topologies(self, topology, slices, words):
        with pytest.raises(ValueError, match=words):
            describe_pod(topology, slices)

    @needs_tpu_compiler
    def test_a_shape_that_the_compiler_does_not_know(self):
        with pytest.raises(ValueError, match=r"--topology=v5e:17x3 is none .*v5e:2x4 to v5e:16x16"):
            describe_pod("v5e:17x3")

    def test_without_the_compiler(self, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(RuntimeError, match=r"pip install 'jaxref\[tpu-aot\]'"):
            describe_pod("v5e:2x4")

    @needs_tpu_compiler
    def test_a_mesh_of_another_size_and_what_is_no_text(self, pod):
        with pytest.raises(ValueError, match="must be 8"):
            aot.compile_step(load_config(overrides=(*TINY, "mesh.fsdp=8")), pod)
        for name in ("digits", "seasons"):
            with pytest.raises(ConfigError, match=f"data.name={name} is no text"):
                aot.compile_step(load_config(overrides=(f"data.name={name}",)), pod)

    def test_a_file_without_a_place_for_the_table(self, tmp_path):
        (tmp_path / "page.md").write_text("nothing")
        with pytest.raises(ValueError, match="has no lines <!-- ahead of time: begin -->"):
            aot_table.table(tmp_path / "page.md")


@needs_tpu_compiler
def test_chips_of_two_devices_and_slices():
    half = describe_pod("tpu7x:2x2x1")
    assert len(half.devices) == 8
    assert half.chip.flops == CHIPS["tpu7x"].flops / 2
    two = describe_pod("v5e:2x4", 2)
    by_place = sorted(two.devices, key=lambda device: (device.slice_index, *device.coords))
    mesh = jax.sharding.Mesh(np.reshape(by_place, (2, 2, 4)), ("slice", "x", "y"))
    of_a_dimension = 2 * CHIPS["v5e"].link_bandwidth
    assert bandwidth(two, mesh, ("slice",)) == CHIPS["v5e"].dcn_bandwidth
    assert bandwidth(two, mesh, ("slice", "x")) == CHIPS["v5e"].dcn_bandwidth
    assert bandwidth(two, mesh, ("y",)) == of_a_dimension
    assert bandwidth(two, mesh, ("x", "y")) == 2 * of_a_dimension


def test_table_is_written_between_its_lines(monkeypatch, tmp_path):
    """The rows come from runs of the command."""
    little = Sent(("fsdp", "tensor"), 512, {"all-reduce": 1e6}, 600e9)
    step = work(sent=[*work().sent, little])
    report = written_report(load_config(overrides=TINY))._replace(work=step)
    given = {**aot._fields(report), "estimate": aot._fields(estimate(step, POD))}
    asked = []

    def run(command, **options):
        asked.append(command[3:])
        return SimpleNamespace(stdout=json.dumps(given))

    monkeypatch.setattr(subprocess, "run", run)
    page = tmp_path / "page.md"
    page.write_text("before\n" + "\nold\n".join(aot_table.MARKERS) + "\nafter\n")
    aot_table.table(page)
    text = page.read_text()
    assert len(asked) == len(aot_table.CONFIGS) * len(aot_table.TOPOLOGIES)
    assert asked[0][:2] == ["--topology=v5e:16x16", "--config=configs/llm_1b.py"]
    assert text.startswith(f"before\n{aot_table.MARKERS[0]}\n\n| configuration |")
    assert text.endswith(f"\n\n{aot_table.MARKERS[1]}\nafter\n")
    assert "old" not in text
    row = (
        "| tiny | 1 billion | v5e:2x4 | fsdp 4 x tensor 2 | 32 in 2 | 23.0 of 16 GiB | 1.33 | "
        "fsdp 150 GB, tensor 25.0 GB | 1.00 s, compute | 1.88 s | 40% to 75% |\n"
    )
    assert text.count(row) == 12
    assert "`--topology=v5e:16x16 --config=configs/llm_70b.py --config.accumulate=16`" in text


@pytest.mark.parametrize("config", aot_table.CONFIGS)
def test_configurations_are_of_the_size_of_their_names(config):
    """Without compiling: their parameters, counted from their shapes."""
    from jaxref.train.program import build

    given = load_config(config, ["mesh.fsdp=2", "mesh.data=1", "mesh.tensor=1", "mesh.expert=1"])
    program = build(given, given.data.vocab_size, devices=jax.devices()[:2])
    count = sum(leaf.size for leaf in jax.tree.leaves(program.abstract_state.params))
    billions = {"1b": 1.14, "7b": 7.24, "70b": 68.98, "moe": 46.7}
    name = config.removeprefix("configs/llm_").removesuffix(".py")
    assert count / 1e9 == pytest.approx(billions[name], rel=0.01)
    active = active_parameters(given, program.abstract_state.params)
    assert active < count
    if name == "moe":
        assert active / 1e9 == pytest.approx(12.75, rel=0.01)
