"""From the records of all samples to a score: always in the same order and with the same sums, whoever made them."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .samples import MASKED, SCORED, SKIPPED, SURPRISALS, UNDEFINED, WITHOUT_PARTS, Parameters
from .values import Parts, ValueBlock
from .work_file import WorkFile

EXACT_QUANTILES = 2**22
"""Up to so many samples quantiles are exact, beyond by a t-digest."""
WORST = 5

_COMPRESSION = 2_000
QUANTILES = {
    "p99_9": 0.999,
    "p99": 0.99,
    "p95": 0.95,
    "p90": 0.9,
    "p75": 0.75,
    "median": 0.5,
    "p25": 0.25,
    "p10": 0.1,
    "p5": 0.05,
    "p1": 0.01,
    "p0_1": 0.001,
}
_OF_LOSSES = [key for key in QUANTILES if key not in ("p75", "p25")]


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
    p99_9: float
    p10: float
    p5: float
    p1: float
    p0_1: float
    min: float


class Estimate(NamedTuple):
    """A number that is estimated from the samples; NaN where it is not defined."""

    value: float
    stderr: float


class Perplexity(NamedTuple):
    """Of the targets: exp of the mean -log probability."""

    student: Estimate
    teacher: Estimate
    log_ratio: Estimate
    """Of the student's to the teacher's; like the two below with the error of a paired comparison."""
    ratio: Estimate
    difference: Estimate
    correlation: float
    """Of the two -log probabilities over the samples."""


class DeltaP(NamedTuple):
    """The student's probability of the target less the teacher's."""

    mean: Estimate
    rms: Estimate
    max: float
    p99_9: float
    p99: float
    p95: float
    p90: float
    p75: float
    median: float
    p25: float
    p10: float
    p5: float
    p1: float
    p0_1: float
    min: float


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
    masked: int | None = None
    """Samples that do not count, by the mask or their label; None where nothing says which count."""
    perplexity: Perplexity | None = None
    """None without targets."""
    delta_p: DeltaP | None = None
    """None without targets."""
    top_k_overlap: dict[int, Estimate] | None = None
    """By k: the share of the teacher's k largest classes that are among the student's; None where not asked for."""
    reading: str | None = None
    """ "llama.cpp" where two of its dumps are compared by its own tool's rules; None else."""


class Scores(NamedTuple):
    """Several candidates against one teacher."""

    teacher: str
    students: dict[str, Score]
    """In the order given."""
    differences: dict[str, dict[str, Estimate]]
    """Of each candidate but the first, by loss: its mean less the first's, over the samples scored in both."""


class Values:
    """The samples of a work file with their losses: weighted, and GKL's divided by the normaliser of all of them."""

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

    def blocks(self) -> Iterator[ValueBlock]:
        """All samples, a block at a time."""
        with np.errstate(all="ignore"):
            for records in self._records():
                surprisals = [records[field].astype(np.float64) if self.targeted else None for field in SURPRISALS]
                yield ValueBlock(
                    losses={name: self._parts(name, records) for name in self.names},
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


def score_of(
    values: Values, parameters: Parameters, backend: str, device: str, *, masking: bool, reading: str | None
) -> Score:
    """The score of all samples; ValueError where there is none to score."""
    if not values.scored:
        why = f"in {values.skipped:,} samples every class is -inf for student and teacher"
        if values.undefined:
            why += f", in {values.undefined:,} a logit is NaN or none is finite"
        if values.masked:
            why += f", {values.masked:,} do not count"
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
            weights="class prior" if values.by_prior else "teacher",
            quantiles="exact" if values.scored <= EXACT_QUANTILES else "t-digest",
            parameters=parameters,
            top1_agreement=totals.agreeing / values.scored,
            losses={name: _summary(values, name, totals) for name in values.names},
            worst_classes=_worst(totals) if values.labelled else None,
            masked=values.masked if masking else None,
            perplexity=_perplexity(values) if values.targeted else None,
            delta_p=_delta_p(values) if values.targeted else None,
            top_k_overlap={k: _overlap(values, k) for k in values.top_k} if values.top_k else None,
            reading=reading,
        )


class _Totals:
    """The sums that one run over the samples gives."""

    def __init__(self, values: Values) -> None:
        sums: dict[str, list[list[float]]] = {name: [] for name in values.names}
        self.largest = dict.fromkeys(values.names, -np.inf)
        self.smallest = dict.fromkeys(values.names, np.inf)
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
                self.smallest[name] = float(np.minimum(self.smallest[name], chosen[0].min()))
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
    return Summary(
        mean=mean,
        stderr=math.sqrt(_total(squares) / (n - 1) / n) if n > 1 and math.isfinite(mean) else math.nan,
        max=totals.largest[name],
        min=totals.smallest[name],
        mse=parts[0] if parts else None,
        ce=parts[1] if parts else None,
        infinite=totals.infinite[name],
        **{key: quantiles.at(QUANTILES[key]) for key in _OF_LOSSES},
    )


def _estimate(parts: Callable[[], Iterator[Any]], n: int) -> Estimate:
    """The mean of n numbers that come in blocks, twice."""
    mean = _total(float(x.sum()) for x in parts()) / n
    if n < 2 or not math.isfinite(mean):
        return Estimate(mean, math.nan)
    return Estimate(mean, math.sqrt(_total(float(((x - mean) ** 2).sum()) for x in parts()) / (n - 1) / n))


def _surprisals(values: Values) -> Iterator[tuple[Any, Any]]:
    for block in values.blocks():
        assert block.student_surprisal is not None
        assert block.teacher_surprisal is not None
        yield block.student_surprisal[block.scored], block.teacher_surprisal[block.scored]


def _perplexity(values: Values) -> Perplexity:
    n = values.scored
    student = _estimate(lambda: (s for s, _ in _surprisals(values)), n)
    teacher = _estimate(lambda: (t for _, t in _surprisals(values)), n)
    ratio = _estimate(lambda: (s - t for s, t in _surprisals(values)), n)
    products = _total(float(((s - student.value) * (t - teacher.value)).sum()) for s, t in _surprisals(values))
    covariance = products / (n - 1) / n if n > 1 else math.nan  # of the two means
    spread = student.stderr * teacher.stderr
    ppl, base = (Estimate(_exp(x.value), _exp(x.value) * x.stderr) for x in (student, teacher))
    of_difference = ppl.stderr**2 + base.stderr**2 - 2 * ppl.value * base.value * covariance
    return Perplexity(
        student=ppl,
        teacher=base,
        log_ratio=ratio,
        ratio=Estimate(_exp(ratio.value), _exp(ratio.value) * ratio.stderr),
        difference=Estimate(ppl.value - base.value, math.sqrt(max(of_difference, 0.0))),
        correlation=max(-1.0, min(covariance / spread, 1.0)) if spread > 0 else math.nan,
    )


def _delta_p(values: Values) -> DeltaP:
    def differences() -> Iterator[Any]:
        for s, t in _surprisals(values):
            yield np.exp(-s) - np.exp(-t)

    n, quantiles, low, high = values.scored, _Quantiles(values.scored), math.inf, -math.inf
    for x in differences():
        if x.size:
            low, high = min(low, float(x.min())), max(high, float(x.max()))
            quantiles.add(x)
    squares = _estimate(lambda: (x**2 for x in differences()), n)
    rms = math.sqrt(squares.value)
    return DeltaP(
        mean=_estimate(differences, n),
        rms=Estimate(rms, squares.stderr / (2 * rms) if rms else squares.stderr),
        max=high,
        min=low,
        **{key: quantiles.at(q) for key, q in QUANTILES.items()},
    )


def _overlap(values: Values, k: int) -> Estimate:
    def shares() -> Iterator[Any]:
        for block in values.blocks():
            assert block.overlaps is not None
            yield block.overlaps[k][block.scored] / k

    return _estimate(shares, values.scored)


def difference(values: Values, first: Values, name: str) -> Estimate:
    """The mean of a loss less that of another candidate, with the error of a paired comparison.

    Over the samples that are scored in both.
    """

    def differences() -> Iterator[Any]:
        for own, other in zip(values.blocks(), first.blocks(), strict=True):
            both = own.scored & other.scored
            yield own.losses[name].loss[both] - other.losses[name].loss[both]

    with np.errstate(all="ignore"):
        n = sum(x.size for x in differences())
        return _estimate(differences, n) if n else Estimate(math.nan, math.nan)


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


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
