"""What every process of distft's own does before it imports anything else."""

from __future__ import annotations

import os
import sys

SAFE_PATH = "PYTHONSAFEPATH"
"""Environment variable of Python: do not put the working folder on the import path."""


def start_up() -> None:
    leave_working_folder()
    from distft.console import set_up_streams

    set_up_streams()


def leave_working_folder() -> None:
    """Keep this process and those it starts from importing modules of the working folder.

    `python -m` looks there first, and would find a user's `datasets.py` before the library of that name.
    """
    here = os.getcwd()  # noqa: PTH109 - pathlib is not imported yet, and could be the user's
    if here == os.path.dirname(os.path.dirname(os.path.abspath(__file__))):  # noqa: PTH100, PTH120
        return  # distft itself is imported from there, without being installed
    # The variable says that it is done: the next entry may be the same folder, which the user has put on PYTHONPATH.
    if not os.environ.get(SAFE_PATH) and sys.path[:1] in ([""], [here]):
        del sys.path[0]
    os.environ[SAFE_PATH] = "1"
