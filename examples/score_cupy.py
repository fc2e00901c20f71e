"""Score a student's logits against a teacher's on a CUDA GPU with CuPy, as `gklx score --backend cupy` does.

    python examples/score_cupy.py student.npy teacher.npy

The files are [samples, classes], float16 or float32, of any size: rows are copied to the GPU in blocks, through
page-locked memory.
"""

import sys

import cupy as cp
import cupyx
import numpy as np

import gklx


def main(student_path: str, teacher_path: str, block_bytes: int = 2**28) -> None:
    """Print mean, standard error, median and 99th percentile of KL and GKL, and the top-1 agreement."""
    student, teacher = (np.load(path, mmap_mode="r") for path in (student_path, teacher_path))
    samples, classes = student.shape
    rows = max(1, block_bytes // (4 * classes))
    hosts = [cupyx.empty_pinned((rows, classes), dtype=np.float32) for _ in range(2)]
    found: dict[str, list[cp.ndarray]] = {"kl": [], "gkl": [], "agrees": []}
    for start in range(0, samples, rows):
        blocks = []
        for host, file in zip(hosts, (student, teacher), strict=True):
            count = min(rows, samples - start)
            host[:count] = file[start : start + count]
            blocks.append(cp.empty((count, classes), dtype=cp.float32))
            blocks[-1].set(host[:count])
        found["kl"].append(gklx.kl(*blocks, reduction="none"))
        found["gkl"].append(gklx.gkl(*blocks, reduction="none"))  # with gamma = 1 there is no normaliser over the file
        found["agrees"].append(cp.argmax(blocks[0], axis=-1) == cp.argmax(blocks[1], axis=-1))
    values = {name: cp.concatenate(parts).astype(cp.float64) for name, parts in found.items()}
    for name in ("kl", "gkl"):
        x = values[name]
        median, p99 = (float(q) for q in cp.quantile(x, cp.asarray([0.5, 0.99])))
        error = float(x.std(ddof=1)) / samples**0.5
        print(f"{name:4} mean {float(x.mean()):.6f} ± {error:.6f}  median {median:.6f}  99 % {p99:.6f}")
    print(f"top-1 agreement {float(values['agrees'].mean()):.2%} of {samples:,} samples")


if __name__ == "__main__":
    main(*sys.argv[1:])
