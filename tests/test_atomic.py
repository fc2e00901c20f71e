"""Files are written completely or not at all."""

import errno
import os
import stat
import subprocess
import sys
import threading

import pytest

from gklx._scoring.atomic import check_writable, replacing

pytestmark = pytest.mark.library_independent


def test_file_is_replaced_when_the_block_ends(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(0o640)
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["x"]


def test_new_file_obeys_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "x") as part:
            part.write_text("new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SystemExit])
@pytest.mark.parametrize("old", ["old", None])
def test_interruption_leaves_the_old_file_or_none(tmp_path, error, old):
    path = tmp_path / "x"
    if old:
        path.write_text(old)

    def write():
        with replacing(path) as part:
            part.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == ({"x": old} if old else {})


def test_symbolic_link_is_followed(tmp_path):
    (tmp_path / "x").symlink_to(tmp_path / "there")
    with replacing(tmp_path / "x") as part:
        part.write_text("new")
    assert (tmp_path / "x").is_symlink()
    assert (tmp_path / "there").read_text() == "new"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device here")
def test_device_is_written_in_place():
    with pytest.raises(OSError, match=r"No space left.*'/dev/full'$") as caught, replacing("/dev/full") as part:
        part.write_text("x")
    assert caught.value.errno == errno.ENOSPC
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes by name here")
def test_pipe_is_written_in_place(tmp_path):
    path = tmp_path / "x"
    os.mkfifo(path)
    got = []
    reader = threading.Thread(target=lambda: got.append(path.read_text()))
    reader.start()
    with replacing(path) as part:
        part.write_text("new")
    reader.join(10)
    assert got == ["new"]
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="no such device here")
def test_dev_stdout_is_written_when_it_is_a_pipe():
    assert _python('with replacing("/dev/stdout") as part: part.write_text("new")') == "new"


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="no descriptors by name here")
@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
def test_file_behind_a_descriptor_is_written_where_the_descriptor_stands(tmp_path, name):
    log = tmp_path / "log"
    log.write_text("kept ")
    if name == "link":
        name = str(tmp_path / "link")
        os.symlink("/dev/stdout", name)
    elif not os.path.exists(name):
        pytest.skip("no such path here")
    before, names = log.stat().st_ino, os.listdir(tmp_path)
    with log.open("a") as out:
        _python(f"with replacing({name!r}) as part: part.write_text('new')", stdout=out)
    assert log.read_text() == "kept new"
    assert (log.stat().st_ino, os.listdir(tmp_path)) == (before, names)


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="no descriptors by name here")
def test_check_writable_refuses_descriptors_that_are_not_open_to_be_written_to(tmp_path):
    (tmp_path / "x").write_text("old")
    with (tmp_path / "x").open() as file:
        path = f"/dev/fd/{file.fileno()}"
        with pytest.raises(ValueError, match=r"^/dev/fd/\d+: must be a descriptor that is open to be written to"):
            check_writable(path)
    for closed in (path, f"/dev/fd/{2**70}"):
        with pytest.raises(ValueError, match=r"^/dev/fd/\d+: must be a descriptor that is open to be written to"):
            check_writable(closed)


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on files here")
def test_full_disk_raises_an_error_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    output_text = _python(
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        f"    with replacing({str(path)!r}) as part: part.write_bytes(bytes(5000))\n"
        "except OSError as error: print(error)\n"
    )
    assert output_text.strip().endswith(f"File too large: {str(path)!r}")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_read_only_file_is_replaced_and_stays_read_only(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(0o440)
    with replacing(path) as part:
        assert part.stat().st_mode & stat.S_IWUSR  # otherwise only root could write it
        part.write_text("new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o440


def _python(code, stdout=subprocess.PIPE):
    source = f"from gklx._scoring.atomic import replacing\n{code}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", source], env=environment, stdout=stdout, text=True, check=True, timeout=60
    ).stdout


@pytest.mark.skipif(os.name != "posix", reason="signals and locks of POSIX")
@pytest.mark.parametrize("name", ["x", "[a-z]*.json", "n" * 250])
def test_temporary_file_of_a_killed_process_is_removed_by_the_next(tmp_path, name):
    path = tmp_path / name
    code = f"""
import sys
from gklx._scoring.atomic import replacing
with replacing({str(path)!r}) as part:
    part.write_text("half")
    print(part, flush=True)
    sys.stdin.read()
"""
    argv = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    started = [
        subprocess.Popen(argv, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    parts = [each.stdout.readline().strip() for each in started]
    started[0].kill()
    started[0].communicate()
    other = tmp_path / f".{name[:40]}y.01234567.part"
    other.write_text("not ours")
    (tmp_path / f".{name[:40]}.01234567.part").mkdir()
    assert {os.path.exists(part) for part in parts} == {True}
    with replacing(path) as part:
        part.write_text("new")
    assert [os.path.exists(part) for part in parts] == [False, True]  # the second one is still being written
    assert path.read_text() == "new"
    assert other.exists()
    started[1].communicate()
    assert path.read_text() == "half"
    assert sorted(os.listdir(tmp_path)) == sorted([name, other.name, f".{name[:40]}.01234567.part"])


def test_folder_that_cannot_be_listed_is_written_to(tmp_path, monkeypatch):
    def refused(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    with monkeypatch.context() as patched:  # permissions do not hold for root
        patched.setattr(type(tmp_path), "iterdir", refused)
        with replacing(tmp_path / "x") as part:
            part.write_text("new")
    assert os.listdir(tmp_path) == ["x"]


def test_check_writable_refuses_folders_and_missing_folders(tmp_path):
    with pytest.raises(ValueError, match=r"must be a file to write, got a directory$"):
        check_writable(tmp_path)
    with pytest.raises(ValueError, match=r"must be in a folder that exists, got .*none$"):
        check_writable(tmp_path / "none" / "x")
    check_writable(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_check_writable_refuses_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match=r"must be in a folder that may be written to"):
        check_writable(tmp_path / "x")
