import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest

from jaxref.train.config import ConfigError, load_config
from jaxref.train.records import Records, check_config, read_metrics, read_norms
from jaxref.train.report import plot_gradient, plot_norms, plot_speed, plot_times, report

FACTS = {
    "parameters": 1234567,
    "data": "text of <notes>; 100 tokens to train on, 10 held out",
    "measure": "nats per byte",
    "baselines": {"unigram": 3.3, "zlib": 1.5},
    "mesh": {"data": 2, "fsdp": 4, "tensor": 1},
    "devices": "8 x TPU v5",
    "processes": 2,
    "jax": "0.10.2",
}


def record(step, *, first=False, **others):
    """A record of a run at 100 ms a step, ten times that for the first of a start."""
    slow = 10 if first else 1
    values = {
        "loss": 1 + 4 * 0.9**step,
        "gradient_norm": 2.0,
        "tokens_per_second": 1e4 / slow,
        "input_seconds": 0.001,
        "step_seconds": 0.1 * slow - 0.001,
        "save_seconds": 0.0,
        "learning_rate": 1e-3,
        "nonfinite_steps": 0,
    }
    return values | others


def write(workdir, rows, *, resume_step=0, facts=FACTS):
    """One start of a run, with these records by step."""
    with Records(workdir, resume_step=resume_step) as records:
        if facts:
            records.write_start(facts)
        for step, values in rows.items():
            records.write(step, values)


class Page(HTMLParser):
    """What a page is made of; complains about tags that are not closed in their order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], "", []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open[-1:] != ["style"]:
            self.text += data + " "

    @property
    def words(self):
        return " ".join(self.text.split())


def page_of(config, workdir):
    report(config, workdir)
    return Page((workdir / "report.html").read_text())


@pytest.fixture
def config():
    return load_config(overrides=["steps=40", "optimizer.name=lion", "model.features=96"])


class TestPage:
    def test_of_a_finished_run(self, config, tmp_path, capsys):
        validated = {20: {"validation_loss": 1.25}, 40: {"validation_loss": 1.5}}
        rows = {s: record(s, first=s == 10, **validated.get(s, {})) for s in range(10, 41, 10)}
        rows[40]["model_flops_utilisation"] = 0.437
        write(tmp_path, rows)
        sample = "if a < b:\n    <script>alert(1)</script>"
        (tmp_path / "sample.txt").write_text(sample)
        page = page_of(config, tmp_path)
        assert capsys.readouterr().out == f"Report: {tmp_path / 'report.html'}\n"
        assert sample in page.text
        for text in (
            "40 of 40 steps",
            "1.059 training loss",
            "1.500 validation, nats per byte",
            "10,000 tokens per second",
            "43.7% of the peak FLOPs",
            "1,234,567 parameters",
            "text of <notes>; 100 tokens",
            "8 x TPU v5 as data 2 x fsdp 4",
            "0.10.2",
            "validation, step 40 1.500 2.164",
            "best validation, step 20 1.250 1.803",
            "unigram 3.300 4.761",
            "optimizer.name 'lion' 'adamw'",
            "model.features 96 192",
        ):
            assert text in page.words
        assert "length 128" not in page.words

        # One file that needs no other
        assert {"script", "link", "iframe", "object"}.isdisjoint(page.tags)
        sources = [value for name, value in page.attributes if name in ("src", "href")]
        assert len(sources) == page.tags.count("img") == 4
        assert all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
        assert ("name", "viewport") in page.attributes
        assert "http" not in page.text

    def test_in_the_middle_of_a_run_that_was_resumed(self, config, tmp_path):
        write(tmp_path, {10: record(10), 20: record(20)})
        write(tmp_path, {20: record(20, first=True)}, resume_step=15)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 30, "lo')
        page = page_of(config, tmp_path)
        assert "20 of 40 steps" in page.words
        assert page.text.count("UTC") == 3
        assert "UTC, continued after step 15" in page.words
        assert "nan" not in page.text

    def test_of_images(self, config, tmp_path):
        row = record(1, images_per_second=640.0, validation_accuracy=0.987)
        del row["tokens_per_second"]
        write(tmp_path, {1: row}, facts={**FACTS, "measure": "nats per image"})
        (tmp_path / "predictions.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        page = page_of(config, tmp_path)
        assert "98.7% right in validation" in page.words
        assert "640 images per second" in page.words
        assert ("src", "data:image/png;base64,iVBORw0KGgo=") in page.attributes

    def test_of_series(self, config, tmp_path):
        rows = {step: record(step, windows_per_second=320.0) for step in (1, 2, 3)}
        for row in rows.values():
            del row["tokens_per_second"]
        write(tmp_path, rows, facts={**FACTS, "measure": "squared error"})
        page = page_of(config, tmp_path)
        assert "320 windows per second" in page.words
        assert page.tags.count("img") == 4

    def test_of_a_run_before_there_were_times_and_starts(self, config, tmp_path):
        old = {"loss": 2.0, "gradient_norm": 1.0, "tokens_per_second": 9.0, "learning_rate": 0.1}
        write(tmp_path, {10: old}, facts=None)
        page = page_of(config, tmp_path)
        assert page.tags.count("img") == 2
        assert "Outcome None yet." in page.words

    def test_without_records(self, config, tmp_path):
        with pytest.raises(ConfigError, match=r"holds no records yet; train first"):
            report(config, tmp_path)
        check_config(tmp_path, config.to_dict())
        with pytest.raises(ConfigError, match=r"holds no records yet; train first"):
            report(config, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["config.json"]

    def test_command(self, config, tmp_path, call):
        code, _ = call("--mode=report", f"--workdir={tmp_path}")
        assert code == f"FileNotFoundError: {tmp_path} is not the working directory of a run"
        check_config(tmp_path, config.to_dict())
        code, _ = call("--mode=report", f"--workdir={tmp_path}")
        assert code == f"ConfigError: {tmp_path} holds no records yet; train first"
        write(tmp_path, {10: record(10)})
        code, out = call("--mode=report", f"--workdir={tmp_path}")
        assert not code
        assert out == f"Report: {tmp_path / 'report.html'}\n"


class TestCurves:
    def test_time_to_compile_is_left_out(self, tmp_path):
        first = record(10, first=True)
        write(tmp_path, {10: first, 20: record(20), 30: record(30, save_seconds=0.1)})
        write(tmp_path, {30: first, 40: record(40)}, resume_step=20)
        metrics = read_metrics(tmp_path)
        for row in metrics:
            row["model_flops_utilisation"] = row["tokens_per_second"] / 2e4
        starts = [{"step": 0}, {"step": 20}]
        [speed] = plot_speed(metrics, starts).axes
        assert speed.get_ylim() == (0, pytest.approx(1.12e4))
        [times] = plot_times(metrics, starts).axes
        assert times.get_ylim() == (0, pytest.approx(112))
        assert [line.get_xdata()[0] for line in times.lines] == [20]  # the second start
        [legend] = times.figure.legends
        labels = [text.get_text() for text in legend.get_texts()]
        assert labels == ["step 99 ms, 99.0%", "input 1 ms, 1.0%", "save 0 ms, 0.0%"]
        [right] = speed.child_axes
        speed.figure.draw_without_rendering()
        assert right.get_ylim() == (0, pytest.approx(0.56))

    def test_skipped_steps_are_marked(self):
        counts = {10: 0, 20: 0, 30: 4, 40: 4, 50: 5}
        metrics = [{"step": s, **record(s, nonfinite_steps=n)} for s, n in counts.items()]
        metrics[2]["gradient_norm"] = math.nan
        metrics.insert(3, {"step": 35, "validation_loss": 1.0})
        _, lower = plot_gradient(metrics, []).axes
        spans = [(span.get_x(), span.get_x() + span.get_width()) for span in lower.patches]
        assert spans == [(20, 30), (40, 50)]
        assert list(lower.lines[0].get_xdata()) == [10, 20, 40, 50]


def rows_of(figure):
    """Names and values of the rows of each heat map, where all have names."""
    found = {}
    for ax in figure.axes[:2]:
        [mesh] = ax.collections
        names = [label.get_text() for label in ax.get_yticklabels()]
        found[ax.get_title(loc="left")] = dict(zip(names, mesh.get_array(), strict=True))
    return found


class TestNorms:
    def norms(self, scale=1.0):
        """Of three layers, of which the last two are stacked."""
        return {
            "blocks/0/mlp/function/up/kernel": 3.0 * scale,
            "blocks/0/norm/scale": 4.0 * scale,
            "blocks/1/mlp/function/up/kernel": [6.0 * scale, 9.0 * scale],
            "blocks/1/norm/scale": [8.0 * scale, 12.0 * scale],
            "embed/embedding": 7.0 * scale,
        }

    @pytest.fixture
    def read(self, tmp_path):
        with Records(tmp_path, resume_step=0) as records:
            for step in (10, 20, 30):
                gradients = self.norms(0.1) | ({"embed/embedding": math.inf} if step == 20 else {})
                records.write_norms(step, parameters=self.norms(), gradients=gradients)
        return read_norms(tmp_path)

    def test_what_is_written_can_be_read(self, read, tmp_path):
        assert [row["step"] for row in read] == [10, 20, 30]
        assert read[1]["parameters"] == self.norms()
        assert read[1]["gradients"]["embed/embedding"] == math.inf
        json.loads(
            (tmp_path / "norms.jsonl").read_text().splitlines()[1], parse_constant=pytest.fail
        )
        with Records(tmp_path, resume_step=10):
            pass
        assert [row["step"] for row in read_norms(tmp_path)] == [10]

    def test_by_layer(self, read):
        figure = plot_norms(read, by_layer=True)
        maps = rows_of(figure)
        assert list(maps) == ["parameters", "gradients"]
        expected = {"blocks 0": 5.0, "blocks 1": 10.0, "blocks 2": 15.0, "embed": 7.0}
        assert list(maps["parameters"]) == list(expected)
        for name, norm in expected.items():
            np.testing.assert_allclose(maps["parameters"][name], np.log10([norm] * 3))
        np.testing.assert_allclose(maps["gradients"]["blocks 2"], np.log10([1.5] * 3))
        assert maps["gradients"]["embed"].mask.tolist() == [False, True, False]
        [mesh] = figure.axes[0].collections
        assert mesh.get_coordinates()[0, :, 0].tolist() == [5, 15, 25, 35]

    def test_by_array(self, read):
        maps = rows_of(plot_norms(read, by_layer=False))
        expected = {
            "blocks mlp/up/kernel": math.sqrt(9 + 36 + 81),
            "blocks norm/scale": math.sqrt(16 + 64 + 144),
            "embed/embedding": 7.0,
        }
        assert list(maps["parameters"]) == list(expected)
        for name, norm in expected.items():
            np.testing.assert_allclose(maps["parameters"][name], np.log10([norm] * 3))

    def test_many_layers_and_one_record(self):
        norms = {"blocks/0/kernel": np.arange(100.0).tolist(), "output/kernel": 2.0}
        figure = plot_norms([{"step": 5, "parameters": norms, "gradients": norms}], by_layer=True)
        ax = figure.axes[0]
        names = [label.get_text() for label in ax.get_yticklabels()]
        assert names[0] == "blocks 0"
        assert names[-1] == "output"
        assert len(names) < 30
        [mesh] = ax.collections
        assert mesh.get_array().shape == (101, 1)
        assert mesh.get_array().mask[:, 0].tolist() == [True] + [False] * 100  # of norm 0
