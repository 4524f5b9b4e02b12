"""The model card of a run's result, as on the Hugging Face Hub: `README.md` in `adapter/`, `model/` or `merged/`.

It says what the model is, what it was trained on and how, what that changed, and how to load it. Everything comes from
the run folder; what is not known is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from distft.config.recipe import Recipe, load_recipe
from distft.config.schema import Data
from distft.data.formats import format_of, is_chat
from distft.data.sources import KNOWN_DATASETS, parts_of
from distft.files import write_atomically
from distft.models.loading import model_path
from distft.models.locations import local_folder, may_be_on_hub
from distft.runs.card_of_export import how_to_load_file, proof_section, read_export
from distft.runs.folder import RunFolder
from distft.text import count, with_interval

_PACKAGES = ("distft", "torch", "transformers", "trl", "peft", "bitsandbytes", "deepspeed")
_JOULES_PER_KWH = 3.6e6
_HERE = "FOLDER"
"""What the card calls the folder that it lies in."""
Row = tuple[str, str | None]
"""A line of a table; None for what is not known."""


def write_card(folder: RunFolder, result: Path) -> None:
    """Write the card of the model in `result`: the adapter of the run `folder`, or a whole model."""
    recipe = load_recipe([f"recipe={folder.recipe.absolute()}"])
    adapter = (result / "adapter_config.json").is_file()
    exported = read_export(result)
    file = exported.get("file")
    summary, environment = folder.read_summary(), folder.read_environment()
    metadata = _metadata(recipe, summary, folder.name, adapter=adapter)
    if file is not None:
        metadata.library_name, metadata.tags = "gguf", [*(metadata.tags or []), "gguf"]
    sections = [
        f"# {folder.name}",
        _description(recipe, summary, adapter=adapter),
        "## How to load it",
        _how_to_load(recipe, folder.name, adapter=adapter)
        if file is None
        else how_to_load_file(file, folder.name, _HERE, ollama=exported["to"] == "ollama"),
        *(["## Whether it answers as in training", proof] if (proof := proof_section(exported)) else []),
        *(["## What training changed", changes] if (changes := _changes(summary)) else []),
        "## How it was trained",
        _table(_training(recipe, summary)),
        "## Where it was trained",
        _table(_machine(recipe, summary, environment)),
    ]
    write_atomically(result / "README.md", f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _metadata(recipe: Recipe, summary: Mapping[str, Any], name: str, *, adapter: bool) -> ModelCardData:
    base, known = recipe.model.name, _on_hub(recipe.model.name)
    after = summary.get("eval_after") or {}
    data = ", ".join(_names(recipe))
    results = [
        EvalResult("text-generation", data, data, metric, after[metric], dataset_split="held-out")
        for metric in ("loss", "perplexity")
        if after.get(metric) is not None
    ]
    return ModelCardData(
        base_model=base if known else None,
        base_model_relation=("adapter" if adapter else "finetune") if known else None,
        datasets=list(filter(_on_hub, _names(recipe))) or None,
        eval_results=results or None,
        library_name="peft" if adapter else "transformers",
        license=_license(recipe),
        model_name=name,
        pipeline_tag="text-generation",
        co2_eq_emissions=_emissions_metadata(recipe, summary),
        tags=["distft", recipe.objective, *(["lora"] if recipe.lora is not None else [])],
    )


def _emissions_metadata(recipe: Recipe, summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """As the hub expects it, in grams."""
    grams = _emissions(recipe, summary)
    if grams is None:
        return None
    source = f"measured energy of the GPUs, at {recipe.tracking.co2_g_per_kwh:g} g/kWh"
    return {"emissions": round(grams, 3), "source": source, "training_type": "fine-tuning"}


def _on_hub(name: str) -> bool:
    return "/" in name and local_folder(name) is None and may_be_on_hub(name)


def _names(recipe: Recipe) -> list[str]:
    """The data sets: hub IDs, and the names of files without their folders, which say nothing to others."""
    found = []
    for part in [recipe.data] if recipe.data.sources is None else recipe.data.sources:
        known = KNOWN_DATASETS.get(part.name)
        name = known.hub or part.name if known else part.path or part.name
        found.append(name if _on_hub(name) else Path(name).name)
    return found


def _base(recipe: Recipe) -> str:
    """The base's name; of a folder, only its own: where it lies says nothing to others."""
    name = recipe.model.name
    return name if local_folder(name) is None else Path(name).name


def _license(recipe: Recipe) -> str | None:
    """The licence that the card of the base names, where the base lies in a folder or in the hub's cache."""
    try:
        text = (Path(model_path(recipe)) / "README.md").read_text(encoding="utf-8")
        found = getattr(ModelCard(text, ignore_metadata_errors=True).data, "license", None)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, str) else None


def _description(recipe: Recipe, summary: Mapping[str, Any], *, adapter: bool) -> str:
    base, names = _base(recipe), " and ".join(f"`{name}`" for name in _names(recipe))
    what = f"A LoRA adapter for `{base}`" if adapter else f"A fine-tune of `{base}`"
    samples, tokens = summary.get("samples"), summary.get("tokens")
    seen = f" ({samples:,} samples, {tokens:,} tokens)" if samples and tokens else ""
    return f"{what}, trained on {names}{seen} with distft."


def _how_to_load(recipe: Recipe, name: str, *, adapter: bool) -> str:
    form = format_of(recipe.data)
    if is_chat(recipe.data):
        prompt = "The tokenizer in it has the chat template of the training."
    elif form is not None and form.instruction:
        prompt = "Prompts begin with `### Instruction:` and end with `### Response:`, as in the training."
    else:
        prompt = "Prompts had no template in the training."
    auto = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    imports = (
        f"from peft import {auto}\nfrom transformers import AutoTokenizer"
        if adapter
        else f"from transformers import {auto}, AutoTokenizer"
    )
    served = f"{_base(recipe)} --enable-lora --lora-modules {name}={_HERE}" if adapter else _HERE
    if adapter:
        llama = f"`convert_lora_to_gguf.py {_HERE}` makes a file for `llama-cli --lora`"
    else:
        llama = f"`convert_hf_to_gguf.py {_HERE}` makes a file for `llama-cli --model`"
    code = (
        f'{imports}\n\nmodel = {auto}.from_pretrained("{_HERE}")\ntokenizer = AutoTokenizer.from_pretrained("{_HERE}")'
    )
    return (
        f"{_HERE} is the folder of this file. {prompt}\n\n```python\n{code}\n```\n\n"
        f"- distft: `distft chat {_HERE}`, or `distft serve {_HERE}` for OpenAI clients\n"
        f"- vLLM: `vllm serve {served}`\n- llama.cpp: {llama}"
    )


def _changes(summary: Mapping[str, Any]) -> str:
    """A table of what was evaluated: by `distft evaluate`, with intervals, or by the run itself."""
    results = summary.get("evaluation") or {}
    rows = [
        (
            f"{task}: {figure['title']}" if len(results) > 1 else figure["title"],
            *(with_interval(figure.get(side), figure["form"]) for side in ("base", "adapter")),
        )
        for task, result in results.items()
        for figure in result["figures"].values()
        if not figure.get("detail")
    ]
    before, after = summary.get("eval_before") or {}, summary.get("eval_after") or {}
    if not rows and before and after:
        rows = [
            (f"held-out {name}", f"{before[name]:,.4f}", f"{after[name]:,.4f}")
            for name in before
            if name not in ("pairs", "answers")
        ]
    if not rows:
        return ""
    lines = "\n".join(f"| {title} | {base} | {trained} |" for title, base, trained in rows)
    return f"| | base | trained |\n| --- | --- | --- |\n{lines}\n\nBrackets hold 95% confidence intervals."


def _training(recipe: Recipe, summary: Mapping[str, Any]) -> Iterator[Row]:
    lora, training = recipe.lora, recipe.training
    yield "recipe", f"`{Path(summary['recipe']).name}`, {recipe.objective}" if summary.get("recipe") else None
    yield "base", f"`{_base(recipe)}`" + (f", licence {found}" if (found := _license(recipe)) else "")
    yield "data", ", ".join(f"`{name}`" for name in _names(recipe))
    yield "template", _template(recipe)
    yield "strategy", f"{summary['strategy']}, {count(summary.get('world_size') or 1, 'process')}"
    yield "base weights", {4: "4-bit", 8: "8-bit"}.get(recipe.bits, recipe.model.dtype)
    yield "adapter", None if lora is None else f"LoRA, r={lora.get('r', 8)}, alpha={lora.get('lora_alpha', 8)}"
    yield "global batch", _batch(summary)
    yield "optimizer steps", _number(summary.get("steps"))
    yield "learning rate", f"{training.get('learning_rate')}, {training.get('lr_scheduler_type', 'linear')}"
    yield "longest sample", _number(training.get("max_length"), " tokens")
    yield "training loss", None if summary.get("train_loss") is None else f"{summary['train_loss']:.4f}"
    yield "seed", str(recipe.run.seed)
    yield "digest of the texts", summary.get("data_digest")
    yield "digest of the base", summary.get("weights_digest")
    yield "digest of the adapter it started from", summary.get("start_digest")


def _template(recipe: Recipe) -> str:
    """What prompts are rendered with."""
    return " and ".join(dict.fromkeys(map(_template_of, parts_of(recipe.data).values())))


def _template_of(data: Data) -> str:
    form = format_of(data)
    if is_chat(data):
        name = data.chat_template
        return "the tokenizer's chat template" if name is None else f"the chat template `{Path(name).name}`"
    if form is not None and (form.instruction or form.review):
        return "Dolly's instructions" if form.instruction else "reviews with a sentiment"
    return "none"


def _emissions(recipe: Recipe, summary: Mapping[str, Any]) -> float | None:
    """Grams of CO₂ of the energy that was measured; None if that, or what electricity emits, is not known."""
    joules, rate = summary.get("energy_j"), recipe.tracking.co2_g_per_kwh
    return None if joules is None or rate is None else joules / _JOULES_PER_KWH * rate


def _machine(recipe: Recipe, summary: Mapping[str, Any], environment: Mapping[str, Any]) -> Iterator[Row]:
    gpus = environment.get("gpus") or []
    names = {gpu["name"]: sum(other["name"] == gpu["name"] for other in gpus) for gpu in gpus}
    yield "hardware", " and ".join(f"{number} × {name}" for name, number in names.items()) or "CPU"
    seconds, joules = summary.get("train_time_s"), summary.get("energy_j")
    yield "time", None if seconds is None else f"{seconds / 60:,.1f} minutes"
    yield "energy of the GPUs", None if joules is None else f"{joules / _JOULES_PER_KWH:,.3f} kWh"
    grams, rate = _emissions(recipe, summary), recipe.tracking.co2_g_per_kwh
    yield "CO₂ of that energy", None if grams is None else f"{grams:,.3g} g, at {rate:g} g/kWh"
    packages = environment.get("packages") or {}
    yield "packages", ", ".join(f"{name} {packages[name]}" for name in _PACKAGES if packages.get(name)) or None


def _batch(summary: Mapping[str, Any]) -> str | None:
    size, tokens = summary.get("global_batch_size"), summary.get("global_batch_tokens")
    return f"{size:,} samples" if size else _number(tokens, " tokens")


def _number(value: int | None, unit: str = "") -> str | None:
    return None if value is None else f"{value:,}{unit}"


def _table(rows: Iterable[Row]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows if value is not None]
    return "\n".join(["| | |", "| --- | --- |", *lines])
