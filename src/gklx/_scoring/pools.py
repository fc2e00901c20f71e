"""Computes chunks on threads of this process or on the workers of a Dask cluster.

Both return results in the order of the chunks. A bounded number of chunks is in progress at a time, so that reading,
transfer and computing overlap and the memory is bounded.
"""

import asyncio
import collections
import contextlib
import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from .backend import Backend, backend
from .backend import threads as own_threads

_TIMEOUT = 10  # seconds for a scheduler to answer
_POLL_INTERVAL = 2  # seconds between two checks of the connection to it


@dataclass(frozen=True)
class Pool:
    """An executor, and what its tasks need to know."""

    executor: Executor
    width: int
    """The number of tasks that run at the same time."""
    place: Backend | None
    """The backend that tasks compute on; None on a cluster, where each worker makes its own."""
    share: Callable[[Any], Any]
    """Makes an array that all tasks need into an argument for each: on a cluster a handle, sent once."""
    name: str
    device: str
    lost: Callable[[], bool] = lambda: False
    """Whether the connection to the tasks is closed: what they return will not come any more."""

    def in_order(
        self, f: Callable[..., Any], calls: Iterable[tuple[Any, ...]], ahead: int | None = None
    ) -> Generator[Any, None, None]:
        """The results of calls, in the order of the calls. An error is raised in the place of its result.

        Calls that have not started by then are cancelled. At most `ahead` calls are in progress or have results that
        wait for earlier ones; the default is twice `width`.
        """
        ahead = 2 * self.width if ahead is None else ahead
        waiting: collections.deque[Future[Any]] = collections.deque()
        try:
            for call in calls:
                waiting.append(self.executor.submit(f, self.place, *call))
                if len(waiting) > ahead:
                    yield self._result(waiting.popleft())
            while waiting:
                yield self._result(waiting.popleft())
        finally:
            for future in waiting:
                future.cancel()

    def _result(self, future: Future[Any]) -> Any:
        while not self.lost():
            try:
                return future.result(timeout=_POLL_INTERVAL)
            except CancelledError:
                break
            except TimeoutError:
                if future.done():  # it is the task's own
                    raise
        raise ConnectionError("the connection to the Dask scheduler was lost")


@contextlib.contextmanager
def threads(place: Backend, count: int) -> Iterator[Pool]:
    """Threads of this process."""
    with ThreadPoolExecutor(count, thread_name_prefix="gklx") as executor:
        place = replace(place, kernel_threads=max(1, own_threads() // count))
        yield Pool(executor, count, place, place.put, place.library.backend, place.device_name)


@contextlib.contextmanager
def cluster(scheduler: str | None) -> Iterator[Pool]:
    """The Dask cluster at a scheduler's address, or a temporary one in this process."""
    try:
        from dask.distributed import Client, LocalCluster
        from distributed.utils import silence_logging_cmgr
    except ImportError:
        raise ValueError("backend dask needs distributed, which is not installed (pip install 'gklx[dask]')") from None
    with contextlib.ExitStack() as stack:
        for logger in ("distributed", "tornado"):  # what fails is raised here, and said once
            stack.enter_context(silence_logging_cmgr(logging.CRITICAL, logger))
        try:
            at = stack.enter_context(_own_cluster(LocalCluster)) if scheduler is None else _that_answers(scheduler)
            made = Client(at, timeout=_TIMEOUT, set_as_default=False)  # type: ignore[no-untyped-call]
            client = stack.enter_context(made)
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
            lambda: client.status == "closed",
        )


def _that_answers(address: str) -> str:
    """The address, once something at it speaks Dask's protocol.

    A client would wait for ever at a socket that says nothing, and 20 s at the interpreter's exit where the address is
    none.
    """
    from dask.distributed import Security
    from distributed.comm.core import connect

    secured = Security().get_connection_args("client")  # type: ignore[no-untyped-call]

    async def greet() -> None:
        try:
            async with asyncio.timeout(_TIMEOUT):
                found = await connect(address, timeout=_TIMEOUT, **secured)  # type: ignore[no-untyped-call]
                await found.close()
        except TimeoutError:
            raise OSError(f"nothing within {_TIMEOUT} s") from None
        except (OSError, ValueError, TypeError):
            raise  # these say what is wrong with the address
        except Exception:  # a web server's answer, say, read as the length of a message
            raise OSError("what answers is something else") from None

    with ThreadPoolExecutor(1) as executor:  # this thread may run an event loop already
        executor.submit(asyncio.run, greet()).result()
    return address


def _own_cluster(cluster: Callable[..., Any]) -> Any:
    """A cluster of threads in this process, which listens on the loopback interface only."""
    here = "127.0.0.1:0"
    return cluster(
        n_workers=1,
        threads_per_worker=own_threads(),
        processes=False,
        silence_logs=logging.CRITICAL,
        dashboard_address=here,
        worker_dashboard_address=here,
    )


@contextlib.contextmanager
def working(place: Backend | None) -> Iterator[Backend]:
    """The backend of a task: the pool's, or NumPy on a worker of a cluster."""
    if place is None:
        with backend("numpy", None) as own, own.working():
            yield own
    else:
        with place.working():
            yield place
