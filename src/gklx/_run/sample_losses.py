"""Each sample's own losses, for statistics over samples: by the kernels where they serve, else by the formulas."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from .._core import formulas
from .._core.call import Array, Call
from . import cpu, cuda


class SampleLosses(NamedTuple):
    """What is known of each sample, whatever it weighs, all [...]."""

    kl: Array | None
    """None where no call is KL."""
    ce: Array | None
    """None where all are."""
    mse: tuple[Array | None, ...]
    """wMSE of each call, in their order; None of KL."""
    mass: tuple[Array | None, ...]
    """W of each call, likewise."""
    student_peak: Array
    """The largest probability of softmax(s / temperature)."""
    teacher_peak: Array
    student_class: Array
    """int64: where the largest logit is, the first of several. Means nothing in an undefined sample."""
    teacher_class: Array
    has_valid: Array
    """Boolean: some class is valid."""
    undefined: Array
    """Boolean: a valid logit is NaN or +inf, or a softmax has no finite logit."""
    reverse_kl: Array | None = None
    """KL with student and teacher exchanged; from the row kernel alone, where it is asked for."""
    overlaps: Array | None = None
    """int32 [..., len(top_k)]: how many classes are among the k largest of both networks; likewise."""


def sample_losses(
    calls: Sequence[Call], threads: int = 1, *, reverse: bool = False, top_k: Sequence[int] = ()
) -> SampleLosses:
    """Each sample's own KL, CE and wMSE, unweighted and not normalised; without masks.

    Of calls that differ in formula, gamma, weight temperature or prior alone. The kernel may use so many threads.
    `top_k` is in ascending order.
    """
    if all(cpu.serves(each) for each in calls):
        beside = [*(["reverse_kl"] if reverse else []), *(["overlaps"] if top_k else [])]
        return _by_kernel(calls, partial(cpu.samples, threads=threads, top_k=top_k), beside)
    if all(cuda.serves(each) for each in calls):
        return _by_kernel(calls, cuda.samples)
    return _by_formulas(calls)


def _by_formulas(calls: Sequence[Call]) -> SampleLosses:
    call, of_rows = calls[0], formulas.rows_of(calls[0])
    decomposed = [each.formula.decomposed for each in calls]
    mse, mass = zip(*(_mse_and_mass(each, of_rows) for each in calls), strict=True)
    return SampleLosses(
        kl=None if all(decomposed) else formulas.kullback_leibler(call, of_rows),
        ce=formulas.cross_entropy(call, of_rows) if any(decomposed) else None,
        mse=mse,
        mass=mass,
        student_peak=1.0 / of_rows.student.total,  # the largest logit is 0 by now
        teacher_peak=1.0 / of_rows.teacher.total,
        student_class=call.xp.argmax(call.arrays.student, axis=-1),
        teacher_class=call.xp.argmax(call.arrays.teacher, axis=-1),
        has_valid=of_rows.has_valid,
        undefined=of_rows.undefined,
    )


def _mse_and_mass(call: Call, of_rows: formulas.Rows) -> tuple[Array | None, Array | None]:
    """A call's wMSE and W; None of KL."""
    if not call.formula.decomposed:
        return None, None
    weights, temperature = formulas.class_weights(call, of_rows), call.numbers.temperature
    energy = formulas.energy(call, of_rows, weights, formulas.deviations(call, of_rows, weights))
    if call.formula.tempered:
        energy = energy / temperature / temperature
    mass = weights.total * weights.base**call.numbers.gamma
    return mass * mass * energy, mass


_OF_EVERY_CALL = ("student_peak", "teacher_peak", "student_class", "teacher_class", "has_valid", "undefined")


def _by_kernel(
    calls: Sequence[Call],
    samples: Callable[[Call, Sequence[str]], dict[str, Array]],
    beside: Sequence[str] = (),
) -> SampleLosses:
    """One pass for all calls that weigh the classes alike; the first finds as well what is the same for every call."""
    decomposed = [call for call in calls if call.formula.decomposed]
    common = ["kl"] if len(decomposed) < len(calls) else []
    common += ["ce"] if decomposed else []
    own = ["mse", "mass"] if decomposed else []
    passes: dict[object, dict[str, Array]] = {}
    for call in decomposed or calls[:1]:
        if _weighing(call) not in passes:
            passes[_weighing(call)] = samples(call, own if passes else [*own, *common, *beside, *_OF_EVERY_CALL])
    found = next(iter(passes.values()))
    of_calls = [passes[_weighing(call)] if call.formula.decomposed else {} for call in calls]
    return SampleLosses(
        kl=found.get("kl"),
        ce=found.get("ce"),
        mse=tuple(x.get("mse") for x in of_calls),
        mass=tuple(x.get("mass") for x in of_calls),
        reverse_kl=found.get("reverse_kl"),
        overlaps=found.get("overlaps"),
        **{name: found[name] for name in _OF_EVERY_CALL},
    )


def _weighing(call: Call) -> object:
    """The same for two calls with the same wMSE of each sample."""
    n = call.numbers
    return n.gamma, n.weight_temperature, id(call.arrays.prior), call.formula.tempered and n.temperature != 1.0
