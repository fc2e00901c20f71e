"""Kinds of inputs that gave wrong numbers, here or in a mutant, against the definitions in decimal arithmetic."""

import math
from decimal import Decimal
from functools import partial

import numpy as np
import pytest

import backends
import exact
import gklx
from cases import LOSSES
from closeness import assert_close, assert_near

# NumPy says so where a result is beyond the float's range.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.many_programs,
    pytest.mark.version_independent,
]

INF, NAN = np.inf, np.nan
PLAIN = [
    ("kl", {}),
    ("kl", {"temperature": 4.0}),
    ("dkl", {}),
    ("ikl", {}),
    ("gkl", {"gamma": 0.0}),
    ("gkl", {"gamma": 0.5}),
]
KNOWN = {}


def in_decimals(name, s, t, arrays, **settings):
    """The results and their error bounds in decimals, computed once for all libraries."""
    named = sorted({"s": s, "t": t, **arrays}.items())
    key = (name, *((k, x.shape, x.tobytes()) for k, x in named), *sorted(settings.items()))
    if key not in KNOWN:
        KNOWN[key] = exact.evaluate(name, s, t, **arrays, **settings)
    return KNOWN[key]


def check(backend, dtype, *problems):
    """Check entries, values and gradients of problems (name, settings, student, teacher, arrays) to rounding."""
    computed = "float64" if dtype == "float64" else "float32"
    given = []
    for _, _, s, t, arrays in problems:
        arrays = {name: backend.array(x, computed if x.dtype.kind == "f" else None) for name, x in arrays.items()}
        given.append((backend.array(s, dtype), backend.array(t, dtype), arrays))

    def everything(given):  # in one function, which a compiler compiles once
        found = []
        for (name, settings, *_), (s, t, arrays) in zip(problems, given, strict=True):
            loss = partial(LOSSES[name], **settings)
            value, gradients = gklx.value_and_grad(loss, (0, 1))(s, t, **arrays)
            found.append((loss(s, t, **arrays, reduction="none"), value, *gradients))
        return found

    for at, (entries, *found) in enumerate(backend.wrap(everything)(given)):
        name, settings, _, _, arrays = problems[at]
        s, t, rounded = given[at]
        rounded = {
            key: backend.numpy(x) if arrays[key].dtype.kind == "f" else arrays[key] for key, x in rounded.items()
        }
        ask = partial(in_decimals, name, backend.numpy(s), backend.numpy(t), rounded, dtype=computed, **settings)
        value, to_s, to_t, *bounds = ask()
        each, _, _, each_bound, *_ = ask(reduction="none")
        wanted = [
            (each, each_bound, computed),
            *zip((value, to_s, to_t), bounds, (computed, dtype, dtype), strict=True),
        ]
        for what, x, (expected, bound, kind) in zip(
            ("entries", "value", "to s", "to t"), (entries, *found), wanted, strict=True
        ):
            text = exact.fault(backend.numpy(x), expected, bound, kind)
            assert not text, f"{name} {settings}, {what}: {text}"


def fills_of(dtype):
    """Low values with which users fill logits, as far as the dtype can hold them."""
    return [x for x in (-1e4, -1e5, -1e6, -1e7, -1e8, -1e9, -INF) if x >= -exact.LARGEST[dtype]] + [
        -exact.LARGEST[dtype]
    ]


@pytest.mark.parametrize("name", ["kl", "ikl", "gkl"])
def test_same_fill_value_in_both_networks(backend, dtype, name):
    rng = np.random.default_rng(0)
    s, t = 3.0 * rng.standard_normal((2, len(fills_of(dtype)), 2, 10)) + [[[[15.0]]], [[[22.0]]]]
    for i, fill in enumerate(fills_of(dtype)):
        s[i, :, 6:] = t[i, :, 6:] = fill
    uniform = {"prior": np.full_like(s, 0.1)}
    problems = [(key, settings, s, t, {}) for key, settings in PLAIN if key == name or (key, name) == ("dkl", "kl")]
    if name != "kl":
        problems += [(name, {}, s, t, uniform), (name, {"temperature": 2.0, "weight_temperature": 4.0}, s, t, {})]
    check(backend, dtype, *problems)


def test_same_fill_value_has_difference_zero(backend):
    """t − s is 0 in the filled classes, for any fill value."""
    s, t = np.zeros((1, 10)) + 15.0, np.zeros((1, 10)) + 22.0
    for fill in (-1e4, -1e6, -1e9, -3e38):
        s[:, 6:] = t[:, 6:] = fill
        found = gklx.ikl(
            backend.array(s, "float32"),
            backend.array(t, "float32"),
            prior=backend.array(np.full((1, 10), 0.1), "float32"),
            ce_weight=0.0,
        )
        # d is 7 in six classes of ten and 0 in four: half its variance.
        assert_close(found, 0.5 * 49 * 0.6 * 0.4, backend, "float32", ulps=4)


def test_opposite_offsets_of_the_networks(backend, dtype):
    rng = np.random.default_rng(1)
    s, t = 3.0 * rng.standard_normal((2, 6, 2, 8))
    for i, (a, b) in enumerate([(1e4, -1e4), (-1e4, 1e4), (1e4, 1e4), (-3e4, 3e4), (1e2, -1e4), (0.0, 2e4)]):
        s[i] += a
        t[i] += b
    s[2, :, 5:] = t[2, :, 5:] = -3e4
    check(backend, dtype, *((name, settings, s, t, {}) for name, settings in PLAIN))


def masked_out(dtype):
    """Logits with extreme values, and a mask that is False there."""
    rng = np.random.default_rng(2)
    values = [1e4, -1e4, -1e9, 1e18, -1e18, exact.LARGEST[dtype], -exact.LARGEST[dtype], INF, -INF, NAN]
    s, t = 3.0 * rng.standard_normal((2, len(values), 3, 6))
    where = np.ones(s.shape, dtype=bool)
    for i, x in enumerate(v for v in values):
        x = np.clip(x, -exact.LARGEST[dtype], exact.LARGEST[dtype]) if np.isfinite(x) else x
        s[i, :2, i % 6], t[i, 1:, i % 6] = x, x  # in one of the networks, in both, in the other
        where[i, :, i % 6] = False
    return s, t, where


def test_masked_class_is_not_read(backend, dtype):
    s, t, where = masked_out(dtype)
    prior = {"where": where, "prior": np.full_like(s, 0.25)}
    problems = [(name, settings, s, t, {"where": where}) for name, settings in PLAIN]
    check(backend, dtype, *problems, ("ikl", {}, s, t, prior), ("gkl", {"gamma": 2.0}, s, t, prior))
    # Or the other way round: what is left is far from what is taken out.
    far = [x for x in (1e4, -1e9, -1e18, 1e30) if abs(x) <= exact.LARGEST[dtype]]
    s, t = (x[: len(far)] for x in masked_out(dtype)[:2])
    for i, x in enumerate(far):
        s[i, :, :3], t[i, :2, :3] = x * (1 + 0.1 * np.arange(3)), 0.5 * x
    s[:, :, 3:] = t[:, :, 3:] = 0.0
    for kept in ([True, False, False, False, False, False], [True, True, True, False, False, False]):
        where = np.broadcast_to(np.asarray(kept), s.shape)
        check(backend, dtype, *((name, settings, s, t, {"where": where}) for name, settings in PLAIN))


@pytest.mark.parametrize("low", [-1e4, -1e18, -3e38])
def test_only_valid_class_far_from_the_masked_one(backend, low):
    s, t, where = np.asarray([[low, 0.0]]), np.zeros((1, 2)), np.asarray([True, False])
    for logits in ((s, t), (t, s), (s[0], t[0])):
        given = (backend.array(x, "float32") for x in logits)
        for loss in LOSSES.values():
            value, gradients = gklx.value_and_grad(loss, (0, 1))(*given, where=backend.array(where))
            assert_close(value, 0.0, backend, "float32", ulps=0)
            for x in gradients:
                assert (backend.numpy(x) == 0).all()
            given = (backend.array(x, "float32") for x in logits)


def test_sample_of_weight_zero_is_not_read(backend, dtype):
    s, t, where = masked_out(dtype)
    weight = {"sample_weight": np.where(where.all(axis=-1), 1.0, 0.0)}
    weight["sample_weight"][:, 0] = 0.0
    s[3, 1], t[3, 1] = 1.0, [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]  # one that counts
    weight["sample_weight"][3, 1] = 2.0
    check(backend, dtype, *((name, settings, s, t, weight) for name, settings in PLAIN))


@pytest.mark.parametrize(("name", "side"), [("kl", 0), ("dkl", 1), ("ikl", 1), ("gkl", 0)])
def test_nan_in_one_row_of_a_large_batch_stays_in_that_row(backend, name, side):
    """Only the valid classes of that row are affected."""
    rng = np.random.default_rng(3)
    shape = (1_000, 1_000)
    logits = rng.standard_normal((2, *shape)).astype("float32")
    where = np.ones(shape[1], dtype=bool)
    where[17:27] = False
    weight = np.ones(shape[0], dtype="float32")
    weight[[3, 400]] = 0.0
    loss = partial(LOSSES[name], reduction="sum")

    def run(logits, argument):
        s, t = (backend.array(x) for x in logits)
        given = {"where": backend.array(where), "sample_weight": backend.array(weight)}
        _, gradients = backend.wrap(gklx.value_and_grad(loss, (0, 1)))(s, t, **given)
        return [backend.numpy(x) for x in gradients]

    clean = run(logits, loss)
    logits[side, 500, 40] = NAN
    for found, expected in zip(run(logits, loss), clean, strict=True):
        assert (found[:, ~where] == 0.0).all()
        assert (found[weight == 0.0] == 0.0).all()
        others = np.arange(shape[0]) != 500
        np.testing.assert_array_equal(found[others], expected[others])
        assert expected.any() == np.isnan(found[500, where]).any() or name != "kl"


def test_prior_of_zeros_gives_wmse_zero(backend, dtype):
    """If all weights are 0, the wMSE and its gradient are 0; with γ = 0 all weights are 1."""
    s, t = np.asarray([0.0, 1.0, 2.0]), np.asarray([1.0, 0.0, 0.0])
    some = np.stack([np.zeros(3), [0.2, 0.3, 0.5]])
    table = {"prior": np.stack([np.zeros(3), [0.5, 0.5, 0.0], np.zeros(3)])}
    two, zeros = (np.stack([s, t]), np.stack([t, s])), np.zeros(3)
    problems = []
    for name, settings in [("ikl", {}), *(("gkl", {"gamma": gamma}) for gamma in (0.0, 0.5, 1.0, 8.0))]:
        problems += [
            (name, settings, s, t, {"prior": zeros}),
            (name, settings, s[None], t[None], {"prior": zeros[None]}),
            (name, settings, *two, {"prior": some}),
            (name, settings, *two, {**table, "labels": np.asarray([1, 2])}),
            (name, settings, s, t, {**table, "labels": np.asarray(0)}),
        ]
    check(backend, dtype, *problems)
    value = gklx.gkl(backend.array(s), backend.array(t), prior=backend.array(zeros))
    p = np.exp(t) / np.exp(t).sum()
    assert_close(value, np.log(np.exp(s).sum()) - p @ s, backend, "float64", ulps=4)


SCALES = (1e-30, 1e-25, 1e-12, 1e12, 1e18, 1e25, 1.0, 3e38)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("normalize", ["batch", "samples"])
def test_scale_of_the_prior(backend, dtype, scale, normalize):
    """Normalised by the batch, GKL does not depend on it; by samples, its wMSE grows with the square of its power γ."""
    if backend.costly and not backends.EXHAUSTIVE and SCALES.index(scale) % 2 == (normalize == "batch"):
        pytest.skip("the other normaliser has this scale")
    rng = np.random.default_rng(4)
    s, t = 3.0 * rng.standard_normal((2, 4, 5))
    prior = rng.dirichlet(np.ones(5), 4)
    prior[0] *= 1e-3
    problems = []
    for gamma in (0.3, 2.0) if backend.costly else (0.0, 0.3, 1.0, 2.0, 8.0):
        settings = {"gamma": gamma, "normalize": normalize, "mse_weight": 4.0}
        problems += [("gkl", settings, s, t, {"prior": scale * prior})]
    if scale == 1.0 and not backend.costly:  # more classes than the row kernel adds up at a time
        wide = 3.0 * rng.standard_normal((2, 1, 600))
        problems += [("gkl", {"gamma": 0.0, "normalize": normalize}, *wide, {"prior": rng.dirichlet(np.ones(600), 1)})]
    check(backend, dtype, *problems)
    if normalize == "batch":
        wide = "float64" if dtype == "float64" else "float32"
        given = backend.array(s, dtype), backend.array(t, dtype)
        one, other = (gklx.gkl(*given, prior=backend.array(x * prior, wide)) for x in (scale, 1.0))
        assert_close(one, backend.numpy(other), backend, wide, ulps=16)


def test_masked_classes_beside_sample_weights(backend, dtype):
    """A masked class takes no part in the softmax, nor in the scale of its row's prior, though it weighs most."""
    rng = np.random.default_rng(8)
    s, t = 3.0 * rng.standard_normal((2, 4, 6))
    where = np.ones((4, 6), dtype=bool)
    where[:, 2] = where[1, 4] = where[3, :2] = False
    prior = (1e-200 if dtype == "float64" else 1e-30) * rng.dirichlet(np.ones(6), 4)
    prior[~where] = 1.0
    given = {"where": where, "sample_weight": np.asarray([1.0, 2.0, 0.0, 0.5])}
    check(
        backend,
        dtype,
        ("kl", {"temperature": 2.0}, s, t, given),
        ("gkl", {"gamma": 0.5}, s, t, given),
        ("gkl", {"gamma": 2.0}, s, t, {**given, "prior": prior}),
    )


@pytest.mark.parametrize("power", [-30, 30])
def test_scale_of_the_prior_is_that_of_the_samples_that_count(backend, dtype, power):
    """A sample of weight 0 leaves the batch's normaliser alone, whatever its own row of the prior holds."""
    rng = np.random.default_rng(6)
    s, t = rng.standard_normal((2, 3, 5))
    prior = 10.0 ** (8 * power if dtype == "float64" else power) * rng.dirichlet(np.ones(5), 3)
    prior[1] = 1.0
    check(backend, dtype, ("gkl", {}, s, t, {"prior": prior, "sample_weight": np.asarray([1.0, 0.0, 2.0])}))


def test_wmse_without_a_difference_is_zero_though_its_factor_overflows(backend, dtype):
    """Networks that differ by one number in all classes, and weights whose square is infinite."""
    t = np.asarray([[1.0, 2.0, 3.0], [0.5, 0.25, 2.0]])
    prior = backend.array(np.asarray([[1e25, 2e25, 5e25], [3e25, 1e25, 1e25]]), "float32")
    given = backend.array(t + 4.0, dtype), backend.array(t, dtype)

    def everything(mse_weight):
        loss = partial(gklx.gkl, gamma=30.0, normalize="samples", mse_weight=mse_weight)

        def of(s, t, prior):
            value, gradients = gklx.value_and_grad(loss, (0, 1))(s, t, prior=prior)
            return value, *gradients, loss(s, t, prior=prior, reduction="none")

        return [backend.numpy(x) for x in backend.wrap(of)(*given, prior)]

    for x, of_ce in zip(everything(1.0), everything(0.0), strict=True):
        assert (abs(x - of_ce) <= 1e-15).all()


def test_wmse_of_weight_zero_leaves_nan_of_the_teacher_out_of_its_gradient(backend, dtype):
    """Where the numbers are traced as well, as under `jax.jit`."""
    s, t = np.asarray([[1.0, 2.0], [3.0, 5.0]]), np.asarray([[2.0, NAN], [4.0, 1.0]])
    problems = [(name, {"mse_weight": 0.0}, s, t, {}) for name in ("dkl", "ikl", "gkl")]
    check(backend, dtype, *problems, ("gkl", {"mse_weight": 0.0, "gamma": 0.5}, s, t, {}))


def test_undefined_normalizer_reaches_classes_without_weight(backend, dtype):
    """The teacher's NaN in one sample leaves the batch without a normaliser, and so without gradients of the wMSE."""
    t = np.asarray([[0.0, -2000.0], [0.0, 0.0], [NAN, 0.0]])
    s = np.asarray([[NAN, 0.0], [0.0, 1.0], [0.0, 0.0]])
    wide = backend.array(s, dtype), backend.array(t, dtype)
    for loss in (gklx.gkl, partial(gklx.gkl, gamma=2.0)):
        for gradient in backend.wrap(gklx.value_and_grad(loss, (0, 1)))(*wide)[1]:
            assert np.isnan(backend.numpy(gradient)).all()


def test_products_of_a_small_prior_keep_their_digits(backend):
    """A weight times a difference is below the normal numbers, although the weights are not and their scale cancels."""
    rng = np.random.default_rng(5)
    s, t = 1e-3 * rng.standard_normal((2, 2, 5))
    prior = 4e-37 * np.asarray([[1.0, 0.3, 0.9, 0.04, 0.05], [0.2, 0.04, 0.1, 0.5, 0.05]])
    check(backend, "float32", ("gkl", {"mse_weight": 1e3, "ce_weight": 0.0}, s, t, {"prior": prior}))


@pytest.mark.parametrize("gamma", [8.0, 60.0])
@pytest.mark.parametrize("wide", ["float32", "float64"])
def test_large_power_of_a_prior(backend, wide, gamma):
    """Its largest entry may be nearly twice a power of two, which to the power gamma is a large number."""
    rng = np.random.default_rng(4)
    s, t = rng.standard_normal((2, 3, 5))
    # Some are about the square root of 1/2, where the logarithm's series has its largest error.
    prior = np.asarray([0.98, 0.97, 0.99, 0.71, 1e-3]) * np.asarray([[1.0], [1.43], [1.99]])
    for size in (1.0, 1e37):
        for normalize in ("batch", "samples"):
            settings = {"gamma": gamma, "normalize": normalize, "reduction": "sum", "temperature": 1e3}
            check(backend, wide, ("gkl", settings, size * s, size * t, {"prior": prior / 2}))


@pytest.mark.parametrize("gamma", [0.3, 2.9])
@pytest.mark.parametrize("wide", ["float32", "float64"])
def test_power_of_a_prior_whatever_its_digits(backend, wide, gamma):
    """Where two classes weigh 1 and x, and differ in d by 1, twice their wMSE is x to the power gamma."""
    x = np.linspace(0.5, 1.0, 999, dtype=wide)
    prior = backend.array(np.stack([np.ones_like(x), x], axis=-1), wide)
    s, t = (backend.array(np.tile([0.0, last], (len(x), 1)), wide) for last in (0.0, 1.0))
    loss = partial(gklx.gkl, gamma=gamma, normalize="samples", ce_weight=0.0, reduction="none")
    exponent = Decimal(float(np.dtype(wide).type(gamma)))
    powers = [float(Decimal(float(each)) ** exponent) for each in x]
    assert_near(backend.numpy(2 * backend.wrap(loss)(s, t, prior=prior)), powers, wide, ulps=6, by="entry")


@pytest.mark.parametrize("name", LOSSES)
def test_classes_without_a_gap_where_its_factor_overflows(backend, dtype, name):
    """The factor of q - p is v / T, and in these rows q - p is 0: so is its product."""
    s = np.asarray([[100.0, -1e4, -50.0, -70.0], [-60.0, -1e4, 3.0, -60.0]])
    t = np.asarray([[90.0, -1e4, -40.0, -50.0], [-50.0, -1e4, 2.0, -1e4]])
    v = np.asarray([2e38, 1e38]) if dtype != "float64" else np.asarray([1e308, 5e307])
    settings = {"temperature": 1e-3, "reduction": "sum"} | ({"mse_weight": 0.0} if name != "kl" else {})
    check(backend, dtype, (name, settings, s, t, {"sample_weight": v}))


def test_gap_times_an_overflowing_factor_is_infinite(backend, dtype):
    wide = "float64" if dtype == "float64" else "float32"
    v = backend.array(np.asarray([1e308 if wide == "float64" else 2e38]), wide)
    s, t = (backend.array(np.asarray([x]), dtype) for x in ([0.0, 1.0, 2.0], [2.0, 1.0, 0.0]))
    to_s = gklx.grad(partial(gklx.kl, temperature=1e-3, reduction="sum"))(s, t, sample_weight=v)
    assert backend.numpy(to_s).tolist() == [[-INF, 0.0, INF]]


@pytest.mark.parametrize("scale", [1e-27, 1.1e-3, 5e12, 1.05e18])
def test_large_logits_with_priors_far_from_one(backend, scale):
    """Products of both exceed the float's range although the loss does not."""
    rng = np.random.default_rng(11)
    problems = []
    for size in (1e18,) if backend.costly else (1e16, 1e18, 1e37):
        s, t = size * rng.standard_normal((2, 2, 130))
        for prior in (scale * rng.dirichlet(np.ones(130), 2), scale * np.eye(130)[:2]):
            for name, settings in (("ikl", {}), ("gkl", {}), ("gkl", {"gamma": 0.5, "normalize": "samples"})):
                problems += [(name, settings, s, t, {"prior": prior})]
    check(backend, "float32", *problems)


def test_teachers_weights_of_very_different_scale(backend, dtype):
    """High powers of the teacher's softmax: W ranges from 1 to 1e-25 and below the smallest float."""
    rng = np.random.default_rng(5)
    s, t = 3.0 * rng.standard_normal((2, 4, 7))
    t[0], t[1] = 0.0, [20.0, 0, 0, 0, 0, 0, 0]
    every = np.zeros((3, 900)) + rng.standard_normal((3, 900)) * 1e-2
    for normalize in ("batch", "samples"):
        for gamma in (0.0, 1.0, 3.0, 8.0):
            settings = {"gamma": gamma, "normalize": normalize}
            check(backend, dtype, ("gkl", settings, s, t, {}), ("gkl", settings, every[:1], every[1:2], {}))
        if backend.costly:
            break  # seconds of compiling, for the same formulas


@pytest.mark.parametrize("scale", [0.9, 1e-10, 1e-30, "small", "smallest", "subnormal"])
def test_scale_of_the_sample_weights(backend, dtype, scale):
    """The mean does not depend on it, even if the sum of the weights exceeds the largest float."""
    wide = "float64" if dtype == "float64" else "float32"
    info = np.finfo(wide)
    smallest = float(info.smallest_normal), 4096 * float(info.smallest_subnormal)
    unit = {"small": 1e-5, "smallest": smallest[0], "subnormal": smallest[1]}.get(scale)
    unit = float(info.max) * scale if unit is None else unit
    rng = np.random.default_rng(6)
    s, t = 3.0 * rng.standard_normal((2, 5, 6))
    v = np.asarray([1.0, 1.0, 0.5, 0.25, 0.0]) * unit
    check_mean(backend, dtype, s, t, v)
    check_mean(backend, dtype, s, t, np.where(np.arange(5) == 0, 1e-30 if wide == "float32" else 1e-200, v))


def check_mean(backend, dtype, s, t, v):
    wide = "float64" if dtype == "float64" else "float32"
    for name, settings in [*PLAIN, ("gkl", {"normalize": "samples"})]:
        given = backend.array(s, dtype), backend.array(t, dtype)
        found = gklx.value_and_grad(partial(LOSSES[name], **settings), (0, 1))
        value, gradients = found(*given, sample_weight=backend.array(v, wide))
        rounded = [backend.numpy(x) for x in given]
        known = in_decimals(name, *rounded, {"sample_weight": backend.rounded(v, wide)}, dtype=wide, **settings)
        for x, wanted, bound, kind in zip((value, *gradients), known[:3], known[3:], (wide, dtype, dtype), strict=True):
            text = exact.fault(backend.numpy(x), wanted, bound, kind)
            assert not text, f"{name} {settings}: {text}"


@pytest.mark.parametrize("name", LOSSES)
def test_lowest_float_as_a_student_logit(backend, dtype, name):
    """Finite logits have finite gradients, or infinite ones where they are beyond the dtype; never NaN."""
    low = -exact.LARGEST[dtype]
    s, t = np.asarray([[0.0, low, 1.0], [low, low, 0.0], [0.0, 1.0, 2.0]]), np.asarray([[1.0, 2.0, 0.0]] * 3)
    check(backend, dtype, (name, {}, s, t, {}))
    value, gradients = gklx.value_and_grad(LOSSES[name], (0, 1))(backend.array(s, dtype), backend.array(t, dtype))
    assert backend.numpy(value) > 0.1 * -low
    for x in gradients:
        assert not np.isnan(backend.numpy(x)).any()
    to_s = backend.numpy(gklx.grad(LOSSES["kl"])(backend.array(s, dtype), backend.array(t, dtype)))
    assert np.isfinite(to_s).all()


def test_smallest_temperature(backend):
    """At the smallest normal float scaled differences exceed the float's range: losses are 0 or huge, never NaN."""
    least = float(np.finfo("float32").smallest_normal)
    s, t = np.asarray([[1.0, 0.0, -3.0], [0.0, 1.0, 1.0]]), np.asarray([[1.0, 0.5, 0.0], [1.0, 0.0, 0.0]])
    given = backend.array(s, "float32"), backend.array(t, "float32")
    for name in LOSSES:
        with pytest.raises(ValueError, match="temperature must be at least"):
            LOSSES[name](*given, temperature=least / 8)
        check(backend, "float32", (name, {"temperature": least}, s[:1], t[:1], {}))
    entries = gklx.kl(*given, temperature=least, reduction="none")
    assert backend.numpy(entries)[0] == 0.0
    assert backend.numpy(entries)[1] > 1e37


def test_scaled_difference_beyond_the_largest_float_where_the_teacher_is_sure(backend):
    """p L is 0 where p is, although L is not finite."""
    s = np.asarray([[3e38, -3e38, 1e38]])
    for t in (np.asarray([[3e38, -3e38, -1e38]]), np.asarray([[3e38, 1e38, -3e38]])):
        check(backend, "float32", ("kl", {"temperature": 0.25}, s, t, {}))


@pytest.mark.parametrize("wide", ["float32", "float64"])
def test_kl_whatever_the_ratio_of_the_probabilities(backend, wide):
    """Each class's part of KL has a form for p near q and another one, which must meet."""
    x = np.linspace(-4.0, 4.0, 161)
    s, t = np.zeros((161, 2)), np.stack([np.zeros_like(x), x], axis=-1)
    check(backend, wide, ("kl", {}, s, t, {}), ("kl", {}, t, s, {}))


def test_rows_of_huge_logits_alone(backend):
    """A row without a moderate logit in one of its networks; the temperature brings its loss back into the range."""
    huge = np.asarray([[3e38, -3e38, 1e38], [-2e38, -3e38, -1e38]])
    moderate = np.asarray([[0.0, 1.0, 2.0], [1.0, 0.0, 1.0]])
    settings = [("kl", {"temperature": 1e3}), ("dkl", {"temperature": 1e20}), ("gkl", {"temperature": 1e3})]
    problems = [(*each, huge, moderate, {}) for each in settings] + [(*each, moderate, huge, {}) for each in settings]
    check(backend, "float32", *problems)


def test_sum_of_huge_differences(backend):
    """The mean of the differences is finite where their sum is beyond the largest float."""
    t = np.asarray([[3e38, 3e38, 3e38, -3e38, -3e38, -2e38]])
    settings = {"mse_weight": 1e-3, "normalize": "samples"}
    check(backend, "float32", ("gkl", settings, np.zeros_like(t), t, {"prior": np.full_like(t, 0.2)}))


@pytest.mark.parametrize("wide", ["float32", "float64"])
def test_sum_of_huge_logits_under_an_even_teacher(backend, wide):
    """The mean of the student's logits is finite where their sum is beyond the largest float."""
    s = np.full((1, 512), -exact.LARGEST[wide] / 100)
    s[0, 3] = 0.0
    t = np.zeros_like(s)
    check(backend, wide, ("kl", {}, s, t, {}), ("dkl", {"mse_weight": 0}, s, t, {}), ("gkl", {}, s, t, {}))


@pytest.mark.parametrize("wide", ["float32", "float64"])
def test_fills_of_the_two_networks_in_different_classes(backend, wide):
    """An infinite loss is never NaN."""
    s, t = np.zeros((2, 1, 16))
    s[0, :6] = t[0, 7:9] = -exact.LARGEST[wide]
    check(backend, wide, *((name, {}, s, t, {}) for name in LOSSES))


@pytest.mark.parametrize("wide", ["float32", "float64"])
def test_logits_further_apart_than_the_largest_float(backend, wide):
    """Or differences of two networks' logits, over the temperature: a small probability brings the loss back."""
    largest = exact.LARGEST[wide]
    s, t = np.asarray([[0.9 * largest, -0.9 * largest]]), np.asarray([[0.0, -6.0]])
    check(backend, wide, ("kl", {}, s, t, {}), ("dkl", {"mse_weight": 0}, s, t, {}))
    s, t = np.asarray([[0.0, 1.0, -largest]]), np.asarray([[1.0, 0.0, -2.0]])
    check(backend, wide, ("kl", {"temperature": 0.5}, s, t, {}), ("kl", {"temperature": 0.9}, s, t - [[0, 0, 5]], {}))


@pytest.mark.parametrize("fill", [-1e4, -1e9])
def test_the_same_fill_in_all_classes_of_weight(backend, fill):
    """Differences of the other network's logits keep their digits."""
    s, t = np.asarray([[fill, fill, 1.03, fill]]), np.asarray([[-0.41, 0.02, fill, 1.95]])
    check(backend, "float32", *((name, {}, s, t, {}) for name in ("kl", "dkl")))
    s, t = np.asarray([[0.43, 0.06, -0.37]]), np.asarray([[-0.6, fill, fill]])
    prior = {"prior": np.asarray([[0.0, 0.4, 0.6]])}
    check(backend, "float32", ("gkl", {}, s, t, prior), ("gkl", {}, t, s, prior))


def test_prior_of_nearly_one_class(backend):
    """There d is nearly its mean: the small difference of both keeps its digits."""
    rng = np.random.default_rng(13)
    s, t = (backend.rounded(x, "float32") for x in 3.0 * rng.standard_normal((2, 6, 6)))
    prior = backend.rounded(np.where(np.eye(6) > 0, 1.0, 1e-6), "float32")
    loss = partial(gklx.gkl, ce_weight=0.0, normalize="samples")
    given = [backend.array(x, "float32") for x in (s, t, prior)]
    found = backend.wrap(lambda s, t, prior: gklx.grad(loss, (0, 1))(s, t, prior=prior))(*given)
    for x, expected in zip(found, gklx.grad(loss, (0, 1))(s, t, prior=prior), strict=True):
        bound = 32 * np.finfo("float32").eps * abs(expected).max(axis=-1, keepdims=True)
        assert (abs(backend.numpy(x) - expected) <= bound).all()


def test_powers_far_above_1(backend, dtype):
    """The normaliser of a batch does not depend on the scale of its weights, whatever gamma."""
    rng = np.random.default_rng(12)
    s, t = rng.standard_normal((2, 3, 4))
    t[:, 0] = [5.0, 4.9, 0.0]
    prior = {"prior": np.asarray([[0.7, 0.1, 0.1, 0.1], [0.69, 0.2, 0.1, 0.01], [0.25, 0.25, 0.25, 0.25]])}
    check(backend, dtype, *(("gkl", {"gamma": gamma}, s, t, given) for gamma in (65.0, 600.0) for given in ({}, prior)))


@pytest.mark.parametrize("size", [2.0**56, 1e18])
def test_sum_of_huge_squares(backend, size):
    """The mean of the squared differences, here all the same, is finite where their sum is beyond the largest float."""
    t = np.full((1, 20_000), size)
    t[:, ::2] = -size
    given = [backend.array(x, "float32") for x in (np.zeros_like(t), t)]
    loss = partial(gklx.gkl, ce_weight=0.0, normalize="samples", prior=backend.array(np.full_like(t, 5e-5), "float32"))
    value, gradients = gklx.value_and_grad(loss, (0, 1))(*given)
    rounding = 1e-4  # XLA on a CPU adds one class after the other, here 20,000 times with the same rounding
    assert backend.numpy(value) == pytest.approx(size**2 / 2, rel=rounding)
    for sign, found in zip((-1, 1), gradients, strict=True):
        np.testing.assert_allclose(backend.numpy(found), sign * t * 5e-5, rtol=rounding)


def test_power_of_a_subnormal_prior(backend):
    """Its largest entry is a power of two, by which nothing is rounded."""
    if backend.library.backend == "jax":
        pytest.skip("XLA takes subnormal numbers for 0")
    rng = np.random.default_rng(6)
    s, t = rng.standard_normal((2, 2, 4))
    prior = np.asarray([[1.0, 0.5, 1e-40, 2e-42], [0.25, 3e-41, 0.1, 0.25]])
    check(backend, "float32", *(("gkl", {"gamma": gamma}, s, t, {"prior": prior}) for gamma in (0.05, 0.3)))


def test_kl_is_not_negative(backend, dtype):
    """For rows one rounding apart. KL is at most (max d − min d)² / 8."""
    rng = np.random.default_rng(7)
    rows = 20_000 if backend.execution == "kernel" else 2_000
    unit, _ = exact.LAST[dtype]
    t = backend.rounded(3.0 * rng.standard_normal((rows, 10)), dtype)
    s = backend.rounded(t * (1 + unit * rng.integers(-1, 2, t.shape)), dtype)
    found = backend.numpy(
        backend.wrap(partial(gklx.kl, reduction="none"))(backend.array(s, dtype), backend.array(t, dtype))
    )
    assert (found >= 0).all()
    spread = (t - s).max(axis=-1) - (t - s).min(axis=-1)
    unit, _ = exact.LAST["float64" if dtype == "float64" else "float32"]
    assert (found <= spread**2 / 8 * 1.001 + 64 * unit * spread).all()
    assert (found > 0).any()
    same = backend.numpy(
        backend.wrap(partial(gklx.kl, reduction="none"))(backend.array(t, dtype), backend.array(t, dtype))
    )
    assert (same == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_unreduced_entries_add_up_to_the_sum(backend, dtype, name):
    """Under "none" an entry includes its sample's weight, as in PyTorch's and Keras' losses."""
    rng = np.random.default_rng(8)
    s, t = 3.0 * rng.standard_normal((2, 3, 2, 5))
    v = np.asarray([[0.0, 2.0], [0.5, 1.0], [3.0, 0.25]])
    wide = "float64" if dtype == "float64" else "float32"
    given = backend.array(s, dtype), backend.array(t, dtype)
    weight = {"sample_weight": backend.array(v, wide)}
    run = {each: backend.wrap(partial(LOSSES[name], reduction=each)) for each in ("none", "sum", "mean")}
    entries, total, mean = (backend.numpy(run[each](*given, **weight)) for each in ("none", "sum", "mean"))
    assert entries[0, 0] == 0.0
    np.testing.assert_allclose(entries.sum(), total, rtol=1e-6)
    np.testing.assert_allclose(entries.sum() / v.sum(), mean, rtol=1e-6)
    if name != "gkl":  # whose normaliser is of the weights, too
        np.testing.assert_allclose(entries, v * backend.numpy(run["none"](*given)), rtol=1e-6)


# --- JAX --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def jax():
    backends.needs("jax")
    import jax

    jax.config.update("jax_enable_x64", True)
    return jax


@pytest.mark.parametrize("name", ["dkl", "ikl", "gkl"])
@pytest.mark.parametrize("zero", ["mse_weight", "ce_weight", "gamma"])
def test_traced_hyper_parameter_of_zero(jax, execution, name, zero):
    """As in a warm-up from 0: a part of weight 0 must vanish even where it is infinite, as with a static weight."""
    if zero == "gamma" and name != "gkl":
        pytest.skip("only GKL has it")
    s = np.asarray([[0.0, -INF, 1.0], [1.0, 2.0, 0.5]])
    t = np.asarray([[0.0, 0.5, 1.0], [0.0, -INF if zero == "mse_weight" else -3.0, 1.0]])

    def run(s, t, number):
        return jax.value_and_grad(lambda s, t: LOSSES[name](s, t, **{zero: number}), (0, 1))(s, t)

    given = jax.numpy.asarray(s), jax.numpy.asarray(t)
    alone, several = jax.jit(run), jax.jit(jax.vmap(run, (None, None, 0)))
    of_several = several(*given, jax.numpy.asarray([0.0, 0.5]))
    for at, number in enumerate((0.0, 0.5)):
        value, gradients = run(*given, number)
        for one, of_one in (alone(*given, number), jax.tree.map(lambda x, at=at: x[at], of_several)):
            np.testing.assert_allclose(one, value, rtol=1e-12)
            for x, y in zip(of_one, gradients, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)
        if number == 0.0 and zero == "mse_weight":
            assert not np.isnan(gradients[0]).any()
            assert (np.asarray(gradients[1]) == 0).all()


@pytest.mark.optimized_programs
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", LOSSES)
def test_programs_of_many_rows_with_float64_enabled(jax, execution, dtype, name):
    """With at least 8 MB of logits, with and without powers of the weights."""
    rng = np.random.default_rng(9)
    s, t = rng.standard_normal((2, 2_000, 600))
    prior = rng.dirichlet(np.ones(600), len(s))
    for gamma in (1.0, 0.5) if name == "gkl" else (None,):
        loss = LOSSES[name] if gamma is None else partial(gklx.gkl, gamma=gamma)
        for arrays in ({}, {"prior": prior.astype(dtype)}) if name in ("ikl", "gkl") else ({},):
            value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(s.astype(dtype), t.astype(dtype), **arrays)
            wide = [x.astype(dtype).astype("float64") for x in (s, t)]
            wide_arrays = {key: x.astype("float64") for key, x in arrays.items()}
            exactly, of_both = gklx.value_and_grad(loss, (0, 1))(*wide, **wide_arrays)
            np.testing.assert_allclose(value, exactly, rtol=1e-5 if dtype == "float32" else 1e-13)
            for x, y in zip(gradients, of_both, strict=True):
                assert x.dtype == dtype
                np.testing.assert_allclose(x, y, rtol=0, atol=abs(y).max() * (1e-5 if dtype == "float32" else 1e-12))


# --- PyTorch ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    backends.needs("torch")
    import torch

    torch._dynamo.reset()
    return torch


def close(torch, found, expected, dtype):
    assert found.dtype == expected.dtype
    rough = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 1e-2)
    torch.testing.assert_close(found, expected, rtol=0, atol=rough * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("how", "dtype"),
    [
        ("backward", "float32"),
        ("backward", "float64"),
        ("backward", "bfloat16"),
        ("value_and_grad", "float32"),
        ("func", "float32"),
    ],
)
def test_compiled_logits_of_different_layouts(torch, execution, how, dtype):
    """Channels of images are the classes: one network's come first in memory, the other's last."""
    if how == "func" and execution == "kernel":
        pytest.skip("a transform within the compiler runs on the formulas")
    if dtype != "float32" and execution == "kernel" and not backends.EXHAUSTIVE:
        pytest.skip("the operator is one node in every dtype, whose strides float32 tests")
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    s, t = torch.randn(1, 21, 16, 16, dtype=kind), torch.randn(1, 16, 16, 21, dtype=kind)

    def run(s, t):  # all losses in one program, since compiling takes most of the time
        found = []
        for loss in LOSSES.values():
            if how == "func":
                gradients, value = torch.func.grad_and_value(lambda s, t, f=loss: f(s.permute(0, 2, 3, 1), t), (0, 1))(
                    s, t
                )
            elif how == "value_and_grad":
                value, (to_s, to_t) = gklx.value_and_grad(loss, (0, 1))(s.permute(0, 2, 3, 1), t)
                gradients = to_s.permute(0, 3, 1, 2), to_t
            else:
                value, gradients = loss(s.permute(0, 2, 3, 1), t), ()
            found.append((value, *gradients))
        return found

    def all_of(run, s, t):
        s, t = (x.clone().requires_grad_(how == "backward") for x in (s, t))
        found = run(s, t)
        if how == "backward":
            return [(value.detach(), *torch.autograd.grad(value, (s, t), retain_graph=True)) for (value,) in found]
        return found

    compiled = torch.compile(run)
    for found, expected in zip(all_of(compiled, s, t), all_of(run, s.double(), t.double()), strict=True):
        for x, y in zip(found, expected, strict=True):
            close(torch, x, y.to(x.dtype), kind)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_teacher_may_be_an_inference_tensor(torch, execution, compiled, dtype):
    if compiled and dtype not in ("float32", "bfloat16"):
        pytest.skip("compiles what another dtype compiles")
    rng = np.random.default_rng(10)
    kind = getattr(torch, dtype)
    s, t = (torch.tensor(x).to(kind) for x in rng.standard_normal((2, 6, 5)))
    given = {"sample_weight": torch.rand(6) + 0.5, "where": torch.rand(6, 5) > 0.2}
    prior = {"prior": torch.rand(5, 5), "labels": torch.arange(6) % 5}
    with torch.inference_mode():
        frozen = t.clone()
        frozen_given, frozen_prior = ({key: x.clone() for key, x in each.items()} for each in (given, prior))
    assert frozen.is_inference()

    def losses(s, t, given, prior, reduction):
        return [
            loss(s, t, **given, **(prior if name in ("ikl", "gkl") else {}), reduction=reduction).sum()
            for name, loss in LOSSES.items()
        ]

    run = torch.compile(losses) if compiled else losses
    for reduction in ("mean",) if compiled else ("mean", "none"):
        found = []
        for arguments in ((frozen, frozen_given, frozen_prior), (t, given, prior)):
            student = s.clone().requires_grad_()
            found.append(
                [torch.autograd.grad(x, student, retain_graph=True)[0] for x in run(student, *arguments, reduction)]
            )
        for x, y in zip(*found, strict=True):
            assert torch.equal(x, y)
            assert y.abs().max() > 0
    if compiled:
        return
    found = []
    for arguments in ((frozen, frozen_given, frozen_prior), (t, given, prior)):
        student = s.clone().requires_grad_()
        first = [torch.autograd.grad(x, student, create_graph=True)[0] for x in run(student, *arguments, "mean")]
        found.append([torch.autograd.grad((x * x).sum(), student)[0] for x in first])
    for x, y in zip(*found, strict=True):
        close(torch, x, y, kind)
        assert y.abs().max() > 0


@pytest.mark.parametrize(("name", "compiled"), [*((name, False) for name in LOSSES), ("kl", True), ("gkl", True)])
def test_teacher_of_a_module_may_be_an_inference_tensor(torch, execution, name, compiled):
    import gklx.torch

    labels = torch.arange(6) % 5 if name in ("ikl", "gkl") else None
    module = getattr(gklx.torch, f"{name.upper()}Loss")(**({"num_classes": 5} if labels is not None else {}))
    torch.manual_seed(0)
    s, t = torch.randn(2, 6, 5)
    with torch.inference_mode():
        frozen = t.clone()
    run = torch.compile(module) if compiled else module
    gradients = []
    for teacher in (frozen, t):
        student = s.clone().requires_grad_()
        run(student, teacher, labels).backward()
        gradients.append(student.grad)
    assert torch.equal(*gradients)
    if labels is not None:
        module.advance()
        assert math.isclose(float(module.prior.sum()), 5.0, rel_tol=1e-5)


def test_dynamic_hyper_parameter_of_a_compiled_loss(torch, execution):
    """As in a warm-up: the weight is a Python float that changes, and is 0 once."""
    s, t = torch.tensor([[0.0, -INF, 1.0], [1.0, 2.0, 0.5]]), torch.tensor([[0.0, 0.5, 1.0], [0.0, -3.0, 1.0]])

    def run(s, t, weight):
        return gklx.ikl(s, t, mse_weight=weight, reduction="sum")

    compiled = torch.compile(run, dynamic=True)
    for weight in (0.5, 0.25, 0.0, 0.75):
        results = []
        for each in (run, compiled):
            student, teacher = s.clone().requires_grad_(), t.clone().requires_grad_()
            value = each(student, teacher, weight)
            value.backward()
            results.append((value.detach(), student.grad, teacher.grad))
        for x, y in zip(*results, strict=True):
            torch.testing.assert_close(x, y)
