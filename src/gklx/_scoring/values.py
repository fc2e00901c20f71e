"""The values of every sample after all are scored, in blocks, since there may be very many."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .samples import MASKED, SCORED, SKIPPED, SURPRISALS, UNDEFINED, WITHOUT_PARTS, Parameters
from .work_file import WorkFile


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


class Values:
    """The samples of a work file with their losses: weighted, and GKL's divided by the normaliser of all of them.

    They come in the order of the input, and may be gone through any number of times.
    """

    def __init__(
        self,
        work: WorkFile,
        names: tuple[str, ...],
        parameters: Parameters,
        classes: int,
        *,
        labelled: bool,
        by_prior: bool,
        candidate: int | None = None,
    ) -> None:
        self.names, self.classes, self.labelled, self.by_prior = names, classes, labelled, by_prior
        self._work, self._parameters = work, parameters
        self._candidate = candidate
        self.samples = work.records
        fields = set((work.dtype if candidate is None else work.dtype[candidate]).names or ())
        self.targeted = set(SURPRISALS) <= fields
        self.top_k = tuple(sorted(int(field[4:]) for field in fields if field.startswith("top_")))
        states = np.zeros(4, dtype=np.int64)
        squares, masses = [], 0
        for records in self._records():
            states += np.bincount(records["state"], minlength=4)
            if "gkl" in names:
                mass = records["gkl_mass"][records["state"] == SCORED].astype(np.float64)
                mass = mass[np.isfinite(mass)]
                squares.append(float((mass**2).sum()))
                masses += mass.size
        self.skipped, self.scored, self.undefined, self.masked = (
            int(states[state]) for state in (SKIPPED, SCORED, UNDEFINED, MASKED)
        )
        mean = math.fsum(squares) / masses if masses else 0.0
        self._normalizer = mean if mean > 0 else 1.0

    def _records(self) -> Iterator[Any]:
        for records in self._work.blocks():
            yield records if self._candidate is None else records[str(self._candidate)]

    def blocks(self, losses: Sequence[str] | None = None) -> Iterator[ValueBlock]:
        """All samples, some ten thousand at a time; with these losses, by default with all."""
        with np.errstate(all="ignore"):
            for records in self._records():
                surprisals = [records[field].astype(np.float64) if self.targeted else None for field in SURPRISALS]
                yield ValueBlock(
                    losses={name: self._parts(name, records) for name in (self.names if losses is None else losses)},
                    student_class=records["student_class"].astype(np.int64),
                    teacher_class=records["teacher_class"].astype(np.int64),
                    student_confidence=records["student_confidence"].astype(np.float64),
                    teacher_confidence=records["teacher_confidence"].astype(np.float64),
                    label=records["label"].astype(np.int64) if self.labelled else None,
                    scored=records["state"] == SCORED,
                    student_surprisal=surprisals[0],
                    teacher_surprisal=surprisals[1],
                    overlaps={k: records[f"top_{k}"] for k in self.top_k} if self.top_k else None,
                )

    def _parts(self, name: str, records: Any) -> Parts:
        if name in WITHOUT_PARTS:
            return Parts(records[name].astype(np.float64), None, None)
        mse, ce = (records[field].astype(np.float64) for field in (f"{name}_mse", "ce"))
        if name == "gkl":
            mse = mse / self._normalizer
        # 0 times infinity is nothing here: a part of weight 0 is not there.
        mse_weight, ce_weight = self._parameters.mse_weight, self._parameters.ce_weight
        mse = mse_weight * mse if mse_weight else np.zeros_like(mse)
        ce = ce_weight * ce if ce_weight else np.zeros_like(ce)
        return Parts(mse + ce, mse, ce)
