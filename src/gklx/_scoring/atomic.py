"""Files that are whole or not there: written beside their place, then renamed into it."""

import contextlib
import os
import tempfile
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
        What was written does not fit.
    """
    check_writable(path)
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        yield target
        return
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    os.close(handle)
    part = Path(name)
    try:
        part.chmod(target.stat().st_mode if target.exists() else 0o666 & ~_umask())
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def check_writable(path: str | os.PathLike[str]) -> None:
    """ValueError where a file cannot be written: said before the work, not after it."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ValueError(f"{path}: must be a file to write, got a directory")
    if not target.parent.is_dir():
        raise ValueError(f"{path}: must be in a folder that exists, got {target.parent}")
    if not os.access(target.parent if target.is_file() or not target.exists() else target, os.W_OK):
        raise ValueError(f"{path}: must be in a folder that may be written to, got {target.parent}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
