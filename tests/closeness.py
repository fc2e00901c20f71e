"""The one comparison of the tests: library, dtype, device, shape, then values in units in the last place."""

import array_api_compat
import numpy as np

from gklx._core.libraries import dtype_name
from gklx._verify.ulps import Expected, compared, units


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
    wanted = Expected("the result", expected, dtype, units(expected, dtype, by, scale), ulps)
    _, message = compared(actual, wanted, may_flush=False)
    assert not message, f"{message}, in units in the last place of {dtype}"


def ulps_of(dtype):
    """The allowed distance: the rounding of a short sum in float32 and float64; only the last rounding in halves."""
    return {"float64": 32, "float32": 32, "float16": 1, "bfloat16": 1}[dtype]
