"""Zarr arrays, formats 2 and 3: a chunk is unpacked once where it holds more rows than are read at a time."""

import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .kept import Kept
from .rows import Room, Stamp, chosen, dtype_of, files_below, picked, reading, reason, stamp, widened


@dataclass(frozen=True)
class ZarrRows:
    """An array in a folder, or in a group within a folder."""

    name: str
    path: str
    key: str | None
    shape: tuple[int, ...]
    dtype: str
    axes: int
    stamps: tuple[Stamp, ...]
    band: "Band"

    @property
    def held_bytes(self) -> int:
        """The memory of a band: the kept copy, Zarr's unpacked copy, and the stored bytes."""
        return 3 * self.band.size

    def read(self, start: int, stop: int, room: Room | None = None) -> Any:
        """Rows of the flattened leading axes."""
        zarr = _library(self.name)
        with reading(self.name):
            if self.band.rows <= stop - start:
                array = zarr.open_array(self.path, mode="r", path=self.key)
                x = picked(array, self.shape, self.axes, start, stop)
            else:
                x = np.concatenate([self._of_band(*each) for each in self.band.parts(start, stop)])
        return widened(x.view("V2") if self.dtype == "bfloat16" else x, self.axes, room)

    def _of_band(self, first: int, last: int, start: int, stop: int) -> Any:
        return _bands(self, first, last)[start - first : stop - first]


@dataclass(frozen=True)
class Band:
    """The smallest run of consecutive rows that consists of whole chunks."""

    rows: int
    size: int
    """The bytes of its chunks."""
    period: int
    """Bands start again after so many rows; the last one before may be shorter."""

    def parts(self, start: int, stop: int) -> list[tuple[int, int, int, int]]:
        """The bands that hold these rows: first and last row of each, and which of its rows are asked for."""
        found = []
        while start < stop:
            origin = start - start % self.period
            first = start - (start - origin) % self.rows
            last = min(first + self.rows, origin + self.period)
            found.append((first, last, start, min(stop, last)))
            start = last
        return found


def open_zarr(name: str, path: str, key: str | None, axes: int) -> ZarrRows:
    """An array in a folder; ValueError where there is none of that key."""
    zarr = _library(name)
    for _ in files_below(path):  # refuses pipes, which would block the read
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that do not belong to Zarr
            found = zarr.open(path, mode="r")
            held = None if hasattr(found, "shape") else dict(found.members(max_depth=None))
            if held is not None:
                key = chosen(name, key, [each for each, x in held.items() if hasattr(x, "shape")])
            elif key is not None:
                raise ValueError(f"{name}: a Zarr array has no others in it, got the key {key!r}")
            stamps = (stamp(os.path.join(path, key or "")),)
            found = zarr.open_array(path, mode="r", path=key)
    except Exception as error:  # stores and codecs raise errors of any kind
        if str(error).startswith(f"{name}: "):
            raise
        raise ValueError(f"{name}: not a Zarr array or group that can be read ({reason(error)})") from None
    shape = tuple(found.shape)
    band = _band_of(shape, tuple(found.chunks), axes, found.dtype.itemsize)
    return ZarrRows(name, path, key, shape, dtype_of(found.dtype), axes, stamps, band)


def _band_of(shape: tuple[int, ...], chunks: tuple[int, ...], axes: int, itemsize: int) -> Band:
    leading = len(shape) - axes
    if leading < 1 or 0 in shape:  # refused later, or empty
        return Band(1, 0, 1)
    at = next((i for i in range(leading) if chunks[i] > 1), leading - 1)
    inner, period = math.prod(shape[at + 1 : leading]), math.prod(shape[at:leading])
    rows = min(chunks[at], shape[at]) * inner
    # Zarr unpacks whole chunks, which may reach far beyond the shape.
    rest = zip(shape[at + 1 :], chunks[at + 1 :], strict=True)
    whole = (chunks[at], *(-(-size // chunk) * chunk for size, chunk in rest))
    return Band(rows, math.prod(whole) * itemsize, period)


def store_of(path: str) -> str:
    """The outermost Zarr folder that an array's folder lies in; another path as it is."""
    if not os.path.isdir(path):
        return path
    above = [path, *map(str, Path(path).parents)]
    return [each for each in above if each.endswith(".zarr")][-1]


def _band(of: ZarrRows, first: int, last: int) -> Any:
    array = _library(of.name).open_array(of.path, mode="r", path=of.key)
    return picked(array, of.shape, of.axes, first, last)


# One for each input, and one more where threads are not yet through with the band before.
_bands = Kept(_band, lambda inputs: inputs + 1)


def forget() -> None:
    """Frees the bands that are kept."""
    _bands.forget()


def _library(name: str) -> Any:
    try:
        import zarr
    except ImportError:
        raise ValueError(f"{name}: Zarr needs zarr, which is not installed (pip install 'gklx[score]')") from None
    return zarr
