"""Calls of one process timed in turns.

The clock is `timeit`'s. pyperf, asv and pytest-benchmark all time one benchmark to its end before they start the next,
the first two in processes of its own; a machine that slows down meanwhile then slows one peer and not the other. Here
all peers of a size take turns, and a ratio is made turn by turn.
"""

import random
import resource
import statistics
import timeit
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Taken(NamedTuple):
    """What one call took."""

    calls_a_turn: int
    turns: list[float]
    """Seconds a call, in every turn."""
    faults_a_call: float
    """Pages that the system had to hand out."""

    def as_row(self) -> dict[str, Any]:
        """Everything, as it goes into a JSON file."""
        return {**self._asdict(), **spread(self.turns, "seconds")}


def take_turns(calls: Mapping[str, Callable[[], Any]], turns: int, seconds: float) -> dict[str, Taken]:
    """Time all calls so many turns; in a turn each is repeated for about so many seconds, and once at the least.

    The order is drawn anew for every turn: what a call leaves behind, caches or threads that still spin, is then not
    always met by the same one. The draw is the same in every run.
    """
    timers = {}
    for name, call in calls.items():
        timer = timeit.Timer(call)
        timer.timeit(1)  # lazy imports, compilation, first allocations
        timers[name] = timer, max(1, round(seconds / timer.timeit(1)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    faults = dict.fromkeys(calls, 0)
    order, draw = list(calls), random.Random(20261122)
    for _ in range(turns):
        draw.shuffle(order)
        for name in order:
            timer, number = timers[name]
            if number > 1:
                timer.timeit(1)  # its arrays back into the caches, while another library's threads stop spinning
            before = _faults()
            taken[name].append(timer.timeit(number) / number)
            faults[name] += _faults() - before
    return {name: Taken(number, taken[name], faults[name] / (turns * number)) for name, (_, number) in timers.items()}


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def spread(x: Sequence[float], name: str) -> dict[str, float]:
    """Take the median and the quartiles."""
    first, median, third = statistics.quantiles(x, n=4, method="inclusive")
    return {name: median, f"{name}_q1": first, f"{name}_q3": third}


def ratio(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Divide turn by turn: what else slowed the machine in a turn slowed both."""
    return spread([a / b for a, b in zip(x, y, strict=True)], "ratio")
