"""Runs the sweep over blocks of rows, so that what it allocates on the way is a few blocks and not a few batches.

The rows of a batch share two sums and nothing else: one run over the blocks makes those, the next writes values and
gradients. Where every row may be expected to be ordinary the sums are known beforehand, and the first run is made only
if some row turns out not to be. A library that compiles or defers its work is given the whole batch: it fuses the sweep
itself. On a GPU kernels of our own take the place of the blocks, where CuPy can compile them.
"""

import math
from collections.abc import Iterator
from functools import partial
from types import EllipsisType

from . import _cuda, _freed_memory, _threads
from ._batch import Totals, mass_matters, totals_of_parts
from ._libraries import library_of
from ._problem import Array, Problem
from ._rows import in_dtype
from ._sweep import Sweep, looks_below, prior_raised, sweep_rows, totals, totals_if_ordinary

_Block = tuple[slice | EllipsisType, ...]


def sweep(
    problem: Problem,
    of_batch: Totals | None = None,
    *,
    value: bool = False,
    student: bool = False,
    teacher: bool = False,
    upstream: Array | None = None,
) -> Sweep:
    """As `_sweep.sweep_rows`, with the gradients in their logits' dtypes."""
    if _cuda.takes(problem):
        return _cuda.sweep(problem, of_batch, value=value, student=student, teacher=teacher, upstream=upstream)
    xp, arrays = problem.xp, problem.arrays
    problem, blocks, workers = _divided(problem, value)

    def swept(part: Problem, upstream: Array | None) -> Sweep:
        nonlocal problem
        run = partial(sweep_rows, value=value, student=student, teacher=teacher, upstream=upstream)
        found = run(part, of_batch)
        if part.presumed and part.eager and not found.ordinary:
            problem = problem._replace(presumed=False)  # rows that are not ordinary seldom come alone
            return run(part._replace(presumed=False), of_batch)
        return found

    if len(blocks) < 2:
        found = swept(problem, upstream)
        return found._replace(
            student=None if found.student is None else in_dtype(xp, found.student, arrays.student.dtype),
            teacher=None if found.teacher is None else in_dtype(xp, found.teacher, arrays.teacher.dtype),
        )
    unreduced = problem.reduction == "none"
    to_student = xp.empty_like(arrays.student) if student else None
    to_teacher = xp.empty_like(arrays.teacher) if teacher else None

    def run(block: _Block) -> tuple[Array | None, bool]:
        found = swept(_part(problem, block), upstream[block] if unreduced and upstream is not None else upstream)
        if to_student is not None:
            to_student[block] = in_dtype(xp, found.student, to_student.dtype)
        if to_teacher is not None:
            to_teacher[block] = in_dtype(xp, found.teacher, to_teacher.dtype)
        return found.value, found.ordinary

    expected = None
    if of_batch is None:
        of_batch = expected = totals_if_ordinary(problem)
        if expected is None:
            of_batch = _totals(problem, blocks, workers)
    values, ordinary = zip(*_threads.each(run, blocks, workers), strict=True)
    if expected is not None and not all(ordinary):
        of_batch = _totals(problem, blocks, workers)
        if of_batch is not None and not all(bool(a == b) for a, b in zip(of_batch, expected, strict=True)):
            values, _ = zip(*_threads.each(run, blocks, workers), strict=True)
    return Sweep(_joined(problem, list(values)) if value else None, to_student, to_teacher, of_batch, all(ordinary))


def _totals(problem: Problem, blocks: list[_Block], workers: int) -> Totals | None:
    local = problem._replace(ranks=None, presumed=False)
    parts = _threads.each(lambda block: totals(_part(local, block)), blocks, workers)
    return None if parts[0] is None else totals_of_parts(problem, parts)


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


def _divided(problem: Problem, value: bool) -> tuple[Problem, list[_Block], int]:
    """The problem, its prior raised where that is less work; its blocks: every row once, in order; its threads.

    The value, where it is asked for, tells whether rows were ordinary.
    """
    library = library_of(problem.arrays.student)
    assert library is not None
    given = [x for x in problem.arrays if x is not None]
    shape = tuple(problem.arrays.student.shape)
    size = library.block(*given)
    if size == 0 or math.prod(shape) == 0:
        return prior_raised(problem) if library.sizes_known() else problem, [(...,)], 1
    readable = not problem.unread and library.readable(*given)
    problem = problem._replace(readable=readable, eager=True, softmax=library.softmax(shape[-1]))
    if value and library.silent and problem.ranks is None:  # ranks must sum together, and as often
        problem = problem._replace(presumed=looks_below(problem) > 0)
    _freed_memory.keep()
    row = shape[-1] * (8 if problem.dtype == problem.xp.float64 else 4)
    if math.prod(shape[:-1]) * row <= size:
        return prior_raised(problem), [(...,)], 1
    blocks = list(_slices(shape[:-1], max(1, size // row)))
    problem = prior_raised(problem, passes=2 if mass_matters(problem) else 1)
    return problem, blocks, _threads.threads() if library.needs_threads else 1


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
