"""A comparison from what was asked for to its score: checks everything, runs, and writes what is to be written."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import __version__, _freed_memory
from .._core.libraries import library_of
from . import memory
from .backend import backend
from .inputs import Inputs, inputs_of
from .plot import check_plot, draw
from .pools import Pool, cluster, threads
from .progress import Progress
from .run import Job, run
from .sample_files import check_sample_file, write_samples
from .samples import LOSSES, Parameters, checked, record_dtype
from .statistics import EXACT_QUANTILES, Score, Values, digest, score_of
from .work_file import WorkFile, job_folder


class Request(NamedTuple):
    """What was asked for, as in `gklx.score`."""

    student: Any
    teacher: Any
    labels: Any
    losses: tuple[str, ...]
    parameters: tuple[float, ...]
    backend: str | None
    device: str | None
    scheduler: str | None
    memory: int | str | None
    batch_size: int | None
    strict: bool
    work_dir: str | None
    progress: bool
    per_sample: str | None
    plot: str | None


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a word on how far the run came."""


def score(request: Request) -> Score:
    """The score; files are written once everything is known, and the progress is dropped after that."""
    names, parameters = _checked(request)
    inputs = inputs_of(request.student, request.teacher, request.labels)
    if request.per_sample is not None:
        check_sample_file(request.per_sample)
    if request.plot is not None:
        check_plot(request.plot)
    if inputs.samples is not None and inputs.samples > EXACT_QUANTILES:
        digest()
    with contextlib.ExitStack() as stack:
        pool, rows = stack.enter_context(_pool(request, inputs, names))
        job = Job(names, parameters, rows, request.strict)
        progress = stack.enter_context(Progress(inputs.samples, shown=request.progress))
        work = _work_file(request, inputs, job, pool)
        done = False
        try:
            if work.resumed_at:
                progress.note(f"going on after {work.resumed_at:,} of {inputs.samples:,} samples")
            run(job, inputs, pool, work, progress.at)
            values = Values(work, names, parameters, inputs.classes, inputs.labelled)
            found = score_of(values, parameters, pool.name, pool.device)
            if request.per_sample is not None:
                write_samples(values, request.per_sample)
            if request.plot is not None:
                draw(values, found, request.plot, _title(request))
            done = True
        except KeyboardInterrupt:
            raise Interrupted(_how_far(work, inputs)) from None
        finally:
            work.close(done=done)
    return found


def _checked(request: Request) -> tuple[tuple[str, ...], Parameters]:
    names = tuple(dict.fromkeys(request.losses))
    if not names or any(name not in LOSSES for name in names):
        raise ValueError(f"losses must be among {', '.join(LOSSES)}, got {list(request.losses)}")
    parameters = Parameters(*request.parameters)
    checked(names, parameters)
    parameters = Parameters(*(float(x) for x in parameters))
    if request.scheduler is not None and request.backend != "dask":
        raise ValueError(f'scheduler needs backend "dask", got {request.backend!r}')
    for name in ("device", "memory"):
        if request.backend == "dask" and (given := getattr(request, name)) is not None:
            raise ValueError(f'{name} must be left to the workers with backend "dask", got {given!r}')
    size = request.batch_size
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(f"batch_size must be a whole number, at least 1, got {size!r}")
    return names, parameters


@contextlib.contextmanager
def _pool(request: Request, inputs: Inputs, names: tuple[str, ...]) -> Iterator[tuple[Pool, int]]:
    """The workers, and the rows of a chunk for each."""
    itemsize = np.dtype(inputs.computed_in).itemsize
    with contextlib.ExitStack() as stack:
        if request.backend == "dask":
            if inputs.stamps() is None:
                raise ValueError('backend "dask" needs files that its workers can open, got arrays')
            pool = stack.enter_context(cluster(request.scheduler))
            rows = max(1, 2**22 // (inputs.classes * itemsize))
        else:
            own = library_of(inputs.like)
            name = request.backend or ("numpy" if own is None or own.lazy else own.backend)
            place = stack.enter_context(backend(name, request.device, inputs.like))
            fixed = 0
            if inputs.labelled and not {"ikl", "gkl"}.isdisjoint(names):
                fixed = inputs.classes**2 * 8 * (2 + place.threads)
            bound = memory.parse_size(request.memory) if isinstance(request.memory, str) else request.memory
            rows, count = memory.rows_and_threads(
                inputs.classes, itemsize, place.block_bytes, place.threads, bound, fixed
            )
            _freed_memory.keep()
            pool = stack.enter_context(threads(place, count))
        yield pool, request.batch_size or rows


def _work_file(request: Request, inputs: Inputs, job: Job, pool: Pool) -> WorkFile:
    dtype = record_dtype(job.names, inputs.computed_in)
    stamps = inputs.stamps()
    if request.work_dir is None or stamps is None:
        return WorkFile(dtype, None)
    # All that a record depends on; the weights of the parts come in later.
    numbers = job.parameters._asdict()
    known = {
        "inputs": stamps,
        "labelled": inputs.labelled,
        "losses": job.names,
        "parameters": {key: numbers[key] for key in ("temperature", "weight_temperature", "gamma")},
        "backend": pool.name,
        "device": "" if pool.name == "dask" else pool.device,
        "version": __version__,
    }
    return WorkFile(dtype, job_folder(Path(request.work_dir), known))


def _how_far(work: WorkFile, inputs: Inputs) -> str:
    of = f" of {inputs.samples:,}" if inputs.samples is not None else ""
    goes_on = "; the same command goes on from there" if work.folder is not None else ""
    return f"interrupted after {work.records:,}{of} samples{goes_on}"


def _title(request: Request) -> str:
    if request.teacher is None or library_of(request.student) is not None:
        return "Student against teacher"
    return f"{_short(request.student)} against {_short(request.teacher)}"


def _short(x: Any) -> str:
    return Path(str(x)).name if not isinstance(x, (list, tuple)) else f"{len(x)} shards"
