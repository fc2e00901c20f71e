"""The calls that are checked: losses with settings, and arguments with masks, on which the package's own tests run too.

`gklx verify` tries each case without a mask, some with masks, and two losses at extreme logits.
"""

import itertools
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..losses import dkl, gkl, ikl, kl

LOSSES = {"kl": kl, "dkl": dkl, "ikl": ikl, "gkl": gkl}


class Case(NamedTuple):
    """A loss with its settings."""

    id: str
    loss: str
    settings: Mapping[str, Any]
    prior: str = ""
    """"" for the teacher's weights, "labels" for prior[labels], "rows" for a row a sample."""

    def call(self, **more: Any) -> Any:
        """The loss with its settings."""
        return partial(LOSSES[self.loss], **self.settings, **more)


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


def arguments(
    case: Case, mask: str, *, batch: tuple[int, ...] = (5,), classes: int = 7, seed: int = 0, scale: float = 3.0
) -> tuple[Any, Any, dict[str, Any]]:
    """Student, teacher and keyword arrays of a call, NumPy's float64.

    What a mask takes out is NaN, infinite or a label that names no class.
    """
    rng = np.random.default_rng(seed)
    shape = (*batch, classes)
    s, t = scale * rng.standard_normal((2, *shape))
    arrays: dict[str, Any] = {}
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
        if case.loss in ("kl", "dkl"):  # the gradient to the teacher only
            t[1, ..., 3] = -np.inf
    return s, t, arrays


# --- what `gklx verify` tries -----------------------------------------------------------------------------------------

_TRIED_MASKS = ("elements", "samples", "absent")  # "classes" is a mask by `where` as well
_MASKED = ("kl-T", "dkl-T", "ikl-prior", "gkl-prior")
_NARROW: Mapping[str, Any] = {"batch": (6,), "classes": 11, "seed": 2305_13948}
_WIDE: Mapping[str, Any] = {"batch": (3,), "classes": 40, "seed": 2305_13948}
"""Two shapes, the same in every run. 40 classes fill the vectors of every kernel and dtype, 11 leave a rest."""


class Problem(NamedTuple):
    """A case with its arguments."""

    name: str
    case: Case
    student: Any
    teacher: Any
    arrays: Mapping[str, Any]
    reductions: tuple[str, ...] = ("none",)
    """Those that are tried beside the mean."""
    autodiff: bool = False
    """Whether the library's autodiff is tried too: no mask changes how that works."""
    confident: bool = False
    """Whether the softmax of a row may be so peaked that its normaliser rounds to 1."""
    halves: bool = True
    """Whether half precisions can hold such logits: near 1e4 they are spaced by 8 and by 64."""


def problems() -> Iterator[Problem]:
    """Every case without a mask, every loss with masks, and two at extreme logits."""
    for case, drawn in zip(CASES, itertools.cycle((_NARROW, _WIDE)), strict=False):
        yield Problem(case.id, case, *arguments(case, "none", **drawn), ("none", "sum"), autodiff=True)
        for mask in _TRIED_MASKS if case.id in _MASKED else ():
            yield Problem(f"{case.id} {mask}", case, *arguments(case, mask, **drawn))
    for case in CASES[0], CASES[7]:  # KL, and the decomposed formula, of which DKL and IKL are special cases
        s, t, _ = arguments(case, "none", **_WIDE)
        yield Problem(f"{case.id} scale 30", case, 10 * s, 10 * t, {}, confident=True)
        yield Problem(f"{case.id} offset 1e4", case, s - 1e4, t + 1e4, {}, halves=False)


def equivalents() -> Iterator[tuple[Problem, Problem]]:
    """Pairs of KL and DKL, whose gradients are equal at every temperature."""
    for temperature, mask in ((0.5, "none"), (1.0, "none"), (1.0, "elements"), (4.0, "absent")):
        name = f"T={temperature:g} {mask}".removesuffix(" none")
        kl_too, dkl_too = (
            Problem(name, case, *arguments(case, mask, **_NARROW), (), autodiff=True)
            for case in (Case(loss, loss, {"temperature": temperature}) for loss in ("kl", "dkl"))
        )
        yield kl_too, dkl_too
