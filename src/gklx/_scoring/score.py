"""A comparison from what was asked for to its score: checks everything, runs, and writes what is to be written."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import __version__
from .._core.libraries import library_of
from . import memory
from .atomic import check_apart, check_writable
from .backend import backend
from .file_formats import npz, zarr
from .inputs import Inputs, inputs_of
from .plot import check_plot, draw
from .pools import Pool, cluster, threads
from .progress import Progress
from .run import ChangedError, Job, run
from .sample_files import check_sample_file, write_samples
from .samples import LOSSES, Parameters, checked, record_dtype
from .statistics import EXACT_QUANTILES, Score, Values, digest, score_of
from .streams import printable
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
    output: str | None = None
    """Where `report` of `score` writes to, if that is a file."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a word on how far the run came."""


def score(request: Request, report: Callable[[Score], None] = lambda found: None) -> Score:
    """The score; files are written once everything is known, then `report` is called, then the progress is dropped."""
    names, parameters = _checked(request)
    if request.output is not None:
        check_writable(request.output)
    inputs = inputs_of(request.student, request.teacher, request.labels)
    if request.per_sample is not None:
        check_sample_file(request.per_sample)
    if request.plot is not None:
        check_plot(request.plot)
    outputs = {"output": request.output, "per_sample": request.per_sample, "plot": request.plot}
    check_apart(
        ((name, path) for name, path in outputs.items() if path is not None),
        (zarr.store_of(each.path) for _, stamps in inputs.stamps() or () for each in stamps),
    )
    if inputs.samples is not None and inputs.samples > EXACT_QUANTILES:
        digest()
    with contextlib.ExitStack() as stack:
        stack.callback(zarr.forget)
        stack.callback(npz.forget)
        pool, rows = stack.enter_context(_pool(request, inputs, names))
        job = Job(names, parameters, rows, request.strict)
        progress = stack.enter_context(Progress(inputs.samples, shown=request.progress))
        work = _work_file(request, inputs, job, pool)
        done = False
        try:
            if work.note is not None:
                progress.note(work.note)
            if work.resumed_at:
                progress.note(f"going on after {work.resumed_at:,} of {inputs.samples:,} samples")
            run(job, inputs, pool, work, progress.at)
            values = Values(work, names, parameters, inputs.classes, inputs.labelled)
            found = score_of(values, parameters, pool.name, pool.device)
            if request.per_sample is not None:
                write_samples(values, request.per_sample)
            if request.plot is not None:
                draw(values, found, request.plot, _title(request))
            progress.end()
            report(found)
            done = True
        except ChangedError:
            done = True  # what was computed is of no use
            raise
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
            memory.rows_and_threads(inputs.classes, itemsize, 0, 1, None, _needs(inputs, names))
            pool = stack.enter_context(cluster(request.scheduler))
            rows = max(1, 2**22 // (inputs.classes * itemsize))
        else:
            own = library_of(inputs.like)
            name = request.backend or ("numpy" if own is None or own.lazy else own.backend)
            place = stack.enter_context(backend(name, request.device, inputs.like))
            bound = memory.parse_size(request.memory) if isinstance(request.memory, str) else request.memory
            rows, count = memory.rows_and_threads(
                inputs.classes, itemsize, place.block_bytes, place.threads, bound, _needs(inputs, names)
            )
            pool = stack.enter_context(threads(place, count))
        yield pool, request.batch_size or rows


def _needs(inputs: Inputs, names: tuple[str, ...]) -> memory.Needs:
    """What is held beside the blocks: the class prior and the sums for it, and what reading keeps."""
    held, a_thread, what = inputs.held_bytes, 0, []
    if inputs.labelled and not {"ikl", "gkl"}.isdisjoint(names):
        table = 8 * inputs.classes**2
        held, a_thread = held + 2 * table, 2 * table
        what.append(f"the class prior of {inputs.classes:,} classes (losses kl and dkl need none)")
    if inputs.held_bytes:
        what.append(f"the chunks of {inputs.held_by}, which are unpacked whole")
    return memory.Needs(held, a_thread, " and ".join(what))


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
    if isinstance(x, (list, tuple)):
        return f"{len(x)} shards"
    return printable(Path(os.fspath(x)).name)  # else it may not be drawn at all
