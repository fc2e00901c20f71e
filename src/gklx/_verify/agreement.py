"""Compares the results of backends with what was expected, and names every deviation in one message."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .calls import Results
from .places import Place
from .ulps import Distance, Per, farthest, units


class _Found(NamedTuple):
    place: str
    dtype: str
    what: str
    got: Results
    ulps: float


class Agreement:
    """The comparisons of one assertion, with one reference."""

    def __init__(self, reference: str, *, ulps: float, per: Per) -> None:
        self.problems: list[str] = []
        self._reference, self._ulps, self._per = reference, ulps, per
        self._found: list[_Found] = []
        self._cause: Exception | None = None

    def attempt(self, place: Place, dtype: str, what: str, f: Callable[[], Results]) -> Results | None:
        """The result of a call; None where it raises, which is recorded as a problem of that place."""
        try:
            return f()
        except Exception as error:
            self._cause = self._cause or error
            self.problems.append(f"{place.name} in {dtype}: {what} raised {type(error).__name__}: {error}")
            return None

    def hold(
        self,
        place: Place,
        dtype: str,
        what: str,
        got: Results,
        expected: Sequence[Any],
        dtypes: Sequence[str],
        unit_of: str | None = None,
    ) -> None:
        """Compares results with float64 arrays and names of dtypes, in units of these dtypes or of `unit_of`."""
        where, worst = f"{place.name} in {dtype}: {what}", 0.0
        if len(got.arrays) != len(expected):
            self.problems.append(f"{where} gave {len(got.arrays)} arrays, expected {len(expected)}")
            return
        for at, (x, exact, own, wanted) in enumerate(zip(got.arrays, expected, got.dtypes, dtypes, strict=True)):
            name = f"{where}[{at}]" if len(expected) > 1 else where
            if x.shape != exact.shape:
                self.problems.append(f"{name} has shape {list(x.shape)}, expected {list(exact.shape)}")
                return
            if own != wanted:
                self.problems.append(f"{name} is of {own}, expected {wanted}")
                return
            distance = self._distance(x, exact, unit_of or own)
            worst = max(worst, distance.ulps)
            if distance.ulps > self._ulps:
                self.problems.append(f"{name}{told(distance, own)}, allowed {self._ulps:g}")
        self._found.append(_Found(place.name, dtype, what, got, worst))

    def hold_pairs(self) -> None:
        """Compares the results with each other; they may be twice as far apart."""
        for one, other in self._pairs():
            for at, (x, y, own) in enumerate(zip(one.got.arrays, other.got.arrays, one.got.dtypes, strict=True)):
                distance = self._distance(x, y, own)
                if distance.ulps > 2 * self._ulps:
                    name = f"{one.what}[{at}]" if len(one.got.arrays) > 1 else one.what
                    self.problems.append(
                        f"{one.place} and {other.place} in {one.dtype}: {name}"
                        f"{told(distance, own, f'that of {other.place}')}, allowed {2 * self._ulps:g}"
                    )

    def settle(self, hint: str = "") -> None:
        """AssertionError if there are problems: a line for each, then all distances, the farthest pair and a hint."""
        if not self.problems:
            return
        lines = list(self.problems)
        for dtype, what in dict.fromkeys((found.dtype, found.what) for found in self._found):
            of = [found for found in self._found if (found.dtype, found.what) == (dtype, what)]
            each = ", ".join(f"{found.place} {found.ulps:.3g}" for found in of)
            lines.append(f"{what} in {dtype}, ulp from {self._reference}: {each}")
        pairs = [(self._apart(one, other), one, other) for one, other in self._pairs()]
        if pairs:
            ulps, one, other = max(pairs, key=lambda pair: pair[0])
            lines.append(f"farthest pair: {one.place} and {other.place} in {one.dtype}, {ulps:.3g} ulp")
        lines += [hint] if hint else []
        raise AssertionError("\n".join(lines)) from self._cause

    def _pairs(self) -> list[tuple[_Found, _Found]]:
        pairs = itertools.combinations(self._found, 2)
        return [(one, other) for one, other in pairs if (one.dtype, one.what) == (other.dtype, other.what)]

    def _apart(self, one: _Found, other: _Found) -> float:
        results = zip(one.got.arrays, other.got.arrays, one.got.dtypes, strict=True)
        return max((self._distance(x, y, own).ulps for x, y, own in results), default=0.0)

    def _distance(self, x: Any, expected: Any, dtype: str) -> Distance:
        unit = units(expected, dtype, self._per) if x.dtype.kind == "f" else 1.0
        return farthest(x, expected, unit, dtype)


def told(distance: Distance, dtype: str, expected: str = "expected") -> str:
    """The end of a sentence that says where two arrays lie farthest apart, and how far."""
    digits = {"float64": ".17g", "float32": ".9g", "float16": ".5g", "bfloat16": ".4g"}.get(dtype, "")
    element = f" element {list(distance.place)}" if distance.place else ""
    apart = f"{distance.ulps:.4g} ulp off" if math.isfinite(distance.ulps) else "not the same"
    return f"{element} is {distance.actual:{digits}}, {expected} {distance.expected:{digits}}, {apart}"
