"""Runs a test on every selected backend, and in every dtype that the backend is tested in."""

import contextlib
import os
import zlib

import pytest
from hypothesis import HealthCheck, settings

import backends
from cases import Case
from gklx._run import cuda_launch

# Eight virtual CPU devices for JAX, which reads this when it starts; the other libraries ignore it.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {backends.EIGHT_DEVICES}".strip()

settings.register_profile(
    "gklx",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("gklx")


def pytest_configure():
    """On a GPU the tests share one cache of compiled kernels: chosen before `own_cache` gives each test a folder."""
    if backends.ON_GPU:
        with contextlib.suppress(ImportError):
            cuda_launch._program_cache()


def pytest_generate_tests(metafunc):
    if "backend" not in metafunc.fixturenames:
        return
    chosen = [each for each in backends.BACKENDS if not backends.REQUIRED or each.library.backend in backends.REQUIRED]
    if hasattr(metafunc.module, "ONLY_ON"):  # the names of the backends that the module's tests are for
        chosen = [each for each in chosen if each.name in metafunc.module.ONLY_ON]
    if "dtype" in metafunc.fixturenames:
        pairs = [(each, dtype) for each in chosen for dtype in each.dtypes]
        ids = [f"{each.name}-{dtype}" for each, dtype in pairs]
        metafunc.parametrize(("backend", "dtype"), pairs, ids=ids, indirect=["backend"])
    else:
        metafunc.parametrize("backend", chosen, ids=[each.name for each in chosen], indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Deselects cases that others cover, marks those whose programs are compiled with optimisations, orders the tests.

    Deselected is what a costly backend does not run, and under `GKLX_SAMPLE=N` all but about one in N cases of each
    parametrised test: the same ones in every run. Tests that take long come first: at the end of a run one process
    would wait for them.
    """
    for item in items:
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        if isinstance(backend, backends.Backend) and backend.traced:
            item.add_marker("optimized_programs")

    def is_covered_elsewhere(item):
        given = item.callspec.params if hasattr(item, "callspec") else {}
        backend, dtype, case, mask = (given.get(name) for name in ("backend", "dtype", "case", "mask"))
        if not isinstance(backend, backends.Backend):
            return False
        halves = dtype in ("float16", "bfloat16") and dtype not in (backend.thorough or ())
        if backend.costly and halves and item.get_closest_marker("many_programs"):
            return True
        case, mask = case if isinstance(case, Case) else None, mask if isinstance(mask, str) else None
        return not backends.takes_part(backend, dtype, case, mask)

    out = {item for item in items if is_covered_elsewhere(item)}
    if backends.SAMPLE > 1:
        out |= not_sampled([item for item in items if item not in out])
    if out:
        config.hook.pytest_deselected(items=list(out))
        items[:] = [item for item in items if item not in out]
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def not_sampled(items):
    """The cases that are left out of a sample; every test keeps its first case, and those behind the table keep all."""
    out, tests = set(), set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        parametrised = hasattr(item, "callspec") and not item.get_closest_marker("supports")
        if parametrised and test in tests and zlib.crc32(item.nodeid.encode()) % backends.SAMPLE:
            out.add(item)
        tests.add(test)
    return out


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """A cache folder for each test and its processes: the command keeps its progress in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def backend(request, monkeypatch):
    backends.needs(request.param.library.backend)
    backends.run_on(request.param.execution, request.param.library.backend, monkeypatch)
    return request.param


@pytest.fixture(params=["kernel", "formulas"])
def execution(request, monkeypatch):
    """Runs a test of one library twice: on the kernel and on the formulas."""
    backends.run_on(request.param, "numpy", monkeypatch)
    return request.param
