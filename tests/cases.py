"""The losses, settings, masks and inputs of `gklx verify`, as arrays of the backends of the tests."""

from gklx._verify.cases import CASES, LOSSES, MASKS, Case
from gklx._verify.cases import arguments as call

__all__ = ["CASES", "LOSSES", "MASKS", "Case", "call", "loss_of", "on", "rounded"]

loss_of = Case.call


def on(backend, dtype, s, t, arrays):
    """The arguments as arrays of a backend: floating ones in `dtype`, the others unchanged."""
    given = {
        name: backend.array(x, dtype if x.dtype.kind == "f" and name != "sample_weight" else None)
        for name, x in arrays.items()
    }
    return backend.array(s, dtype), backend.array(t, dtype), given


def rounded(backend, dtype, s, t, arrays):
    """The values that `on` gives after rounding to `dtype`, as float64."""
    given = {
        name: backend.rounded(x, dtype) if x.dtype.kind == "f" and name != "sample_weight" else x
        for name, x in arrays.items()
    }
    return backend.rounded(s, dtype), backend.rounded(t, dtype), given
