"""A call on Dask's arrays: each chunk of rows is a call on arrays of its own library, and runs as such a call does.

The samples of a batch share a few sums and nothing else (`Batch`). For gradients a task for each chunk makes its part
of them, one task merges the parts, and a second task for each chunk makes the gradients: Dask keeps the chunks of the
logits meanwhile. For a value alone one task for each chunk is enough. The classes of a row come together in a task,
however they are chunked.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from .._core import batch as batches
from .._core.call import Array, Arrays, Asked, Batch, Call, Formula, Numbers, Reduction, Result
from .._core.formulas import scaled
from .._core.libraries import library_of
from . import blocks, cpu, cpu_library, cuda


class _Plan(NamedTuple):
    """A call without arrays, as tasks are sent to other processes."""

    formula: Formula
    reduction: Reduction
    numbers: Numbers
    dtype: str
    kernel: bool
    """Whether kernels were allowed when the graph was made. Where a task runs they must be allowed as well."""


class _Value(NamedTuple):
    """The value of a chunk's samples, as if there were no others."""

    batch: Batch
    ce: Array
    """The value but for the wMSE where the batch divides that, else all of it."""
    mse: Array | None


def evaluate(call: Call, asked: Asked) -> Result:
    """As `dispatch.evaluate`: graphs."""
    s, t = call.arrays.student, call.arrays.teacher
    plan = _Plan(call.formula, call.reduction, call.numbers, np.dtype(call.dtype).name, cpu_library.kernel_allowed())
    of_rows, of_logits, given = tuple(range(s.ndim - 1)), tuple(range(s.ndim)), _with_axes(call.arrays)
    if batches.uses_batch(call) and not (asked.student or asked.teacher):
        return Result(_value(call, plan, given), None, None)
    shared: list[Any] = [None, None]  # the sums over the batch and their axes, as `blockwise` takes them
    if batches.uses_batch(call):
        parts = _tasks(partial(_batch, plan), of_rows, *given, concatenate=True)
        shared = [_tasks(partial(_merged, plan), (), parts, of_rows, concatenate=False), ()]
    found = _tasks(partial(_evaluated, plan, asked), of_rows, *shared, *given, concatenate=True)

    def result(number: int, axes: tuple[int, ...], dtype: Any) -> Array:
        made = dict.fromkeys(axes[len(of_rows) :], s.shape[-1])
        return _tasks(itemgetter(number), axes, found, of_rows, like=s, dtype=dtype, new_axes=made)

    loss = None
    if asked.value and call.reduction == "none":
        loss = result(0, of_rows, call.dtype)
    elif asked.value:
        values = _tasks(itemgetter(0), of_rows, found, of_rows)
        loss = _tasks(_total, (), values, of_rows, concatenate=False, like=s, dtype=call.dtype)
    to_student = _chunked_as(s, result(1, of_logits, s.dtype)) if asked.student else None
    to_teacher = _chunked_as(t, result(2, of_logits, t.dtype)) if asked.teacher else None
    return Result(loss, to_student, to_teacher)


def _value(call: Call, plan: _Plan, given: list[Any]) -> Array:
    """A value, which needs a chunk once: the batch's sums divide what has been made of it."""
    s = call.arrays.student
    of_rows = tuple(range(s.ndim - 1))
    parts = _tasks(partial(_value_alone, plan), of_rows, *given, concatenate=True)
    if call.reduction != "none":
        return _tasks(partial(_value_of_batch, plan), (), parts, of_rows, concatenate=False, like=s, dtype=call.dtype)
    own = _tasks(itemgetter(0), of_rows, parts, of_rows)
    shared = _tasks(partial(_merged, plan), (), own, of_rows, concatenate=False)
    return _tasks(partial(_value_in_batch, plan), of_rows, parts, of_rows, shared, (), like=s, dtype=call.dtype)


def kernel_of(call: Call) -> str | None:
    """The instruction set of the kernel that runs the chunks; None where the formulas do, or it is not known here."""
    library = library_of(call.arrays.student._meta)
    return cpu_library.instruction_set() if library is not None and library.backend == "numpy" else None


# --- the graph --------------------------------------------------------------------------------------------------------


def _with_axes(arrays: Arrays) -> list[Any]:
    """As `blockwise` takes them: each array and its axes, those of the logits from 0 on; None twice for none."""
    n = arrays.student.ndim
    of_rows, of_logits, of_prior = tuple(range(n - 1)), tuple(range(n)), tuple(range(n))
    if arrays.labels is not None and arrays.prior is not None:
        # A table has axes of its own, and every task needs all of it.
        arrays, of_prior = arrays._replace(prior=arrays.prior.rechunk(-1)), (n, n + 1)
    of_where = () if arrays.where is None else of_logits[n - arrays.where.ndim :]
    pairs = zip(arrays, (of_logits, of_logits, of_prior, of_rows, of_rows, of_where), strict=True)
    return [each for x, axes in pairs for each in (x, None if x is None else axes)]


def _tasks(
    f: Callable[..., Any], axes: tuple[int, ...], *given: Any, like: Array = None, dtype: Any = object, **options: Any
) -> Array:
    """A Dask array with one task for each chunk. Its chunks are arrays `like` another's, and without it any objects."""
    dask_array = sys.modules["dask.array"]
    meta: Any = np.empty((0,) * len(axes), object)
    if like is not None:
        meta = dask_array.utils.meta_from_array(like._meta, ndim=len(axes), dtype=dtype)
    return dask_array.blockwise(f, axes, *given, dtype=dtype, meta=meta, **options)


def _chunked_as(logits: Array, gradient: Array) -> Array:
    """The gradient in the chunks of its logits, as far as their sizes are known."""
    pairs = enumerate(zip(logits.chunks, gradient.chunks, strict=True))
    wanted = {axis: own for axis, (own, found) in pairs if own != found and not any(np.isnan((*own, *found)))}
    return gradient.rechunk(wanted) if wanted else gradient


# --- the tasks --------------------------------------------------------------------------------------------------------


def _call(plan: _Plan, arrays: tuple[Any, ...]) -> Call:
    library = library_of(arrays[0])
    assert library is not None
    xp = library.namespace()
    dtype = getattr(xp, plan.dtype)
    return Call(library, xp, dtype, plan.formula, plan.reduction, plan.numbers, Arrays(*arrays), None)


def _call_beside(plan: _Plan, batch: Batch) -> Call:
    """The call without its arrays, for numbers of a batch that it found."""
    return _call(plan, (batch.weight, *[None] * (len(Arrays._fields) - 1)))


def _batch_of(plan: _Plan, call: Call) -> Batch:
    if plan.kernel and cpu.serves(call):
        return cpu.batch(call, threads=1)  # Dask runs tasks on the others
    if plan.kernel and cuda.serves(call):
        return cuda.batch(call)
    return blocks.batch(call)


def _result_of(plan: _Plan, call: Call, shared: Batch | None, asked: Asked) -> Result:
    if plan.kernel and cpu.serves(call):
        return cpu.evaluate(call, asked, shared, threads=1)
    if plan.kernel and cuda.serves(call):
        return cuda.evaluate(call, asked, shared)
    return blocks.evaluate(call, asked, shared)


def _batch(plan: _Plan, *arrays: Any) -> Batch:
    return _batch_of(plan, _call(plan, arrays))


def _merged(plan: _Plan, parts: Any) -> Batch:
    found = list(_flat(parts))
    return batches.merged(_call_beside(plan, found[0]), found)


def _evaluated(plan: _Plan, asked: Asked, shared: Batch | None, *arrays: Any) -> tuple[Any, ...]:
    found = _result_of(plan, _call(plan, arrays), shared, asked)
    return found.value, found.student, found.teacher


def _value_alone(plan: _Plan, *arrays: Any) -> _Value:
    call = _call(plan, arrays)
    own = _batch_of(plan, call)

    def value(**numbers: float) -> Array:
        some = call._replace(numbers=call.numbers._replace(**numbers))
        return _result_of(plan, some, own, Asked(value=True)).value

    if not batches.uses_batch_mass(call):
        return _Value(own, value(), None)
    return _Value(own, value(mse_weight=0.0), value(ce_weight=0.0))


def _value_in_batch(plan: _Plan, part: _Value, shared: Batch) -> Array:
    """A chunk's value as part of the batch's: divided by the sums over the batch in place of those over the chunk."""
    call = _call_beside(plan, shared)
    xp, own = call.xp, part.batch
    own_weight, weight, squared_mass = (
        xp.where(x == 0, 1.0, x) for x in (own.weight, shared.weight, shared.squared_mass)
    )
    by_weight = own.weight_scale / shared.weight_scale
    by_mass = (own.base_scale / shared.base_scale) ** call.numbers.gamma
    of_mass = by_mass * by_mass * (own.squared_mass / squared_mass)
    if call.reduction == "mean":
        of_ce, of_mse = by_weight * (own.weight / weight), by_weight * of_mass
    else:
        of_ce, of_mse = xp.ones_like(weight), shared.weight / own_weight * of_mass
    value = scaled(xp, of_ce, part.ce)
    if part.mse is not None:
        value = value + scaled(xp, of_mse, part.mse)
    return xp.astype(value, call.dtype)


def _value_of_batch(plan: _Plan, parts: Any) -> Array:
    found = list(_flat(parts))
    shared = _merged(plan, [part.batch for part in found])
    return _total([_value_in_batch(plan, part, shared) for part in found])


def _total(values: Any) -> Any:
    found = list(_flat(values))
    library = library_of(found[0])
    assert library is not None
    xp = library.namespace()
    return xp.sum(xp.stack(found))


def _flat(nested: Any) -> Iterator[Any]:
    """The entries of nested lists, which have a level for each axis."""
    if isinstance(nested, list):
        for each in nested:
            yield from _flat(each)
    else:
        yield nested
