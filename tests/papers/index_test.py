import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

from jaxref import papers
from jaxref.papers.__main__ import main

ROOT = Path(__file__).parents[2]
INDEX = papers.load()
each_paper = pytest.mark.parametrize("paper", INDEX, ids=lambda paper: paper.id)


def claim_marks(tree, prefix=""):
    """(paper, test) for every function under `@pytest.mark.claim(paper)`, methods too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from claim_marks(node, f"{prefix}::{node.name}")
        elif isinstance(node, ast.FunctionDef):
            for mark in node.decorator_list:
                match mark:
                    case ast.Call(
                        func=ast.Attribute(attr="claim"), args=[ast.Constant(value=paper)]
                    ):
                        yield paper, f"{prefix}::{node.name}"


def all_claim_marks():
    marks = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("*_test.py")):
        file = path.relative_to(ROOT).as_posix()
        for paper, test in claim_marks(ast.parse(path.read_text("utf-8"))):
            marks[paper].append(file + test)
    return dict(marks)


class TestIndex:
    def test_claim_tests_and_entries_are_the_same(self):
        """Every entry's test carries its mark, no other does, and no mark is without entry."""
        assert all_claim_marks() == {paper.id: [paper.test] for paper in INDEX}

    @each_paper
    def test_schema(self, paper):
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", paper.id)
        for text in (paper.title, paper.authors, paper.claim):
            assert isinstance(text, str)
            assert text == " ".join(text.split())
            assert text
        assert isinstance(paper.year, int)
        assert 1950 <= paper.year <= 2100
        assert paper.claim.endswith(".")
        assert (paper.arxiv is None) != (paper.without_arxiv is None)
        if paper.arxiv is not None:
            assert re.fullmatch(r"\d{4}\.\d{4,5}", paper.arxiv)
            assert 2000 + int(paper.arxiv[:2]) == paper.year
        assert paper.symbols
        assert len(set(paper.symbols)) == len(paper.symbols)

    @each_paper
    def test_renamed_names_lead_to_symbols_and_are_no_symbols(self, paper):
        names = {symbol.rpartition(".")[2] for symbol in paper.symbols}
        assert set(paper.renamed.values()) <= names
        assert not set(paper.renamed) & names
        assert paper.renamed or not paper.renamed_because

    @each_paper
    def test_symbols_are_public_and_cite_the_paper(self, paper):
        for symbol in paper.symbols:
            room, _, name = symbol.rpartition(".")
            module = importlib.import_module(room)
            assert name in module.__all__, symbol
            text = " ".join((getattr(module, name).__doc__ or "").split())
            assert (f"arXiv:{paper.arxiv}" if paper.arxiv else paper.title) in text, symbol

    def test_numbers_are_not_used_twice(self):
        numbers = [paper.arxiv for paper in INDEX if paper.arxiv]
        assert len(set(numbers)) == len(numbers)

    def test_file_has_no_keys_that_are_not_read(self):
        index = tomllib.loads((ROOT / "jaxref/papers/index.toml").read_text("utf-8"))
        assert set().union(*index.values()) <= set(papers.Paper._fields)
        assert tuple(index) == tuple(paper.id for paper in INDEX)


class TestClaimMarks:
    def test_functions_methods_and_other_decorators(self):
        tree = ast.parse(
            "@pytest.mark.claim('a')\ndef test_f(): ...\n"
            "class TestC:\n"
            "    @pytest.mark.slow\n    @pytest.mark.claim('b')\n    def test_g(self): ...\n"
            "    @parameterized.parameters(1)\n    def test_h(self): ...\n"
        )
        assert list(claim_marks(tree)) == [("a", "::test_f"), ("b", "::TestC::test_g")]


class TestSearch:
    def found(self, *words):
        return [paper.id for paper in papers.matching(INDEX, words)]

    @pytest.mark.parametrize(
        "word",
        [
            "polyloss",
            "POLYNOMIAL",
            "2204.12511",
            "arXiv:2204.125",
            "poly1_focal",
            "leng et",
            "1 + ε",
        ],
    )
    def test_every_part_of_an_entry_is_found(self, word):
        assert "polyloss" in self.found(word)
        assert len(self.found(word)) < 4

    def test_all_words_must_match(self):
        assert {"polyloss", "squentropy"} <= set(self.found("jaxref.losses"))
        assert self.found("jaxref.losses", "hui") == ["squentropy"]
        assert self.found("polyloss", "hui") == []
        assert self.found() == [paper.id for paper in INDEX]

    def test_names_that_were_changed_are_found(self):
        assert self.found("poly_n_cross_entropy") == ["polyloss"]


class TestCommandLine:
    def test_lists_all_that_an_entry_says(self, capsys):
        assert main(["squentropy"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        paper = next(paper for paper in INDEX if paper.id == "squentropy")
        for text in (paper.title, "2023, arXiv:2302.03952", paper.claim, paper.test):
            assert text in out
        assert all(symbol in out for symbol in paper.symbols)

    def test_lists_every_paper_without_words(self, capsys):
        assert main([]) == 0
        assert [e.partition("\n")[0] for e in capsys.readouterr().out.split("\n\n")] == [
            paper.id for paper in INDEX
        ]

    def test_markdown(self, capsys):
        assert main(["--markdown"]) == 0
        header, rule, *rows = capsys.readouterr().out.splitlines()
        assert header == "| paper | arXiv | symbols | claim test |"
        assert {line.count("|") for line in (header, rule, *rows)} == {5}
        for paper, row in zip(INDEX, rows, strict=True):
            assert row.startswith(f"| {paper.title} ({paper.year}) | ")
            if paper.arxiv:
                assert f"| [{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv}) |" in row
            assert all(f"`{symbol}`" in row for symbol in paper.symbols)
            assert row.endswith(f"| `{paper.test}` |")

    def test_markdown_of_some(self, capsys):
        assert main(["--markdown", "squentropy"]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 3

    def test_no_match_says_so_with_near_matches(self, capsys):
        assert main(["poliloss"]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert "no paper matches 'poliloss'; did you mean polyloss" in err
        assert main(["zzzzzz"]) == 1
        assert capsys.readouterr().err == "no paper matches 'zzzzzz'\n"

    def test_does_not_import_jax(self):
        code = (
            "import sys; from jaxref.papers.__main__ import main; main([]);"
            "print('jax' in sys.modules)"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.stdout.endswith("False\n"), result

    def test_closed_pipe_is_no_error(self):
        command = f"set -o pipefail; {sys.executable} -m jaxref.papers | true"
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")


def test_paper_without_arxiv_number_names_its_venue():
    paper = INDEX[0]._replace(arxiv=None, without_arxiv="Journal of Examples 1(2)")
    assert "Journal of Examples" in papers.markdown([paper])
    assert papers.matching([paper], ["journal"]) == [paper]
