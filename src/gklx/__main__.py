"""`python -m gklx` is the command `gklx`."""

import sys

from ._cli import main

if __name__ == "__main__":
    sys.exit(main())
