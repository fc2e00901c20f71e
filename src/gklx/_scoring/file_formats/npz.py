"""NumPy's `.npz`: a member is read as a stream, so that its checksum is verified, compressed or not."""

import collections
import functools
import lzma
import math
import shutil
import tempfile
import threading
import weakref
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import threads
from .npy import NpyRows, header
from .rows import Room, Stamp, chosen, reading, reason, stamp, text, widened

_PIECE = 2**20
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    UnicodeDecodeError,  # of a member's name
)
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class ArchivedRows:
    """A member, of which only the rows around the current read are unpacked.

    In Fortran order a row is spread over the whole member: the first read in a process unpacks all of it into a file in
    TMPDIR, as large as the array.
    """

    path: str
    member: str
    unpacked: NpyRows

    @property
    def name(self) -> str:
        """As the user wrote it."""
        return self.unpacked.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's."""
        return self.unpacked.shape

    @property
    def dtype(self) -> str:
        """By name."""
        return self.unpacked.dtype

    @property
    def stamps(self) -> tuple[Stamp, ...]:
        """The archive's."""
        return self.unpacked.stamps

    @property
    def held_bytes(self) -> int:
        """0: what is unpacked lies in a file."""
        return 0

    def read(self, start: int, stop: int, room: Room | None = None) -> Any:
        """Rows of the flattened leading axes."""
        whole = self.unpacked
        if whole.fortran:
            with reading(self.name), _one_at_a_time:
                copy = _copy(self.path, self.member, stamp(self.path))
            return whole.read_mapped(copy.file, start, stop, room)
        shape = (stop - start, *self.shape[len(self.shape) - whole.axes :])
        row = math.prod(shape[1:]) * whole.stored.itemsize
        with reading(self.name):
            with _one_at_a_time:
                stream = _stream(self.path, self.member, stamp(self.path))
            x = np.frombuffer(stream.read(whole.offset + start * row, (stop - start) * row), whole.stored)
        return widened(x.reshape(shape), whole.axes, room)


def open_npz(name: str, path: str, key: str | None, axes: int) -> ArchivedRows:
    """An array in an archive; ValueError where there is none of that key, or it is damaged."""
    stamps = (stamp(path),)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {x.filename.removesuffix(".npy"): x for x in archive.infolist() if x.filename.endswith(".npy")}
            info = members[chosen(name, key, list(members))]
            with archive.open(info) as file:
                shape, fortran, stored, start = header(name, file)
    except _DAMAGED as error:
        raise ValueError(f"{name}: the .npz archive is damaged or cut short ({reason(error)})") from None
    needed = start + stored.itemsize * math.prod(shape)
    if info.file_size != needed:
        raise ValueError(
            f"{name}: the array in the archive is damaged or cut short: its header promises shape {text(shape)}, "
            f"{needed:,} bytes, and there are {info.file_size:,}"
        )
    return ArchivedRows(path, info.filename, NpyRows(name, path, start, shape, stored, fortran, axes, stamps))


class _Copy:
    """A member in an unnamed temporary file, which the system removes with its last reader."""

    def __init__(self, path: str, member: str) -> None:
        self.file = tempfile.TemporaryFile(prefix="gklx-")  # noqa: SIM115
        weakref.finalize(self, self.file.close)
        with zipfile.ZipFile(path) as archive, archive.open(member) as packed:
            size, free = archive.getinfo(member).file_size, shutil.disk_usage(tempfile.gettempdir()).free
            if size > free:
                raise OSError(f"unpacking takes {size:,} bytes in {tempfile.gettempdir()}, where {free:,} are free")
            try:
                shutil.copyfileobj(packed, self.file, 2**20)
                self.file.flush()
            except OSError as error:
                raise OSError(f"unpacking into {tempfile.gettempdir()}: {error}") from None


class _Stream:
    """A member that is unpacked from start to end; the last pieces are kept.

    Threads that read rows in order arrive slightly out of order, by at most twice as many reads as there are threads. A
    read further back starts the unpacking again.
    """

    def __init__(self, path: str, member: str) -> None:
        self._archive, self._member = zipfile.ZipFile(path), member
        weakref.finalize(self, self._archive.close)
        self._lock = threading.Lock()
        self._kept: collections.deque[bytes] = collections.deque()
        self._start()

    def _start(self) -> None:
        self._packed = self._archive.open(self._member)
        self._kept.clear()
        self._first = self._end = 0  # the bytes of the member that the kept pieces hold

    def read(self, offset: int, size: int) -> bytearray:
        """Bytes of the member; zipfile verifies the checksum at its end."""
        with self._lock:
            if offset < self._first:
                self._packed.close()
                self._start()
            most = (2 * threads() + 2) * max(size, _PIECE)
            while self._end < offset + size:
                piece = self._packed.read(_PIECE)
                if not piece:
                    raise EOFError("it has become shorter")
                self._kept.append(piece)
                self._end += len(piece)
                while self._end - self._first - len(self._kept[0]) >= most:
                    self._first += len(self._kept.popleft())
            found, at = [], self._first
            for piece in self._kept:
                found.append(piece[max(0, offset - at) : max(0, offset + size - at)])
                at += len(piece)
            return bytearray().join(found)


def forget() -> None:
    """Frees what is kept of archives."""
    with _one_at_a_time:
        _stream.cache_clear()
        _copy.cache_clear()


@functools.lru_cache(maxsize=4)
def _stream(path: str, member: str, _: Stamp) -> _Stream:
    """The open member of an archive, kept for the next read; for student, teacher and labels at the same time."""
    return _Stream(path, member)


# Only as many as student, teacher and labels are read from at once: copies of all shards would fill the disk.
@functools.lru_cache(maxsize=8)
def _copy(path: str, member: str, _: Stamp) -> _Copy:
    """The unpacked copy of an archive's member, kept for the next read."""
    return _Copy(path, member)
