"""`adapter` of a recipe: a saved adapter that training starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel

from distft.config.adapter import adapter_faults, adapter_folder
from distft.config.preference import Preference
from distft.config.recipe import Recipe
from distft.errors import Fault, ModelError
from distft.models.digest import adapter_digest
from distft.models.saved_adapter import SavedAdapter


def start_folder(recipe: Recipe) -> Path | None:
    """The folder of the adapter that the recipe starts from; None if it starts from the base."""
    return None if recipe.adapter is None else adapter_folder(Path(recipe.adapter))


def start_digest(recipe: Recipe) -> str | None:
    """The digest of the values that the adapter starts from; None if they are new.

    Raises:
        ModelError: they cannot be read.
    """
    folder = start_folder(recipe)
    return None if folder is None else adapter_digest(folder)


def start_from_adapter(model: Any, recipe: Recipe) -> Any:
    """`model` with the values of the saved adapter that the recipe names, if it names one. The model is still whole.

    Raises:
        ModelError: the adapter cannot be read, or does not fit.
    """
    if (folder := start_folder(recipe)) is not None:
        SavedAdapter.read(folder).start(model, recipe.model.name)
    return model


def start_notes(recipe: Recipe) -> list[str]:
    """What a run says about the adapter that it starts from."""
    if (folder := start_folder(recipe)) is None:
        return []
    note = SavedAdapter.read(folder).base_note(recipe)
    held = ", which is also the reference" if recipe.prefers and (recipe.preference or Preference()).refers else ""
    return [f"starts from the adapter in {folder}{held}", *([] if note is None else [note])]


def start_faults(recipe: Recipe, model: PeftModel) -> list[Fault]:
    """Why the saved adapter that the recipe names, if it names one, cannot be the start of that of `model`, which is
    without values."""
    folder = start_folder(recipe)
    if folder is None or adapter_faults(recipe):  # those are reported with the other files
        return []
    try:
        saved = SavedAdapter.read(folder)
        if saved.is_of_other_base(recipe):
            hint = "name the base that the adapter was trained on"
            return [Fault(recipe.source.of("model.name"), "model.name", str(saved.base_note(recipe)), hint)]
        saved.require_fit(model, recipe.model.name)
    except ModelError as error:
        return [Fault(recipe.source.of("adapter"), "adapter", str(error))]
    return []
