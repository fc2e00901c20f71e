"""The plot of a score: its data, and its formats."""

import json
import re
import struct
import xml.etree.ElementTree as ET

import numpy as np
import pytest

import gklx
from gklx._scoring import plot

pytestmark = pytest.mark.library_independent

pytest.importorskip("altair", reason="altair is not installed")
pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")

rng = np.random.default_rng(5)


def logits(samples, classes):
    return tuple(rng.standard_normal((2, samples, classes)) * 3)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """A function that scores; it returns the plot's specification and the score."""

    def draw(*args, **kwargs):
        specs = []
        monkeypatch.setattr(plot, "rendered", lambda spec, suffix: specs.append(spec) or b"")
        found = gklx.score(*args, plot=tmp_path / "x.svg", **kwargs)
        return specs[0], found

    return draw


def rows(spec, panel, layer=0):
    chart = spec["hconcat"][panel]
    chart = chart["layer"][layer] if "layer" in chart else chart
    return spec["datasets"][chart["data"]["name"]]


def subtitle(spec, panel):
    return " ".join(spec["hconcat"][panel]["title"]["subtitle"])


def test_histogram_shares_are_fractions_of_all_samples(drawn):
    s, t = logits(200, 5)
    spec, found = drawn(s, t, gamma=0.5)
    for name in found.losses:
        assert sum(row["share"] for row in rows(spec, 0) if row["loss"] == name) == pytest.approx(1)
    kl = gklx.kl(s, t, reduction="none")
    for row in rows(spec, 0):
        if row["loss"] == "kl":
            assert row["share"] == pytest.approx(((kl >= row["from"]) & (kl < row["to"])).mean(), abs=1e-12)
    marks = {(row["loss"], row["what"]): row["value"] for row in rows(spec, 0, 1)}
    assert marks["gkl", "median"] == found.losses["gkl"].median
    assert marks["kl", "mean"] == found.losses["kl"].mean


@pytest.mark.parametrize("labelled", [True, False])
def test_class_means_are_sorted_and_by_label_or_top_class(drawn, labelled):
    s, t = logits(300, 6)
    labels = rng.integers(0, 6, 300)
    spec, _ = drawn(s, t, labels if labelled else None, losses=["gkl", "kl"])
    of = labels if labelled else t.argmax(-1)
    if not labelled:
        loss = gklx.gkl(s, t, reduction="none")
        found = {row["class"]: row["mean"] for row in rows(spec, 1)}
        assert found == pytest.approx({c: loss[of == c].mean() for c in range(6)}, rel=1e-12)
    means = [row["mean"] for row in rows(spec, 1)]
    assert means == sorted(means, reverse=True)
    assert {row["class"]: row["samples"] for row in rows(spec, 1)} == {c: (of == c).sum() for c in range(6)}


def test_many_classes_are_drawn_as_a_curve(drawn):
    s, t = logits(1200, 1500)
    spec, _ = drawn(s, t, losses=["kl"])
    panel = spec["hconcat"][1]
    assert panel["mark"]["type"] == "line"
    assert 100 < len(rows(spec, 1)) <= 400
    loss, top = gklx.kl(s, t, reduction="none"), t.argmax(-1)
    means = {c: loss[top == c].mean() for c in np.unique(top)}
    worst = sorted(means, key=means.get, reverse=True)
    assert f"worst: {', '.join(map(str, worst[:10]))}" in subtitle(spec, 1)
    assert rows(spec, 1)[-1]["class"] == worst[-1]


def test_confidence_panel_counts_samples_and_shows_agreement(drawn):
    s, t = logits(500, 3)
    spec, found = drawn(s, t)
    panel = spec["hconcat"][2]
    cells = rows(spec, 2)
    assert sum(cell["samples"] for cell in cells) == 500
    teacher = (np.exp(t) / np.exp(t).sum(-1, keepdims=True)).max(-1)
    for low, high in {(cell["teacher"], cell["teacher_to"]) for cell in cells}:
        counted = sum(cell["samples"] for cell in cells if cell["teacher"] == low)
        assert counted == ((teacher >= low) & (teacher < high)).sum()
    assert f"{found.top1_agreement:.2%}" in panel["title"]["text"]


def test_subtitles_count_the_samples_that_are_not_drawn(drawn):
    s, t = logits(50, 4)
    s[:3] = t[:3]
    s[5, 0] = -np.inf
    s[7] = np.nan
    s[8] = t[8] + [0, 0, 0, 1e-7]
    spec, _ = drawn(s, t, losses=["kl"])
    output_text = subtitle(spec, 0)
    for each in ("not finite, not drawn: kl 1", "exactly 0, not drawn: kl 3", "not drawn: kl 1"):
        assert each in output_text
    assert "below 1e-" in output_text
    assert sum(row["share"] for row in rows(spec, 0)) == pytest.approx(44 / 49)
    assert "1 losses that are not finite left out" in subtitle(spec, 1)
    assert "1 left out" in spec["title"]["subtitle"]


def test_class_means_are_of_finite_losses(drawn):
    s, t = logits(300, 4)
    s[:5, 0] = -np.inf
    spec, _ = drawn(s, t, losses=["kl"])
    loss, top = gklx.kl(s[5:], t[5:], reduction="none"), t[5:].argmax(-1)
    found = {row["class"]: row["mean"] for row in rows(spec, 1)}
    assert found == pytest.approx({c: loss[top == c].mean() for c in range(4)}, rel=1e-12)


@pytest.mark.parametrize("losses", [["kl", "dkl", "ikl", "gkl"], ["gkl", "ikl", "dkl"]])
def test_coinciding_curves_have_different_dashes(drawn, losses):
    spec, _ = drawn(*logits(30, 4), losses=losses)
    order = list(dict.fromkeys(row["loss"] for row in rows(spec, 0)))
    scale = spec["hconcat"][0]["layer"][0]["encoding"]["strokeDash"]["scale"]
    dashes = dict(zip(scale["domain"], scale["range"], strict=True))
    assert order[-3:] == ["dkl", "ikl", "gkl"]  # drawn in this order, whatever was asked for
    assert [dashes[name] for name in order[-3:]] == [[1, 0], [10, 6], [6, 6]]


@pytest.mark.parametrize("case", ["bars", "curve", "infinite"])
def test_subtitles_have_equal_numbers_of_lines(drawn, case):
    s, t = logits(200, 60 if case == "curve" else 5)
    if case == "infinite":
        s[:9, 0] = -np.inf
    spec, _ = drawn(s, t)
    assert len({len(panel["title"]["subtitle"]) for panel in spec["hconcat"]}) == 1


@pytest.mark.parametrize("case", ["one", "equal", "infinite", "negative"])
def test_degenerate_samples_are_drawn(tmp_path, case):
    s, t = logits(1 if case == "one" else 20, 3)
    if case == "equal":
        s = t
    elif case == "infinite":
        s[:, 0] = -np.inf
    weights = {"mse_weight": -1.0, "ce_weight": -1.0} if case == "negative" else {}
    gklx.score(s, t, plot=tmp_path / "x.svg", **weights)
    assert ET.parse(tmp_path / "x.svg").getroot().tag.endswith("svg")


def test_svg_png_and_html_are_complete(tmp_path):
    s, t = logits(60, 4)
    for name in ("x.svg", "again.svg", "x.png", "x.html"):
        gklx.score(s, t, plot=tmp_path / name)
    assert (tmp_path / "x.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()
    text = "".join(ET.parse(tmp_path / "x.svg").getroot().itertext())
    for phrase in (
        "Loss per sample",
        "share of samples",
        "teacher's largest probability",
        "60 samples",
        "mean kl",
    ):
        assert phrase in text
    png = (tmp_path / "x.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert struct.unpack(">I", png[16:20])[0] > 1500
    html = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "Loss per sample" in html
    assert not re.search(r"<(script|link)[^>]+(src|href)=", html)  # nothing is fetched


@pytest.mark.parametrize(
    "name", ["<!--<script>", "</script><b>", "a&lt;b\"'\\\u2028", "<%", "\udcff\udc80", "e\u0301\n\x1b[31m"]
)
def test_any_file_name_can_be_the_title(tmp_path, name):
    paths = [tmp_path / f"{which}{name.replace('/', '')}.npy" for which in "st"]
    for path, x in zip(paths, logits(30, 4), strict=True):
        np.save(path, x)
    for suffix in ("svg", "png", "html"):
        gklx.score(*paths, plot=tmp_path / f"x.{suffix}")
    escaped = name.replace("/", "").replace("\n", " ")
    for bad in ("\x1b", "\udcff", "\udc80", "\u2028"):
        escaped = escaped.replace(bad, " " if bad == "\u2028" else ascii(bad)[1:-1])
    output_text = f"s{escaped}.npy against t{escaped}.npy"
    html = (tmp_path / "x.html").read_text(encoding="utf-8")
    script = html.rpartition("<script")[2].rpartition("</script")[0]
    assert "<" not in script
    spec, _ = json.JSONDecoder().raw_decode(script.partition("const spec = ")[2])
    assert spec["title"]["text"] == output_text
    assert spec["hconcat"][0]["title"]["text"] == "Loss per sample"


@pytest.mark.parametrize(
    ("name", "message"), [("x.gif", r"must go to a \.svg, \.png or \.html file, got \.gif$"), ("no/x.svg", r"exists")]
)
def test_errors_come_before_the_work(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        gklx.score(*logits(3, 3), plot=tmp_path / name)
