"""The run over all samples: chunk by chunk into the work file, from where an earlier run was cut off."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .backend import Backend
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


def run(job: Job, inputs: Inputs, pool: Pool, work: WorkFile, progress: Callable[[str, int], None]) -> None:
    """Fills the work file; `progress` is told what is under way and how many samples are through it."""
    prior = None
    if job.takes_prior(inputs):
        prior = _class_prior(job, inputs, pool, work, progress)
    progress("scoring", work.records)
    calls = ((job, chunk, prior) for chunk in inputs.chunks(work.records, job.rows))
    for records in pool.in_order(score_chunk, calls):
        if job.strict and (bad := records["state"] == UNDEFINED).any():
            at = work.records + int(bad.argmax())
            raise ValueError(f"strict: sample {at} has a NaN among its logits, or no finite one")
        work.append(records)
        progress("scoring", work.records)


def score_chunk(place: Backend | None, job: Job, chunk: Chunk, prior: Any) -> Any:
    """The records of a chunk; on whatever thread or machine."""
    with working(place) as here:
        return scored(here, job.names, job.parameters, _read(chunk), prior)


def sum_chunk(place: Backend | None, job: Job, chunk: Chunk) -> tuple[Any, int]:
    """The class sums of a chunk and how many samples they are of."""
    with working(place) as here:
        labels = _labels(chunk)
        teacher = chunk.teacher.read(chunk.start, chunk.stop)
        return prior_sums(here, job.parameters.weight_temperature, teacher, labels), len(labels)


def _class_prior(job: Job, inputs: Inputs, pool: Pool, work: WorkFile, progress: Callable[[str, int], None]) -> Any:
    """The mean softmax of each class over all samples, [C, C]; uniform for a class without samples."""
    if not inputs.repeatable:
        raise ValueError(
            "student must be batches that can be gone through twice (a list, a DataLoader, a function that returns an "
            "iterator) where labels ask for a class prior, got an iterator"
        )
    sums, done = work.class_sums() or (np.zeros((inputs.classes, inputs.classes)), 0)
    progress("class prior", done)
    calls = ((job, chunk) for chunk in inputs.chunks(done, job.rows)) if done != inputs.samples else ()
    for part, count in pool.in_order(sum_chunk, calls):
        sums += part
        done += count
        work.save_class_sums(sums, done, last=done == inputs.samples)
        progress("class prior", done)
    totals = sums.sum(axis=-1, keepdims=True)
    prior = np.where(totals > 0, sums / np.where(totals > 0, totals, 1.0), 1.0 / inputs.classes)
    return pool.share(prior.astype(inputs.computed_in))


def _read(chunk: Chunk) -> RowsOfBlock:
    labels = None if chunk.labels is None else _labels(chunk)
    student, teacher = (x.read(chunk.start, chunk.stop) for x in (chunk.student, chunk.teacher))
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
