"""Inputs of `gklx.score` other than files: arrays of every library, and batches."""

import os
import subprocess
import sys
import types

import numpy as np
import pytest

import backends
import gklx
from gklx._run import cpu_library
from gklx._scoring import comparison, pools
from gklx._scoring.backend import backend as backend_of

CLASSES = 6
rng = np.random.default_rng(7)
STUDENT, TEACHER = (rng.standard_normal((50, CLASSES)) * 3 for _ in range(2))
LABELS = rng.integers(0, CLASSES, 50)
NUMBERS = {"gamma": 0.5, "mse_weight": 2.0, "temperature": 1.5}


def means(found):
    return {name: each.mean for name, each in found.losses.items()} | {"top1": found.top1_agreement}


def expected(labels=LABELS):
    return means(gklx.score(STUDENT, TEACHER, labels, **NUMBERS))


def batches_of(*arrays, sizes=(1, 30, 0, 19)):
    ends = np.cumsum(sizes)
    return [tuple(x[end - size : end] for x in arrays) for size, end in zip(sizes, ends, strict=True)]


@pytest.mark.parametrize("labelled", [True, False])
def test_arrays_of_every_library_are_scored(backend, dtype, labelled):
    s, t = (backend.array(x, dtype) for x in (STUDENT, TEACHER))
    found = gklx.score(s, t, backend.array(LABELS) if labelled else None, **NUMBERS)
    assert found.backend == ("numpy" if backend.library.lazy else backend.library.backend)
    same = (backend.rounded(x, dtype) for x in (STUDENT, TEACHER))
    wanted = means(gklx.score(*same, LABELS if labelled else None, **NUMBERS))
    assert means(found) == pytest.approx(wanted, rel=1e-12 if dtype == "float64" else 1e-5)


@pytest.mark.parametrize("shape", [(5, 10), (2, 5, 5)])
def test_leading_axes_are_samples(backend, shape):
    s, t = (backend.array(x.reshape(*shape, CLASSES), "float32") for x in (STUDENT, TEACHER))
    found = gklx.score(s, t, backend.array(LABELS.reshape(shape)), **NUMBERS, batch_size=7)
    assert means(found) == pytest.approx(expected(), rel=1e-5)


@pytest.mark.parametrize("labelled", [True, False])
def test_batches_may_have_any_size(labelled):
    batches = batches_of(STUDENT, TEACHER, LABELS) if labelled else batches_of(STUDENT, TEACHER)
    wanted = pytest.approx(expected(LABELS if labelled else None), rel=1e-12)
    assert means(gklx.score(batches, **NUMBERS)) == wanted
    assert means(gklx.score(lambda: iter(batches), **NUMBERS, batch_size=4)) == wanted
    apart = [list(each) for each in zip(*batches, strict=True)]
    assert means(gklx.score(*apart, **NUMBERS)) == wanted


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_byte_order_does_not_matter(dtype):
    """Neither for a score nor for a loss."""
    s, t = (x.astype(f"<{dtype}") for x in (STUDENT, TEACHER))
    prior = rng.dirichlet(np.ones(CLASSES), 50)
    swapped = [x.astype(f">{dtype}") for x in (s, t)]
    settings = {"rel": 1e-12 if dtype == "f8" else 1e-6}
    assert means(gklx.score(*swapped, LABELS)) == pytest.approx(means(gklx.score(s, t, LABELS)), **settings)
    assert float(gklx.kl(*swapped)) == pytest.approx(float(gklx.kl(s, t)), **settings)
    other = float(gklx.gkl(s, t, prior=prior.astype(">f8")))
    assert other == pytest.approx(float(gklx.gkl(s, t, prior=prior)), **settings)
    assert float(gklx.kl(swapped[0], t)) == pytest.approx(float(gklx.kl(s, t)), **settings)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("halves", ["float16", "bfloat16"])
def test_half_precision_scores_as_the_same_numbers_in_float32(tmp_path, halves, labelled):
    """To the last bit, in files and in arrays, although they are not widened to float32."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtype = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[halves]
    x = [rng.standard_normal((70, 501)).astype(dtype) * dtype(4) for _ in range(2)]
    for one in x:
        one[3, 5], one[4, :400], one[5], one[6, 7] = -np.inf, -np.inf, -np.inf, np.nan
    labels = rng.integers(0, 501, 70) if labelled else None
    wide = [one.astype(np.float32) for one in x]
    files = []
    for i, one in enumerate(x):
        files.append(tmp_path / f"{i}.npy")
        np.save(files[-1], one)
    settings = {"per_sample": str(tmp_path / "out.npy"), "batch_size": 16, "temperature": 1.5, "gamma": 0.5}

    def samples(*pair):
        gklx.score(*pair, labels, **settings)
        return np.load(tmp_path / "out.npy").tobytes()

    wanted = samples(*wide)
    assert samples(*x) == wanted
    assert samples(*files) == samples(*(one.astype(np.float32) for one in x)) == wanted
    assert samples(x[0], wide[1]) == wanted


def test_losses_with_equal_class_weights_share_one_pass(monkeypatch):
    if cpu_library.instruction_set() is None:
        pytest.skip("the kernel is not in use")
    passes, run = [], cpu_library.run
    monkeypatch.setattr(cpu_library, "run", lambda call: (passes.append(call.threads), run(call)))
    s, t = (x.astype(np.float32) for x in (STUDENT, TEACHER))
    gklx.score(s, t)
    assert len(passes) == 1
    gklx.score(s, t, losses=("kl", "gkl"), gamma=0.5)
    assert len(passes) == 2
    gklx.score(s, t, losses=("kl",))
    assert len(passes) == 3
    gklx.score(s, t, gamma=0.5, temperature=2.0)  # dkl, ikl and gkl each have other weights or another scale
    assert len(passes) == 6


@pytest.mark.parametrize(("own", "blocks"), [(8, 2), (3, 2), (1, 4)])
def test_concurrent_blocks_share_the_threads(monkeypatch, own, blocks):
    monkeypatch.setattr(pools, "own_threads", lambda: own)
    with backend_of("numpy", None) as place, pools.threads(place, blocks) as pool:
        assert pool.place.kernel_threads == max(1, own // blocks)


def test_batches_may_be_iterators():
    batches = batches_of(STUDENT, TEACHER)
    assert means(gklx.score(iter(batches), **NUMBERS)) == pytest.approx(expected(None), rel=1e-12)
    apart = (iter(each) for each in zip(*batches, strict=True))
    assert means(gklx.score(*apart, **NUMBERS)) == pytest.approx(expected(None), rel=1e-12)
    # KL alone needs no class prior, hence no second pass.
    once = iter(batches_of(STUDENT, TEACHER, LABELS))
    assert gklx.score(once, losses=["kl"]).losses["kl"].mean == pytest.approx(float(gklx.kl(STUDENT, TEACHER)))


def test_batches_may_differ_in_dtype():
    batches = batches_of(STUDENT, TEACHER)
    batches[1] = tuple(x.astype(np.float32) for x in batches[1])
    assert means(gklx.score(batches, **NUMBERS)) == pytest.approx(expected(None), rel=1e-6)


def test_batches_are_computed_on_the_requested_backend(backend):
    batches = [
        tuple(backend.array(x, "float32") for x in pair) for pair in batches_of(STUDENT, TEACHER, sizes=(20, 30))
    ]
    found = gklx.score(batches, backend="numpy", **NUMBERS)
    assert (found.backend, means(found)) == ("numpy", pytest.approx(expected(None), rel=1e-5))


def test_tensors_that_require_gradients_are_scored():
    torch = pytest.importorskip("torch")
    s = torch.tensor(STUDENT, requires_grad=True)
    assert means(gklx.score(s, torch.tensor(TEACHER), **NUMBERS)) == pytest.approx(expected(None), rel=1e-12)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the cores are counted otherwise here")
@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, 4),
        ({"OMP_NUM_THREADS": "1,2"}, 1),
        ({"OMP_NUM_THREADS": "3", "GKLX_NUM_THREADS": "2"}, 2),
        ({"GKLX_NUM_THREADS": "3"}, 3),
        ({"GKLX_NUM_THREADS": "64"}, 4),
    ],
)
@pytest.mark.parametrize("on", ["numpy", "array_api_strict", "dask"])
def test_threads_are_limited_as_for_the_losses(monkeypatch, tmp_path, environment, threads, on):
    backends.needs(on)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    # PyTorch, if an earlier test has imported it, has loaded OpenMP with as many threads as this machine has cores.
    monkeypatch.setattr(cpu_library, "_limited_to", lambda: sys.maxsize)
    for name in ("OMP_NUM_THREADS", "GKLX_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    widths, in_order = [], pools.Pool.in_order
    monkeypatch.setattr(
        pools.Pool, "in_order", lambda self, *args: (widths.append(self.width), in_order(self, *args))[1]
    )
    for name, x in (("s", STUDENT), ("t", TEACHER)):
        np.save(tmp_path / f"{name}.npy", x)
    gklx.score(tmp_path / "s.npy", tmp_path / "t.npy", backend=on)
    assert widths == [min(threads, 2) if on == "array_api_strict" else threads]


def test_threadpoolctl_limits_the_threads():
    pytest.importorskip("threadpoolctl", reason="threadpoolctl is not installed")
    program = """
import os
import numpy, threadpoolctl
os.sched_getaffinity = lambda process: {0, 1, 2, 3}
import gklx
from gklx._scoring import comparison, pools
in_order = pools.Pool.in_order
pools.Pool.in_order = lambda self, *args: (print(self.width), in_order(self, *args))[1]
with threadpoolctl.threadpool_limits(limits=1):
    gklx.score(numpy.zeros((2, 2)), numpy.zeros((2, 2)))
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("GKLX_NUM_THREADS", "OMP_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "1\n"


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((STUDENT, 3), {}, TypeError, r"^teacher must be a path, an array of a known library or batches"),
        ((3,), {}, TypeError, r"^student must be a path, an array, or, where teacher is None, an iterable"),
        ((STUDENT.astype(int), TEACHER), {}, TypeError, r"^student must be floating logits, got int64"),
        ((STUDENT[0], TEACHER[0]), {}, ValueError, r"^student must have shape \[samples, classes\]"),
        ((STUDENT, TEACHER[:, :5]), {}, ValueError, r"^vocabulary mismatch"),
        ((STUDENT, TEACHER[:5]), {}, ValueError, r"they do not hold the same samples"),
        ((STUDENT, TEACHER, LABELS[:5]), {}, ValueError, r"labels must have one label a sample"),
        ((STUDENT, TEACHER, LABELS + 1), {}, ValueError, r"^labels: labels must lie in \[0, 6\), got 6 at sample"),
        ((STUDENT, TEACHER, LABELS * 1.0), {}, TypeError, r"^labels must be integer labels, got float64"),
        ((STUDENT, [TEACHER]), {}, TypeError, r"must all be batches where one of them is"),
        ((batches_of(STUDENT, TEACHER), None, LABELS), {}, TypeError, r"labels must come with the batches"),
        (([],), {}, ValueError, r"at least one batch, got none"),
        (([STUDENT],), {}, TypeError, r"^a batch must be \(student, teacher\)"),
        (([(STUDENT,)],), {}, TypeError, r"got 1 entries"),
        (([(STUDENT, TEACHER), (STUDENT, TEACHER, LABELS)],), {}, ValueError, r"from sample 50 on must have 6 classes"),
        ((iter([(STUDENT, TEACHER, LABELS)]),), {}, ValueError, r"gone through twice"),
        ((STUDENT, TEACHER), {"losses": []}, ValueError, r"^losses must be among kl, .*, reverse_kl, got \[\]"),
        ((STUDENT, TEACHER), {"losses": ["mse"]}, ValueError, r"^losses must be among"),
        ((STUDENT, TEACHER), {"temperature": 0.0}, ValueError, r"^temperature must be"),
        ((STUDENT, TEACHER), {"gamma": "x"}, TypeError, r"^gamma must be"),
        ((STUDENT, TEACHER), {"batch_size": 0}, ValueError, r"^batch_size must be a whole number"),
        ((STUDENT, TEACHER), {"backend": "mlx"}, ValueError, r"^backend must be one of numpy"),
        ((STUDENT, TEACHER), {"memory": "2 apples"}, ValueError, r"^memory must be a size such as 2GB"),
        ((STUDENT, TEACHER), {"memory": b"2GB"}, TypeError, r"^memory must be bytes or a size such as 2GB, got bytes$"),
        (
            (STUDENT, TEACHER, LABELS.tolist()),
            {},
            TypeError,
            r"^student, .* all be batches .* got ndarray, ndarray, list$",
        ),
        (
            (STUDENT, TEACHER),
            {"sample_weight": [True, False]},
            TypeError,
            r"^sample_weight must be a path, .* got list$",
        ),
        (([STUDENT, STUDENT], [TEACHER]), {}, ValueError, r"^student, teacher and labels must be as many batches"),
        (({1: STUDENT, "1": TEACHER}, TEACHER), {}, ValueError, r"^students must have different names, got 1, 1$"),
        ((STUDENT, TEACHER), {"memory": 1000}, ValueError, r"^memory must be at least [\d,]+ MB for 6 classes"),
        (
            (STUDENT, TEACHER),
            {"memory": 0},
            ValueError,
            r"^memory must be at least [\d,]+ MB for 6 classes .*got 0 MB$",
        ),
        ((STUDENT, TEACHER), {"plot": ""}, ValueError, r"^plot must be the name of what to write, got an empty one$"),
        ((STUDENT, TEACHER), {"scheduler": "tcp://x"}, ValueError, r"^scheduler needs backend \"dask\""),
        (
            (STUDENT, TEACHER),
            {"backend": "dask", "scheduler": ""},
            ValueError,
            r"^scheduler must be the address of a Dask scheduler, got an empty one$",
        ),
        ((STUDENT, TEACHER), {"backend": "dask"}, ValueError, r"needs files that its workers can open"),
        ((STUDENT, TEACHER), {"per_sample": "x.txt"}, ValueError, r"x\.txt"),
        ((STUDENT, TEACHER), {"plot": "x.gif"}, ValueError, r"x\.gif"),
    ],
)
def test_invalid_inputs_raise_the_documented_errors(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        gklx.score(*args, **kwargs)


def test_whole_numbers_may_be_of_numpy():
    found = gklx.score(
        STUDENT, TEACHER, LABELS, batch_size=np.int64(7), where_label=np.int64(3), top_k=np.asarray([1, 2])
    )
    assert found == gklx.score(STUDENT, TEACHER, LABELS, batch_size=7, where_label=3, top_k=[1, 2])


@pytest.mark.parametrize(
    ("student", "teacher", "title"),
    [
        ("a/s.npy", "b/t.npy", "s.npy against t.npy"),
        ("a/s.npy", TEACHER, "s.npy against teacher"),
        (STUDENT, ["a.npy", "b.npy"], "Student against 2 shards"),
        (iter([STUDENT]), iter([TEACHER]), "Student against teacher"),
        ([STUDENT], [TEACHER], "Student against teacher"),
        (iter([(STUDENT, TEACHER)]), None, "Student against teacher"),
    ],
)
def test_title_of_the_picture_names_files(student, teacher, title):
    assert comparison._title(types.SimpleNamespace(student=student, teacher=teacher)) == title


def test_dask_array_of_unknown_length_is_refused():
    backends.needs("dask")
    import dask.array as da

    unknown = da.from_array(STUDENT, chunks=(10, -1))
    unknown = unknown[unknown[:, 0] > 0]
    with pytest.raises(ValueError, match=r"^student must have a known shape \(compute_chunk_sizes makes it known\)"):
        gklx.score(unknown, TEACHER)
