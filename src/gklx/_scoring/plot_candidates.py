"""A picture of several candidates: the loss of each with error and quantiles, and the change of the targets' p."""

import math
from typing import Any

from .plot import altair_for, styled, write
from .statistics import Score, Scores
from .streams import short_names

_COLOUR, _SECOND = "#0072B2", "#E69F00"
_HEIGHT, _STEP = 320, 64
_BANDS = (("1 to 99 %", "p1", "p99", 6), ("10 to 90 %", "p10", "p90", 16))


def draw_candidates(found: Scores, path: str) -> None:
    """Draws the candidates into a file; its suffix chooses the format."""
    write(specification(found, path), path)


def specification(found: Scores, path: str = "plot") -> dict[str, Any]:
    """The picture as a Vega-Lite specification."""
    alt = altair_for(path)
    names = short_names(list(found.students))
    scores = dict(zip(names, found.students.values(), strict=True))
    loss = next(iter(next(iter(scores.values())).losses))
    panels = [_loss_panel(alt, scores, loss)]
    targeted = all(score.delta_p is not None for score in scores.values())
    panels.append(_delta_panel(alt, scores) if targeted else _agreement_panel(alt, scores))
    one = next(iter(scores.values()))
    title = f"{len(scores)} candidates against {short_names([found.teacher])[0]}"
    subtitle = f"{one.samples:,} samples · {one.classes:,} classes · temperature {one.parameters.temperature:g}"
    return styled(alt, alt.hconcat(*panels, spacing=48), title, subtitle)


def _loss_panel(alt: Any, scores: dict[str, Score], loss: str) -> Any:
    """Mean with its error, median, and quantiles as bands; on a logarithmic scale where all numbers are positive."""
    numbers = {name: score.losses[loss]._asdict() for name, score in scores.items()}
    drawn = {name: of for name, of in numbers.items() if math.isfinite(of["mean"]) and math.isfinite(of["p99"])}
    lowest = min((of["p1"] for of in drawn.values()), default=0.0)
    scale = alt.Scale(type="log", nice=True) if lowest > 0 else alt.Scale(zero=True)
    marks = [
        {"candidate": name, **{key: of[key] for key in ("mean", "stderr", "median", "p1", "p10", "p90", "p99")}}
        # On a logarithmic scale an error bar must end above 0.
        | {"low": max(of["mean"] - _or_0(of["stderr"]), lowest) if lowest > 0 else of["mean"] - _or_0(of["stderr"])}
        | {"high": of["mean"] + _or_0(of["stderr"])}
        for name, of in drawn.items()
    ]
    said = ["mean with its standard error, median, quantiles"]
    if len(drawn) < len(scores):
        said.append(f"not finite, not drawn: {', '.join(name for name in scores if name not in drawn)}")
    return _bands(alt, marks, list(scores), f"{loss} of a sample", scale, f"Mean {loss}", said)


def _delta_panel(alt: Any, scores: dict[str, Score]) -> Any:
    """The change of the targets' probabilities, in percentage points."""
    marks = []
    for name, score in scores.items():
        assert score.delta_p is not None
        of = score.delta_p
        if not math.isfinite(of.mean.value):
            continue
        row = {key: 100 * getattr(of, key) for key in ("p1", "p10", "median", "p90", "p99")}
        row |= {"mean": 100 * of.mean.value, "stderr": 100 * _or_0(of.mean.stderr)}
        marks.append(
            {"candidate": name, **row, "low": row["mean"] - row["stderr"], "high": row["mean"] + row["stderr"]}
        )
    said = ["percentage points that the target's probability has moved by"]
    return _bands(alt, marks, list(scores), "Δp, percentage points", alt.Scale(zero=True), "Δp of the targets", said)


def _bands(
    alt: Any, marks: list[dict[str, Any]], names: list[str], axis: str, scale: Any, title: str, said: list[str]
) -> Any:
    base = alt.Chart(alt.InlineData(values=marks))
    x = alt.X(
        "candidate:N", sort=names, title=None, axis=alt.Axis(labelAngle=-30, grid=False), scale=alt.Scale(domain=names)
    )
    layers = []
    for what, low, high, width in _BANDS:
        tooltip = ["candidate:N", alt.Tooltip(f"{low}:Q", format=".4~g"), alt.Tooltip(f"{high}:Q", format=".4~g")]
        layers.append(
            base.transform_calculate(what=f"'{what}'")
            .mark_bar(size=width, opacity=0.3, color=_COLOUR)
            .encode(x=x, y=alt.Y(f"{low}:Q", title=axis, scale=scale), y2=f"{high}:Q", tooltip=tooltip)
        )
    layers.append(base.mark_tick(color=_COLOUR, thickness=2, size=22).encode(x=x, y="median:Q"))
    layers.append(base.mark_rule(color=_SECOND, strokeWidth=2).encode(x=x, y="low:Q", y2="high:Q"))
    tooltip = ["candidate:N", *(alt.Tooltip(f"{key}:Q", format=".4~g") for key in ("mean", "stderr", "median"))]
    layers.append(
        base.mark_point(filled=True, size=36, opacity=1, color=_SECOND).encode(x=x, y="mean:Q", tooltip=tooltip)
    )
    return alt.layer(*layers).properties(
        width=max(300, _STEP * len(names)),
        height=_HEIGHT,
        title=alt.TitleParams(
            title,
            subtitle=[*said, "orange: mean · blue line: median · bars: 1 to 99 %, 10 to 90 %"],
            anchor="start",
            fontSize=14,
            subtitleFontSize=11,
        ),
    )


def _agreement_panel(alt: Any, scores: dict[str, Score]) -> Any:
    """The share of samples for which both networks have the same top class."""
    rows = [{"candidate": name, "agreement": score.top1_agreement} for name, score in scores.items()]
    return (
        alt.Chart(alt.InlineData(values=rows))
        .mark_bar(color=_COLOUR, size=28)
        .encode(
            x=alt.X("candidate:N", sort=list(scores), title=None, axis=alt.Axis(labelAngle=-30, grid=False)),
            y=alt.Y(
                "agreement:Q", title="share of samples", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="~%")
            ),
            tooltip=["candidate:N", alt.Tooltip("agreement:Q", format=".2%")],
        )
        .properties(
            width=max(300, _STEP * len(scores)),
            height=_HEIGHT,
            title=alt.TitleParams(
                "Top-1 agreement",
                subtitle=["samples in which student and teacher name the same class", " "],
                anchor="start",
                fontSize=14,
                subtitleFontSize=11,
            ),
        )
    )


def _or_0(stderr: float) -> float:
    """A standard error as it is drawn: 0 where it is NaN."""
    return stderr if math.isfinite(stderr) else 0.0
