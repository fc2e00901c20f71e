"""`gklx.torch`: modules that compute the functions, with a class prior and a warm-up in their buffers."""

import copy
import io
import subprocess
import sys

import numpy as np
import pytest

import backends
import gklx
from backends import BY_NAME
from closeness import assert_close

C = 4
SETTINGS = {
    "KLLoss": {"temperature": 2.0},
    "DKLLoss": {"mse_weight": 3.0, "ce_weight": 2.0, "temperature": 2.0},
    "IKLLoss": {"mse_weight": 3.0, "ce_weight": 2.0, "temperature": 2.0, "weight_temperature": 4.0},
    "GKLLoss": {
        "mse_weight": 3.0,
        "ce_weight": 2.0,
        "gamma": 0.4,
        "temperature": 2.0,
        "weight_temperature": 4.0,
        "symmetric": False,
        "normalize": "samples",
    },
}
FUNCTIONS = {"KLLoss": gklx.kl, "DKLLoss": gklx.dkl, "IKLLoss": gklx.ikl, "GKLLoss": gklx.gkl}
WITH_PRIOR = ("IKLLoss", "GKLLoss")


@pytest.fixture
def torch():
    backends.needs("torch")
    return pytest.importorskip("torch")


@pytest.fixture
def modules(torch):
    import gklx.torch

    return gklx.torch


@pytest.fixture
def batch(torch):
    """A function that makes student logits, teacher logits, and labels of some of the classes."""

    def make(seed=0, n=12, classes=(0, 1, 3), dtype="float32"):
        rng = np.random.default_rng(seed)
        array = BY_NAME["torch"].array
        student, teacher = (array(2 * rng.standard_normal((n, C)), dtype) for _ in range(2))
        return student, teacher, array(rng.choice(classes, n))

    return make


def same(actual, expected, dtype="float32", ulps=0):
    """A tensor equals another one, also in dtype."""
    assert_close(actual.detach(), BY_NAME["torch"].numpy(expected.detach()), BY_NAME["torch"], dtype, ulps=ulps)


def with_gradients(function, student, teacher, *args, **kwargs):
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    value = function(student, teacher, *args, **kwargs)
    value.sum().backward()
    return value, student.grad, teacher.grad


def test_gklx_does_not_import_its_torch_module():
    code = "import sys, gklx; assert 'gklx.torch' not in sys.modules and 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", SETTINGS)
def test_module_computes_its_function(torch, modules, batch, name, reduction):
    student, teacher, labels = batch()
    settings = {**SETTINGS[name], "reduction": reduction}
    given = {"sample_weight": torch.linspace(0, 2, 12), "where": torch.tensor([True, True, False, True])}
    criterion = getattr(modules, name)(**settings)
    for found, expected in zip(
        with_gradients(criterion, student, teacher, **given),
        with_gradients(FUNCTIONS[name], student, teacher, **settings, **given),
        strict=True,
    ):
        same(found, expected)
    if name in WITH_PRIOR:
        criterion = getattr(modules, name)(C, **settings)
        criterion(student, teacher, labels)
        criterion.advance()
        given |= {"labels": labels}
        for found, expected in zip(
            with_gradients(criterion, student, teacher, **given),
            with_gradients(FUNCTIONS[name], student, teacher, prior=criterion.prior, **settings, **given),
            strict=True,
        ):
            same(found, expected)


@pytest.mark.parametrize("name", SETTINGS)
def test_defaults_are_those_of_the_function(modules, batch, name):
    student, teacher, _ = batch()
    same(getattr(modules, name)()(student, teacher), FUNCTIONS[name](student, teacher))


@pytest.mark.parametrize("name", WITH_PRIOR)
def test_prior_over_two_epochs_is_that_of_class_prior(torch, modules, batch, name):
    epochs = [[batch(1), batch(2)], [batch(3, classes=(1, 2))]]
    criterion = getattr(modules, name)(C, weight_temperature=4.0)
    prior = gklx.ClassPrior(C, temperature=4.0, like=torch.zeros(1))
    same(criterion.prior, torch.full((C, C), 1 / C))
    for batches in epochs:
        table = criterion.prior.clone()
        for student, teacher, labels in batches:
            value = criterion(student, teacher, labels)
            expected = FUNCTIONS[name](student, teacher, prior=table, labels=labels, weight_temperature=4.0)
            same(value, expected)
            prior.update(teacher, labels)
            same(criterion.prior, table)
        criterion.advance()
        prior.advance()
        same(criterion.prior, prior.table, ulps=2)
        assert not criterion.prior_sums.any()
    absent = criterion.prior.clone()
    same(absent[[0, 3]], table[[0, 3]])  # not seen in the second epoch
    criterion.advance()  # nothing seen at all
    same(criterion.prior, absent)
    assert criterion.epoch.item() == 3


def test_prior_is_collected_only_in_training_mode_and_without_gradient(modules, batch):
    student, teacher, labels = batch()
    criterion = modules.GKLLoss(C)
    criterion.eval()
    criterion(student, teacher.clone().requires_grad_(), labels)
    assert not criterion.prior_sums.any()
    criterion.train()
    criterion(student, teacher.clone().requires_grad_(), labels)
    assert not criterion.prior_sums.requires_grad
    same(criterion.prior_sums, gklx.class_sums(teacher, labels, C))
    before = criterion.prior_sums.clone()
    criterion.eval()
    criterion(student, teacher, labels)
    same(criterion.prior_sums, before)


def test_failed_call_does_not_change_the_prior(modules, batch):
    student, teacher, labels = batch()
    labels[0] = 7
    criterion = modules.IKLLoss(C)
    with pytest.raises(ValueError, match=r"^labels must lie in \[0, 4\), got 7 at index \[0\]$"):
        criterion(student, teacher, labels)
    assert not criterion.prior_sums.any()


def test_masked_samples_and_classes_stay_out_of_the_prior(torch, modules, batch):
    student, teacher, labels = batch()
    weight = torch.ones(12)
    weight[:3] = 0
    padded = teacher.clone()
    padded[:3] = torch.nan
    labels[:3] = -100
    criterion = modules.GKLLoss(C, weight_temperature=2.0)
    criterion(student, padded, labels, sample_weight=weight)
    same(criterion.prior_sums, gklx.class_sums(teacher[3:], labels[3:], C, temperature=2.0), ulps=2)

    there = torch.tensor([True, True, False, True])
    holed = teacher.clone()
    holed[:, 2] = torch.nan
    criterion = modules.GKLLoss(C)
    criterion(student, holed, labels, sample_weight=weight, where=there)
    found = criterion.prior_sums.sum(dim=0)
    same(found[there], teacher[3:, there].softmax(dim=-1).sum(dim=0), ulps=4)
    assert found[2] == 0


@pytest.mark.parametrize("with_prior", [True, False])
def test_warm_up_scales_the_loss_linearly(modules, batch, with_prior):
    student, teacher, labels = batch()
    arguments = (student, teacher, labels) if with_prior else (student, teacher)
    num_classes = C if with_prior else None
    criterion = modules.GKLLoss(num_classes, mse_weight=20.0, ce_weight=4.0, warmup_epochs=4).eval()
    for epoch, factor in enumerate((0.25, 0.5, 0.75, 1.0, 1.0)):
        assert criterion.epoch.item() == epoch
        weights = {"mse_weight": 20.0 * factor, "ce_weight": 4.0 * factor}
        expected = with_gradients(modules.GKLLoss(num_classes, **weights).eval(), *arguments)
        for found, exact in zip(with_gradients(criterion, *arguments), expected, strict=True):
            same(found, exact, ulps=2)
        criterion.advance()


def test_warm_up_keeps_float64_precision(modules, batch):
    student, teacher, _ = batch(dtype="float64")
    found = modules.IKLLoss(warmup_epochs=3)(student, teacher)
    same(found, gklx.ikl(student, teacher) / 3, "float64", ulps=2)


def test_without_warm_up_the_epoch_does_not_change_the_loss(modules, batch):
    student, teacher, _ = batch()
    criterion = modules.GKLLoss()
    first = criterion(student, teacher)
    criterion.advance()
    same(criterion(student, teacher), first)
    assert criterion.epoch.item() == 1


@pytest.mark.parametrize("name", WITH_PRIOR)
def test_restored_module_continues_exactly(torch, modules, batch, name):
    """Saved in the middle of an epoch and of the warm-up, through a file."""
    settings = {**SETTINGS[name], "warmup_epochs": 3}
    kept = getattr(modules, name)(C, **settings)
    kept(*batch(1))
    kept.advance()
    kept(*batch(2))
    file = io.BytesIO()
    torch.save(kept.state_dict(), file)
    file.seek(0)
    restored = getattr(modules, name)(C, **settings)
    buffers = dict(restored.named_buffers())
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert set(buffers) == {"prior", "prior_sums", "epoch"}
    for _ in range(3):
        for seed in (3, 4):
            same(restored(*batch(seed)), kept(*batch(seed)))
        for criterion in (kept, restored):
            criterion.advance()
        same(restored.prior, kept.prior)
        assert restored.epoch == kept.epoch
    for key, buffer in restored.named_buffers():
        assert buffer is buffers[key]


def test_buffers_are_updated_in_place(modules, batch):
    """A state dict or a compiled graph that holds a buffer sees its new values."""
    criterion = modules.GKLLoss(C)
    state, before = criterion.state_dict(), dict(criterion.named_buffers())
    criterion(*batch())
    assert state["prior_sums"].sum().item() == pytest.approx(12)
    criterion.advance()
    assert not state["prior_sums"].any()
    assert state["epoch"].item() == 1
    same(state["prior"], criterion.prior)
    for key, buffer in criterion.named_buffers():
        assert buffer is before[key]


def test_buffers_exist_only_where_they_are_used(torch, modules):
    assert set(modules.GKLLoss().state_dict()) == {"epoch"}
    assert modules.GKLLoss().prior is None
    assert not modules.KLLoss().state_dict()
    state = modules.IKLLoss(C).state_dict()
    assert {key: (x.dtype, tuple(x.shape)) for key, x in state.items()} == {
        "prior": (torch.float32, (C, C)),
        "prior_sums": (torch.float32, (C, C)),
        "epoch": (torch.int64, ()),
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_cast_does_not_change_the_prior(torch, modules, batch, dtype):
    """Also as a submodule of a model that is cast to half precision."""
    criterion = modules.GKLLoss(C, weight_temperature=4.0, warmup_epochs=2)
    criterion(*batch(1))
    criterion.advance()
    criterion(*batch(2))
    cast = torch.nn.ModuleDict({"criterion": copy.deepcopy(criterion)}).to(getattr(torch, dtype))["criterion"]
    same(cast.prior, criterion.prior)
    same(cast.prior_sums, criterion.prior_sums)
    assert cast.epoch.dtype == torch.int64
    student, teacher, labels = batch(3, dtype=dtype)
    wide = "float64" if dtype == "float64" else "float32"
    same(cast(student, teacher, labels), criterion(student, teacher, labels), wide)
    cast.advance()
    criterion.advance()
    same(cast.prior, criterion.prior)


def test_half_double_and_float_do_not_change_the_prior(torch, modules, batch):
    for method in ("half", "bfloat16", "double", "float"):
        criterion = modules.IKLLoss(C)
        criterion(*batch())
        criterion.advance()
        expected = criterion.prior.clone()
        assert getattr(criterion, method)() is criterion
        same(criterion.prior, expected)
        assert criterion.epoch.dtype == torch.int64


def test_module_moves_to_another_device(modules, torch):
    """The meta device has no values: code that reads one fails there."""
    criterion = modules.GKLLoss(C, warmup_epochs=2).to("meta")
    logits = torch.zeros(3, C, device="meta")
    value = criterion(logits.clone().requires_grad_(), logits, torch.zeros(3, dtype=torch.int64, device="meta"))
    value.backward()
    criterion.advance()
    assert {x.device.type for x in (value, *criterion.buffers())} == {"meta"}
    back = criterion.to_empty(device="cpu")
    assert {(x.device.type, x.dtype) for x in back.buffers()} == {("cpu", torch.float32), ("cpu", torch.int64)}


def test_copy_has_its_own_prior(modules, batch):
    criterion = modules.GKLLoss(C, gamma=0.5, warmup_epochs=2)
    criterion(*batch(1))
    other = copy.deepcopy(criterion)
    same(other.prior_sums, criterion.prior_sums)
    assert repr(other) == repr(criterion)
    other(*batch(2))
    other.advance()
    assert criterion.epoch.item() == 0
    same(criterion.prior_sums, gklx.class_sums(*batch(1)[1:], C))


def test_autocast_does_not_round_the_prior(torch, modules, batch):
    student, teacher, labels = batch()
    criterion = modules.GKLLoss(C)
    with torch.autocast("cpu", torch.bfloat16):
        criterion(student, teacher, labels)
    same(criterion.prior_sums, gklx.class_sums(teacher, labels, C))


def test_symmetric_wmse_gives_a_gradient_with_a_frozen_teacher(torch, modules, batch):
    student, teacher, labels = batch()
    for symmetric in (True, False):
        criterion = modules.GKLLoss(C, ce_weight=0.0, symmetric=symmetric)
        found = student.clone().requires_grad_()
        criterion(found, teacher, labels).backward()
        assert bool(found.grad.any()) is symmetric


def test_repr_shows_the_settings(modules):
    assert repr(modules.KLLoss(temperature=4.0)) == "KLLoss(temperature=4.0, reduction='mean')"
    assert repr(modules.IKLLoss(C, warmup_epochs=20)) == (
        "IKLLoss(num_classes=4, mse_weight=1.0, ce_weight=1.0, temperature=1.0, weight_temperature=1.0, "
        "reduction='mean', warmup_epochs=20)"
    )
    assert repr(modules.GKLLoss(gamma=0.5, normalize="samples")) == (
        "GKLLoss(num_classes=None, mse_weight=1.0, ce_weight=1.0, gamma=0.5, temperature=1.0, weight_temperature=1.0, "
        "symmetric=True, normalize='samples', reduction='mean', warmup_epochs=0)"
    )
    for criterion in (modules.DKLLoss(mse_weight=2.0), modules.GKLLoss(C, warmup_epochs=3)):
        assert repr(eval(repr(criterion), vars(modules))) == repr(criterion)


WRONG = {
    "temperature": ("KLLoss", {"temperature": 0}, ValueError, r"^temperature must be above 0, got 0$"),
    "temperature kind": ("DKLLoss", {"temperature": "4"}, TypeError, r"^temperature must be a Python number, got str$"),
    "reduction": ("KLLoss", {"reduction": "batchmean"}, ValueError, r"^reduction must be .*, got 'batchmean'$"),
    "mse_weight": ("DKLLoss", {"mse_weight": float("inf")}, ValueError, r"^mse_weight must be finite, got inf$"),
    "weight_temperature": ("IKLLoss", {"weight_temperature": -1.0}, ValueError, r"^weight_temperature must be above 0"),
    "gamma": ("GKLLoss", {"gamma": -0.5}, ValueError, r"^gamma must be at least 0, got -0.5$"),
    "symmetric": ("GKLLoss", {"symmetric": 1}, TypeError, r"^symmetric must be a bool, got int$"),
    "normalize": ("GKLLoss", {"normalize": "class"}, ValueError, r"^normalize must be .*, got 'class'$"),
    "num_classes": ("GKLLoss", {"num_classes": 0}, ValueError, r"^num_classes must be at least 1, got 0$"),
    "num_classes kind": ("IKLLoss", {"num_classes": 3.0}, TypeError, r"^num_classes must be an integer, got float$"),
    "warmup_epochs": ("GKLLoss", {"warmup_epochs": -1}, ValueError, r"^warmup_epochs must be at least 0, got -1$"),
    "warmup_epochs kind": ("IKLLoss", {"warmup_epochs": 2.0}, TypeError, r"^warmup_epochs must be an integer, got f"),
    "warmup_epochs bool": ("IKLLoss", {"warmup_epochs": True}, TypeError, r"^warmup_epochs must be an integer, got b"),
    "unknown": ("KLLoss", {"gamma": 1.0}, TypeError, "unexpected keyword"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_are_checked_in_the_constructor(modules, name):
    loss, settings, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        getattr(modules, loss)(**settings)


@pytest.mark.parametrize("name", WITH_PRIOR)
def test_labels_need_num_classes_and_vice_versa(modules, batch, name):
    student, teacher, labels = batch()
    loss = getattr(modules, name)
    with pytest.raises(ValueError, match=r"^labels need num_classes in the constructor, got labels and num_classes=No"):
        loss()(student, teacher, labels)
    with pytest.raises(ValueError, match=r"^labels must be given with num_classes, got None and num_classes=4$"):
        loss(C)(student, teacher)
    with pytest.raises(ValueError, match=r"^prior with labels must have shape \[4, 4\], got \[5, 5\]$"):
        loss(5)(student, teacher, labels)
    for criterion in (modules.KLLoss(), modules.DKLLoss()):
        with pytest.raises(TypeError, match="positional"):
            criterion(student, teacher, labels)


def test_settings_may_be_numbers_of_numpy(torch, modules):
    """PyTorch's compiler follows none of these, nor would a change of the caller's array be noticed."""
    torch.compiler.reset()
    settings = {"temperature": np.float64(2.0), "gamma": np.asarray(0.5), "mse_weight": np.int64(3)}
    criterion, s, t = modules.GKLLoss(**settings), torch.randn(4, 5), torch.randn(4, 5)
    settings["gamma"][...] = -1
    assert repr(criterion) == repr(modules.GKLLoss(temperature=2.0, gamma=0.5, mse_weight=3.0))
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(s, t), gklx.gkl(s, t, temperature=2.0, gamma=0.5, mse_weight=3.0))
