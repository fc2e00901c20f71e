"""The run over all samples: chunk by chunk into the work file, from where an earlier run was cut off."""

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .backend import Backend
from .file_formats import llama
from .file_formats.kept import in_turn
from .file_formats.rows import Room, Stamp, stamp
from .inputs import Chunk, Inputs
from .pools import Pool, working
from .samples import MASKED, UNDEFINED, Parameters, RowsOfBlock, prior_sums, record_dtype, scored
from .work_file import WorkFile

_threads = threading.local()


class Job(NamedTuple):
    """What is asked for."""

    names: tuple[str, ...]
    parameters: Parameters
    rows: int
    """A chunk, at most: of few classes or many candidates it has fewer."""
    strict: bool
    by_prior: bool = False
    """Whether a pass over the teacher alone comes first, for the class prior."""
    top_k: tuple[int, ...] = ()
    """In ascending order."""
    where_label: int | None = None
    """The label or target of a sample that does not count."""
    candidates: tuple[str, ...] = ()
    by_tool: tuple[bool, ...] = (False,)
    """Of each student, whether llama.cpp's reading is followed."""

    def record_dtype(self, computed_in: Any, *, targeted: bool) -> Any:
        """The fields of one sample's record; of several candidates one after another, by their numbers."""
        of_one = record_dtype(self.names, computed_in, targeted=targeted, top_k=self.top_k)
        if not self.candidates:
            return of_one
        return np.dtype([(str(at), of_one) for at in range(len(self.candidates))])


def of_each(records: Any) -> list[Any]:
    """The records of each candidate."""
    names = records.dtype.names
    return [records[name] for name in names] if records.dtype[0].names else [records]


class ChangedError(ValueError):
    """A file was written to during the run: what was found so far may be of both contents."""


class Watch:
    """Sees to it that the files stay those that were opened."""

    def __init__(self, stamps: tuple[Stamp, ...]) -> None:
        self._stamps, self._next = stamps, 0.0

    def check(self, *, last: bool = False) -> None:
        """Now and then, and at the end: `ChangedError` where a file is another one, has changed or is gone."""
        start = time.monotonic()
        if start < self._next and not last:
            return
        for each in self._stamps:
            try:
                same = stamp(each.path) == each
            except OSError:
                same = False
            if not same:
                raise ChangedError(f"{each.path}: was changed during the run; what was computed is dropped")
        took = time.monotonic() - start
        self._next = start + max(1.0, 50 * took)


def run(job: Job, inputs: Inputs, pool: Pool, work: WorkFile, progress: Callable[[str, int], None]) -> None:
    """Fills the work file; `progress` is told what is under way and how many samples are through it."""
    watch = Watch(tuple(each for _, stamps in inputs.stamps() or () for each in stamps))
    try:
        _run(job, inputs, pool, work, watch, progress)
    except Exception:
        watch.check(last=True)  # what went wrong may come from that
        raise
    watch.check(last=True)


def _run(
    job: Job, inputs: Inputs, pool: Pool, work: WorkFile, watch: Watch, progress: Callable[[str, int], None]
) -> None:
    if job.strict:
        at = 0
        for records in work.blocks():  # an earlier run may not have been strict
            _check_strict(records, at)
            at += len(records)
    prior = None
    if job.by_prior:
        prior = _class_prior(job, inputs, pool, work, watch, progress)
    progress("scoring", work.records)
    # Of few classes or many candidates the records are more than the logits.
    calls = ((job, chunk, prior) for chunk in inputs.chunks(work.records, work.block(job.rows)))
    for records in pool.in_order(score_chunk, calls):
        if job.strict:
            _check_strict(records, work.records)
        watch.check()
        work.append(records)
        progress("scoring", work.records)


def _check_strict(records: Any, first: int) -> None:
    for own in of_each(records):
        bad = own["state"] == UNDEFINED
        if bad.any():
            raise ValueError(
                f"strict: sample {first + int(bad.argmax())} has NaN or +inf among its logits, or no finite one"
            )


def score_chunk(place: Backend | None, job: Job, chunk: Chunk, prior: Any) -> Any:
    """The records of a chunk; on whatever thread or machine."""
    with working(place) as here, in_turn(_inputs(chunk)):
        beside = _beside(job, chunk)
        if here.runs_kernel and not hasattr(_threads, "rooms"):
            _threads.rooms = Room(), Room()
        of_student, of_teacher = _threads.rooms if here.runs_kernel else (None, None)
        teacher = chunk.teacher.read(chunk.start, chunk.stop, of_teacher)
        on_device = here.put(teacher)
        found = []
        for rows, by_tool in zip(chunk.students, job.by_tool, strict=True):
            student = rows.read(chunk.start, chunk.stop, of_student)
            block = RowsOfBlock(student, on_device, beside.labels, beside.targets)
            records = scored(here, job.names, job.parameters, block, prior, job.top_k)
            if by_tool:
                _read_as_tool(records, student, teacher, beside.targets)
            if beside.counted is not None:
                records["state"][~beside.counted] = MASKED
            if beside.written_labels is not None:
                records["label"] = beside.written_labels
            found.append(records)
    if not job.candidates:
        return found[0]
    joined = np.empty(len(found[0]), [(str(at), own.dtype) for at, own in enumerate(found)])
    for at, own in enumerate(found):
        joined[str(at)] = own
    return joined


def _inputs(chunk: Chunk) -> int:
    """How many are read for a chunk."""
    return sum(x is not None for x in (*chunk.students, chunk.teacher, chunk.labels, chunk.targets, chunk.mask))


def _read_as_tool(records: Any, student: Any, teacher: Any, targets: Any) -> None:
    """Puts in what llama.cpp's own tool makes of two of its dumps."""
    if "kl" in (records.dtype.names or ()):
        records["kl"] = llama.divergence(student, teacher)
    if targets is not None:
        records["teacher_surprisal"] = -np.take_along_axis(teacher, targets[:, None], axis=-1)[:, 0]


def sum_chunk(place: Backend | None, job: Job, chunk: Chunk) -> tuple[Any, int]:
    """The class sums of a chunk and how many samples they are of."""
    with working(place) as here, in_turn(_inputs(chunk)):
        beside = _beside(job, chunk)
        teacher = chunk.teacher.read(chunk.start, chunk.stop)
        sums = prior_sums(here, job.parameters.weight_temperature, teacher, beside.labels, beside.counted)
        return sums, chunk.stop - chunk.start


def _class_prior(
    job: Job, inputs: Inputs, pool: Pool, work: WorkFile, watch: Watch, progress: Callable[[str, int], None]
) -> Any:
    """The mean softmax of each class over all samples, [C, C]; uniform for a class without samples."""
    if not inputs.repeatable:
        raise ValueError(
            "student must be batches that can be gone through twice (a list, a DataLoader, a function that returns an "
            "iterator) where labels ask for a class prior, got an iterator"
        )
    sums, done = work.class_sums(inputs.classes) or (np.zeros((inputs.classes, inputs.classes)), 0)
    progress("class prior", done)
    calls = ((job, chunk) for chunk in inputs.chunks(done, job.rows)) if done != inputs.samples else ()
    for part, count in pool.in_order(sum_chunk, calls, ahead=pool.width):
        watch.check()
        sums += part
        done += count
        work.save_class_sums(sums, done, last=done == inputs.samples)
        progress("class prior", done)
    watch.check(last=True)
    totals = sums.sum(axis=-1, keepdims=True)
    seen = totals > 0  # False for NaN as well
    sums /= np.where(seen, totals, 1.0)
    sums[~seen[:, 0]] = 1.0 / inputs.classes
    return pool.share(sums.astype(inputs.computed_in, copy=False))


class _Beside(NamedTuple):
    """What is known of the samples of a chunk beside their logits, [n] each or None."""

    labels: Any | None
    """In [0, C)."""
    targets: Any | None
    written_labels: Any | None
    """As they stand in the input where they fit: those of samples that do not count may be anything."""
    counted: Any | None
    """Booleans: which samples count; None for all."""


def _beside(job: Job, chunk: Chunk) -> _Beside:
    labels, targets = (
        None if rows is None else rows.read(chunk.start, chunk.stop) for rows in (chunk.labels, chunk.targets)
    )
    counted = None
    if chunk.mask is not None:
        mask = chunk.mask.read(chunk.start, chunk.stop)
        bad = (mask != 0) & (mask != 1)
        if bad.any():
            at = int(bad.argmax())
            raise ValueError(
                f"{chunk.mask.name}: a mask must hold 0 and 1 alone, got {mask[at]} at sample {chunk.first + at}"
            )
        counted = mask == 1
    if job.where_label is not None:
        for x in (labels, targets):
            if x is not None:
                counted = (x != job.where_label) if counted is None else counted & (x != job.where_label)
    classes = chunk.teacher.shape[-1]
    given: list[Any] = []
    for what, rows, x in (("labels", chunk.labels, labels), ("targets", chunk.targets, targets)):
        if rows is None or x is None:
            given.append(None)
            continue
        inside = (x >= 0) & (x < classes)
        bad = ~inside if counted is None else counted & ~inside
        if bad.any():
            at = int(bad.argmax())
            padding = " (--where-label leaves the samples of one label out)" if x[at] < 0 else ""
            raise ValueError(
                f"{rows.name}: {what} must lie in [0, {classes}), got {x[at]} at sample {chunk.first + at}{padding}"
            )
        given.append(np.where(inside, x, 0).astype(np.int64))
    return _Beside(given[0], given[1], None if labels is None else _written(labels), counted)


def _written(labels: Any) -> Any:
    """Labels as a record keeps them, in 32 bits: -1 for one that does not fit, whose sample does not count."""
    fits = (labels >= -(2**31)) & (labels < 2**31)
    return np.where(fits, labels, -1).astype(np.int32)
