"""What the pages are made of: the package, its papers, and where each name stands."""

import ast
import json
import re
import tomllib
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from jaxref.papers import Paper, load
from jaxref_docs.package import Package, Room, Symbol, Topic

SPLIT_ABOVE = 45
"""Rooms of more names than this have a page for each topic."""

PROGRAMS = {"train", "papers"}
"""Rooms of commands, whose functions are not methods to choose between."""


class Tutorial(NamedTuple):
    """A notebook, its first heading and its first paragraph."""

    path: Path
    title: str
    about: str

    @property
    def page(self) -> str:
        """The name of its page in the site."""
        return f"tutorials/{self.path.stem}"


class Site:
    """Everything that the pages show, read from a clone of the repository."""

    def __init__(self, root: Path):
        self.root = root
        self.package = Package(root)

    @cached_property
    def papers(self) -> list[Paper]:
        """The papers in the order of their titles."""
        return sorted(load(), key=lambda paper: paper.title.lower())

    @property
    def index(self) -> Path:
        """The file of the papers."""
        return self.root / "jaxref" / "papers" / "index.toml"

    @cached_property
    def papers_of(self) -> dict[str, list[Paper]]:
        """The papers of each public name, the earliest first."""
        found: dict[str, list[Paper]] = {}
        for paper in sorted(self.papers, key=lambda paper: paper.year):
            for name in paper.symbols:
                symbol = self.package.symbols.get(name)
                papers = found.setdefault(symbol.name if symbol else name, [])
                if paper not in papers:
                    papers.append(paper)
        return found

    @cached_property
    def descriptions(self) -> list[tuple[str, str]]:
        """The rows of README.md's table: the cell of the rooms, and what they hold."""
        text = (self.root / "README.md").read_text("utf-8")
        return re.findall(r"^\| (`jaxref\.\w+`[^|]*) \| [\d ]*\| (.*) \|$", text, re.MULTILINE)

    @cached_property
    def rooms(self) -> list[Room]:
        """The rooms in the order of README.md's table, then those that it does not name; their
        topics by title."""
        named = [name for cell, _ in self.descriptions for name in re.findall(r"\.(\w+)`", cell)]
        order = {name: place for place, name in enumerate(named)}
        rooms = [
            replace(room, topics=tuple(sorted(room.topics, key=lambda t: _place(room, t))))
            for room in self.package.rooms.values()
        ]
        return sorted(rooms, key=lambda room: (order.get(room.name, len(order)), room.name))

    def room(self, name: str) -> Room:
        """A room by its name."""
        (found,) = (room for room in self.rooms if room.name == name)
        return found

    @cached_property
    def benches(self) -> list[tuple[str, str]]:
        """Name and docstring of each bench."""
        folder = self.root / "jaxref" / "bench"
        main = ast.parse((folder / "__main__.py").read_text("utf-8"))
        others = {"__init__", "__main__", "harness", "tuning"}
        for statement in main.body:
            match statement:
                case ast.Assign(targets=[ast.Name("NOT_BENCHES")], value=value):
                    others |= ast.literal_eval(value)
        return [
            (path.stem, ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "")
            for path in sorted(folder.glob("*.py"))
            if path.stem not in others
        ]

    @cached_property
    def course(self) -> list[tuple[str, list[Tutorial]]]:
        """The parts of the course that colabs/README.md orders, each with its notebooks."""
        folder = self.root / "colabs"
        parts = re.split(r"^## +(.+)$", (folder / "README.md").read_text("utf-8"), flags=re.M)[1:]
        return [
            (
                heading,
                [_tutorial(folder / file) for file in re.findall(r"\]\((\w+\.ipynb)\)", text)],
            )
            for heading, text in zip(parts[::2], parts[1::2])
        ]

    @property
    def repository(self) -> str:
        """The repository's address as pyproject.toml has it; empty where it has none."""
        project = tomllib.loads((self.root / "pyproject.toml").read_text("utf-8"))["project"]
        return project.get("urls", {}).get("Repository", "")

    def is_split(self, room: Room) -> bool:
        """Whether the room's topics have pages of their own."""
        return len(room.symbols) > SPLIT_ABOVE

    def page(self, room: Room, topic: Topic | None = None) -> str:
        """The name of the page of a room, or of one of its topics."""
        page = f"reference/{room.name}"
        if topic is None or not self.is_split(room):
            return page
        return f"{page}/{slug(room, topic)}"

    def resolve(self, text: str, room: str, symbol: Symbol | None = None) -> Symbol | None:
        """The public name that is meant by `text` in a docstring of a room."""
        names = self.package.symbols
        candidates = [f"jaxref.{room}.{text}", f"jaxref.{text}", text]
        if symbol:
            candidates = [
                f"{symbol.name}.{text}",
                f"{symbol.name.rpartition('.')[0]}.{text}",
                f"{symbol.module}.{text}",
                *candidates,
            ]
        for candidate in candidates:
            if candidate in names:
                return names[candidate]
        # Words of the language, as "entropy", are also names of other rooms: those are not meant.
        if re.fullmatch(r"\w*(_|[a-z][A-Z]|[A-Z][a-z])\w*", text):
            for other in self.rooms:
                if other.name != "train" and (found := names.get(f"jaxref.{other.name}.{text}")):
                    return found
        return None

    def resolve_page(self, text: str) -> str | None:
        """The page of a room or a topic, by the name of its module."""
        for room in self.rooms:
            if text == f"jaxref.{room.name}":
                return self.page(room)
            for topic in room.topics:
                if text == topic.module:
                    return self.page(room, topic)
        return None


def _tutorial(path: Path) -> Tutorial:
    cells = json.loads(path.read_text("utf-8"))["cells"]
    text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    heading, about = re.findall(r"\A# +(.+)\n+(.+)$", text, re.MULTILINE)[0]
    return Tutorial(path, heading.replace("`", ""), re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", about))


def colab_address(repository: str, path: str) -> str:
    """Where Colab opens a notebook of a repository at GitHub; empty for one that is elsewhere.

    >>> colab_address("https://github.com/owner/name", "colabs/train.ipynb")
    'https://colab.research.google.com/github/owner/name/blob/main/colabs/train.ipynb'
    """
    place = repository.removesuffix("/").removesuffix(".git").partition("https://github.com/")[2]
    return f"https://colab.research.google.com/github/{place}/blob/main/{path}" if place else ""


def slug(room: Room, topic: Topic) -> str:
    """The topic's file as a part of an address; names from other rooms stand under "others"."""
    return topic.module.removeprefix(f"jaxref.{room.name}").lstrip(".") or "others"


def _place(room: Room, topic: Topic) -> tuple[bool, str]:
    return slug(room, topic) == "others", title(room, topic).lower()


def title(room: Room, topic: Topic) -> str:
    """A heading: what the file's docstring begins with, if that is short, or the file's name."""
    file = slug(room, topic)
    if file == "others":
        return "From other rooms"
    sentence = re.split(r"(?<=\w)[.:;](?:\s|$)", topic.docstring, maxsplit=1)[0]
    if 0 < len(sentence) <= 60 and "\n\n" not in sentence:
        return " ".join(sentence.replace("`", "").split())
    words = file.rpartition(".")[2].replace("_", " ")
    return words[:1].upper() + words[1:]
