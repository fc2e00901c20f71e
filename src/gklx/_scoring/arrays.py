"""Logits and labels given as arrays of any library."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .._core.libraries import dtype_name, library_of
from .file_formats.rows import Room, Stamp

_LOGITS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class ArrayRows:
    """An array as rows. A read returns an array of the same library, or NumPy's for Dask."""

    name: str
    array: Any
    axes: int
    """The number of trailing axes in a row: 1 for logits, 0 for labels."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> str:
        """The array's dtype by name."""
        return dtype_name(self.array.dtype)

    def read(self, start: int, stop: int, room: Room | None = None) -> Any:
        """Rows of the flattened leading axes: labels as int64 on the host, halves as float32.

        With a `room`, NumPy's float16 and bfloat16 are not widened.
        """
        x = self.array
        library = library_of(x)
        assert library is not None
        if x.ndim > 1 + self.axes:
            if library.backend == "numpy":
                x = x[np.unravel_index(np.arange(start, stop), self.shape[: x.ndim - self.axes])]
            else:
                x = library.namespace().reshape(x, (-1, *self.shape[x.ndim - self.axes :]))[start:stop, ...]
        else:
            x = x[start:stop, ...]
        x = library.constant(x)
        if self.axes == 0:
            return np.asarray(library.to_numpy(x)).astype(np.int64)
        if library.lazy:
            x = library.to_numpy(x)
        stays = room is not None and isinstance(x, np.ndarray) and x.dtype.isnative
        if self.dtype in ("float16", "bfloat16") and not stays:
            xp = library.namespace() if not library.lazy else np
            x = xp.astype(x, xp.float32)
        return x

    @property
    def stamps(self) -> tuple[Stamp, ...]:
        """None: an array has no files."""
        return ()

    @property
    def held_bytes(self) -> int:
        """0: reading an array needs no memory beyond it."""
        return 0


def logits_rows(name: str, x: Any) -> ArrayRows:
    """Checks an array of logits [..., C]; TypeError or ValueError where it is none."""
    found = ArrayRows(name, _known(name, x), 1)
    if found.dtype not in _LOGITS:
        raise TypeError(f"{name} must be floating logits, got {found.dtype}")
    if len(found.shape) < 2:
        raise ValueError(f"{name} must have shape [samples, classes] or more axes, got {list(found.shape)}")
    return found


def label_rows(name: str, x: Any) -> ArrayRows:
    """Checks an array of labels [...]; TypeError where it is none."""
    found = ArrayRows(name, _known(name, x), 0)
    if not found.dtype.startswith(("int", "uint")):
        raise TypeError(f"{name} must be integer labels, got {found.dtype}")
    return found


def mask_rows(name: str, x: Any) -> ArrayRows:
    """Checks an array that masks samples [...]; TypeError where it is none."""
    found = ArrayRows(name, _known(name, x), 0)
    if not found.dtype.startswith(("bool", "int", "uint")):
        raise TypeError(f"{name} must be booleans, or integers 0 and 1, got {found.dtype}")
    return found


def _known(name: str, x: Any) -> Any:
    if library_of(x) is None:
        raise TypeError(
            f"{name} must be a path, an array of a known library or batches of them, got {type(x).__name__}"
        )
    return x
