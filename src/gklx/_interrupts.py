"""Ctrl-C while the command `gklx` imports its modules."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator


def is_command() -> bool:
    """Whether this process is the command `gklx`, or `python -m gklx`."""
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    started = getattr(sys, "orig_argv", [])
    return os.path.splitext(os.path.basename(program))[0] == "gklx" or (program == "-m" and "gklx" in started)


@contextlib.contextmanager
def ended_by_interrupts(wanted: bool = True) -> Iterator[None]:
    """Lets Ctrl-C end the process at once: KeyboardInterrupt during an import would print a traceback.

    Only in the command, and only if no other handler of the signal was set.
    """
    if (
        not wanted
        or threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
