"""What the formats share: rows in the dtype that is computed in, names of dtypes, and error messages."""

import contextlib
import functools
import hashlib
import math
import os
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np


class Stamp(NamedTuple):
    """The state of a file, or of all files of a folder, at one time."""

    path: str
    state: str
    """Differs where the content was changed or the file was replaced, even if its modification time is the same."""


class Room:
    """A reusable buffer: each read overwrites what the previous one returned."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def array(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array in the buffer."""
        size = math.prod(shape) * dtype.itemsize
        if self._bytes.size < size:
            self._bytes = np.empty(size, np.uint8)
        return self._bytes[:size].view(dtype).reshape(shape)


class Rows(Protocol):
    """An array as rows; may be sent to another thread, process or machine."""

    @property
    def name(self) -> str:
        """The name as the user wrote it, for messages."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Logits [..., C], labels [...]."""

    @property
    def dtype(self) -> str:
        """The name of the dtype."""

    @property
    def stamps(self) -> tuple[Stamp, ...]:
        """The state of each of its files, taken before it was opened; empty where there is no file."""

    @property
    def held_bytes(self) -> int:
        """The bytes that a read needs in addition to the rows that it returns."""

    def read(self, start: int, stop: int, room: Room | None = None) -> Any:
        """Rows of the flattened leading axes, at least one: halves as float32, labels as `integers`, in C order.

        With a `room` the rows may lie in it, and float16 and bfloat16 (of ml_dtypes) need not be widened.
        """


def dtype_of(dtype: Any) -> str:
    """The name of a NumPy dtype; NumPy stores bfloat16 as V2."""
    found = np.dtype(dtype)
    if found.kind == "V" and found.names is None and found.subdtype is None and found.itemsize == 2:
        return "bfloat16"
    if found.names is not None:
        return "a structured dtype"
    names: dict[str, str] = {"U": "text", "S": "bytes", "c": f"complex ({found.name})"}
    return names.get(found.kind, str(found.name))


def widened(x: Any, axes: int, room: Room | None = None) -> Any:
    """Logits in float32 or float64, with a `room` also float16 and bfloat16; labels as `integers` has them."""
    if axes == 0:
        return integers(x)
    if room is not None and x.dtype.itemsize == 2 and x.dtype.isnative:
        if x.dtype == np.float16:
            return np.ascontiguousarray(x)
        if (bfloat16 := _bfloat16()) is not None and dtype_of(x.dtype) == "bfloat16":
            return np.ascontiguousarray(x).view(bfloat16)
    if dtype_of(x.dtype) == "bfloat16":  # its bits are the upper half of a float32
        bits = np.ascontiguousarray(x).view(np.uint16).astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32)
    return np.ascontiguousarray(x, dtype=np.float64 if x.dtype.itemsize == 8 else np.float32)


def integers(x: Any) -> Any:
    """Labels in int64; as Python's integers where some of uint64 are larger, and would wrap to negative ones."""
    large = x.dtype.kind == "u" and x.size and x.max() > np.iinfo(np.int64).max
    return x.astype(object) if large else np.ascontiguousarray(x, dtype=np.int64)


@functools.cache
def _bfloat16() -> Any:
    """The NumPy dtype of bfloat16; None where ml_dtypes is not installed."""
    try:
        import ml_dtypes
    except ImportError:
        return None
    return np.dtype(ml_dtypes.bfloat16)


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns any exception of a read into an error that names the file."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{name}: can no longer be read as when it was opened ({reason(error)})") from None


def picked(x: Any, shape: tuple[int, ...], axes: int, start: int, stop: int) -> Any:
    """Rows of the flattened leading axes of an array that is indexed by axis; no other row is read."""
    leading, row = shape[: len(shape) - axes], shape[len(shape) - axes :]
    found = [np.asarray(x[index]).reshape(-1, *row) for index in _pieces(leading, start, stop)]
    rows = found[0] if len(found) == 1 else np.concatenate(found)
    if len(rows) != stop - start:
        raise EOFError(f"its shape is no longer {text(shape)}")
    return rows


def _pieces(leading: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int | slice, ...]]:
    """Indices that together take these rows, in order: runs of whole entries of an axis, and parts of its entries."""
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


def stamp(path: str) -> Stamp:
    """The state of a file or folder now."""
    found = os.stat(path)
    if not stat.S_ISDIR(found.st_mode):
        return Stamp(os.path.abspath(path), _state(found))
    every = 0
    for each in files_below(path):  # in any order
        line = f"{each!r} {_state(os.stat(each))}"
        every ^= int.from_bytes(hashlib.blake2b(line.encode(), digest_size=16).digest())
    return Stamp(os.path.abspath(path), f"{every:x}")


def _state(found: os.stat_result) -> str:
    # The change time is set by the system only; the modification time can be set back, as by `cp -p`.
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"


def files_below(folder: str) -> Iterator[str]:
    """The regular files of a folder and its subfolders; OSError for a pipe or device, which would block its reader."""
    waiting, seen = [folder], set()
    while waiting:
        at = waiting.pop()
        found = os.stat(at)
        if (found.st_dev, found.st_ino) in seen:  # a link to a parent folder
            continue
        seen.add((found.st_dev, found.st_ino))
        with os.scandir(at) as entries:
            for entry in entries:
                if entry.is_dir():
                    waiting.append(entry.path)
                elif entry.is_file():
                    yield entry.path
                else:
                    raise OSError(f"{entry.name} in it is neither a file nor a folder")


def reason(error: Exception) -> str:
    """The message of an exception in one line of bounded length, since it may quote a whole damaged header."""
    return shortened(" ".join(str(error).split()), 200)


def shortened(said: str, length: int) -> str:
    """The text, without its middle where it is too long."""
    return said if len(said) <= length else f"{said[: length // 2]} … {said[len(said) - length // 2 :]}"


def text(shape: tuple[int | str, ...]) -> str:
    """A shape as people write it."""
    return shortened("[" + ", ".join(str(size) for size in shape) + "]", 200)


def chosen(name: str, key: str | None, keys: list[str]) -> str:
    """The key that was asked for, or the only one in the file."""
    if key is None and len(keys) == 1:
        return keys[0]
    if key is None or key not in keys:
        first = [shortened(each, 60) for each in sorted(keys)[:10]]
        held = ", ".join(first) + (", …" if len(keys) > 10 else "") if keys else "none"
        wanted = "no array was named (FILE::key)" if key is None else f"there is no array {shortened(repr(key), 200)}"
        raise ValueError(f"{name}: {wanted}; it holds {held}")
    return key
