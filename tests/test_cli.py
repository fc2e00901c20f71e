"""The command `gklx`: its output, its errors and its exit codes."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import backends
import gklx
import gklx._scoring.comparison
from gklx._cli import main
from gklx._core.libraries import LIBRARIES

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
STUDENT, TEACHER, LABELS = (str(DIGITS / f"{name}.npy") for name in ("student", "teacher", "labels"))
FILES = [STUDENT, TEACHER]


@pytest.fixture
def save(tmp_path):
    def saved(name, x):
        path = tmp_path / f"{name}.npy"
        np.save(path, x, allow_pickle=True)
        return str(path)

    return saved


@pytest.fixture
def run(capsys):
    def ran(*argv):
        capsys.readouterr()
        status = main([str(x) for x in argv])
        out, err = capsys.readouterr()
        return status, out, err

    return ran


@pytest.fixture
def fails(run):
    """Runs a command that must fail with one line on stderr; returns the line without its prefix."""

    def failed(*argv, status=2):
        got, out, err = run(*argv)
        assert (got, out) == (status, "")
        assert err.startswith("gklx: error: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        return err.removeprefix("gklx: error: ").rstrip("\n")

    return failed


def process(*argv, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "gklx", *argv], capture_output=True, text=True, check=False, timeout=60, **kwargs
    )


# --- output -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["30", "80", "120"])
def test_table_shows_every_number_at_any_width(run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    status, out, err = run("score", *FILES, "--labels", LABELS)
    assert (status, err) == (0, "")
    assert "…" not in out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(re.findall(r"\d", next(line for line in lines if line.startswith("maximum")))) >= 16
    for title in ("mean", "± standard error", "  of which wMSE", "median", "90 %", "95 %", "99 %"):
        assert [line for line in lines if line.startswith(title)]
    assert "top-1 agreement" in out
    assert "classes with the largest mean kl" in " ".join(out.split())
    assert "899 samples" in out


def test_table_without_parts_and_without_labels(run):
    status, out, _ = run("score", *FILES, "--loss", "kl")
    assert status == 0
    assert "wMSE" not in out
    assert "largest" not in out
    assert "infinite" not in out
    assert "undefined" not in out


def test_table_counts_infinite_and_undefined_samples(run, save):
    s = np.load(STUDENT)
    s[3, 1] = -np.inf
    s[9] = np.nan
    status, out, err = run("score", save("s", s), TEACHER, "--mse-weight", "1e9")
    assert (status, err) == (0, "")
    assert re.search(r"samples infinite +1 +1 +1 +1", out)
    assert "898 samples, 1 undefined (NaN)" in out
    assert "e+" in out


def test_json_has_all_fields(run):
    status, out, err = run("score", *FILES, "--labels", LABELS, "--format", "json", "--gamma", "0.5", "--temperature=2")
    assert (status, err) == (0, "")
    found = json.loads(out, parse_constant=pytest.fail)
    losses, worst = found.pop("losses"), found.pop("worst_classes")
    assert found == {
        "samples": 899,
        "skipped": 0,
        "undefined": 0,
        "classes": 10,
        "backend": "numpy",
        "device": "cpu",
        "quantiles": "exact",
        "parameters": {
            "temperature": 2.0,
            "weight_temperature": 1.0,
            "gamma": 0.5,
            "mse_weight": 1.0,
            "ce_weight": 1.0,
            "weights": "class prior",
        },
        "top1_agreement": pytest.approx(0.961, abs=0.02),
    }
    assert list(losses) == ["kl", "dkl", "ikl", "gkl"]
    keys = ["mean", "stderr", "median", "p90", "p95", "p99", "max", "mse", "ce", "infinite"]
    keys += ["p99_9", "p10", "p5", "p1", "p0_1", "min"]
    assert [list(each) for each in losses.values()] == [keys] * 4
    assert (losses["kl"]["mse"], losses["kl"]["ce"]) == (None, None)
    for name in ("dkl", "ikl", "gkl"):
        assert losses[name]["mean"] == pytest.approx(losses[name]["mse"] + losses[name]["ce"], rel=1e-12)
    assert len(worst) == 5
    assert list(worst[0]) == ["class", "samples", "top1_agreement", "mean"]
    assert list(worst[0]["mean"]) == list(losses)


@pytest.mark.parametrize("on", ["numpy", "dask", "array_api_strict"])
def test_json_has_null_for_numbers_that_are_not_finite(run, save, on):
    backends.needs(on)
    s, t = np.load(STUDENT)[:20], np.load(TEACHER)[:20]
    s[3, 1], t[5, 0], s[6] = -np.inf, np.inf, np.nan
    labels = save("y", np.load(LABELS)[:20])
    status, out, err = run("score", save("s", s), save("t", t), "--format", "json", "--labels", labels, "--backend", on)
    assert (status, err) == (0, "")
    found = json.loads(out, parse_constant=pytest.fail)
    assert found["losses"]["kl"]["mean"] is None
    assert (found["losses"]["kl"]["infinite"], found["undefined"]) == (1, 2)
    assert None in [each["mean"]["kl"] for each in found["worst_classes"]]


@pytest.mark.parametrize(
    "argv",
    [
        [*FILES, "--loss", "gkl", "kl", "gkl"],
        [*FILES, "--loss", "gkl,kl,gkl"],
        [*FILES, "--loss", "gkl", "--loss", "kl"],
        ["--loss", "gkl", "--loss=kl", *FILES],
        ["--loss", "gkl,kl", *FILES],
        ["--loss", "gkl", "kl", *FILES],
        ["--loss", "gkl", FILES[0], "--loss", "kl", FILES[1]],
        ["--loss", "gkl,kl", "--", *FILES],
    ],
    ids=" ".join,
)
def test_loss_option_may_be_repeated_or_separated_by_commas(run, argv):
    status, out, err = (
        run("score", *argv, "--format", "json") if "--" not in argv else run("score", "--format", "json", *argv)
    )
    assert (status, err) == (0, "")
    assert list(json.loads(out)["losses"]) == ["gkl", "kl"]


def test_loss_option_may_precede_the_files(run):
    status, out, err = run("score", "--format", "json", "--loss", "kl", *FILES)
    assert (status, err) == (0, "")
    assert list(json.loads(out)["losses"]) == ["kl"]


def test_version_and_help(run):
    assert run("--version") == (0, f"gklx {gklx.__version__}\n", "")
    status, out, _ = run("score", "--help")
    assert status == 0
    assert "usage: gklx score" in out
    for word in ("--weight-temperature", "examples:", "null", "class prior"):
        assert word in out
    status, out, err = run()
    assert (status, out) == (2, "")
    assert "usage: gklx" in err
    assert "gklx score student.npy teacher.npy" in err


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"hello, world", "not a NumPy .npy or .npz file"),
        (b"PK\x03\x04", "the .npz archive is damaged or cut short"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr'", "damaged or cut short"),
        (b"\x93NUMPY\x07\x00\x10\x00{'descr'", "damaged or cut short"),
        (b"\x93NUM", "not a NumPy .npy or .npz file"),
    ],
)
def test_file_without_an_array_is_refused(fails, tmp_path, content, message):
    path = tmp_path / "bad.npy"
    path.write_bytes(content)
    for files in ([path, TEACHER], [STUDENT, path], [*FILES, "--labels", path]):
        line = fails("score", *files)
        assert str(path) in line
        assert message in line


def test_missing_or_truncated_file_is_refused(fails, tmp_path):
    assert "No such file" in fails("score", tmp_path / "none.npy", TEACHER)
    assert "is a directory" in fails("score", tmp_path, TEACHER)
    assert "not a regular file" in fails("score", os.devnull, TEACHER)
    assert "File name too long" in fails("score", "x" * 5000, TEACHER)
    assert "No such file" in fails("score", "two\nlines", TEACHER)
    short = tmp_path / "short.npy"
    short.write_bytes(Path(STUDENT).read_bytes()[:-1])
    assert "cut short" in fails("score", short, TEACHER)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file_is_refused(fails, save):
    path = save("s", np.zeros((2, 2)))
    os.chmod(path, 0)
    assert "Permission denied" in fails("score", path, TEACHER)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((3, 2), dtype=np.int64), "float16, bfloat16, float32 or float64, got int64"),
        (np.zeros((3, 2), dtype=bool), "got bool"),
        (np.zeros((3, 2), dtype=np.complex64), "got complex (complex64)"),
        (np.asarray([["a"]]), "got text"),
        (np.asarray([[b"a"]]), "got bytes"),
        (np.zeros((3, 2), dtype=[("x", "f4")]), "got a structured dtype"),
        (np.zeros((3, 2), dtype=[("größe", "f4")]), "got a structured dtype"),
        (np.zeros((3, 2), dtype="M8[s]"), "got datetime64[s]"),
        (np.asarray([[None]]), "pickled Python objects"),
        (np.zeros(3), "must have shape [samples, classes] or more axes, got [3]"),
        (np.float32(1), "got []"),
        (np.zeros((0, 3)), "no logits in it, its shape is [0, 3]"),
        (np.zeros((3, 0)), "no logits in it"),
    ],
)
@pytest.mark.filterwarnings("ignore:Stored array in format 3.0:UserWarning")
def test_arrays_that_are_no_logits_are_refused(fails, save, x, message):
    path = save("bad", x)
    line = fails("score", path, path)
    assert line.startswith(f"{path}: ")
    assert message in line


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="no wider float here")
def test_long_doubles_are_refused(fails, save):
    path = save("bad", np.zeros((2, 2), dtype=np.longdouble))
    assert "must be float16, bfloat16, float32 or float64" in fails("score", path, path)


def test_files_of_different_shapes_are_refused(fails, save):
    wide = save("wide", np.zeros((899, 12), dtype=np.float32))
    line = fails("score", STUDENT, wide)
    assert line == f"vocabulary mismatch: {STUDENT} has shape [899, 10] and {wide} has shape [899, 12]"
    assert "do not hold the same samples" in fails("score", STUDENT, save("few", np.zeros((5, 10), dtype=np.float32)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y[:-1], "labels must have one label a sample, shape [899]"),
        (lambda y: y[:, None], "got [899, 1]"),
        (lambda y: y.astype(np.float64), "labels must be integers, got float64"),
        (lambda y: y > 3, "labels must be integers, got bool"),
        (lambda y: y + np.asarray([1] + [0] * 898) * 10, "labels must lie in [0, 10), got 1"),
        (lambda y: np.where(np.arange(899) == 17, -100, y), "got -100 at sample 17"),
        (lambda y: np.where(np.arange(899) == 17, 2**64 - 1, y.astype(np.uint64)), f"got {2**64 - 1} at sample 17"),
    ],
)
def test_invalid_labels_are_refused(fails, save, change, message):
    assert message in fails("score", *FILES, "--labels", save("y", change(np.load(LABELS))))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--temperature", "0"], "argument --temperature: must be above 0, got 0"),
        (["--temperature", "nan"], "must be a finite number, got nan"),
        (["--weight-temperature", "-1"], "must be above 0, got -1"),
        (["--gamma", "-0.5"], "argument --gamma: must be at least 0, got -0.5"),
        (["--gamma", "x"], "must be a finite number, got x"),
        (["--mse-weight", "inf"], "argument --mse-weight: must be a finite number, got inf"),
        (["--batch-size", "0"], "argument --batch-size: must be a whole number, at least 1, got 0"),
        (["--batch-size", "1.5"], "must be a whole number"),
        (["--loss", "mse"], "--loss: must be of kl, dkl, ikl, gkl, reverse_kl, with commas between, got 'mse'"),
        (["--loss", "kl,"], "--loss: must be of kl, dkl, ikl, gkl, reverse_kl, with commas between, got 'kl,'"),
        (["--loss", "kl", "mse"], "unrecognized arguments: mse"),
        (["--loss"], "argument --loss: expected one argument"),
        (["--memory", "0.5"], "argument --memory: must be a size such as 2GB or 500MiB, got 0.5"),
        (["--memory", "9" * 400], "argument --memory: must be a size such as 2GB or 500MiB, got 999"),
        (["--output", ""], "output must be the name of what to write, got an empty one"),
        (["--per-sample", ""], "per_sample must be the name of what to write, got an empty one"),
        (["--plot", ""], "plot must be the name of what to write, got an empty one"),
        (["--work-dir", ""], "work_dir must be the name of what to write, got an empty one"),
        (["--backend", "tensorflow"], "argument --backend: invalid choice"),
        (["--format", "xml"], "argument --format: invalid choice"),
        (["--device", "nowhere"], "device nowhere: NumPy cannot compute there"),
        (["--temp", "1"], "unrecognized arguments: --temp"),
        (["--labels", LABELS, "more"], "unrecognized arguments: more"),
    ],
)
def test_invalid_options_are_refused(fails, argv, message):
    assert message in fails("score", *FILES, *argv)


def test_outputs_must_differ_from_inputs_and_each_other(fails, save, tmp_path):
    s, t, y = save("s", np.load(STUDENT)), save("t", np.load(TEACHER)), save("y", np.load(LABELS))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "link.npy").symlink_to(t)
    os.link(s, tmp_path / "hard.npy")
    for path, read in ((s, s), (t, t), (y, y), (tmp_path / "link.npy", t), (tmp_path / "hard.npy", s)):
        for option in ("output", "per_sample"):
            line = fails("score", s, t, "--labels", y, f"--{option.replace('_', '-')}", path)
            assert line == f"{path}: {option} must not be written over an input, got {read}"
    line = fails("score", tmp_path / "[st].npy", tmp_path / "[ts].npy", "--output", t)
    assert line == f"{t}: output must not be written over an input, got {t}"
    (tmp_path / "new").symlink_to(tmp_path / "x.npy")
    for one, two in (("x.npy", "x.npy"), ("new", "x.npy")):
        line = fails("score", s, t, "--output", tmp_path / one, "--per-sample", tmp_path / two)
        assert line == f"{tmp_path / two}: per_sample and output must be two files, got one"
    with pytest.raises(ValueError, match=r"per_sample must not be written over an input"):
        gklx.score(s, t, per_sample=t)
    assert {path: path.read_bytes() for path in before} == before
    assert {path.name for path in tmp_path.iterdir()} == {"s.npy", "t.npy", "y.npy", "link.npy", "hard.npy", "new"}


def test_outputs_must_not_lie_within_an_input(fails, tmp_path):
    zarr = pytest.importorskip("zarr")
    zarr.create_array(tmp_path / "s.zarr", shape=(899, 10), dtype="f4", chunks=(100, 10))[...] = np.load(STUDENT)
    group = zarr.open_group(tmp_path / "g.zarr", mode="w")
    group.create_array("a/b", shape=(899, 10), dtype="f4", chunks=(100, 10))[...] = np.load(STUDENT)
    for store, names in (("s.zarr", ("zarr.json", "c/0/new")), ("g.zarr", ("zarr.json", "new", "a/b/zarr.json"))):
        before = (tmp_path / store / "zarr.json").read_bytes()
        for name in names:
            path = tmp_path / store / name
            line = fails("score", tmp_path / store, TEACHER, "--output", path)
            assert line == f"{path}: output must not be written over an input, got {tmp_path / store}"
        assert (tmp_path / store / "zarr.json").read_bytes() == before


def test_missing_arguments_are_refused(fails):
    assert "required: TEACHER" in fails("score", STUDENT)
    assert "invalid choice: 'train'" in fails("train")


@pytest.mark.parametrize(
    "library", [x for x in LIBRARIES if x.backend not in ("numpy", "dask")], ids=lambda x: x.backend
)
def test_unknown_devices_are_refused(fails, library):
    backends.needs(library.backend)
    for device in ("nowhere", "cpu:999999", ":", "cuda:99"):
        if (library.backend, device) != ("torch", "cpu:999999"):  # PyTorch's CPU has any number
            assert f"device {device}: {library.name} cannot" in fails(
                "score", *FILES, "--backend", library.backend, "--device", device
            )


def test_missing_library_is_an_error(fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "array_api_compat.cupy", None)
    assert "backend cupy: CuPy cannot be imported here" in fails("score", *FILES, "--backend", "cupy")


@pytest.mark.parametrize("on", [x.backend for x in LIBRARIES if x.backend not in ("numpy", "cupy", "dask")])
def test_device_option_selects_the_device(run, on):
    backends.needs(on)
    name = "CPU_DEVICE" if on == "array_api_strict" else "cpu"
    status, out, _ = run("score", *FILES, "--loss", "kl", "--backend", on, "--device", name, "--format", "json")
    assert status == 0
    assert json.loads(out)["device"].startswith(name)


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "gklx: interrupted"),
        (MemoryError("8 GiB"), 1, "gklx: error: not enough memory; a smaller --memory may help (8 GiB)"),
        (RuntimeError("one\ntwo"), 1, "gklx: error: RuntimeError: one two"),
    ],
)
def test_internal_errors_are_one_line(run, monkeypatch, raised, status, line):
    def trouble(request, report):
        raise raised

    monkeypatch.setattr(gklx._scoring.comparison, "score", trouble)
    assert run("score", *FILES) == (status, "", line + "\n")


def test_broken_pipe_gives_status_141(tmp_path, monkeypatch, capsys):
    class Closed(io.StringIO):
        def write(self, text):
            if text:
                raise BrokenPipeError
            return 0

    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(["score", *FILES, "--work-dir", str(tmp_path)]) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "name",
    ["\x1b[31mred", "\x9b31m", "\x07\x08", "\u202eback", "\udcff", "\r", "two\u2028lines", "x" * 200_000, "é"],
    ids=ascii,
)
def test_error_lines_escape_control_characters(fails, name):
    line = fails("score", f"{name}.npy", TEACHER)
    assert "No such file" in line or "File name too long" in line
    assert line.isprintable()
    assert len(line) < 2100
    assert ("é" in line) == (name == "é")
    assert fails("score", *FILES, "--loss", name).isprintable()


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.library_independent
def test_python_m_gklx_runs_the_command():
    done = process("score", *FILES, "--labels", LABELS, "--format", "json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["samples"] == 899
    done = process("score", "none.npy", TEACHER)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gklx: error: none.npy: No such file or directory\n"


@pytest.mark.library_independent
def test_output_is_ascii_on_an_ascii_stream():
    done = process("score", *FILES, "--labels", LABELS, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "+- standard error" in done.stdout
    assert "?" not in done.stdout


@pytest.mark.library_independent
@pytest.mark.parametrize("terminal", [{"FORCE_COLOR": "1"}, {"PYTHONIOENCODING": "ascii"}], ids=str)
def test_report_in_a_file_does_not_depend_on_the_terminal(tmp_path, terminal):
    done = process("score", *FILES, "--output", str(tmp_path / "report.txt"), env={**os.environ, **terminal})
    assert (done.returncode, done.stdout) == (0, "")
    report = (tmp_path / "report.txt").read_text(encoding="utf-8")
    assert report.startswith("899 samples · 10 classes")
    assert "± standard error" in report
    assert "\x1b" not in report


@pytest.mark.library_independent
@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="no such device here")
def test_report_is_appended_to_the_file_behind_dev_stdout(tmp_path):
    log = tmp_path / "log"
    log.write_text("kept\n")
    argv = [sys.executable, "-m", "gklx", "score", *FILES, "--output", "/dev/stdout"]
    with log.open("a") as out:
        subprocess.run(argv, stdout=out, check=True, timeout=60)
    assert log.read_text(encoding="utf-8").startswith("kept\n899 samples")


def test_import_does_not_load_the_command():
    code = "import sys, gklx; print([m for m in sys.modules if m.startswith(('rich', 'gklx._cli', 'gklx._scoring'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("argv", "absent"),
    [
        (["score", *FILES], "rich"),
        (["score", *FILES], "psutil"),
        (["score", *FILES, "--memory", "1GB"], "psutil"),
        (["verify", "--backend", "numpy"], "rich"),
    ],
)
@pytest.mark.library_independent
def test_command_without_the_cli_extra_names_it(argv, absent):
    """A plain install has neither package: one line says what to install."""
    code = f"import sys; sys.modules[{absent!r}] = None; from gklx._cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    line = f"gklx: error: gklx {argv[0]} needs {absent}, which is not installed (pip install 'gklx[cli]')\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


@pytest.mark.library_independent
def test_score_function_without_the_cli_extra_names_it():
    code = "import sys, gklx; sys.modules['psutil'] = None; gklx.score([[0.0, 1.0]], [[1.0, 0.0]])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    expected = r"ModuleNotFoundError: gklx\.score needs psutil, .*pip install 'gklx\[cli\]'"
    assert re.match(expected, done.stderr.splitlines()[-1])


@pytest.mark.library_independent
@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
@pytest.mark.parametrize(("argv", "statuses"), [(["score", *FILES], {141}), (["score", "--help"], {0, 141})])
def test_closed_output_pipe_ends_the_command_silently(tmp_path, argv, statuses):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as out:
        done = subprocess.run(
            [sys.executable, "-m", "gklx", *argv, *([] if "--help" in argv else ["--work-dir", str(tmp_path)])],
            stdout=out,
            stderr=subprocess.PIPE,
            check=False,
            timeout=60,
        )
    assert done.returncode in statuses  # argparse may have swallowed the error of writing its help
    assert done.stderr == b""


@pytest.mark.library_independent
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device here")
@pytest.mark.parametrize("by", ["standard output", "--output"])
def test_failed_output_keeps_the_progress(tmp_path, by):
    argv = [sys.executable, "-m", "gklx", "score", *FILES, "--work-dir", str(tmp_path / "work"), "--format", "json"]
    if by == "--output":
        argv += ["--output", "/dev/full"]
    with open("/dev/full" if by == "standard output" else os.devnull, "wb") as out:
        done = subprocess.run(argv, stdout=out, stderr=subprocess.PIPE, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(b"gklx: error: OSError: ")
    assert done.stderr.count(b"\n") == 1
    again = subprocess.run(argv[: argv.index("--format") + 2], capture_output=True, text=True, check=True, timeout=60)
    assert again.stderr == "gklx: going on after 899 of 899 samples\n"
    assert json.loads(again.stdout)["samples"] == 899
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.library_independent
@pytest.mark.skipif(os.name != "posix", reason="streams of POSIX")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"])
@pytest.mark.parametrize("case", ["report", "file", "error", "help", "no arguments"])
def test_closed_standard_streams(tmp_path, closed, case):
    """A lost report gives an error status, nothing goes to the other stream, and no file gets a stream's descriptor."""
    out = tmp_path / "out.json"
    argv = {
        "report": ["score", *FILES, "--format", "json"],
        "file": ["score", *FILES, "--format", "json", "--output", str(out)],
        "error": ["score", "none.npy", TEACHER],
        "help": ["score", "--help"],
        "no arguments": [],
    }[case]
    work = ["--work-dir", str(tmp_path / "work")] if "--format" in argv else []
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "gklx", *argv, *work],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    silent, deaf = ">&-" in closed.replace("2>&-", ""), "2>" in closed
    lost = "gklx: error: OSError: standard output is closed, and the report was to go there\n" if silent else ""
    output_text = {
        "report": lost,
        "file": "",
        "error": "gklx: error: none.npy: No such file or directory\n",
        "help": lost,
        "no arguments": done.stderr,
    }[case]
    assert done.stderr == ("" if deaf else output_text)
    assert (
        done.returncode == {"report": int(silent), "file": 0, "error": 2, "help": int(silent), "no arguments": 2}[case]
    )
    if case == "report" and not silent:
        assert json.loads(done.stdout)["samples"] == 899
    elif case == "help" and not silent:
        assert done.stdout.startswith("usage: ")
    else:
        assert done.stdout == ""
    if case == "file":
        assert json.loads(out.read_text())["samples"] == 899


@pytest.mark.library_independent
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("module", ["gklx._cli.verify", "gklx._scoring.comparison", "rich.progress", "psutil"])
def test_interrupt_during_imports(tmp_path, module):
    """The command ends without output; otherwise an interrupted import might print a traceback."""
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from gklx._cli import main\n"
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "score", *FILES, "--work-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.library_independent
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(("command", "status"), [(["gklx", "--version"], -signal.SIGINT), (["script.py"], 1)])
def test_interrupt_while_the_package_is_imported(command, status):
    """The command ends without output; in a script KeyboardInterrupt is raised."""
    code = (
        "import os, signal, sys\n"
        f"sys.argv = {command!r}\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'numpy': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "try:\n"
        "    import gklx\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


@pytest.mark.library_independent
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_interrupt_reports_the_progress(tmp_path):
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may inherit it ignored\n"
        "import gklx._scoring.run as run, gklx._cli as cli\n"
        "run.scored = lambda *args: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(cli.main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "score", *FILES, "--work-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        130,
        "",
        "gklx: interrupted after 0 of 899 samples; the same command goes on from there\n",
    )
