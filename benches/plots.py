"""The plots of the results, on a white background: legible on dark and light pages."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

# Dark enough for text on white.
_OURS, _THEIRS, _OTHER, _FOURTH = "#08468f", "#cc5500", "#2787cf", "#b0478a"
_SECONDS = (
    "datum.value >= 1 ? format(datum.value, '~g') + ' s' : datum.value >= 0.000999 ? "
    "format(datum.value * 1e3, '~g') + ' ms' : format(datum.value * 1e6, '~g') + ' µs'"
)


def drawn(draw: Callable[..., Any], rows: Sequence[Any]) -> str | None:
    """A plot as SVG, the same text for the same rows; None where altair is missing or there is nothing to draw."""
    try:
        import altair  # noqa: F401
        import vl_convert
    except ImportError:
        return None
    chart = draw(rows)
    if chart is None:
        return None
    spec = (
        chart.properties(padding=14, background="white")
        .configure(font="Helvetica, Arial, sans-serif")
        .configure_view(stroke="#ddd")
        .configure_axis(gridColor="#eee", labelColor="#333", labelFontSize=11, titleColor="#222", labelLimit=260)
        .configure_title(anchor="start", fontSize=14, subtitleColor="#555", color="#111")
        .to_dict()
    )
    # The ids of clips and gradients count those of the whole process: set them to 0, for a reproducible text.
    return re.sub(r'((?:id="|url\(#)(?:gradient|clip)_?)\d+', r"\g<1>0", vl_convert.vegalite_to_svg(spec))


def multiples(rows: Sequence[Any]) -> Any:
    """Times of gklx and its peers as multiples of a copy: one panel per size, one line per call."""
    import altair as alt

    copies = {(row.size, row.library, row.what): row.peer_seconds for row in rows if row.peer == "a copy"}
    points = []
    for row in rows:
        copy = copies.get((row.size, row.library, row.what))
        if copy is not None:
            who, time = ("gklx", row.seconds) if row.peer == "a copy" else (row.peer, row.peer_seconds)
            points.append({"size": row.size, "call": f"{row.library} · {row.what}", "who": who, "times": time / copy})
    if not points:
        return None
    names, whos = _unique(points, "call"), ["gklx", *(who for who in _unique(points, "who") if who != "gklx")]
    panels = []
    for size in _unique(points, "size"):
        base = alt.Chart(alt.InlineData(values=[point for point in points if point["size"] == size])).encode(
            x=alt.X("times:Q", title=None, scale=alt.Scale(type="log", nice=False, padding=12), axis=_ratio_axis(alt)),
            y=alt.Y("call:N", title=None, sort=names, scale=alt.Scale(domain=names), axis=_call_axis(alt, not panels)),
        )
        line = base.mark_line(color="#bbb").encode(detail="call:N")
        dots = base.mark_point(filled=True, size=70, opacity=1).encode(
            color=alt.Color("who:N", title=None, scale=alt.Scale(domain=whos, range=[_OURS, _THEIRS, _OTHER, _FOURTH]))
        )
        panels.append((line + dots).properties(width=150, height=20 * len(names), title=size))
    title = alt.TitleParams("Time as a multiple of copying inputs to outputs", subtitle="further left is faster")
    return alt.hconcat(*panels, spacing=14).resolve_scale(x="shared", color="shared").properties(title=title)


def _ratio_axis(alt: Any) -> Any:
    return alt.Axis(values=[0.5, 1, 2, 5, 10, 20, 50, 100, 200], format="~g")


def _call_axis(alt: Any, shown: bool) -> Any:
    return alt.Axis(labels=shown, ticks=False, domain=False, grid=True)


def growth(rows: Sequence[Any]) -> Any:
    """Time against the number of classes on logarithmic axes, one line per form."""
    import altair as alt

    points = [{"form": row.form, "classes": row.classes, "seconds": row.time.median} for row in rows]
    names = _unique(points, "form")
    base = alt.Chart(alt.InlineData(values=points)).encode(
        x=alt.X("classes:Q", title="classes C", scale=alt.Scale(type="log"), axis=alt.Axis(format="~s", tickCount=6)),
        y=alt.Y("seconds:Q", title=None, scale=alt.Scale(type="log"), axis=alt.Axis(labelExpr=_SECONDS, tickCount=6)),
        color=alt.Color(
            "form:N", title=None, scale=alt.Scale(domain=names, range=[_OURS, _THEIRS, _OTHER, _FOURTH][: len(names)])
        ),
    )
    chart = base.mark_line(strokeWidth=2) + base.mark_point(filled=True, size=30, opacity=1)
    title = f"Time of gkl's value and both gradients · B = {rows[0].batch}, float32, one thread"
    return chart.properties(width=460, height=300, title=title)


def _unique(points: Iterable[dict[str, Any]], name: str) -> list[Any]:
    return list(dict.fromkeys(point[name] for point in points))
