"""Mutants of the mathematics: one operator, comparison or number changed at a time, and the tests run on each.

`python tests/mutants.py formulas` (or `kernel`) tries all of them, `--sample 40 --seed 1` some. It prints each mutant
that passes all tests, and fails unless `EQUIVALENT` says why no test can detect it.

The tests are collected once, and each mutant runs in a fork of that process. A mutant of the formulas is executed in
their module; one of the kernel is compiled, without optimisation, and loaded in place of the library.
"""

import argparse
import ast
import importlib
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from _pytest.runner import runtestprotocol

HERE = pathlib.Path(__file__).parent
PACKAGE = HERE.parent / "src" / "gklx"
LONGEST = 120  # seconds a mutant may take


class Mutant(NamedTuple):
    name: str
    """The place of a mutation, the original text and the new one."""
    apply: Callable[[], None]
    """Applies a mutant in the process that runs the tests."""


# --- the formulas -----------------------------------------------------------------------------------------------------

_OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
}  # fmt: skip
_FUNCTIONS = {"max": "min", "any": "all", "exp": "expm1", "expm1": "exp", "isinf": "isnan", "isnan": "isinf"}


def _replacements(node: ast.AST) -> Iterator[tuple[str, object]]:
    """The fields of a node, and their possible replacements."""
    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in _OPERATORS:
            yield "op", _OPERATORS[type(op)]()
        case ast.Compare(ops=[op]) if type(op) in _OPERATORS:
            yield "ops", [_OPERATORS[type(op)]()]
        case ast.UnaryOp(op=ast.USub(), operand=operand) if not isinstance(operand, ast.Constant):
            yield "op", ast.UAdd()
        case ast.keyword(arg="axis", value=value) if ast.unparse(value) != "0":
            yield "value", ast.Constant(0)
        case ast.UnaryOp(op=ast.Not() | ast.Invert(), operand=operand):
            yield "operand", ast.UnaryOp(node.op, operand)
        case ast.Constant(value=bool(value)):
            yield "value", not value
        case ast.Constant(value=float(value)):
            yield "value", 2 * value if value else 1.0
        case ast.Attribute(attr=name) if name in _FUNCTIONS:
            yield "attr", _FUNCTIONS[name]


def formula_mutants(_: pathlib.Path) -> Iterator[Mutant]:
    for module in ("formulas", "batch"):
        path = PACKAGE / "_core" / f"{module}.py"
        source = path.read_text(encoding="utf-8")
        tree, lines = ast.parse(source), source.splitlines()
        for function in (x for x in tree.body if isinstance(x, ast.FunctionDef)):
            for statement in function.body:
                for node in ast.walk(statement):
                    for field, new in _replacements(node):
                        old, before = getattr(node, field), ast.unparse(node)
                        setattr(node, field, new)
                        name = f"{module}.{function.name}: {before}  ->  {ast.unparse(node)}"
                        if isinstance(node, ast.Constant):
                            name += f"  in  {lines[node.lineno - 1].strip()}"
                        code = compile(ast.fix_missing_locations(tree), path, "exec")
                        setattr(node, field, old)
                        yield Mutant(name, lambda module=module, code=code: _execute(module, code))


def _execute(module: str, code: object) -> None:
    """Replace the functions of the module by the mutant's."""
    exec(code, vars(importlib.import_module(f"gklx._core.{module}")))


# --- the kernel -------------------------------------------------------------------------------------------------------

# The part of a file that is mathematics: from the first text to the last. test_kernel.py covers types and layouts.
_MATHEMATICS = {
    "row.h": ("template <class R> GKLX_BOTH R exponential", None),
    "loops.h": ("// A row of valid classes", None),
}
_TOKENS = {
    "+": "-", "-": "+", "*": "/", "/": "*", "<": ">=", ">": "<=", "<=": ">", ">=": "<", "==": "!=", "!=": "==",
    "&&": "||", "||": "&&", "+=": "-=", "-=": "+=", "*=": "/=", "|=": "&=", "true": "false", "false": "true",
}  # fmt: skip
# Between spaces an operator is one of two operands, and neither a pointer, a template's bracket nor a sign.
_PLACES = re.compile(
    r"(?<= )(?:[-+*/]=?|[<>]=?|[=!]=|&&|\|\||\|=)(?= )|\b(?:true|false)\b|\b\d+\.\d+\b|(?<=R\()\d+(?=\))"
)


def kernel_mutants(folder: pathlib.Path) -> Iterator[Mutant]:
    sources = PACKAGE / "_kernels"
    _compile(sources, folder / "whole.so")
    for name, (first, last) in _MATHEMATICS.items():
        text = (sources / name).read_text(encoding="utf-8")
        begin = text.index(first)
        end = len(text) if last is None else text.index(last)
        for found in _PLACES.finditer(text, begin, end):
            start = text.rindex("\n", 0, found.start()) + 1
            line = text[start : text.index("\n", start)]
            if "//" in line[: found.start() - start] or re.match(r"\s*(#|SIMD|for )|template[^{]*$", line):
                continue
            new = _TOKENS.get(found[0]) or f"{2 * float(found[0]) or 1.0}"
            at = found.start() - start
            mutated = line[:at] + new + line[at + len(found[0]) :]
            shown = f"{name}: {line.strip()}  ->  {mutated.strip()}"
            changed = text[:start] + mutated + text[start + len(line) :]
            yield Mutant(shown, lambda name=name, changed=changed: _load(folder, name, changed))


def _compile(sources: pathlib.Path, library: pathlib.Path) -> None:
    """Compile without optimisation, to be quick, for the baseline instruction set."""
    options = (
        "-std=c++17",
        "-O0",
        "-fPIC",
        "-shared",
        "-DGKLX_SET=generic",
        "-DGKLX_HAS_GENERIC",
        "-DGKLX_CHUNK=64",
        "-pthread",
        "-w",
    )
    files = (str(sources / name) for name in ("cpu.cpp", "call.cpp", "overlap.cpp"))
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, *options, *files, "-o", str(library)], check=True, capture_output=True)


def _load(folder: pathlib.Path, name: str, changed: str) -> None:
    from gklx._run import cpu_library

    sources = folder / "mutant"
    shutil.copytree(PACKAGE / "_kernels", sources, ignore=shutil.ignore_patterns("*.so"), dirs_exist_ok=True)
    (sources / name).write_text(changed, encoding="utf-8")
    library = folder / "mutant.so"
    library.unlink(missing_ok=True)
    try:
        _compile(sources, library)
    except subprocess.CalledProcessError:
        os._exit(_NOT_A_PROGRAM)
    os.environ["GKLX_KERNEL_LIBRARY"] = str(library)
    cpu_library.library.cache_clear()
    cpu_library._instruction_set.cache_clear()


# --- the tests on each mutant -----------------------------------------------------------------------------------------

_NOT_A_PROGRAM = 77
_SELECTED = {
    "formulas": "numpy-formulas and not formulas-float16 and not formulas-float32 and not 100000",
    "kernel": "numpy and not formulas and not float16 and not 100000",
}
_TESTS = (
    "test_against_definition.py::test_value_and_gradients_are_those_of_the_definition",
    "test_against_definition.py::test_argnums_choose_gradients_as_in_jax",
    "test_extremes.py",
    "test_precision.py::test_float32_gradients_are_within_rounding",
    "test_right_numbers.py::test_same_fill_value_in_both_networks",
    "test_right_numbers.py::test_opposite_offsets_of_the_networks",
    "test_right_numbers.py::test_kl_is_not_negative",
    "test_right_numbers.py::test_scaled_difference_beyond_the_largest_float_where_the_teacher_is_sure",
    "test_right_numbers.py::test_power_of_a_subnormal_prior",
    "test_right_numbers.py::test_kl_whatever_the_ratio_of_the_probabilities",
    "test_right_numbers.py::test_rows_of_huge_logits_alone",
    "test_right_numbers.py::test_sum_of_huge_differences",
    "test_right_numbers.py::test_prior_of_zeros_gives_wmse_zero",
    "test_right_numbers.py::test_scale_of_the_prior",
    "test_right_numbers.py::test_wmse_without_a_difference_is_zero_though_its_factor_overflows",
    "test_right_numbers.py::test_masked_classes_beside_sample_weights",
    "test_right_numbers.py::test_scale_of_the_prior_is_that_of_the_samples_that_count",
    "test_right_numbers.py::test_products_of_a_small_prior_keep_their_digits",
    "test_right_numbers.py::test_large_power_of_a_prior",
    "test_right_numbers.py::test_power_of_a_prior_whatever_its_digits",
    "test_right_numbers.py::test_classes_without_a_gap_where_its_factor_overflows",
    "test_right_numbers.py::test_gap_times_an_overflowing_factor_is_infinite",
    "test_right_numbers.py::test_scale_of_the_sample_weights",
    "test_right_numbers.py::test_prior_of_nearly_one_class",
    "test_right_numbers.py::test_the_same_fill_in_all_classes_of_weight",
    "test_right_numbers.py::test_logits_further_apart_than_the_largest_float",
    "test_score_fidelity.py::test_reverse_kl_and_low_quantiles",
    "test_score_fidelity.py::test_reverse_kl_of_classes_that_are_ruled_out",
    "test_score_fidelity.py::test_reverse_kl_of_huge_logits",
    "test_score_fidelity.py::test_reverse_kl_of_logits_further_apart_than_the_largest_float",
    "test_score_fidelity.py::test_reverse_kl_whatever_the_ratio_of_the_probabilities",
    "test_blocks.py::test_blocks_give_the_results_of_the_whole_batch",
)
MUTANTS = {"formulas": formula_mutants, "kernel": kernel_mutants}


class MutantRunner:
    """A pytest plugin that runs the collected tests on each mutant, until one fails."""

    def __init__(self, mutants: list[Mutant]) -> None:
        self.mutants, self.outcomes = mutants, Counter()
        self.survivors: list[str] = []
        self.stream = os.fdopen(os.dup(2), "w")  # pytest captures the other

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        assert session.items, "no tests were selected"
        if not self._passes(session, lambda: None):
            raise pytest.UsageError("the tests fail without a mutation")
        for number, mutant in enumerate(self.mutants):
            if number % 10 == 0:
                print(f"{number} of {len(self.mutants)}", file=self.stream, flush=True)
            if self._passes(session, mutant.apply):
                self.survivors.append(mutant.name)
                print("survives:", mutant.name, file=self.stream, flush=True)
        return True

    def _passes(self, session: pytest.Session, apply: Callable[[], None]) -> bool:
        child = os.fork()
        if child == 0:
            signal.alarm(LONGEST)
            os._exit(self._first_failure(session, apply))
        status = os.waitpid(child, 0)[1]
        self.outcomes[os.waitstatus_to_exitcode(status)] += 1
        return os.waitstatus_to_exitcode(status) == 0

    @staticmethod
    def _first_failure(session: pytest.Session, apply: Callable[[], None]) -> int:
        warnings.simplefilter("ignore")  # `runtestprotocol` does not apply the filters in the tests' marks
        try:
            apply()
            for item, after in zip(session.items, [*session.items[1:], None], strict=True):
                reports = runtestprotocol(item, log=False, nextitem=after)
                if any(report.failed for report in reports):
                    return 1
        except BaseException:
            return 1
        return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("execution", choices=MUTANTS)
    parser.add_argument("--sample", type=int, help="how many to try; all without it")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mutants = list(MUTANTS[options.execution](pathlib.Path(folder)))
        if options.execution == "kernel":
            os.environ["GKLX_KERNEL_LIBRARY"] = str(pathlib.Path(folder) / "whole.so")
        if options.sample is not None:
            mutants = random.Random(options.seed).sample(mutants, min(options.sample, len(mutants)))
        plugin = MutantRunner(mutants)
        arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", _SELECTED[options.execution]]
        status = pytest.main([*arguments, *(str(HERE / test) for test in _TESTS)], plugins=[plugin])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return int(status)
    unexplained = [name for name in plugin.survivors if name not in EQUIVALENT]
    print(f"{len(mutants)} mutants, seed {options.seed}: {plugin.outcomes[_NOT_A_PROGRAM]} do not compile, ", end="")
    print(f"{len(plugin.survivors) - len(unexplained)} equivalent, {len(unexplained)} survive")
    print(*unexplained, sep="\n")
    return bool(unexplained)


# Mutants that compute the same, that differ where any outcome is right, or that NumPy does not reach (the test that
# detects them is named).
EQUIVALENT: dict[str, str] = {
    "formulas.uses_energy: asked.student and formula.symmetric  ->  asked.student or formula.symmetric": (
        "what is computed in addition is not used"
    ),
    "formulas.uses_energy: asked.value and formula.decomposed  ->  asked.value or formula.decomposed": (
        "what is computed in addition is not used"
    ),
    "formulas.uses_energy: False  ->  True  in  return False": "the factor of what is computed in addition is 0",
    "formulas.class_weights: 1.0  ->  2.0  in  divisor = xp.where(base == 0, 1.0, scale * base)": (
        "0 divided by whichever number is 0"
    ),
    "formulas.class_weights: 0.25  ->  0.5  in  scale = xp.where(base > largest, 0.25 * xp.ones_like(base), 1.0)": (
        "NumPy divides; test_scale_of_the_prior, in XLA"
    ),
    "formulas.class_weights: 1.0  ->  2.0  in  scale = xp.where(base > largest, 0.25 * xp.ones_like(base), 1.0)": (
        "divisor and divided have the factor, too"
    ),
    "formulas.class_weights: base > largest  ->  base <= largest": "NumPy divides; test_scale_of_the_prior, in XLA",
    "formulas.class_weights: 0.25 * xp.ones_like(base)  ->  0.25 / xp.ones_like(base)": "either is a quarter",
    "formulas.class_weights: 1.0 / float(xp.finfo(call.dtype).smallest_normal)  ->  "
    "1.0 * float(xp.finfo(call.dtype).smallest_normal)": "smaller priors may be quartered as well",
    "formulas.class_weights: 1.0  ->  2.0  in  largest = 1.0 / float(xp.finfo(call.dtype).smallest_normal)": (
        "NumPy divides; test_scale_of_the_prior, in XLA"
    ),
    "formulas.class_weights: 0.5  ->  1.0  in  lowest = 0.5 * float(xp.finfo(call.dtype).min)": "exp of either is 0",
    "formulas.deviations: 1.0  ->  2.0  in  "
    "u = weights.relative / xp.where(weights.total == 0, 1.0, weights.total)[..., None]": (
        "0 divided by whichever number is 0"
    ),
    "formulas.scaled: 0.0  ->  1.0  in  factor = xp.where(xp.isinf(factor) & (x == 0), 0.0, factor)": (
        "it is multiplied by 0"
    ),
    "formulas.scaled: 0.0  ->  1.0  in  return factor * xp.where((factor == 0) & ~xp.isfinite(x), 0.0, x)": (
        "it is multiplied by 0"
    ),
    "formulas.deviations: upwards | downwards  ->  upwards & downwards": (
        "where one of them is infinite the sum of squares is so by itself"
    ),
    "formulas.deviations: 0.0  ->  1.0  in  "
    "return Deviations(u, xp.where(weighs, centred, 0.0), (upwards | downwards)[..., 0])": (
        "a class without weight is multiplied by its weight"
    ),
    "formulas.rows_of: False  ->  True  in  "
    "s, t = (xp.astype(x, call.dtype, copy=False) for x in (arrays.student, arrays.teacher))": "a copy is the same",
    "formulas._prior_rows: False  ->  True  in  prior = xp.astype(prior, call.dtype, copy=False)": "a copy is the same",
    "formulas.rows_of: 0.0  ->  1.0  in  d = difference(xp, xp.where(valid, t, 0.0), xp.where(valid, s, 0.0))": (
        "the difference of a class that is not valid has no weight"
    ),
    "formulas.softmax: 0.0  ->  1.0  in  "
    "top = xp.where(has_valid[..., None], xp.max(x, axis=-1, keepdims=True), 0.0)": (
        "without a valid class all exponentials are 0 whatever the maximum"
    ),
    "formulas.softmax: 1.0  ->  2.0  in  total = xp.where(has_valid, xp.sum(exponentials, axis=-1), 1.0)": (
        "without a valid class all exponentials are 0 whatever they are divided by"
    ),
    "formulas.class_weights: 1.0  ->  2.0  in  total = xp.where(rows.has_valid, xp.sum(xp.exp(z), axis=-1), 1.0)": (
        "without a valid class all weights are 0"
    ),
    "formulas.difference: 0.0  ->  1.0  in  known_t, known_s = xp.where(finite, t, 0.0), xp.where(finite, s, 0.0)": (
        "stands for a logit that is not finite, whose difference is put back afterwards"
    ),
    "formulas.deviations: 0.0  ->  1.0  in  "
    "centred = xp.where(summed, subtract(rows.d, difference(xp, t, s)), 0.0)": "what is not summed is replaced",
    "formulas.deviations: 0.0  ->  1.0  in  "
    "centred = xp.where(summed, centred - xp.sum(u * centred, axis=-1, keepdims=True), 0.0)": (
        "stands where the weight is 0, or the difference is put back afterwards"
    ),
    "batch._relative: 1.0  ->  2.0  in  return v * (1.0 / weight_scale)": "the sum of the weights has the factor, too",
    "batch._invertible: 1.0  ->  2.0  in  "
    "return xp.where(x < smallest, smallest, xp.where(x > 1.0 / smallest, 1.0 / smallest, x))": (
        "NumPy computes with subnormal reciprocals; test_scale_of_the_sample_weights, in XLA"
    ),
    "batch._or_one: 1.0  ->  2.0  in  return call.xp.where(x == 0, 1.0, x)": "0 divided by whichever number is 0",
    "formulas.class_weights: ~rows.has_valid  ->  ~~rows.has_valid": (
        "NumPy's labels are read and refused; test_invalid_arguments_of_a_compiled_loss_give_nan"
    ),
    "batch.factors_of: share * upstream  ->  share / upstream": (
        "NumPy has no upstream gradient; test_compiled_without_a_graph_break"
    ),
    "batch.batch_of: 0.0  ->  1.0  in  mass = xp.where(v == 0, 0.0, _mass(call, weights, base_scale))": (
        "its square is multiplied by v, which is 0"
    ),
    "batch.factors_of: 0.0  ->  1.0  in  "
    "of_energy = xp.where((v == 0) | (numbers.mse_weight == 0), 0.0, of_energy)  # where W is NaN, too": (
        "E of a sample of weight 0, which has no valid class, is 0; NumPy computes no E of weight 0"
    ),
    "batch.factors_of: (v == 0) | (numbers.mse_weight == 0)  ->  (v == 0) & (numbers.mse_weight == 0)": (
        "NumPy computes no E of weight 0; "
        "test_wmse_of_weight_zero_leaves_nan_of_the_teacher_out_of_its_gradient, in XLA"
    ),
    "formulas.kullback_leibler: 0.0  ->  1.0  in  "
    "near = p * exponential_remainder(xp, xp.where(is_near, ratio, 0.0))": "what is not near is not used",
    "batch.over_ranks: False  ->  True  in  own = Batch(*(call.xp.astype(x, call.dtype, copy=False) for x in own))": (
        "a copy more"
    ),
    "formulas.kullback_leibler: 0.0  ->  1.0  in  "
    "far = xp.where(overflows, product, p * xp.where(overflows, 0.0, ratio)) + (q - p)": "the other product is taken",
    "formulas.kullback_leibler: 0.0  ->  1.0  in  product = over_t(p * xp.where(xp.isinf(d), 0.0, d))": (
        "times 0, or replaced by infinity"
    ),
    "formulas.cross_entropy: 0.0  ->  1.0  in  "
    "mean = xp.sum(p * xp.where(halved == -xp.inf, 0.0, halved), axis=-1) / call.numbers.temperature": (
        "the teacher's probability is 0 there, or the row's CE is infinite"
    ),
    "batch.factors_of: call.ranks.size * share  ->  call.ranks.size / share": ("NumPy has one rank; test_many_devices"),
    "batch.merged: True  ->  False  in  "
    "stacked = Batch(*(call.xp.stack(column) for column in zip(*parts, strict=True)))": ("the parts are of one length"),
    "formulas.energy: call.xp.isnan  ->  call.xp.isinf": "what it is multiplied by is NaN there",
    "formulas.class_weights: xp.isnan  ->  xp.isinf": (
        "NumPy's priors are read and refused; test_errors_are_the_same_on_every_backend"
    ),
    "loops.h: wrong |= invalid;  ->  wrong &= invalid;": (
        "NumPy's priors are read and refused; test_kernel.py's test_invalid_prior_entry_gives_nan"
    ),
    "row.h: return gamma == R(1) ? base : gamma == R(0) ? R(1) : std::pow(base, gamma);  ->  "
    "return gamma == R(1) ? base : gamma == R(1.0) ? R(1) : std::pow(base, gamma);": "the power 0 is 1, more slowly",
    "loops.h: const bool raises = gamma != R(0) && gamma != R(1) && seen.largest > R(0);  ->  "
    "const bool raises = gamma != R(1.0) && gamma != R(1) && seen.largest > R(0);": "any base to the power 0 is 1",
    "loops.h: const R log_base = raises ? logarithm(seen.largest * per_scale) : R(0), "
    "base = raises ? seen.largest : scale;  ->  const R log_base = raises ? logarithm(seen.largest * per_scale) : "
    "R(1.0), base = raises ? seen.largest : scale;": "it is used where the prior is raised, or all of it is 0",
    "loops.h: R largest = as_they_are ? base : R(0);  ->  R largest = as_they_are ? base : R(1.0);": (
        "the base is no larger than the largest weight, whose quotient is therefore at least 1"
    ),
    "loops.h: bool usable_unscaled(double largest) { return largest >= 0.5 && largest < 2; }  ->  "
    "bool usable_unscaled(double largest) { return largest >= 1.0 && largest < 2; }": (
        "rows between are then divided by 1/2, which is exact"
    ),
    "row.h: return totals.weight == R(0) ? R(0) : ranks * (weight / totals.largest_weight / totals.weight);  ->  "
    "return totals.weight == R(0) ? R(1.0) : ranks * (weight / totals.largest_weight / totals.weight);": (
        "no sample has a valid class then"
    ),
    "loops.h: invalid |= x[j] >= R(0) ? Word(0) : Word(1);  ->  invalid &= x[j] >= R(0) ? Word(0) : Word(1);": (
        "NumPy's priors are read and refused; test_kernel.py's test_invalid_prior_entry_gives_nan"
    ),
    "loops.h: c += of_t == R(0) || s[j] == -Real<R>::inf ? R(0) : of_t * (halved * R(2 * summed_part<Guarded>));  ->  "
    "c += of_t == R(0) && s[j] == -Real<R>::inf ? R(0) : of_t * (halved * R(2 * summed_part<Guarded>));": (
        "CE is infinite where the student alone rules a class out"
    ),
    "loops.h: if (Weighed && x.w_total > 0) {  ->  if (Weighed || x.w_total > 0) {": (
        "the teacher's own weights are added up later, and where all weights are 0 nothing comes of the reference"
    ),
    "loops.h: const R mean = Gap || Kl ? R(0) : x.mean;  // which is known when nothing else is asked for anymore  ->  "
    "const R mean = Gap && Kl ? R(0) : x.mean;  // which is known when nothing else is asked for anymore": (
        "it is 0 until it is known"
    ),
    "loops.h: const R normalizers = Kl ? R(std::log(x.t_total) - std::log(x.s_total)) : R(0);  ->  "
    "const R normalizers = Kl ? R(std::log(x.t_total) - std::log(x.s_total)) : R(1.0);": "KL alone uses it",
    "loops.h: if (Guarded) deviation = infinite ? R(0) : deviation;  ->  "
    "if (Guarded) deviation = infinite ? R(1.0) : deviation;": "the class weighs 0, or the row's results are infinite",
    "loops.h: if (Guarded) c = is_infinite(d.high) ? R(0) : c;  ->  "
    "if (Guarded) c = is_infinite(d.high) ? R(1.0) : c;": "it is multiplied by a weight or a factor of 0",
    "loops.h: template <> struct Widest<float, true> { using Type = double; };  ->  "
    "template <> struct Widest<float, false> { using Type = double; };": (
        "test_kernel.py::test_squares_beyond_the_largest_float_times_a_small_prior; the formulas' are infinite"
    ),
    "loops.h: if (Guarded) part = infinite || p == R(0) ? q : is_infinite(ratio) ? (p * apart) * doubled : part;  ->  "
    "if (Guarded) part = infinite && p == R(0) ? q : is_infinite(ratio) ? (p * apart) * doubled : part;": (
        "the other form gives q as well, or the sum is infinite or so large that q is nothing beside it"
    ),
    "loops.h: if (Guarded) part = infinite || q == R(0) ? p : is_infinite(ratio) ? -(q * apart) * doubled : part;  ->  "
    "if (Guarded) part = infinite && q == R(0) ? p : is_infinite(ratio) ? -(q * apart) * doubled : part;": (
        "the other form gives p as well, or the sum is infinite or so large that p is nothing beside it"
    ),
}

if __name__ == "__main__":
    os.environ["GKLX_BACKENDS"] = "numpy"
    sys.exit(main())
