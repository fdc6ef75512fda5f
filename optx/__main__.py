"""`python -m optx` is `optx`."""

import sys

from optx.cli import main

if __name__ == "__main__":
    sys.exit(main())
