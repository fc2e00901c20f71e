"""The calls that are checked: every loss, without a mask, with each mask, and at extreme logits; all of one shape."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..losses import dkl, gkl, ikl, kl

LOSSES = {"kl": kl, "dkl": dkl, "ikl": ikl, "gkl": gkl}

_SAMPLES, _CLASSES = 6, 11


class Case(NamedTuple):
    """A loss with its settings, and NumPy arguments in float64."""

    name: str
    loss: str
    settings: Mapping[str, Any]
    student: Any
    teacher: Any
    arrays: Mapping[str, Any]
    full: bool = False
    """Whether the reduction "sum" and the library's autodiff are tried as well: no mask changes how they work."""
    confident: bool = False
    """Whether the softmax of a row may be so peaked that its normaliser rounds to 1."""
    halves: bool = True
    """Whether half precisions can hold such logits: near 1e4 they are spaced by 8 and by 64."""

    def call(self, **more: Any) -> Any:
        """The loss with its settings."""
        return partial(LOSSES[self.loss], **self.settings, **more)


_TEMPERED = {"temperature": 3.0, "mse_weight": 0.5, "ce_weight": 4.0}
_SMOOTH = {"gamma": 0.3, "temperature": 4.0, "weight_temperature": 4.0, "mse_weight": 4.0}
_VARIANTS: tuple[tuple[str, str, dict[str, float], bool, bool], ...] = (
    # name, loss, settings, whether with a class prior, whether with each mask too
    ("kl", "kl", {}, False, False),
    ("kl T=2.5", "kl", {"temperature": 2.5}, False, True),
    ("dkl", "dkl", {}, False, False),
    ("dkl T=3", "dkl", _TEMPERED, False, True),
    ("ikl", "ikl", {"weight_temperature": 4.0, "mse_weight": 2.0}, False, False),
    ("ikl prior", "ikl", {"mse_weight": 20.0, "ce_weight": 4.0}, True, True),
    ("gkl gamma=0", "gkl", {"gamma": 0.0}, False, False),
    ("gkl gamma=0.5", "gkl", {"gamma": 0.5}, False, True),
    ("gkl prior gamma=0.3", "gkl", _SMOOTH, True, True),
)


def cases() -> Iterator[Case]:
    """All cases; the arrays are the same in every run."""
    for name, loss, settings, prior, masked in _VARIANTS:
        for mask in ("", "where", "sample_weight", "-inf")[: 4 if masked else 1]:
            s, t, arrays = _arguments(mask, prior=prior, ruled_out=loss in ("kl", "dkl"))
            yield Case(f"{name} {mask}".strip(), loss, settings, s, t, arrays, full=not mask)
    for loss in ("kl", "gkl"):  # KL, and the decomposed formula, of which dkl and ikl are special cases
        s, t, _ = _arguments("", prior=False, ruled_out=False)
        yield Case(f"{loss} scale 30", loss, {}, 10 * s, 10 * t, {}, confident=True)
        yield Case(f"{loss} offset 1e4", loss, {}, s - 1e4, t + 1e4, {}, halves=False)


def equivalents() -> Iterator[tuple[Case, Case]]:
    """Pairs of KL and DKL, whose gradients are equal at every temperature."""
    for temperature, mask in ((0.5, ""), (1.0, ""), (1.0, "where"), (4.0, "-inf")):
        s, t, arrays = _arguments(mask, prior=False, ruled_out=True)
        name = f"T={temperature:g} {mask}".strip()
        of_kl, of_dkl = (Case(name, loss, {"temperature": temperature}, s, t, arrays) for loss in ("kl", "dkl"))
        yield of_kl, of_dkl


def _arguments(mask: str, *, prior: bool, ruled_out: bool) -> tuple[Any, Any, dict[str, Any]]:
    """Student, teacher and named arrays. What a mask takes out is NaN, infinite or a label that names no class."""
    rng = np.random.default_rng(2305_13948)
    s, t = 3.0 * rng.standard_normal((2, _SAMPLES, _CLASSES))
    arrays: dict[str, Any] = {}
    if prior:
        arrays["prior"] = rng.dirichlet(np.ones(_CLASSES), size=_CLASSES)
        arrays["labels"] = rng.integers(0, _CLASSES, _SAMPLES)
    if mask == "where":
        arrays["where"] = rng.random(s.shape) < 0.6
        arrays["where"][:, 0], arrays["where"][2] = True, False
        t[~arrays["where"]] = np.nan
        if prior:
            arrays["labels"][2] = -100
    elif mask == "sample_weight":
        arrays["sample_weight"] = rng.random(_SAMPLES) + 0.5
        arrays["sample_weight"][1] = 0.0
        s[1], t[1, 0] = np.nan, np.inf
        if prior:
            arrays["labels"][1] = 10_000
    elif mask == "-inf":
        s[:, 2] = t[:, 2] = s[0, 4] = t[0, 4] = -np.inf
        if ruled_out:  # the gradient to the teacher only
            t[1, 3] = -np.inf
    return s, t, arrays
