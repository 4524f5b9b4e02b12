"""The proof of merged weights passes where nothing is wrong, and names the stage of every planted break."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distft.config.recipe import Recipe
from distft.export.proof import Proof
from distft.export.run import Trained, prove_merged, write_merged
from distft.runs.folder import RunFolder

from .conftest import TEMPLATE


def test_a_merge_without_a_break_is_equal_in_every_stage(trained: Trained, recipe: Recipe, merged: Path) -> None:
    proof = prove_merged(trained, recipe, merged)
    assert {stage.name: stage.passed for stage in proof.stages} == {"template": True, "tokenizer": True, "merge": True}
    assert proof.broken is None and proof.whole is not None and proof.whole.equal
    assert proof.continuations is not None and proof.continuations["same"] == 1
    assert (proof.rows, proof.split) == (6, "test")
    assert all("equal" in stage.found for stage in proof.stages)
    items = trained.replays.items
    assert all(item.prompt and item.prompt.startswith("<s>Be kind.\n### user:\n") for item in items)
    assert all(item.prompt and item.prompt.endswith("</s>\n### assistant:\n") for item in items)
    assert trained.replays.ends == {2}, "</s>"


def edit(file: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        settings = json.loads((folder / file).read_text(encoding="utf-8"))
        change(settings)
        (folder / file).write_text(json.dumps(settings), encoding="utf-8")

    return broken


def template(text: str) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")

    return broken


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", {"format": "pt"})

    return broken


def head_is_embedding(found: dict[str, torch.Tensor]) -> None:
    found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()


def overflows(found: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    found[name] = (found[name] * 1e6).half().float()


BREAKS = {
    "a doubled BOS in the template": (template("{{ bos_token }}" + TEMPLATE), "template", "'<s><s>Be kind"),
    "another system line": (template(TEMPLATE.replace("kind", "brief")), "template", "is '<s>Be brief"),
    "no end of turn": (
        template(TEMPLATE.replace("{{ eos_token }}", "")),
        "template",
        r"is '.*\\?\\n### assistant.*in training '.*\\?</s>",
    ),
    "an end of sequence that stops nothing": (
        edit("tokenizer_config.json", lambda it: it.update(eos_token="<pad>")),
        "template",
        "<pad>",
    ),
    "tied embeddings": (tensors(head_is_embedding), "merge", "the output head computes something else"),
    "an overflow in fp16": (tensors(overflows), "merge", r"down_proj\.weight has infinite values"),
    "a swapped rope_theta": (
        edit("config.json", lambda it: it["rope_parameters"].update(rope_theta=500.0)),
        "merge",
        r"config\.json: rope_parameters is .*500",
    ),
}


def tampered(merged: Path, folder: Path, broken: Callable[[Path], None]) -> Path:
    shutil.copytree(merged, folder)
    broken(folder)
    return folder


@pytest.mark.parametrize("name", BREAKS)
def test_planted_breaks_are_named_at_their_stage(
    name: str, trained: Trained, recipe: Recipe, merged: Path, tmp_path: Path
) -> None:
    broken, stage, found = BREAKS[name]
    proof = prove_merged(trained, recipe, tampered(merged, tmp_path / "merged", broken))
    assert proof.broken is not None and proof.broken.name == stage, proof.lines()
    assert re.search(found, proof.broken.found), proof.broken.found


def test_answers_that_do_not_end_are_found(trained: Trained, recipe: Recipe, merged: Path, tmp_path: Path) -> None:
    """The template spells the end out; the tokens that stop a model are elsewhere."""

    def broken(folder: Path) -> None:
        template(TEMPLATE.replace("{{ eos_token }}", "</s>"))(folder)
        edit("tokenizer_config.json", lambda it: it.update(eos_token="<pad>"))(folder)
        edit("generation_config.json", lambda it: it.update(eos_token_id=0))(folder)

    proof = prove_merged(trained, recipe, tampered(merged, tmp_path / "merged", broken))
    assert proof.broken is not None and proof.broken.name == "tokenizer"
    assert proof.broken.found == "answers ended with token 2 in training, and do not end there any more"


def test_a_wrong_lora_scaling_names_a_module(
    handed: RunFolder, trained: Trained, recipe: Recipe, tmp_path: Path
) -> None:
    shutil.copytree(handed.adapter, tmp_path / "adapter")
    edit("adapter_config.json", lambda it: it.update(lora_alpha=9))(tmp_path / "adapter")  # it was 8
    (tmp_path / "merged").mkdir()
    write_merged(recipe, tmp_path / "adapter", tmp_path / "merged")
    proof: Proof = prove_merged(trained, recipe, tmp_path / "merged")
    assert proof.broken is not None and proof.broken.name == "merge"
    assert "_proj computes something else: outputs differ by" in proof.broken.found
