"""`gklx score`: its arguments, and a score as a report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from .._core.libraries import LIBRARIES
from . import arguments as kinds

if TYPE_CHECKING:
    from .._scoring.gates import Gate
    from .._scoring.statistics import Score, Scores

_DEFAULT = ("kl", "dkl", "ikl", "gkl")
_LOSSES = (*_DEFAULT, "reverse_kl")

_DESCRIPTION = """\
Compares a student's logits with a teacher's: mean, standard error and quantiles of each loss over the samples, its
wMSE and CE parts, and how often both name the same class; with targets the perplexities, and how the targets'
probabilities have moved. Files of any size are read block by block; the result does not depend on blocks or shards:
GKL's normaliser and the class prior are those of all samples. Several students are candidates: one pass over the
teacher, a column each, and how they differ from the first.
"""

_NOTES = """\
files:
  STUDENT and TEACHER hold logits of one shape, [samples, classes] or with more leading axes, float16, bfloat16, float32
  or float64: FILE.npy, FILE.npz::key, FILE.safetensors::tensor, a Zarr array DIR.zarr or DIR.zarr::array, a dump of
  llama-perplexity --kl-divergence-base, or shards by a pattern in quotes, 'logits-*.npy', joined in natural order.
  Labels and targets are integers in [0, classes), one a sample; llama.cpp's dumps carry their targets. With labels the
  weights of ikl and gkl are the class prior, the mean of softmax(teacher / weight temperature) over the samples of a
  class; without, or where it does not fit the memory, each sample's own softmax(teacher / weight temperature). Samples
  with every class at -inf in both files are skipped. Those with NaN, or with no finite logit, are left out and counted
  as undefined. Two of llama.cpp's dumps are read as its own tool reads them, at temperature 1; the report says so.

progress:
  A run keeps its progress in a folder under --work-dir until the report is written. One that was killed, interrupted or
  ran out of disk goes on with the same command, and gives the same numbers. A file that changes meanwhile is an error.

json:
  samples, skipped, undefined, classes, backend, device, quantiles, parameters, top1_agreement,
  losses.NAME.{mean, stderr, median, p90, p95, p99, max, mse, ce, infinite, p99_9, p10, p5, p1, p0_1, min}; with a mask
  masked, with labels worst_classes, with targets perplexity.{student, teacher, log_ratio, ratio,
  difference}.{value, stderr}, perplexity.correlation, delta_p.{mean, rms}.{value, stderr} and delta_p.{max, p99_9, p99,
  p95, p90, p75, median, p25, p10, p5, p1, p0_1, min}; with --top-k top_k_overlap.K.{value, stderr}; reading where it is
  llama.cpp's. mse and ce are the weighted parts of the mean (null for kl and reverse_kl). A number that is infinite or
  undefined is null; infinite counts the samples whose loss is. Several candidates: teacher, and students, a list of the
  same with name and, but for the first, difference_from_first.NAME.{value, stderr}.

exit status:
  0 done, 1 failure (a full disk, too little memory), 2 wrong input, 3 a condition of --fail-if is true (after the
  report is written, with a line for each), 130 interrupted.

examples:
  gklx score student.npy teacher.npy
  gklx score student.npy teacher.npy --labels labels.npy --gamma 0.5 --mse-weight 4
  gklx score 'student-*.safetensors::logits' 'teacher-*.safetensors::logits' --memory 2GB --plot report.html
  gklx score q8.kld q5.kld q4.kld f16.kld --loss kl --plot candidates.svg
  gklx score q4.kld f16.kld --loss kl --fail-if 'kl.p99 > 0.1' --fail-if 'top1_agreement < 0.9'
  gklx score student.npy teacher.npy --loss kl,gkl --backend torch --device cuda --format json --output score.json
"""


def add_to(commands: Any) -> None:
    """Adds the subcommand to the parser."""
    score = commands.add_parser(
        "score",
        help="score a student's logits against a teacher's",
        description=_DESCRIPTION,
        epilog=_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    score.set_defaults(run=_run)
    score.add_argument(
        "student", metavar="STUDENT", nargs="+", help="the student's logits, or those of several candidates"
    )
    score.add_argument("teacher", metavar="TEACHER", help="the teacher's logits")
    score.add_argument("--labels", metavar="FILE", help="the class of each sample")
    score.add_argument(
        "--targets", metavar="FILE", help="the true next class of each sample (default: those that the files carry)"
    )
    score.add_argument(
        "--where-label",
        type=kinds.any_whole,
        metavar="N",
        help="samples of this label or target do not count, as -100 of padding",
    )
    score.add_argument(
        "--sample-weight", metavar="FILE", help="a mask: 1 for a sample that counts, 0 for one that does not"
    )
    score.add_argument(
        "--weights",
        choices=["prior", "teacher"],
        help="of ikl and gkl: the class prior by labels, or the teacher (default: prior with labels, where it fits)",
    )
    score.add_argument(
        "--loss",
        type=_losses,
        action="extend",
        metavar="NAME[,NAME]",
        help="kl, dkl, ikl, gkl, reverse_kl; may be given again; the first orders the worst classes "
        "(default: the first four)",
    )
    score.add_argument(
        "--top-k",
        type=kinds.wholes,
        default=(),
        metavar="K[,K]",
        help="the overlap of the K largest classes, as 5,10 (default: none)",
    )
    score.add_argument("--strict", action="store_true", help="a sample with NaN is an error")
    out = score.add_argument_group("what to write")
    out.add_argument("--format", choices=["table", "json"], default="table", help="default: %(default)s")
    out.add_argument("--output", metavar="FILE", help="the report, in place of the standard output")
    out.add_argument("--per-sample", metavar="FILE", help="the values of every sample, .npy or .parquet")
    out.add_argument("--plot", metavar="FILE", help="a picture of them, .svg, .png or .html")
    out.add_argument(
        "--fail-if",
        type=_gate,
        action="append",
        default=[],
        metavar="CONDITION",
        help="status 3 where it is true, as 'kl.p99 > 0.1': a result in the JSON report by its name (none of "
        "worst_classes), < or >, a number; may be given again",
    )
    where = score.add_argument_group("where to compute")
    where.add_argument(
        "--backend",
        choices=[library.backend for library in LIBRARIES],
        default="numpy",
        metavar="NAME",
        help=f"{', '.join(library.backend for library in LIBRARIES)} (default: %(default)s); "
        "dask: in NumPy on a cluster's workers",
    )
    where.add_argument("--device", help="as the library spells it: cpu, cuda:0 (default: the library's own)")
    where.add_argument("--scheduler", metavar="ADDRESS", help="of the Dask cluster (default: one on this machine)")
    where.add_argument(
        "--memory",
        type=_size,
        metavar="SIZE",
        help="a bound on the process, such as 2GB (default: half of what is free)",
    )
    where.add_argument(
        "--batch-size",
        type=kinds.whole,
        metavar="ROWS",
        help="samples a block at most; changes memory and speed alone (default: what suits library and memory)",
    )
    where.add_argument("--work-dir", metavar="DIR", help="keeps the progress (default: gklx in the user's cache)")
    numbers = score.add_argument_group("hyper-parameters")
    _number(numbers, "--temperature", kinds.above_zero, "of the softmaxes of kl, dkl and the CE parts")
    _number(numbers, "--weight-temperature", kinds.above_zero, "of the teacher's softmax in the weights of ikl and gkl")
    _number(numbers, "--gamma", kinds.not_negative, "gkl's weights are raised to it")
    _number(numbers, "--mse-weight", kinds.finite, "of the wMSE part")
    _number(numbers, "--ce-weight", kinds.finite, "of the CE part")


def with_losses_joined(argv: Sequence[str]) -> list[str]:
    """The arguments with `--loss kl gkl` written as `--loss kl,gkl`; the first one that names no loss is a file."""
    found: list[str] = []
    for text in argv:
        if len(found) > 1 and found[-2] == "--loss" and "--" not in found and set(text.split(",")) <= {*_LOSSES}:
            found[-1] += f",{text}"
        else:
            found.append(text)
    return found


def _run(arguments: argparse.Namespace, show: Callable[[str], None]) -> int:
    from .._interrupts import ended_by_interrupts
    from .._scoring.streams import say

    with ended_by_interrupts():
        from .._scoring.atomic import replacing
        from .._scoring.comparison import Request, score
        from .._scoring.gates import broken
        from .._scoring.report import as_json, as_table
        from .._scoring.work_file import default_parent

    def report(found: Score | Scores) -> None:
        def text(file: TextIO | None = None) -> str:
            return as_json(found) if arguments.format == "json" else as_table(found, file)

        if arguments.output is None:
            show(text())
            return
        with replacing(arguments.output) as path, open(path, "w", encoding="utf-8") as file:
            file.write(text(file))

    work_dir = default_parent() if arguments.work_dir is None else arguments.work_dir
    if work_dir is None:
        say("no progress is kept: the user's cache cannot be written (--work-dir names another place)")
    request = Request(
        student=_students(arguments.student),
        losses=tuple(arguments.loss or _DEFAULT),
        parameters=tuple(getattr(arguments, name) for name in _NUMBERS),
        work_dir=None if work_dir is None else str(work_dir),
        progress=True,
        gates=tuple(arguments.fail_if),
        **{name: getattr(arguments, name) for name in _PASSED_ON},
    )
    found = score(request, report)
    lines = list(broken(request.gates, found))
    for line in lines:
        say(line)
    return 3 if lines else 0


def _students(paths: list[str]) -> str | dict[str, str]:
    """The one student, or several candidates by their names."""
    if len(paths) == 1:
        return paths[0]
    for at, path in enumerate(paths):
        if path in paths[:at]:
            raise ValueError(f"{path}: is named twice as a candidate")
    return {path: path for path in paths}


_NUMBERS = ("temperature", "weight_temperature", "gamma", "mse_weight", "ce_weight")
_PASSED_ON = (
    "teacher",
    "labels",
    "targets",
    "where_label",
    "sample_weight",
    "weights",
    "top_k",
    "backend",
    "device",
    "scheduler",
    "memory",
    "batch_size",
    "strict",
    "per_sample",
    "plot",
    "output",
)


def _number(group: Any, option: str, kind: Callable[[str], float], text: str) -> None:
    group.add_argument(option, type=kind, default=1.0, metavar="X", help=f"{text} (default: %(default)g)")


def _losses(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= {*_LOSSES}:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(_LOSSES)}, with commas between, got {text!r}")
    return names


def _gate(text: str) -> Gate:
    from .._scoring.gates import parsed_gate

    try:
        return parsed_gate(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _size(text: str) -> int:
    from .._scoring.sizes import parse_size

    try:
        return parse_size(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a size such as 2GB or 500MiB, got {text}") from None
