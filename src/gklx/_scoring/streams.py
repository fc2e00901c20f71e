"""What the command says to people: one line each on the standard error stream, if there is one."""

import contextlib
import os
import sys
from pathlib import Path
from typing import TextIO

_LONGEST = 2000


def say(message: str) -> None:
    """One line, whatever line breaks and control characters a file name or a library's message has."""
    if sys.stderr is None:
        return
    try:
        print(f"gklx: {printable(message)}", file=sys.stderr, flush=True)
    except OSError:
        drop(sys.stderr)


def printable(text: str) -> str:
    """In one line, with what would steer a terminal or cannot be encoded spelt out, and of bounded length."""
    line = " ".join(text.split())
    line = "".join(x if x.isprintable() else x.encode("unicode_escape").decode("ascii") for x in line)
    half = _LONGEST // 2
    return line if len(line) <= _LONGEST else f"{line[:half]} … {line[-half:]}"


def short_names(names: list[str]) -> list[str]:
    """Paths without their folders, where that tells them apart; printable."""
    short = [printable(Path(name).name) for name in names]
    return short if len(set(short)) == len(names) else [printable(name) for name in names]


def drop(stream: TextIO | None) -> None:
    """Sends what is still buffered nowhere; the interpreter would try to write it once more at its end."""
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
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
