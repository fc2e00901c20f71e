"""Compares the results of places with what `gklx.testing` expects, and names every deviation in one message."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from .places import Place, Results, raised
from .ulps import Expected, Per, compared, units


class _Compared(NamedTuple):
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
        self._compared: list[_Compared] = []
        self._cause: Exception | None = None

    def compare(
        self,
        place: Place,
        dtype: str,
        what: str,
        f: Callable[[], Results],
        expected: Sequence[Any],
        dtypes: Sequence[str] = (),
        unit_of: str | None = None,
    ) -> Sequence[str]:
        """Compares the results of a call with float64 arrays, in units of their dtypes or of `unit_of`.

        Returns the dtypes that they must have: `dtypes`, or where none are given those that they have.
        """
        where = f"{place.name} in {dtype}: {what}"
        try:
            got = f()
        except Exception as error:
            self._cause = self._cause or error
            self.problems.append(f"{where} {raised(error)}")
            return dtypes
        if len(got.arrays) != len(expected):
            self.problems.append(f"{where} gave {len(got.arrays)} arrays, expected {len(expected)}")
            return dtypes
        dtypes = dtypes or got.dtypes
        wanted = [
            Expected(name, x, own, self._unit(x, unit_of or own), self._ulps)
            for name, x, own in zip(_names(where, expected), expected, dtypes, strict=True)
        ]
        if mismatch := got.mismatch(wanted):
            self.problems.append(mismatch)
            return dtypes
        found = [compared(x, each) for x, each in zip(got.arrays, wanted, strict=True)]
        self.problems += [message for _, message in found if message]
        self._compared.append(_Compared(place.name, dtype, what, got, max((ulps for ulps, _ in found), default=0.0)))
        return dtypes

    def compare_pairs(self) -> None:
        """Compares the results with each other; they may be twice as far apart."""
        self.problems += [message for _, found in self._pairs() for _, message in found if message]

    def raise_problems(self, hint: str = "") -> None:
        """AssertionError if there are problems: a line for each, then all distances, the farthest pair and a hint."""
        if not self.problems:
            return
        lines = list(self.problems)
        for dtype, what in dict.fromkeys((each.dtype, each.what) for each in self._compared):
            of = [f"{x.place} {x.ulps:.3g}" for x in self._compared if (x.dtype, x.what) == (dtype, what)]
            lines.append(f"{what} in {dtype}, ulp from {self._reference}: {', '.join(of)}")
        apart = [(max((ulps for ulps, _ in found), default=0.0), names) for names, found in self._pairs()]
        if apart:
            ulps, names = max(apart, key=lambda pair: pair[0])
            lines.append(f"farthest pair: {names}, {ulps:.3g} ulp")
        lines += [hint] if hint else []
        raise AssertionError("\n".join(lines)) from self._cause

    def _pairs(self) -> Iterator[tuple[str, list[tuple[float, str]]]]:
        """The names of both places, and their distance in each result with what there is to say about it."""
        for one, other in itertools.combinations(self._compared, 2):
            if (one.dtype, one.what) == (other.dtype, other.what):
                where, source = f"{one.place} and {other.place} in {one.dtype}", f"that of {other.place}"
                names = _names(f"{where}: {one.what}", one.got.arrays)
                results = zip(names, one.got.arrays, other.got.arrays, one.got.dtypes, strict=True)
                found = (
                    compared(x, Expected(name, y, own, self._unit(y, own), 2 * self._ulps, source=source))
                    for name, x, y, own in results
                )
                yield where, list(found)

    def _unit(self, expected: Any, dtype: str) -> Any:
        return units(expected, dtype, self._per) if expected.dtype.kind == "f" else 1.0


def _names(what: str, results: Sequence[Any]) -> list[str]:
    return [f"{what}[{at}]" for at in range(len(results))] if len(results) > 1 else [what]
