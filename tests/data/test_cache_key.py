"""Prepared data are found again only by a recipe that gives the same samples."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from distft.config.schema import Data
from distft.data.formats import formatter
from distft.data.named_templates import CHATML, use_template
from distft.data.prepare import prepare_data
from tests.data.rows import ALL, recipe_of, write_rows

ROWS, OTHER, JINJA = "rows.jsonl", "other.jsonl", "own.jinja"
MIXED = ("data.name=null", f"data.sources=[{{name: {ROWS}, weight: 3}}, {{name: {OTHER}, weight: 1}}]")
STEPS = "training.max_steps=9"
CHANGES = {
    "name": [f"data.name={OTHER}"],
    "path": [f"data.path={OTHER}"],
    "files": ["data.name=null", f"data.files=[{OTHER}]"],
    "test_path": [f"data.test_path={OTHER}"],
    "validation_fraction": ["data.validation_fraction=0.5"],
    "test_fraction": ["data.test_fraction=0.5"],
    "max_samples": ["data.max_samples=5"],
    "format": ["data.format.messages=others"],
    "deduplicate": ["data.deduplicate=true"],
    "chat_template": [f"data.chat_template={JINJA}"],
    "train_on": ["data.train_on=all"],
    "train_on_end_of_turn": ["data.train_on_end_of_turn=false"],
    "truncation": ["data.truncation=beginning"],
    "sources": ["data.name=null", f"data.sources=[{{name: {ROWS}, samples: 4}}]"],
    "streaming": ["data.streaming=true", "data.window=4", STEPS],
    "window": ["data.streaming=true", "data.window=8", STEPS],
    "stopping_strategy": ["data.stopping_strategy=all_exhausted"],
}
"""What changes the samples, for each key of the data section. What those of the hub read are other rows."""
OF_THE_HUB = {"config", "train_split", "test_split"}
OF_THE_ORDER = {"order", "stages"}
"""These do not change the samples: test_curriculum.py."""
OTHERS = {"training.max_length": ["training.max_length=null"], "run.seed": ["run.seed=2"]}


def talk(number: int) -> list[dict[str, str]]:
    turns = [("user", f"{number}?"), ("assistant", f"{number}."), ("user", "More?"), ("assistant", "No more.")]
    return [{"role": role, "content": text} for role, text in turns]


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare: Any) -> None:
    """The files, in the working folder; the cache is empty."""
    monkeypatch.chdir(tmp_path)
    write_rows(Path(ROWS), [{"messages": talk(number % 6), "others": talk(number)[:2]} for number in range(8)])
    write_rows(Path(OTHER), [{"messages": talk(7 + number), "others": []} for number in range(3)])
    Path(JINJA).write_text(CHATML.replace("<|im_start|>' +", "<|im_start|> ' +"), encoding="utf-8")


def samples(words: list[str], tokenizer: Any) -> dict[str, Any]:
    """All splits that a recipe gives, in order."""
    recipe, chatting = recipe_of(*words), copy.deepcopy(tokenizer)
    use_template(chatting, str(recipe.data.chat_template))
    splits = prepare_data(recipe, chatting)
    return {name: list(rows) for name in ("train", "validation", "test") if (rows := getattr(splits, name)) is not None}


def test_a_change_is_known_for_every_key_of_the_section() -> None:
    assert set(Data.model_fields) == set(CHANGES) | OF_THE_HUB | OF_THE_ORDER


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("key", [*CHANGES, *OTHERS])
def test_beside_the_data_of_another_recipe_a_recipe_finds_its_own(
    key: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = [f"data.name={ROWS}", "data.chat_template=chatml", *ALL[:3], "training.max_length=24"]
    base += MIXED if key == "stopping_strategy" else []
    base += ["data.streaming=true", "data.window=4", STEPS] if key == "window" else []
    base += ["batching.global_batch_size=4", "batching.micro_batch=1"] if key in ("window", "streaming") else []
    changed = [*base, *(CHANGES | OTHERS)[key]]
    before, after = samples(base, tokenizer), samples(changed, tokenizer)
    assert before != after
    assert samples(base, tokenizer) == before
    monkeypatch.setenv("DISTFT_CACHE", "empty")
    assert samples(changed, tokenizer) == after


@pytest.mark.usefixtures("rows")
def test_a_template_that_changes_under_its_name_finds_no_older_data(tokenizer: Any) -> None:
    words = [f"data.name={ROWS}", f"data.chat_template={JINJA}", *ALL]
    before = samples(words, tokenizer)
    Path(JINJA).write_text(CHATML, encoding="utf-8")
    assert samples(words, tokenizer) != before
    assert samples(words, tokenizer) == samples([*words, "data.chat_template=chatml"], tokenizer)


@pytest.mark.usefixtures("rows")
def test_what_formats_rows_can_be_sent_to_other_processes(tokenizer: Any) -> None:
    chatting = copy.deepcopy(tokenizer)
    use_template(chatting, "chatml")
    made = formatter(recipe_of(f"data.name={ROWS}", "data.format.messages=messages", *ALL), chatting)
    again = pickle.loads(pickle.dumps(made))
    row = {"messages": talk(1)}
    assert again(row) == made(row)
    assert json.dumps(again.key(), sort_keys=True) == json.dumps(made.key(), sort_keys=True)
