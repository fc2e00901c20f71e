"""Compares a student's logits with a teacher's: files, arrays or batches of any size."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from ._scoring.samples import Parameters
    from ._scoring.statistics import ClassScore, DeltaP, Estimate, Perplexity, Score, Scores, Summary

__all__ = [
    "ClassScore",
    "DeltaP",
    "Estimate",
    "Parameters",
    "Perplexity",
    "Score",
    "Scores",
    "Summary",
    "score",
    "score_candidates",
]


def __getattr__(name: str) -> Any:
    """What `score` returns is imported on first use: `import gklx` need not wait for it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("._scoring.statistics", __package__), name)


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
    targets: Any = None,
    sample_weight: Any = None,
    where_label: int | None = None,
    top_k: Sequence[int] = (),
    weights: str | None = None,
) -> Score:
    """Statistics of the losses over samples: mean and its error, quantiles, parts, top-1 agreement.

    The logits are processed in blocks of rows; the next blocks are read while others are computed. There is one pass,
    or two where labels are given for a class prior. But for rounding the result does not depend on blocks, shards,
    batches or the order of samples: GKL's normaliser and the class prior are those of all samples.

    Parameters
    ----------
    student, teacher : path, sequence of paths, array or iterable of arrays
        Logits [samples, classes] or with more leading axes, of one shape. A path is a `.npy` file, `FILE.npz::key`,
        `FILE.safetensors::tensor`, a Zarr array, or a pattern such as ``logits-*.npy``, whose matches are joined in
        natural order, or a dump of llama.cpp's. Arrays are of any supported library. With
        ``teacher=None`` `student` is an iterable of batches (student, teacher) or (student, teacher, labels), or a
        function that returns one.
    labels : as above, optional
        Integers in [0, classes), one a sample. With them the weights of ikl and gkl are the class prior, where it fits
        the memory; without them each sample's softmax(teacher / weight_temperature).
    losses : sequence of {"kl", "dkl", "ikl", "gkl", "reverse_kl"}
        The first orders the worst classes.
    temperature, weight_temperature, gamma, mse_weight, ce_weight : float
        As in the losses.
    backend : {"numpy", "torch", "jax", "cupy", "array_api_strict", "dask"}, optional
        The library that computes; by default that of the arrays, and NumPy for files. "dask" computes blocks in NumPy
        on the workers of a cluster, which must have access to the same files.
    device : str, optional
        The library's name of a device, such as "cuda:0".
    scheduler : str, optional
        The address of a Dask scheduler; for ``backend="dask"``, by default a cluster on this machine's cores.
    memory : int or str, optional
        A bound on the memory of the process, in bytes or as "2GB"; by default half of what is free may be used.
    batch_size : int, optional
        Samples a block; by default what suits the library and the bound.
    strict : bool
        A sample with NaN or +inf among its logits is an error instead of being left out and counted.
    work_dir : path, optional
        A folder that keeps the progress of a run over files: after an interruption the same call resumes it.
    progress : bool
        A progress bar on the standard error stream.
    per_sample : path, optional
        A `.npy` or `.parquet` file for the values of every sample.
    plot : path, optional
        An `.svg`, `.png` or `.html` file for a picture of them.
    targets : path or array, optional
        The true next class of each sample, integers in [0, classes): for the perplexities and the differences of its
        probability. By default those that the files carry.
    sample_weight : path or array, optional
        A mask, 1 or True for a sample that counts, 0 or False for one that does not, whatever its logits hold.
    where_label : int, optional
        Samples of this label or target do not count, as -100 of padding.
    top_k : sequence of int
        For each k the share of the teacher's k largest classes that are among the student's.
    weights : {"prior", "teacher"}, optional
        Of ikl and gkl. "prior" needs labels, and raises where the class prior does not fit the memory.

    Returns
    -------
    Score
        A named tuple: samples, skipped, undefined, top1_agreement, losses[name].mean, .stderr, .median, .p99 and so
        on, worst_classes; with targets perplexity and delta_p. Values are sums over samples in float64 of what the
        library computed in the logits' dtype, float32 at least. Quantiles are exact up to 4,194,304 samples and by a
        t-digest beyond.

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit together or cannot be read; nothing to score; with `strict`, an undefined sample.
    OSError
        A file that cannot be written.
    ModuleNotFoundError
        psutil or rich is not installed: both are in the extra `cli`.

    See Also
    --------
    score_candidates : Several students against one teacher.

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
        from ._scoring.comparison import Request, score
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("psutil", "rich"):
            raise
        raise ModuleNotFoundError(
            f"gklx.score needs {missing}, which is not installed (pip install 'gklx[cli]')", name=missing
        ) from None

    found = score(
        Request(
            student=student,
            teacher=teacher,
            labels=labels,
            losses=(losses,) if isinstance(losses, str) else tuple(losses),
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
            targets=targets,
            sample_weight=sample_weight,
            where_label=where_label,
            top_k=tuple(top_k),
            weights=weights,
        )
    )
    return cast("Score", found)


def score_candidates(students: Mapping[str, Any], teacher: Any, labels: Any = None, **options: Any) -> Scores:
    """Statistics of several candidates against one teacher, in one pass over the teacher.

    Parameters
    ----------
    students : mapping of str to path, sequence of paths or array
        The candidates by name; at least one. They hold the same samples and classes as the teacher.
    teacher, labels
        As in `score`.
    **options
        As in `score`, without `per_sample`.

    Returns
    -------
    Scores
        A named tuple: teacher, its name; students[name], a `Score` each; differences[name][loss], the mean of each
        candidate but the first less that of the first, with the standard error of a paired comparison.

    See Also
    --------
    score : One student against its teacher.

    Examples
    --------
    >>> import numpy as np
    >>> import gklx
    >>> teacher = np.random.default_rng(0).normal(size=(100, 10))
    >>> found = gklx.score_candidates({"fine": teacher.round(2), "coarse": teacher.round()}, teacher, losses=["kl"])
    >>> value, stderr = found.differences["coarse"]["kl"]
    >>> print(f"{value:.5f} ± {stderr:.5f}")
    0.03456 ± 0.00150
    """
    if not isinstance(students, Mapping):
        raise TypeError(f"students must be a mapping of names to logits, got {type(students).__name__}")
    return cast("Scores", score(students, teacher, labels, **options))
