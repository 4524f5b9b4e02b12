"""`adapter`: train on from a saved adapter. What its run, or PEFT's file, says about the model goes into the recipe.

It takes the place of what a shipped recipe says, not of what the user says: on the command line or in a recipe of their
own. Whether the two can go together is looked at before a training, not where a recipe is merely read: a finished run
does not need the adapter that it started from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.config.files import read_yaml, related
from distft.config.upstream import upstream_fields
from distft.config.upstream_rules import OWNED
from distft.config.validation import COMMAND_LINE, DEFAULT, DERIVED, Source
from distft.errors import Fault, RecipeError
from distft.paths import packaged

if TYPE_CHECKING:
    from distft.config.recipe import Recipe

RECIPE, SUMMARY, RESULT, WHOLE = "recipe.yaml", "summary.json", "adapter", "model"
PEFT = "adapter_config.json"
"""Names in a run's folder, and of PEFT's file in an adapter's."""
REWRITES = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Values of lora.init_lora_weights, or their beginnings, with which PEFT also changes the weights of the base."""
_REPEATABLE = ("pissa", "olora")
"""Those with which it changes them in the same way again."""
_OF_MODEL = ("name", "revision", "tokenizer", "resize_embeddings", "trust_remote_code", "dtype")
_OF_RECIPE = {"quantization": ("bnb_4bit_quant_storage", "dequantize_at_load"), "lora": ("lora_dropout",)}
"""What any recipe may set, because the adapter computes the same with it."""
_BY_NAME = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
"""Fields that select modules, possibly the same ones in other words: the tensors tell."""
_OWN_TEMPLATE = "tokenizer"


@dataclass(frozen=True)
class Stated:
    """What is known of an adapter: `sections` of a recipe, and the file that says so."""

    sections: Mapping[str, Any]
    origin: Path


def absolute(name: str) -> str:
    """A path that names the same folder from any working folder."""
    try:
        return os.path.normpath(Path(name).expanduser().absolute())
    except RuntimeError:  # there is no such user, and no such folder
        return name


def adapter_folder(place: Path) -> Path:
    """The folder of the adapter that `adapter` names by its own folder, or by that of its run."""
    return place / RESULT if (place / RECIPE).is_file() and not (place / PEFT).is_file() else place


def run_of(place: Path) -> Path | None:
    """The recipe of the run that made an adapter, which is a result or a checkpoint; None if it is in no run."""
    folder = adapter_folder(place)
    runs = (run for run in [*folder.parents][:2] if (run / SUMMARY).is_file() and (run / RECIPE).is_file())
    return next((run / RECIPE for run in runs), None)


def stated_by(place: Path) -> Stated | None:
    """What the run that made an adapter, else PEFT's file, says about the model; None if neither can be read."""
    folder = adapter_folder(place)
    if (file := run_of(place)) is not None:
        try:
            return Stated(read_yaml(file), file)
        except RecipeError:
            return None
    config = _peft_config(folder)
    if config is None:
        return None
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    model = {"name": name, "revision": revision} if isinstance(name, str) and name else {}
    return Stated({"model": model, "lora": _lora_of(config)}, folder / PEFT)


def with_adapter(
    values: dict[str, Any], source: Source, planned: Mapping[Path, Recipe] | None = None
) -> tuple[dict[str, Any], Source]:
    """`values` of a recipe, completed by what is known of its adapter. `planned` are runs that are still to be made, by
    their folders."""
    wanted = values.get("adapter")
    if not isinstance(wanted, str) or not wanted:
        return values, source
    place = Path(absolute(wanted))
    run = (planned or {}).get(place)
    stated = stated_by(place) if run is None else Stated(run.model_dump(), place / RECIPE)
    if stated is None:
        return values, source
    filling = _Filling(values, source, stated)
    filling.model()
    filling.section("quantization")
    filling.section("lora")
    filling.template()
    return filling.values, replace(source, origins=filling.origins)


class _Filling:
    """A recipe's values and their origins, while those of an adapter are filled in."""

    def __init__(self, values: dict[str, Any], source: Source, stated: Stated) -> None:
        self.values, self.origins = dict(values), dict(source.origins)
        self._source, self._stated = source, stated

    def model(self) -> None:
        stated, found = self._stated.sections.get("model"), self.values.get("model", {})
        if not isinstance(stated, dict) or not isinstance(found, dict):
            return
        moved = self._said("model.name")
        for key in (key for key in _OF_MODEL if key in stated):
            if not self._said(f"model.{key}") and not (moved and key == "revision"):
                found = found | {key: stated[key]}
                self._note(f"model.{key}")
        self.values["model"] = found

    def section(self, name: str) -> None:
        """Replace a section but for what the user says, and for what any recipe may set."""
        if name not in self._stated.sections:
            return
        stated, found = self._stated.sections[name], self.values.get(name)
        if not isinstance(stated, dict | None) or not isinstance(found, dict | None):
            return
        if found is None and self._said(name):
            return
        said = {key: value for key, value in (found or {}).items() if self._said(f"{name}.{key}")}
        kept = {key: value for key, value in (found or {}).items() if key in _OF_RECIPE[name]}
        if stated is None and not said:
            self.values[name] = None
        else:
            self.values[name] = (_without_init(stated or {}) if name == "lora" else stated or {}) | kept | said
        self.origins = {
            key: origin
            for key, origin in self.origins.items()
            if not related(key, name) or self._is_user(origin) or key.split(".")[1:2] in [[leaf] for leaf in kept]
        }
        for key in (self.values[name] or {}).keys() - {**kept, **said}.keys():
            self._note(f"{name}.{key}")

    def template(self) -> None:
        """A template that is not the tokenizer's own may have added tokens, which were trained with the adapter."""
        stated, found = self._stated.sections.get("data"), self.values.get("data", {})
        name = stated.get("chat_template") if isinstance(stated, dict) else None
        if name in (None, _OWN_TEMPLATE) or not isinstance(found, dict) or self._said("data.chat_template"):
            return
        self.values["data"] = found | {"chat_template": name}
        self._note("data.chat_template")

    def _said(self, key: str) -> bool:
        return self._is_user(self._source.of(key))

    @staticmethod
    def _is_user(origin: str) -> bool:
        if origin in (DEFAULT, DERIVED):
            return False
        return origin == COMMAND_LINE or not Path(origin).resolve().is_relative_to(packaged("recipes"))

    def _note(self, key: str) -> None:
        self.origins[key] = str(self._stated.origin)


def adapter_faults(recipe: Recipe) -> list[Fault]:
    """What keeps a training from starting from the recipe's adapter, as far as its files' names and settings tell."""
    if recipe.adapter is None:
        return []

    def fault(problem: str, hint: str = "", key: str = "adapter") -> Fault:
        return Fault(recipe.source.of(key), key, problem, hint)

    place = Path(recipe.adapter)
    folder = adapter_folder(place)
    if not place.is_dir():
        return [fault(f"there is no folder {place}", "name the folder of a run, or of an adapter")]
    if not (folder / PEFT).is_file():
        if (place / RECIPE).is_file() and (whole := place / WHOLE).is_dir():
            hint = f"model.name={whole} trains on from it"
            return [fault(f"the run in {place} has trained a whole model, not an adapter", hint)]
        if (place / RECIPE).is_file():
            return [fault(f"the run in {place} has no adapter: it has not finished", "finish it first")]
        return [fault(f"{place} is the folder of neither a run nor an adapter: it has no {PEFT}")]
    config = _peft_config(folder)
    if config is None:
        return [fault(f"{folder / PEFT} is damaged")]
    if (kind := config.get("peft_type")) != "LORA":
        return [fault(f"the adapter in {folder} is of the type {kind}", "distft trains LORA, with DoRA and rsLoRA")]
    if recipe.lora is None:
        return [fault("is null, and an adapter is to be trained", "leave lora out, or adapter", key="lora")]
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(REWRITES) and not init.startswith(_REPEATABLE):
        problem = f"the adapter in {folder} fits a base that {init} has changed, in a way that cannot be repeated"
        return [fault(problem, "convert it to plain LoRA with PEFT")]
    stated = stated_by(place)
    theirs = stated.sections.get("lora") if stated is not None else None
    if not isinstance(theirs, dict):
        return []
    found, defaults = [], {field.name: field.default for field in upstream_fields("lora")}
    ours = recipe.lora
    for key in dict.fromkeys((*ours, *theirs)):
        if key in (*_BY_NAME, *_OF_RECIPE["lora"], "init_lora_weights"):
            continue
        given, known = (defaults.get(key) if each.get(key) is None else each[key] for each in (ours, theirs))
        if (given or None) != (known or None):  # false, {} and [] are no different from null
            hint = "leave it out: it comes from the adapter"
            found.append(fault(f"is {given!r}, and the adapter in {folder} has {known!r}", hint, key=f"lora.{key}"))
    return found


def _without_init(lora: Mapping[str, Any]) -> dict[str, Any]:
    """`lora` without the initial weights, which do not matter any more, unless they come with changes of the base."""
    rewrites = str(lora.get("init_lora_weights", True)).lower().startswith(REWRITES)
    return {key: value for key, value in lora.items() if rewrites or key != "init_lora_weights"}


def _lora_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `lora` section that PEFT's file means: what differs from PEFT's defaults. Fields that this version of PEFT
    does not know are kept, to be refused by their names."""
    defaults = {field.name: field.default for field in upstream_fields("lora")}
    found = {
        key: value
        for key, value in config.items()
        if key not in OWNED["lora"] and value not in (None, {}, [], False, "") and value != defaults.get(key)
    }
    named = {key: config[key] for key in ("r", "lora_alpha") if key in config}
    if isinstance(targets := found.get("target_modules"), list):
        found["target_modules"] = sorted(targets)
    return named | found


def _peft_config(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / PEFT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
