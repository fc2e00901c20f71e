"""Arguments of unusual kinds: accepted where the meaning is clear, otherwise refused in one sentence."""

import fractions
import functools
import itertools
import re

import numpy as np
import pytest

import gklx
from backends import needs
from closeness import assert_close

S, T = np.zeros((2, 3)), np.ones((2, 3))
LABELS, TABLE = np.asarray([0, 2]), np.full((3, 3), 1 / 3)
LOSSES = (gklx.kl, gklx.dkl, gklx.ikl, gklx.gkl)
KNOWN = "NumPy, PyTorch, JAX, CuPy, Dask, array-api-strict"


def raises(kind, message):
    return pytest.raises(kind, match="^" + re.escape(message) + "$")


# --- arguments that are no arrays -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_none_is_refused_as_logits(loss):
    for call in (loss, gklx.grad(loss), gklx.value_and_grad(loss, (0, 1))):
        for logits in ((None, T), (None, None)):
            with raises(TypeError, f"student_logits must be an array of {KNOWN}, got None"):
                call(*logits)
        with raises(TypeError, f"teacher_logits must be an array of {KNOWN}, got None"):
            call(S, None)


def test_none_is_refused_by_the_class_prior():
    for call in (lambda *xs: gklx.class_sums(*xs, 3), gklx.ClassPrior(3).update):
        with raises(TypeError, f"logits must be an array of {KNOWN}, got None"):
            call(None, LABELS)
        with raises(TypeError, f"labels must be an array of {KNOWN}, got None"):
            call(S, None)
    with raises(TypeError, "like must be an array of a known library, got NoneType"):
        gklx.ClassPriorState.uniform(3, like=None)


@pytest.mark.parametrize(
    ("name", "value", "came"),
    [
        ("where", [True, False, True], "builtins.list"),
        ("where", True, "builtins.bool"),
        ("sample_weight", [1.0, 2.0], "builtins.list"),
        ("sample_weight", 1.0, "builtins.float"),
        ("labels", (0, 1), "builtins.tuple"),
        ("prior", [[1.0]], "builtins.list"),
        ("prior", gklx.ClassPrior(3), "gklx.prior.ClassPrior"),
    ],
)
def test_arguments_that_are_no_arrays_are_refused(name, value, came):
    with raises(TypeError, f"{name} must be an array of {KNOWN}, got {came}"):
        gklx.gkl(S, T, **{"prior": TABLE, "labels": LABELS, name: value})


# --- unsupported kinds of arrays --------------------------------------------------------------------------------------


def unsupported_tensors():
    torch = pytest.importorskip("torch")
    from torch.masked import masked_tensor

    x = torch.tensor(S)
    rows = [torch.zeros(2, 3), torch.zeros(1, 3)]
    return {
        "a nested tensor": torch.nested.nested_tensor(rows),
        "a nested tensor, jagged": torch.nested.nested_tensor(rows, layout=torch.jagged),
        "a tensor of layout torch.sparse_coo": x.to_sparse(),
        "a tensor of layout torch.sparse_csr": x.to_sparse_csr(),
        "a tensor of layout torch.sparse_csc": x.to_sparse_csc(),
        "a tensor of layout torch._mkldnn": x.float().to_mkldnn(),
        "a masked tensor": masked_tensor(x, x == 0),
    }


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, that these kinds are prototypes
def test_nested_sparse_and_masked_tensors_are_refused():
    needs("torch")
    import torch

    s, labels = torch.tensor(S), torch.tensor(LABELS)
    for kind, x in unsupported_tensors().items():
        came = f" must be a dense array without a mask of its own, got {kind.removesuffix(', jagged')}"
        for loss in LOSSES:
            for call in (loss, gklx.grad(loss), gklx.value_and_grad(loss, (0, 1))):
                with raises(TypeError, "student_logits" + came):
                    call(x, x)
                with raises(TypeError, "teacher_logits" + came):
                    call(s, x)
            with raises(TypeError, "where" + came):
                loss(s, s, where=x)
            with raises(TypeError, "sample_weight" + came):
                loss(s, s, sample_weight=x)
        with raises(TypeError, "prior" + came):
            gklx.gkl(s, s, prior=x)
        with raises(TypeError, "logits" + came):
            gklx.class_sums(x, labels, 3)
        with raises(TypeError, "labels" + came):
            gklx.class_sums(s, x, 3)
        for make in (lambda x: gklx.ClassPrior(3, like=x), lambda x: gklx.ClassPriorState.uniform(3, like=x)):
            with raises(TypeError, "like" + came):
                make(x)


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_masked_and_matrix_arrays_of_numpy_are_refused():
    for x in (np.ma.masked_array(S), np.asmatrix(S)):
        came = f"got {type(x).__module__}.{type(x).__name__}"
        with raises(TypeError, f"student_logits must be an array of {KNOWN}, {came}"):
            gklx.kl(x, x)
        with raises(TypeError, f"sample_weight must be an array of {KNOWN}, {came}"):
            gklx.kl(S, T, sample_weight=x)


def test_dask_arrays_with_masked_chunks_are_refused():
    needs("dask")
    import dask.array

    x = dask.array.ma.masked_array(dask.array.from_array(S), mask=S > 0)
    kind = f"a Dask array whose chunks are {np.ma.MaskedArray.__module__}.MaskedArray"
    with raises(TypeError, f"teacher_logits must be a dense array without a mask of its own, got {kind}"):
        gklx.kl(dask.array.from_array(S), x)


def test_sparse_arrays_of_jax_are_refused():
    needs("jax")
    import jax.numpy as jnp
    from jax.experimental import sparse

    x = sparse.BCOO.fromdense(jnp.asarray(S))
    with raises(TypeError, f"teacher_logits must be an array of {KNOWN}, got jax.experimental.sparse.bcoo.BCOO"):
        gklx.kl(jnp.asarray(S), x)


# --- numbers ----------------------------------------------------------------------------------------------------------

NUMBERS = ("temperature", "weight_temperature", "gamma", "mse_weight", "ce_weight")


@pytest.mark.parametrize("spelling", [np.float64, np.float32, np.float16, np.int64, np.uint8, np.asarray, int])
@pytest.mark.parametrize("name", NUMBERS)
def test_hyper_parameters_may_be_numbers_of_any_type(name, spelling):
    s, t = np.random.default_rng(0).standard_normal((2, 4, 3))
    np.testing.assert_array_equal(gklx.gkl(s, t, **{name: spelling(2)}), gklx.gkl(s, t, **{name: 2.0}))


def test_numpy_hyper_parameters_are_accepted_by_every_library(backend):
    s, t = (backend.array(x, "float32") for x in np.random.default_rng(0).standard_normal((2, 4, 3)))
    expected = backend.numpy(gklx.gkl(s, t, temperature=2.0, gamma=2.0))
    found = gklx.gkl(s, t, temperature=np.asarray(2.0), gamma=np.float64(2.0))
    assert_close(found, expected, backend, "float32", ulps=0)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    ("value", "came"),
    [
        (np.True_, "numpy.bool" if np.__version__ >= "2" else "bool_"),
        (np.asarray([2.0]), "ndarray"),
        (np.asarray("2"), "str_"),
        (2.0 + 0.0j, "complex"),
        ("2", "str"),
        (None, "NoneType"),
    ],
)
def test_hyper_parameters_that_are_no_numbers_are_refused(name, value, came):
    with raises(TypeError, f"{name} must be a Python number, got {came}"):
        gklx.gkl(S, T, **{name: value})


@pytest.mark.parametrize("name", NUMBERS)
def test_hyper_parameters_beyond_the_float_range_are_refused(backend, name):
    s, t = backend.array(S, "float32"), backend.array(T, "float32")
    for value, came in (
        (10**400, "a number of type int beyond the largest float"),
        (-(10**5000), "a negative number of type int beyond the largest float"),  # more digits than Python prints
        (fractions.Fraction(10**400), "a number of type Fraction beyond the largest float"),
        (np.inf, "inf"),
    ):
        for call in (gklx.gkl, gklx.grad(gklx.gkl)):
            with raises(ValueError, f"{name} must be finite, got {came}"):
                call(s, t, **{name: value})
    with raises(ValueError, "temperature must be finite, got a number of type int beyond the largest float"):
        gklx.class_sums(s, backend.array(LABELS), 3, temperature=10**400)
    with raises(ValueError, "temperature must be finite, got a number of type int beyond the largest float"):
        gklx.ClassPrior(3, temperature=10**400)


SMALLEST = {"float32": ("1.18e-38", 2.0**-126), "float64": ("2.23e-308", 2.0**-1022)}


@pytest.mark.parametrize("name", ["temperature", "weight_temperature"])
def test_subnormal_temperatures_are_refused(backend, name, dtype):
    """A processor may flush them to 0, and their reciprocals are infinite."""
    computed = "float64" if dtype == "float64" else "float32"
    text, smallest = SMALLEST[computed]
    s, t, labels = backend.array(S, dtype), backend.array(T, dtype), backend.array(LABELS)
    bad = smallest / 2
    message = f" must be at least {text}, the smallest normal number of {computed}, got {bad!r}"
    for call in (gklx.gkl, gklx.grad(gklx.gkl), gklx.terms(gklx.ikl)):
        with raises(ValueError, name + message):
            call(s, t, **{name: bad})
        call(s, t, **{name: smallest})
    with raises(ValueError, "temperature" + message):
        gklx.class_sums(s, labels, 3, temperature=bad)
    prior = gklx.ClassPrior(3, temperature=bad)
    with raises(ValueError, "temperature" + message):
        prior.update(s, labels)


def test_error_names_the_smallest_temperature():
    s = S.astype("float32")
    for value in (1e-40, np.float32(1e-40)):
        message = "temperature must be at least 1.18e-38, the smallest normal number of float32, got "
        with raises(ValueError, message + repr(value)):
            gklx.kl(s, s, temperature=value)
    gklx.kl(S, T, temperature=1e-40)  # in float64 a number as others are
    with raises(ValueError, "temperature must be above 0, got 0.0"):
        gklx.kl(S, T, temperature=0.0)


@pytest.mark.parametrize("name", NUMBERS)
def test_hyper_parameters_beyond_the_compute_dtype_are_refused(backend, name):
    s, t = backend.array(S, "float32"), backend.array(T, "float32")
    message = f"{name} must be finite in float32, the dtype computed in, got 1e+300"
    for value in (1e300, 10**300):
        with raises(ValueError, message):
            gklx.gkl(s, t, **{name: value})
    if name not in ("mse_weight", "ce_weight"):
        return
    with raises(ValueError, message.replace("1e+300", "-1e+300")):
        gklx.gkl(s, t, **{name: -1e300})


def test_jax_scalar_hyper_parameters_are_checked():
    needs("jax")
    import jax.numpy as jnp

    s, t = jnp.asarray(S, "float32"), jnp.asarray(T, "float32")
    with pytest.raises(ValueError, match=r"^temperature must be "):
        gklx.kl(s, t, temperature=jnp.asarray(1e-40, "float64"))


def test_error_of_a_differentiated_temperature_names_the_argument():
    """`kl` has one temperature, so its message must not name `weight_temperature`."""
    needs("jax")
    import jax
    import jax.numpy as jnp

    s, t = jnp.asarray(S), jnp.asarray(T)
    for loss in (gklx.kl, gklx.dkl):
        with pytest.raises((TypeError, ValueError)) as caught:
            jax.grad(lambda x, f=loss: f(s, t, temperature=x))(2.0)
        assert "weight_temperature" not in str(caught.value)
        assert "temperature" in str(caught.value)


# --- choices, counts, argnums -----------------------------------------------------------------------------------------


def test_symmetric_must_be_a_bool(backend):
    s, t = backend.array([[0.0, 1.0, 3.0]]), backend.array([[2.0, 1.0, 0.0]])
    for value in (True, False):
        found = gklx.grad(gklx.gkl)(s, t, symmetric=np.bool_(value))
        expected = gklx.grad(gklx.gkl)(s, t, symmetric=value)
        assert_close(found, backend.numpy(expected), backend, "float64", ulps=0)
    for value, came in ((1, "int"), (np.int64(1), "int64"), (np.asarray(True), "ndarray"), (None, "NoneType")):
        with raises(TypeError, f"symmetric must be a bool, got {came}"):
            gklx.gkl(s, t, symmetric=value)


@pytest.mark.parametrize("name", ["reduction", "normalize"])
def test_reduction_and_normalize_must_be_known_strings(name):
    assert gklx.gkl(S, T, **{name: np.str_("samples" if name == "normalize" else "sum")}) > 0
    for value in (None, 1, np.asarray(["mean", "sum"]), ["mean"], True):
        with pytest.raises(ValueError, match=f'^{name} must be ".*", got {re.escape(repr(value))}$'):
            gklx.gkl(S, T, **{name: value})


def test_argnums_may_be_numpy_integers():
    rng = np.random.default_rng(0)
    s, t = rng.standard_normal((2, 4, 3))
    for_student, for_teacher = gklx.grad(gklx.kl, (0, 1))(s, t)
    for one in (np.int64(1), np.uint8(1), np.asarray(1)):
        np.testing.assert_array_equal(gklx.grad(gklx.kl, one)(s, t), for_teacher)
        np.testing.assert_array_equal(gklx.value_and_grad(gklx.kl, one)(s, t)[1], for_teacher)
    for both in ((np.int64(0), 1), np.asarray([0, 1]), list(np.arange(2)), range(2)):
        found = gklx.grad(gklx.kl, both)(s, t)
        assert isinstance(found, tuple)
        np.testing.assert_array_equal(found, (for_student, for_teacher))
    for wrong in (np.True_, np.float64(1), np.asarray([[0]]), np.asarray([0.0, 1.0]), np.asarray([True]), {0, 1}):
        with raises(TypeError, f"argnums must be an integer or a sequence of integers, got {wrong!r}"):
            gklx.grad(gklx.kl, wrong)
    for wrong in (np.int64(2), np.asarray([0, -1])):
        with raises(ValueError, f"argnums must be made of 0 (student) and 1 (teacher), got {wrong!r}"):
            gklx.grad(gklx.kl, wrong)


def test_assert_gradients_match_checks_argnums():
    from gklx.testing import assert_gradients_match

    s, t = np.random.default_rng(0).standard_normal((2, 2, 3))
    for argnums in (np.int64(1), np.asarray([0, 1])):
        grad = gklx.grad(gklx.kl, argnums)
        assert_gradients_match(gklx.kl, s, t, argnums=argnums, grad=grad, backends=["numpy"])
    for wrong in ("0", None, 0.0, True):
        with raises(TypeError, f"argnums must be an integer or a sequence of integers, got {wrong!r}"):
            assert_gradients_match(gklx.kl, s, t, argnums=wrong, backends=["numpy"])


def test_num_classes_must_be_an_integer():
    for three in (np.int64(3), np.uint8(3), np.asarray(3)):
        assert gklx.class_sums(S, LABELS, three).shape == (3, 3)
        assert type(gklx.ClassPrior(three).num_classes) is int
    for wrong, came in (("3", "str"), (None, "NoneType"), (np.True_, "bool"), (np.asarray([3]), "ndarray")):
        with pytest.raises(TypeError, match=rf"^num_classes must be an integer, got (numpy\.)?{came}_?$"):
            gklx.ClassPrior(wrong)


# --- modules ----------------------------------------------------------------------------------------------------------


def test_modules_without_class_weights_refuse_labels():
    needs("torch")
    import torch

    from gklx.torch import DKLLoss, KLLoss

    s, t, labels = torch.tensor(S), torch.tensor(T), torch.tensor(LABELS)
    for kind in (KLLoss, DKLLoss):
        for call in (lambda loss: loss(s, t, labels), lambda loss: loss(s, t, labels=labels)):
            message = (
                f"labels must not be given to {kind.__name__}, which has no class weights and takes two positional "
                "arguments, got Tensor"
            )
            with raises(TypeError, message):
                call(kind())
        assert torch.equal(kind()(s, t, None), kind()(s, t))


def test_errors_of_modules_name_the_public_class():
    needs("torch")
    import torch

    import gklx.torch as modules

    s = torch.tensor(S)
    for name in modules.__all__:
        loss = getattr(modules, name)()
        for call in (lambda f: f(s), lambda f: f(s, s, None, s), lambda f: f(s, s, weight=s), lambda f: f(s, s, s, s)):
            with pytest.raises(TypeError, match=rf"^{name}\.forward\(\) "):
                call(loss)
        for call in (lambda f: f(1, 2, 3, 4), lambda f: f(tau=2.0)):
            with pytest.raises(TypeError, match=rf"^{name}\.__init__\(\) "):
                call(getattr(modules, name))


def test_modules_accept_numpy_settings():
    needs("torch")
    import torch

    from gklx.torch import GKLLoss

    loss = GKLLoss(np.int64(3), symmetric=np.True_, warmup_epochs=np.int64(2), temperature=1e-40)
    assert type(loss.num_classes) is int
    assert "num_classes=3," in repr(loss)
    with pytest.raises(ValueError, match=r"^temperature must be at least 1.18e-38, .* float32, got 1e-40$"):
        loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 1]))
    for wrong in (True, 2.0, np.True_):
        with pytest.raises(TypeError, match=r"^warmup_epochs must be an integer, got "):
            GKLLoss(warmup_epochs=wrong)


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"])
def test_labels_may_have_any_integer_dtype(backend, kind):
    rng = np.random.default_rng(0)
    s, t = (backend.array(x, "float32") for x in rng.standard_normal((2, 4, 3)))
    labels, table = np.asarray([2, 0, 1, 2]), rng.dirichlet(np.ones(3), 3)
    prior = backend.array(table, "float32")
    call = backend.wrap(lambda s, t, p, y: gklx.value_and_grad(gklx.gkl, (0, 1))(s, t, prior=p, labels=y, gamma=0.5))
    value, gradients = call(s, t, prior, backend.array(labels.astype(kind)))
    expected, expected_gradients = call(s, t, prior, backend.array(labels))
    assert_close(value, backend.numpy(expected), backend, "float32", ulps=0)
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert_close(one, backend.numpy(other), backend, "float32", ulps=0)
    sums = backend.wrap(lambda x, y: gklx.class_sums(x, y, 3))
    found, expected = (sums(t, backend.array(y)) for y in (labels.astype(kind), labels))
    assert_close(found, backend.numpy(expected), backend, "float32", ulps=0)


@pytest.mark.parametrize(("kind", "value"), [("uint32", 2**32 - 1), ("uint64", 2**64 - 1), ("uint64", 2**63)])
def test_labels_beyond_the_signed_range_name_no_class(backend, kind, value):
    """Such a label is an error where values are read, and gives NaN elsewhere: it must not wrap around to a class."""
    s, t, prior = backend.array(S), backend.array(T), backend.array(TABLE)
    labels = backend.array(np.asarray([0, value], kind))
    loss = backend.wrap(lambda s, t, p, y: gklx.gkl(s, t, prior=p, labels=y))
    sums = backend.wrap(lambda t, y: gklx.class_sums(t, y, 3))
    if backend.library.readable(s) and not backend.traced:
        for call in (lambda: loss(s, t, prior, labels), lambda: sums(t, labels)):
            with raises(ValueError, f"labels must lie in [0, 3), got {value} at index [1]"):
                call()
    else:
        assert np.isnan(backend.numpy(loss(s, t, prior, labels)))
        assert np.isnan(backend.numpy(sums(t, labels))).any()


@pytest.mark.parametrize("samples", [4, 8], ids=["fewer samples than classes", "more"])
def test_prior_may_hold_anything_where_nothing_counts(backend, samples):
    """In rows of classes without samples, and of samples without weight; in classes that are masked."""
    rng = np.random.default_rng(0)
    s, t = (backend.array(x, "float32") for x in rng.standard_normal((2, samples, 5)))
    table, labels, weights = rng.dirichlet(np.ones(5), 5), rng.integers(0, 3, samples), np.ones(samples)
    labels[1], weights[1] = 3, 0.0
    some = np.arange(5) != 2
    call = backend.wrap(
        lambda s, t, p, y, v, where: gklx.value_and_grad(gklx.gkl, (0, 1))(
            s, t, prior=p, labels=y, sample_weight=v, where=where
        )
    )

    def results(table, labels):
        prior, weight = (backend.array(x, "float32") for x in (table, weights))
        return call(s, t, prior, backend.array(labels), weight, backend.array(some))

    expected, expected_gradients = results(table, labels)
    table[3:], table[:, 2] = np.nan, -1.0
    value, gradients = results(table, labels)
    assert_close(value, backend.numpy(expected), backend, "float32", ulps=0)
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert_close(one, backend.numpy(other), backend, "float32", ulps=0)
    if backend.library.readable(s) and not backend.traced:
        labels[-1] = 4
        with raises(ValueError, "prior must be finite and not negative, got nan at index [4, 0]"):
            results(table, labels)


@pytest.mark.parametrize("shape", [(2, 3), (300, 20), (40, 1000)])
def test_nan_in_a_large_prior_is_found(backend, shape):
    """A maximum alone may leave it out: XLA's does, of more than a few numbers."""
    table = np.full(shape, 0.5)
    table[1, 2] = np.nan
    s = backend.array(np.zeros(shape), "float32")
    loss = backend.wrap(lambda s, p: gklx.gkl(s, s, prior=p))
    if backend.library.readable(s) and not backend.traced:
        with raises(ValueError, "prior must be finite and not negative, got nan at index [1, 2]"):
            loss(s, backend.array(table, "float32"))
    else:
        assert np.isnan(backend.numpy(loss(s, backend.array(table, "float32"))))


def test_unsigned_labels_under_torch_compile():
    needs("torch")
    import torch

    s, t, prior = torch.tensor(S), torch.tensor([[0.0, 1.0, 2.0], [2.0, 0.0, 1.0]]), torch.tensor(TABLE)
    compiled = torch.compile(lambda y: gklx.gkl(s, t, prior=prior, labels=y), backend="aot_eager", fullgraph=True)
    for kind in (torch.uint16, torch.uint32, torch.uint64):
        found = compiled(torch.tensor(LABELS).to(kind))
        assert torch.equal(found, gklx.gkl(s, t, prior=prior, labels=torch.tensor(LABELS)))
    assert torch.isnan(compiled(torch.tensor(np.asarray([0, 2**64 - 1], "uint64"))))


# --- JAX without rank promotion ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (2, 4, 3)], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_work_without_jax_rank_promotion(loss, shape):
    needs("jax")
    import jax
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    s, t = (jnp.asarray(x) for x in rng.standard_normal((2, *shape)))
    weights = jnp.asarray(rng.random(shape[:-1]))
    labels = jnp.asarray(rng.integers(0, 3, shape[:-1]))
    priors = [{}]
    if loss in (gklx.ikl, gklx.gkl):
        priors += [{"prior": jnp.asarray(TABLE), "labels": labels}, {"prior": jnp.abs(t)}]
    gammas = [{}, {"gamma": 0.5}, {"gamma": 0.0}] if loss is gklx.gkl else [{}]
    masks = [{}, {"sample_weight": weights}, {"where": jnp.asarray([True, False, True])}]
    with jax.numpy_rank_promotion("raise"):
        for prior, gamma, mask in itertools.product(priors, gammas, masks):
            given = functools.partial(loss, **prior, **gamma, **mask)
            # It is found in tracing, which takes no time.
            jax.eval_shape(functools.partial(given, reduction="none"), s, t)
            jax.eval_shape(jax.value_and_grad(given, (0, 1)), s, t)
            jax.eval_shape(gklx.value_and_grad(given, (0, 1)), s, t)
        jax.eval_shape(lambda s, t: jax.jvp(loss, (s, t), (t, s)), s, t)
        jax.eval_shape(jax.hessian(loss), s, t)
        gklx.value_and_grad(loss, (0, 1))(s, t, **priors[-1], sample_weight=weights)


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 4, 3)], ids=str)
def test_class_prior_works_without_jax_rank_promotion(shape):
    needs("jax")
    import jax
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    t = jnp.asarray(rng.standard_normal(shape), "float32")
    labels, weights = jnp.asarray(rng.integers(0, 3, shape[:-1])), jnp.asarray(rng.random(shape[:-1]))
    expected = gklx.class_sums(np.asarray(t), np.asarray(labels), 3, sample_weight=np.asarray(weights))
    with jax.numpy_rank_promotion("raise"):
        found = gklx.class_sums(t, labels, 3, sample_weight=weights)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
        prior = gklx.ClassPrior(3)
        prior.update(t, labels, weights)
        prior.advance()
        state = gklx.ClassPriorState.uniform(3, like=t)
        jax.jit(lambda state: state.update(t, labels).advance())(state)
