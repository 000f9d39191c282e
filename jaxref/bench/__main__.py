"""`python -m jaxref.bench NAME [--quick] [--json] [options]`: runs a bench, prints its results."""

import argparse
import ast
import difflib
import importlib
import inspect
import json
import math
import pkgutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jaxref.bench
from jaxref.core.host import prepare_host

NOT_BENCHES = {"__main__", "ahead_of_time", "harness", "tuning"}


def benches() -> dict[str, str]:
    """First docstring line of every bench by name, read without importing any of them."""
    return {
        module.name: first_line(Path(path) / f"{module.name}.py")
        for path in jaxref.bench.__path__
        for module in pkgutil.iter_modules([path])
        if module.name not in NOT_BENCHES
    }


def first_line(source: Path) -> str:
    return (ast.get_docstring(ast.parse(source.read_text("utf-8"))) or "").partition("\n")[0]


def json_line(measurement: Any) -> str:
    """One object with the fields of a measurement; a number that is not finite is null."""
    fields = measurement._asdict()
    for name in ("value", "ratio"):
        if fields[name] is not None:
            number = float(fields[name])
            fields[name] = number if math.isfinite(number) else None
    return json.dumps(fields)


def announced(measurements: Iterable[Any]) -> Iterator[Any]:
    """The measurements, each named on stderr as it arrives: the table comes only at the end."""
    start = time.monotonic()
    for m in measurements:
        elapsed = time.monotonic() - start
        print(f"[{elapsed:.0f} s] {m.case}: {m.implementation} {m.metric}", file=sys.stderr)
        yield m


def print_table(measurements: Iterable[Any]) -> None:
    """Aligned columns, one line a measurement, a blank line between cases."""
    rows = [("case", "implementation", "metric", "value", "ratio")]
    for m in measurements:
        ratio = "" if m.ratio is None else f"{significant(m.ratio)} x {m.peer}"
        rows.append((m.case, m.implementation, m.metric, readable(m.value, m.metric), ratio))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for previous, row in zip([rows[0], *rows], rows):
        if row[0] != previous[0]:
            print()
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        cells[3] = row[3].rjust(widths[3])
        print("  ".join(cells).rstrip())


def readable(value: float, metric: str) -> str:
    """The value with a unit of fitting size.

    >>> readable(0.00123, "seconds"), readable(3 * 2**20, "temporary bytes"), readable(7.0, "loss")
    ('1.23 ms', '3.00 MiB', '7.00')
    """
    unit = metric.rpartition(" ")[2]
    scales = {
        "seconds": [("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)],
        "bytes": [("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10), ("B", 1.0)],
        "flops": [("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6), ("FLOP", 1.0)],
    }.get(unit)
    if scales is None or not math.isfinite(value):
        return significant(value)
    name, scale = next((s for s in scales if abs(value) >= s[1]), scales[-1])
    return f"{significant(value / scale)} {name}"


def significant(value: float) -> str:
    """Three significant digits, without an exponent where it can be read without one.

    >>> significant(0.5), significant(12.345), significant(1234.5), significant(0.0)
    ('0.500', '12.3', '1234', '0')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.2e}" if not -4 <= digits <= 5 else f"{value:.{max(digits, 0)}f}"


def options_of(run: Callable[..., Any], parser: argparse.ArgumentParser) -> None:
    """An option for every keyword of `run`; a default of None takes a string."""
    for name, parameter in inspect.signature(run).parameters.items():
        default = parameter.default
        flag = "--" + name.replace("_", "-")
        if isinstance(default, bool):
            text = "small shapes, to try the bench" if name == "quick" else None
            action = argparse.BooleanOptionalAction if default else "store_true"
            parser.add_argument(flag, action=action, default=default, help=text)
        else:
            kind = str if default is None else type(default)
            parser.add_argument(flag, type=kind, default=default, help=f"default: {default}")


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    known = benches()
    parser = argparse.ArgumentParser(
        prog="python -m jaxref.bench",
        usage="python -m jaxref.bench NAME [--quick] [--json] [options of the bench]",
        description="Side-by-side benchmarks. `NAME --help` lists the options of one.",
        epilog="benches:\n" + "\n".join(f"  {name}\n      {line}" for name, line in known.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    asked = next((argument for argument in argv if not argument.startswith("-")), None)
    if asked is None:
        parser.print_help()
        return 0
    argv.remove(asked)
    name = asked.replace("-", "_")
    if name not in known:
        near = difflib.get_close_matches(name, known)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known)}"
        print(f"no bench named {asked!r}; {hint}", file=sys.stderr)
        return 2

    bench = importlib.import_module(f"jaxref.bench.{name}")
    parser = argparse.ArgumentParser(
        prog=f"python -m jaxref.bench {name}",
        description=inspect.getdoc(bench),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line on stdout")
    options_of(bench.run, parser)
    options = vars(parser.parse_args(argv))
    if options.pop("json"):
        for measurement in bench.run(**options):
            print(json_line(measurement), flush=True)
    else:
        print_table(list(announced(bench.run(**options))))
    return 0


if __name__ == "__main__":
    prepare_host()
    sys.exit(main())
