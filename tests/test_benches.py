"""The benches run from the command line and say what they are asked; how fast anything is, is not asserted."""

import importlib.util
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytestmark = [pytest.mark.library_independent, pytest.mark.version_independent]

BENCHES = Path(__file__).parents[1] / "benches"


DRAWS = all(importlib.util.find_spec(name) for name in ("altair", "vl_convert"))


def quick(script: str, *options: str, before: Path | None = None) -> str:
    """What a smoke run prints; modules in `before` stand before those installed."""
    command = [sys.executable, str(BENCHES / script), "--quick", *options]
    paths = [str(before or ""), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(folder: Path) -> dict[Path, int]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path: path.stat().st_mtime_ns for path in found}


@pytest.mark.parametrize("seed", [3, 23])
def test_fuzz_of_files_finds_nothing(seed):
    pytest.importorskip("zarr")
    pytest.importorskip("safetensors")
    command = [sys.executable, str(BENCHES / "fuzz_files.py"), "--seed", str(seed), "--cases", "6"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, f"seed {seed}\n6 cases, 0 findings\n")


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


def assert_is_picture(path: Path) -> None:
    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert 0 < float(root.attrib["width"]) <= 820
    assert "NaN" not in path.read_text(encoding="utf-8")


def only(folder: Path, suffix: str) -> Path:
    (found,) = folder.glob(f"*{suffix}")
    return found


def test_compare(tmp_path):
    """One test: workers of a parallel run would each make the run anew."""
    folder = tmp_path / "new"
    quick("compare.py", "--output", str(folder))
    result = json.loads(only(folder, ".json").read_text(encoding="utf-8"))
    assert_every_peer_is_timed_at_every_size(result)
    assert_peers_are_divided_by_gklx_on_their_own_backend(result)
    assert_memory_and_a_copy_are_taken(result)
    assert_a_page_and_two_pictures_are_written(result, folder)
    assert_what_was_written_by_hand_is_kept(folder, tmp_path / "steps")


def assert_every_peer_is_timed_at_every_size(result: dict) -> None:
    plan = result["plan"]
    here = [name for name in result["peers"] if name not in result["left_out"]]
    assert {"gklx kl · NumPy", "gklx gkl · NumPy", "gklx gkl γ=1 · NumPy", "KL on whole arrays · NumPy"} <= set(here)
    measured = {(row["suite"], row["peer"], row["batch"], row["classes"], row["gradient"]) for row in result["rows"]}
    for name in here:
        pairs = name.startswith("pairs")
        if not pairs:
            for batch, classes in plan["sizes"]:
                assert {("sizes", name, batch, classes, gradient) for gradient in ("both", "student")} <= measured
        if "γ=1" not in name:
            for classes in plan["classes"]:
                assert (("growth", name, plan["batch"], classes, "both") in measured) == (
                    not pairs or classes <= plan["pair_classes"]
                )
        if "γ=1" not in name and name.endswith((" · NumPy", " · PyTorch")):
            assert {("small", name, batch, classes, "both") for batch, classes in plan["small"]} <= measured
    assert {row["peer"] for row in result["rows"]} == set(here)
    for row in result["rows"]:
        assert len(row["turns"]) == plan["turns"]
        assert 0 < row["seconds_q1"] <= row["seconds"] <= row["seconds_q3"]
        assert row["bandwidth"] > 0
        assert 0 <= row["difference"] <= 1e-4


def assert_peers_are_divided_by_gklx_on_their_own_backend(result: dict) -> None:
    rows = {(row["suite"], row["peer"], row["batch"], row["classes"], row["gradient"]): row for row in result["rows"]}
    assert {each["gklx"] for each in result["ratios"] if each["peer"] == "KL on whole arrays"} == {
        "kl",
        "gkl",
        "gkl γ=1",
    }
    assert {each["gklx"] for each in result["ratios"] if each["peer"] == "pairs"} == {"gkl"}
    for each in result["ratios"]:
        place = each["batch"], each["classes"], each["gradient"]
        peer = rows[each["suite"], f"{each['peer']} · {each['backend']}", *place]
        own = rows[each["suite"], f"gklx {each['gklx']} · {each['backend']}", *place]
        assert 0 < each["ratio_q1"] <= each["ratio"] <= each["ratio_q3"]
        assert min(peer["turns"]) / max(own["turns"]) <= each["ratio"] <= max(peer["turns"]) / min(own["turns"])


def assert_memory_and_a_copy_are_taken(result: dict) -> None:
    assert "gklx gkl · NumPy" in {row["peer"] for row in result["memory"]}
    for row in result["memory"]:
        assert row["counted"] >= 2 * 4 * row["batch"] * row["classes"]  # the two gradients
    best = result["copy"]["copies"][result["copy"]["best"]]
    assert best["bytes_per_second"] == max(each["bytes_per_second"] for each in result["copy"]["copies"].values())
    assert "NumPy" in {row["backend"] for row in result["dispatch"]}
    for row in result["dispatch"]:
        assert row["operations"] >= 40
        assert 0 < row["alone_seconds"] < row["call_seconds"]
    places = {(row["backend"], row["batch"], row["classes"]) for row in result["one_or_two"]}
    assert {("NumPy", *size) for size in result["plan"]["sizes"]} <= places
    for row in result["one_or_two"]:
        assert 0 < row["ratio_q1"] <= row["ratio"] <= row["ratio_q3"]


def assert_a_page_and_two_pictures_are_written(result: dict, folder: Path) -> None:
    name = only(folder, ".md").stem
    pictures = {f"{name}-time.svg", f"{name}-bandwidth.svg"} if DRAWS else set()
    assert {path.name for path in folder.iterdir()} == {f"{name}.json", f"{name}.md"} | pictures
    text = (folder / f"{name}.md").read_text(encoding="utf-8")
    assert result["command"] == "python benches/compare.py --quick"
    for said in (result["date"], result["machine"]["processor"], result["command"], "## Ratios", "## Memory"):
        assert said in text
    for name, reason in result["left_out"].items():
        assert f"| {name} | {reason}".splitlines()[0] in text
    for picture in pictures:
        assert_is_picture(folder / picture)
        assert f"]({picture})" in text


def assert_what_was_written_by_hand_is_kept(folder: Path, other: Path) -> None:
    source = only(folder, ".json")
    other.mkdir()
    steps = other / f"{source.stem}-steps.md"
    steps.write_text("### Tried\n\nLess work, less time.\n", encoding="utf-8")
    quick("compare.py", "--render", str(source), "--output", str(other))
    assert "Less work, less time." in (other / f"{source.stem}.md").read_text(encoding="utf-8")
    assert steps.read_text(encoding="utf-8") == "### Tried\n\nLess work, less time.\n"


def test_compare_leaves_out_what_is_missing_and_writes_nothing_unasked(tmp_path):
    (tmp_path / "scipy.py").write_text("raise ImportError('hidden by the test')")
    before = files(BENCHES)
    said = quick("compare.py", "--only", "8x50.*(SciPy|kl · NumPy)", before=tmp_path)
    assert files(BENCHES) == before
    assert "hidden by the test" in said
    assert "gklx kl · NumPy" in said
    assert "gklx kl · PyTorch" not in said.partition("Left out")[0]


def test_block_size_measures_every_size_and_draws_it(tmp_path):
    quick("block_size.py", "--output", str(tmp_path))
    source = only(tmp_path, ".json")
    assert {path.name for path in tmp_path.iterdir()} == {source.name} | ({f"{source.stem}.svg"} if DRAWS else set())
    result = json.loads(source.read_text(encoding="utf-8"))
    plan = result["plan"]
    for backend, cores in {(row["backend"], row["cores"]) for row in result["rows"]}:
        of = [row for row in result["rows"] if (row["backend"], row["cores"]) == (backend, cores)]
        assert [[row["batch"], row["classes"], row["block"]] for row in of] == [
            [*size, block] for size in plan["sizes"] for block in plan["blocks"]
        ]
    assert "NumPy" in {row["backend"] for row in result["rows"]}
    for row in result["rows"]:
        assert 0 < row["seconds_q1"] <= row["seconds"] <= row["seconds_q3"]
    if DRAWS:
        assert_is_picture(tmp_path / f"{source.stem}.svg")


def test_block_size_quick_writes_nothing_unasked():
    before = files(BENCHES)
    assert "NumPy" in quick("block_size.py")
    assert files(BENCHES) == before
