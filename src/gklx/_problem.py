"""What one call asks for: a formula, its numbers and its arrays, already checked."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Literal, NamedTuple

Array = Any
"""An array of any supported library; its type is known only to the caller."""

Number = Any
"""A Python float or, under JAX, a 0-d array of the dtype computed in."""

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


def parted(numbers: Numbers) -> tuple[Numbers, Numbers]:
    """The Python numbers, and the arrays that stand for a number; None in the places of the others."""
    known = Numbers(*(x if isinstance(x, float) else None for x in numbers))
    return known, Numbers(*(None if isinstance(x, float) else x for x in numbers))


def joined(known: Numbers, arrays: Numbers) -> Numbers:
    """The numbers that `parted` took apart."""
    return Numbers(*(b if a is None else a for a, b in zip(known, arrays, strict=True)))


class Arrays(NamedTuple):
    """The arrays of a call, as the caller gave them, but for constants cut from any autodiff graph."""

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


class Problem(NamedTuple):
    """A checked call, ready to be computed."""

    xp: ModuleType
    dtype: Any
    """The dtype computed in: float32 or float64."""
    formula: Formula
    reduction: Reduction
    numbers: Numbers
    arrays: Arrays
    ranks: Ranks | None
    """None where this batch is all there is."""
    readable: bool = False
    """Whether values may be looked at, to spare finite logits the care that others need."""
    unread: bool = False
    """Whether nobody checked the arguments' values, and they must not be trusted though they could be read now."""
    eager: bool = False
    """Whether operations run at once and no autodiff records them: an array made on the way may be written over."""
    softmax: Callable[[Array], Array] | None = None
    """The library's own along the last axis; None where ours is to be taken."""
    presumed: bool = False
    """Whether rows are spared that care without a look; who asks for it looks at `Sweep.ordinary` afterwards."""
    top: tuple[Array, Array] | None = None
    """The maxima of the student's and the teacher's rows, where these were seen to hold moderate numbers alone."""
    together: Callable[[Sequence[Array]], Sequence[Array]] | None = None
    """Sums along the last axis of several arrays in one reading; None where each is read by itself."""

    @property
    def fused(self) -> bool:
        """Whether a compiler makes loops over the rows of operations on rows presumed ordinary."""
        return self.presumed and not self.eager
