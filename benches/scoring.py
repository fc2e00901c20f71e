"""`gklx score` on a dump that does not fit: peak memory by the operating system's count, and throughput.

Two float16 dumps are generated and scored by the command under a bound on its memory, on each backend in a process of
its own. Beside each run stands a plain sequential read of the same two files. Both may meet the system's page cache;
where the dumps are larger than the free memory it helps neither much.

    python benches/scoring.py                        # 20 GB under 1 GB, into benches/results/; some ten minutes
    python benches/scoring.py --gigabytes 2          # less
    python benches/scoring.py --quick                # a smoke test of a few seconds, writes nothing
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from files import write
from machine import machine

PREDICTION = """\
Written before the first full run. All four losses of a pair of logits take about 45 passes over arrays that stay in the
cache, three `exp` among them, and the widening of two half-precision numbers: 30 to 60 ns on one core in NumPy, half
that on two. At 4 bytes a pair of float16 logits that is 0.1 to 0.2 GB/s, so a read of the files (1 GB/s or more) is no
matter. JAX compiles the passes into a few and should be twice as fast. KL alone needs a third of the passes. Peak
memory is NumPy's 80 MB and two dozen blocks of 1 MiB a core, far below the bound."""
LEARNT = """\
- **The bound holds with room**: at most 115 MB in NumPy, and some 550 to 800 MB in PyTorch and JAX, which need most of
  that before the first block.
- **Computing is what takes the time**, as predicted, not reading: NumPy's 135 s on two cores are 54 ns of one core a
  pair of logits, at the slow end of the prediction. JAX was faster by a fifth, not twice; PyTorch, whose operations are
  not fused either, slower. KL alone takes two thirds of all four and not one third: the softmaxes are most of it.
- Before the run a block's arrays were returned to the system and faulted in again at each operation; since freed memory
  is kept, NumPy took 7.9 s in place of 13.5 s for 1 GB."""

# The command, and then what Linux says was its peak; `ru_maxrss` begins with that of the parent.
_COMMAND = """
import re, sys
from gklx._cli import main
status = main()
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
sys.exit(status)
"""


def dump(path: Path, samples: int, classes: int, seed: int) -> None:
    """Logits such as a model gives, the same few hundred rows again and again: what they hold is no matter here."""
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((256, classes), dtype=np.float32) * 3).astype(np.float16)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f2", "fortran_order": False, "shape": (samples, classes)}
        )
        for start in range(0, samples, len(rows)):
            file.write(rows[: samples - start].data)


def read(paths: list[Path]) -> float:
    """Seconds of a plain read of all bytes."""
    buffer = memoryview(bytearray(2**22))
    start = time.perf_counter()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def scored(paths: list[Path], memory: str, options: list[str]) -> dict[str, Any]:
    """Seconds, peak resident bytes and mean KL of the command."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "score.json"
        command = [sys.executable, "-c", _COMMAND, "score", *map(str, paths), "--memory", memory, "--work-dir", folder]
        start = time.perf_counter()
        done = subprocess.run(
            [*command, "--format", "json", "--output", str(report), *options],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        seconds = time.perf_counter() - start
        found = json.loads(report.read_text(encoding="utf-8"))
    return {"seconds": seconds, "peak_bytes": int(done.stdout) * 1024, "kl": found["losses"]["kl"]["mean"]}


def run(gigabytes: float, classes: int, memory: str, backends: list[str], folder: Path) -> dict[str, Any]:
    """All runs, each beside a read."""
    paths = [folder / "student.npy", folder / "teacher.npy"]
    samples = max(1, int(gigabytes * 1e9 / 2 / (2 * classes)))
    for seed, path in enumerate(paths):
        dump(path, samples, classes, seed)
    size = sum(path.stat().st_size for path in paths)
    rows = []
    for backend in backends:
        for losses in (["kl"], ["kl", "dkl", "ikl", "gkl"]):
            reading = read(paths)
            found = scored(paths, memory, ["--backend", backend, "--loss", *losses])
            row = {"backend": backend, "losses": losses, "read_seconds": reading, **found}
            rows.append(row | {"bytes_per_second": size / found["seconds"], "read_bytes_per_second": size / reading})
            print(f"{backend}, {' '.join(losses)}: {found['seconds']:.1f} s, {found['peak_bytes'] / 1e6:.0f} MB")
    return {
        "machine": machine(),
        "bytes": size,
        "samples": samples,
        "classes": classes,
        "memory": memory,
        "rows": rows,
    }


def report(result: dict[str, Any], command: str) -> str:
    """The results as a page."""
    about = result["machine"]
    lines = [
        f"# gklx score on {result['bytes'] / 1e9:.1f} GB under {result['memory']}",
        "",
        f"{about['processor']}, {about['cores']} cores · made by `{command}`",
        "",
        f"{result['samples']:,} samples of {result['classes']:,} classes, float16, two `.npy` files.",
        "",
        "## Prediction",
        "",
        PREDICTION,
        "",
        "## Result",
        "",
        "| backend | losses | time | throughput | plain read | peak resident memory | mean KL |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['backend']} | {', '.join(row['losses'])} | {row['seconds']:.0f} s "
        f"| {row['bytes_per_second'] / 1e9:.2f} GB/s | {row['read_bytes_per_second'] / 1e9:.2f} GB/s "
        f"| {row['peak_bytes'] / 1e6:.0f} MB | {row['kl']:.7f} |"
        for row in result["rows"]
    ]
    if result["bytes"] > 19e9:  # what was learnt is of the full run
        lines += ["", "## What was learnt", "", LEARNT]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--classes", type=int, default=32_000)
    parser.add_argument("--memory", default="1GB")
    parser.add_argument("--backend", nargs="+", default=["numpy", "torch", "jax"])
    parser.add_argument("--folder", type=Path, help="where the dumps go for the time being")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.gigabytes, arguments.classes, arguments.backend = 0.002, 100, ["numpy"]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = run(arguments.gigabytes, arguments.classes, arguments.memory, arguments.backend, Path(folder))
    command = " ".join(["python benches/scoring.py", *sys.argv[1:]])
    page = report(found, command)
    print(page)
    if not arguments.quick:
        results = Path(__file__).parent / "results"
        write(results / "scoring.json", json.dumps(found | {"command": command}, indent=1) + "\n")
        write(results / "scoring.md", page)


if __name__ == "__main__":
    main()
