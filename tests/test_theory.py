"""The identities of docs/theory.md, each by its number there: symbolically for few classes, numerically in float64.

One side of an identity is computed by the package's public functions where it can be, the other by its formula.
"""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import backends
import gklx
import oracle

pytestmark = pytest.mark.evidence

PAGE = Path(__file__).parents[1] / "docs" / "theory.md"
BATCH, CLASSES = 4, 5


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def entropy(p):
    return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(axis=-1)


def mean_under(w, x):
    return (w * x).sum(axis=-1, keepdims=True) / w.sum(axis=-1, keepdims=True)


def variance_under(w, x):
    return mean_under(w, (x - mean_under(w, x)) ** 2)[..., 0]


def curvature(w):
    """The page's F_w = diag(w) − w wᵀ / W."""
    return np.diag(w) - np.outer(w, w) / w.sum()


def jacobian(f, x, step=1e-5):
    """By central differences; rows are the entries of f, columns those of x."""
    columns = [(f(x + step * e) - f(x - step * e)) / (2 * step) for e in np.eye(x.size)]
    return np.stack(columns, axis=-1)


def near(actual, expected, *, rtol=0.0, atol=0.0):
    np.testing.assert_allclose(np.asarray(actual, dtype="float64"), np.asarray(expected), rtol=rtol, atol=atol)


def sample_gradient(loss, s, t, *, argnum, **settings):
    """The gradient of a single sample."""
    return gklx.grad(partial(loss, **settings), argnum)(s[None], t[None])[0]


def given_weights(w, **settings):
    """GKL's wMSE alone, with the given weights, without the batch normaliser."""
    return partial(gklx.gkl, prior=w[None], ce_weight=0.0, normalize="samples", **settings)


@pytest.fixture
def draw():
    return np.random.default_rng(20260806)


@pytest.fixture
def logits(draw):
    return 3 * draw.standard_normal((2, BATCH, CLASSES))


def symbols_of(sympy, classes):
    s, t = sympy.symbols(f"s:{classes}", real=True), sympy.symbols(f"t:{classes}", real=True)
    temperature = sympy.Symbol("T", positive=True)

    def probabilities(x):
        total = sum(sympy.exp(each / temperature) for each in x)
        return [sympy.exp(each / temperature) / total for each in x]

    return s, t, temperature, probabilities(t), probabilities(s)


def symbolic_log_ratio(sympy, s, t, temperature):
    """log p − log q, with the logarithms of the softmax already taken apart."""

    def log_normalizer(x):
        return sympy.log(sum(sympy.exp(each / temperature) for each in x))

    shift = log_normalizer(s) - log_normalizer(t)
    return [(each_t - each_s) / temperature + shift for each_s, each_t in zip(s, t, strict=True)]


# --- the theorem ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_kl_gradients_symbolically(classes):
    sympy = pytest.importorskip("sympy")
    s, t, temperature, p, q = symbols_of(sympy, classes)
    r = symbolic_log_ratio(sympy, s, t, temperature)
    kl = sum(a * b for a, b in zip(p, r, strict=True))
    for j in range(classes):
        assert sympy.simplify(sympy.diff(kl, s[j]) - (q[j] - p[j]) / temperature) == 0
        assert sympy.simplify(sympy.diff(kl, t[j]) - p[j] * (r[j] - kl) / temperature) == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_gradients_of_the_package(logits, temperature):
    s, t = logits
    p, q = softmax(t / temperature), softmax(s / temperature)
    r = np.log(p) - np.log(q)
    to_s, to_t = gklx.grad(gklx.kl, (0, 1))(s, t, temperature=temperature)
    near(to_s, (q - p) / (temperature * BATCH), atol=1e-15)
    near(to_t, p * (r - (p * r).sum(axis=-1, keepdims=True)) / (temperature * BATCH), atol=1e-13)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_log_ratio_minus_kl_is_the_centred_difference(logits, temperature):
    s, t = logits
    p = softmax(t / temperature)
    r = np.log(p) - np.log(softmax(s / temperature))
    kl = gklx.kl(s, t, temperature=temperature, reduction="none")
    d = t - s
    near(r - kl[:, None], (d - mean_under(p, d)) / temperature, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("mask", ["none", "where", "teacher", "both"])
def test_kl_and_dkl_have_equal_gradients(logits, mask, temperature):
    s, t = logits.copy()
    masks, inside = {}, np.ones(t.shape, dtype=bool)
    inside[:, 1] = mask == "none"
    if mask == "where":
        masks["where"] = inside
    if mask in ("teacher", "both"):
        t[:, 1] = -np.inf
    if mask == "both":
        s[:, 1] = -np.inf
    p = np.where(inside, softmax(np.where(inside, t, -np.inf) / temperature), 0)
    q = softmax(np.where(inside | (mask == "teacher"), s, -np.inf) / temperature)
    d = np.where(inside, np.where(inside, t, 0) - np.where(inside, s, 0), 0)
    to_s, to_t = (q - p) / temperature / BATCH, p * (d - mean_under(p, d)) / temperature**2 / BATCH
    for name in ("kl", "dkl"):
        _, oracle_s, oracle_t = oracle.evaluate(name, s, t, temperature=temperature, **masks)
        package_s, package_t = gklx.grad(getattr(gklx, name), (0, 1))(s, t, temperature=temperature, **masks)
        for found_s, found_t in ((oracle_s, oracle_t), (package_s, package_t)):
            near(found_s, to_s, atol=1e-14)
            near(found_t, to_t, atol=1e-13)
    outside = ~inside & (mask != "none")
    assert not package_t[outside].any()
    if mask in ("where", "both"):
        assert not package_s[outside].any()


def test_loss_weights_scale_the_gradients_of_dkl(logits):
    s, t = logits
    kl_s, kl_t = gklx.grad(gklx.kl, (0, 1))(s, t, temperature=2.0)
    dkl_s, dkl_t = gklx.grad(gklx.dkl, (0, 1))(s, t, temperature=2.0, mse_weight=20.0, ce_weight=4.0)
    near(dkl_s, 4 * kl_s, atol=1e-14)
    near(dkl_t, 20 * kl_t, atol=1e-13)


def test_kl_and_dkl_have_the_same_trajectory(draw):
    """A linear network that is student and teacher at once; DKL by its definition, KL by the package."""
    clean, noisy = draw.standard_normal((2, 12, 3))
    start = draw.standard_normal((3, CLASSES))

    def gradient(name, theta):
        s, t = noisy @ theta, clean @ theta
        if name == "kl":
            to_s, to_t = gklx.grad(gklx.kl, (0, 1))(s, t)
        else:
            _, to_s, to_t = oracle.evaluate("dkl", s, t)
        return noisy.T @ to_s.astype("float64") + clean.T @ to_t.astype("float64")

    def momentum(gradients, theta):
        velocity = np.zeros_like(theta)
        for _ in range(40):
            velocity = 0.9 * velocity + gradients(theta) + 0.01 * theta
            theta = theta - 0.1 * velocity
            yield theta

    def adam(gradients, theta):
        first, second = np.zeros_like(theta), np.zeros_like(theta)
        for step in range(1, 41):
            g = gradients(theta)
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
            theta = theta - 0.01 * first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
            yield theta

    for optimizer in (momentum, adam):
        of_kl, of_dkl = (list(optimizer(partial(gradient, name), start)) for name in ("kl", "dkl"))
        near(of_dkl, of_kl, atol=1e-12)
        assert np.abs(of_kl[-1] - start).max() > 0.1


def kl_hessian(s, t, temperature):
    """The blocks (ss, st, ts, tt) of the page."""
    p, q = softmax(t / temperature), softmax(s / temperature)
    d = t - s
    e = (d - mean_under(p, d)) / temperature
    moved = np.diag(p * e) - np.outer(p * e, p) - np.outer(p, p * e)
    blocks = (curvature(q), -curvature(p), -curvature(p), curvature(p) + moved)
    return [block / temperature**2 for block in blocks]


@pytest.mark.parametrize("loss", [gklx.kl, gklx.dkl], ids=["kl", "dkl"])
def test_jacobian_of_the_gradient_field_is_kls_hessian(logits, loss):
    (s, *_), (t, *_) = logits
    of = partial(sample_gradient, partial(loss, temperature=2.0))
    found = [
        jacobian(lambda x: of(x, t, argnum=0), s),
        jacobian(lambda x: of(s, x, argnum=0), t),
        jacobian(lambda x: of(x, t, argnum=1), s),
        jacobian(lambda x: of(s, x, argnum=1), t),
    ]
    for block, expected in zip(found, kl_hessian(s, t, 2.0), strict=True):
        near(block, expected, atol=1e-9)


def test_automatic_second_derivative_of_dkl_is_kls_hessian(logits):
    backends.needs("torch")
    import torch

    (s, *_), (t, *_) = logits
    found = torch.func.hessian(partial(gklx.dkl, temperature=2.0), (0, 1))(torch.tensor(s), torch.tensor(t))
    for block, expected in zip((*found[0], *found[1]), kl_hessian(s, t, 2.0), strict=True):
        near(block, expected, atol=1e-13)


def test_second_derivative_of_a_detached_expression(logits):
    backends.needs("torch")
    import torch

    (s, *_), (t, *_) = logits

    def stopped(s, t):
        p = torch.softmax(t / 2, -1).detach()
        d = (t - s.detach()) / 2
        mse = 0.25 * (p[:, None] * p * (d[:, None] - d) ** 2).sum()
        return mse - (p * torch.log_softmax(s / 2, -1)).sum()

    found = torch.func.hessian(stopped, (0, 1))(torch.tensor(s), torch.tensor(t))
    zero = np.zeros((CLASSES, CLASSES))
    expected = (curvature(softmax(s / 2)) / 4, zero, zero, curvature(softmax(t / 2)) / 4)
    for block, formula in zip((*found[0], *found[1]), expected, strict=True):
        near(block, formula, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_dkl_exceeds_kl_by_the_entropy_and_half_the_variance(logits, temperature):
    s, t = logits
    p = softmax(t / temperature)
    dkl, kl = (loss(s, t, temperature=temperature, reduction="none") for loss in (gklx.dkl, gklx.kl))
    near(dkl - kl, entropy(p) + variance_under(p, (t - s) / temperature) / 2, rtol=1e-12)


def test_kl_is_a_cumulant_generating_function(logits):
    s, t = logits
    p, d = softmax(t / 2), (t - s) / 2
    near(
        gklx.kl(s, t, temperature=2.0, reduction="none"),
        np.log(mean_under(p, np.exp(mean_under(p, d) - d)))[:, 0],
        atol=1e-13,
    )
    direction = d[0] - mean_under(p[0], d[0])
    kappa = [mean_under(p[0], direction**n)[0] for n in (2, 3, 4)]
    kappa[2] -= 3 * kappa[0] ** 2
    remainders = []
    for size in (0.02, 0.01):
        kl = gklx.kl(t[:1] - 2 * size * direction, t[:1], temperature=2.0)
        remainders.append(kl - size**2 * kappa[0] / 2 + size**3 * kappa[1] / 6 - size**4 * kappa[2] / 24)
    assert 28 < remainders[0] / remainders[1] < 36  # of the fifth order: halving divides by about 32


def test_excess_of_dkl_is_twice_kl(logits):
    (_, *_), (t, *_) = logits
    direction = logits[0, 1]
    ratios = []
    for size in (1e-2, 1e-3):
        s = t - size * direction
        excess = gklx.dkl(s[None], t[None]) - entropy(softmax(t))
        ratios.append(excess / gklx.kl(s[None], t[None]) - 2)
    near(ratios, [0, 0], atol=0.05)
    assert 9 < ratios[0] / ratios[1] < 11  # the first order in the distance


def test_unequal_loss_weights_have_no_potential(draw, logits):
    (s, *_), (t, *_) = logits
    parts = {"mse_weight": 3.0, "ce_weight": 0.5, "temperature": 2.0}
    fisher, given = curvature(softmax(t / 2)) / 4, draw.uniform(0.1, 2, (1, CLASSES))

    def asymmetry(loss, s):
        of = partial(sample_gradient, loss, **parts)
        return jacobian(lambda x: of(s, x, argnum=0), t) - jacobian(lambda x: of(x, t, argnum=1), s).T

    near(asymmetry(gklx.dkl, s), (3.0 - 0.5) * fisher, atol=1e-9)
    near(asymmetry(partial(gklx.gkl, prior=given, gamma=0.3), s), -0.5 * fisher, atol=1e-9)
    for loss in (gklx.ikl, partial(gklx.gkl, gamma=0.3)):
        near(asymmetry(loss, t), -0.5 * fisher, atol=1e-9)
        assert np.abs(asymmetry(loss, s) + 0.5 * fisher).max() > 1e-3


# --- the weighted mean-square error -----------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_wmse_over_pairs_equals_its_closed_form(draw, classes):
    sympy = pytest.importorskip("sympy")
    w, d = sympy.symbols(f"w:{classes}", positive=True), sympy.symbols(f"d:{classes}", real=True)
    mass = sum(w)
    mu = sum(a * b for a, b in zip(w, d, strict=True)) / mass
    each = range(classes)
    pairs = sum(w[j] * w[k] * (d[j] - d[k]) ** 2 for j in each for k in each) / 4
    centred = mass * sum(w[j] * (d[j] - mu) ** 2 for j in each) / 2
    expanded = (mass * sum(w[j] * d[j] ** 2 for j in each) - (mu * mass) ** 2) / 2
    assert sympy.simplify(pairs - centred) == 0
    assert sympy.simplify(pairs - expanded) == 0
    numbers, s, t = draw.uniform(0.1, 2, classes), *draw.standard_normal((2, classes))
    value = pairs.subs(dict(zip((*w, *d), (*numbers, *(t - s)), strict=True)))
    near(given_weights(numbers)(s[None], t[None]), float(value), rtol=1e-13)


def test_wrong_centre_adds_its_squared_error(draw):
    w, d = draw.uniform(0.1, 2, CLASSES), draw.standard_normal(CLASSES)
    mu = mean_under(w, d)
    for m in (mu + 0.3, mu - 2.0):
        near((w * (d - m) ** 2).sum(), (w * (d - mu) ** 2).sum() + w.sum() * (m - mu) ** 2, rtol=1e-14)


def test_expanded_variance_cancels_in_float32(draw):
    """The weights are given, so that no softmax adds rounding errors."""
    w = draw.uniform(0.1, 2, CLASSES).astype("float32")
    unit = 2.0**-24
    for offset in (1e2, 1e3):
        # Multiples of 2⁻¹⁰: the differences are exact, and what is measured is the sums' rounding alone.
        d = (np.rint((offset + draw.standard_normal(CLASSES)) * 1024) / 1024).astype("float32")
        wide_w, wide_d = w.astype("float64"), d.astype("float64")
        variance = variance_under(wide_w, wide_d)
        exact = wide_w.sum() ** 2 * variance / 2
        expanded = wide_w.sum() * (wide_w * wide_d**2).sum() / 2
        condition = 1 + mean_under(wide_w, wide_d)[0] ** 2 / variance
        near(expanded / exact, condition, rtol=1e-9)
        in_single = 0.5 * (w.sum() * (w * d**2).sum() - (w * d).sum() ** 2)
        lost = abs(float(in_single) / exact - 1)
        assert 0.02 * condition * unit < lost < (2 * CLASSES + 6) * condition * unit
        ours = given_weights(w)(np.zeros((1, CLASSES), dtype="float32"), d[None])
        assert abs(float(ours) / exact - 1) < (2 * CLASSES + 6) * unit


# --- the gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_gradients_of_ce_and_wmse_symbolically(classes):
    """CE is differentiated with p constant, and the wMSE with w constant."""
    sympy = pytest.importorskip("sympy")
    s, t, temperature, _, q = symbols_of(sympy, classes)
    p, w = sympy.symbols(f"p:{classes}", positive=True), sympy.symbols(f"w:{classes}", positive=True)
    log_normalizer = sympy.log(sum(sympy.exp(each / temperature) for each in s))
    ce = -sum(p[j] * (s[j] / temperature - log_normalizer) for j in range(classes))
    d = [b - a for a, b in zip(s, t, strict=True)]
    mass = sum(w)
    mu = sum(a * b for a, b in zip(w, d, strict=True)) / mass
    wmse = mass * sum(w[j] * (d[j] - mu) ** 2 for j in range(classes)) / 2
    for j in range(classes):
        assert sympy.simplify(sympy.diff(ce, s[j]) - (sum(p) * q[j] - p[j]) / temperature) == 0
        assert sympy.simplify(sympy.diff(wmse, t[j]) - mass * w[j] * (d[j] - mu)) == 0
        assert sympy.simplify(sympy.diff(wmse, s[j]) + mass * w[j] * (d[j] - mu)) == 0


def test_gradients_of_the_four_losses(draw, logits):
    s, t = logits
    v, prior, labels = draw.uniform(0.5, 2, BATCH), softmax(draw.standard_normal((CLASSES, CLASSES))), np.arange(BATCH)
    common = {"temperature": 2.0, "sample_weight": v}
    parts = {"mse_weight": 3.0, "ce_weight": 0.5}
    share = (v / v.sum())[:, None]
    d = t - s
    p, q = softmax(t / 2), softmax(s / 2)
    ce = share * (q - p) / 2
    of_p = share * p * (d - mean_under(p, d)) / 4

    def wmse(w, normalizer):
        return v[:, None] * w.sum(axis=-1, keepdims=True) * w * (d - mean_under(w, d)) / normalizer

    w = prior[labels] ** 0.4
    of_prior, of_gamma = wmse(prior[labels], v.sum()), wmse(w, (v * w.sum(axis=-1) ** 2).sum())
    prior = {"prior": prior, "labels": labels}
    expected = {
        partial(gklx.kl, **common): (ce, of_p),
        partial(gklx.dkl, **common, **parts): (0.5 * ce, 3 * of_p),
        partial(gklx.ikl, **common, **parts, **prior): (0.5 * ce - 3 * of_prior, 3 * of_prior),
        partial(gklx.gkl, **common, **parts, **prior, gamma=0.4): (0.5 * ce - 3 * of_gamma, 3 * of_gamma),
    }
    for loss, (to_s, to_t) in expected.items():
        found_s, found_t = gklx.grad(loss, (0, 1))(s, t)
        near(found_s, to_s, atol=1e-14)
        near(found_t, to_t, atol=1e-14)


def test_weights_and_normalizer_are_constants(logits):
    s, t = logits
    settings = {"gamma": 0.3, "mse_weight": 2.0}
    frozen = partial(gklx.gkl, prior=softmax(t / 4), **settings)
    own = gklx.grad(partial(gklx.gkl, weight_temperature=4.0, **settings), (0, 1))(s, t)
    for found, expected in zip(own, gklx.grad(frozen, (0, 1))(s, t), strict=True):
        near(found, expected, atol=1e-15)
    # With the weights held and no CE the gradient to the teacher is the value's own.
    flat = jacobian(lambda x: np.asarray(frozen(s, x.reshape(t.shape), ce_weight=0.0)), t.ravel())
    near(own[1], flat.reshape(t.shape), atol=1e-9)


def test_gradient_rows_sum_to_zero(logits):
    s, t = logits
    for loss in (gklx.kl, gklx.dkl, gklx.ikl, partial(gklx.gkl, gamma=0.3)):
        for gradient in gklx.grad(loss, (0, 1))(s, t):
            near(gradient.sum(axis=-1), np.zeros(BATCH), atol=1e-15)
        near(loss(s + 7.0, t - 5.0), loss(s, t), rtol=1e-13)


# --- the asymmetry ----------------------------------------------------------------------------------------------------


def test_student_gradients_with_a_frozen_teacher(logits):
    s, t = logits
    p, q = softmax(t), softmax(s)
    for mse_weight in (0.0, 1.0, 20.0):
        near(gklx.grad(gklx.dkl)(s, t, mse_weight=mse_weight, ce_weight=4.0), 4 * (q - p) / BATCH, atol=1e-15)
        w, d = p**0.5, t - s
        mass = w.sum(axis=-1, keepdims=True)
        wmse = mass * w * (d - mean_under(w, d)) / (mass**2).sum()
        found = gklx.grad(gklx.gkl)(s, t, mse_weight=mse_weight, ce_weight=4.0, gamma=0.5)
        near(found, 4 * (q - p) / BATCH - mse_weight * wmse, atol=1e-14)


def test_student_gradients_near_the_teacher(draw, logits):
    (_, *_), (t, *_) = logits
    direction, w = draw.standard_normal(CLASSES), draw.uniform(0.1, 2, CLASSES)
    left = []
    for size in (1e-2, 1e-3):
        s = t + size * direction
        ce = sample_gradient(gklx.kl, s, t, argnum=0, temperature=2.0)
        left.append(np.abs(ce - size * curvature(softmax(t / 2)) @ direction / 4).max())
        near(sample_gradient(given_weights(w), s, t, argnum=0), w.sum() * curvature(w) @ (size * direction), atol=1e-14)
    assert 80 < left[0] / left[1] < 120  # of the second order


def test_gradients_of_ce_and_wmse_are_parallel_at_gamma_one(draw, logits):
    (_, *_), (t, *_) = logits
    near(curvature(softmax(t / 2)), np.diag(softmax(t / 2)) - np.outer(softmax(t / 2), softmax(t / 2)), atol=1e-15)

    def gradients(t, direction, gamma):
        s = t + 1e-6 * direction
        settings = {"ce_weight": 0.0, "normalize": "samples", "gamma": gamma, "weight_temperature": 2.0}
        ce, mse = (
            sample_gradient(gklx.kl, s, t, argnum=0, temperature=2.0),
            sample_gradient(gklx.gkl, s, t, argnum=0, **settings),
        )
        return ce, mse, ce @ mse / np.linalg.norm(ce) / np.linalg.norm(mse)

    direction = draw.standard_normal(CLASSES)
    ce, mse, cosine = gradients(t, direction, 1.0)
    near(mse, 4 * ce, atol=1e-5 * np.abs(mse).max())
    near(cosine, 1, atol=1e-9)
    for gamma in (0.0, 0.5):
        assert gradients(t, direction, gamma)[2] < 0.99
        near(gradients(t[:2], direction[:2], gamma)[2], 1, atol=1e-9)  # two classes: always parallel
        near(gradients(np.zeros(CLASSES), direction, gamma)[2], 1, atol=1e-9)  # a uniform teacher


def confident(share, epsilon, temperature):
    """A teacher's logits with probability ε·share on all classes but the first."""
    return temperature * np.log(np.concatenate(([1 - epsilon], epsilon * share)))


@pytest.mark.parametrize("gamma", [0.25, 0.5, 1.0])
def test_student_gradients_with_a_confident_teacher(draw, gamma):
    share, delta = softmax(draw.standard_normal(CLASSES - 1)), draw.standard_normal(CLASSES)
    gap = (delta - delta[0])[1:]
    settings = {"ce_weight": 0.0, "normalize": "samples", "gamma": gamma, "weight_temperature": 2.0}
    ce_left, mse_left = [], []
    for epsilon in (1e-8, 1e-12):
        t = confident(share, epsilon, 2.0)
        ce = 2 * sample_gradient(gklx.kl, t + delta, t, argnum=0, temperature=2.0)[1:]
        mse = sample_gradient(gklx.gkl, t + delta, t, argnum=0, **settings)[1:]
        ce_left.append(np.abs(ce / epsilon / (share * np.expm1(gap / 2)) - 1).max() / epsilon)
        mse_left.append(np.abs(mse / epsilon**gamma / (share**gamma * gap) - 1).max() / epsilon**gamma)
    # Off by O(ε) and O(ε^γ), relative; float64 allows 1e-15 besides, 1e-3 in units of the smallest ε.
    assert max(ce_left[0], mse_left[0]) < 50
    assert mse_left[1] < (50 if gamma < 1 else 1e4)


def test_wmse_with_a_confident_teacher_and_equal_weights(draw):
    t, delta = confident(softmax(draw.standard_normal(CLASSES - 1)), 1e-9, 1.0), draw.standard_normal(CLASSES)
    settings = {"ce_weight": 0.0, "gamma": 0.0}
    found = sample_gradient(gklx.gkl, t + delta, t, argnum=0, normalize="samples", **settings)
    near(found, CLASSES * (delta - delta.mean()), atol=1e-13)
    near(sample_gradient(gklx.gkl, t + delta, t, argnum=0, **settings), (delta - delta.mean()) / CLASSES, atol=1e-14)


@pytest.mark.parametrize("gamma", [0.25, 0.5, 1.0])
def test_gradients_of_a_wrong_student_with_a_confident_teacher(draw, gamma):
    share, s = softmax(draw.standard_normal(CLASSES - 1)), draw.standard_normal(CLASSES)
    settings = {"ce_weight": 0.0, "normalize": "samples", "gamma": gamma, "weight_temperature": 2.0}
    left = []
    for epsilon in (1e-4, 1e-8):
        t = confident(share, epsilon, 2.0)
        near(
            2 * sample_gradient(gklx.kl, s, t, argnum=0, temperature=2.0),
            softmax(s / 2) - np.eye(CLASSES)[0],
            atol=2 * epsilon,
        )
        leading = 2 * np.log(1 / epsilon) - 2 * np.log(share) + s[1:] - s[0]
        found = sample_gradient(gklx.gkl, s, t, argnum=0, **settings)[1:]
        off = np.abs(found - epsilon**gamma * share**gamma * leading).max()
        left.append(off / (epsilon ** (2 * gamma) * np.log(1 / epsilon)))
    assert max(left) < 20


def test_hessians_of_ce_and_wmse_to_the_student(draw, logits):
    (s, *_), (t, *_) = logits
    w = draw.uniform(0.1, 2, CLASSES)
    ce = partial(gklx.dkl, mse_weight=0.0, temperature=2.0)
    near(jacobian(lambda x: sample_gradient(ce, x, t, argnum=0), s), curvature(softmax(s / 2)) / 4, atol=1e-9)
    near(jacobian(lambda x: sample_gradient(ce, x, t, argnum=0), t + 3.0), curvature(softmax(t / 2)) / 4, atol=1e-9)
    near(jacobian(lambda x: sample_gradient(given_weights(w), x, t, argnum=0), s), w.sum() * curvature(w), atol=1e-8)


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_quadratic_form_of_the_curvature_is_the_variance(draw, classes):
    sympy = pytest.importorskip("sympy")
    w, x = sympy.Matrix(sympy.symbols(f"w:{classes}", positive=True)), sympy.Matrix(sympy.symbols(f"x:{classes}"))
    mass = sum(w)
    matrix = sympy.diag(*w) - w * w.T / mass
    mean = (w.T * x)[0] / mass
    spread = sum(w[j] * (x[j] - mean) ** 2 for j in range(classes))
    assert sympy.simplify((x.T * matrix * x)[0] - spread) == 0
    assert sympy.simplify(matrix * sympy.ones(classes, 1)) == sympy.zeros(classes, 1)


def test_gradient_vanishes_at_the_teacher_up_to_a_constant(logits):
    s, t = logits
    for loss in (gklx.kl, gklx.dkl, gklx.ikl, partial(gklx.gkl, gamma=0.3)):
        near(gklx.grad(loss)(t + 3.0, t), np.zeros(t.shape), atol=1e-15)
        assert (np.abs(gklx.grad(loss)(s, t)).max(axis=-1) > 1e-4).all()


def spectrum(w):
    """The eigenvalues of F_w but the one of the constant vector, which is 0; ascending."""
    return np.linalg.eigvalsh(curvature(w))[1:]


def test_eigenvalues_of_the_curvature_interlace_with_the_weights(draw):
    for _ in range(200):
        w = np.sort(np.exp(draw.uniform(0.2, 4) * draw.standard_normal(draw.integers(2, 8))))
        found, slack = spectrum(w), 1e-13 * w.max()
        assert (found >= w[:-1] - slack).all()
        assert (found <= w[1:] + slack).all()


@pytest.mark.parametrize("gamma", [0.2, 0.5, 1.0])
def test_condition_number_is_bounded_by_the_ratio_of_weights(draw, gamma):
    for _ in range(100):
        t = draw.uniform(0.2, 3) * draw.standard_normal(CLASSES)
        w = np.sort(softmax(t / 2) ** gamma)
        eigenvalues = np.linalg.eigvalsh(
            jacobian(
                lambda x, w=w: sample_gradient(given_weights(w), x, np.zeros(CLASSES), argnum=0),
                np.zeros(CLASSES),
                step=1.0,
            )
        )[1:]
        condition = eigenvalues[-1] / eigenvalues[0]
        near(w[-1] / w[0], np.exp(gamma * np.ptp(t) / 2), rtol=1e-12)
        assert w[-2] / w[1] * (1 - 1e-9) <= condition <= w[-1] / w[0] * (1 + 1e-9)


def test_equal_weights_are_perfectly_conditioned(logits):
    (_, *_), (t, *_) = logits
    settings = {"ce_weight": 0.0, "gamma": 0.0}
    found = jacobian(lambda x: sample_gradient(gklx.gkl, x, t, argnum=0, **settings), t, step=1.0)
    near(found, (np.eye(CLASSES) - 1 / CLASSES) / CLASSES, atol=1e-14)
    found = jacobian(lambda x: sample_gradient(gklx.gkl, x, t, argnum=0, normalize="samples", **settings), t, step=1.0)
    near(found, CLASSES * np.eye(CLASSES) - 1, atol=1e-13)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_eigenvalues_of_the_sum_are_bounded(logits, gamma):
    (_, *_), (t, *_) = logits
    settings = {"mse_weight": 3.0, "ce_weight": 0.5, "temperature": 2.0, "gamma": gamma}
    found = np.linalg.eigvalsh(jacobian(lambda x: sample_gradient(gklx.gkl, x, t, argnum=0, **settings), t))[1:]
    p, w = np.sort(softmax(t / 2)), np.sort(softmax(t) ** gamma)
    assert 0.5 * p[0] / 4 + 3.0 * w[0] / w.sum() - 1e-9 <= found[0]
    assert found[-1] <= 0.5 * p[-1] / 4 + 3.0 * w[-1] / w.sum() + 1e-9
    if gamma == 0:
        near(found, 0.5 * spectrum(p) / 4 + 3.0 / CLASSES, atol=1e-9)


# --- the weight function ----------------------------------------------------------------------------------------------


def test_largest_share_of_a_class_grows_with_gamma(logits):
    p, gamma, step = softmax(logits[1]), 0.4, 1e-5

    def log_share(gamma):
        return np.log(p**gamma / (p**gamma).sum(axis=-1, keepdims=True))

    rate = (log_share(gamma + step) - log_share(gamma - step)) / (2 * step)
    near(rate, np.log(p) - mean_under(p**gamma, np.log(p)), atol=1e-9)
    assert (rate.max(axis=-1) >= 0).all()
    shares = np.exp([log_share(gamma).max(axis=-1) for gamma in np.linspace(0, 2, 21)])
    assert (np.diff(shares, axis=0) > 0).all()


def test_entropy_of_the_weights_falls_with_gamma(logits):
    p, gamma, step = softmax(logits[1]), 0.4, 1e-5

    def of(gamma):
        return entropy(p**gamma / (p**gamma).sum(axis=-1, keepdims=True))

    near((of(gamma + step) - of(gamma - step)) / (2 * step), -gamma * variance_under(p**gamma, np.log(p)), atol=1e-8)
    assert (np.diff([of(gamma) for gamma in np.linspace(0, 2, 21)], axis=0) < 0).all()


def test_total_weight_falls_with_gamma(logits):
    p = softmax(logits[1])
    near((p**0.0).sum(axis=-1), np.full(BATCH, CLASSES))
    near(p.sum(axis=-1), np.ones(BATCH), rtol=1e-15)
    totals = np.asarray([(p**gamma).sum(axis=-1) for gamma in np.linspace(0, 1, 11)])
    assert (np.diff(totals, axis=0) < 0).all()
    assert (totals <= CLASSES ** (1 - np.linspace(0, 1, 11))[:, None] * (1 + 1e-14)).all()
    # A class without probability weighs as much as any other at γ = 0, and nothing at any other γ.
    s, t = np.asarray([[0.5, 0.0, 1.0]]), np.zeros((1, 3))
    peaked = np.asarray([[1.0, 0.0, 0.0]])
    near(gklx.gkl(s, t, prior=peaked, gamma=0.0, ce_weight=0.0), variance_under(np.ones(3), s)[0] / 2, rtol=1e-14)
    near(gklx.gkl(s, t, prior=peaked, gamma=0.1, ce_weight=0.0), 0, atol=1e-30)


def test_gamma_is_a_temperature(logits):
    s, t = logits
    p = softmax(t / 3)
    near(p**0.25 / (p**0.25).sum(axis=-1, keepdims=True), softmax(0.25 * t / 3), atol=1e-15)
    for i in range(BATCH):  # one sample at a time: the batch normaliser then leaves W out altogether
        settings = {"ce_weight": 0.0, "weight_temperature": 3.0}
        soft = gklx.gkl(s[i : i + 1], t[i : i + 1], gamma=0.25, **settings)
        hot = gklx.gkl(s[i : i + 1], t[i : i + 1], ce_weight=0.0, gamma=1.0, weight_temperature=12.0)
        near(soft, hot, rtol=1e-12)


def test_batch_normalizer_divides_by_the_squared_total_weights(logits):
    s, t = logits
    w = softmax(t) ** 0.3
    mass, variance = w.sum(axis=-1), variance_under(w, t - s)
    of = partial(gklx.gkl, gamma=0.3, ce_weight=0.0)
    near(of(s, t, normalize="samples", reduction="none"), mass**2 * variance / 2, rtol=1e-12)
    near(of(s, t), (mass**2 * variance / 2).sum() / (mass**2).sum(), rtol=1e-12)


# --- the class prior --------------------------------------------------------------------------------------------------


def simulated(draw, size, between, noise, shrinkage):
    """Errors of (1 − λ) p_i + λ m̂ for the first sample of each of many classes of n samples."""
    trials = 200_000
    wanted = 0.3 + between * draw.standard_normal((trials, size))
    seen = wanted + noise * draw.standard_normal((trials, size))
    estimate = (1 - shrinkage) * seen[:, 0] + shrinkage * seen.mean(axis=1)
    return (estimate - wanted[:, 0]) ** 2


@pytest.mark.parametrize("shrinkage", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("between", "noise"), [(0.5, 1.0), (1.0, 0.5)])
def test_mean_square_error_of_the_class_mean(draw, between, noise, shrinkage):
    size = 5
    errors = simulated(draw, size, between, noise, shrinkage)
    mixed = (1 - shrinkage) ** 2 * noise**2 + shrinkage**2 * between**2
    expected = noise**2 / size + (1 - 1 / size) * mixed
    deviations = abs(errors.mean() - expected) / (errors.std() / np.sqrt(errors.size))
    assert deviations < 4


def test_best_shrinkage():
    sympy = pytest.importorskip("sympy")
    between, noise, size = sympy.symbols("B V n", positive=True)
    shrinkage = sympy.Symbol("lambda", real=True)
    error = noise / size + (1 - 1 / size) * ((1 - shrinkage) ** 2 * noise + shrinkage**2 * between)
    (best,) = sympy.solve(sympy.diff(error, shrinkage), shrinkage)
    assert sympy.simplify(best - noise / (noise + between)) == 0
    gain = error.subs(shrinkage, 0) - error.subs(shrinkage, 1)
    assert sympy.simplify(gain - (1 - 1 / size) * (noise - between)) == 0
    # The bracket itself, from the two independent errors and their weights in the estimate.
    own = (1 - shrinkage) + shrinkage / size
    noises = own**2 * noise + (size - 1) * (shrinkage / size) ** 2 * noise
    variations = shrinkage**2 * ((1 - 1 / size) ** 2 + (size - 1) / size**2) * between
    assert sympy.simplify(noises + variations - error) == 0


@pytest.mark.parametrize("gamma", [0.2, 0.5, 1.0])
def test_power_of_the_class_mean_exceeds_the_mean_power(draw, gamma):
    t = 3 * draw.standard_normal((50, CLASSES))
    labels = np.zeros(50, dtype="int64")
    prior = gklx.ClassPrior(CLASSES)
    prior.update(t, labels)
    prior.advance()
    mean, p = prior.table[0], softmax(t)
    near(mean, p.mean(axis=0), rtol=1e-6)
    assert (mean**gamma >= (p**gamma).mean(axis=0) * (1 - 1e-6)).all()
    assert entropy(mean) > entropy(p).mean()


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_mistaken_sample_gives_its_class_weight(gamma):
    n = 8
    t = np.full((n, 3), -1e3)
    t[:-1, 0], t[-1, 1] = 0.0, 0.0  # the last of class 0 is taken for class 1
    sums = gklx.class_sums(t, np.zeros(n, dtype="int64"), 3)
    weights = (sums / n)[0] ** gamma
    near(weights, [(1 - 1 / n) ** gamma, n**-gamma, 0], rtol=1e-12)
    s = np.asarray([[0.0, 2.0, 0.0]])
    own = gklx.grad(partial(gklx.gkl, gamma=gamma, ce_weight=0.0))(s, t[-1:])
    near(own, np.zeros((1, 3)), atol=1e-12)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_every_identity_of_the_page_names_its_tests():
    """Every identity has a number and tests that exist; every test of this file but this one stands on the page."""
    text = PAGE.read_text(encoding="utf-8")
    displayed = re.findall(r"^\$\$\n(.*?)^\$\$$\n(.*?)(?=\n\n)", text, re.DOTALL | re.MULTILINE)
    assert len(displayed) == text.count("$$") // 2
    numbers, named_here = [], set()
    for formula, below in displayed:
        (number,) = re.findall(r"\\tag\{T(\d+)\}", formula)
        numbers.append(int(number))
        assert r"\\" not in formula, rf"T{number}: Sphinx puts \\ into `split`, which takes no number; use \cr"
        names = re.findall(r"`tests/(test_\w+\.py)::(test_\w+)`", below)
        assert names, f"T{number} names no test"
        assert below.startswith("*Test"), f"T{number}: its tests do not follow"
        for file, name in names:
            source = (Path(__file__).parent / file).read_text(encoding="utf-8")
            assert f"\ndef {name}(" in source, f"T{number} names {file}::{name}, which is not there"
            named_here |= {name} if file == "test_theory.py" else set()
    assert numbers == list(range(1, len(numbers) + 1))
    own = set(re.findall(r"^def (test_\w+)\(", Path(__file__).read_text(encoding="utf-8"), re.MULTILINE))
    assert own - {"test_every_identity_of_the_page_names_its_tests"} == named_here
