"""Questions are put in the template that the evaluated model was trained with, and results say which it was."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distft.config.recipe import Recipe, load_recipe
from distft.errors import ModelError
from distft.evaluation.request import Request
from distft.evaluation.summary import template_line
from distft.evaluation.target import Target, Trained
from distft.evaluation.tasks.alpaca import TASK
from distft.evaluation.template import PromptTemplate, prompt_template
from distft.files import read_lines
from distft.runs.folder import RunFolder
from tests.evaluation.conftest import evaluation

CHATML = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
SET = "as set in evaluation.generation.template"
UNKNOWN = "the template of the training is not known; evaluation.generation.template sets it"


def instruct(target: Target, recipe: Recipe | None) -> Target:
    """`target` as an instruct model: its tokenizer has a chat template."""
    tokenizer = copy.deepcopy(target.tokenizer)
    tokenizer.chat_template = CHATML
    return replace(target, tokenizer=tokenizer, trained=recipe and Trained(recipe))


@pytest.fixture
def prompts(tmp_path: Path) -> Callable[[str], Recipe]:
    """A recipe that trains on prompts and completions, with each prompt made from a pattern."""

    def recipe(pattern: str) -> Recipe:
        rows = [{"q": pattern.format(number), "a": "Yes."} for number in range(20)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_recipe(
            [f"data.name={tmp_path}/rows.jsonl", "data.format.prompt=q", "data.format.completion=a"],
        )

    return recipe


def test_the_template_is_that_of_the_training(target: Target, prompts: Callable[[str], Recipe], tmp_path: Path) -> None:
    def found(target: Target, given: str = "auto") -> PromptTemplate:
        return prompt_template(target, evaluation(generation={"template": given}))

    dolly, whole = load_recipe(["recipe=tiny"]), load_recipe(["recipe=tiny_sentiment"])
    assert found(instruct(target, dolly)) == PromptTemplate("instruction", "as in training")
    assert found(instruct(target, prompts("Question {}?"))) == PromptTemplate("plain", "as in training")
    rendered = "<|system|>Be kind.<|end|><|user|>Question {}?<|end|><|assistant|>"
    assert found(instruct(target, prompts(rendered))) == PromptTemplate("chat", "as in training")
    (tmp_path / "rows.jsonl").unlink()
    gone = load_recipe([f"data.path={tmp_path}/rows.jsonl", "data.format={prompt: q, completion: a}"])
    assert found(instruct(target, gone)) == PromptTemplate("chat", UNKNOWN)
    assert found(instruct(target, whole)) == PromptTemplate("chat", UNKNOWN)
    assert found(instruct(target, None)) == PromptTemplate("chat", UNKNOWN)
    assert found(replace(instruct(target, None), result=None)) == PromptTemplate("chat", "nothing was trained")
    assert found(target) == PromptTemplate("instruction", UNKNOWN)
    for name in ("chat", "instruction", "plain"):
        assert found(instruct(target, dolly), name) == PromptTemplate(name, SET)
    with pytest.raises(ModelError, match="the tokenizer has no chat template"):
        found(target, "chat")


def test_the_template_decides_the_prompts_and_is_recorded(target: Target, tmp_path: Path, replay: Any) -> None:
    (tmp_path / "pairs.json").write_text('[{"instruction": "Name a fruit.", "output": "A pear."}]')
    server = replay(lambda body, number: (200, "[RESULT] 3"))
    settings = evaluation(
        alpaca={"path": str(tmp_path / "pairs.json")},
        generation={"max_new_tokens": 4},
        judge={"endpoint": server.address, "retries": 0, "attempts": 1},
    )
    dolly = "### Instruction:\nName a fruit.\n\n### Response:\n"
    chat = "<|user|>Name a fruit.<|end|><|assistant|>"
    for trained, prompt, said in (
        (load_recipe(["recipe=tiny"]), dolly, "prompts in Dolly's instruction template (as in training)"),
        (None, chat, f"prompts in the tokenizer's chat template ({UNKNOWN})"),
    ):
        folder = tmp_path / prompt[:5].strip("<|# ")
        found = TASK.run(instruct(target, trained), settings, folder)
        assert {record["prompt"] for record in read_lines(folder / "answers.jsonl")} == {prompt}
        assert template_line("alpaca", found) == f"alpaca: {said}"


def test_the_training_of_an_adapter_is_known_from_its_run(adapter: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunFolder(tmp_path / "runs" / "a")
    for place in (run.adapter, run.checkpoints / "checkpoint-4", tmp_path / "elsewhere"):
        place.mkdir(parents=True)
        (place / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    run.recipe.write_text(load_recipe(["recipe=tiny", "run.name=a"]).to_yaml(), encoding="utf-8")
    other = ["data.name=tiny_sentiment", "evaluation.max_samples=4"]
    for words, trained, folder in (
        (["runs/a"], "tiny", "runs/a"),
        (["model=tiny", "adapter=runs/a/adapter"], "tiny", "runs/a"),
        (["model=tiny", "adapter=runs/a/checkpoints/checkpoint-4"], "tiny", "runs/evaluate-a-checkpoint-4"),
        (["model=tiny", "adapter=elsewhere"], None, "runs/evaluate-tiny-elsewhere"),
        (["model=tiny"], None, "runs/evaluate-tiny"),
    ):
        request = Request.of([*words, *other], preflight_checks=False)
        known = Trained.by(request.run)
        assert (known and known.recipe.data.name) == trained
        assert request.recipe.data.name == "tiny_sentiment"
        assert request.folder.path.resolve() == tmp_path / folder
