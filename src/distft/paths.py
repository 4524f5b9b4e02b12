"""Where distft's files are: those that travel with it, in the installed package or at the top of a checkout, and
those that it makes."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def packaged(name: str) -> Path:
    """Path of a shipped file or folder such as `recipes`, `accelerate_configs/fsdp.yaml` or `assets/tiny_corpus.txt`.

    A wheel carries the top-level folders inside the package; an editable install reads those of the checkout.

    Raises:
        FileNotFoundError: the installation is incomplete.
    """
    for root in (PACKAGE, PACKAGE.parent.parent):
        if (root / name).exists():
            return root / name
    raise FileNotFoundError(
        f"distft's own file {name!r} is missing from this installation ({PACKAGE}); install it again"
    )


def cache_folder() -> Path:
    """`$DISTFT_CACHE`, else `distft` in the user's cache folder."""
    if "DISTFT_CACHE" in os.environ:
        return Path(os.environ["DISTFT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distft"
