"""Every documented error, by type and message: raised before any work, in one sentence with the value given."""

import functools
import re

import numpy as np
import pytest

import gklx

pytestmark = [pytest.mark.version_dependent_jax, pytest.mark.together]

S, T = np.zeros((2, 3)), np.ones((2, 3))
LABELS, TABLE = np.asarray([0, 2]), np.full((3, 3), 1 / 3)


def whole_message(message):
    return "^" + re.escape(message) + "$"


WRONG = {
    "integers": (gklx.kl, (S.astype(int), T), {}, TypeError,
        "student_logits must be float16, bfloat16, float32 or float64, got int64"),
    "complex teacher": (gklx.gkl, (S, T.astype(complex)), {}, TypeError,
        "teacher_logits must be float16, bfloat16, float32 or float64, got complex128"),
    "a list": (gklx.kl, ([[1.0]], T), {}, TypeError,
        "student_logits must be an array of NumPy, PyTorch, JAX, CuPy, Dask, array-api-strict, got builtins.list"),
    "a masked array": (gklx.kl, (S, np.ma.masked_array(T)), {}, TypeError,
        "teacher_logits must be an array of NumPy, PyTorch, JAX, CuPy, Dask, array-api-strict, "
        f"got {np.ma.MaskedArray.__module__}.MaskedArray"),
    "a vocabulary mismatch": (gklx.kl, (S, np.ones((2, 4))), {}, ValueError,
        "teacher_logits must have the shape of student_logits, [2, 3], got [2, 4]"),
    "a scalar": (gklx.kl, (np.zeros(()), np.zeros(())), {}, ValueError,
        "student_logits must have at least 1 class on the last axis, got shape []"),
    "no class": (gklx.kl, (np.zeros((2, 0)), np.zeros((2, 0))), {}, ValueError,
        "student_logits must have at least 1 class on the last axis, got shape [2, 0]"),
    "temperature 0": (gklx.dkl, (S, T), {"temperature": 0}, ValueError, "temperature must be above 0, got 0"),
    "temperature -1": (gklx.kl, (S, T), {"temperature": -1.0}, ValueError, "temperature must be above 0, got -1.0"),
    "temperature NaN": (gklx.kl, (S, T), {"temperature": np.nan}, ValueError, "temperature must be above 0, got nan"),
    "temperature text": (gklx.kl, (S, T), {"temperature": "1"}, TypeError,
        "temperature must be a Python number, got str"),
    "temperature array": (gklx.kl, (S, T), {"temperature": np.ones(2)}, TypeError,
        "temperature must be a Python number, got ndarray"),
    "temperature bool": (gklx.kl, (S, T), {"temperature": True}, TypeError,
        "temperature must be a Python number, got bool"),
    "weight_temperature": (gklx.ikl, (S, T), {"weight_temperature": 0.0}, ValueError,
        "weight_temperature must be above 0, got 0.0"),
    "gamma": (gklx.gkl, (S, T), {"gamma": -0.5}, ValueError, "gamma must be at least 0, got -0.5"),
    "mse_weight": (gklx.dkl, (S, T), {"mse_weight": np.inf}, ValueError, "mse_weight must be finite, got inf"),
    "ce_weight": (gklx.ikl, (S, T), {"ce_weight": None}, TypeError, "ce_weight must be a Python number, got NoneType"),
    "reduction": (gklx.kl, (S, T), {"reduction": "batchmean"}, ValueError,
        "reduction must be \"mean\", \"sum\" or \"none\", got 'batchmean'"),
    "normalize": (gklx.gkl, (S, T), {"normalize": "class"}, ValueError,
        "normalize must be \"batch\" or \"samples\", got 'class'"),
    "symmetric": (gklx.gkl, (S, T), {"symmetric": 1}, TypeError, "symmetric must be a bool, got int"),
    "where dtype": (gklx.kl, (S, T), {"where": np.ones(3)}, TypeError, "where must be boolean, got float64"),
    "where shape": (gklx.kl, (S, T), {"where": np.ones(4, bool)}, ValueError,
        "where must broadcast to the logits' shape [2, 3], got [4]"),
    "where too deep": (gklx.kl, (S, T), {"where": np.ones((1, 2, 3), bool)}, ValueError,
        "where must broadcast to the logits' shape [2, 3], got [1, 2, 3]"),
    "sample_weight shape": (gklx.kl, (S, T), {"sample_weight": np.ones((2, 1))}, ValueError,
        "sample_weight must have one weight a sample, shape [2], got [2, 1]"),
    "sample_weight dtype": (gklx.kl, (S, T), {"sample_weight": np.ones(2, complex)}, TypeError,
        "sample_weight must be floating, integer or boolean, got complex128"),
    "sample_weight negative": (gklx.kl, (S, T), {"sample_weight": np.asarray([1.0, -2.0])}, ValueError,
        "sample_weight must be finite and not negative, got -2.0 at index [1]"),
    "sample_weight NaN": (gklx.gkl, (S, T), {"sample_weight": np.asarray([np.nan, 1.0])}, ValueError,
        "sample_weight must be finite and not negative, got nan at index [0]"),
    "sample_weight integers": (gklx.gkl, (S, T), {"sample_weight": np.asarray([3, -1])}, ValueError,
        "sample_weight must be finite and not negative, got -1.0 at index [1]"),
    "labels alone": (gklx.ikl, (S, T), {"labels": LABELS}, ValueError,
        "labels need a prior to choose rows of, got labels and no prior"),
    "labels floating": (gklx.ikl, (S, T), {"labels": LABELS * 1.0, "prior": TABLE}, TypeError,
        "labels must be integers, got float64"),
    "labels boolean": (gklx.ikl, (S, T), {"labels": LABELS > 0, "prior": TABLE}, TypeError,
        "labels must be integers, got bool"),
    "labels shape": (gklx.gkl, (S, T), {"labels": LABELS[:, None], "prior": TABLE}, ValueError,
        "labels must have one label a sample, shape [2], got [2, 1]"),
    "labels large": (gklx.gkl, (S, T), {"labels": LABELS + 1, "prior": TABLE}, ValueError,
        "labels must lie in [0, 3), got 3 at index [1]"),
    "labels negative": (gklx.gkl, (S, T), {"labels": LABELS - 100, "prior": TABLE}, ValueError,
        "labels must lie in [0, 3), got -100 at index [0]"),
    "labels of one byte": (gklx.gkl, (S, T), {"labels": np.asarray([1, 200], "uint8"), "prior": TABLE}, ValueError,
        "labels must lie in [0, 3), got 200 at index [1]"),
    "prior beyond the dtype computed in": (gklx.ikl, (S.astype("float32"), T.astype("float32")),
        {"prior": np.asarray([[1e39, 1, 1], [1, 1, 1]])}, ValueError,
        "prior must be finite and not negative, got 1e+39 at index [0, 0]"),
    "sample_weight beyond the dtype computed in": (gklx.kl, (S.astype("float32"), T.astype("float32")),
        {"sample_weight": np.asarray([1, 1e39])}, ValueError,
        "sample_weight must be finite and not negative, got 1e+39 at index [1]"),
    "prior rows": (gklx.ikl, (S, T), {"prior": TABLE}, ValueError,
        "prior without labels must have the logits' shape [2, 3], got [3, 3]"),
    "prior table": (gklx.ikl, (S, T), {"prior": S, "labels": LABELS}, ValueError,
        "prior with labels must have shape [3, 3], got [2, 3]"),
    "prior integers": (gklx.ikl, (S, T), {"prior": np.ones((3, 3), int), "labels": LABELS}, TypeError,
        "prior must be float16, bfloat16, float32 or float64, got int64"),
    "prior negative": (gklx.ikl, (S, T), {"prior": TABLE - 0.5, "labels": LABELS}, ValueError,
        "prior must be finite and not negative, got -0.16666666666666669 at index [0, 0]"),
    "prior NaN": (gklx.gkl, (S, T), {"prior": np.full((2, 3), np.nan)}, ValueError,
        "prior must be finite and not negative, got nan at index [0, 0]"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_loss_raises_the_documented_error(wrong):
    loss, logits, settings, kind, message = WRONG[wrong]
    for call in (loss, gklx.grad(loss), gklx.value_and_grad(loss, (0, 1))):
        with pytest.raises(kind, match=whole_message(message)):
            call(*logits, **settings)
    if loss is not gklx.kl:
        with pytest.raises(kind, match=whole_message(message)):
            gklx.terms(loss)(*logits, **settings)


def test_errors_are_the_same_on_every_backend(backend):
    """Types, shapes and dtypes are checked everywhere, values where reading them is free; elsewhere they give NaN."""
    s, t, table = backend.array(S), backend.array(T), backend.array(TABLE)
    with pytest.raises(ValueError, match=r"^teacher_logits must have the shape"):
        gklx.kl(s, backend.array(np.ones((2, 4))))
    with pytest.raises(TypeError, match=r"^student_logits must be float16, .*, got int64"):
        gklx.kl(backend.array(S.astype("int64")), t)
    bad, negative = backend.array(np.asarray([0, 3])), backend.array(np.asarray([1.0, -1.0]))
    loss = backend.wrap(gklx.gkl)
    if backend.library.readable(s) and not backend.traced:
        with pytest.raises(ValueError, match=r"^labels must lie in \[0, 3\), got 3 at index \[1\]$"):
            loss(s, t, prior=table, labels=bad)
        with pytest.raises(ValueError, match=r"^sample_weight must be finite and not negative, got -1.0"):
            loss(s, t, sample_weight=negative)
        with pytest.raises(ValueError, match=r"^prior must be finite and not negative, got -"):
            loss(s, t, prior=backend.array(TABLE - 1), labels=backend.array(LABELS))
    else:
        assert np.isnan(backend.numpy(loss(s, t, prior=table, labels=bad)))
        assert np.isnan(backend.numpy(loss(s, t, sample_weight=negative)))
        assert np.isnan(backend.numpy(loss(s, t, prior=backend.array(TABLE - 1), labels=backend.array(LABELS))))
        assert np.isnan(backend.numpy(loss(s, t, prior=backend.array(S - 1))))
        equally_weighing = backend.wrap(functools.partial(gklx.gkl, gamma=0.0))
        assert np.isnan(backend.numpy(equally_weighing(s, t, prior=backend.array(S - 1))))


@pytest.mark.parametrize("samples", [2, 5])
def test_wrong_entry_of_a_prior_is_named_by_its_place_in_the_table(backend, samples):
    """Whether all rows of the table are read or, of fewer samples than classes, those that are used."""
    if not backend.library.readable(backend.array(S)) or backend.traced:
        pytest.skip("reads no values")
    table, loss = TABLE.copy(), backend.wrap(gklx.gkl)
    table[2, 1] = np.inf
    logits = backend.array(np.ones((samples, 3)))
    labels = np.asarray([0, 2, 1, 1, 0])[:samples]
    with pytest.raises(ValueError, match=r"^prior must be finite and not negative, got inf at index \[2, 1\]$"):
        loss(logits, logits, prior=backend.array(table), labels=backend.array(labels))
    if samples == 2:
        loss(logits, logits, prior=backend.array(table), labels=backend.array(np.asarray([0, 1])))


@pytest.mark.parametrize("execution", ["kernel", "formulas"])
def test_prior_of_samples_that_do_not_count_may_be_anything(execution, monkeypatch):
    if execution == "formulas":
        monkeypatch.setenv("GKLX_KERNEL", "0")
    prior = np.asarray([[1.0, np.nan, 0.0], [0.2, 0.3, np.inf], [-1.0, 0.0, 1.0]])
    logits, weight = np.ones((3, 3)), np.asarray([1.0, 1.0, 0.0])
    where = np.asarray([[True, False, True], [True, True, False], [True, True, True]])
    assert gklx.gkl(logits, logits + 1, prior=prior, sample_weight=weight, where=where) >= 0
    where[1, 2] = True
    with pytest.raises(ValueError, match=r"^prior must be finite and not negative, got inf at index \[1, 2\]$"):
        gklx.gkl(logits, logits, prior=prior, sample_weight=weight, where=where)


def test_prior_in_other_layouts_is_checked():
    table = np.full((40, 40), 0.1)
    table[3, 30] = -0.5
    labels = np.asarray([1, 3])
    for prior in (np.asfortranarray(table), table.astype(">f8"), np.repeat(table, 2, axis=1)[:, ::2]):
        with pytest.raises(ValueError, match=r"^prior must be finite and not negative, got -0.5 at index \[3, 30\]$"):
            gklx.gkl(np.ones((2, 40)), np.ones((2, 40)), prior=prior, labels=labels)


def test_arrays_of_two_libraries_are_refused(backend):
    if backend.library.backend == "numpy":
        strict = pytest.importorskip("array_api_strict")
        other, name = strict.asarray(T), "array-api-strict"
    else:
        other, name = T, "NumPy"
    s, own = backend.array(S), backend.library.name
    with pytest.raises(
        TypeError, match=f"^teacher_logits must be an array of the library of student_logits, {own}, got one of {name}$"
    ):
        gklx.kl(s, other)
    with pytest.raises(TypeError, match=f"^sample_weight must be an array of the library of student_logits, {own}"):
        gklx.kl(s, backend.array(T), sample_weight=other[:, 0])


def test_arrays_on_two_devices_are_refused():
    strict = pytest.importorskip("array_api_strict")
    there = strict.asarray(T, device=strict.Device("device1"))
    with pytest.raises(ValueError, match=r"^teacher_logits must be on the device of student_logits, .*CPU.*, got .*1"):
        gklx.kl(strict.asarray(S), there)


def test_tensors_on_two_devices_are_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"^teacher_logits must be on the device of student_logits, cpu, got meta$"):
        gklx.kl(torch.tensor(S), torch.tensor(T, device="meta"))


@pytest.mark.parametrize("transform", [gklx.grad, gklx.value_and_grad, gklx.terms])
def test_transforms_accept_only_the_four_losses(transform):
    message = "loss must be gklx.kl, gklx.dkl, gklx.ikl, gklx.gkl or a functools.partial of one, got "
    with pytest.raises(TypeError, match=whole_message(message + "sum")):
        transform(sum)
    with pytest.raises(TypeError, match=whole_message(message + "sum")):
        transform(functools.partial(sum, start=1))
    with pytest.raises(TypeError, match=whole_message(message + "str")):
        transform("kl")


def test_invalid_argnums_are_refused():
    for wrong in (2, -1, (0, 2)):
        with pytest.raises(ValueError, match=r"^argnums must be made of 0 \(student\) and 1 \(teacher\), got"):
            gklx.grad(gklx.kl, wrong)
    with pytest.raises(ValueError, match=r"^argnums must name at least one argument, got \(\)"):
        gklx.grad(gklx.kl, ())
    for wrong in (0.0, True, "0", None):
        with pytest.raises(TypeError, match=r"^argnums must be an integer or a sequence of integers, got"):
            gklx.value_and_grad(gklx.kl, wrong)


def test_gradient_of_an_unreduced_loss_is_refused():
    for transform in (gklx.grad, gklx.value_and_grad):
        with pytest.raises(ValueError, match=r'^reduction must be "mean" or "sum" for a gradient, got "none"$'):
            transform(gklx.kl)(S, T, reduction="none")


def test_kl_has_no_terms():
    with pytest.raises(TypeError, match=r"^loss must be gklx.dkl, gklx.ikl or gklx.gkl, which have parts, got kl$"):
        gklx.terms(gklx.kl)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword"):
        gklx.kl(S, T, ignore_index=-100)
    with pytest.raises(TypeError, match="unexpected keyword"):
        gklx.kl(S, T, gamma=1.0)
    with pytest.raises(TypeError, match="positional"):
        gklx.kl(S, T, 2.0)


def test_class_sums_raises_the_documented_errors():
    for arguments, kind, message in (
        ((S, LABELS, 4), ValueError, "logits must have num_classes = 4 classes on the last axis, got [2, 3]"),
        ((S, LABELS, 0), ValueError, "num_classes must be at least 1, got 0"),
        ((S, LABELS, 3.0), TypeError, "num_classes must be an integer, got float"),
        ((S, LABELS + 1, 3), ValueError, "labels must lie in [0, 3), got 3 at index [1]"),
        ((S, LABELS * 1.0, 3), TypeError, "labels must be integers, got float64"),
        ((LABELS, LABELS, 3), TypeError, "logits must be float16, bfloat16, float32 or float64, got int64"),
    ):
        with pytest.raises(kind, match=whole_message(message)):
            gklx.class_sums(*arguments)
    with pytest.raises(ValueError, match=r"^temperature must be above 0, got 0$"):
        gklx.class_sums(S, LABELS, 3, temperature=0)
