"""Logits and labels in .npy files: opens them, says what is wrong with one, and hands out blocks of rows.

Files are mapped, not read: only the rows asked for come into memory. Every fault is a ValueError of one sentence that
names the file.
"""

import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_MAGIC = b"\x93NUMPY"


class LogitFiles(NamedTuple):
    """The files of one comparison, checked against each other."""

    student: Any
    """[..., C], mapped."""
    teacher: Any
    labels: Any | None
    """[N], int64 in [0, C), in memory."""
    samples: int
    """N, the product of the leading axes."""
    classes: int
    """C."""
    dtype: Any
    """What the rows are computed in: float64 where a file is, float32 otherwise."""

    def rows(self, logits: Any, start: int, stop: int) -> Any:
        """Rows of `student` or `teacher` [stop - start, C]: a copy in `dtype`, C-ordered and of native byte order.

        Rows are picked by index: reshaping a Fortran-ordered file would copy all of it.
        """
        index = np.unravel_index(np.arange(start, stop), logits.shape[:-1])
        return np.ascontiguousarray(logits[index], dtype=self.dtype)


def open_logit_files(student: str, teacher: str, labels: str | None) -> LogitFiles:
    """Opens and checks the files of one comparison.

    Raises
    ------
    ValueError
        A file cannot be read or holds something else than it should, or two of them do not fit together.
    """
    s, t = _logits(student), _logits(teacher)
    if s.shape != t.shape:
        what = "vocabulary mismatch" if s.shape[-1] != t.shape[-1] else "they do not hold the same samples"
        raise ValueError(f"{what}: {student} has shape {_text(s.shape)} and {teacher} has shape {_text(t.shape)}")
    classes = s.shape[-1]
    return LogitFiles(
        student=s,
        teacher=t,
        labels=None if labels is None else _labels(labels, s.shape[:-1], classes, student),
        samples=s.size // classes,
        classes=classes,
        dtype=np.float64 if 8 in (s.dtype.itemsize, t.dtype.itemsize) else np.float32,
    )


def _logits(path: str) -> Any:
    x = _mapped(path)
    if x.dtype.kind != "f" or x.dtype.itemsize > 8:
        raise ValueError(f"{path}: logits must be float16, float32 or float64, got {_kind(x.dtype)}")
    if x.ndim < 2:
        raise ValueError(f"{path}: logits must have shape [samples, classes] or more axes, got {_text(x.shape)}")
    if x.size < 1:
        raise ValueError(f"{path}: there are no logits in it, its shape is {_text(x.shape)}")
    return x


def _labels(path: str, leading: tuple[int, ...], classes: int, student: str) -> Any:
    x = _mapped(path)
    if x.dtype.kind not in "iu":
        raise ValueError(f"{path}: labels must be integers, got {_kind(x.dtype)}")
    if x.shape != leading:
        raise ValueError(
            f"{path}: labels must have one label a sample, shape {_text(leading)} as in {student}, got {_text(x.shape)}"
        )
    flat = np.asarray(x).reshape(-1)
    bad = (flat < 0) | (flat >= classes)
    if bad.any():
        at = int(bad.argmax())
        raise ValueError(f"{path}: labels must lie in [0, {classes}), got {flat[at]} at sample {at}")
    return flat.astype(np.int64)


def _mapped(path: str) -> Any:
    """The array in a file, mapped read-only."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"{path}: {'is a directory' if os.path.isdir(path) else 'is not a regular file'}")
        _check_kind(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # whatever a damaged header makes of itself
        raise ValueError(f"{path}: the .npy file is damaged or cut short ({error})") from None


def _check_kind(path: str) -> None:
    """Refuses what NumPy would describe as something to unpickle."""
    with Path(path).open("rb") as file:
        start = file.read(len(_MAGIC))
        if not start:
            raise ValueError(f"{path}: the file is empty")
        if start != _MAGIC:
            raise ValueError(f"{path}: not a NumPy .npy file")
        file.seek(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                header = read.get(np.lib.format.read_magic(file))
                dtype = None if header is None else header(file)[2]
        except Exception as error:  # tokenizer, parser and dtype errors alike
            raise ValueError(f"{path}: the .npy file is damaged or cut short ({error})") from None
    if dtype is not None and dtype.hasobject:
        raise ValueError(f"{path}: holds pickled Python objects, which are never loaded")


def _kind(dtype: Any) -> str:
    if dtype.names is not None:
        return "a structured dtype"
    names: dict[str, str] = {"U": "text", "S": "bytes", "c": f"complex ({dtype.name})"}
    return names.get(dtype.kind, str(dtype.name))


def _text(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"
