"""Zarr arrays, formats 2 and 3."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .rows import chosen, dtype_of, widened


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
        inner = int(np.prod(self.shape[1 : len(self.shape) - self.axes], dtype=np.int64))
        first, last = start // inner, -(-stop // inner)
        x = np.asarray(_array(self.name, self.path, self.key)[first:last])
        x = x.reshape(-1, *self.shape[len(self.shape) - self.axes :])[start - first * inner : stop - first * inner]
        return widened(x.view("V2") if self.dtype == "bfloat16" else x, self.axes)

    def stamps(self) -> tuple[tuple[str, int, int], ...]:
        """The array's folder: the number of its files, and the newest."""
        root = Path(self.path) / (self.key or "")
        files = [x.stat() for x in root.rglob("*") if x.is_file()]
        return ((os.path.abspath(root), sum(x.st_size for x in files), max(x.st_mtime_ns for x in files)),)


def open_zarr(name: str, path: str, key: str | None, axes: int) -> ZarrRows:
    """An array in a folder; ValueError where there is none of that key."""
    found = _array(name, path, key)
    if not hasattr(found, "shape"):
        key = chosen(name, key, [each for each, _ in found.arrays()])
        found = _array(name, path, key)
    return ZarrRows(name, path, key, tuple(found.shape), dtype_of(found.dtype), axes)


def _array(name: str, path: str, key: str | None) -> Any:
    try:
        import zarr
    except ImportError:
        raise ValueError(f"{name}: Zarr needs zarr, which is not installed (pip install 'gklx[score]')") from None
    try:
        return zarr.open(path, mode="r", path=key)
    except Exception as error:  # whatever its stores and codecs raise
        raise ValueError(f"{name}: not a Zarr array that can be read ({error})") from None
