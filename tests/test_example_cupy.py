"""The CuPy script in `examples/` prints the statistics of `gklx.score`; both run on the GPU."""

import re
import runpy
from pathlib import Path

import pytest

import backends
import gklx

EXAMPLES = Path(__file__).parents[1] / "examples"
FILES = [str(EXAMPLES / "digits" / f"{name}.npy") for name in ("student", "teacher")]


@pytest.mark.parametrize("block_bytes", [2**28, 4 * 10 * 100])
def test_script_prints_the_statistics_of_score(capsys, block_bytes):
    backends.needs("cupy")
    runpy.run_path(str(EXAMPLES / "score_cupy.py"))["main"](*FILES, block_bytes=block_bytes)
    out = capsys.readouterr().out
    found = gklx.score(*FILES, backend="cupy", losses=["kl", "gkl"])
    assert found.device.startswith("cuda")
    for name, each in found.losses.items():
        numbers = re.search(rf"^{name} +mean (\S+) ± (\S+)  median (\S+)  99 % (\S+)$", out, re.MULTILINE)
        expected = (each.mean, each.stderr, each.median, each.p99)
        assert [float(x) for x in numbers.groups()] == pytest.approx(expected, abs=2e-6)
    assert f"{found.top1_agreement:.2%} of 899 samples" in out
