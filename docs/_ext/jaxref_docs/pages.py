"""Writes the pages that are not written by hand, anew at each build: little files of directives for
the reference, and copies of the tutorials."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from jaxref_docs.package import Room, Symbol, Topic
from jaxref_docs.site import Site, title


def write_pages(site: Site, folder: Path) -> None:
    """Writes `reference` and `tutorials` below a folder, and removes what is no page any more."""
    pages = dict(_pages(site))
    pages["reference/rooms.inc"] = _toctree([site.page(room) for room in site.rooms], "Rooms")
    tutorials = [tutorial for _, part in site.course for tutorial in part]
    pages["tutorials/all.inc"] = _toctree([tutorial.page for tutorial in tutorials], "Tutorials")
    for tutorial in tutorials:
        pages[f"{tutorial.page}.ipynb"] = tutorial.path.read_text("utf-8")
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # A page that stays as it is keeps its time, and Sphinx need not read it again.
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")
    for part in ("reference", "tutorials"):
        for path in (folder / part).rglob("*"):
            if path.is_file() and path.relative_to(folder).as_posix() not in pages:
                path.unlink()


def _pages(site: Site) -> Iterator[tuple[str, str]]:
    for room in site.rooms:
        lines = [*_heading(f"jaxref.{room.name}", "="), f".. jaxref-room:: {room.name}", ""]
        if site.is_split(room):
            lines += [".. toctree::", "   :hidden:", "   :maxdepth: 1", ""]
            for topic in room.topics:
                page = site.page(room, topic)
                lines.append(f"   {page.removeprefix('reference/')}")
                text = [*_heading(title(room, topic), "="), *_topic(room, topic)]
                yield f"{page}.rst", "\n".join(text) + "\n"
        else:
            for topic in room.topics:
                lines += [*_heading(title(room, topic), "-"), *_topic(room, topic)]
        yield f"{site.page(room)}.rst", "\n".join(lines) + "\n"


def _toctree(pages: Iterable[str], caption: str) -> str:
    lines = (f"   /{page}" for page in pages)
    return "\n".join([".. toctree::", "   :hidden:", f"   :caption: {caption}", "", *lines, ""])


def _heading(text: str, line: str) -> list[str]:
    escaped = text
    for character in "\\`*_|":
        escaped = escaped.replace(character, f"\\{character}")
    return [escaped, line * (2 * len(escaped)), ""]


def _topic(room: Room, topic: Topic) -> Iterator[str]:
    yield f".. jaxref-topic:: {room.name} {topic.module}"
    yield ""
    module = None
    for symbol in topic.symbols:
        if symbol.name.rpartition(".")[0] != module:
            module = symbol.name.rpartition(".")[0]
            yield f".. py:currentmodule:: {module}"
            yield ""
        yield from _entry(room, symbol, "")


def _entry(room: Room, symbol: Symbol, indent: str) -> Iterator[str]:
    signature = symbol.signature if symbol.kind not in ("data", "property") else ""
    yield f"{indent}.. py:{symbol.kind}:: {symbol.short}{signature}"
    if symbol.kind == "property" and symbol.signature:
        yield f"{indent}   :type: {symbol.signature}"
    if symbol.kind == "data" and symbol.signature:
        yield f"{indent}   :value: {symbol.signature}"
    yield ""
    yield f"{indent}   .. jaxref-docstring:: {room.name} {symbol.name}"
    yield ""
    for member in symbol.members:
        yield from _entry(room, member, indent + "   ")
