"""Runs a call: on the row kernel of the CPU or of a GPU where it serves the arrays, else by the formulas."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from .._core import formulas
from .._core.batch import Batch
from .._core.call import Array, Call, Result
from . import blocks, cpu, cuda, dask_chunks, rows


def kernel_of(call: Call) -> str | None:
    """The instruction set of the kernel that runs an eager call, "cuda" on a GPU; None where the formulas do."""
    if call.library.backend == "jax":
        device = call.library.device(call.arrays.student)  # None over several, which the formulas serve
        on_cpu = device is not None and device.platform == "cpu"
        return cpu.instruction_set() if on_cpu and cpu.serves_jax() else None
    if call.library.backend == "dask":
        return dask_chunks.kernel_of(call)
    if rows.serves(call):
        return cpu.instruction_set()
    return "cuda" if cuda.serves(call) else None


def evaluate(
    call: Call,
    shared: Batch | None = None,
    *,
    value: bool = False,
    student: bool = False,
    teacher: bool = False,
    upstream: Array | None = None,
    statistics: Array | None = None,
) -> Result:
    """Value and gradients of a call, as asked for.

    `shared` is what the samples of the batch share, and `statistics` what the CUDA kernels found of each row, where an
    earlier evaluation of the same call returned them. The gradients are those of each sample's own entry under the
    reduction "none", times `upstream`, of the value's shape, where it is given.
    """
    if call.library.backend == "dask":
        return dask_chunks.evaluate(call, value=value, student=student, teacher=teacher)
    asked: dict[str, Any] = {"value": value, "student": student, "teacher": teacher, "upstream": upstream}
    if rows.serves(call):
        return rows.evaluate(call, shared, **asked)
    if cuda.serves(call):
        return cuda.evaluate(call, shared, statistics=statistics, **asked)
    return blocks.evaluate(call, shared, **asked)


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
    """Boolean: a valid logit is NaN, or a softmax has no finite logit."""
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
    if all(rows.serves(each) for each in calls):
        beside = [*(["reverse_kl"] if reverse else []), *(["overlaps"] if top_k else [])]
        return _sample_losses_by_kernel(calls, partial(rows.samples, threads=threads, top_k=top_k), beside)
    if all(cuda.serves(each) for each in calls):
        return _sample_losses_by_kernel(calls, cuda.samples)
    call, xp = calls[0], calls[0].xp
    of_rows = formulas.rows_of(call)
    mse: list[Array | None] = []
    mass: list[Array | None] = []
    for each in calls:
        if not each.formula.decomposed:
            mse.append(None)
            mass.append(None)
            continue
        weights = formulas.class_weights(each, of_rows)
        energy = formulas.energy(each, of_rows, weights, formulas.deviations(each, of_rows, weights))
        own = weights.total * weights.base**each.numbers.gamma
        if each.formula.tempered:
            energy = energy / each.numbers.temperature / each.numbers.temperature
        mse.append(own * own * energy)
        mass.append(own)
    return SampleLosses(
        None if all(each.formula.decomposed for each in calls) else formulas.kullback_leibler(call, of_rows),
        formulas.cross_entropy(call, of_rows) if any(each.formula.decomposed for each in calls) else None,
        tuple(mse),
        tuple(mass),
        1.0 / of_rows.student.total,  # the largest logit is 0 by now
        1.0 / of_rows.teacher.total,
        xp.argmax(call.arrays.student, axis=-1),
        xp.argmax(call.arrays.teacher, axis=-1),
        of_rows.has_valid,
        of_rows.undefined,
    )


_OF_EVERY_CALL = ("student_peak", "teacher_peak", "student_class", "teacher_class", "has_valid", "undefined")


def _sample_losses_by_kernel(
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
