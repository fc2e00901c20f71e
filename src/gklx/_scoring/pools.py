"""Who works the chunks off: threads of this process, or the workers of a Dask cluster.

Both give results in the order of the chunks, with a bounded number under way, so that reading, transfer and computing
overlap and memory does not grow.
"""

import collections
import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from .backend import Backend, backend
from .backend import threads as own_threads


@dataclass(frozen=True)
class Pool:
    """An executor and what its tasks are told."""

    executor: Executor
    width: int
    """Tasks that run at once."""
    place: Backend | None
    """Where they compute; None on a cluster, where each worker is asked for its own."""
    share: Callable[[Any], Any]
    """What to hand to every task in place of an array that all of them need."""
    name: str
    device: str

    def in_order(
        self, f: Callable[..., Any], calls: Iterable[tuple[Any, ...]], ahead: int | None = None
    ) -> Generator[Any, None, None]:
        """The results of calls, in their order; an error comes in its place, and what has not begun is dropped.

        At most `ahead` are under way or wait for those before them; twice the width by default.
        """
        ahead = 2 * self.width if ahead is None else ahead
        waiting: collections.deque[Future[Any]] = collections.deque()
        try:
            for call in calls:
                waiting.append(self.executor.submit(f, self.place, *call))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextlib.contextmanager
def threads(place: Backend, count: int) -> Iterator[Pool]:
    """Threads of this process."""
    with ThreadPoolExecutor(count, thread_name_prefix="gklx") as executor:
        place = replace(place, kernel_threads=max(1, own_threads() // count))
        yield Pool(executor, count, place, place.put, place.library.backend, place.device_name)


@contextlib.contextmanager
def cluster(scheduler: str | None) -> Iterator[Pool]:
    """The Dask cluster of a scheduler's address, or one in this process for the time being."""
    try:
        from dask.distributed import Client, LocalCluster
    except ImportError:
        raise ValueError("backend dask needs distributed, which is not installed (pip install 'gklx[dask]')") from None
    with contextlib.ExitStack() as stack:
        try:
            at = scheduler or stack.enter_context(_own_cluster(LocalCluster))
            client = stack.enter_context(Client(at, timeout=10, set_as_default=False))  # type: ignore[no-untyped-call]
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"scheduler {scheduler}: no Dask scheduler answers there ({error})") from None
        workers = len(client.scheduler_info(n_workers=-1)["workers"])
        if not workers:
            raise ValueError(f"scheduler {scheduler}: has no workers")
        width = sum(client.nthreads().values())
        yield Pool(
            client.get_executor(pure=False),
            width,
            None,
            lambda x: client.scatter(x, broadcast=True, hash=False),
            "dask",
            f"{workers} worker{'s' if workers > 1 else ''}",
        )


def _own_cluster(cluster: Callable[..., Any]) -> Any:
    """Threads of this process, which nobody but this machine can speak to."""
    here = "127.0.0.1:0"
    return cluster(
        n_workers=1,
        threads_per_worker=own_threads(),
        processes=False,
        dashboard_address=here,
        worker_dashboard_address=here,
    )


@contextlib.contextmanager
def working(place: Backend | None) -> Iterator[Backend]:
    """Where a task computes: as the pool says, or on a worker in its NumPy."""
    if place is None:
        with backend("numpy", None) as own, own.working():
            yield own
    else:
        with place.working():
            yield place
