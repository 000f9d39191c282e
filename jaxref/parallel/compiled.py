"""What one device computes, moves and sends in a compiled program, read from its optimised HLO.

XLA's own cost analysis counts the body of a loop once. A model whose layers are a scan and whose
batch is accumulated in another then seems to compute and send hundreds of times too little. Here
everything is multiplied by how often it runs.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
"""The collective operations of XLA."""


class Collective(NamedTuple):
    """An operation that all devices of a group take part in.

    Attributes:
      kind: of `KINDS`.
      axes: the mesh axes along which the devices of a group differ, outermost first.
      group_size: n, devices in a group.
      operand_bytes: size of what a device brings, all operands together.
      result_bytes: size of what it has afterwards.
      sent_bytes: what it sends, once: with x the larger of the two, 2 (n-1)/n x of an all-reduce,
        which is a reduce-scatter and an all-gather around a ring, (n-1)/n x of these and of an
        all-to-all, and x of the others.
      times: how often a device executes it in a run of the program.
    """

    kind: str
    axes: tuple[str, ...]
    group_size: int
    operand_bytes: int
    result_bytes: int
    sent_bytes: float
    times: int


def collectives(compiled: jax.stages.Compiled, mesh: Mesh) -> list[Collective]:
    """The collective operations that a device executes.

    One inside loops is counted as often as they run it, one in a conditional where the branch with
    the most bytes is taken, one that starts and ends apart from each other once, and so one that
    the TPU's compiler spread over several fusions. An all-reduce of which a device keeps its own
    part, in one fusion, is a reduce-scatter.

    Args:
      compiled: a program partitioned over devices, `jax.jit(f).lower(...).compile()`, of the CPU,
        TPU or GPU backend.
      mesh: the mesh of the program's arguments, whose `devices.flat` are its partitions.

    Returns:
      One `Collective` for each instruction, in no particular order. Those of a single device, which
      send nothing, are left out.

    Raises:
      ValueError: the program is for another number of devices than the mesh has.

    Use it to see that a sharding brings the collectives that it should, and what they cost;
    `sent_by_axes` sums them up.

    Example:
      >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
      >>> collectives(jax.jit(lambda x: 2 * x).lower(1.0).compile(), mesh)
      []
    """
    module = _Module(compiled)
    partitions = int((re.findall(r"num_partitions=(\d+)", module.header) or [1])[0])
    if partitions not in (1, mesh.size):
        raise ValueError(f"mesh has {mesh.size} devices, and the program is for {partitions}")

    def measure(instruction: _Instruction, computation: _Computation) -> Collective | None:
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS or _continues(instruction, computation):
            return None
        groups = _groups(instruction, mesh.size)
        places = np.stack(np.unravel_index(groups, mesh.devices.shape))
        differs = (places != places[:, :, :1]).any(axis=(1, 2))
        axes = tuple(axis for axis, spans in zip(mesh.axis_names, differs) if spans)
        if not axes:
            return None
        root = computation.root
        if root.opcode == "dynamic-slice" and root.operands[0] == instruction.name:
            kind = "reduce-scatter"
        n, operand = groups.shape[1], sum(map(_bytes, computation.operands(instruction)))
        result = {"all-gather": operand * n, "reduce-scatter": operand // n}.get(kind, operand)
        rounds = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1, "collective-broadcast": 1}
        sent = rounds.get(kind, (n - 1) / n) * max(operand, result)
        return Collective(kind, axes, n, operand, result, sent, 1)

    executed = module.executed(measure, size=lambda one: one.sent_bytes, into_fusions=True)
    return [one._replace(times=times) for one, times in executed]


def sent_by_axes(operations: list[Collective]) -> dict[tuple[str, ...], dict[str, float]]:
    """Bytes that a device sends in a run of the program.

    Args:
      operations: of `collectives`.

    Returns:
      Bytes by the mesh axes that are spanned and by kind, the most first.

    Example:
      >>> gather = Collective("all-gather", ("fsdp",), 4, 10, 40, 30.0, times=3)
      >>> sent_by_axes([gather, gather._replace(kind="reduce-scatter", times=1)])
      {('fsdp',): {'all-gather': 90.0, 'reduce-scatter': 30.0}}
    """
    sums: dict[tuple[str, ...], dict[str, float]] = {}
    for one in operations:
        kinds = sums.setdefault(one.axes, {})
        kinds[one.kind] = kinds.get(one.kind, 0.0) + one.sent_bytes * one.times
    ranked = sorted(sums.items(), key=lambda item: -sum(item[1].values()))
    return {axes: dict(sorted(k.items(), key=lambda item: -item[1])) for axes, k in ranked}


def flops(compiled: jax.stages.Compiled) -> float:
    """Floating-point operations of the matrix products that a device computes.

        2 · (entries of the result) · (products that are summed for each)

    of every dot and convolution, where a convolution's padding and the holes of its dilation do not
    count: the TPU's compiler makes convolutions of dots, batched ones with much of both. Kernels
    of Pallas count as what their `cost_estimate` says; `uncounted_kernels` names those without.

    Args:
      compiled: as in `collectives`; one for a single device too.

    Returns:
      The operations of a run, those inside loops as often as they run.

    Example:
      >>> def power(x):
      ...     return jax.lax.scan(lambda y, _: (x @ y, None), x, length=5)[0]
      >>> flops(jax.jit(power).lower(jax.numpy.ones((8, 8))).compile())
      5120.0
    """

    def measure(instruction: _Instruction, computation: _Computation) -> float | None:
        if instruction.opcode == "dot":
            return _dot_flops(instruction, computation)
        if instruction.opcode == "convolution":
            return _convolution_flops(instruction, computation)
        if instruction.opcode == "custom-call":
            return float((re.findall(_DECLARED_FLOPS, instruction.attributes) or [0])[0])
        return None

    executed = _Module(compiled).executed(measure, size=float, into_fusions=True)
    return float(sum(value * count for value, count in executed))


def uncounted_kernels(compiled: jax.stages.Compiled) -> dict[str, int]:
    """The TPU kernels that declare no cost, and so have no part in `flops`.

    Args:
      compiled: as in `collectives`.

    Returns:
      How often a device runs each, by the name that the compiler gave it.

    Example:
      >>> uncounted_kernels(jax.jit(lambda x: 2 * x).lower(1.0).compile())
      {}
    """

    def measure(instruction: _Instruction, computation: _Computation) -> str | None:
        is_kernel = 'custom_call_target="tpu_custom_call"' in instruction.attributes
        declares = re.search(_DECLARED_FLOPS, instruction.attributes)
        return re.sub(r"[.\d]+$", "", instruction.name) if is_kernel and not declares else None

    counts: dict[str, int] = {}
    for name, count in _Module(compiled).executed(measure, size=len, into_fusions=True):
        counts[name] = counts.get(name, 0) + count
    return counts


def memory_traffic(compiled: jax.stages.Compiled) -> float:
    """Bytes that a device reads from and writes to its main memory.

    Every instruction outside fusions reads its operands and writes its results, a fusion only the
    slices that it takes of an operand or updates in place. What the TPU's compiler keeps in the
    chip's vector memory is not counted.

    Args:
      compiled: as in `collectives`.

    Returns:
      The bytes of a run, those inside loops as often as they run.

    It is what the program asks for, not what a cache might save.

    Example:
      >>> memory_traffic(jax.jit(lambda x: 2 * x).lower(jax.numpy.ones(1000)).compile())
      8000.0
    """
    module = _Module(compiled)

    def measure(instruction: _Instruction, computation: _Computation) -> float | None:
        if instruction.opcode in _WITHOUT_TRAFFIC or instruction.opcode.endswith("-done"):
            return None
        return module.read(instruction, computation) + module.written(instruction, computation)

    executed = module.executed(measure, size=float, into_fusions=False)
    return float(sum(value * count for value, count in executed))


_DECLARED_FLOPS = r'"cost_estimate":\{"flops":"(\d+)"'

_WITHOUT_TRAFFIC = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "partition-id",
    "replica-id",
    "after-all",
    "opt-barrier",
}


class _Instruction(NamedTuple):
    """A line of HLO: `%name = shape opcode(arguments), attributes`."""

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.arguments)

    def called(self, attribute: str) -> list[str]:
        """The computations that an attribute names: one, or a list in braces."""
        found = re.search(attribute + r"=(\{[^}]*\}|%[\w.-]+)", self.attributes)
        return re.findall(r"%([\w.-]+)", found[1]) if found else []


class _Computation(NamedTuple):
    instructions: dict[str, _Instruction]
    root: _Instruction

    def operands(self, instruction: _Instruction) -> list[str]:
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


class _Module:
    """A program's computations, and what happens in a run of them."""

    def __init__(self, compiled: jax.stages.Compiled):
        text = compiled.as_text()
        assert text is not None
        self.header, _, body = text.partition("\n")
        self.computations: dict[str, _Computation] = {}
        for block in re.split(r"\n(?=ENTRY|%)", body):
            heading, _, lines = block.partition("\n")
            named = re.match(r"(ENTRY )?%([\w.-]+) ", heading)
            if named is None:
                continue
            parsed = [_instruction(line) for line in lines.splitlines() if " = " in line]
            (root,) = re.findall(r"ROOT %([\w.-]+) ", lines)
            instructions = {one.name: one for one in parsed}
            computation = _Computation(instructions, instructions[root])
            self.computations[named[2]] = computation
            if named[1]:
                self.entry = computation

    def executed(
        self,
        measure: Callable[[_Instruction, _Computation], Any],
        *,
        size: Callable[[Any], float],
        into_fusions: bool,
    ) -> list[tuple[Any, int]]:
        """What `measure` returns of the instructions, where it is not None, and how often each
        runs. Of a conditional's branches, the one with the largest sum of `size`."""

        def run(computation: _Computation) -> Iterator[tuple[Any, int]]:
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

    def called(self, instruction: _Instruction, into_fusions: bool) -> list[list[str]]:
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

    def trip_count(self, loop: _Instruction, computation: _Computation) -> int:
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

    def read(self, instruction: _Instruction, computation: _Computation) -> float:
        """Bytes of main memory that an instruction reads."""
        if instruction.opcode == "fusion":
            (name,) = instruction.called("calls")
            fused = self.computations[name]
            return sum(
                self.read_of(one, fused)
                for one in fused.instructions.values()
                if one.opcode == "parameter"
            )
        shapes = computation.operands(instruction)
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in ("slice", "dynamic-slice", "gather"):
            result = _elements(instruction.shape)[-1 if opcode == instruction.opcode else 1]
            return _bytes(result) if _in_main_memory(shapes[0]) else 0
        if opcode == "dynamic-update-slice":
            return _main_bytes(shapes[1])
        return sum(map(_main_bytes, shapes))

    def read_of(self, instruction: _Instruction, fused: _Computation) -> float:
        """Bytes that a fusion reads of one of its parameters, or of what views it."""
        whole = _main_bytes(instruction.shape)
        if not whole:
            return 0
        total = 0.0
        for user in fused.instructions.values():
            if instruction.name not in user.operands:
                continue
            first = user.operands[0] == instruction.name
            if user.opcode in ("dynamic-slice", "slice", "gather") and first:
                total += _bytes(user.shape)
            elif user.opcode == "bitcast":
                total += self.read_of(user, fused)
            elif user.opcode == "fusion":
                inner = self.computations[user.called("calls")[0]]
                place = user.operands.index(instruction.name)
                total += sum(
                    self.read_of(one, inner)
                    for one in inner.instructions.values()
                    if one.opcode == "parameter" and one.arguments == str(place)
                )
            elif not (user.opcode == "dynamic-update-slice" and first) and not _passes_on(user):
                total += whole
        return min(total, whole)

    def written(self, instruction: _Instruction, computation: _Computation) -> float:
        """Bytes of main memory that an instruction writes."""
        match instruction.opcode:
            case "fusion":
                fused = self.computations[instruction.called("calls")[0]]
                return self.written(fused.root, fused)
            case "tuple":  # the results of a fusion
                parts = [computation.instructions[name] for name in instruction.operands]
                return sum(self.written(one, computation) for one in parts)
            case "bitcast":
                return self.written(computation.instructions[instruction.operands[0]], computation)
            case "dynamic-update-slice":
                return _main_bytes(computation.operands(instruction)[1])
            case "parameter":
                return 0
        if _passes_on(instruction):
            return 0
        elements = _elements(instruction.shape)
        if instruction.opcode == "copy-start":  # either side may be elsewhere; the other was read
            return sum(map(_main_bytes, elements[:2])) - self.read(instruction, computation)
        if instruction.opcode.endswith("-start") and len(elements) > 1:  # what it reads comes first
            return _main_bytes(elements[1])
        return sum(map(_main_bytes, elements))


def _instruction(line: str) -> _Instruction:
    found = re.match(r"\s*(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z\d-]*)\((.*)$", line)
    assert found is not None, line
    name, shape, opcode, rest = found.groups()
    depth, end = 1, 0
    while depth:
        depth += (rest[end] == "(") - (rest[end] == ")")
        end += 1
    return _Instruction(name, shape, opcode, rest[: end - 1], rest[end:])


_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")


def _elements(shape: str) -> list[str]:
    """The arrays of a shape, which may be a tuple of tuples."""
    return [found[0] for found in _ARRAY.finditer(shape)]


def _sizes(shape: str) -> list[int]:
    found = _ARRAY.search(shape)
    assert found is not None, shape
    return [int(size) for size in found[2].split(",") if size]


def _bytes(shape: str) -> int:
    """Bytes of all arrays of a shape; a type's bits are the first number of its name."""
    total = 0
    for array in _elements(shape):
        kind = array.partition("[")[0]
        bits = 8 if kind == "pred" else int((re.findall(r"\d+", kind) or [0])[0])
        total += -(-math.prod(_sizes(array)) * bits // 8)
    return total


def _in_main_memory(shape: str) -> bool:
    return re.search(r"S\(\d+\)", shape) is None


def _main_bytes(shape: str) -> int:
    return sum(_bytes(array) for array in _elements(shape) if _in_main_memory(array))


def _continues(instruction: _Instruction, computation: _Computation) -> bool:
    """Whether an instruction is a further part of a collective that was begun in a fusion before
    it, as the TPU's compiler spreads one over the fusions that hide it."""
    if "async_collective_fusion_config" not in instruction.attributes:
        return False
    return not any(
        "AsyncCollectiveStart" in one.attributes for one in computation.instructions.values()
    )


def _passes_on(instruction: _Instruction) -> bool:
    """Whether an instruction in a fusion is part of a collective, or hands on what it is given."""
    return (
        instruction.opcode in ("tuple", *KINDS)
        or 'custom_call_target="AsyncCollective' in instruction.attributes
        or 'custom_call_target="AllocateBuffer"' in instruction.attributes
    )


def _groups(instruction: _Instruction, num_devices: int) -> np.ndarray:
    """`[groups, devices in each]`, the partitions that take part together."""
    attributes = instruction.attributes
    pairs = re.search(r"source_target_pairs=\{(.*?\})\}", attributes)
    if pairs:
        return np.array(re.findall(r"\d+", pairs[1]), int).reshape(-1, 2)
    iota = re.search(r"replica_groups=(\[[\d,]+\]<=\S*?)(?:, |$)", attributes)
    if iota:
        return _iota(iota[1])
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\)?)\))? \{([^}]*)\}", attributes
    )
    if named:
        return _named_groups(*named.groups())
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", attributes)
    if listed is None:  # none are named: all devices
        return np.arange(num_devices).reshape(1, -1)
    return np.array([group.split(",") for group in re.findall(r"\{([\d,]+)\}", listed[1])], int)


def _iota(text: str) -> np.ndarray:
    """`[4,2]<=[2,4]T(1,0)`: the numbers from 0 in the second shape, transposed, in the first."""
    shape, reshaped, permutation = (
        [int(n) for n in part.split(",") if n]
        for part in re.findall(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)[0]
    )
    numbers = np.arange(math.prod(reshaped)).reshape(reshaped)
    return numbers.transpose(permutation or range(len(reshaped))).reshape(shape)


def _named_groups(mesh: str, order: str | None, over: str) -> np.ndarray:
    """`mesh['a'=2,'b'=4] {'b'}`: groups along axes of a mesh of the compiler's own. `order` is how
    the devices lie in it, if not by number; `'b':(2)2` is a part of an axis, of size 2 within 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    devices = np.arange(math.prod(sizes.values()))
    if order is not None:
        shape = ",".join(map(str, sizes.values()))
        transposed = re.match(r"(\[[\d,]+\]T.*)", order)
        devices = (
            _iota(f"[{shape}]<={transposed[1]}") if transposed else np.array(order.split(","), int)
        )
    places = np.indices(tuple(sizes.values())).reshape(len(sizes), -1)
    apart = places.copy()  # what tells groups apart: the places without what `over` names
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over):
        axis = list(sizes).index(name)
        within = sizes[name] // (int(before) * int(size)) if size else 1
        count = int(size) if size else sizes[name]
        apart[axis] -= places[axis] // within % count * within
    order_by_group = np.lexsort(apart[::-1])
    groups = len(np.unique(apart, axis=1).T)
    return devices.ravel()[order_by_group].reshape(groups, -1)


def _dot_flops(instruction: _Instruction, computation: _Computation) -> float:
    left = _sizes(computation.operands(instruction)[0])
    summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    axes = [int(axis) for axis in summed[1].split(",") if axis] if summed else []
    return 2.0 * math.prod(_sizes(instruction.shape)) * math.prod(left[axis] for axis in axes)


def _convolution_flops(instruction: _Instruction, computation: _Computation) -> float:
    inputs, kernel = (_sizes(shape) for shape in computation.operands(instruction))
    result = _sizes(instruction.shape)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None
    left, right, out = labels.groups()
    # Every output sums over the kernel's input features and the window's places that are on an
    # entry of the input; groups have made the kernel smaller.
    pairs = 2.0 * result[out.index("b")] * result[out.index("f")] * kernel[right.index("i")]
    text = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = {} if text is None else dict(part.split("=") for part in text[1].split())
    for i, label in enumerate(sorted(label for label in out if label.isdigit())):
        stride, dilation, holes, padding = (
            window[name].split("x")[i] if name in window else default
            for name, default in (
                ("stride", "1"),
                ("rhs_dilate", "1"),
                ("lhs_dilate", "1"),
                ("pad", "0_0"),
            )
        )
        outputs = np.arange(result[out.index(label)])[:, None] * int(stride)
        offsets = np.arange(kernel[right.index(label)]) * int(dilation)
        places = outputs + offsets - int(padding.split("_")[0])
        last = (inputs[left.index(label)] - 1) * int(holes)
        pairs *= int(((places >= 0) & (places <= last) & (places % int(holes) == 0)).sum())
    return pairs
