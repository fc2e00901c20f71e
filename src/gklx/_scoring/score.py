"""Scores a student's logits against a teacher's, block by block of rows.

The device holds one block at a time, the host a few float64 numbers a sample. All sums over samples are made on the
host, over the whole file, so that no result depends on the size of a block.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .. import losses
from .._blocks import samples
from .._problem import Array
from ..losses import problem_builder
from ..prior import class_sums
from .backend import Backend
from .logit_files import LogitFiles

LOSSES: dict[str, Callable[..., Array]] = {name: getattr(losses, name) for name in ("kl", "dkl", "ikl", "gkl")}
BLOCK_ELEMENTS = 2**22
WORST = 5

_QUANTILES = (0.5, 0.9, 0.95, 0.99)


class Parameters(NamedTuple):
    """The hyper-parameters; each loss takes those it has."""

    temperature: float = 1.0
    weight_temperature: float = 1.0
    gamma: float = 1.0
    mse_weight: float = 1.0
    ce_weight: float = 1.0


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
    nonfinite: int
    """How many samples' losses are infinite or NaN."""


class ClassScore(NamedTuple):
    """One class of the labels."""

    label: int
    samples: int
    top1_agreement: float
    means: dict[str, float]


class Score(NamedTuple):
    """All that is reported."""

    samples: int
    skipped: int
    """Samples left out: every class is -inf for student and teacher."""
    classes: int
    backend: str
    device: str
    weights: str
    """Of IKL and GKL: "class prior" or "teacher"."""
    parameters: Parameters
    top1_agreement: float
    losses: dict[str, Summary]
    worst_classes: list[ClassScore] | None
    """By the first loss, the largest mean first; None without labels."""


class _Parts(NamedTuple):
    """A loss of every sample, [N] each: its weighted parts, or the loss alone."""

    loss: Any
    mse: Any | None
    ce: Any | None


def score(
    files: LogitFiles, names: list[str], parameters: Parameters, backend: Backend, batch_size: int | None = None
) -> Score:
    """Scores the student of some files against their teacher.

    Parameters
    ----------
    files : LogitFiles
        The logits and, perhaps, labels.
    names : list of str
        Which of `LOSSES`; the first orders the worst classes.
    parameters : Parameters
        As in the losses.
    backend : Backend
        Where to compute.
    batch_size : int, optional
        Rows a block; by default so many that a block has about `BLOCK_ELEMENTS` elements.

    Raises
    ------
    ValueError
        No sample has a class to score.
    """
    size = batch_size or max(1, BLOCK_ELEMENTS // files.classes)
    prior = None
    if files.labels is not None and not {"ikl", "gkl"}.isdisjoint(names):
        prior = backend.put(_class_prior(files, parameters.weight_temperature, backend, size))
    raw = {name: np.empty((1 if name == "kl" else 3, files.samples)) for name in names}
    agrees, counts = np.empty(files.samples, dtype=bool), np.empty(files.samples, dtype=bool)
    for block in _blocks(files.samples, size):
        student, teacher = (files.rows(x, block.start, block.stop) for x in (files.student, files.teacher))
        agrees[block], counts[block] = _top1(student, teacher)
        arrays = backend.put(student), backend.put(teacher)
        weights = {}
        if prior is not None and files.labels is not None:
            weights = {"prior": prior, "labels": backend.put(files.labels[block])}
        for name in names:
            raw[name][:, block] = _block(name, arrays, weights, parameters, backend)
    if not counts.any():
        raise ValueError("nothing to score: in every sample every class is -inf for student and teacher")
    of = {name: _weighted(name, each[:, counts], parameters) for name, each in raw.items()}
    agrees = agrees[counts]
    return Score(
        samples=int(counts.sum()),
        skipped=int((~counts).sum()),
        classes=files.classes,
        backend=backend.library.backend,
        device=backend.device_name,
        weights="teacher" if files.labels is None else "class prior",
        parameters=parameters,
        top1_agreement=float(agrees.mean()),
        losses={name: _summary(parts) for name, parts in of.items()},
        worst_classes=None if files.labels is None else _worst(files.labels[counts], files.classes, agrees, of),
    )


# --- one block --------------------------------------------------------------------------------------------------------


def _blocks(rows: int, size: int) -> Iterator[slice]:
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _top1(student: Any, teacher: Any) -> tuple[Any, Any]:
    """Whether both name the same class, and whether a sample has any class at all; NaN names none."""
    tops = [x.argmax(axis=-1, keepdims=True) for x in (student, teacher)]
    s, t = (np.take_along_axis(x, top, axis=-1)[:, 0] for x, top in zip((student, teacher), tops, strict=True))
    same = (tops[0] == tops[1])[:, 0] & ~np.isnan(s) & ~np.isnan(t)
    return same, ~((s == -np.inf) & (t == -np.inf))


def _block(
    name: str, arrays: tuple[Array, Array], weights: dict[str, Array], parameters: Parameters, backend: Backend
) -> Any:
    """The KL of a block's samples [1, B], or their wMSE, CE and W [3, B], in one transfer."""
    takes: dict[str, Any] = {"temperature": parameters.temperature}
    if name in ("ikl", "gkl"):
        takes |= weights | {"weight_temperature": parameters.weight_temperature}
    if name == "gkl":
        takes["gamma"] = parameters.gamma
    problem = problem_builder(LOSSES[name])(*arrays, **takes)
    found = samples(problem)
    return backend.get(problem.xp.stack([x for x in found if x is not None]))


def _class_prior(files: LogitFiles, temperature: float, backend: Backend, size: int) -> Any:
    """The mean softmax of each class over the whole file, [C, C] in float64; uniform for a class without samples.

    A sample without a softmax (NaN or +inf in the teacher's row) is left out: it spoils its own loss, not its class's.
    """
    assert files.labels is not None
    sums = np.zeros((files.classes, files.classes))
    for block in _blocks(files.samples, size):
        rows = files.rows(files.teacher, block.start, block.stop).astype(np.float64, copy=False)
        usable = rows.max(axis=-1) < np.inf
        if usable.any():
            logits, labels = backend.put(rows[usable]), backend.put(files.labels[block][usable])
            # Summed on the host: a lazy library would keep every block until the end.
            sums += backend.get(class_sums(logits, labels, files.classes, temperature=temperature))
    totals = sums.sum(axis=-1, keepdims=True)
    return np.where(totals > 0, sums / np.where(totals > 0, totals, 1.0), 1.0 / files.classes)


# --- all samples ------------------------------------------------------------------------------------------------------


def _weighted(name: str, raw: Any, parameters: Parameters) -> _Parts:
    """The losses of all samples; GKL's mean over pairs of classes is that of the whole file."""
    if name == "kl":
        return _Parts(raw[0], None, None)
    mse, ce, mass = raw
    if name == "gkl":
        # A W that is NaN belongs to a sample whose wMSE is NaN already.
        normalizer = np.mean(mass[np.isfinite(mass)] ** 2) if np.isfinite(mass).any() else 0.0
        mse = mse / (normalizer if normalizer > 0 else 1.0)
    # 0 times infinity is nothing here: a part of weight 0 is not there.
    mse = parameters.mse_weight * mse if parameters.mse_weight else np.zeros_like(mse)
    ce = parameters.ce_weight * ce if parameters.ce_weight else np.zeros_like(ce)
    return _Parts(mse + ce, mse, ce)


def _summary(parts: _Parts) -> Summary:
    x = parts.loss
    median, p90, p95, p99 = _quantiles(x)
    return Summary(
        mean=float(x.mean()),
        stderr=float(x.std(ddof=1) / np.sqrt(x.size)) if x.size > 1 else np.nan,
        median=median,
        p90=p90,
        p95=p95,
        p99=p99,
        max=float(x.max()),
        mse=None if parts.mse is None else float(parts.mse.mean()),
        ce=None if parts.ce is None else float(parts.ce.mean()),
        nonfinite=int((~np.isfinite(x)).sum()),
    )


def _quantiles(x: Any) -> list[float]:
    """Quantiles by linear interpolation; between a number and an infinity, and between two infinities, the infinity."""
    below, above = (np.quantile(x, _QUANTILES, method=method) for method in ("lower", "higher"))
    between = np.where(np.isfinite(below) & np.isfinite(above), np.quantile(x, _QUANTILES), below + above)
    return [float(q) for q in np.where(below == above, below, between)]


def _worst(labels: Any, classes: int, agrees: Any, of: dict[str, _Parts]) -> list[ClassScore]:
    count = np.bincount(labels, minlength=classes)
    seen = np.flatnonzero(count)

    def per_class(x: Any) -> Any:
        return np.bincount(labels, weights=x, minlength=classes)[seen] / count[seen]

    means = {name: per_class(parts.loss) for name, parts in of.items()}
    agreement = per_class(agrees)
    first = next(iter(means.values()))
    order = np.argsort(-np.where(np.isnan(first), np.inf, first), kind="stable")[:WORST]
    return [
        ClassScore(
            int(seen[at]), int(count[seen[at]]), float(agreement[at]), {name: float(x[at]) for name, x in means.items()}
        )
        for at in order
    ]
