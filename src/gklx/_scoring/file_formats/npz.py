"""NumPy's `.npz`: a stored member is mapped where it lies in the archive, a compressed one is unpacked once."""

import atexit
import functools
import os
import shutil
import tempfile
import threading
import zipfile
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .npy import NpyRows, header, open_npy
from .rows import chosen, dtype_of, stamp

_LOCAL_HEADER = 30
"""Bytes of a member's header in the archive, before its name and extra field."""

_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class PackedRows:
    """A compressed member: the first read in a process unpacks it into a temporary file, as large as the array."""

    name: str
    path: str
    member: str
    shape: tuple[int, ...]
    stored: Any
    axes: int

    @property
    def dtype(self) -> str:
        """By name."""
        return dtype_of(self.stored)

    def read(self, start: int, stop: int) -> Any:
        """Rows of the flattened leading axes."""
        with _one_at_a_time:
            unpacked = _unpacked(self.path, self.member, stamp(self.path))
        return replace(open_npy(self.name, unpacked, self.axes), name=self.name).read(start, stop)

    def stamps(self) -> tuple[tuple[str, int, int], ...]:
        """The archive as it is now."""
        return (stamp(self.path),)


def open_npz(name: str, path: str, key: str | None, axes: int) -> NpyRows | PackedRows:
    """An array in an archive; ValueError where there is none of that key, or it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {x.filename.removesuffix(".npy"): x for x in archive.infolist() if x.filename.endswith(".npy")}
            info = members[chosen(name, key, list(members))]
            with archive.open(info) as file:
                shape, fortran, stored = header(name, file)
                start = file.tell()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{name}: the .npz archive is damaged or cut short ({error})") from None
    needed = start + stored.itemsize * int(np.prod(shape, dtype=np.int64))
    if info.file_size < needed:
        raise ValueError(f"{name}: the array in the archive is damaged or cut short")
    if info.compress_type != zipfile.ZIP_STORED:
        return PackedRows(name, path, info.filename, shape, stored, axes)
    with open(path, "rb") as raw:  # the archive's directory does not say how long a member's own header is
        raw.seek(info.header_offset + _LOCAL_HEADER - 4)
        of_name, of_extra = np.frombuffer(raw.read(4), dtype="<u2").tolist()
    offset = info.header_offset + _LOCAL_HEADER + of_name + of_extra + start
    return NpyRows(name, path, offset, shape, stored, fortran, axes)


@functools.lru_cache(maxsize=64)
def _unpacked(path: str, member: str, _: tuple[str, int, int]) -> str:
    """The path of the member's copy, which goes when the process does."""
    handle, copy = tempfile.mkstemp(suffix=".npy", prefix="gklx-")
    atexit.register(functools.partial(_remove, copy))
    with zipfile.ZipFile(path) as archive, archive.open(member) as packed, os.fdopen(handle, "wb") as file:
        shutil.copyfileobj(packed, file, 2**20)
    return copy


def _remove(path: str) -> None:
    if os.path.exists(path):
        os.remove(path)
