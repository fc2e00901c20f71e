"""The folder of the progress: its permissions, and several runs of one job at a time."""

import errno
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import gklx
import gklx._scoring.comparison
from dumps import command
from gklx._scoring import work_file
from gklx._scoring.work_file import WorkFile, job_folder

pytestmark = [
    pytest.mark.library_independent,
    pytest.mark.skipif(os.name != "posix", reason="links, users and locks of POSIX"),
]

DTYPE = np.dtype([("x", "<f4")])


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / "s.npy", tmp_path / "t.npy"]
    for path in paths:
        np.save(path, rng.standard_normal((40, 3)))
    return paths


def test_folder_and_files_are_private(tmp_path):
    before = os.umask(0)
    try:
        work = WorkFile(DTYPE, tmp_path / "kept")
        work.append(np.zeros(3, DTYPE))
        work.save_class_sums(np.zeros((2, 2)), 3, last=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "kept").iterdir()}
    assert modes == dict.fromkeys(("records.bin", "checks.bin", "class_sums.bin"), 0o600)
    work.close(done=True)
    assert list(tmp_path.iterdir()) == []


def test_old_readable_folder_is_made_private(tmp_path):
    (tmp_path / "kept").mkdir(0o755)
    work = WorkFile(DTYPE, tmp_path / "kept")
    assert (stat.S_IMODE((tmp_path / "kept").stat().st_mode), work.note) == (0o700, None)
    work.close(done=True)


PLANTED = {
    "a link for the folder": lambda kept, aim: kept.symlink_to(aim.parent),
    "a file for the folder": lambda kept, aim: kept.write_text("mine"),
    "a folder that others may write to": lambda kept, aim: (kept.mkdir(), kept.chmod(0o777)),
    "another user's folder": lambda kept, aim: (kept.mkdir(0o700), os.chown(kept, 65534, 65534)),
    **{
        f"{kind} for {name}": lambda kept, aim, plant=plant, name=name: (kept.mkdir(0o700), plant(kept / name, aim))
        for name in ("records.bin", "checks.bin")
        for kind, plant in (
            ("a link", lambda path, aim: path.symlink_to(aim)),
            ("a hard link", lambda path, aim: os.link(aim, path)),
            ("a pipe", lambda path, aim: os.mkfifo(path)),
            ("a folder", lambda path, aim: path.mkdir()),
        )
    },
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=list(PLANTED))
def test_planted_links_are_not_followed_and_only_disable_the_progress(files, tmp_path, monkeypatch, capsys, planted):
    aim = tmp_path / "aim" / "records.bin"
    aim.parent.mkdir()
    aim.write_text("somebody's")
    work = tmp_path / "work"
    work.mkdir()
    try:
        monkeypatch.setattr("gklx._scoring.comparison.job_folder", lambda parent, job: parent / "kept")
        planted(work / "kept", aim)
    except PermissionError:
        pytest.skip("only root makes another user's folder")
    found = gklx.score(*files, work_dir=work, progress=True)
    assert found == gklx.score(*files)
    assert capsys.readouterr().err.startswith("gklx: no progress is kept: ")
    assert aim.read_text() == "somebody's"
    assert [path.name for path in aim.parent.iterdir()] == ["records.bin"]


def test_planted_link_for_the_class_sums_is_not_followed(tmp_path):
    (tmp_path / "kept").mkdir(0o700)
    (tmp_path / "aim").write_text("somebody's")
    (tmp_path / "kept" / "class_sums.bin").symlink_to(tmp_path / "aim")
    work = WorkFile(DTYPE, tmp_path / "kept")
    assert work.class_sums(2) is None
    work.close(done=True)
    assert (tmp_path / "aim").read_text() == "somebody's"


def test_users_do_not_share_a_folder(tmp_path, monkeypatch):
    own = job_folder(tmp_path, {"a": 1})
    assert own == job_folder(tmp_path, {"a": 1}) != job_folder(tmp_path, {"a": 2})
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    assert own != job_folder(tmp_path, {"a": 1})


def test_foreign_files_in_the_folder_are_kept(tmp_path):
    work = WorkFile(DTYPE, tmp_path / "kept")
    (tmp_path / "kept" / "notes").write_text("mine")
    work.close(done=True)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["notes"]


def test_second_run_reports_that_it_keeps_no_progress(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gklx._scoring.comparison.job_folder", lambda parent, job: parent / "kept")
    first = WorkFile(DTYPE, tmp_path / "kept")
    gklx.score(*files, work_dir=tmp_path, progress=True)
    assert capsys.readouterr().err == "gklx: no progress is kept: another run of this job is under way\n"
    first.close(done=True)


def test_concurrent_runs_of_one_job_see_only_their_own_records(tmp_path):
    """Runs start and end while others are in progress; no file is left."""
    failed, start = [], threading.Barrier(4)

    def run(number):
        try:
            start.wait()
            for i in range(300):
                work = WorkFile(DTYPE, tmp_path / "kept")
                assert work.resumed_at == 0
                work.append(np.full(3, number * 1000 + i).astype(DTYPE))
                work.save_class_sums(np.full((2, 2), float(number)), 3, last=True)
                if work.folder is not None:
                    assert work.class_sums(2)[0][0, 0] == number
                (block,) = work.blocks()
                assert block["x"].tolist() == [number * 1000 + i] * 3
                work.close(done=True)
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps", range(3))
def test_folder_removed_at_any_step_is_made_again(tmp_path, monkeypatch, steps):
    """Another run removes it at its end: before the folder is opened, before the file is opened, or before the lock."""
    left = [steps]

    def going(original):
        def instead(*args, **kwargs):
            if left[0] == 0:
                for path in tmp_path.glob("kept/*"):
                    path.unlink()
                if (tmp_path / "kept").exists():
                    (tmp_path / "kept").rmdir()
            left[0] -= 1
            return original(*args, **kwargs)

        return instead

    monkeypatch.setattr(work_file, "_make_own", going(work_file._make_own))
    monkeypatch.setattr(work_file, "_open_own", going(work_file._open_own))
    monkeypatch.setattr(work_file, "lock", going(work_file.lock))
    work = WorkFile(DTYPE, tmp_path / "kept")
    assert work.folder is not None
    work.append(np.ones(300, DTYPE))
    work.close(done=False)
    again = WorkFile(DTYPE, tmp_path / "kept")
    assert again.resumed_at == 300
    again.close(done=True)


def test_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    work = WorkFile(DTYPE, Path("work") / "kept")
    assert work.note == "no progress is kept: work/kept cannot be made (No such file or directory)"
    work.close(done=True)


def test_block_has_fewer_of_large_records(tmp_path):
    work = WorkFile([("x", "<f4", 2**16)], None)
    work.append(np.zeros(9, work.dtype))
    assert [len(block) for block in work.blocks()] == [4, 4, 1]
    work.close(done=True)


def test_full_disk_is_no_wrong_argument(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(type(tmp_path), "mkdir", full)
    with pytest.raises(OSError, match="No space left on device"):
        WorkFile(DTYPE, tmp_path / "kept")


@pytest.mark.parametrize("home", ["a file", "read-only", "none"])
def test_unwritable_home_only_disables_the_progress(files, tmp_path, home):
    if home == "read-only" and os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    environment = {key: value for key, value in os.environ.items() if key != "XDG_CACHE_HOME"}
    place = tmp_path / "home"
    if home == "read-only":
        place.mkdir(0o500)
    else:
        place.write_text("a file")
    done = command(
        *files, "--format", "json", env={**environment, "HOME": str(place / "x" if home == "none" else place)}
    )
    assert done.returncode == 0
    assert done.stderr == (
        "gklx: no progress is kept: the user's cache cannot be written (--work-dir names another place)\n"
    )
    assert json.loads(done.stdout)["samples"] == 40


def test_local_cluster_listens_on_the_loopback_interface_only(files):
    pytest.importorskip("distributed")
    program = """
import sys, threading, time
import psutil
import gklx
from gklx._scoring import pools
original, seen = pools.Pool.in_order, set()
def in_order(self, *args, **kwargs):
    seen.update(x.laddr for x in psutil.Process().net_connections("inet") if x.status == psutil.CONN_LISTEN)
    return original(self, *args, **kwargs)
pools.Pool.in_order = in_order
print(gklx.score(*sys.argv[1:], backend="dask").samples, sorted({each.ip for each in seen}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, files)], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "40 ['127.0.0.1']\n"
