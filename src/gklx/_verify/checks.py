"""`gklx verify`: compares the results of every execution with the definitions, and with each other.

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

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ..transforms import value_and_grad
from .cases import Problem, equivalents, problems
from .definitions import exact
from .executions import Execution, executions, pairs
from .places import Arguments, places, raised
from .ulps import DTYPES, HALVES, Expected, compared, units

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
    message: str
    """A description of the results, where they break the bound."""

    @property
    def broken(self) -> bool:
        """Whether the distance is above the bound."""
        return not self.ulps <= self.bound

    @property
    def share(self) -> float:
        """The distance as a share of the bound."""
        return self.ulps / self.bound


@dataclass(frozen=True)
class Report:
    """The findings."""

    executions: list[Execution]
    absent: dict[str, str]
    """Why a library or a device is not here."""
    checks: list[Check]
    seconds: float

    @cached_property
    def broken(self) -> list[Check]:
        """The checks whose bound is broken."""
        return [check for check in self.checks if check.broken]

    @cached_property
    def farthest(self) -> dict[tuple[str, tuple[str, ...], str, str], Check]:
        """For each kind, places, dtype and quantity the check that is nearest to its bound, or farthest beyond it."""
        found: dict[tuple[str, tuple[str, ...], str, str], Check] = {}
        for check in self.checks:
            key = (check.kind, check.places, check.dtype, check.what)
            found[key] = max(found.get(key, check), check, key=lambda each: each.share)
        return found


def verify(names: Sequence[str] | None, tracked: Callable[[list[Any]], Iterable[Any]] = iter) -> Report:
    """Checks the libraries and devices of these names, or all that are here; ValueError where one is not.

    `tracked` is handed the list of what is to be done, and may tell how far it is.
    """
    start = time.monotonic()
    with places(names) as (here, absent):
        found = executions(here)
        return Report(found, absent, run(found, tracked), time.monotonic() - start)


def run(found: Sequence[Execution], tracked: Callable[[list[Any]], Iterable[Any]] = iter) -> list[Check]:
    """All checks of these executions."""
    steps: list[tuple[Any, ...]] = []
    for dtype in DTYPES:
        steps += [(_of_problem, dtype, each) for each in problems() if each.halves or dtype not in HALVES]
        if dtype in EQUIVALENT_IN:
            steps += [(_of_equivalents, dtype, *pair) for pair in equivalents()]
    checks: list[Check] = []
    for of, dtype, *tried in tracked(steps):
        checks += of([each for each in found if each.takes(dtype)], dtype, *tried)
    return checks


def _of_problem(able: Sequence[Execution], dtype: str, problem: Problem) -> Iterator[Check]:
    """Compares every execution with the definition, and some with each other."""
    given = _given(problem, dtype)
    expected = _expected(problem, given, dtype)
    found = {each.name: _returned(each, problem, given, dtype, expected) for each in able}
    for name, returned in found.items():
        for at, x in returned.items():
            yield _check("definition", (name,), dtype, problem, x, expected[at])
    for one, other in pairs(able):
        for at, x in found[one.name].items():
            y, each = found[other.name].get(at, ""), expected[at]
            if not isinstance(x, str) and not isinstance(y, str):
                either = each._replace(array=y, bound=2 * each.bound)
                yield _check("pair", (one.name, other.name), dtype, problem, x, either)


def _of_equivalents(able: Sequence[Execution], dtype: str, kl: Problem, dkl: Problem) -> Iterator[Check]:
    """Compares the gradients of DKL with those of KL: by the definitions, then in every execution."""
    given = _given(kl, dtype)
    expected, of_definition = (_expected(each, given, dtype) for each in (kl, dkl))
    for each, other in zip(expected, of_definition, strict=True):
        if dtype == "float64" and each.what == "gradient":
            same = each._replace(bound=_BOUND_OF_EQUIVALENCE)
            yield _check("equivalence", ("definition",), dtype, kl, other.array, same)
    for execution in able:
        of_kl, of_dkl = (_returned(execution, each, given, dtype, expected) for each in (kl, dkl))
        for at, x in of_dkl.items():
            each = expected[at]
            if each.what != "value" and at in of_kl:
                same = each._replace(array=of_kl[at], bound=_BOUND_OF_EQUIVALENCE)
                yield _check("equivalence", (execution.name,), dtype, kl, x, same)
                if each.what == "gradient":
                    own = each._replace(what="definition")
                    yield _check("equivalence", (execution.name,), dtype, kl, x, own)


def _check(kind: str, names: tuple[str, ...], dtype: str, problem: Problem, x: Any, expected: Expected) -> Check:
    """Compares two arrays; a sentence instead of an array says why there is none."""
    ulps, message = math.inf, next((each for each in (x, expected.array) if isinstance(each, str)), "")
    if not message:
        ulps, message = compared(x, expected)
    return Check(kind, names, dtype, problem.name, expected.what, ulps, expected.bound, message)


# --- calls of one problem ---------------------------------------------------------------------------------------------


def _given(problem: Problem, dtype: str) -> Arguments:
    return Arguments((problem.student, problem.teacher), problem.arrays).rounded(dtype)


def _expected(problem: Problem, given: Arguments, dtype: str) -> list[Expected]:
    """The results of `_everything`, then those of autodiff."""
    case, wide = problem.case, "float32" if dtype in HALVES else dtype
    with np.errstate(all="ignore"):
        found = exact(case.loss, given.positional[0], given.positional[1], case.settings, given.named)

    def value(name: str, x: Any) -> Expected:
        return Expected(name, x, wide, units(x, wide, "entry", float(problem.confident)), _BOUND, "value")

    def gradient(name: str, x: Any, what: str) -> Expected:
        bound = _BOUND_OF_HALF_GRADIENTS if dtype in HALVES else _BOUND
        return Expected(f"gradient to the {name}", x, dtype, units(x, dtype, "row"), bound, what)

    def gradients(what: str) -> list[Expected]:
        return [gradient("student", found.to_student, what), gradient("teacher", found.to_teacher, what)]

    others = {"none": value("losses", found.none), "sum": value("sum", found.sum)}
    of_call = [value("mean", found.mean), *gradients("gradient"), *(others[each] for each in problem.reductions)]
    return [*of_call, *(gradients("autodiff") if problem.autodiff else ())]


def _everything(problem: Problem) -> Callable[..., Any]:
    """A function that returns the mean with its gradients, and the loss under the other reductions."""
    call = problem.case.call

    def of(*logits: Any, **arrays: Any) -> tuple[Any, ...]:
        mean, gradients = value_and_grad(call(), (0, 1))(*logits, **arrays)
        return mean, *gradients, *(call(reduction=each)(*logits, **arrays) for each in problem.reductions)

    return of


def _returned(
    execution: Execution, problem: Problem, given: Arguments, dtype: str, expected: Sequence[Expected]
) -> dict[int, Any]:
    """The arrays of both calls by their indices in `expected`.

    Where a call raises, or returns another shape or dtype, a sentence says so in place of its last array.
    """
    found: dict[int, Any] = {}
    calls: list[tuple[Callable[..., Any], tuple[int, ...] | None]] = [(_everything(problem), None)]
    if problem.autodiff and execution.place.library.differentiates:
        calls.append((problem.case.call(), (0, 1)))
    for f, argnums in calls:
        indices = [at for at, each in enumerate(expected) if (each.what == "autodiff") == (argnums is not None)]
        try:
            got = execution.call(dtype, f, given, argnums)
            why = got.mismatch([expected[at] for at in indices])
        except Exception as error:  # an error of a library is a finding, and the other checks go on
            why = raised(error)
        found |= {indices[-1]: why} if why else zip(indices, got.arrays, strict=True)
    return found
