"""Fixtures: one that runs a test on every backend, one on every dtype a backend has."""

import pytest
from hypothesis import HealthCheck, settings

import backends

settings.register_profile(
    "gklx",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("gklx")


@pytest.fixture(params=backends.BACKENDS, ids=lambda each: each.name)
def backend(request):
    backends.needs(request.param.library.backend)
    return request.param


@pytest.fixture(params=["float64", "float32", "float16", "bfloat16"])
def dtype(request, backend):
    if request.param not in backend.dtypes:
        has = "is tested in" if request.param in backend.library.dtypes else "has only"
        pytest.skip(f"{backend.name} {has} {', '.join(backend.dtypes)}")
    return request.param
