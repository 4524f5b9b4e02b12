"""Where a model or a tokenizer is: a folder on this machine, or a repository on the hub."""

from __future__ import annotations

import contextlib
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
"""A tokenizer has at least one of these."""


def local_folder(name: str) -> Path | None:
    """The folder that `name` is; None for a hub ID."""
    path = Path(name).expanduser()
    with contextlib.suppress(OSError):  # no folder can have this name
        return path if path.is_dir() else None
    return None


def may_be_on_hub(name: str) -> bool:
    """Whether the hub could have a repository of this name: `owner/model` or `model`, never a path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.startswith(("/", ".", "~"))


def location_problem(name: str, what: str) -> str | None:
    """What is wrong with `name` as the place of a `what` ("model" or "tokenizer"), without asking the hub."""
    path = local_folder(name)
    if path is None:
        with contextlib.suppress(OSError):
            if Path(name).expanduser().is_file():
                return f"{name} is a file; name the folder that holds the {what}, or a hub ID"
        return None if may_be_on_hub(name) else f"there is no folder {name}"
    if what == "model" and not (path / "config.json").is_file():
        holds = (
            "an adapter; name its base, and give the adapter to distft evaluate" if _is_adapter(path) else "no model"
        )
        return f"the folder {name} has no config.json: it holds {holds}"
    if what == "tokenizer" and not any((path / file).is_file() for file in TOKENIZER_FILES):
        return f"the folder {name} has no tokenizer: none of {', '.join(TOKENIZER_FILES)}"
    return None


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()
