"""The format is told from the columns where one fits, and asked for where none or several do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from distft.data.inference import format_of_rows, with_format
from distft.data.named_templates import CHATML
from distft.errors import DataError, RecipeError
from tests.data.rows import ALL, Prepare, read_rows, recipe_of, whole, write_rows

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHARE = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


@pytest.mark.parametrize(
    ("row", "columns", "said"),
    [
        ({"messages": TURNS}, {"messages": "messages"}, "conversations in messages; "),
        ({"conversations": SHARE, "id": 1}, {"messages": "conversations"}, "conversations (not read: id)"),
        ({"chat": TURNS, "tools": "[]"}, {"messages": "chat", "tools": "tools"}, "conversations in chat;"),
        (
            {"prompt": "Hi", "prompt_id": "7", "messages": TURNS},
            {"messages": "messages"},
            "not read: prompt, p",
        ),
        ({"prompt": "Hi", "completion": "Hello"}, {"prompt": "prompt", "completion": "completion"}, "prompts and"),
        (
            {"prompt": TURNS[:1], "completion": TURNS[1:]},
            {"prompt": "prompt", "completion": "completion"},
            "that are messages",
        ),
        (
            {"instruction": "Hi", "input": "", "output": "Hello", "text": "Hi\nHello"},
            {"instruction": "instruction", "context": "input", "response": "output"},
            "instructions in instruction, input, output (not read: text)",
        ),
        (
            {"instruction": "Hi", "context": "", "response": "Hello", "category": "qa"},
            {"instruction": "instruction", "context": "context", "response": "response"},
            "not read: category",
        ),
        ({"text": "Hi", "meta": {}}, {"text": "text"}, "whole texts in text (not read: meta)"),
        (
            {"prompt": "Hi", "chosen": "Hello", "rejected": "No", "score": 1},
            {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
            "pairs of preferences, chosen and rejected, with their prompt in prompt (not read: score)",
        ),
        (
            {"conversations": SHARE[:1], "chosen": SHARE[1], "rejected": SHARE[1]},
            {"prompt": "conversations", "chosen": "chosen", "rejected": "rejected"},
            "with their prompt in conversations",
        ),
        (
            {"chosen": TURNS, "rejected": TURNS, "tools": "[]"},
            {"chosen": "chosen", "rejected": "rejected", "tools": "tools"},
            "without a column of prompts: what both begin with",
        ),
        (
            {"system": "Be kind", "question": "Hi", "chosen": "a", "rejected": "b"},
            {"prompt": "question", "chosen": "chosen", "rejected": "rejected", "system": "system"},
            "with their prompt in question",
        ),
    ],
)
def test_columns_tell_the_format(row: dict[str, Any], columns: dict[str, str], said: str) -> None:
    form, what = format_of_rows([dict.fromkeys(row), row])
    assert form.model_dump(exclude_none=True, exclude={"label_words"}) == columns
    assert said in what and what.endswith("; data.format overrides this")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"question": "Hi", "answer": "Hello"}, "no columns that say what to train on; they have question, answer"),
        ({"text": "Hi", "label": 1}, "whole texts in text; or texts with a class number in label. The columns are"),
        ({"messages": TURNS, "instruction": "Hi", "output": "Hello"}, "conversations in messages; or instructions in"),
        (
            {"instruction": "Hi", "output": "a", "response": "b"},
            "output; or instructions in instruction, r",
        ),
        ({"a": TURNS, "b": TURNS}, "conversations in a; or conversations in b"),
        (
            {"prompt": "Hi", "chosen": ["a"], "rejected": ["b"]},
            "chosen and rejected, which hold neither texts nor messages",
        ),
        (
            {"instruction": "Hi", "input": "x", "chosen": "a", "rejected": "b"},
            "in two columns, instruction and its context",
        ),
        ({"messages": TURNS, "label": True}, "mark answers as good or bad in the column label"),
    ],
)
def test_columns_that_do_not_tell_it_are_listed_with_what_to_set(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError) as caught:
        format_of_rows([row])
    assert problem in str(caught.value)
    assert ("data.format.messages=COLUMN" in str(caught.value)) == ("chosen" not in row)


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("alpaca_sample", {"instruction": "instruction", "context": "input", "response": "output"}),
        ("dolly_sample", {"instruction": "instruction", "context": "context", "response": "response"}),
        ("toolcall_sample", {"messages": "conversations", "tools": "tools"}),
        ("reasoning_tools_sample", {"messages": "messages", "tools": "tools"}),
        ("parts_sample", {"messages": "messages"}),
    ],
)
def test_the_format_of_real_data_is_told(shared_data: Path, name: str, columns: dict[str, str]) -> None:
    recipe, _ = with_format(recipe_of(f"data.name={shared_data / name}.jsonl"))
    assert recipe.data.format is not None
    assert recipe.data.format.model_dump(exclude_none=True, exclude={"label_words"}) == columns


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("dpo_sample", r"pairs of preferences, chosen and rejected, and objective=sft.*\n  set objective=dpo"),
        ("kto_sample", r"\n  to train on the labels, set objective=dpo preference.loss_type=kto"),
    ],
)
def test_sft_refuses_real_preferences_and_says_what_to_set(shared_data: Path, name: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        with_format(recipe_of(f"data.name={shared_data / name}.jsonl"))


def test_dpo_refuses_single_answers(shared_data: Path) -> None:
    with pytest.raises(DataError, match=r"objective=dpo needs pairs of answers, and the data are instructions in"):
        with_format(recipe_of("recipe=dpo", f"data.name={shared_data / 'alpaca_sample'}.jsonl"))
    with pytest.raises(RecipeError, match="names single answers, and objective=dpo"):
        recipe_of("recipe=dpo", "data.name=dolly")
    with pytest.raises(RecipeError, match="names pairs of answers, chosen and rejected, and objective=sft"):
        recipe_of("data.name=tiny_preferences")


def test_instructions_become_conversations_where_the_tokenizer_has_a_template(
    tokenizer: Any, prepare: Prepare, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"instruction": "Add.", "input": "1 and 1", "output": "2"}])
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = CHATML
    recipe, what = with_format(recipe_of(f"data.name={file}"), chatting)
    assert recipe.data.chat_template == "tokenizer" and what is not None
    assert "as conversations through the tokenizer's chat template" in what
    assert with_format(recipe, chatting) == (recipe, None), "what was inferred is in the recipe"
    splits = prepare(f"data.name={file}", *ALL)
    assert any("through Dolly's template" in line for line in splits.report.lines())
    (row,) = splits.train
    assert whole(row, tokenizer) == "### Instruction:\nAdd.\n\n### Context:\n1 and 1\n\n### Response:\n2</s>"


def test_a_wrong_guess_costs_one_override(prepare: Prepare, tmp_path: Path, tokenizer: Any) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "Wrong", "body": "Right"}])
    (row,) = prepare(f"data.name={file}", "data.format.text=body", *ALL).train
    assert whole(row, tokenizer) == "Right</s>"


def test_no_format_and_no_rows(tmp_path: Path) -> None:
    read_rows(write_rows(tmp_path / "rows.jsonl", []))
    with pytest.raises(DataError, match="is empty"):
        with_format(recipe_of(f"data.name={tmp_path / 'rows.jsonl'}"))
