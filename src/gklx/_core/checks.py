"""Checks every argument before any work, and says in one sentence what was expected and what came.

TypeError: something of the wrong kind. ValueError: the right kind with a wrong value. Values are read only where
reading is free (`Library.readable`); shapes, dtypes and devices are checked everywhere.
"""

import math
import numbers as python_numbers
from types import ModuleType
from typing import Any

from .call import Array, Arrays, Call, Formula, Number, Numbers
from .formulas import is_class, valid_mask
from .libraries import LIBRARIES, Library, dtype_name, library_of
from .ranks import ranks_of

_COMPUTED_IN = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}


def problem_of(
    formula: Formula,
    student_logits: Array,
    teacher_logits: Array,
    *,
    prior: Array | None = None,
    labels: Array | None = None,
    sample_weight: Array | None,
    where: Array | None,
    reduction: Any,
    temperature: Number,
    weight_temperature: Number | None = None,
    gamma: Number = 1.0,
    mse_weight: Number = 1.0,
    ce_weight: Number = 1.0,
) -> Call:
    """The checked problem of a call to one of the four losses."""
    named = {
        "student_logits": student_logits,
        "teacher_logits": teacher_logits,
        "prior": prior,
        "labels": labels,
        "sample_weight": sample_weight,
        "where": where,
    }
    present = {name: x for name, x in named.items() if x is not None}
    library = _one_library(present)
    ranks = ranks_of(library)
    to_read = sample_weight is not None or prior is not None
    readable = to_read and library.readable(*present.values())
    xp = library.namespace()
    dtype = _logits(xp, {"student_logits": student_logits, "teacher_logits": teacher_logits})
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"teacher_logits must have the shape of student_logits, {_shape(student_logits)}, "
            f"got {_shape(teacher_logits)}"
        )
    batch = tuple(student_logits.shape[:-1])
    if where is not None:
        _where(where, tuple(student_logits.shape))
    if sample_weight is not None:
        sample_weight = _sample_weight(xp, sample_weight, batch, dtype, readable)
    if prior is None and labels is not None:
        raise ValueError("labels need a prior to choose rows of, got labels and no prior")
    if labels is not None:
        labels = _labels(xp, labels, batch)
    if prior is not None:
        _prior_shape(xp, prior, labels, tuple(student_logits.shape))
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    temperature = _number(xp, library, dtype, "temperature", temperature, above_zero=True)
    checked = Numbers(
        temperature=temperature,
        weight_temperature=temperature
        if weight_temperature is None
        else _number(xp, library, dtype, "weight_temperature", weight_temperature, above_zero=True),
        gamma=_number(xp, library, dtype, "gamma", gamma, below_zero=False),
        mse_weight=_number(xp, library, dtype, "mse_weight", mse_weight),
        ce_weight=_number(xp, library, dtype, "ce_weight", ce_weight),
    )
    arrays = Arrays(
        student=student_logits,
        teacher=teacher_logits,
        prior=None if prior is None else library.constant(prior),
        labels=labels,
        sample_weight=None if sample_weight is None else library.constant(sample_weight),
        where=where,
    )
    if readable and prior is not None:
        _values(xp, arrays, prior)
    return Call(
        xp=xp, dtype=dtype, formula=formula, reduction=reduction, numbers=checked, arrays=arrays, ranks=ranks
    )


def labelled_logits(
    logits: Array, labels: Array, num_classes: int, sample_weight: Array | None
) -> tuple[Library, ModuleType, Any, Array, Array | None]:
    """Checks the arguments of `class_sums`: library, namespace, dtype to compute in, labels and weights to use."""
    named = {"logits": logits, "labels": labels, "sample_weight": sample_weight}
    present = {name: x for name, x in named.items() if x is not None}
    library = _one_library(present)
    readable = library.readable(*present.values())
    xp = library.namespace()
    dtype = _logits(xp, {"logits": logits})
    if logits.shape[-1] != num_classes:
        raise ValueError(f"logits must have num_classes = {num_classes} classes on the last axis, got {_shape(logits)}")
    batch = tuple(logits.shape[:-1])
    labels = _labels(xp, labels, batch)
    if sample_weight is not None:
        sample_weight = library.constant(_sample_weight(xp, sample_weight, batch, dtype, readable))
    if readable:
        _label_values(xp, labels, num_classes, (logits,), None, sample_weight)
    return library, xp, dtype, labels, sample_weight


def class_count(num_classes: Any) -> int:
    """A number of classes."""
    if isinstance(num_classes, bool) or not isinstance(num_classes, python_numbers.Integral):
        raise TypeError(f"num_classes must be an integer, got {type(num_classes).__name__}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    return int(num_classes)


def positive_number(name: str, value: Any) -> float:
    """A Python number above 0."""
    return _python_number(name, value, above_zero=True)


def computed_in(name: str, x: Array) -> str:
    """The name of the dtype in which an array's is computed."""
    given = dtype_name(x.dtype)
    if given not in _COMPUTED_IN:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {given}")
    return _COMPUTED_IN[given]


# --- kinds, shapes and devices ----------------------------------------------------------------------------------------


def _one_library(named: dict[str, Any]) -> Library:
    """The library of all the arrays, which must also lie on one device."""
    first_name, first = next(iter(named.items()))
    library = None
    for name, x in named.items():
        found = library_of(x)
        if found is None:
            known = ", ".join(each.name for each in LIBRARIES)
            raise TypeError(f"{name} must be an array of {known}, got {type(x).__module__}.{type(x).__qualname__}")
        if library is None:
            library = found
        elif found is not library:
            raise TypeError(
                f"{name} must be an array of the library of {first_name}, {library.name}, got one of {found.name}"
            )
    assert library is not None
    device = library.device(first)
    for name, x in named.items():
        other = library.device(x)
        if device is not None and other is not None and other != device:
            raise ValueError(f"{name} must be on the device of {first_name}, {device}, got {other}")
    return library


def _logits(xp: ModuleType, named: dict[str, Array]) -> Any:
    """The dtype to compute in."""
    widest = "float32"
    for name, x in named.items():
        if computed_in(name, x) == "float64":
            widest = "float64"
        if x.ndim < 1 or x.shape[-1] < 1:
            raise ValueError(f"{name} must have at least 1 class on the last axis, got shape {_shape(x)}")
    return getattr(xp, widest)


def _where(where: Array, shape: tuple[int, ...]) -> None:
    if dtype_name(where.dtype) != "bool":
        raise TypeError(f"where must be boolean, got {dtype_name(where.dtype)}")
    ends = shape[len(shape) - where.ndim :]
    if where.ndim > len(shape) or any(own not in (1, to) for own, to in zip(where.shape, ends, strict=True)):
        raise ValueError(f"where must broadcast to the logits' shape {_text(shape)}, got {_shape(where)}")


def _sample_weight(xp: ModuleType, v: Array, batch: tuple[int, ...], dtype: Any, readable: bool) -> Array:
    """The weights in the dtype to compute in."""
    kind = dtype_name(v.dtype)
    if kind not in _COMPUTED_IN and not xp.isdtype(v.dtype, ("bool", "integral")):
        raise TypeError(f"sample_weight must be floating, integer or boolean, got {kind}")
    if tuple(v.shape) != batch:
        raise ValueError(f"sample_weight must have one weight a sample, shape {_text(batch)}, got {_shape(v)}")
    v = xp.astype(v, dtype, copy=False)
    if readable and not _all_weights(xp, v):
        bad = ~((v >= 0) & (v < xp.inf))
        raise ValueError(f"sample_weight must be finite and not negative, got {_first(xp, v, bad)}")
    return v


def _labels(xp: ModuleType, labels: Array, batch: tuple[int, ...]) -> Array:
    """The labels, in a dtype that can be compared with any number of classes."""
    if not xp.isdtype(labels.dtype, "integral"):
        raise TypeError(f"labels must be integers, got {dtype_name(labels.dtype)}")
    if tuple(labels.shape) != batch:
        raise ValueError(f"labels must have one label a sample, shape {_text(batch)}, got {_shape(labels)}")
    return xp.astype(labels, xp.int32) if xp.iinfo(labels.dtype).bits < 32 else labels


def _prior_shape(xp: ModuleType, prior: Array, labels: Array | None, shape: tuple[int, ...]) -> None:
    computed_in("prior", prior)
    if labels is None and tuple(prior.shape) != shape:
        raise ValueError(f"prior without labels must have the logits' shape {_text(shape)}, got {_shape(prior)}")
    if labels is not None and tuple(prior.shape) != (shape[-1], shape[-1]):
        raise ValueError(f"prior with labels must have shape {_text((shape[-1], shape[-1]))}, got {_shape(prior)}")


# --- numbers ----------------------------------------------------------------------------------------------------------


def _number(
    xp: ModuleType,
    library: Library,
    dtype: Any,
    name: str,
    value: Any,
    *,
    above_zero: bool = False,
    below_zero: bool = True,
) -> Number:
    if not isinstance(value, float) and library.number(value):
        if not xp.isdtype(value.dtype, ("real floating", "integral")):
            raise TypeError(f"{name} must be a number, got an array of {dtype_name(value.dtype)}")
        if library.readable(value):
            _python_number(name, float(value), above_zero=above_zero, below_zero=below_zero)
        return xp.astype(value, dtype)
    return _python_number(name, value, above_zero=above_zero, below_zero=below_zero)


def _python_number(name: str, value: Any, *, above_zero: bool = False, below_zero: bool = True) -> float:
    if not isinstance(value, float) and (isinstance(value, bool) or not isinstance(value, python_numbers.Real)):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__}")
    number = float(value)
    # By comparisons, which a compiler follows for a number that it keeps open.
    if not -math.inf < number < math.inf or (above_zero and number <= 0) or (not below_zero and number < 0):
        kind = "above 0" if above_zero else "finite" if below_zero else "at least 0"
        raise ValueError(f"{name} must be {kind}, got {value!r}")
    return number


# --- values, where reading them is free -------------------------------------------------------------------------------


def _values(xp: ModuleType, arrays: Arrays, prior: Array) -> None:
    """Labels that name a class and priors that are weights, in every sample that counts."""
    logits = (arrays.student, arrays.teacher)
    if not _all_weights(xp, prior):
        bad = ~((prior >= 0) & (prior < xp.inf))
        if arrays.labels is None:
            bad = bad & valid_mask(xp, logits, arrays.where, arrays.sample_weight)
        if bool(xp.any(bad)):
            raise ValueError(f"prior must be finite and not negative, got {_first(xp, prior, bad)}")
    if arrays.labels is not None:
        _label_values(xp, arrays.labels, arrays.student.shape[-1], logits, arrays.where, arrays.sample_weight)


def _all_weights(xp: ModuleType, x: Array) -> bool:
    """Whether every entry is finite and not negative, by its extremes, which are NaN where an entry is.

    A table of classes may be larger than the batch: two sums' worth of reading, and no array written.
    """
    return math.prod(x.shape) == 0 or (bool(xp.min(x) >= 0) and bool(xp.max(x) < math.inf))


def _label_values(
    xp: ModuleType,
    labels: Array,
    classes: int,
    logits: tuple[Array, ...],
    where: Array | None,
    sample_weight: Array | None,
) -> None:
    bad = ~is_class(labels, classes)
    if bool(xp.any(bad)):
        bad = bad & xp.any(valid_mask(xp, logits, where, sample_weight), axis=-1)
        if bool(xp.any(bad)):
            raise ValueError(f"labels must lie in [0, {classes}), got {_first(xp, labels, bad)}")


def _first(xp: ModuleType, x: Array, which: Array) -> str:
    """The first element chosen, and its place, as text."""
    flat = xp.reshape(xp.astype(which, xp.int32), (-1,))
    at = int(xp.argmax(flat))
    index: list[int] = []
    rest = at
    for size in reversed(x.shape):
        rest, here = divmod(rest, size)
        index.insert(0, here)
    value = xp.reshape(x, (-1,))[at]
    number = float(value) if dtype_name(x.dtype) in _COMPUTED_IN else int(value)
    return f"{number} at index {_text(tuple(index))}"


def _shape(x: Array) -> str:
    return _text(tuple(x.shape))


def _text(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"
