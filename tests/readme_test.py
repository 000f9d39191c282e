import contextlib
import io
import re
from pathlib import Path

from jaxref.papers import load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs_and_learns():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    before, after = map(float, re.fullmatch(r"loss (\S+) -> (\S+)\n", printed.getvalue()).groups())
    assert after < before - 1


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert "://" in target or (ROOT / target).is_file(), target


def test_the_commands_are_those_that_continuous_integration_runs():
    (command,) = re.findall(r'^    (pip install -e "\.\[test\]" && pytest)$', README, re.M)
    script = (ROOT / ".ci" / "run").read_text().replace("install --quiet -e", "install -e")
    assert command in script


def test_every_room_is_in_the_table():
    rooms = {path.parent.name for path in (ROOT / "jaxref").glob("*/__init__.py")}
    named = set(re.findall(r"`jaxref\.(\w+)`", README))
    assert rooms - {"core"} <= named


def test_the_table_counts_the_papers_of_the_index():
    papers = load()
    assert f"methods of {len(papers)} research papers" in README
    rows = re.findall(r"^\| (`jaxref\.\w+`[^|]*) \| ([\d ]*)\|", README, re.MULTILINE)
    for cell, number in rows:
        rooms = set(re.findall(r"`jaxref\.(\w+)`", cell))
        theirs = [p for p in papers if rooms & {symbol.split(".")[1] for symbol in p.symbols}]
        assert len(theirs) == int(number or 0), cell
