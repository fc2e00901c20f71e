"""Runs of `gklx score` that are interrupted or have little memory or disk give the same numbers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import backends
import gklx
from dumps import COMMAND, SAMPLES, command, save_dumps
from gklx._scoring import run as runs
from gklx._scoring import statistics, work_file
from gklx._scoring.work_file import WorkFile

pytestmark = [
    pytest.mark.library_independent,
    pytest.mark.skipif(os.name != "posix", reason="signals, limits and locks of POSIX"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save_dumps(tmp_path_factory.mktemp("logits"))


def uninterrupted(tmp_path, *argv):
    done = command(*argv, "--work-dir", tmp_path / "other", "--format", "json", "--batch-size", "1")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


# --- interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [False, True])
def test_killed_run_is_resumed(files, tmp_path, labelled):
    work = tmp_path / "work"
    argv = [*files[:2], "--work-dir", work, "--batch-size", "1", "--format", "json"]
    argv += ["--labels", files[2]] if labelled else []
    with subprocess.Popen([*COMMAND, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        for _ in range(6000):
            if any(path.stat().st_size > 20_000 for path in work.glob("*/records.bin")):
                break
            assert process.poll() is None, "ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    done = command(*argv)
    assert done.returncode == 0
    assert done.stderr.startswith("gklx: going on after ")
    assert 0 < int(done.stderr.split()[4].replace(",", "")) < SAMPLES
    expected = uninterrupted(tmp_path, *files[:2], *(["--labels", files[2]] if labelled else []))
    assert json.loads(done.stdout) == expected
    assert list(work.iterdir()) == []


def test_interrupted_run_is_resumed(files, tmp_path):
    argv = [*files[:2], "--work-dir", tmp_path / "work", "--batch-size", "1", "--format", "json"]
    code = (
        "import signal, sys; from gklx._cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may inherit it ignored\n"
        "sys.exit(main())"
    )
    heeding = [sys.executable, "-c", code, "score", *map(str, argv)]
    with subprocess.Popen(heeding, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not any(path.stat().st_size > 20_000 for path in (tmp_path / "work").glob("*/records.bin")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert err.startswith(b"gklx: interrupted after ")
    assert err.endswith(b" of 3,000 samples; the same command goes on from there\n")
    assert err.count(b"\n") == 1
    done = command(*argv)
    assert done.stderr.startswith("gklx: going on after ")
    assert json.loads(done.stdout) == uninterrupted(tmp_path, *files[:2])


def test_run_that_failed_in_the_first_pass_is_resumed(files, tmp_path, monkeypatch):
    whole = gklx.score(*files, batch_size=100)
    monkeypatch.setattr(work_file, "_SECONDS_BETWEEN_SUMS", 0.0)
    seen = []

    def until(stop):
        def sums(place, job, chunk):
            seen.append(chunk.start)
            if chunk.start == stop:
                raise OSError("gone")
            return original(place, job, chunk)

        return sums

    original = runs.sum_chunk
    monkeypatch.setattr(runs, "sum_chunk", until(1500))
    with pytest.raises(OSError, match="gone"):
        gklx.score(*files, batch_size=100, work_dir=tmp_path)
    seen.clear()
    monkeypatch.setattr(runs, "sum_chunk", until(None))
    assert gklx.score(*files, batch_size=100, work_dir=tmp_path) == whole
    assert min(seen) == 1500


def test_truncated_record_is_recomputed(files, tmp_path, monkeypatch):
    whole = gklx.score(*files[:2], batch_size=100)
    original = runs.score_chunk

    def gone(place, job, chunk, prior):
        if chunk.start == 1000:
            raise OSError("gone")
        return original(place, job, chunk, prior)

    monkeypatch.setattr(runs, "score_chunk", gone)
    with pytest.raises(OSError, match="gone"):
        gklx.score(*files[:2], batch_size=100, work_dir=tmp_path)
    monkeypatch.setattr(runs, "score_chunk", original)
    (kept,) = tmp_path.glob("*/records.bin")
    os.truncate(kept, kept.stat().st_size - 5)
    assert gklx.score(*files[:2], batch_size=37, work_dir=tmp_path) == whole


def test_strict_applies_to_samples_of_an_earlier_run(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    s, t = rng.standard_normal((2, 300, 4))
    s[70, 1] = np.nan
    paths = [tmp_path / "s.npy", tmp_path / "t.npy"]
    for path, x in zip(paths, (s, t), strict=True):
        np.save(path, x)
    fail_at_block(monkeypatch, 200, *paths, work_dir=tmp_path / "work")
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"^strict: sample 70 has NaN or \+inf among its logits, or no finite one$"
        ):
            gklx.score(*paths, strict=True, batch_size=100, work_dir=tmp_path / "work")
    assert gklx.score(*paths, batch_size=100, work_dir=tmp_path / "work").undefined == 1


def fail_at_block(monkeypatch, at, *args, **kwargs):
    """Score in blocks of 100, fail at the block that starts at `at`, and keep the progress."""
    original = runs.score_chunk

    def gone(place, job, chunk, prior):
        if chunk.start == at:
            raise OSError("gone")
        return original(place, job, chunk, prior)

    with monkeypatch.context() as patched:
        patched.setattr(runs, "score_chunk", gone)
        with pytest.raises(OSError, match="gone"):
            gklx.score(*args, batch_size=100, **kwargs)


def flipped(content, at):
    content[at % len(content)] ^= 16


DAMAGES = {
    "doubled": lambda x: x.extend(x),
    "zeroed": lambda x: x.__setitem__(slice(None), bytes(len(x))),
    "zeroed in the middle": lambda x: x.__setitem__(slice(len(x) // 3, len(x) // 2), bytes(len(x) // 2 - len(x) // 3)),
    "flipped at the start": lambda x: flipped(x, 3),
    "flipped in the middle": lambda x: flipped(x, len(x) // 2),
    "flipped at the end": lambda x: flipped(x, -2),
    "cut": lambda x: x.__delitem__(slice(len(x) * 2 // 3, None)),
    "a piece twice": lambda x: x.__setitem__(slice(0, 0), x[: len(x) // 2]),
    "a piece out": lambda x: x.__delitem__(slice(len(x) // 4, len(x) // 2)),
    "halves swapped": lambda x: x.__setitem__(slice(None), x[len(x) // 2 :] + x[: len(x) // 2]),
    "empty": lambda x: x.clear(),
}


@pytest.mark.parametrize("name", ["records.bin", "checks.bin", "class_sums.bin", "*"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_damaged_progress_is_recomputed(files, tmp_path, monkeypatch, name, damage):
    labels = [files[2]] if name == "class_sums.bin" else []
    whole = gklx.score(*files[:2], *labels, batch_size=100)
    fail_at_block(monkeypatch, 1500, *files[:2], *labels, work_dir=tmp_path)
    damaged = list(tmp_path.glob(f"*/{name}"))
    assert damaged
    for path in damaged:
        content = bytearray(path.read_bytes())
        damage(content)
        path.write_bytes(content)
    assert gklx.score(*files[:2], *labels, batch_size=100, work_dir=tmp_path) == whole


def test_progress_of_another_job_is_not_used(files, tmp_path, monkeypatch):
    fail_at_block(monkeypatch, 1500, *files[:2], temperature=2.0, work_dir=tmp_path / "other")
    fail_at_block(monkeypatch, 100, *files[:2], work_dir=tmp_path / "own")
    (other,), (own,) = (list((tmp_path / which).iterdir()) for which in ("other", "own"))
    for name in ("records.bin", "checks.bin"):
        (own / name).write_bytes((other / name).read_bytes())
    assert gklx.score(*files[:2], batch_size=100, work_dir=tmp_path / "own") == gklx.score(*files[:2], batch_size=100)


def test_records_changed_during_the_run_are_an_error(tmp_path):
    dtype = np.dtype([("x", "<f4")])
    work = WorkFile(dtype, tmp_path / "kept")
    work.append(np.arange(1000).astype(dtype))
    assert sum(len(block) for block in work.blocks()) == 1000
    path = tmp_path / "kept" / "records.bin"
    content = path.read_bytes()
    for bad in (content[:-1], content[:40] + b"?" + content[41:], b""):
        path.write_bytes(bad)
        with pytest.raises(OSError, match=r"the records are no longer those that were written.*records\.bin"):
            list(work.blocks())
    work.close(done=True)


@pytest.mark.parametrize("kind", ["npy", "npz", "zarr"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_file_rewritten_during_the_run_is_an_error(tmp_path, monkeypatch, kind, which):
    """The new file has the same size and date; it is written before its rows are read, or afterwards."""
    rng = np.random.default_rng(1)
    arrays = [*rng.standard_normal((2, 1000, 4)), rng.integers(0, 4, 1000)]
    paths = [tmp_path / f"{i}.{kind}" for i in range(3)]

    def save(path, x):
        if kind == "zarr":
            pytest.importorskip("zarr").open_array(path, mode="w", shape=x.shape, dtype=x.dtype, chunks=x.shape)[
                ...
            ] = x
        else:
            (np.save if kind == "npy" else np.savez)(path, x)

    for path, x in zip(paths, arrays, strict=True):
        save(path, x)
    for at in (100, 900):
        original = runs.score_chunk

        def rewriting(place, job, chunk, prior, at=at, original=original):
            if chunk.start == at:
                written = [p for p in [paths[which], *paths[which].rglob("*")] if p.is_file()]
                dates = [path.stat().st_mtime_ns for path in written]
                save(paths[which], arrays[which][::-1].copy())
                for path, date in zip(written, dates, strict=True):
                    os.utime(path, ns=(date, date))
            return original(place, job, chunk, prior)

        time.sleep(0.02)
        with monkeypatch.context() as patched:
            patched.setattr(runs, "score_chunk", rewriting)
            with pytest.raises(ValueError, match=rf"{which}\.{kind}: was changed during the run; what was computed is"):
                gklx.score(*paths, batch_size=100, work_dir=tmp_path / "work")
        assert list((tmp_path / "work").iterdir()) == []


def test_other_inputs_or_settings_are_another_job(files, tmp_path, monkeypatch):
    """Other inputs or settings make another job; other weights of the parts do not, since they are applied later."""
    folders = []
    monkeypatch.setattr("gklx._scoring.comparison.job_folder", lambda parent, job: folders.append(json.dumps(job)))
    for kwargs in ({}, {"mse_weight": 3.0, "ce_weight": 2.0, "batch_size": 7}):
        gklx.score(*files[:2], work_dir=tmp_path, **kwargs)
    assert len(set(folders)) == 1
    for kwargs in ({"gamma": 0.5}, {"temperature": 2.0}, {"losses": ["kl"]}, {"labels": files[2]}):
        gklx.score(*files[:2], work_dir=tmp_path, **kwargs)
    os.utime(files[0], (0, 0))
    gklx.score(*files[:2], work_dir=tmp_path)
    assert len(set(folders)) == 6
    np.savez(tmp_path / "both.npz", s=np.load(files[0]), t=np.load(files[1]))
    for key in ("s", "t"):
        gklx.score(f"{tmp_path / 'both.npz'}::{key}", files[1], work_dir=tmp_path)
    assert len(set(folders)) == 8


def test_second_run_of_a_job_keeps_no_progress(tmp_path):
    dtype = np.dtype([("x", "<f4")])
    one = WorkFile(dtype, tmp_path)
    one.append(np.zeros(3, dtype))
    two = WorkFile(dtype, tmp_path)
    assert (two.records, two.folder) == (0, None)
    two.append(np.ones(2, dtype))
    assert [block["x"].tolist() for block in one.blocks()] == [[0, 0, 0]]
    two.close(done=True)
    one.close(done=False)
    again = WorkFile(dtype, tmp_path)
    assert again.resumed_at == 3
    again.close(done=True)
    assert not tmp_path.exists()


# --- full disks and memory bounds -------------------------------------------------------------------------------------


def test_run_on_a_full_disk_fails_and_is_resumed(files, tmp_path):
    """A limit on the size of files simulates the full disk."""
    argv = [*files[:2], "--work-dir", tmp_path / "work", "--format", "json"]
    limited = ["sh", "-c", 'ulimit -f 98 && exec "$@"', "sh", *COMMAND, *map(str, argv)]  # of 512 bytes
    done = subprocess.run(limited, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("gklx: error: ")
    assert "records.bin" in done.stderr
    assert done.stderr.count("\n") == 1
    done = command(*argv)
    assert done.stderr.startswith("gklx: going on after ")
    assert json.loads(done.stdout) == uninterrupted(tmp_path, *files[:2])


def test_run_on_a_full_file_system_fails_and_is_resumed(files, tmp_path):
    """The file system has 64 kB, and is enlarged for the second run."""
    script = (
        'mkdir -p "$1" && mount -t tmpfs -o size=64k tmpfs "$1" || exit 77\n'
        'dir=$1; shift\n"$@"; echo "status $?"\nmount -o remount,size=10m "$dir" && "$@"\n'
    )
    work = tmp_path / "work"
    argv = [*COMMAND, *files[:2], "--work-dir", str(work / "kept"), "--format", "json"]
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(work), *argv],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no file system of one's own may be mounted here ({done.stderr.strip()})")
    status, _, report = done.stdout.partition("\n")
    assert status == "status 1"
    full, going_on = done.stderr.splitlines()
    assert full.startswith("gklx: error: OSError: ")
    assert "No space left on device" in full
    assert going_on.startswith("gklx: going on after ")
    assert json.loads(report) == uninterrupted(tmp_path, *files[:2])


def test_disk_that_is_full_of_an_unpacked_member_is_a_failure_of_the_system(tmp_path):
    for name in ("s", "t"):
        np.savez(tmp_path / f"{name}.npz", np.zeros((9000, 5), order="F"))
    limited = ["sh", "-c", 'ulimit -f 98 && exec "$@"', "sh", *COMMAND, "s.npz", "t.npz", "--work-dir", "."]
    done = subprocess.run(limited, capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"gklx: error: OSError: .* t\.npz: unpacking it: File too large: '.*'\n", done.stderr)


def test_block_of_many_candidates_has_fewer_samples(files, monkeypatch):
    """Their records would else be larger than their logits."""
    score = runs.score_chunk
    seen = []
    monkeypatch.setattr(runs, "score_chunk", lambda *args: (seen.append(args[2].stop - args[2].start), score(*args))[1])
    for names in ("a", "abc"):
        monkeypatch.setattr(work_file, "_BLOCK_BYTES", 30_000)
        gklx.score(dict.fromkeys(names, files[0]), files[1], losses=["kl"])
    assert 3 * max(seen[-2:]) <= seen[0] + 2


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the system does not tell the peak")
@pytest.mark.parametrize("kind", ["npy", "fortran", "npz", "zarr", "prior", "few"])
def test_memory_of_the_process_stays_below_the_bound(tmp_path, kind):
    """As the operating system counts it, for files of 600 MB; the bound is little more than what NumPy needs.

    Where classes are few, what is known of a sample takes more than its logits.
    """
    shapes = {"fortran": (150_000, 1000), "zarr": (2000, 15_000), "prior": (2000, 3000), "few": (1_000_000, 2)}
    shape = shapes.get(kind, (5000, 30_000))
    paths = []
    for name in ("student", "teacher"):
        x = np.zeros(shape, np.float16, "F" if kind == "fortran" else "C")
        x[::500] = 1
        paths.append(tmp_path / f"{name}.{kind if kind in ('npz', 'zarr') else 'npy'}")
        if kind == "npz":
            np.savez_compressed(paths[-1], x)
        elif kind == "zarr":  # in one chunk of 60 MB
            zarr = pytest.importorskip("zarr")
            zarr.create_array(paths[-1], shape=shape, dtype=x.dtype, chunks=shape)[...] = x
        else:
            np.save(paths[-1], x)
    np.save(tmp_path / "labels.npy", np.arange(shape[0]) % shape[1])
    by_prior = ["--loss", "gkl", "--labels", tmp_path / "labels.npy", "--weights", "prior"]
    options = by_prior if kind == "prior" else ["--loss", "kl,dkl,ikl" if kind == "few" else "kl"]
    bound = {"zarr": 560, "prior": 640, "few": 100}.get(kind, 200)
    code = (  # not ru_maxrss, which begins with that of the parent
        "import re, sys; from gklx._cli import main; status = main();"
        "print(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1], file=sys.stderr);"
        "sys.exit(status)"
    )
    argv = ["score", *paths, *options, "--memory", f"{bound}MB"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stderr) * 1024 < bound * 1e6
    if kind in ("zarr", "prior"):
        done = command(*argv[1:-1], "300MB")
        assert (done.returncode, done.stdout) == (2, "")
        what = {
            "zarr": rf"the chunks of {paths[0]}, {paths[1]}, which are unpacked whole",
            "prior": r"the class prior of 3,000 classes \(losses kl and dkl need none\)",
        }[kind]
        line = rf"gklx: error: memory must be at least \d+ MB for {shape[1]:,} classes here, \d+ MB of it for {what}; "
        assert re.fullmatch(line + "got 300 MB\n", done.stderr)


@pytest.mark.parametrize("on", ["numpy", "dask"])
def test_class_prior_too_large_for_memory_is_refused_before_the_work(tmp_path, on):
    """Even without a bound: the prior of a million classes takes 8 TB, and as much for each block in progress."""
    backends.needs(on)
    for name in ("s", "t"):
        np.lib.format.open_memmap(tmp_path / f"{name}.npy", "w+", np.float16, (3, 10**6))
    np.save(tmp_path / "y.npy", np.arange(3))
    argv = [*(tmp_path / f"{name}.npy" for name in "st"), "--labels", tmp_path / "y.npy", "--backend", on]
    done = command(*argv, "--weights", "prior")
    assert (done.returncode, done.stdout) == (2, "")
    what = r"32,000 GB of it for the class prior of 1,000,000 classes \(losses kl and dkl need none\)"
    line = rf"gklx: error: memory must be at least 32,\d\d\d GB for 1,000,000 classes here, {what}; "
    assert re.fullmatch(line + r"half of the free memory leaves [\d,]+ [MG]B\n", done.stderr)
    assert command(*argv[:-2], "--loss", "kl").returncode == 0
    done = command(*argv, "--loss", "gkl", "--format", "json")
    assert done.stderr.startswith("gklx: ikl and gkl are weighed by the teacher: memory must be at least 32,")
    assert json.loads(done.stdout)["parameters"]["weights"] == "teacher"


def test_work_folder_that_cannot_be_created_is_an_error(files):
    done = command(*files[:2], "--work-dir", Path(files[0]) / "below")
    assert (done.returncode, done.stdout) == (2, "")
    assert "must be a folder to keep the progress in" in done.stderr


# --- quantiles of many samples ----------------------------------------------------------------------------------------


def test_sketched_quantiles_are_close(monkeypatch):
    pytest.importorskip("datasketches")
    rng = np.random.default_rng(0)
    s, t = rng.standard_normal((2, 40_000, 3)) * 3
    s[:4, 0] = -np.inf
    exact = gklx.score(s, t)
    monkeypatch.setattr(statistics, "EXACT_QUANTILES", 1000)
    sketched = gklx.score(s, t)
    assert (exact.quantiles, sketched.quantiles) == ("exact", "t-digest")
    for name, own in sketched.losses.items():
        values = np.sort(getattr(gklx, name)(s, t, reduction="none"))
        quantiles = {key: q for key, q in statistics.QUANTILES.items() if key in own._fields}
        assert len(quantiles) == 9
        for key, q in quantiles.items():
            rank = np.searchsorted(values, getattr(own, key)) / values.size
            assert abs(rank - q) < 0.001, (name, key)
        same = own._replace(**{key: getattr(exact.losses[name], key) for key in quantiles})
        assert same == exact.losses[name]


def test_sketched_quantiles_have_each_infinity_at_its_own_end(monkeypatch):
    pytest.importorskip("datasketches")
    rng = np.random.default_rng(0)
    s, t = rng.standard_normal((2, 4000, 3))
    s[:600, 0] = -np.inf
    exact, sketched = [], []
    for found, most in ((exact, 4000), (sketched, 1000)):
        monkeypatch.setattr(statistics, "EXACT_QUANTILES", most)
        for weight in (1, -1):
            found.append(gklx.score(s, t, losses=["dkl"], mse_weight=weight, ce_weight=0).losses["dkl"])
    assert (exact[0].p90, exact[1].p10) == (np.inf, -np.inf)
    for one, other in zip(exact, sketched, strict=True):
        quantiles = {key: getattr(one, key) for key in statistics.QUANTILES if key in one._fields}
        assert {key: getattr(other, key) for key in quantiles} == pytest.approx(quantiles, rel=0.02, abs=1e-3)


def test_missing_sketch_library_is_an_error_before_the_work(files, monkeypatch):
    monkeypatch.setattr(statistics, "EXACT_QUANTILES", 1000)
    monkeypatch.setattr("gklx._scoring.comparison.EXACT_QUANTILES", 1000)
    monkeypatch.setitem(sys.modules, "datasketches", None)
    with pytest.raises(ValueError, match=r"^more than 1,000 samples need datasketches .* 'gklx\[score\]'"):
        gklx.score(*files[:2])
