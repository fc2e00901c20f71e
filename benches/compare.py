"""Compare the time of gklx with that of its alternatives and of a copy of its inputs to its outputs; check the goals.

The benchmark times what users do: value and both gradients of `kl` and `gkl` in eager and compiled PyTorch, jitted JAX
and NumPy; a published recipe with the student's gradient alone; small calls; and `gklx score` on files. gklx, the peer
and the copy take turns in one process. Before timing, every result is compared with the definition in float64.

    python benches/compare.py                          # writes to benches/results/; five minutes on an idle machine
    python benches/compare.py --score --score-before PYTHON
                                                       # also `gklx score`, and that of another interpreter's gklx
    python benches/compare.py --device cuda            # on a GPU, for which there are no goals
    python benches/compare.py --quick                  # a smoke test, writes only to `--output`
    python benches/compare.py --only 'JAX.*4,096'      # only what matches; writes only to `--output`
"""

import argparse
import functools
import gc
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import arrays
import definitions
import pages
import peers
import plots
import scoring
from pages import figures, markdown, seconds
from peers import GKL, GKL_RECIPE, KL, KL_STUDENT, Call, Request, Task
from timing import Spread, ratio, spread, take_turns

PACKAGES = ("numpy", "array-api-compat", "torch", "jax", "optax")
COLUMNS = ("size", "library", "what", "peer", "milliseconds", "peer milliseconds", "ratio", "low", "high", "goal")
COPY, MICROSECOND = "a copy", "a microsecond"
# Relative to the value, and to the largest entry of a gradient's row. For the half precisions the bound leaves room for
# the rounding of a peer that computes in them.
_TOLERANCES = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.5}
_TABLE_BYTES = 8e9  # larger tables of the class prior are skipped


class Plan(NamedTuple):
    """The sizes, dtypes and repetitions of a run."""

    sizes: tuple[tuple[int, int], ...]
    """Batch and classes."""
    dtypes: tuple[str, ...] = ("float32",)
    turns: int = 11
    seconds: float = 0.1
    """The minimum time of one turn of one call."""
    compiler: str = "inductor"
    gigabytes: float = 2.0
    """The size of both scored files together."""
    score_classes: int = 32_000
    score_turns: int = 3


FULL = Plan(sizes=((512, 1_000), (4_096, 1_000), (256, 32_000)))
GPU = FULL._replace(
    sizes=((8_192, 1_000), (4_096, 32_000), (1_024, 128_256)), dtypes=("float32", "float16", "bfloat16")
)
# The `eager` compiler runs the captured graph, so that no C++ is compiled.
QUICK = Plan(((8, 50),), turns=3, seconds=5e-4, compiler="eager", gigabytes=2e-4, score_classes=100)


class Suite(NamedTuple):
    """A library, the way its users call it, and the calls that it is compared with."""

    library: str
    """Its name in the tables."""
    module: str
    build: Callable[[peers.Loss, Task, bool], Call]
    requests: tuple[Request, ...]
    peer_losses: tuple[tuple[str, peers.Loss, str], ...] = ()
    """The name, the loss and the required module of each peer."""
    peer_request: Request = KL
    copy_module: str = ""
    """The module that makes the copy; empty for small calls."""
    device: str = "cpu cuda"
    goals: Mapping[str, tuple[float, ...]] = MappingProxyType({})
    """For each peer and size of the plan: the least speed-up over a loss, or the largest multiple of a copy's time."""


_NUMPY, _TORCH, _CUPY = (functools.partial(peers.by_value_and_grad, library) for library in ("numpy", "torch", "cupy"))
_F_KL_DIV = ("F.kl_div", peers.f_kl_div, "torch")
_LIGER = ("Liger-Kernel", peers.liger, "liger_kernel.transformers")
_OPTAX = ("optax", peers.optax_kl, "optax")
_EAGER = Suite("PyTorch", "torch", peers.by_backward, (KL, GKL), (_F_KL_DIV,), copy_module="torch")
SUITES = (
    _EAGER._replace(goals={"F.kl_div": (2.5, 4, 4)}),
    _EAGER._replace(
        requests=(GKL_RECIPE,),
        peer_losses=(_F_KL_DIV, _LIGER),
        peer_request=KL_STUDENT,
        goals={"F.kl_div": (1.5, 3, 3)},
    ),
    _EAGER._replace(library="PyTorch compiled", build=peers.by_compiled_backward, goals={"F.kl_div": (2, 2, 2)}),
    Suite("JAX", "jax", peers.by_jit, (KL, GKL), (_OPTAX,), copy_module="numpy", goals={"optax": (3, 3, 3)}),
    Suite("NumPy", "numpy", _NUMPY, (KL, GKL), copy_module="numpy", device="cpu", goals={COPY: (4, 2.5, 2.5)}),
    Suite("CuPy", "cupy", _CUPY, (KL, GKL), copy_module="cupy", device="cuda"),
)
SMALL = (
    ((1, 10), Suite("NumPy", "numpy", _NUMPY, (KL, GKL), goals={MICROSECOND: (30,)})),
    ((1, 10), Suite("PyTorch value_and_grad", "torch", _TORCH, (KL, GKL), goals={MICROSECOND: (50,)})),
    ((128, 10), _EAGER._replace(library="PyTorch backward", copy_module="", goals={"F.kl_div": (1,)})),
)


class Row(NamedTuple):
    """One call compared with one other."""

    size: str
    library: str
    what: str
    peer: str
    seconds: float | None
    peer_seconds: float | None
    ratio: Spread
    """The peer's time divided by gklx's where the peer is a loss; otherwise gklx's divided by the peer's."""
    goal: float | None
    at_least: bool

    @property
    def goal_text(self) -> str:
        """The goal as text; empty where there is none."""
        return "" if self.goal is None else f"{'≥' if self.at_least else '≤'} {self.goal:g}"

    @property
    def met(self) -> bool:
        """Whether the median meets the goal."""
        assert self.goal is not None
        return self.ratio.median >= self.goal if self.at_least else self.ratio.median <= self.goal

    @property
    def ratio_text(self) -> str:
        """The ratio and its spread."""
        return f"{figures(self.ratio.median)} ({figures(self.ratio.low)} – {figures(self.ratio.high)})"

    def cells(self) -> tuple[Any, ...]:
        """The row of the CSV file."""
        times = ("" if x is None else x * 1e3 for x in (self.seconds, self.peer_seconds))
        return (self.size, self.library, self.what, self.peer, *times, *self.ratio, self.goal_text)


class Run(NamedTuple):
    """The options of a run, and what it left out, with the reasons."""

    plan: Plan
    device: str
    only: re.Pattern[str]
    left_out: dict[str, str]

    def is_available(self, name: str, module: str) -> bool:
        """Whether a module can be used; if not, the reason is recorded."""
        reason = peers.missing(module, self.device)
        if reason is None and name == "PyTorch compiled":
            reason = peers.cannot_compile(self.device, self.plan.compiler)
        if reason is not None:
            self.left_out[name] = reason
        return reason is None


def log(message: str) -> None:
    """Report progress on standard error."""
    print(message, file=sys.stderr, flush=True)


# --- losses -----------------------------------------------------------------------------------------------------------


def measure(run: Run, suite: Suite, task: Task, size_index: int) -> list[Row]:
    """Check and time a suite; `size_index` is the place of the task's size in the plan."""
    recipe = GKL_RECIPE in suite.requests
    label = f"{suite.library}{' recipe' if recipe else ''} {task.size}"
    is_supported = task.device in suite.device and (suite.module, task.dtype) != ("cupy", "bfloat16")
    if not (is_supported and run.only.search(label) and run.is_available(suite.library, suite.module)):
        return []
    if recipe and 4 * task.classes**2 > _TABLE_BYTES:
        run.left_out[label] = "the prior's table is too large"
        return []
    log(f"{label}: building and checking")
    calls: dict[str, Callable[[], Any]] = {}
    own_names = [request.what for request in suite.requests]
    for request in suite.requests:
        calls[request.what] = _checked_call(suite.build(request.loss(task), task, request.both), request, task, label)
    peer_names = []
    for name, loss, module in suite.peer_losses:
        if (name != "Liger-Kernel" or task.device == "cuda") and run.is_available(name, module):
            call = suite.build(loss, task, suite.peer_request.both)
            calls[name] = _checked_call(call, suite.peer_request, task, f"{label}, {name}")
            peer_names.append(name)
    module = "torch" if suite.copy_module == "numpy" and task.device == "cuda" else suite.copy_module
    copies = peers.copies(module, task, suite.requests[0].both) if module else {}
    log(f"{label}: timing")
    taken = take_turns({**calls, **copies}, run.plan.turns, run.plan.seconds)
    times = {name: taken[name] for name in [*own_names, *peer_names]}
    if copies:
        times[COPY] = min((taken[name] for name in copies), key=lambda turns: spread(turns).median)
    elif not peer_names:
        times[MICROSECOND] = [1e-6] * run.plan.turns
    return [
        _row(suite, task, size_index, what, peer, times)
        for what in own_names
        for peer in times
        if peer not in own_names
    ]


def _checked_call(call: Call, request: Request, task: Task, label: str) -> Call:
    """Return the call; raise AssertionError where its results differ from the definition."""
    error = definitions.difference(peers.reference(request, task), definitions.some_rows_on_host(call()))
    if not error <= _TOLERANCES[task.dtype]:
        raise AssertionError(f"{label}, {request.what}: {error:.1e} from the definition in float64")
    return call


def _row(suite: Suite, task: Task, size_index: int, what: str, peer: str, times: dict[str, list[float]]) -> Row:
    at_least = peer not in (COPY, MICROSECOND)
    goals = suite.goals.get(peer, ()) if task.device == "cpu" else ()
    return Row(
        task.size,
        suite.library,
        what,
        peer,
        spread(times[what]).median,
        spread(times[peer]).median,
        ratio(times[peer], times[what]) if at_least else ratio(times[what], times[peer]),
        goals[size_index] if goals else None,
        at_least,
    )


def losses(run: Run) -> list[Row]:
    """Measure all suites at every size, and the small calls on a CPU."""
    rows = []
    for size_index, (batch, classes) in enumerate(run.plan.sizes):
        for dtype in run.plan.dtypes:
            task = Task(batch, classes, dtype, run.device, run.plan.compiler)
            for suite in SUITES:
                rows += measure(run, suite, task, size_index)
                _free_caches(run.device)
    for size, suite in SMALL if run.device == "cpu" else ():
        rows += measure(run, suite, Task(*size), 0)
    return rows


def _free_caches(device: str) -> None:
    """Free the prior's table, the programs that PyTorch compiled, and the memory pools on a GPU."""
    peers.prior_of.cache_clear()
    gc.collect()
    if "torch" in sys.modules:
        sys.modules["torch"].compiler.reset()
    if device == "cuda":
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()
        if "cupy" in sys.modules:
            sys.modules["cupy"].get_default_memory_pool().free_all_blocks()


# --- files ------------------------------------------------------------------------------------------------------------


def scores(run: Run, before: str | None, folder: Path | None) -> list[Row]:
    """Compare `gklx score` of all four losses with a plain read of its files and with another version."""
    plan = run.plan
    arrays.logits.cache_clear()
    with tempfile.TemporaryDirectory(dir=folder) as dump_folder:
        paths = scoring.dumps(Path(dump_folder), plan.gigabytes, plan.score_classes)
        bytes_ = sum(path.stat().st_size for path in paths)
        runs: dict[str, list[scoring.Scored]] = {"gklx score": []}
        calls: dict[str, Callable[[], Any]] = {"a plain read": lambda: scoring.read(paths)}
        if before:
            runs["the version before"] = []
        for name, scored in runs.items():
            python = before if name != "gklx score" else None
            calls[name] = lambda python=python, scored=scored: scored.append(scoring.scored(paths, python=python))
        log("gklx score: timing")
        taken = take_turns(calls, plan.score_turns, 0, warm=False)
    own, peak = taken["gklx score"], max(scored.peak_bytes for scored in runs["gklx score"])
    size = f"{scoring.samples_in(plan.gigabytes, plan.score_classes):,} × {plan.score_classes:,} float16"
    what, rows = f"all four losses, {bytes_ / 1e9:.3g} GB", []
    for peer, goal, at_least in (("the version before", 3.0, True), ("a plain read", 1.3, False)):
        if peer in taken:
            times_ratio = ratio(taken[peer], own) if at_least else ratio(own, taken[peer])
            medians = spread(own).median, spread(taken[peer]).median
            rows.append(Row(size, "gklx score", what, peer, *medians, times_ratio, goal, at_least))
    for scored in runs.get("the version before", []):
        scoring.check(runs["gklx score"][0], scored)
    peak_gigabytes = Spread(*(peak / 1e9,) * 3)
    return [*rows, Row(size, "gklx score", "peak resident memory", "1 GB", None, None, peak_gigabytes, 1.0, False)]


# --- the page ---------------------------------------------------------------------------------------------------------

_METHOD = """\
Value and gradients: eager PyTorch by the loss and `backward()`, compiled PyTorch the same through `torch.compile`, JAX
by `jit(value_and_grad(…))`, NumPy and CuPy by `value_and_grad`. `kl` and `gkl γ=1` (the teacher's own weights) give
both gradients, and so do their peers, `F.kl_div` and optax on log-softmax. `gkl recipe` is that of CIFAR-100: a class
prior chosen by labels, γ = 0.3, temperature 4, both weights 4, a frozen teacher. Its peer gives the student's gradient
alone and has no temperature, which saves it two passes. The prior's table is float32, 4 GB at 32,000 classes; the
classes of the batch have random rows, the others uniform ones.

Compared with another loss, the ratio is its time divided by gklx's: above 1 gklx is the faster. Compared with a copy,
it is gklx's time divided by that of copying both inputs to the outputs (for one gradient, of adding both inputs into
it), by the fastest of the methods tried, into memory that is already allocated. A copy does not include reading a
prior."""
_METHOD_OF_FILES = """\
`gklx score` is timed from the start of the process to its end, on two generated `.npy` files in the page cache, with
`--memory 1GB`; the plain read reads the same files 4 MiB at a time. The results of all runs agree."""


def page(run: Run, rows: Sequence[Row], command: str, name: str, loads: Sequence[str], picture: bool) -> str:
    """Render a run as Markdown."""
    where = pages.machine(run.device)
    lines = pages.heading(f"gklx compared with its peers: {where}", command, where, PACKAGES, loads)
    if run.plan.compiler != "inductor":
        lines += [f"A smoke test: `torch.compile` ran with `{run.plan.compiler}`.", ""]
    with_goal = [row for row in rows if row.goal is not None]
    lines += [_METHOD, "", f"Medians of {run.plan.turns} turns, and their middle half.", ""]
    if any(row.library == "gklx score" for row in rows):
        lines += [_METHOD_OF_FILES, ""]
    if picture:
        lines += [f"![Times, as multiples of a copy]({name}.svg)", ""]
    if with_goal:
        lines += ["## Goals", "", f"{sum(row.met for row in with_goal)} of {len(with_goal)} are met.", ""]
        headings = ["size", "library", "what", "compared with", "ratio (middle half)", "goal", ""]
        cells = [
            [
                row.size,
                row.library,
                row.what,
                row.peer,
                row.ratio_text,
                row.goal_text,
                "met" if row.met else "**missed**",
            ]
            for row in with_goal
        ]
        lines += markdown(headings, cells, right=(4, 5))
    headings = ["size", "library", "what", "time", "compared with", "its time", "ratio (middle half)"]
    timed = [row for row in rows if row.seconds is not None and row.peer_seconds is not None]
    cells = [
        [row.size, row.library, row.what, seconds(row.seconds), row.peer, seconds(row.peer_seconds), row.ratio_text]
        for row in timed
    ]
    lines += ["## All measurements", "", *markdown(headings, cells, right=(3, 5, 6))]
    if run.left_out:
        reasons = ([name, why.replace("|", "\\|")] for name, why in run.left_out.items())
        lines += ["## Left out", "", *markdown(["what", "why"], reasons)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, some seconds; writes only to --output")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", metavar="PATTERN", help="a regular expression, searched in 'JAX 256 × 32,000'")
    parser.add_argument("--score", action="store_true", help="time `gklx score` on files too")
    parser.add_argument("--score-before", metavar="PYTHON", help="an interpreter with another version of gklx")
    parser.add_argument("--score-folder", type=Path, metavar="DIR", help="folder of the temporary files")
    parser.add_argument("--output", type=Path, help="folder of the results [benches/results]")
    options = parser.parse_args(arguments)
    # Set before JAX is imported: on a GPU it would otherwise reserve most of the memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if options.device == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    elif reason := peers.missing("torch", "cuda"):  # which computes the definition on the GPU
        parser.error(reason)
    plan = QUICK if options.quick else FULL if options.device == "cpu" else GPU
    run, loads = Run(plan, options.device, re.compile(options.only or ""), {}), [pages.load()]
    rows = losses(run)
    if options.score or options.score_before:
        rows += scores(run, options.score_before, options.score_folder)
    if not rows:
        parser.error(f"nothing that runs here matches --only {options.only}")
    where = pages.machine(options.device)
    name, picture = pages.slug(where), plots.drawn(plots.multiples, [row for row in rows if row.seconds is not None])
    text = page(run, rows, _command(options), name, [*loads, pages.load()], picture is not None)
    print(text)
    folder = options.output or (None if options.quick or options.only else pages.RESULTS)
    if folder is not None:
        pages.write(folder / f"{name}.md", text)
        pages.write(folder / f"{name}.csv", pages.as_csv(COLUMNS, (row.cells() for row in rows)))
        if picture is not None:
            pages.write(folder / f"{name}.svg", picture)
        log(f"written to {folder}")


def _command(options: argparse.Namespace) -> str:
    """The command without the paths, which differ between machines."""
    device = f" --device {options.device}" if options.device != "cpu" else ""
    only = f" --only '{options.only}'" if options.only else ""
    score = " --score-before PYTHON" if options.score_before else " --score" if options.score else ""
    return f"python benches/compare.py{' --quick' if options.quick else ''}{device}{only}{score}"


if __name__ == "__main__":
    main()
