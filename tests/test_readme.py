"""The README and the landing page are right: support table, commands and their output, every Python block."""

import ast
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import backends
from gklx._cli import main
from gklx._core.libraries import support_table

pytestmark = pytest.mark.together

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = [(*at.groups(), README[: at.start()].count("\n") + 2) for at in FENCED.finditer(README)]
PYTHON = [(body, line) for kind, body, line in BLOCKS if kind == "python"]
COMMANDS = [body.rstrip("\n") for kind, body, _ in BLOCKS if kind == "sh"]
TESTS = "python3 -m pip install 'nox[uv]' && python3 -m nox"
SCORE = "python3 -m pip install '.[cli]' && python3 -m gklx score "
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def imported(source):
    """The top-level modules that a block imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found


def test_readme_is_short():
    assert len(README.splitlines()) <= 120


def test_support_table_is_current():
    page = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    _, _, rest = page.partition("<!-- support table: begin -->\n")
    found, end, _ = rest.partition("\n<!-- support table: end -->\n")
    assert end
    assert found == support_table()


@pytest.mark.parametrize(("source", "line"), PYTHON, ids=[f"line{line}" for _, line in PYTHON])
def test_python_block_runs(source, line):
    """Each block has its own names, so it must be complete; errors have the README's line."""
    backends.needs_imported(imported(source))
    exec(compile("\n" * (line - 1) + source, str(ROOT / "README.md"), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("library", ["numpy", "torch", "jax", "cupy"])
def test_library_has_a_python_block(library):
    assert any(imported(source) == {library, "gklx"} for source, _ in PYTHON)


def test_readme_command_is_the_one_that_ci_runs():
    if (ROOT / "PKG-INFO").exists():
        pytest.skip("a source distribution holds no .ci")
    assert TESTS in COMMANDS
    assert TESTS in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_score_prints_what_the_landing_page_shows(capsys, monkeypatch):
    """Word for word, except for the last digits of the numbers, which may differ between machines."""
    (command,) = (each for each in COMMANDS if each.startswith(SCORE))
    landing = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    (shown,) = (body for kind, body in FENCED.findall(landing) if kind == "text")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["score", *shlex.split(command.removeprefix(SCORE))]) == 0
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.rstrip("\n").splitlines()) + "\n"
    assert NUMBER.sub("0", printed) == NUMBER.sub("0", shown)
    found, expected = ([float(x) for x in NUMBER.findall(text)] for text in (printed, shown))
    np.testing.assert_allclose(found, expected, rtol=2e-3)
