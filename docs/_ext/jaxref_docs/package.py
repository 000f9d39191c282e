"""Reads the package's source, without importing it: rooms, public names, signatures, docstrings.

A room is a folder of jaxref with an `__init__.py`; a topic is a file of it. The public names of a
room are those of its `__all__`. The training program has no such list: there the public names are
the functions, classes and documented constants of each file that do not start with an underscore.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign

WITHOUT_PAGE = ("core", "bench")
"""Rooms that nobody imports from: shared helpers, and a program."""

LISTED_BY_FILE = ("train",)
"""Rooms whose public names are those of their files."""


@dataclass(frozen=True)
class Symbol:
    """A public name, or a member of a public class.

    Attributes:
      name: in full, where users import it from ("jaxref.losses.squentropy").
      module: where it is defined ("jaxref.losses.classification").
      kind: "function", "class", "data", "method" or "property".
      signature: what follows the name, "(x: Array, *, axis: int=-1) -> Array"; of a property its
        type, of data its value if that is short.
      docstring: without indentation; empty if there is none.
      parameters: names of the arguments, or of the fields of a tuple or dataclass.
      is_state: a class that holds data and does nothing: a NamedTuple, a dataclass.
      members: of a class: documented public methods and properties.
      aliases: further names under which packages of the room offer it.
    """

    name: str
    module: str
    kind: str
    signature: str
    docstring: str
    parameters: tuple[str, ...] = ()
    is_state: bool = False
    members: tuple["Symbol", ...] = ()
    aliases: list[str] = field(default_factory=list, compare=False)

    @property
    def short(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Topic:
    """A file of a room: its module, docstring, path and public names in the order of the file."""

    module: str
    docstring: str
    path: Path
    symbols: tuple[Symbol, ...]


@dataclass(frozen=True)
class Room:
    """A sub-package: its name ("losses"), docstring, path of its `__init__.py`, and topics."""

    name: str
    docstring: str
    path: Path
    topics: tuple[Topic, ...]

    @property
    def symbols(self) -> list[Symbol]:
        """All public names, topic by topic."""
        return [symbol for topic in self.topics for symbol in topic.symbols]


class Package:
    """The source of a package below a directory."""

    def __init__(self, root: Path, name: str = "jaxref"):
        self.root, self.name = root, name
        self._trees: dict[str, tuple[Path, ast.Module]] = {}

    @cached_property
    def rooms(self) -> dict[str, Room]:
        """The rooms that have a page, by name."""
        folders = sorted(path.parent.name for path in (self.root / self.name).glob("*/__init__.py"))
        return {name: self._room(name) for name in folders if name not in WITHOUT_PAGE}

    @cached_property
    def symbols(self) -> dict[str, Symbol]:
        """All public names in full, aliases and members of classes included."""
        found: dict[str, Symbol] = {}
        for room in self.rooms.values():
            for symbol in room.symbols:
                found |= dict.fromkeys((*symbol.aliases, symbol.name), symbol)
                found |= {member.name: member for member in symbol.members}
        return found

    def tree(self, module: str) -> tuple[Path, ast.Module]:
        """Path and syntax tree of a module of the package."""
        if module not in self._trees:
            path = self.root.joinpath(*module.split("."))
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            self._trees[module] = path, ast.parse(path.read_text("utf-8"))
        return self._trees[module]

    def docstring(self, module: str) -> str:
        """The docstring of a module, or the empty string."""
        return ast.get_docstring(self.tree(module)[1]) or ""

    def listed(self, module: str) -> list[str]:
        """The names of a module's `__all__`."""
        for statement in self.tree(module)[1].body:
            match statement:
                case ast.Assign(targets=[ast.Name("__all__")], value=ast.List(names)):
                    return [ast.literal_eval(name) for name in names]
        return []

    def find(self, module: str, name: str) -> tuple[str, int, Definition | None]:
        """Where a name of a module is defined: that module, the position in it, the definition.

        The definition is None for what comes from other packages, and for modules.
        """
        body = self.tree(module)[1].body
        for position, statement in reversed(list(enumerate(body))):
            match statement:
                case ast.FunctionDef(name=found) | ast.ClassDef(name=found) if found == name:
                    return module, position, statement
                case ast.Assign(targets=targets) if name in map(ast.unparse, targets):
                    return module, position, statement
                case ast.AnnAssign(target=ast.Name(found)) if found == name:
                    return module, position, statement
                case ast.ImportFrom(module=str(origin), names=names, level=0):
                    originals = [a.name for a in names if (a.asname or a.name) == name]
                    if originals and origin.split(".")[0] == self.name:
                        return self.find(origin, originals[0])
        return module, -1, None

    def _room(self, room: str) -> Room:
        package = f"{self.name}.{room}"
        folder = self.root / self.name / room
        subpackages = sorted(
            ".".join((package, *path.parent.relative_to(folder).parts))
            for path in folder.glob("*/**/__init__.py")
        )
        entries: dict[tuple[str, str], list[str]] = {}  # by place of definition: names in full
        for listing in (package, *subpackages):
            for name in self.listed(listing):
                module, _, definition = self.find(listing, name)
                # A name that another room has too is a name of its own here.
                own = module if definition and module.startswith(package) else listing
                entries.setdefault((own, _name_of(definition, name)), []).append(
                    f"{listing}.{name}"
                )
        if room in LISTED_BY_FILE:
            for module, name in self._public(package, folder):
                entries.setdefault((module, name), []).append(f"{module}.{name}")
        topics: dict[str, list[tuple[int, Symbol]]] = {}
        for (module, name), names in entries.items():
            # In the room's own order: the name in the room first, its sub-packages' after it.
            names = list(dict.fromkeys(sorted(names, key=lambda full: full.count("."))))
            origin, position, definition = self.find(module, name)
            symbol = self._symbol(names[0], origin, definition)
            symbol.aliases.extend(names[1:])
            topics.setdefault(module, []).append((position, symbol))
        return Room(
            room,
            self.docstring(package),
            folder / "__init__.py",
            tuple(
                Topic(
                    module,
                    self.docstring(module),
                    self.tree(module)[0],
                    tuple(symbol for _, symbol in sorted(found, key=lambda pair: pair[0])),
                )
                for module, found in sorted(topics.items())
            ),
        )

    def _public(self, package: str, folder: Path) -> Iterator[tuple[str, str]]:
        """The public names of a room's files, each with its module."""
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if path.stem.startswith("__") or "configs" in parts:
                continue
            module = ".".join((package, *parts))
            body = self.tree(module)[1].body
            for position, statement in enumerate(body):
                match statement:
                    case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                        documented = bool(ast.get_docstring(statement))
                    case (
                        ast.Assign(targets=[ast.Name(name)]) | ast.AnnAssign(target=ast.Name(name))
                    ):
                        documented = bool(_text_after(body, position))
                    case _:
                        continue
                if documented and not name.startswith("_"):
                    yield module, name

    def _symbol(self, name: str, module: str, definition: Definition | None) -> Symbol:
        match definition:
            case ast.FunctionDef():
                return Symbol(
                    name,
                    module,
                    "function",
                    _signature(definition),
                    ast.get_docstring(definition) or "",
                    _parameters(definition.args),
                )
            case ast.ClassDef():
                return self._class(name, module, definition)
            case ast.Assign() | ast.AnnAssign():
                body = self.tree(module)[1].body
                text = _text_after(body, body.index(definition))
                if isinstance(definition.value, ast.Name):  # another name of a function
                    origin, _, found = self.find(module, definition.value.id)
                    if isinstance(found, ast.FunctionDef | ast.ClassDef):
                        text = text or f"Another name of `{definition.value.id}`."
                        return replace(self._symbol(name, origin, found), docstring=text)
                value = ast.unparse(definition.value) if definition.value else ""
                return Symbol(name, module, "data", value if len(value) <= 80 else "", text)
        return Symbol(name, module, "data", "", "")

    def _class(self, name: str, module: str, definition: ast.ClassDef) -> Symbol:
        lineage = list(self._lineage(module, definition))
        fields = [
            statement
            for _, ancestor in reversed(lineage)
            for statement in ancestor.body
            if isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and not statement.target.id.startswith("_")
            and "ClassVar" not in ast.unparse(statement.annotation)
        ]
        bases = {ast.unparse(base) for _, ancestor in lineage for base in ancestor.bases}
        marks = " ".join(ast.unparse(mark) for mark in definition.decorator_list)
        holds_data = bool(re.search(r"\b(dataclass|struct)\b", marks)) or "NamedTuple" in bases
        makers = [
            method
            for _, ancestor in lineage
            for method in ancestor.body
            if isinstance(method, ast.FunctionDef) and method.name == "__init__"
        ]
        parameters: tuple[str, ...] = ()
        signature = ""
        if makers:
            signature = _signature(makers[0], bound=True).partition(" -> ")[0]
            parameters = _parameters(makers[0].args)[1:]
        elif holds_data:
            parameters = tuple(dict.fromkeys(field.target.id for field in fields))  # type: ignore[union-attr]
            signature = _field_signature(fields)
        members = tuple(
            self._member(f"{name}.{method.name}", module, method)
            for method in definition.body
            if isinstance(method, ast.FunctionDef)
            and (method.name == "__call__" or not method.name.startswith("_"))
            and ast.get_docstring(method)
            and not any("overload" in ast.unparse(mark) for mark in method.decorator_list)
            and not any(ast.unparse(mark).endswith(".setter") for mark in method.decorator_list)
        )
        return Symbol(
            name,
            module,
            "class",
            signature,
            ast.get_docstring(definition) or "",
            parameters,
            is_state=holds_data and not any(member.kind == "method" for member in members),
            members=members,
        )

    def _member(self, name: str, module: str, method: ast.FunctionDef) -> Symbol:
        marks = [ast.unparse(mark) for mark in method.decorator_list]
        text = ast.get_docstring(method) or ""
        if any(mark.endswith("property") for mark in marks):
            result = ast.unparse(method.returns) if method.returns else ""
            return Symbol(name, module, "property", result, text)
        bound = "staticmethod" not in marks
        return Symbol(
            name, module, "method", _signature(method, bound=bound), text, _parameters(method.args)
        )

    def _lineage(self, module: str, definition: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        """A class and the classes of this package that it is made from."""
        yield module, definition
        for base in definition.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name):
                origin, _, found = self.find(module, base.id)
                if isinstance(found, ast.ClassDef):
                    yield from self._lineage(origin, found)


def _name_of(definition: Definition | None, name: str) -> str:
    return definition.name if isinstance(definition, ast.FunctionDef | ast.ClassDef) else name


def _text_after(body: list[ast.stmt], position: int) -> str:
    """The string that stands below a constant and documents it."""
    match body[position + 1 : position + 2]:
        case [ast.Expr(value=ast.Constant(value=str(text)))]:
            return "\n".join(line.strip() for line in text.strip().splitlines())
    return ""


def _signature(function: ast.FunctionDef, *, bound: bool = False) -> str:
    arguments = function.args
    if bound:
        first = [*arguments.posonlyargs, *arguments.args][:1]
        arguments = ast.arguments(
            posonlyargs=[a for a in arguments.posonlyargs if a not in first],
            args=[a for a in arguments.args if a not in first],
            vararg=arguments.vararg,
            kwonlyargs=arguments.kwonlyargs,
            kw_defaults=arguments.kw_defaults,
            kwarg=arguments.kwarg,
            defaults=arguments.defaults,
        )
    result = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"({ast.unparse(arguments)}){result}"


def _field_signature(fields: list[ast.AnnAssign]) -> str:
    by_name = {ast.unparse(field.target): field for field in fields}
    return "({})".format(
        ", ".join(
            f"{name}: {ast.unparse(field.annotation)}"
            + (f"={ast.unparse(field.value)}" if field.value else "")
            for name, field in by_name.items()
        )
    )


def _parameters(arguments: ast.arguments) -> tuple[str, ...]:
    stars = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *stars]
    return tuple(argument.arg for argument in named)
