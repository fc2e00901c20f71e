"""Files are whole or not there."""

import errno
import os
import stat

import pytest

from gklx._scoring.atomic import check_writable, replacing


def test_a_file_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(0o640)
    with replacing(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.listdir(tmp_path) == ["x"]


def test_a_new_file_obeys_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "x") as part:
            part.write_text("new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SystemExit])
@pytest.mark.parametrize("old", ["old", None])
def test_an_interruption_leaves_the_old_file_or_none(tmp_path, error, old):
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


def test_a_link_is_followed(tmp_path):
    (tmp_path / "x").symlink_to(tmp_path / "there")
    with replacing(tmp_path / "x") as part:
        part.write_text("new")
    assert (tmp_path / "x").is_symlink()
    assert (tmp_path / "there").read_text() == "new"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device here")
def test_a_device_is_written_and_stays():
    with pytest.raises(OSError, match="No space left") as caught, replacing("/dev/full") as part:
        part.write_text("x")
    assert caught.value.errno == errno.ENOSPC
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match=r"must be a file to write, got a directory$"):
        check_writable(tmp_path)
    with pytest.raises(ValueError, match=r"must be in a folder that exists, got .*none$"):
        check_writable(tmp_path / "none" / "x")
    check_writable(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match=r"must be in a folder that may be written to"):
        check_writable(tmp_path / "x")
