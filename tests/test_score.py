"""What `gklx score` computes, against plain NumPy in float64 that builds every pair of classes."""

import json
from pathlib import Path

import numpy as np
import pytest

import backends
import gklx
from gklx._cli import main
from gklx._core.libraries import LIBRARIES
from gklx._scoring.samples import LOSSES, Parameters
from gklx._scoring.statistics import Score

pytestmark = pytest.mark.together

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
STUDENT, TEACHER, LABELS = (DIGITS / f"{name}.npy" for name in ("student", "teacher", "labels"))
NAMES = list(LOSSES)
NUMBERS = Parameters(temperature=2.0, weight_temperature=4.0, gamma=0.5, mse_weight=3.0, ce_weight=0.5)


@pytest.fixture
def save(tmp_path):
    def saved(name, x):
        path = tmp_path / f"{name}.npy"
        np.save(path, x)
        return str(path)

    return saved


@pytest.fixture
def digits():
    return tuple(np.load(path) for path in (STUDENT, TEACHER, LABELS))


def computed(
    student=STUDENT, teacher=TEACHER, labels=LABELS, *, names=NAMES, numbers=NUMBERS, on="numpy", batch_size=None
) -> Score:
    return gklx.score(student, teacher, labels, losses=names, **numbers._asdict(), backend=on, batch_size=batch_size)


def numbers_of(found: Score) -> dict[str, float]:
    """All numbers of a score by their places, without those that name the backend."""
    flat = {name: getattr(found, name) for name in ("samples", "skipped", "undefined", "top1_agreement")}
    for name, summary in found.losses.items():
        flat |= {f"{name}.{key}": value for key, value in summary._asdict().items() if value is not None}
    for at, each in enumerate(found.worst_classes or []):
        flat |= {f"{at}.label": each.label, f"{at}.samples": each.samples, f"{at}.top1": each.top1_agreement}
        flat |= {f"{at}.{name}": value for name, value in each.means.items()}
    return flat


def assert_same(found: Score, expected: Score, rel: float) -> None:
    assert numbers_of(found) == pytest.approx(numbers_of(expected), rel=rel, abs=rel, nan_ok=True)


# --- by hand ----------------------------------------------------------------------------------------------------------


def softmax(x, temperature):
    e = np.exp((x - x.max(axis=-1, keepdims=True)) / temperature)
    return e / e.sum(axis=-1, keepdims=True)


def pairs_mse(w, s, t):
    """1/4 sum_jk w_j w_k (dt_jk - ds_jk)^2 from [N, C, C] pairs."""
    of_pairs = (t[:, :, None] - t[:, None, :]) - (s[:, :, None] - s[:, None, :])
    return (w[:, :, None] * w[:, None, :] * of_pairs**2).sum(axis=(1, 2)) / 4


def class_prior(t, labels, temperature):
    rows = softmax(t, temperature)
    classes = t.shape[-1]
    uniform = np.full(classes, 1 / classes)
    return np.stack([rows[labels == y].mean(axis=0) if (labels == y).any() else uniform for y in range(classes)])


def by_hand(s, t, labels, numbers):
    """Weighted wMSE and CE of each sample and loss; KL as (KL, None)."""
    s, t = s.astype(np.float64), t.astype(np.float64)
    p, q = softmax(t, numbers.temperature), softmax(s, numbers.temperature)
    ce = numbers.ce_weight * -(p * np.log(q)).sum(axis=-1)
    if labels is None:
        w = softmax(t, numbers.weight_temperature)
    else:
        w = class_prior(t, labels, numbers.weight_temperature)[labels]
    w_gkl = w**numbers.gamma
    normalizer = (w_gkl.sum(axis=-1) ** 2).mean()
    a = numbers.mse_weight
    return {
        "kl": ((p * np.log(p / q)).sum(axis=-1), None),
        "dkl": (a * pairs_mse(p, s / numbers.temperature, t / numbers.temperature), ce),
        "ikl": (a * pairs_mse(w, s, t), ce),
        "gkl": (a * pairs_mse(w_gkl, s, t) / normalizer, ce),
    }


@pytest.mark.parametrize("labelled", [True, False])
def test_every_number_matches_a_computation_by_hand(digits, save, labelled):
    s, t, labels = digits
    s, t = s.astype(np.float64), t.astype(np.float64)
    found = computed(save("s", s), save("t", t), LABELS if labelled else None)
    per_sample = {}
    for name, (mse, ce) in by_hand(s, t, labels if labelled else None, NUMBERS).items():
        x = per_sample[name] = mse if ce is None else mse + ce
        median, p90, p95, p99 = np.quantile(x, (0.5, 0.9, 0.95, 0.99))
        expected = {
            "mean": x.mean(),
            "stderr": x.std(ddof=1) / np.sqrt(x.size),
            "median": median,
            "p90": p90,
            "p95": p95,
            "p99": p99,
            "max": x.max(),
            "mse": None if ce is None else mse.mean(),
            "ce": None if ce is None else ce.mean(),
            "infinite": 0,
        }
        got = found.losses[name]._asdict()
        assert (got["mse"] is None, got["ce"] is None) == (name == "kl",) * 2
        numbers = {key: value for key, value in expected.items() if value is not None}
        assert {key: got[key] for key in numbers} == pytest.approx(numbers, rel=1e-12), name
    agrees = s.argmax(-1) == t.argmax(-1)
    assert found.top1_agreement == pytest.approx(agrees.mean(), rel=1e-15)
    assert found.weights == ("class prior" if labelled else "teacher")
    if not labelled:
        assert found.worst_classes is None
        return
    means = np.asarray([per_sample["kl"][labels == y].mean() for y in range(10)])
    assert [each.label for each in found.worst_classes] == np.argsort(-means)[:5].tolist()
    for each in found.worst_classes:
        of = labels == each.label
        assert each.samples == of.sum()
        assert each.top1_agreement == pytest.approx(agrees[of].mean(), rel=1e-14)
        assert each.means == pytest.approx({name: x[of].mean() for name, x in per_sample.items()}, rel=1e-12)


def test_means_are_those_of_the_losses(digits):
    s, t, labels = (x.astype(np.float64) if x.dtype.kind == "f" else x for x in digits)
    prior = gklx.ClassPrior(10)
    prior.update(t, labels)
    prior.advance()
    found = computed(numbers=Parameters(gamma=0.3)).losses
    expected = gklx.gkl(s, t, prior=prior.table, labels=labels, gamma=0.3)
    assert found["gkl"].mean == pytest.approx(float(expected), rel=1e-5)
    assert found["kl"].mean == pytest.approx(float(gklx.kl(s, t)), rel=1e-5)


# --- invariances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_batch_size_does_not_matter_in_float64(digits, save, batch_size, labelled):
    files = [save(name, x[:101].astype(np.float64)) for name, x in zip("st", digits[:2], strict=True)]
    labels = save("y", digits[2][:101]) if labelled else None
    assert_same(computed(*files, labels, batch_size=batch_size), computed(*files, labels), rel=1e-12)


@pytest.mark.parametrize("labelled", [True, False])
def test_order_does_not_matter(digits, labelled):
    s, t, labels = (x.astype(np.float64) if x.dtype.kind == "f" else x for x in digits)
    order = np.random.default_rng(0).permutation(len(s))
    there, here = ((s, t, labels), (s[order], t[order], labels[order]))
    found, expected = (gklx.score(x, y, z if labelled else None, **NUMBERS._asdict()) for x, y, z in (there, here))
    assert_same(found, expected, rel=1e-12)


@pytest.mark.parametrize("on", ["numpy", "torch", "jax"])
def test_batch_size_does_not_matter_in_float32(digits, save, on):
    backends.needs(on)
    student, teacher, labels = (save(name, x[:14]) for name, x in zip("sty", digits, strict=True))
    names = ["kl", "gkl"]  # the others are gkl's formula; JAX compiles each operation for each shape
    whole = computed(student, teacher, labels, on=on, names=names)
    for size in (1, 7, 1000):
        assert_same(computed(student, teacher, labels, on=on, names=names, batch_size=size), whole, rel=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("library", [x for x in LIBRARIES if x.backend != "numpy"], ids=lambda x: x.backend)
def test_backends_agree(digits, save, library, dtype):
    backends.needs(library.backend)
    student, teacher = (save(name, x.astype(dtype)) for name, x in zip("st", digits[:2], strict=True))
    found = computed(student, teacher, on=library.backend)
    assert found.backend == library.backend
    assert_same(found, computed(student, teacher), rel=1e-5 if dtype == "float32" else 1e-12)


def test_jax_settings_are_restored():
    backends.needs("jax")
    import jax

    before = jax.config.jax_enable_x64
    computed(on="jax", names=["kl"])
    assert jax.config.jax_enable_x64 == before


@pytest.mark.parametrize("change", ["big_endian", "fortran", "three_axes", "fortran_three_axes", "float64", "mixed"])
def test_layout_does_not_matter(digits, save, change):
    s, t, labels = (x[:120] for x in digits)
    expected = computed(save("s0", s), save("t0", t), save("y0", labels))
    rel = 1e-12
    if change == "big_endian":
        s, t, labels = s.astype(">f4"), t.astype(">f4"), labels.astype(">i2")
    elif change in ("float64", "mixed"):
        s, t, rel = s.astype(np.float64), t if change == "mixed" else t.astype(np.float64), 1e-5
    elif change == "fortran":
        s, t = np.asfortranarray(s), np.asfortranarray(t)
    else:
        s, t, labels = s.reshape(12, 10, 10), t.reshape(12, 10, 10), labels.reshape(12, 10)
    if change == "fortran_three_axes":
        s, labels = np.asfortranarray(s), np.asfortranarray(labels)
    assert_same(computed(save("s", s), save("t", t), save("y", labels), batch_size=17), expected, rel=rel)


@pytest.mark.parametrize("on", [x.backend for x in LIBRARIES if x.backend != "cupy"])
def test_float16_is_computed_in_float32(digits, save, on):
    backends.needs(on)
    s, t = (x[:50].astype(np.float16) for x in digits[:2])
    wide = save("s32", s.astype(np.float32)), save("t32", t.astype(np.float32))
    found = computed(save("s", s), save("t", t), None, on=on, names=["gkl"])
    assert_same(found, computed(*wide, None, on=on, names=["gkl"]), rel=1e-12)


def test_worst_classes_need_labels_but_no_prior(digits):
    found = computed(names=["kl"])
    of = {y: gklx.kl(*(x[digits[2] == y].astype(np.float64) for x in digits[:2]), temperature=2.0) for y in range(10)}
    assert found.worst_classes[0].label == max(of, key=of.get)


def test_class_without_samples_and_unsigned_labels(digits, save):
    s, t, labels = (x.astype(np.float64) if x.dtype.kind == "f" else x for x in digits)
    keep = labels < 3
    s, t, labels = s[keep], t[keep], labels[keep].astype(np.uint8)
    found = computed(save("s", s), save("t", t), save("y", labels), batch_size=10)
    mse, ce = by_hand(s, t, labels, NUMBERS)["gkl"]
    assert found.losses["gkl"].mean == pytest.approx((mse + ce).mean(), rel=1e-12)
    assert {each.label for each in found.worst_classes} == {0, 1, 2}


# --- infinite and undefined samples -----------------------------------------------------------------------------------


def test_infinite_sample_does_not_affect_lower_quantiles(save):
    s, t = np.zeros((20, 3)), np.zeros((20, 3))
    t[:, 0] = np.arange(20) / 10
    s[4, 0] = -np.inf
    found = computed(save("s", s), save("t", t), None, names=["kl", "gkl"]).losses["kl"]
    assert (found.mean, found.max, found.infinite) == (np.inf, np.inf, 1)
    assert np.isfinite([found.median, found.p90]).all()
    assert (found.p95, found.p99) == (np.inf, np.inf)  # the 95 % point lies just above the largest finite loss


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_undefined_sample_is_counted_and_left_out(digits, save, bad, labelled):
    s, t, labels = (x[:60].copy() for x in digits)
    t[7, 2] = bad
    files = save("s", s), save("t", t), save("y", labels) if labelled else None
    found = computed(*files)
    assert (found.samples, found.undefined) == (59, 1)
    assert_same(computed(*files, batch_size=1), found, rel=2e-6)
    good = np.arange(60) != 7
    clean = save("s1", s[good]), save("t1", t[good]), save("y1", labels[good]) if labelled else None
    assert_same(found._replace(undefined=0), computed(*clean), rel=2e-6)
    with pytest.raises(ValueError, match=r"^strict: sample 7 has NaN or \+inf among its logits, or no finite one$"):
        gklx.score(*files, strict=True)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_undefined_samples_do_not_spoil_their_classes(library):
    """A class prior leaves them out, in every library; XLA leaves NaN out of the maxima of some shapes."""
    backends.needs(library)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 20, 300)
    s, t = rng.standard_normal((2, 300, 20)).astype("float32")
    bad = [np.flatnonzero(labels == label)[0] for label in range(20)]
    t[bad[:10], 3], t[bad[10:], 4] = np.nan, np.inf
    found = gklx.score(s, t, labels, backend=library)
    expected = gklx.score(np.delete(s, bad, 0), np.delete(t, bad, 0), np.delete(labels, bad))
    assert (found.samples, found.undefined) == (280, 20)
    for name, summary in found.losses.items():
        assert summary.mean == pytest.approx(expected.losses[name].mean, rel=1e-5)


def test_samples_without_classes_are_skipped(digits, save):
    s, t, labels = (x[:40].copy() for x in digits)
    expected = computed(save("s0", s[:38]), save("t0", t[:38]), save("y0", labels[:38]))
    s[38:], t[38:] = -np.inf, -np.inf
    found = computed(save("s", s), save("t", t), save("y", labels))
    assert (found.samples, found.skipped) == (38, 2)
    assert_same(found._replace(skipped=0), expected, rel=1e-6)
    with pytest.raises(ValueError, match="nothing to score"):
        computed(save("s1", s[38:]), save("t1", t[38:]), None)


def test_nan_sample_does_not_count_for_agreement(save):
    x = np.asarray([[0.0, 1.0], [np.nan, 1.0], [2.0, 1.0]])
    found = computed(save("s", x), save("t", x), None, names=["kl"])
    assert (found.samples, found.undefined, found.top1_agreement) == (2, 1, 1.0)
    with pytest.raises(ValueError, match=r"^nothing to score: .* in 1 a logit is NaN or \+inf, or none is finite"):
        computed(save("s1", x[1:2]), save("t1", x[1:2]), None)


def test_part_of_weight_zero_is_zero_even_if_infinite(save):
    s, t = np.zeros((4, 3)), np.zeros((4, 3))
    s[0, 0] = -np.inf
    path = save("s", s), save("t", t), None
    assert computed(*path, names=["dkl"], numbers=Parameters(mse_weight=0.0)).losses["dkl"].mse == 0
    both = Parameters(mse_weight=0.0, ce_weight=0.0)
    assert computed(*path, names=["dkl"], numbers=both).losses["dkl"].mean == 0


@pytest.mark.parametrize("on", ["numpy", "torch", "jax"])
def test_top_classes_beyond_the_integers_of_float32_are_exact(on):
    """2^24 and 2^24 + 1 are one number in float32."""
    backends.needs(on)
    classes = 2**24 + 3
    s, t = np.zeros((2, 1, classes), np.float32)
    for x, top in ((s, 2**24), (t, 2**24 + 1)):
        x[0, top] = 1
    found = gklx.score(s, t, losses=["kl"], backend=on)
    assert (found.samples, found.top1_agreement) == (1, 0.0)
    assert gklx.score(s, s, losses=["kl"], backend=on).top1_agreement == 1.0


def test_one_sample_has_no_standard_error(digits, save, capsys):
    student, teacher = (save(name, x[:1]) for name, x in zip("st", digits[:2], strict=True))
    assert main(["score", student, teacher, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["losses"]["kl"]["stderr"] is None
    assert found["losses"]["kl"]["infinite"] == 0
