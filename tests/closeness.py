"""The one comparison of the tests: library, dtype, device, shape, then values in units in the last place."""

import array_api_compat
import numpy as np

from gklx._core.libraries import dtype_name

_EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
_SMALLEST = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}  # normal


def assert_close(actual, expected, backend, dtype, *, ulps, like=None, by="row", scale=0.0):
    """`actual`, of the backend and dtype, is `expected` (NumPy float64) within `ulps` units in the last place.

    The unit is that of the largest expected entry of the row (`by="row"`) or of each entry itself ("entry"), or of
    `scale` where that is larger. Infinities and NaN must be the same.
    """
    assert backend.owns(actual), f"{type(actual)} is not of {backend.library.name}"
    assert dtype_name(actual.dtype) == dtype, f"dtype {actual.dtype}, expected {dtype}"
    if like is not None:
        assert array_api_compat.device(actual) == array_api_compat.device(like)
    assert_near(backend.numpy(actual), expected, dtype, ulps=ulps, by=by, scale=scale)


def assert_near(actual, expected, dtype, *, ulps, by="row", scale=0.0):
    """Compares NumPy float64 values likewise, in units of `dtype`."""
    actual, expected = np.asarray(actual), np.asarray(expected, dtype="float64")
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    finite = np.isfinite(expected)
    same = np.isnan(expected) == np.isnan(actual)
    same &= np.isinf(expected) == np.isinf(actual)
    same &= ~np.isinf(expected) | (np.sign(expected) == np.sign(actual))
    assert same.all(), f"NaN or infinities differ:\n{actual}\nexpected\n{expected}"
    error = np.where(finite, np.abs(np.where(finite, actual, 0) - np.where(finite, expected, 0)), 0.0)
    size = np.where(finite, np.abs(np.where(finite, expected, 0)), 0.0)
    if by == "row" and size.ndim:
        size = size.max(axis=-1, keepdims=True, initial=0.0)
    size = np.maximum(size, np.maximum(scale, _SMALLEST[dtype]))
    unit = np.exp2(np.floor(np.log2(size))) * _EPS[dtype]
    worst = (error / unit).max(initial=0.0)
    assert worst <= ulps, f"off by {worst:.3g} units in the last place of {dtype}, allowed {ulps}"


def ulps_of(dtype):
    """The allowed distance: the rounding of a short sum in float32 and float64; only the last rounding in halves."""
    return {"float64": 32, "float32": 32, "float16": 1, "bfloat16": 1}[dtype]
