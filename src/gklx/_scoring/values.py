"""The values of every sample after all are scored, in blocks, since there may be very many."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol


class Parts(NamedTuple):
    """A loss of each sample, [n] float64: its weighted parts, or the loss alone."""

    loss: Any
    mse: Any | None
    ce: Any | None


class ValueBlock(NamedTuple):
    """Consecutive samples; each array is [n]."""

    losses: dict[str, Parts]
    """By the loss's name, in the order asked for."""
    student_class: Any
    """int64, the student's top class; the first of equal ones."""
    teacher_class: Any
    student_confidence: Any
    """float64, the largest probability of softmax(student / temperature)."""
    teacher_confidence: Any
    label: Any | None
    """int64; None where no labels were given."""
    scored: Any
    """bool: False for a sample left out (every class -inf, or masked), or undefined (NaN among its logits). The other
    fields of such a sample mean nothing."""
    student_surprisal: Any | None = None
    """float64, -log of the student's probability of the target; None where there are no targets."""
    teacher_surprisal: Any | None = None
    overlaps: dict[int, Any] | None = None
    """By k: how many of the teacher's k largest classes are among the student's."""


class SampleValues(Protocol):
    """All samples, in the order of the input; may be iterated several times."""

    names: tuple[str, ...]
    """The losses."""
    samples: int
    """N, with those that are not scored."""
    classes: int

    def blocks(self) -> Iterator[ValueBlock]:
        """All samples, a block at a time (some hundred thousand)."""
