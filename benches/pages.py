"""What a page of results is made of: the machine, numbers as people read them, tables, and files that are whole."""

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
from gklx._run import cpu

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """Its name, and where the system tells them the family and the model: a cloud's names leave them out."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or "unknown"
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = told.get("model name") or platform.processor() or "unknown"
    return f"{name} (family {told['cpu family']}, model {told['model']})" if "cpu family" in told else name


def machine(device: str = "cpu") -> str:
    """The processor and its cores, or the GPU that the arrays are on."""
    if device == "cpu":
        return f"{processor()}, {os.cpu_count()} cores"
    import torch

    return torch.cuda.get_device_name()


def slug(name: str) -> str:
    """Name the files of a machine's results."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def load() -> str:
    """Say how many processes wanted a core in the last minute."""
    return f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"


def heading(title: str, command: str, where: str, packages: Sequence[str], loads: Sequence[str]) -> list[str]:
    """The title of a page, and what its numbers were taken on."""
    versions = [f"Python {platform.python_version()}", f"gklx {gklx.__version__}"]
    for name in packages:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
    limits = [f"{name}={os.environ[name]}" for name in ("GKLX_NUM_THREADS", "OMP_NUM_THREADS") if name in os.environ]
    said = [
        datetime.date.today().isoformat(),
        f"{where}, {platform.system()}",
        ", ".join(versions),
        f"row kernel: {cpu.instruction_set() or 'none'}",
        *limits,
        f"load average {loads[0]} before and {loads[-1]} after",
        f"made by `{command}`",
    ]
    return [f"# {title}", "", " · ".join(said), ""]


def markdown(headings: Sequence[str], cells: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lay out a Markdown table, line by line, and a blank one."""
    rule = ["---:" if i in right else "---" for i in range(len(headings))]
    return [*(f"| {' | '.join(row)} |" for row in (headings, rule, *cells)), ""]


def figures(x: float) -> str:
    """Three figures, and all of those before the point."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def seconds(x: float) -> str:
    """Name a time in the unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if abs(x) >= scale:
            return f"{figures(x / scale)} {unit}"
    return f"{figures(x / 1e-6)} µs"


def amount(x: float) -> str:
    """Name a number of bytes in the unit that suits it."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if x >= scale:
            return f"{figures(x / scale)} {unit}"
    return f"{figures(x / 1e3)} kB"


def as_csv(headings: Sequence[str], cells: Iterable[Sequence[Any]]) -> str:
    """Numbers to four figures: the machine's own swing is larger."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows([f"{x:.4g}" if isinstance(x, float) else x for x in row] for row in cells)
    return file.getvalue()


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
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
