"""Dumps of llama.cpp: their layout is read correctly, and the scores are those of its own tool."""

import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest

import gklx
from gklx._cli import main
from gklx._scoring.file_formats.rows import Room
from gklx._scoring.files import carried_targets, open_logits

DUMPS = Path(__file__).parent / "data" / "llama.cpp"
BASE, QUANTISED = (str(DUMPS / f"{name}.kld") for name in ("f32", "q4_0"))
PRINTED = (DUMPS / "q4_0-against-f32.txt").read_text()
rng = np.random.default_rng(5)

pytestmark = pytest.mark.library_independent


def assert_equal(found, expected):
    assert (found.shape, found.tolist()) == (expected.shape, expected.tolist())


def write_dump(path, context, tokens, codes, scales, smallest):
    """Write a dump of codes [chunks * rows, classes]; return its path."""
    n, classes = codes.shape
    with open(path, "wb") as file:
        file.write(b"_logits_" + struct.pack("<Iii", context, classes, len(tokens) // context))
        file.write(np.asarray(tokens, "<i4").tobytes())
        for row in range(n):
            file.write(struct.pack("<ff", scales[row], smallest[row]))
            file.write(codes[row].astype("<u2").tobytes() + b"\0\0" * (classes % 2))
    return str(path)


def random_dump(path, classes=7, context=9, chunks=3):
    rows = context - 1 - context // 2
    tokens = rng.integers(0, classes, chunks * context)
    codes = rng.integers(0, 2**16, (chunks * rows, classes))
    scales, smallest = rng.uniform(1e-5, 3e-4, chunks * rows), rng.uniform(-18, -12, chunks * rows)
    write_dump(path, context, tokens, codes, scales, smallest)
    values = np.float32(scales)[:, None] * codes.astype(np.float32) + np.float32(smallest)[:, None]
    targets = tokens.reshape(chunks, context)[:, context // 2 + 1 : context // 2 + 1 + rows].reshape(-1)
    return str(path), values, targets


@pytest.mark.parametrize(("classes", "context"), [(7, 9), (8, 8), (1, 3), (300, 64)])
def test_rows_and_targets_are_read(tmp_path, classes, context):
    path, values, targets = random_dump(tmp_path / "x", classes, context)
    rows = open_logits(path)
    n = len(values)
    assert (rows.shape, rows.dtype) == ((n, classes), "float32")
    room = Room()
    for start, stop in ((0, n), (1, n), (n // 2, n // 2 + 1)):
        assert_equal(rows.read(start, stop), values[start:stop])
        assert_equal(rows.read(start, stop, room), values[start:stop])
        assert_equal(carried_targets(rows).read(start, stop), targets[start:stop])


def test_shards_have_their_targets(tmp_path):
    parts = [random_dump(tmp_path / f"x-{i}.kld") for i in range(3)]
    rows = open_logits(str(tmp_path / "x-*.kld"))
    assert_equal(rows.read(5, 30), np.concatenate([values for _, values, _ in parts])[5:30])
    assert_equal(carried_targets(rows).read(5, 30), np.concatenate([targets for *_, targets in parts])[5:30])


# --- agreement with the tool ------------------------------------------------------------------------------------------


def printed_numbers(name):
    """The numbers of a line of the tool's report, each with half a unit of its last digit."""
    (line,) = re.findall(rf"^\s*{re.escape(name)}\s*:\s*(.*)$", PRINTED, re.MULTILINE)
    numbers = re.findall(r"-?\d+\.\d+", line)
    return [(float(x), 0.5 * 10.0 ** -len(x.partition(".")[2])) for x in numbers]


OF_TOOL = {
    "Mean PPL(Q)": ("perplexity.student.value", "perplexity.student.stderr"),
    "Mean PPL(base)": ("perplexity.teacher.value", "perplexity.teacher.stderr"),
    "Mean ln(PPL(Q)/PPL(base))": ("perplexity.log_ratio.value", "perplexity.log_ratio.stderr"),
    "Mean PPL(Q)/PPL(base)": ("perplexity.ratio.value", "perplexity.ratio.stderr"),
    "Mean PPL(Q)-PPL(base)": ("perplexity.difference.value", "perplexity.difference.stderr"),
    "Cor(ln(PPL(Q)), ln(PPL(base)))": ("perplexity.correlation",),
    "Mean    KLD": ("losses.kl.mean", "losses.kl.stderr"),
    "Maximum KLD": ("losses.kl.max",),
    "99.9%   KLD": ("losses.kl.p99_9",),
    "99.0%   KLD": ("losses.kl.p99",),
    "95.0%   KLD": ("losses.kl.p95",),
    "90.0%   KLD": ("losses.kl.p90",),
    "Median  KLD": ("losses.kl.median",),
    "10.0%   KLD": ("losses.kl.p10",),
    "5.0%   KLD": ("losses.kl.p5",),
    "1.0%   KLD": ("losses.kl.p1",),
    "0.1%   KLD": ("losses.kl.p0_1",),
    "Minimum KLD": ("losses.kl.min",),
    "Mean    Δp": ("delta_p.mean.value", "delta_p.mean.stderr"),
    "Maximum Δp": ("delta_p.max",),
    "99.9%   Δp": ("delta_p.p99_9",),
    "99.0%   Δp": ("delta_p.p99",),
    "95.0%   Δp": ("delta_p.p95",),
    "90.0%   Δp": ("delta_p.p90",),
    "75.0%   Δp": ("delta_p.p75",),
    "Median  Δp": ("delta_p.median",),
    "25.0%   Δp": ("delta_p.p25",),
    "10.0%   Δp": ("delta_p.p10",),
    "5.0%   Δp": ("delta_p.p5",),
    "1.0%   Δp": ("delta_p.p1",),
    "0.1%   Δp": ("delta_p.p0_1",),
    "Minimum Δp": ("delta_p.min",),
    "RMS Δp": ("delta_p.rms.value", "delta_p.rms.stderr"),
    "Same top p": ("top1_agreement",),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "report.json"
    options = ["--format", "json", "--output", str(out), "--work-dir", str(out.parent / "work")]
    assert main(["score", QUANTISED, BASE, *options]) == 0
    return json.loads(out.read_text())


def lookup(report, name):
    for key in name.split("."):
        report = report[key]
    return report


# A code is up to 16 / 65535 from the next, so that a log-probability of the student, which the tool had in float32, is
# known to 1.2e-4. Over hundreds of samples that averages out; of a single one it stays.
CODES = {"mean": 2e-6, "single": 1e-5}


@pytest.mark.parametrize("name", OF_TOOL)
def test_numbers_agree_with_those_of_the_tool(report, name):
    percent = 100 if "Δp" in name or name in ("Same top p", "Cor(ln(PPL(Q)), ln(PPL(base)))") else 1
    for key, (expected, half_a_unit) in zip(OF_TOOL[name], printed_numbers(name), strict=False):
        of_codes = CODES["mean" if "mean" in key or "rms" in key else "single"] * percent
        if key.startswith("perplexity.student") or key.startswith("perplexity.difference"):
            of_codes = 3e-4  # 3e-7 of the perplexity, 1033
        if key.startswith(("perplexity.teacher", "top1_agreement")):
            of_codes = 2e-6 if key.endswith("stderr") else 1e-12  # the tool squares in float32
        assert abs(percent * lookup(report, key) - expected) <= half_a_unit + of_codes, (
            key,
            percent * lookup(report, key),
        )


def test_every_line_of_the_tools_report_is_compared():
    lines = [line.partition(":")[0].strip() for line in PRINTED.splitlines() if ":" in line]
    assert sorted(lines) == sorted(OF_TOOL)


def test_report_names_llama_cpps_rule(report, capsys, tmp_path):
    assert report["reading"] == "llama.cpp"
    assert main(["score", QUANTISED, BASE, "--work-dir", str(tmp_path)]) == 0
    assert "by llama.cpp's rule" in capsys.readouterr().out
    np.save(tmp_path / "base.npy", open_logits(BASE).read(0, 378))
    for argv in ([QUANTISED, str(tmp_path / "base.npy")], [QUANTISED, BASE, "--temperature", "2"]):
        assert main(["score", *argv, "--format", "json", "--work-dir", str(tmp_path / "work")]) == 0
        assert "reading" not in json.loads(capsys.readouterr().out)


def test_classes_of_negligible_probability_are_left_out(tmp_path):
    """Those of log-probability −16 and below. The base's stored values are not normalised, the student's are."""
    paths, values = [], []
    for name in ("s", "t"):
        codes = np.asarray([[65535, 30000, 0, 0], [65535, 1, 0, 40000]])
        scales, smallest = np.asarray([17 / 65535, 18 / 65535]), np.asarray([-17.0, -18.0])
        if name == "s":
            codes[:, 1:] += 777
        paths.append(write_dump(tmp_path / name, 6, np.zeros(6), codes, scales, smallest))
        values.append(
            np.float64(np.float32(scales)[:, None] * codes.astype(np.float32) + np.float32(smallest)[:, None])
        )
    s, t = values
    q = s - np.log(np.exp(s).sum(-1, keepdims=True))
    expected = np.where(t > -16, np.exp(t) * (t - q), 0).sum(-1)
    found = gklx.score(*paths, losses=["kl"])
    assert found.losses["kl"].mean == pytest.approx(expected.mean(), rel=1e-5)
    plain = gklx.score(s, t, losses=["kl"])
    assert plain.losses["kl"].mean != pytest.approx(expected.mean(), rel=1e-4)


def test_block_size_does_not_change_the_score(tmp_path):
    found = gklx.score(QUANTISED, BASE, batch_size=7)
    assert found == gklx.score(QUANTISED, BASE)


# --- invalid files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fails(capsys):
    def failed(*argv):
        capsys.readouterr()
        assert main(["score", *map(str, argv)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("gklx: error: ")
        assert err.count("\n") == 1
        return err

    return failed


@pytest.mark.parametrize("length", [8, 12, 19, 20, 24, 200, 3091, 3092, 3100, 4000, 229_891])
def test_truncated_dump_is_refused(fails, tmp_path, length):
    cut = tmp_path / "cut.kld"
    cut.write_bytes(Path(QUANTISED).read_bytes()[:length])
    assert "llama.cpp dump is " in (line := fails(cut, BASE))
    assert "cut short" in line
    fails(BASE, cut)


@pytest.mark.parametrize("at", [8, 12, 16])
@pytest.mark.parametrize("claim", [-(2**31), -1, 0, 1, 2, 2**30, 2**31 - 1])
def test_header_with_impossible_sizes_is_refused(fails, tmp_path, at, claim):
    """Even a claim of petabytes is refused before memory is allocated."""
    content = bytearray(Path(QUANTISED).read_bytes())
    content[at : at + 4] = struct.pack("<i", claim)
    (tmp_path / "lying.kld").write_bytes(content)
    line = fails(tmp_path / "lying.kld", BASE)
    assert "damaged" in line
    assert "its header " in line


def test_dump_longer_than_its_header_says_is_refused(fails, tmp_path):
    (tmp_path / "more.kld").write_bytes(Path(QUANTISED).read_bytes() + b"\0")
    assert "promises 229,892 bytes" in fails(tmp_path / "more.kld", BASE)


def test_dumps_of_different_texts_are_refused(fails, tmp_path):
    path, _, targets = random_dump(tmp_path / "a", classes=7)
    other = random_dump(tmp_path / "b", classes=8)[0]
    assert "vocabulary mismatch" in fails(path, other)
    longer = random_dump(tmp_path / "c", classes=7, chunks=4)[0]
    assert "they do not hold the same samples" in fails(path, longer)
    content = bytearray(Path(path).read_bytes())
    content[20 + 4 * 6 : 24 + 4 * 6] = struct.pack("<i", int(targets[1] + 1) % 7)
    (tmp_path / "other").write_bytes(content)
    assert "must be dumps of the same text, got different tokens at sample 1" in fails(path, tmp_path / "other")
    assert "holds log-probabilities without a name, got the key 'x'" in fails(f"{path}::x", path)
    assert "none that could be read as labels" in fails(path, path, "--labels", path)


def test_tokens_outside_the_vocabulary_are_refused(fails, tmp_path):
    path = random_dump(tmp_path / "a", classes=7)[0]
    content = bytearray(Path(path).read_bytes())
    content[20 + 4 * 6 : 24 + 4 * 6] = struct.pack("<i", 7)
    Path(path).write_bytes(content)
    assert "targets must lie in [0, 7), got 7 at sample 1" in fails(path, path)
