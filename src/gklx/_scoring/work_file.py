"""A file of the records of the samples scored so far. It saves memory, and lets a run that was killed be resumed.

A record is written once and never changed, and each group of records has a checksum. A later run of the same job keeps
the records whose checksums are right and computes the others again. With a folder the file outlives the process: the
same job finds it by its key and resumes.
"""

import contextlib
import errno
import hashlib
import json
import os
import stat
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from .atomic import lock, replacing

RECORDS_A_BLOCK = 2**14
"""The most records that are read at a time: statistics make some twenty columns in float64 of them."""
_BLOCK_BYTES = 2**20
"""The most bytes of records a block has, whether it is computed or read; one record may be more."""
_RECORDS_A_CHECK = 2**8
_SECONDS_BETWEEN_SUMS = 20.0
_RECORDS, _CHECKS, _SUMS = "records.bin", "checks.bin", "class_sums.bin"
_CHECK = struct.Struct("<Q16s")
"""A line of the checksum file: a number of records from the start, and their digest."""
_HEAD = struct.Struct("<16sQ")
"""The head of the class sums: the digest of what follows, and the number of samples in the sums."""


class WorkFile:
    """The records of one job, and the class sums of its first pass."""

    def __init__(self, dtype: Any, folder: Path | None) -> None:
        self.dtype, self.folder = np.dtype(dtype), folder
        self.note: str | None = None
        """The reason why no progress is kept although a folder was given; None where it is kept."""
        self.records, self._saved = 0, time.monotonic()
        # The digest starts from the job's key, so that records of another job never match it.
        self._digest = hashlib.blake2b(b"" if folder is None else folder.name.encode(), digest_size=16)
        self._empty = self._digest.copy()
        self._file, self._checks = self._opened()
        if self._checks is not None:
            try:
                self._resume()
            except BaseException:
                self.close(done=False)
                raise
        self.resumed_at = self.records

    def append(self, records: Any) -> None:
        """Appends records. OSError where they cannot be written; those written before remain valid."""
        x = np.ascontiguousarray(records, dtype=self.dtype)
        for start in range(0, len(x), _RECORDS_A_CHECK):
            some = x[start : start + _RECORDS_A_CHECK].tobytes()
            self._write(self._file, self.records * self.dtype.itemsize, some)
            self._digest.update(some)
            self.records += len(some) // self.dtype.itemsize
            if self._checks is not None:
                self._write(self._checks, None, _CHECK.pack(self.records, self._digest.digest()))

    def block(self, most: int) -> int:
        """How many records a block has: at most so many, and fewer of large ones."""
        return max(1, min(most, _BLOCK_BYTES // int(self.dtype.itemsize)))

    def blocks(self) -> Iterator[Any]:
        """All records, `block(RECORDS_A_BLOCK)` at a time; OSError where the file was changed."""
        digest, block = self._empty.copy(), self.block(RECORDS_A_BLOCK)
        for start in range(0, self.records, block):
            count = min(block, self.records - start)
            some = self._read(start, count)
            digest.update(some)
            if len(some) == count * self.dtype.itemsize:
                yield np.frombuffer(some, dtype=self.dtype)
        if digest.digest() != self._digest.digest():
            raise OSError(errno.EIO, "the records are no longer those that were written", self._name())

    def class_sums(self, classes: int) -> tuple[Any, int] | None:
        """The last saved class sums, [classes, classes], and the number of samples in them."""
        if self.folder is None:
            return None
        with contextlib.suppress(OSError), _open_own(self.folder / _SUMS, os.O_RDONLY) as file:
            if os.fstat(file.fileno()).st_size == _HEAD.size + 8 * classes**2:
                sums = np.empty((classes, classes))
                digest, samples = _HEAD.unpack(file.read(_HEAD.size))
                rest = sums.data.cast("B")
                while rest and (count := file.readinto(rest)):  # type: ignore[attr-defined]
                    rest = rest[count:]
                if not rest and digest == self._digest_of(sums, samples):
                    return sums, samples
        return None

    def save_class_sums(self, sums: Any, samples: int, *, last: bool) -> None:
        """Saves class sums for a resumed run, at intervals."""
        if self.folder is None or not (last or time.monotonic() - self._saved > _SECONDS_BETWEEN_SUMS):
            return
        sums = np.ascontiguousarray(sums, dtype=np.float64)
        with replacing(self.folder / _SUMS, 0o600) as path, open(path, "wb") as file:
            file.write(_HEAD.pack(self._digest_of(sums, samples), samples))
            file.write(sums.data)
        self._saved = time.monotonic()

    def close(self, *, done: bool) -> None:
        """Closes the file; where the job is done, removes it and its folder."""
        if done and self.folder is not None:
            # Removed while the file is locked, so that no other run resumes from a part of it.
            for path in [*self.folder.glob(f".{_SUMS}.*.part"), *(self.folder / x for x in (_SUMS, _CHECKS, _RECORDS))]:
                with contextlib.suppress(OSError):
                    path.unlink()
            with contextlib.suppress(OSError):
                self.folder.rmdir()
        self._file.close()
        if self._checks is not None:
            self._checks.close()

    def _opened(self) -> tuple[IO[bytes], IO[bytes] | None]:
        """Opens and locks the folder's two files; without a folder, a temporary file without checksums."""
        if self.folder is not None:
            with contextlib.ExitStack() as stack:
                try:
                    if (file := _locked(self.folder)) is not None:
                        stack.callback(file.close)
                        checks = _open_own(self.folder / _CHECKS, os.O_RDWR | os.O_CREAT)
                        stack.pop_all()
                        return file, checks
                    self.note = "no progress is kept: another run of this job is under way"
                except _UnusableError as error:
                    self.note = f"no progress is kept: {error}"
            self.folder = None
        return tempfile.TemporaryFile(buffering=0), None

    def _resume(self) -> None:
        """Keeps the records whose checksums are right, and truncates the file after them."""
        assert self._checks is not None
        there = os.fstat(self._file.fileno()).st_size // self.dtype.itemsize
        self._checks.seek(0)
        checks = 0
        while len(check := self._checks.read(_CHECK.size)) == _CHECK.size:
            records, expected = _CHECK.unpack(check)
            if not self.records < records <= min(there, self.records + _RECORDS_A_CHECK):
                break
            digest = self._digest.copy()
            digest.update(self._read(self.records, records - self.records))
            if digest.digest() != expected:
                break
            self._digest, self.records, checks = digest, records, checks + 1
        self._file.truncate(self.records * self.dtype.itemsize)
        self._checks.truncate(checks * _CHECK.size)
        self._checks.seek(0, os.SEEK_END)

    def _read(self, start: int, count: int) -> bytes:
        self._file.seek(start * self.dtype.itemsize)
        return self._file.read(count * self.dtype.itemsize) or b""

    def _write(self, file: IO[bytes], at: int | None, some: bytes) -> None:
        """Writes all of `some`, at the offset `at` or at the file's position."""
        rest = memoryview(some)
        if at is not None:
            file.seek(at)
        while rest:
            try:
                rest = rest[file.write(rest) :]
            except OSError as error:
                raise OSError(error.errno, error.strerror, self._name()) from None

    def _name(self) -> str:
        return tempfile.gettempdir() if self.folder is None else str(self.folder / _RECORDS)

    def _digest_of(self, sums: Any, samples: int) -> bytes:
        digest = self._empty.copy()
        digest.update(samples.to_bytes(8, "little"))
        digest.update(sums.data)
        return digest.digest()


def job_folder(parent: Path, job: Any) -> Path:
    """The folder of a job: the same for the same inputs and settings of one user."""
    of_user = [os.geteuid() if hasattr(os, "geteuid") else None, job]
    key = hashlib.sha256(json.dumps(of_user, sort_keys=True).encode()).hexdigest()[:24]
    return parent / f"score-{key}"


def default_parent() -> Path | None:
    """The default folder of progress, in the user's cache; None where that cannot be written."""
    try:
        parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gklx"
        parent.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        return None
    return parent if os.access(parent, os.W_OK | os.X_OK) else None


class _UnusableError(OSError):
    """The folder of the progress cannot be made, or belongs to another user, who may have planted wrong records."""


def _locked(folder: Path) -> IO[bytes] | None:
    """Opens and locks the records' file in the folder; None where another process holds the lock."""
    for _ in range(1000):  # another run of the same job may end and remove the folder at any moment
        with contextlib.suppress(FileNotFoundError):
            _make_own(folder)
            path = folder / _RECORDS
            file = _open_own(path, os.O_RDWR | os.O_CREAT)
            if not lock(file.fileno()):
                file.close()
                return None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.lstat()):
                    return file
            file.close()
    return None


def _make_own(folder: Path) -> None:
    """Makes the folder, readable by this user only."""
    try:
        _make(folder)
        if os.name != "posix":
            return
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (FileNotFoundError, _UnusableError):
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # a full disk is no wrong argument
            raise
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EACCES) and os.path.lexists(folder):
            raise _UnusableError(f"{folder} is not a folder of this user") from None
        raise ValueError(f"{folder.parent}: must be a folder to keep the progress in ({error.strerror})") from None
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise _UnusableError(f"{folder} is not a folder of this user alone")
        os.fchmod(descriptor, 0o700)
    finally:
        os.close(descriptor)


def _make(folder: Path) -> None:
    """Makes the folder and those above it, which no run removes."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(0o700)
    except FileNotFoundError as error:
        raise _UnusableError(f"{folder} cannot be made ({error.strerror})") from None


def _open_own(path: Path, flags: int) -> IO[bytes]:
    """Opens a regular file of this user; symbolic and hard links are refused."""
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR):
            raise _UnusableError(f"{path} is not a regular file") from None
        raise
    file = os.fdopen(descriptor, "r+b" if flags & os.O_RDWR else "rb", buffering=0)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        file.close()
        raise _UnusableError(f"{path} is not a regular file of its own")
    return file
