"""The records of the samples scored so far, in a file: what memory need not hold, and what a killed run left behind.

A record is written once and never changed, so the length of the file says how far the run came. With a folder the file
outlives the process; the same job finds it by its key and goes on.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from .atomic import replacing

RECORDS_A_BLOCK = 2**18
_SECONDS_BETWEEN_SUMS = 20.0


class WorkFile:
    """The records of one job, and the class sums of its first pass."""

    def __init__(self, dtype: Any, folder: Path | None) -> None:
        self.dtype, self.folder = np.dtype(dtype), folder
        kept = None if folder is None else _locked(folder / "records.bin")
        if kept is None:  # the same job may be under way elsewhere: this one keeps out of its way
            self.folder = None
        self._file: IO[bytes] = kept or tempfile.TemporaryFile(buffering=0)  # noqa: SIM115, closed by `close`
        whole = os.fstat(self._file.fileno()).st_size // self.dtype.itemsize
        self._file.truncate(whole * self.dtype.itemsize)  # a write may have been cut short
        self.records = whole
        self.resumed_at = whole
        self._saved = time.monotonic()

    def append(self, records: Any) -> None:
        """Adds records; OSError where they cannot be written, and then as many as could be are kept."""
        rest = memoryview(np.ascontiguousarray(records, dtype=self.dtype).tobytes())
        self._file.seek(0, os.SEEK_END)
        while rest:
            try:
                rest = rest[self._file.write(rest) :]
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._file.name)) from None
        self.records += len(records)

    def blocks(self) -> Iterator[Any]:
        """All records, up to `RECORDS_A_BLOCK` at a time."""
        for start in range(0, self.records, RECORDS_A_BLOCK):
            self._file.seek(start * self.dtype.itemsize)
            count = min(RECORDS_A_BLOCK, self.records - start)
            yield np.frombuffer(self._file.read(count * self.dtype.itemsize), dtype=self.dtype)

    def class_sums(self) -> tuple[Any, int] | None:
        """The class sums saved last and how many samples are in them."""
        if self.folder is None or not (path := self.folder / "class_sums.npz").exists():
            return None
        with np.load(path, allow_pickle=False) as found:
            return found["sums"], int(found["samples"])

    def save_class_sums(self, sums: Any, samples: int, *, last: bool) -> None:
        """Keeps class sums for a resumed run, now and then."""
        if self.folder is None or not (last or time.monotonic() - self._saved > _SECONDS_BETWEEN_SUMS):
            return
        with replacing(self.folder / "class_sums.npz") as path, open(path, "wb") as file:
            np.savez(file, sums=sums, samples=samples)
        self._saved = time.monotonic()

    def close(self, *, done: bool) -> None:
        """Lets go of the file, and of all that was kept where the job is done."""
        self._file.close()
        if done and self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def job_folder(parent: Path, job: Any) -> Path:
    """The folder of a job, made where it is not there: the same for the same inputs and settings."""
    key = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:24]
    folder = parent / f"score-{key}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{parent}: must be a folder to keep the progress in ({error.strerror})") from None
    return folder


def default_parent() -> Path:
    """Where progress is kept if nothing else is said: the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gklx"


def _locked(path: Path) -> IO[bytes] | None:
    """The file, opened for this process alone; None where another has it."""
    file = open(path, "a+b", buffering=0)  # noqa: SIM115
    try:
        import fcntl
    except ImportError:  # Windows has none; there two runs of one job are the user's care
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file
