"""The findings as text: tables for people and in Markdown, JSON for programs."""

import json
import math
import platform
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .. import __version__
from .checks import EQUIVALENT_IN, Check
from .executions import pairs
from .ulps import DTYPES
from .verify import Report

_NONE, _SHOWN = "–", 20
_WHATS = ("value", "gradient", "autodiff")
_PLAIN = str.maketrans({"–": "-", "≡": "=", "·": "|"})
"""Replacements for a standard output whose encoding is ASCII."""
_BOUNDS = (
    "in units in the last place; allowed: 32, for gradients in halves 1, between two rows twice that, "
    "DKL from KL in one row 16"
)


class _Grid(NamedTuple):
    title: str
    header: tuple[str, ...]
    rows: list[tuple["_Cell", ...]]


class _Cell(NamedTuple):
    text: str
    broken: bool = False


def as_table(report: Report) -> str:
    """Tables, in the colours and the width that standard output has."""
    console = Console(highlight=False, emoji=False)
    parts: list[Table | Text] = []
    for grid in _grids(report):
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for at, name in enumerate(grid.header):
            table.add_column(name, no_wrap=at < len(grid.header) - 1)
        for row in grid.rows:
            table.add_row(*(Text(cell.text, "bold red" if cell.broken else "") for cell in row))
        parts += [Text(grid.title, "bold"), table, Text("")]
    parts += [Text(_BOUNDS), *(Text(line, "red" if report.broken else "green") for line in _verdict(report))]
    # On a narrow terminal the table is too wide: a number must not be truncated.
    roomy = console.options.update(width=1000)
    needed = max(Measurement.get(console, roomy, part).maximum for part in parts if isinstance(part, Table))
    console.width = max(console.width, min(needed, 120))
    with console.capture() as capture:
        console.print(Group(*parts))
    text = capture.get()
    return text.translate(_PLAIN) if console.options.ascii_only else text


def as_markdown(report: Report) -> str:
    """Markdown tables, for the summary of a CI run; broken bounds are in bold."""
    lines = [f"# gklx {__version__} verify", ""]
    for grid in _grids(report):
        lines += [f"## {grid.title}", "", _line(grid.header), "|---" * len(grid.header) + "|"]
        lines += [_line(tuple(f"**{text}**" if broken else text for text, broken in row)) for row in grid.rows]
        lines.append("")
    return "\n".join([*lines, f"{_BOUNDS[0].upper()}{_BOUNDS[1:]}.", "", *_verdict(report, "- ")]) + "\n"


def as_json(report: Report) -> str:
    """Strict JSON: null for an infinite distance, which NaN or an exception give."""
    equivalent = [check for check in report.checks if check.kind == "equivalence"]
    found = {
        "gklx": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "seconds": round(report.seconds, 3),
        "backends": {
            each.name: {
                "version": each.place.version,
                "device": each.place.device_name,
                "hardware": each.place.hardware,
                "kernel": each.kernel,
            }
            for each in report.executions
        },
        "absent": report.absent,
        "checks": len(report.checks),
        "kl_equals_dkl": not any(check.broken for check in equivalent),
        "farthest": [_json(check) for check in _farthest(report)],
        "broken": [{**_json(check), "found": check.told} for check in report.broken],
    }
    return json.dumps(found, indent=2, allow_nan=False) + "\n"


def _json(check: Check) -> dict[str, Any]:
    ulps = check.ulps if math.isfinite(check.ulps) else None
    found = {"kind": check.kind, "backends": check.places, "dtype": check.dtype, "what": check.what}
    return {**found, "case": check.case, "ulps": ulps, "bound": check.bound}


def _farthest(report: Report) -> Iterator[Check]:
    """For each kind, backends, dtype and quantity the check that is nearest to its bound or farthest beyond it."""
    for key in dict.fromkeys((check.kind, check.places, check.dtype, check.what) for check in report.checks):
        check = report.farthest(*key)
        assert check is not None
        yield check


# --- tables -----------------------------------------------------------------------------------------------------------


def _grids(report: Report) -> list[_Grid]:
    names = [each.name for each in report.executions]
    here = [(x.name, x.place.version, x.place.device_name, x.place.hardware) for x in report.executions]
    here += [(name, _NONE, _NONE, why) for name, why in report.absent.items()]
    of_definitions = [_of_definition(report, name, dtype) for name in names for dtype in DTYPES]
    of_pairs = [
        _row(report, "pair", (one.name, other.name), DTYPES, ("value",), ("gradient", "autodiff"))
        for one, other in pairs(report.executions)
    ]
    of_dkl = [
        _row(report, "equivalence", (name,), EQUIVALENT_IN, ("gradient", "autodiff"), ("definition",))
        for name in ("definition", *names)
    ]
    title_of_dkl = "KL ≡ DKL: the gradients of DKL from those of KL, from the definition of KL"
    grids = [
        _Grid("Backends", ("backend", "version", "device", ""), [tuple(map(_Cell, row)) for row in here]),
        _Grid(
            "Farthest from the definitions",
            ("backend", "dtype", *_WHATS, "nearest to its bound"),
            [row for row in of_definitions if row],
        ),
        _Grid("Farthest from each other: value, gradient", ("backends", *DTYPES), of_pairs),
        _Grid(title_of_dkl, ("backend", *EQUIVALENT_IN), of_dkl),
    ]
    return [grid for grid in grids if grid.rows]


def _row(
    report: Report, kind: str, names: tuple[str, ...], dtypes: Sequence[str], *whats: tuple[str, ...]
) -> tuple[_Cell, ...]:
    return _Cell(", ".join(names)), *(_cells(report, kind, names, dtype, *whats) for dtype in dtypes)


def _of_definition(report: Report, name: str, dtype: str) -> tuple[_Cell, ...]:
    """The cells of a row; empty for a dtype that is not tried."""
    worst = report.farthest("definition", (name,), dtype, *_WHATS)
    if worst is None:
        return ()
    cells = (_cells(report, "definition", (name,), dtype, (what,)) for what in _WHATS)
    return _Cell(name), _Cell(dtype), *cells, _Cell(worst.case)


def _cells(report: Report, kind: str, names: tuple[str, ...], dtype: str, *whats: tuple[str, ...]) -> _Cell:
    """The largest distance of each group of quantities, in one cell."""
    found = [report.farthest(kind, names, dtype, *of) for of in whats]
    text = ", ".join(f"{check.ulps:.3g}" for check in found if check is not None)
    return _Cell(text or _NONE, any(check is not None and check.broken for check in found))


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _verdict(report: Report, bullet: str = "") -> list[str]:
    broken, count = report.broken, f"{len(report.checks):,} comparisons in {report.seconds:.0f} s"
    if not broken:
        return [f"{count}, all within their bounds; the gradients of KL and DKL are the same"]
    lines = [f"{count}, {len(broken):,} beyond their bound:", ""]
    lines += [f"{bullet}{headline(check)}: {check.told}" for check in broken[:_SHOWN]]
    return lines + ([f"{bullet}and {len(broken) - _SHOWN:,} more"] if len(broken) > _SHOWN else [])


def headline(check: Check) -> str:
    """Which comparison it is."""
    kind = {"definition": "", "pair": "", "equivalence": "KL = DKL, "}[check.kind]
    return f"{kind}{' and '.join(check.places)}, {check.dtype}, {check.case}, {check.what}"
