"""The example that shows KL's and DKL's training trajectories, on a few steps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import backends

pytestmark = pytest.mark.evidence

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "experiments" / "trajectories.py"


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    backends.needs("torch")
    for module in ("altair", "vl_convert", "mlxtend"):
        pytest.importorskip(module)
    out = tmp_path_factory.mktemp("results")
    done = run("--steps", "5", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert sorted(each.name for each in out.iterdir()) == ["trajectories.json", "trajectories.svg"]
    assert (out / "trajectories.svg").read_text(encoding="utf-8").startswith("<svg")
    return json.loads((out / "trajectories.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("dtype", "rounding"), [("float64", 1e-13), ("float32", 1e-5)])
def test_trajectories_of_kl_and_dkl_are_equal_to_rounding(results, dtype, rounding):
    runs = {each["variant"]: each for each in results["runs"] if each["dtype"] == dtype}
    for variant in ("KL, samples reversed", "DKL, definition", "gklx.kl", "gklx.dkl"):
        assert max(runs[variant]["largest_difference"]) < rounding
    for variant in ("gklx.ikl", "gklx.gkl, γ = 0.5"):
        assert runs[variant]["largest_difference"][-1] > 1e-3
    assert all(len(each["values"]) == 5 for each in runs.values())
    difference = runs["DKL, definition"]["values"][-1] - runs["KL, definition"]["values"][-1]
    assert difference > 1  # the values are not equal, the trajectories are


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--steps", "none"]])
def test_invalid_steps_are_refused(arguments):
    pytest.importorskip("altair")
    backends.needs("torch")
    done = run(*arguments)
    assert done.returncode == 2
    assert "argument --steps" in done.stderr
    assert "Traceback" not in done.stderr


def test_unwritable_folder_is_a_one_line_error(tmp_path):
    backends.needs("torch")
    for module in ("altair", "vl_convert", "mlxtend"):
        pytest.importorskip(module)
    taken = tmp_path / "file"
    taken.write_text("")
    done = run("--steps", "1", "--out", str(taken))
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
