"""Zarr arrays, formats 2 and 3."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rows import chosen, dtype_of, picked, reading, widened


@dataclass(frozen=True)
class ZarrRows:
    """An array in a folder, or in a group in one."""

    name: str
    path: str
    key: str | None
    shape: tuple[int, ...]
    dtype: str
    axes: int

    def read(self, start: int, stop: int) -> Any:
        """Rows of the flattened leading axes; whole chunks are decompressed for them."""
        zarr = _library(self.name)
        with reading(self.name):
            x = picked(zarr.open_array(self.path, mode="r", path=self.key), self.shape, self.axes, start, stop)
        return widened(x.view("V2") if self.dtype == "bfloat16" else x, self.axes)

    def stamps(self) -> tuple[tuple[str, int, int], ...]:
        """The array's folder: the number of its files, and the newest."""
        root = Path(self.path) / (self.key or "")
        files = [x.stat() for x in root.rglob("*") if x.is_file()]
        return ((os.path.abspath(root), sum(x.st_size for x in files), max(x.st_mtime_ns for x in files)),)


def open_zarr(name: str, path: str, key: str | None, axes: int) -> ZarrRows:
    """An array in a folder; ValueError where there is none of that key."""
    zarr = _library(name)
    try:
        found = zarr.open(path, mode="r")
        held = None if hasattr(found, "shape") else dict(found.members(max_depth=None))
    except Exception as error:  # whatever its stores and codecs raise
        raise ValueError(f"{name}: not a Zarr array or group that can be read ({error})") from None
    if held is not None:
        key = chosen(name, key, [each for each, x in held.items() if hasattr(x, "shape")])
        found = held[key]
    elif key is not None:
        raise ValueError(f"{name}: a Zarr array has no others in it, got the key {key!r}")
    return ZarrRows(name, path, key, tuple(found.shape), dtype_of(found.dtype), axes)


def _library(name: str) -> Any:
    try:
        import zarr
    except ImportError:
        raise ValueError(f"{name}: Zarr needs zarr, which is not installed (pip install 'gklx[score]')") from None
    return zarr
