"""The picture of a score: what is in it, and that each format can be opened."""

import re
import struct
import xml.etree.ElementTree as ET

import numpy as np
import pytest

import gklx
from gklx._scoring import plot

pytest.importorskip("altair", reason="altair is not installed")
pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")

rng = np.random.default_rng(5)


def logits(samples, classes):
    return tuple(rng.standard_normal((2, samples, classes)) * 3)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The specification that a score would have rendered."""

    def draw(*args, **kwargs):
        specs = []
        monkeypatch.setattr(plot, "_rendered", lambda spec, suffix: specs.append(spec) or b"")
        found = gklx.score(*args, plot=tmp_path / "x.svg", **kwargs)
        return specs[0], found

    return draw


def rows(spec, panel, layer=0):
    chart = spec["hconcat"][panel]
    chart = chart["layer"][layer] if "layer" in chart else chart
    return spec["datasets"][chart["data"]["name"]]


def test_shares_are_those_of_all_samples(drawn):
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
def test_class_means(drawn, labelled):
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


def test_many_classes_are_a_curve_of_few_points(drawn):
    s, t = logits(3000, 4000)
    spec, _ = drawn(s, t, losses=["kl"])
    panel = spec["hconcat"][1]
    assert panel["mark"]["type"] == "line"
    assert 100 < len(rows(spec, 1)) <= 400
    loss, top = gklx.kl(s, t, reduction="none"), t.argmax(-1)
    means = {c: loss[top == c].mean() for c in np.unique(top)}
    worst = sorted(means, key=means.get, reverse=True)
    assert f"worst: {worst[0]}, {worst[1]}, " in panel["title"]["subtitle"]
    assert rows(spec, 1)[-1]["class"] == worst[-1]


def test_confidences_and_agreement(drawn):
    s, t = logits(500, 3)
    spec, found = drawn(s, t)
    panel = spec["hconcat"][2]
    cells = rows(spec, 2)
    assert sum(cell["samples"] for cell in cells) == 500
    teacher = (np.exp(t) / np.exp(t).sum(-1, keepdims=True)).max(-1)
    for low, high in {(cell["teacher"], cell["teacher_to"]) for cell in cells}:
        counted = sum(cell["samples"] for cell in cells if cell["teacher"] == low)
        assert counted == ((teacher >= low) & (teacher < high)).sum()
    assert f"{found.top1_agreement:.2%}" in panel["title"]["subtitle"]


def test_what_is_not_drawn_is_said(drawn):
    s, t = logits(50, 4)
    s[:3] = t[:3]
    s[5, 0] = -np.inf
    s[7] = np.nan
    spec, _ = drawn(s, t, losses=["kl"])
    assert "not drawn" in spec["hconcat"][0]["title"]["subtitle"]
    assert "kl 4" in spec["hconcat"][0]["title"]["subtitle"]
    assert "1 left out" in spec["title"]["subtitle"]


@pytest.mark.parametrize("case", ["one", "equal", "infinite", "negative"])
def test_odd_samples_are_drawn(tmp_path, case):
    s, t = logits(1 if case == "one" else 20, 3)
    if case == "equal":
        s = t
    elif case == "infinite":
        s[:, 0] = -np.inf
    weights = {"mse_weight": -1.0, "ce_weight": -1.0} if case == "negative" else {}
    gklx.score(s, t, plot=tmp_path / "x.svg", **weights)
    assert ET.parse(tmp_path / "x.svg").getroot().tag.endswith("svg")


def test_formats(tmp_path):
    s, t = logits(60, 4)
    for suffix in ("svg", "png", "html"):
        for _ in range(2):
            gklx.score(s, t, plot=tmp_path / f"x.{suffix}")
            again = (tmp_path / f"x.{suffix}").read_bytes()
        assert len(again) > 10_000
    text = "".join(ET.parse(tmp_path / "x.svg").getroot().itertext())
    for said in ("Loss per sample", "share of samples", "teacher's largest probability", "60 samples"):
        assert said in text
    png = (tmp_path / "x.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert struct.unpack(">I", png[16:20])[0] > 1500
    html = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "Loss per sample" in html
    assert not re.search(r"<script[^>]+src=", html)  # nothing is fetched


@pytest.mark.parametrize(
    ("name", "message"), [("x.gif", r"must go to a \.svg, \.png or \.html file, got \.gif$"), ("no/x.svg", r"exists")]
)
def test_errors_come_before_the_work(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        gklx.score(*logits(3, 3), plot=tmp_path / name)
