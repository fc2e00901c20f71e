"""All libraries in one process give the same values and gradients, for every loss, dtype and reduction.

Each library is compared with NumPy. `test_against_definition.py` compares each library with the definition, with every
mask.
"""

import numpy as np
import pytest

import backends
import gklx
from cases import CASES, call, loss_of, on
from closeness import assert_close, ulps_of

pytestmark = [pytest.mark.side_by_side, pytest.mark.together]

NUMPY = backends.BACKENDS[0]


@pytest.mark.parametrize("mask", ["none", "elements", "samples"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_library_agrees_with_numpy(backend, dtype, case, mask):
    if dtype == "bfloat16":
        pytest.skip("NumPy has no bfloat16; the comparison with the definition covers it")
    arguments = call(case, mask, batch=(3, 2), classes=11, seed=7)
    s, t, given = on(backend, dtype, *arguments)
    s0, t0, given0 = on(NUMPY, dtype, *arguments)
    wide = "float64" if dtype == "float64" else "float32"

    def everything(s, t, given):
        both = [gklx.value_and_grad(loss_of(case, reduction=each), (0, 1))(s, t, **given) for each in ("mean", "sum")]
        return both, loss_of(case, reduction="none")(s, t, **given)

    both, entries = backend.wrap(everything)(s, t, given)
    both0, entries0 = everything(s0, t0, given0)
    for (value, gradients), (value0, gradients0) in zip(both, both0, strict=True):
        assert_close(value, np.asarray(value0, dtype="float64"), backend, wide, ulps=32)
        for one, other in zip(gradients, gradients0, strict=True):
            assert_close(one, other.astype("float64"), backend, dtype, ulps=ulps_of(dtype))
    assert_close(entries, entries0.astype("float64"), backend, wide, ulps=32, by="entry")
