"""A score as text: a table for people, JSON for programs."""

import json
import math
from collections.abc import Callable, Iterable
from typing import TextIO

from rich import box
from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .samples import WITHOUT_PARTS
from .statistics import DeltaP, Estimate, Perplexity, Score, Scores
from .streams import short_names

_ROWS = (
    ("mean", "mean"),
    ("± standard error", "stderr"),
    ("  of which wMSE", "mse"),
    ("  of which CE", "ce"),
    ("minimum", "min"),
    ("0.1 %", "p0_1"),
    ("1 %", "p1"),
    ("5 %", "p5"),
    ("10 %", "p10"),
    ("median", "median"),
    ("90 %", "p90"),
    ("95 %", "p95"),
    ("99 %", "p99"),
    ("99.9 %", "p99_9"),
    ("maximum", "max"),
)
_OF_TARGETS = ("min", "p0_1", "p1", "p5", "p10", "p99_9")
"""The rows of a single student's table that need targets."""
_PERPLEXITIES = (
    ("perplexity of the student", "student"),
    ("perplexity of the teacher", "teacher"),
    ("ratio", "ratio"),
    ("log of the ratio", "log_ratio"),
    ("difference", "difference"),
)
_DELTA_P = (
    ("minimum", "min"),
    ("0.1 %", "p0_1"),
    ("1 %", "p1"),
    ("5 %", "p5"),
    ("10 %", "p10"),
    ("25 %", "p25"),
    ("median", "median"),
    ("75 %", "p75"),
    ("90 %", "p90"),
    ("95 %", "p95"),
    ("99 %", "p99"),
    ("99.9 %", "p99_9"),
    ("maximum", "max"),
)
_SKETCHED = {key for _, key in _DELTA_P} - {"max", "min"}
_MEASURES = ("mean", "stderr", "mse", "ce", "median", "p90", "p95", "p99", "max")
"""The statistics whose sizes decide the number of decimals of a column."""
_NONE = "–"
_WIDEST = 10**9
"""More characters than any table has in a line."""
_BY_TOOL = "kl and p(target) by llama.cpp's rule: the base as stored, classes of log p ≤ -16 left out"
_PLAIN = str.maketrans({"–": "-", "±": "+-", "·": "|", "γ": "gamma", "×": "*", "Δ": "d", "≤": "<="})
"""Replacements for a standard output whose encoding is ASCII."""


def as_json(found: Score | Scores) -> str:
    """A score as strict JSON: null for a number that is not finite."""
    if isinstance(found, Score):
        document = _document(found)
    else:
        students = []
        for name, score in found.students.items():
            student: dict[str, object] = {"name": name, **_document(score)}
            if name in found.differences:
                student["difference_from_first"] = {
                    loss: _of_estimate(each) for loss, each in found.differences[name].items()
                }
            students.append(student)
        document = {"teacher": found.teacher, "students": students}
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def _document(score: Score) -> dict[str, object]:
    left_out = {"skipped": score.skipped, "undefined": score.undefined}
    found: dict[str, object] = {
        "samples": score.samples,
        **(left_out if score.masked is None else {**left_out, "masked": score.masked}),
        "classes": score.classes,
        "backend": score.backend,
        "device": score.device,
        "quantiles": score.quantiles,
        "parameters": {**score.parameters._asdict(), "weights": score.weights},
        "top1_agreement": score.top1_agreement,
        "losses": {
            name: {key: _finite(value) for key, value in summary._asdict().items()}
            for name, summary in score.losses.items()
        },
    }
    if score.reading is not None:
        found["reading"] = score.reading
    for key, part in (("perplexity", score.perplexity), ("delta_p", score.delta_p)):
        if part is not None:
            found[key] = {
                name: _of_estimate(value) if isinstance(value, Estimate) else _finite(value)
                for name, value in part._asdict().items()
            }
    if score.top_k_overlap is not None:
        found["top_k_overlap"] = {str(k): _of_estimate(each) for k, each in score.top_k_overlap.items()}
    if score.worst_classes is not None:
        found["worst_classes"] = [
            {
                "class": each.label,
                "samples": each.samples,
                "top1_agreement": each.top1_agreement,
                "mean": {name: _finite(value) for name, value in each.means.items()},
            }
            for each in score.worst_classes
        ]
    return found


def _of_estimate(x: Estimate) -> dict[str, float | None]:
    return {key: _finite(value) for key, value in x._asdict().items()}


def as_table(found: Score | Scores, file: TextIO | None = None) -> str:
    """A score as tables, in the colours, width and characters that a file has, by default standard output."""
    # rich gives colours to every file where FORCE_COLOR asks for them on the terminal.
    colours = None if file is None else file.isatty()
    console = Console(file=file, force_terminal=colours, highlight=False, emoji=False)
    parts: list[Table | Text] = _of_one(found) if isinstance(found, Score) else _of_several(found)
    # On a narrow terminal the table is too wide: a number must not be truncated.
    roomy = console.options.update(width=_WIDEST)
    needed = max(Measurement.get(console, roomy, part).maximum for part in parts if isinstance(part, Table))
    console.width = max(console.width, needed)
    with console.capture() as capture:
        console.print(Group(*parts))
    text = capture.get()
    return text.translate(_PLAIN) if console.options.ascii_only else text


def _of_one(score: Score) -> list[Table | Text]:
    parts: list[Table | Text] = [_title(score), _losses(score)]
    if score.perplexity is not None and score.delta_p is not None:
        parts += [Text(), _perplexities(score.perplexity), Text(), _changes(score.delta_p)]
    if score.worst_classes is not None:
        parts += [Text(f"\nclasses with the largest mean {next(iter(score.losses))}\n"), _worst(score)]
    return parts


def _with_errors(of: str) -> Table:
    """An empty table of numbers and their errors."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(of, no_wrap=True)
    for title in ("value", "± standard error"):
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _perplexities(found: Perplexity) -> Table:
    table = _with_errors("targets")
    for title, key in _PERPLEXITIES:
        each: Estimate = getattr(found, key)
        table.add_row(title, *(_six(x) for x in each))
    table.add_row("correlation of log probabilities", _share(found.correlation), "")
    return table


def _changes(found: DeltaP) -> Table:
    table = _with_errors("Δp of the target")
    for title, each in (("mean", found.mean), ("root mean square", found.rms)):
        table.add_row(title, *(_share(x) for x in each), style="bold" if title == "mean" else "")
    for title, key in _DELTA_P:
        table.add_row(title, _share(getattr(found, key)), "")
    return table


def _of_several(found: Scores) -> list[Table | Text]:
    """A table with a column for each candidate: the most important numbers first, then the quantiles of each loss."""
    scores = list(found.students.values())
    first = scores[0]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(f"against {short_names([found.teacher])[0]}", no_wrap=True)
    names = short_names(list(found.students))
    for name in names:
        table.add_column(Text(name), justify="right", no_wrap=True)
    table.add_row("samples", *(f"{x.samples:,}" for x in scores))
    for title, values in (
        ("skipped (every class -inf)", [x.skipped for x in scores]),
        ("undefined (NaN)", [x.undefined for x in scores]),
        ("masked", [x.masked or 0 for x in scores]),
    ):
        if any(values):
            table.add_row(title, *(f"{x:,}" for x in values))
    table.add_row("top-1 agreement", *(_with_error(_agreement(x), _share) for x in scores))
    for k in first.top_k_overlap or {}:
        table.add_row(f"top-{k} overlap", *(_with_error((x.top_k_overlap or {})[k], _share) for x in scores))
    for name in first.losses:
        table.add_section()
        of_loss = [x.losses[name] for x in scores]
        for title, key in _ROWS:
            given = [getattr(x, key) for x in of_loss]
            if all(value is None for value in given):
                continue
            label = f"{name} {title}" if key == "mean" else f"  {title}"
            about = " (t-digest)" if first.quantiles != "exact" and key in _SKETCHED else ""
            table.add_row(label + about, *_aligned(given), style="bold" if key == "mean" else "")
        others = [found.differences.get(candidate, {}).get(name) for candidate in found.students]
        if any(others):
            cells = (_NONE if x is None else _with_error(x, _signed) for x in others)
            table.add_row("  less the first's", *cells)
        if any(x.infinite for x in of_loss):
            table.add_row("  samples infinite", *(f"{x.infinite:,}" for x in of_loss), style="red")
    ppl = [x.perplexity for x in scores if x.perplexity is not None]
    if ppl:
        table.add_section()
        for title, key in _PERPLEXITIES:
            table.add_row(title, *(_with_error(getattr(x, key), _six) for x in ppl))
        table.add_row("correlation of log probabilities", *(_share(x.correlation) for x in ppl))
    changes = [x.delta_p for x in scores if x.delta_p is not None]
    if changes:
        table.add_section()
        table.add_row("Δp mean", *(_with_error(x.mean, _share) for x in changes), style="bold")
        table.add_row("  root mean square", *(_with_error(x.rms, _share) for x in changes))
        for title, key in _DELTA_P:
            table.add_row(f"  {title}", *(_share(getattr(x, key)) for x in changes))
    by_tool = [name for name, x in zip(names, scores, strict=True) if x.reading]
    said = f"{_BY_TOOL}: {', '.join(by_tool)}\n" if by_tool else ""
    about = f"{first.classes:,} classes · {first.backend} on {first.device}\n{_settings(first)}\n{said}"
    return [Text(about), table]


def _agreement(score: Score) -> Estimate:
    p, n = score.top1_agreement, score.samples
    return Estimate(p, math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan)


def _with_error(x: Estimate, spelt: Callable[[float], str]) -> str:
    return spelt(x.value) + (f" ± {spelt(x.stderr).lstrip('+')}" if math.isfinite(x.stderr) else "")


def _six(x: float) -> str:
    return f"{x:,.6f}" if abs(x) < 1e9 or not math.isfinite(x) else f"{x:.6e}"


def _signed(x: float) -> str:
    return f"{x:+.4g}"


def _share(x: float) -> str:
    return f"{x:.3%}"


def _title(score: Score) -> Text:
    left_out = f", {score.skipped:,} skipped (every class -inf)" if score.skipped else ""
    left_out += f", {score.undefined:,} undefined (NaN)" if score.undefined else ""
    left_out += f", {score.masked:,} masked" if score.masked else ""
    agreement = _agreement(score)
    error = f" ± {agreement.stderr:.2%}" if math.isfinite(agreement.stderr) else ""
    return Text.assemble(
        (f"{score.samples:,} samples", "bold"),
        f"{left_out} · {score.classes:,} classes · {score.backend} on {score.device}\n",
        f"{_settings(score)}\n",
        f"{_BY_TOOL}\n" if score.reading else "",
        "top-1 agreement ",
        (f"{agreement.value:.2%}", "bold"),
        f"{error}\n",
        *(f"top-{k} overlap {_with_error(each, _share)}\n" for k, each in (score.top_k_overlap or {}).items()),
    )


def _settings(score: Score) -> str:
    numbers, losses = score.parameters, score.losses.keys()
    settings = [f"temperature {numbers.temperature:g}"]
    if losses & {"ikl", "gkl"}:
        of_weights = f"weights {score.weights}"
        if numbers.weight_temperature != 1:
            of_weights += f" at temperature {numbers.weight_temperature:g}"
        settings.append(of_weights)
    if "gkl" in losses:
        settings.append(f"γ {numbers.gamma:g}")
    if losses - {*WITHOUT_PARTS}:
        settings.append(f"wMSE × {numbers.mse_weight:g} + CE × {numbers.ce_weight:g}")
    return " · ".join(settings)


def _losses(score: Score) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("loss per sample", no_wrap=True)
    columns = []
    for name, summary in score.losses.items():
        table.add_column(name, justify="right", no_wrap=True)
        values = [getattr(summary, key) for _, key in _ROWS]
        columns.append(_aligned(values, [getattr(summary, key) for key in _MEASURES]))
    for at, (title, key) in enumerate(_ROWS):
        if score.delta_p is None and key in _OF_TARGETS:
            continue
        if all(getattr(summary, key) is None for summary in score.losses.values()):
            continue
        about = " (t-digest)" if score.quantiles != "exact" and key in _SKETCHED else ""
        table.add_row(title + about, *(column[at] for column in columns), style="bold" if key == "mean" else "")
    if any(summary.infinite for summary in score.losses.values()):
        table.add_row("samples infinite", *(f"{x.infinite:,}" for x in score.losses.values()), style="red")
    return table


def _worst(score: Score) -> Table:
    assert score.worst_classes is not None
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("class", justify="right", no_wrap=True)
    table.add_column("samples", justify="right", no_wrap=True)
    table.add_column("top-1", justify="right", no_wrap=True)
    columns = []
    for name in score.losses:
        table.add_column(name, justify="right", no_wrap=True)
        columns.append(_aligned([each.means[name] for each in score.worst_classes]))
    for at, each in enumerate(score.worst_classes):
        numbers = (column[at] for column in columns)
        table.add_row(str(each.label), f"{each.samples:,}", f"{each.top1_agreement:.1%}", *numbers)
    return table


def _aligned(values: Iterable[float | None], measures: Iterable[float | None] | None = None) -> list[str]:
    """The numbers of one column, with as many decimals as give the smallest of them four digits, or with exponents.

    Where `measures` are given, the smallest of these decides, since the low quantiles may be almost 0.
    """
    given = list(values)
    sizes = [abs(x) for x in (measures or given) if x is not None and math.isfinite(x) and x != 0]
    decimals = max(0, 3 - math.floor(math.log10(min(sizes)))) if sizes else 4
    fixed = decimals <= 6 and (not sizes or max(sizes) < 1e6)
    style = f",.{decimals}f" if fixed else ".4e"
    return [_NONE if x is None else f"{x:{style}}" for x in given]


def _finite(x: float | int | None) -> float | int | None:
    return x if x is None or math.isfinite(x) else None
