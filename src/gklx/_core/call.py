"""What one call asks for: a formula, its hyper-parameters and its arrays, already checked."""

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, Literal, NamedTuple

from .libraries import Array as Array
from .libraries import Library

Number = Any
"""A Python float; under JAX or `torch.compile` it may be traced."""

Reduction = Literal["mean", "sum", "none"]


class Formula(NamedTuple):
    """Which loss it is: the differences between the four, and nothing else."""

    decomposed: bool
    """wMSE + CE; otherwise KL itself, whose gradients are those of DKL with both weights 1."""
    tempered: bool
    """The wMSE acts on logits / temperature; otherwise on the logits as they are."""
    symmetric: bool
    """The wMSE gradient reaches the student as well as the teacher."""
    batch_normalized: bool
    """The wMSE is divided by the batch's sum of v W^2; otherwise by its sum of v."""


class Numbers(NamedTuple):
    """The hyper-parameters."""

    temperature: Number
    weight_temperature: Number
    gamma: Number
    mse_weight: Number
    ce_weight: Number


def is_static(x: Number, value: float) -> bool:
    """Whether a hyper-parameter is known to have this value; a traced one may have any."""
    return isinstance(x, float) and x == value


def are_static(numbers: Iterable[Number]) -> bool:
    """Whether all hyper-parameters are Python numbers, none of them traced."""
    for x in numbers:  # noqa: SIM110, in half the time of `all`
        if not isinstance(x, float):
            return False
    return True


def partition(numbers: Numbers) -> tuple[Numbers, Numbers]:
    """The Python numbers, and the arrays that stand for a number; None in the places of the others."""
    static = Numbers(*(x if isinstance(x, float) else None for x in numbers))
    return static, Numbers(*(None if isinstance(x, float) else x for x in numbers))


def combine(static: Numbers, traced: Numbers) -> Numbers:
    """The hyper-parameters that `partition` separated."""
    return Numbers(*(b if a is None else a for a, b in zip(static, traced, strict=True)))


class Arrays(NamedTuple):
    """The arrays of a call: logits, prior and mask as given, labels signed, weights in the dtype computed in.

    All but the logits are cut from any autodiff graph.
    """

    student: Array
    teacher: Array
    prior: Array | None
    labels: Array | None
    sample_weight: Array | None
    where: Array | None


class Ranks(NamedTuple):
    """The processes or devices over which one batch is spread."""

    size: int
    total: Callable[[Array], Array]
    """The sum of an array over the ranks; every rank gets it."""
    largest: Callable[[Array], Array]
    """The maximum over the ranks, entry by entry, without a gradient."""


class Call(NamedTuple):
    """A checked call of one of the four losses."""

    library: Library
    """Of all the arrays."""
    xp: ModuleType
    """Its array-API namespace."""
    dtype: Any
    """The dtype computed in: float32 or float64."""
    formula: Formula
    reduction: Reduction
    numbers: Numbers
    arrays: Arrays
    ranks: Ranks | None
    """None where this batch is all there is."""


_NO_ARRAYS = Arrays(*[None] * len(Arrays._fields))


def without_arrays(call: Call) -> Call:
    """What of a call can be kept, hashed and compared while its arrays are handed on by themselves."""
    return call._replace(arrays=_NO_ARRAYS)


class Asked(NamedTuple):
    """Which results an evaluation is to make."""

    value: bool = False
    student: bool = False
    """The gradient with respect to the student's logits."""
    teacher: bool = False
    """The gradient with respect to the teacher's logits."""


class Batch(NamedTuple):
    """What the samples of a batch share, 0-d arrays."""

    weight_scale: Array
    """The largest v, rounded to a power of two: see `batch._power_of_two`."""
    base_scale: Array
    """The largest class weight before gamma: relative to it, powers of the others are at most 1. It is 1 where the loss
    is not normalised by the batch."""
    weight: Array
    """The sum of v / weight_scale."""
    squared_mass: Array
    """The sum of v W^2, relative to both scales; 0 where the loss is not normalised by the batch."""


class Result(NamedTuple):
    """What was asked for; the rest is None."""

    value: Array | None
    student: Array | None
    """The gradient with respect to the student's logits, in their dtype."""
    teacher: Array | None
    """The gradient with respect to the teacher's logits, in their dtype."""
    batch: Batch | None = None
    """None where the samples share nothing or the kernel keeps it."""
    statistics: Array | None = None
    """What the CUDA kernels found of each row: gradients of the same call need not find it again."""
