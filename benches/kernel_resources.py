"""The registers, spills and shared memory of the CUDA kernels on several architectures. No GPU is needed.

    pip install "nvidia-cuda-nvrtc-cu12>=12.8" "nvidia-cuda-nvcc-cu12>=12.8"
    python benches/kernel_resources.py                        # prints the table
    python benches/kernel_resources.py --output benches/results/cuda-kernels.txt

NVRTC compiles each plan to PTX, as on a machine with a GPU. ptxas compiles the PTX and reports the resources.
"""

import argparse
import ctypes
import itertools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pages

from gklx._run import cuda, cuda_launch

ARCHITECTURES = (75, 80, 90, 120)
LOSSES = {
    "KL": ("PROBABILITIES", False),
    "wMSE, weights p": ("PROBABILITIES", True),
    "wMSE, powers of p": ("TEACHER_POWER", True),
    "wMSE, a prior": ("PRIOR_POWER", True),
}
# The C++ types of the arithmetic, of the student's and of the teacher's logits, and the number of logits in a load.
KINDS = (("float", "float", "float", 4), ("float", "Brain", "Brain", 8), ("double", "double", "double", 2))


class Resources(NamedTuple):
    """The resources of one kernel."""

    registers: int
    spilled: int
    """Bytes of registers that are spilled to the thread's local memory."""
    shared: int
    """Bytes of shared memory in a block."""


def nvrtc_library() -> ctypes.CDLL:
    """Load NVRTC from the package nvidia-cuda-nvrtc-cu12."""
    return ctypes.CDLL(str(_packaged("lib/libnvrtc.so*")))


def _packaged(pattern: str) -> Path:
    import nvidia

    found = [path for folder in nvidia.__path__ for path in sorted(Path(folder).glob(f"*/{pattern}"))]
    if not found:
        raise SystemExit(f"{pattern} is not installed: nvidia-cuda-nvrtc-cu12 and nvidia-cuda-nvcc-cu12 have it")
    return found[0]


def ptx_of(nvrtc: ctypes.CDLL, options: cuda_launch.Options, architecture: int) -> bytes:
    """Compile the kernels of a plan to PTX."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    text = cuda_launch.source().encode()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"cuda.cu", 0, None, None) == 0
    given = [f"--gpu-architecture=compute_{architecture}", "--std=c++17", *(f"-D{k}={v}" for k, v in options)]
    pointers = (ctypes.c_char_p * len(given))(*(option.encode() for option in given))
    status = nvrtc.nvrtcCompileProgram(program, len(given), pointers)
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    if status != 0:
        raise RuntimeError(log.value.decode())
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, ptx)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return ptx.value


def resources_of(ptxas: str, ptx: bytes, architecture: int) -> dict[str, Resources]:
    """The resources of each kernel that ptxas reports, by the kernel's name."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernels.ptx"
        source.write_bytes(ptx)
        command = [ptxas, f"--gpu-name=sm_{architecture}", "--verbose", "--output-file", f"{source}.cubin", str(source)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = {}
    for part in re.split(r"Compiling entry function '", report)[1:]:
        name = part.partition("'")[0]
        registers, spilled = (
            int(re.search(pattern, part)[1]) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")
        )
        shared = re.search(r"(\d+) bytes smem", part)
        found[name] = Resources(registers, spilled, int(shared[1]) if shared else 0)
    return found


def rows() -> Iterator[Sequence[str]]:
    """The rows of the table, plan by plan."""
    nvrtc = nvrtc_library()
    ptxas = shutil.which("ptxas") or str(_packaged("bin/ptxas"))
    for (real, student, teacher, vector), (loss, given) in itertools.product(KINDS, LOSSES.items()):
        plan = cuda.Plan(real, student, teacher, *given, vector, 256, 1)
        columns = [
            resources_of(ptxas, ptx_of(nvrtc, plan.options, architecture), architecture)
            for architecture in ARCHITECTURES
        ]
        for name in ("statistics", "gradients"):
            yield (
                name,
                student,
                loss,
                *(f"{column[name].registers} / {column[name].spilled}" for column in columns),
                f"{columns[-1][name].shared:,}",
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    headings = [
        "kernel",
        "logits",
        "loss",
        *(f"sm_{architecture}" for architecture in ARCHITECTURES),
        "shared memory",
    ]
    lines = [
        "# The CUDA kernels: registers of a thread / bytes spilled, and bytes of shared memory of a block",
        "",
        f"NVRTC {major.value}.{minor.value}, blocks of {cuda_launch.THREADS} threads. "
        "Made by `python benches/kernel_resources.py --output benches/results/cuda-kernels.txt`.",
        "",
        *pages.markdown(headings, rows(), right=(3, 4, 5, 6, 7)),
    ]
    print("\n".join(lines))
    if options.output:
        pages.write(options.output, "\n".join(lines))


if __name__ == "__main__":
    main()
