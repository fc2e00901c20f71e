"""The calls of the tests: losses with settings, and inputs with masks."""

from functools import partial
from typing import NamedTuple

import numpy as np

import gklx

LOSSES = {"kl": gklx.kl, "dkl": gklx.dkl, "ikl": gklx.ikl, "gkl": gklx.gkl}


class Case(NamedTuple):
    id: str
    loss: str
    settings: dict
    prior: str = ""
    """"" for the teacher's weights, "labels" for prior[labels], "rows" for a row a sample."""


CASES = (
    Case("kl", "kl", {}),
    Case("kl-T", "kl", {"temperature": 2.5}),
    Case("dkl", "dkl", {}),
    Case("dkl-T", "dkl", {"temperature": 3.0, "mse_weight": 0.5, "ce_weight": 4.0}),
    Case("ikl", "ikl", {"mse_weight": 2.0, "ce_weight": 0.5, "temperature": 2.0}),
    Case("ikl-tau", "ikl", {"weight_temperature": 4.0}),
    Case("ikl-prior", "ikl", {"mse_weight": 20.0, "ce_weight": 4.0}, "labels"),
    Case("gkl", "gkl", {}),
    Case("gkl-0", "gkl", {"gamma": 0.0, "mse_weight": 3.0}),
    Case("gkl-tau", "gkl", {"gamma": 0.3, "weight_temperature": 4.0, "temperature": 4.0}),
    Case("gkl-prior", "gkl", {"gamma": 0.5, "mse_weight": 4.0, "ce_weight": 3.0}, "labels"),
    Case("gkl-rows", "gkl", {"gamma": 2.0}, "rows"),
    Case("gkl-asymmetric", "gkl", {"symmetric": False, "normalize": "samples", "gamma": 0.7, "temperature": 2.0}),
    Case("gkl-samples", "gkl", {"normalize": "samples", "ce_weight": 0.0}, "labels"),
    Case("gkl-ce", "gkl", {"mse_weight": 0.0}),
)
MASKS = ("none", "classes", "elements", "samples", "absent")
BATCH, C = 5, 7


def call(case, mask, *, batch=(BATCH,), classes=C, seed=0, scale=3.0):
    """NumPy float64 arguments of a call: student, teacher, and the keyword arrays."""
    rng = np.random.default_rng(seed)
    shape = (*batch, classes)
    s, t = scale * rng.standard_normal((2, *shape))
    arrays = {}
    if case.prior == "labels":
        arrays["prior"] = rng.dirichlet(np.ones(classes), size=classes)
        arrays["labels"] = rng.integers(0, classes, batch)
    elif case.prior == "rows":
        arrays["prior"] = rng.dirichlet(np.ones(classes), size=batch)
    if mask == "classes":
        arrays["where"] = np.arange(classes) % 3 != 1
        s[..., 1] = np.nan
    elif mask == "elements":
        arrays["where"] = rng.random(shape) < 0.6
        arrays["where"][..., 0] = True
        arrays["where"][2, ...] = False
        t[~arrays["where"]] = np.nan
        if "labels" in arrays:
            arrays["labels"][2, ...] = -100
    elif mask == "samples":
        arrays["sample_weight"] = rng.random(batch) + 0.5
        arrays["sample_weight"][1, ...] = 0.0
        s[1, ...], t[1, ..., 0] = np.nan, np.inf
        if "labels" in arrays:
            arrays["labels"][1, ...] = 10_000
        if case.prior == "rows":
            arrays["prior"][1, ...] = np.nan
    elif mask == "absent":
        s[..., 2] = t[..., 2] = -np.inf
        s[0, ..., 4] = t[0, ..., 4] = -np.inf
        if case.loss in ("kl", "dkl"):
            t[1, ..., 3] = -np.inf
    return s, t, arrays


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


def loss_of(case, **more):
    return partial(LOSSES[case.loss], **case.settings, **more)
