"""An OpenAI-compatible server for a model: `vllm serve` where vLLM is installed and there is a GPU, otherwise
`transformers serve`.

Neither knows the template of a model that was trained without a chat template, and `transformers serve` loads no
adapter. So a server gets a folder with what it needs: links to the weights, and a tokenizer with that template.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distft.config.recipe import Recipe
from distft.console import say
from distft.data.prompts import trained_template
from distft.errors import LaunchError, MissingExtraError, RunFolderError
from distft.evaluation.engines.lora import lora_words, obstacle_to_lora
from distft.evaluation.request import Request
from distft.evaluation.target import Trained
from distft.hardware import visible_devices
from distft.models.export import merge
from distft.models.loading import load_tokenizer, model_path
from distft.models.locations import local_folder

Program = Literal["vllm", "transformers"]
_SERVER_OF_TRANSFORMERS = ("fastapi", "uvicorn", "openai")
_INSTRUCTION = (
    "{% for message in messages %}{% if message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
    "### Response:\n{% elif message['role'] == 'assistant' %}{{ message['content'] | trim }}\n\n{% endif %}{% endfor %}"
)
_PLAIN = (
    "{% for message in messages %}{{ message['content'] }}{% if not loop.last %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
)
_TEMPLATES = {"instruction": _INSTRUCTION, "plain": _PLAIN}
"""What distft trains with where there is no chat template, as one."""
_NOT_WEIGHTS = ("tokenizer", "chat_template", "special_tokens", "vocab", "merges", "added_tokens")
"""Beginnings of the names of a tokenizer's files."""


@dataclass(frozen=True)
class Served:
    """What a server loads: a `model`, and perhaps an `adapter` of some `rank` on it. Clients ask for `name`, and
    `transformers serve` takes this name for a folder where it is started."""

    model: str
    name: str
    dtype: str
    tokenizer: str | None = None
    adapter: str | None = None
    rank: int = 0
    revision: str | None = None
    trust_remote_code: bool = False


def command(program: Program, served: Served, host: str, port: int) -> list[str]:
    """The command of the server.

    Raises:
        MissingExtraError: the server of transformers is not installed.
        LaunchError: the program is not there.
    """
    model = served.name if program == "transformers" else served.model
    words = [path_of(program), "serve", model, "--host", host, "--port", str(port), "--dtype", served.dtype]
    words += ["--trust-remote-code"] if served.trust_remote_code else []
    if program == "transformers":
        return words
    words += [] if served.revision is None else ["--revision", served.revision]
    words += [] if served.tokenizer is None else ["--tokenizer", served.tokenizer]
    if served.adapter is None:
        return [*words, "--served-model-name", served.name]
    return [*words, *lora_words(served.name, served.adapter, served.rank)]


def path_of(program: Program) -> str:
    """The program that belongs to this Python, or else the first on the PATH.

    Raises:
        MissingExtraError: the server of transformers is not installed.
        LaunchError: the program is not there.
    """
    for module in _SERVER_OF_TRANSFORMERS if program == "transformers" else ():
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError("servers of transformers", module, "serve")
    own = Path(sys.executable).with_name(program)
    found = str(own) if own.is_file() else shutil.which(program)
    if found is None:
        raise LaunchError(f"there is no program {program}; it comes with the package of that name")
    return found


def choose_program() -> Program:
    """vLLM if it is installed and there is a GPU for it."""
    return "vllm" if importlib.util.find_spec("vllm") is not None and visible_devices() else "transformers"


def prepare(request: Request, program: Program, folder: Path, *, base: bool) -> Served:
    """What the server is to load, with what it needs and the model lacks in `folder`. An adapter that the server cannot
    load is merged into its base: in the run's `merged/`, which is kept, or in `folder`.

    Raises:
        ModelError: the model cannot be loaded or merged.
        RunFolderError: the run's merged model is older than its adapter.
    """
    recipe, result = request.recipe, None if base else request.result
    settings: dict[str, Any] = {}
    if result is not None and (file := result / "adapter_config.json").is_file():
        settings = json.loads(file.read_text(encoding="utf-8-sig"))
    tokenizer = _tokenizer(recipe, request, result)
    options: dict[str, Any] = {"trust_remote_code": recipe.model.trust_remote_code}
    name = recipe.model.name if result is None else request.folder.name
    options |= {"name": Path(name).name if local_folder(name) else name, "dtype": recipe.model.dtype}
    if settings:
        why = "transformers serve loads no adapter" if program == "transformers" else obstacle_to_lora(settings)
        why = why or ("vLLM does not quantise the base as in training" if recipe.bits < 16 else None)
        if why is None:
            tokenizer.save_pretrained(str(folder))
            adapter: dict[str, Any] = {"adapter": str(result), "rank": int(settings["r"]), "tokenizer": str(folder)}
            return Served(model_path(recipe), revision=recipe.model.revision, **adapter, **options)
        assert result is not None
        place = folder / options["name"]
        return Served(str(_with_tokenizer(_merged(request, result, folder, why), tokenizer, place)), **options)
    place = model_path(recipe) if result is None else str(result)
    if (weights := local_folder(place)) is None:  # on the hub, with a tokenizer of its own
        return Served(place, revision=recipe.model.revision, **options)
    return Served(str(_with_tokenizer(weights, tokenizer, folder / options["name"])), **options)


def _merged(request: Request, adapter: Path, folder: Path, why: str) -> Path:
    run = request.run
    target = folder / ".merged" if run is None or adapter != run.adapter else run.merged
    if target.is_dir():
        weights = adapter / "adapter_model.safetensors"
        if weights.is_file() and weights.stat().st_mtime > (target / "config.json").stat().st_mtime:
            raise RunFolderError(f"{target} is older than {adapter}; delete it, and it is made again")
        return target
    say(f"{why}: merging the adapter into its base, in {target}")
    merge(request.recipe, adapter, target, {"": 0} if visible_devices() else None)
    return target


def _with_tokenizer(weights: Path, tokenizer: Any, place: Path) -> Path:
    """The folder `place` with links to the files of `weights`, and the files of `tokenizer` in place of its own."""
    place.mkdir(parents=True)
    for file in weights.iterdir():
        if file.is_file() and not file.name.startswith(_NOT_WEIGHTS):
            (place / file.name).symlink_to(file.resolve())
    tokenizer.save_pretrained(str(place))
    return place


def _tokenizer(recipe: Recipe, request: Request, result: Path | None) -> Any:
    """The tokenizer, with the template of the training as its chat template."""
    tokenizer = load_tokenizer(recipe)
    trained = Trained.by(request.run)
    wanted = recipe.evaluation.generation.template
    name = wanted if wanted != "auto" else None if trained is None else trained_template(trained.recipe, tokenizer)
    if name is None and not tokenizer.chat_template:
        name = "instruction"  # as distft chat does
    if (template := chat_template_for(name, tokenizer)) is not None:
        tokenizer.chat_template = template
    return tokenizer


def chat_template_for(name: str | None, tokenizer: Any) -> str | None:
    """The chat template that gives a server the prompts of the template `name`; None if the tokenizer has its own.

    A server adds no special tokens to a rendered conversation, so the template writes the beginning of the sequence
    where the tokenizer does.
    """
    if name not in _TEMPLATES:
        return None
    ids = tokenizer("a")["input_ids"]
    begins = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if begins else "") + _TEMPLATES[name]
