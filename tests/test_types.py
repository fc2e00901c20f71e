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


def check(tool, file, tmp_path):
    """What a checker says of a file, with the package's sources at hand, and its exit status."""
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed")
    options = (
        ["--strict", f"--cache-dir={tmp_path / 'cache'}"] if tool == "mypy" else [f"--pythonpath={sys.executable}"]
    )
    environment = os.environ | {"MYPYPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", tool, *options, str(file)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return ran.returncode, ran.stdout + ran.stderr


@pytest.mark.parametrize("tool", ["mypy", "pyright"])
def test_uses(tool, tmp_path):
    status, said = check(tool, USES, tmp_path)
    assert status == 0, said


@pytest.mark.parametrize("tool", ["mypy", "pyright"])
def test_checkers_see_a_wrong_type(tool, tmp_path):
    """Were the package not found, every use would be right."""
    wrong = tmp_path / "wrong.py"
    source = USES.read_text(encoding="utf-8")
    wrong.write_text(source.replace("assert_type(gklx.kl(x, x), Tensor)", "assert_type(gklx.kl(x, x), int)"))
    status, said = check(tool, wrong, tmp_path)
    assert status == 1
    assert "int" in said
