"""`gklx verify` finds no fault here, and reports a fault planted in one library as a fault of that library."""

import argparse
import importlib.machinery
import itertools
import json
import os
import re
import subprocess
import sys
import types
import xml.etree.ElementTree as ET

import numpy as np
import pytest

import backends
import gklx
import oracle
from gklx._cli import main
from gklx._cli.verify import add_to
from gklx._core.libraries import LIBRARIES, library_of
from gklx._run import cpu_library, cuda
from gklx._verify import cases, checks, definitions
from gklx._verify.checks import Check, Report, verify
from gklx._verify.executions import executions, pairs
from gklx._verify.places import Arguments, places
from gklx._verify.report import _BOUNDS, as_json, as_junit, as_markdown, as_table
from gklx.transforms import _unwrapped

OTHERS = [library.backend for library in LIBRARIES if library.backend not in ("numpy", "cupy")]
WITH_FUNCTIONS_OF_THEIR_OWN = [each for each in OTHERS if each != "dask"]  # Dask's chunks are NumPy's arrays
SET = cpu_library.instruction_set()
FEW = ("kl-T", "gkl-prior absent", "gkl-prior")


@pytest.fixture
def few(monkeypatch):
    """Some of the cases: all of them take seconds in JAX and Dask."""
    some = [problem for problem in cases.problems() if problem.name in FEW]
    assert len(some) == len(FEW)
    monkeypatch.setattr(checks, "problems", lambda: iter(some))
    monkeypatch.setattr(checks, "equivalents", lambda: itertools.islice(cases.equivalents(), 1))
    monkeypatch.setattr(checks, "DTYPES", ("float16", "float32"))
    monkeypatch.setattr(checks, "EQUIVALENT_IN", ("float32",))


@pytest.fixture(params=OTHERS)
def other(request):
    backends.needs(request.param)
    return request.param


@pytest.fixture(scope="module")
def here():
    """NumPy and, where it takes part, PyTorch: the two that run all cases in a second."""
    asked = not backends.REQUIRED or "torch" in backends.REQUIRED
    return ["numpy", "torch"] if asked and backends.absent("torch") is None else ["numpy"]


@pytest.fixture(scope="module")
def report(here):
    """Of all cases, but for PyTorch's compiler, which takes a second for each: it has the few."""
    with places(here) as (found, absent):
        quick = [each for each in executions(found) if not each.name.startswith("torch.compile")]
        return Report(quick, absent, checks.run(quick), 1.0)


def run(*argv):
    """The output of the command, and its exit code."""
    parser = argparse.ArgumentParser()
    add_to(parser.add_subparsers())
    arguments = parser.parse_args(["verify", *argv])
    shown = []
    status = arguments.run(arguments, shown.append)
    return "".join(shown), status


def test_problems_fill_the_vectors_of_a_kernel_and_leave_a_rest():
    """However the classes are weighed."""
    found = set()
    for each in cases.problems():
        call = _unwrapped(each.case.call())(each.student, each.teacher, **each.arrays)
        plan = cuda.plan_of(call, ())
        found.add((plan.weights, plan.decomposed, plan.vector))
    weighed = {("PROBABILITIES", False), ("PROBABILITIES", True), ("TEACHER_POWER", True), ("PRIOR_POWER", True)}
    assert found == {(*each, vector) for each in weighed for vector in (1, 2)}
    assert {each.student.shape[-1] % 16 for each in cases.problems()} == {8, 11}  # of AVX-512's 16 and of 4


def blamed(report):
    """The backends that the definitions find at fault."""
    return {check.places[0] for check in report.broken if check.kind == "definition"}


def names_of(backend):
    """The names of a library's executions here: on the kernel where there is one, compiled, and by the formulas."""
    by_kernel = {
        "numpy": ["numpy"],
        "dask": ["dask"],
        "torch": ["torch", "torch.compile"],
        "jax": ["jax", "jax.jit"] if cpu_library.serves_jax() else [],
    }
    kernels = by_kernel.get(backend, []) if SET else []
    return [*(f"{name} (kernel: {SET})" for name in kernels), f"{backend} (formulas)"]


def quick_names(here):
    """Those of `report`."""
    return [name for backend in here for name in names_of(backend) if not name.startswith("torch.compile")]


# --- all is well ------------------------------------------------------------------------------------------------------


def test_numpy_and_pytorch_are_within_every_bound(report, here):
    assert [check.message for check in report.broken] == []
    assert [each.name for each in report.executions] == quick_names(here)
    seen = {(check.kind, check.places, check.dtype, check.what) for check in report.checks}
    for each in report.executions:
        for dtype, what in itertools.product(each.place.library.dtypes, ("value", "gradient")):
            assert ("definition", (each.name,), dtype, what) in seen
    if SET:
        for backend in here:
            assert ("pair", (names_of(backend)[0], f"{backend} (formulas)"), "float32", "gradient") in seen
    assert ("equivalence", ("definition",), "float64", "gradient") in seen
    if len(here) > 1:
        assert ("pair", ("numpy (formulas)", "torch (formulas)"), "float32", "gradient") in seen
        assert ("definition", (names_of("torch")[0],), "bfloat16", "autodiff") in seen


def test_a_library_is_within_its_bounds(other, few):
    found = verify(["numpy", other])
    assert [check.message for check in found.broken] == []
    assert [each.name for each in found.executions] == names_of("numpy") + names_of(other)
    for kind in ("definition", "equivalence"):
        assert {check.places[0] for check in found.checks if check.kind == kind} >= {
            *names_of("numpy"),
            *names_of(other),
        }
    its_pairs = {(name, f"{other} (formulas)") for name in ("numpy (formulas)", *names_of(other)[:-1])}
    assert {check.places for check in found.checks if check.kind == "pair"} >= its_pairs
    assert max(check.ulps for check in found.checks) > 0


def test_cases_cover_losses_masks_and_extremes():
    names = [problem.name for problem in cases.problems()]
    assert len(set(names)) == len(names)
    for loss in ("kl", "dkl", "ikl", "gkl"):
        for mask in ("elements", "samples", "absent"):
            assert any(name.startswith(loss) and name.endswith(mask) for name in names), (loss, mask)
    assert len({problem.student.shape for problem in cases.problems()}) == 2
    for one, other in zip(cases.problems(), cases.problems(), strict=True):
        assert str(one) == str(other)


@pytest.mark.parametrize("problem", list(cases.problems()), ids=lambda problem: problem.name)
def test_definitions_against_those_of_the_tests(problem):
    """Two that were written apart; at extremes the tests' own are good for a few digits less."""
    with np.errstate(all="ignore"):
        case, arguments = problem.case, (problem.case.loss, problem.student, problem.teacher)
        found = definitions.exact(*arguments, case.settings, problem.arrays)
        value, to_s, to_t = oracle.evaluate(*arguments, **case.settings, **problem.arrays)
        entries, *_ = oracle.evaluate(*arguments, **case.settings, **problem.arrays, reduction="none")
        total, *_ = oracle.evaluate(*arguments, **case.settings, **problem.arrays, reduction="sum")
    for x, y in ((found.mean, value), (found.none, entries), (found.sum, total)):
        np.testing.assert_allclose(x, y, rtol=1e-14)
    for x, y in ((found.to_student, to_s), (found.to_teacher, to_t)):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-14 * np.abs(y).max())


def test_definitions_do_where_no_float_is_wider_than_64_bits(monkeypatch):
    monkeypatch.setattr(definitions, "_WIDE", np.float64)
    assert [check.message for check in verify(["numpy"]).broken] == []


def test_cases_cover_the_settings_of_gkl():
    """Its two normalisers, wMSE of one side and of both, and a prior by labels and by rows."""
    tried = [problem.case for problem in cases.problems() if problem.case.loss == "gkl"]
    assert {case.settings.get("normalize", "batch") for case in tried} == {"batch", "samples"}
    assert {case.settings.get("symmetric", True) for case in tried} == {True, False}
    assert {case.prior for case in tried} == {"", "labels", "rows"}


def test_bounds():
    plain, confident = (problem for problem in cases.problems() if problem.name in ("kl", "kl scale 30"))
    given = Arguments((plain.student, plain.teacher), {})
    for dtype, gradients in (("float16", 1), ("bfloat16", 1), ("float32", 32), ("float64", 32)):
        expected = checks._expected(plain, given.rounded(dtype), dtype)
        assert {each.bound for each in expected if each.what == "value"} == {32}
        of_confident = checks._expected(confident, given, dtype)
        assert min(np.min(each.unit) for each in of_confident if each.what == "value") in (2.0**-23, 2.0**-52)
        assert {each.bound for each in expected if each.what != "value"} == {gradients}


# --- planted faults ---------------------------------------------------------------------------------------------------


@pytest.fixture
def anew(other):
    """Clears JAX's compiled programs before and after the test."""
    clear = sys.modules["jax"].clear_caches if other == "jax" else lambda: None
    clear()
    yield
    clear()


@pytest.mark.usefixtures("anew")
@pytest.mark.parametrize("other", WITH_FUNCTIONS_OF_THEIR_OWN, indirect=True)
def test_a_wrong_exponential_turns_it_red(other, few, monkeypatch):
    module = backends.BY_BACKEND[other].namespace()
    true_exp = module.exp
    monkeypatch.setattr(module, "exp", lambda x: true_exp(x * (1 + 1e-4)))
    found = verify(["numpy", other])
    formulas = f"{other} (formulas)"
    assert blamed(found) == {formulas}
    assert {check.what for check in found.broken if check.kind == "definition"} >= {"value", "gradient"}
    assert {check.dtype for check in found.broken} == {"float16", "float32"} & set(backends.BY_BACKEND[other].dtypes)
    its_pairs = {(name, formulas) for name in ("numpy (formulas)", *names_of(other)[:-1])}
    assert {check.places for check in found.broken if check.kind == "pair"} == its_pairs

    text, status = run("--backend", "numpy", other, "--format", "junit")
    assert status == 1
    failed = [case for case in ET.fromstring(text.encode()).iter("testcase") if case.find("failure") is not None]
    names = {(case.get("classname"), case.get("name")) for case in failed}
    assert (f"gklx.verify.definition.{formulas}", "float32 gkl-prior") in names
    assert (f"gklx.verify.pair.numpy (formulas)-{formulas}", "float32") in names
    assert not [name for name in names if name[0].startswith("gklx.verify.definition.numpy")]
    (failure,) = (
        case.find("failure")
        for case in failed
        if case.get("classname") == f"gklx.verify.definition.{formulas}" and case.get("name") == "float32 kl-T"
    )
    assert re.match(
        rf"{other} \(formulas\), float32, kl-T, value: mean is \S+, expected \S+, [\d.e+]+ ulp off, "
        r"allowed 32 and \d+ more$",
        failure.get("message"),
    )
    assert f"{formulas}, float32, kl-T, gradient: gradient to the teacher element [" in failure.text


def test_a_wrong_exponential_of_numpy_is_numpys(few, here, monkeypatch):
    true_exp = np.exp

    def exp(x):
        of_formulas = sys._getframe(1).f_globals["__name__"] == "gklx._core.formulas"  # the definition uses NumPy's too
        return true_exp(x * (1 + 1e-4)) if of_formulas else true_exp(x)

    monkeypatch.setattr(backends.BY_BACKEND["numpy"].namespace(), "exp", exp)
    assert blamed(verify(here)) == {"numpy (formulas)"}


@pytest.mark.parametrize("library", ["numpy", "torch", "dask"])
def test_a_fault_of_the_kernel_is_the_kernels(few, library, monkeypatch):
    backends.needs(library)
    if SET is None:
        pytest.skip("no kernel is in use")
    true_run = cpu_library.run

    def run_hotter(request):
        request.temperature *= 1 + 1e-4
        true_run(request)

    monkeypatch.setattr(cpu_library, "run", run_hotter)
    found = verify([library])
    *kernels, formulas = names_of(library)
    assert blamed(found) == set(kernels)
    assert {check.places for check in found.broken if check.kind == "pair"} == {(name, formulas) for name in kernels}


def test_a_fault_of_the_kernel_in_jax(few, monkeypatch):
    backends.needs("jax")
    if not cpu_library.serves_jax():
        pytest.skip("no kernel with a handler for jax.ffi is in use")
    from gklx._run import xla

    true_evaluate = xla.evaluate

    def evaluate(call, asked):
        found = true_evaluate(call, asked)
        if not cpu_library.serves_jax():
            return found
        return found._replace(value=None if found.value is None else found.value * (1 + 1e-4))

    monkeypatch.setattr(xla, "evaluate", evaluate)
    assert blamed(verify(["jax"])) == {f"jax (kernel: {SET})", f"jax.jit (kernel: {SET})"}


def test_without_the_kernel_there_are_the_formulas(few, here, monkeypatch):
    monkeypatch.setenv("GKLX_KERNEL", "0")
    found = verify(here)
    assert [each.name for each in found.executions] == [f"{name} (formulas)" for name in here]
    assert found.broken == []


def test_the_choice_of_the_environment_is_put_back(monkeypatch):
    for before in (None, "1"):
        monkeypatch.delenv("GKLX_KERNEL", raising=False)
        if before is not None:
            monkeypatch.setenv("GKLX_KERNEL", before)
        with places(["numpy"]) as (here, _):
            *_, formulas = executions(here)
            seen = formulas.call(
                "float32", lambda x: x * float(os.environ["GKLX_KERNEL"]), Arguments((np.ones(1),), {})
            )
        assert seen.arrays[0] == 0
        assert os.environ.get("GKLX_KERNEL") == before


def test_a_kernel_is_compared_with_the_formulas_of_its_place(other):
    with places(["numpy", other]) as (here, _):
        found = [(one.name, its.name) for one, its in pairs(executions(here))]
    (*of_numpy, numpy), (*of_other, formulas) = names_of("numpy"), names_of(other)
    expected = [*((name, numpy) for name in of_numpy), *((name, formulas) for name in of_other), (numpy, formulas)]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("of", ["analytic", "autodiff"])
def test_a_sign_in_the_gradient_of_one_library(few, monkeypatch, of):
    backends.needs("torch")
    import gklx._autodiff
    from gklx._autodiff import torch as adapter

    if of == "analytic":
        true = gklx._autodiff.value_and_gradients

        def flipped(problem, asked):
            found = true(problem, asked)
            if library_of(problem.arrays.student).backend != "torch" or found.teacher is None:
                return found
            return found._replace(teacher=-found.teacher)

        monkeypatch.setattr(gklx._autodiff, "value_and_gradients", flipped)
    else:
        backward = adapter._EagerLoss.backward

        def flipped(ctx, *upstream):
            plan, student, teacher, *rest = backward(ctx, *upstream)
            return plan, student, -teacher, *rest

        monkeypatch.setattr(adapter._EagerLoss, "backward", staticmethod(flipped))
    found = verify(["numpy", "torch"])
    what = "gradient" if of == "analytic" else "autodiff"
    broken = [check for check in found.broken if check.kind == "definition"]
    names = names_of("torch") if of == "analytic" else [name for name in names_of("torch") if "compile" not in name]
    assert {(*check.places, check.what) for check in broken} == {(name, what) for name in names}
    assert all("gradient to the teacher" in check.message for check in broken)


@pytest.mark.parametrize("other", WITH_FUNCTIONS_OF_THEIR_OWN, indirect=True)
def test_a_library_that_raises_is_a_broken_case_and_not_the_end(other, few, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no\n\x1b[31msums")

    monkeypatch.setattr(backends.BY_BACKEND[other].namespace(), "sum", broken)
    found = verify(["numpy", other])
    # The kernel needs no sum; the derivative of a program of JAX may.
    assert {f"{other} (formulas)"} <= blamed(found) <= set(names_of(other))
    assert {check.message for check in found.broken} == {"raised RuntimeError: no \x1b[31msums"}
    assert any(check.places == ("numpy (formulas)",) for check in found.checks)
    failures = ET.fromstring(as_junit(found).encode()).iter("failure")
    assert all("raised RuntimeError: no [31msums" in each.get("message") for each in failures)
    assert json.loads(as_json(found))["broken"][0]["ulps"] is None
    assert "raised RuntimeError" in as_table(found)
    assert "raised RuntimeError" in as_markdown(found)


def test_another_dtype_is_a_fault(few, monkeypatch):
    import gklx._autodiff

    true = gklx._autodiff.value
    monkeypatch.setattr(gklx._autodiff, "value", lambda problem: true(problem).astype("float64"))
    messages = {check.message for check in verify(["numpy"]).broken}
    assert messages == {"losses is of float64, expected float32"}


def test_gradients_of_dkl_that_are_not_those_of_kl(few, monkeypatch):
    monkeypatch.setitem(cases.LOSSES, "dkl", gklx.ikl)
    found = verify(["numpy"])
    assert {(check.kind, check.what) for check in found.broken} == {
        ("equivalence", "gradient"),
        ("equivalence", "definition"),
    }
    assert json.loads(as_json(found))["kl_equals_dkl"] is False
    flat = " ".join(as_table(found).split())
    assert "KL = DKL, numpy (formulas), float32, T=0.5, gradient: gradient to the teacher element [" in flat


# --- what is here -----------------------------------------------------------------------------------------------------


def only(monkeypatch, *names):
    monkeypatch.setattr("gklx._verify.places.LIBRARIES", [backends.BY_BACKEND[name] for name in names])


def test_libraries_that_are_not_here_are_told(few, monkeypatch):
    only(monkeypatch, "numpy", "torch")
    monkeypatch.setitem(sys.modules, "torch", None)
    found = verify(None)
    assert (found.absent, found.broken) == ({"torch": "not installed"}, [])
    (skipped,) = ET.fromstring(as_junit(found).encode()).iter("skipped")
    assert skipped.get("message") == "not installed"
    assert "| torch | – | – | not installed |" in as_markdown(found)
    assert json.loads(as_json(found))["absent"] == {"torch": "not installed"}


def test_a_library_that_fails_to_import_is_told(monkeypatch):
    def namespace():
        raise OSError("libfoo.so: undefined\nsymbol")

    broken = backends.BY_BACKEND["numpy"]._replace(namespace=namespace)
    monkeypatch.setattr("gklx._verify.places.LIBRARIES", [broken])
    with places(None) as (here, absent):
        assert (here, absent) == ([], {"numpy": "cannot be imported (libfoo.so: undefined symbol)"})
    with (
        pytest.raises(ValueError, match=r"^backend numpy cannot be used, numpy: cannot be imported "),
        places(["numpy"]),
    ):
        pass


def test_cupy_without_a_gpu_is_told(monkeypatch):
    def count():
        raise RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")

    cupy = types.ModuleType("cupy")
    cupy.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    cupy.cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(getDeviceCount=count))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    library = backends.BY_BACKEND["cupy"]._replace(namespace=lambda: cupy)
    monkeypatch.setattr("gklx._verify.places.LIBRARIES", [library])
    with places(None) as (here, absent):
        assert here == []
        assert absent["cupy"].startswith("no CUDA GPU that CuPy can use (cudaErrorNoDevice")


def test_a_gpu_is_a_backend_of_its_own_and_a_broken_one_leaves_the_cpu(monkeypatch):
    backends.needs("torch")
    import torch

    only(monkeypatch, "numpy", "torch")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with places(None) as (here, absent):
        assert "torch" in [place.name for place in here]
        if not torch.cuda.is_available():
            assert absent["torch cuda:0"].startswith("device cuda:0: PyTorch cannot compute there (")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"^backend torch cannot be used, torch cuda:0: device cuda:0: "):
            verify(["torch"])


def test_jax_devices(monkeypatch):
    backends.needs("jax")
    import jax

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [None])
    only(monkeypatch, "jax")
    before = jax.config.jax_enable_x64
    with places(None) as (here, absent):
        assert "jax" in [place.name for place in here]
        assert absent["jax gpu:0"].startswith("device gpu:0: JAX cannot compute there (")
        assert jax.config.jax_enable_x64
    assert jax.config.jax_enable_x64 == before


@pytest.mark.parametrize("name", ["tensorflow", "numpy gpu:0", ""])
def test_a_backend_that_is_not_here(name):
    with pytest.raises(ValueError, match=re.escape(repr(name)) if name in ("tensorflow", "") else name):
        run("--backend", "numpy", name)


# --- reports ----------------------------------------------------------------------------------------------------------


def test_table(report, monkeypatch):
    for columns in ("40", "80", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        text = as_table(report)
        assert "…" not in text
        assert _BOUNDS in text.splitlines()  # not broken into lines that a terminal breaks once more
        flat = " ".join(text.split())
        assert "all within their bounds; the gradients of KL and DKL are the same" in flat
        for title in ("Backends", "Farthest from the definitions", "KL ≡ DKL"):
            assert title in text
        for name in names_of("numpy"):
            assert re.search(rf"^{re.escape(name)} +float32 +\d\.\d+ +\d\.\d+ +– ", text, re.MULTILINE)


def test_markdown(report):
    text = as_markdown(report)
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert len(tables) == (4 if len(report.executions) > 1 else 3)
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "**" not in text


def test_json(report, here):
    found = json.loads(as_json(report), parse_constant=pytest.fail)
    assert list(found["backends"]) == quick_names(here)
    assert [each["kernel"] for each in found["backends"].values()] == [each.kernel for each in report.executions]
    assert found["backends"]["numpy (formulas)"]["version"] == np.__version__
    assert (found["checks"], found["broken"], found["kl_equals_dkl"]) == (len(report.checks), [], True)
    by_key = {(each["kind"], *each["backends"], each["dtype"], each["what"]): each for each in found["farthest"]}
    for check in report.checks:
        assert check.ulps <= by_key[(check.kind, *check.places, check.dtype, check.what)]["ulps"]


def test_junit_counts_add_up(report):
    root = ET.fromstring(as_junit(report).encode())
    assert [suite.tag for suite in root] == ["testsuite"] * len(root)
    tests = list(root.iter("testcase"))
    assert int(root.get("tests")) == len(tests) == sum(int(suite.get("tests")) for suite in root)
    assert (root.get("failures"), root.get("errors"), root.get("skipped")) == ("0", "0", "0")
    names = [(case.get("classname"), case.get("name")) for case in tests]
    assert len(set(names)) == len(names)


def test_many_faults_are_cut_short_but_in_json():
    check = Check("definition", ("numpy",), "float32", "kl", "value", 100.0, 32.0, "mean is 1, expected 2")
    report = Report([], {}, [check] * 30, 1.0)
    assert as_table(report).count("mean is 1, expected 2") == as_markdown(report).count("mean is 1") == 20
    assert "and 10 more" in as_table(report)
    assert "30 comparisons in 1 s, 30 beyond their bound:" in as_table(report)
    assert len(json.loads(as_json(report))["broken"]) == 30


@pytest.mark.parametrize("format_", ["table", "json", "junit", "markdown"])
def test_command(few, capsys, format_):
    assert main(["verify", "--backend", "numpy", "--format", format_]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "numpy" in out
    assert main(["verify", "--backend", "tensorflow"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("gklx: error: backends must be among numpy, torch, ")


@pytest.mark.long
@pytest.mark.side_by_side
@pytest.mark.together
@pytest.mark.parametrize("library", ["dask", "jax", "torch", "array_api_strict", "numpy"])
def test_command_finds_no_fault_in_any_case(library):
    """A test each: those of PyTorch and JAX take half a minute."""
    backends.needs(library)
    flags = os.environ["XLA_FLAGS"].replace(backends.EIGHT_DEVICES, "").strip()
    command = [sys.executable, "-m", "gklx", "verify", "--backend", library]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "XLA_FLAGS": flags})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " comparisons in " in done.stdout
    assert "all within their bounds" in done.stdout


def test_help_imports_no_library():
    code = (
        "import argparse, sys\nfrom gklx._cli.verify import add_to\nparser = argparse.ArgumentParser()\n"
        "add_to(parser.add_subparsers())\nparser.format_help()\n"
        "print([m for m in ('torch', 'jax', 'dask', 'rich', 'gklx._verify') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
