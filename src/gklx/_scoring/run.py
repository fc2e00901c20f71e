"""The run over all samples: chunk by chunk into the work file, from where an earlier run was cut off."""

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .backend import Backend
from .file_formats.rows import Room, Stamp, stamp
from .inputs import Chunk, Inputs
from .pools import Pool, working
from .samples import UNDEFINED, Parameters, RowsOfBlock, prior_sums, scored
from .work_file import WorkFile


class Job(NamedTuple):
    """What is asked for."""

    names: tuple[str, ...]
    parameters: Parameters
    rows: int
    """A chunk."""
    strict: bool

    def takes_prior(self, inputs: Inputs) -> bool:
        """Whether a pass over the teacher alone comes first."""
        return inputs.labelled and not {"ikl", "gkl"}.isdisjoint(self.names)


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
    if job.takes_prior(inputs):
        prior = _class_prior(job, inputs, pool, work, watch, progress)
    progress("scoring", work.records)
    calls = ((job, chunk, prior) for chunk in inputs.chunks(work.records, job.rows))
    for records in pool.in_order(score_chunk, calls):
        if job.strict:
            _check_strict(records, work.records)
        watch.check()
        work.append(records)
        progress("scoring", work.records)


def _check_strict(records: Any, first: int) -> None:
    bad = records["state"] == UNDEFINED
    if bad.any():
        raise ValueError(f"strict: sample {first + int(bad.argmax())} has a NaN among its logits, or no finite one")


def score_chunk(place: Backend | None, job: Job, chunk: Chunk, prior: Any) -> Any:
    """The records of a chunk; on whatever thread or machine."""
    with working(place) as here:
        return scored(here, job.names, job.parameters, _read(chunk, here), prior)


def sum_chunk(place: Backend | None, job: Job, chunk: Chunk) -> tuple[Any, int]:
    """The class sums of a chunk and how many samples they are of."""
    with working(place) as here:
        labels = _labels(chunk)
        teacher = chunk.teacher.read(chunk.start, chunk.stop)
        return prior_sums(here, job.parameters.weight_temperature, teacher, labels), len(labels)


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


_threads = threading.local()


def _read(chunk: Chunk, place: Backend) -> RowsOfBlock:
    labels = None if chunk.labels is None else _labels(chunk)
    if place.runs_kernel and not hasattr(_threads, "rooms"):
        _threads.rooms = Room(), Room()
    of_student, of_teacher = _threads.rooms if place.runs_kernel else (None, None)
    student = chunk.student.read(chunk.start, chunk.stop, of_student)
    teacher = chunk.teacher.read(chunk.start, chunk.stop, of_teacher)
    return RowsOfBlock(student, teacher, labels)


def _labels(chunk: Chunk) -> Any:
    assert chunk.labels is not None
    classes, labels = chunk.student.shape[-1], chunk.labels.read(chunk.start, chunk.stop)
    bad = (labels < 0) | (labels >= classes)
    if bad.any():
        at = int(bad.argmax())
        raise ValueError(
            f"{chunk.labels.name}: labels must lie in [0, {classes}), got {labels[at]} at sample {chunk.first + at}"
        )
    return labels
