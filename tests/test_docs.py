"""Every Python block of docs/**/*.md is a doctest and prints what the page shows.

Each block is complete in itself, except in a tutorial, whose blocks together are one doctest.
"""

import ast
import doctest
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import backends

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
FENCED = re.compile(r"^```(?:python|pycon)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Pages that need no example, and why.
EXEMPT = {
    "changelog.md": "is the project's changelog",
    "measurements.md": "shows the reports that the benchmarks write",
    "results.md": "shows what the experiments measured",
    "support.md": "lists what is supported; test_readme.py checks its table",
    "theory.md": "is mathematics, and names the tests that check it",
}


# Frameworks whose blocks each run in a process of their own, and the libraries on which they run.
FRAMEWORKS = {"keras": ("torch", "jax"), "lightning": ("torch",), "transformers": ("torch",), "accelerate": ("torch",)}
NEEDED = {"transformers": ("accelerate",)}  # by its trainer


def name_of(page):
    return page.relative_to(DOCS).as_posix()


def is_tutorial(page):
    return page.parent.name == "tutorials"


def needs_examples(page):
    """Whether a page must have examples: all but EXEMPT and the reference, whose docstrings are doctests themselves."""
    return name_of(page) not in EXEMPT and page.parent.name != "reference"


def doctest_of(source, page, above):
    """A doctest with its own names and the line numbers of the page."""
    name = f"{page.name}, the block at line {above + 1}"
    return doctest.DocTestParser().get_doctest(source, {"__name__": "__main__"}, name, str(page), above)


def examples_in(page):
    """One doctest per block; for a tutorial one of all blocks, with blank lines between them, to keep line numbers."""
    text = page.read_text(encoding="utf-8")
    blocks = [(at[1], text[: at.start(1)].count("\n")) for at in FENCED.finditer(text)]
    if not (is_tutorial(page) and blocks):
        return [doctest_of(source, page, above) for source, above in blocks]
    (whole, first), *others = blocks
    for source, above in others:
        whole += "\n" * (above - first - whole.count("\n")) + source
    return [doctest_of(whole, page, first)]


def doctest_at(page, line):
    """The doctest of a page that begins at a line."""
    (found,) = (test for test in examples_in(Path(page)) if test.lineno == line)
    return found


def imported(test):
    """The top-level modules that a doctest imports; `gklx.torch` counts as PyTorch too."""
    found = set()
    for node in ast.walk(ast.parse("".join(each.source for each in test.examples))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {part for name in found for part in (name.partition(".")[0], name.removeprefix("gklx.").partition(".")[0])}


def problems(test):
    """The differences between the output of a doctest and the page; empty where there are none."""
    output_text = []
    doctest.DocTestRunner(verbose=False).run(test, out=output_text.append)
    return "".join(output_text)


BLOCKS = [pytest.param(test, id=f"{name_of(page)}:{test.lineno + 1}") for page in PAGES for test in examples_in(page)]


@pytest.mark.parametrize("test", BLOCKS)
def test_block_prints_what_the_page_shows(test):
    modules = imported(test)
    backends.needs_imported(modules)
    if "optax" in modules:
        pytest.importorskip("optax", reason="optax is not installed")
    if modules & FRAMEWORKS.keys():
        pytest.skip("test_framework_block_prints_what_the_page_shows runs it")
    found = problems(test)
    assert not found, found


FRAMEWORK_BLOCKS = [
    pytest.param(block.values[0], framework, library, id=f"{block.id}-{framework}-{library}")
    for block in BLOCKS
    for framework in sorted(imported(block.values[0]) & FRAMEWORKS.keys())
    for library in FRAMEWORKS[framework]
]


@pytest.mark.long
@pytest.mark.parametrize(("test", "framework", "library"), FRAMEWORK_BLOCKS)
def test_framework_block_prints_what_the_page_shows(test, framework, library):
    """In a separate process: Keras has one backend per process, and frameworks give warnings of their own."""
    backends.needs(library)
    for module in (framework, *NEEDED.get(framework, ())):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    code = f"import test_docs; print(end=test_docs.problems(test_docs.doctest_at({test.filename!r}, {test.lineno})))"
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("src", "tests"))
    environment = os.environ | {"KERAS_BACKEND": library, "PYTHONPATH": paths}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stdout + ran.stderr


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_framework_has_a_block(framework):
    assert any(block.values[1] == framework for block in FRAMEWORK_BLOCKS)


@pytest.mark.parametrize("test", BLOCKS)
def test_block_has_examples_and_shows_output(test):
    """A block without a prompt or without output could not fail."""
    assert test.examples, f"{test.filename}:{test.lineno + 1}: a Python block without >>>"
    assert any(each.want for each in test.examples), f"{test.filename}:{test.lineno + 1}: a block that shows no output"
    assert "gklx" in imported(test)


def test_there_are_pages():
    assert PAGES, f"no page in {DOCS}"


@pytest.mark.parametrize("page", list(filter(needs_examples, PAGES)), ids=name_of)
def test_page_has_examples(page):
    assert any(test.examples for test in examples_in(page)), f"{page}: no example found"


@pytest.mark.parametrize("library", ["numpy", "torch", "jax", "cupy", "dask"])
def test_library_has_a_tutorial(library):
    tutorials = [test for page in PAGES if is_tutorial(page) for test in examples_in(page)]
    assert any(imported(test) & backends.BY_BACKEND.keys() - {"numpy"} == {library} - {"numpy"} for test in tutorials)


def public_names(module):
    """The names in `__all__`, read from the source, since a library may be absent."""
    tree = ast.parse((ROOT / "src" / "gklx" / f"{module}.py").read_text(encoding="utf-8"))
    (names,) = (each.value for each in tree.body if isinstance(each, ast.Assign) and each.targets[0].id == "__all__")
    return ast.literal_eval(names)


@pytest.mark.parametrize("module", ["__init__", "torch", "testing", "scoring"])
def test_every_public_name_is_in_the_reference(module):
    reference = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    shown = re.findall(r"^\.\. auto(?:function|class|data):: (\w+)$", reference, re.MULTILINE)
    assert sorted(set(public_names(module)) - set(shown)) == []


def test_links_of_the_readme_lead_to_files():
    """The build of the site checks the links of the pages."""
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_no_line_is_taken_for_a_comment():
    """The site would leave out a line that begins with a percent sign, and what follows it in the paragraph."""
    lines = [(page, line.lstrip()) for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]
    begins = [f"{page}: {line}" for page, line in lines if line.startswith("%")]
    assert begins == []


def test_no_example_stands_outside_a_block():
    """The doctests would miss a prompt outside a fenced block."""
    for page in PAGES:
        prompts = re.findall(r"^\s*>>> ", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(prompts) == sum(len(test.examples) for test in examples_in(page)), page


@pytest.mark.parametrize("wrong", [">>> 1 + 1\n3\n", '>>> raise RuntimeError("no")\n'], ids=["output", "exception"])
@pytest.mark.parametrize("folder", ["howto", "tutorials"])
def test_error_names_file_and_line(tmp_path, folder, wrong):
    page = tmp_path / folder / "page.md"
    page.parent.mkdir()
    page.write_text(f"# A page\n\n```pycon\n>>> 1 + 2\n3\n```\n\n```pycon\n{wrong}\n```\n", encoding="utf-8")
    assert f'File "{page}", line 9,' in "".join(problems(test) for test in examples_in(page))


def test_blocks_of_a_tutorial_share_names(tmp_path):
    for folder, found in (("howto", True), ("tutorials", False)):
        page = tmp_path / folder / "page.md"
        page.parent.mkdir()
        page.write_text("# A page\n\n```pycon\n>>> x = 1\n```\n\n```pycon\n>>> x\n1\n```\n", encoding="utf-8")
        assert any(problems(test) for test in examples_in(page)) is found
