"""What one device computes, moves and sends in a compiled program, read from its optimised HLO.

XLA's own cost analysis counts the body of a loop once. A model whose layers are a scan and whose
batch is accumulated in another then seems to compute and send hundreds of times too little. Here
everything is multiplied by how often it runs.
"""

import math
import re
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxref.parallel.hlo import Computation, Instruction, Module, elements, size_in_bytes, sizes

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


def collectives(compiled: jax.stages.Compiled | str, mesh: Mesh) -> list[Collective]:
    """The collective operations that a device executes.

    One inside loops is counted as often as they run it, one in a conditional where the branch with
    the most bytes is taken, one that starts and ends apart from each other once, and so one that
    the TPU's compiler spread over several fusions. An all-reduce of which a device keeps its own
    part, in one fusion, is a reduce-scatter.

    Args:
      compiled: a program partitioned over devices, `jax.jit(f).lower(...).compile()`, of the CPU,
        TPU or GPU backend; or its optimised HLO as text.
      mesh: the mesh of the program's arguments, whose `devices.flat` are its partitions; of several
        slices, which a data-centre network joins, one slice after the other.

    Returns:
      One `Collective` for each instruction, in no particular order. Those of a single device, which
      send nothing, are left out.

    Raises:
      ValueError: the program is for another number of devices than the mesh has.

    Use it to see that a sharding brings the collectives that it should, and what they cost;
    `sent_by_axes` sums them up.

    Cost: a pass over the text of the program on the host; nothing is run on devices.

    Example:
      >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
      >>> collectives(jax.jit(lambda x: 2 * x).lower(1.0).compile(), mesh)
      []
    """
    module = Module(compiled)
    partitions = int((re.findall(r"num_partitions=(\d+)", module.header) or [1])[0])
    slices = len({getattr(device, "slice_index", 0) for device in mesh.devices.flat})
    if partitions not in (1, mesh.size // slices):
        raise ValueError(
            f"mesh has {mesh.size // slices} devices in a slice, and the program is for "
            f"{partitions}"
        )

    def measure(instruction: Instruction, computation: Computation) -> Collective | None:
        kind = instruction.opcode.removesuffix("-start")
        network = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
        if kind == "send" and network:  # what one slice sends to the others
            kind = network[1].lower().replace("_", "-")
            groups = np.arange(mesh.size).reshape(slices, -1).T
        elif kind in KINDS and not _continues(instruction, computation):
            groups = _groups(instruction, mesh.size // slices)
        else:
            return None
        places = np.stack(np.unravel_index(groups, mesh.devices.shape))
        differs = (places != places[:, :, :1]).any(axis=(1, 2))
        axes = tuple(axis for axis, spans in zip(mesh.axis_names, differs) if spans)
        if not axes:
            return None
        root = computation.root
        if root.opcode == "dynamic-slice" and root.operands[0] == instruction.name:
            kind = "reduce-scatter"
        n, operand = groups.shape[1], sum(map(size_in_bytes, computation.operands(instruction)))
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

    Use it to see which mesh axes carry the most, as those belong on the fastest links (`make_mesh`
    lays "tensor" there), and how far a change of the rules helps.

    Cost: a sum over the list.

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


def flops(compiled: jax.stages.Compiled | str) -> float:
    """Floating-point operations of the matrix products that a device computes.

        2 · (entries of the result) · (products that are summed for each)

    of every dot and convolution, where a convolution's padding and the holes of its dilation do not
    count: the TPU's compiler makes convolutions of dots, batched ones with much of both. Kernels
    of Pallas count as what their `cost_estimate` says; `uncounted_kernels` names those without.

    Args:
      compiled: as in `collectives`; one for a single device too.

    Returns:
      The operations of a run, those inside loops as often as they run.

    Use it for a program's arithmetic as it was compiled, rematerialisation included: over the time
    of a run and a chip's peak it is the utilisation. `memory_traffic` is what else may bound the
    time.

    Cost: a pass over the text of the program on the host; nothing is run on devices.

    Example:
      >>> def power(x):
      ...     return jax.lax.scan(lambda y, _: (x @ y, None), x, length=5)[0]
      >>> flops(jax.jit(power).lower(jax.numpy.ones((8, 8))).compile())
      5120.0
    """

    def measure(instruction: Instruction, computation: Computation) -> float | None:
        if instruction.opcode == "dot":
            return _dot_flops(instruction, computation)
        if instruction.opcode == "convolution":
            return _convolution_flops(instruction, computation)
        if instruction.opcode == "custom-call":
            return float((re.findall(_DECLARED_FLOPS, instruction.attributes) or [0])[0])
        return None

    executed = Module(compiled).executed(measure, size=float, into_fusions=True)
    return float(sum(value * count for value, count in executed))


def uncounted_kernels(compiled: jax.stages.Compiled | str) -> dict[str, int]:
    """The TPU kernels that declare no cost, and so have no part in `flops`.

    Args:
      compiled: as in `collectives`.

    Returns:
      How often a device runs each, by the name that the compiler gave it.

    Use it beside `flops`: where it is not empty, that is too low, by what these kernels compute.

    Cost: a pass over the text of the program on the host; nothing is run on devices.

    Example:
      >>> uncounted_kernels(jax.jit(lambda x: 2 * x).lower(1.0).compile())
      {}
    """

    def measure(instruction: Instruction, computation: Computation) -> str | None:
        is_kernel = 'custom_call_target="tpu_custom_call"' in instruction.attributes
        declares = re.search(_DECLARED_FLOPS, instruction.attributes)
        return re.sub(r"[.\d]+$", "", instruction.name) if is_kernel and not declares else None

    counts: dict[str, int] = {}
    for name, count in Module(compiled).executed(measure, size=len, into_fusions=True):
        counts[name] = counts.get(name, 0) + count
    return counts


def memory_traffic(compiled: jax.stages.Compiled | str) -> float:
    """Bytes that a device reads from and writes to its main memory.

    Every instruction outside fusions reads its operands and writes its results, a fusion only the
    slices that it takes of an operand or updates in place. What the TPU's compiler keeps in the
    chip's vector memory is not counted.

    Args:
      compiled: as in `collectives`.

    Returns:
      The bytes of a run, those inside loops as often as they run.

    Use it with `flops` to tell whether memory or arithmetic bounds a program, and which of two does
    less. It is what the program asks for, not what a cache might save.

    Cost: a pass over the text of the program on the host; nothing is run on devices.

    Example:
      >>> memory_traffic(jax.jit(lambda x: 2 * x).lower(jax.numpy.ones(1000)).compile())
      8000.0
    """
    module = Module(compiled)

    def measure(instruction: Instruction, computation: Computation) -> float | None:
        if instruction.opcode in _WITHOUT_TRAFFIC or instruction.opcode.endswith("-done"):
            return None
        return _read(module, instruction, computation) + _written(module, instruction, computation)

    executed = module.executed(measure, size=float, into_fusions=False)
    return float(sum(value * count for value, count in executed))


_DECLARED_FLOPS = r'"cost_estimate":\{[^}]*"flops":"(\d+)"'

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


def _read(module: Module, instruction: Instruction, computation: Computation) -> float:
    """Bytes of main memory that an instruction reads."""
    if instruction.opcode == "fusion":
        (name,) = instruction.called("calls")
        fused = module.computations[name]
        return sum(
            _read_of(module, one, fused)
            for one in fused.instructions.values()
            if one.opcode == "parameter"
        )
    shapes = computation.operands(instruction)
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in ("slice", "dynamic-slice", "gather"):
        result = elements(instruction.shape)[-1 if opcode == instruction.opcode else 1]
        return size_in_bytes(result) if _in_main_memory(shapes[0]) else 0
    if opcode == "dynamic-update-slice":
        return _main_bytes(shapes[1])
    return sum(map(_main_bytes, shapes))


def _read_of(module: Module, instruction: Instruction, fused: Computation) -> float:
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
            total += size_in_bytes(user.shape)
        elif user.opcode == "bitcast":
            total += _read_of(module, user, fused)
        elif user.opcode == "fusion":
            inner = module.computations[user.called("calls")[0]]
            place = user.operands.index(instruction.name)
            total += sum(
                _read_of(module, one, inner)
                for one in inner.instructions.values()
                if one.opcode == "parameter" and one.arguments == str(place)
            )
        elif not (user.opcode == "dynamic-update-slice" and first) and not _passes_on(user):
            total += whole
    return min(total, whole)


def _written(module: Module, instruction: Instruction, computation: Computation) -> float:
    """Bytes of main memory that an instruction writes."""
    match instruction.opcode:
        case "fusion":
            fused = module.computations[instruction.called("calls")[0]]
            return _written(module, fused.root, fused)
        case "tuple":  # the results of a fusion
            parts = [computation.instructions[name] for name in instruction.operands]
            return sum(_written(module, one, computation) for one in parts)
        case "bitcast":
            return _written(module, computation.instructions[instruction.operands[0]], computation)
        case "dynamic-update-slice":
            return _main_bytes(computation.operands(instruction)[1])
        case "parameter":
            return 0
    if _passes_on(instruction):
        return 0
    arrays = elements(instruction.shape)
    if instruction.opcode == "copy-start":  # either side may be elsewhere; the other was read
        return sum(map(_main_bytes, arrays[:2])) - _read(module, instruction, computation)
    if instruction.opcode.endswith("-start") and len(arrays) > 1:  # what it reads comes first
        return _main_bytes(arrays[1])
    return sum(map(_main_bytes, arrays))


def _in_main_memory(shape: str) -> bool:
    return re.search(r"S\(\d+\)", shape) is None


def _main_bytes(shape: str) -> int:
    return sum(size_in_bytes(array) for array in elements(shape) if _in_main_memory(array))


def _continues(instruction: Instruction, computation: Computation) -> bool:
    """Whether an instruction is a further part of a collective that was begun in a fusion before
    it, as the TPU's compiler spreads one over the fusions that hide it."""
    if "async_collective_fusion_config" not in instruction.attributes:
        return False
    return not any(
        "AsyncCollectiveStart" in one.attributes for one in computation.instructions.values()
    )


def _passes_on(instruction: Instruction) -> bool:
    """Whether an instruction only hands on what it is given: a part of a collective that began in a
    fusion before it and ends in one after, whose result the last of them writes."""
    return instruction.opcode == "tuple" or any(
        mark in instruction.attributes
        for mark in ("async_collective_fusion_config", "AsyncCollectiveStart", "AllocateBuffer")
    )


def _groups(instruction: Instruction, num_devices: int) -> np.ndarray:
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


def _dot_flops(instruction: Instruction, computation: Computation) -> float:
    left = sizes(computation.operands(instruction)[0])
    summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    axes = [int(axis) for axis in summed[1].split(",") if axis] if summed else []
    return 2.0 * math.prod(sizes(instruction.shape)) * math.prod(left[axis] for axis in axes)


def _convolution_flops(instruction: Instruction, computation: Computation) -> float:
    inputs, kernel = (sizes(shape) for shape in computation.operands(instruction))
    result = sizes(instruction.shape)
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
