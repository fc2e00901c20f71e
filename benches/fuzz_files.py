"""Fuzz `gklx score` with damaged files, kills and rewritten inputs: the result must be right, or one line of error.

Each case has its own seed, which a finding prints; `--cases 1` with that seed repeats the case. The exit status is 1 if
there was a finding.

    python benches/fuzz_files.py --seconds 60
    python benches/fuzz_files.py --seed 1234 --cases 1
"""

import argparse
import contextlib
import faulthandler
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = 7
COMMAND = [sys.executable, "-m", "gklx", "score"]
FORMATS = ("npy", "fortran", "npz", "packed", "packed fortran", "shards", "safetensors", "zarr 2", "zarr 3")
SECONDS_A_CASE = 120


def save(folder: Path, name: str, kind: str, x: Any) -> tuple[str, list[Path]]:
    """Save an array; return the name by which the command opens it, and its files."""
    path = folder / f"{name}.{kind.split()[0]}"
    if kind in ("npy", "fortran", "shards"):
        pieces = np.array_split(x, 3) if kind == "shards" else [x]
        paths = [folder / f"{name}-{i}.npy" for i in range(len(pieces))]
        for path, piece in zip(paths, pieces, strict=True):
            np.save(path, np.asfortranarray(piece) if kind == "fortran" else piece)
        return str(folder / f"{name}-*.npy"), paths
    if kind in ("npz", "packed", "packed fortran"):
        path = folder / f"{name}.npz"
        (np.savez if kind == "npz" else np.savez_compressed)(path, x=np.asfortranarray(x) if "fortran" in kind else x)
    elif kind == "safetensors":
        from safetensors.numpy import save_file

        save_file({"x": x}, path)
    else:
        import zarr

        group = zarr.open_group(path, mode="w", zarr_format=int(kind[-1]))
        group.create_array("x", shape=x.shape, dtype=x.dtype, chunks=tuple(max(1, size // 2) for size in x.shape))[
            ...
        ] = x
        return str(path), [path for path in path.rglob("*") if path.is_file()]
    return str(path), [path]


def read(name: str, kind: str) -> Any:
    """Read the array by the format's own library, which may raise any exception."""
    if kind in ("npy", "fortran", "shards"):
        folder = Path(name).parent
        return np.concatenate([np.load(path) for path in sorted(folder.glob(Path(name).name))])
    if kind in ("npz", "packed", "packed fortran"):
        with np.load(name) as archive:
            return archive[archive.files[0]]
    if kind == "safetensors":
        from safetensors.numpy import load_file

        (x,) = load_file(name).values()
        return x
    import zarr

    (x,) = [
        member for _, member in zarr.open_group(name, mode="r").members(max_depth=None) if hasattr(member, "chunks")
    ]
    return x[...]


def damage(rng: random.Random, content: bytearray) -> bytearray:
    """Damage the content at random: cut it, flip a bit, overwrite, repeat, remove or append bytes, or change digits."""
    size = len(content)
    a, b = sorted(rng.randrange(size + 1) for _ in range(2))
    if rng.random() < 0.5:  # half of the damage goes to the header, which is small and whose errors vary most
        a, b = min(a, rng.randrange(300)), min(b, a + rng.randrange(40))
        b = max(a, b)
    kind = rng.choice(["cut", "flip", "zero", "double", "random", "remove", "append", "digit"])
    if kind == "cut":
        return content[:a]
    if kind == "flip" and size:
        content[min(a, size - 1)] ^= 1 << rng.randrange(8)
    elif kind == "zero":
        content[a:b] = bytes(b - a)
    elif kind == "double":
        content[b:b] = content[a:b]
    elif kind == "random":
        content[a:b] = rng.randbytes(b - a)
    elif kind == "remove":
        del content[a:b]
    elif kind == "append":
        content += rng.randbytes(b - a)
    else:  # digits of a shape, an offset or a version
        digits = [i for i, byte in enumerate(content[:2000]) if chr(byte).isdigit()]
        for i in rng.sample(digits, min(len(digits), 2)):
            content[i] = ord(rng.choice("0123456789-e."))
    return content


def expected(s: Any, t: Any) -> tuple[int, float, float]:
    """The number of scored samples, the mean KL and the top-1 agreement, by the definitions in float64."""
    with np.errstate(all="ignore"):
        s, t = (np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in (s, t))
        log_q, log_p = (x - x.max(-1, keepdims=True) for x in (s, t))
        log_q, log_p = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (log_q, log_p))
        kl = np.where(np.exp(log_p) > 0, np.exp(log_p) * (log_p - log_q), 0).sum(-1)
    is_finite = np.isfinite(s).all(-1) & np.isfinite(t).all(-1)
    agree = s.argmax(-1) == t.argmax(-1)
    return int(is_finite.sum()), float(kl[is_finite].mean()), float(agree[is_finite].mean())


def output_fault(status: int, out: str, err: str) -> str | None:
    """What is wrong with a run's output, whatever its input: a traceback, a status, many lines of error; or None."""
    if "Traceback" in err or "Traceback" in out:
        return f"a traceback: {err.strip().splitlines()[-1]}"
    if status not in (0, 2):
        return f"status {status}: {err.strip()[-300:]}"
    lines = err.splitlines()
    if status == 2 and (out or len(lines) != 1 or not lines[0].startswith("gklx: error: ") or len(lines[0]) > 2100):
        return f"no single line of error: {out[:100]!r} {err[:300]!r}"
    return None


def damaged_file(rng: random.Random, folder: Path) -> str | None:
    """Damage one file: the command must refuse it, or read the values that the format's own library reads."""
    from gklx._cli import main

    numbers = np.random.default_rng(rng.randrange(2**32))
    shape = rng.choice([(40, CLASSES), (5, 8, CLASSES)])
    dtype = rng.choice(["float16", "float32", "float64"])
    kind, other = rng.choice(FORMATS), rng.choice(FORMATS)
    arrays = [(numbers.standard_normal(shape) * 3).astype(dtype) for _ in range(2)]
    (s, paths), (t, _) = save(folder, "s", kind, arrays[0]), save(folder, "t", other, arrays[1])
    path = rng.choice(paths)
    path.write_bytes(damage(rng, bytearray(path.read_bytes())))
    argv = ["score", s, t, "--loss", "kl", "--format", "json", "--work-dir", str(folder / "work")]
    argv += ["--batch-size", str(rng.choice([1, 7, 100]))]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(argv)
    what = f"{kind}, {path.name} damaged"
    if fault := output_fault(status, out.getvalue(), err.getvalue()):
        return f"{what}: {fault}"
    # Zarr's chunks have no checksum, and for a damaged chunk Zarr may return uninitialised memory.
    if status != 0 or (kind.startswith("zarr") and "zarr" not in path.name and not path.name.startswith(".z")):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = read(s, kind)
    except Exception as error:
        return f"{what}: scored, though its own library says {type(error).__name__}: {str(error)[:200]}"
    found = json.loads(out.getvalue())
    samples, mean, agreement = expected(x, arrays[1])
    if found["undefined"] or found["losses"]["kl"]["infinite"] or np.abs(x.astype(np.float64)).max() > 1e30:
        return None
    if (found["samples"], found["top1_agreement"]) != (samples, agreement):
        return f"{what}: {found['samples']} samples, {found['top1_agreement']} agree: not {samples}, {agreement}"
    error = abs(found["losses"]["kl"]["mean"] - mean)
    return None if error <= 1e-4 * mean else f"{what}: a mean of {found['losses']['kl']['mean']}, not {mean}"


def new_job(rng: random.Random, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """The command of a run that takes some tenths of a second, and its result without a disturbance."""
    numbers = np.random.default_rng(rng.randrange(2**32))
    names = [save(folder, name, rng.choice(FORMATS), numbers.standard_normal((1500, 60)))[0] for name in "st"]
    np.save(folder / "y.npy", numbers.integers(0, 60, 1500))
    argv = [*COMMAND, *names, "--format", "json", "--batch-size", "2"]
    argv += ["--labels", str(folder / "y.npy")] if rng.random() < 0.5 else []
    done = subprocess.run([*argv, "--work-dir", str(folder / "alone")], capture_output=True, text=True, check=True)
    return [*argv, "--work-dir", str(folder / "work")], json.loads(done.stdout)


def killed(rng: random.Random, folder: Path) -> str | None:
    """Kill the run a few times and sometimes damage its progress: the last run must give the undisturbed result."""
    argv, right = new_job(rng, folder)
    for _ in range(rng.randrange(1, 4)):
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.3, 2.5))
            process.kill()
        work_files = [path for path in (folder / "work").rglob("*") if path.is_file()]
        if work_files and rng.random() < 0.5:
            path = rng.choice(work_files)
            path.write_bytes(damage(rng, bytearray(path.read_bytes())))
    return fault_of(subprocess.run(argv, capture_output=True, text=True, check=False), [right], "after kills")


def together(rng: random.Random, folder: Path) -> str | None:
    """Start several runs of one job at random times: each must give the right result and leave no file."""
    argv, right = new_job(rng, folder)
    started = []
    for _ in range(3):
        started.append(subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        time.sleep(rng.uniform(0, 1))
    for process in started:
        out, err = process.communicate()
        done = subprocess.CompletedProcess(argv, process.returncode, out, err)
        if fault := fault_of(done, [right], "of several runs at once"):
            return fault
    left = list((folder / "work").iterdir())
    return f"several runs at once leave {left[0].name}" if left else None


def rewritten(rng: random.Random, folder: Path) -> str | None:
    """Rewrite an input during the run: the result must be that of the old or the new numbers or an error, not a mix."""
    argv, right = new_job(rng, folder)
    path = rng.choice([path for path in folder.rglob("*") if path.is_file() and path.name.startswith("s")])
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(rng.uniform(0.2, 2))
        content = bytearray(path.read_bytes())
        content[-3000:-2000] = content[-2000:-1000]
        path.write_bytes(content)
        out, err = process.communicate()
    done = subprocess.CompletedProcess(argv, process.returncode, out, err)
    if fault := fault_of(done, None, "an input rewritten"):
        return fault
    if done.returncode:
        return None
    again = subprocess.run(argv, capture_output=True, text=True, check=False)
    new = [] if again.returncode else [json.loads(again.stdout)]
    return fault_of(done, [right, *new], "an input rewritten")


def fault_of(done: "subprocess.CompletedProcess[str]", right: list[Any] | None, what: str) -> str | None:
    """What is wrong with a run, or None; where `right` is given, the run must succeed with one of these results."""
    if fault := output_fault(done.returncode, done.stdout, done.stderr):
        return f"{what}: {fault}"
    if right is None:
        return None
    if done.returncode:
        return f"{what}: {done.stderr.strip()}"
    found = json.loads(done.stdout)
    return None if found in right else f"{what}: {found['losses']} is not {right[0]['losses']}"


def case(seed: int) -> str | None:
    """Run one case; return what is wrong, or None."""
    rng = random.Random(seed)
    kinds: list[Callable[[random.Random, Path], str | None]] = [damaged_file] * 97 + [killed, together, rewritten]
    kind = rng.choice(kinds)
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as folder:
        try:
            return kind(rng, Path(folder))
        except Exception:
            return " ".join(traceback.format_exc().split())[-600:]


def main() -> int:
    """Run cases until the time is over; the exit status is 1 if there was a finding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument("--cases", type=int, default=10**9, help="the largest number of cases")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    end, count, findings = time.monotonic() + arguments.seconds, 0, 0
    pool = ProcessPoolExecutor(1)
    while count < arguments.cases and (count == 0 or time.monotonic() < end):
        seed = arguments.seed + count
        try:
            found = pool.submit(case, seed).result(SECONDS_A_CASE)
        except Exception as error:  # the process died or hangs
            found = f"{type(error).__name__} {error}"
            for process in list(pool._processes.values()):
                process.kill()
            pool = ProcessPoolExecutor(1)
        if found:
            findings += 1
            print(f"--seed {seed} --cases 1: {' '.join(found.split())}", flush=True)
        count += 1
    pool.shutdown()
    print(f"{count} cases, {findings} findings")
    return int(findings > 0)


if __name__ == "__main__":
    os.environ["XDG_CACHE_HOME"] = tempfile.gettempdir()
    sys.exit(main())
