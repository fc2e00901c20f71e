"""The threads of the row kernel: how many, whose, and that they do not change results."""

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest

import backends
import gklx
from cases import CASES, call, loss_of
from gklx._run import cpu, cpu_library


@pytest.fixture
def four_cores(monkeypatch):
    for name in ("GKLX_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cpu_library, "_cores", lambda: 4)
    monkeypatch.setattr(cpu_library, "_limited_to", lambda: sys.maxsize)


@pytest.fixture
def threads_of_calls(monkeypatch):
    """The number of threads allowed in each call of the kernel; every batch is large enough for several."""
    backends.run_on("kernel", "numpy", monkeypatch)
    allowed, run = [], cpu_library.run
    monkeypatch.setattr(cpu, "_ONE_THREAD", 1)
    monkeypatch.setattr(cpu_library, "run", lambda request: allowed.append(request.threads) or run(request))
    return allowed


def run_alone(program):
    """The output of a program in a process whose environment does not limit threads."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GKLX_NUM_THREADS", "OMP_NUM_THREADS")}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, 4),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "2,1"}, 2),
        ({"OMP_NUM_THREADS": "3", "GKLX_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "1", "GKLX_NUM_THREADS": "2"}, 2),
        ({"GKLX_NUM_THREADS": "64"}, 4),
        ({"GKLX_NUM_THREADS": "0"}, 1),
        ({"GKLX_NUM_THREADS": "many"}, 4),
    ],
)
def test_environment_limits_the_threads(four_cores, monkeypatch, environment, threads):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cpu_library.threads() == threads


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
def test_affinity_limits_the_threads():
    program = """
import os
from gklx._run import cpu_library
allowed = sorted(os.sched_getaffinity(0))
print(cpu_library.threads() == len(allowed))
os.sched_setaffinity(0, allowed[:1])
print(cpu_library.threads())
"""
    assert run_alone(program) == ["True", "1"]


def test_threadpoolctl_limits_the_threads():
    """The limit is that of the libraries which the process has loaded."""
    pytest.importorskip("threadpoolctl", reason="threadpoolctl is not installed")
    program = """
import numpy, threadpoolctl
from gklx._run import cpu_library
cpu_library._cores = lambda: 4
with threadpoolctl.threadpool_limits(limits=1):
    print(cpu_library.threads())
with threadpoolctl.threadpool_limits(limits=2):
    print(cpu_library.threads())
"""
    assert run_alone(program) == ["1", "2"]


def test_numpy_calls_use_the_limit(four_cores, threads_of_calls, monkeypatch):
    s, t, _ = call(CASES[0], "none")
    gklx.gkl(s, t)
    monkeypatch.setenv("GKLX_NUM_THREADS", "3")
    gklx.grad(gklx.gkl)(s, t)
    assert threads_of_calls == [4, 3]


@pytest.mark.parametrize("threads", [1, 3])
def test_pytorch_calls_use_pytorchs_setting(threads_of_calls, monkeypatch, threads):
    """In the forward pass, and in the backward pass, which computes half-precision gradients."""
    backends.needs("torch")
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("GKLX_NUM_THREADS", "2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    s, t = torch.randn(2, 8, 7).bfloat16()
    gklx.gkl(s.requires_grad_(), t).backward()
    assert threads_of_calls == [threads] * 2


def test_small_batch_uses_one_thread(four_cores, monkeypatch):
    backends.run_on("kernel", "numpy", monkeypatch)
    allowed, run = [], cpu_library.run
    monkeypatch.setattr(cpu_library, "run", lambda request: allowed.append(request.threads) or run(request))
    for samples in (10, 2000):
        gklx.kl(np.zeros((samples, 100)), np.zeros((samples, 100)))
    assert allowed == [1, 4]


@pytest.mark.numpy_alone
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("mask", ["none", "elements", "samples"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_results_do_not_depend_on_the_number_of_threads(threads_of_calls, monkeypatch, case, mask, dtype):
    """Bit for bit: value and gradients of 301 samples, which no number of threads divides evenly."""
    s, t, given = call(case, mask, batch=(301,))
    s, t = s.astype(dtype), t.astype(dtype)
    found = []
    for threads in (1, 2, 3, 8):
        monkeypatch.setattr(cpu_library, "_cores", lambda threads=threads: threads)
        monkeypatch.setenv("GKLX_NUM_THREADS", str(threads))
        monkeypatch.setattr(cpu_library, "_limited_to", lambda: sys.maxsize)
        value, gradients = gklx.value_and_grad(loss_of(case), (0, 1))(s, t, **given)
        found.append([np.asarray(value).tobytes(), *(x.tobytes() for x in gradients)])
    assert threads_of_calls == [1, 2, 3, 8]
    assert all(each == found[0] for each in found)


def on_threads_of_pytorch(count):
    """The bytes of value and gradients of a batch that is large enough for so many threads."""
    import torch

    s, t = np.random.default_rng(0).standard_normal((2, 4001, 100))
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        value, gradients = gklx.value_and_grad(gklx.gkl, (0, 1))(torch.from_numpy(s), torch.from_numpy(t))
    finally:
        torch.set_num_threads(before)
    return [x.numpy().tobytes() for x in (value, *gradients)]


def test_pytorch_runs_the_kernel_on_its_own_threads(monkeypatch):
    """Bit for bit as on one thread."""
    backends.needs("torch")
    backends.run_on("kernel", "torch", monkeypatch)
    import torch

    loops, run = [], cpu_library.run
    monkeypatch.setattr(cpu_library, "run", lambda request: loops.append(bool(request.parallel_for)) or run(request))
    of_one, of_two, of_three = map(on_threads_of_pytorch, (1, 2, 3))
    assert of_one == of_two == of_three
    has_one = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
    assert loops == [False, has_one, has_one]


def test_the_kernel_starts_threads_where_the_library_lends_none(monkeypatch):
    """A loop that fails has done nothing."""
    backends.needs("torch")
    backends.run_on("kernel", "torch", monkeypatch)
    expected, asked = on_threads_of_pytorch(1), []

    @ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
    def failing(begin, end, grain, work, context):
        asked.append((begin, end, grain))
        return 1

    host = cpu._HOSTS["torch"]._replace(parallel_for=lambda: ctypes.cast(failing, ctypes.c_void_p).value)
    monkeypatch.setitem(cpu._HOSTS, "torch", host)
    assert on_threads_of_pytorch(3) == expected
    assert asked == [(0, 3, 1)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize(
    ("library", "arrays"),
    [
        ("numpy", "cpu_library._cores = lambda: 4; s, t = np.random.default_rng(0).standard_normal((2, 4000, 100))"),
        ("torch", "import torch; torch.set_num_threads(2); s, t = torch.randn(2, 4000, 100)"),
    ],
    ids=["numpy", "torch"],
)
def test_forked_process_starts_its_own_threads(monkeypatch, library, arrays):
    """A fork, such as a worker of PyTorch's data loader, does not inherit the threads of its parent.

    PyTorch's own loop would wait for them forever.
    """
    if library == "torch":
        backends.needs("torch")
    backends.run_on("kernel", library, monkeypatch)
    program = f"""
import os
import numpy as np
import gklx
from gklx._run import cpu_library
{arrays}
own = gklx.value_and_grad(gklx.gkl)(s, t)
child = os.fork()
if child == 0:
    found = gklx.value_and_grad(gklx.gkl)(s, t)
    same = all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(found, own, strict=True))
    os._exit(0 if same else 1)
print(os.waitpid(child, 0)[1])
"""
    assert run_alone(program) == ["0"]


def test_callers_in_many_threads_get_their_own_results(four_cores, threads_of_calls):
    from concurrent.futures import ThreadPoolExecutor

    s, t = np.random.default_rng(0).standard_normal((2, 500, 20))
    expected = [gklx.grad(gklx.gkl)(k * s, t).tobytes() for k in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda k: gklx.grad(gklx.gkl)(k * s, t).tobytes(), range(8)))
    assert found == expected


def test_loss_can_be_computed_at_exit(monkeypatch):
    backends.run_on("kernel", "numpy", monkeypatch)
    program = """
import atexit
import numpy as np
import gklx
from gklx._run import cpu_library
cpu_library._cores = lambda: 4
s = np.zeros((4000, 100))
atexit.register(lambda: print(float(gklx.kl(s, s))))
"""
    assert run_alone(program) == ["0.0"]
