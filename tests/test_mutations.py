"""The tests fail on wrong formulas and on a wrong kernel: a sample of the mutants of `nox -s mutations`."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import backends

pytestmark = [pytest.mark.library_independent, pytest.mark.version_independent]

SAMPLES = {"formulas": 20, "kernel": 8}


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each mutant lives in a fork")
@pytest.mark.parametrize("execution", SAMPLES)
def test_mutants_are_detected(execution, tmp_path):
    if execution == "kernel":
        backends.needs_kernel()
        if shutil.which(os.environ.get("CXX", "c++")) is None:
            pytest.skip("no C++ compiler")
    program = pathlib.Path(__file__).parent / "mutants.py"
    command = [sys.executable, str(program), execution, "--sample", str(SAMPLES[execution])]
    environment = {**os.environ, "GKLX_BACKENDS": "numpy", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=program.parent.parent
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert f"{SAMPLES[execution]} mutants" in done.stdout
