"""Type checkers know what the public functions return. The `types` session has mypy read the same file."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.library_independent, pytest.mark.version_independent]

ROOT = Path(__file__).parents[1]
USES = ROOT / "tests" / "typing" / "uses.py"


@pytest.mark.parametrize("tool", ["mypy", "pyright"])
def test_uses(tool):
    """A package that is not found is an error to both, and so is a type other than the asserted one."""
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed")
    options = ["--strict"] if tool == "mypy" else ["--pythonpath", sys.executable]
    environment = os.environ | {"MYPYPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", tool, *options, str(USES)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
