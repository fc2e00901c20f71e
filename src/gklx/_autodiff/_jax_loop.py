"""Row blocks within a program that JAX compiles for one CPU: a loop, in place of temporaries as large as the batch.

XLA keeps some five of them, in memory that is new to it at every run; where the batch is large, the page faults that
this costs take longer than the arithmetic. Over several devices XLA divides the work itself, and is left to.
"""

import math
from typing import Any

from jax import lax

from .._batch import Totals, mass_matters, over_ranks
from .._problem import Array, Problem
from .._sweep import Sweep, prior_raised, sweep_rows, totals, totals_if_ordinary

_FROM_BYTES = 3 * 2**20
_BLOCK_BYTES = 2**20


def sweep(problem: Problem, *, value: bool = False, student: bool = False, teacher: bool = False) -> Sweep:
    """As `_sweep.sweep_rows`, in a loop where the rows are many and fall into equal blocks."""
    blocks = _blocks(problem)
    if blocks == 1:
        return sweep_rows(problem, value=value, student=student, teacher=teacher)
    problem = prior_raised(problem, passes=2 if mass_matters(problem) else 1)
    xp, arrays = problem.xp, problem.arrays
    shape = arrays.student.shape

    def in_blocks(x: Array | None, axes: int) -> Array | None:
        return None if x is None else xp.reshape(x, (blocks, -1, *shape[len(shape) - axes :]))

    rows = arrays._replace(
        student=in_blocks(arrays.student, 1),
        teacher=in_blocks(arrays.teacher, 1),
        prior=in_blocks(arrays.prior, 1) if arrays.labels is None else None,
        labels=in_blocks(arrays.labels, 0),
        sample_weight=in_blocks(arrays.sample_weight, 0),
        where=None if arrays.where is None else in_blocks(xp.broadcast_to(arrays.where, shape), 1),
    )

    def part(block: Any) -> Problem:
        own, top = block
        return problem._replace(arrays=own if arrays.labels is None else own._replace(prior=arrays.prior), top=top)

    of_rows = rows, None if problem.top is None else tuple(in_blocks(x, 0) for x in problem.top)
    of_batch = totals_if_ordinary(problem)
    if of_batch is None:
        found = lax.map(lambda block: totals(part(block)._replace(ranks=None)), of_rows)
        of_batch = None if found is None else over_ranks(problem, Totals(*(xp.sum(x) for x in found)))

    def run(block: Any) -> tuple[Array | None, ...]:
        swept = sweep_rows(part(block), of_batch, value=value, student=student, teacher=teacher)
        return swept.value, swept.student, swept.teacher

    values, *gradients = lax.map(run, of_rows)
    if value:
        values = xp.reshape(values, shape[:-1]) if problem.reduction == "none" else xp.sum(values)
    to_student, to_teacher = (None if x is None else xp.reshape(x, shape) for x in gradients)
    return Sweep(values, to_student, to_teacher, of_batch, ordinary=False)


def _blocks(problem: Problem) -> int:
    """How many there are: the fewest of at most `_BLOCK_BYTES`, or not many more where the rows divide into those."""
    s = problem.arrays.student
    rows, size = math.prod(s.shape[:-1]), math.prod(s.shape) * problem.xp.finfo(problem.dtype).bits // 8
    if size < _FROM_BYTES:
        return 1
    fewest = min(rows, -(-size // _BLOCK_BYTES))
    return next((n for n in range(fewest, 4 * fewest) if rows % n == 0), 1)
