"""The Sphinx extension that makes jaxref's site from its source and its index of papers."""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util.docutils import SphinxDirective
from sphinx.writers.html5 import HTML5Translator

from jaxref.papers import Paper
from jaxref_docs import formula
from jaxref_docs.docstring import advice, cost, parse, summary
from jaxref_docs.navigation import navigation
from jaxref_docs.package import Room, Symbol
from jaxref_docs.pages import write_pages
from jaxref_docs.render import (
    Writer,
    arxiv_link,
    arxiv_numbers,
    label,
    link_to,
    link_to_page,
    link_to_paper,
)
from jaxref_docs.site import PROGRAMS, Site, colab_address
from jaxref_docs.site import title as heading


@cache
def read_site(root: Path) -> Site:
    """The site of a clone, read once."""
    return Site(root)


class filtered(nodes.General, nodes.Element):
    """What `_static/filter.js` gives a box to filter by; `what` says how much of what it holds."""


class JaxrefDirective(SphinxDirective):
    """What all directives share: the site, and a note of the files that a page depends on."""

    has_content = False
    final_argument_whitespace = False

    @property
    def site(self) -> Site:
        return read_site(Path(self.env.srcdir).parent)

    def depends_on(self, *paths: Path) -> None:
        for path in (*paths, *Path(__file__).parent.glob("*.py")):
            self.env.note_dependency(str(path))


class RoomPage(JaxrefDirective):
    """`.. jaxref-room:: losses`: what the room is about, and the table of its methods."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        room = self.site.room(self.arguments[0])
        self.depends_on(room.path, self.site.index, *(topic.path for topic in room.topics))
        write = Writer(self.site, room.name)
        made: list[nodes.Node] = [*write.docstring(room.docstring)]
        for cell, text in self.site.descriptions:
            if cell == f"`jaxref.{room.name}`":
                made.append(write.paragraph(f"{text[:1].upper()}{text[1:]}.", "holds"))
        methods = [s for s in room.symbols if not s.is_state and s.kind != "data"]
        if methods:
            made.append(filtered("", self.methods(room, methods), what=f"{len(methods)} methods"))
        if others := [s for s in room.symbols if s not in methods]:
            made.append(nodes.rubric("", "Data types and constants"))
            rows = [
                [[nodes.paragraph("", "", link_to(s, s.short))], [write.paragraph(first(s))]]
                for s in others
            ]
            made.append(table(["Name", "What it is"], [(row, "") for row in rows], "types"))
        return made

    def methods(self, room: Room, methods: list[Symbol]) -> nodes.table:
        """The comparison: name and what it computes, when to use it, what it costs, where it is
        from. A program's functions, which nobody chooses between, have the first and the last."""
        heads = ["Method", "When to use it", "Cost", "Paper"]
        if room.name in PROGRAMS:
            heads = ["Method", "Paper"]
        rows: list[tuple[list[list[nodes.Node]], str]] = []
        for topic in room.topics:
            chosen = [symbol for symbol in topic.symbols if symbol in methods]
            if chosen:
                head = link_to_page(
                    self.site.page(room, topic), nodes.strong("", heading(room, topic))
                )
                rows.append(([[nodes.paragraph("", "", head)]], "of-topic"))
            for symbol in chosen:
                cells = self.cells(room, symbol)
                rows.append(([cells[head] for head in heads], ""))
        return table(heads, rows, "methods")

    def cells(self, room: Room, symbol: Symbol) -> dict[str, list[nodes.Node]]:
        """A row, by the heads of the columns."""
        blocks = parse(symbol.docstring)
        write = Writer(self.site, room.name, symbol)
        name = nodes.paragraph("", "", link_to(symbol, symbol.short), classes=["name"])
        papers = self.site.papers_of.get(symbol.name, [])
        where: list[nodes.Node] = [paper_line(paper) for paper in papers] or [
            nodes.paragraph("", "", arxiv_link(number))
            for number in arxiv_numbers(symbol.docstring)
        ]
        when, costs = advice(blocks), cost(blocks)
        return {
            "Method": [name, write.paragraph(summary(blocks))],
            "When to use it": [write.paragraph(when)] if when else [],
            "Cost": [write.paragraph(f"{costs[:1].upper()}{costs[1:]}")] if costs else [],
            "Paper": where,
        }


class TopicIntroduction(JaxrefDirective):
    """`.. jaxref-topic:: losses jaxref.losses.classification`: the docstring of a file."""

    required_arguments = 2

    def run(self) -> list[nodes.Node]:
        room = self.site.room(self.arguments[0])
        (topic,) = (t for t in room.topics if t.module == self.arguments[1])
        self.depends_on(room.path, topic.path, self.site.index)
        if topic.module == f"jaxref.{room.name}":
            text = "Names that this room offers too, because its users look for them here."
            return [nodes.paragraph("", text)]
        place = topic.path.relative_to(self.site.root).as_posix()
        line = nodes.paragraph("", "", nodes.literal("", place), classes=["place"])
        if not topic.docstring:
            return [line]
        return [line, *Writer(self.site, room.name).docstring(topic.docstring)]


class Docstring(JaxrefDirective):
    """`.. jaxref-docstring:: losses jaxref.losses.squentropy`: what a name's entry says."""

    required_arguments = 2

    def run(self) -> list[nodes.Node]:
        room, name = self.arguments
        symbol = self.site.package.symbols[name]
        made: list[nodes.Node] = []
        for alias in symbol.aliases:
            target = nodes.target("", "", ids=[alias])
            self.env.domains.python_domain.note_object(
                alias, symbol.kind, alias, aliased=True, location=target
            )
            made.append(target)
        made += Writer(self.site, room, symbol).docstring(symbol.docstring)
        if papers := self.site.papers_of.get(symbol.name):
            content: list[nodes.Node] = [nodes.strong("", "In the index of papers. ")]
            for number, paper in enumerate(papers):
                content += [nodes.Text("; ")] * bool(number)
                content.append(link_to_paper(paper, f"{paper.title} ({paper.year})"))
            made.append(nodes.paragraph("", "", *content, classes=["source"]))
        return made


class PaperIndex(JaxrefDirective):
    """`.. jaxref-papers::`: every paper with its names, its claim and the test of it."""

    def run(self) -> list[nodes.Node]:
        self.depends_on(self.site.index)
        papers = self.site.papers
        entries = [self.entry(paper) for paper in papers]
        return [filtered("", *entries, what=f"{len(papers)} papers")]

    def entry(self, paper: Paper) -> nodes.container:
        write = Writer(self.site, "papers")
        node = nodes.container(classes=["paper"], ids=[paper.id])
        standard = self.env.domains.standard_domain
        standard.anonlabels[label(paper)] = self.env.docname, paper.id
        standard.labels[label(paper)] = self.env.docname, paper.id, paper.title
        title = nodes.reference("", "", nodes.strong("", paper.title), refid=paper.id)
        node += nodes.paragraph("", "", title, classes=["paper-title"])
        source = arxiv_link(paper.arxiv) if paper.arxiv else nodes.Text(paper.without_arxiv or "")
        authors = f"{paper.authors.removesuffix('.')}. {paper.year}. "
        node += nodes.paragraph("", "", nodes.Text(authors), source, classes=["paper-source"])
        node += nodes.paragraph("", "", *self.names(paper), classes=["paper-names"])
        node += write.paragraph(paper.claim, "paper-claim")
        file, _, test = paper.test.partition("::")
        shown = [nodes.literal("", file), nodes.Text(" "), nodes.literal("", test)]
        node += nodes.paragraph("", "", nodes.Text("Shown by "), *shown, classes=["paper-test"])
        if paper.renamed:
            names = ", ".join(f"`{old}` is `{new}`" for old, new in paper.renamed.items())
            because = f": {paper.renamed_because}" if paper.renamed_because else ""
            node += write.paragraph(f"Looked for elsewhere: {names}{because}.", "paper-test")
        return node

    def names(self, paper: Paper) -> Iterable[nodes.Node]:
        for number, name in enumerate(paper.symbols):
            if number:
                yield nodes.Text(" ")
            symbol = self.site.package.symbols.get(name)
            short = name.removeprefix("jaxref.")
            yield link_to(symbol, short) if symbol else nodes.literal("", short)


class RoomMap(JaxrefDirective):
    """`.. jaxref-map::`: README.md's table of rooms, with links to their pages."""

    def run(self) -> list[nodes.Node]:
        self.depends_on(self.site.root / "README.md")
        programs = {"jaxref.bench": "benchmarks"}
        rows = []
        for cell, text in self.site.descriptions:
            names = re.findall(r"`([^`]+)`", cell)
            write = Writer(self.site, names[0].removeprefix("jaxref."))
            links = [
                link_to_page(programs[name], nodes.literal("", name))
                if name in programs
                else write.code(name)
                for name in names
            ]
            lines: list[nodes.Node] = [nodes.paragraph("", "", link) for link in links]
            rows.append(([lines, [write.paragraph(text)]], ""))
        return [table(["Room", "What it holds"], rows, "map")]


class Tutorials(JaxrefDirective):
    """`.. jaxref-tutorials::`: the notebooks in the order of the course."""

    def run(self) -> list[nodes.Node]:
        write = Writer(self.site, "")
        self.depends_on(self.site.root / "colabs" / "README.md")
        made: list[nodes.Node] = []
        number = 0
        for part, tutorials in self.site.course:
            made.append(nodes.rubric("", part))
            for tutorial in tutorials:
                self.depends_on(tutorial.path)
                number += 1
                link = link_to_page(tutorial.page, nodes.strong("", tutorial.title))
                place = tutorial.path.relative_to(self.site.root).as_posix()
                line = nodes.paragraph("", "", nodes.Text(f"{number}. "), link, nodes.Text(" "))
                line += self.download(place)
                if address := colab_address(self.site.repository, place):
                    line += nodes.Text(" ")
                    line += nodes.reference("", "in Colab", refuri=address, internal=False)
                body = [line, write.paragraph(tutorial.about)]
                made.append(nodes.container("", *body, classes=["paper"]))
        return made

    def download(self, place: str) -> addnodes.download_reference:
        """A link to the notebook itself."""
        return addnodes.download_reference(
            "",
            "",
            nodes.literal("", place),
            reftarget=f"/../{place}",
            refdoc=self.env.docname,
            refdomain="",
            refexplicit=True,
        )


class Benches(JaxrefDirective):
    """`.. jaxref-benches::`: the benchmarks by name."""

    def run(self) -> list[nodes.Node]:
        write = Writer(self.site, "bench")
        rows = []
        for name, text in self.site.benches:
            self.depends_on(self.site.root / "jaxref" / "bench" / f"{name}.py")
            head = nodes.paragraph("", "", nodes.literal("", name))
            rows.append(([[head], [write.paragraph(summary(parse(text)))]], ""))
        return [table(["Name", "What it measures"], rows, "types")]


def first(symbol: Symbol) -> str:
    """The first sentence or paragraph of a docstring."""
    return summary(parse(symbol.docstring))


def paper_line(paper: Paper) -> nodes.paragraph:
    """A paper in a cell: its entry in the index, by authors and year, and its page at arXiv."""
    names = paper.authors.removesuffix(".").split(", ")
    who = f"{names[0]} et al." if len(names) > 2 else " and ".join(names)
    content: list[nodes.Node] = [link_to_paper(paper, f"{who}, {paper.year}")]
    if paper.arxiv:
        content += [nodes.Text(" "), arxiv_link(paper.arxiv)]
    return nodes.paragraph("", "", *content)


def table(
    heads: list[str], rows: list[tuple[list[list[nodes.Node]], str]], name: str
) -> nodes.table:
    """A table of cells of nodes; a row of one cell runs over all columns."""
    group = nodes.tgroup(cols=len(heads))
    group += [nodes.colspec(colwidth=1) for _ in heads]
    cells = [nodes.entry("", nodes.paragraph("", head)) for head in heads]
    group += nodes.thead("", nodes.row("", *cells))
    body = nodes.tbody()
    for row, kind in rows:
        node = nodes.row(classes=[kind] if kind else [])
        for content in row:
            more = {"morecols": len(heads) - 1} if len(row) == 1 else {}
            node += nodes.entry("", *content, **more)
        body += node
    group += body
    return nodes.table("", group, classes=["jaxref-table", f"table-{name}"])


def visit_filtered(self, node: filtered) -> None:
    self.body.append(f'<div class="filtered" data-what="{node["what"]}">\n')


def depart_filtered(self, node: filtered) -> None:
    self.body.append("</div>\n")


def _begin(app: Sphinx, config: Config) -> None:
    """Reads the source anew, and lets pages say |papers| for the number of papers."""
    read_site.cache_clear()
    site = read_site(Path(app.srcdir).parent)
    config.rst_epilog = f"{config.rst_epilog or ''}\n.. |papers| replace:: {len(site.papers)}\n"


def _write(app: Sphinx) -> None:
    write_pages(read_site(Path(app.srcdir).parent), Path(app.srcdir))


def _link_types(app: Sphinx, domain: str, kind: str, content: addnodes.desc_content) -> None:
    """Links the types in a signature that are public names here; of others only the text stays."""
    site = read_site(Path(app.srcdir).parent)
    module = app.env.ref_context.get("py:module") or "jaxref."
    signatures = [node for node in content.parent if isinstance(node, addnodes.desc_signature)]
    for signature in signatures:
        for reference in list(signature.findall(addnodes.pending_xref)):
            name = reference["reftarget"]
            symbol = site.package.symbols.get(f"{module}.{name}")
            symbol = symbol or site.resolve(name, module.split(".")[1])
            if symbol:
                made = addnodes.pending_xref("", *reference.children)
                made.attributes |= {
                    "refdomain": "py",
                    "reftype": "obj",
                    "reftarget": symbol.name,
                    "refwarn": True,
                }
                reference.replace_self(made)
            else:
                reference.replace_self(reference.children)


def _navigate(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Gives a page's template the function that makes its navigation."""
    site, address = read_site(Path(app.srcdir).parent), context["pathto"]
    context["toctree"] = lambda **_: navigation(site, page, address, app.env)


def _math(writer: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """TeX of the tutorials as MathML, which browsers know without a script."""
    writer.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, object]:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (_math, None), (_math, None))
    app.add_directive("jaxref-room", RoomPage)
    app.add_directive("jaxref-topic", TopicIntroduction)
    app.add_directive("jaxref-docstring", Docstring)
    app.add_directive("jaxref-papers", PaperIndex)
    app.add_directive("jaxref-map", RoomMap)
    app.add_directive("jaxref-tutorials", Tutorials)
    app.add_directive("jaxref-benches", Benches)
    app.add_node(filtered, html=(visit_filtered, depart_filtered))
    app.add_node(formula.formula, html=(formula.visit_formula, formula.depart_formula))
    app.add_node(formula.formula_group, html=(formula.visit_group, formula.depart_group))
    app.add_node(formula.formula_row, html=(formula.visit_row, formula.depart_row))
    app.add_node(formula.formula_cell, html=(formula.visit_cell, formula.depart_cell))
    app.connect("config-inited", _begin)
    app.connect("builder-inited", _write)
    app.connect("object-description-transform", _link_types)
    app.connect("html-page-context", _navigate, priority=400)  # before the theme uses it
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
