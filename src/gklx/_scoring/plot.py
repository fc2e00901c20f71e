"""A picture of a score: the distribution of the losses, the worst classes, and the confidence of both networks.

One Vega-Lite specification for SVG, PNG and HTML. It holds counts and no marks of samples, so
its size does not grow with their number.
"""

import json
import math
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .atomic import check_writable, replacing
from .samples import WITHOUT_PARTS
from .statistics import Score
from .values import Values

_SUFFIXES = (".svg", ".png", ".html")
_COLOURS = {
    "kl": "#0072B2",
    "dkl": "#E69F00",
    "ikl": "#009E73",
    "gkl": "#CC79A7",
    "reverse_kl": "#56B4E9",
}  # Okabe and Ito's
_SHADES = ["#b5d3ed", "#4a90c2", "#08306b"]
_BINS, _CELLS = 60, 40
_DECADES = 9
_BARS = 30
_NAMED = 10
_POINTS = 400
_SIDE = 320
_LINE = 64
# Dashes of the losses with parts, in drawing order: where curves coincide, each is still visible.
_DASHES = [[1, 0], [10, 6], [6, 6]]
_STAND_IN, _LESS_THAN = "\ue000", "\\u003c"
# Vega expressions for the labels of an axis: powers of ten, numbers, percentages.
_DECIMAL = "datum.value < 0.001 || datum.value >= 10000 ? format(datum.value, '.0e') : format(datum.value, '~g')"
_NUMBER = "format(datum.value, datum.value && (abs(datum.value) < 0.001 || abs(datum.value) >= 1e6) ? '~e' : ',~r')"
_PERCENT = "format(datum.value, '~%')"


class _Counts(NamedTuple):
    edges: Any
    """[_BINS + 1], equally spaced in the logarithm."""
    of_losses: dict[str, Any]
    """For each loss the counts, [_BINS]."""
    not_drawn: dict[str, dict[str, int]]
    """For each loss the number of samples that are not drawn, by the reason."""
    class_samples: Any
    """[C]"""
    class_finite: Any
    """[C], the number of samples whose first loss is finite."""
    class_sums: Any
    """[C], the sum of the first loss over these samples."""
    confidences: Any
    """[_CELLS, _CELLS], student by teacher: the number of samples."""


def check_plot(path: str) -> None:
    """ValueError where the picture cannot be drawn; called before the work."""
    suffix = Path(path).suffix
    if suffix not in _SUFFIXES:
        raise ValueError(f"{path}: a plot must go to a .svg, .png or .html file, got {suffix or 'no suffix'}")
    altair_for(path)
    check_writable(path)


def draw(values: Values, found: Score, path: str, title: str) -> None:
    """Draws the samples of a score into a file; its suffix chooses the format."""
    write(specification(values, found, title, path), path)


def write(spec: dict[str, Any], path: str) -> None:
    """Writes a picture; an old file is replaced when the new one is complete."""
    with replacing(path) as part, open(part, "wb") as file:
        file.write(rendered(spec, Path(path).suffix))


def specification(values: Values, found: Score, title: str, path: str = "plot") -> dict[str, Any]:
    """The picture as a Vega-Lite specification."""
    alt = altair_for(path)
    counts = _counted(values)
    by = "label" if found.worst_classes is not None else "teacher's top class"
    panels = [
        (
            _spread_panel(alt, counts, found),
            "Loss per sample",
            ["median and mean marked at the foot", *_not_drawn(counts)],
        ),
        (_class_panel(alt, counts, found, by), f"Mean {next(iter(found.losses))} by class", _classes(counts, found)),
        (
            _confidence_panel(alt, counts),
            f"Confidence · {found.top1_agreement:.2%} agree",
            ["share of samples in which both name the same top class"],
        ),
    ]
    # The same number of lines above each panel, so that titles and frames are aligned.
    bars = np.count_nonzero(counts.class_finite) <= _BARS
    lines = max(len(said) for _, _, said in panels)
    row = alt.hconcat(
        *(
            panel.properties(
                width=_SIDE,
                height=_SIDE,
                title=alt.TitleParams(
                    title,
                    subtitle=said + [" "] * (lines - len(said)),
                    anchor="start",
                    fontSize=14,
                    subtitleFontSize=11,
                    dy=-5 if at == 1 and bars else 0,  # aligns this title with those of panels with tick labels
                ),
            )
            for at, (panel, title, said) in enumerate(panels)
        ),
        spacing=36,
    )
    numbers = found.parameters
    left_out = f", {found.skipped + found.undefined:,} left out" if found.skipped + found.undefined else ""
    many = "s" if found.samples != 1 else ""
    subtitle = (
        f"{found.samples:,} sample{many}{left_out} · {found.classes:,} classes · temperature {numbers.temperature:g} · "
        f"{found.weights} weights · γ {numbers.gamma:g} · wMSE × {numbers.mse_weight:g} + CE × {numbers.ce_weight:g}"
    )
    return styled(alt, row.resolve_scale(color="independent", shape="independent"), title, subtitle)


def styled(alt: Any, chart: Any, title: str, subtitle: str) -> dict[str, Any]:
    """The whole picture, with the style that all pictures share."""
    head = alt.TitleParams(title, subtitle=subtitle, anchor="start", fontSize=18, subtitleFontSize=12, offset=16)
    spec: dict[str, Any] = (
        chart.properties(title=head, padding=16, background="white")
        .configure(font="Helvetica, Arial, sans-serif")
        .configure_view(stroke="#ddd")
        .configure_axis(
            grid=True,
            gridColor="#eee",
            labelFlush=False,
            labelColor="#444",
            titleColor="#222",
            titleFontWeight="normal",
        )
        .configure_title(subtitleColor="#555", subtitleLineHeight=15)
        .configure_legend(titleFontWeight="normal")
        .to_dict()
    )
    return spec


# --- counting ---------------------------------------------------------------------------------------------------------


def _counted(values: Values) -> _Counts:
    """Counts in two passes over the samples: the first finds the range of the losses."""
    low, high = math.inf, 0.0
    for block in values.blocks():
        for parts in block.losses.values():
            x = parts.loss[block.scored]
            x = x[np.isfinite(x) & (x > 0)]
            if x.size:
                low, high = min(low, float(x.min())), max(high, float(x.max()))
    if high == 0:
        low, high = 0.1, 1.0
    first = math.floor(max(math.log10(low), math.log10(high) - _DECADES))
    edges = np.linspace(first, max(math.ceil(math.log10(high)), first + 1), _BINS + 1)
    of_losses = {name: np.zeros(_BINS) for name in values.names}
    kinds: dict[str, Callable[[Any], Any]] = {
        "not finite": lambda x: ~np.isfinite(x),
        "negative": lambda x: np.isfinite(x) & (x < 0),
        "exactly 0": lambda x: x == 0,
        f"below {f'{10 ** edges[0]:g}'.replace('e-0', 'e-')}": lambda x: (x > 0) & (x < 10 ** edges[0]),
    }
    not_drawn = {kind: dict.fromkeys(values.names, 0) for kind in kinds}
    class_samples, class_finite, class_sums = np.zeros((3, values.classes))
    confidences = np.zeros((_CELLS, _CELLS))
    for block in values.blocks():
        here = block.scored
        for name, parts in block.losses.items():
            x = parts.loss[here]
            shown = np.isfinite(x) & (x >= 10 ** edges[0])
            for kind, holds in kinds.items():
                not_drawn[kind][name] += int(holds(x).sum())
            of_losses[name] += np.histogram(np.log10(x[shown]), edges)[0]
        classes = (block.teacher_class if block.label is None else block.label)[here]
        loss = block.losses[values.names[0]].loss[here]
        class_samples += np.bincount(classes, minlength=values.classes)
        finite = np.isfinite(loss)
        class_finite += np.bincount(classes[finite], minlength=values.classes)
        class_sums += np.bincount(classes[finite], weights=loss[finite], minlength=values.classes)
        pair = block.student_confidence[here], block.teacher_confidence[here]
        confidences += np.histogram2d(*pair, bins=_CELLS, range=((0, 1), (0, 1)))[0]
    return _Counts(edges, of_losses, not_drawn, class_samples, class_finite, class_sums, confidences)


# --- panels -----------------------------------------------------------------------------------------------------------


def _spread_panel(alt: Any, counts: _Counts, found: Score) -> Any:
    """The share of samples by their loss, on a logarithmic scale."""
    names = [name for name in _COLOURS if name in found.losses]
    rows = [
        {"loss": name, "from": float(10**a), "to": float(10**b), "share": float(count) / found.samples}
        for name in names
        for a, b, count in zip(counts.edges[:-1], counts.edges[1:], counts.of_losses[name], strict=True)
    ]
    # A last point at 0 makes each curve end on the axis.
    end = float(10 ** counts.edges[-1])
    rows += [{"loss": name, "from": end, "to": end, "share": 0.0} for name in names]
    marks = [
        {"loss": name, "what": what, "value": getattr(each, what)}
        for name, each in found.losses.items()
        for what in ("median", "mean")
        if 10 ** counts.edges[0] <= getattr(each, what) <= 10 ** counts.edges[-1]
    ]
    colour = alt.Color(
        "loss:N",
        scale=alt.Scale(domain=names, range=[_COLOURS[name] for name in names]),
        legend=alt.Legend(title=None, orient="bottom", symbolType="stroke", symbolStrokeWidth=3),
    )
    with_parts = iter(_DASHES)
    dashes = [_DASHES[0] if name in WITHOUT_PARTS else next(with_parts) for name in names]
    domain = [float(10 ** counts.edges[0]), float(10 ** counts.edges[-1])]
    x = alt.X(
        "from:Q",
        title="loss of a sample",
        scale=alt.Scale(type="log", domain=domain),
        axis=alt.Axis(labelExpr=_DECIMAL, values=_ticks(counts.edges)),
    )
    base = alt.Chart(alt.InlineData(values=rows))
    curve = base.mark_line(interpolate="step-after", strokeWidth=2.2).encode(
        x=x,
        y=alt.Y("share:Q", title="share of samples", **_from_zero(alt, rows, "share")),
        color=colour,
        strokeDash=alt.StrokeDash("loss:N", scale=alt.Scale(domain=names, range=dashes), legend=None),
        tooltip=[
            "loss:N",
            alt.Tooltip("from:Q", format=".3~g"),
            alt.Tooltip("to:Q", format=".3~g"),
            alt.Tooltip("share:Q", format=".3~%"),
        ],
    )
    points = (
        alt.Chart(alt.InlineData(values=marks))
        .mark_point(filled=True, size=70, opacity=1)
        .encode(
            x=alt.X("value:Q", scale=alt.Scale(type="log", domain=domain)),
            y=alt.value(_SIDE - 6),
            color=colour,
            shape=alt.Shape(
                "what:N",
                scale=alt.Scale(domain=["median", "mean"], range=["diamond", "triangle-up"]),
                legend=alt.Legend(title=None, orient="bottom", symbolFillColor="#444", symbolStrokeColor="#444"),
            ),
            tooltip=["loss:N", "what:N", alt.Tooltip("value:Q", format=".4~g")],
        )
    )
    return curve + points


def _not_drawn(counts: _Counts) -> list[str]:
    said = []
    for kind, of in counts.not_drawn.items():
        numbers = [f"{name} {count:,}" for name, count in of.items() if count]
        if len(of) > 1 and len(numbers) == len(of) and len(set(of.values())) == 1:
            numbers = [f"{next(iter(of.values())):,} of each"]
        said += textwrap.wrap(f"{kind}, not drawn: {', '.join(numbers)}", _LINE) if numbers else []
    return said


def _ticks(edges: Any) -> list[float]:
    """Ticks at powers of ten, and between them where there are few."""
    first, last = round(edges[0]), round(edges[-1])
    between = (1, 2, 5) if last - first <= 2 else (1,)
    return [float(f"{digit}e{decade}") for decade in range(first, last + 1) for digit in between]


def _class_panel(alt: Any, counts: _Counts, found: Score, by: str) -> Any:
    """The means of the classes, the largest first: bars for few, a curve over the ranks for many."""
    name = next(iter(found.losses))
    order, means = _ranked(counts)
    ranks = range(len(order)) if len(order) <= _BARS else _some_ranks(len(order))
    rows = [
        {
            "rank": int(rank) + 1,
            "class": int(order[rank]),
            "mean": float(means[rank]),
            "samples": int(counts.class_samples[order[rank]]),
        }
        for rank in ranks
    ]
    tooltip = ["class:N", "rank:Q", alt.Tooltip("mean:Q", format=".4~g"), alt.Tooltip("samples:Q", format=",")]
    mean = {"title": f"mean {name}"} | _from_zero(alt, rows, "mean")
    base = alt.Chart(alt.InlineData(values=rows))
    if len(order) <= _BARS:
        return base.mark_bar(color=_COLOURS[name], size=min(28.0, 0.8 * _SIDE / max(len(order), 1))).encode(
            x=alt.X("mean:Q", **mean),
            y=alt.Y("class:N", sort=None, title=f"class ({by})", axis=alt.Axis(grid=False, labelFontSize=9)),
            tooltip=tooltip,
        )
    return base.mark_line(color=_COLOURS[name], interpolate="step-after").encode(
        x=alt.X(
            "rank:Q",
            title=f"rank of the class ({by})",
            scale=alt.Scale(type="log", domain=[1, len(order)]),
            axis=alt.Axis(format="~s", values=_ticks([0, math.ceil(math.log10(len(order)))])),
        ),
        y=alt.Y("mean:Q", **mean),
        tooltip=tooltip,
    )


def _ranked(counts: _Counts) -> tuple[Any, Any]:
    """The classes that have a finite loss, the largest mean first, and their means over those."""
    classes = np.flatnonzero(counts.class_finite)
    means = counts.class_sums[classes] / counts.class_finite[classes]
    order = np.argsort(-means, kind="stable")
    return classes[order], means[order]


def _classes(counts: _Counts, found: Score) -> list[str]:
    order, _ = _ranked(counts)
    said = [f"{np.count_nonzero(counts.class_samples):,} of {found.classes:,} classes seen"]
    infinite = int((counts.class_samples - counts.class_finite).sum())
    if infinite:
        said += [f"{infinite:,} losses that are not finite left out of the means"]
    if len(order) > _BARS:
        said += textwrap.wrap(f"worst: {', '.join(str(each) for each in order[:_NAMED])}", _LINE)
    return said


def _from_zero(alt: Any, rows: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """A scale from 0 to a tick, never of length 0, so that the titles of the panels are aligned."""
    values = [float(row[key]) for row in rows] + [0.0]
    low, high = min(values), max(values)
    high = high if high > low else 1.0
    digit = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(k * digit for k in (1, 2, 5, 10) if k * digit >= (high - low) / 6)
    ticks = [float(f"{k * step:.12g}") for k in range(math.floor(low / step), math.ceil(high / step) + 1)]
    return {
        "scale": alt.Scale(domain=[ticks[0], ticks[-1]]),
        "axis": alt.Axis(values=ticks, labelExpr=_PERCENT if key == "share" else _NUMBER),
    }


def _some_ranks(count: int) -> list[int]:
    """The ranks that are drawn, equally spaced on a logarithmic scale."""
    return sorted({round(x) - 1 for x in np.geomspace(1, count, _POINTS)})


def _confidence_panel(alt: Any, counts: _Counts) -> Any:
    """The confidence of the student by that of the teacher."""
    side = 1 / _CELLS
    rows = [
        {"student": i * side, "student_to": (i + 1) * side, "teacher": j * side, "teacher_to": (j + 1) * side}
        | {"samples": int(counts.confidences[i, j])}
        for i, j in zip(*np.nonzero(counts.confidences), strict=True)
    ]
    most = max((row["samples"] for row in rows), default=1)
    axis = alt.Axis(format="~%", tickCount=5)
    scale = alt.Scale(domain=[0, 1])
    cells = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_rect()
        .encode(
            x=alt.X("teacher:Q", title="teacher's largest probability", scale=scale, axis=axis),
            x2="teacher_to:Q",
            y=alt.Y("student:Q", title="student's largest probability", scale=scale, axis=axis),
            y2="student_to:Q",
            color=alt.Color(
                "samples:Q",
                scale=alt.Scale(type="log", domain=[1, max(most, 10)], range=_SHADES, interpolate="lab"),
                legend=alt.Legend(
                    title="samples a cell",
                    orient="bottom",
                    gradientLength=_SIDE,
                    format="~s",
                    values=[10**k for k in range(len(str(max(most, 10))))],
                ),
            ),
            tooltip=[alt.Tooltip("samples:Q", format=",")],
        )
    )
    ends = alt.InlineData(values=[{"teacher": 0, "student": 0}, {"teacher": 1, "student": 1}])
    diagonal = alt.Chart(ends).mark_line(color="#666", strokeDash=[4, 4]).encode(x="teacher:Q", y="student:Q")
    return cells + diagonal


# --- rendering --------------------------------------------------------------------------------------------------------


def rendered(spec: dict[str, Any], suffix: str) -> bytes:
    """A specification as the content of a file with this suffix."""
    import vl_convert

    if suffix == ".png":
        png: bytes = vl_convert.vegalite_to_png(spec, scale=2)
        return png
    if suffix == ".svg":
        # Vega numbers its gradients through the process: with a fixed number equal pictures are equal files.
        return re.sub(r'((?:id="|url\(#)gradient_)\d+', r"\g<1>0", vl_convert.vegalite_to_svg(spec)).encode()
    # In a script, `<!--<script>` in a file's name would swallow the rest of the page: `<` is escaped.
    spared = json.dumps(spec).replace("<", _STAND_IN)
    library, script, page = vl_convert.vegalite_to_html(spared, bundle=True).rpartition("<script")
    return f"{library}{script}{page.replace(_STAND_IN, _LESS_THAN)}".encode()


def altair_for(path: str) -> Any:
    """Altair; ValueError where it or its renderer is not installed."""
    try:
        import altair
        import vl_convert  # noqa: F401
    except ImportError:
        raise ValueError(
            f"{path}: a plot needs altair and vl-convert-python, which are not installed (pip install 'gklx[score]')"
        ) from None
    return altair
