"""Each cell of docs/transforms.md has a test, and each such test has a cell."""

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGE = (HERE.parent / "docs" / "transforms.md").read_text(encoding="utf-8")


def claimed_cells():
    """The (row, column) of each cell that is not a dash."""
    table = re.search(r"<!-- table: begin -->\n(.*?)\n<!-- table: end -->", PAGE, re.DOTALL)[1]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    return {(row[0], column) for row in rows for column, cell in zip(header[1:], row[1:], strict=True) if cell != "–"}


def strings(call):
    return [each.value for each in call.args if isinstance(each, ast.Constant)]


def is_call_of(node, name):
    function = getattr(node, "func", None)
    return isinstance(node, ast.Call) and name in (getattr(function, "attr", None), getattr(function, "id", None))


def marked_cells():
    """The (row, column) that the tests are marked_cells with; a module's own `supports(row)` names its column once."""
    found = set()
    for path in sorted(HERE.glob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        own = [strings(node.body[0].value) for node in functions if node.name == "supports"]
        for function in functions:
            for mark in function.decorator_list:
                if function.name.startswith("test_") and is_call_of(mark, "supports"):
                    row, *columns = strings(mark)
                    found |= {(row, column) for column in columns or own[0]}
    return found


def test_every_claim_has_a_test():
    assert sorted(claimed_cells() - marked_cells()) == []


def test_every_marked_test_is_in_the_table():
    assert sorted(marked_cells() - claimed_cells()) == []


@pytest.mark.parametrize("library", ["PyTorch", "JAX", "NumPy", "Dask"])
def test_every_library_has_a_column(library):
    assert any(column == library for _, column in claimed_cells())
