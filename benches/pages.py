"""The parts of a page of results: the machine, formatted numbers, tables, and files written atomically."""

import csv
import datetime
import importlib.metadata
import io
import os
import platform
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import gklx
from gklx._run import cpu_library

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """The processor's name, and its family and model, which the names on cloud machines lack."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or "unknown"
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name") or platform.processor() or "unknown"
    return f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name


def machine(device: str = "cpu") -> str:
    """The processor and its number of cores, or the GPU."""
    if device == "cpu":
        return f"{processor()}, {os.cpu_count()} cores"
    import torch

    return torch.cuda.get_device_name()


def slug(name: str) -> str:
    """The name of a machine's result files."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def load() -> str:
    """The system's load average over the last minute."""
    return f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"


def heading(title: str, command: str, where: str, packages: Sequence[str], loads: Sequence[str]) -> list[str]:
    """The title of a page, with the date, the machine, the versions and the command."""
    versions = [f"Python {platform.python_version()}", f"gklx {gklx.__version__}"]
    for name in packages:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
    limits = [f"{name}={os.environ[name]}" for name in ("GKLX_NUM_THREADS", "OMP_NUM_THREADS") if name in os.environ]
    facts = [
        datetime.date.today().isoformat(),
        f"{where}, {platform.system()}",
        ", ".join(versions),
        f"row kernel: {cpu_library.instruction_set() or 'none'}",
        *limits,
        f"load average {loads[0]} before and {loads[-1]} after",
        f"made by `{command}`",
    ]
    return [f"# {title}", "", " · ".join(facts), ""]


def markdown(headings: Sequence[str], cells: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """The lines of a Markdown table, and a blank line."""
    rule = ["---:" if i in right else "---" for i in range(len(headings))]
    return [*(f"| {' | '.join(row)} |" for row in (headings, rule, *cells)), ""]


def figures(x: float) -> str:
    """A number to three significant figures, or to the integer where it is 100 or more."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def seconds(x: float) -> str:
    """A time in s, ms or µs."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if abs(x) >= scale:
            return f"{figures(x / scale)} {unit}"
    return f"{figures(x / 1e-6)} µs"


def amount(x: float) -> str:
    """A number of bytes in GB, MB or kB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if x >= scale:
            return f"{figures(x / scale)} {unit}"
    return f"{figures(x / 1e3)} kB"


def as_csv(headings: Sequence[str], cells: Iterable[Sequence[Any]]) -> str:
    """A CSV file; floats have four significant figures, since measurements vary by more."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows([f"{x:.4g}" if isinstance(x, float) else x for x in row] for row in cells)
    return file.getvalue()


def write(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
