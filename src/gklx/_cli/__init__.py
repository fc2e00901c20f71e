"""The command `gklx`: its arguments, its exit codes, and what goes to which stream.

0: done. 1: a failure of the system or of gklx. 2: wrong arguments or input. 130: interrupted. 141: the reader of the
output has closed it. Errors are one line on stderr; stdout gets the whole report or nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .._interrupts import ended_by_interrupts
from .._scoring.streams import drop, fill_closed, say

_DESCRIPTION = "KL, DKL, IKL and GKL divergence losses, from logits in files."

_EXTRA = ("psutil", "rich")
"""The packages of the extra `cli`, which the command needs and the losses do not."""
_CLOSED = "standard output is closed, and the report was to go there"

_EXAMPLE = """\
example:
  gklx score student.npy teacher.npy --labels labels.npy --loss kl,gkl --gamma 0.5
  gklx verify --format markdown
"""


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        say(f"error: {message}")
        raise SystemExit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is None:  # the stream is closed, and argparse would write to standard error
            raise OSError(_CLOSED)
        super()._print_message(message, file)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments after the command's name; those of the process by default.
    """
    try:
        fill_closed()
        status = _run(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        say(str(interrupt.args[0]) if interrupt.args else "interrupted")
        return 130
    except BrokenPipeError:
        drop(sys.stdout)
        return 141
    except MemoryError as error:
        say(f"error: not enough memory; a smaller --memory may help ({error})")
        return 1
    except Exception as error:  # a user of the command gets one line instead of a traceback
        if isinstance(error, OSError):
            drop(sys.stdout)
        say(f"error: {type(error).__name__}: {error}")
        return 1
    return status


def _run(argv: Sequence[str] | None) -> int:
    with ended_by_interrupts():
        from . import score

        parser = _parser()
    try:
        arguments = parser.parse_args(score.with_losses_joined(sys.argv[1:] if argv is None else argv))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    if arguments.command is None:
        if sys.stderr is not None:
            parser.print_help(sys.stderr)
        return 2
    try:
        return int(arguments.run(arguments, _print))
    except (ValueError, TypeError) as error:
        say(f"error: {error}")
        return 2
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        say(f"error: gklx {arguments.command} needs {missing}, which is not installed (pip install 'gklx[cli]')")
        return 2


def _print(report: str) -> None:
    """Writes the report to standard output; OSError where that fails."""
    if sys.stdout is None:
        raise OSError(_CLOSED)
    # Characters that the output's encoding lacks are replaced instead of raising an error.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(report.encode(encoding, "replace").decode(encoding), end="", flush=True)


def _parser() -> argparse.ArgumentParser:
    from .. import __version__
    from . import score, verify

    style = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="gklx", description=_DESCRIPTION, epilog=_EXAMPLE, formatter_class=style, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"gklx {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    for command in (score, verify):
        command.add_to(commands)
    return parser
