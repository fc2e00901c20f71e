"""Files that are whole or not there: written beside their place, then renamed into it."""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` at the end of the block, or is gone after an exception.

    A device or pipe is not replaced: what is written goes straight to it.

    Raises
    ------
    ValueError
        As `check_writable`.
    OSError
        What was written does not fit; the error names `path`.
    """
    check_writable(path)
    try:
        if not _replaced(path):
            yield Path(path)
            return
        target = Path(os.path.realpath(path))
        part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        try:
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # the umask takes from this
            yield part
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            if target.exists():
                part.chmod(stat.S_IMODE(target.stat().st_mode))
            os.replace(part, target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a write says no name
            error.filename = os.fspath(path)
        raise


def check_writable(path: str | os.PathLike[str]) -> None:
    """ValueError where a file cannot be written: said before the work, not after it."""
    if os.path.isdir(path):
        raise ValueError(f"{path}: must be a file to write, got a directory")
    if not _replaced(path):
        if not os.access(path, os.W_OK):
            raise ValueError(f"{path}: must be a device or pipe that may be written to, got one that may not")
        return
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise ValueError(f"{path}: must be in a folder that exists, got {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: must be in a folder that may be written to, got {folder}")


def _replaced(path: str | os.PathLike[str]) -> bool:
    """Whether a new file takes the path's place: not a device's, nor a pipe's that /dev/stdout leads to."""
    return os.path.isfile(path) or not os.path.exists(path)
