"""The findings as text: tables for people and in Markdown, JSON for programs, and JUnit XML, which CI systems read."""

import json
import math
import platform
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import __version__
from .checks import EQUIVALENT_IN, Check, Report
from .executions import Execution, pairs
from .ulps import DTYPES

_NONE, _SHOWN = "–", 20
_PLAIN = str.maketrans({"–": "-", "≡": "=", "·": "|"})
"""Replacements for a standard output whose encoding is ASCII."""
_BOUNDS = (
    "in units in the last place; allowed: 32, for gradients in halves 1, between two rows twice that, "
    "DKL from KL in one row 16"
)
_CONTROLS = dict.fromkeys([*range(9), 11, 12, *range(14, 32), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF])
"""Characters that XML does not allow."""
_SUITES = {"definition": "against the definitions", "pair": "against each other", "equivalence": "KL = DKL"}
_OF_DKL = "KL ≡ DKL: the gradients of DKL from those of KL, from the definition of KL"
_BROKEN = "bold red"

_Grid = tuple[str, Sequence[str], Sequence[Sequence[Text]]]
"""A title, the names of the columns, and rows, in which a broken bound has a style."""


def as_table(report: Report) -> str:
    """Tables, in the colours that standard output has."""
    console = Console(highlight=False, emoji=False)
    console.width = max(console.width, 120)  # a number must not be truncated, so a narrow terminal wraps the lines
    with console.capture() as capture:
        for title, header, rows in _grids(report):
            table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
            for at, name in enumerate(header):
                table.add_column(name, no_wrap=at < len(header) - 1)
            for row in rows:
                table.add_row(*row)
            console.print(Text(title, "bold"), table, "", sep="\n")
        for line in (_BOUNDS, *_verdict(report)):
            style = "" if line == _BOUNDS else "red" if report.broken else "green"
            console.print(Text(line, style), soft_wrap=True)
    text = capture.get()
    return text.translate(_PLAIN) if console.options.ascii_only else text


def as_markdown(report: Report) -> str:
    """Markdown tables, for the summary of a CI run; broken bounds are in bold."""
    lines = [f"# gklx {__version__} verify", ""]
    for title, header, rows in _grids(report):
        cells = [[f"**{cell.plain}**" if cell.style else cell.plain for cell in row] for row in rows]
        table = [[name.replace("|", "\\|") for name in row] for row in (header, *cells)]
        table.insert(1, ["---"] * len(header))
        lines += [f"## {title}", "", *(f"| {' | '.join(row)} |" for row in table), ""]
    return "\n".join([*lines, f"{_BOUNDS[0].upper()}{_BOUNDS[1:]}.", "", *_verdict(report, "- ")]) + "\n"


def as_json(report: Report) -> str:
    """Strict JSON: null for an infinite distance, which NaN or an exception give."""
    about = ("version", "device", "hardware", "kernel")
    backends = {x.name: dict(zip(about, (*_described(x), x.kernel), strict=True)) for x in report.executions}
    found = {
        "gklx": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "seconds": round(report.seconds, 3),
        "backends": backends,
        "absent": report.absent,
        "checks": len(report.checks),
        "kl_equals_dkl": not any(check.kind == "equivalence" for check in report.broken),
        "farthest": [_json(check) for check in report.farthest.values()],
        "broken": [{**_json(check), "found": check.message} for check in report.broken],
    }
    return json.dumps(found, indent=2, allow_nan=False) + "\n"


def as_junit(report: Report) -> str:
    """A test case for each execution, dtype and case, and each pair and dtype; a skipped one for an absent library."""
    root = ET.Element("testsuites", name="gklx verify", time=f"{report.seconds:.3f}")

    def add(suite: ET.Element, classname: str, name: str) -> ET.Element:
        return ET.SubElement(suite, "testcase", classname=f"gklx.verify.{classname}", name=name)

    here = ET.SubElement(root, "testsuite", name="backends")
    for each in report.executions:
        version, device, hardware = _described(each)
        ET.SubElement(add(here, "backends", each.name), "system-out").text = f"{version} on {device}, {hardware}"
    for name, why in report.absent.items():
        ET.SubElement(add(here, "backends", name), "skipped", message=why)
    for kind, title in _SUITES.items():
        suite = ET.SubElement(root, "testsuite", name=title)
        broken: dict[tuple[str, str], list[str]] = {}
        for check in report.checks:
            if check.kind == kind:
                name = check.dtype if kind == "pair" else f"{check.dtype} {check.case}"
                broken.setdefault(("-".join(check.places), name), []).extend([_line(check)] if check.broken else [])
        for (names, name), lines in broken.items():
            case = add(suite, f"{kind}.{names}", name)
            if lines:
                message = lines[0] + (f" and {len(lines) - 1} more" if len(lines) > 1 else "")
                ET.SubElement(case, "failure", type="AssertionError", message=message).text = "\n".join(lines)
    for element in (*root, root):
        for count, tag in {"tests": "testcase", "failures": "failure", "errors": "error", "skipped": "skipped"}.items():
            element.set(count, str(len(list(element.iter(tag)))))
    ET.indent(root)
    text = ET.tostring(root, encoding="unicode").translate(_CONTROLS)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


# --- what the forms have in common ------------------------------------------------------------------------------------


def _grids(report: Report) -> Iterator[_Grid]:
    alone = [(each.name,) for each in report.executions]

    def nearest(kind: str, of: tuple[str, ...], dtype: str, *whats: str) -> Check | None:
        found = (report.farthest.get((kind, of, dtype, what)) for what in whats)
        return max(filter(None, found), key=lambda check: check.share, default=None)

    def cell(kind: str, of: tuple[str, ...], dtype: str, *groups: tuple[str, ...]) -> Text:
        """The largest distance of each group of quantities."""
        found = [check for whats in groups if (check := nearest(kind, of, dtype, *whats)) is not None]
        text = ", ".join(f"{check.ulps:.3g}" for check in found) or _NONE
        return Text(text, _BROKEN if any(check.broken for check in found) else "")

    here = [(each.name, *_described(each)) for each in report.executions]
    here += [(name, _NONE, _NONE, why) for name, why in report.absent.items()]
    yield "Backends", ("backend", "version", "device", ""), [[Text(each) for each in row] for row in here]
    whats, rows = ("value", "gradient", "autodiff"), []
    for of in alone:
        for dtype in DTYPES:
            worst = nearest("definition", of, dtype, *whats)
            if worst is not None:
                cells = (cell("definition", of, dtype, (what,)) for what in whats)
                rows.append([Text(*of), Text(dtype), *cells, Text(worst.case)])
    yield "Farthest from the definitions", ("backend", "dtype", *whats, "nearest to its bound"), rows
    in_pairs = [(one.name, other.name) for one, other in pairs(report.executions)]
    gradients = ("gradient", "autodiff")
    for title, kind, places, dtypes, *groups in (
        ("Farthest from each other: value, gradient", "pair", in_pairs, DTYPES, ("value",), gradients),
        (_OF_DKL, "equivalence", [("definition",), *alone], EQUIVALENT_IN, gradients, ("definition",)),
    ):
        rows = [[Text(", ".join(of)), *(cell(kind, of, dtype, *groups) for dtype in dtypes)] for of in places]
        if rows:
            yield title, ("backends", *dtypes), rows


def _described(execution: Execution) -> tuple[str, str, str]:
    """Version, device and hardware."""
    place = execution.place
    return place.version, place.backend.device_name, place.hardware


def _verdict(report: Report, bullet: str = "") -> list[str]:
    broken, count = report.broken, f"{len(report.checks):,} comparisons in {report.seconds:.0f} s"
    if not broken:
        return [f"{count}, all within their bounds; the gradients of KL and DKL are the same"]
    lines = [f"{count}, {len(broken):,} beyond their bound:", "", *(bullet + _line(check) for check in broken[:_SHOWN])]
    return lines + ([f"{bullet}and {len(broken) - _SHOWN:,} more"] if len(broken) > _SHOWN else [])


def _line(check: Check) -> str:
    """Which comparison it is, and what was found."""
    kind = "KL = DKL, " if check.kind == "equivalence" else ""
    return f"{kind}{' and '.join(check.places)}, {check.dtype}, {check.case}, {check.what}: {check.message}"


def _json(check: Check) -> dict[str, Any]:
    ulps = check.ulps if math.isfinite(check.ulps) else None
    found = {"kind": check.kind, "backends": check.places, "dtype": check.dtype, "what": check.what}
    return {**found, "case": check.case, "ulps": ulps, "bound": check.bound}
