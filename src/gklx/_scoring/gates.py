"""Bounds on the numbers of a score, such as `kl.p99 > 0.1`, by which a build may fail."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from .samples import WITHOUT_PARTS
from .statistics import DeltaP, Estimate, Perplexity, Score, Scores, Summary

_GATE = re.compile(r"\s*([A-Za-z0-9_.]+)\s*([<>])\s*(\S+)\s*")
_COUNTS = ("samples", "skipped", "undefined", "classes", "top1_agreement")
_DIFFERENCE = "difference_from_first"


class Gate(NamedTuple):
    """The name of a number, and the values at which it fails."""

    name: str
    above: bool
    """Whether numbers above the bound fail, or those below it."""
    bound: float
    text: str
    """The expression as the user wrote it."""


def parsed_gate(text: str) -> Gate:
    """Parses an expression; ValueError where it is no gate."""
    found = _GATE.fullmatch(text)
    try:
        bound = float(found[3]) if found else math.nan
    except ValueError:
        bound = math.nan
    if found is None or not math.isfinite(bound):
        raise ValueError(f"must be NAME > NUMBER or NAME < NUMBER, such as 'kl.p99 > 0.1', got {text!r}")
    return Gate(found[1], found[2] == ">", bound, " ".join(text.split()))


def check_gates(
    gates: Iterable[Gate],
    losses: tuple[str, ...],
    *,
    targeted: bool,
    masking: bool,
    several: bool,
    top_k: tuple[int, ...],
) -> None:
    """ValueError where an expression names a number that a run with these losses does not report."""
    parts = {"mse", "ce"}
    known = {*_COUNTS} | {
        f"{loss}.{key}" for loss in losses for key in Summary._fields if not (loss in WITHOUT_PARTS and key in parts)
    }
    estimates = [f"top_k_overlap.{k}" for k in top_k]
    if masking:
        known.add("masked")
    if several:
        estimates += [f"{_DIFFERENCE}.{loss}" for loss in losses]
    if targeted:
        known |= {"perplexity.correlation"} | {f"delta_p.{key}" for key in DeltaP._fields}
        estimates += [f"perplexity.{key}" for key in Perplexity._fields if key != "correlation"]
        estimates += ["delta_p.mean", "delta_p.rms"]
    known |= {*estimates} | {f"{name}.stderr" for name in estimates}
    for gate in gates:
        if _plain(gate.name) not in known:
            why = _why_unknown(_plain(gate.name), targeted=targeted, masking=masking, several=several, top_k=top_k)
            raise ValueError(f"--fail-if {gate.text}: {gate.name} is no number of this report{why}")


def broken(gates: Iterable[Gate], found: Score | Scores) -> Iterator[str]:
    """A line for each gate that fails, for each candidate."""
    several = isinstance(found, Scores)
    scores: Mapping[str, Score] = found.students if isinstance(found, Scores) else {"": found}
    for gate in gates:
        for at, (name, score) in enumerate(scores.items()):
            if at == 0 and _plain(gate.name).startswith(_DIFFERENCE):
                continue  # from itself
            differences = found.differences.get(name) if isinstance(found, Scores) else None
            value = _numbers(score, differences or {}).get(_plain(gate.name), math.nan)
            if math.isnan(value) or (value > gate.bound if gate.above else value < gate.bound):
                said = "is not defined" if math.isnan(value) else f"is {value:.6g}"
                yield f"{name + ': ' if several else ''}{gate.name} {said}: fails by {gate.text}"


def _plain(name: str) -> str:
    """Without what may be left out."""
    return name.removeprefix("losses.").removesuffix(".value")


def _why_unknown(name: str, *, targeted: bool, masking: bool, several: bool, top_k: tuple[int, ...]) -> str:
    if name.startswith(("perplexity.", "delta_p.")) and not targeted:
        return " without targets"
    if name == "masked" and not masking:
        return " without --sample-weight or --where-label"
    if name.startswith(f"{_DIFFERENCE}.") and not several:
        return " with a single student"
    if name.startswith("top_k_overlap.") and name.count(".") == 1:
        return f": --top-k asks for {', '.join(str(k) for k in top_k) or 'none'}"
    return ""


def _numbers(score: Score, differences: Mapping[str, Estimate]) -> dict[str, float]:
    """All numbers of a score, by the names that expressions use."""
    found: dict[str, Any] = {name: getattr(score, name) for name in (*_COUNTS, "masked")}
    parts: dict[str, Mapping[str, Any]] = {name: each._asdict() for name, each in score.losses.items()}
    for name, part in (("perplexity", score.perplexity), ("delta_p", score.delta_p)):
        parts |= {} if part is None else {name: part._asdict()}
    parts[_DIFFERENCE] = differences
    parts["top_k_overlap"] = {str(k): each for k, each in (score.top_k_overlap or {}).items()}
    for part_name, numbers in parts.items():
        for key, value in numbers.items():
            if isinstance(value, Estimate):
                found |= {f"{part_name}.{key}": value.value, f"{part_name}.{key}.stderr": value.stderr}
            elif value is not None:
                found[f"{part_name}.{key}"] = value
    return found
