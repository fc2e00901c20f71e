"""Runs the sweep over blocks of rows, so that what it allocates on the way is a few blocks and not a few batches.

The rows of a batch share two sums and nothing else: one run over the blocks makes those, the next writes values and
gradients. A library that compiles or defers its work is given the whole batch: it fuses the sweep itself.
"""

import math
from collections.abc import Iterator
from types import EllipsisType

from ._libraries import library_of
from ._problem import Array, Problem
from ._sweep import Sweep, prior_raised
from ._sweep import sweep as sweep_rows
from ._sweep import totals as totals_of_rows

_Block = tuple[slice | EllipsisType, ...]


def totals(problem: Problem) -> Array | None:
    """As `_sweep.totals`."""
    problem, blocks = _divided(problem)
    if len(blocks) < 2:
        return totals_of_rows(problem)
    local = problem._replace(ranks=None)
    parts = [totals_of_rows(_part(local, block)) for block in blocks]
    if parts[0] is None:
        return None
    whole = problem.xp.sum(problem.xp.stack(parts), axis=0)
    return whole if problem.ranks is None else problem.ranks.total(whole)


def sweep(
    problem: Problem,
    of_batch: Array | None = None,
    *,
    value: bool = False,
    student: bool = False,
    teacher: bool = False,
    upstream: Array | None = None,
) -> Sweep:
    """As `_sweep.sweep`, with the gradients in their logits' dtypes."""
    xp, arrays = problem.xp, problem.arrays
    problem, blocks = _divided(problem)
    if len(blocks) < 2:
        found = sweep_rows(problem, of_batch, value=value, student=student, teacher=teacher, upstream=upstream)
        return found._replace(
            student=None if found.student is None else xp.astype(found.student, arrays.student.dtype, copy=False),
            teacher=None if found.teacher is None else xp.astype(found.teacher, arrays.teacher.dtype, copy=False),
        )
    if of_batch is None:
        of_batch = totals(problem)
    unreduced = problem.reduction == "none"
    to_student = xp.empty_like(arrays.student) if student else None
    to_teacher = xp.empty_like(arrays.teacher) if teacher else None
    values = []
    for block in blocks:
        found = sweep_rows(
            _part(problem, block),
            of_batch,
            value=value,
            student=student,
            teacher=teacher,
            upstream=upstream[block] if unreduced and upstream is not None else upstream,
        )
        values.append(found.value)
        if to_student is not None:
            to_student[block] = xp.astype(found.student, to_student.dtype, copy=False)
        if to_teacher is not None:
            to_teacher[block] = xp.astype(found.teacher, to_teacher.dtype, copy=False)
    return Sweep(_joined(problem, values) if value else None, to_student, to_teacher, of_batch)


def _joined(problem: Problem, values: list[Array]) -> Array:
    xp = problem.xp
    if problem.reduction != "none":
        return xp.sum(xp.stack(values))
    return xp.reshape(xp.concat([xp.reshape(x, (-1,)) for x in values]), problem.arrays.student.shape[:-1])


def _part(problem: Problem, block: _Block) -> Problem:
    """The problem of some of the rows."""
    arrays = problem.arrays
    where = arrays.where
    if where is not None:
        missing = arrays.student.ndim - where.ndim  # `where` broadcasts: leading axes may be missing, others of size 1
        chosen = (slice(None) if size == 1 else at for at, size in zip(block[missing:-1], where.shape, strict=False))
        where = where[(*chosen, ...)]
    return problem._replace(
        arrays=arrays._replace(
            student=arrays.student[block],
            teacher=arrays.teacher[block],
            prior=arrays.prior[block] if arrays.prior is not None and arrays.labels is None else arrays.prior,
            labels=None if arrays.labels is None else arrays.labels[block],
            sample_weight=None if arrays.sample_weight is None else arrays.sample_weight[block],
            where=where,
        )
    )


def _divided(problem: Problem) -> tuple[Problem, list[_Block]]:
    """The problem, its prior raised where that is less work, and its blocks: every row once, in order."""
    library = library_of(problem.arrays.student)
    assert library is not None
    if library.sizes_known():
        problem = prior_raised(problem)
    shape = tuple(problem.arrays.student.shape)
    size = min(library.block(x) for x in problem.arrays if x is not None)
    if size == 0 or math.prod(shape) == 0:
        return problem, [(...,)]
    row = shape[-1] * problem.xp.finfo(problem.dtype).bits // 8
    return problem, list(_slices(shape[:-1], max(1, size // row)))


def _slices(batch: tuple[int, ...], rows: int) -> Iterator[_Block]:
    """Blocks of at most so many rows: whole slices of the first axis where they fit, else parts of each of them."""
    if math.prod(batch) <= rows:
        yield (...,)
        return
    inner = math.prod(batch[1:])
    if inner <= rows:
        step = rows // inner
        for start in range(0, batch[0], step):
            yield (slice(start, min(start + step, batch[0])), ...)
        return
    for i in range(batch[0]):
        for rest in _slices(batch[1:], rows):
            yield (slice(i, i + 1), *rest)
