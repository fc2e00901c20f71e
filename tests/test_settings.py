"""The published settings: each runs through its loss, and the site's tables are made from them."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest

import backends
import gklx
from gklx.published import settings_list, settings_table

ROOT = Path(__file__).parents[1]
IN_PART = {"cifar100-adversarial-autoaugment", "fixmatch", "meanteacher"}
WHOLE = sorted(set(gklx.settings) - IN_PART)

pytestmark = pytest.mark.together


def logits():
    return np.random.default_rng(0).normal(size=(2, 6, 5))


@pytest.mark.parametrize("name", WHOLE)
def test_setting_runs_through_its_loss(name):
    setting = gklx.settings[name]
    loss = getattr(gklx, setting.divergence)
    student, teacher = logits()
    arguments = dict(setting.loss)
    if setting.weights == "class prior":
        labels = np.arange(6) % 5
        prior = gklx.ClassPrior(5, temperature=setting.weight_temperature)
        prior.update(teacher, labels)
        prior.advance()
        arguments |= {"prior": prior.table, "labels": labels}
    parts = gklx.terms(loss)(student, teacher, **arguments)
    plain = gklx.terms(loss)(student, teacher, **arguments | {"ce_weight": 1.0, "mse_weight": 1.0})
    assert float(parts.ce) == pytest.approx(setting.ce_weight * float(plain.ce), rel=1e-12)
    assert float(parts.mse) == pytest.approx(setting.mse_weight * float(plain.mse), rel=1e-12)
    assert parts.mse > 0


@pytest.mark.parametrize("name", WHOLE)
def test_gkl_takes_every_setting(name):
    """GKL with γ = 1 has IKL's weights, which sum to 1."""
    setting = gklx.settings[name]
    student, teacher = logits()
    value = gklx.gkl(student, teacher, **setting.loss)
    if setting.divergence == "ikl":
        assert float(value) == pytest.approx(float(gklx.ikl(student, teacher, **setting.loss)), rel=1e-12)
    assert np.isfinite(value)


def test_imagenet_setting_has_the_published_numbers():
    found = gklx.settings["imagenet-resnet34-resnet18"]
    expected = {"ce_weight": 1.0, "mse_weight": 0.5, "gamma": 0.6, "temperature": 1.0, "weight_temperature": 1.0}
    assert found.loss == expected
    assert found.warmup_epochs == 5


@pytest.mark.parametrize("name", sorted(IN_PART))
def test_setting_published_in_part_has_no_loss(name):
    with pytest.raises(ValueError, match=f"the setting '{name}' is published in part: its "):
        _ = gklx.settings[name].loss


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        gklx.settings["fixmatch"].ce_weight = 2.0
    with pytest.raises(TypeError):
        gklx.settings["fixmatch"] = None
    gklx.settings["imagenet-resnet34-resnet18"].loss["gamma"] = 0.0
    assert gklx.settings["imagenet-resnet34-resnet18"].loss["gamma"] == 0.6


def test_error_of_an_unknown_setting_lists_the_known_ones():
    with pytest.raises(KeyError, match=r"settings must be one of cifar10-adversarial, .*, got 'imagenet'"):
        gklx.settings["imagenet"]


def text_of_the_page(name):
    _, begin, rest = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8").partition(f"<!-- {name}: begin -->\n")
    found, end, _ = rest.partition(f"\n<!-- {name}: end -->")
    assert begin
    assert end
    return found


def test_page_shows_the_settings():
    assert text_of_the_page("settings table") == settings_table()
    assert text_of_the_page("settings list") == settings_list()


def test_every_setting_has_its_name_and_a_source():
    for name, setting in gklx.settings.items():
        assert setting.name == name
        assert setting.source.paper is None or "arXiv" in setting.source.paper


@pytest.mark.parametrize("name", WHOLE)
def test_module_from_a_setting_computes_its_loss(name):
    backends.needs("torch")
    import torch

    from gklx.torch import GKLLoss, IKLLoss

    setting = gklx.settings[name]
    classes = 5 if setting.weights == "class prior" else None
    student, teacher = (torch.tensor(x) for x in logits())
    labels = torch.arange(6) % 5 if classes else None
    for module in (GKLLoss, IKLLoss) if setting.divergence == "ikl" else (GKLLoss,):
        criterion = module.from_settings(name, num_classes=classes)
        arguments = dict(setting.loss)
        if classes:
            arguments |= {"prior": torch.full((5, 5), 0.2), "labels": labels}
        whole = getattr(gklx, setting.divergence)(student, teacher, **arguments)
        value = criterion(student, teacher, labels)
        assert float(value) == pytest.approx(float(whole) / (setting.warmup_epochs or 1), rel=1e-6)
    if setting.divergence == "gkl":
        with pytest.raises(ValueError, match="name must be a setting of IKL, got"):
            IKLLoss.from_settings(name, num_classes=classes)


def test_from_settings_refuses_unsuitable_arguments():
    backends.needs("torch")
    from gklx.torch import GKLLoss

    with pytest.raises(ValueError, match=r"name must be one of .*, got 'imagenet'"):
        GKLLoss.from_settings("imagenet", 5)
    with pytest.raises(ValueError, match="num_classes must be given for 'cifar10-adversarial'"):
        GKLLoss.from_settings("cifar10-adversarial")
    with pytest.raises(ValueError, match="num_classes must not be given for 'cifar100-resnet32x4-resnet8x4'"):
        GKLLoss.from_settings("cifar100-resnet32x4-resnet8x4", 100)
    with pytest.raises(ValueError, match="published in part"):
        GKLLoss.from_settings("fixmatch", 5)


def test_jax_example_takes_a_published_temperature():
    """It once took 7, a number of pairs of networks, for a temperature."""
    for module in ("jax", "optax", "sklearn"):
        pytest.importorskip(module)
    backends.needs("jax")
    spec = importlib.util.spec_from_file_location("train_jax", ROOT / "examples" / "train_jax.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = [setting for name, setting in gklx.settings.items() if name.startswith("cifar100-gkl-")]
    assert len(found) == 11
    published = {(setting.weight_temperature, setting.temperature) for setting in found}
    assert published == {(module.PRIOR_TEMPERATURE, module.TEMPERATURE)}
