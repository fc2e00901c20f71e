"""The tables of `gklx score`."""

import io

import numpy as np
import pytest

import gklx
from gklx._scoring.report import as_table

pytestmark = pytest.mark.library_independent


def test_table_of_very_many_candidates_has_every_number():
    rng = np.random.default_rng(0)
    teacher = rng.standard_normal((20, 3))
    names = [f"candidate-{i}" for i in range(120)]
    found = gklx.score({name: teacher + rng.standard_normal((20, 3)) for name in names}, teacher, losses=["kl"])
    text = as_table(found, io.StringIO())
    assert "…" not in text
    for name, score in found.students.items():
        assert name in text
        assert f"{score.top1_agreement:.3%} ±" in text
