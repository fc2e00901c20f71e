"""The peak of memory of one call of NumPy or of PyTorch on a CPU."""

import contextlib
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def in_fresh_process(script: str, *arguments: str) -> Any:
    """Run a script's worker, which prints JSON in its last line."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def peak(call: Callable[[], Any], library: str) -> dict[str, int | None]:
    """Measure the resident memory of a first call and the bytes its library counts in a second; call once before.

    What was there before, the inputs, is not counted; the results are held, and so are part of both. The count is exact
    (`tracemalloc` for NumPy, the profiler for PyTorch), but knows nothing of what the row kernel asks of the system
    itself, a few rows a thread. Resident memory is what the system sees, pages rounded up, and on small arrays hides in
    memory that imports have freed.
    """
    _settle()
    resident = None
    if (before := _reset_resident()) is not None:
        result = call()
        resident = _status("VmHWM") - before
        del result
    return {"resident": resident, "counted": {"numpy": _numpy, "torch": _torch}[library](call)}


def _settle() -> None:
    """Hand freed memory back to the system: what is used anew would be missing from the peak."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # where it is not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _numpy(call: Callable[[], Any]) -> int:
    tracemalloc.start()
    result = call()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del result
    return most


def _torch(call: Callable[[], Any]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Ev Idx"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return int(max(np.cumsum([change for _, _, change in changes])))


def _reset_resident() -> int | None:
    """Start the peak anew, from the resident bytes returned; None where the system cannot (Linux only)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key}")
