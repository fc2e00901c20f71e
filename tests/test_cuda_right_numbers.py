"""The tests of extreme numbers once more, with the CUDA kernels on a CPU in the place of its own kernel."""

import inspect
from functools import partial

import pytest

import test_right_numbers
from gklx._run import cuda, dispatch
from test_cuda_rows import on_cpu  # noqa: F401, a fixture

pytestmark = pytest.mark.cuda_kernels
ONLY_ON = ("numpy",)
globals().update(
    {
        name: test
        for name, test in vars(test_right_numbers).items()
        if name.startswith("test_") and "backend" in inspect.signature(test).parameters
    }
)


@pytest.fixture(autouse=True)
def cuda_kernels(on_cpu, monkeypatch):  # noqa: F811
    def serves(call):
        return type(call.arrays.student).__module__ == "numpy" and call.arrays.student.size > 0

    monkeypatch.setattr(dispatch.cpu, "serves", serves)
    monkeypatch.setattr(dispatch.cpu, "evaluate", partial(cuda.evaluate, device=on_cpu))
