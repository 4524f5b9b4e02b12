"""Every way to initialise an adapter: what is saved computes what was trained, wherever it is put on the same base.

PiSSA and OLoRA take the adapter out of the weights of the base, so that a base that is left as it is would be wrong.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from distft.config.recipe import Recipe, load_recipe
from distft.distributed.strategies.selection import strategy_for
from distft.distributed.world import World
from distft.errors import ModelError
from distft.evaluation.target import Target
from distft.models.export import merge
from distft.models.loading import load_model
from distft.runs.folder import RunFolder
from distft.training.checkpoints import save_result

WAYS = {
    "default": "lora.r=16",
    "gaussian": "lora.init_lora_weights=gaussian",
    "orthogonal": "lora.init_lora_weights=orthogonal",
    "pissa": "lora.init_lora_weights=pissa",
    "olora": "lora.init_lora_weights=olora",
    "rank-stabilised": "lora={r: 8, init_lora_weights: pissa, use_rslora: true, target_modules: all-linear}",
    "dora": "lora={r: 8, init_lora_weights: olora, use_dora: true, target_modules: all-linear}",
}
IDS = torch.arange(3, 60)[None]
PLAIN_PEFT = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, *adapters = sys.argv[1:]
ids, losses = torch.arange(3, 60)[None], []
for adapter in adapters:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    with torch.inference_mode():
        losses.append(model(input_ids=ids, labels=ids).loss.item())
print(json.dumps(losses))
"""


def loss_of(model: Any) -> float:
    with torch.inference_mode():
        return float(model.eval()(input_ids=IDS, labels=IDS).loss)


def recipe_of(tiny: Path, way: str) -> Recipe:
    return load_recipe(["recipe=tiny", "quantization=null", f"model.name={tiny}", WAYS[way]])


def loaded(recipe: Recipe) -> Any:
    return load_model(recipe, strategy_for(recipe, World(), False))


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, float]]:
    """For each of the `WAYS`, the folder of an adapter that has moved away from its beginning, and the loss with it."""
    found = {}
    for way in WAYS:
        recipe = recipe_of(tiny, way)
        model, folder = loaded(recipe), RunFolder(tmp_path_factory.mktemp(way))
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.02
        save_result(model, recipe, strategy_for(recipe, World(), False), folder)
        found[way] = folder.adapter, loss_of(model)
    return found


def test_plain_peft_in_another_process_computes_it_on_the_original_base(
    trained: dict[str, tuple[Path, float]], tiny: Path
) -> None:
    command = [sys.executable, "-c", PLAIN_PEFT, str(tiny), *(str(folder) for folder, _ in trained.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    losses = json.loads(done.stdout.splitlines()[-1])
    assert losses == pytest.approx([loss for _, loss in trained.values()], abs=1e-5)
    base = loss_of(AutoModelForCausalLM.from_pretrained(tiny))
    assert all(abs(loss - base) > 0.02 for loss in losses), "an adapter that is not applied would go unnoticed"


@pytest.mark.parametrize("way", ["orthogonal", "rank-stabilised", "dora"])
def test_merging_evaluating_and_resuming_compute_it(
    way: str, trained: dict[str, tuple[Path, float]], tiny: Path, tmp_path: Path
) -> None:
    (folder, loss), recipe = trained[way], recipe_of(tiny, way)
    merge(recipe, folder, tmp_path / "merged")
    assert loss_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) == pytest.approx(loss, abs=1e-5)
    target = Target.load(recipe, folder, World())
    with target.side("adapter") as model:
        assert loss_of(model) == pytest.approx(loss, abs=1e-5)
    with target.side("base") as model:
        assert loss_of(model) == loss_of(AutoModelForCausalLM.from_pretrained(tiny))
    resumed = loaded(recipe)
    resumed.load_adapter(str(folder), "default", is_trainable=True)  # as the trainer does
    assert loss_of(resumed) == pytest.approx(loss, abs=1e-5)


def test_an_adapter_that_peft_cannot_merge_is_refused(tiny: Path, tmp_path: Path) -> None:
    recipe = load_recipe(["recipe=tiny", "quantization=null", f"model.name={tiny}", "lora.lora_bias=true"])
    folder = RunFolder(tmp_path)
    save_result(loaded(recipe), recipe, strategy_for(recipe, World(), False), folder)
    with pytest.raises(ModelError, match=r"PEFT cannot merge this adapter: .*lora_bias"):
        merge(recipe, folder.adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
