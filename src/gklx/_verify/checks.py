"""Runs the cases in every execution, and compares the results with the definitions and with each other.

The bounds, in units in the last place (ulp), follow from how the package computes; its tests hold the same ones.

- 32 for values, of each entry, and for gradients in float32 and float64, of the largest entry of the row: softmax, mean
  and centring are short sums, of which every operation rounds once. Values of halves are float32.
- 1 for gradients in halves, which are computed in float32 and rounded once.
- Twice that between two executions, either of which may be off.
- 16 for the gradients of DKL from those of KL of one execution, which share all but a few operations; 32 from the
  definition of KL.

Where the softmax of a row is so peaked that its normaliser rounds to 1, the error of a loss is a unit of 1, however
small the loss is. So for logits of scale 30 the unit of a value is at least the unit of 1.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..transforms import grad, value_and_grad
from .agreement import told
from .calls import Arguments, Results
from .cases import Case, cases, equivalents
from .definitions import Exact, exact
from .executions import Execution, pairs
from .ulps import DTYPES, farthest, units

_HALVES = ("float16", "bfloat16")
EQUIVALENT_IN = ("float32", "float64")
_BOUND, _BOUND_OF_HALF_GRADIENTS, _BOUND_OF_EQUIVALENCE = 32.0, 1.0, 16.0


class Check(NamedTuple):
    """One comparison: of an execution with the definition, of two executions, or of DKL with KL in one."""

    kind: str
    """ "definition", "pair" or "equivalence"."""
    places: tuple[str, ...]
    dtype: str
    case: str
    what: str
    """ "value", "gradient" (analytic), "autodiff", or "definition": the gradient of DKL from the definition of KL."""
    ulps: float
    bound: float
    told: str
    """A description of the results, where they break the bound."""

    @property
    def broken(self) -> bool:
        """Whether the distance is above the bound."""
        return not self.ulps <= self.bound


class _Expected(NamedTuple):
    """An array that a call must return."""

    name: str
    what: str
    array: Any
    dtype: str
    unit: Any

    @property
    def bound(self) -> float:
        return _BOUND_OF_HALF_GRADIENTS if self.dtype in _HALVES else _BOUND


class _Subject(NamedTuple):
    """What is compared: the first fields of a `Check`."""

    kind: str
    places: tuple[str, ...]
    dtype: str
    case: str

    def compared(self, each: _Expected, x: Any, y: Any, bound: float) -> Check:
        """Compares two arrays, in units of the expected one."""
        distance = farthest(x, y, each.unit, each.dtype)
        broken = not distance.ulps <= bound
        words = f"{each.name}{told(distance, each.dtype)}, allowed {bound:g}" if broken else ""
        return Check(*self, each.what, distance.ulps, bound, words)

    def failed(self, each: _Expected, bound: float, why: str) -> Check:
        """The check of a call that returned no arrays to compare."""
        return Check(*self, each.what, math.inf, bound, why)


def run(executions: Sequence[Execution]) -> list[Check]:
    """All checks."""
    found: list[Check] = []
    for dtype in DTYPES:
        able = [each for each in executions if each.takes(dtype)]
        for case in cases():
            if case.halves or dtype not in _HALVES:
                found += _of_case(able, case, dtype)
        for kl, dkl in equivalents() if dtype in EQUIVALENT_IN else ():
            found += _of_equivalents(able, kl, dkl, dtype)
    return found


def _of_case(executions: Sequence[Execution], case: Case, dtype: str) -> Iterator[Check]:
    """Compares every execution with the definition, and some with each other."""
    given = Arguments((case.student, case.teacher), case.arrays).rounded(dtype)
    of_call, of_autodiff = _expected(case, given, dtype)
    found: dict[str, list[tuple[_Expected, Any]]] = {each.name: [] for each in executions}
    for execution in executions:
        subject = _Subject("definition", (execution.name,), dtype, case.name)
        ways = [(of_call, partial(execution.call, dtype, _everything(case), given))]
        if case.full and execution.differentiates:
            ways.append((of_autodiff, partial(execution.autodiff, dtype, case.call(), given)))
        for expected, way in ways:
            got = _attempted(way, expected)
            if isinstance(got, str):
                yield subject.failed(expected[-1], expected[-1].bound, got)
                continue
            for each, x in zip(expected, got, strict=True):
                yield subject.compared(each, x, each.array, each.bound)
            found[execution.name] += zip(expected, got, strict=True)
    for one, other in pairs(executions):
        subject = _Subject("pair", (one.name, other.name), dtype, case.name)
        for (each, x), (same, y) in itertools.product(found[one.name], found[other.name]):
            if each is same:
                yield subject.compared(each, x, y, 2 * each.bound)


def _of_equivalents(executions: Sequence[Execution], kl: Case, dkl: Case, dtype: str) -> Iterator[Check]:
    """Compares the gradients of DKL with those of KL: by the definitions, then in every execution."""
    given = Arguments((kl.student, kl.teacher), kl.arrays).rounded(dtype)
    of_kl, of_dkl = (_defined(case, given) for case in (kl, dkl))
    if dtype == "float64":
        subject = _Subject("equivalence", ("definition",), dtype, kl.name)
        for each, x in zip(_gradients("gradient", of_kl, dtype), (of_dkl.to_student, of_dkl.to_teacher), strict=True):
            yield subject.compared(each, x, each.array, _BOUND_OF_EQUIVALENCE)
    for execution in executions:
        subject = _Subject("equivalence", (execution.name,), dtype, kl.name)
        ways = {"gradient": partial(execution.call, dtype, _gradients_of(kl, dkl), given)}
        if execution.differentiates:
            ways["autodiff"] = partial(_autodiff_of, execution, dtype, (kl, dkl), given)
        for what, way in ways.items():
            expected = _gradients(what, of_kl, dtype)
            got = _attempted(way, 2 * expected)
            if isinstance(got, str):
                yield subject.failed(expected[-1], _BOUND_OF_EQUIVALENCE, got)
                continue
            for each, x, y in zip(expected, got[2:], got[:2], strict=True):
                yield subject.compared(each, x, y, _BOUND_OF_EQUIVALENCE)
                if what == "gradient":
                    yield subject.compared(each._replace(what="definition"), x, each.array, each.bound)


# --- one call ---------------------------------------------------------------------------------------------------------


def _everything(case: Case) -> Callable[..., Any]:
    """A function that returns the mean with its gradients, the losses of the samples, and their sum."""
    others = ("none", "sum") if case.full else ("none",)

    def of(*logits: Any, **arrays: Any) -> tuple[Any, ...]:
        mean, gradients = value_and_grad(case.call(), (0, 1))(*logits, **arrays)
        return mean, *gradients, *(case.call(reduction=each)(*logits, **arrays) for each in others)

    return of


def _gradients_of(*cases_: Case) -> Callable[..., Any]:
    def of(*logits: Any, **arrays: Any) -> tuple[Any, ...]:
        return tuple(x for case in cases_ for x in grad(case.call(), (0, 1))(*logits, **arrays))

    return of


def _autodiff_of(execution: Execution, dtype: str, cases_: Sequence[Case], given: Arguments) -> Results:
    found = [execution.autodiff(dtype, case.call(), given) for case in cases_]
    return Results([x for each in found for x in each.arrays], [name for each in found for name in each.dtypes])


def _expected(case: Case, given: Arguments, dtype: str) -> tuple[list[_Expected], list[_Expected]]:
    """The expected results of `_everything` and of autodiff."""
    defined = _defined(case, given)
    wide = "float32" if dtype in _HALVES else dtype
    mean, none, total = (
        _Expected(name, "value", x, wide, units(x, wide, "entry", float(case.confident)))
        for name, x in (("mean", defined.mean), ("losses", defined.none), ("sum", defined.sum))
    )
    gradients, of_autodiff = (_gradients(what, defined, dtype) for what in ("gradient", "autodiff"))
    return [mean, *gradients, none, *([total] if case.full else [])], of_autodiff


def _defined(case: Case, given: Arguments) -> Exact:
    with np.errstate(all="ignore"):
        return exact(case.loss, given.positional[0], given.positional[1], case.settings, given.named)


def _gradients(what: str, defined: Exact, dtype: str) -> list[_Expected]:
    return [
        _Expected(f"gradient to the {name}", what, x, dtype, units(x, dtype, "row"))
        for name, x in (("student", defined.to_student), ("teacher", defined.to_teacher))
    ]


def _attempted(way: Callable[[], Results], expected: Sequence[_Expected]) -> list[Any] | str:
    """The arrays that a call returns, or why they cannot be compared: it raises, or their shape or dtype is wrong."""
    try:
        got = way()
    except Exception as error:  # an error of a library is a finding, and the other checks go on
        return f"raised {type(error).__name__}: {' '.join(str(error).split())}"
    for x, dtype, each in zip(got.arrays, got.dtypes, expected, strict=True):
        if (dtype, x.shape) != (each.dtype, each.array.shape):
            return f"{each.name} is {dtype} {list(x.shape)}, expected {each.dtype} {list(each.array.shape)}"
    return got.arrays
