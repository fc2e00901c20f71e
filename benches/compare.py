"""gklx beside what one would use in its place: time, bandwidth, memory, small inputs; one process, taking turns.

Peers: `F.kl_div` eager and compiled, optax, SciPy, plain operations on whole arrays, the authors' pairs of classes, and
on a GPU CuPy and Liger-Kernel. Value and both gradients, and value and the student's gradient alone. Before a peer is
timed its results are held against gklx in float64. A peer whose library is missing is left out, and the reason given.

    python benches/compare.py                   # all, into benches/results/; about ten minutes on an idle machine
    python benches/compare.py --device cuda     # on a GPU
    python benches/compare.py --quick           # a smoke test, writes nothing
    python benches/compare.py --only JAX        # what matches, writes nothing; `--output DIR` makes either write
    python benches/compare.py --render FILE     # page and pictures anew from a result
"""

import argparse
import datetime
import functools
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import agreement
import bandwidth
import dispatch
import memory
import peers
import plots
import report
from files import write
from machine import load, machine, slug
from peers import PEERS, Call, Peer, Task
from rich.console import Console
from rich.table import Table
from timing import ratio, take_turns

import gklx

PACKAGES = ("numpy", "array-api-compat", "scipy", "torch", "jax", "jaxlib", "optax", "cupy-cuda12x", "liger-kernel")
# Of the value, and of the row's largest entry of a gradient. Half precisions: what a library that computes in them
# loses, with room; the differences found are in the result.
_TOLERANCES = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.5}
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Plan(NamedTuple):
    """What a run measures."""

    sizes: tuple[tuple[int, int], ...]
    """Batch and classes."""
    dtypes: tuple[str, ...]
    batch: int
    """At which the number of classes grows."""
    classes: tuple[int, ...]
    pair_classes: int
    """The most at which the pairs run."""
    small: tuple[tuple[int, int], ...]
    memory: tuple[int, int]
    copied: int
    """Bytes."""
    turns: int
    seconds: float
    """The least time of one turn of one peer."""
    compiler: str = "inductor"
    memory_of: str = ""
    """A regular expression: whose memory is taken."""


FULL = Plan(
    sizes=((512, 1_000), (4_096, 1_000), (256, 32_000)),
    dtypes=("float32",),
    batch=64,
    classes=(10, 30, 100, 300, 1_000, 3_000, 10_000, 32_000, 100_000),
    pair_classes=1_000,
    small=((1, 10), (8, 10), (64, 10), (128, 10)),
    memory=(256, 32_000),
    copied=2**29,
    turns=9,
    seconds=0.05,
)
GPU = FULL._replace(
    sizes=((8_192, 1_000), (4_096, 32_000), (1_024, 128_256)),
    dtypes=("float32", "float16", "bfloat16"),
    memory=(4_096, 32_000),
    copied=2**30,
)
QUICK = Plan(
    sizes=((8, 50),),
    dtypes=("float32",),
    batch=4,
    classes=(10, 30),
    pair_classes=10,
    small=((1, 10), (8, 10)),
    memory=(8, 50),
    copied=2**20,
    turns=3,
    seconds=0.0005,
    compiler="eager",  # no C++ is compiled, the graph runs as it is captured
    memory_of="gklx gkl · (NumPy|PyTorch compiled|JAX)",
)


class Bench:
    """One run: who takes part, what was found, what was left out and why."""

    def __init__(self, plan: Plan, device: str, only: str | None, say: Callable[[str], None]) -> None:
        self.plan, self.device, self.say = plan, device, say
        self.only = re.compile(only or "", re.IGNORECASE)
        self.left_out: dict[str, str] = {}
        self.here = []
        for peer in PEERS:
            reason = peers.missing(peer, device, plan.compiler)
            if reason is None:
                self.here.append(peer)
            else:
                self.left_out[peer.name] = reason

    def task(self, batch: int, classes: int, gradient: str = "both", dtype: str = "float32") -> Task:
        """Name a task on this run's device."""
        return Task(batch, classes, gradient, dtype, self.device, self.plan.compiler)

    def chosen(self, task: Task, among: Sequence[Peer]) -> list[Peer]:
        """Find who takes a task, by `--only` too."""
        label = f"{task.batch}x{task.classes} {task.gradient} {task.dtype}"
        return [peer for peer in among if peer.takes(task) and self.only.search(f"{label} {peer.name}")]

    def race(self, suite: str, task: Task, among: Sequence[Peer], seconds: float | None = None) -> list[dict[str, Any]]:
        """Check and time peers on one task; one row a peer."""
        chosen = self.chosen(task, among)
        if not chosen:
            return []
        self.say(f"{suite}: {task.batch:,} × {task.classes:,}, {task.dtype}, {task.gradient}: building and checking")
        with peers.cleared(self.device):
            built = {peer.name: self.built(peer, task) for peer in chosen}
            calls = {name: of[0] for name, of in built.items() if of is not None}
            apart = {name: of[1] for name, of in built.items() if of is not None}
            del built
            self.say(f"{suite}: {task.batch:,} × {task.classes:,}, {task.dtype}, {task.gradient}: timing")
            taken = take_turns(calls, self.plan.turns, self.plan.seconds if seconds is None else seconds)
            del calls  # and with them the arrays
        least = bandwidth.least_bytes(task.batch, task.classes, task.gradient, _BYTES[task.dtype])
        rows = []
        for peer in chosen:
            if peer.name in taken:
                of = taken[peer.name].as_row()
                rows.append(
                    {
                        "suite": suite,
                        "peer": peer.name,
                        "what": peer.what,
                        "backend": peer.backend,
                        "loss": peer.loss,
                        "own": peer.own,
                        **{key: getattr(task, key) for key in ("batch", "classes", "gradient", "dtype")},
                        **of,
                        "ns_per_logit": of["seconds"] / (task.batch * task.classes) * 1e9,
                        "least_bytes_per_second": least / of["seconds"],
                        "difference": apart[peer.name],
                    }
                )
        return rows

    def built(self, peer: Peer, task: Task) -> tuple[Call, float] | None:
        """Build a peer, run it once and hold it against gklx in float64; None where somebody else's cannot run."""
        try:
            call = peer.build(task)
            found = agreement.kept(call())
        except Exception as error:
            if peer.own:
                raise
            self.left_out[f"{peer.name} at {task.batch} × {task.classes}, {task.gradient}, {task.dtype}"] = repr(error)
            return None
        apart = agreement.difference(self.reference(task, peer.loss), found)
        if not apart <= _TOLERANCES[task.dtype]:
            raise AssertionError(f"{peer.name} is {apart:.1e} from gklx in float64: {task}")
        return call, apart

    def reference(self, task: Task, loss: str) -> list[Any]:
        """Value and gradients by gklx in float64, from the very logits of the task."""
        return _reference(task, loss, "numpy" if self.device == "cpu" else self.on_gpu())

    def on_gpu(self) -> str:
        """Name a library whose float64 needs no copy to the host."""
        return "torch" if any(peer.library == "torch" for peer in self.here) else "cupy"


@functools.lru_cache(maxsize=len(peers.LOSSES))
def _reference(task: Task, loss: str, library: str) -> list[Any]:
    function = gklx.value_and_grad(peers.LOSSES[loss], argnums=(0, 1) if task.both else (0,))
    value, gradients = function(*task.inputs(library, "float64"))
    return agreement.kept((value, *gradients))


# --- what is measured -------------------------------------------------------------------------------------------------


def sizes(bench: Bench) -> list[dict[str, Any]]:
    """All but the pairs at the sizes of training, both gradients and the student's."""
    among = [peer for peer in bench.here if not peer.pairs]
    return [
        row
        for batch, classes in bench.plan.sizes
        for dtype in bench.plan.dtypes
        for gradient in ("both", "student")
        for row in bench.race("sizes", bench.task(batch, classes, gradient, dtype), among)
    ]


def growth(bench: Bench) -> list[dict[str, Any]]:
    """All as the number of classes grows, the pairs as far as they go."""
    rows = []
    for classes in bench.plan.classes:
        among = [
            peer
            for peer in bench.here
            if peer.loss in ("kl", "gkl") and not (peer.pairs and classes > bench.plan.pair_classes)
        ]
        gradients = ("both", "student") if any(peer.gradients == ("student",) for peer in among) else ("both",)
        for gradient in gradients:
            few = among if gradient == "both" else [peer for peer in among if "both" not in peer.gradients]
            rows += bench.race("growth", bench.task(bench.plan.batch, classes, gradient), few)
    return rows


def small(bench: Bench) -> list[dict[str, Any]]:
    """Eager libraries where a call's fixed cost is all there is."""
    among = [peer for peer in bench.here if peer.backend in ("NumPy", "PyTorch", "CuPy") and peer.loss in ("kl", "gkl")]
    rows = []
    for batch, classes in bench.plan.small:
        task = bench.task(batch, classes)
        of = bench.race("small", task, among, seconds=bench.plan.seconds / 2)
        for row in of:
            (peer,) = (peer for peer in among if peer.name == row["peer"])
            row["operations"] = peers.operations(peer.build(task)) if peer.library == "torch" else None
        rows += of
    return rows


def overhead(bench: Bench) -> list[dict[str, Any]]:
    """Take what gklx adds to its array operations at the smallest input; on a GPU kernels take their place."""
    task = bench.task(*bench.plan.small[0])
    own = [peer for peer in bench.here if peer.own and peer.loss == "gkl" and peer.backend in ("NumPy", "PyTorch")]
    if bench.device != "cpu":
        return []
    bench.say("operations alone")
    return [
        dispatch.measure(peer.library, peer.backend, *bench.plan.small[0], bench.plan.turns, bench.plan.seconds)
        for peer in bench.chosen(task, own)
    ]


def one_or_two(bench: Bench) -> list[dict[str, Any]]:
    """Divide the time of both gradients by that of the student's alone, of gkl with gamma 1, turn by turn."""
    rows = []
    for batch, classes in bench.plan.sizes:
        both, student = (bench.task(batch, classes, gradient) for gradient in ("both", "student"))
        own = [peer for peer in bench.here if peer.own and peer.loss == "gkl γ=1"]
        for peer in bench.chosen(student, own):
            bench.say(f"one gradient or two: {batch:,} × {classes:,}, {peer.backend}")
            with peers.cleared(bench.device):
                calls = {"both": peer.build(both), "student": peer.build(student)}
                taken = take_turns(calls, bench.plan.turns, bench.plan.seconds)
                del calls
            found = ratio(taken["both"].turns, taken["student"].turns)
            rows.append({"backend": peer.backend, "batch": batch, "classes": classes, **found})
    return rows


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Divide every peer by every loss of gklx on the same backend, turn by turn; above 1 gklx is the faster."""
    keys = ("suite", "backend", "batch", "classes", "gradient", "dtype")
    return [
        {**{key: own[key] for key in keys}, "gklx": own["loss"], "peer": peer["what"]}
        | ratio(peer["turns"], own["turns"])
        for peer in rows
        if not peer["own"]
        for own in rows
        if own["own"] and _place(own) == _place(peer) and (peer["loss"] == "kl" or own["loss"] == peer["loss"])
    ]


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("suite", "backend", "batch", "classes", "gradient", "dtype"))


def taken_memory(bench: Bench, script: str) -> list[dict[str, Any]]:
    """Take the peak of every peer, each in a process of its own."""
    rows = []
    batch, classes = bench.plan.memory
    for peer in bench.here:
        task = bench.task(batch, classes, peer.gradients[0])
        if peer.pairs or peer.loss not in ("kl", "gkl") or not bench.chosen(task, [peer]):
            continue
        if not re.search(bench.plan.memory_of, peer.name):
            continue
        bench.say(f"memory of {peer.name}")
        found = memory.in_fresh_process(script, "--worker", json.dumps([peer.name, task]))
        array = batch * classes * _BYTES[task.dtype]
        rows.append({"peer": peer.name, "batch": batch, "classes": classes, "gradient": task.gradient, **found})
        rows[-1]["arrays"] = None if found["counted"] is None else found["counted"] / array
    return rows


def worker(name: str, task: Task) -> dict[str, int | None]:
    """Measure, in that process; the first call compiles."""
    (peer,) = (peer for peer in PEERS if peer.name == name)
    call = peer.build(task)
    call()
    return memory.peak(call, peer.library, task.device)


def threads(libraries: set[str]) -> dict[str, Any]:
    """Say how many threads there are to each library, as far as it is known."""
    found: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None}
    found |= {name: os.environ[name] for name in ("GKLX_NUM_THREADS", "OMP_NUM_THREADS") if name in os.environ}
    if "torch" in libraries:
        import torch

        found["torch"] = torch.get_num_threads()
    return found


def run(plan: Plan, device: str, only: str | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure everything."""
    loads = [load()]
    bench = Bench(plan, device, only, say)
    if not bench.here:
        raise SystemExit("\n".join(["nothing can run:", *(f"{name}: {why}" for name, why in bench.left_out.items())]))
    libraries = {peer.library for peer in bench.here}
    about = machine(PACKAGES)
    if device == "cuda":
        about["gpu"] = _gpu_name(bench.on_gpu())
    say("a copy")
    copy = bandwidth.measure(libraries, device, plan.copied, plan.turns)
    rows = sizes(bench) + growth(bench)
    rows += small(bench)
    for row in rows:
        row["bandwidth"] = row["least_bytes_per_second"] / copy["bytes_per_second"]
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {**about, "device": device, "threads": threads(libraries)},
        "plan": plan._asdict(),
        "only": only,
        "settings": {name: getattr(loss, "keywords", {}) for name, loss in peers.LOSSES.items()},
        "copy": copy,
        "rows": rows,
        "ratios": ratios(rows),
        "one_or_two": one_or_two(bench),
        "dispatch": overhead(bench),
        "memory": taken_memory(bench, __file__),
        "peers": [peer.name for peer in PEERS],
        "left_out": bench.left_out,
        "load": [*loads, load()],
    }


def _gpu_name(library: str) -> str:
    if library == "torch":
        import torch

        return torch.cuda.get_device_name()
    import cupy

    return cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()


# --- the command ------------------------------------------------------------------------------------------------------


def save(result: dict[str, Any], folder: Path) -> list[str]:
    """Write the page and the pictures, and return their names; what is written by hand stands in files of its own."""
    name = slug(result["machine"])
    pictures = plots.drawn(result)
    for kind, svg in pictures.items():
        write(folder / f"{name}-{kind}.svg", svg)
    steps = folder / f"{name}-steps.md"
    said = steps.read_text(encoding="utf-8") if steps.exists() else None
    write(folder / f"{name}.md", report.page(result, name, list(pictures), said))
    return [f"{name}.md", *(f"{name}-{kind}.svg" for kind in pictures)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, some seconds; writes only to --output")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--only", metavar="PATTERN", help="a regular expression, searched in '256x32000 both float32 gklx kl · NumPy'"
    )
    parser.add_argument("--output", type=Path, help="folder of the results [benches/results]")
    parser.add_argument("--render", type=Path, metavar="FILE", help="a result's JSON file: its page and pictures anew")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # a peer and a task, for its memory
    options = parser.parse_args(arguments)
    # Before JAX is imported: on a GPU it would take most of the memory for itself.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if options.device == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if options.worker:
        name, task = json.loads(options.worker)
        print(json.dumps(worker(name, Task(*task))))
        return
    console = Console() if sys.stdout.isatty() else Console(width=150)
    if options.render:
        folder = options.output or options.render.parent
        save(json.loads(options.render.read_text(encoding="utf-8")), folder)
        console.print(f"written to {folder}")
        return
    command = " ".join(["python benches/compare.py", *_named(options)])
    plan = QUICK if options.quick else FULL if options.device == "cpu" else GPU
    with console.status("") as status:
        result = {"command": command, **run(plan, options.device, options.only, status.update)}
    if not result["rows"]:
        parser.error(f"nothing that runs here matches --only {options.only}")
    if reason := plots.missing():
        console.print(reason)
    for title, headings, cells in report.tables(result):
        table = Table(*headings, title=title)
        for row in cells:
            table.add_row(*row)
        console.print(table)
    folder = options.output
    if folder is None and not options.quick and not options.only:
        folder = Path(__file__).parent / "results"
    if folder is not None:
        write(folder / f"{slug(result['machine'])}.json", json.dumps(result, indent=1) + "\n")
        save(result, folder)
        console.print(f"written to {folder}")


def _named(options: argparse.Namespace) -> list[str]:
    """The options that change what is measured."""
    quick = ["--quick"] if options.quick else []
    device = ["--device", options.device] if options.device != "cpu" else []
    return quick + device + (["--only", f"'{options.only}'"] if options.only else [])


if __name__ == "__main__":
    main()
