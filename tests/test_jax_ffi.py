"""The row kernel's handler for `jax.ffi`, called directly, against the definition."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest

import backends
import gklx
import oracle
from backends import BY_NAME
from cases import CASES, MASKS, call, on, rounded
from closeness import assert_near, ulps_of
from gklx._run import cpu_library

FORMULAS = {
    "kl": {"decomposed": 0, "tempered": 1, "symmetric": 0, "batch_normalized": 0},
    "dkl": {"decomposed": 1, "tempered": 1, "symmetric": 0, "batch_normalized": 0},
    "ikl": {"decomposed": 1, "tempered": 0, "symmetric": 1, "batch_normalized": 0},
    "gkl": {"decomposed": 1, "tempered": 0, "symmetric": 1, "batch_normalized": 1},
}
NUMBERS = ("temperature", "weight_temperature", "gamma", "mse_weight", "ce_weight")
OPTIONAL = ("prior", "labels", "sample_weight", "where", "upstream")
ASKED = {"value": 1, "student": 2, "teacher": 4}
BY_ID = {case.id: case for case in CASES}


@cache
def jax_with_handler():
    """JAX, with the handler registered."""
    backends.needs("jax")
    jax = pytest.importorskip("jax")
    backends.needs_kernel("jax")
    library = cpu_library.library()
    jax.ffi.register_ffi_target("gklx_test_rows", jax.ffi.pycapsule(library.gklx_jax_rows), platform="cpu")
    return jax


@pytest.fixture(autouse=True)
def jax():
    return jax_with_handler()


def rows(jax, case, s, t, arrays, *, asked=tuple(ASKED), reduction="mean", threads=2):
    """The requested results, from a compiled program; `arrays` are JAX arrays."""
    jnp = jax.numpy
    real = "float64" if "float64" in (s.dtype.name, t.dtype.name) else "float32"
    numbers = {name: case.settings.get(name, 1.0) for name in NUMBERS}
    if case.loss in ("kl", "dkl"):
        numbers["weight_temperature"] = numbers["temperature"]
    flags = dict(FORMULAS[case.loss])
    if case.settings.get("normalize") == "samples":
        flags["batch_normalized"] = 0
    if not case.settings.get("symmetric", True):
        flags["symmetric"] = 0
    given = dict(arrays)
    if "where" in given:
        given["where"] = jnp.broadcast_to(given["where"], s.shape)
    for name in {"sample_weight", "upstream"} & given.keys():
        given[name] = jnp.asarray(given[name], real)
    results = {
        "value": jax.ShapeDtypeStruct(s.shape[:-1] if reduction == "none" else (), real),
        "student": jax.ShapeDtypeStruct(s.shape, s.dtype),
        "teacher": jax.ShapeDtypeStruct(t.shape, t.dtype),
    }
    integers = {
        **flags,
        "present": sum(1 << bit for bit, name in enumerate(OPTIONAL) if name in given),
        "asked": sum(ASKED[name] for name in asked),
        "reduction": cpu_library.REDUCTIONS[reduction],
        "threads": threads,
    }

    @jax.jit
    def run(s, t, numbers, *operands):
        called = jax.ffi.ffi_call("gklx_test_rows", [results[name] for name in asked])
        return called(s, t, numbers, *operands, **{name: np.int32(x) for name, x in integers.items()})

    numbers = jnp.asarray(list(numbers.values()), real)
    found = run(s, t, numbers, *(given[name] for name in OPTIONAL if name in given))
    return [np.asarray(x, dtype="float64") for x in found]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["kl-T", "dkl-T", "ikl-prior", "gkl-tau", "gkl-prior", "gkl-rows", "gkl-asymmetric"])
def test_results_are_those_of_the_definition(jax, name, mask):
    case, backend = BY_ID[name], BY_NAME["jax"]
    s, t, arrays = call(case, mask)
    expected = oracle.evaluate(case.loss, s, t, **case.settings, **arrays)
    found = rows(jax, case, *on(backend, "float64", s, t, arrays))
    for got, exact in zip(found, expected, strict=True):
        assert_near(got, exact, "float64", ulps=32)


@pytest.mark.parametrize("dtypes", [("float16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float64")])
def test_networks_may_differ_in_dtype(jax, dtypes):
    case, backend = BY_ID["gkl-prior"], BY_NAME["jax"]
    real = "float64" if "float64" in dtypes else "float32"
    s, t, arrays = call(case, "elements")
    exact = [backend.rounded(x, dtype) for x, dtype in zip((s, t), dtypes, strict=True)]
    given = [backend.array(x, dtype) for x, dtype in zip((s, t), dtypes, strict=True)]
    _, _, given_arrays = on(backend, "float16", s, t, arrays)  # the prior has a third dtype
    _, _, exact_arrays = rounded(backend, "float16", s, t, arrays)
    expected = oracle.evaluate(case.loss, *exact, **case.settings, **exact_arrays)
    found = rows(jax, case, *given, given_arrays)
    for got, value, dtype in zip(found, expected, (real, *dtypes), strict=True):
        assert_near(got, value, dtype, ulps=ulps_of(dtype))


@pytest.mark.parametrize("integer", ["int32", "int64"])
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,)], ids=str)
def test_any_batch_axes_and_integer_labels_are_accepted(jax, batch, integer):
    case, backend = BY_ID["gkl-prior"], BY_NAME["jax"]
    s, t, arrays = call(case, "none", batch=batch)
    expected = oracle.evaluate(case.loss, s, t, **case.settings, **arrays)
    given_s, given_t, given = on(backend, "float64", s, t, arrays)
    given["labels"] = given["labels"].astype(integer)
    for got, exact in zip(rows(jax, case, given_s, given_t, given), expected, strict=True):
        assert_near(got, exact, "float64", ulps=32)


@pytest.mark.parametrize(
    "asked", [("value",), ("student",), ("value", "teacher"), ("student", "teacher")], ids="-".join
)
def test_only_the_requested_results_are_computed(jax, asked):
    case, backend = BY_ID["gkl"], BY_NAME["jax"]
    s, t, arrays = on(backend, "float32", *call(case, "classes"))
    everything = dict(zip(ASKED, rows(jax, case, s, t, arrays), strict=True))
    for name, got in zip(asked, rows(jax, case, s, t, arrays, asked=asked), strict=True):
        assert_near(got, everything[name], "float32", ulps=2)  # by another loop of the kernel


def test_upstream_gradient_scales_the_gradients(jax):
    case, backend = BY_ID["ikl"], BY_NAME["jax"]
    s, t, _ = call(case, "none")
    given_s, given_t, _ = on(backend, "float64", s, t, {})
    for reduction, upstream in (("mean", np.asarray(-3.0)), ("none", np.linspace(-1, 2, len(s)))):
        value, *gradients = oracle.evaluate(case.loss, s, t, **case.settings, reduction=reduction)
        found = rows(jax, case, given_s, given_t, {"upstream": upstream}, reduction=reduction)
        for got, exact in zip(found, (value, *(x * upstream[..., None] for x in gradients)), strict=True):
            assert_near(got, exact, "float64", ulps=32)


@pytest.mark.parametrize(
    ("wrong", "operand"),
    [
        ({"labels": np.zeros(4, "int32")}, "labels"),
        ({"prior": np.ones((7, 6))}, "prior"),
        ({"prior": np.ones((7, 7), "int32")}, "prior"),
        ({"labels": np.zeros(5, "float32")}, "labels"),
        ({"sample_weight": np.ones((5, 1, 2))}, "sample_weight"),
        ({"upstream": np.ones(3)}, "upstream"),
    ],
)
def test_operands_of_wrong_shape_or_dtype_are_refused(jax, wrong, operand):
    """Arguments that the package never sends are an error, not a read beyond an array."""
    case, backend = BY_ID["gkl-prior"], BY_NAME["jax"]
    s, t, arrays = on(backend, "float32", *call(case, "none"))
    arrays |= {name: backend.array(x) for name, x in wrong.items()}
    with pytest.raises(Exception, match=f"gklx: {operand} has another shape or dtype than the kernel expects"):
        rows(jax, case, s, t, arrays)


def test_results_do_not_depend_on_the_number_of_threads(jax):
    case, backend = BY_ID["gkl-rows"], BY_NAME["jax"]
    s, t, arrays = on(backend, "float32", *call(case, "samples", batch=(300,), classes=1000))
    one, two = (rows(jax, case, s, t, arrays, threads=threads) for threads in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert_near(a, b, "float32", ulps=0)


def test_calls_that_take_all_threads_of_xla_end(jax):
    """Many calls at once, from several threads of Python and several times in a program: none waits for another."""
    jnp, rng, count = jax.numpy, np.random.default_rng(0), 12
    s, t = (rng.standard_normal((count, 300, 1000), np.float32) for _ in range(2))
    expected = [float(gklx.kl(s[i], t[i])) for i in range(count)]

    @jax.jit
    def losses(s, t):
        return jnp.stack([gklx.kl(s[i], t[i]) for i in range(count)])

    s, t = jnp.asarray(s), jnp.asarray(t)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: losses(s, t), range(40)):
            assert np.asarray(found).tolist() == expected
