"""NumPy's `.npz`: a member is read as a stream, so that its checksum is verified, compressed or not."""

import collections
import errno
import lzma
import math
import shutil
import tempfile
import threading
import weakref
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import threads
from .kept import Kept
from .npy import NpyRows, header
from .rows import Room, Stamp, chosen, reading, reason, stamp, text, widened

_PIECE = 2**16
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    UnicodeDecodeError,  # of a member's name
)


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
            with reading(self.name):
                now = stamp(self.path)
            copy = _copies(self, now)
            return whole.read_mapped(copy.file, start, stop, room)
        shape = (stop - start, *self.shape[len(self.shape) - whole.axes :])
        row = math.prod(shape[1:]) * whole.stored.itemsize
        with reading(self.name):
            stream = _streams(self.path, self.member, stamp(self.path))
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

    def __init__(self, of: ArchivedRows, _: Stamp) -> None:
        folder, whole = tempfile.gettempdir(), of.unpacked
        size, free = whole.offset + whole.stored.itemsize * math.prod(of.shape), shutil.disk_usage(folder).free
        if size > free:
            message = f"{of.name}: unpacking it takes {size:,} bytes, where {free:,} are free"
            raise OSError(errno.ENOSPC, message, folder)
        self.file = tempfile.TemporaryFile(prefix="gklx-")  # noqa: SIM115
        weakref.finalize(self, self.file.close)
        try:
            for piece in _pieces(of):
                self.file.write(piece)
            self.file.flush()
        except OSError as error:  # of writing: `_pieces` has none
            raise OSError(error.errno, f"{of.name}: unpacking it: {error.strerror}", folder) from None


def _pieces(of: ArchivedRows) -> Iterator[bytes]:
    """The unpacked bytes of a member."""
    with reading(of.name), zipfile.ZipFile(of.path) as archive, archive.open(of.member) as packed:
        while piece := packed.read(2**20):
            yield piece


class _Stream:
    """A member that is unpacked from start to end; the last pieces are kept.

    Threads that read rows in order arrive slightly out of order, by at most twice as many reads as there are threads. A
    read further back starts the unpacking again.
    """

    def __init__(self, path: str, member: str, _: Stamp) -> None:
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


# Two for each input: where it is in shards, threads may still read one of them when others have begun the next.
_streams = Kept(_Stream, lambda inputs: 2 * inputs)
_copies = Kept(_Copy, lambda inputs: 2 * inputs)


def forget() -> None:
    """Frees what is kept of archives."""
    _streams.forget()
    _copies.forget()
