"""The values of every sample in `.npy` and Parquet."""

import numpy as np
import pytest

import gklx
from gklx._scoring import work_file

pytestmark = pytest.mark.library_independent

rng = np.random.default_rng(5)
STUDENT, TEACHER = rng.standard_normal((2, 40, 6)) * 3
LABELS = rng.integers(0, 6, 40)


@pytest.fixture(params=[".npy", ".parquet"])
def written(request, tmp_path, monkeypatch):
    """Writes the values of a score, in several blocks, and reads them as a dict of columns."""
    monkeypatch.setattr(work_file, "RECORDS_A_BLOCK", 7)

    def write(*args, **kwargs):
        path = tmp_path / f"values{request.param}"
        gklx.score(*args, per_sample=path, **kwargs)
        if request.param == ".npy":
            found = np.load(path, mmap_mode="r", allow_pickle=False)
            return {name: np.asarray(found[name]) for name in found.dtype.names}
        parquet = pytest.importorskip("pyarrow.parquet")
        table = parquet.read_table(path)
        return {name: table[name].to_numpy() for name in table.column_names}

    if request.param == ".parquet":
        pytest.importorskip("pyarrow")
    return write


def test_values_are_the_losses_of_each_sample(written):
    found = written(STUDENT, TEACHER, gamma=0.5, mse_weight=2.0)
    assert list(found) == [
        *("kl", "dkl", "dkl_mse", "dkl_ce", "ikl", "ikl_mse", "ikl_ce", "gkl", "gkl_mse", "gkl_ce"),
        *("student_confidence", "teacher_confidence", "student_class", "teacher_class", "scored"),
    ]
    for name, kwargs in (("kl", {}), ("dkl", {"mse_weight": 2.0}), ("gkl", {"mse_weight": 2.0, "gamma": 0.5})):
        loss = getattr(gklx, name)
        assert found[name] == pytest.approx(loss(STUDENT, TEACHER, reduction="none", **kwargs), rel=1e-12)
        if name != "kl":
            parts = gklx.terms(loss)(STUDENT, TEACHER, reduction="none", **kwargs)
            assert found[f"{name}_mse"] == pytest.approx(parts.mse, rel=1e-12)
            assert found[f"{name}_ce"] == pytest.approx(parts.ce, rel=1e-12)
    assert (found["student_class"] == STUDENT.argmax(-1)).all()
    assert (found["teacher_class"] == TEACHER.argmax(-1)).all()
    assert found["scored"].all()


def test_undefined_sample_has_nan_values(written):
    s = STUDENT.copy()
    s[3, 1] = np.nan
    found = written(s, TEACHER, LABELS, losses=["kl", "gkl"])
    others = np.arange(40) != 3
    assert (found["scored"] == others).all()
    assert (found["label"] == LABELS).all()
    for name in ("kl", "gkl", "gkl_mse", "student_confidence"):
        assert np.isnan(found[name][3])
        assert np.isfinite(found[name][others]).all()
    assert found["student_class"][3] == -1 or np.isnan(found["student_class"][3])


def test_undefined_sample_is_null_in_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    s = STUDENT.copy()
    s[3, 1] = np.nan
    gklx.score(s, TEACHER, LABELS, losses=["kl", "gkl"], per_sample=tmp_path / "x.parquet")
    found = parquet.read_table(tmp_path / "x.parquet")
    assert {name: found[name].null_count for name in found.column_names} == {
        **dict.fromkeys(found.column_names, 1),
        **dict.fromkeys(("label", "scored"), 0),
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.csv", r"must go to a \.npy or \.parquet file, got \.csv$"),
        ("x", r"got no suffix$"),
        ("none/x.npy", r"must be in a folder that exists"),
    ],
)
def test_errors_come_before_the_work(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        gklx.score(STUDENT, TEACHER, per_sample=tmp_path / name)
    assert list(tmp_path.iterdir()) == []
