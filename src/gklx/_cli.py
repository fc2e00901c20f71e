"""The command `gklx`: its arguments, its exit codes, and what goes to which stream.

0: done. 1: something went wrong in here. 2: something is wrong with what was asked for. 130: interrupted.
141: nobody reads the output any more. Errors are one line on stderr; stdout gets the whole report or nothing.
"""

import argparse
import contextlib
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from . import __version__
from ._libraries import LIBRARIES

_DESCRIPTION = "KL, DKL, IKL and GKL divergence losses, from logits in files."

_EXAMPLE = """\
example:
  gklx score student.npy teacher.npy --labels labels.npy --loss kl gkl --gamma 0.5
"""

_SCORE = """\
Compares a student's logits with a teacher's: mean, standard error and quantiles of each loss over the samples, its
wMSE and CE parts, and how often both name the same class. Files are read block by block; the result does not depend on
the size of a block: GKL's normaliser and the class prior are those of the whole file.
"""

_SCORE_NOTES = """\
files:
  STUDENT and TEACHER are .npy files of one shape, [samples, classes] or with more leading axes, float16, float32 or
  float64. LABELS are integers in [0, classes), one a sample. With labels the weights of ikl and gkl are the class
  prior, the mean of softmax(teacher / weight temperature) over the samples of a class; without, each sample's own
  softmax(teacher / weight temperature). Samples with every class at -inf in both files are skipped.

json:
  samples, skipped, classes, backend, device, parameters, top1_agreement,
  losses.NAME.{mean, stderr, median, p90, p95, p99, max, mse, ce, nonfinite}, and with labels worst_classes.
  mse and ce are the weighted parts of the mean (null for kl). A number that is infinite or undefined is null;
  nonfinite counts the samples whose loss is.

examples:
  gklx score student.npy teacher.npy
  gklx score student.npy teacher.npy --labels labels.npy --gamma 0.5 --mse-weight 4
  gklx score student.npy teacher.npy --loss gkl --backend torch --device cuda --format json
"""


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        _complain(message)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments after the command's name; those of the process by default.
    """
    try:
        status = _run(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("gklx: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_output()
        return 141
    except MemoryError as error:
        _complain(f"not enough memory; a smaller --batch-size may help ({error})")
        return 1
    except Exception as error:  # nobody at a prompt is helped by a traceback
        if isinstance(error, OSError):
            _drop_output()
        _complain(f"{type(error).__name__}: {error}")
        return 1
    return status


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        report = _score(arguments)
    except (ValueError, TypeError) as error:
        _complain(str(error))
        return 2
    # Characters that the output cannot spell are replaced: a table is no reason to fail.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(report.encode(encoding, "replace").decode(encoding), end="")
    return 0


def _score(arguments: argparse.Namespace) -> str:
    from ._scoring.backend import backend
    from ._scoring.logit_files import open_logit_files
    from ._scoring.report import as_json, as_table
    from ._scoring.score import Parameters, score

    files = open_logit_files(arguments.student, arguments.teacher, arguments.labels)
    parameters = Parameters(*(getattr(arguments, field) for field in Parameters._fields))
    names = list(dict.fromkeys(arguments.loss))
    # NumPy warns of every inf - inf on the way to an infinity or a NaN that the report shows and counts. Dask computes
    # in threads of its own, out of reach of np.errstate.
    with warnings.catch_warnings(), backend(arguments.backend, arguments.device) as where:
        warnings.simplefilter("ignore", RuntimeWarning)
        found = score(files, names, parameters, where, arguments.batch_size)
    return as_json(found) if arguments.format == "json" else as_table(found)


# --- arguments --------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="gklx", description=_DESCRIPTION, epilog=_EXAMPLE, formatter_class=style, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"gklx {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    score = commands.add_parser(
        "score",
        help="score a student's logits against a teacher's",
        description=_SCORE,
        epilog=_SCORE_NOTES,
        formatter_class=style,
        allow_abbrev=False,
    )
    score.add_argument("student", metavar="STUDENT", help="the student's logits, .npy")
    score.add_argument("teacher", metavar="TEACHER", help="the teacher's logits, .npy")
    score.add_argument("--labels", metavar="FILE", help="the class of each sample, .npy")
    names = ["kl", "dkl", "ikl", "gkl"]
    score.add_argument(
        "--loss",
        nargs="+",
        choices=names,
        default=names,
        metavar="NAME",
        help="kl, dkl, ikl, gkl; the first orders the worst classes (default: all four)",
    )
    score.add_argument("--format", choices=["table", "json"], default="table", help="default: %(default)s")
    where = score.add_argument_group("where to compute")
    where.add_argument(
        "--backend",
        choices=[library.backend for library in LIBRARIES],
        default="numpy",
        metavar="NAME",
        help=f"{', '.join(library.backend for library in LIBRARIES)} (default: %(default)s)",
    )
    where.add_argument("--device", help="as the library spells it: cpu, cuda:0 (default: the library's own)")
    where.add_argument(
        "--batch-size",
        type=_whole,
        metavar="ROWS",
        help="samples a block; changes memory and speed alone (default: about 4 million logits a block)",
    )
    numbers = score.add_argument_group("hyper-parameters")
    _number(numbers, "--temperature", _above_zero, "of the softmaxes of kl, dkl and the CE parts")
    _number(numbers, "--weight-temperature", _above_zero, "of the teacher's softmax in the weights of ikl and gkl")
    _number(numbers, "--gamma", _not_negative, "gkl's weights are raised to it")
    _number(numbers, "--mse-weight", _finite, "of the wMSE part")
    _number(numbers, "--ce-weight", _finite, "of the CE part")
    return parser


def _number(group: Any, option: str, kind: Callable[[str], float], text: str) -> None:
    group.add_argument(option, type=kind, default=1.0, metavar="X", help=f"{text} (default: %(default)g)")


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return number


def _above_zero(text: str) -> float:
    if (number := _finite(text)) <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return number


def _not_negative(text: str) -> float:
    if (number := _finite(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return number


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, got {text}")
    return int(text)


# --- streams ----------------------------------------------------------------------------------------------------------


def _complain(message: str) -> None:
    """One line on stderr, whatever line breaks a file name or a library's message has."""
    with contextlib.suppress(OSError):
        print(f"gklx: error: {' '.join(message.split())}", file=sys.stderr)


def _drop_output() -> None:
    """Sends what is still buffered for stdout nowhere; the interpreter would try to write it once more."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
