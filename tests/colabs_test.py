import importlib.util
import json
import re
from pathlib import Path

import nbformat
import pytest

COLABS = Path(__file__).parents[1] / "colabs"
NOTEBOOKS = sorted(COLABS.glob("*.ipynb"))

# What makes a tutorial quick where its pictures do not matter: text of a cell, and its replacement.
FEWER_STEPS = {
    "alignment": {
        '"HAPO": ["align.method=hapo"],': "",
        '"DPO": ["align.method=dpo"],': "",
        "steps = 400": "steps = 20",
        '"GRPO": 20, "HAPO": 10, "DPO": 10, "f-DPO": 10': (
            '"GRPO": 2, "HAPO": 1, "DPO": 1, "f-DPO": 1'
        ),
        "align.prompts=6": "align.prompts=2",
        "align.validation_samples=48": "align.validation_samples=16",
    },
    "attention": {"steps=200 batch_size=4": "steps=10 batch_size=4", "steps=600": "steps=110"},
    "contrastive": {
        'device_count=8"': 'device_count=8 --xla_cpu_use_fusion_emitters=false"',
        "steps = 400": "steps = 5",
        "batches = (16, 64, 256)": "batches = (16,)",
        "temperatures = (0.1, 0.2, 0.3, 0.5, 1.0)": "temperatures = (0.1,)",
        "devices = (1, 2, 4, 8)": "devices = (1, 4)",
    },
    "landscape": {
        "epochs, seeds = 60, 5": "epochs, seeds = 2, 2",
        "blocks = 100": "blocks = 3",
        "num_steps=40, num_probes=4": "num_steps=4, num_probes=1",
        "ticks = jnp.linspace(-1, 1, 25)": "ticks = jnp.linspace(-1, 1, 3)",
        "(low.min(), high.max(), 31)": "(low.min(), high.max(), 3)",
    },
    "losses": {"seeds=5": "seeds=2", "steps=600": "steps=20"},
    "method": {
        "steps, seeds = 600, jnp.arange(3)": "steps, seeds = 20, jnp.arange(1)",
        "0.08": "-1",
    },
    "normalization": {"steps = 80": "steps = 20", "steps=60": "steps=22"},
    "optimizers": {"steps, every = 100, 5": "steps, every = 10, 5"},
    "pod": {
        '"--config=configs/llm_1b.py"]': '"--config.data.name=tokens:a"]',  # the main job
        '"data and sequence": ["mesh.data=2", "mesh.sequence=4"],': "",
        "steps_to_take = 60": "steps_to_take = 15",
        "checkpoint_every=10": "checkpoint_every=5",
    },
    "quantization": {
        "steps = 120": "steps = 5",
        '("lnq", (4, 2), ""),': "",
        '("gptq", (4, 2), "low_rank=8"),': "",
    },
    "train": {"load_config()": 'load_config(overrides=["steps=40"])'},
}

spec = importlib.util.spec_from_file_location("execute", COLABS / "execute.py")
execute = importlib.util.module_from_spec(spec)
spec.loader.exec_module(execute)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_with_its_outputs(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for c in cells for output in c.outputs)
    assert any("image/png" in o.get("data", {}) for c in cells for o in c.outputs)
    assert path.stat().st_size < 2**20


def test_the_course_has_each_of_them_once():
    listed = re.findall(r"\]\((\w+)\.ipynb\)", (COLABS / "README.md").read_text())
    assert sorted(listed) == [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_installs_jaxref_where_it_is_missing_and_ends_with_exercises(path):
    cells = nbformat.read(path, as_version=4).cells
    assert 'find_spec("jaxref") is None' in cells[1].source
    assert "## Exercises" in cells[-1].source


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_again_in_fewer_steps(path, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # programs that hardly run
    text = path.read_text()
    for long, short in FEWER_STEPS.get(path.stem, {}).items():
        long, short = (json.dumps(part)[1:-1] for part in (long, short))
        assert text.count(long) == 1, long
        text = text.replace(long, short)
    quick = tmp_path / path.name
    quick.write_text(text)
    execute.execute(quick, quick)
