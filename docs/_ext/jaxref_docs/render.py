"""Makes docutils nodes of parsed docstrings."""

import re
from collections.abc import Iterable

from docutils import nodes
from sphinx import addnodes

from jaxref.papers import Paper
from jaxref_docs import formula
from jaxref_docs.docstring import Block, Doctest, Formula, List, Section, Text, parse
from jaxref_docs.package import Symbol
from jaxref_docs.site import Site

_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5}|[a-z-]+/\d{7})|https?://[^\s,;)]+[^\s,;).]")
_COMMAND = re.compile(r"(python3?|pip|srun|pytest) ")


class Writer:
    """Writes text of one room: `symbol` is what the text documents, or None for a file's."""

    def __init__(self, site: Site, room: str, symbol: Symbol | None = None):
        self.site, self.room, self.symbol = site, room, symbol
        self.names = set(symbol.parameters) if symbol else set()

    def docstring(self, text: str) -> list[nodes.Node]:
        """A whole docstring."""
        return self.blocks(parse(text))

    def paragraph(self, text: str, *classes: str) -> nodes.paragraph:
        """A paragraph with code, links and formulas in it."""
        return nodes.paragraph("", "", *self.inline(text), classes=list(classes))

    def inline(self, text: str) -> list[nodes.Node]:
        """The nodes of plain text with backticks."""
        made: list[nodes.Node] = []
        for piece, part in enumerate(text.split("`")):
            if piece % 2:
                made.append(self.code(part))
            else:
                made.extend(self._plain(part))
        return made

    def _plain(self, text: str) -> Iterable[nodes.Node]:
        for node in _with_links(text):
            if isinstance(node, nodes.Text):
                for piece, part in enumerate(formula.split_prose(node.astext())):
                    if part:
                        yield formula.inline(part, self.names) if piece % 2 else nodes.Text(part)
            else:
                yield node

    def code(self, text: str) -> nodes.Node:
        """What stands between backticks: a link to a public name, a formula, or code."""
        if re.fullmatch(r"[\w.]+(\(\))?", text) and text not in self.names:
            plain = text.removesuffix("()")
            symbol = self.site.resolve(plain, self.room, self.symbol)
            if symbol and symbol != self.symbol:
                return link_to(symbol, text)
            if page := self.site.resolve_page(plain):
                return link_to_page(page, nodes.literal("", text))
        if formula.is_mathematics(text) and text not in self.names:
            return formula.inline(text, self.names)
        return nodes.literal("", text)

    def blocks(self, blocks: Iterable[Block]) -> list[nodes.Node]:
        """The nodes of blocks; sections that follow each other make one list of fields."""
        made: list[nodes.Node] = []
        for block in blocks:
            if isinstance(block, Section) and block.name != "Example":
                if not made or not isinstance(made[-1], nodes.field_list):
                    made.append(nodes.field_list(classes=["docstring-fields"]))
                made[-1] += self._field(block)
            else:
                made.extend(self._block(block))
        return made

    def _block(self, block: Block) -> list[nodes.Node]:
        match block:
            case Text(text, "reference"):
                start = nodes.strong("", "Reference. ")
                return [nodes.paragraph("", "", start, *self.inline(text), classes=["source"])]
            case Text(text):
                return [self.paragraph(text)]
            case Formula(lines) if _COMMAND.match(lines[0]):
                return [nodes.literal_block("", "\n".join(lines), language="console")]
            case Formula(lines):
                return [formula.display(lines, self.code, self.names)]
            case Doctest(text):
                return [nodes.literal_block(text, text, language="pycon")]
            case List(items, numbered):
                node = nodes.enumerated_list() if numbered else nodes.bullet_list()
                for item in items:
                    node += nodes.list_item("", *self.blocks(item))
                return [node]
            case Section(name, items):
                body = [node for _, content in items for node in self.blocks(content)]
                return [nodes.rubric("", name), *body]
        raise TypeError(f"no such block: {block!r}")

    def _field(self, section: Section) -> nodes.field:
        body = nodes.field_body()
        terms: nodes.definition_list | None = None
        for term, content in section.items:
            if not term:
                terms = None
                body += self.blocks(content)
                continue
            if terms is None:
                terms = nodes.definition_list(classes=["arguments", "simple"])
                body += terms
            names = [
                nodes.Text(part) if part in (", ", " and ", " or ") else nodes.literal("", part)
                for part in re.split(r"(, | and | or )", term)
            ]
            terms += nodes.definition_list_item(
                "",
                nodes.term("", "", *names),
                nodes.definition("", *self.blocks(content)),
            )
        return nodes.field("", nodes.field_name("", section.name), body)


def link_to(symbol: Symbol, text: str) -> addnodes.pending_xref:
    """A link to the entry of a public name."""
    content = nodes.literal("", text, classes=["xref", "py", "py-obj"])
    return addnodes.pending_xref(
        "", content, refdomain="py", reftype="obj", reftarget=symbol.name, refwarn=True
    )


def link_to_page(page: str, *content: nodes.Node) -> addnodes.pending_xref:
    """A link to a page of the site by its name."""
    return addnodes.pending_xref(
        "",
        nodes.inline("", "", *content),
        refdomain="std",
        reftype="doc",
        reftarget=f"/{page}",
        refexplicit=True,
        refwarn=True,
    )


def link_to_paper(paper: Paper, text: str) -> addnodes.pending_xref:
    """A link to a paper's entry in the index of papers."""
    return addnodes.pending_xref(
        "",
        nodes.inline("", text),
        refdomain="std",
        reftype="ref",
        reftarget=label(paper),
        refexplicit=True,
        refwarn=True,
    )


def label(paper: Paper) -> str:
    """The name of the target of a paper's entry."""
    return f"paper-{paper.id}".lower()


def arxiv_link(number: str) -> nodes.reference:
    """A link to a paper's page at arXiv."""
    return nodes.reference(
        "", f"arXiv:{number}", refuri=f"https://arxiv.org/abs/{number}", internal=False
    )


def arxiv_numbers(text: str) -> list[str]:
    """The arXiv numbers in a docstring."""
    return list(dict.fromkeys(re.findall(r"arXiv:(\d{4}\.\d{4,5})", text)))


def _with_links(text: str) -> list[nodes.Node]:
    made: list[nodes.Node] = []
    position = 0
    for match in _ARXIV.finditer(text):
        made.append(nodes.Text(text[position : match.start()]))
        if match[1]:
            made.append(arxiv_link(match[1]))
        else:
            made.append(nodes.reference("", match[0], refuri=match[0], internal=False))
        position = match.end()
    made.append(nodes.Text(text[position:]))
    return [node for node in made if node.astext()]
