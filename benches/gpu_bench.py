"""The losses on a GPU beside their peers: time, fraction of the copy bandwidth, peak memory. Part d of benches/gpu.sh.

    python benches/gpu_bench.py --output bench.md             # two and a half minutes on a card
    python benches/gpu_bench.py --device cpu --quick          # a smoke test of every line but CUDA graphs

Calls of a group take turns, so that a clock that changes meanwhile changes for all; each group times a copy and gklx's
`kl` anew. A turn queues calls for some milliseconds and waits once, at its end. The file is written after each group: a
run that is cut off leaves what it found.
"""

import argparse
import functools
import gc
import itertools
import sys
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import definitions
import pages
import peers
from peers import KL, KL_STUDENT, Asked, Task
from timing import spread, take_turns

import gklx

PACKAGES = ("numpy", "torch", "triton", "jax", "optax", "cupy-cuda13x", "cupy-cuda12x", "cuda-core", "liger-kernel")
SIZES = ((8_192, 1_000), (4_096, 32_000), (1_024, 128_256))
DTYPES = ("float32", "bfloat16")
_BYTES = {"float32": 4, "bfloat16": 2}
# Of the value, and of the row's largest entry of a gradient: what a library that computes in halves loses.
_TOLERANCES = {"float32": 1e-4, "bfloat16": 0.5}
COPY, OWN = "a copy", "gklx kl"
_GOAL = 0.8

Calls = dict[str, Callable[[], Any]]


class Found(NamedTuple):
    """One call, timed."""

    size: str
    what: str
    both: bool
    """Whether the teacher has a gradient too."""
    seconds: float
    low: float
    high: float
    of_bandwidth: float
    """Of the copy's, on the counted bytes."""
    peak_bytes: int | None
    """Beyond the inputs."""

    def cells(self) -> list[str]:
        """A line of the table."""
        peak = "–" if self.peak_bytes is None else pages.amount(self.peak_bytes)
        asked = "both" if self.both else "student"
        turns = f"{pages.seconds(self.low)} – {pages.seconds(self.high)}"
        return [self.size, self.what, asked, pages.seconds(self.seconds), turns, f"{self.of_bandwidth:.0%}", peak]


def counted_bytes(task: Task, both: bool) -> int:
    """Both logits read twice, and the gradients written: what the two kernels move."""
    return (6 if both else 5) * task.batch * task.classes * _BYTES[task.dtype]


def copied_bytes(task: Task, both: bool) -> int:
    """Both logits read once, and as much written as there are gradients."""
    return (4 if both else 3) * task.batch * task.classes * _BYTES[task.dtype]


# --- groups of calls --------------------------------------------------------------------------------------------------


def eager(task: Task, both: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """All losses of gklx, and what else runs in eager PyTorch; the teacher is frozen where it has no gradient."""
    for name, loss in (("kl", gklx.kl), ("dkl", gklx.dkl), ("ikl", gklx.ikl), ("gkl", gklx.gkl)):
        yield f"gklx {name}", peers.by_value_and_grad("torch", loss, task, both)
    yield "gklx kl, backward()", peers.by_backward(gklx.kl, task, both)
    yield "F.kl_div", peers.by_backward(peers.f_kl_div, task, both)
    if not both and task.device == "cuda" and peers.missing("liger_kernel.transformers", task.device) is None:
        yield "Liger-Kernel", peers.by_backward(peers.liger, task, both)


def graphs(task: Task, both: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The same as CUDA graphs: without what Python and launches cost."""
    if task.device != "cuda":
        return
    for name, loss in (("kl", gklx.kl), ("gkl", gklx.gkl)):
        yield f"gklx {name}, CUDA graph", captured(peers.by_value_and_grad("torch", loss, task, both))


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """A call as a CUDA graph; each replay returns the same tensors."""
    import torch

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what is made at first use must be there before
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replayed() -> Any:
        graph.replay()
        return result

    return replayed


def compiled(task: Task, both: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """`torch.compile` of PyTorch's own."""
    reason = peers.cannot_compile(task.device, task.compiler)
    if reason:
        raise LookupError(reason)
    yield "F.kl_div, compiled", peers.by_compiled_backward(peers.f_kl_div, task, both)


def jitted(task: Task, both: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """`jax.jit`: gklx's formulas, which XLA fuses as it can, and optax."""
    needed("jax", task)
    yield "gklx kl, jax.jit", peers.by_jit(gklx.kl, task, both)
    if not both:
        yield "gklx gkl, jax.jit", peers.by_jit(gklx.gkl, task, both)
    needed("optax", task)
    yield "optax, jax.jit", peers.by_jit(peers.optax_kl, task, both)


def of_cupy(task: Task, both: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """CuPy, which has no bfloat16."""
    needed("cupy", task)
    if task.dtype != "bfloat16":
        yield "gklx kl, CuPy", peers.by_value_and_grad("cupy", gklx.kl, task, both)
        yield "gklx gkl, CuPy", peers.by_value_and_grad("cupy", gklx.gkl, task, both)


# In the order of what matters most, should time run out.
GROUPS: Mapping[str, Callable[[Task, bool], Iterator[tuple[str, Callable[[], Any]]]]] = {
    "eager": eager,
    "graphs": graphs,
    "compiled": compiled,
    "cupy": of_cupy,
    "jax": jitted,
}


def needed(module: str, task: Task) -> None:
    """LookupError with the reason where a library is not to be had."""
    reason = peers.missing(module, task.device)
    if reason:
        raise LookupError(reason)


# --- measuring --------------------------------------------------------------------------------------------------------


def measured(
    name: str, task: Task, both: bool, turns: int, seconds: float, notes: list[str], found: list[Found]
) -> None:
    """Time a group; what cannot run is noted, and the others go on."""
    where = f"{name}, {task.size}, {'both gradients' if both else 'student alone'}"
    calls: Calls = {}
    try:
        for what, call in GROUPS[name](task, both):
            calls[what] = call
    except Exception as error:  # a peer's own failure is none of the others'
        notes.append(f"{where}: {_said(error)}")
    if not calls:
        return
    calls = {COPY: peers.copies("torch", task, both)["copy"], **calls}
    if name != "eager":
        calls[OWN] = peers.by_value_and_grad("torch", gklx.kl, task, both)
    peaks: dict[str, int | None] = {}
    for what in list(calls):
        try:
            peaks[what] = peak_of(calls[what], task.device)
            if "kl" in what.split(",")[0].split() or what.startswith(("F.", "optax", "Liger")):
                checked(calls[what], task, both)
        except Exception as error:
            notes.append(f"{where}, {what}: {_said(error)}")
            del calls[what]
    repeats = {what: repeats_of(call, task.device, seconds) for what, call in calls.items()}
    queued = {what: functools.partial(_queue, call, repeats[what], task.device) for what, call in calls.items()}
    taken = take_turns(queued, turns, 0)
    times = {what: spread([x / repeats[what] for x in taken[what]]) for what in calls}
    bandwidth = copied_bytes(task, both) / times[COPY].median
    for what, time in times.items():
        moved = (copied_bytes if what == COPY else counted_bytes)(task, both)
        found.append(
            Found(task.size, what, both, time.median, time.low, time.high, moved / time.median / bandwidth, peaks[what])
        )
    notes.append(f"{where}: a copy moves {pages.amount(bandwidth)}/s")


def checked(call: Callable[[], Any], task: Task, both: bool) -> None:
    """AssertionError where the results are not those of the definition in float64."""
    asked: Asked = KL if both else KL_STUDENT
    apart = definitions.difference(peers.reference(asked, task._replace(waits=True)), definitions.kept(call()))
    if not apart <= _TOLERANCES[task.dtype]:
        raise AssertionError(f"{apart:.1e} from the definition in float64")


def peak_of(call: Callable[[], Any], device: str) -> int | None:
    """What PyTorch allocates at once during a call, its results too; None for other allocators."""
    call()
    if device != "cuda":
        return None
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) or None


def repeats_of(call: Callable[[], Any], device: str, seconds: float) -> int:
    """How many calls take so many seconds together."""
    _queue(call, 1, device)
    return max(1, min(1000, round(seconds / timeit.timeit(lambda: _queue(call, 1, device), number=1))))


def _queue(call: Callable[[], Any], times: int, device: str) -> None:
    """Call so many times, and wait for the last."""
    result = None
    for _ in range(times):
        result = call()
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    if "jax" in sys.modules:  # which waits for nobody else's streams
        sys.modules["jax"].block_until_ready([x for x in result or () if hasattr(x, "block_until_ready")])
    if "cupy" in sys.modules and device == "cuda":
        sys.modules["cupy"].cuda.Device().synchronize()


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# --- the page ---------------------------------------------------------------------------------------------------------


def page(found: Sequence[Found], notes: Sequence[str], device: str, loads: Sequence[str]) -> str:
    """Render what there is so far."""
    where = pages.machine(device)
    lines = pages.heading(f"The losses on {where}", "python benches/gpu_bench.py", where, PACKAGES, loads)
    lines += [
        "Value and gradients; calls queued one after the other, their results let go, one wait for some milliseconds "
        "of them. The fraction is of the copy's bandwidth, with both logits read twice and each gradient written once "
        "(24 bytes a pair of float32 logits for both gradients, 20 for one), whatever a peer moves. Memory is what "
        "PyTorch allocates at once beyond the inputs, gradients included.",
        "",
    ]
    goals = [x for x in found if x.what == OWN]
    if goals:
        met = sum(x.of_bandwidth >= _GOAL for x in goals)
        lines += [f"{OWN} reaches {_GOAL:.0%} of the copy's bandwidth in {met} of {len(goals)} measurements.", ""]
    headings = ["size", "what", "gradients", "time", "middle half", "of bandwidth", "peak memory"]
    lines += pages.markdown(headings, [x.cells() for x in found], right=(3, 4, 5, 6))
    if notes:
        lines += ["## Notes", "", *(f"- {note}" for note in notes), ""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seconds", type=float, default=140.0, help="no group is begun after so many")
    parser.add_argument("--quick", action="store_true", help="one small size, few turns")
    options = parser.parse_args(arguments)
    reason = peers.missing("torch", options.device)
    if reason:
        print(f"skipped: {reason}")
        return 77
    sizes, turns, seconds = (((16, 100),), 3, 1e-3) if options.quick else (SIZES, 5, 1e-2)
    compiler = "eager" if options.quick else "inductor"
    loads, start = [pages.load()], timeit.default_timer()
    found: list[Found] = []
    notes: list[str] = []
    try:
        for name, (batch, classes), dtype, both in itertools.product(GROUPS, sizes, DTYPES, (True, False)):
            task = Task(batch, classes, dtype, options.device, compiler, waits=False)
            if timeit.default_timer() - start > options.seconds:
                notes.append(f"{name}, {task.size}, {'both gradients' if both else 'student alone'}: no time was left")
                continue
            before = len(found)
            try:
                measured(name, task, both, turns, seconds, notes, found)
            except Exception as error:  # out of memory, say: the next is smaller or another's
                notes.append(f"{name}, {task.size}: {_said(error)}")
            for each in found[before:]:
                print(*each.cells(), sep=" | ", flush=True)
            cleared(options.device)
            if options.output:
                pages.write(options.output, page(found, notes, options.device, [*loads, pages.load()]))
    except KeyboardInterrupt:
        notes.append("the run was stopped here")
    print(page(found, notes, options.device, [*loads, pages.load()]))
    return 0


def cleared(device: str) -> None:
    """Forget references and programs, and what allocators keep."""
    peers.reference.cache_clear()
    gc.collect()
    if device == "cuda":
        import torch

        torch.compiler.reset()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
