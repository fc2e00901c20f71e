"""What is computed of each sample, on whatever library and device: the numbers from which every statistic follows.

They are raw: not yet weighted, nor divided by GKL's normaliser, which needs all samples. So they do not depend on what
else is in the block, in the shard or in the order.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .._core.call import Array
from .._core.libraries import Library, device_like, library_of, to_numpy
from .._run.sample_losses import sample_losses
from ..losses import call_builder, dkl, gkl, ikl, kl
from ..prior import class_sums
from .backend import Backend

LOSSES: dict[str, Callable[..., Array]] = {"kl": kl, "dkl": dkl, "ikl": ikl, "gkl": gkl}
REVERSE = "reverse_kl"
"""KL with student and teacher exchanged: it may be asked for beside the losses."""
CHOICES = (*LOSSES, REVERSE)
WITHOUT_PARTS = ("kl", REVERSE)

SKIPPED, SCORED, UNDEFINED, MASKED = range(4)
"""A sample's state: every class is -inf; fine; NaN or +inf among its logits, or no finite one; not to be counted."""

SURPRISALS = ("student_surprisal", "teacher_surprisal")
"""The fields of -log q(target) and -log p(target)."""

_DIGIT = 2**16
_OVERLAP_BYTES = 2**21
_GROUP = 128


class Parameters(NamedTuple):
    """The hyper-parameters; each loss takes those it has."""

    temperature: float = 1.0
    weight_temperature: float = 1.0
    gamma: float = 1.0
    mse_weight: float = 1.0
    ce_weight: float = 1.0


class RowsOfBlock(NamedTuple):
    """Consecutive samples, on the host or on the device."""

    student: Any
    """[n, C]."""
    teacher: Any
    labels: Any | None
    """[n], int64 in [0, C)."""
    targets: Any | None = None
    """The true class of each sample, likewise."""


def checked(names: tuple[str, ...], parameters: Parameters) -> None:
    """TypeError or ValueError, in the losses' own words, for hyper-parameters that they do not take."""
    tiny = np.zeros((1, 1), dtype=np.float32)
    for name in names:
        weights = (
            {} if name in WITHOUT_PARTS else {key: getattr(parameters, key) for key in ("mse_weight", "ce_weight")}
        )
        call_builder(LOSSES.get(name, kl))(tiny, tiny, **_takes(name, parameters), **weights)


def record_dtype(
    names: tuple[str, ...], computed_in: Any, *, targeted: bool = False, top_k: tuple[int, ...] = ()
) -> np.dtype[Any]:
    """The fields of one sample's record, `label` -1 where there is none."""
    real = np.dtype(computed_in).newbyteorder("<").str
    fields = [*_reals(names), "student_confidence", "teacher_confidence", *(SURPRISALS if targeted else ())]
    whole = [(f"top_{k}", "<i4") for k in top_k]
    whole += [("student_class", "<i4"), ("teacher_class", "<i4"), ("label", "<i4"), ("state", "u1")]
    return np.dtype([(field, real) for field in fields] + whole)


def scored(
    place: Backend,
    names: tuple[str, ...],
    parameters: Parameters,
    rows: RowsOfBlock,
    prior: Array | None,
    top_k: tuple[int, ...] = (),
) -> Any:
    """The records of some rows; `prior` [C, C] may be on the device already, and `top_k` is in ascending order."""
    of_prior = (None, None) if prior is None else (place.put(prior), place.put(rows.labels))
    targets = None if rows.targets is None else place.put(rows.targets)
    given = (place.put(rows.student), place.put(rows.teacher), *of_prior, targets)
    found = place.get(place.compiled(_raw, names, parameters, place.kernel_threads, top_k)(*given))
    targeted = targets is not None
    records = np.zeros(found.shape[-1], dtype=record_dtype(names, found.dtype, targeted=targeted, top_k=top_k))
    fields = [*_reals(names), *(SURPRISALS if targeted else ()), "student_confidence", "teacher_confidence", "state"]
    *values, student_high, student_low, teacher_high, teacher_low = found[: len(fields) + 4]
    for field, column in zip(fields, values, strict=True):
        records[field] = column
    for field, high, low in (
        ("student_class", student_high, student_low),
        ("teacher_class", teacher_high, teacher_low),
    ):
        records[field] = high.astype(np.int64) * _DIGIT + low.astype(np.int64)
    records["label"] = -1 if rows.labels is None else rows.labels
    counts = found[len(fields) + 4 :]  # which only the row kernel has found by now
    if top_k and not len(counts):
        counts = overlaps(to_numpy(rows.student), to_numpy(rows.teacher), top_k)
    for k, count in zip(top_k, counts, strict=True):
        records[f"top_{k}"] = count
    return records


def prior_sums(place: Backend, temperature: float, teacher: Any, labels: Any, counted: Any = None) -> Any:
    """`class_sums` of some rows in float64, [C, C] on the host: logits [n, C], labels [n].

    A sample without a softmax (NaN or +inf in the teacher's row) is left out: it spoils its own loss, not its class's.
    So is one that is not `counted`, [n] booleans.
    """
    t = place.put(teacher)
    xp = _library(t).namespace()
    t = xp.astype(t, xp.float64)
    usable = xp.all(t < xp.inf, axis=-1)
    if counted is not None:
        usable = usable & place.put(counted)
    return place.get(class_sums(t, place.put(labels), t.shape[-1], temperature=temperature, sample_weight=usable))


def _reals(names: tuple[str, ...]) -> list[str]:
    """The fields that hold a loss's raw parts: CE is common to the three that have one."""
    found = [name for name in WITHOUT_PARTS if name in names]
    with_parts = [name for name in names if name not in WITHOUT_PARTS]
    found += ["ce"] if with_parts else []
    found += [f"{name}_mse" for name in with_parts]
    return found + (["gkl_mass"] if "gkl" in names else [])


def _raw(
    names: tuple[str, ...],
    parameters: Parameters,
    threads: int,
    top_k: tuple[int, ...],
    s: Array,
    t: Array,
    prior: Array = None,
    labels: Array = None,
    targets: Array = None,
) -> Array:
    """All numbers of some samples as one array, hence one transfer.

    float32 holds whole numbers to 16 million, and there may be more classes: their numbers are two digits each.
    """
    # KL comes at no cost beside the numbers that every run needs.
    forward = [name for name in names if name != REVERSE] or ["kl"]
    weights: dict[str, dict[str, Array]] = {name: {} for name in forward}
    if prior is not None:
        # A row a sample: cheaper to check than the whole table.
        own = _library(s).namespace().take(prior, labels, axis=0)
        weights |= {name: {"prior": own} for name in forward if name in ("ikl", "gkl")}
    problems = {}
    for name in forward:
        problems[name] = call_builder(LOSSES[name])(s, t, **_takes(name, parameters), **weights[name])
    first = next(iter(problems.values()))
    reverse = REVERSE in names
    xp, found = first.xp, sample_losses(list(problems.values()), threads, reverse=reverse, top_k=top_k)
    mse, mass = (dict(zip(forward, of_names, strict=True)) for of_names in (found.mse, found.mass))
    columns = [found.kl] if "kl" in names else []
    if reverse and found.reverse_kl is not None:
        columns.append(found.reverse_kl)
    elif reverse:
        columns.append(sample_losses([call_builder(kl)(t, s, **_takes("kl", parameters))], threads).kl)
    with_parts = [name for name in names if name not in WITHOUT_PARTS]
    columns += [found.ce] if with_parts else []
    columns += [mse[name] for name in with_parts]
    columns += [mass["gkl"]] if "gkl" in names else []
    if targets is not None:
        for x, peak, top in (
            (s, found.student_peak, found.student_class),
            (t, found.teacher_peak, found.teacher_class),
        ):
            below = xp.astype(_at(xp, x, top), first.dtype) - xp.astype(_at(xp, x, targets), first.dtype)
            columns.append(below / parameters.temperature - xp.log(peak))
    columns += [found.student_peak, found.teacher_peak]
    columns.append(xp.astype(found.has_valid, first.dtype) + xp.astype(found.has_valid & found.undefined, first.dtype))
    for top in (found.student_class, found.teacher_class):
        columns += [xp.astype(digit, first.dtype) for digit in (top // _DIGIT, top % _DIGIT)]
    if found.overlaps is not None:
        columns += [xp.astype(found.overlaps[:, at], first.dtype) for at in range(len(top_k))]
    return xp.stack(columns)


def _at(xp: Any, x: Array, classes: Array) -> Array:
    """x[i, classes[i]] of each row."""
    rows = xp.arange(x.shape[0], dtype=xp.int64, device=device_like(_library(x), x))
    return xp.take(xp.reshape(x, (-1,)), rows * x.shape[-1] + xp.astype(classes, xp.int64), axis=0)


def _library(x: Array) -> Library:
    library = library_of(x)
    assert library is not None
    return library


def _takes(name: str, parameters: Parameters) -> dict[str, Any]:
    takes = {"temperature": parameters.temperature}
    if name in ("ikl", "gkl"):
        takes["weight_temperature"] = parameters.weight_temperature
    if name == "gkl":
        takes["gamma"] = parameters.gamma
    return takes


# --- overlaps of the largest classes ----------------------------------------------------------------------------------


def overlaps(student: Any, teacher: Any, top_k: tuple[int, ...]) -> list[Any]:
    """For each k the number of classes that are among the k largest of both, [n]; of equal logits the first counts."""
    classes = teacher.shape[-1]
    most = min(max(top_k), classes)
    found = [np.zeros(len(teacher), np.int32) for _ in top_k]
    rows = max(1, _OVERLAP_BYTES // (classes * teacher.itemsize))
    for start in range(0, len(teacher), rows):
        window = slice(start, start + rows)
        s, t = (_largest(x[window], most) for x in (student, teacher))
        for counts, k in zip(found, top_k, strict=True):
            among = np.zeros((len(s), classes), np.bool_)
            np.put_along_axis(among, s[:, :k], True, axis=-1)
            counts[window] = np.take_along_axis(among, t[:, :k], axis=-1).sum(axis=-1)
    return found


def _largest(x: Any, k: int) -> Any:
    """The classes of the k largest logits of each row, the largest first and the lower class first of equal ones.

    They lie in the k groups with the largest maxima, so that no more than these are sorted.
    """
    n, classes = x.shape
    if x.dtype.itemsize == 2:
        x = x.astype(np.float32)
    groups, rest = divmod(classes, _GROUP)
    if groups < 2 * k:
        return np.argsort(-x, axis=-1, kind="stable")[:, :k]
    maxima = x[:, : groups * _GROUP].reshape(n, groups, _GROUP).max(axis=-1)
    chosen = np.sort(np.argsort(-maxima, axis=-1, kind="stable")[:, :k], axis=-1)  # the lower group first of equal ones
    members = (chosen[:, :, None] * _GROUP + np.arange(_GROUP)).reshape(n, -1)
    if rest:
        tail = np.broadcast_to(np.arange(groups * _GROUP, classes), (n, rest))
        members = np.concatenate([members, tail], axis=-1)
    order = np.argsort(-np.take_along_axis(x, members, axis=-1), axis=-1, kind="stable")[:, :k]
    return np.take_along_axis(members, order, axis=-1)
