"""Logits and labels in files: finds the format, joins shards, checks shapes and dtypes.

Every fault is a ValueError of one sentence that names the file.
"""

import glob
import math
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .file_formats.llama import MAGIC as LLAMA
from .file_formats.llama import LlamaRows, open_llama
from .file_formats.npy import MAGIC, open_npy
from .file_formats.npz import open_npz
from .file_formats.rows import Room, Rows, Stamp, text
from .file_formats.safetensors import open_safetensors
from .file_formats.zarr import open_zarr

_LOGITS = ("float16", "bfloat16", "float32", "float64")

What = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Shards:
    """Several arrays, joined along the first axis."""

    name: str
    parts: tuple[Rows, ...]
    ends: tuple[int, ...]
    """For each part the number of rows in it and in all parts before it."""
    shape: tuple[int, ...]
    dtype: str

    def read(self, start: int, stop: int, room: Room | None = None) -> Any:
        """Rows across the parts, in the widest of their dtypes."""
        found, at = [], start
        if stop > self.ends[bisect_right(self.ends, start)]:
            room = None  # the buffer holds the rows of one part only
        while at < stop:
            i = bisect_right(self.ends, at)
            before = self.ends[i - 1] if i else 0
            last = min(stop, self.ends[i])
            found.append(self.parts[i].read(at - before, last - before, room))
            at = last
        x = found[0] if len(found) == 1 else np.concatenate(found)
        return x.astype(np.float64, copy=False) if self.dtype == "float64" else x

    @property
    def stamps(self) -> tuple[Stamp, ...]:
        """The stamps of all parts."""
        return tuple(each for part in self.parts for each in part.stamps)

    @property
    def held_bytes(self) -> int:
        """The bytes of the part that needs most: the parts are read one after another."""
        return max(part.held_bytes for part in self.parts)


def open_logits(what: What) -> Rows:
    """Logits [..., C] in a file, or in shards by a pattern or a sequence of paths."""
    return _joined(what, 1, _check_logits)


def open_labels(what: What) -> Rows:
    """Labels [...] in a file or in shards."""
    return _joined(what, 0, _check_labels)


def open_mask(what: What) -> Rows:
    """A mask of samples [...] in a file or in shards."""
    return _joined(what, 0, _check_mask)


def carried_targets(rows: Rows) -> Rows | None:
    """The targets that the files of these logits carry, as dumps of llama.cpp do; None where they carry none."""
    if not is_of_llama(rows):
        return None
    if isinstance(rows, LlamaRows):
        return rows.targets
    assert isinstance(rows, Shards)
    parts = tuple(part.targets for part in rows.parts if isinstance(part, LlamaRows))
    return Shards(rows.name, parts, rows.ends, rows.shape[:-1], parts[0].dtype)


def is_of_llama(rows: Rows) -> bool:
    """Whether these logits are llama.cpp's dumps."""
    return all(isinstance(part, LlamaRows) for part in (rows.parts if isinstance(rows, Shards) else (rows,)))


def check_together(
    student: Rows, teacher: Rows, labels: Rows | None, targets: Rows | None = None, weights: Rows | None = None
) -> None:
    """ValueError where they do not hold the same samples or classes."""
    s, t = student.shape, teacher.shape
    if s != t:
        what = "vocabulary mismatch" if s[-1] != t[-1] else "they do not hold the same samples"
        raise ValueError(f"{what}: {student.name} has shape {text(s)} and {teacher.name} has shape {text(t)}")
    for what, rows in (("labels", labels), ("targets", targets), ("weights", weights)):
        if rows is not None and rows.shape != s[:-1]:
            raise ValueError(
                f"{rows.name}: {what} must have one {what[:-1]} a sample, shape {text(s[:-1])} as in {student.name}, "
                f"got {text(rows.shape)}"
            )


def _joined(what: What, axes: int, check: Any) -> Rows:
    names = [os.fspath(x) for x in ([what] if isinstance(what, (str, os.PathLike)) else what)]
    if not names:
        raise ValueError("logits and labels must be in one file at least, got an empty sequence")
    parts = tuple(_opened(path, key, axes) for each in names for path, key in _matching(each))
    for part in parts:
        check(part)
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    for part in parts[1:]:
        if part.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"{part.name}: must have shape {text(('...', *first.shape[1:]))} as {first.name} has, "
                f"got {text(part.shape)}"
            )
    inner = math.prod(first.shape[1 : len(first.shape) - axes])
    ends = np.cumsum([part.shape[0] * inner for part in parts]).tolist()
    dtype = first.dtype if axes == 0 else max((part.dtype for part in parts), key=_LOGITS.index)
    name = names[0] if len(names) == 1 else f"{names[0]}, …"
    return Shards(name, parts, tuple(ends), (sum(part.shape[0] for part in parts), *first.shape[1:]), dtype)


def _matching(name: str) -> list[tuple[str, str | None]]:
    """The paths that a name stands for, each with its key: an existing path itself, or a pattern's matches in order."""
    if os.path.lexists(name):
        return [(name, None)]
    path, _, rest = name.partition("::")
    key = rest or None
    if not glob.has_magic(path) or os.path.lexists(path):
        return [(path, key)]
    found = sorted(glob.glob(path, recursive=True), key=_natural)
    if not found:
        raise ValueError(f"{name}: No such file or directory")
    return [(each, key) for each in found]


def _natural(path: str) -> tuple[list[tuple[int, str]], str]:
    """A sort key that orders shard-2 before shard-10."""
    parts = re.findall(r"\d+|\D+", path)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], path


def _opened(path: str, key: str | None, axes: int) -> Rows:
    name = path if key is None else f"{path}::{key}"
    full = os.path.abspath(path)  # workers of a cluster may have another working directory
    try:
        if path.rstrip("/").endswith(".zarr"):
            if not os.path.isdir(path):
                raise ValueError(f"{name}: No such Zarr array")
            return open_zarr(name, full, key, axes)
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"{name}: {'is a directory' if os.path.isdir(path) else 'is not a regular file'}")
        if path.endswith(".safetensors") and os.path.exists(path):
            return open_safetensors(name, full, key, axes)
        with Path(path).open("rb") as file:
            start = file.read(len(LLAMA))
        if not start:
            raise ValueError(f"{name}: the file is empty")
        if start.startswith(b"PK"):
            return open_npz(name, full, key, axes)
        if start == LLAMA:
            if key is not None or axes == 0:
                what = f"got the key {key!r}" if key is not None else "and none that could be read as labels"
                raise ValueError(f"{name}: a llama.cpp dump holds log-probabilities without a name, {what}")
            return open_llama(name, full)
        if not start.startswith(MAGIC):
            raise ValueError(
                f"{name}: not a NumPy .npy or .npz file nor a llama.cpp dump, nor .safetensors or .zarr by its name"
            )
        if key is not None:
            raise ValueError(f"{name}: an .npy file holds one array without a name, got the key {key!r}")
        return open_npy(name, full, axes)
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror or error}") from None


def _check_logits(rows: Rows) -> None:
    if rows.dtype not in _LOGITS:
        raise ValueError(f"{rows.name}: logits must be float16, bfloat16, float32 or float64, got {rows.dtype}")
    if len(rows.shape) < 2:
        raise ValueError(f"{rows.name}: logits must have shape [samples, classes] or more axes, got {text(rows.shape)}")


def _check_labels(rows: Rows) -> None:
    if not rows.dtype.startswith(("int", "uint")):
        raise ValueError(f"{rows.name}: labels must be integers, got {rows.dtype}")
    if not rows.shape:
        raise ValueError(f"{rows.name}: labels must have one label a sample, got a single number")


def _check_mask(rows: Rows) -> None:
    if not rows.dtype.startswith(("bool", "int", "uint")):
        raise ValueError(f"{rows.name}: a mask must hold booleans, or integers 0 and 1, got {rows.dtype}")
    if not rows.shape:
        raise ValueError(f"{rows.name}: a mask must have one value a sample, got a single number")
