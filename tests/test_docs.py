"""Every Python block of docs/*.md is a doctest, complete in itself, and prints what the page shows."""

import ast
import doctest
import re
from pathlib import Path

import pytest

import backends

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
FENCED = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def examples_in(page):
    """The doctest of each block; names are the block's own, and lines those of the page."""
    text = page.read_text(encoding="utf-8")
    found = []
    for at in FENCED.finditer(text):
        above = text[: at.start(1)].count("\n")
        name = f"{page.name}, the block at line {above + 1}"
        names = {"__name__": "__main__"}
        found.append(doctest.DocTestParser().get_doctest(at[1], names, name, str(page), above))
    return found


def imported(test):
    """The top-level modules that a block imports."""
    found = set()
    for node in ast.walk(ast.parse("".join(each.source for each in test.examples))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found


def problems(test):
    """What a block prints other than the page shows; empty where all is well."""
    said = []
    doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    return "".join(said)


BLOCKS = [(page.name, test) for page in PAGES for test in examples_in(page)]


@pytest.mark.parametrize("test", [pytest.param(test, id=f"{name}:{test.lineno + 1}") for name, test in BLOCKS])
def test_block_prints_what_the_page_shows(test):
    modules = imported(test)
    for backend in sorted(modules & backends.BY_BACKEND.keys()):
        backends.needs(backend)
    if "optax" in modules:
        pytest.importorskip("optax", reason="optax is not installed")
    found = problems(test)
    assert not found, found


@pytest.mark.parametrize("test", [pytest.param(test, id=f"{name}:{test.lineno + 1}") for name, test in BLOCKS])
def test_block_has_examples_and_shows_output(test):
    """A block without a prompt, or without output, would pass whatever it did."""
    assert test.examples, f"{test.filename}:{test.lineno + 1}: a Python block without >>>"
    assert any(each.want for each in test.examples), f"{test.filename}:{test.lineno + 1}: a block that shows no output"
    assert "gklx" in imported(test)


def test_there_are_pages():
    assert PAGES, f"no page in {ROOT / 'docs'}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_has_examples(page):
    assert any(test.examples for test in examples_in(page)), f"{page}: no example found"


def test_no_example_stands_outside_a_block():
    """A prompt that the pattern of a block does not find would never run."""
    for page in PAGES:
        prompts = re.findall(r"^\s*>>> ", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(prompts) == sum(len(test.examples) for test in examples_in(page)), page


@pytest.mark.parametrize("wrong", [">>> 1 + 1\n3\n", '>>> raise RuntimeError("no")\n'], ids=["output", "exception"])
def test_error_names_file_and_line(tmp_path, wrong):
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n```python\n>>> 1 + 2\n3\n{wrong}\n```\n", encoding="utf-8")
    (test,) = examples_in(page)
    assert f'File "{page}", line 6,' in problems(test)
