"""Transforms, compilers and modules on a GPU give the results of the CPU in float64. Skipped without a GPU."""

from functools import partial

import numpy as np
import pytest

import backends
import gklx
from cases import CASES, call, loss_of
from closeness import assert_near

SOME = [case for case in CASES if case.id in ("kl-T", "gkl-tau", "gkl-prior", "gkl-asymmetric")]
SOME_CASES = pytest.mark.parametrize("case", SOME, ids=lambda case: case.id)


@pytest.fixture
def torch():
    backends.needs("torch")
    module = pytest.importorskip("torch")
    if not module.cuda.is_available():
        pytest.skip("PyTorch has no GPU here")
    return module


@pytest.fixture
def jax():
    backends.needs("jax")
    module = pytest.importorskip("jax")
    if module.default_backend() != "gpu":
        pytest.skip("JAX has no GPU here")
    with module.enable_x64(True):
        yield module


def on_both(torch, case, mask="elements"):
    """The loss with its arrays, and the logits of both networks; first on the GPU, then on the CPU."""
    s, t, given = call(case, mask, batch=(6,), classes=64)
    for device in ("cuda", None):
        own = {name: torch.tensor(x, device=device) for name, x in given.items()}
        loss = partial(loss_of(case, reduction="sum"), **own)
        yield loss, torch.tensor(s, device=device), torch.tensor(t, device=device)


def assert_same(one, other):
    assert_near(one.detach().cpu().numpy(), other.detach().numpy(), "float64", ulps=256)


@SOME_CASES
def test_torch_transforms_on_a_gpu_agree_with_the_cpu(torch, case):
    gradients, samples, tangents, seconds = [], [], [], []
    for loss, s, t in on_both(torch, case):
        gradients.append(torch.func.grad(loss, argnums=(0, 1))(s, t))
        # Masks and labels are of the whole batch: each of the mapped calls is of one.
        samples.append(torch.vmap(lambda scale, s=s, t=t, loss=loss: loss(scale * s, t))(s.new_tensor([1.0, 0.5])))
        tangents.append(torch.func.jvp(lambda x, t=t, loss=loss: loss(x, t), (s,), (t.nan_to_num(),))[1])
        x = s.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(x, t), x, create_graph=True)
        seconds.append(torch.autograd.grad((first * first).sum(), x)[0])
    for one, other in zip(*gradients, strict=True):
        assert_same(one, other)
    for found in (samples, tangents, seconds):
        assert_same(*found)


@SOME_CASES
@pytest.mark.filterwarnings("default")  # PyTorch's compiler makes an error of a warning a failure to compile
def test_torch_compile_on_a_gpu_agrees_with_the_cpu(torch, case):
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.zeros(8, device="cuda"))
    except Exception as error:  # Triton needs a C compiler and Python's headers
        pytest.skip(f"torch.compile does not work here: {error}")
    found = []
    for loss, s, t in on_both(torch, case, "none"):
        run = torch.compile(loss, fullgraph=True) if s.device.type == "cuda" else loss
        x = s.clone().requires_grad_()
        value = run(x, t)
        value.backward()
        found.append((value, x.grad))
    for one, other in zip(*found, strict=True):
        assert_same(one, other)


def test_torch_contexts_on_a_gpu_agree_with_the_cpu(torch):
    """Backward passes with checkpoints, inference tensors, autocast and a loss scale."""
    from torch.utils.checkpoint import checkpoint

    found = []
    for loss, s, t in on_both(torch, SOME[1], "none"):
        with torch.inference_mode():
            frozen = t + 0
        x, y = (s.clone().requires_grad_() for _ in range(2))
        checkpoint(partial(loss, teacher_logits=frozen), x, use_reentrant=False).backward()
        with torch.autocast(s.device.type, dtype=torch.bfloat16):
            (2.0**10 * loss(y, frozen)).backward()
        found.append((x.grad, y.grad))
    for one, other in zip(*found, strict=True):
        assert_same(one, other)


def test_torch_modules_on_a_gpu_agree_with_the_cpu(torch):
    from gklx.torch import GKLLoss

    s, t, given = call(SOME[2], "none", batch=(12,))
    found = []
    for device in ("cuda", None):
        criterion = GKLLoss(num_classes=7, gamma=0.5).to(device=device or "cpu", dtype=torch.float64)
        x = torch.tensor(s, device=device).requires_grad_()
        criterion(x, torch.tensor(t, device=device), torch.tensor(given["labels"], device=device)).backward()
        criterion.advance()
        found.append((x.grad, criterion.prior))
    (gradient, prior), (expected, expected_prior) = found
    assert_same(gradient, expected)
    assert_near(prior.cpu().numpy(), expected_prior.numpy(), "float32", ulps=16)


@SOME_CASES
def test_transforms_of_jax_on_a_gpu_agree_with_the_cpu(jax, case):
    s, t, given = call(case, "elements", batch=(6,), classes=64)
    found = []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        x, y, *rest = (jax.device_put(each, device) for each in (s, t, *given.values()))
        loss = partial(loss_of(case, reduction="sum"), **dict(zip(given, rest, strict=True)))
        scales = jax.device_put(np.asarray([1.0, 0.5]), device)
        direction = jax.numpy.nan_to_num(y)
        found.append(
            (
                *jax.jit(jax.grad(loss, argnums=(0, 1)))(x, y),
                jax.jit(jax.vmap(lambda scale, x=x, y=y, loss=loss: loss(scale * x, y)))(scales),
                jax.jvp(lambda x, y=y, loss=loss: loss(x, y), (x,), (direction,))[1],
                gklx.grad(loss)(x, y),
            )
        )
    for one, other in zip(*found, strict=True):
        assert_near(np.asarray(one), np.asarray(other), "float64", ulps=256)
