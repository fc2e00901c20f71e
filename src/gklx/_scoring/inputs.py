"""The inputs of a run, cut into chunks of rows: files and arrays of known length, or an iterable of batches."""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from .._core.libraries import dtype_name, library_of
from .file_formats.rows import Room, Rows, Stamp, integers
from .files import carried_targets, check_together, is_of_llama, open_labels, open_logits, open_mask

_MOST_CLASSES = 2**31 - 1
"""The largest number of classes: a record stores a class in 32 bits."""
_TARGETS_AT_ONCE = 2**18
_LOGITS = ("float16", "bfloat16", "float32", "float64")


class Chunk(NamedTuple):
    """Consecutive rows that have not been read yet."""

    students: tuple[Rows, ...]
    """One student, or several candidates."""
    teacher: Rows
    labels: Rows | None
    targets: Rows | None
    mask: Rows | None
    """0 for a sample that does not count, 1 for one that does."""
    start: int
    stop: int
    first: int
    """The index of its first sample among all samples."""


class Inputs(Protocol):
    """Students, teacher, and what goes with them."""

    classes: int
    computed_in: str
    """float32 or float64."""
    samples: int | None
    """The number of samples; None for batches, whose number is known at their end."""
    labelled: bool
    targeted: bool
    masked: bool
    """Whether a mask says which samples count."""
    candidates: tuple[str, ...]
    """The names of several students, none where there is one."""
    by_tool: tuple[bool, ...]
    """For each student: whether it and the teacher are dumps of llama.cpp, to be read by the rules of its tool."""
    repeatable: bool
    """Whether the chunks can be gone through twice."""

    like: Any
    """One of the arrays, which tells library and device; None for files."""
    held_bytes: int
    """The bytes that the readers hold in addition to the chunks."""
    held_by: str
    """The names of the inputs whose readers hold it."""

    def chunks(self, start: int, rows: int) -> Iterator[Chunk]:
        """Chunks of `rows` rows, from the sample `start` on."""

    def stamps(self) -> tuple[tuple[str, tuple[Stamp, ...]], ...] | None:
        """The files as they were when opened; None for arrays and batches, which a later run cannot recognise."""


def inputs_of(student: Any, teacher: Any, labels: Any, targets: Any = None, mask: Any = None) -> Inputs:
    """The inputs that the arguments of `gklx.score` stand for; TypeError or ValueError where they are none."""
    several = isinstance(student, Mapping)
    if teacher is None:
        if labels is not None:
            raise TypeError("labels must come with the batches where teacher is None: (student, teacher, labels)")
        if several or targets is not None or mask is not None:
            raise TypeError(
                "several students, targets and sample_weight need a teacher of files or arrays, got batches"
            )
        return Batches(student)
    given = [x for x in (student, teacher, labels) if x is not None]
    if not several and any(_is_batches(x) for x in given):
        if not all(_is_batches(x) for x in given):
            kinds = ", ".join(type(x).__name__ for x in given)
            raise TypeError(f"student, teacher and labels must all be batches where one of them is, got {kinds}")
        if targets is not None or mask is not None:
            raise TypeError("targets and sample_weight need students and a teacher of files or arrays, got batches")
        return Batches(_Zipped(given))
    if several and not student:
        raise ValueError("student must hold at least one candidate, got an empty mapping")
    students = student if several else {"": student}
    if len({str(name) for name in students}) < len(students):
        raise ValueError(f"students must have different names, got {', '.join(str(name) for name in students)}")
    return Whole(
        tuple(_logits(f"student {name}" if several else "student", x) for name, x in students.items()),
        _logits("teacher", teacher),
        None if labels is None else _labels("labels", labels),
        None if targets is None else _labels("targets", targets),
        None if mask is None else _mask("sample_weight", mask),
        tuple(str(name) for name in students) if several else (),
    )


class Whole:
    """Files or arrays."""

    repeatable = True

    def __init__(
        self,
        students: tuple[Rows, ...],
        teacher: Rows,
        labels: Rows | None,
        targets: Rows | None,
        mask: Rows | None,
        candidates: tuple[str, ...],
    ) -> None:
        for student in students:
            check_together(student, teacher, labels, targets, mask)
        shape, name = students[0].shape, students[0].name
        if 0 in shape:
            raise ValueError(f"{name}: there are no logits in it, its shape is {list(shape)}")
        if shape[-1] > _MOST_CLASSES:
            raise ValueError(f"{name}: must have at most {_MOST_CLASSES:,} classes, got {shape[-1]:,}")
        if targets is None:
            targets = _carried((*students, teacher))
        self._students, self._teacher, self._labels, self._targets, self._mask = (
            students,
            teacher,
            labels,
            targets,
            mask,
        )
        self.like = getattr(students[0], "array", None)
        self.classes = shape[-1]
        self.samples: int | None = math.prod(shape[:-1])
        self.labelled, self.targeted, self.masked = (x is not None for x in (labels, targets, mask))
        self.candidates = candidates
        of_tool = is_of_llama(teacher)
        self.by_tool = tuple(of_tool and is_of_llama(student) for student in students)
        self.computed_in = _computed_in(*students, teacher)
        holding = [x for x in self._all() if x.held_bytes]
        self.held_bytes = sum(x.held_bytes for x in holding)
        self.held_by = ", ".join(x.name for x in holding)

    def _all(self) -> list[Rows]:
        every = (*self._students, self._teacher, self._labels, self._targets, self._mask)
        return [x for x in every if x is not None]

    def chunks(self, start: int, rows: int) -> Iterator[Chunk]:
        """Chunks of the same sources."""
        count = self.samples or 0
        for at in range(start, count, rows):
            given = self._students, self._teacher, self._labels, self._targets, self._mask
            yield Chunk(*given, at, min(at + rows, count), at)

    def stamps(self) -> tuple[tuple[str, tuple[Stamp, ...]], ...] | None:
        """The stamps of all files, each with the name it was given by: a name may choose an array within a file."""
        found = [(x.name, x.stamps) for x in self._all()]
        return None if not all(stamps for _, stamps in found) else tuple(found)


class Batches:
    """Batches (student, teacher) or (student, teacher, labels): from an iterable, or a function that returns one."""

    samples: int | None = None
    computed_in = "float64"  # a later batch may have a wider dtype than the first
    held_bytes, held_by = 0, ""
    targeted = masked = False
    candidates: tuple[str, ...] = ()
    by_tool: tuple[bool, ...] = (False,)

    def __init__(self, batches: Iterable[Any] | Callable[[], Iterable[Any]]) -> None:
        if not (callable(batches) or isinstance(batches, Iterable)):
            raise TypeError(
                "student must be a path, an array, or, where teacher is None, an iterable of batches "
                f"(student, teacher), got {type(batches).__name__}"
            )
        self.repeatable = callable(batches) or not isinstance(batches, Iterator)
        if isinstance(batches, _Zipped):
            self.repeatable = batches.repeatable
        self._batches = batches
        started = iter(self._again())
        first = next(started, None)
        if first is None:
            raise ValueError("student must hold at least one batch, got none")
        chunk = self._chunk(first, 0)
        self.classes, self.labelled = chunk.teacher.shape[-1], chunk.labels is not None
        self.like = getattr(chunk.students[0], "array", None)
        self._started: Iterable[Any] | None = itertools.chain([first], started)

    def chunks(self, start: int, rows: int) -> Iterator[Chunk]:
        """A chunk for each batch, or several where it has more than `rows` rows.

        The first pass continues the iterator whose first batch was already read to learn its shape.
        """
        batches, self._started, seen = self._started or self._again(), None, 0
        for batch in batches:
            whole = self._chunk(batch, seen)
            if whole.teacher.shape[-1] != self.classes or (whole.labels is not None) != self.labelled:
                raise ValueError(
                    f"the batch from sample {seen} on must have {self.classes} classes and labels as the first, "
                    f"got shape {list(whole.teacher.shape)} and {'no ' if whole.labels is None else ''}labels"
                )
            for at in range(0, whole.stop, rows):
                yield whole._replace(start=at, stop=min(at + rows, whole.stop), first=seen + at)
            seen += whole.stop

    def stamps(self) -> None:
        """None: a later run cannot know whether it gets the same batches."""

    def _again(self) -> Iterable[Any]:
        return self._batches() if callable(self._batches) else self._batches

    def _chunk(self, batch: Any, first: int) -> Chunk:
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            raise TypeError(f"a batch must be (student, teacher) or (student, teacher, labels), got {_kind(batch)}")
        student, teacher = _array_of_logits("student", batch[0]), _array_of_logits("teacher", batch[1])
        labels = _array_of_labels("labels", batch[2]) if len(batch) == 3 and batch[2] is not None else None
        check_together(student, teacher, labels)
        return Chunk((student,), teacher, labels, None, None, 0, math.prod(student.shape[:-1]), first)


class _Zipped:
    """Batches from separate iterables of students, teachers and labels."""

    def __init__(self, each: list[Any]) -> None:
        self._each = each
        self.repeatable = not any(isinstance(x, Iterator) for x in each)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        ended = object()
        for batches in itertools.zip_longest(*self._each, fillvalue=ended):
            if any(batch is ended for batch in batches):
                raise ValueError("student, teacher and labels must be as many batches, got fewer of one of them")
            yield batches


# --- files and arrays as rows -----------------------------------------------------------------------------------------


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
            return integers(np.asarray(library.to_numpy(x)))
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


def _of_array(name: str, x: Any, axes: int) -> ArrayRows:
    if library_of(x) is None:
        raise TypeError(
            f"{name} must be a path, an array of a known library or batches of them, got {type(x).__name__}"
        )
    if any(size != size for size in x.shape):  # NaN
        raise ValueError(f"{name} must have a known shape (compute_chunk_sizes makes it known), got {list(x.shape)}")
    return ArrayRows(name, x, axes)


def _is_batches(x: Any) -> bool:
    """Whether it is an iterable of arrays; a list of paths is not."""
    if isinstance(x, (str, os.PathLike)) or library_of(x) is not None:
        return False
    if isinstance(x, (list, tuple)):
        return bool(x) and not isinstance(x[0], (str, os.PathLike))
    return isinstance(x, Iterable)


def is_path(x: Any) -> bool:
    """Whether it is a path, or a sequence of paths to shards."""
    paths = x if isinstance(x, (list, tuple)) else (x,)
    return all(isinstance(each, (str, os.PathLike)) for each in paths)


def _logits(name: str, x: Any) -> Rows:
    return open_logits(x) if is_path(x) else _array_of_logits(name, x)


def _labels(name: str, x: Any) -> Rows:
    return open_labels(x) if is_path(x) else _array_of_labels(name, x)


def _mask(name: str, x: Any) -> Rows:
    return open_mask(x) if is_path(x) else _array_of_mask(name, x)


def _array_of_logits(name: str, x: Any) -> ArrayRows:
    """Checks an array of logits [..., C]; TypeError or ValueError where it is none."""
    found = _of_array(name, x, 1)
    if found.dtype not in _LOGITS:
        raise TypeError(f"{name} must be floating logits, got {found.dtype}")
    if len(found.shape) < 2:
        raise ValueError(f"{name} must have shape [samples, classes] or more axes, got {list(found.shape)}")
    return found


def _array_of_labels(name: str, x: Any) -> ArrayRows:
    """Checks an array of labels [...]; TypeError where it is none."""
    found = _of_array(name, x, 0)
    if not found.dtype.startswith(("int", "uint")):
        raise TypeError(f"{name} must be integer labels, got {found.dtype}")
    return found


def _array_of_mask(name: str, x: Any) -> ArrayRows:
    """Checks an array that masks samples [...]; TypeError where it is none."""
    found = _of_array(name, x, 0)
    if not found.dtype.startswith(("bool", "int", "uint")):
        raise TypeError(f"{name} must be booleans, or integers 0 and 1, got {found.dtype}")
    return found


def _carried(rows: tuple[Rows, ...]) -> Rows | None:
    """The targets that files of logits carry; ValueError where two of them carry different ones."""
    found = [(x, own) for x in rows if (own := carried_targets(x)) is not None]
    if not found:
        return None
    *others, (last, targets) = found
    count = targets.shape[0]
    for other, own in others:
        for start in range(0, count, _TARGETS_AT_ONCE):
            stop = min(start + _TARGETS_AT_ONCE, count)
            differ = own.read(start, stop) != targets.read(start, stop)
            if differ.any():
                raise ValueError(
                    f"{other.name} and {last.name} must be dumps of the same text, "
                    f"got different tokens at sample {start + int(differ.argmax())}"
                )
    return targets


def _computed_in(*rows: Rows) -> str:
    return "float64" if any(x.dtype == "float64" for x in rows) else "float32"


def _kind(x: Any) -> str:
    return f"{len(x)} entries" if isinstance(x, (tuple, list)) else type(x).__name__
