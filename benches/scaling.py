"""Time and peak memory of GKL's value and both gradients as the number of classes C grows.

`gklx` takes O(C) per sample; the papers write the weighted mean-square error over all pairs of classes, and the
authors' code builds those pairs as [B, C, C] tensors in PyTorch. This script measures both forms on one thread, in
turns where the pairs fit into memory and `gklx` alone beyond, and fits the exponent of the growth in C. Before timing,
the forms are compared with the definition. Memory is measured in a fresh process for each form and size.

    python benches/scaling.py                       # all sizes, writes to benches/results/; minutes
    python benches/scaling.py --quick               # a smoke test of a few seconds, writes only to `--output`
"""

import argparse
import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import arrays
import definitions
import memory
import numpy as np
import pages
import plots
from pages import amount, figures, markdown, seconds
from timing import Spread, ratio, spread, take_turns

import gklx

# The weights are the teacher's softmax, as in distillation without a class prior, which has 250 GB at C = 250,000.
NUMBERS = definitions.Numbers(gamma=0.5, mse_weight=4.0)
GOAL = 1.05
_TOLERANCE = 1e-5  # of float32, relative to the row's largest entry
COLUMNS = ("batch", "classes", "form", "milliseconds", "low", "high", "pairs over gklx", "peak bytes")


class Plan(NamedTuple):
    """The sizes and repetitions of a run."""

    batch: int
    pair_classes: tuple[int, ...]
    """The numbers of classes at which the pair forms run too."""
    lone_classes: tuple[int, ...]
    """The numbers of classes at which gklx runs alone."""
    fit_from: int
    """The smallest C in the fit of gklx's exponent."""
    pair_fit_from: int
    held_logits: int
    """B * C of the control, in which the number of logits is constant."""
    held_classes: tuple[int, ...]
    memory_classes: tuple[int, ...]
    turns: int
    seconds: float
    """The minimum time of one turn of one form."""


FULL = Plan(
    batch=64,
    pair_classes=(10, 30, 100, 300, 1_000),
    lone_classes=(3_000, 10_000, 30_000, 100_000, 250_000),
    fit_from=1_000,
    pair_fit_from=100,
    held_logits=16_000_000,
    held_classes=(1_000, 10_000, 100_000, 250_000),
    memory_classes=(1_000, 10_000, 100_000, 250_000),
    turns=9,
    seconds=0.2,
)
QUICK = Plan(8, (5, 10, 20), (100, 200, 400), 20, 5, 1_600, (50, 100, 200), (20,), turns=3, seconds=0.001)


class Form(NamedTuple):
    """One way to compute the same value and gradients."""

    name: str
    library: str
    call: Callable[[Any, Any], definitions.Result]
    pairs: bool


class Row(NamedTuple):
    """One form at one size."""

    batch: int
    classes: int
    form: str
    time: Spread
    over_gklx: Spread | None
    """The time of the pairs divided by that of gklx."""
    peak: int | None
    """Bytes beyond the inputs."""


class Fit(NamedTuple):
    """The exponent k of time ~ C^k, by least squares on logarithms; the error is from the residuals."""

    form: str
    held: str
    classes: tuple[int, ...]
    exponent: float
    error: float


def _gklx(student: Any, teacher: Any) -> definitions.Result:
    loss = functools.partial(gklx.gkl, **NUMBERS._asdict())
    value, gradients = gklx.value_and_grad(loss, argnums=(0, 1))(student, teacher)
    return value, *gradients


FORMS = (
    Form("gklx, NumPy", "numpy", _gklx, pairs=False),
    Form("gklx, PyTorch", "torch", _gklx, pairs=False),
    Form("pairs, PyTorch", "torch", functools.partial(definitions.torch_pairs, numbers=NUMBERS), pairs=True),
)


def bound(form: Form, batch: int, classes: int) -> Callable[[], definitions.Result]:
    """The form bound to its arrays."""
    if form.library == "torch":
        import torch

        torch.set_num_threads(1)
    return functools.partial(form.call, *(arrays.into(form.library, x) for x in arrays.logits(batch, classes)))


def race(forms: Sequence[Form], batch: int, classes: int, plan: Plan) -> list[Row]:
    """Compare the forms with the definition, and time them in turns."""
    print(f"C = {classes:,}, B = {batch:,}", file=sys.stderr, flush=True)
    calls = {form.name: bound(form, batch, classes) for form in forms}
    logits = (x.astype(np.float64) for x in arrays.logits(batch, classes))
    reference = definitions.some_rows_on_host(definitions.gkl(np, *logits, NUMBERS))
    for name, call in calls.items():
        error = definitions.difference(reference, definitions.some_rows_on_host(call()))
        if not error <= _TOLERANCE:
            raise AssertionError(f"{name} at C = {classes:,}: {error:.1e} from the definition in float64")
    taken = take_turns(calls, plan.turns, plan.seconds)
    rows = []
    for form in forms:
        over = ratio(taken[form.name], taken[form.name.replace("pairs", "gklx")]) if form.pairs else None
        rows.append(Row(batch, classes, form.name, spread(taken[form.name]), over, None))
    return rows


def fitted(rows: Sequence[Row], form: str, held: str, start: int) -> Fit:
    """Fit the exponent of the time per sample, over the numbers of classes from `start` on."""
    fit_rows = [row for row in rows if row.form == form and row.classes >= start]
    classes = tuple(row.classes for row in fit_rows)
    times = [row.time.median / row.batch for row in fit_rows]
    (slope, _), covariance = np.polyfit(np.log(classes), np.log(times), 1, cov=True)
    return Fit(form, held, classes, float(slope), float(np.sqrt(covariance[0, 0])))


def run(plan: Plan) -> tuple[list[Row], list[Row], list[Fit]]:
    """The rows of the growth at a constant batch, those of the control, and the fits of both."""
    forms = [form for form in FORMS if importlib.util.find_spec(form.library)]
    alone = [form for form in forms if not form.pairs]
    rows = [row for classes in plan.pair_classes for row in race(forms, plan.batch, classes, plan)]
    rows += [row for classes in plan.lone_classes for row in race(alone, plan.batch, classes, plan)]
    for i, row in enumerate(rows):
        if row.classes in plan.memory_classes:
            size = json.dumps([row.form, row.batch, row.classes])
            done = subprocess.run([sys.executable, __file__, "--worker", size], capture_output=True, check=True)
            rows[i] = row._replace(peak=json.loads(done.stdout))
    # With B * C constant, the arrays have the same size at every C, and so caches and page faults the same effect.
    held = [row for c in plan.held_classes for row in race(alone, plan.held_logits // c, c, plan)]
    fits = [fitted(rows, f.name, f"B = {plan.batch}", plan.pair_fit_from if f.pairs else plan.fit_from) for f in forms]
    fits += [fitted(held, form.name, f"B · C = {plan.held_logits:,}", 0) for form in alone]
    return rows, held, fits


def worker(name: str, batch: int, classes: int) -> int | None:
    """The memory peak of one call beyond its inputs; to be run in a fresh process."""
    (form,) = (form for form in FORMS if form.name == name)
    bound(form, 2, 3)()  # lazy imports
    return memory.peak(bound(form, batch, classes))


def page(rows: Sequence[Row], fits: Sequence[Fit], plan: Plan, heading: Sequence[str], picture: bool) -> str:
    """Render a run as Markdown."""
    settings = ", ".join(f"{name}={x:g}" for name, x in NUMBERS._asdict().items())
    method = f"""\
`gkl({settings})`
with the teacher's own weights, on one thread. *gklx* is `value_and_grad(gkl, argnums=(0, 1))`. *pairs* builds the
definition's [B, C, C] tensors as the authors do, with autograd. Before timing, all were compared with the definition in
float64, to {_TOLERANCE:g} of the row's largest entry.

Time is the median of {plan.turns} turns, with their middle half. The peak of resident memory is that of the first
call in a fresh process, without its inputs and with its results; the last column counts it in arrays of the logits'
size.

The exponent k of time ~ C^k is fitted by least squares on logarithms of the medians; ± is the standard error from the
residuals. For gklx the fit starts at C = {plan.fit_from:,}, below which the fixed cost of a call is a large part. With
B · C constant every array has the same bytes at every C, so that caches and page faults are the same (time is per
sample there). The goal is at most {GOAL:g}."""
    cells = [
        [
            fit.form,
            fit.held,
            f"{min(fit.classes):,} … {max(fit.classes):,} ({len(fit.classes)} sizes)",
            f"{fit.exponent:.3f} ± {fit.error:.3f}",
            "" if fit.form.startswith("pairs") else "met" if fit.exponent <= GOAL else "**missed**",
        ]
        for fit in fits
    ]
    lines = [*heading, method, "", *(["![Time against the number of classes](scaling.svg)", ""] if picture else [])]
    lines += markdown(["form", "held", "C", "k", "goal"], cells, right=(3,))
    headings = ["B", "C", "form", "time (middle half)", "ns a logit", "pairs / gklx", "peak", "in arrays"]
    return "\n".join(lines + markdown(headings, map(_cells, rows), right=(0, 1, 4, 5, 6, 7)))


def _cells(row: Row) -> list[str]:
    logits = row.batch * row.classes
    return [
        f"{row.batch:,}",
        f"{row.classes:,}",
        row.form,
        f"{seconds(row.time.median)} ({seconds(row.time.low)} – {seconds(row.time.high)})",
        figures(row.time.median / logits * 1e9),
        "" if row.over_gklx is None else figures(row.over_gklx.median),
        "" if row.peak is None else amount(row.peak),
        "" if row.peak is None else f"{row.peak / (4 * logits):,.1f}",
    ]


def _values(row: Row) -> list[Any]:
    over = "" if row.over_gklx is None else row.over_gklx.median
    return [row.batch, row.classes, row.form, *(x * 1e3 for x in row.time), over, "" if row.peak is None else row.peak]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, a few seconds; writes only to --output")
    parser.add_argument("--output", type=Path, help="folder of the results [benches/results]")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # a form and a size, whose memory is measured
    options = parser.parse_args(arguments)
    # NumPy takes one thread too, in this process and in the workers: the forms are compared, not the number of cores.
    os.environ["GKLX_NUM_THREADS"] = "1"
    if options.worker:
        print(json.dumps(worker(*json.loads(options.worker))))
        return
    plan, loads = QUICK if options.quick else FULL, [pages.load()]
    rows, held, fits = run(plan)
    picture = plots.drawn(plots.growth, rows)
    rows += held
    title = f"Growth in the number of classes: gkl's value and both gradients, B = {plan.batch}, float32"
    command = "python benches/scaling.py" + (" --quick" if options.quick else "")
    packages = ("numpy", "torch", "array-api-compat")
    heading = pages.heading(title, command, pages.machine(), packages, [*loads, pages.load()])
    text = page(rows, fits, plan, heading, picture is not None)
    print(text)
    folder = options.output or (None if options.quick else pages.RESULTS)
    if folder is not None:
        pages.write(folder / "scaling.md", text)
        pages.write(folder / "scaling.csv", pages.as_csv(COLUMNS, map(_values, rows)))
        if picture is not None:
            pages.write(folder / "scaling.svg", picture)


if __name__ == "__main__":
    main()
