"""Time, fraction of the copy bandwidth and peak memory of the losses and their peers on a GPU: part d of gpu.sh.

    python benches/gpu_bench.py --output bench.md             # two and a half minutes on a GPU
    python benches/gpu_bench.py --device cpu --quick          # a smoke test of every line but CUDA graphs

The calls of a group take turns, so that a change of the clock affects all of them; each group times a copy and gklx's
`kl` again. A turn queues calls for some milliseconds and synchronises once, at its end. The file is written after each
group, so that an interrupted run leaves its measurements.
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
from peers import KL, KL_STUDENT, Request, Task
from timing import spread, take_turns

import gklx

PACKAGES = ("numpy", "torch", "triton", "jax", "optax", "cupy-cuda13x", "cupy-cuda12x", "cuda-core", "liger-kernel")
SIZES = ((8_192, 1_000), (4_096, 32_000), (1_024, 128_256))
DTYPES = ("float32", "bfloat16")
_BYTES = {"float32": 4, "bfloat16": 2}
# Relative to the value, and to the largest entry of a gradient's row. Some peers compute in bfloat16 itself.
_TOLERANCES = {"float32": 1e-4, "bfloat16": 0.5}
COPY, OWN = "a copy", "gklx kl"
_GOAL = 0.8

Calls = dict[str, Callable[[], Any]]


class Measurement(NamedTuple):
    """The measurement of one call."""

    size: str
    what: str
    both: bool
    """Whether the teacher's gradient is computed too."""
    seconds: float
    low: float
    high: float
    of_bandwidth: float
    """The bandwidth on the counted bytes, as a fraction of the copy's."""
    peak_bytes: int | None
    """The peak beyond the inputs."""

    def cells(self) -> list[str]:
        """The row of the table."""
        peak = "–" if self.peak_bytes is None else pages.amount(self.peak_bytes)
        gradients = "both" if self.both else "student"
        turns = f"{pages.seconds(self.low)} – {pages.seconds(self.high)}"
        return [self.size, self.what, gradients, pages.seconds(self.seconds), turns, f"{self.of_bandwidth:.0%}", peak]


def counted_bytes(task: Task, both: bool) -> int:
    """The bytes that the two kernels move: both logits read twice, and the gradients written."""
    return (6 if both else 5) * task.batch * task.classes * _BYTES[task.dtype]


def copied_bytes(task: Task, both: bool) -> int:
    """The bytes that the copy moves: both logits read once, and one output per gradient written."""
    return (4 if both else 3) * task.batch * task.classes * _BYTES[task.dtype]


# --- groups of calls --------------------------------------------------------------------------------------------------


def eager(task: Task, both: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """All losses of gklx and their peers in eager PyTorch; a teacher without a gradient is frozen."""
    for name, loss in (("kl", gklx.kl), ("dkl", gklx.dkl), ("ikl", gklx.ikl), ("gkl", gklx.gkl)):
        yield f"gklx {name}", peers.by_value_and_grad("torch", loss, task, both)
    yield "gklx kl, backward()", peers.by_backward(gklx.kl, task, both)
    yield "F.kl_div", peers.by_backward(peers.f_kl_div, task, both)
    if not both and task.device == "cuda" and peers.missing("liger_kernel.transformers", task.device) is None:
        yield "Liger-Kernel", peers.by_backward(peers.liger, task, both)


def graphs(task: Task, both: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """`kl` and `gkl` as CUDA graphs: without the overhead of Python and of kernel launches."""
    if task.device != "cuda":
        return
    for name, loss in (("kl", gklx.kl), ("gkl", gklx.gkl)):
        yield f"gklx {name}, CUDA graph", capture(peers.by_value_and_grad("torch", loss, task, both))


def capture(call: Callable[[], Any]) -> Callable[[], Any]:
    """Capture a call as a CUDA graph; each replay returns the same tensors."""
    import torch

    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):  # initialisation at first use must not be captured
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def compiled(task: Task, both: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """PyTorch's KL by `torch.compile`."""
    reason = peers.cannot_compile(task.device, task.compiler)
    if reason:
        raise LookupError(reason)
    yield "F.kl_div, compiled", peers.by_compiled_backward(peers.f_kl_div, task, both)


def jitted(task: Task, both: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Gklx's formulas and optax by `jax.jit`."""
    require("jax", task)
    yield "gklx kl, jax.jit", peers.by_jit(gklx.kl, task, both)
    if not both:
        yield "gklx gkl, jax.jit", peers.by_jit(gklx.gkl, task, both)
    require("optax", task)
    yield "optax, jax.jit", peers.by_jit(peers.optax_kl, task, both)


def cupy_calls(task: Task, both: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """CuPy, which has no bfloat16."""
    require("cupy", task)
    if task.dtype != "bfloat16":
        yield "gklx kl, CuPy", peers.by_value_and_grad("cupy", gklx.kl, task, both)
        yield "gklx gkl, CuPy", peers.by_value_and_grad("cupy", gklx.gkl, task, both)


# The most important groups come first, since time may run out.
GROUPS: Mapping[str, Callable[[Task, bool], Iterator[tuple[str, Callable[[], Any]]]]] = {
    "eager": eager,
    "graphs": graphs,
    "compiled": compiled,
    "cupy": cupy_calls,
    "jax": jitted,
}


def require(module: str, task: Task) -> None:
    """Raise LookupError with the reason where a library cannot be used."""
    reason = peers.missing(module, task.device)
    if reason:
        raise LookupError(reason)


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(
    name: str, task: Task, both: bool, turns: int, seconds: float, notes: list[str], measurements: list[Measurement]
) -> None:
    """Time a group; a call that fails is noted, and the others are timed."""
    where = f"{name}, {task.size}, {'both gradients' if both else 'student alone'}"
    calls: Calls = {}
    try:
        for what, call in GROUPS[name](task, both):
            calls[what] = call
    except Exception as error:  # the failure of a peer must not stop the others
        notes.append(f"{where}: {_summary(error)}")
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
                check(calls[what], task, both)
        except Exception as error:
            notes.append(f"{where}, {what}: {_summary(error)}")
            del calls[what]
    repeats = {what: repeats_of(call, task.device, seconds) for what, call in calls.items()}
    queued = {what: functools.partial(_queue, call, repeats[what], task.device) for what, call in calls.items()}
    taken = take_turns(queued, turns, 0)
    times = {what: spread([x / repeats[what] for x in taken[what]]) for what in calls}
    bandwidth = copied_bytes(task, both) / times[COPY].median
    for what, time in times.items():
        moved = (copied_bytes if what == COPY else counted_bytes)(task, both)
        measurements.append(
            Measurement(
                task.size, what, both, time.median, time.low, time.high, moved / time.median / bandwidth, peaks[what]
            )
        )
    notes.append(f"{where}: a copy moves {pages.amount(bandwidth)}/s")


def check(call: Callable[[], Any], task: Task, both: bool) -> None:
    """Raise AssertionError where the results differ from the definition in float64."""
    request: Request = KL if both else KL_STUDENT
    error = definitions.difference(
        peers.reference(request, task._replace(waits=True)), definitions.some_rows_on_host(call())
    )
    if not error <= _TOLERANCES[task.dtype]:
        raise AssertionError(f"{error:.1e} from the definition in float64")


def peak_of(call: Callable[[], Any], device: str) -> int | None:
    """The peak of the memory that PyTorch allocates during a call, with its results; None for other allocators."""
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
    """The number of calls that take `seconds` together."""
    _queue(call, 1, device)
    return max(1, min(1000, round(seconds / timeit.timeit(lambda: _queue(call, 1, device), number=1))))


def _queue(call: Callable[[], Any], times: int, device: str) -> None:
    """Call `times` times, and wait for the last."""
    result = None
    for _ in range(times):
        result = call()
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    if "jax" in sys.modules:  # `torch.cuda.synchronize` may not include JAX's work
        sys.modules["jax"].block_until_ready([x for x in result or () if hasattr(x, "block_until_ready")])
    if "cupy" in sys.modules and device == "cuda":
        sys.modules["cupy"].cuda.Device().synchronize()


def _summary(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# --- the page ---------------------------------------------------------------------------------------------------------


def page(measurements: Sequence[Measurement], notes: Sequence[str], device: str, loads: Sequence[str]) -> str:
    """Render the measurements so far as Markdown."""
    where = pages.machine(device)
    lines = pages.heading(f"The losses on {where}", "python benches/gpu_bench.py", where, PACKAGES, loads)
    lines += [
        "Value and gradients. Calls are queued one after the other, their results freed, with one wait for some "
        "milliseconds of calls. Bandwidth counts both logits read twice and each gradient written once (24 bytes for a "
        "pair of float32 logits and both gradients, 20 for one), whatever a peer moves, as a fraction of the copy's. "
        "Memory is the peak of PyTorch's allocations beyond the inputs, gradients included.",
        "",
    ]
    own = [x for x in measurements if x.what == OWN]
    if own:
        met = sum(x.of_bandwidth >= _GOAL for x in own)
        lines += [f"{OWN} reaches {_GOAL:.0%} of the copy's bandwidth in {met} of {len(own)} measurements.", ""]
    headings = ["size", "what", "gradients", "time", "middle half", "of bandwidth", "peak memory"]
    lines += pages.markdown(headings, [x.cells() for x in measurements], right=(3, 4, 5, 6))
    if notes:
        lines += ["## Notes", "", *(f"- {note}" for note in notes), ""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seconds", type=float, default=140.0, help="after which no group is started")
    parser.add_argument("--quick", action="store_true", help="one small size, few turns")
    options = parser.parse_args(arguments)
    reason = peers.missing("torch", options.device)
    if reason:
        print(f"skipped: {reason}")
        return 77
    sizes, turns, seconds = (((16, 100),), 3, 1e-3) if options.quick else (SIZES, 5, 1e-2)
    compiler = "eager" if options.quick else "inductor"
    loads, start = [pages.load()], timeit.default_timer()
    measurements: list[Measurement] = []
    notes: list[str] = []
    try:
        for name, (batch, classes), dtype, both in itertools.product(GROUPS, sizes, DTYPES, (True, False)):
            task = Task(batch, classes, dtype, options.device, compiler, waits=False)
            if timeit.default_timer() - start > options.seconds:
                notes.append(f"{name}, {task.size}, {'both gradients' if both else 'student alone'}: no time was left")
                continue
            before = len(measurements)
            try:
                measure(name, task, both, turns, seconds, notes, measurements)
            except Exception as error:  # such as out of memory; the other groups may still run
                notes.append(f"{name}, {task.size}: {_summary(error)}")
            for measurement in measurements[before:]:
                print(*measurement.cells(), sep=" | ", flush=True)
            free_caches(options.device)
            if options.output:
                pages.write(options.output, page(measurements, notes, options.device, [*loads, pages.load()]))
    except KeyboardInterrupt:
        notes.append("the run was interrupted")
    print(page(measurements, notes, options.device, [*loads, pages.load()]))
    return 0


def free_caches(device: str) -> None:
    """Free the references, the compiled programs and the cached memory of allocators."""
    peers.reference.cache_clear()
    gc.collect()
    if device == "cuda":
        import torch

        torch.compiler.reset()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
