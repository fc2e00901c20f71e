"""How far results lie apart, in units in the last place.

The unit is that of each expected entry, of the largest finite entry of its row (the last axis), or of the largest of
the whole array. Numbers below the smallest normal one count as that one. Infinities and NaN must be the
same on both sides; where they are not, the distance is infinite.
"""

import math
from typing import Any, Literal, NamedTuple

import numpy as np

Per = Literal["entry", "row", "array"]

_EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
_SMALLEST = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}
_DIGITS = {"float16": ".5g", "bfloat16": ".4g", "float32": ".9g", "float64": ".17g"}
DTYPES = tuple(_EPS)
HALVES = ("float16", "bfloat16")


class Distance(NamedTuple):
    """The largest distance of two arrays, and where it is."""

    ulps: float
    place: tuple[int, ...]
    actual: Any
    expected: Any


class Expected(NamedTuple):
    """An array that a result must be, to within a bound."""

    name: str
    """What a sentence calls the result."""
    array: Any
    dtype: str
    unit: Any
    bound: float
    what: str = ""
    """The quantity, as "value" or "gradient"."""
    source: str = "expected"
    """What a sentence calls the numbers of this array."""


def units(expected: Any, dtype: str, per: Per, least: Any = 0.0) -> Any:
    """The unit of each entry: of the size that `per` chooses, or of `least` where that is larger."""
    size = np.where(np.isfinite(expected), np.abs(expected), 0.0)
    if per != "entry" and size.ndim:
        size = size.max(axis=-1 if per == "row" else None, keepdims=True, initial=0.0)
    size = np.maximum(size, np.maximum(least, _SMALLEST[dtype]))
    return np.exp2(np.floor(np.log2(size))) * _EPS[dtype]


def farthest(actual: Any, expected: Any, unit: Any, dtype: str, *, may_flush: bool = True) -> Distance:
    """The entries of two NumPy arrays of one shape that lie farthest apart.

    Libraries may flush numbers below the smallest normal one, as JAX does on a CPU; no library flushes float16. So both
    sides are moved towards 0 by that number, which leaves other differences as they are.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    if expected.size == 0:
        return Distance(0.0, (), None, None)
    if expected.dtype.kind != "f":
        apart = np.where(actual == expected, 0.0, math.inf)
    else:
        finite = np.isfinite(actual) & np.isfinite(expected)
        wide = np.result_type(actual, expected, np.float64)
        with np.errstate(all="ignore"):
            edge = _SMALLEST[dtype] if may_flush and dtype != "float16" else 0.0
            one, other = (np.sign(x) * np.maximum(np.abs(x.astype(wide)) - edge, 0.0) for x in (actual, expected))
            apart = np.abs(one - other) / unit
        same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
        apart = np.where(finite, apart, np.where(same, 0.0, math.inf))
    index = tuple(int(at) for at in np.unravel_index(np.argmax(apart), apart.shape))
    return Distance(float(apart[index]), index, actual[index], expected[index])


def compared(actual: Any, expected: Expected, *, may_flush: bool = True) -> tuple[float, str]:
    """The distance of an array and, where it is above the bound, a sentence about the entries farthest apart."""
    distance = farthest(actual, expected.array, expected.unit, expected.dtype, may_flush=may_flush)
    if distance.ulps <= expected.bound:
        return distance.ulps, ""
    digits, element = _DIGITS.get(expected.dtype, ""), f" element {list(distance.place)}" if distance.place else ""
    apart = f"{distance.ulps:.4g} ulp off" if math.isfinite(distance.ulps) else "not the same"
    values = f"{distance.actual:{digits}}, {expected.source} {distance.expected:{digits}}"
    return distance.ulps, f"{expected.name}{element} is {values}, {apart}, allowed {expected.bound:g}"
