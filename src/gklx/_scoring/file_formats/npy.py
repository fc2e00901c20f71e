"""NumPy's `.npy`, and uncompressed members of an `.npz`: a read takes only its rows from the file."""

import io
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from .rows import Room, Stamp, dtype_of, reading, reason, stamp, text, widened

MAGIC = b"\x93NUMPY"
_COLUMNS_AT_ONCE = 32
_PAGE = 2**12
"""The bytes that the system reads for any byte of a file."""
_PIECE = 2**18
"""About how many bytes of whole columns, in Fortran order, are read at a time."""
_LONGEST_HEADER = 2**16


@dataclass(frozen=True)
class NpyRows:
    """An array at an offset of a file."""

    name: str
    path: str
    offset: int
    shape: tuple[int, ...]
    stored: Any
    """The dtype in the file."""
    fortran: bool
    axes: int
    """The number of trailing axes in a row."""
    stamps: tuple[Stamp, ...]
    held_bytes: int = 0

    @property
    def dtype(self) -> str:
        """By name; what NumPy calls V2 is bfloat16."""
        return dtype_of(self.stored)

    def read(self, start: int, stop: int, room: Room | None = None) -> Any:
        """Rows of the flattened leading axes."""
        leading, row = self.shape[: len(self.shape) - self.axes], self.shape[len(self.shape) - self.axes :]
        if self.fortran and len(leading) > 1:
            return self.read_mapped(self.path, start, stop, room)
        count, size = stop - start, math.prod(row)
        # Not memory-mapped: if another process truncated the file, a bus error would kill this one; and of an array in
        # Fortran order whole columns may become resident where a few rows are read.
        with reading(self.name), open(self.path, "rb", buffering=0) as file:
            if self.fortran:
                x = self._columns(file, leading[0], size, start, stop).T.reshape(count, *row)
            else:
                shape = (count, *row)
                x = np.empty(shape, self.stored) if room is None else room.array(shape, self.stored)
                self._fill(file, start * size, x)
        return widened(x, self.axes, room)

    def _columns(self, file: IO[bytes], length: int, size: int, start: int, stop: int) -> Any:
        """Rows of a matrix in Fortran order, transposed: [size, stop - start], from `size` columns of this length."""
        x = np.empty((size, stop - start), self.stored)
        if length * self.stored.itemsize > _PAGE:
            for at, column in enumerate(x):
                self._fill(file, at * length + start, column)
            return x
        # Each page is read in any case: few reads of many whole columns take less time than a short one for each.
        step = max(1, _PIECE // (length * self.stored.itemsize))
        for at in range(0, size, step):
            columns = np.empty((min(step, size - at), length), self.stored)
            self._fill(file, at * length, columns)
            x[at : at + step] = columns[:, start:stop]
        return x

    def _fill(self, file: IO[bytes], at: int, x: Any) -> None:
        """Reads numbers from the one with this index in the file on."""
        file.seek(self.offset + at * self.stored.itemsize)
        rest = x.reshape(-1).view(np.uint8).data
        while rest:
            count = file.readinto(rest)  # type: ignore[attr-defined]
            if not count:
                raise EOFError("it has become shorter")
            rest = rest[count:]

    def read_mapped(self, file: str | IO[bytes], start: int, stop: int, room: Room | None = None) -> Any:
        """Rows of an array in Fortran order, by index from a memory map: a reshape would copy the whole file."""
        leading, row = self.shape[: len(self.shape) - self.axes], self.shape[len(self.shape) - self.axes :]
        index = np.unravel_index(np.arange(start, stop), leading)
        with reading(self.name):
            if not self.fortran:
                return widened(np.memmap(file, self.stored, "r", self.offset, self.shape)[index], self.axes, room)
            x = np.empty((stop - start, math.prod(row)), self.stored)
            # Each column is on other pages, which stay in memory, with up to some MB around, while the map exists.
            step = max(_COLUMNS_AT_ONCE, _PIECE // (math.prod(leading) * self.stored.itemsize))
            for at in range(0, x.shape[1], step):
                into = x[:, at : at + step]
                offset = self.offset + at * math.prod(leading) * self.stored.itemsize
                into[...] = np.memmap(file, self.stored, "r", offset, (*leading, into.shape[1]), "F")[index]
            return widened(x.reshape(-1, *row), self.axes, room)


def open_npy(name: str, path: str, axes: int) -> NpyRows:
    """Opens the array in an `.npy` file."""
    stamps = (stamp(path),)
    with Path(path).open("rb") as file:
        shape, fortran, stored, offset = header(name, file)
        size = os.fstat(file.fileno()).st_size
    found = NpyRows(name, path, offset, shape, stored, fortran, axes, stamps)
    needed = offset + stored.itemsize * math.prod(shape)
    if size < needed:
        raise ValueError(
            f"{name}: the .npy file is damaged or cut short: its header promises shape {text(shape)}, "
            f"{needed:,} bytes, and there are {size:,}"
        )
    return found


def header(name: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, Any, int]:
    """Shape, order, dtype and the header's length; nothing that would have to be unpickled."""
    # NumPy reads all of a header before it refuses one that is too long, and a header may promise 4 GiB.
    start = io.BytesIO(file.read(_LONGEST_HEADER))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            version = np.lib.format.read_magic(start)
            # Version 3 differs from 2 only in the encoding of field names, and logits have no fields.
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            if version not in ((1, 0), (2, 0), (3, 0)):
                raise ValueError(f"format version {version}")
            shape, fortran, dtype = read(start)
            if min(shape, default=0) < 0:
                raise ValueError(f"shape {text(shape)}")
    except Exception as error:  # of the tokenizer, the parser or the dtype
        raise ValueError(f"{name}: the .npy file is damaged or cut short ({reason(error)})") from None
    if dtype.hasobject:
        raise ValueError(f"{name}: holds pickled Python objects, which are never loaded")
    return shape, fortran, dtype, start.tell()
