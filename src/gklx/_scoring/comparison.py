"""Scores a request: checks its arguments, runs it, and writes its files."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import __version__
from .._core.checks import type_name, whole_number
from .._core.libraries import library_of
from . import memory
from .atomic import check_apart, check_writable
from .backend import backend
from .file_formats import npz, zarr
from .gates import Gate, check_gates
from .inputs import Inputs, inputs_of, is_path
from .plot import check_plot, draw
from .plot_candidates import draw_candidates
from .pools import Pool, cluster, threads
from .progress import Progress
from .run import ChangedError, Job, run
from .sample_files import check_sample_file, write_samples
from .samples import CHOICES, Parameters, checked
from .sizes import parse_size
from .statistics import EXACT_QUANTILES, Score, Scores, differences, digest, score_of
from .streams import printable
from .values import Values
from .work_file import WorkFile, job_folder


class Request(NamedTuple):
    """The arguments of `gklx.score`."""

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
    """The file that `report`, an argument of `score`, writes to; None for standard output."""
    targets: Any = None
    sample_weight: Any = None
    where_label: int | None = None
    top_k: tuple[int, ...] = ()
    weights: str | None = None
    gates: tuple[Gate, ...] = ()


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; its message says how many samples were done."""


def score(request: Request, report: Callable[[Score | Scores], None] = lambda found: None) -> Score | Scores:
    """The score of a request.

    The files are written after the last sample, then `report` is called, then the saved progress is removed.
    """
    request = request._replace(
        batch_size=_plain(request.batch_size),
        where_label=_plain(request.where_label),
        top_k=tuple(_plain(k) for k in request.top_k),
    )
    names, parameters = _checked(request)
    if request.output is not None:
        check_writable(request.output)
    inputs = inputs_of(request.student, request.teacher, request.labels, request.targets, request.sample_weight)
    _check_against(request, inputs, names)
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
        by_prior = inputs.labelled and request.weights != "teacher" and not {"ikl", "gkl"}.isdisjoint(names)
        note = None
        try:
            pool, rows = stack.enter_context(_pool(request, inputs, by_prior=by_prior))
        except _NoRoomForPriorError as error:
            if request.weights == "prior":
                raise ValueError(str(error)) from None
            note, by_prior = f"ikl and gkl are weighed by the teacher: {error}", False
            pool, rows = stack.enter_context(_pool(request, inputs, by_prior=by_prior))
        # llama.cpp's tool has no temperature: its rules hold at temperature 1 only.
        by_tool = tuple(each and parameters.temperature == 1 for each in inputs.by_tool)
        asked = (tuple(sorted(request.top_k)), request.where_label, inputs.candidates, by_tool)
        job = Job(names, parameters, rows, request.strict, by_prior, *asked)
        progress = stack.enter_context(Progress(inputs.samples, shown=request.progress))
        work = _work_file(request, inputs, job, pool)
        done = False
        try:
            for each in (note, work.note):
                if each is not None:
                    progress.note(each)
            if work.resumed_at:
                progress.note(f"going on after {work.resumed_at:,} of {inputs.samples:,} samples")
            run(job, inputs, pool, work, progress.at)
            found = _found(request, inputs, job, pool, work)
            progress.end()
            report(found)
            done = True
        except ChangedError:
            done = True  # the records are of the old content: remove them
            raise
        except KeyboardInterrupt:
            raise Interrupted(_how_far(work, inputs)) from None
        finally:
            work.close(done=done)
    return found


def _found(request: Request, inputs: Inputs, job: Job, pool: Pool, work: WorkFile) -> Score | Scores:
    """The score from the records of all samples; writes the file of samples and the picture."""
    masking = inputs.masked or job.where_label is not None
    every, scores = [], []
    for at, by_tool in enumerate(job.by_tool):
        candidate = at if job.candidates else None
        values = Values(
            work,
            job.names,
            job.parameters,
            inputs.classes,
            labelled=inputs.labelled,
            by_prior=job.by_prior,
            candidate=candidate,
        )
        reading = "llama.cpp" if by_tool else None
        every.append(values)
        try:
            scores.append(score_of(values, job.parameters, pool.name, pool.device, masking=masking, reading=reading))
        except ValueError as error:
            raise ValueError(f"{job.candidates[at]}: {error}" if job.candidates else str(error)) from None
    if not job.candidates:
        if request.per_sample is not None:
            write_samples(every[0], request.per_sample)
        if request.plot is not None:
            draw(every[0], scores[0], request.plot, _title(request))
        return scores[0]
    first, *others = every
    compared = {name: differences(values, first) for name, values in zip(job.candidates[1:], others, strict=True)}
    found = Scores(_named(request.teacher), dict(zip(job.candidates, scores, strict=True)), compared)
    if request.plot is not None:
        draw_candidates(found, request.plot)
    return found


def _checked(request: Request) -> tuple[tuple[str, ...], Parameters]:
    names = tuple(dict.fromkeys(request.losses))
    if not names or any(name not in CHOICES for name in names):
        raise ValueError(f"losses must be among {', '.join(CHOICES)}, got {list(request.losses)}")
    if not isinstance(request.memory, (int, str, type(None))):
        raise TypeError(f"memory must be bytes or a size such as 2GB, got {type_name(request.memory)}")
    parameters = Parameters(*request.parameters)
    checked(names, parameters)
    parameters = Parameters(*(float(x) for x in parameters))
    if request.scheduler is not None and request.backend != "dask":
        raise ValueError(f'scheduler needs backend "dask", got {request.backend!r}')
    if request.scheduler == "":  # an unset variable of the shell, and no wish for a cluster of its own
        raise ValueError("scheduler must be the address of a Dask scheduler, got an empty one")
    for name in ("device", "memory"):
        if request.backend == "dask" and (given := getattr(request, name)) is not None:
            raise ValueError(f'{name} must be left to the workers with backend "dask", got {given!r}')
    size = request.batch_size
    if size is not None and not _is_whole(size):
        raise ValueError(f"batch_size must be a whole number, at least 1, got {size!r}")
    if not all(_is_whole(k) for k in request.top_k) or len(set(request.top_k)) < len(request.top_k):
        raise ValueError(f"top_k must be different whole numbers, at least 1, got {list(request.top_k)}")
    where = request.where_label
    if where is not None and whole_number(where) is None:
        raise ValueError(f"where_label must be a whole number, got {where!r}")
    for name in ("output", "per_sample", "plot", "work_dir"):
        if getattr(request, name) == "":  # an unset variable of the shell; as a path it would be the working directory
            raise ValueError(f"{name} must be the name of what to write, got an empty one")
    if request.weights not in (None, "prior", "teacher"):
        raise ValueError(f'weights must be "prior" or "teacher", got {request.weights!r}')
    return names, parameters


def _check_against(request: Request, inputs: Inputs, names: tuple[str, ...]) -> None:
    """ValueError where the request does not fit the inputs."""
    if request.top_k and max(request.top_k) > inputs.classes:
        raise ValueError(f"top_k must be at most the {inputs.classes:,} classes, got {max(request.top_k):,}")
    if request.where_label is not None and not (inputs.labelled or inputs.targeted):
        raise ValueError("where_label needs labels or targets, got neither")
    if request.weights == "prior" and not inputs.labelled:
        raise ValueError('weights "prior" needs labels, by which the class prior is made, got none')
    if request.weights == "prior" and {"ikl", "gkl"}.isdisjoint(names):
        raise ValueError(f'weights "prior" needs the loss ikl or gkl, got {", ".join(names)}')
    if request.per_sample is not None and inputs.candidates:
        raise ValueError("per_sample needs a single student, got several candidates")
    check_gates(
        request.gates,
        names,
        targeted=inputs.targeted,
        masking=inputs.masked or request.where_label is not None,
        several=bool(inputs.candidates),
        top_k=request.top_k,
    )


def _plain(x: Any) -> Any:
    """Python's integer of NumPy's; anything else as it is."""
    number = whole_number(x)
    return x if number is None else number


def _is_whole(x: Any) -> bool:
    number = whole_number(x)
    return number is not None and number >= 1


class _NoRoomForPriorError(ValueError):
    """The class prior does not fit into the memory; without it the run would fit."""


@contextlib.contextmanager
def _pool(request: Request, inputs: Inputs, *, by_prior: bool) -> Iterator[tuple[Pool, int]]:
    """The workers, and the number of rows in a chunk."""
    itemsize = np.dtype(inputs.computed_in).itemsize
    with contextlib.ExitStack() as stack:
        if request.backend == "dask":
            if inputs.stamps() is None:
                raise ValueError('backend "dask" needs files that its workers can open, got arrays')
            _rows_and_threads(inputs, itemsize, 0, 1, None, by_prior=by_prior)
            pool = stack.enter_context(cluster(request.scheduler))
            rows = max(1, 2**22 // (inputs.classes * itemsize))
        else:
            own = library_of(inputs.like)
            name = request.backend or ("numpy" if own is None or own.lazy else own.backend)
            place = stack.enter_context(backend(name, request.device, inputs.like))
            bound = parse_size(request.memory) if isinstance(request.memory, str) else request.memory
            rows, count = _rows_and_threads(
                inputs, itemsize, place.block_bytes, place.threads, bound, by_prior=by_prior
            )
            pool = stack.enter_context(threads(place, count))
        yield pool, request.batch_size or rows


def _rows_and_threads(
    inputs: Inputs, itemsize: int, block_bytes: int, threads: int, bound: int | None, *, by_prior: bool
) -> tuple[int, int]:
    """As `memory.rows_and_threads`; `_NoRoomForPriorError` where the class prior alone is too much."""
    sizes = inputs.classes, itemsize, block_bytes, threads, bound
    try:
        return memory.rows_and_threads(*sizes, _needs(inputs, by_prior=by_prior))
    except ValueError as error:
        if by_prior:
            memory.rows_and_threads(*sizes, _needs(inputs, by_prior=False))
            raise _NoRoomForPriorError(str(error)) from None
        raise


def _needs(inputs: Inputs, *, by_prior: bool) -> memory.Needs:
    """The memory that a run needs in addition to its blocks: the class prior, its sums, readers' buffers, quantiles."""
    held, a_thread, what = inputs.held_bytes + 8 * min(inputs.samples or 0, EXACT_QUANTILES), 0, []
    if by_prior:
        table = 8 * inputs.classes**2
        held, a_thread = held + 2 * table, 2 * table
        what.append(f"the class prior of {inputs.classes:,} classes (losses kl and dkl need none)")
    if inputs.held_bytes:
        what.append(f"the chunks of {inputs.held_by}, which are unpacked whole")
    return memory.Needs(held, a_thread, " and ".join(what))


def _work_file(request: Request, inputs: Inputs, job: Job, pool: Pool) -> WorkFile:
    dtype = job.record_dtype(inputs.computed_in, targeted=inputs.targeted)
    stamps = inputs.stamps()
    if request.work_dir is None or stamps is None:
        return WorkFile(dtype, None)
    # Everything that a record depends on. The weights of the two parts are applied later, when records are read.
    numbers = job.parameters._asdict()
    known = {
        "inputs": stamps,
        "labelled": inputs.labelled,
        "targeted": inputs.targeted,
        "masked": inputs.masked,
        "candidates": job.candidates,
        "where_label": job.where_label,
        "top_k": job.top_k,
        "by_prior": job.by_prior,
        "by_tool": job.by_tool,
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
    student = "Student" if request.teacher is None else _short(request.student, "Student")
    return f"{student} against {_short(request.teacher, 'teacher')}"


def _named(teacher: Any) -> str:
    return os.fspath(teacher) if isinstance(teacher, (str, os.PathLike)) else _short(teacher, "teacher")


def _short(x: Any, otherwise: str) -> str:
    """The name of a file, or what else there is to say."""
    if isinstance(x, (str, os.PathLike)):
        return printable(Path(os.fspath(x)).name)  # control characters would make the picture invalid
    return f"{len(x)} shards" if is_path(x) else otherwise
