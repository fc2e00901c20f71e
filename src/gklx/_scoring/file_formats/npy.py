"""NumPy's `.npy`, and what is stored without compression in an `.npz`: a window is mapped, copied and let go."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from .rows import dtype_of, stamp, text, widened

MAGIC = b"\x93NUMPY"


@dataclass(frozen=True)
class NpyRows:
    """An array at an offset of a file."""

    name: str
    path: str
    offset: int
    shape: tuple[int, ...]
    stored: Any
    """NumPy's dtype of what is in the file."""
    fortran: bool
    axes: int
    """How many of the last axes make a row."""

    @property
    def dtype(self) -> str:
        """By name; what NumPy calls V2 is bfloat16."""
        return dtype_of(self.stored)

    def read(self, start: int, stop: int) -> Any:
        """Rows of the flattened leading axes."""
        leading = len(self.shape) - self.axes
        row = int(np.prod(self.shape[leading:], dtype=np.int64))
        size = stop - start
        try:
            if self.fortran and leading + self.axes > 1:
                # Rows are picked by index: reshaping would copy all of the file.
                whole = np.memmap(self.path, self.stored, "r", self.offset, self.shape, "F")
                x = np.asarray(whole[np.unravel_index(np.arange(start, stop), self.shape[:leading])])
            else:
                at = self.offset + start * row * self.stored.itemsize
                shape = (size, *self.shape[leading:])
                x = np.array(np.memmap(self.path, self.stored, "r", at, shape)) if size * row else np.empty(shape)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.name}: can no longer be read as when it was opened ({error})") from None
        return widened(x, self.axes)

    def stamps(self) -> tuple[tuple[str, int, int], ...]:
        """The file as it is now."""
        return (stamp(self.path),)


def open_npy(name: str, path: str, axes: int) -> NpyRows:
    """The array in an `.npy` file."""
    with Path(path).open("rb") as file:
        shape, fortran, stored = header(name, file)
        offset = file.tell()
        size = os.fstat(file.fileno()).st_size
    found = NpyRows(name, path, offset, shape, stored, fortran, axes)
    needed = offset + stored.itemsize * int(np.prod(shape, dtype=np.int64))
    if size < needed:
        raise ValueError(
            f"{name}: the .npy file is damaged or cut short: its header promises shape {text(shape)}, "
            f"{needed:,} bytes, and there are {size:,}"
        )
    return found


def header(name: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, Any]:
    """Shape, order and dtype; nothing that would have to be unpickled."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            version = np.lib.format.read_magic(file)
            # Version 3 differs from 2 in the encoding of field names alone, which logits have not.
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            if version not in ((1, 0), (2, 0), (3, 0)):
                raise ValueError(f"format version {version}")
            shape, fortran, dtype = read(file)
    except Exception as error:  # tokenizer, parser and dtype errors alike
        raise ValueError(f"{name}: the .npy file is damaged or cut short ({error})") from None
    if dtype.hasobject:
        raise ValueError(f"{name}: holds pickled Python objects, which are never loaded")
    return shape, fortran, dtype
