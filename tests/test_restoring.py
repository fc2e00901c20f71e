"""Copies, pickles and PyTorch checkpoints of priors, functions and modules continue exactly."""

import copy
import functools
import importlib
import io
import os
import pickle  # noqa: TID251  # what users do to our objects
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import gklx
from closeness import assert_close

C = 4


def batch(seed):
    rng = np.random.default_rng(seed)
    return 2 * rng.standard_normal((12, C)), rng.choice(C, 12)


def by_joblib(x):
    joblib = pytest.importorskip("joblib")
    file = io.BytesIO()
    joblib.dump(x, file)
    file.seek(0)
    return joblib.load(file)


def by_torch(x):
    """Save, and load by the defaults of `torch.load`."""
    torch = pytest.importorskip("torch")
    importlib.import_module("gklx.torch")  # lets PyTorch load a prior that was made before PyTorch was imported
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{f"pickle {protocol}": lambda x, p=protocol: pickle.loads(pickle.dumps(x, p)) for protocol in (2, 5)},
    "joblib": by_joblib,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("width", ["float32", "float64"])
def test_copied_prior_continues_exactly(backend, width, way):
    """A copy may be made at any time; a change of one object does not affect the other."""
    if width not in backend.library.dtypes:
        pytest.skip(f"{backend.name} has no {width}")
    first, then = ((backend.array(x, width), backend.array(y)) for x, y in (batch(1), batch(2)))
    for started in range(4):
        kept = gklx.ClassPrior(C, temperature=2.0, like=first[0] if started == 1 else None)
        if started > 1:
            kept.update(*first)
        if started > 2:
            kept.advance()
            kept.update(*then)
        restored = COPIES[way](kept)
        assert (restored.num_classes, restored.temperature) == (C, 2.0)
        table = backend.numpy(kept.table) if started else np.asarray(kept.table)
        restored.update(*then)
        np.testing.assert_array_equal(backend.numpy(kept.table) if started else np.asarray(kept.table), table)
        kept.update(*then)
        shard = gklx.ClassPrior(C, temperature=2.0)
        shard.update(*first)
        for prior in (kept, restored):
            prior.merge(shard)
            prior.advance()
        like = None if way.startswith(("pickle", "joblib")) and backend.library.backend == "jax" else first[0]
        assert_close(restored.table, backend.numpy(kept.table), backend, width, ulps=0, like=like)


def test_restored_prior_stays_in_its_library_and_on_its_device():
    strict = pytest.importorskip("array_api_strict")
    x, y = batch(1)
    there = strict.asarray(x, device=strict.Device("device1"))
    for way in COPIES.values():
        restored = way(gklx.ClassPrior(C, like=there))
        with pytest.raises(TypeError, match=r"^logits must be of this prior's library, array-api-strict, got NumPy$"):
            restored.update(x, y)
        with pytest.raises(ValueError, match=r"^logits must be on this prior's device, .*device1.*, got .*CPU.*$"):
            restored.update(strict.asarray(x), strict.asarray(y))


def test_library_is_restored_as_the_same_object():
    from gklx._core.libraries import LIBRARIES

    for library in LIBRARIES:
        for way in COPIES.values():
            assert way(library) is library


@pytest.mark.parametrize("way", [*COPIES, "torch"])
def test_state_dict_of_a_prior_survives_copying(backend, way):
    (x1, y1), (x2, y2) = batch(1), batch(2)
    kept = gklx.ClassPrior(C)
    kept.update(backend.array(x1), backend.array(y1))
    kept.advance()
    kept.update(backend.array(x2), backend.array(y2))
    state = by_torch(kept.state_dict()) if way == "torch" else COPIES[way](kept.state_dict())
    assert all(isinstance(x, (int, float, np.ndarray)) for x in state.values())
    restored = gklx.ClassPrior(C, like=backend.array(x1))
    restored.load_state_dict(state)
    for prior in (kept, restored):
        prior.update(backend.array(x1), backend.array(y1))
        prior.advance()
    assert_close(restored.table, backend.numpy(kept.table), backend, "float64", ulps=0)


def test_state_dict_of_tensors_is_accepted():
    torch = pytest.importorskip("torch")
    kept = gklx.ClassPrior(C)
    kept.update(*batch(1))
    restored = gklx.ClassPrior(C)
    restored.load_state_dict(by_torch({name: torch.as_tensor(x) for name, x in kept.state_dict().items()}))
    kept.advance()
    restored.advance()
    np.testing.assert_array_equal(restored.table, kept.table)


@pytest.mark.parametrize("first", ["import gklx.torch", "import torch, gklx\ngklx.ClassPrior(2)"])
def test_torch_load_in_another_process(tmp_path, first):
    torch = pytest.importorskip("torch")
    prior = gklx.ClassPrior(C)
    prior.update(*batch(1))
    torch.save({"epoch": 3, "prior": prior.state_dict()}, tmp_path / "checkpoint.pt")
    script = f"""
        {first.replace(chr(10), chr(10) + " " * 8)}
        import torch
        found = torch.load({str(tmp_path / "checkpoint.pt")!r})
        prior = gklx.ClassPrior({C})
        prior.load_state_dict(found["prior"])
        print(found["epoch"], prior.state_dict()["sums"].tobytes().hex())
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, env=environment, check=False
    )
    assert ran.stderr == ""
    assert ran.stdout.split() == ["3", prior.state_dict()["sums"].tobytes().hex()]


def test_torch_load_allows_only_the_arrays_of_a_prior():
    torch = pytest.importorskip("torch")
    gklx.ClassPrior(C).state_dict()
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        by_torch(np.zeros(3))
    names = {getattr(x, "__name__", None) for x in torch.serialization.get_safe_globals()}
    assert not names & {"dtype", "ndarray", "_reconstruct"}


@pytest.mark.parametrize("dtype", ["O", "V8", "<i8", "<c16"])
def test_only_floats_are_restored_from_bytes(dtype):
    """In a forged file, bytes of an object dtype would be read as addresses."""
    from gklx.prior import _state_array

    with pytest.raises(ValueError, match=r"^a class prior's arrays must be float32 or float64, got "):
        _state_array(dtype, (1,), b"\0" * 16)


def test_arrays_computed_from_a_state_can_be_pickled():
    state = gklx.ClassPrior(C).state_dict()
    for x in (state["table"] > 0, state["table"].astype("float16"), state["table"][::2], state["table"].T):
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(x)), x)


S, T = batch(3)[0], batch(4)[0]
FUNCTIONS = {
    "grad": lambda: gklx.grad(gklx.kl, (0, 1)),
    "grad of a partial": lambda: gklx.grad(functools.partial(gklx.gkl, gamma=0.3), np.int64(1)),
    "value_and_grad": lambda: gklx.value_and_grad(gklx.dkl, [1]),
    "a partial of value_and_grad": lambda: functools.partial(gklx.value_and_grad(gklx.ikl), reduction="sum"),
    "terms": lambda: gklx.terms(functools.partial(functools.partial(gklx.gkl, mse_weight=3.0), ce_weight=2.0)),
    "a loss": lambda: gklx.gkl,
}


def flat(x):
    return [y for each in x for y in flat(each)] if isinstance(x, tuple) else [np.asarray(x)]


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_copied_function_gives_the_same_results(name, way):
    function = FUNCTIONS[name]()
    found, expected = COPIES[way](function)(S, T), function(S, T)
    assert type(found) is type(expected)
    for one, other in zip(flat(found), flat(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_equal_functions_compare_and_hash_equal():
    """Caches keyed by the function, such as that of `jax.jit`, rely on it."""
    assert gklx.grad(gklx.kl) == gklx.grad(gklx.kl)
    assert hash(gklx.grad(gklx.kl, [0, 1])) == hash(gklx.grad(gklx.kl, (0, 1)))
    assert gklx.grad(gklx.kl) != gklx.grad(gklx.kl, (0,))
    assert gklx.grad(gklx.kl) != gklx.value_and_grad(gklx.kl)


def test_repr_of_a_function_names_its_loss():
    assert "kl" in repr(gklx.grad(gklx.kl, (0, 1)))


@pytest.mark.parametrize("way", COPIES)
def test_copied_module_continues_exactly(way):
    torch = pytest.importorskip("torch")
    from gklx.torch import GKLLoss, KLLoss

    s, t, labels = torch.tensor(S), torch.tensor(T), torch.tensor(batch(3)[1])
    kept = GKLLoss(num_classes=C, gamma=0.5, warmup_epochs=3)
    kept(s, t, labels)
    kept.advance()
    kept(s, t, labels)
    restored = COPIES[way](kept)
    if way != "copy":  # which shares the buffers
        restored.advance()
    kept.advance()
    assert torch.equal(restored(s, t, labels), kept(s, t, labels))
    assert torch.equal(COPIES[way](KLLoss(temperature=2.0))(s, t), KLLoss(temperature=2.0)(s, t))
