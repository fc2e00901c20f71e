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
DTYPES = tuple(_EPS)


class Distance(NamedTuple):
    """The largest distance of two arrays, and where it is."""

    ulps: float
    place: tuple[int, ...]
    actual: Any
    expected: Any


def units(expected: Any, dtype: str, per: Per, least: float = 0.0) -> Any:
    """The unit of each entry: of the size that `per` chooses, or of `least` where that is larger."""
    size = np.where(np.isfinite(expected), np.abs(expected), 0.0)
    if per != "entry" and size.ndim:
        size = size.max(axis=-1 if per == "row" else None, keepdims=True, initial=0.0)
    size = np.maximum(size, max(least, _SMALLEST[dtype]))
    return np.exp2(np.floor(np.log2(size))) * _EPS[dtype]


def farthest(actual: Any, expected: Any, unit: Any, dtype: str) -> Distance:
    """The entries of two NumPy arrays of one shape that lie farthest apart."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    if expected.size == 0:
        return Distance(0.0, (), None, None)
    if expected.dtype.kind != "f":
        apart = np.where(actual == expected, 0.0, math.inf)
    else:
        finite = np.isfinite(actual) & np.isfinite(expected)
        wide = np.result_type(actual, expected, np.float64)
        with np.errstate(all="ignore"):
            error = _normal(actual.astype(wide), dtype) - _normal(expected.astype(wide), dtype)
            apart = np.abs(error) / unit
        same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
        apart = np.where(finite, apart, np.where(same, 0.0, math.inf))
    index = tuple(int(at) for at in np.unravel_index(np.argmax(apart), apart.shape))
    return Distance(float(apart[index]), index, actual[index], expected[index])


def _normal(x: Any, dtype: str) -> Any:
    """Moves numbers towards 0 by the smallest normal one, since libraries may flush those below it; JAX does on a CPU.

    Both sides move by the same amount, so other differences do not change. No library flushes float16.
    """
    edge = 0.0 if dtype == "float16" else _SMALLEST[dtype]
    return np.sign(x) * np.maximum(np.abs(x) - edge, 0.0)
