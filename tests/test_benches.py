"""The benches run from the command line and report what their options request; no speed is asserted."""

import csv
import importlib
import importlib.util
import os
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

import gklx

pytestmark = [pytest.mark.library_independent, pytest.mark.version_independent]

BENCHES = Path(__file__).parents[1] / "benches"
HERE = {name for name in ("torch", "jax", "optax") if importlib.util.find_spec(name)}
DRAWS = all(importlib.util.find_spec(name) for name in ("altair", "vl_convert"))


def run(*command: str, before: Path | None = None) -> subprocess.CompletedProcess:
    """Run Python; modules in the folder `before` take precedence over installed ones."""
    paths = [str(before or ""), os.environ.get("PYTHONPATH", ""), str(Path(gklx.__file__).parents[1])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, encoding="utf-8", timeout=300, env=env, check=False
    )


def quick(script: str, *options: str, before: Path | None = None) -> str:
    """The output of a smoke run."""
    done = run(str(BENCHES / script), "--quick", *options, before=before)
    assert done.returncode == 0, done.stderr
    return done.stdout


def bench(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHES)
    return importlib.import_module(name)


def files(folder: Path) -> dict[Path, int]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path: path.stat().st_mtime_ns for path in found}


def table(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.glob("*.csv")
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def assert_is_picture(path: Path) -> None:
    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert float(root.attrib["width"]) > 0
    assert "NaN" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("seed", [3, 23])
def test_fuzz_of_files_finds_nothing(seed):
    pytest.importorskip("zarr")
    pytest.importorskip("safetensors")
    done = run(str(BENCHES / "fuzz_files.py"), "--seed", str(seed), "--cases", "6")
    assert (done.returncode, done.stdout) == (0, f"seed {seed}\n6 cases, 0 findings\n")


# --- compare.py -------------------------------------------------------------------------------------------------------


def test_compare_times_every_call_with_its_peer_and_a_copy(tmp_path):
    """One test, since parallel workers would each repeat the run."""
    page = quick("compare.py", "--output", str(tmp_path))
    rows = {(row["size"], row["library"], row["what"], row["peer"]): row for row in table(tmp_path)}
    expected = {("1 × 10", "NumPy", what, "a microsecond"): "≤ 30" for what in ("kl", "gkl γ=1")}
    expected |= {("8 × 50", "NumPy", what, "a copy"): "≤ 4" for what in ("kl", "gkl γ=1")}
    if "torch" in HERE:
        for what in ("kl", "gkl γ=1"):
            expected["8 × 50", "PyTorch", what, "F.kl_div"] = "≥ 2.5"
            expected["8 × 50", "PyTorch compiled", what, "F.kl_div"] = "≥ 2"
            expected["1 × 10", "PyTorch value_and_grad", what, "a microsecond"] = "≤ 50"
            expected["128 × 10", "PyTorch backward", what, "F.kl_div"] = "≥ 1"
            for library in ("PyTorch", "PyTorch compiled"):
                expected["8 × 50", library, what, "a copy"] = ""
        expected["8 × 50", "PyTorch", "gkl recipe", "F.kl_div"] = "≥ 1.5"
        expected["8 × 50", "PyTorch", "gkl recipe", "a copy"] = ""
    if "jax" in HERE:
        expected |= {("8 × 50", "JAX", what, "a copy"): "" for what in ("kl", "gkl γ=1")}
    if {"jax", "optax"} <= HERE:
        expected |= {("8 × 50", "JAX", what, "optax"): "≥ 3" for what in ("kl", "gkl γ=1")}
    assert {place: row["goal"] for place, row in rows.items()} == expected
    for row in rows.values():
        assert 0 < float(row["low"]) <= float(row["ratio"]) <= float(row["high"])
        assert float(row["milliseconds"]) > 0
        assert float(row["peer milliseconds"]) > 0
    (source,) = tmp_path.glob("*.md")
    assert source.read_text(encoding="utf-8") + "\n" == page
    for phrase in (
        "made by `python benches/compare.py --quick`",
        f"of {sum(map(bool, expected.values()))} are met",
    ):
        assert phrase in page
    pictures = {f"{source.stem}.svg"} if DRAWS else set()
    assert {path.name for path in tmp_path.iterdir()} == {f"{source.stem}.md", f"{source.stem}.csv"} | pictures
    for picture in pictures:
        assert_is_picture(tmp_path / picture)
        assert f"]({picture})" in page


def test_compare_scores_files_with_another_version_too(tmp_path):
    """The other version is this one, in another interpreter."""
    python = tmp_path / "python"
    source = shlex.quote(str(Path(gklx.__file__).parents[1]))
    python.write_text(f'#!/bin/sh\nPYTHONPATH={source} exec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    folder = tmp_path / "new"
    page = quick("compare.py", "--only", "NumPy 1", "--score-before", str(python), "--output", str(folder))
    assert str(python) not in page
    rows = {(row["what"], row["peer"]): row for row in table(folder) if row["library"] == "gklx score"}
    what = "all four losses, 0.0002 GB"
    assert {place: row["goal"] for place, row in rows.items()} == {
        (what, "the version before"): "≥ 3",
        (what, "a plain read"): "≤ 1.3",
        ("peak resident memory", "1 GB"): "≤ 1",
    }
    assert 0.01 < float(rows["peak resident memory", "1 GB"]["ratio"]) < 1


def test_compare_reports_missing_libraries_and_writes_only_to_output(tmp_path):
    (tmp_path / "jax.py").write_text("raise ImportError('hidden by the test')")
    before = files(BENCHES)
    page = quick("compare.py", "--only", "JAX|NumPy 8", before=tmp_path)
    assert files(BENCHES) == before
    assert "| JAX | jax: ImportError: hidden by the test |" in page
    assert "| 8 × 50 | NumPy | kl |" in page
    assert "PyTorch |" not in page


def test_compare_refuses_to_time_a_wrong_result():
    script = (
        f"import functools, sys; sys.path.insert(0, {str(BENCHES)!r}); import gklx, compare; "
        "gklx.gkl = functools.partial(gklx.gkl, mse_weight=1.001); compare.main(['--quick', '--only', 'NumPy 8'])"
    )
    done = run("-c", script)
    assert done.returncode != 0
    assert "AssertionError: NumPy 8 × 50, gkl γ=1: " in done.stderr
    assert "from the definition in float64" in done.stderr


def test_goal_is_a_lower_or_an_upper_bound(monkeypatch):
    compare, timing = bench("compare", monkeypatch), bench("timing", monkeypatch)
    row = compare.Row("8 × 50", "NumPy", "kl", "a copy", 2.0, 1.0, timing.Spread(2.0, 1.5, 2.5), 2.0, False)
    cases = ((2.0, False, True), (1.9, False, False), (2.0, True, True), (2.1, True, False))
    for goal, at_least, met in cases:
        assert row._replace(goal=goal, at_least=at_least).met is met


def test_difference_is_relative_to_the_largest_entry_of_a_row(monkeypatch):
    difference = bench("definitions", monkeypatch).difference
    expected = [np.asarray(2.0), np.asarray([[1.0, 4.0], [1.0, 1.0]])]
    assert difference(expected, [np.asarray(2.0), np.asarray([[1.0, 4.0], [1.0, 1.5]])]) == 0.5
    assert difference(expected, [np.asarray(3.0), np.asarray([[2.0, 4.0], [1.0, 1.0]])]) == 0.5
    assert np.isnan(difference(expected, [np.asarray(np.nan), expected[1]]))


# --- scaling.py and scoring.py ----------------------------------------------------------------------------------------


def test_scaling_measures_every_form_at_every_size(tmp_path):
    page = quick("scaling.py", "--output", str(tmp_path))
    libraries = ["NumPy"] + ["PyTorch"] * ("torch" in HERE)
    rows = table(tmp_path)
    own = [(8, c) for c in (5, 10, 20, 100, 200, 400)] + [(32, 50), (16, 100), (8, 200)]
    expected = [(*size, f"gklx, {library}") for size in own for library in libraries]
    expected += [(8, c, "pairs, PyTorch") for c in (5, 10, 20)] * ("torch" in HERE)
    assert sorted((int(row["batch"]), int(row["classes"]), row["form"]) for row in rows) == sorted(expected)
    for row in rows:
        assert 0 < float(row["low"]) <= float(row["milliseconds"]) <= float(row["high"])
        assert bool(row["pairs over gklx"]) == row["form"].startswith("pairs")
    if sys.platform == "linux":
        assert {row["classes"] for row in rows if row["peak bytes"]} == {"20"}
    fitted = [line.split(" | ")[:2] for line in page.splitlines() if " ± " in line and line.startswith("|")]
    assert fitted == [
        *([f"| gklx, {library}", "B = 8"] for library in libraries),
        *[["| pairs, PyTorch", "B = 8"]] * ("torch" in HERE),
        *([f"| gklx, {library}", "B · C = 1,600"] for library in libraries),
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"scaling.md", "scaling.csv", *["scaling.svg"] * DRAWS}
    if DRAWS:
        assert_is_picture(tmp_path / "scaling.svg")


def test_scaling_fits_the_exponent(monkeypatch):
    scaling, timing = bench("scaling", monkeypatch), bench("timing", monkeypatch)
    rows = [
        scaling.Row(batch, c, "gklx", timing.Spread(batch * 3e-9 * c**1.5, 0.0, 0.0), None, None)
        for batch, c in ((1, 1), (64, 100), (32, 1_000), (16, 10_000))
    ]
    rows[0] = rows[0]._replace(time=timing.Spread(1.0, 1.0, 1.0))  # too small to be fitted
    fit = scaling.fitted(rows, "gklx", "", 100)
    assert fit.exponent == pytest.approx(1.5)
    assert fit.error == pytest.approx(0, abs=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")
def test_memory_peak_of_a_call(monkeypatch):
    found = bench("memory", monkeypatch).peak(lambda: np.ones(2**23))
    assert 2**26 <= found <= 1.1 * 2**26


@pytest.mark.parametrize(
    ("script", "output_text"), [("scaling.py", "| form | held |"), ("scoring.py", "| numpy | kl, dkl,")]
)
def test_quick_run_writes_no_file(script, output_text):
    before = files(BENCHES)
    assert output_text in quick(script)
    assert files(BENCHES) == before


# --- gpu.sh -----------------------------------------------------------------------------------------------------------


def gpu_sh(tmp_path, **environment: str) -> tuple[subprocess.CompletedProcess, str]:
    """The finished run of the script, and its summary."""
    out = tmp_path / "out"
    env = os.environ | {"OUT": str(out), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | environment
    done = subprocess.run(
        ["bash", str(BENCHES / "gpu.sh")], capture_output=True, text=True, timeout=300, env=env, check=False
    )
    return done, (out / "summary.txt").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="a script for Linux")
def test_gpu_script_reports_skipped_parts(tmp_path):
    done, summary = gpu_sh(tmp_path, PARTS="a d")
    assert done.returncode == 0, done.stdout
    assert "a, kernels: skipped" in summary
    assert "d, benchmark: skipped" in summary
    assert "c, " not in summary
    output_text = (tmp_path / "out" / "a.txt").read_text(encoding="utf-8")
    for library in ("torch", "cupy"):
        assert f"{library}: skipped, " in output_text


@pytest.mark.skipif(sys.platform != "linux", reason="a script for Linux")
@pytest.mark.skipif("torch" not in HERE, reason="PyTorch is not installed")
def test_gpu_script_reports_a_wrong_loss_and_continues(tmp_path):
    """A wrong loss, imported in place of gklx's own, makes part a fail; part d still runs."""
    done, summary = gpu_sh(tmp_path, PARTS="a", DRY="1")
    assert done.returncode == 0, summary
    assert "a, kernels: ok" in summary
    (tmp_path / "sitecustomize.py").write_text(
        "import functools, sys\n"
        "if sys.argv[0:1] and 'gpu_check' in ' '.join(sys.orig_argv):\n"
        "    import gklx\n"
        "    gklx.kl = functools.partial(gklx.kl, temperature=1.001)\n"
    )
    done, summary = gpu_sh(tmp_path, PARTS="a d", DRY="1", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, summary
    assert "a, kernels: failed, status 1" in summary
    assert "from the definition, allowed" in (tmp_path / "out" / "a.txt").read_text(encoding="utf-8")
    assert "d, benchmark: ok" in summary
