"""A run of the tiny model on conversations, made without training: its adapter has random factors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from distft.config.recipe import Recipe, load_recipe
from distft.data.named_templates import words_of_run
from distft.export.run import Trained, write_merged
from distft.models.loading import load_tokenizer, model_path
from distft.runs.folder import RunFolder

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if loop.first and m.role != 'system' %}Be kind.\n{% endif %}"
    "### {{ m.role }}:\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
RECIPE = """
extends: tiny
quantization: null
model: {dtype: float32}
lora: {r: 8, target_modules: [q_proj, v_proj, down_proj]}
data: {name: null, path: CHATS, format: {messages: messages}, chat_template: TEMPLATE}
"""


def made_run(folder: Path, words: str = "", **lora: object) -> RunFolder:
    """A run folder as after training, in `folder`."""
    run = RunFolder(folder)
    folder.mkdir(parents=True)
    said = [("What is %d and %d?", "It is %d."), ("Is %d more than %d?", "No, both are %d.")]
    rows = [
        {"messages": [{"role": "user", "content": ask % (n, n)}, {"role": "assistant", "content": answer % (2 * n)}]}
        for n in range(40)
        for ask, answer in said
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "own.jinja").write_text(TEMPLATE, encoding="utf-8")
    text = RECIPE.replace("CHATS", str(folder / "chats.jsonl")).replace("TEMPLATE", str(folder / "own.jinja"))
    run.recipe.write_text(text + words, encoding="utf-8")
    run.summary.write_text(json.dumps({"strategy": "single", "world_size": 1}), encoding="utf-8")
    recipe = load_recipe([f"recipe={run.recipe}"])
    settings = {"r": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]} | lora
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_path(recipe)), LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.05
    model.save_pretrained(run.adapter)
    load_tokenizer(recipe).save_pretrained(run.adapter)
    return run


@pytest.fixture(scope="session")
def handed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run. Tests do not write into it."""
    return made_run(tmp_path_factory.mktemp("handed") / "chat")


@pytest.fixture(scope="session")
def recipe(handed: RunFolder) -> Recipe:
    return load_recipe(words_of_run(handed.recipe, handed.adapter))


@pytest.fixture(scope="session")
def trained(handed: RunFolder, recipe: Recipe) -> Trained:
    """What the trained model says about 6 held-out rows."""
    return Trained.of(recipe, handed.adapter, 6)


@pytest.fixture(scope="session")
def merged(handed: RunFolder, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the merged model. Tests change copies of it."""
    folder = tmp_path_factory.mktemp("merged")
    assert write_merged(recipe, handed.adapter, folder) == "tensor by tensor"
    return folder
