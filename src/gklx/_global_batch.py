"""One batch over many processes or devices: the sums that its rows share are taken over all of them.

The collectives are those of `torch.distributed` and of JAX. Only numbers that no gradient flows into are exchanged:
two a loss, C² a `class_sums`.
"""

import sys
import threading
from types import TracebackType
from typing import Any, NamedTuple

from ._libraries import Library
from ._problem import Array, Ranks


class _Over(NamedTuple):
    process_group: Any
    axis_name: Any


class _Entered(threading.local):
    """What was entered in this thread, innermost last; no ContextVar, which PyTorch's compiler does not follow."""

    def __init__(self) -> None:
        self.batches: tuple[_Over, ...] = ()


_entered = _Entered()


class global_batch:  # noqa: N801, a context reads like a function
    """Within it a batch is that of all ranks: each passes its own samples, and they count as one batch.

    The mean and GKL's normaliser then run over the samples of every rank, however many each of them has, and
    `class_sums` (hence `ClassPrior.update`) adds up those of all ranks. Under "mean" each rank's loss is its samples'
    part of the whole, times the number of ranks: the mean of the ranks' losses, and the mean of their gradients, which
    DistributedDataParallel takes, are those of the whole batch on one device. Under "sum" the sum of the ranks' losses
    is that of the whole batch, and under "none" each rank has its own samples' entries.

    All ranks must make the same calls in the same order, as with any collective; a rank without samples too, with an
    empty batch or weights of 0.

    Parameters
    ----------
    process_group : torch.distributed.ProcessGroup, optional
        PyTorch: the ranks; all of them by default. Where `torch.distributed` is not initialised there is one rank, and
        the context changes nothing.
    axis_name : str or tuple of str, optional
        JAX: the mapped axis over which the batch is split, as in `jax.lax.psum`; to be entered within `jax.shard_map`
        (or `jax.vmap` with an `axis_name`). Under `jax.jit` with sharded arrays no context is needed: there
        the arrays are whole.

    Raises
    ------
    TypeError
        In the call of a loss: arrays of another library, JAX arrays without `axis_name`, PyTorch tensors with one.
    ValueError
        In the call of a loss: this process is not in `process_group`; no axis of that name is being mapped.

    Notes
    -----
    The context holds for the thread that entered it. No gradient flows between ranks but in second
    derivatives of `gkl`, whose normaliser depends on every rank's teacher: PyTorch's `all_reduce` is differentiated.

    Examples
    --------
    >>> import torch
    >>> import gklx
    >>> student = torch.zeros(2, 3, requires_grad=True)
    >>> with gklx.global_batch():  # a world of one needs no set-up
    ...     loss = gklx.gkl(student, torch.eye(2, 3))
    >>> loss.backward()
    """

    def __init__(self, *, process_group: Any = None, axis_name: Any = None) -> None:
        self._over = _Over(process_group, axis_name)

    def __enter__(self) -> "global_batch":
        _entered.batches = (*_entered.batches, self._over)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _entered.batches = _entered.batches[:-1]


def ranks_of(library: Library) -> Ranks | None:
    """The ranks over which a batch of this library's arrays is spread now; None for one."""
    if not _entered.batches:
        return None
    over = _entered.batches[-1]
    if library.backend == "torch":
        return _of_torch(over)
    if library.backend == "jax":
        return _of_jax(over)
    raise TypeError(f"global_batch must hold PyTorch or JAX arrays, got {library.name}")


def _of_torch(over: _Over) -> Ranks | None:
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

    def total(x: Array) -> Array:
        from torch.distributed import _functional_collectives as collectives

        # The collectives that the compiler takes and autograd differentiates.
        summed = collectives.all_reduce(x, "sum", distributed.group.WORLD if group is None else group)
        return collectives.wait_tensor(summed)  # type: ignore[no-untyped-call]

    return Ranks(size, total)


def _of_jax(over: _Over) -> Ranks | None:
    if over.axis_name is None or over.process_group is not None:
        raise TypeError(f"global_batch must have an axis_name for JAX, got process_group {over.process_group!r}")
    lax = sys.modules["jax"].lax
    try:
        size = lax.psum(1, over.axis_name)  # a Python number: JAX knows it when it traces
    except NameError as error:
        raise ValueError(f"axis_name must name an axis that is being mapped, got {over.axis_name!r}") from error
    return Ranks(size, lambda x: lax.psum(x, over.axis_name))
