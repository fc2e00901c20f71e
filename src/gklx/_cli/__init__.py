"""The command `gklx`: its arguments, its exit codes, and what goes to which stream.

0: done. 1: something went wrong in here. 2: something is wrong with what was asked for. 130: interrupted.
141: nobody reads the output any more. Errors are one line on stderr; stdout gets the whole report or nothing.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from . import score, verify

_DESCRIPTION = "KL, DKL, IKL and GKL divergence losses, from logits in files."

_EXTRA = ("psutil", "rich")
"""What the command needs beyond the losses: the extra `cli`."""

_EXAMPLE = """\
example:
  gklx score student.npy teacher.npy --labels labels.npy --loss kl gkl --gamma 0.5
  gklx verify --format markdown
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
    except KeyboardInterrupt as interrupt:
        print(f"gklx: {interrupt.args[0] if interrupt.args else 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_output()
        return 141
    except MemoryError as error:
        _complain(f"not enough memory; a smaller --memory may help ({error})")
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
        report, status = arguments.run(arguments)
    except (ValueError, TypeError) as error:
        _complain(str(error))
        return 2
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        _complain(f"gklx {arguments.command} needs {error.name}, which is not installed (pip install 'gklx[cli]')")
        return 2
    # Characters that the output cannot spell are replaced: a table is no reason to fail.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(report.encode(encoding, "replace").decode(encoding), end="")
    return int(status)


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="gklx", description=_DESCRIPTION, epilog=_EXAMPLE, formatter_class=style, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"gklx {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    for command in (score, verify):
        command.add_to(commands)
    return parser


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
