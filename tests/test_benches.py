"""The benches run from the command line and say what they are asked; how fast anything is, is not asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHES = Path(__file__).parents[1] / "benches"


def quick(script: str, *options: str) -> str:
    """What a smoke run prints."""
    command = [sys.executable, str(BENCHES / script), "--quick", *options]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def scaling(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str, set[str]]:
    folder = tmp_path_factory.mktemp("scaling") / "new"
    quick("scaling.py", "--output", str(folder))
    names = {path.name for path in folder.iterdir()}
    text = (folder / "scaling.md").read_text(encoding="utf-8")
    return json.loads((folder / "scaling.json").read_text(encoding="utf-8")), text, names


def test_scaling_measures_every_form_at_every_size(scaling):
    result, _, _ = scaling
    plan = result["plan"]
    measured = {(row["form"], row["classes"]) for row in result["rows"]}
    forms = {row["form"] for row in result["rows"]}
    assert {"gklx, NumPy", "pairs, NumPy"} <= forms
    both = plan["pair_classes"] + plan["lone_classes"]
    assert measured == {
        (form, classes) for form in forms for classes in (plan["pair_classes"] if form.startswith("pairs") else both)
    }
    for row in result["rows"]:
        assert row["batch"] == plan["batch"]
        assert len(row["turns"]) == plan["turns"]
        assert 0 < row["seconds_q1"] <= row["seconds"] <= row["seconds_q3"]


def test_scaling_counts_memory_at_the_sizes_asked(scaling):
    result, _, _ = scaling
    taken = {(row["form"], row["classes"]): row["memory"] for row in result["rows"] if "memory" in row}
    assert {classes for _, classes in taken} == set(result["plan"]["memory_classes"])
    for (form, classes), memory in taken.items():
        array = 4 * result["plan"]["batch"] * classes
        # Two gradients at the least; the pairs at least two tensors of theirs.
        assert memory["counted"] >= 2 * array * (classes if form.startswith("pairs") else 1)


def test_scaling_holds_the_forms_against_each_other(scaling):
    result, _, _ = scaling
    assert [each["classes"] for each in result["agreement"]] == result["plan"]["pair_classes"]
    for each in result["agreement"]:
        assert 0 <= each["float64"] <= 1e-12
        assert 0 <= each["float32"] <= 1e-5


def test_scaling_fits_an_exponent_a_form(scaling):
    result, _, _ = scaling
    held = f"B * C = {result['plan']['held_logits']:,}"
    assert {fit["form"] for fit in result["fits"]} == {row["form"] for row in result["rows"]}
    kept = f"B = {result['plan']['batch']}, freed memory kept"
    for name, rows in ((held, result["held"]), (kept, result["kept"])):
        assert {fit["form"] for fit in result["fits"] if fit["held"] == name} == {row["form"] for row in rows}
    for fit in result["fits"]:
        assert len(fit["classes"]) >= 3
        assert fit["standard_error"] >= 0
    for ratio in result["ratios"]:
        assert ratio["ratio_q1"] <= ratio["ratio"] <= ratio["ratio_q3"]


def test_scaling_report_says_where_it_comes_from(scaling):
    result, text, names = scaling
    assert names == {"scaling.json", "scaling.md"}
    assert result["command"] == "python benches/scaling.py --quick"
    for said in (result["date"], result["machine"]["processor"], result["command"], "## Prediction", "## Result"):
        assert said in text
    table = text.partition("| C | form |")[2].partition("\n\n")[0]
    assert table.count("\n") == 1 + len(result["rows"])


def test_scaling_quick_writes_nothing_unasked():
    before = files(BENCHES)
    assert "time ~ C^k" in quick("scaling.py")
    assert files(BENCHES) == before
