"""`python -m distft.cli`: the command `distft`."""

import sys

from distft.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
