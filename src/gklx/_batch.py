"""From samples to a batch: the sums that its samples share, what each counts for, and the value.

Arrays here are [...], one number a sample; every way of running the sweep over the rows comes through here.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from ._problem import Array, Number, Problem
from ._rows import divided, exactly, product


class Samples(NamedTuple):
    """What each sample comes to before weights and reduction, all [...]."""

    kl: Array | None
    mse: Array | None
    ce: Array | None
    mass: Array | float | None
    """W, a number where it is the same in every sample; None where there is no wMSE."""


class Totals(NamedTuple):
    """What the rows of a batch share: Python numbers where no array was needed to know them, else 0-d arrays."""

    weight: Number
    """The sum of v."""
    squared_mass: Number
    """The sum of v W^2; 0 where it is not in the loss."""


class Rates(NamedTuple):
    """The factors of a sample's two gradients, [...] or a number; None where that part is not there."""

    teacher: Array | float | None
    """Of w (d - mu), or what is in proportion to it."""
    student: Array | float | None
    """Of q - p."""


def mass_matters(problem: Problem) -> bool:
    """Whether the batch's sum of v W^2 is in the loss."""
    return problem.formula.batch_normalized and not exactly(problem.numbers.mse_weight, 0.0)


def shares(problem: Problem) -> bool:
    """Whether the samples of a batch share anything."""
    return problem.reduction == "mean" or mass_matters(problem)


def totals_of(problem: Problem, v: Array | float, mass: Array | float | None) -> Totals:
    """The totals of samples of those weights and masses, over all ranks."""
    squared = 0.0 if mass is None else _total(problem, product(mass * mass, v))
    return over_ranks(problem, Totals(_total(problem, v), squared))


def _total(problem: Problem, x: Array | float) -> Number:
    """The sum over the samples, of a number too; a number where it may be read, since what follows is then no array."""
    if isinstance(x, float):
        return x * math.prod(problem.arrays.student.shape[:-1])
    total = problem.xp.sum(x)
    return float(total) if problem.readable else total


def totals_of_parts(problem: Problem, parts: Sequence[Totals]) -> Totals:
    """The totals of a batch from those of its parts, each made for its own rank alone."""
    sums = []
    for column in zip(*parts, strict=True):
        arrays = [x for x in column if not isinstance(x, float)]
        known = sum(x for x in column if isinstance(x, float))
        sums.append(known + problem.xp.sum(problem.xp.stack(arrays)) if arrays else known)
    return over_ranks(problem, Totals(*sums))


def over_ranks(problem: Problem, found: Totals) -> Totals:
    """The totals of a batch that may be spread over ranks, from those of this rank's part."""
    if problem.ranks is None:
        return found
    xp = problem.xp
    zero = xp.sum(xp.zeros_like(problem.arrays.student[..., 0], dtype=problem.dtype))
    both = problem.ranks.total(xp.stack([zero + found.weight, zero + found.squared_mass]))
    return Totals(both[0], both[1])


def share_of(problem: Problem, v: Array | float, of_batch: Totals | None) -> Array | float:
    """What a sample's entry counts for in the reduced value.

    Over several ranks the mean of their values, like the mean of their gradients, is that of the whole batch.
    """
    if problem.reduction == "sum":
        return v
    if problem.reduction == "none":
        return _quotient(problem, v, v)
    assert of_batch is not None
    share = _quotient(problem, v, of_batch.weight)
    return share if problem.ranks is None else problem.ranks.size * share


def mse_weight_of(problem: Problem, of_batch: Totals | None) -> Number:
    """The weight of a sample's wMSE; in GKL times sum v / sum v W^2, from a mean over samples to one over pairs."""
    mse_weight = problem.numbers.mse_weight
    if not mass_matters(problem):
        return mse_weight
    assert of_batch is not None
    return mse_weight * _quotient(problem, of_batch.weight, of_batch.squared_mass)


def rates_of(
    problem: Problem,
    share: Array | float,
    mse_weight: Number,
    factor: Array | float | None,
    upstream: Array | None,
) -> Rates:
    """What the gradients of samples of that share are multiplied by, `factor` being that of a sample's wMSE alone."""
    formula, numbers = problem.formula, problem.numbers
    if upstream is not None:
        share = share * upstream
    teacher = None
    if factor is not None:
        teacher = product(share * mse_weight, factor)
        if formula.tempered:
            teacher = divided(divided(teacher, numbers.temperature), numbers.temperature)
    if exactly(numbers.ce_weight, 0.0):
        return Rates(teacher, None)
    return Rates(teacher, share * divided(numbers.ce_weight, numbers.temperature))


def value_of(problem: Problem, of: Samples, mse_weight: Number, share: Array | float) -> Array:
    """The loss, reduced, of what the samples come to."""
    xp, loss = problem.xp, of.kl
    if loss is None:
        loss = _weighted(problem, of.ce, problem.numbers.ce_weight)
    if of.mse is not None:
        loss = _weighted(problem, of.mse, mse_weight) + loss
    loss = _weighted(problem, loss, share)
    return loss if problem.reduction == "none" else xp.sum(loss)


def _weighted(problem: Problem, x: Array, weight: Number) -> Array:
    """The product weight * x, and 0 where the weight is 0 though x be infinite."""
    xp = problem.xp
    if isinstance(weight, float):
        return x if weight == 1.0 else xp.zeros_like(x) if weight == 0.0 else weight * x
    return weight * xp.where(weight == 0, 0.0, x)


def _quotient(problem: Problem, x: Number, by: Number) -> Number:
    """`x / by`, and x where `by` is 0."""
    return x / ((by or 1.0) if isinstance(by, float) else problem.xp.where(by == 0, 1.0, by))
