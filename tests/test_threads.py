"""Pieces of work on a few threads: in order, never more threads than allowed, and nothing hidden that went wrong."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import gklx
from backends import BY_NAME
from cases import CASES, call, loss_of, on
from closeness import assert_close
from gklx import _libraries, _threads


@pytest.fixture
def four_cores(monkeypatch):
    for name in ("GKLX_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(_threads, "_cores", lambda: 4)
    monkeypatch.setattr(_threads, "_limited_to", lambda: sys.maxsize)
    _threads._pool.cache_clear()
    yield
    _threads._pool.cache_clear()


def test_results_come_in_order_from_several_threads(four_cores):
    together = threading.Barrier(4, timeout=30)

    def work(piece):
        if piece < 4:
            together.wait()  # passed only if four threads are at it at a time
        return 10 * piece, threading.get_ident()

    found = _threads.each(work, range(50), 4)
    assert [value for value, _ in found] == [10 * piece for piece in range(50)]
    assert len({thread for _, thread in found}) == 4


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_an_exception_comes_out_and_leaves_the_rest_undone(four_cores, workers):
    done = []

    def work(piece):
        if piece == 5:
            raise ZeroDivisionError(piece)
        time.sleep(0.001)
        done.append(piece)

    with pytest.raises(ZeroDivisionError, match="5"):
        _threads.each(work, range(1000), workers)
    time.sleep(0.05)
    assert len(done) < 50


def test_numpy_errors_are_treated_as_in_the_caller(four_cores):
    together = threading.Barrier(4, timeout=30)

    def work(_):
        together.wait()
        return np.geterr()

    with np.errstate(over="ignore", under="raise"):
        found = _threads.each(work, range(4), 4)
    assert {(each["over"], each["under"]) for each in found} == {("ignore", "raise")}


def test_callers_in_many_threads_get_their_own_results(four_cores):
    found = {}

    def caller(k):
        found[k] = _threads.each(lambda piece: k * piece, range(100), 4)

    callers = [threading.Thread(target=caller, args=(k,)) for k in range(8)]
    for each in callers:
        each.start()
    for each in callers:
        each.join()
    assert found == {k: [k * piece for piece in range(100)] for k in range(8)}


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
def test_the_environment_limits_them(four_cores, monkeypatch, environment, threads):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert _threads.threads() == threads


def test_threadpoolctl_limits_them():
    """Asked of the process's own libraries, in a process whose environment says nothing."""
    pytest.importorskip("threadpoolctl", reason="threadpoolctl is not installed")
    program = """
import numpy, threadpoolctl
from gklx import _threads
_threads._cores = lambda: 4
with threadpoolctl.threadpool_limits(limits=1):
    print(_threads.threads())
with threadpoolctl.threadpool_limits(limits=2):
    print(_threads.threads())
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("GKLX_NUM_THREADS", "OMP_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["1", "2"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_has_threads_of_its_own():
    """A pool's threads do not follow into a fork, as PyTorch's data loader makes them; its work would wait for ever."""
    program = """
import os
from gklx import _threads
_threads._cores = lambda: 4
assert _threads.each(abs, range(100), 4) == list(range(100))
child = os.fork()
if child == 0:
    os._exit(0 if _threads.each(abs, range(100), 4) == list(range(100)) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=60)


def test_work_at_the_end_of_a_process_is_done_alone():
    program = """
import atexit
from gklx import _threads
_threads._cores = lambda: 4
atexit.register(lambda: print(_threads.each(abs, range(5), 4)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[0, 1, 2, 3, 4]", "")


@pytest.mark.parametrize("case", [case for case in CASES if case.id in ("kl", "gkl", "gkl-prior")], ids=lambda c: c.id)
@pytest.mark.parametrize("mask", ["none", "samples"])
def test_losses_on_threads_are_the_losses(four_cores, monkeypatch, case, mask):
    s, t, given = on(BY_NAME["numpy"], "float64", *call(case, mask, batch=(40,)))
    outcomes = []
    for block in (2**40, 3 * 7 * 8):
        monkeypatch.setattr(_libraries, "_BLOCK_ON_CPU", block)
        outcomes.append(gklx.value_and_grad(loss_of(case), (0, 1))(s, t, **given))
    (value, gradients), (threaded, of_threads) = outcomes
    assert_close(np.asarray(threaded), value, BY_NAME["numpy"], "float64", ulps=4)
    for one, other in zip(of_threads, gradients, strict=True):
        assert_close(one, other, BY_NAME["numpy"], "float64", ulps=4)
