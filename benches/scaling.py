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
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import timeit
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

import gklx

# gamma and the teacher's own weights, as in distillation without a class prior: the longest path through the sweep, and
# one that needs no [C, C] prior, which at C = 250,000 would be 250 GB.
SETTINGS = {"gamma": 0.5, "mse_weight": 4.0, "ce_weight": 1.0}
_EXACT = 1e-12  # float64, of the row's largest entry
_ROUNDED = 1e-5  # float32

Result = tuple[Any, Any, Any]
"""Value, gradient to the student, gradient to the teacher."""


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
Of five full runs on one two-core machine, the first three with other work beside them. Before the fifth, which is the
one shown, rows had come to be worked off in blocks of 1 MiB; no prediction was written for that.

- **The work is linear in C**, and since the blocks it shows: k is 1.02 ± 0.02 on NumPy and 1.03 ± 0.02 on PyTorch as a
  process comes, and the same within its error with freed memory kept and at constant B * C.
- **What exceeded 1 before was page faults, not the algorithm and hardly the caches.** In the four runs on whole arrays
  k was 1.09 to 1.26 as a process comes, and 0.92 to 1.04 where freed memory was kept. The prediction blamed the caches
  and was wrong. Blocks stay below the 32 MiB from which glibc maps an array afresh: at C = 250,000 a call met 1,103
  faults in place of 18,327 on NumPy and took 416 ms in place of 1.26 s; on PyTorch 31,415 in place of 610,651, and
  705 ms in place of 1.67 s. The gradients themselves are what is left.
- **Blocks cost where the arrays were small enough**: at C = 10,000, where a batch is 2.6 MB, a call takes 16.9 ms and
  took 11.6 ms on NumPy, 26 and 18.9 ms on PyTorch. GKL's normaliser needs a run of its own over the teacher before
  the gradients' run.
- **Memory** was predicted as 11 arrays, and 11.5 were found on whole arrays at every large C. In blocks it is the two
  gradients and little more: 2.2 arrays at C = 250,000. Below 1 MiB an array the figure is the old one.
- **Small C belongs to the pairs**, as predicted: at C = 10 they take about 0.35 of gklx's time on NumPy and 0.6 on
  PyTorch, since gklx makes many small calls. They draw level at about thirty classes; at a hundred gklx is 4 to 5
  times faster.
- **Pairs at C = 1,000 swing from run to run**, presumably with the page faults too: NumPy's were 206 to 1,057 times
  slower than gklx, PyTorch's 737 to 1,135. PyTorch's exponent between 100 and 1,000 comes out near 3; no control was
  run on the pairs.
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


def numpy_pairs(student: np.ndarray, teacher: np.ndarray) -> Result:
    """Compute the definition, with the gradients written out from the pairs."""
    batch = student.shape[0]
    log_p, log_q = _numpy_log_softmax(teacher), _numpy_log_softmax(student)
    p, q = np.exp(log_p), np.exp(log_q)
    w = p ** SETTINGS["gamma"]
    ww = w[:, :, None] * w[:, None, :]
    delta_teacher = teacher[:, :, None] - teacher[:, None, :]
    delta_student = student[:, :, None] - student[:, None, :]
    difference = delta_teacher - delta_student
    normalizer = np.sum(ww)
    mse = 0.25 * np.sum(ww * difference**2) / normalizer
    ce = -np.sum(p * log_q) / batch
    to_teacher = SETTINGS["mse_weight"] * np.sum(ww * difference, axis=-1) / normalizer
    to_student = SETTINGS["ce_weight"] * (q - p) / batch - to_teacher
    return SETTINGS["mse_weight"] * mse + SETTINGS["ce_weight"] * ce, to_student, to_teacher


def _numpy_log_softmax(x: np.ndarray) -> np.ndarray:
    below = x - np.max(x, axis=-1, keepdims=True)
    return below - np.log(np.sum(np.exp(below), axis=-1, keepdims=True))


def torch_pairs(student: Any, teacher: Any) -> Result:
    """Go the authors' way: pair tensors, and autograd back through them."""
    import torch

    student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    classes = student.shape[-1]
    p = torch.softmax(teacher, dim=-1).detach()
    w = p ** SETTINGS["gamma"]
    ww = w.view(-1, classes, 1) * w.view(-1, 1, classes)
    delta_teacher = teacher.view(-1, classes, 1) - teacher.view(-1, 1, classes)
    delta_student = student.view(-1, classes, 1) - student.view(-1, 1, classes)
    mse = 0.25 * (torch.pow(delta_teacher - delta_student, 2) * ww).sum() / ww.sum()
    ce = -(p * torch.log_softmax(student, dim=-1)).sum(-1).mean()
    loss = SETTINGS["mse_weight"] * mse + SETTINGS["ce_weight"] * ce
    loss.backward()
    return loss.detach(), student.grad, teacher.grad


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
    rng = np.random.default_rng(20261122)
    # Drawn as float32: at C = 250,000 a float64 draw would leave the peak of the memory above what is measured.
    teacher = rng.standard_normal((batch, classes), dtype=np.float32)
    student = rng.standard_normal((batch, classes), dtype=np.float32)
    teacher *= 2.0
    student += teacher
    arrays = student.astype(dtype, copy=False), teacher.astype(dtype, copy=False)
    if library == "torch":
        import torch

        # One thread, as NumPy has: the forms are compared, not the number of cores.
        torch.set_num_threads(1)
        return torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1])
    return arrays


# --- agreement --------------------------------------------------------------------------------------------------------


def check(forms: Iterable[Form], batch: int, classes: int, dtype: str, tolerance: float) -> float:
    """Hold every form against gklx on NumPy, gradients by the row's largest entry; return the worst difference."""
    reference = [np.asarray(x) for x in gklx_form(*inputs("numpy", batch, classes, dtype))]
    worst = 0.0
    for form in forms:
        found = [np.asarray(x) for x in form.call(*inputs(form.library, batch, classes, dtype))]
        for name, ours, theirs in zip(("value", "student", "teacher"), reference, found, strict=True):
            assert theirs.dtype == ours.dtype == np.dtype(dtype), (form.name, name, theirs.dtype)
            scale = np.abs(ours) if ours.ndim == 0 else np.max(np.abs(ours), axis=-1, keepdims=True)
            message = f"{form.name}, {name}, C = {classes}"
            np.testing.assert_allclose(theirs / scale, ours / scale, rtol=0, atol=tolerance, err_msg=message)
            worst = max(worst, float(np.max(np.abs(theirs - ours) / scale)))
    return worst


# --- time -------------------------------------------------------------------------------------------------------------


def race(forms: Sequence[Form], batch: int, classes: int, plan: Plan) -> list[dict[str, Any]]:
    """Time the forms, taking turns; one row a form, with its seconds a call in every turn."""
    timers = []
    for form in forms:
        timer = timeit.Timer(functools.partial(form.call, *inputs(form.library, batch, classes)))
        timer.timeit(1)  # lazy imports, first allocations
        once = timer.timeit(1)
        timers.append((form, timer, max(1, round(plan.seconds / once))))
    turns: dict[str, list[float]] = {form.name: [] for form in forms}
    faults = {form.name: 0 for form in forms}
    for _ in range(plan.turns):
        for form, timer, number in timers:
            before = _faults()
            turns[form.name].append(timer.timeit(number) / number)
            faults[form.name] += _faults() - before
    return [
        {
            "form": form.name,
            "library": form.library,
            "pairs": form.pairs,
            "batch": batch,
            "classes": classes,
            "calls_a_turn": number,
            "faults_a_call": faults[form.name] / (plan.turns * number),
            "turns": turns[form.name],
            **_spread(turns[form.name], "seconds"),
            "ns_per_logit": statistics.median(turns[form.name]) / (batch * classes) * 1e9,
        }
        for form, _, number in timers
    ]


def _faults() -> int:
    """Count the pages that the system had to hand to this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _spread(x: Sequence[float], name: str) -> dict[str, float]:
    first, median, third = statistics.quantiles(x, n=4, method="inclusive")
    return {name: median, f"{name}_q1": first, f"{name}_q3": third}


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Divide pairs by gklx, turn by turn: what else slowed the machine in a turn slowed both."""
    found = []
    for pair in (row for row in rows if row["pairs"]):
        (own,) = (
            row
            for row in rows
            if not row["pairs"] and (row["library"], row["classes"]) == (pair["library"], pair["classes"])
        )
        each = [a / b for a, b in zip(pair["turns"], own["turns"], strict=True)]
        found.append({"library": pair["library"], "classes": pair["classes"], **_spread(each, "ratio")})
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


def memory(form: Form, batch: int, classes: int) -> dict[str, int]:
    """Take the peak of one call beyond its inputs, in a fresh process."""
    command = [sys.executable, __file__, "--worker", form.name, "--batch", str(batch), "--classes", str(classes)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(form: Form, batch: int, classes: int) -> dict[str, int]:
    """Measure, in that process, the resident memory of a first call and the bytes its library counts in a second.

    The results are held, and so are part of both. The count is exact (`tracemalloc` for NumPy, the profiler for
    PyTorch); resident memory is what the system sees, pages rounded up, and on small arrays hides in memory that
    imports have freed.
    """
    form.call(*inputs(form.library, 2, 3))  # lazy imports
    arrays = inputs(form.library, batch, classes)
    gc.collect()
    before = _reset_resident()
    result = form.call(*arrays)
    resident = None if before is None else _status("VmHWM") - before
    del result
    counted = _counted_torch if form.library == "torch" else _counted_numpy
    return {"resident": resident, "counted": counted(form, arrays)}


def _counted_numpy(form: Form, arrays: Any) -> int:
    tracemalloc.start()
    result = form.call(*arrays)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del result
    return peak


def _counted_torch(form: Form, arrays: Any) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = form.call(*arrays)
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Ev Idx"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return int(max(np.cumsum([change for _, _, change in changes])))


def _reset_resident() -> int | None:
    """Start the peak anew, from the resident bytes returned; None where the system cannot (Linux only)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key}")


# --- the report -------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Describe what the numbers were taken on."""
    processor = platform.processor() or "unknown"
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    versions = {"Python": platform.python_version(), "gklx": gklx.__version__}
    for name in ("numpy", "torch", "array-api-compat"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {"processor": processor, "cores": os.cpu_count(), "system": platform.system(), "versions": versions}


def _load() -> float | None:
    """Say how many processes wanted a core in the last minute; None where the system does not."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def run(plan_name: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure everything: agreement, time, controls, memory."""
    plan = PLANS[plan_name]
    date = datetime.date.today().isoformat()
    load = [_load()]
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
            row["memory"] = memory(form, plan.batch, row["classes"])
    return {
        "date": date,
        "machine": {**machine(), "load": [*load, _load()]},
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
                f"{_seconds(row['seconds'])} ({_seconds(row['seconds_q1'])} – {_seconds(row['seconds_q3'])})",
                f"{row['ns_per_logit']:,.1f}",
                f"{row['faults_a_call']:,.0f}",
                "" if ratio is None else f"{_figures(ratio['ratio'])}×",
                _bytes(taken["counted"]) if taken else "",
                f"{taken['counted'] / array:,.1f}" if taken else "",
                # Below some megabytes it is the allocator's leftovers that are measured.
                _bytes(taken["resident"]) if taken and taken["resident"] and taken["counted"] > 2**24 else "",
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
        *_markdown(headings, cells, right=(0, 3, 4, 5, 6, 7, 8)),
        "",
        "The exponent k of time ~ C^k, by least squares on logarithms of the medians; ± is the standard error from the "
        f"residuals. For gklx the fit starts at C = {plan['fit_from']:,}, below which the fixed cost of the calls is a "
        "large part. Two controls hold the size of the arrays' effect on memory still: with B · C constant every array "
        "has the same bytes at every C (time is per sample); with freed memory kept, in a process with "
        f"`{' '.join(f'{k}={v}' for k, v in _KEPT_MEMORY.items())}`, no array is faulted in anew.",
        "",
        *_markdown(["form", "held", "C", "k"], _fit_cells(result), right=(3,)),
        "",
        "gklx at B · C constant:",
        "",
        *_markdown(control, _control_cells(result["held"]), right=(0, 1, 4, 5)),
        "",
        "gklx where freed memory is kept:",
        "",
        *_markdown(control, _control_cells(result["kept"]), right=(0, 1, 4, 5)),
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
            f"{_seconds(row['seconds'])} ({_seconds(row['seconds_q1'])} – {_seconds(row['seconds_q3'])})",
            f"{row['ns_per_logit']:,.1f}",
            f"{row['faults_a_call']:,.0f}",
        ]
        for row in rows
    ]


def _markdown(headings: Sequence[str], cells: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    rule = ["---:" if i in right else "---" for i in range(len(headings))]
    return [f"| {' | '.join(row)} |" for row in (headings, rule, *cells)]


def _figures(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _seconds(x: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if x >= scale:
            return f"{_figures(x / scale)} {unit}"
    return f"{_figures(x / 1e-6)} µs"


def _bytes(x: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if x >= scale:
            return f"{_figures(x / scale)} {unit}"
    return f"{_figures(x / 1e3)} kB"


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


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
