"""Numbers as people read them, and tables of them."""

from collections.abc import Iterable, Sequence


def markdown(headings: Sequence[str], cells: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lay out a Markdown table, line by line."""
    rule = ["---:" if i in right else "---" for i in range(len(headings))]
    return [f"| {' | '.join(row)} |" for row in (headings, rule, *cells)]


def figures(x: float) -> str:
    """Three figures, and all of those before the point."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def seconds(x: float) -> str:
    """Name a time in the unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if abs(x) >= scale:
            return f"{figures(x / scale)} {unit}"
    return f"{figures(x / 1e-6)} µs"


def amount(x: float) -> str:
    """Name a number of bytes in the unit that suits it."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if x >= scale:
            return f"{figures(x / scale)} {unit}"
    return f"{figures(x / 1e3)} kB"
