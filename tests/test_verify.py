"""`gklx verify`: all is well here, and a fault planted in one library turns it red and is told as that library's."""

import argparse
import importlib.machinery
import itertools
import json
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
from gklx._verify import cases, checks, definitions
from gklx._verify.calls import Arguments
from gklx._verify.checks import Check
from gklx._verify.junit import as_junit
from gklx._verify.places import places
from gklx._verify.report import as_json, as_markdown, as_table
from gklx._verify.verify import Report, verify

OTHERS = [library.backend for library in LIBRARIES if library.backend not in ("numpy", "cupy")]
FEW = ("kl T=2.5", "gkl gamma=0.5 -inf", "gkl prior gamma=0.3")


@pytest.fixture
def few(monkeypatch):
    """Some of the cases: JAX and Dask take seconds over all of them."""
    some = [case for case in cases.cases() if case.name in FEW]
    assert len(some) == len(FEW)
    monkeypatch.setattr(checks, "cases", lambda: iter(some))
    monkeypatch.setattr(checks, "equivalents", lambda: itertools.islice(cases.equivalents(), 1))
    monkeypatch.setattr(checks, "DTYPES", ("float16", "float32"))
    monkeypatch.setattr(checks, "_EQUIVALENT_IN", ("float32",))


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
    return verify(here)


def run(*argv):
    """What the command prints, and its exit code."""
    parser = argparse.ArgumentParser()
    add_to(parser.add_subparsers())
    arguments = parser.parse_args(["verify", *argv])
    return arguments.run(arguments)


def blamed(report):
    """The backends that the definitions find at fault."""
    return {check.places[0] for check in report.broken if check.kind == "definition"}


# --- all is well ------------------------------------------------------------------------------------------------------


def test_numpy_and_pytorch_are_within_every_bound(report, here):
    assert [check.told for check in report.broken] == []
    assert [place.name for place in report.places] == here
    seen = {(check.kind, check.places, check.dtype, check.what) for check in report.checks}
    for place in report.places:
        for dtype, what in itertools.product(place.library.dtypes, ("value", "gradient")):
            assert ("definition", (place.name,), dtype, what) in seen
    assert ("equivalence", ("definition",), "float64", "gradient") in seen
    if len(here) > 1:
        assert ("pair", tuple(here), "float32", "gradient") in seen
        assert ("definition", ("torch",), "bfloat16", "autodiff") in seen


def test_a_library_is_within_its_bounds(other, few):
    found = verify(["numpy", other])
    assert [check.told for check in found.broken] == []
    assert {check.kind for check in found.checks} == {"definition", "pair", "equivalence"}
    assert max(check.ulps for check in found.checks) > 0


def test_cases_cover_losses_masks_and_extremes():
    names = [case.name for case in cases.cases()]
    assert len(set(names)) == len(names)
    for loss in ("kl", "dkl", "ikl", "gkl"):
        for mask in ("where", "sample_weight", "-inf"):
            assert any(name.startswith(loss) and name.endswith(mask) for name in names), (loss, mask)
    assert len({case.student.shape for case in cases.cases()}) == 1
    for one, other in zip(cases.cases(), cases.cases(), strict=True):
        assert str(one) == str(other)


@pytest.mark.parametrize("case", list(cases.cases()), ids=lambda case: case.name)
def test_definitions_against_those_of_the_tests(case):
    """Two that were written apart; at extremes the tests' own are good for a few digits less."""
    with np.errstate(all="ignore"):
        found = definitions.exact(case.loss, case.student, case.teacher, case.settings, case.arrays)
        arguments = (case.loss, case.student, case.teacher)
        value, to_s, to_t = oracle.evaluate(*arguments, **case.settings, **case.arrays)
        entries, *_ = oracle.evaluate(*arguments, **case.settings, **case.arrays, reduction="none")
        total, *_ = oracle.evaluate(*arguments, **case.settings, **case.arrays, reduction="sum")
    for x, y in ((found.mean, value), (found.none, entries), (found.sum, total)):
        np.testing.assert_allclose(x, y, rtol=1e-14)
    for x, y in ((found.to_student, to_s), (found.to_teacher, to_t)):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-14 * np.abs(y).max())


def test_definitions_do_where_no_float_is_wider_than_64_bits(monkeypatch):
    monkeypatch.setattr(definitions, "_WIDE", np.float64)
    assert [check.told for check in verify(["numpy"]).broken] == []


def test_bounds():
    case, *_, confident = (case for case in cases.cases() if case.name in ("kl", "kl scale 30"))
    given = Arguments((case.student, case.teacher), {})
    for dtype, gradients in (("float16", 1), ("bfloat16", 1), ("float32", 32), ("float64", 32)):
        of_call, of_autodiff = checks._expected(case, given.rounded(dtype), dtype)
        assert {each.bound for each in of_call if each.what == "value"} == {32}
        of_confident, _ = checks._expected(confident, Arguments((case.student, case.teacher), {}), dtype)
        assert min(np.min(each.unit) for each in of_confident if each.what == "value") in (2.0**-23, 2.0**-52)
        assert {each.bound for each in (*of_call, *of_autodiff) if each.what != "value"} == {gradients}


# --- planted faults ---------------------------------------------------------------------------------------------------


def test_a_wrong_exponential_turns_it_red(other, few, monkeypatch):
    module = backends.BY_BACKEND[other].namespace()
    true_exp = module.exp
    monkeypatch.setattr(module, "exp", lambda x: true_exp(x * (1 + 1e-4)))
    if other == "torch":  # whose softmax has an exponential of its own
        torch = sys.modules["torch"]
        true_softmax = torch.softmax
        monkeypatch.setattr(torch, "softmax", lambda x, dim: true_softmax(x * (1 + 1e-4), dim=dim))
    found = verify(["numpy", other])
    assert blamed(found) == {other}
    assert {check.what for check in found.broken if check.kind == "definition"} >= {"value", "gradient"}
    assert {check.dtype for check in found.broken} == {"float16", "float32"} & set(backends.BY_BACKEND[other].dtypes)
    assert {check.places for check in found.broken if check.kind == "pair"} == {("numpy", other)}

    text, status = run("--backend", "numpy", other, "--format", "junit")
    assert status == 1
    failed = [case for case in ET.fromstring(text.encode()).iter("testcase") if case.find("failure") is not None]
    names = {(case.get("classname"), case.get("name")) for case in failed}
    assert (f"gklx.verify.definition.{other}", "float32 gkl prior gamma=0.3") in names
    assert (f"gklx.verify.pair.numpy-{other}", "float32") in names
    assert not [name for name in names if name[0] == "gklx.verify.definition.numpy"]
    (failure,) = (
        case.find("failure")
        for case in failed
        if case.get("classname") == f"gklx.verify.definition.{other}" and case.get("name") == "float32 kl T=2.5"
    )
    assert re.match(
        rf"{other}, float32, kl T=2\.5, value: mean is \S+, expected \S+, [\d.e+]+ ulp off, allowed 32 and \d+ more$",
        failure.get("message"),
    )
    assert f"{other}, float32, kl T=2.5, gradient: gradient to the teacher element [" in failure.text


def test_a_wrong_exponential_of_numpy_is_numpys(few, here, monkeypatch):
    true_exp = np.exp
    monkeypatch.setattr(backends.BY_BACKEND["numpy"].namespace(), "exp", lambda x: true_exp(x * (1 + 1e-4)))
    assert blamed(verify(here)) == {"numpy"}


@pytest.mark.parametrize("of", ["analytic", "autodiff"])
def test_a_sign_in_the_gradient_of_one_library(few, monkeypatch, of):
    backends.needs("torch")
    import gklx._autodiff
    from gklx._autodiff import _torch

    if of == "analytic":
        true = gklx._autodiff.value_and_gradients

        def flipped(problem, **asked):
            found = true(problem, **asked)
            if library_of(problem.arrays.student).backend != "torch" or found.teacher is None:
                return found
            return found._replace(teacher=-found.teacher)

        monkeypatch.setattr(gklx._autodiff, "value_and_gradients", flipped)
    else:
        backward = _torch._EagerLoss.backward

        def flipped(ctx, *upstream):
            plan, student, teacher, *rest = backward(ctx, *upstream)
            return plan, student, -teacher, *rest

        monkeypatch.setattr(_torch._EagerLoss, "backward", staticmethod(flipped))
    found = verify(["numpy", "torch"])
    what = "gradient" if of == "analytic" else "autodiff"
    broken = [check for check in found.broken if check.kind == "definition"]
    assert {(check.places, check.what) for check in broken} == {(("torch",), what)}
    assert all("gradient to the teacher" in check.told for check in broken)


def test_a_library_that_raises_is_a_broken_case_and_not_the_end(other, few, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no\n\x1b[31msums")

    monkeypatch.setattr(backends.BY_BACKEND[other].namespace(), "sum", broken)
    found = verify(["numpy", other])
    assert blamed(found) == {other}
    assert {check.told for check in found.broken} == {"raised RuntimeError: no \x1b[31msums"}
    assert any(check.places == ("numpy",) for check in found.checks)
    failures = ET.fromstring(as_junit(found).encode()).iter("failure")
    assert all("raised RuntimeError: no [31msums" in each.get("message") for each in failures)
    assert json.loads(as_json(found))["broken"][0]["ulps"] is None
    assert "raised RuntimeError" in as_table(found)
    assert "raised RuntimeError" in as_markdown(found)


def test_another_dtype_is_a_fault(few, monkeypatch):
    import gklx._autodiff

    true = gklx._autodiff.value
    monkeypatch.setattr(gklx._autodiff, "value", lambda problem: true(problem).astype("float64"))
    told = {check.told for check in verify(["numpy"]).broken}
    assert told == {"losses is float64 [6], expected float32 [6]"}


def test_gradients_of_dkl_that_are_not_those_of_kl(few, monkeypatch):
    monkeypatch.setitem(cases.LOSSES, "dkl", gklx.ikl)
    found = verify(["numpy"])
    assert {(check.kind, check.what) for check in found.broken} == {
        ("equivalence", "gradient"),
        ("equivalence", "definition"),
    }
    assert json.loads(as_json(found))["kl_equals_dkl"] is False
    assert "KL = DKL, numpy, float32, T=0.5, gradient: gradient to the teacher element [" in as_table(found)


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
        flat = " ".join(text.split())
        assert "all within their bounds; the gradients of KL and DKL are the same" in flat
        for title in ("Backends", "Farthest from the definitions", "KL ≡ DKL"):
            assert title in text
        assert re.search(r"^numpy +float32 +\d\.\d+ +\d\.\d+ +– ", text, re.MULTILINE)


def test_markdown(report, here):
    text = as_markdown(report)
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert len(tables) == (4 if len(here) > 1 else 3)
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "**" not in text


def test_json(report, here):
    found = json.loads(as_json(report), parse_constant=pytest.fail)
    assert list(found["backends"]) == here
    assert found["backends"]["numpy"]["version"] == np.__version__
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


def test_help_imports_no_library():
    code = (
        "import argparse, sys\nfrom gklx._cli.verify import add_to\nparser = argparse.ArgumentParser()\n"
        "add_to(parser.add_subparsers())\nparser.format_help()\n"
        "print([m for m in ('torch', 'jax', 'dask', 'rich', 'gklx._verify') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
