"""From the records of all samples to a score: always in the same order and with the same sums, whoever made them."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .samples import Parameters
from .values import Values

EXACT_QUANTILES = 2**22
"""Up to so many samples quantiles are exact, beyond by a t-digest."""
WORST = 5

_COMPRESSION = 5_000
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
    """Samples left out: NaN or +inf among the logits, or no finite one."""
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


def score_of(
    values: Values, parameters: Parameters, backend: str, device: str, *, masking: bool, reading: str | None
) -> Score:
    """The score of all samples; ValueError where there is none to score."""
    if not values.scored:
        why = f"in {values.skipped:,} samples every class is -inf for student and teacher"
        if values.undefined:
            why += f", in {values.undefined:,} a logit is NaN or +inf, or none is finite"
        if values.masked:
            why += f", {values.masked:,} do not count"
        raise ValueError(f"nothing to score: {why}")
    with np.errstate(all="ignore"):
        totals = _Totals(values)
        beside = _estimates(lambda: _beside_losses(values)) if values.targeted or values.top_k else {}
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
            perplexity=_perplexity(beside) if values.targeted else None,
            delta_p=_delta_p(values, beside) if values.targeted else None,
            top_k_overlap={k: beside[f"top_{k}"] for k in values.top_k} if values.top_k else None,
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
    for block in values.blocks((name,)):
        x = block.losses[name].loss[block.scored]
        squares.append(float(((x - mean) ** 2).sum()))
        quantiles.add(x)
    return Summary(
        mean=mean,
        stderr=_standard_error(squares, mean, values.scored),
        max=totals.largest[name],
        min=totals.smallest[name],
        mse=parts[0] if parts else None,
        ce=parts[1] if parts else None,
        infinite=totals.infinite[name],
        **{key: quantiles.at(QUANTILES[key]) for key in _OF_LOSSES},
    )


def _estimates(blocks: Callable[[], Iterator[dict[str, Any]]]) -> dict[str, Estimate]:
    """The means of columns, with standard errors; NaN of no numbers. Each of two passes calls `blocks`."""
    sums: dict[str, list[float]] = {}
    n = 0
    for block in blocks():
        for name, x in block.items():
            sums.setdefault(name, []).append(float(x.sum()))
        n += next(iter(block.values())).size
    means = {name: _total(parts) / n if n else math.nan for name, parts in sums.items()}
    squares: dict[str, list[float]] = {name: [] for name in means}
    for block in blocks():
        for name, x in block.items():
            squares[name].append(float(((x - means[name]) ** 2).sum()))
    return {name: Estimate(mean, _standard_error(squares[name], mean, n)) for name, mean in means.items()}


def _standard_error(squares: list[float], mean: float, n: int) -> float:
    return math.sqrt(_total(squares) / (n - 1) / n) if n > 1 and math.isfinite(mean) else math.nan


def _beside_losses(values: Values) -> Iterator[dict[str, Any]]:
    """Columns of the scored samples, in blocks: overlaps as shares of k, and what follows from the targets."""
    for block in values.blocks(()):
        here = block.scored
        columns = {f"top_{k}": count[here] / k for k, count in (block.overlaps or {}).items()}
        if values.targeted:
            assert block.student_surprisal is not None
            assert block.teacher_surprisal is not None
            s, t = block.student_surprisal[here], block.teacher_surprisal[here]
            change = np.exp(-s) - np.exp(-t)
            columns |= {"student": s, "teacher": t, "log_ratio": s - t, "delta_p": change, "delta_p_squared": change**2}
        yield columns


def _perplexity(found: dict[str, Estimate]) -> Perplexity:
    student, teacher, ratio = found["student"], found["teacher"], found["log_ratio"]
    covariance = (student.stderr**2 + teacher.stderr**2 - ratio.stderr**2) / 2  # of the two means
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


def _delta_p(values: Values, found: dict[str, Estimate]) -> DeltaP:
    quantiles, low, high = _Quantiles(values.scored), math.inf, -math.inf
    for columns in _beside_losses(values):
        x = columns["delta_p"]
        if x.size:
            low, high = min(low, float(x.min())), max(high, float(x.max()))
            quantiles.add(x)
    squares = found["delta_p_squared"]
    rms = math.sqrt(squares.value)
    return DeltaP(
        mean=found["delta_p"],
        rms=Estimate(rms, squares.stderr / (2 * rms) if rms else squares.stderr),
        max=high,
        min=low,
        **{key: quantiles.at(q) for key, q in QUANTILES.items()},
    )


def differences(values: Values, first: Values) -> dict[str, Estimate]:
    """The mean of each loss less that of another candidate, with the error of a paired comparison.

    Over the samples that are scored in both.
    """

    def paired() -> Iterator[dict[str, Any]]:
        for own, other in zip(values.blocks(), first.blocks(), strict=True):
            both = own.scored & other.scored
            yield {name: own.losses[name].loss[both] - other.losses[name].loss[both] for name in values.names}

    with np.errstate(all="ignore"):
        return _estimates(paired)


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
        self._lowest = self._highest = 0  # how many are -inf, and how many +inf or NaN: a digest takes none of them
        self._digest = None if count <= EXACT_QUANTILES else digest()
        self._sorted = False

    def add(self, x: Any) -> None:
        if self._digest is None:
            self._all[self._filled : self._filled + x.size] = x
            self._filled += x.size
            return
        finite = np.isfinite(x)
        lowest = int((x == -np.inf).sum())
        self._lowest += lowest
        self._highest += int((~finite).sum()) - lowest
        self._digest.update(x[finite])

    def at(self, q: float) -> float:
        """By linear interpolation; between a number and an infinity, and between two infinities, the infinity."""
        if self._digest is not None:
            finite, place = self._count - self._lowest - self._highest, q * self._count - self._lowest
            if self._lowest and place <= 0:
                return -math.inf
            return float(self._digest.get_quantile(place / finite)) if place <= finite and finite else math.inf
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
