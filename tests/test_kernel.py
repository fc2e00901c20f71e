"""The CPU row kernel by itself, called as the package calls it, against the losses' definitions.

`definition` is written in NumPy's widest type, row by row, on the valid classes alone; it shares nothing with the
package. Every test runs on each instruction set that the library was compiled for and this machine has.

Under the sanitizers, with a library built by `cmake -S . -B build/sanitized -DGKLX_SANITIZE=ON`, see CMakeLists.txt:

    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \\
        GKLX_KERNEL_LIBRARY=build/sanitized/rows.so python -m pytest tests/test_kernel.py
"""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import backends
import oracle
from closeness import assert_near
from gklx._run import cpu_library

pytestmark = [pytest.mark.library_independent, pytest.mark.version_independent]

ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
if backends.kernel_absent("numpy") and not backends.KERNEL_REQUIRED:
    pytest.skip(backends.kernel_absent("numpy"), allow_module_level=True)

INF, NAN = np.inf, np.nan
DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SETS = ["sse2", "avx2", "avx512"] if platform.machine() in ("x86_64", "AMD64") else ["neon", "generic"]
ADDRESSES = {name for name, kind in cpu_library.RowCall._fields_ if kind is ctypes.c_void_p}


def load(instruction_set, folder):
    """The library, loaded again with this instruction set; None where the machine or the library lacks it."""
    source = Path(cpu_library.library()._name)
    copy = Path(folder) / f"{instruction_set}{source.suffix}"
    shutil.copy(source, copy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GKLX_INSTRUCTION_SET", instruction_set)
        loaded = ctypes.CDLL(str(copy))
    loaded.gklx_instruction_set.restype = ctypes.c_char_p
    loaded.gklx_rows.argtypes = loaded.gklx_check_prior.argtypes = [ctypes.c_void_p]
    return loaded if loaded.gklx_instruction_set().decode() == instruction_set else None


FOLDER = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # Windows keeps a library that is loaded
KERNELS = {name: load(name, FOLDER.name) for name in SETS}


@pytest.fixture(params=[name for name in SETS if KERNELS[name]])
def kernel(request):
    return KERNELS[request.param]


@pytest.mark.parametrize("name", SETS)
def test_every_instruction_set_is_tested(name):
    if KERNELS[name] is None:
        pytest.skip(f"this machine, or this library, has no {name}")
    assert KERNELS[name].gklx_instruction_set().decode() == name


def run(
    kernel,
    name,
    s,
    t,
    *,
    prior=None,
    labels=None,
    mse_weight=1.0,
    ce_weight=1.0,
    gamma=1.0,
    temperature=1.0,
    weight_temperature=1.0,
    symmetric=True,
    normalize="batch",
    sample_weight=None,
    where=None,
    reduction="mean",
    upstream=None,
    totals=None,
    ranks=1.0,
    threads=1,
    asked=("value", "to_student", "to_teacher"),
):
    """The requested results, by name. The arrays are filled with 7 before, so that unwritten entries are noticed."""
    rows, classes = s.shape
    real = np.result_type(*(x.dtype if x.dtype.itemsize > 2 else np.float32 for x in (s, t)))
    shapes = {
        "value": rows if reduction == "none" else (),
        "totals_out": 4,
        "to_student": s.shape,
        "to_teacher": t.shape,
    }
    dtypes = {
        "to_student": s.dtype,
        "to_teacher": t.dtype,
        "totals_out": np.float64,
        "has_valid": bool,
        "undefined": bool,
        "student_class": np.int64,
        "teacher_class": np.int64,
    }
    found = {key: np.full(shapes.get(key, rows), 7, dtypes.get(key, real)) for key in asked}
    given = {"student": s, "teacher": t, "prior": prior}
    given["labels"] = None if labels is None else np.asarray(labels, dtype=np.int64)
    given["sample_weight"] = None if sample_weight is None else np.asarray(sample_weight, dtype=real)
    given["upstream"] = None if upstream is None else np.asarray(upstream, dtype=real)
    given["totals"] = None if totals is None else np.asarray(totals, dtype=np.float64)
    call = cpu_library.RowCall(
        rows=rows, classes=classes, temperature=temperature, gamma=gamma, mse_weight=mse_weight, ce_weight=ce_weight,
        ranks=ranks, student_type=cpu_library.TYPES[s.dtype.name], teacher_type=cpu_library.TYPES[t.dtype.name],
        weight_temperature=temperature if name == "dkl" else weight_temperature,
        decomposed=name != "kl", tempered=name == "dkl", symmetric=symmetric and name in ("ikl", "gkl"),
        batch_normalized=name == "gkl" and normalize == "batch", reduction=cpu_library.REDUCTIONS[reduction],
        threads=threads,
    )  # fmt: skip
    if prior is not None:
        call.prior_type = cpu_library.TYPES[prior.dtype.name]
    if upstream is not None:
        call.upstream_per_row = np.ndim(upstream) > 0
    if where is not None:
        given["where"] = where = np.broadcast_to(where, s.shape)
        call.where_row_stride, call.where_class_stride = where.strides
    for key, x in {**given, **found}.items():
        if x is not None:
            assert key == "where" or x.flags.c_contiguous
            setattr(call, key, x.ctypes.data)
    assert kernel.gklx_rows(ctypes.addressof(call)) == 0
    return found


REALS = ("kl", "mse", "ce", "mass", "student_peak", "teacher_peak", "reverse_kl")


def log_softmax(x):
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def definition(
    name,
    s,
    t,
    *,
    prior=None,
    labels=None,
    mse_weight=1.0,
    ce_weight=1.0,
    gamma=1.0,
    temperature=1.0,
    weight_temperature=1.0,
    symmetric=True,
    normalize="batch",
    sample_weight=None,
    where=None,
    reduction="mean",
    upstream=1.0,
):
    """All results of the kernel in longdouble; masked classes are removed from a row first."""
    rows, classes = s.shape
    single = np.float64 not in (s.dtype, t.dtype)
    smallest = np.finfo(np.float32 if single else np.float64).smallest_normal  # less than that is no probability
    gamma = np.longdouble(np.float32(gamma) if single else gamma)
    s, t = s.astype(np.longdouble), t.astype(np.longdouble)
    prior = None if prior is None else prior.astype(np.longdouble)
    T, tau = np.longdouble(temperature), np.longdouble(temperature if name == "dkl" else weight_temperature)
    symmetric, batch = symmetric and name in ("ikl", "gkl"), name == "gkl" and normalize == "batch"
    per_square = 1 / T**2 if name in ("kl", "dkl") else np.longdouble(1)
    v = np.ones(rows, np.longdouble) if sample_weight is None else np.asarray(sample_weight, np.longdouble).copy()
    found = {key: np.zeros(rows, np.longdouble) for key in REALS}
    has_valid, undefined = np.zeros((2, rows), dtype=bool)
    difference, gap = np.zeros((2, rows, classes), np.longdouble)  # W w (d - mean), q - p
    for i in range(rows):
        keep = ~((s[i] == -INF) & (t[i] == -INF))
        if where is not None:
            keep &= np.broadcast_to(where, s.shape)[i]
        if v[i] == 0 or not keep.any():
            v[i] = 0
            continue
        has_valid[i] = True
        a, b = s[i][keep], t[i][keep]
        undefined[i] = np.isnan(a).any() or np.isnan(b).any() or not np.isfinite([a.max(), b.max()]).all()
        if undefined[i]:
            for key in REALS:
                if key != "mass":
                    found[key][i] = NAN
            gap[i, keep] = NAN
        if prior is not None:
            if labels is not None and not 0 <= labels[i] < classes:
                w = np.full(keep.sum(), NAN)
            else:
                w = np.where(prior >= 0, prior, NAN)[i if labels is None else labels[i]][keep] ** gamma
        elif gamma == 0:
            w = np.ones(keep.sum())
        else:
            w = np.exp(gamma * log_softmax(b / tau))
            w = np.where(w < smallest, 0, w)
        if prior is None and not (np.isfinite(b.max()) and not np.isnan(b).any()):
            w = np.full(len(b), NAN)
        if name == "kl":
            w = np.exp(log_softmax(b / T))
            w = np.where(w < smallest, 0, w)
        W = found["mass"][i] = w.sum()
        if undefined[i]:
            difference[i, keep] = np.where((w == 0) & ~np.isnan(W), 0, NAN)
            continue
        log_q, log_p = log_softmax(a / T), log_softmax(b / T)
        p, q = np.exp(log_p), np.exp(log_q)
        gap[i, keep] = q - p
        found["student_peak"][i], found["teacher_peak"][i] = q.max(), p.max()
        unreachable = ((a == -INF) & (b > -INF)).any()
        some = (p > 0) & (a > -INF)
        found["ce"][i] = INF if unreachable else -(p[some] * log_q[some]).sum()
        found["kl"][i] = INF if unreachable else (p[some] * (log_p - log_q)[some]).sum()
        some = (q > 0) & (b > -INF)
        unreachable = ((b == -INF) & (a > -INF)).any()
        found["reverse_kl"][i] = INF if unreachable else (q[some] * (log_q - log_p)[some]).sum()
        d = b - a
        if np.isnan(W):
            found["mse"][i], difference[i, keep] = NAN, NAN
            continue
        some = (w > 0) & np.isfinite(d)
        c = np.zeros(len(d), np.longdouble)
        if some.any():
            mean = (w[some] * d[some]).sum() / w[some].sum()
            c[some] = d[some] - mean
            c[some] -= (w[some] * c[some]).sum() / w[some].sum()
        rise, fall = ((w > 0) & (d == INF)).any(), ((w > 0) & (d == -INF)).any()
        if rise or fall:
            c = np.where(np.isinf(d), d, NAN if rise and fall else -INF if rise else INF)
            found["mse"][i] = INF
        else:
            found["mse"][i] = 0.5 * W * (w * c**2).sum() * (per_square if name == "dkl" else 1)
        difference[i, keep] = np.where(w > 0, W * w * np.where(w > 0, c, 0), 0)
    found["has_valid"], found["undefined"] = has_valid, undefined
    read = np.ones(rows) if sample_weight is None else np.asarray(sample_weight) != 0
    found["student_class"], found["teacher_class"] = (np.where(read, x.argmax(-1), 0) for x in (s, t))
    total, squared = v.sum(), (v[has_valid] * found["mass"][has_valid] ** 2).sum()
    factor = (total / squared if squared else 1) if batch and mse_weight else 1
    share = v / total if reduction == "mean" and total else v
    entries = np.zeros(rows, np.longdouble)
    for i in np.flatnonzero(has_valid):
        if name == "kl":
            entries[i] = share[i] * found["kl"][i]
            continue
        entries[i] = mse_weight * factor * found["mse"][i] if mse_weight else 0
        entries[i] = share[i] * (entries[i] + (ce_weight * found["ce"][i] if ce_weight else 0))
    found["value"] = entries if reduction == "none" else entries.sum()
    rate = (share * np.asarray(upstream, np.longdouble))[:, None]
    of_difference = rate * (per_square if name == "kl" else mse_weight * factor * per_square)
    of_gap = rate * (1 if name == "kl" else ce_weight) / T
    with np.errstate(invalid="ignore"):
        difference = np.where((of_difference == 0) | (difference == 0), 0, of_difference * difference)
        gap = np.where((of_gap == 0) | (gap == 0), 0, of_gap * gap)
    found["to_teacher"] = difference
    found["to_student"] = gap - difference if symmetric else gap
    return found


EVERYTHING = (
    "value", "to_student", "to_teacher", *REALS, "has_valid", "undefined", "student_class", "teacher_class",
)  # fmt: skip


def compare(kernel, name, s, t, *, ulps=32, threads=1, asked=EVERYTHING, value_scale=0.0, scale=0.0, **settings):
    """Every result that was asked for, in units in the last place of its own type."""
    found = run(kernel, name, s, t, threads=threads, asked=asked, **settings)
    settings.pop("totals", None)
    if settings.get("upstream") is None:
        settings.pop("upstream", None)
    with np.errstate(all="ignore"):
        exact = definition(name, s, t, **settings)
    for key in asked:
        if key in ("has_valid", "undefined", "student_class", "teacher_class"):
            assert found[key].tolist() == exact[key].tolist(), key
            continue
        if name == "kl" and key in ("mse", "mass"):  # of KL's own weights, p
            continue
        valid = ... if key in ("value", "to_student", "to_teacher") else exact["has_valid"]
        dtype = found[key].dtype.name
        granted = ulps if dtype in ("float32", "float64") else 1
        own_scale = scale if key.startswith("to_") else np.min(scale)  # that of gradients may have an entry a row
        if key in ("value", "kl", "reverse_kl", "mse", "ce", "mass"):
            own_scale = value_scale
        with np.errstate(over="ignore"):
            expected = exact[key].astype(found[key].dtype) if granted == 1 else exact[key].astype(np.float64)
        try:
            assert_near(
                np.asarray(found[key], np.float64)[valid], np.asarray(expected, np.float64)[valid], dtype, ulps=granted,
                scale=own_scale, by="row" if key.startswith("to_") else "entry",
            )  # fmt: skip
        except AssertionError as error:
            raise AssertionError(f"{key}: {error}") from None
    return found


def logits(seed, rows, classes, dtype="float32", teacher=None, size=3.0):
    s, t = size * np.random.default_rng(seed).standard_normal((2, rows, classes))
    return s.astype(DTYPES[dtype]), t.astype(DTYPES[teacher or dtype])


LOSSES = {
    "kl": ("kl", {}),
    "kl-T4": ("kl", {"temperature": 4.0}),
    "dkl": ("dkl", {"mse_weight": 2.0, "ce_weight": 0.5}),
    "dkl-T4": ("dkl", {"temperature": 4.0}),
    "ikl": ("ikl", {"mse_weight": 4.0}),
    "ikl-labels": ("ikl", {"prior": "labels"}),
    "ikl-tau2": ("ikl", {"weight_temperature": 2.0}),
    "gkl": ("gkl", {}),
    "gkl-labels": ("gkl", {"prior": "labels"}),
    "gkl-rows": ("gkl", {"prior": "rows"}),
    "gkl-recipe": ("gkl", {"prior": "labels", "gamma": 0.3, "temperature": 4.0}),
    "gkl-rows-2": ("gkl", {"prior": "rows", "gamma": 2.0}),
    "gkl-labels-0": ("gkl", {"prior": "labels", "gamma": 0.0}),
    "gkl-own-0": ("gkl", {"gamma": 0.0}),
    "gkl-own-0.3": ("gkl", {"gamma": 0.3, "temperature": 4.0, "weight_temperature": 4.0}),
    "gkl-own-2-tau": ("gkl", {"gamma": 2.0, "weight_temperature": 2.0}),
    "gkl-one-sided": ("gkl", {"symmetric": False}),
    "gkl-samples": ("gkl", {"normalize": "samples", "gamma": 0.3}),
    "gkl-no-mse": ("gkl", {"mse_weight": 0.0}),
    "gkl-no-ce": ("gkl", {"ce_weight": 0.0}),
}
ALL_LOSSES = pytest.mark.parametrize("loss", LOSSES)


def loss_of(loss, seed, rows, classes, dtype=np.float32):
    """The name and the settings of a loss, with the arrays that it takes."""
    name, settings = LOSSES[loss]
    settings, rng = dict(settings), np.random.default_rng(seed)
    kind = settings.pop("prior", None)
    if kind == "labels":
        settings["prior"] = rng.dirichlet(np.ones(classes), size=classes).astype(dtype)
        settings["labels"] = rng.integers(0, classes, rows)
    elif kind == "rows":
        settings["prior"] = rng.dirichlet(np.ones(classes), size=rows).astype(dtype)
    return name, settings


@ALL_LOSSES
@pytest.mark.parametrize("classes", [1, 2, 3, 7, 10, 41, 1000, 4099])
def test_every_loss_at_every_number_of_classes(kernel, loss, classes):
    rows = 5 if classes <= 1000 else 2
    if "labels" in loss or "recipe" in loss:
        classes = min(classes, 1000)
    name, settings = loss_of(loss, 1, rows, classes)
    s, t = logits(0, rows, classes)
    if classes == 1:
        found = run(kernel, name, s, t, asked=EVERYTHING, **settings)
        assert found["value"] == 0
        assert (found["to_student"] == 0).all()
        assert (found["to_teacher"] == 0).all()
    else:
        compare(kernel, name, s, t, ulps=32, **settings)


@ALL_LOSSES
def test_every_loss_in_float64(kernel, loss):
    name, settings = loss_of(loss, 1, 6, 301, np.float64)
    s, t = logits(0, 6, 301, "float64")
    compare(kernel, name, s, t, **settings)


@ALL_LOSSES
@pytest.mark.parametrize(("student", "teacher"), [(a, b) for a in DTYPES for b in DTYPES])
def test_every_pair_of_dtypes(kernel, loss, student, teacher):
    name, settings = loss_of(loss, 1, 4, 41, DTYPES[teacher])
    s, t = logits(0, 4, 41, student, teacher)
    compare(kernel, name, s, t, **settings)


@ALL_LOSSES
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("masks", ["none", "where", "weights", "both"])
def test_reductions_masks_and_weights(kernel, loss, reduction, masks):
    rng = np.random.default_rng(3)
    name, settings = loss_of(loss, 2, 12, 23)
    s, t = logits(1, 12, 23)
    if masks in ("where", "both"):
        settings["where"] = rng.random((12, 23)) < 0.7
        settings["where"][3] = False
        s[~settings["where"]] = NAN
        t[:, 5] = s[:, 5] = -INF
    if masks in ("weights", "both"):
        settings["sample_weight"] = rng.integers(0, 4, 12) / 2
        settings["sample_weight"][:2] = 0, 1.5
        s[0], t[0] = NAN, INF
        if "labels" in settings:
            settings["labels"][0] = -100
    for upstream in (None, 2.0, rng.standard_normal(12)):
        compare(kernel, name, s, t, reduction=reduction, upstream=upstream, **settings)


@pytest.mark.parametrize("shape", [(9,), (6, 1), (1, 1), (6, 9)])
def test_where_is_broadcast(kernel, shape):
    where = np.random.default_rng(0).random(shape) < 0.6
    s, t = logits(0, 6, 9)
    compare(kernel, "gkl", s, t, where=where)


# Rows with infinities, NaN or masks: each is tested alone and among ordinary rows.
SPECIAL_ROWS = {
    "teacher rules out": ([1.0, 2.0, 0.5, 0.1], [0.0, -INF, 1.0, 0.3]),
    "student rules out": ([1.0, -INF, 0.5, 0.1], [0.0, 0.5, 1.0, 0.3]),
    "both rule out the same": ([1.0, -INF, 0.5, 0.1], [0.0, -INF, 1.0, 0.3]),
    "opposite": ([0.0, -INF, 2.0, 0.1], [-INF, 1.0, 1.0, 0.3]),
    "underflown teacher": ([0.0, -INF, 0.0, 0.0], [0.0, -2000.0, 0.0, 0.0]),
    "one valid class": ([1.0, -INF, -INF, -INF], [2.0, -INF, -INF, -INF]),
    "no valid class": ([-INF, -INF, -INF, -INF], [-INF, -INF, -INF, -INF]),
    "student without a class": ([-INF, -INF, -INF, -INF], [0.0, 1.0, 2.0, 3.0]),
    "teacher without a class": ([0.0, 1.0, 2.0, 3.0], [-INF, -INF, -INF, -INF]),
    "NaN student": ([1.0, NAN, 0.5, 0.1], [0.0, 0.5, 1.0, 0.3]),
    "NaN teacher": ([1.0, 1.0, 0.5, 0.1], [0.0, NAN, 1.0, 0.3]),
    "NaN and masked": ([1.0, NAN, -INF, 0.1], [0.0, 0.5, -INF, 0.3]),
    "+inf student": ([1.0, INF, 0.5, 0.1], [0.0, 0.5, 1.0, 0.3]),
    "+inf teacher": ([1.0, 0.0, 0.5, 0.1], [0.0, INF, 1.0, 0.3]),
    "+inf both": ([1.0, INF, 0.5, 0.1], [0.0, INF, 1.0, 0.3]),
}


@ALL_LOSSES
@pytest.mark.parametrize("special", SPECIAL_ROWS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_rows_with_infinite_or_nan_logits(kernel, loss, special, dtype):
    classes = 4 + 29
    name, settings = loss_of(loss, 2, 3, classes, DTYPES[dtype])
    s, t = logits(1, 3, classes, dtype)
    s[1, :4], t[1, :4] = SPECIAL_ROWS[special]
    if "valid class" in special or "without" in special:
        s[1, 4:] = -INF if "student" in special or "valid class" in special else 0.0
        t[1, 4:] = -INF if "teacher" in special or "valid class" in special else 0.0
    settings.setdefault("normalize", "samples")  # the batch's normaliser has NaN in every row
    for only in (slice(1, 2), slice(0, 3)):
        given = dict(settings)
        for key in ("labels", *(["prior"] if "labels" not in settings else [])):
            if key in given:
                given[key] = np.ascontiguousarray(given[key][only])
        for reduction in ("none", "sum"):
            compare(kernel, name, s[only], t[only], reduction=reduction, **given)


@pytest.mark.parametrize("loss", ["gkl", "gkl-recipe", "gkl-rows-2", "gkl-own-0.3", "gkl-own-0"])
def test_normalizer_of_rows_without_a_valid_class(kernel, loss):
    """The kernel assumes the batch's sums from its shape, and must correct them for such rows and for NaN teachers."""
    name, settings = loss_of(loss, 2, 5, 9)
    s, t = logits(1, 5, 9)
    s[2] = t[2] = -INF
    compare(kernel, name, s, t, **settings)
    s[1, :4] = t[1, :4] = -INF
    compare(kernel, name, s, t, **settings)
    t[3, 2] = NAN
    found = run(kernel, name, s, t, **settings)
    assert np.isnan(found["value"])
    if "own" in loss or loss == "gkl":
        assert np.isnan(found["to_teacher"][0]).all()
    assert (found["to_teacher"][2] == 0).all()


def test_squares_beyond_the_largest_float_times_a_small_prior(kernel):
    """The formulas' sum of squares is infinite in float32; the kernel's is of a wider type."""
    s, t = np.asarray([[0.0, 1e30, 2.0]], np.float32), np.asarray([[1.0, 0.0, -2.0]], np.float32)
    prior = np.asarray([[1e-18, 2e-18, 3e-18]], np.float32)
    compare(kernel, "gkl", s, t, prior=prior, normalize="samples", ce_weight=0.0)


def test_masked_classes_have_gradient_positive_zero(kernel):
    s, t = logits(1, 3, 40)
    where = np.random.default_rng(0).random((3, 40)) < 0.5
    s[1, 3] = NAN
    where[1, 3] = True
    found = run(kernel, "gkl", s, t, where=where, normalize="samples")
    for key in ("to_student", "to_teacher"):
        outside = found[key][~where]
        assert (outside == 0).all()
        assert not np.signbit(outside).any()


def test_invalid_sample_weight_gives_nan(kernel):
    s, t = logits(1, 4, 6)
    for v in (NAN, -1.0):
        found = run(kernel, "kl", s, t, sample_weight=[1.0, v, 0.0, 2.0], reduction="none")
        assert np.isnan(found["value"]).tolist() == [False, True, False, False]
        assert np.isnan(found["to_student"]).all(axis=1).tolist() == [False, True, False, False]
        assert np.isnan(run(kernel, "kl", s, t, sample_weight=[1.0, v, 0.0, 2.0])["value"])


@pytest.mark.parametrize("gamma", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("entry", [-0.1, NAN])
def test_invalid_prior_entry_gives_nan(kernel, gamma, entry):
    s, t = logits(1, 3, 6)
    prior = np.random.default_rng(0).dirichlet(np.ones(6), size=3).astype(np.float32)
    prior[1, 2] = entry
    asked = ("value", "to_student", "to_teacher", "mass", "mse")
    settings = {"normalize": "samples", "reduction": "none", "gamma": gamma, "prior": prior}
    found = compare(kernel, "gkl", s, t, asked=asked, **settings)
    assert np.isnan(found["to_teacher"]).all(axis=1).tolist() == [False, True, False]
    compare(kernel, "gkl", s, t, asked=asked, where=np.arange(6) != 2, **settings)


def prior_is_right(kernel, prior, labels=None, threads=1):
    call = cpu_library.RowCall(
        prior=prior.ctypes.data, rows=len(prior), classes=prior.shape[1],
        prior_type=cpu_library.TYPES[prior.dtype.name], threads=threads,
    )  # fmt: skip
    if labels is not None:
        labels = np.asarray(labels, np.int64)
        call.labels, call.rows = labels.ctypes.data, len(labels)
    return {0: True, 2: False}[kernel.gklx_check_prior(ctypes.addressof(call))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 7, 50, 67])
def test_prior_is_checked_at_every_place(kernel, dtype, classes):
    kind = DTYPES[dtype]
    limits = ml_dtypes.finfo(kind)
    right = [0.0, -0.0, limits.smallest_subnormal, limits.smallest_normal, 1.0, limits.max]
    prior = np.resize(np.asarray(right, kind), (classes, classes))
    assert prior_is_right(kernel, prior)
    for wrong in (-limits.smallest_subnormal, -1.0, -limits.max, INF, -INF, NAN, -NAN):
        for place in range(classes):
            changed = prior.copy()
            changed[classes // 2, place] = wrong
            assert not prior_is_right(kernel, changed), (wrong, place)
            assert not prior_is_right(kernel, changed, [0, classes // 2])
            if classes > 1:
                assert prior_is_right(kernel, changed, [classes // 2 - 1])  # names no wrong row
            assert not prior_is_right(kernel, changed, [0] * classes)  # of as many rows as classes all are checked


@pytest.mark.parametrize("rows", [1, 6, 40])
def test_labels_of_a_prior_are_checked_at_every_place(kernel, rows):
    prior, labels = np.ones((7, 7), np.float32), np.arange(rows) % 7
    assert prior_is_right(kernel, prior, labels)
    for wrong in (-1, 7, 2**40, -(2**63), 2**63 - 1):
        for place in range(rows):
            assert not prior_is_right(kernel, prior, np.where(np.arange(rows) == place, wrong, labels))


def test_prior_without_labels_may_have_more_rows_than_classes(kernel):
    prior = np.ones((50_000, 3), np.float32)
    assert prior_is_right(kernel, prior, threads=2)
    prior[40_000, 1] = -1.0
    assert not prior_is_right(kernel, prior, threads=2)


def test_invalid_label_gives_nan(kernel):
    s, t = logits(1, 4, 6)
    prior = np.random.default_rng(0).dirichlet(np.ones(6), size=6).astype(np.float32)
    for gamma in (1.0, 0.3):
        settings = {"prior": prior, "labels": np.asarray([2, -1, 6, 5]), "gamma": gamma, "normalize": "samples"}
        found = compare(kernel, "gkl", s, t, reduction="none", **settings)
        assert np.isnan(found["value"]).tolist() == [False, True, True, False]
        assert np.isnan(found["to_teacher"]).all(axis=1).tolist() == [False, True, True, False]


@ALL_LOSSES
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_opposite_offsets_of_the_networks(kernel, loss, dtype, offset):
    """The gradient must be that of the rounded logits, whose differences have more digits than a float."""
    name, settings = loss_of(loss, 2, 4, 501, DTYPES[dtype])
    s, t = logits(1, 4, 501, "float64")
    compare(kernel, name, (s - offset).astype(dtype), (t + offset).astype(dtype), **settings)


@ALL_LOSSES
@pytest.mark.parametrize("fill", ["-1e9", "smallest"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_same_fill_value_in_both_networks(kernel, loss, fill, dtype):
    name, settings = loss_of(loss, 2, 4, 64, DTYPES[dtype])
    s, t = logits(1, 4, 64, dtype)
    s[:, ::3] = t[:, ::3] = -1e9 if fill == "-1e9" else np.finfo(dtype).min
    compare(kernel, name, s, t, **settings)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("loss", ["kl", "gkl", "gkl-labels", "gkl-labels-0"])
def test_logits_near_the_largest_float(kernel, dtype, loss):
    """For large t and s of opposite signs t − s overflows; value and gradients must be finite."""
    name, settings = loss_of(loss, 2, 3, 8, DTYPES[dtype])
    s, t = logits(1, 3, 8, dtype)
    s[1] = -0.9 * np.finfo(dtype).max
    t[1] = 0.9 * np.finfo(dtype).max
    found = run(kernel, name, s, t, reduction="none", normalize="samples", **settings)
    for x in found.values():
        assert np.isfinite(x).all()
    assert abs(found["to_teacher"][1]).max() < 1e-3 * np.finfo(dtype).eps * np.finfo(dtype).max


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-12, 1.0, 1e12, 1e30])
@pytest.mark.parametrize("gamma", [1.0, 0.3, 2.0])
@pytest.mark.parametrize("kind", ["rows", "labels"])
def test_scale_of_a_prior_cancels(kernel, scale, gamma, kind):
    """GKL's batch normaliser cancels any scale of the weights."""
    s, t = logits(1, 7, 50)
    rng = np.random.default_rng(1)
    prior = rng.dirichlet(np.ones(50), size=50 if kind == "labels" else 7)
    settings = {"labels": rng.integers(0, 50, 7)} if kind == "labels" else {}
    small = (scale * prior).astype(np.float32)
    asked = ("value", "to_student", "to_teacher")
    compare(kernel, "gkl", s, t, prior=small, gamma=gamma, asked=asked, **settings)


@pytest.mark.parametrize("kind", ["rows", "labels"])
def test_subnormal_weights_of_a_small_prior_keep_their_digits(kernel, kind):
    """Products with subnormal weights keep their digits if the whole row is small."""
    s, t = logits(1, 1, 4)
    prior = np.asarray([[4e-11, 3e-12, 1.7e-44, 2e-30]] * (4 if kind == "labels" else 1), np.float32)
    settings = {"prior": prior, "sample_weight": [4e29], "reduction": "sum", "ce_weight": 0.0}
    if kind == "labels":
        settings["labels"] = np.asarray([2])
    asked = ("to_student", "to_teacher")
    found, exact = run(kernel, "ikl", s, t, asked=asked, **settings), definition("ikl", s, t, **settings)
    for key in asked:
        np.testing.assert_allclose(found[key], exact[key].astype(np.float64), rtol=4e-6)


def test_power_of_an_underflowing_probability_is_kept(kernel):
    """exp(-150) is 0 in float32, but its power 0.1 is not."""
    s, t = np.zeros((1, 3), np.float32), np.asarray([[0.0, -150.0, -1.0]], np.float32)
    compare(kernel, "gkl", s, t, gamma=0.1, ulps=8)
    prior = np.asarray([[1.0, 1e-44, 0.3]], np.float32)
    compare(kernel, "gkl", s, t, gamma=0.1, prior=prior, ulps=8)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1e-1, 1e-3, 0.0])
def test_kl_of_close_rows_keeps_its_digits(kernel, dtype, size):
    rng = np.random.default_rng(2)
    t = (3 * rng.standard_normal((50, 1000))).astype(dtype)
    s = (t + size * rng.standard_normal(t.shape)).astype(dtype)
    if size == 0:
        s = np.nextafter(t, rng.choice([-INF, INF], t.shape).astype(dtype))
    found = run(kernel, "kl", s, t, reduction="none", asked=("value", "to_student", "to_teacher"))
    assert (found["value"] >= 0).all()
    if size:
        exact = definition("kl", s, t, reduction="none")["value"]
        assert (abs(found["value"] - exact) / exact).max() < 16 * np.finfo(dtype).eps / size
    assert (run(kernel, "kl", t, t, reduction="none")["value"] == 0).all()
    moved = np.float64(1 << 10) + t.astype(np.float16).astype(dtype)
    assert (run(kernel, "kl", moved, moved - 1024, reduction="none")["value"] == 0).all()


@pytest.mark.parametrize("kind", ["confident", "confident-teacher", "opposed", "wide"])
@pytest.mark.parametrize("classes", [10, 1000])
def test_confident_rows_keep_their_digits(kernel, kind, classes):
    s, t = 3.0 * np.random.default_rng(1).standard_normal((2, 8, classes))
    if kind == "confident":
        s[:, 0] += 20.0
        t[:, 0] += 18.0
    elif kind == "confident-teacher":
        t[:, 1] += 25.0
    elif kind == "opposed":
        s[:, 0] += 60.0
        t[:, 1] += 60.0
    else:
        s, t = 5.0 * s, 5.0 * t
    s, t = s.astype(np.float32), t.astype(np.float32)
    for loss in ("kl", "dkl", "ikl", "gkl"):
        name, settings = loss_of(loss, 1, 8, classes)
        scale = settings.get("mse_weight", 1.0) * scale_of(s.astype(float), t.astype(float))
        compare(kernel, name, s, t, value_scale=1.0, scale=scale, **settings)


def scale_of(s, t):
    """The size of the summands of d's mean in each row. They may cancel: see test_precision.py."""
    t, s = t - t.max(axis=-1, keepdims=True), s - s.max(axis=-1, keepdims=True)
    p = np.exp(t) / np.exp(t).sum(axis=-1, keepdims=True)
    return (p * (1 - p) * (abs(t) + abs(s))).max(axis=-1, keepdims=True) / len(s)


@pytest.mark.parametrize("loss", ["kl", "gkl", "gkl-recipe", "gkl-own-0.3"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_results_do_not_depend_on_the_number_of_threads(kernel, loss, dtype):
    rows, classes = 700, 501
    name, settings = loss_of(loss, 2, rows, classes)
    s, t = logits(1, rows, classes, dtype)
    s[5, 3], t[7, 8] = -INF, -INF
    alone = run(kernel, name, s, t, asked=EVERYTHING, **settings)
    for threads in (2, 5):
        several = run(kernel, name, s, t, asked=EVERYTHING, threads=threads, **settings)
        for key, x in alone.items():
            assert x.tobytes() == several[key].tobytes(), key


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 2, 63, 64, 65, 1000])
def test_class_of_the_largest_logit_is_that_of_argmax(kernel, dtype, classes):
    """As in NumPy, the first of several maxima, and the first NaN if there is one; for any requested results."""
    s, t = logits(3, 9, classes, dtype)
    at = np.arange(0, 9) * classes // 9
    t[np.arange(9), at], t[:, -1] = 50, 50
    s[1:] = 0
    s[2, -1], s[3, classes // 2 :], s[4], s[5], t[5], s[6, -1], t[6, 0] = INF, NAN, -INF, -INF, -INF, -0.0, NAN
    s[7], s[7, classes // 3] = -INF, -7
    asked = ("student_class", "teacher_class")
    found = run(kernel, "gkl", s, t, asked=asked)
    for key, x in zip(asked, (s, t), strict=True):
        assert found[key].tolist() == x.astype(np.float64).argmax(-1).tolist()
        assert run(kernel, "kl", s, t, asked=(key, "value"))[key].tolist() == found[key].tolist()
    masked = run(kernel, "gkl", s, t, asked=asked, where=np.zeros((9, classes), dtype=bool))
    assert masked["teacher_class"].tolist() == found["teacher_class"].tolist()
    unweighted = run(kernel, "gkl", s, t, asked=asked, sample_weight=np.zeros(9))
    assert not any(unweighted["teacher_class"])


@ALL_LOSSES
def test_results_do_not_depend_on_which_are_requested(kernel, loss):
    name, settings = loss_of(loss, 2, 6, 47)
    s, t = logits(1, 6, 47)
    for asked in (
        ("value",),
        ("to_student",),
        ("to_teacher",),
        ("to_student", "value"),
        ("kl", "mse", "ce"),
        ("mse",),
        ("reverse_kl",),
        ("reverse_kl", "to_student"),
        ("mass",),
        ("student_peak",),
        ("has_valid", "undefined"),
        ("value", "totals_out"),
    ):
        compare(kernel, name, s, t, asked=[key for key in asked if key != "totals_out"], **settings)


@pytest.mark.parametrize("loss", ["gkl", "gkl-recipe", "gkl-rows-2", "kl"])
def test_batch_over_two_ranks_has_the_results_of_the_whole(kernel, loss):
    """Two halves, each with the sums of both, give the whole batch's gradients; their values' mean is its value."""
    name, settings = loss_of(loss, 2, 8, 30)
    s, t = logits(1, 8, 30)
    v = np.arange(8) / 4
    whole = run(
        kernel, name, s, t, sample_weight=v, asked=("value", "to_student", "to_teacher", "totals_out"), **settings
    )
    values = []
    for half in (slice(0, 4), slice(4, 8)):
        given = dict(settings)
        for key in ("labels", *(["prior"] if "labels" not in settings else [])):
            if key in given:
                given[key] = np.ascontiguousarray(given[key][half])
        found = run(
            kernel, name, s[half], t[half], sample_weight=v[half], totals=whole["totals_out"], ranks=2.0, **given
        )
        values.append(found["value"])
        for key in ("to_student", "to_teacher"):
            assert_near(found[key].astype(float), 2.0 * whole[key][half].astype(float), "float32", ulps=2)
    assert_near(np.mean(values), whole["value"].astype(float), "float32", ulps=2)


def test_loss_of_an_empty_batch_is_zero(kernel):
    s, t = logits(0, 0, 5)
    for name in ("kl", "gkl"):
        for reduction in ("mean", "sum", "none"):
            found = run(kernel, name, s, t, reduction=reduction)
            assert found["value"].size == 0 or found["value"] == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_of_a_batch_without_weight_is_zero(kernel, loss):
    name, settings = loss_of(loss, 2, 3, 6)
    s, t = logits(1, 3, 6)
    s[0], t[1] = NAN, INF
    found = run(kernel, name, s, t, sample_weight=np.zeros(3), **settings)
    assert found["value"] == 0
    assert (found["to_student"] == 0).all()
    assert (found["to_teacher"] == 0).all()


@ALL_LOSSES
def test_definition_agrees_with_the_oracle(loss):
    """Checks the reference of the other tests against all pairs of classes, with complex steps."""
    name, settings = loss_of(loss, 1, 4, 7, np.float64)
    s, t = logits(0, 4, 7, "float64")
    settings["where"] = np.random.default_rng(1).random((4, 7)) < 0.8
    settings["sample_weight"] = np.asarray([1.0, 0.0, 2.0, 0.5])
    for reduction in ("mean", "sum"):
        value, to_s, to_t = oracle.evaluate(name, s, t, reduction=reduction, **settings)
        exact = definition(name, s, t, reduction=reduction, **settings)
        assert_near(exact["value"], value, "float64", ulps=2)
        assert_near(exact["to_student"], to_s, "float64", ulps=4)
        assert_near(exact["to_teacher"], to_t, "float64", ulps=4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_half_precision_number_is_read_and_written_exactly(kernel, dtype):
    """With two equal weights the wMSE's gradient is the logit itself, times the upstream gradient."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(DTYPES[dtype])
    halves = halves[np.isfinite(halves.astype(np.float32))]
    s = np.stack([halves, np.zeros_like(halves)], axis=1)
    t = np.zeros_like(s)
    found = run(kernel, "ikl", s, t, ce_weight=0.0, gamma=0.0, reduction="sum", upstream=0.25)  # W w (d - mean) = d
    expected = np.stack([0.25 * halves.astype(np.float64), -0.25 * halves.astype(np.float64)], axis=1)
    assert (found["to_student"] == expected.astype(DTYPES[dtype])).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradients_are_rounded_once(kernel, dtype):
    """One network's float64 logits make the arithmetic float64; the other's gradient is rounded from it directly."""
    rng = np.random.default_rng(0)
    t = rng.standard_normal((4000, 2)).astype(DTYPES[dtype])
    s = rng.standard_normal((4000, 2))
    upstream = np.exp2(rng.integers(-30, 12, 4000).astype(float))
    found = run(kernel, "kl", s, t, reduction="sum", upstream=upstream, asked=("to_teacher",))["to_teacher"]
    exact = definition("kl", s, t, reduction="sum", upstream=upstream)["to_teacher"]
    assert (found != exact.astype(np.float64).astype(DTYPES[dtype])).mean() < 1e-3


def test_environment_chooses_the_instruction_set():
    script = "from gklx._run import cpu_library; print(cpu_library.instruction_set())"
    source = str(Path(cpu_library.__file__).parents[2])

    def instruction_set_with(**environment):
        done = subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": source, **environment},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    assert instruction_set_with(GKLX_INSTRUCTION_SET=SETS[0]) == SETS[0]
    assert instruction_set_with(GKLX_INSTRUCTION_SET="none such") == instruction_set_with(GKLX_INSTRUCTION_SET="")
    assert instruction_set_with(GKLX_KERNEL="0") == "None"
