"""`distft fetch`: download a recipe's model and data for machines without a connection, and report what is missing.

Downloads go through the libraries that read the files later, so that a run with HF_HUB_OFFLINE=1 finds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from distft.config.files import list_recipes
from distft.config.recipe import Recipe
from distft.connection import cache_only
from distft.data.checks import require_files
from distft.data.files import exists
from distft.data.sources import HubSplit, Source, data_sources, on_network, read_source, remotes_of
from distft.errors import DataError, ModelError
from distft.models.digest import WHOLE
from distft.models.digest import files as weight_files
from distft.models.locations import TOKENIZER_FILES, local_folder, location_problem, may_be_on_hub
from distft.text import first_line

_TEXTS = ["*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken"]
_WEIGHTS = "model*.safetensors"


def fetch(recipe: Recipe) -> list[str]:
    """Download what a run of `recipe` reads and tokenize its data. Returns a line for each with its location and size.

    Downloads weights as safetensors only, and code only with model.trust_remote_code.

    Raises:
        ModelError: the hub is unreachable or lacks the model, or the model is gated or has no safetensors.
        DataError: the data is unavailable, or does not fit the recipe.
    """
    from distft.data.prepare import prepare_data  # take seconds to import, and `missing` does not need them
    from distft.models.loading import load_tokenizer

    require_files(recipe)
    lines = fetch_model(recipe)
    splits = prepare_data(recipe, load_tokenizer(recipe))
    lines += map(fetch_data, data_sources(recipe.data)[recipe.data.streaming :])  # what is streamed is fetched later
    tokens = [Path(file["filename"]) for file in splits.train.cache_files]  # of all splits
    return [*lines, f"data, tokenized: {tokens[0].parent}, {_size(*tokens)}"]


def fetch_model(recipe: Recipe, role: str = "") -> list[str]:
    """Do what `fetch` does for model and tokenizer only; each line has `role` after the name."""
    from distft.models.tiny import tiny_model

    lines = []
    for name, parts in _repositories(recipe).items():
        folder = tiny_model() if name == "tiny" else local_folder(name) or _download(recipe, name, parts)
        if lacking := _lacking(folder, parts):
            raise ModelError(f"{name} has no {' and no '.join(lacking)}, which distft needs")
        lines.append(f"{' and '.join(parts)} {name}{role}: {folder}, {_size(folder)}")
    return lines


def fetch_data(source: Source) -> str:
    """Download a data source, and return a line with its location and size.

    Raises:
        DataError: it is unavailable.
    """
    files = read_source(source).files
    name = f"{source.name}, {source.split} split" if isinstance(source, HubSplit) else str(source)
    return f"data {name}: {files[0].parent if files else source}, {_size(*files)}"


def missing(recipe: Recipe, *, hub: bool = True) -> list[str]:
    """What a run of `recipe` would lack with the hub offline, each with its remedy. Does not use the network.

    `hub=False` checks only local files and folders, and leaves out what the hub may have.
    """
    found = missing_model(recipe, hub=hub)
    checked = [source for source in _sources(recipe, found) if hub or not on_network(source)]
    return found + [line for source in checked for line in missing_data(recipe, source)]


def remedy(recipe: Recipe) -> str:
    """The remedy for files that the cache lacks."""
    named, files = recipe.source.name, recipe.source.files
    wanted = named if not files or list_recipes(Path.cwd()).get(named) == files[-1] else files[-1]
    return f"on a machine with a connection: distft fetch recipe={wanted}, with the same overrides"


def missing_model(recipe: Recipe, role: str = "", *, hub: bool = True) -> list[str]:
    """What `missing` finds for model and tokenizer only; each line has `role` after the name."""
    found = []
    for name, parts in _repositories(recipe).items():
        if name == "tiny":
            continue  # built if it does not exist
        local = local_folder(name)
        if local is None and not hub and may_be_on_hub(name):
            continue
        folder = local or _cached(recipe, name)
        what = " and ".join(parts)
        if folder is not None:
            fix = "copy the complete folder" if local else remedy(recipe)
            found += [f"{name} lacks {part} in {folder}; {fix}" for part in _lacking(folder, parts)]
        elif problem := location_problem(name, parts[0]):
            found.append(f"{problem} ({what}){role}")
        else:
            found.append(f"the {what} {name}{role} is not in the cache; {remedy(recipe)}")
    return found


def missing_data(recipe: Recipe, source: Source) -> list[str]:
    """What `missing` finds for one data source."""
    if isinstance(source, Path):
        return [] if exists(source) else [f"there is no data file or folder {source} (data)"]
    if recipe.data.streaming and on_network(source) and source == data_sources(recipe.data)[0]:
        return [f"the data {source} are streamed, and need a connection during the run"]
    if remotes := remotes_of(source):
        lacking = [remote for remote in remotes if remote.copies() is None]
        return [f"the data {remote} is not in the cache; {remedy(recipe)}" for remote in lacking]
    with cache_only():
        try:
            read_source(source)
        except DataError as error:
            if not isinstance(source, HubSplit):
                return [str(error)]
            return [f"the data {source.name}, {source.split} split, is not in the cache; {remedy(recipe)}"]
    return []


def _repositories(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """Hub IDs or folders (or `tiny`), each with the parts that a run reads from it."""
    name, tokenizer = recipe.model.name, recipe.model.tokenizer
    if tokenizer is None or tokenizer == name:
        return {name: ("model", "tokenizer")}
    return {name: ("model",), tokenizer: ("tokenizer",)}


def _sources(recipe: Recipe, found: list[str]) -> list[Source]:
    try:
        return data_sources(recipe.data)
    except DataError as error:
        found.append(str(error))
        return []


def _revision(recipe: Recipe, name: str) -> str | None:
    return recipe.model.revision if name == recipe.model.name and recipe.model.tokenizer != name else None


def _download(recipe: Recipe, name: str, parts: Sequence[str]) -> Path:
    wanted = [*_TEXTS, *([_WEIGHTS] if "model" in parts else []), *(["*.py"] if recipe.model.trust_remote_code else [])]
    revision = _revision(recipe, name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: accept its licence on its page on the hub, then `hf auth login` (or set HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{name} has no revision {revision} (model.revision)") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"the hub has no model {name}, or it is private: `hf auth login` (or set HF_TOKEN)") from error
    except HFValidationError as error:
        raise ModelError(f"{name} is neither an existing folder nor a hub ID") from error
    except Exception as error:  # refused, timed out, offline, server errors: many types, one meaning
        reason = "HF_HUB_OFFLINE is set; unset it for distft fetch" if constants.HF_HUB_OFFLINE else _reason(error)
        raise ModelError(f"{name} cannot be downloaded from the hub: {reason}") from error


def _cached(recipe: Recipe, name: str) -> Path | None:
    """The snapshot of a model in the hub's cache, complete or not; None if there is none."""
    try:
        return Path(snapshot_download(name, revision=_revision(recipe, name), local_files_only=True, allow_patterns=[]))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _lacking(folder: Path, parts: Sequence[str]) -> list[str]:
    """The files of `parts` that `folder` lacks. A broken link in the cache counts as missing."""
    wanted = {"config.json"} if "model" in parts else set()
    if "model" in parts:
        wanted |= weight_files(folder) or {WHOLE}
    found = [name for name in sorted(wanted) if not (folder / name).is_file()]
    if "tokenizer" in parts and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        found.append(TOKENIZER_FILES[0])
    return found


def _reason(error: BaseException) -> str:
    """The first line of the innermost error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _size(*paths: Path) -> str:
    """Total size of files and of everything in folders, as text."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
