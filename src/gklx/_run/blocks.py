"""Runs the formulas, in blocks of rows where the library is eager.

What they allocate on the way is then a few blocks and not a few batches. The rows of a batch share a few sums and
nothing else: one run over the blocks makes those, the next makes values and gradients. A library that compiles or
defers its work is given all rows at once.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from types import EllipsisType
from typing import Any

import numpy as np

from .._core import batch as batches
from .._core import formulas
from .._core.call import Array, Asked, Batch, Call, Result

_Block = tuple[slice | EllipsisType, ...]


def evaluate(call: Call, asked: Asked, shared: Batch | None = None, *, upstream: Array | None = None) -> Result:
    """As `dispatch.evaluate`."""
    with _without_warnings(call):
        return _in_blocks(call, asked, shared, upstream)


def batch(call: Call) -> Batch:
    """What the samples share, on this rank alone."""
    with _without_warnings(call):
        return batches.merged(call, [_batch_of(_part(call, block)) for block in _blocks(call)])


def _without_warnings(call: Call) -> AbstractContextManager[Any]:
    """NumPy warns where numbers overflow or are NaN, even if no result is made of them; the kernels do not."""
    return np.errstate(all="ignore") if call.library.backend in ("numpy", "array_api_strict") else nullcontext()


def _in_blocks(call: Call, asked: Asked, shared: Batch | None, upstream: Array | None) -> Result:
    if shared is None and batches.uses_batch(call):
        shared = batches.over_ranks(call, batch(call))
    blocks = list(_blocks(call))
    if len(blocks) == 1:
        return _evaluated(call, asked, shared, upstream)
    xp, arrays = call.xp, call.arrays
    to_student = xp.empty_like(arrays.student) if asked.student else None
    to_teacher = xp.empty_like(arrays.teacher) if asked.teacher else None
    values = []
    for block in blocks:
        own = upstream[block] if upstream is not None and call.reduction == "none" else upstream
        found = _evaluated(_part(call, block), asked, shared, own)
        if to_student is not None:
            to_student[block] = found.student
        if to_teacher is not None:
            to_teacher[block] = found.teacher
        values.append(found.value)
    return Result(_joined(call, values) if asked.value else None, to_student, to_teacher, shared)


def _batch_of(call: Call) -> Batch:
    rows = formulas.rows_of(call)
    weights = formulas.class_weights(call, rows) if batches.uses_batch_mass(call) else None
    v = formulas.sample_weights(call.xp, call.arrays.sample_weight, rows.has_valid, call.dtype)
    return batches.batch_of(call, v, weights)


def _evaluated(call: Call, asked: Asked, shared: Batch | None, upstream: Array | None) -> Result:
    """All rows of a call at once."""
    xp, arrays = call.xp, call.arrays
    rows = formulas.rows_of(call)
    weights = around = None
    if formulas.uses_energy(call, asked):
        weights = formulas.class_weights(call, rows)
        around = formulas.deviations(call, rows, weights)
    v = formulas.sample_weights(call.xp, call.arrays.sample_weight, rows.has_valid, call.dtype)
    loss = to_student = to_teacher = None
    if asked.value:
        loss = formulas.value(call, rows, weights, around, batches.factors_of(call, v, weights, shared))
        loss = xp.astype(loss, call.dtype, copy=False)  # NumPy 1 widens a single sample's numbers
    factors = batches.factors_of(call, v, weights, shared, upstream)
    if asked.student:
        to_student = formulas.student_gradient(call, rows, around, factors)
        to_student = xp.astype(to_student, arrays.student.dtype, copy=False)
    if asked.teacher:
        to_teacher = formulas.teacher_gradient(call, rows, around, factors)
        to_teacher = xp.astype(to_teacher, arrays.teacher.dtype, copy=False)
    return Result(loss, to_student, to_teacher, shared)


def _joined(call: Call, values: list[Array]) -> Array:
    xp = call.xp
    if call.reduction != "none":
        return xp.sum(xp.stack(values))
    return xp.reshape(xp.concat([xp.reshape(x, (-1,)) for x in values]), call.arrays.student.shape[:-1])


def _part(call: Call, block: _Block) -> Call:
    """The call of some of the rows."""
    arrays = call.arrays
    where = arrays.where
    if where is not None:
        missing = arrays.student.ndim - where.ndim  # `where` broadcasts: leading axes may be missing, others of size 1
        index = (slice(None) if size == 1 else at for at, size in zip(block[missing:-1], where.shape, strict=False))
        where = where[(*index, ...)]
    return call._replace(
        arrays=arrays._replace(
            student=arrays.student[block],
            teacher=arrays.teacher[block],
            prior=arrays.prior[block] if arrays.prior is not None and arrays.labels is None else arrays.prior,
            labels=None if arrays.labels is None else arrays.labels[block],
            sample_weight=None if arrays.sample_weight is None else arrays.sample_weight[block],
            where=where,
        )
    )


def _blocks(call: Call) -> Iterator[_Block]:
    """Every row once, in order."""
    shape = tuple(call.arrays.student.shape)
    size = call.library.block(*(x for x in call.arrays if x is not None))
    row = shape[-1] * call.xp.finfo(call.dtype).bits // 8
    if size == 0 or math.prod(shape[:-1]) * row <= size:
        yield (...,)
    else:
        yield from _slices(shape[:-1], max(1, size // row))


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
