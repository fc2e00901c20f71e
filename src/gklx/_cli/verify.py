"""`gklx verify`: its arguments, and the findings as a report."""

import argparse
import io
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from .._core.libraries import LIBRARIES

_DESCRIPTION = """\
Checks the array libraries and devices that are here, on the row kernel and by the formulas: values and gradients of
every loss, in every dtype, under masks, reductions and extreme logits, against the definitions in NumPy's widest float
and against each other; the libraries' own autodiff; and that KL and DKL have the same gradients. Distances are in units
in the last place.
"""

_NOTES = """\
bounds:
  32 units for values (of each number) and for gradients in float32 and float64 (of the largest number of the row), 1
  for gradients in float16 and bfloat16, which are rounded once; twice that between two rows; 16 for the gradients of
  DKL from those of KL. docs/verify.md has the reasons.

json:
  backends.NAME.{version, device, hardware, kernel}, absent.NAME, checks, kl_equals_dkl, and in lists of {kind,
  backends, dtype, what, case, ulps, bound}: farthest, the worst of each; broken, what is beyond its bound, with what
  was found. kernel is the instruction set that the kernel uses, null for the formulas.
  ulps is null where one side is infinite or NaN, or raised an error.

exit status:
  0 all within the bounds, 1 a bound is broken or a library raised, 2 a backend that was named is not here.

examples:
  gklx verify
  gklx verify --backend numpy torch --format junit > verify.xml
  gklx verify --backend "torch cuda:0" --format json
  gklx verify --format markdown >> "$GITHUB_STEP_SUMMARY"
"""


def add_to(commands: Any) -> None:
    """Adds the subcommand to the parser."""
    verify = commands.add_parser(
        "verify",
        help="check the array libraries that are here against each other",
        description=_DESCRIPTION,
        epilog=_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verify.set_defaults(run=_run)
    verify.add_argument(
        "--backend",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(library.backend for library in LIBRARIES)}, or one device, as 'torch cuda:0' "
        "(default: all that are here)",
    )
    formats = ["table", "json", "junit", "markdown"]
    verify.add_argument("--format", choices=formats, default="table", help="default: %(default)s")


def _run(arguments: argparse.Namespace, show: Callable[[str], None]) -> int:
    from rich.console import Console
    from rich.progress import track

    from .._verify.checks import verify
    from .._verify.report import as_json, as_junit, as_markdown, as_table

    console = Console(file=sys.stderr or io.StringIO())  # rich takes None for standard output
    bar = partial(track, description="gklx verify", console=console, transient=True, disable=not console.is_terminal)
    report = verify(arguments.backend, bar)
    writers = {"table": as_table, "json": as_json, "junit": as_junit, "markdown": as_markdown}
    show(writers[arguments.format](report))
    return int(bool(report.broken))
