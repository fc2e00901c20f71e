"""`gklx verify`: everything that is here, checked."""

import time
from collections.abc import Sequence
from typing import NamedTuple

from .checks import Check, run
from .places import Place, places


class Report(NamedTuple):
    """What was found."""

    places: list[Place]
    absent: dict[str, str]
    """Why a library or a device is not among the places."""
    checks: list[Check]
    seconds: float

    @property
    def broken(self) -> list[Check]:
        """The checks whose bound is broken."""
        return [check for check in self.checks if check.broken]

    def farthest(self, kind: str, names: tuple[str, ...], dtype: str, *what: str) -> Check | None:
        """The check of such a kind that comes nearest to its bound, or is beyond it most; None where there is none."""
        found = (
            check
            for check in self.checks
            if (check.kind, check.places, check.dtype) == (kind, names, dtype) and check.what in what
        )
        return max(found, key=lambda check: check.ulps / check.bound, default=None)


def verify(names: Sequence[str] | None) -> Report:
    """Checks the libraries and devices of these names, or all that are here; ValueError where one is not."""
    start = time.monotonic()
    with places(names) as (here, absent):
        return Report(here, absent, run(here), time.monotonic() - start)
