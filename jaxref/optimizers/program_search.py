"""Optimizers as programs, and the evolution that found Lion: programs as data, run, shortened,
mutated and selected."""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxref.core.checks import check_interval, check_same_tree
from jaxref.core.numerics import compute_dtype

INPUTS = ("w", "g", "m", "v", "lr")


class Statement(NamedTuple):
    """`target = function(*arguments)`.

    Attributes:
      target: the variable that is assigned, new or not; inputs may be assigned too.
      function: a name of the language of `UpdateProgram`.
      arguments: names of variables, and numbers.
    """

    target: str
    function: str
    arguments: tuple[str | float, ...]

    def __str__(self):
        arguments = [str(a) for a in self.arguments]
        if self.function in ("+", "-", "*", "/"):
            return f"{self.target} = {f' {self.function} '.join(arguments)}"
        return f"{self.target} = {self.function}({', '.join(arguments)})"


class UpdateProgram(NamedTuple):
    """An optimizer as a list of assignments; `print` shows it as a Python function.

    Its inputs are the weights w, their gradient g, the variables m and v, which it keeps from step
    to step and which are 0 at first (trees like the weights), and the learning rate lr (a number).
    The weights become w - update. Values are numbers, trees like the weights, or trees with a
    number per leaf; they are broadcast to each other. The functions:

        + - * / max min power(x, y)       abs sign negative reciprocal square cube
        sqrt(|x|) cbrt exp exp2 exp10 expm1 log|x| log2|x| log10|x| log1p = log|1 + x|
        sin cos tan arcsin arccos arctan and sinh cosh tanh arcsinh arccosh arctanh
        interp(x, y, a) = (1 - a) x + a y
        norm(x)  of each leaf             global_norm(x)  of the whole tree
        dot(x, y), cosine_sim(x, y)       clip_by_global_norm(x, c) = min(1, c / ‖x‖) x
        get_pi() get_e() get_eps() = 1e-8

    Attributes:
      statements: the assignments, a tuple of `Statement`, executed in order.
      outputs: the variables that hold the update and the new m and v at the end.

    Reference: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023,
    arXiv:2302.06675.
    """

    statements: tuple[Statement, ...]
    outputs: tuple[str, str, str] = ("update", "m", "v")

    def __str__(self):
        head = f"def train({', '.join(INPUTS)}):"
        lines = [*map(str, self.statements), f"return {', '.join(self.outputs)}"]
        return "\n    ".join([head, *lines])


adamw_program = UpdateProgram(
    (
        Statement("g2", "square", ("g",)),
        Statement("m", "interp", ("g", "m", 0.9)),
        Statement("v", "interp", ("g2", "v", 0.999)),
        Statement("sqrt_v", "sqrt", ("v",)),
        Statement("sqrt_v", "+", ("sqrt_v", 1e-8)),
        Statement("update", "/", ("m", "sqrt_v")),
        Statement("wd", "*", ("w", 0.01)),
        Statement("update", "+", ("update", "wd")),
        Statement("lr", "*", ("lr", 0.001)),
        Statement("update", "*", ("update", "lr")),
    )
)
"""AdamW without bias correction, where the paper's search starts; lr is relative to 0.001."""

lion_program = UpdateProgram(
    (
        Statement("update", "interp", ("g", "m", 0.9)),
        Statement("update", "sign", ("update",)),
        Statement("m", "interp", ("g", "m", 0.99)),
        Statement("wd", "*", ("w", 0.1)),
        Statement("update", "+", ("update", "wd")),
        Statement("update", "*", ("update", "lr")),
    )
)
"""Lion with weight decay 0.1, where the paper's search ended after simplification by hand."""


def run_update_program(
    program: UpdateProgram,
    w: optax.Params,
    g: optax.Updates,
    m: Any,
    v: Any,
    lr: ArrayLike,
) -> tuple[optax.Updates, Any, Any]:
    r"""One step of the optimizer that a program describes.

        (update, m, v) = program(w, g, m, v, lr),     then w ← w - update

    Args:
      program: static data: close over it under `jax.jit`, or name it in `static_argnums`.
      w: weights, a tree of floating-point arrays.
      g: gradients, a tree like `w`.
      m: first variable that the program keeps, a tree like `w`; 0 at first.
      v: second variable that the program keeps, a tree like `w`; 0 at first.
      lr: the learning rate's schedule value, a number.

    Returns:
      the update in the types of `g`, the new `m` and `v` in theirs; computed in at least float32
      (statements on constants alone in float64, when the program is traced). Programs may divide
      by zero or overflow: what comes out is theirs.

    Raises:
      ValueError: the program uses a variable before its assignment, an unknown function or a
        wrong number of arguments, returns what is not like the weights; trees do not match.

    Use it to train with a program that `regularized_evolution` found, and to measure its fitness.

    Cost: m and v for each parameter, used or not; the work of the statements, which `jax.jit`
    fuses.

    Example:
      >>> w, zero = jnp.array([1.0, -2.0]), jnp.zeros(2)
      >>> update, m, v = run_update_program(lion_program, w, jnp.array([3.0, 0.1]), zero, zero, 0.1)
      >>> print(update)
      [0.11 0.08]

    Reference: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023,
    arXiv:2302.06675.
    """
    _check_valid(program)
    check_same_tree(w, g=g, m=m, v=v)
    structure = jax.tree.structure(w)
    values: dict[str, Any] = {
        name: tuple(jnp.asarray(x, compute_dtype(x)) for x in jax.tree.leaves(tree))
        for name, tree in zip(INPUTS, (w, g, m, v))
    }
    values["lr"] = jnp.asarray(lr, jnp.float32)
    for target, function, arguments in program.statements:
        resolved = [values[a] if isinstance(a, str) else float(a) for a in arguments]
        values[target] = _call(function, resolved)

    def rounded(name, like):
        leaves = zip(values[name], jax.tree.leaves(like))
        new = [x.astype(jnp.result_type(old)) for x, old in leaves]
        return jax.tree.unflatten(structure, new)

    update, new_m, new_v = map(rounded, program.outputs, (g, m, v))
    return update, new_m, new_v


def simplify_update_program(program: UpdateProgram) -> UpdateProgram:
    """The same optimizer in fewer statements.

    Removes statements that the outputs do not depend on, evaluates those on constants alone,
    merges those that compute the same value, and drops steps that change nothing (x * 1, x / 1,
    x - 0, -(-x), | |x| |, sign(sign(x))). Every rewriting is exact: the outputs keep their bits.
    A variable that is assigned again gets a name of its own.

    Args:
      program: the program.

    Returns:
      the short program; simplifying it again changes nothing.

    Raises:
      ValueError: the program is not valid, see `run_update_program`.

    Use it to read what a search found: in the paper's runs two thirds of the statements were
    redundant. What is nearly without effect has to be found by removing it and measuring.

    Cost: a few passes over the statements, on the host.

    Example:
      >>> print(simplify_update_program(UpdateProgram((
      ...     Statement("two", "+", (1.0, 1.0)),
      ...     Statement("x", "sin", ("g",)),
      ...     Statement("m", "+", ("g", "two")),
      ...     Statement("update", "*", ("m", "lr"))))))
      def train(w, g, m, v, lr):
          m_1 = g + 2.0
          update = m_1 * lr
          return update, m_1, v

    Reference: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023,
    arXiv:2302.06675.
    """
    _check_valid(program)
    definitions, outputs = _trace(program)
    needed = set(outputs)
    for name, (_, arguments) in reversed(definitions.items()):
        if name in needed:
            needed.update(a for a in arguments if isinstance(a, str))
    statements = (Statement(name, *call) for name, call in definitions.items() if name in needed)
    return UpdateProgram(tuple(statements), outputs)


class EvolutionResult(NamedTuple):
    """What `regularized_evolution` returns.

    Attributes:
      program: the fittest program met, with its redundant statements.
      fitness: its fitness.
      history: [generations], the best fitness met so far.
      evaluations: how often `fitness` was called; the other children were known already.
    """

    program: UpdateProgram
    fitness: float
    history: np.ndarray
    evaluations: int


def regularized_evolution(
    fitness: Callable[[UpdateProgram], float],
    initial_program: UpdateProgram = adamw_program,
    *,
    key: Array,
    generations: int,
    population: int = 1000,
    tournament: int = 2,
    restart_every: int | None = None,
) -> EvolutionResult:
    """Searches programs by mutation, tournament and age.

    The population is a queue, at first of copies of the initial program. In each generation the
    fittest of `tournament` random members is copied and mutated, the child enters the queue, and
    the oldest member leaves it, whatever its fitness. A mutation inserts a random statement,
    deletes one, or replaces one argument of one by a variable or by a constant from N(0, 1), or
    multiplies a constant by 2^a, a ~ N(0, 1). Before anything is run, an abstract execution rejects
    children that are not valid programs, which are mutated anew, and finds those that compute what
    a known program computes, whose fitness is not measured again.

    Args:
      fitness: a function of a program, simplified, to a number, larger is better; NaN counts as
        -inf. It runs on the host, and may train a small model: minus its validation loss, say.
      initial_program: where to start. Default AdamW, as in the paper.
      key: the key of all random choices.
      generations: the number of children, at least 0.
      population: the length of the queue. Default 1000, as in the paper.
      tournament: members that compete, in [1, population]. Default 2, as in the paper.
      restart_every: after so many generations, refill the queue with the best program met so far.
        Default: never. The paper does it between searches, and also runs several from the initial
        program: with several keys.

    Returns:
      `EvolutionResult`.

    Raises:
      ValueError: a number out of its range, or the initial program is not valid.

    Use it with fitness that costs seconds at most: the paper needed 10^5 programs. `fitness` on
    tasks of several sizes, small to large, belongs to `funnel_selection`.

    Cost: a call of `fitness` for each child that computes something new, `generations` + 1 at most;
    the rest is on the host.

    Example:
      >>> length = lambda program: -len(program.statements)
      >>> key = jax.random.key(0)
      >>> result = regularized_evolution(length, key=key, generations=50, population=5)
      >>> result.fitness > length(adamw_program)
      True

    Reference: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023,
    arXiv:2302.06675.
    """
    _check_integers(0, generations=generations)
    _check_integers(1, population=population, tournament=tournament)
    check_interval(1, population, tournament=tournament)
    if restart_every is not None:
        _check_integers(1, restart_every=restart_every)
    _check_valid(initial_program)
    rng = np.random.default_rng(np.ravel(jax.random.key_data(key)))
    known: dict[str, float] = {}

    def measured(program):
        digest = _digest(program)
        if digest not in known:
            value = float(fitness(simplify_update_program(program)))
            known[digest] = -math.inf if math.isnan(value) else value
        return known[digest], program

    best = measured(initial_program)
    queue = deque([best] * population)
    history = []
    for generation in range(1, generations + 1):
        members = rng.choice(population, tournament, replace=False)
        _, parent = max((queue[i] for i in members), key=_fitness)
        child = measured(_mutate(parent, rng))
        queue.append(child)
        queue.popleft()
        best = max(best, child, key=_fitness)
        if restart_every is not None and generation % restart_every == 0:
            queue = deque([best] * population)
        history.append(best[0])
    return EvolutionResult(best[1], best[0], np.array(history), len(known))


def funnel_selection(
    programs: Iterable[UpdateProgram],
    tasks: Sequence[Callable[[UpdateProgram], float]],
    baseline: UpdateProgram = adamw_program,
) -> tuple[UpdateProgram, ...]:
    """Which programs beat the baseline on every task of a series that grows.

    A program that does not surpass the baseline on a task is not measured on the larger ones. It
    keeps programs that only fit the small task of the search from the expensive tasks.

    Args:
      programs: the candidates, of several searches, say.
      tasks: fitness functions, larger is better, from the cheapest to the most expensive.
      baseline: what to surpass. Default AdamW.

    Returns:
      those that surpass it on every task, the fittest on the last task first.

    Raises:
      ValueError: there is no task.

    Use it after `regularized_evolution`, whose fitness is a proxy, to choose what generalises.

    Cost: a call of the first task for each program, and of each further one for those that are
    left.

    Example:
      >>> length = lambda program: -len(program.statements)
      >>> funnel_selection([lion_program, adamw_program], [length, length]) == (lion_program,)
      True

    Reference: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023,
    arXiv:2302.06675.
    """
    if not tasks:
        raise ValueError("tasks must hold at least one fitness function, got none")
    candidates = [(0.0, program) for program in programs]
    for task in tasks:
        bar = task(baseline)
        measured = [(task(program), program) for _, program in candidates]
        candidates = [candidate for candidate in measured if candidate[0] > bar]
    return tuple(program for _, program in sorted(candidates, key=_fitness, reverse=True))


# The language. A value is a number, or a tuple with an array per leaf. Numbers that are Python
# floats are constants: functions of constants are computed by NumPy, in float64, when the program
# is traced or simplified alike, so that folding them cannot change a bit.


def _named(name):
    return lambda xp, *arguments: getattr(xp, name)(*arguments)


_ELEMENTWISE: dict[str, tuple[int, Callable[..., Any]]] = {
    **{name: (0, lambda xp, value=value: value) for name, value in
       {"get_pi": math.pi, "get_e": math.e, "get_eps": 1e-8}.items()},
    **{name: (1, _named(name)) for name in (
        "abs", "sign", "negative", "reciprocal", "square", "cbrt", "exp", "exp2", "expm1",
        "sin", "cos", "tan", "arcsin", "arccos", "arctan",
        "sinh", "cosh", "tanh", "arcsinh", "arccosh", "arctanh",
    )},
    "cube": (1, lambda xp, x: x * x * x),
    "exp10": (1, lambda xp, x: xp.power(10.0, x)),
    "sqrt": (1, lambda xp, x: xp.sqrt(xp.abs(x))),
    "log": (1, lambda xp, x: xp.log(xp.abs(x))),
    "log2": (1, lambda xp, x: xp.log2(xp.abs(x))),
    "log10": (1, lambda xp, x: xp.log10(xp.abs(x))),
    "log1p": (1, lambda xp, x: xp.log(xp.abs(1 + x))),
    "+": (2, _named("add")),
    "-": (2, _named("subtract")),
    "*": (2, _named("multiply")),
    "/": (2, _named("divide")),
    "max": (2, _named("maximum")),
    "min": (2, _named("minimum")),
    "power": (2, _named("power")),
    "interp": (3, lambda xp, x, y, a: (1 - a) * x + a * y),
    "clip_by_global_norm": (2, lambda xp, x, factor: xp.minimum(1.0, factor) * x),
}  # fmt: skip
_REDUCTIONS = {"norm": 1, "global_norm": 1, "dot": 2, "cosine_sim": 2}
_ARITY = {name: arity for name, (arity, _) in _ELEMENTWISE.items()} | _REDUCTIONS
_COMMUTATIVE = {"+", "*"}


def _call(function, arguments):
    constant = all(isinstance(a, float) for a in arguments)
    xp: Any = np if constant else jnp

    def each(name, *values):
        """The elementwise function of numbers and of trees, leaf by leaf."""
        call = partial(_ELEMENTWISE[name][1], xp)
        lengths = [len(x) for x in values if isinstance(x, tuple)]
        if not lengths:
            return call(*values)
        spread = [x if isinstance(x, tuple) else (x,) * lengths[0] for x in values]
        return tuple(map(call, *spread))

    def total(x):
        return sum((xp.sum(leaf) for leaf in x), start=0.0) if isinstance(x, tuple) else x

    def global_norm(x):
        return xp.sqrt(total(each("square", x)))

    with np.errstate(all="ignore"):
        match function, arguments:
            case "norm", (tuple(leaves),):
                result: Any = tuple(jnp.sqrt(jnp.sum(jnp.square(x))) for x in leaves)
            case "norm" | "global_norm", (x,):
                result = global_norm(x)
            case "dot", (x, y):
                result = total(each("*", x, y))
            case "cosine_sim", (x, y):
                result = total(each("*", x, y)) / (global_norm(x) * global_norm(y))
            case "clip_by_global_norm", (x, limit):
                result = each(function, x, each("/", limit, global_norm(x)))
            case _:
                result = each(function, *arguments)
    return float(result) if constant else result


# Abstract execution: of names and kinds instead of arrays.


def _trace(program):
    """Every value once: name → (function, arguments), in order, and the outputs' names.

    Arguments are names or constants. Constants are folded, equal values merged and steps without
    effect dropped; values that nothing needs are still there.
    """
    current: dict[str, str | float] = {name: name for name in INPUTS}
    definitions: dict[str, tuple[str, tuple[str | float, ...]]] = {}
    known: dict[Any, str] = {}
    for target, function, written in program.statements:
        arguments = tuple(current[a] if isinstance(a, str) else float(a) for a in written)
        value = _folded(function, arguments, definitions)
        if value is None:
            ordered = sorted(arguments, key=repr) if function in _COMMUTATIVE else arguments
            call = (function, *map(repr, ordered))  # -0.0 is not 0.0: g / -0.0 is not g / 0.0
            if call not in known:
                name, count = target, 0
                while name in definitions or name in INPUTS:
                    count += 1
                    name = f"{target}_{count}"
                definitions[name] = (function, arguments)
                known[call] = name
            value = known[call]
        current[target] = value
    return definitions, tuple(current[name] for name in program.outputs)


def _folded(function, arguments, definitions):
    """The constant or the earlier value that a call is equal to, bit for bit, or None."""
    if all(isinstance(a, float) for a in arguments):
        value = _call(function, arguments)
        return value if math.isfinite(value) else None
    match function, arguments:
        case ("*", (str(x), 1.0)) | ("*", (1.0, str(x))) | ("/", (str(x), 1.0)):
            return x
        case "-", (str(x), 0.0):
            return x if math.copysign(1.0, arguments[1]) > 0 else None  # -0 - -0 is +0
        case "negative" | "abs" | "sign", (str(x),):
            inner, inner_arguments = definitions.get(x, (None, ()))
            if inner == function:
                return inner_arguments[0] if function == "negative" else x
    return None


def _check_valid(program):
    """Raises ValueError unless the program can run: names, numbers of arguments and kinds.

    The kind of a value is 0 for a number, 1 for a number per leaf, 2 for a tree like the weights.
    """
    kinds = dict.fromkeys(INPUTS, 2) | {"lr": 0}
    for statement in program.statements:
        if statement.function not in _ARITY:
            raise ValueError(f"program has no function {statement.function!r} in `{statement}`")
        if len(statement.arguments) != _ARITY[statement.function]:
            raise ValueError(
                f"program must give {statement.function} {_ARITY[statement.function]} arguments, "
                f"got {len(statement.arguments)} in {statement.arguments!r}"
            )
        found = [0]
        for argument in statement.arguments:
            if isinstance(argument, str):
                if argument not in kinds:
                    raise ValueError(f"program uses {argument!r} before it is assigned")
                found.append(kinds[argument])
        kind = max(found)
        if statement.function in _REDUCTIONS:
            kind = min(kind, 1) if statement.function == "norm" else 0
        kinds[statement.target] = kind
    for name in program.outputs:
        if kinds.get(name) != 2:
            raise ValueError(f"program must return {name!r} as a tree like the weights")


def _digest(program):
    """A hash of how the outputs follow from the inputs, whatever the names and the dead code."""
    definitions, outputs = _trace(program)
    digests = {name: name for name in INPUTS}
    for name, (function, arguments) in definitions.items():
        parts = [digests[a] if isinstance(a, str) else repr(a) for a in arguments]
        parts = sorted(parts) if function in _COMMUTATIVE else parts
        digests[name] = hashlib.sha256(f"{function}({','.join(parts)})".encode()).hexdigest()
    return " ".join(digests[name] for name in outputs)


# Mutation.


def _mutate(program, rng):
    """A valid program that differs from this one by a statement or by an argument."""
    while True:
        child = _MUTATIONS[rng.integers(len(_MUTATIONS))](program, rng)
        try:
            _check_valid(child)
        except ValueError:
            continue
        if child != program:
            return child


def _insert(program, rng):
    position = rng.integers(len(program.statements) + 1)
    scope = _scope(program, position)
    function = _choice(rng, _ARITY)
    arguments = tuple(_random_argument(scope, rng) for _ in range(_ARITY[function]))
    taken = _scope(program, len(program.statements))
    fresh = next(name for i in range(len(taken) + 1) if (name := f"x{i}") not in taken)
    statement = Statement(_choice(rng, [*scope, fresh]), function, arguments)
    return _with_statements(program, position, position, statement)


def _delete(program, rng):
    if not program.statements:
        return program
    position = rng.integers(len(program.statements))
    return _with_statements(program, position, position + 1)


def _modify(program, rng):
    positions = [i for i, s in enumerate(program.statements) if s.arguments]
    if not positions:
        return program
    position = _choice(rng, positions)
    statement = program.statements[position]
    arguments = list(statement.arguments)
    index = rng.integers(len(arguments))
    if not isinstance(arguments[index], str) and rng.integers(2):
        scaled = arguments[index] * 2.0 ** rng.normal()
        arguments[index] = float(np.clip(scaled, -1e10, 1e10))
    else:
        arguments[index] = _random_argument(_scope(program, position), rng)
    changed = statement._replace(arguments=tuple(arguments))
    return _with_statements(program, position, position + 1, changed)


_MUTATIONS = (_insert, _delete, _modify)


def _scope(program, position):
    """The variables that a statement at this position may use, each once."""
    return list(dict.fromkeys([*INPUTS, *(s.target for s in program.statements[:position])]))


def _random_argument(scope, rng):
    choice = rng.integers(len(scope) + 1)
    return scope[choice] if choice < len(scope) else float(rng.normal())


def _with_statements(program, start, stop, *new):
    old = program.statements
    return program._replace(statements=(*old[:start], *new, *old[stop:]))


def _choice(rng, options):
    options = list(options)
    return options[rng.integers(len(options))]


def _fitness(member):
    return member[0]


def _check_integers(low, /, **values):
    for name, value in values.items():
        if not isinstance(value, Integral) or value < low:
            raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
