"""`gklx score` on files larger than its memory bound: time, and peak memory as the operating system counts it.

The script generates two float16 dumps, and scores them with the command under a bound on its memory, on each backend in
a separate process. Each run is compared with a plain sequential read of the same two files. Both may use the page
cache, which helps little where the dumps are larger than the free memory.

    python benches/scoring.py                        # 20 GB under 1 GB, writes to benches/results/; minutes
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
# Runs the command and prints Linux' peak of its memory; `ru_maxrss` would start from the peak of the parent process.
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
    """The number of rows of each of the two dumps."""
    return max(1, int(gigabytes * 1e9 / 2 / (2 * classes)))


def dumps(folder: Path, gigabytes: float, classes: int) -> list[Path]:
    """Write the student's and the teacher's dump: 256 random rows, repeated, since values do not affect the time."""
    samples, paths = samples_in(gigabytes, classes), [folder / "student.npy", folder / "teacher.npy"]
    for seed, path in enumerate(paths):
        rows = (np.random.default_rng(seed).standard_normal((256, classes), dtype=np.float32) * 3).astype(np.float16)
        with open(path, "wb") as file:
            shape = {"descr": "<f2", "fortran_order": False, "shape": (samples, classes)}
            np.lib.format.write_array_header_1_0(file, shape)
            for start in range(0, samples, len(rows)):
                file.write(rows[: samples - start].data)
            file.flush()
            os.fsync(file.fileno())  # so that no write is pending while the file is read
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
    """Run the command, with the gklx of the interpreter `python` where it is given."""
    # This interpreter imports the sources of this process' gklx, another one the gklx that it has installed.
    env = os.environ | {"PYTHONPATH": "" if python else str(Path(gklx.__file__).parents[1])}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "score.json"
        options = ["--memory", memory, "--work-dir", folder, "--backend", backend, "--format", "json"]
        options += ["--device", device] if device else []
        command = [python or sys.executable, "-c", _COMMAND, "score", *map(str, paths), *options]
        start = timeit.default_timer()
        # In an empty folder, since Python would import modules of the working folder first.
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
    """Raise AssertionError where the mean losses of two runs on the same files differ."""
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
    parser.add_argument("--folder", type=Path, help="folder of the temporary dumps")
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
