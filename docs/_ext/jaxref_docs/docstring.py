"""Parses the docstrings of jaxref, which have one form, into blocks.

    First line: what it computes.

        L = Σ_i ...                          an indented block is a formula

    Args:
      name: text, continued by two more spaces; may hold paragraphs, lists and formulas.

    Returns:
      text.

    Use it for ...

    Example:
      >>> doctest

    Reference: Authors, "Title", year, arXiv number.

Text is plain but for single backticks. Lists are of lines that start with "- " or "1. ".
"""

import re
from dataclasses import dataclass
from typing import Literal

ITEMIZED = ("Args", "Attributes", "Raises", "Yields")
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example")

_HEADER = re.compile(rf"({'|'.join(SECTIONS)}):(?: (.*))?$")
_REFERENCE = re.compile(r"References?: ")
_ITEM = re.compile(r"(\*{0,2}[\w.]+(?:\[[^\]]*\])?(?:(?:,| and| or) \*{0,2}[\w.]+)*): (.*)$")
_ENDS_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[`\"(]?[A-ZΑ-Ω`])")
_ABBREVIATION = re.compile(r"(\b(et al|e\.g|i\.e|cf|vs|eq|Eq|fig|Fig|sec|Sec|no)\.|\b[A-Z]\.)$")


@dataclass(frozen=True)
class Text:
    """A paragraph, or what follows "Reference:"."""

    text: str
    role: Literal["paragraph", "reference"] = "paragraph"


@dataclass(frozen=True)
class Formula:
    """An indented block: lines that are set as they stand."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Doctest:
    """Prompts and what they print."""

    text: str


@dataclass(frozen=True)
class List:
    """Items of blocks, numbered or not."""

    items: tuple[tuple["Block", ...], ...]
    numbered: bool


@dataclass(frozen=True)
class Section:
    """ "Args:" and its kind: items of a name and blocks; free text has an empty name."""

    name: str
    items: tuple[tuple[str, tuple["Block", ...]], ...]


Block = Text | Formula | Doctest | List | Section


def parse(docstring: str) -> tuple[Block, ...]:
    """The blocks of a docstring without indentation, in their order."""
    return _blocks(docstring.splitlines(), sections=True)


def summary(blocks: tuple[Block, ...]) -> str:
    """The first paragraph: what it computes."""
    return blocks[0].text if blocks and isinstance(blocks[0], Text) else ""


def paragraphs(blocks: tuple[Block, ...]) -> list[str]:
    """All paragraphs outside of sections and references, the summary first."""
    return [b.text for b in blocks if isinstance(b, Text) and b.role == "paragraph"]


def advice(blocks: tuple[Block, ...]) -> str:
    """When to use it: the paragraphs that begin with "Use", or else the sentences that do, or else
    what follows the sections."""
    texts = [text for text in paragraphs(blocks) if not text.startswith(_COST)]
    begins = re.compile(r"Use\b|Prefer\b|For [^.]* use\b")
    for parts in (texts, [s for text in texts for s in split_sentences(text)]):
        if chosen := [part for part in parts if begins.match(part)]:
            return " ".join(chosen)
    sections = [i for i, b in enumerate(blocks) if isinstance(b, Section) and b.name != "Example"]
    after = paragraphs(blocks[sections[-1] :]) if sections else []
    return next((text for text in after if text in texts), "")


_COST = "Cost: "


def cost(blocks: tuple[Block, ...]) -> str:
    """What it costs: the paragraph that says so."""
    found = [text for text in paragraphs(blocks) if text.startswith(_COST)]
    return " ".join(text.removeprefix(_COST) for text in found)


def split_sentences(text: str) -> list[str]:
    """The sentences of a paragraph; backticks and abbreviations hide their full stops."""
    sentences: list[str] = []
    for part in _ENDS_SENTENCE.split(text):
        open_before = sentences and (
            sentences[-1].count("`") % 2 or _ABBREVIATION.search(sentences[-1])
        )
        if open_before:
            sentences[-1] += f" {part}"
        else:
            sentences.append(part)
    return sentences


def irregularities(docstring: str) -> list[str]:
    """What in a docstring is not of this form."""
    found = []
    blocks = parse(docstring)
    if not summary(blocks):
        found.append("does not begin with a sentence")
    elif summary(blocks)[-1] not in ".:":
        found.append("first paragraph does not end with a full stop")
    outside = re.sub(r"(?m)^ *(>>>|\.\.\.) .*$", "", docstring)
    if outside.count("`") % 2:
        found.append("backticks do not match")
    names = [block.name for block in blocks if isinstance(block, Section)]
    if sorted(names, key=SECTIONS.index) != names and "Attributes" not in names:
        found.append(f"sections in the order {', '.join(names)}")
    for block in blocks:
        if isinstance(block, Text) and re.match(r"[A-Z]\w+:$", block.text):
            found.append(f"unknown section {block.text!r}")
    return found


def _blocks(lines: list[str], *, sections: bool = False) -> tuple[Block, ...]:
    """The blocks of lines whose own indentation is taken away."""
    blocks: list[Block] = []
    position = 0
    while position < len(lines):
        line = lines[position]
        if not line.strip():
            position += 1
            continue
        if sections and (header := _HEADER.match(line)):
            end = _end_of_indented(lines, position + 1)
            body = ([f"  {header[2]}"] if header[2] else []) + lines[position + 1 : end]
            blocks.append(_section(header[1], _dedent(body)))
        elif line.startswith(">>>"):
            end = _end_of_paragraph(lines, position)
            blocks.append(Doctest("\n".join(lines[position:end])))
        elif line.startswith(" "):
            end = _end_of_indented(lines, position)
            content = _dedent(lines[position:end])
            if content[0].startswith(">>>"):
                blocks.extend(_blocks(content))
            else:
                blocks.append(Formula(tuple(content)))
        elif marker := re.match(r"- |1\. ", line):
            end, block = _list(lines, position, numbered=marker[0] != "- ")
            blocks.append(block)
        else:
            end = position + 1
            while end < len(lines) and _continues(lines, end, sections):
                end += 1
            text = " ".join(part.strip() for part in lines[position:end])
            if sections and (reference := _REFERENCE.match(text)):
                blocks.append(Text(text[reference.end() :], "reference"))
            else:
                blocks.append(Text(text))
        position = end
    return tuple(blocks)


def _continues(lines: list[str], position: int, sections: bool) -> bool:
    """Whether a line goes on with the paragraph before it."""
    line = lines[position]
    after_colon = lines[position - 1].rstrip().endswith(":")
    return not (
        not line.strip()
        or line.startswith((">>>", "    "))
        or (after_colon and re.match(r" *(- |1\. )", line))
        or (sections and (_HEADER.match(line) or _REFERENCE.match(line)))
    )


def _section(name: str, lines: list[str]) -> Section:
    if name not in ITEMIZED:
        return Section(name, (("", _blocks(lines)),))
    items: list[tuple[str, list[str]]] = []
    for line in lines:
        if (item := _ITEM.match(line)) and not line.startswith(" "):
            items.append((item[1], [item[2]]))
        elif line.startswith(" ") or not line.strip() or (items and not items[-1][0]):
            if not items:
                items.append(("", []))
            items[-1][1].append(line)
        else:
            items.append(("", [line]))
    return Section(
        name, tuple((term, _blocks([body[0], *_dedent(body[1:])])) for term, body in items)
    )


def _list(lines: list[str], position: int, *, numbered: bool) -> tuple[int, List]:
    pattern = re.compile(r"\d+\. " if numbered else "- ")
    items: list[list[str]] = []
    while position < len(lines):
        line = lines[position]
        if marker := pattern.match(line):
            items.append([line[marker.end() :]])
        elif line.startswith(" ") or (
            not line.strip()
            and position + 1 < len(lines)
            and (lines[position + 1].startswith("  ") or pattern.match(lines[position + 1]))
        ):
            items[-1].append(line)
        else:
            break
        position += 1
    return position, List(tuple(_blocks([item[0], *_dedent(item[1:])]) for item in items), numbered)


def _end_of_paragraph(lines: list[str], position: int) -> int:
    while position < len(lines) and lines[position].strip():
        position += 1
    return position


def _end_of_indented(lines: list[str], position: int) -> int:
    """Where indented lines end, those after blank ones included; blank ones at the end are not."""
    end = position
    while position < len(lines) and (not lines[position].strip() or lines[position][0] == " "):
        position += 1
        if lines[position - 1].strip():
            end = position
    return end


def _dedent(lines: list[str]) -> list[str]:
    indent = min((len(s) - len(s.lstrip()) for s in lines if s.strip()), default=0)
    return [line[indent:] for line in lines]
