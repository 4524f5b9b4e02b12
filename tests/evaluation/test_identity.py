"""What was measured is kept under the content of everything that was loaded: replaced weights are measured anew."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from distft.config.recipe import load_recipe
from distft.distributed.world import World
from distft.evaluation.target import Target, tokenizer_digest
from distft.evaluation.tasks.perplexity import PerplexityTask
from distft.models.digest import contents, digest


def change_some_numbers(file: Path) -> None:
    """Change some numbers of a safetensors file in place, and leave its time stamp as it was."""
    before = file.stat()
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if "embed" in name or "lora_B" in name)
    tensors[name][:90] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def measured(model: Path, adapter: Path | None, out: Path) -> dict[str, float]:
    """Perplexity of each side, with the items kept in `out`."""
    words = [f"model.name={model}", "model.dtype=float32", "quantization=null", "evaluation.max_samples=6"]
    recipe = load_recipe(["recipe=tiny", *words])
    target = Target.load(recipe, adapter, World())
    figure = PerplexityTask().run(target, recipe.evaluation, out)["figures"]["perplexity"]
    return {side: figure[side]["value"] for side in target.sides}


def test_replaced_weights_at_the_same_path_are_measured_anew(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    shutil.copytree(adapter, tmp_path / "adapter")
    places = tmp_path / "model", tmp_path / "adapter"
    first = measured(*places, tmp_path / "out")
    assert measured(*places, tmp_path / "out") == first
    change_some_numbers(tmp_path / "adapter" / "adapter_model.safetensors")
    second = measured(*places, tmp_path / "out")
    assert second["base"] == first["base"] and second["adapter"] != first["adapter"]
    change_some_numbers(tmp_path / "model" / "model.safetensors")
    third = measured(*places, tmp_path / "out")
    assert third["base"] != second["base"] and third["adapter"] != second["adapter"]
    assert measured(*places, tmp_path / "fresh") == third


def test_the_digest_of_contents_covers_what_is_loaded(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    known = {contents(str(folder))}
    for name in ("README.md", "trainer_state.json", "pytorch_model.bin"):
        (folder / name).write_text("not loaded")
    assert {contents(str(folder))} == known
    sampled = digest(str(folder))
    change_some_numbers(folder / "model.safetensors")
    assert digest(str(folder)) == sampled  # the middle rows are the same
    known.add(contents(str(folder)))
    for name in ("tokenizer.json", "config.json", "modeling_own.py", "adapter_model.bin", "chat_template.jinja"):
        with (folder / name).open("a") as file:
            file.write(" ")
        known.add(contents(str(folder)))
    assert len(known) == 7 and None not in known
    assert contents("nobody/has-this-in-a-cache") is None


def test_the_tokenizer_and_how_a_base_is_loaded_are_part_of_the_identity(tiny: Path, tmp_path: Path) -> None:
    def identity(*words: str) -> str:
        recipe = load_recipe(["recipe=tiny", f"model.name={tiny}", "model.dtype=float32", "quantization=null", *words])
        return Target.load(recipe, None, World()).identity["base"]

    shutil.copytree(tiny, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    file = tmp_path / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"] = None
    file.write_text(json.dumps(content))
    plain = identity()
    assert identity() == plain
    assert len({plain, identity("model.dtype=bfloat16"), identity(f"model.tokenizer={tmp_path}/tokenizer")}) == 3


def test_an_adapter_that_peft_reads_from_another_file_is_known_by_its_content(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    tensors: dict[str, Any] = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    found = set()
    for factor in (1.0, 2.0):
        torch.save({key: factor * value for key, value in tensors.items()}, tmp_path / "adapter" / "adapter_model.bin")
        found.add(contents(str(tmp_path / "adapter")))
    assert len(found) == 2


def test_a_tokenizer_without_a_backend_has_a_digest() -> None:
    class Slow:
        eos_token_id, bos_token_id = 1, None

        def __init__(self, vocabulary: dict[str, int]) -> None:
            self.get_vocab = lambda: vocabulary

    assert tokenizer_digest(Slow({"a": 0})) == tokenizer_digest(Slow({"a": 0})) != tokenizer_digest(Slow({"b": 0}))
