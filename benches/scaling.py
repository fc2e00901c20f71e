"""Time and peak memory of GKL's value and both gradients as the number of classes C grows.

`gklx` works in O(C) a sample; the papers write the weighted mean-square error over all pairs of classes, and the
authors' code builds those pairs as [B, C, C] tensors. This script measures both on NumPy and on PyTorch (CPU, eager):
side by side where the pairs fit into memory, `gklx` alone beyond, and fits the exponent of the growth in C.

Before anything is timed the forms are held against each other. Timing is `timeit`'s, the forms of one size taking
turns in one process; memory is taken in a fresh process a form and size.

    python benches/scaling.py                       # the full set, into benches/results/; about ten minutes
    python benches/scaling.py --quick               # a smoke test of a few seconds, writes nothing
    python benches/scaling.py --quick --output DIR  # the same, into DIR
"""

import argparse
import datetime
import functools
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import agreement
import arrays
import memory
import numpy as np
from files import write
from forms import SETTINGS, Result, numpy_pairs, torch_pairs
from machine import load, machine
from rich.console import Console
from rich.table import Table
from tables import amount, figures, markdown, seconds
from timing import ratio, take_turns

import gklx

_EXACT = 1e-12  # float64, of the row's largest entry
_ROUNDED = 1e-5  # float32


class Plan(NamedTuple):
    """What a run measures."""

    batch: int
    pair_classes: tuple[int, ...]
    """Numbers of classes at which the pair forms run too."""
    lone_classes: tuple[int, ...]
    """Those at which gklx runs alone."""
    fit_from: int
    """The least C in the fit of gklx's exponent."""
    pair_fit_from: int
    held_logits: int
    """B * C of the control at a constant number of logits."""
    held_classes: tuple[int, ...]
    memory_classes: tuple[int, ...]
    turns: int
    seconds: float
    """The least time of one turn of one form."""


FULL = Plan(
    batch=64,
    pair_classes=(10, 30, 100, 300, 1_000),
    lone_classes=(3_000, 10_000, 30_000, 100_000, 250_000),
    fit_from=1_000,
    pair_fit_from=100,
    held_logits=16_000_000,
    held_classes=(1_000, 10_000, 100_000, 250_000),
    memory_classes=(10, 100, 1_000, 10_000, 100_000, 250_000),
    turns=9,
    seconds=0.2,
)
QUICK = Plan(
    batch=8,
    pair_classes=(5, 10, 20),
    lone_classes=(100, 200, 400),
    fit_from=20,
    pair_fit_from=5,
    held_logits=1_600,
    held_classes=(50, 100, 200),
    memory_classes=(20,),
    turns=3,
    seconds=0.001,
)

PREDICTION = """\
Written before the first run, from the source of the sweep.

- **gklx.** Value and both gradients at gamma = 0.5 take about 60 passes over [B, C] arrays, three of them `exp`, and no
  pass over anything larger: the work is linear in C. About 11 arrays of [B, C] are alive at the peak, two of them the
  gradients.
- **The exponent** at B = 64 should therefore be 1, but for two things that are not the algorithm: below C = 1,000 the
  fixed cost of some hundred calls dominates, and where the arrays leave the caches (2.6 MB each at C = 10,000, 26 MB at
  100,000) a logit costs more. The naive fit over C >= 1,000 should come out between 1.0 and 1.15. With B * C held
  constant, where every size has the same bytes, time should not depend on C: exponent 1.00 within some hundredths.
- **Pairs.** The NumPy form makes about ten passes over [B, C, C], five such arrays alive: exponent 2. At C = 1,000
  that is thousands of [B, C] passes outside the caches against 60 within: 200 to 500 times slower, thousands of arrays'
  worth of memory. At C = 10 the pairs should be *faster* than gklx on NumPy: they are twenty calls on small arrays.

Added after a first run, in which a logit cost gklx twice as much at C = 250,000 as at 100,000 (k = 1.09 ± 0.05 on
NumPy, 1.16 ± 0.08 on PyTorch). Caches do not explain it, since both sizes are far outside of them; but an array is
64 MB at the one and 26 MB at the other, and glibc maps every array above 32 MiB afresh and gives it back when freed, so
that each page of it is faulted in and zeroed at each use. If that is it, the step goes where freed memory is kept for
the next array (`MALLOC_MMAP_MAX_=0`, `MALLOC_TRIM_THRESHOLD_` large), and k is 1 there."""

LEARNT = """\
Of six full runs on machines of two cores, the first three with other work beside them. Before the fifth rows had come
to be worked off in blocks of 1 MiB, and before the sixth, which is the one shown, all steps of `compare.py`'s page
had been taken; no prediction was written for those.

- **The work is linear in C**, and since the blocks it shows: on NumPy k is 1.02 ± 0.01 as a process comes. On PyTorch
  it is 1.10 ± 0.04, 1.06 ± 0.05 with freed memory kept and 1.01 ± 0.01 at constant B * C: a small call has become
  cheap enough for the caches to show, at C = 1,000 and 3,000, and at 250,000 the gradients' page faults.
- **What exceeded 1 on whole arrays was page faults, not the algorithm and hardly the caches.** In the four runs on
  those k was 1.09 to 1.26 as a process comes, and 0.92 to 1.04 where freed memory was kept. The prediction blamed the
  caches and was wrong. Blocks stay below the 32 MiB from which glibc maps an array afresh: at C = 250,000 a call met
  1,103 faults in place of 18,327 on NumPy, and 31,415 in place of 610,651 on PyTorch. The gradients themselves are
  what is left; with freed memory kept PyTorch takes 138 ms there in place of 206.
- **Blocks cost where the arrays were small enough**, when they came: at C = 10,000, where a batch is 2.6 MB, a call
  took 16.9 ms and had taken 11.6 ms on NumPy, 26 and 18.9 ms on PyTorch. Since then rows are spared their masks, and
  it takes 5.0 and 6.0.
- **Memory** was predicted as 11 arrays, and 11.5 were found on whole arrays at every large C. In blocks it is the two
  gradients and little more: 2.2 arrays at C = 100,000. Below 1 MiB an array it is 7.
- **Small C belongs to the pairs**, as predicted: at C = 10 they take 0.83 of gklx's time on NumPy, where gklx makes
  many small calls; on PyTorch no longer. At a hundred classes gklx is 10 times faster, where it was 4 to 5 in the
  first runs.
- **Pairs at C = 1,000 swing from run to run**, presumably with the page faults too: NumPy's took 206 to 1,057 times
  as long as gklx in the first five runs, PyTorch's 737 to 1,135, and 4,190 in the sixth. PyTorch's exponent between
  100 and 1,000 comes out near 3; no control was run on the pairs.
- Standard errors come from the residuals of three to six sizes: read them as the size of the noise, not as confidence
  limits."""

# Read by glibc when a process starts: no array gets a mapping of its own, and nothing freed is given back.
_KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}

PLANS = {"full": FULL, "quick": QUICK}


# --- the forms --------------------------------------------------------------------------------------------------------


def gklx_form(student: Any, teacher: Any) -> Result:
    """Call the library, on whichever arrays it is given."""
    value, (to_student, to_teacher) = gklx.value_and_grad(functools.partial(gklx.gkl, **SETTINGS), argnums=(0, 1))(
        student, teacher
    )
    return value, to_student, to_teacher


class Form(NamedTuple):
    """One way to compute the same value and gradients."""

    name: str
    library: str
    call: Callable[[Any, Any], Result]
    pairs: bool


FORMS = (
    Form("gklx, NumPy", "numpy", gklx_form, pairs=False),
    Form("pairs, NumPy", "numpy", numpy_pairs, pairs=True),
    Form("gklx, PyTorch", "torch", gklx_form, pairs=False),
    Form("pairs, PyTorch", "torch", torch_pairs, pairs=True),
)


def available() -> tuple[Form, ...]:
    """List the forms whose library is installed."""
    return tuple(form for form in FORMS if importlib.util.find_spec(form.library))


def inputs(library: str, batch: int, classes: int, dtype: str = "float32") -> tuple[Any, Any]:
    """Make student and teacher logits, the same numbers in every library."""
    if library == "torch":
        import torch

        torch.set_num_threads(1)
    student, teacher = (arrays.into(library, x, dtype) for x in arrays.logits(batch, classes))
    return student, teacher


# --- agreement --------------------------------------------------------------------------------------------------------


def check(forms: Iterable[Form], batch: int, classes: int, dtype: str, tolerance: float) -> float:
    """Hold every form against gklx on NumPy, gradients by the row's largest entry; return the worst difference."""
    reference = agreement.kept(gklx_form(*inputs("numpy", batch, classes, dtype)))
    worst = 0.0
    for form in forms:
        found = form.call(*inputs(form.library, batch, classes, dtype))
        assert all(np.asarray(x).dtype == np.dtype(dtype) for x in found), form.name
        apart = agreement.difference(reference, agreement.kept(found))
        assert apart <= tolerance, (form.name, classes, dtype, apart)
        worst = max(worst, apart)
    return worst


# --- time -------------------------------------------------------------------------------------------------------------


def race(forms: Sequence[Form], batch: int, classes: int, plan: Plan) -> list[dict[str, Any]]:
    """Time the forms, taking turns; one row a form, with its seconds a call in every turn."""
    calls = {form.name: functools.partial(form.call, *inputs(form.library, batch, classes)) for form in forms}
    taken = take_turns(calls, plan.turns, plan.seconds)
    return [
        {
            "form": form.name,
            "library": form.library,
            "pairs": form.pairs,
            "batch": batch,
            "classes": classes,
            **taken[form.name].as_row(),
            "ns_per_logit": statistics.median(taken[form.name].turns) / (batch * classes) * 1e9,
        }
        for form in forms
    ]


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Divide pairs by gklx, turn by turn: what else slowed the machine in a turn slowed both."""
    found = []
    for pair in (row for row in rows if row["pairs"]):
        (own,) = (
            row
            for row in rows
            if not row["pairs"] and (row["library"], row["classes"]) == (pair["library"], pair["classes"])
        )
        apart = ratio(pair["turns"], own["turns"])
        found.append({"library": pair["library"], "classes": pair["classes"], **apart})
    return found


def exponent(classes: Sequence[int], seconds: Sequence[float]) -> dict[str, Any]:
    """Fit log time on log C by least squares: the slope and its standard error, from the residuals."""
    (slope, _), covariance = np.polyfit(np.log(classes), np.log(seconds), 1, cov=True)
    return {"classes": list(classes), "exponent": float(slope), "standard_error": float(np.sqrt(covariance[0, 0]))}


def fits(rows: Sequence[dict[str, Any]], plan: Plan) -> list[dict[str, Any]]:
    """Fit the exponents of every form at the plan's batch."""
    found = []
    for form in {row["form"]: row for row in rows}.values():
        starts = {plan.pair_fit_from, min(plan.pair_classes)} if form["pairs"] else {plan.fit_from}
        for start in sorted(starts):
            chosen = [row for row in rows if row["form"] == form["form"] and row["classes"] >= start]
            fit = exponent([row["classes"] for row in chosen], [row["seconds"] for row in chosen])
            found.append({"form": form["form"], "held": f"B = {plan.batch}", **fit})
    return found


def kept_fits(rows: Sequence[dict[str, Any]], plan: Plan) -> list[dict[str, Any]]:
    """Fit the exponents where freed memory is kept."""
    return [{**fit, "held": f"{fit['held']}, freed memory kept"} for fit in fits(rows, plan)]


def held(forms: Sequence[Form], plan: Plan, say: Callable[[str], None]) -> tuple[list[Any], list[Any]]:
    """Run the control: gklx with B * C constant, so that caches and page faults are the same at every C.

    Time a logit does not depend on the array's bytes here, so its growth in C, plus 1, is the exponent of the work.
    """
    rows = []
    forms = [form for form in forms if not form.pairs]
    for classes in plan.held_classes:
        say(f"time at B * C = {plan.held_logits:,}, C = {classes:,}")
        rows += race(forms, plan.held_logits // classes, classes, plan)
    found = []
    for form in forms:
        own = [row for row in rows if row["form"] == form.name]
        fit = exponent([row["classes"] for row in own], [row["seconds"] / row["batch"] for row in own])
        found.append({"form": form.name, "held": f"B * C = {plan.held_logits:,}", **fit})
    return rows, found


def kept(plan_name: str) -> list[dict[str, Any]]:
    """Run the other control: gklx at the plan's batch in a process that keeps freed memory; nothing without glibc."""
    if platform.libc_ver()[0] != "glibc":
        return []
    command = [sys.executable, __file__, "--worker", "kept", "--plan", plan_name]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | _KEPT_MEMORY)
    return json.loads(done.stdout.splitlines()[-1])


def measure_kept(plan: Plan) -> list[dict[str, Any]]:
    """Time, in that process, the sizes of the fit."""
    forms = [form for form in available() if not form.pairs]
    sizes = [classes for classes in (*plan.pair_classes, *plan.lone_classes) if classes >= plan.fit_from]
    return [row for classes in sizes for row in race(forms, plan.batch, classes, plan)]


# --- memory -----------------------------------------------------------------------------------------------------------


def measure_memory(form: Form, batch: int, classes: int) -> dict[str, int | None]:
    """Take the peak of one call beyond its inputs; for a process of its own."""
    form.call(*inputs(form.library, 2, 3))  # lazy imports
    return memory.peak(functools.partial(form.call, *inputs(form.library, batch, classes)), form.library)


# --- the report -------------------------------------------------------------------------------------------------------


def run(plan_name: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure everything: agreement, time, controls, memory."""
    plan = PLANS[plan_name]
    date = datetime.date.today().isoformat()
    loads = [load()]
    forms = available()
    alone = [form for form in forms if not form.pairs]
    agreement = []
    for classes in plan.pair_classes:
        say(f"agreement at C = {classes:,}")
        exact = check(forms, min(plan.batch, 4), classes, "float64", _EXACT)
        rounded = check(forms, plan.batch, classes, "float32", _ROUNDED)
        agreement.append({"classes": classes, "float64": exact, "float32": rounded})
    for classes in plan.lone_classes:
        check(alone, plan.batch, classes, "float32", _ROUNDED)
    rows = []
    for classes in (*plan.pair_classes, *plan.lone_classes):
        say(f"time at C = {classes:,}")
        rows += race(forms if classes in plan.pair_classes else alone, plan.batch, classes, plan)
    held_rows, held_fits = held(forms, plan, say)
    say("time where freed memory is kept")
    kept_rows = kept(plan_name)
    for row in rows:
        if row["classes"] in plan.memory_classes:
            say(f"memory of {row['form']} at C = {row['classes']:,}")
            (form,) = (form for form in forms if form.name == row["form"])
            row["memory"] = memory.in_fresh_process(
                __file__, "--worker", form.name, "--batch", str(plan.batch), "--classes", str(row["classes"])
            )
    return {
        "date": date,
        "machine": {**machine(), "load": [*loads, load()]},
        "settings": SETTINGS,
        "plan": plan._asdict(),
        "agreement": agreement,
        "rows": rows,
        "ratios": ratios(rows),
        "fits": fits(rows, plan) + held_fits + kept_fits(kept_rows, plan),
        "held": held_rows,
        "kept": kept_rows,
    }


def headings_and_cells(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Render the main table as text."""
    headings = ["C", "form", "time (IQR)", "ns a logit", "page faults", "pairs / gklx"]
    headings += ["peak memory", "in [B, C] arrays", "resident"]
    by_size = {(ratio["library"], ratio["classes"]): ratio for ratio in result["ratios"]}
    cells = []
    for row in result["rows"]:
        ratio = by_size.get((row["library"], row["classes"])) if row["pairs"] else None
        array = row["batch"] * row["classes"] * 4
        taken = row.get("memory")
        cells.append(
            [
                f"{row['classes']:,}",
                row["form"],
                f"{seconds(row['seconds'])} ({seconds(row['seconds_q1'])} – {seconds(row['seconds_q3'])})",
                f"{row['ns_per_logit']:,.1f}",
                f"{row['faults_a_call']:,.0f}",
                "" if ratio is None else f"{figures(ratio['ratio'])}×",
                amount(taken["counted"]) if taken else "",
                f"{taken['counted'] / array:,.1f}" if taken else "",
                # Below some megabytes it is the allocator's leftovers that are measured.
                amount(taken["resident"]) if taken and taken["resident"] and taken["counted"] > 2**24 else "",
            ]
        )
    return headings, cells


def report(result: dict[str, Any], command: str) -> str:
    """Render the result as Markdown."""
    headings, cells = headings_and_cells(result)
    machine, plan = result["machine"], result["plan"]
    control = ["B", "C", "form", "time (IQR)", "ns a logit", "page faults a call"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"# Growth in the number of classes: gkl's value and both gradients, B = {plan['batch']}, float32",
        "",
        f"{result['date']} · {machine['processor']}, {machine['cores']} cores, {machine['system']} · {versions} · "
        f"one thread · load average {machine['load'][0]} before and {machine['load'][1]} after · made by `{command}`",
        "",
        f"`gkl({', '.join(f'{k}={v}' for k, v in result['settings'].items())})` with the teacher's own weights. "
        "*gklx* is `value_and_grad(gkl, argnums=(0, 1))`. *pairs* builds the definition's [B, C, C] tensors: on NumPy "
        "with the gradients written out, on PyTorch as the authors do, by autograd. Before timing, all agreed with "
        f"gklx on NumPy: {max(a['float64'] for a in result['agreement']):.0e} in float64 and "
        f"{max(a['float32'] for a in result['agreement']):.0e} in float32, of the row's largest entry.",
        "",
        "## Prediction",
        "",
        PREDICTION,
        "",
        "## Result",
        "",
        f"Time: median of {plan['turns']} turns and the middle half of them; forms of one size take turns in one "
        "process, and the ratio is the median of the turns' ratios. Peak memory: bytes the library allocated beyond "
        "its inputs, gradients included, counted in a fresh process; resident: the same as the system sees it, where "
        "above 16 MB.",
        "",
        *markdown(headings, cells, right=(0, 3, 4, 5, 6, 7, 8)),
        "",
        "The exponent k of time ~ C^k, by least squares on logarithms of the medians; ± is the standard error from the "
        f"residuals. For gklx the fit starts at C = {plan['fit_from']:,}, below which the fixed cost of the calls is a "
        "large part. Two controls hold the size of the arrays' effect on memory still: with B · C constant every array "
        "has the same bytes at every C (time is per sample); with freed memory kept, in a process with "
        f"`{' '.join(f'{k}={v}' for k, v in _KEPT_MEMORY.items())}`, no array is faulted in anew.",
        "",
        *markdown(["form", "held", "C", "k"], _fit_cells(result), right=(3,)),
        "",
        "gklx at B · C constant:",
        "",
        *markdown(control, _control_cells(result["held"]), right=(0, 1, 4, 5)),
        "",
        "gklx where freed memory is kept:",
        "",
        *markdown(control, _control_cells(result["kept"]), right=(0, 1, 4, 5)),
        "",
    ]
    if plan == FULL._asdict():
        lines += ["## What was learnt", "", LEARNT, ""]
    return "\n".join(lines)


def _fit_cells(result: dict[str, Any]) -> list[list[str]]:
    return [
        [
            fit["form"],
            fit["held"],
            f"{min(fit['classes']):,} … {max(fit['classes']):,} ({len(fit['classes'])} sizes)",
            f"{fit['exponent']:.3f} ± {fit['standard_error']:.3f}",
        ]
        for fit in result["fits"]
    ]


def _control_cells(rows: Iterable[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            f"{row['batch']:,}",
            f"{row['classes']:,}",
            row["form"],
            f"{seconds(row['seconds'])} ({seconds(row['seconds_q1'])} – {seconds(row['seconds_q3'])})",
            f"{row['ns_per_logit']:,.1f}",
            f"{row['faults_a_call']:,.0f}",
        ]
        for row in rows
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, a few seconds; writes only to --output")
    parser.add_argument("--output", type=Path, help="folder of scaling.json and scaling.md [benches/results]")
    parser.add_argument("--worker", choices=["kept", *(form.name for form in FORMS)], help=argparse.SUPPRESS)
    parser.add_argument("--plan", choices=PLANS, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--classes", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    # One thread on NumPy too, here and in the workers: the forms are compared, not the number of cores.
    os.environ["GKLX_NUM_THREADS"] = "1"
    if options.worker == "kept":
        print(json.dumps(measure_kept(PLANS[options.plan])))
        return
    if options.worker:
        (form,) = (form for form in FORMS if form.name == options.worker)
        print(json.dumps(measure_memory(form, options.batch, options.classes)))
        return
    # Eighty columns, as where no terminal says otherwise, would break every cell.
    console = Console() if sys.stdout.isatty() else Console(width=150)
    command = "python benches/scaling.py" + (" --quick" if options.quick else "")
    with console.status("") as status:
        result = run("quick" if options.quick else "full", status.update)
    headings, cells = headings_and_cells(result)
    for title, names, rows in (
        (f"gkl value and both gradients, B = {result['plan']['batch']}", headings, cells),
        ("time ~ C^k", ["form", "held", "C", "k"], _fit_cells(result)),
    ):
        table = Table(*names, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    folder = options.output
    if folder is None and not options.quick:
        folder = Path(__file__).parent / "results"
    if folder is not None:
        write(folder / "scaling.json", json.dumps({"command": command, **result}, indent=1) + "\n")
        write(folder / "scaling.md", report(result, command))
        console.print(f"written to {folder}")


if __name__ == "__main__":
    main()
