"""Sets plain mathematics: `L = Σ_{j=1}^{N} ε_j (1 - p)^j` with real sub- and superscripts.

The formulas of the docstrings are lines of Unicode text. They are typeset as text too, without a
TeX engine: variables in italics, scripts raised and lowered, columns that the author aligned with
spaces aligned again. So a formula needs no script in the browser, can be selected and searched,
and what it says is exactly what the docstring says.
"""

import re
from collections.abc import Callable, Collection
from itertools import pairwise

from docutils import nodes

_MARKS = "[\u0300-\u036f\u20d0-\u20ff]*"
_LETTER = f"(?:[A-Za-zͰ-Ͽℓℝℕℤ]{_MARKS})"
_SINGLE = re.compile(f"{_LETTER}(?![A-Za-zͰ-Ͽℓ])")
_WORD = re.compile(rf"{_LETTER}(?:{_LETTER}|\d)*(?:_{_LETTER}(?:{_LETTER}|\d)*)*")
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[-+]?\d+)?")
_SCRIPT_RUN = re.compile(rf"[-+−]?(?:{_LETTER}|\d+\.\d+|\d|[⁺⁻ᵀ∞*⊤⊥'′?])+|[+*−-]|∞")
_LIMITS = ("max", "min", "argmax", "argmin", "sup", "inf", "lim", "sum", "mean", "log", "softmax")
_RELATIONS = "=←→≤≥<>≈∝∈~:"

Link = Callable[[str], nodes.Node]


class formula(nodes.General, nodes.Element):
    """A displayed formula; its children are `formula_group`s."""


class formula_group(nodes.General, nodes.Element):
    """Lines that are aligned with each other: `formula_row`s."""


class formula_row(nodes.General, nodes.Element):
    """A line; its children are `formula_cell`s."""


class formula_cell(nodes.General, nodes.TextElement):
    """A part of a line that stands in a column; `span` is the number of columns."""


def display(lines: Collection[str], code: Link, names: Collection[str] = ()) -> formula:
    """The node of a block of lines.

    Args:
      lines: the formula, as it stands in the docstring.
      code: makes the node of what stands between backticks.
      names: identifiers that are kept as they are: the arguments of the function.
    """
    node = formula(classes=["formula"])
    group: list[str] = []
    for line in (*lines, ""):
        if line.strip():
            group.append(line)
        elif group:
            node += formula_group("", *_rows(group, code, names))
            group = []
    return node


def inline(text: str, names: Collection[str] = ()) -> nodes.inline:
    """The node of mathematics within a sentence."""
    node = nodes.inline(classes=["formula-inline"])
    node += _typeset(text, names)
    return node


def is_mathematics(text: str) -> bool:
    """Whether what stands between backticks is a formula rather than code."""
    if re.search(r"\w\((?:[^()]*=)|[\"'@]|\*\*|\bjnp?\.|jax\.|->", text):
        return False
    signs = r"[Α-Ωα-ω√∞≠≤≥±·∈∂∇‖←→∝≈²ᵀ∫ℓ^]|(?<!\w)[A-Za-z]_[a-z0-9](?!\w)"
    return bool(re.search(signs, text)) and not text.startswith("[")


_IN_PROSE = re.compile(
    rf"""(?<![\w.\\/]){_LETTER}(?:[_^](?:
      \{{[^{{}}]*\}} | \([^()]*\) | -\d+  # x_{{i+1}}, u^(k+1), e^-80
      | (?:{_LETTER}|\d)(?!\w)  # x_i, D_f(p)
      | (?<=[Ͱ-Ͽ]_)[A-Za-z]{{2,3}}(?!\w)  # π_ref(y)
      | [A-Za-zͰ-Ͽ\d]{{2,3}}(?![\w(])  # q_min, but not f_dpo(x)
    ))+""",
    re.VERBOSE,
)


def split_prose(text: str) -> list[str]:
    """Cuts a sentence such that each second part is a variable with scripts, like "ε_1"."""
    parts, position = [], 0
    for match in _IN_PROSE.finditer(text):
        parts += [text[position : match.start()], match[0]]
        position = match.end()
    return [*parts, text[position:]]


def _rows(lines: list[str], code: Link, names: Collection[str]) -> list[formula_row]:
    starts = _columns(lines)
    columns = sorted({column for line in starts for column, _ in line})
    rows = []
    for line in starts:
        row = formula_row()
        for position, (column, parts) in enumerate(line):
            index = columns.index(column)
            following = line[position + 1][0] if position + 1 < len(line) else None
            end = columns.index(following) if following is not None else len(columns)
            if position == 0 and index:
                row += formula_cell(span=index)
            cell = formula_cell(span=end - index)
            for number, part in enumerate(parts):
                if number:
                    cell += nodes.inline("", "\u2003", classes=["formula-space"])
                for piece, text in enumerate(re.split(r"`([^`]+)`", part)):
                    cell += [code(text)] if piece % 2 else _typeset(text, names)
            row += cell
        rows.append(row)
    return rows


def _columns(lines: list[str]) -> list[list[tuple[int, list[str]]]]:
    """Each line as parts that start at columns; what aligns with no other line joins the part
    before it."""
    # Combining marks take no column: letters alone say where a part starts.
    letters = [re.findall(f".{_MARKS}", line) for line in lines]
    bare = ["".join(letter[0] for letter in line) for line in letters]
    parts = _cut_at_relations(
        bare, [[m.span() for m in re.finditer(r"\S+(?: \S+)*", line)] for line in bare]
    )
    column_of = _snapped(bare, parts)
    shared = [column_of[start] for spans in parts for start, _ in spans]
    result = []
    for characters, spans in zip(letters, parts):
        cells: list[tuple[int, list[str]]] = []
        for start, end in spans:
            text = "".join(characters[start:end]).rstrip()
            if shared.count(column_of[start]) > 1:
                cells.append((column_of[start], [text]))
            elif not cells:
                cells.append((0, ["\u2003" * (start // 2) + text]))
            else:
                cells[-1][1].append(text)
        result.append(cells)
    return result


def _cut_at_relations(
    lines: list[str], parts: list[list[tuple[int, int]]]
) -> list[list[tuple[int, int]]]:
    """Cuts parts where a relation stands below one that another line pads for: "L   = a" above
    "L_π = b"."""
    padded = {
        start
        for line, spans in zip(lines, parts)
        for start, _ in spans[1:]
        if line[start] in _RELATIONS
    }
    result = []
    for line, spans in zip(lines, parts):
        cut: list[tuple[int, int]] = []
        for start, end in spans:
            inside = [c for c in padded if start < c < end and line[c - 1] == " "]
            edges = [start, *sorted(c for c in inside if line[c] in _RELATIONS), end]
            cut += pairwise(edges)
        result.append(cut)
    return result


def _snapped(lines: list[str], parts: list[list[tuple[int, int]]]) -> dict[int, int]:
    """The column of each start: accents mislead some editors by a column or two, so that starts
    that near each other, behind wide gaps, are meant to be one."""
    column_of = {start: start for spans in parts for start, _ in spans}
    wide = {a for line, spans in zip(lines, parts) for a, _ in spans if line[:a].endswith("   ")}
    for start in sorted(wide):
        near = [other for other in wide if start - 2 <= other < start]
        together = any({start, *near} <= {a for a, _ in spans} for spans in parts)
        if near and not together:
            column_of[start] = column_of[min(near)]
    return column_of


def _typeset(text: str, names: Collection[str]) -> list[nodes.Node]:
    """The nodes of one piece of a line."""
    made: list[nodes.Node] = []
    plain: list[str] = []

    def flush() -> None:
        if plain:
            made.append(nodes.Text("".join(plain)))
            plain.clear()

    def variable(letters: str) -> None:
        if letters[0] in "ΣΠΔΩΦΘΛΓΨΞ" or letters[0] in "ℝℕℤ":
            plain.append(letters)
        else:
            flush()
            made.append(nodes.inline("", letters, classes=["mi"]))

    position = 0
    while position < len(text):
        rest = text[position:]
        before = text[position - 1] if position else " "
        if match := _NUMBER.match(rest):
            plain.append(match[0])
            position += match.end()
        elif match := _WORD.match(rest):
            word = match[0]
            single = _SINGLE.match(word)
            if word in names and "_" in word:
                plain.append(word)
            elif single and (len(word) == single.end() or word[single.end()] in "_0123456789"):
                digits = re.match(r"\d*", word[single.end() :])
                word = single[0] + (digits[0] if digits else "")
                variable(single[0])
                plain.append(word[single.end() :])
            else:
                base, _, tail = word.rpartition("_")
                short = len(tail) == 1 or base in _LIMITS or (base.isupper() and len(tail) < 3)
                word = base if base and short else word
                plain.append(word)
            position += len(word)
        elif rest[0] in "_^" and not before.isspace() and (scripts := _scripts(rest)):
            flush()
            made.append(_script_node(scripts, names))
            position += sum(length for _, _, length in scripts)
        elif rest[0] == "-":
            plain.append("-" if _is_hyphen(text, position) else "\u2212")
            position += 1
        elif rest.startswith("..."):
            plain.append("…")
            position += 3
        else:
            plain.append(rest[0])
            position += 1
    flush()
    return made


def _scripts(rest: str) -> list[tuple[str, str, int]]:
    """The scripts that `rest` begins with, at most one of each kind: "_" or "^", text, length."""
    found: list[tuple[str, str, int]] = []
    while rest[:1] in ("_", "^") and rest[0] not in [kind for kind, _, _ in found]:
        script = _script(rest)
        if not script:
            break
        found.append((rest[0], *script))
        rest = rest[script[1] :]
    return found


def _script(rest: str) -> tuple[str, int] | None:
    """The script that starts at "_" or "^", and how many characters it takes."""
    opening = rest[1:2]
    if opening in ("{", "("):
        closing = {"{": "}", "(": ")"}[opening]
        depth = 0
        for index, character in enumerate(rest[1:], 1):
            depth += (character == opening) - (character == closing)
            if depth == 0:
                inside = rest[2:index] if opening == "{" else rest[1 : index + 1]
                return inside, index + 1
        return None
    match = _SCRIPT_RUN.match(rest, 1)
    if match and rest[0] == "_" and match[0][0] in "-−" and len(match[0]) > 1:
        return None
    return (match[0], match.end()) if match else None


def _script_node(scripts: list[tuple[str, str, int]], names: Collection[str]) -> nodes.Node:
    """One script, or a lower and an upper one above each other."""
    made = {}
    for kind, script, _ in scripts:
        node = nodes.subscript() if kind == "_" else nodes.superscript()
        if re.fullmatch(r"[A-Za-z]{3,}\d*", re.sub(_MARKS, "", script)):
            node += nodes.Text(script)
        else:
            node += _script_letters(script, names)
        made[kind] = node
    if len(made) == 1:
        return made[scripts[0][0]]
    return nodes.inline("", "", made["^"], made["_"], classes=["scripts"])


def _script_letters(script: str, names: Collection[str]) -> list[nodes.Node]:
    """Indices like "ij" are variables side by side; anything else is set as usual."""
    if not re.fullmatch(f"{_LETTER}{{1,2}}", script):
        return _typeset(script, names)
    letters = re.findall(_LETTER, script)
    return [nodes.inline("", letter, classes=["mi"]) for letter in letters]


def _is_hyphen(text: str, position: int) -> bool:
    """Whether "-" joins two words."""
    left = re.search(r"[A-Za-z]+$", text[:position])
    right = re.match(r"[A-Za-z]+", text[position + 1 :])
    return bool(left and right and len(left[0]) > 1 and len(right[0]) > 1)


def visit_formula(self, node: formula) -> None:
    self.body.append(self.starttag(node, "div", role="math"))


def depart_formula(self, node: formula) -> None:
    self.body.append("</div>\n")


def visit_group(self, node: formula_group) -> None:
    self.body.append("<table>")


def depart_group(self, node: formula_group) -> None:
    self.body.append("</table>")


def visit_row(self, node: formula_row) -> None:
    self.body.append(self.starttag(node, "tr", ""))


def depart_row(self, node: formula_row) -> None:
    self.body.append("</tr>")


def visit_cell(self, node: formula_cell) -> None:
    span = node.get("span", 1)
    self.body.append(f'<td colspan="{span}">' if span > 1 else "<td>")


def depart_cell(self, node: formula_cell) -> None:
    self.body.append("</td>")
