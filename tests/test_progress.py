"""The progress bar on a terminal."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.library_independent

pty = pytest.importorskip("pty", reason="terminals of POSIX")


def test_progress_bar_shows_stage_count_and_rate(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("s", "t"):
        np.save(tmp_path / f"{name}.npy", rng.standard_normal((600, 50)))
    np.save(tmp_path / "y.npy", rng.integers(0, 50, 600))
    ours, theirs = pty.openpty()
    argv = ["score", "s.npy", "t.npy", "--labels", "y.npy", "--batch-size", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "gklx", *argv],
        stdout=subprocess.PIPE,
        stderr=theirs,
        cwd=tmp_path,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    ) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # Linux's end of file
                break
            if not piece:
                break
            seen += piece
        out = process.stdout.read().decode()
    os.close(ours)
    assert process.returncode == 0
    assert "600 samples" in out
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert "class prior" in text
    assert re.search(r"scoring .* \d+/600 .*\d/s", text)
