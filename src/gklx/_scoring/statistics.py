"""From the records of all samples to a score: always in the same order and with the same sums, whoever made them."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .samples import SCORED, SKIPPED, UNDEFINED, Parameters
from .values import Parts, ValueBlock
from .work_file import WorkFile

EXACT_QUANTILES = 2**22
"""Up to so many samples quantiles are exact, beyond by a t-digest."""
WORST = 5

_COMPRESSION = 2_000
_QUANTILES = (0.5, 0.9, 0.95, 0.99)


class Summary(NamedTuple):
    """One loss over the samples; NaN where a number is not defined."""

    mean: float
    stderr: float
    median: float
    p90: float
    p95: float
    p99: float
    max: float
    mse: float | None
    """The weighted wMSE part of the mean; None for a loss without parts."""
    ce: float | None
    infinite: int
    """How many samples' losses are not finite."""


class ClassScore(NamedTuple):
    """One class of the labels."""

    label: int
    samples: int
    top1_agreement: float
    means: dict[str, float]


class Score(NamedTuple):
    """All that is reported of a comparison."""

    samples: int
    """Scored: neither skipped nor undefined."""
    skipped: int
    """Samples left out: every class is -inf for student and teacher."""
    undefined: int
    """Samples left out: NaN among the logits, or no finite one."""
    classes: int
    backend: str
    device: str
    weights: str
    """Of IKL and GKL: "class prior" or "teacher"."""
    quantiles: str
    """ "exact" or "t-digest"."""
    parameters: Parameters
    top1_agreement: float
    losses: dict[str, Summary]
    worst_classes: list[ClassScore] | None
    """By the first loss, the largest mean first; None without labels."""


class Values:
    """The samples of a work file with their losses: weighted, and GKL's divided by the normaliser of all of them."""

    def __init__(
        self, work: WorkFile, names: tuple[str, ...], parameters: Parameters, classes: int, labelled: bool
    ) -> None:
        self.names, self.classes, self.labelled = names, classes, labelled
        self._work, self._parameters = work, parameters
        self.samples = work.records
        states = np.zeros(3, dtype=np.int64)
        squares, masses = [], 0
        for records in work.blocks():
            states += np.bincount(records["state"], minlength=3)
            if "gkl" in names:
                mass = records["gkl_mass"][records["state"] == SCORED].astype(np.float64)
                mass = mass[np.isfinite(mass)]
                squares.append(float((mass**2).sum()))
                masses += mass.size
        self.skipped, self.scored, self.undefined = (int(states[state]) for state in (SKIPPED, SCORED, UNDEFINED))
        mean = math.fsum(squares) / masses if masses else 0.0
        self._normalizer = mean if mean > 0 else 1.0

    def blocks(self) -> Iterator[ValueBlock]:
        """All samples, a block at a time."""
        with np.errstate(all="ignore"):
            for records in self._work.blocks():
                yield ValueBlock(
                    losses={name: self._parts(name, records) for name in self.names},
                    student_class=records["student_class"].astype(np.int64),
                    teacher_class=records["teacher_class"].astype(np.int64),
                    student_confidence=records["student_confidence"].astype(np.float64),
                    teacher_confidence=records["teacher_confidence"].astype(np.float64),
                    label=records["label"].astype(np.int64) if self.labelled else None,
                    scored=records["state"] == SCORED,
                )

    def _parts(self, name: str, records: Any) -> Parts:
        if name == "kl":
            return Parts(records["kl"].astype(np.float64), None, None)
        mse, ce = (records[field].astype(np.float64) for field in (f"{name}_mse", "ce"))
        if name == "gkl":
            mse = mse / self._normalizer
        # 0 times infinity is nothing here: a part of weight 0 is not there.
        mse_weight, ce_weight = self._parameters.mse_weight, self._parameters.ce_weight
        mse = mse_weight * mse if mse_weight else np.zeros_like(mse)
        ce = ce_weight * ce if ce_weight else np.zeros_like(ce)
        return Parts(mse + ce, mse, ce)


def score_of(values: Values, parameters: Parameters, backend: str, device: str) -> Score:
    """The score of all samples; ValueError where there is none to score."""
    if not values.scored:
        why = f"in {values.skipped:,} samples every class is -inf for student and teacher"
        if values.undefined:
            why += f", in {values.undefined:,} a logit is NaN or none is finite"
        raise ValueError(f"nothing to score: {why}")
    with np.errstate(all="ignore"):
        totals = _Totals(values)
        return Score(
            samples=values.scored,
            skipped=values.skipped,
            undefined=values.undefined,
            classes=values.classes,
            backend=backend,
            device=device,
            weights="class prior" if values.labelled else "teacher",
            quantiles="exact" if values.scored <= EXACT_QUANTILES else "t-digest",
            parameters=parameters,
            top1_agreement=totals.agreeing / values.scored,
            losses={name: _summary(values, name, totals) for name in values.names},
            worst_classes=_worst(totals) if values.labelled else None,
        )


class _Totals:
    """The sums that one run over the samples gives."""

    def __init__(self, values: Values) -> None:
        sums: dict[str, list[list[float]]] = {name: [] for name in values.names}
        self.largest = dict.fromkeys(values.names, -np.inf)
        self.infinite = dict.fromkeys(values.names, 0)
        self.agreeing = 0
        self.per_class = np.zeros((2 + len(values.names), values.classes if values.labelled else 0))
        for block in values.blocks():
            here = block.scored
            if not here.any():
                continue
            agrees = (block.student_class == block.teacher_class)[here]
            self.agreeing += int(agrees.sum())
            of_class = [np.ones_like(agrees), agrees]
            for name, parts in block.losses.items():
                chosen = [x[here] for x in parts if x is not None]
                sums[name].append([float(x.sum()) for x in chosen])
                self.largest[name] = float(np.maximum(self.largest[name], chosen[0].max()))
                self.infinite[name] += int((~np.isfinite(chosen[0])).sum())
                of_class.append(chosen[0])
            if block.label is not None:
                for total, x in zip(self.per_class, of_class, strict=True):
                    total += np.bincount(block.label[here], weights=x, minlength=values.classes)
        self.means = {
            name: [_total(column) / values.scored for column in zip(*rows, strict=True)] for name, rows in sums.items()
        }


def _summary(values: Values, name: str, totals: _Totals) -> Summary:
    mean, *parts = totals.means[name]
    squares, quantiles = [], _Quantiles(values.scored)
    for block in values.blocks():
        x = block.losses[name].loss[block.scored]
        squares.append(float(((x - mean) ** 2).sum()))
        quantiles.add(x)
    n = values.scored
    median, p90, p95, p99 = (quantiles.at(q) for q in _QUANTILES)
    return Summary(
        mean=mean,
        stderr=math.sqrt(_total(squares) / (n - 1) / n) if n > 1 and math.isfinite(mean) else math.nan,
        median=median,
        p90=p90,
        p95=p95,
        p99=p99,
        max=totals.largest[name],
        mse=parts[0] if parts else None,
        ce=parts[1] if parts else None,
        infinite=totals.infinite[name],
    )


class _Quantiles:
    """Quantiles of numbers that come in blocks: all of them kept, or a t-digest where there are too many."""

    def __init__(self, count: int) -> None:
        self._count, self._filled = count, 0
        self._all = np.empty(count if count <= EXACT_QUANTILES else 0)
        self._infinite = 0
        self._digest = None if count <= EXACT_QUANTILES else digest()
        self._sorted = False

    def add(self, x: Any) -> None:
        if self._digest is None:
            self._all[self._filled : self._filled + x.size] = x
            self._filled += x.size
            return
        finite = np.isfinite(x)
        self._infinite += int((~finite).sum())
        self._digest.update(x[finite])

    def at(self, q: float) -> float:
        """By linear interpolation; between a number and an infinity, and between two infinities, the infinity."""
        if self._digest is not None:
            finite = self._count - self._infinite
            inside = q * self._count / finite if finite else 2.0
            return float(self._digest.get_quantile(inside)) if inside <= 1 else math.inf
        if not self._sorted:
            self._all.sort()
            self._sorted = True
        place = q * (self._count - 1)
        below, above = (float(self._all[round_(place)]) for round_ in (math.floor, math.ceil))
        if below == above:
            return below
        if not (math.isfinite(below) and math.isfinite(above)):
            return below + above
        return below + (above - below) * (place - math.floor(place))


def digest() -> Any:
    """An empty t-digest; ValueError where its library is not here."""
    try:
        from datasketches import tdigest_double
    except ImportError:
        raise ValueError(
            f"more than {EXACT_QUANTILES:,} samples need datasketches for their quantiles, which is not installed "
            "(pip install 'gklx[score]')"
        ) from None
    return tdigest_double(_COMPRESSION)


def _total(parts: Any) -> float:
    """An exactly rounded sum, or what plain addition makes of infinities."""
    found = list(parts)
    return math.fsum(found) if all(math.isfinite(x) for x in found) else float(np.sum(found))


def _worst(totals: _Totals) -> list[ClassScore]:
    count = totals.per_class[0]
    seen = np.flatnonzero(count)
    agreement, *rest = (total[seen] / count[seen] for total in totals.per_class[1:])
    means = dict(zip(totals.means, rest, strict=True))
    order = np.argsort(-np.where(np.isnan(rest[0]), np.inf, rest[0]), kind="stable")[:WORST]
    return [
        ClassScore(
            int(seen[at]), int(count[seen[at]]), float(agreement[at]), {name: float(x[at]) for name, x in means.items()}
        )
        for at in order
    ]
