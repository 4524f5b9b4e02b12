"""`python -m distft.cli`: the command `distft`."""

import sys

from distft.startup import leave_working_folder

if __name__ == "__main__":
    leave_working_folder()
    from distft.cli.main import main

    sys.exit(main())
