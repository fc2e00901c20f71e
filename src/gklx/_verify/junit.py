"""The findings as JUnit XML, which CI systems read."""

import itertools
import xml.etree.ElementTree as ET
from collections.abc import Iterable

from .checks import Check
from .report import headline
from .verify import Report

_SUITES = {"definition": "against the definitions", "pair": "against each other", "equivalence": "KL = DKL"}


def as_junit(report: Report) -> str:
    """A test case for each execution, dtype and case, and each pair and dtype; a skipped one for an absent library."""
    root = ET.Element("testsuites", name="gklx verify", time=f"{report.seconds:.3f}")
    here = ET.SubElement(root, "testsuite", name="backends")
    for execution in report.executions:
        case = ET.SubElement(here, "testcase", classname="gklx.verify.backends", name=execution.name)
        place = execution.place
        ET.SubElement(case, "system-out").text = _clean(f"{place.version} on {place.device_name}, {place.hardware}")
    for name, why in report.absent.items():
        case = ET.SubElement(here, "testcase", classname="gklx.verify.backends", name=name)
        ET.SubElement(case, "skipped", message=_clean(why))
    for kind, title in _SUITES.items():
        suite = ET.SubElement(root, "testsuite", name=title)
        checks = sorted((check for check in report.checks if check.kind == kind), key=_test)
        for (names, name), of in itertools.groupby(checks, key=_test):
            classname = f"gklx.verify.{kind}.{'-'.join(names)}"
            _add(ET.SubElement(suite, "testcase", classname=classname, name=name), list(of))
    for suite in root:
        suite.set("tests", str(len(suite)))
        suite.set("failures", str(len(suite.findall("*/failure"))))
        suite.set("errors", "0")
        suite.set("skipped", str(len(suite.findall("*/skipped"))))
    for count in ("tests", "failures", "errors", "skipped"):
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in root)))
    ET.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _test(check: Check) -> tuple[tuple[str, ...], str]:
    return check.places, check.dtype if check.kind == "pair" else f"{check.dtype} {check.case}"


def _add(case: ET.Element, checks: Iterable[Check]) -> None:
    lines = [_clean(f"{headline(check)}: {check.told}") for check in checks if check.broken]
    if lines:
        more = f" and {len(lines) - 1} more" if len(lines) > 1 else ""
        ET.SubElement(case, "failure", type="AssertionError", message=lines[0] + more).text = "\n".join(lines)


def _clean(text: str) -> str:
    """Escapes control characters, which XML does not allow."""
    return "".join(each for each in text if each.isprintable())
