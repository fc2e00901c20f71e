"""One batch over many processes or devices: the sums that its rows share are taken over all of them.

The collectives are those of `torch.distributed` and of JAX. Only numbers that no gradient flows into are exchanged:
four a loss, C² a `class_sums`.
"""

from types import TracebackType
from typing import Any

from ._core.ranks import GlobalBatch, entered


class global_batch:  # noqa: N801, a context reads like a function
    """Makes the samples of all ranks one batch: each rank passes its own.

    Within the context the mean and GKL's normaliser are over the samples of all ranks, which may have different numbers
    of samples, and `class_sums` (hence `ClassPrior.update`) adds up those of all ranks.

    Under "mean" the loss of a rank is its samples' part of the whole, times the number of ranks. So the mean of the
    ranks' losses, and the mean of their gradients, which DistributedDataParallel takes, are those of the whole batch on
    one device. Under "sum" the sum of the ranks' losses is that of the whole batch. Under "none" a rank has the entries
    of its own samples.

    As with any collective operation, all ranks must make the same calls in the same order. A rank without samples makes
    them with an empty batch or weights of 0.

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

    See Also
    --------
    gkl : Its normaliser is a sum over the batch.
    class_sums : The sums of a class prior.

    Notes
    -----
    The context holds for the thread that entered it, and contexts end in the reverse order of their beginnings. No
    gradient flows between ranks but in second derivatives of `gkl`, whose normaliser depends on every rank's teacher:
    PyTorch's `all_reduce` is differentiated.

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
        self._over = GlobalBatch(process_group, axis_name)

    def __enter__(self) -> "global_batch":
        entered.batches = (*entered.batches, self._over)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not (entered.batches and entered.batches[-1] is self._over):
            raise RuntimeError("global_batch must end where it began: in the same thread, the innermost one first")
        entered.batches = entered.batches[:-1]
