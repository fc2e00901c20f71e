"""The CUDA kernels: on a CPU, thread by thread, against the array functions; compiled for GPUs; and on one.

What a GPU adds, blocks of threads that wait for each other and the memory between them, only the last tests see.
"""

import ctypes
import re
import shutil
import subprocess
import sys
import types
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest

import backends
import gklx
from backends import BY_NAME
from cases import CASES, MASKS, call, loss_of, on
from closeness import assert_near, ulps_of
from gklx import _sweep
from gklx._cuda import launch, plan, rows
from gklx.transforms import _unwrapped as problem_builder

pytestmark = pytest.mark.cuda_kernels

HERE = Path(__file__).parent
SOURCE = Path(rows.__file__).with_name("rows.cu")
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@pytest.fixture(scope="session")
def on_cpu(tmp_path_factory):
    """The kernels of a plan as a library of the host, started as on a GPU; what was started is kept."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler here: g++ is not on the path")
    folder = tmp_path_factory.mktemp("rows")

    @cache
    def library(options):
        path = folder / f"{abs(hash(options))}.so"
        command = ["g++", "-O1", "-shared", "-fPIC", "-std=c++14", "-ffp-contract=off", "-x", "c++", *options]
        command += ["-Wall", "-Werror", "-Wno-unknown-pragmas", f"-I{SOURCE.parent}", "-o", str(path)]
        subprocess.run([*command, str(HERE / "cuda_on_cpu.cpp")], check=True)
        return ctypes.CDLL(str(path))

    def start(the_plan, name, arguments):
        kinds = {int: ctypes.c_longlong, float: ctypes.c_double}
        given = [
            kinds[type(x)](x) if type(x) in kinds else ctypes.c_void_p(None if x is None else x.ctypes.data)
            for x in arguments
        ]
        kernels = library(the_plan.options)
        assert kernels.bytes_of_row() == rows._ROW_BYTES
        getattr(kernels, name)(*given)
        started.append(the_plan)

    started = []
    device = launch.Device(np.ascontiguousarray, lambda x: x.ctypes.data, poisoned, start)
    return device, started


def poisoned(shape, dtype):
    """Memory that holds what no result may hold, at an address that 16 divides."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.full(size + 16, 0xA5, dtype=np.uint8)
    begin = -memory.ctypes.data % 16
    return memory[begin : begin + size].view(dtype).reshape(shape)


def aligned(x):
    y = poisoned(x.shape, x.dtype)
    y[...] = x
    return y


def problem(case, s, t, given, reduction="mean"):
    return problem_builder(loss_of(case, reduction=reduction))(aligned(s), aligned(t), **given)


def compare(on_cpu, case, dtype, s, t, given, ulps, reduction="mean", dtypes=None):
    s, t, given = on(BY_NAME["numpy"], dtype, s, t, given)
    s, t = (x.astype(of) for x, of in zip((s, t), dtypes or (dtype, dtype), strict=True))
    given = {name: x for name, x in given.items() if x is not None}
    own = problem(case, s, t, given, reduction)
    upstream = np.asarray(1.7, dtype=own.dtype)
    if reduction == "none":
        upstream = np.linspace(0.3, 2.0, int(np.prod(s.shape[:-1])), dtype=own.dtype).reshape(s.shape[:-1])
    asked = {"value": True, "student": True, "teacher": True, "upstream": upstream}
    with np.errstate(all="ignore"):
        found = rows.sweep(own, device=on_cpu[0], **asked)
        wide = {name: x.astype("float64") if x.dtype.kind == "f" else x for name, x in given.items()}
        exact = problem(case, s.astype("float64"), t.astype("float64"), wide, reduction)
        expected = _sweep.sweep_rows(exact, **asked | {"upstream": upstream.astype("float64")})
    computed = np.dtype(own.dtype).name
    assert_near(np.asarray(found.value, dtype="float64"), expected.value, computed, ulps=4 * ulps, by="entry")
    for one, other, name in ((found.student, expected.student, s), (found.teacher, expected.teacher, t)):
        assert one.dtype == name.dtype
        close_to = 1 if one.dtype == np.float16 else ulps
        assert_near(one.astype("float64"), other, one.dtype.name, ulps=close_to)


@EACH
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_kernels_are_the_sweep(on_cpu, case, mask, dtype):
    for reduction in ("mean", "none"):
        compare(on_cpu, case, dtype, *call(case, mask), ulps_of(dtype), reduction)


@EACH
@pytest.mark.parametrize("classes", [1, 2, 32, 33, 600, 4096])
def test_of_any_number_of_classes(on_cpu, case, classes):
    """Loads of 16 bytes and single ones, rows shorter and longer than a group of threads."""
    compare(on_cpu, case, "float32", *call(case, "samples", classes=classes, batch=(2,)), 64)
    the_plan = on_cpu[1][-1]
    assert the_plan.vector == (4 if classes % 4 == 0 else 1)
    assert the_plan.group == {1: 32, 2: 32, 32: 32, 33: 64, 600: 256, 4096: 256}[classes]


@pytest.mark.parametrize("dtypes", [("float16", "float16"), ("float16", "float32"), ("float32", "float64")])
@pytest.mark.parametrize("case", [case for case in CASES if case.id in ("kl", "gkl", "gkl-prior")], ids=lambda c: c.id)
def test_of_halves_and_of_two_dtypes(on_cpu, case, dtypes):
    widest = "float64" if "float64" in dtypes else "float32"
    s, t, given = call(case, "elements", classes=64)
    compare(on_cpu, case, widest, s, t, given, 32, dtypes=dtypes)


def test_half_and_bfloat16_round_as_numpy_does(on_cpu, tmp_path):
    """Every float16 and bfloat16, and floats between them."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    program = tmp_path / "halves.cpp"
    program.write_text("""
#define REAL float
#define STUDENT Half
#define TEACHER Brain
#define VECTOR 1
#define GROUP 32
#define BLOCK 256
#include "rows.cu"
extern "C" void to_float(const Half* h, const Brain* b, float* x, float* y, int n) {
  for (int i = 0; i < n; ++i) { x[i] = wide(h[i]); y[i] = wide(b[i]); }
}
extern "C" void from_float(const float* x, Half* h, Brain* b, int n) {
  for (int i = 0; i < n; ++i) { narrow((double)x[i], h[i]); narrow((double)x[i], b[i]); }
}
""")
    path = tmp_path / "halves.so"
    subprocess.run(["g++", "-shared", "-fPIC", f"-I{SOURCE.parent}", str(program), "-o", str(path)], check=True)
    kernels = ctypes.CDLL(str(path))

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


@EACH
@pytest.mark.parametrize("kind", ["offset", "confident", "close", "spread"])
def test_extremes_keep_their_digits(on_cpu, case, kind):
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


@EACH
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
        ([[0.0, -np.inf, 2.0], [0.0, 1.0, 2.0]], [[0.0, -2000.0, 1.0], [0.0, 1.0, 1.0]]),
    ],
    ids=["student", "teacher", "both", "absent", "student-row", "nan", "inf", "underflown"],
)
def test_infinities_and_nan_end_as_in_the_sweep(on_cpu, case, rows_of):
    given = {}
    if case.prior:
        given["prior"] = np.asarray([[0.2, 0.5, 0.3], [1.0, 0.0, 2.0], [0.1, 0.1, 0.8]])
        if case.prior == "labels":
            given["labels"] = np.asarray([0, 2])
        else:
            given["prior"] = given["prior"][:2]
    s, t = (np.asarray(x) for x in rows_of)
    compare(on_cpu, case, "float64", s, t, given, 32, "none")


def test_a_label_that_names_no_class_gives_nan(on_cpu):
    case = next(case for case in CASES if case.id == "gkl-prior")
    s, t, given = call(case, "none")
    own = problem(case, s, t, given)
    bad = np.where(np.arange(5) == 2, 7, given["labels"])
    found = rows.sweep(own._replace(arrays=own.arrays._replace(labels=bad)), device=on_cpu[0], value=True)
    assert np.isnan(found.value)


def test_only_what_is_asked_for_is_made(on_cpu):
    own = problem(CASES[7], *call(CASES[7], "none"))
    for asked in ({"value": True}, {"student": True}, {"teacher": True}):
        found = rows.sweep(own, device=on_cpu[0], **asked)
        assert {name for name in ("value", "student", "teacher") if getattr(found, name) is not None} == set(asked)
    known = _sweep.totals(own)
    half = own._replace(arrays=own.arrays._replace(student=own.arrays.student[:2], teacher=own.arrays.teacher[:2]))
    part = rows.sweep(half, known, device=on_cpu[0], student=True).student
    assert_near(part, _sweep.sweep_rows(own, student=True).student[:2], "float64", ulps=16)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(q - p) * student_rate", "(p - q) * student_rate"),
        ("student -= teacher", "student += teacher"),
        ("infinite ? d : about_zero - r.mean", "infinite ? d : about_zero"),
        ("0.5 * r.mass * sums.squares", "r.mass * sums.squares"),
        ("x.mass = a.mass + b.mass;", "x.mass = a.mass;"),
        ("x.total * (double)decay(x.top - value, per_temperature)", "x.total"),
        ("exponential((REAL)(by * per_temperature))", "exponential((REAL)by)"),
        ("pow(total, -g.gamma)", "1.0 / total"),
        ("x.moment -= x.mass == 0.0", "x.moment += x.mass == 0.0"),
    ],
)
def test_a_mutation_of_the_kernels_is_caught(tmp_path, on_cpu, monkeypatch, old, new):
    text = SOURCE.read_text()
    assert text.count(old) == 1
    (tmp_path / "rows.cu").write_text(text.replace(old, new))
    shutil.copy(HERE / "cuda_on_cpu.cpp", tmp_path)
    case = next(case for case in CASES if case.id == "gkl-tau")
    s, t, given = call(case, "none", classes=100)
    options = None

    def start(the_plan, name, arguments):
        nonlocal options
        path = tmp_path / "rows.so"
        if options != the_plan.options:
            options = the_plan.options
            command = ["g++", "-O1", "-shared", "-fPIC", "-std=c++14", *options, "-o", str(path)]
            subprocess.run([*command, str(tmp_path / "cuda_on_cpu.cpp")], check=True, capture_output=True)
        kinds = {int: ctypes.c_longlong, float: ctypes.c_double}
        given = [
            kinds[type(x)](x) if type(x) in kinds else ctypes.c_void_p(None if x is None else x.ctypes.data)
            for x in arguments
        ]
        getattr(ctypes.CDLL(str(path)), name)(*given)

    mutant = on_cpu[0]._replace(start=start)
    with pytest.raises(AssertionError, match="units in the last place"):
        compare((mutant, []), case, "float64", s, t, given, 64)


# --- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "shape", "offset", "vector", "group", "blocks"),
    [
        ("float32", "float32", (8192, 1000), 0, 4, 256, 8192),
        ("float32", "float32", (10, 10), 0, 1, 32, 2),
        ("float32", "float32", (9, 64), 4, 1, 64, 3),
        ("float16", "float16", (4, 2, 128_256), 0, 8, 256, 8),
        ("float16", "float64", (1, 6), 0, 2, 32, 1),
        ("float64", "float64", (7,), 0, 1, 32, 1),
    ],
)
def test_the_plan(student, teacher, shape, offset, vector, group, blocks):
    s, t = np.zeros(shape, dtype=student), np.zeros(shape, dtype=teacher)
    found = plan.plan_of(problem_builder(gklx.kl)(s, t), (4096, 8192 + offset))
    assert (found.vector, found.group, found.blocks) == (vector, group, blocks)
    assert f"-DBLOCK={plan.THREADS}" in found.options
    assert set(re.findall(r"-D(\w+)=", " ".join(found.options))) == {
        "REAL", "STUDENT", "TEACHER", "VECTOR", "GROUP", "BLOCK",
    }  # fmt: skip


def test_arrays_on_the_cpu_are_not_taken():
    assert not rows.takes(problem_builder(gklx.kl)(np.zeros((2, 3)), np.zeros((2, 3))))
    backends.needs("torch")
    torch = pytest.importorskip("torch")
    assert not rows.takes(problem_builder(gklx.kl)(torch.zeros(2, 3), torch.zeros(2, 3)))


def test_kernels_that_do_not_compile_are_said_so_once_and_left(monkeypatch):
    def fails(*_):
        raise OSError("libnvrtc.so: cannot open shared object file")

    cupy = types.SimpleNamespace(
        cuda=types.SimpleNamespace(
            runtime=types.SimpleNamespace(getDeviceCount=lambda: 1, CUDARuntimeError=RuntimeError),
            Device=lambda: types.SimpleNamespace(id=0),
        )
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(launch, "_kernel", fails)
    launch.available.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="array operations take their place: libnvrtc"):
            assert not launch.available()
        assert not launch.available()
    finally:
        launch.available.cache_clear()


# --- compiled, and on a GPU -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [("float", "float", "float", 4), ("double", "double", "double", 2),
                                   ("float", "Half", "Half", 8), ("float", "Brain", "float", 4)])  # fmt: skip
@pytest.mark.parametrize("architecture", ["compute_80", "compute_90"])
def test_nvrtc_compiles_them(kinds, architecture):
    """The compiler that CuPy calls needs no GPU; of a warning there is none."""
    nvrtc = nvrtc_library()
    real, student, teacher, vector = kinds
    the_plan = plan.Plan(real, student, teacher, vector, 64, 1)
    program, log_size = ctypes.c_void_p(), ctypes.c_size_t()
    text = launch.source().encode()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"rows.cu", 0, None, None) == 0
    options = [f"--gpu-architecture={architecture}", "--std=c++14", "--fmad=false", *the_plan.options]
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), given)
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(log_size))
    log = ctypes.create_string_buffer(log_size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    assert status == 0, log.value.decode()
    assert not log.value.strip(), log.value.decode()


def nvrtc_library():
    try:
        import nvidia.cuda_nvrtc as package
    except ImportError:
        pytest.skip("NVRTC is not installed: nvidia-cuda-nvrtc-cu12")
    path = next(Path(next(iter(package.__path__))).glob("lib/libnvrtc.so*"))
    return ctypes.CDLL(str(path))


@EACH
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_on_a_gpu_kernels_are_the_sweep(case, mask, library):
    backends.needs(library)
    module = pytest.importorskip(library)
    if not launch.available():
        pytest.skip("no NVIDIA GPU with CuPy here")
    s, t, given = call(case, mask, batch=(6,), classes=1000)

    def put(x):
        x = x.astype("float32") if x.dtype.kind == "f" else x
        return module.asarray(x) if library == "cupy" else module.from_numpy(np.array(x)).cuda()

    own = problem_builder(loss_of(case))(put(s), put(t), **{name: put(x) for name, x in given.items()})
    assert rows.takes(own)
    found = rows.sweep(own, value=True, student=True, teacher=True)
    expected = _sweep.sweep_rows(own, value=True, student=True, teacher=True)
    for one, other in zip(found[:3], expected[:3], strict=True):
        one, other = (np.asarray(x.get() if library == "cupy" else x.cpu(), dtype="float64") for x in (one, other))
        assert_near(one, other, "float32", ulps=128)


def test_on_a_gpu_losses_go_by_the_kernels(monkeypatch):
    backends.needs("torch")
    torch = pytest.importorskip("torch")
    if not launch.available() or not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU with CuPy here")
    started = []
    original = launch._start
    monkeypatch.setattr(launch, "_start", lambda *given: started.append(given[3]) or original(*given))
    s, t = torch.randn(2, 64, 1000, device="cuda")
    s.requires_grad_()
    partial(gklx.gkl, gamma=0.5)(s, t).backward()
    assert started == ["statistics", "gradients"]
