"""Dumps of logits, and `gklx score` on them in a separate process."""

import subprocess
import sys

import numpy as np

SAMPLES, CLASSES = 3000, 200
COMMAND = (sys.executable, "-m", "gklx", "score")


def save_dumps(folder):
    """Save the student's and the teacher's logits and labels; return their paths."""
    rng = np.random.default_rng(3)
    paths = [str(folder / f"{name}.npy") for name in ("student", "teacher", "labels")]
    for path in paths[:2]:
        np.save(path, rng.standard_normal((SAMPLES, CLASSES), dtype=np.float32) * 3)
    np.save(paths[2], rng.integers(0, CLASSES, SAMPLES))
    return paths


def command(*argv, **kwargs):
    return subprocess.run(
        [*COMMAND, *map(str, argv)], capture_output=True, text=True, check=False, timeout=120, **kwargs
    )
