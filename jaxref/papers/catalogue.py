"""Reads index.toml, which says what each paper's symbols are and which test proves its claim.

One table for a paper, by its id: `title`, `authors`, `year`, `symbols` (public names in full),
`claim` (one sentence), `test` (the pytest id of its claim test), and `arxiv` or, for a paper that
is not there, `without_arxiv` (where it appeared). `renamed` gives, for a name that a reader may
look for, the public name that does its work here, and `renamed_because` why.
"""

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import NamedTuple


class Paper(NamedTuple):
    """One entry of the index.

    Attributes:
      id: the name of the paper in the index and in the mark of its claim test.
      title: its title.
      authors: as its references cite them ("Hui, Belkin, Wright", "Leng et al.").
      year: of its first version.
      symbols: the public names that implement it, each in full ("jaxref.losses.squentropy").
      claim: one sentence: the property that the claim test shows.
      test: the claim test ("tests/losses/classification_test.py::TestClaims::test_...").
      arxiv: its arXiv number, or None.
      without_arxiv: where a paper without arXiv number appeared, or None.
      renamed: other names for some of its symbols, with the last part of the symbol's name.
      renamed_because: why they are called otherwise here, or None.
    """

    id: str
    title: str
    authors: str
    year: int
    symbols: tuple[str, ...]
    claim: str
    test: str
    arxiv: str | None = None
    without_arxiv: str | None = None
    renamed: Mapping[str, str] = {}
    renamed_because: str | None = None

    @property
    def source(self) -> str:
        """Where to read it: "arXiv:2302.03952", or the venue."""
        return f"arXiv:{self.arxiv}" if self.arxiv else str(self.without_arxiv)

    @property
    def searchable(self) -> str:
        """All that a search looks through, in lower case."""
        parts = (self.id, self.title, self.authors, str(self.year), self.source, self.claim)
        return " ".join((*parts, *self.symbols, *self.renamed)).lower()


def load() -> tuple[Paper, ...]:
    """All papers of the index, in its order.

    Returns:
      A `Paper` for each entry.

    Use it where a program needs the papers; `python -m jaxref.papers` finds them by hand.

    Cost: the file is read and parsed at every call: keep the result.

    Example:
      >>> load()[0].arxiv
      '2204.12511'
    """
    text = resources.files("jaxref.papers").joinpath("index.toml").read_text("utf-8")
    return tuple(
        Paper(id=name, **{**entry, "symbols": tuple(entry["symbols"])})
        for name, entry in tomllib.loads(text).items()
    )


def matching(papers: Iterable[Paper], words: Iterable[str]) -> list[Paper]:
    """The papers that hold every word, in any case and as part of any of their words.

    Looked through are the id, title, authors, year, arXiv number, claim, symbols and renamed
    symbols.

    Args:
      papers: those to choose from, such as `load()`.
      words: what each paper has to hold; without any, every paper matches.

    Returns:
      The papers that match, in their order.

    Use it to find the methods of a paper; where a word is misspelled and nothing matches,
    `near_matches` has words to ask for instead.

    Cost: a search of every word in the entry of every paper.

    Example:
      >>> [paper.id for paper in matching(load(), ["SQUENT"])]
      ['squentropy']
    """
    words = [word.lower() for word in words]
    return [paper for paper in papers if all(word in paper.searchable for word in words)]


def near_matches(papers: Iterable[Paper], words: Iterable[str]) -> list[str]:
    """Words of the index spelled nearly like those words that it does not hold.

    Args:
      papers: those whose words are known.
      words: what was asked for; words that some paper holds are left out.

    Returns:
      Up to three words for each, in lower case and nearest first, none of them twice.

    Use it where `matching` finds no paper, to ask what was meant.

    Cost: a comparison of each unknown word with all words of the index.

    Example:
      >>> near_matches(load(), ["squentrpy"])[0]
      'squentropy'
    """
    text = " ".join(paper.searchable for paper in papers)
    vocabulary = {part.strip('.,:;()"').removeprefix("arxiv:") for part in text.split()}
    vocabulary = {part.rpartition(".")[2] if "jaxref" in part else part for part in vocabulary}
    unknown = [word.lower() for word in words if word.lower() not in text]
    near = [difflib.get_close_matches(word, vocabulary, cutoff=0.7) for word in unknown]
    return list(dict.fromkeys(match for matches in near for match in matches))


def markdown(papers: Iterable[Paper]) -> str:
    """The coverage table: paper, arXiv link, symbols, claim test.

    Args:
      papers: its rows, in their order.

    Returns:
      A table in Markdown, without a line end.

    Use it for a file that says what is covered; `matching` answers a question.

    Cost: one line of text for each paper.

    Example:
      >>> print(markdown(load()[:1]).splitlines()[0])
      | paper | arXiv | symbols | claim test |
    """
    lines = ["| paper | arXiv | symbols | claim test |", "|---|---|---|---|"]
    for paper in papers:
        link = f"[{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})"
        symbols = ", ".join(f"`{symbol}`" for symbol in paper.symbols)
        source = link if paper.arxiv else paper.source
        lines.append(f"| {paper.title} ({paper.year}) | {source} | {symbols} | `{paper.test}` |")
    return "\n".join(lines)
