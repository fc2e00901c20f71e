"""The page of a comparison."""

from collections.abc import Iterable, Sequence
from typing import Any

from tables import amount, figures, markdown, seconds

Tables = list[tuple[str, list[str], list[list[str]]]]
"""Title, headings, cells."""

_GRADIENTS = {"both": "value and both gradients", "student": "value and the student's gradient"}
_SAID = {
    "Ratios": """\
The peer's time over gklx's, turn by turn: the median, and the middle half of the turns. Above 1 gklx is the faster. KL
is what the peers compute, so their ratio to gklx's `gkl` says what GKL costs beside the library's own KL.""",
    "Time": """\
Median and the middle half of the turns. *Bandwidth* is the least a loss must move, both logits read once and each
gradient written once, over the time, as a share of the fastest copy. Arrays that fit into the last-level cache may
exceed it.""",
    "Growth": "Value and both gradients, medians.",
    "Memory": """\
Peak of one call beyond its inputs, its results included, in a fresh process after a first call. *Counted* is the
library's own count, and in arrays as large as the logits; *resident* is what the system sees.""",
    "Small": """\
Value and both gradients, medians. *Operations* are those that PyTorch's dispatcher is asked for, views among them.""",
    "One": """\
Of `gkl` with γ = 1: the time of the value and both gradients over that of the value and the student's gradient alone,
turn by turn.""",
    "Dispatch": """\
At the smallest input, where an operation costs its call and nothing else: a call of `gkl` by `value_and_grad`, and the
array operations that it makes, repeated without gklx around them, turn by turn. What the call takes longer is the
overhead. *Bare* are the same formulas without a check (*GKL on whole arrays*).""",
    "Agreement": """\
The worst difference of any task from gklx in float64 on the same logits, of the value and of the row's largest entry of
a gradient.""",
    "Copy": """\
Bytes read and written a second, by arrays far beyond the caches. The fastest is what *bandwidth* refers to.""",
}


def tables(result: dict[str, Any]) -> Tables:
    """Lay out all tables."""
    rows = result["rows"]
    found: Tables = []
    for gradient, said in _GRADIENTS.items():
        found.append((f"Ratios: {said}", *_ratios(result, gradient)))
    for gradient, said in _GRADIENTS.items():
        found.append((f"Time: {said}", *_times([row for row in rows if row["gradient"] == gradient])))
    found += [
        ("Growth in the number of classes", *_growth(rows)),
        ("Memory", *_memory(result["memory"])),
        ("One gradient or two", *_one_or_two(result["one_or_two"])),
        ("Small inputs", *_small(rows)),
        ("Dispatch overhead", *_dispatch(result["dispatch"])),
        ("Agreement", *_agreement(rows)),
        ("Copy", *_copies(result["copy"])),
        ("Left out", ["peer", "why"], [[name, why.replace("|", "\\|")] for name, why in result["left_out"].items()]),
    ]
    return [table for table in found if table[2]]


def _ratios(result: dict[str, Any], gradient: str) -> tuple[list[str], list[list[str]]]:
    chosen = [each for each in result["ratios"] if (each["suite"], each["gradient"]) == ("sizes", gradient)]
    places = _unique((each["batch"], each["classes"], each["dtype"]) for each in chosen)
    by = {
        (each["backend"], each["peer"], each["gklx"], each["batch"], each["classes"], each["dtype"]): each
        for each in chosen
    }
    cells = []
    for backend, peer, own in _unique((each["backend"], each["peer"], each["gklx"]) for each in chosen):
        cells.append([backend, f"{peer} / gklx {own}"])
        for place in places:
            each = by.get((backend, peer, own, *place))
            cells[-1].append(_ratio(each) if each else "")
    return ["backend", "ratio", *(_place(*place) for place in places)], cells


def _ratio(each: dict[str, Any]) -> str:
    return f"{figures(each['ratio'])} ({figures(each['ratio_q1'])} – {figures(each['ratio_q3'])})"


def _times(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    headings = ["size", "peer", "time (IQR)", "ns a logit", "bandwidth", "page faults"]
    return headings, [
        [
            _place(row["batch"], row["classes"], row["dtype"]),
            row["peer"],
            f"{seconds(row['seconds'])} ({seconds(row['seconds_q1'])} – {seconds(row['seconds_q3'])})",
            figures(row["ns_per_logit"]),
            f"{row['bandwidth']:.1%}",
            f"{row['faults_a_call']:,.0f}",
        ]
        for row in rows
        if row["suite"] == "sizes"
    ]


def _growth(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    chosen = [row for row in rows if row["suite"] == "growth"]
    classes = _unique(row["classes"] for row in chosen)
    by = {(row["peer"], row["gradient"], row["classes"]): row for row in chosen}
    cells = []
    for peer, gradient in _unique((row["peer"], row["gradient"]) for row in chosen):
        name = peer if gradient == "both" else f"{peer} ({gradient} alone)"
        found = [by.get((peer, gradient, each)) for each in classes]
        cells.append([name, *(seconds(row["seconds"]) if row else "" for row in found)])
    batch = chosen[0]["batch"] if chosen else 0
    return [f"B = {batch}, C =", *(f"{each:,}" for each in classes)], cells


def _memory(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    headings = ["size", "peer", "counted", "in arrays", "resident"]
    return headings, [
        [
            f"{row['batch']:,} × {row['classes']:,}" + (", student" if row["gradient"] == "student" else ""),
            row["peer"],
            "" if row["counted"] is None else amount(row["counted"]),
            "" if row["arrays"] is None else f"{row['arrays']:.1f}",
            "" if row["resident"] is None else amount(row["resident"]),
        ]
        for row in rows
    ]


def _small(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    chosen = [row for row in rows if row["suite"] == "small"]
    places = _unique((row["batch"], row["classes"]) for row in chosen)
    by = {(row["peer"], row["batch"], row["classes"]): row for row in chosen}
    cells = []
    for peer in _unique(row["peer"] for row in chosen):
        found = [by.get((peer, *place)) for place in places]
        count = next((row["operations"] for row in found if row and row["operations"] is not None), None)
        times = (seconds(row["seconds"]) if row else "" for row in found)
        cells.append([peer, *times, "" if count is None else f"{count}"])
    return ["peer", *(f"{batch:,} × {classes:,}" for batch, classes in places), "operations"], cells


def _one_or_two(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    places = _unique((row["batch"], row["classes"]) for row in rows)
    by = {(row["backend"], row["batch"], row["classes"]): row for row in rows}
    return ["backend", *(f"{batch:,} × {classes:,}" for batch, classes in places)], [
        [backend, *(_ratio(by[backend, *place]) if (backend, *place) in by else "" for place in places)]
        for backend in _unique(row["backend"] for row in rows)
    ]


def _dispatch(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    headings = ["backend", "size", "overhead (IQR)", "call", "its operations alone", "operations", "bare"]
    return headings, [
        [
            row["backend"],
            f"{row['batch']:,} × {row['classes']:,}",
            f"{seconds(row['seconds'])} ({seconds(row['seconds_q1'])} – {seconds(row['seconds_q3'])})",
            seconds(row["call_seconds"]),
            seconds(row["alone_seconds"]),
            f"{row['operations']}",
            seconds(row["bare_seconds"]),
        ]
        for row in rows
    ]


def _agreement(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    dtypes = _unique(row["dtype"] for row in rows)
    worst: dict[tuple[str, str], float] = {}
    for row in rows:
        key = row["peer"], row["dtype"]
        worst[key] = max(worst.get(key, 0.0), row["difference"])
    peers = _unique(row["peer"] for row in rows)
    return ["peer", *dtypes], [
        [peer, *(f"{worst[peer, dtype]:.1e}" if (peer, dtype) in worst else "" for dtype in dtypes)] for peer in peers
    ]


def _copies(copy: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    headings = [f"copy of {amount(copy['size'])}", "rate (IQR)"]
    key = "bytes_per_second"
    return headings, [
        [name, f"{amount(of[key])}/s ({amount(of[f'{key}_q1'])} – {amount(of[f'{key}_q3'])})"]
        for name, of in copy["copies"].items()
    ]


def _place(batch: int, classes: int, dtype: str) -> str:
    return f"{batch:,} × {classes:,}" + (f" {dtype}" if dtype != "float32" else "")


def _unique(found: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(found))


def page(result: dict[str, Any], name: str, pictures: Sequence[str], steps: str | None) -> str:
    """Render the result as Markdown; `steps` is what somebody wrote by hand."""
    about = result["machine"]
    versions = ", ".join(f"{each} {version}" for each, version in about["versions"].items())
    where = about.get("gpu") or f"{about['processor']}, {about['cores']} cores"
    count = about["threads"]
    threads = f"{count['cores']} cores to every library" if count["cores"] else "all cores to every library"
    threads += "".join(f", {key}={value}" for key, value in count.items() if key.isupper())
    if "torch" in count:
        threads += f", {count['torch']} threads in PyTorch"
    settings = ", ".join(f"{key}={value:g}" for key, value in result["settings"]["gkl"].items())
    lines = [
        f"# gklx beside its peers: {where}",
        "",
        f"{result['date']} · {where}, {about['system']} · {versions} · {threads} · load average {result['load'][0]} "
        f"before and {result['load'][1]} after · made by `{result['command']}`",
        "",
        f"`gkl` is `gkl({settings})` with the teacher's own weights, `gkl γ=1` the same with γ = 1. In NumPy and CuPy "
        "gklx is `value_and_grad`, in PyTorch the loss and `backward()`, in JAX `jit(value_and_grad(…))`. All peers "
        f"of a size take turns in one process, {result['plan']['turns']} turns each, in an order drawn anew for every "
        "turn; what is compiled is compiled beforehand.",
        "",
    ]
    if result["plan"]["compiler"] != "inductor":
        lines += [f"A smoke test: `torch.compile` ran with `{result['plan']['compiler']}`.", ""]
    for kind in pictures:
        lines += [f"![{plots_of(kind)}]({name}-{kind}.svg)", ""]
    before = ""
    for title, headings, cells in tables(result):
        kind = title.replace(":", " ").split()[0]
        lines += [f"## {title}", ""]
        if kind in _SAID and kind != before:
            lines += [_SAID[kind], ""]
        before = kind
        words = {"peer", "backend", "ratio", "size", "why"}
        right = [i for i, heading in enumerate(headings) if i and heading not in words]
        lines += [*markdown(headings, cells, right), ""]
    if steps is not None:
        lines += ["## Steps", "", steps.strip(), ""]
    return "\n".join(lines)


def plots_of(kind: str) -> str:
    """Say what a picture shows, for those who do not see it."""
    return {"time": "Time against the number of classes", "bandwidth": "Share of the bandwidth of a copy"}[kind]
