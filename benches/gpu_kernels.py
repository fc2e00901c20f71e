"""The GPU time of each CUDA kernel of a call, by PyTorch's profiler, beside a copy of the logits to the gradients.

    python benches/gpu_kernels.py          # half a minute on a GPU

Queueing and launching are left out: gpu_bench.py times whole calls.
"""

import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any

import gpu_bench
import pages
import peers

import gklx

_CALLS = 10


def times_of(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds a call, of each kernel by its name."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(_CALLS):
            call()
        torch.cuda.synchronize()
    events = found.key_averages()
    return {each.key: each.device_time_total / _CALLS / 1e6 for each in events if each.device_time_total > 0}


def calls_of(batch: int, classes: int, dtype: str) -> dict[str, Callable[[], Any]]:
    """The losses on random logits, and KL of a student close to its teacher, whose digits need another sum."""
    import torch

    s, t = (torch.randn(batch, classes, device="cuda").to(getattr(torch, dtype)) for _ in range(2))
    near = (s + 0.1 * torch.randn(batch, classes, device="cuda")).to(s.dtype)
    outputs = torch.empty_like(s), torch.empty_like(t)

    def copy() -> None:
        for to, x in zip(outputs, (s, t), strict=True):
            to.copy_(x)

    both = functools.partial(gklx.value_and_grad, argnums=(0, 1))
    return {
        "copy": copy,
        "kl": lambda: both(gklx.kl)(s, t),
        "kl, close": lambda: both(gklx.kl)(s, near),
        "kl, student alone": lambda: gklx.value_and_grad(gklx.kl)(s, t),
        "gkl": lambda: both(gklx.gkl)(s, t),
        "gkl, gamma 0.5": lambda: both(functools.partial(gklx.gkl, gamma=0.5))(s, t),
    }


def main() -> int:
    """Print the table."""
    reason = peers.missing("torch", "cuda")
    if reason:
        print(f"skipped: {reason}")
        return 77
    rows = []
    for (batch, classes), dtype in itertools.product(gpu_bench.SIZES, gpu_bench.DTYPES):
        copy, task = None, peers.Task(batch, classes, dtype, "cuda")
        more = gpu_bench.counted_bytes(task, both=True) / gpu_bench.copied_bytes(task, both=True)
        for name, call in calls_of(batch, classes, dtype).items():
            times = times_of(call)
            total = sum(times.values())
            if not total:
                print("skipped: PyTorch's profiler saw no kernel")
                return 77
            copy = total if name == "copy" else copy
            both = name != "copy" and "alone" not in name
            of_copy = f"{more * copy / total:.0%}" if both else "–"
            own = [pages.seconds(times.get(kernel, 0.0)) for kernel in ("statistics", "batch", "gradients")]
            cells = [f"{batch:,} × {classes:,} {dtype}", name, pages.seconds(total), of_copy]
            rows.append([*cells, *(["–"] * 3 if name == "copy" else own)])
            print(*rows[-1], sep=" | ", flush=True)
    headings = ["size", "what", "GPU time", "of bandwidth", "statistics", "batch", "gradients"]
    print(*pages.markdown(headings, rows, right=(2, 3, 4, 5, 6)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
