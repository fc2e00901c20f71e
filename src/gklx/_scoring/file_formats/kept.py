"""What readers keep between reads: for as many inputs as are read in turn, whether here or on a worker of a cluster."""

import collections
import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_in_turn: list[int] = []
"""For each block in progress the number of its inputs."""


@contextlib.contextmanager
def in_turn(inputs: int) -> Iterator[None]:
    """What a task enters around the reads of a block, one of each input."""
    _in_turn.append(inputs)
    try:
        yield
    finally:
        _in_turn.remove(inputs)


class Kept(Generic[T]):
    """What was made for the latest reads, made one at a time; `most` says how many are kept for how many inputs."""

    def __init__(self, make: Callable[..., T], most: Callable[[int], int]) -> None:
        self._make, self._most = make, most
        self._held: collections.OrderedDict[Hashable, T] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *key: Hashable) -> T:
        """What is kept for this key, made now where there is none."""
        with self._lock:
            if key not in self._held:
                most = self._most(max(tuple(_in_turn), default=2))
                while len(self._held) >= most:
                    self._held.popitem(last=False)
                self._held[key] = self._make(*key)
            self._held.move_to_end(key)
            return self._held[key]

    def forget(self) -> None:
        """Frees all of it."""
        with self._lock:
            self._held.clear()
