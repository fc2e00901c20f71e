"""A run of `gklx score` that is spread over a Dask cluster: the numbers are those of one process."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import numpy as np
import pytest

import backends
import gklx
from dumps import CLASSES, command, save_dumps
from gklx._scoring import pools


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save_dumps(tmp_path_factory.mktemp("logits"))


@pytest.fixture(scope="module")
def scheduler():
    backends.needs("dask")
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", memory_limit=0) as cluster:
        yield cluster.scheduler_address


@pytest.mark.parametrize("labelled", [False, True])
def test_cluster_gives_the_same_numbers(files, scheduler, labelled):
    labels = files[2] if labelled else None
    found = gklx.score(*files[:2], labels, backend="dask", scheduler=scheduler, batch_size=100, gamma=0.5)
    assert (found.backend, found.device) == ("dask", "2 workers")
    here = gklx.score(*files[:2], labels, batch_size=100, gamma=0.5)
    assert found._replace(backend="numpy", device="cpu") == here


def test_command_scores_shards_on_a_cluster(files, scheduler, tmp_path):
    for name, path in zip(("s", "t"), files, strict=False):
        for i, shard in enumerate(np.array_split(np.load(path), 11)):
            np.save(tmp_path / f"{name}-{i}.npy", shard)
    done = command(
        tmp_path / "s-*.npy", tmp_path / "t-*.npy", "--backend", "dask", "--scheduler", scheduler, "--format", "json"
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["losses"]["gkl"]["mean"] == pytest.approx(gklx.score(*files[:2]).losses["gkl"].mean, rel=1e-6)


def test_error_on_a_worker_is_one_line(files, scheduler, tmp_path):
    labels = np.load(files[2])
    labels[2222] = CLASSES
    np.save(tmp_path / "y.npy", labels)
    done = command(*files[:2], "--labels", tmp_path / "y.npy", "--backend", "dask", "--scheduler", scheduler)
    assert (done.returncode, done.stdout) == (2, "")
    message = f"gklx: error: {tmp_path / 'y.npy'}: labels must lie in [0, {CLASSES}), got {CLASSES} at sample 2222\n"
    assert done.stderr == message


def test_error_on_a_worker_of_the_own_cluster_is_one_line(files, tmp_path):
    backends.needs("dask")
    pytest.importorskip("distributed")
    labels = np.load(files[2])
    labels[5] = -100
    np.save(tmp_path / "y.npy", labels)
    done = command(*files[:2], "--labels", tmp_path / "y.npy", "--backend", "dask")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"gklx: error: {tmp_path / 'y.npy'}: labels must lie in [0, {CLASSES}), got -100")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_interrupted_cluster_is_one_line(files, tmp_path):
    backends.needs("dask")
    pytest.importorskip("distributed")
    code = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may inherit it ignored\n"
        "import gklx._scoring.run as run, gklx._cli as cli\n"
        "run.scored = lambda *args: (os.kill(os.getpid(), signal.SIGINT), time.sleep(1))\n"
        "sys.exit(cli.main())\n"
    )
    argv = ["score", *files[:2], "--backend", "dask", "--work-dir", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False, timeout=60)
    line = "gklx: interrupted after 0 of 3,000 samples; the same command goes on from there\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", line)


@pytest.mark.parametrize("address", ["foo", "foo://127.0.0.1:1", "tls://127.0.0.1:1"])
def test_address_of_no_scheduler_is_refused_at_once(files, tmp_path, address):
    backends.needs("dask")
    pytest.importorskip("distributed")
    start = time.monotonic()
    done = command(*files[:2], "--backend", "dask", "--scheduler", address)
    assert time.monotonic() - start < 15
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"gklx: error: scheduler {address}: no Dask scheduler answers there (")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [(b"", "nothing within 1 s"), (b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(64), "what answers is something else")],
)
def test_socket_of_no_scheduler_is_refused(files, monkeypatch, greeting, reason):
    """One that says nothing, and one of another protocol; a dashboard's, say."""
    backends.needs("dask")
    pytest.importorskip("distributed")
    monkeypatch.setattr(pools, "_TIMEOUT", 1)
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as executor:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        asked = executor.submit(gklx.score, *files[:2], backend="dask", scheduler=address)
        connection, _ = server.accept()
        with connection:
            connection.sendall(greeting)
            with pytest.raises(
                ValueError, match=rf"^scheduler {address}: no Dask scheduler answers there \({reason}\)$"
            ):
                asked.result(timeout=30)


@pytest.mark.parametrize("address", ["foo", "tcp://127.0.0.1:1"])
def test_address_is_tried_within_an_event_loop(files, monkeypatch, address):
    """As a notebook has one."""
    backends.needs("dask")
    pytest.importorskip("distributed")
    monkeypatch.setattr(pools, "_TIMEOUT", 1)

    async def score():
        return gklx.score(*files[:2], backend="dask", scheduler=address)

    with pytest.raises(ValueError, match="no Dask scheduler answers there"):
        asyncio.run(score())


def test_scheduler_needs_the_dask_backend():
    backends.needs("dask")
    pytest.importorskip("distributed")
    done = command("a.npy", "b.npy", "--scheduler", "tcp://127.0.0.1:1")
    assert done.stderr == "gklx: error: scheduler needs backend \"dask\", got 'numpy'\n"


class Unanswered(Executor):
    """Its tasks never end; or they are cancelled, as those of a client that loses its scheduler may be."""

    def __init__(self, cancelled):
        self.cancelled = cancelled

    def submit(self, f, /, *args, **kwargs):
        future = Future()
        if self.cancelled:
            future.cancel()
        return future


@pytest.mark.parametrize("cancelled", [True, False])
def test_lost_connection_ends_the_run(cancelled, monkeypatch):
    monkeypatch.setattr(pools, "_POLL_INTERVAL", 0.01)
    looks = iter([False] * 5 + [True] * 99)
    pool = pools.Pool(Unanswered(cancelled), 1, None, None, "dask", "1 worker", lambda: next(looks))
    with pytest.raises(ConnectionError, match=r"^the connection to the Dask scheduler was lost$"):
        list(pool.in_order(print, [(1,), (2,)]))
    assert cancelled or next(looks)


def test_slow_task_is_awaited_and_its_own_timeout_is_raised(monkeypatch):
    monkeypatch.setattr(pools, "_POLL_INTERVAL", 0.01)

    def slow(place, x):
        time.sleep(0.05)
        if x == 2:
            raise TimeoutError("its own")
        return x

    with ThreadPoolExecutor(1) as executor:
        found = pools.Pool(executor, 1, None, None, "numpy", "cpu").in_order(slow, [(1,), (2,)])
        assert next(found) == 1
        with pytest.raises(TimeoutError, match="its own"):
            next(found)
