"""Time against the size of gklx's row blocks on the CPU: NumPy and PyTorch, on one core and on all.

A block must be small enough to stay in a cache and large enough that the calls on it cost little. Every number of cores
has a process of its own, bound to them before a library starts its threads; in it all block sizes take turns.

    python benches/block_size.py                       # into benches/results/; about five minutes
    python benches/block_size.py --quick               # a smoke test, writes nothing
    python benches/block_size.py --quick --output DIR  # the same, into DIR
"""

import argparse
import datetime
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import memory
import peers
import plots
from files import write
from machine import load, machine, slug
from peers import PEERS, Call, Task
from rich.console import Console
from rich.table import Table
from tables import seconds
from timing import take_turns

import gklx._core.libraries

BACKENDS = ("NumPy", "PyTorch")


class Plan(NamedTuple):
    """What a run measures."""

    sizes: tuple[tuple[int, int], ...]
    """Batch and classes."""
    blocks: tuple[int, ...]
    """Bytes."""
    turns: int
    seconds: float


FULL = Plan(
    sizes=((512, 1_000), (4_096, 1_000), (256, 32_000)),
    blocks=tuple(2**k for k in range(15, 25)),
    turns=7,
    seconds=0.05,
)
QUICK = Plan(sizes=((8, 100), (16, 50)), blocks=(2**10, 2**12), turns=3, seconds=0.0005)


def set_block_size(size: int) -> None:
    """Turn the one knob: how many bytes of an array a block holds on the CPU."""
    assert hasattr(gklx._core.libraries, "_BLOCK_ON_CPU"), "the knob is elsewhere: nothing would be measured"
    gklx._core.libraries._BLOCK_ON_CPU = size


def measure(plan: Plan) -> list[dict[str, Any]]:
    """Time `gkl` with both gradients at every block size, on what cores this process has."""
    rows = []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for backend in BACKENDS:
        (peer,) = (peer for peer in PEERS if peer.name == f"gklx gkl · {backend}")
        if peers.missing(peer, "cpu", "eager"):
            continue
        for batch, classes in plan.sizes:
            call = peer.build(Task(batch, classes))
            calls = {str(size): functools.partial(_blocked, call, size) for size in plan.blocks}
            taken = take_turns(calls, plan.turns, plan.seconds)
            for size in plan.blocks:
                row = taken[str(size)].as_row()
                of = {"backend": backend, "cores": cores, "batch": batch, "classes": classes, "block": size, **row}
                rows.append(of | {"ns_per_logit": row["seconds"] / (batch * classes) * 1e9})
    return rows


def _blocked(call: Call, size: int) -> Any:
    set_block_size(size)
    return call()


def on_cores(count: int, plan_name: str) -> list[dict[str, Any]]:
    """Measure in a process that has so many cores: it inherits them."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(before)[:count]))
    try:
        return memory.in_fresh_process(__file__, "--worker", plan_name)
    finally:
        os.sched_setaffinity(0, before)


def run(plan_name: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure everything."""
    loads = [load()]
    rows = []
    if hasattr(os, "sched_setaffinity"):
        for count in sorted({1, len(os.sched_getaffinity(0))}):
            say(f"on {count} cores")
            rows += on_cores(count, plan_name)
    else:
        rows = measure(PLANS[plan_name])
    about = machine()
    return {
        "date": datetime.date.today().isoformat(),
        "machine": about,
        "load": [*loads, load()],
        "plan": PLANS[plan_name]._asdict(),
        "default": gklx._core.libraries._BLOCK_ON_CPU,
        "loss": "gkl, value and both gradients, float32",
        "rows": rows,
    }


PLANS = {"full": FULL, "quick": QUICK}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, some seconds; writes only to --output")
    parser.add_argument("--output", type=Path, help="folder of the results [benches/results]")
    parser.add_argument("--worker", choices=PLANS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(measure(PLANS[options.worker])))
        return
    command = "python benches/block_size.py" + (" --quick" if options.quick else "")
    console = Console() if sys.stdout.isatty() else Console(width=150)
    with console.status("") as status:
        result = {"command": command, **run("quick" if options.quick else "full", status.update)}
    blocks = result["plan"]["blocks"]
    table = Table("backend", "cores", "size", *(_binary(each) for each in blocks), title=f"time of {result['loss']}")
    for key, found in plots.grouped(result["rows"], "backend", "cores", "batch", "classes").items():
        backend, cores, batch, classes = key
        table.add_row(backend, str(cores), f"{batch:,} × {classes:,}", *(seconds(row["seconds"]) for row in found))
    console.print(table)
    folder = options.output
    if folder is None and not options.quick:
        folder = Path(__file__).parent / "results"
    if folder is not None:
        name = f"{slug(result['machine'])}-block-size"
        write(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
        if plots.missing() is None:
            write(folder / f"{name}.svg", plots.svg(plots.blocks(result["rows"], result["default"])))
        console.print(f"written to {folder}")


def _binary(size: int) -> str:
    return f"{size // 2**20} MiB" if size >= 2**20 else f"{size // 2**10} KiB"


if __name__ == "__main__":
    main()
