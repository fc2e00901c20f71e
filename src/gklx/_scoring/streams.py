"""Messages of the command: single lines on the standard error stream, if it is open."""

import contextlib
import os
import sys
from pathlib import Path
from typing import TextIO

_LONGEST = 2000


def say(message: str) -> None:
    """Prints one line; line breaks and control characters in file names and messages are escaped."""
    if sys.stderr is None:
        return
    try:
        print(f"gklx: {printable(message)}", file=sys.stderr, flush=True)
    except OSError:
        drop(sys.stderr)


def printable(text: str) -> str:
    """A text in one line of bounded length; control characters and what cannot be encoded are escaped."""
    line = " ".join(text.split())
    line = "".join(x if x.isprintable() else x.encode("unicode_escape").decode("ascii") for x in line)
    half = _LONGEST // 2
    return line if len(line) <= _LONGEST else f"{line[:half]} … {line[-half:]}"


def short_names(names: list[str]) -> list[str]:
    """The paths without their folders if they still differ then, with control characters escaped."""
    short = [printable(Path(name).name) for name in names]
    return short if len(set(short)) == len(names) else [printable(name) for name in names]


def drop(stream: TextIO | None) -> None:
    """Discards the buffered output: the interpreter would try to write it again at its exit."""
    if stream is None:
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def fill_closed() -> None:
    """Opens /dev/null in place of a standard stream that is closed: a file opened later would get its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor
