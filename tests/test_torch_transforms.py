"""PyTorch's transforms, compiler, mixed precision and layouts, each against the analytic gradient of `gklx.grad`."""

import shutil
import warnings
from functools import partial
from pathlib import Path

import pytest

import backends
import gklx
import oracle
from backends import BY_NAME
from cases import CASES, call, loss_of, on, rounded
from closeness import assert_close
from gklx import show_config
from gklx._run import blocks

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

SMALL = ("kl", "dkl-T", "ikl", "gkl", "gkl-0", "gkl-tau", "gkl-prior", "gkl-rows", "gkl-asymmetric")
SOME_CASES = pytest.mark.parametrize("case", [case for case in CASES if case.id in SMALL], ids=lambda case: case.id)
ALL_CASES = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def supports(row):
    return pytest.mark.supports(row, "PyTorch")


@pytest.fixture(autouse=True)
def _torch_seeded():
    backends.needs("torch")
    torch.manual_seed(0)


def same(actual, expected, ulps=16, dtype="float64", **more):
    assert_close(actual.detach(), expected.detach().double().numpy(), BY_NAME["torch"], dtype, ulps=ulps, **more)


def given(case, mask="none", dtype="float64", **more):
    """The loss with its keyword arrays bound, and the logits."""
    s, t, arrays = on(BY_NAME["torch"], dtype, *call(case, mask, **more))
    return partial(loss_of(case), **arrays), s, t


def directions(s):
    d = torch.linspace(-1, 1, s.numel(), dtype=s.dtype).reshape(s.shape)
    return d, (3 * d).cos()


# --- derivatives ------------------------------------------------------------------------------------------------------


@supports("second derivatives")
@ALL_CASES
def test_second_derivatives_pass_gradgradcheck(case):
    """For every loss and both arguments, reverse over reverse and forward over reverse."""
    loss, s, t = given(case, batch=(2,), classes=4)
    s, t = s.requires_grad_(), t.requires_grad_()
    assert torch.autograd.gradgradcheck(loss, (s, t), check_fwd_over_rev=True)


@supports("gradients by the library's own autodiff")
@pytest.mark.parametrize("mask", ["none", "elements", "samples"])
@pytest.mark.parametrize(
    "case", [x for x in CASES if x.loss != "dkl" and x.settings.get("symmetric", True)], ids=lambda case: case.id
)
def test_gradients_without_stopped_parts_pass_gradcheck(case, mask):
    """These are KL's, and the student's of IKL and symmetric GKL; the others have stopped parts by design."""
    loss, s, t = given(case, mask, batch=(3,), classes=4)
    s, t = torch.nan_to_num(s), torch.nan_to_num(t, posinf=0.0)  # finite differences cannot step from NaN
    s.requires_grad_()
    t.requires_grad_(case.loss == "kl")
    assert torch.autograd.gradcheck(loss, (s, t), check_forward_ad=True)


def stopped_dkl(s, t):
    """DKL written with `detach`: its first derivative is right, its second is wrong."""
    p = torch.softmax(t, -1).detach()
    d = t - s.detach()
    mse = 0.5 * (p * (d - (p * d).sum(-1, keepdim=True)) ** 2).sum(-1)
    ce = -(p * torch.log_softmax(s, -1)).sum(-1)
    return (mse + ce).mean()


@supports("second derivatives")
def test_second_derivative_of_dkl_is_right_and_that_of_a_detached_expression_wrong():
    _, s, t = given(CASES[0], batch=(2,), classes=4)

    def second(loss):
        a, b = s.clone().requires_grad_(), t.clone().requires_grad_()
        first = torch.autograd.grad(loss(a, b), (a, b), create_graph=True)
        return first, torch.autograd.grad(sum((g * d).sum() for g, d in zip(first, directions(s), strict=True)), (a, b))

    (ours, of_ours), (kl, of_kl), (stopped, of_stopped) = (second(loss) for loss in (gklx.dkl, gklx.kl, stopped_dkl))
    for i in (0, 1):
        same(stopped[i], kl[i], ulps=64)
        same(ours[i], kl[i], ulps=64)
        same(of_ours[i], of_kl[i], ulps=256)
        assert (of_stopped[i] - of_kl[i]).abs().max() > 0.1 * of_kl[i].abs().max()


@supports("gradients by the library's own autodiff")
@SOME_CASES
def test_func_grad_and_jacobians_are_the_analytic_gradient(case):
    loss, s, t = given(case, "samples")
    exact = gklx.grad(loss, (0, 1))(s, t)
    for found, expected in zip(torch.func.grad(loss, (0, 1))(s, t), exact, strict=True):
        same(found, expected)
    unreduced = partial(loss, reduction="none")
    for i in (0, 1):
        same(torch.func.jacrev(loss, i)(s, t), exact[i])
        same(torch.func.jacfwd(loss, i)(s, t), exact[i])
        rows = torch.func.jacrev(unreduced, i)(s, t)
        same(torch.func.jacfwd(unreduced, i)(s, t), rows)
        exact_rows = gklx.grad(partial(loss, reduction="sum"), i)(s, t)
        same(rows.sum(0), exact_rows)


@supports("forward mode")
@SOME_CASES
def test_forward_mode_is_the_analytic_gradient(case):
    loss, s, t = given(case, "elements")
    u, v = directions(s)
    to_s, to_t = gklx.grad(loss, (0, 1))(s, t)
    expected = (to_s * u).sum() + (to_t * v).sum()
    scale = float((to_s * u).abs().max())
    same(torch.func.jvp(loss, (s, t), (u, v))[1], expected, scale=scale)
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        dual = loss(forward_ad.make_dual(s, u), forward_ad.make_dual(t, v))
        same(forward_ad.unpack_dual(dual).tangent, expected, scale=scale)
        one = loss(s, forward_ad.make_dual(t, v))
        same(forward_ad.unpack_dual(one).tangent, (to_t * v).sum(), scale=scale)


@supports("second derivatives")
@SOME_CASES
def test_second_derivatives_agree_in_every_mode(case):
    """Each mode over each mode, against reverse mode over the analytic gradient; third derivatives too."""
    loss, s, t = given(case, batch=(2,), classes=3)
    fwd, rev = torch.func.jacfwd, torch.func.jacrev
    for i in (0, 1):
        field = rev(gklx.grad(loss, i), i)(s, t)
        assert field.abs().max() > 0 or (case.settings.get("symmetric") is False and i == 0)
        for outer, inner in ((fwd, rev), (rev, rev), (rev, fwd), (fwd, fwd)):
            same(outer(inner(loss, i), i)(s, t), field, ulps=64, scale=0.1)
    third = fwd(field_of := rev(gklx.grad(loss, 1), 1), 1)(s, t)
    same(rev(fwd(fwd(loss, 1), 1), 1)(s, t), third, ulps=256, scale=0.1)
    assert field_of(s, t).shape == (*t.shape, *t.shape)


@supports("vmap")
@SOME_CASES
def test_vmap_of_grad_and_grad_of_vmap(case):
    loss, s, t = given(case)
    batches = torch.stack([s, 2 * s, t.flip(0)])
    exact = [gklx.grad(loss, (0, 1))(x, t) for x in batches]
    same(torch.func.vmap(loss, (0, None))(batches, t), torch.stack([loss(x, t) for x in batches]))
    per_batch = torch.func.vmap(torch.func.grad(loss, (0, 1)), (0, None))(batches, t)
    around = torch.func.grad(lambda x: torch.func.vmap(loss, (0, None))(x, t).sum())(batches)
    # One row is the same in both networks. Its gradient is 0 but for PyTorch's exponential, which rounds by an entry's
    # place in a vector register.
    for i in (0, 1):
        same(per_batch[i], torch.stack([each[i] for each in exact]), scale=0.1)
    same(around, torch.stack([each[0] for each in exact]), scale=0.1)


@supports("vmap")
def test_vmap_over_every_array_argument():
    case = next(case for case in CASES if case.id == "gkl-prior")
    loss, s, t = given(case, "samples")
    arrays = loss.keywords
    several = {name: torch.stack([x, x.flip(0)]) for name, x in arrays.items() if isinstance(x, torch.Tensor)}
    several["where"] = torch.stack([s.isfinite(), t.isfinite()])

    def of(s, t, several):
        return loss_of(case)(s, t, **several)

    found = torch.func.vmap(torch.func.grad(of), (None, None, 0))(s, t, several)
    for i in (0, 1):
        one = {name: x[i] for name, x in several.items()}
        same(found[i], gklx.grad(loss_of(case))(s, t, **one))


# --- memory of the graph ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=["student", "teacher", "both"])
def test_backward_pass_keeps_at_most_one_tensor_per_differentiated_input(wanted, dtype):
    s, t = torch.randn(2, 64, 100).to(getattr(torch, dtype))
    s.requires_grad_(wanted[0]), t.requires_grad_(wanted[1])
    kept = {}

    def pack(x):
        kept[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        gklx.gkl(s, t)
    for x in (s, t):
        kept.pop(x.data_ptr())
    half = dtype in ("float16", "bfloat16")
    one = s.numel() * s.element_size()
    assert sum(kept.values()) <= (0 if half else sum(wanted)) * one + 64


@ALL_CASES
@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)], ids=str)
def test_gradients_of_tracked_logits(case, wanted, monkeypatch):
    """They are made as fast as those of plain tensors, and only a derivative of them needs the formulas."""
    loss, s, t = given(case, classes=4)
    plain = gklx.grad(loss, wanted)(s, t)
    s.requires_grad_()
    t = t * s.sin() / s.detach().sin()  # the teacher depends on the student
    with monkeypatch.context() as patched:
        patched.setattr(blocks, "evaluate", None if show_config(mode="dicts")["kernel"] else blocks.evaluate)
        tracked = gklx.grad(loss, wanted)(s, t)
    for found, expected in zip(tracked, plain, strict=True):
        same(found, expected)
    found = torch.autograd.grad(sum(x.square().sum() for x in tracked), s, materialize_grads=True)[0]

    def squares(s, t):
        return sum(x.square().sum() for x in torch.func.grad(loss, wanted)(s, t))

    by_student, by_teacher = torch.func.grad(squares, (0, 1))(s.detach(), t.detach())
    same(found, by_student + by_teacher * t.detach() * s.detach().cos() / s.detach().sin(), ulps=256)


def test_input_changed_before_the_backward_pass_is_an_error():
    s, t = torch.randn(2, 4, 5)
    s.requires_grad_()
    value = gklx.gkl(s, t)
    t.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("times", [1, 3])
def test_retained_graph_gives_the_same_gradient_again(times):
    s, t = torch.randn(2, 4, 5)
    s.requires_grad_()
    value = gklx.gkl(s, t)
    for _ in range(times):
        (found,) = torch.autograd.grad(value, s, retain_graph=True)
        same(found, gklx.grad(gklx.gkl)(s.detach(), t), dtype="float32")


# --- compilers --------------------------------------------------------------------------------------------------------


class CountingBackend:
    """A backend of `torch.compile` that counts the compiled graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs += 1
        return aot_eager(graph, inputs)


@pytest.fixture
def compiled():
    torch.compiler.reset()
    counter = CountingBackend()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Online softmax is disabled")
        yield lambda f, **options: torch.compile(f, fullgraph=True, **{"backend": counter, **options}), counter
    torch.compiler.reset()


@supports("compiler")
@pytest.mark.parametrize("mask", ["none", "elements", "samples"])
@SOME_CASES
def test_compiled_without_a_graph_break(compiled, case, mask):
    compile_, counter = compiled
    loss, s, t = given(case, mask)
    expected = gklx.grad(loss, (0, 1))(s, t)
    a, b = s.clone().requires_grad_(), t.clone().requires_grad_()
    value = compile_(loss)(a, b)
    same(value, loss(s, t))
    (3 * value).backward()
    same(a.grad, 3 * expected[0], ulps=64)
    same(b.grad, 3 * expected[1], ulps=64)
    assert counter.graphs == 1


@supports("compiler")
@SOME_CASES
def test_compiled_by_the_eager_backend(compiled, case):
    compile_, _ = compiled
    loss, s, t = given(case, "none")
    for negligible in (False, True):
        if negligible:
            s[1], t[1] = -torch.inf, -torch.inf
        expected = gklx.grad(loss, (0, 1))(s, t)
        a, b = s.clone().requires_grad_(), t.clone().requires_grad_()
        value = compile_(loss, backend="eager")(a, b)
        same(value, loss(s, t))
        value.backward()
        same(a.grad, expected[0], ulps=64)
        same(b.grad, expected[1], ulps=64)


INDUCTOR = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler for TorchInductor"
)


@pytest.fixture(params=["operator", "formulas"])
def given_to_inductor(request, monkeypatch):
    """What Inductor compiles: the operator, or the formulas, as on CUDA and over several ranks."""
    from gklx._autodiff import torch_operator

    if request.param == "formulas":
        monkeypatch.setattr(torch_operator, "serves", lambda call: False)
        monkeypatch.setenv("GKLX_KERNEL", "0")
    return request.param


@supports("compiler")
@INDUCTOR
@pytest.mark.parametrize(
    ("name", "mask", "permuted"),
    [("kl", "none", True), ("gkl-tau", "none", True), ("gkl-prior", "samples", False)],
)
def test_inductor_agrees_with_the_definition(compiled, given_to_inductor, name, mask, permuted):
    """Inductor has had bugs where the layouts of the two networks differ."""
    compile_, _ = compiled
    case = next(case for case in CASES if case.id == name)
    s, t, arrays = call(case, mask, batch=(2, 2, 4))
    exact_s, exact_t, exact = rounded(BY_NAME["torch"], "float32", s, t, arrays)
    s, t, arrays = on(BY_NAME["torch"], "float32", s, t, arrays)

    def loss(a, b):
        return loss_of(case)(a.permute(0, 2, 3, 1) if permuted else a, b, **arrays)

    a = (s.permute(0, 3, 1, 2).contiguous() if permuted else s).requires_grad_()
    b = t.requires_grad_()
    value = compile_(loss, backend="inductor")(a, b)
    value.backward()
    found = (value.detach(), a.grad.permute(0, 2, 3, 1) if permuted else a.grad, b.grad)
    for one, other in zip(found, oracle.evaluate(case.loss, exact_s, exact_t, **case.settings, **exact), strict=True):
        assert_close(one, other, BY_NAME["torch"], "float32", ulps=32)


@supports("compiler")
@INDUCTOR
def test_compiled_program_is_cached_on_disk(compiled, monkeypatch, tmp_path):
    """As docs/speed.md describes it."""
    import torch._inductor.config as options
    from torch._dynamo.utils import counters

    if not hasattr(options, "unsafe_marked_cacheable_functions"):
        pytest.skip("this PyTorch takes no function for cacheable on trust")
    name = "gklx._autodiff.torch_operator._in_graph"
    assert name in (Path(__file__).parents[1] / "docs" / "speed.md").read_text(encoding="utf-8")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(options, "unsafe_marked_cacheable_functions", {name: gklx.__version__})
    compile_, _ = compiled
    s, t = torch.randn(2, 6, 7).unbind()
    expected = gklx.grad(gklx.gkl)(s, t)
    for outcome in ("autograd_cache_saved", "autograd_cache_hit"):
        torch.compiler.reset()
        counters.clear()
        a = s.clone().requires_grad_()
        compile_(gklx.gkl, backend="inductor")(a, t).backward()
        assert counters["aot_autograd"][outcome] == 1
        same(a.grad, expected, dtype="float32")


PLACES = [(0, 1), (3, 4), (4, 0)]


def with_entries(x, value):
    x = x.clone()
    for place in PLACES:
        x[place] = value
    return x


def without_a_class(s, row):
    s = s.clone()
    s[row] = -torch.inf
    return s


# From ordinary logits to logits with special rows, of the named kind, and the other arguments.
SPECIAL_ROWS = {
    "classes that both rule out": lambda s, t: (with_entries(s, -torch.inf), with_entries(t, -torch.inf), {}),
    "classes the student rules out": lambda s, t: (with_entries(s, -torch.inf), t, {}),
    "classes the teacher rules out": lambda s, t: (s, with_entries(t, -torch.inf), {}),
    "an infinite logit": lambda s, t: (s, with_entries(t, torch.inf), {}),
    "NaN": lambda s, t: (with_entries(s, torch.nan), t, {}),
    "NaN of weight 0": lambda s, t: (
        with_entries(s, torch.nan),
        t,
        {"sample_weight": torch.tensor([0.0, 2.0, 1.0, 0.0, 0.0, 1.0])},
    ),
    "a student without a class": lambda s, t: (without_a_class(s, 2), t, {}),
    "differences that overflow": lambda s, t: (s * 1e38, -t * 1e38, {}),
}
LOSSES = {
    "kl": gklx.kl,
    "dkl": gklx.dkl,
    "gkl": partial(gklx.gkl, gamma=0.5),
    "gkl-0": partial(gklx.gkl, gamma=0.0),
    "ce": partial(gklx.gkl, mse_weight=0.0),
}


@supports("compiler")
@pytest.mark.parametrize("name", SPECIAL_ROWS)
@pytest.mark.parametrize("loss", LOSSES)
def test_compiled_special_rows_agree_with_eager(compiled, loss, name):
    """Rows with infinite, NaN or masked logits have the same results compiled and eagerly."""
    compile_, _ = compiled
    s, t, given = SPECIAL_ROWS[name](*torch.randn(2, 6, 7))
    loss = partial(LOSSES[loss], reduction="none", **given)
    found, expected = [], []
    for run, into in ((compile_(loss), found), (loss, expected)):
        a, b = s.clone().requires_grad_(), t.clone().requires_grad_()
        value = run(a, b)
        value.backward(torch.linspace(1, 2, 6))
        into += [value, a.grad, b.grad]
    for x, y in zip(found, expected, strict=True):
        same(x, y, dtype="float32")


@supports("compiler")
def test_compiled_wmse_of_large_differences_keeps_its_digits(compiled):
    """Differences of 3,000, some larger by 2^-12: a square about a rounded mean would be mostly rounding error."""
    compile_, _ = compiled
    s, t = torch.zeros(2, 8, 5000)
    s[:, 1:] = -3000.0
    s[:, 1:5] -= 2.0**-12
    t[:, 0] = -60.0  # what the student is sure of weighs nothing
    loss = partial(gklx.gkl, ce_weight=0.0, reduction="none")
    same(compile_(loss)(s.requires_grad_(), t), loss(s.double(), t.double()), dtype="float32")


@supports("compiler")
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_compiled_half_precision_masked_rows_agree_with_eager(compiled, half):
    compile_, _ = compiled
    s, t, _ = SPECIAL_ROWS["classes that both rule out"](*torch.randn(2, 6, 7))
    s, t = (x.to(getattr(torch, half)) for x in (s, t))
    a, b = s.clone().requires_grad_(), t.clone().requires_grad_()
    compile_(gklx.gkl)(a, b).backward()
    for x, expected in zip((a.grad, b.grad), gklx.grad(gklx.gkl, (0, 1))(s, t), strict=True):
        same(x, expected, dtype=half, ulps=2)


@supports("compiler")
@pytest.mark.parametrize("wrong", ["sample_weight", "prior", "labels"])
@pytest.mark.parametrize("with_masked_class", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_invalid_arguments_of_a_compiled_loss_give_nan(compiled, wrong, with_masked_class, gamma):
    compile_, _ = compiled
    s, t = torch.randn(2, 4, 7).unbind()
    if with_masked_class:
        s[3, 1] = t[3, 1] = -torch.inf
    s.requires_grad_()
    given = {"sample_weight": torch.ones(4), "prior": torch.rand(7, 7), "labels": torch.arange(4)}
    given[wrong][1] = -1
    value = compile_(partial(gklx.gkl, gamma=gamma))(s, t, **given)
    value.backward()
    assert value.isnan()
    assert s.grad[1].isnan().all()


@supports("compiler")
@supports("batch size left open")
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_for_any_batch_size(compiled, dynamic):
    """Two graphs at most for all sizes above 1: one for the first size, one for any."""
    compile_, counter = compiled
    loss = compile_(partial(gklx.gkl, gamma=0.5), dynamic=dynamic)
    for batch in (5, 3, 17, 64, 33, 7, 128):
        s, t = torch.randn(2, batch, 7, dtype=torch.float64)
        s.requires_grad_()
        labels, prior = torch.randint(0, 7, (batch,)), torch.rand(7, 7, dtype=torch.float64)
        loss(s, t, prior=prior, labels=labels).backward()
        exact = gklx.grad(partial(gklx.gkl, gamma=0.5))(s.detach(), t, prior=prior, labels=labels)
        same(s.grad, exact, ulps=64)
    assert counter.graphs <= 2


@supports("hyper-parameters that change without compiling again")
@pytest.mark.parametrize("differentiable", [False, True])
def test_scheduled_hyper_parameters_do_not_recompile(compiled, differentiable):
    compile_, counter = compiled
    loss = compile_(gklx.gkl)
    s, t = (x.requires_grad_(differentiable) for x in torch.randn(2, 5, 7, dtype=torch.float64))
    for weight in (0.1, 0.2, 0.35, 0.4, 0.55, 0.6, 0.7):
        settings = {"mse_weight": weight, "gamma": 1.5 * weight, "ce_weight": 2 * weight}
        value = loss(s, t, **settings)
        same(value, gklx.gkl(s, t, **settings))
        if differentiable:
            found = torch.autograd.grad(value, (s, t))
            for x, expected in zip(found, gklx.grad(partial(gklx.gkl, **settings), (0, 1))(s, t), strict=True):
                same(x, expected, ulps=64)
    assert counter.graphs <= 3


@supports("compiler")
def test_transforms_of_losses_can_be_compiled(compiled):
    compile_, _ = compiled
    s, t = torch.randn(2, 5, 7, dtype=torch.float64)
    value, (to_s, to_t) = compile_(gklx.value_and_grad(gklx.gkl, (0, 1)))(s, t)
    same(value, gklx.gkl(s, t))
    for found, expected in zip((to_s, to_t), gklx.grad(gklx.gkl, (0, 1))(s, t), strict=True):
        same(found, expected)
    same(compile_(gklx.terms(gklx.ikl))(s, t).mse, gklx.terms(gklx.ikl)(s, t).mse)
    same(compile_(torch.func.grad(gklx.gkl))(s, t), to_s)
    same(compile_(torch.func.vmap(gklx.gkl))(s, t), torch.func.vmap(gklx.gkl)(s, t))


@supports("class prior inside a compiled step")
def test_compiled_module_over_epochs(compiled):
    """One graph for training over all epochs, and one for evaluation."""
    import gklx.torch

    compile_, counter = compiled
    modules = [gklx.torch.GKLLoss(7, gamma=0.5, warmup_epochs=3) for _ in range(2)]
    run = compile_(modules[0])
    for epoch in range(3):
        s, t = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(epoch))
        labels = torch.tensor([1, 2, 2, 0, 6])
        same(run(s, t, labels), modules[1](s, t, labels), dtype="float32")
        for module in modules:
            module.advance()
        same(modules[0].prior, modules[1].prior, dtype="float32")
    modules[0].eval()
    run(s, t, labels)
    assert counter.graphs == 2


@supports("class prior inside a compiled step")
def test_class_prior_in_a_compiled_step(compiled):
    compile_, _ = compiled
    t, labels = torch.randn(5, 7, dtype=torch.float64), torch.tensor([1, 2, 2, 0, 6])
    state = gklx.ClassPriorState.uniform(7, like=t)

    def step(state, t, labels):
        state = state.update(t, labels, temperature=2.0).advance()
        return state, gklx.gkl(t.flip(0), t, prior=state.table, labels=labels)

    found, value = compile_(step)(state, t, labels)
    expected, exact = step(state, t, labels)
    same(found.table, expected.table)
    same(value, exact)


class Distilled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 7)

    def forward(self, x, teacher, labels, weight):
        prior = torch.full((7, 7), 1 / 7)
        return gklx.gkl(self.layer(x), teacher, prior=prior, labels=labels, sample_weight=weight, gamma=0.5)


@supports("export")
@supports("batch size left open")
@pytest.mark.parametrize("strict", [False, True])
def test_export_for_any_batch_size(strict):
    def inputs(batch):
        return torch.randn(batch, 4), torch.randn(batch, 7), torch.randint(0, 7, (batch,)), torch.rand(batch)

    torch.compiler.reset()
    model, batch = Distilled(), torch.export.Dim("batch", min=2, max=4096)
    program = torch.export.export(model, inputs(6), dynamic_shapes=({0: batch},) * 4, strict=strict).module()
    assert "gklx" not in program.code  # it runs where gklx is not
    for size in (2, 9, 300):
        arguments = inputs(size)
        same(program(*arguments), model(*arguments), dtype="float32")


# --- mixed precision --------------------------------------------------------------------------------------------------


@supports("mixed precision")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_loss_under_autocast_is_computed_in_float32(dtype):
    """The class sums too, although the layers give half precision."""
    layer, x, t = torch.nn.Linear(4, 7), torch.randn(64, 4), torch.randn(64, 7)
    labels = torch.randint(0, 7, (64,))
    with torch.autocast("cpu", dtype=getattr(torch, dtype)):
        s = layer(x)
        s.retain_grad()
        value = gklx.gkl(s, t, gamma=0.5)
        sums = gklx.class_sums(t, labels, 7)
    assert str(s.dtype) == f"torch.{dtype}"
    value.backward()
    wide = s.detach().double()
    same(value, gklx.gkl(wide, t.double(), gamma=0.5), dtype="float32")
    exact = gklx.grad(partial(gklx.gkl, gamma=0.5))(wide, t.double())
    assert_close(s.grad, exact.numpy(), BY_NAME["torch"], dtype, ulps=1)
    same(sums, gklx.class_sums(t.double(), labels, 7), dtype="float32")


@supports("mixed precision")
def test_grad_scaler_prevents_underflow_of_half_precision_gradients():
    """For large batches unscaled gradients underflow in float16; the scale is applied before rounding."""
    s, t = torch.randn(2, 4096, 100).to(torch.float16)
    s.requires_grad_()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    scaler.scale(gklx.gkl(s, t)).backward()
    exact = 2.0**14 * gklx.grad(gklx.gkl)(s.detach().double(), t.double())
    assert_close(s.grad, exact.numpy(), BY_NAME["torch"], "float16", ulps=1)
    assert (gklx.grad(gklx.gkl)(s.detach(), t) == 0).double().mean() > 100 * (s.grad == 0).double().mean()


@supports("mixed precision")
def test_grad_scaler_trains():
    layer, teacher, x = torch.nn.Linear(4, 7), torch.nn.Linear(4, 7), torch.randn(64, 4)
    optimizer, scaler = torch.optim.SGD(layer.parameters(), lr=0.5), torch.amp.GradScaler("cpu")
    t = teacher(x).detach()
    values = []
    for _ in range(50):
        with torch.autocast("cpu", dtype=torch.float16):
            value = gklx.kl(layer(x), t)
        optimizer.zero_grad()
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        values.append(float(value.detach()))
    assert values[-1] < 0.5 * values[0]


def test_returned_gradients_do_not_alias_the_kept_ones():
    """With a retained graph a returned gradient may be changed in place; the kept one must not change."""
    s, t = torch.randn(2, 5, 7).unbind()
    s.requires_grad_(), t.requires_grad_()
    value = gklx.gkl(s, t)
    first = torch.autograd.grad(value, (s, t), retain_graph=True)
    expected = [x.clone() for x in first]
    for x in first:
        x.mul_(3)
    for one, other in zip(torch.autograd.grad(value, (s, t)), expected, strict=True):
        same(one, other, dtype="float32", ulps=0)


# --- layouts and memory -----------------------------------------------------------------------------------------------


@supports("checkpoint")
@pytest.mark.parametrize("reentrant", [True, False])
@SOME_CASES
def test_checkpoint_keeps_the_gradient(case, reentrant):
    from torch.utils.checkpoint import checkpoint

    loss, s, t = given(case)
    a, b = s.clone().requires_grad_(), t.clone().requires_grad_()
    checkpoint(loss, a, b, use_reentrant=reentrant).backward()
    for found, expected in zip((a.grad, b.grad), gklx.grad(loss, (0, 1))(s, t), strict=True):
        same(found, expected)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (0, 0, 1)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_of_an_empty_batch_is_zero(shape, reduction):
    s, t = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    value = gklx.gkl(s, t, reduction=reduction)
    value.sum().backward()
    assert value.shape == (shape[:-1] if reduction == "none" else ())
    assert value.sum() == 0
    assert s.grad.shape == t.grad.shape == shape


@SOME_CASES
def test_transposed_strided_and_expanded_logits(case):
    loss, s, t = given(case)
    exact = gklx.grad(loss, (0, 1))(s, t)
    wide = torch.zeros(2, 14, 5, dtype=torch.float64)
    wide[:, ::2] = torch.stack([s.T, t.T])
    views = wide.requires_grad_()[:, ::2].mT
    loss(views[0], views[1]).backward()
    for i in (0, 1):
        same(wide.grad[i, ::2].T, exact[i])
    row = t[0].clone().requires_grad_()
    loss(s, row.expand(5, 7)).backward()
    same(row.grad, gklx.grad(loss, 1)(s, t[:1].repeat(5, 1)).sum(0), scale=float(exact[1].abs().max()))


def test_meta_tensors_have_a_backward_pass():
    s, t = (torch.empty(4, 5, device="meta", requires_grad=True) for _ in range(2))
    gklx.gkl(
        s, t, prior=torch.empty(5, 5, device="meta"), labels=torch.empty(4, dtype=torch.int64, device="meta")
    ).backward()
    assert s.grad.shape == t.grad.shape == (4, 5)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_many_upstream_gradients_at_once(dtype, reduction):
    s, t = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    value = gklx.kl(s.requires_grad_(), t, reduction=reduction)
    upstream = torch.randn(4, *value.shape, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad(value, s, upstream, is_grads_batched=True, retain_graph=True)
    expected = torch.stack([torch.autograd.grad(value, s, x, retain_graph=True)[0] for x in upstream])
    assert torch.equal(found, expected)
