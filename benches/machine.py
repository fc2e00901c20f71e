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
    """Its name, and where the system tells it the family and the model: a cloud's names leave them out."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or "unknown"
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = told.get("model name") or platform.processor() or "unknown"
    return f"{name} (family {told['cpu family']}, model {told['model']})" if "cpu family" in told else name


def load() -> float | None:
    """Say how many processes wanted a core in the last minute; None where the system does not."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def slug(about: dict[str, Any]) -> str:
    """Name the files of a machine's results: after its GPU where the arrays were there, else after its processor."""
    name = about.get("gpu") or f"{about['processor']} {about['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
