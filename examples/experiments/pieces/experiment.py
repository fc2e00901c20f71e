"""Run an experiment: every condition, variant and seed in worker processes, then results, table and plot."""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import importlib.metadata
import itertools
import math
import multiprocessing
import os
import platform
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import gklx

from . import report
from .images import DATA_SETS, MNIST

RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = ("numpy", "scipy", "torch", "torchvision", "jax", "optax", "mlxtend", "adversarial-robustness-toolbox")
# A run has one thread: for such small networks parallel runs are faster than threads, and runs are reproducible.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}


@dataclass(frozen=True)
class Experiment:
    """A comparison of variants under several conditions, seed by seed."""

    name: str
    """The name of the files: results/<name>.json, .md and .svg."""
    title: str
    train: Callable[[str, int, Any], Mapping[str, float]]
    """Computes the metrics from variant, seed and settings; a function at the top level of a module."""
    variants: tuple[str, ...]
    """The variants in the order of the table."""
    metrics: Mapping[str, str]
    """The label of each metric, with its unit."""
    conditions: Mapping[str, Any]
    """The settings of each condition: a frozen dataclass with a field `steps_limit: int | None = None`."""
    full: Mapping[str, Any]
    """The conditions under `--full`."""
    baseline: str = "kl"
    """The variant from which the paired differences are taken."""
    higher_is_better: Mapping[str, bool] = field(default_factory=dict)
    """For each metric; True if it is absent."""


class Job(NamedTuple):
    """One run."""

    condition: str
    variant: str
    seed: int


class RunError(Exception):
    """A run failed; the message is one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(experiment: Experiment, arguments: Sequence[str] | None = None) -> int:
    """Run the experiment by its command line; return the exit status.

    Parameters
    ----------
    experiment : Experiment
        What to run.
    arguments : sequence of str, optional
        The command line without the program's name; that of `sys.argv` by default.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options, conditions = _parse(experiment, arguments)
    variants = [name for name in experiment.variants if name in (options.only or experiment.variants)]
    # The variants of a seed follow each other, so that a recipe can cache what they share, such as a teacher.
    order = itertools.product(conditions, range(options.seeds), variants)
    jobs = [Job(condition, variant, seed) for condition, seed, variant in order]
    try:
        found = dict(_progress(experiment, jobs, _metrics_of(experiment, jobs, conditions, options.processes)))
        results = {
            "experiment": experiment.name,
            "title": experiment.title,
            "command": shlex.join(
                ["python", f"examples/experiments/{experiment.name}.py", *_run_options().parse_known_args(arguments)[1]]
            ),
            "versions": _versions(),
            "baseline": experiment.baseline,
            "metrics": dict(experiment.metrics),
            "higher_is_better": {name: experiment.higher_is_better.get(name, True) for name in experiment.metrics},
            "settings": {name: _settings_record(settings) for name, settings in conditions.items()},
            "runs": [{**job._asdict(), "metrics": found[job]} for job in jobs],
        }
        report.write(results, options.out)
    except KeyboardInterrupt:
        print(f"{experiment.name}: interrupted, nothing was written", file=sys.stderr)
        return 130
    except (RunError, OSError, concurrent.futures.BrokenExecutor) as error:
        print(f"{experiment.name}: error: {error}", file=sys.stderr)
        return 1
    print(report.table(results), end="")
    return 0


def _parse(experiment: Experiment, arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The options, and the settings of each selected condition."""
    parser = _Parser(prog=f"{experiment.name}.py", description=experiment.title, parents=[_run_options()])
    parser.add_argument("--full", action="store_true", help="the papers' settings; takes hours, on a GPU if present")
    parser.add_argument("--seeds", type=positive, default=5, metavar="N", help="seeds 0 to N - 1 (default %(default)s)")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=experiment.variants,
        metavar="VARIANT",
        help=f"of {', '.join(experiment.variants)}",
    )
    parser.add_argument("--condition", nargs="+", metavar="NAME", help="only these conditions")
    parser.add_argument(
        "--steps-limit", type=positive, metavar="N", help="stop each training after N steps, for a trial run"
    )
    with_data = _has_field(next(iter(experiment.conditions.values())), "data")
    if with_data:
        parser.add_argument("--data", choices=DATA_SETS, help="the images (default mnist; with --full as published)")
        parser.add_argument("--root", metavar="DIR", help="the folder of CIFAR's files; nothing is downloaded")
    options = parser.parse_args(arguments)

    conditions = experiment.full if options.full else experiment.conditions
    unknown = [name for name in options.condition or () if name not in conditions]
    if unknown:
        parser.error(f"argument --condition: invalid choice: {unknown[0]!r} (choose from {', '.join(conditions)})")
    changes = {"steps_limit": options.steps_limit}
    if with_data:
        changes |= {"root": options.root} | ({"data": options.data} if options.data else {})
    selected = {
        name: dataclasses.replace(settings, **changes)
        for name, settings in conditions.items()
        if name in (options.condition or conditions)
    }
    for settings in selected.values():
        if with_data and settings.data != MNIST and settings.root is None:
            parser.error(f"{settings.data} needs --root DIR, the folder that holds its files")
    return options, selected


def _run_options() -> argparse.ArgumentParser:
    """The options that do not affect the results, and are left out of the recorded command."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--processes",
        type=positive,
        default=os.cpu_count() or 1,
        metavar="N",
        help="runs in parallel (default %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the results (default results/)"
    )
    return parser


def _metrics_of(
    experiment: Experiment, jobs: Sequence[Job], conditions: Mapping[str, Any], processes: int
) -> Iterator[tuple[Job, dict[str, float]]]:
    """Each job with its metrics, in the order of completion."""
    if processes == 1:
        _one_thread()
        for job in jobs:
            yield _run(experiment, job, conditions[job.condition])
        return
    os.environ.update({name: os.environ.get(name, value) for name, value in ONE_THREAD.items()})
    pool = concurrent.futures.ProcessPoolExecutor(
        min(processes, len(jobs)), mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        runs = [pool.submit(_run, experiment, job, conditions[job.condition]) for job in jobs]
        for run in concurrent.futures.as_completed(runs):
            yield run.result()
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.terminate()  # a run may take hours
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _run(experiment: Experiment, job: Job, settings: Any) -> tuple[Job, dict[str, float]]:
    where = f"{job.condition}, {job.variant}, seed {job.seed}"
    try:
        metrics = {name: float(value) for name, value in experiment.train(job.variant, job.seed, settings).items()}
    except Exception as error:
        message = (str(error) or "no message").splitlines()[0]
        raise RunError(f"{where}: {type(error).__name__}: {message}") from None
    if metrics.keys() != experiment.metrics.keys():
        raise RunError(f"{where}: measured {sorted(metrics)}, expected {sorted(experiment.metrics)}")
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise RunError(f"{where}: {experiment.metrics[name]} is {value}")
    return job, metrics


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    _one_thread()


def _one_thread() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _progress(
    experiment: Experiment, jobs: Sequence[Job], found: Iterator[tuple[Job, dict[str, float]]]
) -> Iterator[tuple[Job, dict[str, float]]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield from progress.track(found, total=len(jobs), description=experiment.name)


def _versions() -> dict[str, str]:
    """The versions of the installed packages that a recipe may use."""
    versions = {"python": platform.python_version(), "gklx": gklx.__version__}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _settings_record(settings: Any) -> dict[str, Any]:
    """The settings for the results file, without the path on this machine."""
    return {name: value for name, value in dataclasses.asdict(settings).items() if name != "root"}


def _has_field(settings: Any, name: str) -> bool:
    return any(f.name == name for f in dataclasses.fields(settings))


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
