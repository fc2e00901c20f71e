"""`gklx score` sample by sample against other implementations: SciPy's `rel_entr` and `F.kl_div`."""

import numpy as np
import pytest

import backends
import gklx
from gklx._cli import main
from gklx._core.libraries import LIBRARIES

pytestmark = [pytest.mark.library_independent, pytest.mark.together]

SAMPLES, CLASSES = 300, 1000
TEMPERATURE = 2.0


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    rng = np.random.default_rng(11)
    teacher = (rng.standard_normal((SAMPLES, CLASSES)) * 4).astype(np.float32)
    student = teacher + rng.standard_normal((SAMPLES, CLASSES)).astype(np.float32)
    student[:3] = teacher[:3]
    for name, x in (("student", student), ("teacher", teacher)):
        np.save(folder / f"{name}.npy", x)
    return folder


def scored(files, on):
    path = files / f"{on}.npy"
    argv = ["score", files / "student.npy", files / "teacher.npy", "--backend", on, "--per-sample", path]
    assert main([str(x) for x in [*argv, "--loss", "kl", "--temperature", TEMPERATURE]]) == 0
    return np.load(path)


def logits(files, dtype):
    return (np.load(files / f"{name}.npy").astype(dtype) for name in ("student", "teacher"))


@pytest.mark.parametrize("on", [x.backend for x in LIBRARIES])
def test_kl_agrees_with_scipy(files, on):
    backends.needs(on)
    if on == "dask":
        pytest.importorskip("distributed")
    special = pytest.importorskip("scipy.special")
    s, t = (x / TEMPERATURE for x in logits(files, np.float64))
    expected = special.rel_entr(special.softmax(t, axis=-1), special.softmax(s, axis=-1)).sum(axis=-1)
    found = scored(files, on)["kl"]
    # float32 logits about 15 in size: a softmax is known to some 1e-6 of itself, a divergence of 0.1 to as much.
    assert found == pytest.approx(expected, rel=2e-6, abs=1e-8)
    assert (found[:3] == 0).all()


def test_kl_agrees_with_pytorch(files):
    backends.needs("torch")
    torch = pytest.importorskip("torch")
    s, t = (torch.log_softmax(torch.from_numpy(x) / TEMPERATURE, dim=-1) for x in logits(files, np.float64))
    expected = torch.nn.functional.kl_div(s, t, log_target=True, reduction="none").sum(dim=-1).numpy()
    assert scored(files, "torch")["kl"] == pytest.approx(expected, rel=2e-6, abs=1e-8)


def test_top_class_and_confidence_are_those_of_the_softmax(files):
    found = scored(files, "numpy")
    for name, x in zip(("student", "teacher"), logits(files, np.float64), strict=True):
        p = np.exp(x / TEMPERATURE - (x / TEMPERATURE).max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        assert (found[f"{name}_class"] == p.argmax(axis=-1)).all()
        assert found[f"{name}_confidence"] == pytest.approx(p.max(axis=-1), rel=2e-6)
    mean = gklx.score(str(files / "student.npy"), str(files / "teacher.npy"), temperature=TEMPERATURE).losses["kl"].mean
    assert found["kl"].mean() == pytest.approx(mean, rel=1e-12)
