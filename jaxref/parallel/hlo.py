"""Optimised HLO as XLA writes it: instructions, computations, and how often each of them runs."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax


class Instruction(NamedTuple):
    """A line of HLO: `%name = shape opcode(arguments), attributes`."""

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """The names of the instructions whose results it takes."""
        return re.findall(r"%([\w.-]+)", self.arguments)

    def called(self, attribute: str) -> list[str]:
        """The computations that an attribute names: one, or a list in braces."""
        found = re.search(attribute + r"=(\{[^}]*\}|%[\w.-]+)", self.attributes)
        return re.findall(r"%([\w.-]+)", found[1]) if found else []


class Computation(NamedTuple):
    """A function of HLO: its instructions by name, and the one whose result is its own."""

    instructions: dict[str, Instruction]
    root: Instruction

    def operands(self, instruction: Instruction) -> list[str]:
        """The operands' shapes."""
        return [self.instructions[name].shape for name in instruction.operands]

    def constant(self, name: str) -> int | None:
        """The integer that an instruction is, or copies."""
        instruction = self.instructions[name]
        if instruction.opcode == "constant" and instruction.arguments.lstrip("-").isdigit():
            return int(instruction.arguments)
        if instruction.opcode in ("copy", "bitcast"):
            return self.constant(instruction.operands[0])
        return None

    def step(self, name: str) -> int:
        """What an instruction adds to the element of a tuple that it starts from."""
        instruction = self.instructions[name]
        if instruction.opcode in ("copy", "bitcast"):
            return self.step(instruction.operands[0])
        if instruction.opcode != "add":
            return 0
        constants = map(self.constant, instruction.operands)
        return sum(
            self.step(n) if c is None else c for n, c in zip(instruction.operands, constants)
        )


class Module:
    """A compiled program's computations, and what happens in a run of them."""

    def __init__(self, compiled: jax.stages.Compiled | str):
        text = compiled if isinstance(compiled, str) else compiled.as_text()
        assert text is not None
        self.header, _, body = text.partition("\n")
        self.computations: dict[str, Computation] = {}
        for block in re.split(r"\n(?=ENTRY|%)", body):
            heading, _, lines = block.partition("\n")
            named = re.match(r"(ENTRY )?%([\w.-]+) ", heading)
            if named is None:
                continue
            parsed = [_instruction(line) for line in lines.splitlines() if " = " in line]
            (root,) = re.findall(r"ROOT %([\w.-]+) ", lines)
            instructions = {one.name: one for one in parsed}
            computation = Computation(instructions, instructions[root])
            self.computations[named[2]] = computation
            if named[1]:
                self.entry = computation

    def executed(
        self,
        measure: Callable[[Instruction, Computation], Any],
        *,
        size: Callable[[Any], float],
        into_fusions: bool,
    ) -> list[tuple[Any, int]]:
        """What `measure` returns of the instructions, where it is not None, and how often each
        runs. Of a conditional's branches, the one with the largest sum of `size`."""

        def run(computation: Computation) -> Iterator[tuple[Any, int]]:
            for instruction in computation.instructions.values():
                value = measure(instruction, computation)
                if value is not None:
                    yield value, 1
                times = 1
                if instruction.opcode == "while":
                    times = self.trip_count(instruction, computation)
                for alternatives in self.called(instruction, into_fusions):
                    runs = [list(run(self.computations[name])) for name in alternatives]
                    largest = max(runs, key=lambda each: sum(size(v) * n for v, n in each))
                    yield from ((value, count * times) for value, count in largest)

        return list(run(self.entry))

    def called(self, instruction: Instruction, into_fusions: bool) -> list[list[str]]:
        """The computations that an instruction runs, each with its alternatives."""
        match instruction.opcode:
            case "while":
                return [instruction.called("condition"), instruction.called("body")]
            case "conditional":
                branches = ("branch_computations", "true_computation", "false_computation")
                return [[name for branch in branches for name in instruction.called(branch)]]
            case "call":
                return [instruction.called("to_apply")]
            case "async-start":
                return [instruction.called("calls")]
            case "fusion" if into_fusions:
                return [instruction.called("calls")]
        return []

    def trip_count(self, loop: Instruction, computation: Computation) -> int:
        """How often a loop runs its body; 1 where only the run itself decides it."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.called("condition")[0]]
        body = self.computations[loop.called("body")[0]]
        compare = condition.root
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            return 1
        counter = condition.instructions[compare.operands[0]]
        bound = condition.constant(compare.operands[1])
        if counter.opcode != "get-tuple-element" or bound is None:
            return 1
        place = int(re.findall(r"index=(\d+)", counter.attributes)[0])
        initial = computation.instructions[loop.operands[0]]
        start = computation.constant(initial.operands[place]) if initial.opcode == "tuple" else 0
        step = body.step(body.root.operands[place]) if body.root.opcode == "tuple" else 1
        return max(0, -(-(bound - (start or 0)) // (step or 1)))


def _instruction(line: str) -> Instruction:
    found = re.match(r"\s*(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z\d-]*)\((.*)$", line)
    assert found is not None, line
    name, shape, opcode, rest = found.groups()
    depth, end = 1, 0
    while depth:
        depth += (rest[end] == "(") - (rest[end] == ")")
        end += 1
    return Instruction(name, shape, opcode, rest[: end - 1], rest[end:])


_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")


def elements(shape: str) -> list[str]:
    """The arrays of a shape, which may be a tuple of tuples."""
    return [found[0] for found in _ARRAY.finditer(shape)]


def sizes(shape: str) -> list[int]:
    """The sizes of the axes of an array."""
    found = _ARRAY.search(shape)
    assert found is not None, shape
    return [int(size) for size in found[2].split(",") if size]


def size_in_bytes(shape: str) -> int:
    """Bytes of all arrays of a shape; a type's bits are the first number of its name."""
    total = 0
    for array in elements(shape):
        kind = array.partition("[")[0]
        bits = 8 if kind == "pred" else int((re.findall(r"\d+", kind) or [0])[0])
        total += -(-math.prod(sizes(array)) * bits // 8)
    return total
