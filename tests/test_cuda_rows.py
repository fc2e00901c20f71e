"""The CUDA kernels against the formulas: run on a CPU, thread by thread; compiled for GPUs; and run on a GPU.

Only the tests on a GPU cover the synchronisation of a block's threads and its shared memory.
"""

import ctypes
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import backends
import gklx
import oracle
from backends import BY_NAME
from cases import CASES, MASKS, Case, call, loss_of, on
from closeness import assert_near, ulps_of
from gklx._core.batch import uses_batch
from gklx._core.call import Asked
from gklx._run import blocks, cuda, cuda_launch, dispatch
from gklx._run.sample_losses import sample_losses
from gklx.transforms import _unwrapped as call_builder
from test_precision import MANY, logits, scale_of

pytestmark = pytest.mark.cuda_kernels

HERE = Path(__file__).parent
KERNELS = Path(cuda.__file__).parents[1] / "_kernels"
ALL = Asked(value=True, student=True, teacher=True)
ALL_CASES = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def compile_for_host(program, path, *options):
    """Compile a program for the host, with fused multiply-adds where the machine has them, as on a GPU."""
    command = ["g++", "-O1", "-shared", "-fPIC", "-std=c++17", "-march=native", "-ffp-contract=fast", *options]
    command += ["-Wall", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function", f"-I{KERNELS}", "-o", str(path)]
    subprocess.run([*command, str(program)], check=True)
    return ctypes.CDLL(str(path))


def make_starter(folder, program=HERE / "cuda_on_cpu.cpp", *more):
    """A function that starts kernels on the CPU. It compiles each plan once; `start.plans` has the started plans."""

    @cache
    def library(options):
        return compile_for_host(
            program, folder / f"{abs(hash(options))}.so", *(f"-D{k}={v}" for k, v in options), *more
        )

    def start(options, blocks, name, arguments):
        kinds = {
            np.uint64: ctypes.c_void_p,
            np.int64: ctypes.c_longlong,
            np.float32: ctypes.c_float,
            np.float64: ctypes.c_double,
        }
        given = [kinds[type(x)](x.item()) for x in arguments]
        kernels, options = library(options), dict(options)
        assert kernels.bytes_of_row() == cuda._ROW * {"float": 4, "double": 8}[options["REAL"]]
        getattr(kernels, name)(*given)
        start.plans.append(options)

    start.plans = []
    return start


@pytest.fixture(scope="session")
def on_cpu(tmp_path_factory):
    """A device for `cuda.evaluate` that runs the kernels on the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler here: g++ is not on the path")
    return device_with(make_starter(tmp_path_factory.mktemp("rows")))


def device_with(start):
    return cuda_launch.Device(np.ascontiguousarray, lambda x: x.ctypes.data, poisoned, start)


@pytest.fixture
def gklx_on_kernels(on_cpu, monkeypatch):
    """Makes the public functions run the CUDA kernels, on the CPU, for NumPy's arrays."""
    monkeypatch.setattr(dispatch.cpu, "serves", lambda call: True)
    monkeypatch.setattr(dispatch.cpu, "evaluate", partial(cuda.evaluate, device=on_cpu))


def poisoned(shape, dtype):
    """Memory filled with a value that no result has, at an address divisible by 16."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.full(size + 16, 0xA5, dtype=np.uint8)
    begin = -memory.ctypes.data % 16
    return memory[begin : begin + size].view(dtype).reshape(shape)


def aligned(x):
    y = poisoned(x.shape, x.dtype)
    y[...] = x
    return y


def call_of(case, s, t, given, reduction="mean"):
    return call_builder(loss_of(case, reduction=reduction))(aligned(s), aligned(t), **given)


def compare(on_cpu, case, dtype, s, t, given, ulps, reduction="mean", dtypes=None, scale=0.0):
    s, t, given = on(BY_NAME["numpy"], dtype, s, t, given)
    s, t = (x.astype(of) for x, of in zip((s, t), dtypes or (dtype, dtype), strict=True))
    given = {name: x for name, x in given.items() if x is not None}
    own = call_of(case, s, t, given, reduction)
    upstream = np.asarray(1.7, dtype=own.dtype)
    if reduction == "none":
        upstream = np.linspace(0.3, 2.0, int(np.prod(s.shape[:-1])), dtype=own.dtype).reshape(s.shape[:-1])
    with np.errstate(all="ignore"):
        found = cuda.evaluate(own, ALL, upstream=upstream, device=on_cpu)
        wide = {name: x.astype("float64") if x.dtype.kind == "f" else x for name, x in given.items()}
        exact = call_of(case, s.astype("float64"), t.astype("float64"), wide, reduction)
        expected = blocks.evaluate(exact, ALL, upstream=upstream.astype("float64"))
    computed = np.dtype(own.dtype).name
    assert_near(np.asarray(found.value, dtype="float64"), expected.value, computed, ulps=4 * ulps, by="entry")
    for one, other, name in ((found.student, expected.student, s), (found.teacher, expected.teacher, t)):
        assert one.dtype == name.dtype
        close_to = 1 if one.dtype == np.float16 else ulps
        assert_near(one.astype("float64"), other, one.dtype.name, ulps=close_to, scale=scale)


@ALL_CASES
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_kernels_agree_with_the_formulas(on_cpu, case, mask, dtype):
    for reduction in ("mean", "sum", "none"):
        compare(on_cpu, case, dtype, *call(case, mask), ulps_of(dtype), reduction)


@ALL_CASES
@pytest.mark.parametrize("mask", MASKS)
def test_kernels_agree_with_the_definition(gklx_on_kernels, case, mask):
    s, t, given = call(case, mask)
    for reduction in ("mean", "sum"):
        with np.errstate(all="ignore"):
            loss = loss_of(case, reduction=reduction)
            value, (to_s, to_t) = gklx.value_and_grad(loss, (0, 1))(s, t, **given)
            exact, exact_s, exact_t = oracle.evaluate(case.loss, s, t, **case.settings, **given, reduction=reduction)
        for one, other in ((value, exact), (to_s, exact_s), (to_t, exact_t)):
            assert_near(one, other, "float64", ulps=32)


@ALL_CASES
@pytest.mark.parametrize("classes", [1, 2, 32, 33, 600, 10_000])
def test_any_number_of_classes(on_cpu, case, classes):
    """With loads of 16 bytes and of single logits, and rows shorter and longer than a group of threads."""
    compare(on_cpu, case, "float32", *call(case, "samples", classes=classes, batch=(2,)), 64)
    options = on_cpu.start.plans[-1]
    assert options["VECTOR"] == ("4" if classes % 4 == 0 else "1")
    assert options["GROUP"] == ("128" if classes == 10_000 else "32")


@pytest.mark.parametrize("dtypes", [("float16", "float16"), ("float16", "float32"), ("float32", "float64")])
@pytest.mark.parametrize("case", [case for case in CASES if case.id in ("kl", "gkl", "gkl-prior")], ids=lambda c: c.id)
def test_half_precision_and_mixed_dtypes(on_cpu, case, dtypes):
    widest = "float64" if "float64" in dtypes else "float32"
    s, t, given = call(case, "elements", classes=64)
    compare(on_cpu, case, widest, s, t, given, 32, dtypes=dtypes)


def test_float16_and_bfloat16_round_as_in_numpy(on_cpu, tmp_path):
    """For every float16 and bfloat16, and for floats between them."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    program = tmp_path / "halves.cpp"
    program.write_text("""
#include <cmath>
#define REAL float
#define STUDENT Half
#define TEACHER Brain
#define WEIGHTS PROBABILITIES
#define DECOMPOSED 0
#define VECTOR 1
#define GROUP 32
#define BLOCK 256
#include "cuda.cu"
extern "C" void to_float(const Half *h, const Brain *b, float *x, float *y, int n) {
  for (int i = 0; i < n; ++i) { x[i] = widened(h[i]); y[i] = widened(b[i]); }
}
extern "C" void from_float(const float *x, Half *h, Brain *b, int n) {
  for (int i = 0; i < n; ++i) { narrow(x[i], h[i]); narrow(x[i], b[i]); }
}
""")
    kernels = compile_for_host(program, tmp_path / "halves.so")

    def at(x):
        return ctypes.c_void_p(x.ctypes.data)

    bits = np.arange(2**16, dtype=np.uint16)
    x, y = np.empty(2**16, dtype=np.float32), np.empty(2**16, dtype=np.float32)
    kernels.to_float(at(bits), at(bits), at(x), at(y), 2**16)
    np.testing.assert_array_equal(x, bits.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(y, bits.view(ml_dtypes.bfloat16).astype(np.float32))
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, 300_000, dtype=np.uint32).view(np.float32)
    narrow = (rng.standard_normal(300_000) * np.exp2(rng.integers(-30, 18, 300_000))).astype(np.float32)
    x = x[np.isfinite(x)]
    ties = (x[:-1].astype(np.float64) / 2 + x[1:].astype(np.float64) / 2).astype(np.float32)
    values = np.concatenate([values, narrow, ties])
    half, brain = np.empty(len(values), dtype=np.float16), np.empty(len(values), dtype=ml_dtypes.bfloat16)
    kernels.from_float(at(values), at(half), at(brain), len(values))
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(half, values.astype(np.float16))
        np.testing.assert_array_equal(brain.astype(np.float32), values.astype(ml_dtypes.bfloat16).astype(np.float32))


@ALL_CASES
@pytest.mark.parametrize("kind", ["offset", "confident", "close", "spread"])
def test_extreme_logits_keep_their_digits(on_cpu, case, kind):
    s, t, given = call(case, "none", classes=50)
    rng = np.random.default_rng(5)
    s, t = {
        "offset": lambda: (s + 1e4, t - 1e4),
        "confident": lambda: (s + 12 * (np.arange(50) == 3), t + 14 * (np.arange(50) == 3)),
        "close": lambda: (t + 1e-3 * rng.standard_normal(t.shape), t),
        "spread": lambda: (30 * s, 30 * t),
    }[kind]()
    s, t = (x.astype("float32").astype("float64") for x in (s, t))
    # A row whose differences cancel by accident is bounded by its summands, in test_precision.py.
    compare(on_cpu, case, "float32", s, t, given, {"close": 2**14, "spread": 512}.get(kind, 128), "none")


@ALL_CASES
@pytest.mark.parametrize(
    "rows_of",
    [
        ([[1.0, -np.inf, 0.5], [0.0, 1.0, 2.0]], [[0.0, 0.5, 1.0], [0.0, 1.0, 1.0]]),
        ([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]], [[0.0, -np.inf, 1.0], [0.0, 1.0, 1.0]]),
        ([[0.0, -np.inf, 2.0], [0.0, 1.0, 2.0]], [[-np.inf, 1.0, 1.0], [0.0, 1.0, 1.0]]),
        ([[-np.inf] * 3, [0.0, 1.0, 2.0]], [[-np.inf] * 3, [0.0, 1.0, 1.0]]),
        ([[-np.inf] * 3, [0.0, 1.0, 2.0]], [[0.0, 1.0, 2.0], [0.0, 1.0, 1.0]]),
        ([[np.nan, 1.0, 2.0], [0.0, 1.0, 2.0]], [[0.0, 1.0, 2.0], [0.0, 1.0, 1.0]]),
        ([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]], [[np.inf, 1.0, 2.0], [0.0, 1.0, 1.0]]),
        ([[0.0, np.inf, 2.0], [0.0, 1.0, 2.0]], [[0.0, 1.0, 2.0], [0.0, 1.0, 1.0]]),
        ([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]], [[0.0, np.nan, 2.0], [0.0, 1.0, 1.0]]),
        ([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]], [[-np.inf] * 3, [0.0, 1.0, 1.0]]),
        ([[0.0, -np.inf, 2.0], [0.0, 1.0, 2.0]], [[0.0, -2000.0, 1.0], [0.0, 1.0, 1.0]]),
    ],
    ids=[
        "student",
        "teacher",
        "both",
        "absent",
        "student-row",
        "nan",
        "inf",
        "student-inf",
        "teacher-nan",
        "teacher-row",
        "underflown",
    ],
)
def test_infinities_and_nan_agree_with_the_formulas(on_cpu, case, rows_of):
    given = {}
    if case.prior:
        given["prior"] = np.asarray([[0.2, 0.5, 0.3], [1.0, 0.0, 2.0], [0.1, 0.1, 0.8]])
        if case.prior == "labels":
            given["labels"] = np.asarray([0, 2])
        else:
            given["prior"] = given["prior"][:2]
    s, t = (np.asarray(x) for x in rows_of)
    compare(on_cpu, case, "float64", s, t, given, 32, "none")
    if not (t == -2000.0).any():  # whose weight is 0 in float32 alone
        compare(on_cpu, case, "float32", s, t, given, 32, "sum")


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("entry", [np.nan, -0.25])
def test_invalid_prior_entry_gives_nan(on_cpu, gamma, entry):
    """The public functions do not check the prior where reading values is not free."""
    case = Case("", "gkl", {"gamma": gamma, "normalize": "samples"}, "rows")
    s, t, given = call(case, "none")
    given["where"] = np.arange(7) != 3
    own = call_of(case, s, t, given, "none")
    prior = given["prior"].copy()
    prior[1, 2] = prior[2, 3] = entry
    own = own._replace(arrays=own.arrays._replace(prior=prior))
    with np.errstate(all="ignore"):
        found, expected = cuda.evaluate(own, ALL, device=on_cpu), blocks.evaluate(own, ALL)
    assert np.isnan(found.value).tolist() == [False, True, False, False, False]
    for one, other in zip(found[:3], expected[:3], strict=True):
        assert_near(one, other, "float64", ulps=64)


def test_invalid_label_gives_nan(on_cpu):
    case = next(case for case in CASES if case.id == "gkl-prior")
    s, t, given = call(case, "none")
    for label in (7, -1):
        bad = np.where(np.arange(5) == 2, label, given["labels"])
        own = call_of(case, s, t, given, "none")
        own = own._replace(arrays=own.arrays._replace(labels=bad), formula=own.formula._replace(batch_normalized=False))
        found = cuda.evaluate(own, ALL, device=on_cpu)
        assert np.isnan(found.value).tolist() == [False, False, True, False, False]
        for gradient in found[1:3]:
            assert np.isnan(gradient).all(axis=-1).tolist() == [False, False, True, False, False]
            assert np.isnan(gradient).any(axis=-1).tolist() == [False, False, True, False, False]


def test_only_the_requested_results_are_computed(on_cpu):
    case = next(case for case in CASES if case.id == "gkl")
    own = call_of(case, *call(case, "none"))
    for asked in (Asked(value=True), Asked(student=True), Asked(teacher=True)):
        found = cuda.evaluate(own, asked, device=on_cpu)
        assert [x is not None for x in found[:3]] == list(asked)
    known = cuda.evaluate(own, Asked(value=True), device=on_cpu).batch
    half = own._replace(arrays=own.arrays._replace(student=own.arrays.student[:2], teacher=own.arrays.teacher[:2]))
    part = cuda.evaluate(half, Asked(student=True), known, device=on_cpu).student
    assert_near(part, blocks.evaluate(own, Asked(student=True)).student[:2], "float64", ulps=16)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("mask", ["none", "elements", "samples"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.id in ("dkl-T", "ikl-prior", "gkl-tau")], ids=lambda c: c.id
)
def test_sample_losses_agree_with_the_formulas(on_cpu, monkeypatch, case, mask, dtype):
    s, t, given = on(BY_NAME["numpy"], dtype, *call(case, mask))
    if mask == "none":
        s, t = s.copy(), t.copy()
        s[1], t[2, 3], s[3, 2] = -np.inf, np.nan, -np.inf
    own = call_of(case, s, t, given)
    wide = {name: x.astype("float64") if x.dtype.kind == "f" else x for name, x in given.items()}
    monkeypatch.setattr(dispatch.cpu, "serves", lambda call: False)
    with np.errstate(all="ignore"):
        exact = sample_losses([call_of(case, s.astype("float64"), t.astype("float64"), wide)])
        monkeypatch.setattr(cuda, "serves", lambda call: True)
        monkeypatch.setattr(cuda, "samples", partial(cuda.samples, device=on_cpu))
        found = sample_losses([own])
    assert found.has_valid.tolist() == exact.has_valid.tolist()
    assert found.undefined.tolist() == exact.undefined.tolist()
    assert exact.undefined.tolist() == [False, mask == "none", mask == "none", False, False]
    for name in ("ce", "mse", "mass", "student_peak", "teacher_peak"):
        one, other = (x[0] if isinstance(x, tuple) else x for x in (getattr(found, name), getattr(exact, name)))
        known = found.has_valid & ~found.undefined
        assert_near(one[known].astype("float64"), other[known], dtype, ulps=32, by="entry")
    assert np.isnan(found.ce[found.undefined]).all()


@pytest.mark.parametrize("case", MANY, ids=lambda case: case.id)
@pytest.mark.parametrize("kind", ["plain", "offsets", "confident", "confident-teacher", "opposed", "wide"])
@pytest.mark.parametrize(("classes", "ulps"), [(10, 32), (1_000, 32), (100_000, 128)])
def test_float32_is_within_the_bounds_of_the_precision_tests(gklx_on_kernels, monkeypatch, case, kind, classes, ulps):
    s, t = (x.astype("float32") for x in logits(np.random.default_rng(1), kind, 4 if classes > 10 else 64, classes))
    run = gklx.value_and_grad(loss_of(case), (0, 1))
    found, (to_s, to_t) = run(s, t)
    monkeypatch.undo()
    s, t = s.astype("float64"), t.astype("float64")
    exact, (exact_s, exact_t) = run(s, t)
    even = kind in ("plain", "offsets")
    assert_near(found, exact, "float32", ulps=ulps, scale=0.0 if even else 1.0)
    for one, other in ((to_s, exact_s), (to_t, exact_t)):
        assert_near(one.astype("float64"), other, "float32", ulps=ulps, scale=0.0 if even else scale_of(s, t))


@pytest.mark.parametrize("order", ["rising", "falling", "heaviest-last"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.id in ("kl", "gkl-tau", "gkl-rows")], ids=lambda c: c.id
)
def test_order_of_the_classes_costs_no_digits(on_cpu, case, order):
    """In rising order each class of a thread exceeds the one before, so that every class rescales the sums."""
    s, t, given = call(case, "none", classes=3000)
    last = 40.0 * (np.arange(3000) == 2999)
    if order == "heaviest-last":
        s, t = s + last, t + last
    for x in (s, t, *([given["prior"]] if given else [])):
        if order != "heaviest-last":
            x.sort(axis=-1)
        if order == "falling":
            x[...] = x[..., ::-1].copy()
    s, t = (x.astype("float32").astype("float64") for x in (s, t))
    scale = scale_of(s, t) if order == "heaviest-last" else 0.0
    for reduction in ("mean", "none"):
        compare(on_cpu, case, "float32", s, t, given, 64, reduction, scale=scale)


@pytest.mark.parametrize("case", [case for case in CASES if case.id in ("kl", "gkl-tau")], ids=lambda c: c.id)
def test_several_threads_find_equally_large_logits(on_cpu, case):
    """As bfloat16's do. Each may have taken its differences from another of these classes."""
    rng = np.random.default_rng(0)
    t = np.round(4 * rng.standard_normal((3, 64_000)))
    compare(on_cpu, case, "float32", t + rng.standard_normal(t.shape), t, {}, 64)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@ALL_CASES
@pytest.mark.parametrize("fill", ["-1e9", "smallest"])
def test_same_fill_value_in_both_networks(on_cpu, case, fill, dtype):
    s, t, given = call(case, "none", classes=64)
    s[:, ::3] = t[:, ::3] = -1e9 if fill == "-1e9" else np.finfo(dtype).min
    compare(on_cpu, case, dtype, s, t, given, 64)


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 1e-4])
def test_kl_of_close_rows_keeps_its_digits(on_cpu, size):
    rng = np.random.default_rng(2)
    t = (3 * rng.standard_normal((50, 1_000))).astype("float32")
    s = (t + size * rng.standard_normal(t.shape)).astype("float32")
    kl = CASES[0]
    found = cuda.evaluate(call_of(kl, s, t, {}, "none"), Asked(value=True), device=on_cpu).value
    exact = gklx.kl(s.astype("float64"), t.astype("float64"), reduction="none")
    assert (abs(found - exact) / exact).max() < 2e-6 / size
    assert (found >= 0).all()
    assert (cuda.evaluate(call_of(kl, t, t, {}, "none"), Asked(value=True), device=on_cpu).value == 0).all()


@pytest.mark.parametrize("scale", [1e-38, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("case", [case for case in CASES if case.id in ("gkl-prior", "gkl-rows")], ids=lambda c: c.id)
def test_scale_of_a_prior_cancels(on_cpu, case, scale):
    s, t, given = call(case, "samples")
    expected = blocks.evaluate(call_of(case, s, t, given), Asked(value=True, student=True))
    small = {**given, "prior": (scale * given["prior"]).astype("float32")}
    own = call_of(case, s.astype("float32"), t.astype("float32"), small)
    found = cuda.evaluate(own, Asked(value=True, student=True), device=on_cpu)
    assert_near(float(found.value), expected.value, "float32", ulps=64)
    assert_near(found.student.astype("float64"), expected.student, "float32", ulps=64)


def test_power_of_an_underflowing_probability_is_kept(on_cpu):
    """exp(-150) is 0 in float32, but its power 0.1 is not."""
    s, t = np.zeros((1, 3)), np.asarray([[0.0, -150.0, -1.0]])
    case = Case("", "gkl", {"gamma": 0.1})
    compare(on_cpu, case, "float32", s, t, {}, 8)
    compare(on_cpu, case, "float32", s, t, {"prior": np.asarray([[1.0, 1e-44, 0.3]])}, 8)


@ALL_CASES
def test_masked_classes_have_gradient_positive_zero(on_cpu, case):
    s, t, given = call(case, "elements")
    found = cuda.evaluate(call_of(case, s, t, given), Asked(student=True, teacher=True), device=on_cpu)
    for gradient in found[1:3]:
        outside = gradient[~given["where"]]
        assert (outside == 0).all()
        assert not np.signbit(outside).any()


@pytest.mark.parametrize("shape", [(7,), (5, 1), (1, 7), (1, 1), (5, 7)])
def test_where_is_broadcast(on_cpu, shape):
    case = next(case for case in CASES if case.id == "gkl-tau")
    s, t, _ = call(case, "none")
    where = np.random.default_rng(3).random(shape) < 0.7
    compare(on_cpu, case, "float64", s, t, {"where": where}, 32)


MUTATIONS = [
    ("gkl-tau", "(of_s - of_t) * of_both", "(of_t - of_s) * of_both"),
    ("gkl-tau", "of_s * of_student", "of_t * of_student"),
    ("gkl-tau", "gap -= spread", "gap += spread"),
    ("gkl-tau", "deviation(d, r.reference) - r.mean", "deviation(d, r.reference)"),
    ("gkl-tau", "REAL(0.5) * (squares - square)", "REAL(0.5) * squares"),
    ("gkl-tau", "log_s_total - mean_logit", "log_s_total + mean_logit"),
    ("gkl-tau", "    add(a.mass, b.mass);\n".replace("    ", "  "), ""),
    ("gkl-tau", "multiply(x.s_total, exponential_of<true>(from.s_top - to.s_top, g.per_temperature))", ""),
    ("gkl-tau", "          multiply(x.mass, by_weight);\n          multiply", "          multiply"),
    ("ikl-tau", "of<Guarded>(below, g.per_weight_temperature);\n", "of<Guarded>(below, g.per_temperature);\n"),
    ("gkl-tau", "add(x.moment, -(mass.high * g.per_class * by))", "add(x.moment, mass.high * g.per_class * by)"),
    ("gkl-tau", "(mass.high * g.per_class * by - REAL(2) * x.moment.high)", "(mass.high * g.per_class * by)"),
    ("gkl-tau", "add(x.mean_logit, value_of(x.t_total) * g.per_class * half_of(from.s_top, to.s_top))", ""),
    ("gkl-tau", "REAL(0) : v * (mass * mass)", "REAL(0) : v * mass"),
    ("kl", "difference - r.log_ratio", "difference + r.log_ratio"),
    ("kl", "a.ce_weight * share, a.mse_weight * share", "a.ce_weight * share, REAL(2) * a.mse_weight * share"),
    ("kl-close", "* doubled - r.log_ratio", "* doubled + r.log_ratio"),
    ("gkl-prior", "add(x.mass, mass)", "add(x.mass, mass * mass)"),
    ("gkl-prior", "    multiply(x.mass, by_weight);\n    multiply(x.moment", "    multiply(x.moment"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "old", "new"), MUTATIONS)
def test_mutation_of_the_kernels_is_detected(tmp_path, on_cpu, case, old, new):
    for file in KERNELS.glob("*.*"):
        if file.suffix in (".cu", ".h"):
            shutil.copy(file, tmp_path)
    text = (KERNELS / "cuda.cu").read_text()
    assert text.count(old) == 1
    (tmp_path / "cuda.cu").write_text(text.replace(old, new))
    program = shutil.copy(HERE / "cuda_on_cpu.cpp", tmp_path)  # finds what lies beside it first
    close = case == "kl-close"
    case = next(each for each in CASES if each.id == case.removesuffix("-close"))
    s, t, given = call(case, "none", classes=100)
    s, t = np.sort(s), np.sort(t)  # each class of a thread exceeds the one before, so that its sums are moved
    if "prior" in given:
        given["prior"] = np.sort(given["prior"])
    if close:
        s = t + 1e-3 * s
    with pytest.raises(AssertionError, match="units in the last place"):
        compare(device_with(make_starter(tmp_path, program)), case, "float64", s, t, given, 64)


# --- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "shape", "offset", "vector", "group", "blocks"),
    [
        ("float32", "float32", (8192, 1000), 0, 4, 32, 1024),
        ("float32", "float32", (8192, 5000), 0, 4, 64, 2048),
        ("float32", "float32", (4096, 32_000), 0, 4, 256, 4096),
        ("float32", "float32", (10, 10), 0, 1, 32, 2),
        ("float32", "float32", (9, 64), 4, 1, 32, 2),
        ("float16", "float16", (4, 2, 128_256), 0, 8, 256, 8),
        ("float16", "float64", (1, 6), 0, 2, 32, 1),
        ("float64", "float64", (7,), 0, 1, 32, 1),
    ],
)
def test_plan_chooses_vector_group_and_blocks(student, teacher, shape, offset, vector, group, blocks):
    s, t = np.zeros(shape, dtype=student), np.zeros(shape, dtype=teacher)
    found = cuda.plan_of(call_builder(gklx.kl)(s, t), (4096, 8192 + offset))
    assert (found.vector, found.group, found.blocks) == (vector, group, blocks)
    assert ("BLOCK", str(cuda_launch.THREADS)) in found.options


@pytest.mark.parametrize(
    ("case", "weights"),
    [
        ("kl", "PROBABILITIES"),
        ("kl-T", "PROBABILITIES"),
        ("ikl-tau", "TEACHER_POWER"),
        ("gkl", "PROBABILITIES"),
        ("gkl-0", "TEACHER_POWER"),
        ("gkl-prior", "PRIOR_POWER"),
    ],
)
def test_plan_names_the_source_of_the_weights(case, weights):
    case = next(x for x in CASES if x.id == case)
    found = call_of(case, *call(case, "none"))
    plan = cuda.plan_of(found, (0, 0))
    assert (plan.weights, plan.decomposed) == (weights, not case.id.startswith("kl"))


def test_cuda_does_not_serve_arrays_on_the_cpu():
    assert not cuda.serves(call_builder(gklx.kl)(np.zeros((2, 3)), np.zeros((2, 3))))
    backends.needs("torch")
    torch = pytest.importorskip("torch")
    assert not cuda.serves(call_builder(gklx.kl)(torch.zeros(2, 3), torch.zeros(2, 3)))


def test_launcher_that_fails_to_compile_warns_once_and_is_skipped(monkeypatch):
    def fails(*_):
        raise OSError("libnvrtc.so: cannot open shared object file")

    asked = []

    def works(*given):
        asked.append(given)

    installed = ("json", "ast", "csv")
    launchers = tuple(
        cuda_launch._Launcher(*given, works) for given in zip(installed, (fails, works, works), strict=True)
    )
    with pytest.warns(RuntimeWarning, match="do not compile here by json: libnvrtc"):
        assert cuda_launch._launcher(0, launchers) is launchers[1]
    assert cuda_launch._launcher(0, launchers) is launchers[1]
    assert len(asked) == 1
    with pytest.warns(RuntimeWarning, match="do not compile here by json"):
        assert cuda_launch._launcher(0, launchers[:1]) is None
    absent = cuda_launch._Launcher("gklx.no_such_module", works, works)
    assert cuda_launch._launcher(0, (absent,)) is None
    assert cuda_launch._launcher(0, (absent._replace(module="no_such_package.core"),)) is None


# --- PyTorch's tensors, by a launcher ---------------------------------------------------------------------------------


@pytest.fixture
def torch_on_kernels(tmp_path, monkeypatch):
    """Runs `cuda.evaluate` on PyTorch's CPU tensors; the list of started kernels: name, stream and blocks."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler here: g++ is not on the path")
    backends.needs("torch")
    torch = pytest.importorskip("torch")

    @cache
    def library(options):
        path = tmp_path / f"{abs(hash(options))}.so"
        return compile_for_host(HERE / "cuda_on_cpu.cpp", path, *(f"-D{k}={v}" for k, v in options))

    def start(kernel, device, stream, blocks, given):
        options, name = kernel
        kinds = {np.int64: ctypes.c_longlong, np.uint64: ctypes.c_void_p}
        kinds |= {np.float32: ctypes.c_float, np.float64: ctypes.c_double}
        getattr(library(options), name)(*(kinds[type(x)](x.item()) for x in given))
        started.append((name, stream, blocks))

    started = []
    launcher = cuda_launch._Launcher("json", lambda options, name, device: (options, name), start)
    monkeypatch.setattr(cuda_launch, "_LAUNCHERS", (launcher,))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    return started


def test_tensors_of_any_layout_reach_the_kernels(torch_on_kernels):
    """Transposed, sliced, expanded, unaligned and lazily negated tensors, parameters, and tensors of two dtypes."""
    import torch

    draw = torch.Generator().manual_seed(0)
    whole = torch.randn(2, 16, 40, generator=draw)
    pairs = [
        (whole[0].T, whole[1].T),
        (whole[0, ::2, 3:35], whole[1, 1::2, :32]),
        (whole[0, :1].expand(8, 40), whole[1, :8]),
        (whole[0].reshape(-1)[1:321].reshape(8, 40), whole[1].reshape(-1)[:320].reshape(8, 40)),
        (torch.view_as_complex(whole.reshape(16, 40, 2)).conj().imag, whole[1]),
        (torch.nn.Parameter(whole[0].clone()), whole[1]),
        (whole[0].bfloat16(), whole[1]),
        (whole[0].half(), whole[1].half()),
        (whole.reshape(4, 8, 40), whole.flip(0).reshape(4, 8, 40)),
    ]
    assert pairs[4][0].is_neg()
    for student, teacher in pairs:
        call = call_builder(gklx.gkl)(student, teacher, reduction="sum")
        found = cuda.evaluate(call, ALL)
        exact = gklx.value_and_grad(partial(gklx.gkl, reduction="sum"), (0, 1))(
            student.detach().double(), teacher.detach().double()
        )
        assert_near(found.value.item(), exact[0].item(), "float32", ulps=64)
        for gradient, expected, given in zip(found[1:3], exact[1], (student, teacher), strict=True):
            assert gradient.dtype == given.dtype
            dtype = str(given.dtype).partition(".")[2]
            assert_near(gradient.double().numpy(), expected.numpy(), dtype, ulps=64 if dtype == "float32" else 1)
        started = [(name, stream) for name, stream, _ in torch_on_kernels]
        assert started == [("statistics", 7), ("batch", 7), ("gradients", 7)]
        torch_on_kernels.clear()


def test_labels_priors_and_masks_of_other_dtypes_are_converted(torch_on_kernels):
    import torch

    case = next(case for case in CASES if case.id == "gkl-prior")
    s, t, given = call(case, "elements")
    own = {name: torch.tensor(x) for name, x in given.items()}
    own |= {"labels": own["labels"].to(torch.int32), "prior": own["prior"].T.contiguous().T.double()}
    own["sample_weight"] = torch.arange(5)
    found = cuda.evaluate(call_builder(loss_of(case))(torch.tensor(s).float(), torch.tensor(t).float(), **own), ALL)
    given["sample_weight"] = np.arange(5.0)
    with np.errstate(all="ignore"):
        exact = blocks.evaluate(call_of(case, s, t, given), ALL)
    for one, other in zip(found[:3], exact[:3], strict=True):
        assert_near(np.asarray(one.double()), other, "float32", ulps=64)


@ALL_CASES
@pytest.mark.parametrize("mask", MASKS)
def test_launching_moves_and_reads_no_values(case, mask):
    """Meta tensors have no values to read, and no operator may receive a CPU tensor, which it would move."""
    backends.needs("torch")
    torch = pytest.importorskip("torch")
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class OnlyMetaTensors(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            result = operator(*args, **(kwargs or {}))
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
            assert {x.device.type for x in tensors} <= {"meta"}, operator
            return result

    started = []
    device = cuda_launch.Device(
        contiguous=lambda x, dtype: (x if dtype is None else x.to(dtype)).contiguous(),
        address=lambda x: 0,
        empty=lambda shape, dtype: torch.empty(tuple(shape), dtype=dtype, device="meta"),
        start=lambda options, blocks, name, arguments: started.append(name),
    )
    s, t, given = call(case, mask)
    s, t = (torch.tensor(x, device="meta", dtype=torch.float32) for x in (s, t))
    given = {name: torch.tensor(x, device="meta") for name, x in given.items()}
    for reduction in ("mean", "sum", "none"):
        with OnlyMetaTensors():
            own = call_builder(loss_of(case, reduction=reduction))(s, t, **given)
            found = cuda.evaluate(own, ALL, device=device)
        assert found.value.shape == ((5,) if reduction == "none" else ())
        assert started == ["statistics", *(["batch"] if uses_batch(own) else []), "gradients"]
        started.clear()


def test_compiling_by_cuda_core_leaves_the_current_device(monkeypatch):
    """cuda-core's `set_current` changes PyTorch's current device too. One compilation gives both kernels."""
    backends.needs("torch")
    torch = pytest.importorskip("torch")
    current, made = [0], []

    class CudaDevice:
        compute_capability = SimpleNamespace(major=9, minor=0)

        def __init__(self, index):
            self.index = index

        def set_current(self):
            current[0] = self.index

    @contextmanager
    def device(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    def compiled_for(options, architecture):
        assert current == [1]
        made.append(architecture)
        return SimpleNamespace(get_kernel=lambda name: (name, architecture))

    monkeypatch.setitem(sys.modules, "cuda.core", SimpleNamespace(Device=CudaDevice))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(cuda_launch, "cubin", compiled_for)
    options = (("OF", "this test"),)
    for name in ("statistics", "gradients"):
        assert cuda_launch._core_kernel(options, name, 1) == (name, "sm_90")
        assert current == [0]
    assert made == ["sm_90"]  # both at once: half the compiling


def test_start_by_cuda_core_binds_a_context_and_leaves_the_current_device(monkeypatch):
    """A thread of autograd's, which starts the kernels of a backward pass, may have none."""
    backends.needs("torch")
    torch = pytest.importorskip("torch")
    bound, current = [None], [0]

    @contextmanager
    def device(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    def launch(stream, config, kernel, *given):
        assert (bound, current) == ([1], [1])
        return started.append((stream, config, kernel, given))

    class CudaDevice(int):
        def set_current(self):
            bound[0] = int(self)

    started = []
    monkeypatch.setitem(sys.modules, "cuda.core", SimpleNamespace(Device=CudaDevice, launch=launch))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(cuda_launch, "_core_stream", lambda device, handle: f"stream {handle}")
    monkeypatch.setattr(cuda_launch, "_core_config", lambda blocks: blocks)
    cuda_launch._start_by_core("kernel", 1, 7, 3, (1.0, 2))
    assert started == [("stream 7", 3, "kernel", (1.0, 2))]
    assert current == [0]


def test_source_is_self_contained():
    text = cuda_launch.source()
    assert set(re.findall(r"#include (.*)", text)) == {"<cmath>", "<cstdint>", "<cstring>"}  # not for NVRTC
    assert "#pragma once" not in text
    assert text.count("Difference<R> difference(R t, R s)") == 1


# --- compiled for GPUs, and on a GPU ----------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["PROBABILITIES", "TEACHER_POWER", "PRIOR_POWER"])
@pytest.mark.parametrize("kinds", [("float", "float", "float", 4), ("double", "double", "double", 2),
                                   ("float", "Half", "Half", 8), ("float", "Brain", "float", 4)])  # fmt: skip
@pytest.mark.parametrize("architecture", ["compute_75", "compute_80", "compute_90", "compute_120"])
def test_nvrtc_compiles_the_kernels(kinds, architecture, weights):
    """NVRTC, which CuPy calls, needs no GPU; it must give no warning."""
    nvrtc = nvrtc_library()
    the_plan = cuda.Plan(*kinds[:3], weights, True, kinds[3], 64, 1)
    program, log_size, size = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    text = cuda_launch.source().encode()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"cuda.cu", 0, None, None) == 0
    options = [f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{k}={v}" for k, v in the_plan.options)]
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), given)
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(log_size))
    log = ctypes.create_string_buffer(log_size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    assert not log.value.strip(), log.value.decode()
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, ptx)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    in_double = re.search(rb"\b(add|cvt|div|fma|mul|rcp|sub)[a-z0-9.]*\.f64\b", ptx.value)  # most GPUs are slow at it
    assert bool(in_double) == (kinds[0] == "double")


@pytest.mark.parametrize("kinds", [("float", "float", "float", 4), ("double", "double", "float", 2)])
def test_cuda_core_compiles_the_kernels_once(kinds, tmp_path, monkeypatch):
    """And keeps them on disk, if it may. Without a driver it can compile, but not start kernels."""
    utils = pytest.importorskip("cuda.core.utils", reason="cuda-core is not installed")
    nvrtc_library()
    the_plan = cuda.Plan(*kinds[:3], "PRIOR_POWER", True, kinds[3], 64, 1)
    monkeypatch.setattr(cuda_launch, "_program_cache", lambda: utils.FileStreamProgramCache(tmp_path))
    made = cuda_launch.cubin(the_plan.options, "sm_90").code
    assert made[:4] == b"\x7fELF"
    (kept,) = (path for path in (tmp_path / "entries").rglob("*") if path.is_file())
    kept.write_bytes(b"kept")
    assert cuda_launch.cubin(the_plan.options, "sm_90").code == b"kept"

    def cannot_be_written():
        raise PermissionError("read-only")

    monkeypatch.setattr(cuda_launch, "_program_cache", cannot_be_written)
    assert cuda_launch.cubin(the_plan.options, "sm_90").code == made


def nvrtc_library():
    try:
        import nvidia
    except ImportError:
        pytest.skip("NVRTC is not installed: nvidia-cuda-nvrtc-cu12")
    found = [path for folder in nvidia.__path__ for path in Path(folder).glob("*/lib/libnvrtc.so*")]
    if not found:
        pytest.skip("NVRTC is not installed: nvidia-cuda-nvrtc-cu12")
    return ctypes.CDLL(str(found[0]))


@ALL_CASES
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_on_a_gpu_kernels_agree_with_the_formulas(case, mask, library):
    module = on_a_gpu(library)
    s, t, given = call(case, mask, batch=(6,), classes=1000)

    def put(x):
        x = x.astype("float32") if x.dtype.kind == "f" else x
        return module.asarray(x) if library == "cupy" else module.from_numpy(np.array(x)).cuda()

    own = call_builder(loss_of(case))(put(s), put(t), **{name: put(x) for name, x in given.items()})
    assert cuda.serves(own)
    found = cuda.evaluate(own, ALL)
    expected = blocks.evaluate(own, ALL)
    for one, other in zip(found[:3], expected[:3], strict=True):
        one, other = (np.asarray(x.get() if library == "cupy" else x.cpu(), dtype="float64") for x in (one, other))
        assert_near(one, other, "float32", ulps=128)


def test_on_a_gpu_losses_run_on_the_kernels(monkeypatch):
    torch = on_a_gpu("torch")
    started = []
    original = cuda._Run.start
    monkeypatch.setattr(cuda._Run, "start", lambda *given: started.append(given[1]) or original(*given))
    s, t = torch.randn(2, 64, 1000, device="cuda")
    s.requires_grad_()
    partial(gklx.gkl, gamma=0.5)(s, t).backward()
    # The backward pass starts the last kernel again, with what the first one found.
    assert started == ["statistics", "batch", "gradients", "gradients"]


def on_a_gpu(library):
    backends.needs(library)
    module = pytest.importorskip(library)
    if library == "torch" and not module.cuda.is_available():
        pytest.skip("PyTorch has no GPU here")
    if not cuda_launch.available(module.zeros(1) if library == "cupy" else module.zeros(1, device="cuda")):
        pytest.skip("neither CuPy nor cuda-core is here")
    return module
