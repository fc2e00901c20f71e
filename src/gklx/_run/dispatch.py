"""Runs a call: on the row kernel of the CPU or of a GPU where it serves the arrays, else by the formulas."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .._core import formulas
from .._core.batch import Batch
from .._core.call import Array, Call, Result
from . import blocks, cpu, cuda, rows


def kernel_of(call: Call) -> str | None:
    """The instruction set of the kernel that runs a call; None where the formulas do."""
    return cpu.instruction_set() if rows.serves(call) else "cuda" if cuda.serves(call) else None


def evaluate(
    call: Call,
    shared: Batch | None = None,
    *,
    value: bool = False,
    student: bool = False,
    teacher: bool = False,
    upstream: Array | None = None,
) -> Result:
    """Value and gradients of a call, as asked for.

    `shared` is what the samples of the batch share, where an earlier evaluation found it. The gradients are those of
    each sample's own entry under the reduction "none", times `upstream`, of the value's shape, where it is given.
    """
    run = rows.evaluate if rows.serves(call) else cuda.evaluate if cuda.serves(call) else blocks.evaluate
    return run(call, shared, value=value, student=student, teacher=teacher, upstream=upstream)


class SampleLosses(NamedTuple):
    """What is known of each sample, whatever it weighs, all [...]."""

    kl: Array
    ce: Array
    mse: tuple[Array, ...]
    """wMSE of each call, in their order."""
    mass: tuple[Array, ...]
    """W of each call."""
    student_peak: Array
    """The largest probability of softmax(s / temperature)."""
    teacher_peak: Array
    has_valid: Array
    """Boolean: some class is valid."""
    undefined: Array
    """Boolean: a valid logit is NaN, or a softmax has no finite logit."""


def sample_losses(calls: Sequence[Call]) -> SampleLosses:
    """Each sample's own KL, CE and wMSE, unweighted and not normalised.

    Of calls that differ in formula, gamma, weight temperature or prior alone.
    """
    for kernel in (rows, cuda):
        if all(kernel.serves(each) for each in calls):
            return _sample_losses_by_kernel(calls, kernel.samples)
    call, (mse, mass) = calls[0], ([], [])
    of_rows = formulas.rows_of(call)
    for each in calls:
        weights = formulas.class_weights(each, of_rows)
        energy = formulas.energy(each, of_rows, weights, formulas.deviations(each, of_rows, weights))
        own = weights.total * weights.base**each.numbers.gamma
        if each.formula.tempered:
            energy = energy / each.numbers.temperature / each.numbers.temperature
        mse.append(own * own * energy)
        mass.append(own)
    return SampleLosses(
        formulas.kullback_leibler(call, of_rows),
        formulas.cross_entropy(call, of_rows),
        tuple(mse),
        tuple(mass),
        1.0 / of_rows.student.total,  # the largest logit is 0 by now
        1.0 / of_rows.teacher.total,
        of_rows.has_valid,
        of_rows.undefined,
    )


def _sample_losses_by_kernel(calls: Sequence[Call], samples: Callable[[Call], rows.SampleResults]) -> SampleLosses:
    """One pass for all calls that weigh the classes alike."""
    found: dict[object, rows.SampleResults] = {}
    of_calls = []
    for call in calls:
        n = call.numbers
        tempered = call.formula.tempered and n.temperature != 1.0
        key = (n.gamma, n.weight_temperature, id(call.arrays.prior), tempered)
        if key not in found:
            found[key] = samples(call)
        of_calls.append(found[key])
    first = of_calls[0]
    mse, mass = tuple(x.mse for x in of_calls), tuple(x.mass for x in of_calls)
    return SampleLosses(first.kl, first.ce, mse, mass, *first[-4:])
