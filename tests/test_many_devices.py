"""One batch over many devices: each gets its part of the result of a single device.

PyTorch: processes of a gloo group on this machine. JAX: eight virtual devices of the host. Dask: chunks of rows.
"""

import multiprocessing
import os
import sys
from functools import partial

import numpy as np
import pytest

import backends
import gklx
from backends import BY_NAME
from cases import CASES, call, loss_of, on
from closeness import assert_close, assert_near

N, C = 11, 7
KINDS = ("kl", "dkl-T", "gkl", "gkl-tau", "gkl-prior", "gkl-rows", "gkl-asymmetric")
SOME = [case for case in CASES if case.id in KINDS]
# Where the batch is cut: uneven, and with a rank that has no sample.
CUTS = {2: (0, 4, 11), 4: (0, 3, 3, 9, 11)}


def whole_batch(backend, case, mask="none"):
    s, t, arrays = on(BY_NAME[backend], "float64", *call(case, mask, batch=(N,), seed=3))
    return s, t, arrays


def part_of(rows, s, t, arrays):
    """The part of some rows; a prior with labels is the same for all."""
    own = {name: x if name == "prior" and "labels" in arrays else x[rows] for name, x in arrays.items()}
    return s[rows], t[rows], own


# --- PyTorch, many processes ------------------------------------------------------------------------------------------


def on_ranks(size, scenario, folder):
    """Runs `scenario(rank, size)` in `size` processes; an error in one is raised here."""
    backends.needs("torch")
    torch = pytest.importorskip("torch")
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch was built without torch.distributed")
    method = "spawn"
    if "forkserver" in multiprocessing.get_all_start_methods():  # one process imports for all ranks of all tests
        method = "forkserver"
        multiprocessing.set_forkserver_preload(["torch._dynamo", __name__])
    arguments = (size, scenario, str(folder / "rendezvous"))
    torch.multiprocessing.start_processes(_rank, arguments, nprocs=size, start_method=method)


def _rank(rank, size, scenario, meeting):
    import torch

    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    try:
        scenario(rank, size)
    finally:
        torch.distributed.destroy_process_group()
    # DistributedDataParallel and functional collectives keep the threads of gloo alive beyond that. Where one lets go
    # of a tensor while the interpreter shuts down, the process is aborted (pytorch/pytorch#179291): no such shutdown.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def assert_same(actual, expected, ulps=16, **more):
    assert_near(actual.detach().numpy(), expected.detach().numpy(), "float64", ulps=ulps, **more)


def sum_over_ranks(x):
    import torch

    x = x.detach().clone()
    torch.distributed.all_reduce(x)
    return x


def every_loss(rank, size):
    import torch

    from gklx._core import libraries

    for number, case in enumerate(SOME):
        libraries._BLOCK_ON_CPU = 2**20 if number % 2 else 2 * C * 8  # all rows at once, or two at a time
        # With the mask the weights differ, and rank 0 has a sample of weight 0 that holds NaN and a bad label.
        for mask in ("none", "samples"):
            s, t, arrays = whole_batch("torch", case, mask)
            rows = slice(CUTS[size][rank], CUTS[size][rank + 1])
            own_s, own_t, own = part_of(rows, s, t, arrays)
            for reduction in ("mean", "sum", "none"):
                loss = loss_of(case, reduction=reduction)
                a, b = own_s.clone().requires_grad_(), own_t.clone().requires_grad_()
                with gklx.global_batch():
                    value = loss(a, b, **own)
                value.sum().backward()
                if reduction == "none":
                    assert_same(value, loss(s, t, **arrays)[rows])
                    continue
                times = size if reduction == "mean" else 1
                assert_same(sum_over_ranks(value) / times, loss(s, t, **arrays))
                exact = gklx.grad(loss, (0, 1))(s, t, **arrays)
                for found, expected in zip((a.grad, b.grad), exact, strict=True):
                    assert_same(found / times, expected[rows], scale=1e-3)
                with gklx.global_batch():
                    again = gklx.grad(loss)(own_s, own_t, **own)
                    parts = gklx.terms(loss)(own_s, own_t, **own) if case.loss != "kl" else None
                assert_same(again, a.grad, scale=1e-3)
                if parts is not None:
                    assert_same(sum_over_ranks(parts.mse) / times, gklx.terms(loss)(s, t, **arrays).mse)
                    assert torch.isfinite(parts.ce)


@pytest.mark.long
@pytest.mark.supports("batch split over devices", "PyTorch")
def test_torch_ranks_have_their_part_of_the_whole_batch(tmp_path):
    on_ranks(4, every_loss, tmp_path)


def second_derivatives(rank, size):
    import torch

    rows = slice(CUTS[size][rank], CUTS[size][rank + 1])
    for case in SOME:
        s, t, arrays = whole_batch("torch", case)

        def of_squares(s, t, arrays, context, case=case):
            s, t = s.clone().requires_grad_(), t.clone().requires_grad_()
            with context:
                value = loss_of(case)(s, t, **arrays)
                first = torch.autograd.grad(value, (s, t), create_graph=True)
                return torch.autograd.grad(sum((g * g).sum() for g in first), (s, t))

        import contextlib

        exact = of_squares(s, t, arrays, contextlib.nullcontext())
        found = of_squares(*part_of(rows, s, t, arrays), gklx.global_batch())
        for one, other in zip(found, exact, strict=True):
            assert_same(one / size**2, other[rows], ulps=64, scale=1e-2)


@pytest.mark.supports("second derivatives", "PyTorch")
def test_torch_second_derivatives_include_the_other_ranks(tmp_path):
    """The normaliser of GKL depends on every rank's teacher."""
    on_ranks(2, second_derivatives, tmp_path)


def prior_and_groups(rank, size):
    import torch

    _, t, _ = whole_batch("torch", CASES[0])
    labels = torch.arange(N) % C
    rows = slice(CUTS[size][rank], CUTS[size][rank + 1])
    prior, state = gklx.ClassPrior(C, like=t), gklx.ClassPriorState.uniform(C, like=t)
    with gklx.global_batch():
        sums = gklx.class_sums(t[rows], labels[rows], C)
        prior.update(t[rows], labels[rows])
        state = state.update(t[rows], labels[rows])
    prior.advance()
    assert_same(sums, gklx.class_sums(t, labels, C))
    assert_same(state.sums, sums)
    assert_same(prior.table, state.advance().table)

    # Pairs of ranks as batches of their own.
    pairs = [torch.distributed.new_group([i, i + 1]) for i in range(0, size, 2)]
    first = rank - rank % 2
    of_pair = slice(CUTS[size][first], CUTS[size][first + 2])
    with gklx.global_batch(process_group=pairs[rank // 2]):
        found = gklx.grad(gklx.gkl)(t[rows].flip(1), t[rows])
    exact = gklx.grad(gklx.gkl)(t[of_pair].flip(1), t[of_pair])
    start = CUTS[size][rank] - CUTS[size][first]
    assert_same(found / 2, exact[start : start + len(found)])
    with gklx.global_batch(process_group=pairs[1 - rank // 2]), pytest.raises(ValueError, match=r"^process_group must"):
        gklx.gkl(t, t)


@pytest.mark.supports("batch split over devices", "PyTorch")
def test_torch_class_prior_and_groups_of_ranks(tmp_path):
    on_ranks(4, prior_and_groups, tmp_path)


def transformed(rank, size):
    """In a compiled step, under a checkpoint, and by `torch.func`."""
    import torch
    from torch.utils.checkpoint import checkpoint

    s, t, _ = whole_batch("torch", CASES[0])
    rows = slice(CUTS[size][rank], CUTS[size][rank + 1])
    exact = gklx.grad(gklx.gkl)(s, t)[rows]

    def inside(s, t):
        with gklx.global_batch():
            return gklx.gkl(s, t)

    compiled = torch.compile(gklx.gkl, fullgraph=True, backend="aot_eager")
    compiled(s[rows], t[rows])  # compiled for one device first: entering the context must recompile
    for function in (compiled, torch.compile(inside, fullgraph=True, backend="aot_eager"), partial(checkpoint, inside)):
        a = s[rows].clone().requires_grad_()
        keywords = {"use_reentrant": False} if isinstance(function, partial) else {}
        with gklx.global_batch():
            function(a, t[rows], **keywords).backward()
        assert_same(a.grad / size, exact)
    assert_same(torch.func.grad(inside)(s[rows], t[rows]) / size, exact)
    assert_same(torch.func.jacfwd(inside)(s[rows], t[rows]) / size, exact)


@pytest.mark.long
@pytest.mark.supports("batch split over devices", "PyTorch")
def test_torch_ranks_under_compile_checkpoint_and_func(tmp_path):
    on_ranks(2, transformed, tmp_path)


class Student:
    """A linear layer to train, with its inputs, the teacher's logits and the labels."""

    def __init__(self):
        import torch

        generator = torch.Generator().manual_seed(0)
        self.layer = torch.nn.Linear(5, C).double()
        with torch.no_grad():
            for x in self.layer.parameters():
                x.copy_(torch.randn(x.shape, generator=generator))
        self.x = torch.randn(N, 5, generator=generator).double()
        self.t = torch.randn(N, C, generator=generator).double()
        self.labels = torch.arange(N) % C

    def train(self, model, rows, weight=None):
        """Train for three steps, each of which updates the class prior; return the parameters."""
        import torch

        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        prior = gklx.ClassPriorState.uniform(C, like=self.t)
        for _ in range(3):
            settings = {"prior": prior.table, "labels": self.labels[rows], "gamma": 0.5, "mse_weight": 3.0}
            value = gklx.gkl(model(self.x[rows]), self.t[rows], **settings, sample_weight=weight)
            prior = prior.update(self.t[rows], self.labels[rows], sample_weight=weight).advance()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        return [x.detach().clone() for x in self.layer.parameters()]


def distributed_data_parallel(rank, size):
    import torch
    from torch.nn.parallel import DistributedDataParallel

    rows = slice(CUTS[size][rank], CUTS[size][rank + 1])
    alone = Student()
    expected = alone.train(alone.layer, slice(None))
    split = Student()
    with gklx.global_batch():
        found = split.train(DistributedDataParallel(split.layer), rows)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other, ulps=64)

    # The last rank has a full batch of padding.
    masked = Student()
    weight = torch.ones(N, dtype=torch.float64)
    weight[CUTS[size][-2] :] = 0
    expected = masked.train(masked.layer, slice(None), weight)
    split = Student()
    split.x[CUTS[size][-2] :] = torch.nan if rank == size - 1 else 0.0
    split.x = torch.nan_to_num(split.x)
    split.t[CUTS[size][-2] :] = torch.nan
    with gklx.global_batch():
        found = split.train(DistributedDataParallel(split.layer), rows, weight[rows])
    for one, other in zip(found, expected, strict=True):
        assert torch.isfinite(one).all()
        assert_same(one, other, ulps=64)


def module_inside(rank, size):
    """The criterion is part of the wrapped model; DDP copies its buffers from rank 0, which are those of all ranks."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    import gklx.torch

    class Model(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.criterion = layer, gklx.torch.GKLLoss(C, gamma=0.5, warmup_epochs=2)

        def forward(self, x, t, labels):
            return self.criterion(self.layer(x), t, labels)

    def train(model, inner, data, rows):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        for _ in range(3):
            for _ in range(2):
                optimizer.zero_grad()
                model(data.x[rows], data.t[rows], data.labels[rows]).backward()
                optimizer.step()
            inner.criterion.advance()
        return [x.detach().double() for x in inner.state_dict().values()]

    alone, split = Student(), Student()
    model = Model(alone.layer)
    expected = train(model, model, alone, slice(None))
    model = Model(split.layer)
    with gklx.global_batch():
        rows = slice(CUTS[size][rank], CUTS[size][rank + 1])
        found = train(DistributedDataParallel(model), model, split, rows)
    for one, other in zip(found, expected, strict=True):
        assert_near(one.numpy(), other.numpy(), "float32", ulps=64)


@pytest.mark.supports("batch split over devices", "PyTorch")
def test_torch_criterion_may_be_part_of_the_wrapped_model(tmp_path):
    on_ranks(4, module_inside, tmp_path)


@pytest.mark.supports("batch split over devices", "PyTorch")
@pytest.mark.parametrize("size", [2, 4])
def test_torch_distributed_data_parallel_trains_as_one_process_does(size, tmp_path):
    """Uneven batches, an empty one (of four ranks) and a fully masked one included."""
    on_ranks(size, distributed_data_parallel, tmp_path)


def test_torch_global_batch_without_a_process_group_does_nothing():
    backends.needs("torch")
    s, t, _ = whole_batch("torch", CASES[0])
    with gklx.global_batch():
        assert_same(gklx.gkl(s, t), gklx.gkl(s, t))
        assert_same(gklx.class_sums(t, s.argmax(-1), C), gklx.class_sums(t, s.argmax(-1), C))


def a_rank_without_the_kernel(rank, size):
    """What the ranks exchange is of one dtype, whatever computes it."""
    import torch

    os.environ["GKLX_KERNEL"] = str(1 - rank)
    s, t = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
    for loss in (gklx.kl, partial(gklx.gkl, gamma=0.5)):
        for dtype in (torch.float32, torch.float64):
            whole, rows = loss(s.to(dtype), t.to(dtype)), slice(4 * rank, 4 * rank + 4)
            with gklx.global_batch():
                own = loss(s[rows].to(dtype), t[rows].to(dtype))
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(sum_over_ranks(own) / size, whole, rtol=8 * eps, atol=0)


def test_torch_ranks_without_the_kernel_beside_others(tmp_path):
    on_ranks(2, a_rank_without_the_kernel, tmp_path)


def test_global_batches_nest_and_are_local_to_a_thread():
    """The innermost context applies; another thread is in none."""
    import threading

    from gklx._core.ranks import entered as _entered

    inner, outer, seen = gklx.global_batch(axis_name="inner"), gklx.global_batch(axis_name="outer"), []
    with outer, inner:
        assert [over.axis_name for over in _entered.batches] == ["outer", "inner"]
        thread = threading.Thread(target=lambda: seen.append(_entered.batches))
        thread.start()
        thread.join()
    with pytest.raises(RuntimeError, match="stop"), outer, inner:
        raise RuntimeError("stop")
    assert _entered.batches == ()
    assert seen == [()]
    inner.__enter__()
    outer.__enter__()
    with pytest.raises(RuntimeError, match=r"^global_batch must end where it began: in the same thread, the innermost"):
        inner.__exit__(None, None, None)
    outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    assert _entered.batches == ()


def test_global_batch_of_the_wrong_kind_is_refused(backend):
    s = backend.array(np.zeros((2, 3)))
    name = backend.library.backend
    settings, message = {
        "torch": ({"axis_name": "i"}, r"^global_batch must have a process_group for PyTorch, got axis_name 'i'$"),
        "jax": ({}, r"^global_batch must have an axis_name for JAX, got process_group None$"),
    }.get(name, ({}, r"^global_batch must hold PyTorch or JAX arrays, got "))
    with gklx.global_batch(**settings), pytest.raises(TypeError, match=message):
        gklx.gkl(s, s)
    if name == "jax":
        with (
            gklx.global_batch(axis_name="i"),
            pytest.raises(ValueError, match=r"^axis_name must name an axis that is being mapped, got 'i'$"),
        ):
            gklx.gkl(s, s)


# --- JAX, eight devices of the host -----------------------------------------------------------------------------------


@pytest.fixture
def jax():
    backends.needs("jax")
    BY_NAME["jax"].array([0.0])  # enables float64
    jax = pytest.importorskip("jax")
    if len(jax.devices()) < 8:
        pytest.skip("JAX was started with fewer than eight devices")
    return jax


def test_jax_moves_arrays_that_nobody_put_anywhere(jax):
    """As in any operation of JAX; those that somebody did put on another device are an error."""
    here, there = jax.devices()[2], jax.devices()[3]
    s, t = (jax.device_put(x, here) for x in jax.random.normal(jax.random.key(0), (2, 6, C)))
    prior, labels = jax.numpy.full((C, C), 1 / C), jax.numpy.zeros(6, int)
    expected = jax.jit(lambda s, t: gklx.gkl(s, t, prior=prior, labels=labels))(s, t)
    found = gklx.gkl(s, t, prior=prior, labels=labels)
    assert found.devices() == {here}
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(gklx.gkl(jax.numpy.asarray(np.asarray(s)), t), gklx.gkl(s, t), rtol=1e-6)
    with pytest.raises(ValueError, match=r"^prior must be on the device of student_logits, .*2, got .*3$"):
        gklx.gkl(s, t, prior=jax.device_put(prior, there), labels=labels)


def mesh_of(jax, kind="Auto"):
    return jax.make_mesh((8,), ("i",), axis_types=(getattr(jax.sharding.AxisType, kind),))


def arrays_for_eight_devices(case, mask="none"):
    s, t, arrays = on(BY_NAME["jax"], "float64", *call(case, mask, batch=(16,), classes=24, seed=3))
    return s, t, arrays


def assert_close_on_jax(actual, expected, **more):
    assert_close(actual, np.asarray(expected), BY_NAME["jax"], "float64", ulps=64, **more)


JAX_CASES = [case for case in CASES if case.id in ("kl", "gkl-tau", "gkl-prior")]


def test_jax_prior_on_one_device_refuses_logits_over_several(jax):
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    logits, labels = np.zeros((16, 3), np.float32), np.zeros(16, np.int32)
    split = [jax.device_put(x, NamedSharding(mesh_of(jax), P("i"))) for x in (logits, labels)]
    prior = gklx.ClassPrior(3, like=jax.numpy.zeros(1))
    with pytest.raises(ValueError, match=r"^logits must be on this prior's device, .*, got several devices$"):
        prior.update(*split)


@pytest.mark.supports("batch split over devices", "JAX")
@pytest.mark.supports("classes split over devices", "JAX")
@pytest.mark.parametrize("axis", ["batch", "classes"])
@pytest.mark.parametrize("case", JAX_CASES, ids=lambda case: case.id)
def test_jax_sharded_arrays_give_the_same_numbers(jax, case, axis):
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = mesh_of(jax)
    spec = P("i", None) if axis == "batch" else P(None, "i")
    s, t, arrays = arrays_for_eight_devices(case, "samples")
    split = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (s, t)]
    run = jax.jit(jax.value_and_grad(loss_of(case), (0, 1)))
    value, gradients = run(*split, **arrays)
    assert_close_on_jax(value, loss_of(case)(s, t, **arrays))
    for found, exact in zip(gradients, gklx.grad(loss_of(case), (0, 1))(s, t, **arrays), strict=True):
        assert_close_on_jax(found, exact)
        assert found.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
    eager = gklx.grad(loss_of(case))(*split, **arrays)
    assert_close_on_jax(eager, gradients[0])
    labels = jax.numpy.arange(16) % 24
    assert_close_on_jax(gklx.class_sums(split[1][2:], labels[2:], 24), gklx.class_sums(t[2:], labels[2:], 24))


@pytest.mark.supports("batch split over devices", "JAX")
@pytest.mark.parametrize("case", JAX_CASES, ids=lambda case: case.id)
def test_jax_meshes_of_explicit_axes_give_the_same_numbers(jax, case):
    """JAX cannot infer how a gather is sharded there, so the caller gathers the prior's rows and names the sharding."""
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = mesh_of(jax, "Explicit")
    s, t, arrays = arrays_for_eight_devices(case)
    exact = gklx.grad(loss_of(case), (0, 1))(s, t, **arrays)
    for spec in (P("i", None), P(None, "i")):
        split = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (s, t)]
        rows = {}
        if "labels" in arrays:
            table = jax.device_put(arrays["prior"], NamedSharding(mesh, P()))
            labels = jax.device_put(arrays["labels"], NamedSharding(mesh, P(spec[0])))
            rows["prior"] = table.at[labels].get(out_sharding=NamedSharding(mesh, spec))
        for found, expected in zip(jax.jit(jax.grad(loss_of(case), (0, 1)))(*split, **rows), exact, strict=True):
            assert_close_on_jax(found, expected)


@pytest.mark.supports("batch split over devices", "JAX")
@pytest.mark.parametrize("case", JAX_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("mask", ["none", "samples"])
def test_jax_shard_map_with_an_axis_name(jax, case, mask):
    from jax.sharding import PartitionSpec as P

    s, t, arrays = arrays_for_eight_devices(case, mask)
    if mask == "samples":
        arrays["sample_weight"] = arrays["sample_weight"].at[4:8].set(0.0)  # two devices with nothing but padding
    specs = {name: P() if name == "prior" and "labels" in arrays else P("i") for name in arrays}

    def step(s, t, arrays):
        with gklx.global_batch(axis_name="i"):
            value, gradients = jax.value_and_grad(loss_of(case), (0, 1))(s, t, **arrays)
        return jax.lax.pmean(value, "i"), gradients

    for checked in (True, False):
        run = jax.jit(
            jax.shard_map(
                step,
                mesh=mesh_of(jax),
                in_specs=(P("i"), P("i"), specs),
                out_specs=(P(), P("i")),
                check_vma=checked,
            )
        )
        value, gradients = run(s, t, arrays)
        assert_close_on_jax(value, loss_of(case)(s, t, **arrays))
        for found, exact in zip(gradients, gklx.grad(loss_of(case), (0, 1))(s, t, **arrays), strict=True):
            assert_close_on_jax(found / 8, exact)


@pytest.mark.supports("batch split over devices", "JAX")
def test_jax_shard_map_trains_as_one_device_does(jax):
    """The loss is averaged over the devices, and the class prior is the same on all."""
    from jax.sharding import PartitionSpec as P

    s, t, _ = arrays_for_eight_devices(CASES[0])
    labels, parameters = jax.numpy.arange(16) % 24, jax.numpy.eye(24)
    state = gklx.ClassPriorState.uniform(24, like=t)

    def train(parameters, state, s, t, labels, mean=lambda x: x):
        def loss(parameters):
            return mean(gklx.gkl(s @ parameters, t, prior=state.table, labels=labels, gamma=0.5))

        for _ in range(2):
            parameters = parameters - 0.1 * jax.grad(loss)(parameters)
            state = state.update(t, labels).advance()
        return parameters, state

    def split(*arguments):
        with gklx.global_batch(axis_name="i"):
            return train(*arguments, mean=lambda x: jax.lax.pmean(x, "i"))

    run = jax.shard_map(split, mesh=mesh_of(jax), in_specs=(P(), P(), P("i"), P("i"), P("i")), out_specs=(P(), P()))
    found, exact = jax.jit(run)(parameters, state, s, t, labels), train(parameters, state, s, t, labels)
    assert_close_on_jax(found[0], exact[0])
    assert_close_on_jax(found[1].table, exact[1].table)


@pytest.mark.supports("batch split over devices", "JAX")
def test_jax_vmap_with_an_axis_name(jax):
    s, t, _ = arrays_for_eight_devices(CASES[0])

    def one(s, t):
        with gklx.global_batch(axis_name="i"):
            return gklx.gkl(s, t, gamma=0.5)

    values = jax.vmap(one, axis_name="i")(s.reshape(8, 2, 24), t.reshape(8, 2, 24))
    assert_close_on_jax(values.mean(), gklx.gkl(s, t, gamma=0.5))


# --- Dask -------------------------------------------------------------------------------------------------------------


@pytest.mark.supports("batch split over devices", "Dask")
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.id)
def test_dask_gradient_has_the_chunks_of_the_logits(case):
    """With uneven chunks of rows; nothing is computed before `compute`."""
    backends.needs("dask")
    import dask
    import dask.array as da

    s, t, arrays = call(case, "samples", batch=(N,))
    chunked = [da.from_array(x, chunks=((4, 5, 2), -1)) for x in (s, t)]
    rows = {name: x for name, x in arrays.items() if len(x) == N}
    given = {name: da.from_array(x, chunks=((4, 5, 2), *[-1] * (x.ndim - 1))) for name, x in rows.items()}
    given |= {name: da.from_array(x, chunks=-1) for name, x in arrays.items() if name not in rows}

    def refuse(graph, keys, **_):
        raise AssertionError("a Dask array was computed")

    with dask.config.set(scheduler=refuse):
        value, gradients = gklx.value_and_grad(loss_of(case), (0, 1))(*chunked, **given)
    exact_value, exact = gklx.value_and_grad(loss_of(case), (0, 1))(s, t, **arrays)
    assert_near(value.compute(scheduler="threads"), exact_value, "float64", ulps=16)
    for found, expected in zip(gradients, exact, strict=True):
        assert found.chunks == ((4, 5, 2), (C,))
        assert_near(found.compute(scheduler="threads"), expected, "float64", ulps=16)
