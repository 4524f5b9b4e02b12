"""Where distft's own files are: the ones it ships and the ones it caches."""

from __future__ import annotations

import os
from pathlib import Path

from distft.errors import StorageError

PACKAGE = Path(__file__).resolve().parent


def packaged(name: str) -> Path:
    """Path of a shipped file or folder such as `recipes`, `accelerate_configs/fsdp.yaml` or `assets/tiny_corpus.txt`.

    A wheel contains the top-level folders in the package; an editable install uses those of the checkout.

    Raises:
        FileNotFoundError: the installation is incomplete.
    """
    for root in (PACKAGE, PACKAGE.parent.parent):
        if (root / name).exists():
            return root / name
    raise FileNotFoundError(
        f"distft's own file {name!r} is missing from this installation ({PACKAGE}); reinstall distft"
    )


def cache_folder() -> Path:
    """`$DISTFT_CACHE`, or `distft` in the user's cache folder if that is empty or not set.

    Raises:
        StorageError: neither is set, and this user has no home folder.
    """
    try:
        if own := os.environ.get("DISTFT_CACHE"):
            return Path(own).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distft"
    except RuntimeError as error:  # neither HOME nor an entry in the list of users
        raise StorageError(NO_HOME) from error


NO_HOME = "this user has no home folder: set HOME to a folder that can be written"
