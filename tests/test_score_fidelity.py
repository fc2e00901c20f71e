"""Statistics of `gklx score` besides the losses, against plain NumPy in float64."""

import json
import re
import subprocess

import numpy as np
import pytest

import backends
import dumps
import gklx
from gklx._cli import main
from gklx._run.sample_losses import sample_losses
from gklx._scoring import memory, statistics
from gklx._scoring.gates import parsed_gate
from gklx._scoring.samples import overlaps
from gklx.losses import call_builder

N, C = 600, 40
rng = np.random.default_rng(11)
T = rng.standard_normal((N, C)) * 2
S = T + 0.3 * rng.standard_normal((N, C))
W = T + 0.6 * rng.standard_normal((N, C))
TARGETS = rng.integers(0, C, N)
MASK = rng.integers(0, 2, N)
LOW = {"p10": 0.1, "p5": 0.05, "p1": 0.01, "p0_1": 0.001, "p99_9": 0.999}


def log_softmax(x, temperature=1.0):
    x = (x - x.max(-1, keepdims=True)) / temperature
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def reverse(s, t, temperature=1.0):
    q, p = log_softmax(s, temperature), log_softmax(t, temperature)
    return (np.exp(q) * (q - p)).sum(-1)


def error(x):
    return x.std(ddof=1) / np.sqrt(x.size)


@pytest.fixture
def files(tmp_path):
    found = {}
    for name, x in (("s", S), ("w", W), ("t", T), ("targets", TARGETS), ("mask", MASK)):
        found[name] = str(tmp_path / f"{name}.npy")
        np.save(found[name], x)
    return found


@pytest.fixture
def run(capsys, tmp_path):
    def ran(*argv, status=0):
        capsys.readouterr()
        got = main(["score", *map(str, argv), "--work-dir", str(tmp_path / "work")])
        out, err = capsys.readouterr()
        assert got == status, err
        return out, err

    return ran


@pytest.fixture
def fails(run):
    def failed(*argv):
        out, err = run(*argv, status=2)
        assert out == ""
        assert err.count("\n") == 1
        return err.removeprefix("gklx: error: ").rstrip("\n")

    return failed


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["numpy", "torch", "jax", "array_api_strict"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_perplexities_and_delta_p_of_the_targets(on, temperature):
    backends.needs(on)
    found = gklx.score(S, T, targets=TARGETS, temperature=temperature, losses=["kl"], backend=on)
    at = np.arange(N), TARGETS
    own, base = -log_softmax(S, temperature)[at], -log_softmax(T, temperature)[at]
    ppl, ppl0 = np.exp(own.mean()), np.exp(base.mean())
    covariance = np.cov(own, base)[0, 1] / N
    of = found.perplexity
    assert of.student == pytest.approx((ppl, ppl * error(own)), rel=1e-10)
    assert of.teacher == pytest.approx((ppl0, ppl0 * error(base)), rel=1e-10)
    assert of.log_ratio == pytest.approx(((own - base).mean(), error(own - base)), rel=1e-10)
    assert of.ratio == pytest.approx((ppl / ppl0, ppl / ppl0 * error(own - base)), rel=1e-10)
    spread = np.sqrt((ppl * error(own)) ** 2 + (ppl0 * error(base)) ** 2 - 2 * ppl * ppl0 * covariance)
    assert of.difference == pytest.approx((ppl - ppl0, spread), rel=1e-8)
    assert of.correlation == pytest.approx(np.corrcoef(own, base)[0, 1], rel=1e-10)
    d = np.exp(-own) - np.exp(-base)
    rms = np.sqrt((d**2).mean())
    assert found.delta_p.mean == pytest.approx((d.mean(), error(d)), rel=1e-9)
    assert found.delta_p.rms == pytest.approx((rms, error(d**2) / (2 * rms)), rel=1e-9)
    assert (found.delta_p.max, found.delta_p.min) == pytest.approx((d.max(), d.min()), rel=1e-9)
    for key, q in {**LOW, "p75": 0.75, "p25": 0.25, "median": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}.items():
        assert getattr(found.delta_p, key) == pytest.approx(np.quantile(d, q), rel=1e-9), key


@pytest.mark.parametrize("on", ["numpy", "torch", "jax", "array_api_strict"])
def test_reverse_kl_and_low_quantiles(on):
    backends.needs(on)
    found = gklx.score(S, T, losses=["reverse_kl", "gkl"], temperature=2.0, backend=on)
    x = reverse(S, T, 2.0)
    of = found.losses["reverse_kl"]
    assert (of.mean, of.stderr, of.min, of.max) == pytest.approx((x.mean(), error(x), x.min(), x.max()), rel=1e-10)
    assert {key: getattr(of, key) for key in LOW} == pytest.approx({k: np.quantile(x, q) for k, q in LOW.items()})
    assert (of.mse, of.ce, list(found.losses)) == (None, None, ["reverse_kl", "gkl"])
    alone = gklx.score(S, T, losses=["gkl"], temperature=2.0, backend=on)
    assert found.losses["gkl"] == pytest.approx(alone.losses["gkl"], rel=1e-12)


@pytest.mark.parametrize("on", ["numpy", "torch", "jax", "array_api_strict"])
def test_reverse_kl_of_classes_that_are_ruled_out(on):
    """By both networks, and in one sample by the teacher alone."""
    backends.needs(on)
    s, t, left = S.copy(), T.copy(), np.delete(np.arange(S.shape[1]), [1, 4])
    s[:, [1, 4]] = t[:, [1, 4]] = -np.inf
    found = gklx.score(s, t, losses=["reverse_kl"], backend=on).losses["reverse_kl"]
    x = reverse(S[:, left], T[:, left], 1.0)
    assert (found.mean, found.min, found.max) == pytest.approx((x.mean(), x.min(), x.max()), rel=1e-10)
    t[3, 2] = -np.inf
    assert gklx.score(s, t, losses=["reverse_kl"], backend=on).losses["reverse_kl"].max == np.inf


@pytest.mark.parametrize("on", ["numpy", "torch", "jax", "array_api_strict"])
def test_reverse_kl_of_huge_logits(on):
    backends.needs(on)
    s, t = (1e17 * S).astype(np.float32), (1e17 * T).astype(np.float32)
    found = gklx.score(s, t, losses=["reverse_kl"], backend=on).losses["reverse_kl"]
    x = reverse(s.astype(np.float64), t.astype(np.float64))
    assert (found.mean, found.min, found.max) == pytest.approx((x.mean(), x.min(), x.max()), rel=1e-5)


@pytest.mark.parametrize("on", ["numpy", "torch", "jax", "array_api_strict"])
def test_reverse_kl_of_logits_further_apart_than_the_largest_float(on):
    """Over the temperature: a small probability brings the loss back."""
    backends.needs(on)
    s, t = np.asarray([[1.0, 0.0, -2.0]]), np.asarray([[0.0, 1.0, -float(np.finfo(np.float32).max)]])
    found = gklx.score(
        *(x.astype(np.float32) for x in (s, t)), losses=["reverse_kl"], temperature=0.5, backend=on
    ).losses["reverse_kl"]
    assert found.mean == pytest.approx(float(gklx.kl(t, s, temperature=0.5)), rel=1e-6)


@pytest.mark.parametrize("on", ["numpy"])
def test_reverse_kl_whatever_the_ratio_of_the_probabilities(on, tmp_path):
    """Each class's part has a form for p near q and another one; KL, of the networks exchanged, has its own."""
    x = np.linspace(-4.0, 4.0, 161)
    s, t = np.zeros((161, 2)), np.stack([np.zeros_like(x), x], axis=-1)
    gklx.score(s, t, losses=["reverse_kl"], backend=on, per_sample=tmp_path / "found.npy")
    found, expected = np.load(tmp_path / "found.npy")["reverse_kl"], gklx.kl(t, s, reduction="none")
    np.testing.assert_allclose(found, expected, rtol=1e-14, atol=1e-17)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, "bfloat16"])
def test_target_statistics_in_half_and_single_precision(tmp_path, dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    s, t = S.astype(dtype), T.astype(dtype)
    for name, x in (("s", s), ("t", t)):
        np.save(tmp_path / f"{name}.npy", x)
    found = gklx.score(tmp_path / "s.npy", tmp_path / "t.npy", targets=TARGETS)
    expected = gklx.score(s.astype(np.float64), t.astype(np.float64), targets=TARGETS)
    assert found.perplexity.student == pytest.approx(expected.perplexity.student, rel=1e-6)
    assert found.delta_p.rms == pytest.approx(expected.delta_p.rms, rel=1e-5)


def test_model_compared_with_itself_shows_no_change():
    found = gklx.score(T, T, targets=TARGETS, top_k=[5])
    assert found.perplexity.log_ratio == (0, 0)
    assert found.perplexity.difference == (0, pytest.approx(0, abs=1e-5))
    assert found.perplexity.correlation == pytest.approx(1)
    assert found.delta_p.rms == (0, 0)
    assert found.top_k_overlap == {5: (1, 0)}


def test_target_of_probability_zero_has_null_perplexity_in_json(run, files, tmp_path):
    s = S.copy()
    s[7, TARGETS[7]] = -np.inf
    np.save(tmp_path / "s.npy", s)
    out, _ = run(files["s"], files["t"], "--targets", files["targets"], "--format", "json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert found["perplexity"]["student"] == {"value": None, "stderr": None}
    assert found["perplexity"]["teacher"]["value"] is not None
    assert found["delta_p"]["mean"]["value"] is not None


def plain_overlap(s, t, k):
    """The overlap of the k largest classes; of equal logits the first is the larger."""
    order = [np.argsort(-x.astype(np.float64), axis=-1, kind="stable")[:, :k] for x in (s, t)]
    return np.asarray([len(set(a) & set(b)) for a, b in zip(*order, strict=True)])


def overlaps_by_kernel(s, t, top_k):
    if absent := backends.kernel_absent("numpy"):
        pytest.skip(absent)
    return sample_losses([call_builder(gklx.kl)(s, t)], threads=2, top_k=sorted(top_k)).overlaps.T


@pytest.mark.parametrize("classes", [3, 40, 2559, 2560, 2700, 5000])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("found_by", [overlaps, overlaps_by_kernel], ids=["NumPy", "kernel"])
def test_overlap_of_the_largest_classes(classes, dtype, found_by):
    t = rng.standard_normal((50, classes))
    s = t + 0.5 * rng.standard_normal((50, classes))
    t[25:], s[25:] = t[25:].round(1), s[25:].round(1)  # with many equal ones
    t[3] = s[3] = 0
    t[4, 1:] = -np.inf
    s[5], t[5] = np.arange(classes), -np.arange(classes)
    s[6], s[6, ::2] = 0.0, -0.0
    s, t = s.astype(dtype), t.astype(dtype)
    top_k = (2, 3) if classes == 3 else (1, 5, 10, 39, classes)
    for k, found in zip(top_k, found_by(s, t, top_k), strict=True):
        assert found.tolist() == plain_overlap(s, t, k).tolist()


def test_nan_rows_do_not_affect_the_overlap_of_others():
    """The overlap of a NaN row is meaningless, but the kernel must terminate and stay within its memory."""
    s, t = rng.standard_normal((2, 6, 300)).astype(np.float32)
    whole = overlaps_by_kernel(s, t, (3, 200))
    s[1], t[2], s[3, 7], t[4, :299] = np.nan, np.nan, np.nan, np.nan
    found = overlaps_by_kernel(s, t, (3, 200))
    assert found[:, [0, 5]].tolist() == whole[:, [0, 5]].tolist()
    assert ((found >= 0) & (found <= [[3], [200]])).all()


@pytest.mark.parametrize("on", ["numpy", "torch", "jax", "array_api_strict", "dask"])
def test_overlaps_in_the_report(run, files, on):
    backends.needs(on)
    out, _ = run(files["s"], files["t"], "--top-k", "5,10", "--format", "json", "--backend", on)
    found = json.loads(out)["top_k_overlap"]
    assert list(found) == ["5", "10"]
    for k in (5, 10):
        x = plain_overlap(S, T, k) / k
        assert found[str(k)] == pytest.approx({"value": x.mean(), "stderr": error(x)}, rel=1e-12)
    out, _ = run(files["s"], files["t"], "--top-k", "5")
    assert "top-5 overlap" in out


def test_json_has_the_documented_names(run, files):
    out, _ = run(files["s"], files["t"], "--targets", files["targets"], "--format", "json")
    found = json.loads(out)
    assert found["perplexity"].pop("correlation") == pytest.approx(0.98, abs=0.05)
    assert list(found["perplexity"]) == ["student", "teacher", "log_ratio", "ratio", "difference"]
    assert {tuple(x) for x in found["perplexity"].values()} == {("value", "stderr")}
    of = found["delta_p"]
    assert [list(of.pop(key)) for key in ("mean", "rms")] == [["value", "stderr"]] * 2
    assert " ".join(of) == "max p99_9 p99 p95 p90 p75 median p25 p10 p5 p1 p0_1 min"
    assert {"reading", "top_k_overlap", "masked", "worst_classes"}.isdisjoint(found)


def test_blocks_threads_and_resuming_change_nothing(files, tmp_path, monkeypatch):
    kwargs = {"targets": files["targets"], "losses": ["kl", "reverse_kl"], "top_k": (3,)}
    whole = gklx.score(files["s"], files["t"], **kwargs)
    assert gklx.score(files["s"], files["t"], **kwargs, batch_size=7) == whole
    from gklx._scoring import run as runs

    original = runs.score_chunk

    def gone(place, job, chunk, prior):
        if chunk.start == 300:
            raise OSError("gone")
        return original(place, job, chunk, prior)

    with monkeypatch.context() as patched:
        patched.setattr(runs, "score_chunk", gone)
        with pytest.raises(OSError, match="gone"):
            gklx.score(files["s"], files["t"], **kwargs, batch_size=100, work_dir=tmp_path / "work")
    assert gklx.score(files["s"], files["t"], **kwargs, batch_size=100, work_dir=tmp_path / "work") == whole


def test_dask_gives_the_same_statistics(files):
    backends.needs("dask")
    kwargs = {"targets": files["targets"], "losses": ["kl", "reverse_kl"], "sample_weight": files["mask"]}
    found = gklx.score(files["s"], files["t"], **kwargs, backend="dask")
    own = gklx.score(files["s"], files["t"], **kwargs)
    assert found._replace(backend="", device="") == own._replace(backend="", device="")


def test_quantiles_of_many_samples_are_sketched(monkeypatch):
    pytest.importorskip("datasketches")
    monkeypatch.setattr(statistics, "EXACT_QUANTILES", 100)
    found = gklx.score(S, T, targets=TARGETS, losses=["kl"])
    at = np.arange(N), TARGETS
    d = np.exp(log_softmax(S)[at]) - np.exp(log_softmax(T)[at])
    assert found.quantiles == "t-digest"
    assert found.delta_p.p90 == pytest.approx(np.quantile(d, 0.9), abs=0.01)
    assert found.delta_p.min == pytest.approx(d.min(), rel=1e-10)


def test_sample_values_include_surprisals_of_the_targets(tmp_path):
    gklx.score(S, T, targets=TARGETS, losses=["reverse_kl"], per_sample=tmp_path / "x.npy")
    found = np.load(tmp_path / "x.npy")
    np.testing.assert_allclose(found["reverse_kl"], reverse(S, T), rtol=1e-9)
    for name, x in (("student", S), ("teacher", T)):
        np.testing.assert_allclose(found[f"{name}_surprisal"], -log_softmax(x)[np.arange(N), TARGETS], rtol=1e-9)


# --- padding ----------------------------------------------------------------------------------------------------------


def numbers(summary):
    return {key: value for key, value in summary._asdict().items() if value is not None}


@pytest.mark.parametrize("by", ["labels", "targets", "mask", "boolean mask", "mask and labels"])
def test_padding_does_not_affect_the_score(by):
    s, t, labels = (x.reshape(20, 30, *x.shape[1:]).copy() for x in (S, T, TARGETS))
    here = MASK.reshape(20, 30).astype(bool)
    if by == "mask and labels":
        here = here & (labels != 3)
    s[~here], t[~here, 0] = np.nan, -np.inf
    labels[~here] = -100
    kwargs, expected = {}, {}
    if by != "targets":
        kwargs["labels"], expected["labels"] = labels, labels[here]
    if by == "targets":
        kwargs["targets"], expected["targets"] = labels, labels[here]
    if "mask" in by:
        kwargs["sample_weight"] = MASK.reshape(20, 30).astype(bool if by == "boolean mask" else np.int64)
    if by != "mask":
        kwargs["where_label"] = -100
    found = gklx.score(s, t, **kwargs)
    assert found.masked == (~here).sum()
    own = gklx.score(s[here], t[here], **expected)
    assert found.samples == own.samples
    for name, each in own.losses.items():
        assert numbers(found.losses[name]) == pytest.approx(numbers(each), rel=1e-12), name
    assert found.top1_agreement == own.top1_agreement
    assert found.perplexity == own.perplexity
    for one, other in zip(found.worst_classes or (), own.worst_classes or (), strict=True):
        assert one[:3] == other[:3]
        # A product of matrices with rows of 0, of which the class prior is made, may round otherwise.
        assert one.means == pytest.approx(other.means, rel=1e-12)


def test_padding_in_the_reports(run, files, tmp_path):
    labels = np.where(MASK == 1, TARGETS, -100)
    np.save(tmp_path / "labels.npy", labels)
    argv = [files["s"], files["t"], "--labels", tmp_path / "labels.npy", "--where-label", "-100"]
    masked = int((MASK == 0).sum())
    assert json.loads(run(*argv, "--format", "json")[0])["masked"] == masked
    out, _ = run(*argv, "--per-sample", tmp_path / "values.npy")
    assert f"{N - masked} samples, {masked} masked" in out
    values = np.load(tmp_path / "values.npy")
    assert values["scored"].tolist() == (MASK == 1).tolist()
    assert values["label"].tolist() == labels.tolist()
    assert np.isnan(values["kl"][MASK == 0]).all()


@pytest.mark.parametrize("array", [False, True])
def test_labels_beyond_the_signed_integers_do_not_wrap(run, fails, files, tmp_path, array):
    labels = np.where(MASK == 1, TARGETS, -100).astype(np.uint64)
    where, masked = 2**64 - 100, int((MASK == 0).sum())
    if array:
        assert gklx.score(S, T, labels, where_label=where).masked == masked
        with pytest.raises(ValueError, match=rf"^labels: labels must lie in \[0, {C}\), got {where} at sample "):
            gklx.score(S, T, labels, where_label=-100)
        return
    np.save(tmp_path / "labels.npy", labels)
    argv = [files["s"], files["t"], "--labels", tmp_path / "labels.npy"]
    out, _ = run(*argv, "--where-label", where, "--per-sample", tmp_path / "values.npy", "--format", "json")
    assert json.loads(out)["masked"] == masked
    assert np.load(tmp_path / "values.npy")["label"].tolist() == np.where(MASK == 1, TARGETS, -1).tolist()
    assert f"got {where} at sample " in fails(*argv, "--where-label", "-100")


@pytest.mark.parametrize("what", ["labels", "targets"])
def test_error_of_a_negative_label_names_the_where_label_option(fails, files, tmp_path, what):
    labels = TARGETS.copy()
    labels[5] = -100
    np.save(tmp_path / "y.npy", labels)
    line = fails(files["s"], files["t"], f"--{what}", tmp_path / "y.npy")
    expected = f"{what} must lie in [0, {C}), got -100 at sample 5 (--where-label leaves the samples of one label out)"
    assert line == f"{tmp_path / 'y.npy'}: {expected}"
    labels[6] = -1  # another one
    np.save(tmp_path / "y.npy", labels)
    assert "got -1 at sample 6" in fails(
        files["s"], files["t"], f"--{what}", tmp_path / "y.npy", "--where-label", "-100"
    )


def test_invalid_masks_and_targets_are_refused(fails, files, tmp_path):
    pair = files["s"], files["t"]
    for name, x, message in (
        ("floats", MASK * 0.5, "a mask must hold booleans, or integers 0 and 1, got float64"),
        ("two", MASK + 1, "a mask must hold 0 and 1 alone, got 2 at sample"),
        ("short", MASK[:-1], "weights must have one weight a sample, shape [600] as in"),
    ):
        np.save(tmp_path / f"{name}.npy", x)
        assert message in fails(*pair, "--sample-weight", tmp_path / f"{name}.npy")
    for name, x, message in (
        ("floats", TARGETS * 1.0, "labels must be integers, got float64"),
        ("outside", TARGETS + 1, f"targets must lie in [0, {C}), got {C} at sample"),
        ("short", TARGETS[:-1], "targets must have one target a sample, shape [600] as in"),
    ):
        np.save(tmp_path / f"{name}.npy", x)
        assert message in fails(*pair, "--targets", tmp_path / f"{name}.npy")
    np.save(tmp_path / "none.npy", np.zeros(N, bool))
    line = fails(*pair, "--sample-weight", tmp_path / "none.npy")
    assert line.startswith("nothing to score: ")
    assert line.endswith("600 do not count")
    assert fails(*pair, "--where-label", "-100") == "where_label needs labels or targets, got neither"
    assert "must be a whole number, got x" in fails(*pair, "--where-label", "x")
    for given in ("0", "5,5", "a", ""):
        assert "argument --top-k: must be different whole numbers" in fails(*pair, "--top-k", given)
    assert fails(*pair, "--top-k", "41") == "top_k must be at most the 40 classes, got 41"


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_option_selects_the_class_weights(fails, run, files):
    argv = [files["s"], files["t"], "--labels", files["targets"], "--format", "json"]
    found = {name: json.loads(run(*argv, *more)[0]) for name, more in (("", ()), ("t", ("--weights", "teacher")))}
    prior = json.loads(run(*argv, "--weights", "prior")[0])
    assert prior == found[""]
    assert [x["parameters"]["weights"] for x in found.values()] == ["class prior", "teacher"]
    plain = json.loads(run(files["s"], files["t"], "--format", "json")[0])
    assert found["t"]["losses"] == plain["losses"]
    assert len(found["t"]["worst_classes"]) == 5
    assert fails(files["s"], files["t"], "--weights", "prior") == (
        'weights "prior" needs labels, by which the class prior is made, got none'
    )
    assert fails(*argv, "--weights", "prior", "--loss", "kl") == 'weights "prior" needs the loss ikl or gkl, got kl'


def test_class_prior_too_large_for_memory_is_replaced_unless_required(run, fails, files, monkeypatch):
    original = memory.rows_and_threads

    def small(*args):
        if "class prior" in args[-1].what:
            raise ValueError("memory must be at least 1,000 GB")
        return original(*args)

    monkeypatch.setattr(memory, "rows_and_threads", small)
    argv = [files["s"], files["t"], "--labels", files["targets"]]
    assert fails(*argv, "--weights", "prior") == "memory must be at least 1,000 GB"
    out, err = run(*argv, "--format", "json")
    assert err == "gklx: ikl and gkl are weighed by the teacher: memory must be at least 1,000 GB\n"
    plain = json.loads(run(files["s"], files["t"], "--format", "json")[0])
    assert json.loads(out)["losses"] == plain["losses"]
    assert json.loads(out)["parameters"]["weights"] == "teacher"


# --- candidates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["numpy", "torch", "jax", "dask"])
def test_candidates_score_as_each_alone(run, files, on):
    backends.needs(on)
    argv = ["--targets", files["targets"], "--format", "json", "--backend", on, "--top-k", "5"]
    out, _ = run(files["w"], files["s"], files["t"], *argv)
    found = json.loads(out)
    assert list(found) == ["teacher", "students"]
    assert found["teacher"] == files["t"]
    assert [x.pop("name") for x in found["students"]] == [files["w"], files["s"]]
    differences = [x.pop("difference_from_first", None) for x in found["students"]]
    for own, name in zip(found["students"], ("w", "s"), strict=True):
        assert own == json.loads(run(files[name], files["t"], *argv)[0])
    assert differences[0] is None
    kl = [gklx.kl(x, T, reduction="none") for x in (W, S)]
    expected = {"value": (kl[1] - kl[0]).mean(), "stderr": error(kl[1] - kl[0])}
    assert differences[1]["kl"] == pytest.approx(expected, rel=1e-6)
    assert list(differences[1]) == ["kl", "dkl", "ikl", "gkl"]


def test_candidates_read_the_teacher_once(files, monkeypatch):
    from gklx._scoring.file_formats.npy import NpyRows

    original, read = NpyRows.read, []
    monkeypatch.setattr(NpyRows, "read", lambda self, *args: read.append(self.name) or original(self, *args))
    gklx.score_candidates({"a": files["s"], "b": files["w"], "c": files["s"]}, files["t"], batch_size=N)
    assert read.count(files["t"]) == 1


def test_differences_leave_out_samples_undefined_for_one_candidate(files):
    s, w = S.copy(), W.copy()
    s[3, 0], w[9, 0] = np.nan, np.nan
    found = gklx.score_candidates({"s": s, "w": w}, T, losses=["kl"])
    assert [x.undefined for x in found.students.values()] == [1, 1]
    both = np.delete(np.arange(N), [3, 9])
    x = gklx.kl(W, T, reduction="none")[both] - gklx.kl(S, T, reduction="none")[both]
    assert found.differences["w"]["kl"] == pytest.approx((x.mean(), error(x)), rel=1e-10)


def test_table_compares_the_candidates(run, files):
    out, _ = run(files["w"], files["s"], files["t"], "--targets", files["targets"], "--top-k", "5", "--loss", "kl")
    lines = out.splitlines()
    (row,) = (line for line in lines if line.startswith("kl mean"))
    assert [float(x) for x in row.split()[2:]] == pytest.approx([gklx.kl(x, T) for x in (W, S)], rel=1e-3)
    (row,) = (line for line in lines if "less the first's" in line)
    assert re.search(r"–  +-0\.\d+ ± 0\.\d+$", row.rstrip())
    for phrase in (
        "against t.npy",
        "top-1 agreement",
        "top-5 overlap",
        "perplexity of the student",
        "Δp mean",
        "0.1 %",
    ):
        assert phrase in out


def test_invalid_candidates_are_refused(fails, files, tmp_path):
    np.save(tmp_path / "short.npy", S[:-1])
    np.save(tmp_path / "narrow.npy", S[:, :-1])
    assert "they do not hold the same samples" in fails(files["s"], tmp_path / "short.npy", files["t"])
    assert "vocabulary mismatch" in fails(files["s"], tmp_path / "narrow.npy", files["t"])
    assert fails(files["s"], files["s"], files["t"]) == f"{files['s']}: is named twice as a candidate"
    line = fails(files["s"], files["w"], files["t"], "--per-sample", tmp_path / "x.npy")
    assert line == "per_sample needs a single student, got several candidates"
    nan = tmp_path / "nan.npy"
    np.save(nan, np.full_like(S, np.nan))
    assert fails(files["s"], nan, files["t"]).startswith(f"{nan}: nothing to score: ")
    with pytest.raises(TypeError, match="students must be a mapping of names to logits, got list"):
        gklx.score_candidates([files["s"]], files["t"])
    with pytest.raises(ValueError, match="must hold at least one candidate"):
        gklx.score_candidates({}, files["t"])


@pytest.mark.parametrize("suffix", [".svg", ".png", ".html"])
@pytest.mark.parametrize("targeted", [True, False])
def test_plot_compares_the_candidates(run, files, tmp_path, suffix, targeted):
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    more = ["--targets", files["targets"]] if targeted else []
    plot = tmp_path / f"plot{suffix}"
    run(files["w"], files["s"], files["t"], *more, "--plot", plot)
    content = plot.read_bytes()
    if suffix != ".png":
        for phrase in (
            "w.npy",
            "s.npy",
            "2 candidates against t.npy",
            "Δp of the targets" if targeted else "Top-1",
        ):
            assert phrase in content.decode() or phrase.encode("unicode_escape") in content
    assert content[:4] == {".svg": b"<svg", ".png": b"\x89PNG", ".html": b"<!DO"}[suffix]


# --- gates ------------------------------------------------------------------------------------------------------------


def test_gates_pass_and_fail(run, files, tmp_path):
    argv = [files["s"], files["t"], "--targets", files["targets"], "--format", "json", "--top-k", "5"]
    found = json.loads(run(*argv)[0])
    kl = found["losses"]["kl"]
    passing = [
        f"kl.mean > {kl['mean'] + 1e-9}",
        f"losses.kl.mean<{kl['mean'] - 1e-9}",
        "perplexity.ratio > 2",
        "perplexity.ratio.value > 2",
        "top_k_overlap.5.value < 0.1",
        "top1_agreement < 0.5",
        "delta_p.rms.stderr > 1",
        "samples < 600",
    ]
    _, err = run(*argv, *(x for gate in passing for x in ("--fail-if", gate)))
    assert err == ""
    gates = ["--fail-if", f"kl.p99 > {kl['p99'] / 2}", "--fail-if", "kl.p99 > 1e9", "--fail-if", "delta_p.min<0"]
    _, err = run(*argv, *gates, "--output", tmp_path / "out.json", status=3)
    first, second = err.splitlines()
    assert first == f"gklx: kl.p99 is {kl['p99']:.6g}: fails by kl.p99 > {kl['p99'] / 2}"
    assert second == f"gklx: delta_p.min is {found['delta_p']['min']:.6g}: fails by delta_p.min<0"
    assert json.loads((tmp_path / "out.json").read_text()) == found
    assert list((tmp_path / "work").iterdir()) == []


def test_gates_apply_to_every_candidate(run, files):
    bound = (gklx.kl(S, T) + gklx.kl(W, T)) / 2
    out, err = run(files["s"], files["w"], files["t"], "--loss", "kl", "--fail-if", f"kl.mean > {bound}", status=3)
    assert "kl mean" in out
    assert err.startswith(f"gklx: {files['w']}: kl.mean is ")
    assert err.count("\n") == 1


def test_gates_know_every_result(run, files):
    masked = int((MASK == 0).sum())
    gates = ["--fail-if", "classes > 39", "--fail-if", "masked > 0"]
    _, err = run(files["s"], files["t"], "--loss", "kl", "--sample-weight", files["mask"], *gates, status=3)
    assert err == f"gklx: classes is {C}: fails by classes > 39\ngklx: masked is {masked}: fails by masked > 0\n"
    value, stderr = gklx.score_candidates({"s": S, "w": W}, T, losses=["kl"]).differences["w"]["kl"]
    name = "difference_from_first.kl"
    gates = [x for end in ("", ".value", ".stderr") for x in ("--fail-if", f"{name}{end} > 0")]
    _, err = run(files["s"], files["w"], files["t"], "--loss", "kl", *gates, status=3)
    assert err.splitlines() == [
        f"gklx: {files['w']}: {name}{end} is {x:.6g}: fails by {name}{end} > 0"
        for end, x in (("", value), (".value", value), (".stderr", stderr))
    ]


def test_undefined_number_fails_its_gate(run, files, tmp_path):
    np.save(tmp_path / "one.npy", S[:1])
    _, err = run(tmp_path / "one.npy", tmp_path / "one.npy", "--fail-if", "kl.stderr > 1", status=3)
    assert err == "gklx: kl.stderr is not defined: fails by kl.stderr > 1\n"


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("kl.p99", "argument --fail-if: must be NAME > NUMBER or NAME < NUMBER, such as 'kl.p99 > 0.1', got 'kl.p99'"),
        ("", "must be NAME > NUMBER"),
        ("kl.p99 >= 1", "must be NAME > NUMBER"),
        ("kl.p99 > x", "must be NAME > NUMBER"),
        ("kl.p99 > nan", "must be NAME > NUMBER"),
        ("kl.p99 > inf", "must be NAME > NUMBER"),
        ("kl.p99 > 1 > 2", "must be NAME > NUMBER"),
        ("kl.p98 > 1", "--fail-if kl.p98 > 1: kl.p98 is no number of this report"),
        ("kl > 1", "kl is no number of this report"),
        ("kl.mse > 1", "kl.mse is no number of this report"),
        ("reverse_kl.mean > 1", "reverse_kl.mean is no number of this report"),
        ("perplexity.ratio > 1", "perplexity.ratio is no number of this report without targets"),
        ("top_k_overlap.5 < 1", "top_k_overlap.5 is no number of this report: --top-k asks for none"),
        ("masked > 1", "masked is no number of this report without --sample-weight or --where-label"),
        ("difference_from_first.kl > 1", "difference_from_first.kl is no number of this report with a single student"),
        ("classes.x < 1", "classes.x is no number of this report"),
    ],
)
def test_invalid_gates_are_refused_before_the_work(fails, files, gate, message):
    assert message in fails(files["s"], files["t"], "--fail-if", gate)


def test_parsed_gate_keeps_its_text():
    assert parsed_gate("  kl.p99   >  1e-1 ") == ("kl.p99", True, 0.1, "kl.p99 > 1e-1")


def test_failed_gate_sets_the_exit_status(files, tmp_path):
    argv = [*dumps.COMMAND, files["s"], files["t"], "--work-dir", str(tmp_path / "work"), "--fail-if", "kl.mean > 0"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 3
    assert "top-1 agreement" in done.stdout
    assert re.fullmatch(r"gklx: kl\.mean is 0\.\d+: fails by kl\.mean > 0\n", done.stderr)


@pytest.mark.parametrize("kind", ["normal", "squares", "two peaks"])
def test_digest_is_within_a_thousandth_of_the_ranks(kind):
    pytest.importorskip("datasketches")
    rng = np.random.default_rng(0)
    x = rng.standard_normal(4_400_000)
    if kind != "normal":
        x = x**2 if kind == "squares" else np.where(rng.random(x.size) < 0.5, x - 3, 0.1 * x + 3)
    sketch = statistics.digest()
    for part in np.split(x, 20):
        sketch.update(part)
    ordered = np.sort(x)
    for q in statistics.QUANTILES.values():
        assert abs(np.searchsorted(ordered, sketch.get_quantile(q)) / x.size - q) < 0.001
