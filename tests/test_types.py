"""Type checkers know what the public functions return. The `types` session has mypy read the same file."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gklx
from gklx import scoring

pytestmark = [pytest.mark.library_independent, pytest.mark.version_independent]

ROOT = Path(__file__).parents[1]
USES = ROOT / "tests" / "typing" / "uses.py"


@pytest.mark.parametrize("tool", ["mypy", "pyright"])
def test_checker_accepts_the_file_of_uses(tool):
    """Both tools report a missing package, and a type other than the asserted one, as errors."""
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed")
    options = ["--strict"] if tool == "mypy" else ["--pythonpath", sys.executable]
    environment = os.environ | {"MYPYPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", tool, *options, str(USES)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("cls", [gklx.Terms, gklx.ClassPriorState])
def test_named_tuple_of_arrays_has_the_bases_of_a_tuple(cls):
    """Older versions of PyTorch find tensors in no other named tuple."""
    assert cls.__bases__ == (tuple,)


@pytest.mark.parametrize("cls", [gklx.Terms, gklx.ClassPriorState, gklx.ClassPrior])
def test_annotations_may_name_the_type_of_arrays(cls):
    assert cls[np.ndarray].__args__ == (np.ndarray,)


def test_what_score_returns_is_public():
    x = np.eye(3)
    found = gklx.score_candidates({"one": x, "other": x + 1}, x, np.arange(3), losses=["kl"], targets=np.arange(3))
    score = found.students["one"]
    values = [found, score, score.losses["kl"], score.parameters, score.worst_classes[0], score.perplexity]
    values += [score.delta_p, found.differences["other"]["kl"]]
    classes = [getattr(scoring, name) for name in scoring.__all__ if not name.startswith("score")]
    assert {type(value) for value in values} == set(classes)


def test_unknown_name_of_scoring_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"^module 'gklx.scoring' has no attribute 'scores'$"):
        scoring.scores  # noqa: B018
