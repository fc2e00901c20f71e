"""The ranks over which a batch is spread at the moment: those of the `global_batch` that this thread has entered."""

import sys
import threading
from typing import Any, NamedTuple

from .call import Array, Ranks
from .libraries import Library


class GlobalBatch(NamedTuple):
    """What `global_batch` was given."""

    process_group: Any
    axis_name: Any


class _Entered(threading.local):
    """What was entered in this thread, innermost last; no ContextVar, which PyTorch's compiler does not follow."""

    def __init__(self) -> None:
        self.batches: tuple[GlobalBatch, ...] = ()


entered = _Entered()


def ranks_of(library: Library) -> Ranks | None:
    """The ranks over which a batch of this library's arrays is spread now; None for one."""
    if not entered.batches:
        return None
    over = entered.batches[-1]
    if library.backend == "torch":
        return _of_torch(over)
    if library.backend == "jax":
        return _of_jax(over)
    raise TypeError(f"global_batch must hold PyTorch or JAX arrays, got {library.name}")


def _of_torch(over: GlobalBatch) -> Ranks | None:
    if over.axis_name is not None:
        raise TypeError(f"global_batch must have a process_group for PyTorch, got axis_name {over.axis_name!r}")
    distributed = sys.modules["torch"].distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    group = over.process_group
    size = distributed.get_world_size(group)
    if size < 1:
        raise ValueError("process_group must hold this process, got a group without it")
    if size == 1:
        return None

    def reduced(x: Array, operation: str) -> Array:
        from torch.distributed import _functional_collectives as collectives

        # The collectives that the compiler takes and autograd differentiates.
        found = collectives.all_reduce(x, operation, distributed.group.WORLD if group is None else group)
        return collectives.wait_tensor(found)  # type: ignore[no-untyped-call]

    return Ranks(size, lambda x: reduced(x, "sum"), lambda x: reduced(x.detach(), "max"))


def _of_jax(over: GlobalBatch) -> Ranks | None:
    if over.axis_name is None or over.process_group is not None:
        raise TypeError(f"global_batch must have an axis_name for JAX, got process_group {over.process_group!r}")
    lax = sys.modules["jax"].lax
    try:
        size = lax.psum(1, over.axis_name)  # a Python number: JAX knows it when it traces
    except NameError as error:
        raise ValueError(f"axis_name must name an axis that is being mapped, got {over.axis_name!r}") from error
    return Ranks(
        size,
        lambda x: lax.psum(x, over.axis_name),
        lambda x: lax.pmax(lax.stop_gradient(x), over.axis_name),
    )
