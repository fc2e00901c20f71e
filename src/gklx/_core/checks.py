"""Checks every argument before any work, and says in one sentence what was expected and what came.

TypeError: something of the wrong kind. ValueError: the right kind with a wrong value. Values are read only where
reading is free (`Library.readable`); shapes, dtypes and devices are checked everywhere.
"""

import builtins
import math
import numbers as python_numbers
import operator
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from .call import Array, Arrays, Call, Formula, Number, Numbers, Reduction
from .formulas import is_class, valid_mask
from .libraries import LIBRARIES, Library, device_like, dtype_name, library_of, to_numpy
from .ranks import ranks_of

_COMPUTED_IN = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}

# The smallest normal number and the largest number. A processor may take smaller ones for 0.
_RANGES = {name: (float(np.finfo(name).tiny), float(np.finfo(name).max)) for name in ("float32", "float64")}

# Between these a Python number is right for every hyper-parameter and dtype: nearly all are.
_SMALLEST, _LARGEST = _RANGES["float32"]

_NOT_GIVEN: Any = object()


def call_of(
    prior_is_right: Callable[[Library, Array, Array | None], bool | None],
    formula: Formula,
    student_logits: Array,
    teacher_logits: Array,
    *,
    prior: Array | None = None,
    labels: Array | None = None,
    sample_weight: Array | None,
    where: Array | None,
    reduction: Reduction,
    temperature: Number,
    weight_temperature: Number = _NOT_GIVEN,
    gamma: Number = 1.0,
    mse_weight: Number = 1.0,
    ce_weight: Number = 1.0,
) -> Call:
    """The checked call of one of the four losses.

    `prior_is_right` tells fast whether all labels name classes, and the prior's rows that are used are finite and not
    negative; None where it cannot.
    """
    named = {
        "student_logits": student_logits,
        "teacher_logits": teacher_logits,
        "prior": prior,
        "labels": labels,
        "sample_weight": sample_weight,
        "where": where,
    }
    present = {name: x for name, x in named.items() if x is not None or name in ("student_logits", "teacher_logits")}
    library = one_library(present)
    ranks = ranks_of(library)
    to_read = sample_weight is not None or prior is not None
    readable = to_read and library.readable(*present.values())
    xp = library.namespace()
    dtype = _logits(xp, {"student_logits": student_logits, "teacher_logits": teacher_logits})
    shape = tuple(student_logits.shape)
    if not _fits(tuple(teacher_logits.shape), shape):
        raise ValueError(
            f"teacher_logits must have the shape of student_logits, {_shape(student_logits)}, "
            f"got {_shape(teacher_logits)}"
        )
    batch = shape[:-1]
    if where is not None:
        _where(where, shape)
    if sample_weight is not None:
        sample_weight = _sample_weight(xp, sample_weight, batch, dtype, readable)
    if prior is None and labels is not None:
        raise ValueError("labels need a prior to choose rows of, got labels and no prior")
    given_labels = labels
    if labels is not None:
        labels = _labels(xp, library, labels, batch)
    if prior is not None:
        _prior_shape(xp, prior, labels, shape)
    if not isinstance(reduction, str) or reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    computed = "float64" if dtype == xp.float64 else "float32"
    temperature = _number(xp, library, dtype, computed, "temperature", temperature, "above 0")
    checked = Numbers(
        temperature=temperature,
        weight_temperature=temperature
        if weight_temperature is _NOT_GIVEN
        else _number(xp, library, dtype, computed, "weight_temperature", weight_temperature, "above 0"),
        gamma=_number(xp, library, dtype, computed, "gamma", gamma, "at least 0"),
        mse_weight=_number(xp, library, dtype, computed, "mse_weight", mse_weight),
        ce_weight=_number(xp, library, dtype, computed, "ce_weight", ce_weight),
    )
    prior = None if prior is None else library.constant(prior)
    sample_weight = None if sample_weight is None else library.constant(sample_weight)
    arrays = Arrays(student_logits, teacher_logits, prior, labels, sample_weight, where)
    if readable and prior is not None:
        too_large = _too_large(xp, prior, dtype)
        if too_large < math.inf or not prior_is_right(library, prior, labels):
            if labels is not None:
                _label_values(xp, labels, given_labels, shape[-1], arrays[:2], where, sample_weight)
            _prior_values(xp, arrays, too_large)
    return Call(library, xp, dtype, formula, reduction, checked, arrays, ranks)


def labelled_logits(
    logits: Array, labels: Array, num_classes: int, sample_weight: Array | None
) -> tuple[Library, ModuleType, Any, Array, Array | None]:
    """Checks the arguments of `class_sums`: library, namespace, dtype to compute in, labels and weights to use."""
    named = {"logits": logits, "labels": labels, "sample_weight": sample_weight}
    present = {name: x for name, x in named.items() if x is not None or name != "sample_weight"}
    library = one_library(present)
    readable = library.readable(*present.values())
    xp = library.namespace()
    dtype = _logits(xp, {"logits": logits})
    if logits.shape[-1] != num_classes:
        raise ValueError(f"logits must have num_classes = {num_classes} classes on the last axis, got {_shape(logits)}")
    batch = tuple(logits.shape[:-1])
    given_labels, labels = labels, _labels(xp, library, labels, batch)
    if sample_weight is not None:
        sample_weight = library.constant(_sample_weight(xp, sample_weight, batch, dtype, readable))
    if readable:
        _label_values(xp, labels, given_labels, num_classes, (logits,), None, sample_weight)
    return library, xp, dtype, labels, sample_weight


def class_count(num_classes: Any) -> int:
    """A number of classes."""
    count = whole_number(num_classes)
    if count is None:
        raise TypeError(f"num_classes must be an integer, got {type_name(num_classes)}")
    if count < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    return count


def whole_number(value: Any) -> int | None:
    """Python's integer of anything that is one: an int, a NumPy integer, a 0-d array of integers; None otherwise.

    A Boolean is none: where it is given for a number something was mixed up.
    """
    if isinstance(value, bool) or dtype_name(getattr(value, "dtype", None)) == "bool":
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def truth(name: str, value: Any) -> bool:
    """Python's bool of one of Python's or NumPy's."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be a bool, got {type_name(value)}")
    return bool(value)


def positive_number(name: str, value: Any, computed: str | None = None) -> float:
    """A Python number above 0, and within the range of the dtype computed in, where that is known already."""
    return _python_number(name, value, computed, "above 0")


def known_library(name: str, x: Any) -> Library:
    """The library of an array; TypeError where gklx knows none, or cannot take an array of that kind."""
    library = library_of(x)
    if library is None:
        raise TypeError(f"{name} must be an array of a known library, got {type_name(x)}")
    _dense(library, name, x)
    return library


def computed_in(name: str, x: Array) -> str:
    """The name of the dtype in which an array's is computed."""
    given = dtype_name(x.dtype)
    if given not in _COMPUTED_IN:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {given}")
    return _COMPUTED_IN[given]


# --- kinds, shapes and devices ----------------------------------------------------------------------------------------


def one_library(named: dict[str, Any]) -> Library:
    """The library of all the arrays, which must also lie on one device."""
    first_name = there = next(iter(named))
    library = device = None
    for name, x in named.items():
        found = library_of(x)
        if found is None:
            known = ", ".join(each.name for each in LIBRARIES)
            came = "None" if x is None else f"{type(x).__module__}.{type(x).__qualname__}"
            raise TypeError(f"{name} must be an array of {known}, got {came}")
        _dense(found, name, x)
        if library is None:
            library, device = found, device_like(found, x)
            continue
        if found is not library:
            raise TypeError(
                f"{name} must be an array of the library of {first_name}, {library.name}, got one of {found.name}"
            )
        other = device_like(library, x)
        if device is None:
            there, device = name, other
        elif other is not None and other != device:
            raise ValueError(f"{name} must be on the device of {there}, {device}, got {other}")
    assert library is not None
    return library


def _dense(library: Library, name: str, x: Array) -> None:
    kind = library.unsupported(x)
    if kind is not None:
        raise TypeError(f"{name} must be a dense array without a mask of its own, got {kind}")


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether two shapes are the same, as far as anybody knows: Dask has NaN for a size that it has yet to compute."""
    return shape == expected or (
        len(shape) == len(expected) and all(a == b or (a != a and b != b) for a, b in zip(shape, expected, strict=True))
    )


def _logits(xp: ModuleType, named: dict[str, Array]) -> Any:
    """The dtype to compute in."""
    widest = "float32"
    for name, x in named.items():
        if computed_in(name, x) == "float64":
            widest = "float64"
        if x.ndim < 1 or not x.shape[-1] >= 1:  # NaN, which a Dask array may have there, is no number of classes
            raise ValueError(f"{name} must have at least 1 class on the last axis, got shape {_shape(x)}")
    return getattr(xp, widest)


def _where(where: Array, shape: tuple[int, ...]) -> None:
    if dtype_name(where.dtype) != "bool":
        raise TypeError(f"where must be boolean, got {dtype_name(where.dtype)}")
    ends = shape[len(shape) - where.ndim :]
    if where.ndim > len(shape) or not all(
        own == 1 or _fits((own,), (to,)) for own, to in zip(where.shape, ends, strict=True)
    ):
        raise ValueError(f"where must broadcast to the logits' shape {_text(shape)}, got {_shape(where)}")


def _sample_weight(xp: ModuleType, v: Array, batch: tuple[int, ...], dtype: Any, readable: bool) -> Array:
    """The weights in the dtype to compute in."""
    kind = dtype_name(v.dtype)
    if kind not in _COMPUTED_IN and not xp.isdtype(v.dtype, ("bool", "integral")):
        raise TypeError(f"sample_weight must be floating, integer or boolean, got {kind}")
    if not _fits(tuple(v.shape), batch):
        raise ValueError(f"sample_weight must have one weight a sample, shape {_text(batch)}, got {_shape(v)}")
    too_large = _too_large(xp, v, dtype)
    if too_large == math.inf:
        v = xp.astype(v, dtype, copy=False)
    if readable and not _all_weights(xp, v, too_large):
        bad = ~((v >= 0) & (v < too_large))
        raise ValueError(f"sample_weight must be finite and not negative, got {_first(v, bad)}")
    return xp.astype(v, dtype, copy=False)


def _labels(xp: ModuleType, library: Library, labels: Array, batch: tuple[int, ...]) -> Array:
    """The labels, in a dtype that can be compared with any number of classes.

    PyTorch neither compares uint32 and uint64 nor takes rows by them. In int64 a label of 2**63 or more is negative,
    and so names no class, as before.
    """
    if not xp.isdtype(labels.dtype, "integral"):
        raise TypeError(f"labels must be integers, got {dtype_name(labels.dtype)}")
    if not _fits(tuple(labels.shape), batch):
        raise ValueError(f"labels must have one label a sample, shape {_text(batch)}, got {_shape(labels)}")
    if xp.iinfo(labels.dtype).bits < 32:
        return xp.astype(labels, xp.int32)
    unsigned = library.backend == "torch" and xp.isdtype(labels.dtype, "unsigned integer")
    return xp.astype(labels, xp.int64) if unsigned else labels


def _prior_shape(xp: ModuleType, prior: Array, labels: Array | None, shape: tuple[int, ...]) -> None:
    computed_in("prior", prior)
    if labels is None and not _fits(tuple(prior.shape), shape):
        raise ValueError(f"prior without labels must have the logits' shape {_text(shape)}, got {_shape(prior)}")
    if labels is not None and not _fits(tuple(prior.shape), (shape[-1], shape[-1])):
        raise ValueError(f"prior with labels must have shape {_text((shape[-1], shape[-1]))}, got {_shape(prior)}")


# --- numbers ----------------------------------------------------------------------------------------------------------


def _number(
    xp: ModuleType,
    library: Library,
    dtype: Any,
    computed: str,
    name: str,
    value: Any,
    allowed: str = "finite",
) -> Number:
    if type(value) is float and _SMALLEST <= value <= _LARGEST:
        return value
    if not isinstance(value, float) and library.number(value):
        if not xp.isdtype(value.dtype, ("real floating", "integral")):
            raise TypeError(f"{name} must be a number, got an array of {dtype_name(value.dtype)}")
        if library.readable(value):
            _python_number(name, float(value), computed, allowed)
            return xp.astype(value, dtype)
        value = xp.astype(value, dtype)  # traced: where no error can be raised, a wrong number is NaN
        least = -math.inf if allowed == "finite" else 0.0
        right = xp.isfinite(value) & ((value > least) if allowed == "above 0" else (value >= least))
        return xp.where(right, value, xp.nan)
    return _python_number(name, value, computed, allowed)


def _python_number(name: str, value: Any, computed: str | None = None, allowed: str = "finite") -> float:
    """A Python float of a number, within the range of the dtype computed in, if its name is given."""
    number = value if type(value) is float else _as_float(name, value)
    # By comparisons, which a compiler follows for a number that it keeps open.
    excluded = (allowed == "above 0" and number <= 0) or (allowed == "at least 0" and number < 0)
    if excluded or not -math.inf < number < math.inf:
        kind = "finite" if number > 0 else allowed
        raise ValueError(f"{name} must be {kind}, got {_shown(value, number)}")
    if computed is not None:
        smallest, largest = _RANGES[computed]
        if allowed == "above 0" and number < smallest:
            raise ValueError(
                f"{name} must be at least {smallest:.3g}, the smallest normal number of {computed}, "
                f"got {_shown(value, number)}"
            )
        if not -largest <= number <= largest:
            raise ValueError(f"{name} must be finite in {computed}, the dtype computed in, got {_shown(value, number)}")
    return number


def _shown(value: Any, number: float) -> str:
    """A number as it was given, but for one of so many digits that nobody reads them."""
    return repr(value) if abs(number) < 1e20 else repr(number)


def _as_float(name: str, value: Any) -> float:
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, bool) or not isinstance(value, python_numbers.Real):
        raise TypeError(f"{name} must be a Python number, got {type_name(value)}")
    try:
        return float(value)
    except OverflowError:  # an integer or a fraction, whose digits may be more than Python prints
        kind = f"{'a negative' if value < 0 else 'a'} number of type {type_name(value)}"
        raise ValueError(f"{name} must be finite, got {kind} beyond the largest float") from None


# --- values, where reading them is free -------------------------------------------------------------------------------


def _too_large(xp: ModuleType, x: Array, dtype: Any) -> float:
    """The smallest number of an array's dtype that is infinite in the dtype computed in."""
    narrows = dtype != xp.float64 and dtype_name(x.dtype) == "float64"
    return 2.0**128 - 2.0**103 if narrows else math.inf


def _prior_values(xp: ModuleType, arrays: Arrays, too_large: float) -> None:
    """Priors that are weights in every class and sample that counts. Other rows of a table may hold anything."""
    prior, labels, shape = arrays.prior, arrays.labels, arrays.student.shape
    assert prior is not None
    used, rows = prior, None
    if labels is not None:
        if math.prod(labels.shape) >= prior.shape[0] and _all_weights(xp, prior, too_large):
            return  # a table that has no more rows than there are samples is read faster than chosen from
        rows = xp.where(is_class(labels, prior.shape[0]), labels, xp.zeros_like(labels))
        used = xp.reshape(xp.take(prior, xp.astype(xp.reshape(rows, (-1,)), xp.int32), axis=0), shape)
    if _all_weights(xp, used, too_large):
        return
    bad = ~((used >= 0) & (used < too_large))
    bad = bad & valid_mask(xp, (arrays.student, arrays.teacher), arrays.where, arrays.sample_weight)
    if bool(xp.any(bad)):
        raise ValueError(f"prior must be finite and not negative, got {_first(used, bad, rows)}")


def _all_weights(xp: ModuleType, x: Array, too_large: float) -> bool:
    """Whether every entry is neither negative nor too large nor NaN, which XLA leaves out of a maximum on a CPU."""
    return math.prod(x.shape) == 0 or (bool(xp.all(x >= 0)) and bool(xp.max(x) < too_large))


def _label_values(
    xp: ModuleType,
    labels: Array,
    given: Array,
    classes: int,
    logits: tuple[Array, ...],
    where: Array | None,
    sample_weight: Array | None,
) -> None:
    bad = ~is_class(labels, classes)
    if bool(xp.any(bad)):
        bad = bad & xp.any(valid_mask(xp, logits, where, sample_weight), axis=-1)
        if bool(xp.any(bad)):
            # As it was given: a uint64 label may be another number in the dtype that is compared.
            raise ValueError(f"labels must lie in [0, {classes}), got {_first(given, bad)}")


def _first(x: Array, which: Array, rows: Array | None = None) -> str:
    """The first element chosen, and its place, as text; `rows` are those of a table that the samples in x are of."""
    index = np.argwhere(to_numpy(which))[0].tolist()
    value = x[tuple(index)]
    if rows is not None:
        index = [int(rows[tuple(index[:-1])]), index[-1]]
    # By way of NumPy, since PyTorch makes no int of a uint64 beyond int64.
    number = float(value) if dtype_name(x.dtype) in _COMPUTED_IN else int(to_numpy(value))
    return f"{number} at index {_text(tuple(index))}"


def type_name(value: Any) -> str:
    """The name of a value's type, with its module's where the name alone is a builtin type's: NumPy has a bool, too."""
    if value is None:
        return "NoneType"
    kind = type(value)
    taken = kind.__module__ != "builtins" and hasattr(builtins, kind.__name__)
    return f"{kind.__module__}.{kind.__name__}" if taken else kind.__name__


def _shape(x: Array) -> str:
    return _text(tuple(x.shape))


def _text(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"
