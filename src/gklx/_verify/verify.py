"""`gklx verify`: checks all libraries and devices that are here."""

import time
from collections.abc import Sequence
from typing import NamedTuple

from .checks import Check, run
from .executions import Execution, executions
from .places import places


class Report(NamedTuple):
    """The findings."""

    executions: list[Execution]
    absent: dict[str, str]
    """Why a library or a device is not here."""
    checks: list[Check]
    seconds: float

    @property
    def broken(self) -> list[Check]:
        """The checks whose bound is broken."""
        return [check for check in self.checks if check.broken]

    def farthest(self, kind: str, names: tuple[str, ...], dtype: str, *what: str) -> Check | None:
        """The check of a kind that is nearest to its bound, or farthest beyond it; None where there is none."""
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
        found = executions(here)
        return Report(found, absent, run(found), time.monotonic() - start)
