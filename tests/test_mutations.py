"""Wrong formulas must turn the tests red: each mutation is one line of the mathematics, changed in a copy."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.library_independent, pytest.mark.version_independent]

HERE = pathlib.Path(__file__).parent
PACKAGE = HERE.parent / "src" / "gklx"

MUTATIONS = {
    "gradient zeroed": ("_sweep.py", "return chosen(problem.xp, rows.counted.counts, gradient)", "return 0.0 * gradient"),
    "mse sign": ("_sweep.py", "else minus(to_student, opposite, eager)", "else to_student + opposite"),
    "gap sign": ("_sweep.py", "gap = minus(rows.student.probabilities, p, spend)", "gap = p - rows.student.probabilities"),
    "gradient scaled by 2": ("_batch.py", "teacher = product(share * mse_weight, factor)", "teacher = 2.0 * product(share * mse_weight, factor)"),
    "half forgotten": ("_sweep.py", "mse = 0.5 * spread.factor", "mse = spread.factor"),
    "W forgotten": ("_batch.py", "teacher = product(share * mse_weight, factor)", "teacher = share * mse_weight"),
    "temperature once": ("_batch.py", "divided(divided(teacher, numbers.temperature), numbers.temperature)", "divided(teacher, numbers.temperature)"),
    "CE temperature": ("_batch.py", "share * divided(numbers.ce_weight, numbers.temperature)", "share * numbers.ce_weight"),
    "axis swapped": ("_rows.py", "return e, chosen(xp, any_counts, xp.sum(e, axis=-1), 1.0)", "return e, chosen(xp, any_counts, xp.sum(e), 1.0)"),
    "batch normaliser dropped": ("_batch.py", "mse_weight * _quotient(problem, of_batch.weight, of_batch.squared_mass)", "mse_weight"),
    "W not squared": ("_batch.py", "product(mass * mass, v)", "product(mass, v)"),
    "mean not centred": ("_sweep.py", "    rest = divided(xp.sum(w * d, axis=-1, keepdims=True), divisor)\n", "    d = d + divided(first, divisor)\n    rest = 0.0 * first\n"),
    "teacher and student swapped": ("_sweep.py", "    d = chosen(xp, counted.counts, teacher.z) - chosen(xp, counted.counts, student.z)", "    d = chosen(xp, counted.counts, student.z) - chosen(xp, counted.counts, teacher.z)"),
    "gamma forgotten": ("_sweep.py", "    z = times(z, gamma, _spends(problem, counted))", "    gamma = 1.0"),
    "scale forgotten": ("_sweep.py", "power = -gamma if problem.eager", "power = 0.0 if problem.eager"),
    "prior transposed": ("_sweep.py", "    w = xp.reshape(xp.take(prior, index, axis=0)", "    w = xp.reshape(xp.take(xp.matrix_transpose(prior), index, axis=0)"),
    "weight temperature forgotten": ("_sweep.py", "numbers.weight_temperature, numbers.gamma, problem.softmax", "numbers.temperature, numbers.gamma, problem.softmax"),
    "KL weighed by the student": ("_sweep.py", "minus(times(ratio, p, spend), fallen, spend)", "minus(times(ratio, q, spend), fallen, spend)"),
    "CE of the wrong normaliser": ("_sweep.py", "log_normalizer(problem.xp, rows.student) - mean)", "log_normalizer(problem.xp, rows.teacher) - mean)"),
    "masked classes weigh": ("_sweep.py", "    w = chosen(xp, counted.counts, _prior_weights(problem, w))\n    mass = xp.where(known", "    w = _prior_weights(problem, w)\n    mass = xp.where(known"),
    "ordinary rows swapped": ("_sweep.py", "d = minus(teacher.z, student.z, problem.eager and not _weights_need_logits(problem))", "d = student.z - teacher.z"),
    "logits spent before the weights": ("_sweep.py", "problem.eager and not _weights_need_logits(problem)", "problem.eager"),
    "differences spent before KL": ("_sweep.py", "_spends(problem, rows.counted) and problem.formula.decomposed", "_spends(problem, rows.counted)"),
    "KL's change without its sign": ("_sweep.py", "xp.copysign(xp.expm1(times(abs(ratio), -1.0, spend)), ratio)", "xp.expm1(times(abs(ratio), -1.0, spend))"),
    "masked classes weigh at gamma 0": ("_sweep.py", "-low * min(1.0, numbers.gamma)", "-low"),
    "masked classes weigh by a prior": ("_sweep.py", "if not problem.readable or arrays.prior is not None:", "if not problem.readable:"),
    "empty samples weigh": ("_sweep.py", "(seen[0], seen[-1]), None, any_counts, weight)", "(seen[0], seen[-1]), None, any_counts, _given_weight(problem))"),
    "masks forgotten": ("_rows.py", "x = chosen(xp, where, x, -xp.inf)", "x = chosen(xp, None, x, -xp.inf)"),
    "sample weights ignored": ("_batch.py", "share = _quotient(problem, v, of_batch.weight)", "share = _quotient(problem, 1.0, of_batch.weight)"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_caught(name, tmp_path):
    file, old, new = MUTATIONS[name]
    shutil.copytree(PACKAGE, tmp_path / "gklx", ignore=shutil.ignore_patterns("__pycache__"))
    source = (tmp_path / "gklx" / file).read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {file}"
    (tmp_path / "gklx" / file).write_text(source.replace(old, new))
    found = _run(tmp_path)
    assert found.returncode == 1, f"{name} was not caught:\n{found.stdout[-2000:]}"
    assert " failed" in found.stdout


def test_without_a_mutation_the_same_tests_pass(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "gklx", ignore=shutil.ignore_patterns("__pycache__"))
    found = _run(tmp_path)
    assert found.returncode == 0, found.stdout[-2000:]


def _run(path):
    """The comparison with the definition, on NumPy in float64 alone, against the package under `path`."""
    command = [
        sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "pythonpath=tests",
        str(HERE / "test_against_definition.py"), "-k", "test_value_and_gradients and numpy-float64",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(path), "GKLX_BACKENDS": "numpy", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=HERE.parent)
