"""Fuzz value and both gradients of all losses against their definitions in decimal arithmetic.

Shapes, scales, masks, infinities, NaN, priors, weights, hyper-parameters, dtypes and layouts are random. An error may
not exceed the bound on rounding errors of `tests/exact.py`. Each finding is one line, with the options that repeat the
problem.

    python benches/fuzz_losses.py --seconds 600 --backend torch
    python benches/fuzz_losses.py --backend torch --seed 7 --problem 123
"""

import argparse
import functools
import os
import pathlib
import random
import sys
import time
from typing import Any, NamedTuple

import numpy as np

import gklx

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))
import exact
from backends import BY_NAME, Backend
from cases import LOSSES

INF, NAN = np.inf, np.nan
BACKENDS = ("numpy", "torch", "jax", "jax-jit", "dask", "strict")
FILLS = (-1e4, -1e5, -1e6, -1e7, -1e8, -1e9)


class Problem(NamedTuple):
    """A call of a loss; its float64 arrays are rounded to the dtypes later."""

    loss: str
    settings: dict[str, Any]
    dtypes: tuple[str, str]
    """The dtypes of the student's and the teacher's logits."""
    student: np.ndarray
    teacher: np.ndarray
    arrays: dict[str, np.ndarray]


def problem(rng: np.random.Generator, dtypes: tuple[str, ...]) -> Problem:
    """A random problem; the two networks may have different dtypes."""
    pick = random.Random(int(rng.integers(2**32)))  # faster at choices than NumPy's generator
    batch = pick.choice([(), (1,), (2,), (3,), (5,), (2, 2), (3, 1)])
    shape = (*batch, pick.choice([1, 2, 3, 4, 5, 6, 7, 9, 16] + [33, 130] * (len(batch) < 2)))
    dtype_s = pick.choice(dtypes)
    dtype_t = dtype_s if pick.random() < 0.9 else pick.choice(dtypes)
    compute_dtype = "float64" if "float64" in (dtype_s, dtype_t) else "float32"
    largest = min(min(exact.LARGEST[x], 1e300) for x in (dtype_s, dtype_t))
    name = pick.choice(list(LOSSES))
    s, t = logits(rng, pick, shape, largest)
    arrays: dict[str, np.ndarray] = {}
    if pick.random() < 0.3:
        size = pick.choice([shape, shape[-1:], (*batch, 1), (1,) * len(batch) + shape[-1:]])
        arrays["where"] = where = rng.random(size) < pick.choice([0.3, 0.7, 0.95])
        masked = ~np.broadcast_to(where, shape)
        s[masked], t[masked] = pick.choice([(NAN, INF), (0.0, -INF), (-0.9 * largest, 0.9 * largest), (5.0, NAN)])
    if pick.random() < 0.4:
        exponent = 30 if compute_dtype == "float32" else 250
        scale = 10.0 ** pick.choice([0, 0, 0, -exponent, exponent, pick.uniform(-exponent, exponent)])
        v = scale * rng.random(batch) * 10.0 ** (pick.choice([0, 0, 3]) * rng.standard_normal(batch))
        v = np.minimum(v, 1e8 * 10.0**exponent)  # finite in the dtype computed in
        arrays["sample_weight"] = np.where(rng.random(batch) < 0.2, 0.0, v)
    settings: dict[str, Any] = {"reduction": pick.choice(["mean", "mean", "sum", "none"])}
    temperatures = [1.0, 1.0, 1.0, 0.5, 3.0, 4.0, 1e-3, 1e3, pick.uniform(0.1, 10)]
    settings["temperature"] = pick.choice(temperatures)
    if name != "kl":
        settings["mse_weight"], settings["ce_weight"] = pick.choice([(1.0, 1.0), (20.0, 4.0), (0.0, 1.0), (1.0, 0.0)])
    if name in ("ikl", "gkl"):
        settings["weight_temperature"] = pick.choice(temperatures)
        add_prior(rng, pick, shape, arrays, np.finfo(compute_dtype).tiny)
    if name == "gkl":
        settings["gamma"] = pick.choice([0.0, 0.5, 1.0, 2.0, 8.0, pick.uniform(0, 3)])
        settings["symmetric"], settings["normalize"] = pick.random() < 0.7, pick.choice(["batch", "batch", "samples"])
    return Problem(name, settings, (dtype_s, dtype_t), s, t, arrays)


def logits(rng: np.random.Generator, pick: random.Random, shape: tuple[int, ...], largest: float) -> tuple[Any, Any]:
    """Random logits of student and teacher, often of an extreme kind."""
    scale = min(pick.choice([0.01, 1.0, 3.0, 30.0, 300.0, 1e4, 1e18, 0.1 * largest]), 0.1 * largest)
    s, t = scale * rng.standard_normal((2, *shape))
    kind = pick.choice(
        ["plain", "plain", "offsets", "close", "equal", "fills", "fill in both", "confident", "constant"]
    )
    if kind == "offsets":
        s, t = s + min(pick.choice([1e2, 1e4, -1e5]), largest / 2), t - min(pick.choice([1e2, 1e4, -1e5]), largest / 2)
    elif kind in ("close", "equal"):
        s = (
            t.copy()
            if kind == "equal"
            else t * (1 + pick.choice([1e-16, 1e-7, 1e-4, 1e-2]) * rng.standard_normal(shape))
        )
    elif kind in ("fills", "fill in both"):
        which = rng.random(shape) < 0.4
        s[which] = max(pick.choice([*FILLS, -largest]), -largest)
        which = which if kind == "fill in both" else rng.random(shape) < 0.4
        t[which] = s[which] if kind == "fill in both" else max(pick.choice([*FILLS, -largest]), -largest)
    elif kind == "confident":
        s[..., 0] += pick.choice([0.0, 20.0, 80.0, 800.0])
        t[..., -1] += pick.choice([0.0, 20.0, 80.0, 800.0])
    elif kind == "constant":
        s, t = np.full(shape, s.flat[0]), np.full(shape, t.flat[0])
    for x in (s, t):
        if pick.random() < 0.15:
            x[rng.random(shape) < 0.2] = -INF
        if pick.random() < 0.08 and len(shape) > 1:
            x[pick.randrange(shape[0])].flat[0] = pick.choice([NAN, INF, -INF])
    if pick.random() < 0.15:
        both = rng.random(shape) < 0.2
        s[both], t[both] = -INF, -INF
    return s, t


def add_prior(
    rng: np.random.Generator, pick: random.Random, shape: tuple[int, ...], arrays: dict[str, Any], smallest: float
) -> None:
    """Add a prior to the arrays, or a prior and labels, or neither.

    An entry whose quotient by its row's largest is below the smallest normal number counts as 0, or keeps a part of
    its digits. Such entries are made 0.
    """
    kind, classes = pick.choice(["none", "rows", "labels"]), shape[-1]
    if kind == "none":
        return
    size = (classes,) if kind == "labels" else shape[:-1]
    prior = rng.dirichlet(np.full(classes, pick.choice([0.05, 1.0, 100.0])), size)
    prior *= 10.0 ** pick.choice([0, 0, 0, -25, -12, 12, 18, 38, pick.uniform(-25, 38)])
    prior[rng.random(prior.shape) < pick.choice([0, 0, 0.3])] = 0.0
    prior[prior < 2 * smallest * prior.max(axis=-1, keepdims=True)] = 0.0
    if pick.random() < 0.15 and len(prior.shape) > 1:
        prior[0] = 0.0
    arrays["prior"] = prior
    if kind == "labels":
        arrays["labels"] = rng.integers(0, classes, shape[:-1])


def with_layout(backend: Backend, x: Any, layout: int) -> Any:
    """The same values in another memory layout: transposed or strided."""
    if backend.library.backend not in ("numpy", "torch") or x.ndim < 2 or layout == 0:
        return x
    if layout == 1:
        axes = tuple(reversed(range(x.ndim)))
        return backend.xp.permute_dims(with_layout(backend, backend.xp.permute_dims(x, axes), 2), axes)
    return backend.xp.stack([x, x], axis=-1)[..., 0]


def results(backend: Backend, given: Problem, layout: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The values, gradients and their error bounds in decimals, and the values and gradients of the package."""
    compute_dtype = "float64" if "float64" in given.dtypes else "float32"
    s, t = (with_layout(backend, backend.array(x, to), layout) for x, to in zip(given[3:5], given.dtypes, strict=True))
    arrays = {
        name: backend.array(x, compute_dtype if x.dtype.kind == "f" else None) for name, x in given.arrays.items()
    }
    rounded = {name: backend.numpy(x) if name != "labels" else given.arrays[name] for name, x in arrays.items()}
    if "where" in rounded:
        rounded["where"] = given.arrays["where"]
    expected = exact.evaluate(
        given.loss, backend.numpy(s), backend.numpy(t), **rounded, **given.settings, dtype=compute_dtype
    )
    loss = functools.partial(LOSSES[given.loss], **given.settings)
    if given.settings["reduction"] == "none":
        found = [backend.wrap(loss)(s, t, **arrays)]
    else:
        value, gradients = backend.wrap(gklx.value_and_grad(loss, (0, 1)))(s, t, **arrays)
        found = [value, *gradients]
        if backend.library.differentiates:
            found += by_autodiff(backend, loss, s, t, arrays)
    return list(expected), [backend.numpy(x) for x in found]


def by_autodiff(backend: Backend, loss: Any, s: Any, t: Any, arrays: dict[str, Any]) -> list[Any]:
    """Value and gradients by the library's automatic differentiation."""
    if backend.library.backend == "jax":
        import jax

        value, gradients = backend.wrap(jax.value_and_grad(functools.partial(loss, **arrays), (0, 1)))(s, t)
        return [value, *gradients]
    s, t = s.detach().requires_grad_(), t.detach().requires_grad_()
    value = loss(s, t, **arrays)
    value.backward()
    return [value.detach(), s.grad, t.grad]


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--problem", type=int, help="the number of the only problem to run")
    parser.add_argument("--backend", choices=BACKENDS, default="numpy")
    options = parser.parse_args()
    backend = BY_NAME[options.backend]
    print(f"seed {options.seed}, backend {options.backend}", flush=True)
    kernels = ("1", "0") if backend.library.backend in ("numpy", "torch", "jax") else ("0",)
    stop, findings, number = time.monotonic() + options.seconds, 0, options.problem or 0
    while options.problem is not None or time.monotonic() < stop:
        rng = np.random.default_rng((options.seed, number))
        given, layout = problem(rng, backend.dtypes), int(rng.integers(3))
        compute_dtype = "float64" if "float64" in given.dtypes else "float32"
        for kernel in kernels:
            os.environ["GKLX_KERNEL"] = kernel
            try:
                expected, found = results(backend, given, layout)
                dtypes = [compute_dtype, *given.dtypes]
                faults = [
                    (
                        ("value", "to student", "to teacher")[i % 3],
                        exact.fault(x, expected[i % 3], expected[3 + i % 3], dtypes[i % 3]),
                    )
                    for i, x in enumerate(found)
                ]
            except Exception as error:
                faults = [("", f"{type(error).__name__}: {error}")]
            for what, text in faults:
                if text:
                    findings += 1
                    options_to_repeat = f"--backend {options.backend} --seed {options.seed} --problem {number}"
                    print(f"{options_to_repeat}: {given.loss}, kernel {kernel}, {what}: {text}", flush=True)
                    break
        if options.problem is not None:
            print(given)
            break
        number += 1
    print(f"{number} problems, {findings} findings")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
