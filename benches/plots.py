"""The pictures of a comparison, on a white card of their own: as legible on a dark page as on a light one."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

# gklx is blue; KL by the library at hand is orange, whichever it is. All dark enough for text on white.
_GKL, _KL, _PEER, _SECOND, _PAIRS, _BARE = "#08468f", "#2787cf", "#cc5500", "#a87600", "#b0478a", "#707070"
_COLOURS = {
    "gklx gkl": _GKL,
    "gklx kl": _KL,
    "gklx gkl γ=1": "#00264d",
    "F.kl_div": _PEER,
    "optax": _PEER,
    "KL on whole arrays": _PEER,
    "SciPy": _SECOND,
    "Liger-Kernel": _SECOND,
    "GKL on whole arrays": _BARE,
    "pairs": _PAIRS,
}
_ORDER = list(_COLOURS)
_SHORT = {
    "KL on whole arrays": "KL, whole arrays",
    "GKL on whole arrays": "GKL, whole arrays",
    "Liger-Kernel": "Liger (student)",
}
_FONT = "Helvetica, Arial, sans-serif"
_SECONDS = (
    "datum.value >= 1 ? format(datum.value, '~g') + ' s' : datum.value >= 0.000999 ? "
    "format(datum.value * 1e3, '~g') + ' ms' : format(datum.value * 1e6, '~g') + ' µs'"
)


def missing() -> str | None:
    """Say what drawing needs and is not there."""
    try:
        import altair  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        return f"no pictures: {error} (pip install 'gklx[score]')"
    return None


def drawn(result: dict[str, Any]) -> dict[str, str]:
    """Draw the pictures that there are rows for, as SVG by their kind; none where altair is missing."""
    if missing():
        return {}
    # Who gives the teacher no gradient is drawn without it.
    either = {row["what"] for row in result["rows"] if row["gradient"] == "both"}
    rows = [row for row in result["rows"] if row["gradient"] == "both" or row["what"] not in either]
    rows = [row for row in rows if row["dtype"] == "float32"]
    found = {}
    if of := [row for row in rows if row["suite"] == "growth"]:
        found["time"] = svg(time(of))
    if of := [row for row in rows if row["suite"] == "sizes" and row["what"] != "gklx gkl γ=1"]:
        found["bandwidth"] = svg(shares(of, result["copy"]["bytes_per_second"]))
    return found


def svg(spec: dict[str, Any]) -> str:
    """Render, the same text every time."""
    import vl_convert

    # Clips and gradients are numbered by how many the process has drawn.
    return re.sub(r'((?:id="|url\(#)(?:gradient|clip)_?)\d+', r"\g<1>0", vl_convert.vegalite_to_svg(spec))


# --- time against C ---------------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT = 236, 240
_TEXT, _LINE = 11, 13


def time(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A panel a backend, logarithmic both ways and to one scale, every line named at its end."""
    import altair as alt

    low, high = _decades([row["seconds"] for row in rows])
    first, last = min(row["classes"] for row in rows), max(row["classes"] for row in rows)
    panels = []
    for backend in dict.fromkeys(row["backend"] for row in rows):
        of = [row for row in rows if row["backend"] == backend]
        x = alt.X(
            "classes:Q",
            title="classes C",
            scale=alt.Scale(type="log", domain=[first, last], nice=False),
            axis=alt.Axis(values=_powers(first, last), format="~s"),
        )
        y = alt.Y(
            "seconds:Q",
            title=None,
            scale=alt.Scale(type="log", domain=[low, high], nice=False),
            axis=alt.Axis(values=_powers(low, high), labelExpr=_SECONDS),
        )
        colour = alt.Color("what:N", scale=alt.Scale(domain=_ORDER, range=list(_COLOURS.values())), legend=None)
        base = alt.Chart(alt.InlineData(values=_fields(of, "what", "classes", "seconds"))).encode(
            x=x, y=y, color=colour
        )
        lines = base.mark_line(strokeWidth=2) + base.mark_point(filled=True, size=22, opacity=1)
        layers = [lines]
        ends = [max((row for row in of if row["what"] == what), key=lambda row: row["classes"]) for what in _whats(of)]
        decade = _HEIGHT / math.log10(high / low)
        ends = [{"what": row["what"], "at": row["classes"], "y": row["seconds"]} for row in ends]
        for label in _apart(ends, decade):
            what = label["what"]
            said = {"what": what, "said": _SHORT.get(what, what), "classes": label["at"], "seconds": label["y"]}
            layers.append(
                alt.Chart(alt.InlineData(values=[said]))
                .mark_text(align="left", dx=7, fontSize=_TEXT)
                .encode(x=x, y=y, text="said:N", color=colour)
            )
        title = alt.TitleParams(backend, anchor="start", frame="group", fontSize=13)
        panels.append(alt.layer(*layers).properties(width=_WIDTH, height=_HEIGHT, title=title))
    batch = rows[0]["batch"]
    chart = alt.concat(*panels, columns=2, spacing=22)
    return configured(chart, f"Time of a value and both gradients · B = {batch}, float32")


# --- bandwidth --------------------------------------------------------------------------------------------------------


def shares(rows: Sequence[dict[str, Any]], copied: float) -> dict[str, Any]:
    """A panel a size, a bar a peer, grouped by backend."""
    import altair as alt

    def name(row: dict[str, Any]) -> str:
        return f"{row['backend']} · {_SHORT.get(row['what'], row['what'])}"

    backends = list(dict.fromkeys(row["backend"] for row in rows))
    ordered = sorted(rows, key=lambda row: (backends.index(row["backend"]), _ORDER.index(row["what"])))
    names = list(dict.fromkeys(name(row) for row in ordered))
    most = max(row["bandwidth"] for row in rows)
    panels = []
    for at, (batch, classes) in enumerate(dict.fromkeys((row["batch"], row["classes"]) for row in rows)):
        of = [
            {"name": name(row), "what": row["what"], "share": row["bandwidth"], "said": _percent(row["bandwidth"])}
            for row in ordered
            if (row["batch"], row["classes"]) == (batch, classes)
        ]
        base = alt.Chart(alt.InlineData(values=of)).encode(
            x=alt.X(
                "share:Q",
                title=None,
                scale=alt.Scale(domain=[0, most * 1.22], nice=False),
                axis=alt.Axis(format="~%", tickCount=4),
            ),
            y=alt.Y(
                "name:N",
                title=None,
                sort=names,
                scale=alt.Scale(domain=names),
                axis=alt.Axis(labelLimit=260, ticks=False, domain=False, labels=at == 0, grid=False),
            ),
        )
        colour = alt.Color("what:N", scale=alt.Scale(domain=_ORDER, range=list(_COLOURS.values())), legend=None)
        bars = base.mark_bar(height=11).encode(color=colour)
        texts = base.mark_text(align="left", dx=4, fontSize=10, color="#222").encode(text="said:N")
        title = alt.TitleParams(f"{batch:,} × {classes:,}", anchor="start", frame="group", fontSize=13)
        panels.append((bars + texts).properties(width=165, height=16 * len(names), title=title))
    return configured(
        alt.hconcat(*panels, spacing=14),
        "Share of a copy's bandwidth · value and both gradients, float32",
        f"least bytes (read both logits, write both gradients) over time; a copy reaches {copied / 1e9:,.3g} GB/s",
    )


def _percent(x: float) -> str:
    return f"{x:.0%}" if x >= 0.0995 else f"{x:.1%}"


# --- block size -------------------------------------------------------------------------------------------------------

_BINARY = "datum.value >= 1048576 ? datum.value / 1048576 + 'M' : datum.value / 1024 + 'K'"


def blocks(rows: Sequence[dict[str, Any]], default: int) -> dict[str, Any]:
    """A panel a size, a line a backend and number of cores; the block size as it is set today stands out."""
    import altair as alt

    sizes = sorted({row["block"] for row in rows})
    lines = list(dict.fromkeys((row["backend"], row["cores"]) for row in rows))
    names = [_cores(*each) for each in lines]
    most = max(cores for _, cores in lines)
    colours = [_GKL if backend == "NumPy" else _PEER for backend, _ in lines]
    dashes = [[1, 0] if cores == most else [4, 3] for _, cores in lines]
    low, high = (f(row["ns_per_logit"] for row in rows) * by for f, by in ((min, 1 / 1.15), (max, 1.15)))
    y = alt.Y(
        "ns_per_logit:Q",
        title="ns a logit",
        scale=alt.Scale(type="log", nice=False, domain=[low, high]),
        axis=alt.Axis(format="~r", tickCount=6),
    )
    x = alt.X(
        "block:Q",
        title="bytes a block and core",
        scale=alt.Scale(type="log", base=2, domain=[sizes[0], sizes[-1]], nice=False),
        axis=alt.Axis(values=sizes[::3], labelExpr=_BINARY),
    )
    panels = []
    for (batch, classes), of in grouped(rows, "batch", "classes").items():
        data = [
            {**each, "name": _cores(row["backend"], row["cores"])}
            for row, each in zip(of, _fields(of, "block", "ns_per_logit"), strict=True)
        ]
        last = len(panels) == len({(row["batch"], row["classes"]) for row in rows}) - 1
        colour = alt.Color("name:N", scale=alt.Scale(domain=names, range=colours), legend=None)
        dash = alt.StrokeDash("name:N", scale=alt.Scale(domain=names, range=dashes), legend=None)
        base = alt.Chart(alt.InlineData(values=data)).encode(x=x, y=y, color=colour)
        layers = [
            base.mark_line(strokeWidth=2).encode(strokeDash=dash),
            base.mark_point(filled=True, size=18, opacity=1),
        ]
        if sizes[0] <= default <= sizes[-1]:
            rule = alt.Chart(alt.InlineData(values=[{"block": default}]))
            layers.insert(0, rule.mark_rule(color="#999", strokeDash=[2, 2]).encode(x=x))
        if last:
            ends = [row for row in of if row["block"] == sizes[-1]]
            ends = [
                {"what": _cores(row["backend"], row["cores"]), "at": sizes[-1], "y": row["ns_per_logit"]}
                for row in ends
            ]
            for label in _apart(ends, _HEIGHT / math.log10(high / low)):
                said = alt.Chart(
                    alt.InlineData(values=[{"name": label["what"], "block": label["at"], "ns_per_logit": label["y"]}])
                )
                layers.append(
                    said.mark_text(align="left", dx=7, fontSize=_TEXT).encode(x=x, y=y, text="name:N", color=colour)
                )
        title = alt.TitleParams(f"{batch:,} × {classes:,}", anchor="start", frame="group", fontSize=13)
        panels.append(alt.layer(*layers).properties(width=175, height=_HEIGHT, title=title))
    return configured(
        alt.hconcat(*panels, spacing=16),
        "gkl, value and both gradients, float32 · time against the size of a row block",
        f"the dotted line is what gklx takes today, {default / 2**20:g} MiB"
        if sizes[0] <= default <= sizes[-1]
        else "",
    )


def _cores(backend: str, cores: int) -> str:
    return f"{backend}, {cores} core{'s' if cores > 1 else ''}"


# --- shared -----------------------------------------------------------------------------------------------------------


def configured(chart: Any, title: str, *subtitle: str) -> dict[str, Any]:
    """Give a chart its title and its looks, and return it in Vega-Lite's words."""
    import altair as alt

    words = alt.TitleParams(title, subtitle=list(subtitle), anchor="start", fontSize=15, subtitleFontSize=11, offset=12)
    spec: dict[str, Any] = (
        chart.properties(title=words, padding=14, background="white")
        .configure(font=_FONT)
        .configure_view(stroke="#ddd")
        .configure_axis(
            gridColor="#eee", labelColor="#333", labelFontSize=11, titleColor="#222", titleFontWeight="normal"
        )
        .configure_title(subtitleColor="#555", color="#111")
        .to_dict()
    )
    return spec


def _apart(ends: Iterable[dict[str, Any]], decade: float) -> list[dict[str, Any]]:
    """Push apart the names of lines, where lines end `at` one place: a line of text is so many pixels high."""
    step = _LINE / decade  # in decades
    found: list[dict[str, Any]] = []
    for of in grouped(ends, "at").values():
        of = sorted(of, key=lambda end: end["y"])
        placed = [math.log10(end["y"]) for end in of]
        for _ in range(100):  # neighbours too close share the push
            for i in range(len(placed) - 1):
                short = step - (placed[i + 1] - placed[i])
                if short > 1e-9:
                    placed[i] -= short / 2
                    placed[i + 1] += short / 2
        found += [{**end, "y": 10**y} for end, y in zip(of, placed, strict=True)]
    return found


def grouped(rows: Iterable[dict[str, Any]], *names: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Rows by some of their entries, in the order met."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def _whats(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["what"] for row in rows))


def _fields(rows: Sequence[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{name: row[name] for name in names} for row in rows]


def _decades(x: Sequence[float]) -> tuple[float, float]:
    """The powers of ten around all of them."""
    low, high = math.floor(math.log10(min(x))), math.ceil(math.log10(max(x)))
    return 10.0**low, 10.0 ** max(high, low + 1)


def _powers(low: float, high: float) -> list[float]:
    return [float(f"1e{k}") for k in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
