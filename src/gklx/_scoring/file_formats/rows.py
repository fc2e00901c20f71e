"""What the formats have in common: rows in the dtype computed in, dtypes by name, and errors in the same words."""

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np


class Rows(Protocol):
    """An array as rows; may be copied to another thread, process or machine."""

    @property
    def name(self) -> str:
        """As the user wrote it, for messages."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Logits [..., C], labels [...]."""

    @property
    def dtype(self) -> str:
        """By name."""

    def read(self, start: int, stop: int) -> Any:
        """Rows of the flattened leading axes, at least one: halves as float32, labels as int64, in C order."""

    def stamps(self) -> tuple[tuple[str, int, int], ...]:
        """Path, size and time of change of each file behind it; none where there is no file."""


def dtype_of(dtype: Any) -> str:
    """NumPy's dtype by name; V2 is how bfloat16 is stored by NumPy."""
    found = np.dtype(dtype)
    if found.kind == "V" and found.names is None and found.subdtype is None and found.itemsize == 2:
        return "bfloat16"
    if found.names is not None:
        return "a structured dtype"
    names: dict[str, str] = {"U": "text", "S": "bytes", "c": f"complex ({found.name})"}
    return names.get(found.kind, str(found.name))


def widened(x: Any, axes: int) -> Any:
    """Logits in float32 or float64, labels in int64."""
    if axes == 0:
        return np.ascontiguousarray(x, dtype=np.int64)
    if dtype_of(x.dtype) == "bfloat16":  # the upper half of a float32
        bits = np.ascontiguousarray(x).view(np.uint16).astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32)
    return np.ascontiguousarray(x, dtype=np.float64 if x.dtype.itemsize == 8 else np.float32)


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Says which file could not be read after it had been opened, whatever a library raises then."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{name}: can no longer be read as when it was opened ({why})") from None


def picked(x: Any, shape: tuple[int, ...], axes: int, start: int, stop: int) -> Any:
    """Rows of the flattened leading axes of what can be indexed by axes alone, and no row beside them."""
    leading, row = shape[: len(shape) - axes], shape[len(shape) - axes :]
    found = [np.asarray(x[index]).reshape(-1, *row) for index in _pieces(leading, start, stop)]
    rows = found[0] if len(found) == 1 else np.concatenate(found)
    if len(rows) != stop - start:
        raise EOFError(f"its shape is no longer {text(shape)}")
    return rows


def _pieces(leading: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int | slice, ...]]:
    """Indices that one after another take these rows: runs of whole entries of an axis, and parts of its entries."""
    inner = math.prod(leading[1:])
    while start < stop:
        i, j = divmod(start, inner)
        whole = 0 if j else (stop - start) // inner
        if whole:
            yield (slice(i, i + whole),)
            start += whole * inner
        else:
            end = min(stop - i * inner, inner)
            yield from ((i, *rest) for rest in _pieces(leading[1:], j, end))
            start = i * inner + end


def stamp(path: str) -> tuple[str, int, int]:
    """A file as it is now."""
    found = os.stat(path)
    return os.path.abspath(path), found.st_size, found.st_mtime_ns


def text(shape: tuple[int | str, ...]) -> str:
    """A shape as people write it."""
    return "[" + ", ".join(str(size) for size in shape) + "]"


def chosen(name: str, key: str | None, keys: list[str]) -> str:
    """The key asked for, or the only one there is."""
    if key is None and len(keys) == 1:
        return keys[0]
    if key is None or key not in keys:
        held = ", ".join(sorted(keys)[:10]) + (", …" if len(keys) > 10 else "") if keys else "none"
        wanted = "no array was named (FILE::key)" if key is None else f"there is no array {key!r}"
        raise ValueError(f"{name}: {wanted}; it holds {held}")
    return key
