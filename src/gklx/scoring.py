"""A student's logits against a teacher's, at any size: files, arrays or batches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._scoring.statistics import Score

__all__ = ["score"]


def score(
    student: Any,
    teacher: Any = None,
    labels: Any = None,
    *,
    losses: Sequence[str] = ("kl", "dkl", "ikl", "gkl"),
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
    gamma: float = 1.0,
    mse_weight: float = 1.0,
    ce_weight: float = 1.0,
    backend: str | None = None,
    device: str | None = None,
    scheduler: str | None = None,
    memory: int | str | None = None,
    batch_size: int | None = None,
    strict: bool = False,
    work_dir: str | os.PathLike[str] | None = None,
    progress: bool = False,
    per_sample: str | os.PathLike[str] | None = None,
    plot: str | os.PathLike[str] | None = None,
) -> Score:
    """Statistics of the losses over samples: mean and its error, quantiles, parts, top-1 agreement.

    The logits are worked off in blocks of rows, read ahead while others are computed, in one pass, or in two where
    labels ask for a class prior. The result does not depend on blocks, shards, batches or the order of samples, but for
    rounding: GKL's normaliser and the class prior are those of all samples.

    Parameters
    ----------
    student, teacher : path, sequence of paths, array or iterable of arrays
        Logits [samples, classes] or with more leading axes, of one shape. A path is a `.npy` file, `FILE.npz::key`,
        `FILE.safetensors::tensor`, a Zarr array, or a pattern such as ``logits-*.npy``, whose matches are joined in
        natural order. Arrays are of any supported library. With ``teacher=None`` `student` is an iterable of batches
        (student, teacher) or (student, teacher, labels), or a function that returns one.
    labels : as above, optional
        Integers in [0, classes), one a sample. With them the weights of ikl and gkl are the class prior, without them
        each sample's softmax(teacher / weight_temperature).
    losses : sequence of {"kl", "dkl", "ikl", "gkl"}
        The first orders the worst classes.
    temperature, weight_temperature, gamma, mse_weight, ce_weight : float
        As in the losses.
    backend : {"numpy", "torch", "jax", "cupy", "array_api_strict", "dask"}, optional
        Where to compute; by default the library of the arrays, NumPy for files. "dask" works the blocks off in NumPy
        on the workers of a cluster, which must see the same files.
    device : str, optional
        As the library spells it.
    scheduler : str, optional
        The address of a Dask scheduler; for ``backend="dask"``, by default a cluster on this machine's cores.
    memory : int or str, optional
        A bound on the memory of the process, in bytes or as "2GB"; by default half of what is free may be used.
    batch_size : int, optional
        Samples a block; by default what suits the library and the bound.
    strict : bool
        A sample with NaN among its logits is an error instead of being left out and counted.
    work_dir : path, optional
        A folder that keeps the progress of a run over files: a run that was cut off goes on with the same call.
    progress : bool
        A progress bar on the standard error stream.
    per_sample : path, optional
        A `.npy` or `.parquet` file for the values of every sample.
    plot : path, optional
        An `.svg`, `.png` or `.html` file for a picture of them.

    Returns
    -------
    Score
        A named tuple: samples, skipped, undefined, top1_agreement, losses[name].mean, .stderr, .median, .p99 and so
        on, worst_classes. Values are sums over samples in float64 of what the library computed in the logits' dtype,
        float32 at least. Quantiles are exact up to 4,194,304 samples and by a t-digest beyond.

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit together or cannot be read; nothing to score; with `strict`, an undefined sample.
    OSError
        A file that cannot be written.
    ModuleNotFoundError
        psutil or rich is not installed: both are in the extra `cli`.

    Examples
    --------
    >>> import numpy as np
    >>> import gklx
    >>> teacher = np.log(np.asarray([[0.5, 0.5], [0.25, 0.75]]))
    >>> found = gklx.score(np.zeros((2, 2)), teacher, losses=["kl"])
    >>> print(f"{found.losses['kl'].mean:.6f} {found.top1_agreement:.0%}")
    0.065406 50%
    """
    try:
        from ._scoring.score import Request, score
    except ModuleNotFoundError as error:
        if error.name not in ("psutil", "rich"):
            raise
        raise ModuleNotFoundError(
            f"gklx.score needs {error.name}, which is not installed (pip install 'gklx[cli]')", name=error.name
        ) from None

    return score(
        Request(
            student=student,
            teacher=teacher,
            labels=labels,
            losses=tuple(losses),
            parameters=(temperature, weight_temperature, gamma, mse_weight, ce_weight),
            backend=backend,
            device=device,
            scheduler=scheduler,
            memory=memory,
            batch_size=batch_size,
            strict=strict,
            work_dir=None if work_dir is None else os.fspath(work_dir),
            progress=progress,
            per_sample=None if per_sample is None else os.fspath(per_sample),
            plot=None if plot is None else os.fspath(plot),
        )
    )
