"""Checks an installed gklx: `python check_install.py kernel`, or `pure` for one without the kernel.

`nox -s package` and cibuildwheel run it, where gklx, NumPy and array-api-compat are installed and nothing else.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

import gklx
from gklx._run import cpu_library


def main(kind: str) -> None:
    """Exit with an error if a part is missing or a result is wrong."""
    package = Path(gklx.__file__).parent
    sources = Path(__file__).resolve().parents[1] / "src"
    assert sources not in package.parents, f"{package} is the source tree, not an installation"
    assert gklx.__version__ == version("gklx")
    for name in ("py.typed", "_kernels/row.h", "_kernels/cpu.cpp", "_kernels/jax_ffi.cpp", "_kernels/cuda.cu"):
        assert (package / name).is_file(), f"{name} is missing"
    found = cpu_library.instruction_set()
    assert (found is None) == (kind == "pure"), f"{kind}, instruction set {found}"
    student, teacher = np.zeros((1, 2)), np.log([[0.25, 0.75]])
    value, (to_student, to_teacher) = gklx.value_and_grad(gklx.kl, (0, 1))(student, teacher)
    np.testing.assert_allclose(value, 0.25 * np.log(0.5) + 0.75 * np.log(1.5), rtol=1e-13)
    np.testing.assert_allclose(to_student, [[0.25, -0.25]], rtol=1e-13)
    np.testing.assert_allclose(to_teacher, [[-0.1875 * np.log(3), 0.1875 * np.log(3)]], rtol=1e-13)
    print(f"{package}: instruction set {found}, KL {value:.6f}")


if __name__ == "__main__":
    main(sys.argv[1])
