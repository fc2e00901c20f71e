"""A Markdown table and a plot of the results in an experiment's JSON file."""

import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import altair

from . import statistics

Results = Mapping[str, Any]
"""The content of the JSON file: the experiment, its settings, and the metrics of each run."""


def write(results: Results, directory: Path) -> list[Path]:
    """Write <experiment>.json, .md and .svg; all are computed before the first is written."""
    name = results["experiment"]
    texts = {
        f"{name}.json": json.dumps(results, indent=1, allow_nan=False) + "\n",
        f"{name}.md": table(results),
        f"{name}.svg": plot(results),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        write_atomically(directory / file, text)
    return [directory / file for file in texts]


def table(results: Results) -> str:
    """A Markdown table for each condition: the variants' means, and their paired differences from the baseline."""
    baseline, metrics = results["baseline"], results["metrics"]
    seeds = len({run["seed"] for run in results["runs"]})
    compared = len({run["variant"] for run in results["runs"]} - {baseline})
    lines = [
        f"# {results['title']}",
        "",
        f"`{results['command']}`",
        "",
        f"Mean over {seeds} seed{'s' * (seeds > 1)} ± half of the 95 % interval (Student's t). "
        f"Δ is the difference from {baseline}, paired by seed; bold where its interval leaves 0 out. "
        f"The intervals are not corrected for the {compared} comparison{'s' * (compared != 1)} in a column.",
    ]
    for condition in _in_order(results, "condition"):
        head = ["variant"]
        for metric, label in metrics.items():
            arrow = "↑" if results["higher_is_better"][metric] else "↓"
            head += [f"{label} {arrow}", f"Δ {baseline}"]
        lines += ["", f"## {condition}", "", _row(head), _row(["---"] + ["---:"] * (len(head) - 1))]
        for variant in _in_order(results, "variant"):
            cells = [variant]
            for metric in metrics:
                values = _by_seed(results, condition, variant, metric)
                baseline_values = _by_seed(results, condition, baseline, metric)
                shown = values.keys() & baseline_values.keys() and variant != baseline
                cells.append(_estimate(statistics.mean(list(values.values()))) if values else "–")
                cells.append(_difference(statistics.paired_difference(values, baseline_values)) if shown else "–")
            lines.append(_row(cells))
    return "\n".join(lines) + "\n"


def plot(results: Results) -> str:
    """An SVG plot: a row per metric, a column per condition, a tick per seed, and the mean with its interval."""
    variants, conditions = _in_order(results, "variant"), _in_order(results, "condition")
    rows = []
    for metric, label in results["metrics"].items():
        panels = []
        for condition in conditions:
            ticks, means = [], []
            for variant in variants:
                values = list(_by_seed(results, condition, variant, metric).values())
                if not values:
                    continue
                ticks += [{"variant": variant, "value": value} for value in values]
                estimate = statistics.mean(values)
                unknown = math.isnan(estimate.low)
                low, high = (estimate.mean, estimate.mean) if unknown else (estimate.low, estimate.high)
                means.append({"variant": variant, "value": estimate.mean, "low": low, "high": high})
            y = altair.Y("variant:N", sort=variants, title=None)
            x = altair.X("value:Q", title=label, scale=altair.Scale(zero=False))
            seeds = altair.Chart(altair.Data(values=ticks)).mark_tick(thickness=1.5, size=14, opacity=0.6, color="#777")
            summary = altair.Chart(altair.Data(values=means))
            panels.append(
                altair.layer(
                    seeds.encode(x=x, y=y),
                    summary.mark_rule(strokeWidth=2, color="#1f5fa8").encode(x=altair.X("low:Q"), x2="high:Q", y=y),
                    summary.mark_point(filled=True, size=55, color="#1f5fa8").encode(x=x, y=y),
                ).properties(title=condition, width=240)
            )
        rows.append(altair.hconcat(*panels))
    svg = io.StringIO()
    altair.vconcat(*rows, title=results["title"]).save(svg, format="svg")
    return svg.getvalue()


def _in_order(results: Results, key: str) -> list[str]:
    """The conditions or variants that were run, in the order of the experiment."""
    return list(dict.fromkeys(run[key] for run in results["runs"]))


def _by_seed(results: Results, condition: str, variant: str, metric: str) -> dict[int, float]:
    return {
        run["seed"]: run["metrics"][metric]
        for run in results["runs"]
        if run["condition"] == condition and run["variant"] == variant
    }


def _digits(half_width: float) -> int:
    """The number of decimals that show two digits of the interval, at most four; two if the interval is unknown."""
    if not math.isfinite(half_width) or half_width <= 0:
        return 2
    return min(max(1 - math.floor(math.log10(half_width)), 0), 4)


def _estimate(estimate: statistics.Estimate) -> str:
    digits = _digits(estimate.half_width)
    if math.isnan(estimate.low):
        return f"{estimate.mean:.{digits}f}"
    return f"{estimate.mean:.{digits}f} ± {estimate.half_width:.{digits}f}"


def _difference(estimate: statistics.Estimate) -> str:
    digits = _digits(estimate.half_width)
    text = f"{estimate.mean:+.{digits}f}"
    if not math.isnan(estimate.low):
        text += f" ± {estimate.half_width:.{digits}f}"
    return f"**{text}**" if estimate.excludes_zero else text


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that readers find the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
