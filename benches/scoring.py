"""`gklx score` on files that do not fit: time and peak memory by the operating system's count.

Two float16 dumps are generated and scored by the command under a bound on its memory, on each backend in a process of
its own. Beside each run stands a plain sequential read of the same two files. Both may meet the system's page cache;
where the dumps are larger than the free memory it helps neither much.

    python benches/scoring.py                        # 20 GB under 1 GB, into benches/results/; some minutes
    python benches/scoring.py --gigabytes 2          # less
    python benches/scoring.py --quick                # a smoke test of a few seconds, writes nothing
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pages

import gklx

ALL = ("kl", "dkl", "ikl", "gkl")
# The command, and then what Linux says was its peak; `ru_maxrss` begins with that of the parent.
_COMMAND = """
import re, sys
from gklx._cli import main
status = main()
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
sys.exit(status)
"""


class Scored(NamedTuple):
    """One run of the command."""

    seconds: float
    peak_bytes: int
    means: dict[str, float]


def samples_in(gigabytes: float, classes: int) -> int:
    """How many rows each of the two dumps has."""
    return max(1, int(gigabytes * 1e9 / 2 / (2 * classes)))


def dumps(folder: Path, gigabytes: float, classes: int) -> list[Path]:
    """Logits such as a model gives, the same few hundred rows again and again: what they hold is no matter here."""
    samples, paths = samples_in(gigabytes, classes), [folder / "student.npy", folder / "teacher.npy"]
    for seed, path in enumerate(paths):
        rows = (np.random.default_rng(seed).standard_normal((256, classes), dtype=np.float32) * 3).astype(np.float16)
        with open(path, "wb") as file:
            shape = {"descr": "<f2", "fortran_order": False, "shape": (samples, classes)}
            np.lib.format.write_array_header_1_0(file, shape)
            for start in range(0, samples, len(rows)):
                file.write(rows[: samples - start].data)
            file.flush()
            os.fsync(file.fileno())  # so that nothing is written while somebody reads
    return paths


def read(paths: Sequence[Path]) -> None:
    """Read all bytes, 4 MiB at a time."""
    buffer = memoryview(bytearray(2**22))
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def scored(
    paths: Sequence[Path],
    *,
    losses: Sequence[str] = ALL,
    backend: str = "numpy",
    device: str | None = None,
    memory: str = "1GB",
    python: str | None = None,
) -> Scored:
    """Run the command; by another interpreter's gklx where one is named."""
    # Each interpreter is to find its own gklx: this one the sources that this process imported.
    env = os.environ | {"PYTHONPATH": "" if python else str(Path(gklx.__file__).parents[1])}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "score.json"
        options = ["--memory", memory, "--work-dir", folder, "--backend", backend, "--format", "json"]
        options += ["--device", device] if device else []
        command = [python or sys.executable, "-c", _COMMAND, "score", *map(str, paths), *options]
        start = timeit.default_timer()
        # From an empty folder: Python looks for modules where it is called first.
        done = subprocess.run(
            [*command, "--output", str(report), "--loss", *losses],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=env,
            cwd=folder,
        )
        taken = timeit.default_timer() - start
        found = json.loads(report.read_text(encoding="utf-8"))
    means = {name: found["losses"][name]["mean"] for name in losses}
    return Scored(taken, int(done.stdout) * 1024, means)


def check(first: Scored, second: Scored) -> None:
    """Two runs on the same files found the same."""
    for name in first.means.keys() & second.means.keys():
        if not abs(first.means[name] - second.means[name]) <= 1e-5 * abs(first.means[name]):
            raise AssertionError(f"mean {name}: {first.means[name]} and {second.means[name]}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--classes", type=int, default=32_000)
    parser.add_argument("--memory", default="1GB")
    parser.add_argument("--backend", nargs="+", default=["numpy", "torch", "jax"])
    parser.add_argument("--folder", type=Path, help="where the dumps go for the time being")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    if options.quick:
        options.gigabytes, options.classes, options.backend = 0.002, 100, ["numpy"]
    loads, rows, runs = [pages.load()], [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        paths = dumps(Path(folder), options.gigabytes, options.classes)
        size = sum(path.stat().st_size for path in paths)
        for backend, losses in itertools.product(options.backend, (ALL, ("kl",))):
            reading = timeit.timeit(lambda: read(paths), number=1)
            found = scored(paths, losses=losses, backend=backend, memory=options.memory)
            runs.append(found)
            check(runs[0], found)
            times = pages.seconds(found.seconds), f"{pages.amount(size / found.seconds)}/s", pages.seconds(reading)
            rows.append([backend, ", ".join(losses), *times, pages.amount(found.peak_bytes)])
    title = f"gklx score on {pages.amount(size)} under {options.memory}"
    loads.append(pages.load())
    lines = pages.heading(title, "python benches/scoring.py", pages.machine(), ("numpy", "torch", "jax"), loads)
    samples = samples_in(options.gigabytes, options.classes)
    lines += [f"{samples:,} samples of {options.classes:,} classes, float16, two `.npy` files. All runs agree.", ""]
    headings = ["backend", "losses", "time", "throughput", "plain read", "peak resident memory"]
    text = "\n".join([*lines, *pages.markdown(headings, rows, right=(2, 3, 4, 5))])
    print(text)
    if not options.quick:
        pages.write(pages.RESULTS / "scoring.md", text)


if __name__ == "__main__":
    main()
