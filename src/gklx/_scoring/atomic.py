"""Atomic writes: a file is written under a temporary name in the same folder, then renamed."""

import contextlib
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows: nothing prevents two runs of one job, and what a killed run left is not removed
    fcntl = None

_NAMED = 40
"""How many characters of a target's name its temporary name has: the whole name may be too long for a suffix."""
_MOST_LINKS = 40
"""As many links as Linux follows in a path."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], mode: int = 0o666) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` at the end of the block, or is gone after an exception.

    A device or pipe is not replaced: what is written goes straight to it. Nor is the file behind a descriptor that the
    path names, as /dev/stdout does: it gets what was written where the descriptor stands. A new file gets `mode`, less
    what the umask takes. Temporary files that killed processes left are removed.

    Raises
    ------
    ValueError
        As `check_writable`.
    OSError
        What was written does not fit; the error names `path`.
    """
    check_writable(path)
    try:
        if (descriptor := _descriptor(path)) is not None:
            with tempfile.TemporaryDirectory(prefix="gklx-") as folder:
                part = Path(folder, "part")
                yield part
                # By the descriptor: opened anew by its path, a file that `>>` appends to would be truncated.
                with part.open("rb") as written, open(os.dup(descriptor), "wb") as stream:
                    shutil.copyfileobj(written, stream)
            return
        if not _replaced(path):
            yield Path(path)
            return
        target = Path(os.path.realpath(path))
        _remove_left_over(target)
        with _part(target, mode) as part:
            yield part
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            if target.exists():
                part.chmod(stat.S_IMODE(target.stat().st_mode))
            os.replace(part, target)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # an error of a write has no name
            error.filename = os.fspath(path)
        raise


def check_writable(path: str | os.PathLike[str]) -> None:
    """ValueError where a file cannot be written; called before the work."""
    if os.path.isdir(path):
        raise ValueError(f"{path}: must be a file to write, got a directory")
    if (descriptor := _descriptor(path)) is not None:
        if not _is_open_to_write(descriptor):
            raise ValueError(f"{path}: must be a descriptor that is open to be written to, got one that is not")
        return
    if not _replaced(path):
        if not os.access(path, os.W_OK):
            raise ValueError(f"{path}: must be a device or pipe that may be written to, got one that may not")
        return
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise ValueError(f"{path}: must be in a folder that exists, got {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: must be in a folder that may be written to, got {folder}")


def check_apart(outputs: Iterable[tuple[str, str]], inputs: Iterable[str]) -> None:
    """ValueError where an output, (argument, path), is an input or lies in one, or where two outputs are one file."""
    read, seen = list(inputs), dict[str, str]()
    for name, path in outputs:
        if not _replaced(path):
            continue
        real = os.path.realpath(path)
        for other in read:
            if _same(real, other) or real.startswith(os.path.realpath(other) + os.sep):
                raise ValueError(f"{path}: {name} must not be written over an input, got {other}")
        for other, first in seen.items():
            if _same(real, other):
                raise ValueError(f"{path}: {name} and {first} must be two files, got one")
        seen[real] = name


def _same(real: str, other: str) -> bool:
    """Whether two paths are one file, by hard links or on a file system that ignores case; the first has no links."""
    try:
        return os.path.samefile(real, other)
    except OSError:
        return real == os.path.realpath(other)


def _replaced(path: str | os.PathLike[str]) -> bool:
    """Whether a new file may replace the path: not a device or pipe, to which /dev/stdout may lead."""
    return os.path.isfile(path) or not os.path.exists(path)


def _descriptor(path: str | os.PathLike[str]) -> int | None:
    """The descriptor of this process that a path or a link stands for, as 1 for /dev/stdout; None where it is none.

    None also where a device or pipe is behind it, which is written to by its path.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        return None
    at, folders = os.path.abspath(path), {os.path.realpath(x) for x in ("/dev/fd", "/proc/self/fd")}
    for _ in range(_MOST_LINKS):
        folder, name = os.path.split(at)
        if os.path.realpath(folder) in folders and name.isdecimal():
            return int(name)
        if not os.path.islink(at):
            return None
        at = os.path.join(folder, os.readlink(at))
    return None


def _is_open_to_write(descriptor: int) -> bool:
    try:
        return fcntl is None or fcntl.fcntl(descriptor, fcntl.F_GETFL) & (os.O_WRONLY | os.O_RDWR) != 0
    except (OSError, OverflowError):  # OverflowError: a number that no descriptor can have
        return False


@contextlib.contextmanager
def _part(target: Path, mode: int) -> Iterator[Path]:
    """A temporary file in the target's folder, locked while its writer lives, and removed after an exception."""
    for _ in range(3):
        part = target.with_name(f".{target.name[:_NAMED]}.{secrets.token_hex(4)}.part")
        descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
        if lock(descriptor) and part.exists():
            break
        # Another process removed it as left over before it was locked, or this file system has no locks.
        os.close(descriptor)
        part.unlink(missing_ok=True)
    else:
        descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
    try:
        yield part
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _remove_left_over(target: Path) -> None:
    """Removes temporary files of killed processes: those on which no process holds a lock."""
    if fcntl is None:
        return
    pattern = re.compile(rf"\.{re.escape(target.name[:_NAMED])}\.[0-9a-f]{{8}}\.part")
    try:
        found = [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]
    except OSError:  # a folder that may be written to need not let its files be listed
        return
    for path in found:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
            try:
                if lock(descriptor):
                    path.unlink()
            finally:
                os.close(descriptor)


def lock(descriptor: int) -> bool:
    """Locks an open file for this process; False where another has it, or the file system has no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
