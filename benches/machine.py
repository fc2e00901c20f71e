"""What the numbers were taken on."""

import importlib.metadata
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gklx


def machine(packages: Sequence[str] = ("numpy", "torch", "array-api-compat")) -> dict[str, Any]:
    """Describe processor, system and versions."""
    versions = {"Python": platform.python_version(), "gklx": gklx.__version__}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {"processor": _processor(), "cores": os.cpu_count(), "system": platform.system(), "versions": versions}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def load() -> float | None:
    """Say how many processes wanted a core in the last minute; None where the system does not."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def slug(about: dict[str, Any]) -> str:
    """Name the files of a machine's results: after its GPU where the arrays were there, else after its processor."""
    name = about.get("gpu") or f"{about['processor']} {about['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
