"""A picture of a score: how the losses are spread, which classes are worst, how sure both networks are.

One Vega-Lite specification for SVG, PNG and HTML. It holds counts, never a mark a sample, so it is small at any size.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .atomic import check_writable, replacing
from .statistics import Score
from .values import SampleValues

_SUFFIXES = (".svg", ".png", ".html")
_COLOURS = {"kl": "#0072B2", "dkl": "#E69F00", "ikl": "#009E73", "gkl": "#CC79A7"}  # Okabe and Ito's
_BINS, _CELLS = 60, 40
_DECADES = 9
_BARS = 30
_NAMED = 8
_POINTS = 400
_SIDE = 300
_WIDTHS = [4.2, 3.0, 2.0, 1.2]
# Vega's expression for the labels of a scale of decades.
_DECIMAL = "datum.value < 0.001 || datum.value >= 10000 ? format(datum.value, '.0e') : format(datum.value, '~g')"


class _Counts(NamedTuple):
    edges: Any
    """[_BINS + 1], decades apart in equal steps."""
    of_losses: dict[str, Any]
    """[_BINS] a loss."""
    not_drawn: dict[str, int]
    class_samples: Any
    """[C]"""
    class_sums: Any
    """[C], of the first loss."""
    confidences: Any
    """[_CELLS, _CELLS], student by teacher."""


def check_plot(path: str) -> None:
    """ValueError where the picture could not be drawn: said before the work."""
    suffix = Path(path).suffix
    if suffix not in _SUFFIXES:
        raise ValueError(f"{path}: a plot must go to a .svg, .png or .html file, got {suffix or 'no suffix'}")
    _altair(path)
    check_writable(path)


def draw(values: SampleValues, found: Score, path: str, title: str) -> None:
    """Draws the samples of a score into a file whose suffix says how."""
    spec = specification(values, found, title, path)
    suffix = Path(path).suffix
    with replacing(path) as part, open(part, "wb") as file:
        file.write(_rendered(spec, suffix))


def specification(values: SampleValues, found: Score, title: str, path: str = "plot") -> dict[str, Any]:
    """The picture in Vega-Lite's words."""
    alt = _altair(path)
    counts = _counted(values)
    by = "label" if found.worst_classes is not None else "teacher's top class"
    panels = alt.hconcat(
        _spread_panel(alt, counts, found), _class_panel(alt, counts, found, by), _confidence_panel(alt, counts, found)
    )
    numbers = found.parameters
    left_out = f", {found.skipped + found.undefined:,} left out" if found.skipped + found.undefined else ""
    many = "s" if found.samples != 1 else ""
    subtitle = (
        f"{found.samples:,} sample{many}{left_out} · {found.classes:,} classes · temperature {numbers.temperature:g} · "
        f"weights {found.weights} · γ {numbers.gamma:g} · wMSE × {numbers.mse_weight:g} + CE × {numbers.ce_weight:g}"
    )
    chart = panels.resolve_scale(color="independent").properties(
        title=alt.TitleParams(title, subtitle=subtitle, anchor="start", fontSize=18, subtitleFontSize=12, offset=16),
        padding=16,
        background="white",
    )
    spec: dict[str, Any] = (
        chart.configure(font="Helvetica, Arial, sans-serif")
        .configure_view(stroke="#ddd")
        .configure_axis(grid=True, gridColor="#eee", labelColor="#444", titleColor="#222", titleFontWeight="normal")
        .configure_title(subtitleColor="#555", subtitleLineHeight=15)
        .configure_legend(titleFontWeight="normal")
        .to_dict()
    )
    return spec


# --- counting ---------------------------------------------------------------------------------------------------------


def _counted(values: SampleValues) -> _Counts:
    """Two runs over the samples: the range of the losses, then the counts."""
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
    not_drawn = dict.fromkeys(values.names, 0)
    class_samples, class_sums = np.zeros((2, values.classes))
    confidences = np.zeros((_CELLS, _CELLS))
    for block in values.blocks():
        here = block.scored
        for name, parts in block.losses.items():
            x = parts.loss[here]
            shown = np.isfinite(x) & (x >= 10 ** edges[0])
            not_drawn[name] += int((~shown).sum())
            of_losses[name] += np.histogram(np.log10(x[shown]), edges)[0]
        classes = (block.teacher_class if block.label is None else block.label)[here]
        loss = block.losses[values.names[0]].loss[here]
        class_samples += np.bincount(classes, minlength=values.classes)
        class_sums += np.bincount(classes, weights=loss, minlength=values.classes)
        pair = block.student_confidence[here], block.teacher_confidence[here]
        confidences += np.histogram2d(*pair, bins=_CELLS, range=((0, 1), (0, 1)))[0]
    return _Counts(edges, of_losses, not_drawn, class_samples, class_sums, confidences)


# --- panels -----------------------------------------------------------------------------------------------------------


def _spread_panel(alt: Any, counts: _Counts, found: Score) -> Any:
    """The share of samples by their loss, on a scale of decades."""
    rows = [
        {"loss": name, "from": float(10**a), "to": float(10**b), "share": float(count) / found.samples}
        for name, of_bins in counts.of_losses.items()
        for a, b, count in zip(counts.edges[:-1], counts.edges[1:], of_bins, strict=True)
    ]
    marks = [
        {"loss": name, "what": what, "value": getattr(each, what)}
        for name, each in found.losses.items()
        for what in ("median", "mean")
        if 10 ** counts.edges[0] <= getattr(each, what) <= 10 ** counts.edges[-1]
    ]
    names = list(found.losses)
    colour = alt.Color(
        "loss:N",
        scale=alt.Scale(domain=names, range=[_COLOURS[name] for name in names]),
        legend=alt.Legend(title=None, orient="top-left", symbolType="stroke"),
    )
    domain = [float(10 ** counts.edges[0]), float(10 ** counts.edges[-1])]
    x = alt.X(
        "from:Q",
        title="loss of a sample",
        scale=alt.Scale(type="log", domain=domain),
        axis=alt.Axis(labelExpr=_DECIMAL, values=_ticks(counts.edges)),
    )
    base = alt.Chart(alt.InlineData(values=rows))
    curve = base.mark_line(interpolate="step-after").encode(
        x=x,
        y=alt.Y("share:Q", title="share of samples", axis=alt.Axis(format="~%")),
        color=colour,
        # Drawn by name, the earlier the wider: where curves coincide all of them are seen.
        strokeWidth=alt.StrokeWidth(
            "loss:N", scale=alt.Scale(domain=sorted(names), range=_WIDTHS[-len(names) :]), legend=None
        ),
        tooltip=["loss:N", alt.Tooltip("from:Q", format=".3~g"), alt.Tooltip("to:Q", format=".3~g"), "share:Q"],
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
                legend=None,
            ),
            tooltip=["loss:N", "what:N", alt.Tooltip("value:Q", format=".4~g")],
        )
    )
    left_out = {name: count for name, count in counts.not_drawn.items() if count}
    said = ", ".join(f"{name} {count:,}" for name, count in left_out.items())
    below = "◆ median  ▲ mean"
    below += f" · not drawn (below {10 ** counts.edges[0]:.0e}, or infinite): {said}" if said else ""
    return (curve + points).properties(width=_SIDE, height=_SIDE, title=_titled(alt, "Loss per sample", below))


def _ticks(edges: Any) -> list[float]:
    """Powers of ten, and some between where there are few."""
    first, last = round(edges[0]), round(edges[-1])
    between = (1, 2, 5) if last - first <= 2 else (1,)
    return [float(f"{digit}e{decade}") for decade in range(first, last + 1) for digit in between]


def _class_panel(alt: Any, counts: _Counts, found: Score, by: str) -> Any:
    """The means of the classes, the largest first: bars for few, a curve over the ranks for many."""
    name = next(iter(found.losses))
    seen = np.flatnonzero(counts.class_samples)
    with np.errstate(all="ignore"):
        means = counts.class_sums[seen] / counts.class_samples[seen]
    order = np.argsort(-np.where(np.isnan(means), -np.inf, means), kind="stable")
    ranks = range(len(order)) if len(order) <= _BARS else _some_ranks(len(order))
    rows = [
        {
            "rank": int(rank) + 1,
            "class": int(seen[order[rank]]),
            "mean": float(means[order[rank]]),
            "samples": int(counts.class_samples[seen[order[rank]]]),
        }
        for rank in ranks
        if np.isfinite(means[order[rank]])
    ]
    tooltip = ["class:N", "rank:Q", alt.Tooltip("mean:Q", format=".4~g"), alt.Tooltip("samples:Q", format=",")]
    y = alt.Y("mean:Q", title=f"mean {name}", axis=alt.Axis(format="~g"))
    base = alt.Chart(alt.InlineData(values=rows))
    if len(order) <= _BARS:
        chart = base.mark_bar(color=_COLOURS[name]).encode(
            x=alt.X("class:N", sort=None, title=f"class ({by})", axis=alt.Axis(labelAngle=0)), y=y, tooltip=tooltip
        )
    else:
        chart = base.mark_line(color=_COLOURS[name], interpolate="step-after").encode(
            x=alt.X(
                "rank:Q",
                title=f"rank of the class ({by})",
                scale=alt.Scale(type="log", domain=[1, len(order)]),
                axis=alt.Axis(format="~s", tickCount=6),
            ),
            y=y,
            tooltip=tooltip,
        )
    infinite = int((~np.isfinite(means)).sum())
    said = f"{len(seen):,} of {found.classes:,} classes seen" + (f", {infinite:,} not finite" if infinite else "")
    if len(order) > _BARS:
        said += "; worst: " + ", ".join(str(seen[at]) for at in order[:_NAMED])
    return chart.properties(width=_SIDE, height=_SIDE, title=_titled(alt, f"Mean {name} by class", said))


def _some_ranks(count: int) -> list[int]:
    """All ranks at the start, fewer and fewer towards the end: evenly on a scale of decades."""
    return sorted({round(x) - 1 for x in np.geomspace(1, count, _POINTS)})


def _confidence_panel(alt: Any, counts: _Counts, found: Score) -> Any:
    """How sure the student is against how sure the teacher is."""
    side = 1 / _CELLS
    rows = [
        {"student": i * side, "student_to": (i + 1) * side, "teacher": j * side, "teacher_to": (j + 1) * side}
        | {"samples": int(counts.confidences[i, j])}
        for i, j in zip(*np.nonzero(counts.confidences), strict=True)
    ]
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
                scale=alt.Scale(type="log", scheme="viridis", reverse=True),
                legend=alt.Legend(title="samples", format="~s", tickCount=4),
            ),
            tooltip=[alt.Tooltip("samples:Q", format=",")],
        )
    )
    ends = alt.InlineData(values=[{"teacher": 0, "student": 0}, {"teacher": 1, "student": 1}])
    diagonal = alt.Chart(ends).mark_line(color="#999", strokeDash=[4, 4]).encode(x="teacher:Q", y="student:Q")
    said = f"both name the same class in {found.top1_agreement:.2%} of the samples"
    return (cells + diagonal).properties(width=_SIDE, height=_SIDE, title=_titled(alt, "Confidence", said))


def _titled(alt: Any, title: str, said: str) -> Any:
    return alt.TitleParams(title, subtitle=said, anchor="start", fontSize=14, subtitleFontSize=11)


# --- rendering --------------------------------------------------------------------------------------------------------


def _rendered(spec: dict[str, Any], suffix: str) -> bytes:
    import vl_convert

    if suffix == ".png":
        png: bytes = vl_convert.vegalite_to_png(spec, scale=2)
        return png
    if suffix == ".svg":
        return vl_convert.vegalite_to_svg(spec).encode()
    return vl_convert.vegalite_to_html(spec, bundle=True).encode()


def _altair(path: str) -> Any:
    try:
        import altair
        import vl_convert  # noqa: F401
    except ImportError:
        raise ValueError(
            f"{path}: a plot needs altair and vl-convert-python, which are not installed (pip install 'gklx[score]')"
        ) from None
    return altair
