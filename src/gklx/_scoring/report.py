"""A score as text: a table for people, JSON for programs."""

import json
import math
from collections.abc import Iterable

from rich import box
from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .statistics import Score

_ROWS = (
    ("mean", "mean"),
    ("± standard error", "stderr"),
    ("  of which wMSE", "mse"),
    ("  of which CE", "ce"),
    ("median", "median"),
    ("90 %", "p90"),
    ("95 %", "p95"),
    ("99 %", "p99"),
    ("maximum", "max"),
)
_NONE = "–"
_PLAIN = str.maketrans({"–": "-", "±": "+-", "·": "|", "γ": "gamma", "×": "*"})
"""For a standard output that spells no more than ASCII."""


def as_json(score: Score) -> str:
    """A score as strict JSON: a number that is not finite is null."""
    found: dict[str, object] = {
        "samples": score.samples,
        "skipped": score.skipped,
        "undefined": score.undefined,
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
    return json.dumps(found, indent=2, allow_nan=False) + "\n"


def as_table(score: Score) -> str:
    """A score as tables, styled and as wide as standard output is."""
    console = Console(highlight=False, emoji=False)
    parts: list[Table | Text] = [_title(score), _losses(score)]
    if score.worst_classes is not None:
        parts += [Text(f"\nclasses with the largest mean {next(iter(score.losses))}\n"), _worst(score)]
    # Wider than a narrow terminal rather than a number cut short.
    roomy = console.options.update(width=1000)
    needed = max(Measurement.get(console, roomy, part).maximum for part in parts if isinstance(part, Table))
    console.width = max(console.width, needed)
    with console.capture() as capture:
        console.print(Group(*parts))
    text = capture.get()
    return text.translate(_PLAIN) if console.options.ascii_only else text


def _title(score: Score) -> Text:
    numbers = score.parameters
    left_out = f", {score.skipped:,} skipped (every class -inf)" if score.skipped else ""
    left_out += f", {score.undefined:,} undefined (NaN)" if score.undefined else ""
    p, n = score.top1_agreement, score.samples
    error = f" ± {math.sqrt(p * (1 - p) / (n - 1)):.2%}" if n > 1 else ""
    losses = score.losses.keys()
    settings = [f"temperature {numbers.temperature:g}"]
    if losses & {"ikl", "gkl"}:
        of_weights = f"weights {score.weights}"
        if numbers.weight_temperature != 1:
            of_weights += f" at temperature {numbers.weight_temperature:g}"
        settings.append(of_weights)
    if "gkl" in losses:
        settings.append(f"γ {numbers.gamma:g}")
    if losses - {"kl"}:
        settings.append(f"wMSE × {numbers.mse_weight:g} + CE × {numbers.ce_weight:g}")
    return Text.assemble(
        (f"{score.samples:,} samples", "bold"),
        f"{left_out} · {score.classes:,} classes · {score.backend} on {score.device}\n",
        " · ".join(settings) + "\n",
        "top-1 agreement ",
        (f"{score.top1_agreement:.2%}", "bold"),
        f"{error}\n",
    )


def _losses(score: Score) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("loss per sample", no_wrap=True)
    columns = []
    for name, summary in score.losses.items():
        table.add_column(name, justify="right", no_wrap=True)
        values = [getattr(summary, key) for _, key in _ROWS]
        columns.append(_aligned(values))
    for at, (title, key) in enumerate(_ROWS):
        if all(getattr(summary, key) is None for summary in score.losses.values()):
            continue
        about = " (t-digest)" if score.quantiles != "exact" and key in ("median", "p90", "p95", "p99") else ""
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


def _aligned(values: Iterable[float | None]) -> list[str]:
    """Numbers of one column, with the decimals that give the smallest of them four digits, or with exponents."""
    given = list(values)
    sizes = [abs(x) for x in given if x is not None and math.isfinite(x) and x != 0]
    decimals = max(0, 3 - math.floor(math.log10(min(sizes)))) if sizes else 4
    fixed = decimals <= 6 and (not sizes or max(sizes) < 1e6)
    style = f",.{decimals}f" if fixed else ".4e"
    return [_NONE if x is None else f"{x:{style}}" for x in given]


def _finite(x: float | int | None) -> float | int | None:
    return x if x is None or math.isfinite(x) else None
