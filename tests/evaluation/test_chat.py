"""Talking to a model, and answering the prompts in a file."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distft.data.prompts import Message
from distft.errors import DataError, ModelError, RunFolderError
from distft.evaluation.answers import answer_file, prompts_of
from distft.evaluation.chat import Chat, engine_of
from distft.evaluation.generate import Item, Sampling
from distft.evaluation.request import Request
from distft.evaluation.target import Target
from distft.files import read_lines
from tests.evaluation.conftest import CHAT_TEMPLATE, distft, environment


def written_at_once(target: Target, *turns: Message, sampling: Sampling, base: bool = False) -> str:
    with target.side("base" if base else "adapter"):
        ((_, answer),) = engine_of(target, "instruction").write([Item(turns, sampling)])
    return answer.text


def turn(role: Any, content: str) -> Message:
    return {"role": role, "content": content}


@pytest.mark.parametrize("sampling", [Sampling(12), Sampling(12, temperature=1.0, top_p=0.9)], ids=["greedy", "drawn"])
def test_what_is_streamed_is_the_answer_and_the_conversation_goes_on(target: Target, sampling: Sampling) -> None:
    parts: list[str] = []
    talk = Chat(target, "instruction", sampling)
    answer = talk.ask("What do whales eat?", parts.append)
    first = turn("user", "What do whales eat?")
    assert "".join(parts) == answer.text == written_at_once(target, first, sampling=sampling) != ""
    assert len(parts) > 1, "it was written word by word"

    second = talk.ask("Why?", parts.append)
    turns = (first, turn("assistant", answer.text), turn("user", "Why?"))
    assert second.text == written_at_once(target, *turns, sampling=sampling)
    assert second.text != written_at_once(target, turns[-1], sampling=sampling), "earlier turns make a difference"

    talk.reset()
    assert talk.ask("Why?", parts.append).text == written_at_once(target, turns[-1], sampling=sampling)


def test_the_base_answers_the_last_question_and_is_not_remembered(target: Target) -> None:
    talk = Chat(target, "instruction", Sampling(12))
    assert talk.ask_base(lambda text: None) is None
    ours = talk.ask("What do whales eat?", lambda text: None)
    turns = list(talk.turns)
    theirs = talk.ask_base(lambda text: None)
    assert theirs is not None and theirs.text != ours.text
    assert theirs.text == written_at_once(target, turns[0], sampling=Sampling(12), base=True)
    assert talk.turns == turns


def test_a_conversation_that_fills_the_model_gets_no_answer(target: Target) -> None:
    answer = Chat(target, "instruction", Sampling(12)).ask("word " * 5_000, lambda text: None)
    assert (answer.text, answer.tokens, answer.finished) == ("", 0, False)


def test_a_system_prompt_needs_a_template_that_has_one(target: Target) -> None:
    with pytest.raises(ModelError, match="template 'instruction', which has no system prompt"):
        Chat(target, "instruction", Sampling(4), system="Be brief.")
    own = target.tokenizer.chat_template
    try:
        target.tokenizer.chat_template = CHAT_TEMPLATE
        Chat(target, "chat", Sampling(4), system="Be brief.").ask("Why?", lambda text: None)
        target.tokenizer.chat_template = (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        )
        with pytest.raises(ModelError, match="the chat template refuses this conversation: no system turns"):
            Chat(target, "chat", Sampling(4), system="Be brief.").ask("Why?", lambda text: None)
    finally:
        target.tokenizer.chat_template = own


def test_a_run_an_adapter_and_a_model_are_told_apart(adapter: Path, tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    shutil.copytree(adapter, run / "adapter")
    (run / "recipe.yaml").write_text("extends: tiny\nquantization: null\nlora: {r: 4}\n")

    found = Request.to_talk_to(str(run), ["evaluation.generation.template=plain"])
    assert (found.result, found.recipe.model.dtype) == (run / "adapter", "float32")
    assert found.recipe.evaluation.generation.template == "plain"
    inside = Request.to_talk_to(str(run / "adapter"), [])
    assert (inside.result, inside.recipe.model.name, inside.recipe.model.dtype) == (run / "adapter", "tiny", "float32")
    alone = Request.to_talk_to(str(adapter), [])
    assert (alone.result, alone.recipe.model.name) == (adapter, str(tiny))
    for name in (str(tiny), "tiny", "org/model"):
        model = Request.to_talk_to(name, [])
        assert (model.result, model.recipe.model.name, model.recipe.quantization) == (None, name, None)

    (adapter_alone := tmp_path / "no-base").mkdir()
    (adapter_alone / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="does not name its base; use distft evaluate model=BASE"):
        Request.to_talk_to(str(adapter_alone), [])
    with pytest.raises(RunFolderError, match=r"did you mean .*runs/mine"):
        Request.to_talk_to(str(tmp_path / "runs" / "mime"), [])
    with pytest.raises(RunFolderError, match=r"run folder runs/nothing-like-it does not exist"):
        Request.to_talk_to("runs/nothing-like-it", [])
    with pytest.raises(RunFolderError, match=r"neither a run folder .* nor the folder of an adapter or a model"):
        Request.to_talk_to(str(tmp_path), [])


def test_prompts_of_every_form(tmp_path: Path) -> None:
    question, answer = turn("user", "Why?"), turn("assistant", "So.")
    rows = [
        {"prompt": "Why?"},
        {"prompt": [question]},
        {"messages": [turn("system", "Be brief."), question, answer]},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        {"instruction": "Add.", "input": "1 and 1", "output": "2"},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = prompts_of(file)
    assert [prompt.row for prompt in found] == rows
    assert [prompt.messages for prompt in found] == [
        *[(question,)] * 2,
        (turn("system", "Be brief."), question),
        (question,),
        (turn("user", "Add.\n\n1 and 1"),),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"prompt": "Why?"}\n{"question": "Why?"}\n', "row 2: expected messages, .*; found question"),
        ('{"messages": [{"role": "system", "content": "x"}]}\n', "row 1: .* does not end with a question of the user"),
    ],
)
def test_a_row_without_a_prompt_is_named(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=message):
        prompts_of(file)


def test_answers_are_written_next_to_their_rows(adapter: Path, target: Target, tmp_path: Path) -> None:
    file, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    file.write_text('{"id": 1, "prompt": "Why?"}\n{"id": 2, "prompt": "What do whales eat?"}\n')
    request = Request.to_talk_to(str(adapter), ["model.dtype=float32"])
    counted = answer_file(request, prompts_of(file), Sampling(5), output, base=False, name="mine")
    found = read_lines(output)
    assert [(row["id"], row["prompt"]) for row in found] == [(1, "Why?"), (2, "What do whales eat?")]
    assert counted == (2, sum(not row["finished"] for row in found))
    sampling = Sampling(5)
    assert found[1]["answer"] == written_at_once(target, turn("user", "What do whales eat?"), sampling=sampling)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "prompts.jsonl"]


def test_a_conversation_in_a_terminal(adapter: Path, tmp_path: Path) -> None:
    """A real terminal, in which lines are typed once the program asks for them."""
    here, there = pty.openpty()
    command = [sys.executable, "-m", "distft.cli", "chat", str(adapter), "--max-new-tokens", "6"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment() | {"TERM": "dumb"}, stdin=there, stdout=there, stderr=there
    )
    os.close(there)
    shown = ""

    def read_until(end: str, times: int) -> str:
        nonlocal shown
        last = time.monotonic() + 240
        while shown.count(end) < times:
            assert time.monotonic() < last, shown
            if select.select([here], [], [], 1)[0]:
                shown += os.read(here, 10_000).decode()
        return shown

    try:
        read_until("> ", 1)
        for asked, line in enumerate(["What do whales eat?", "/base", "/reset", "/base", "/help", "/exit"], 2):
            os.write(here, f"{line}\n".encode())
            if line != "/exit":
                read_until("> ", asked)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(here)
    assert shown.count("the answer was cut off after 6 tokens") == 2
    assert "nothing was asked yet" in shown and "forget the conversation" in shown


def test_one_question_and_mistakes(adapter: Path, tmp_path: Path) -> None:
    once = distft(tmp_path, "chat", str(adapter), "--once", "What do whales eat?", "--max-new-tokens", "4")
    assert once.stdout.strip() and once.stdout.count("\n") == 1
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n')
    mistakes = [
        (["chat", str(adapter), "--once", " "], "nothing was asked"),
        (["chat", "runs/none", "--once", "Why?"], "runs/none does not exist"),
        (["generate", str(adapter), "--input", "none.jsonl", "--output", "a.jsonl"], "there is no file none.jsonl"),
        (["generate", str(adapter), "--input", "prompts.jsonl", "--output", "prompts.jsonl"], "already exists"),
    ]
    for words, message in mistakes:
        ended = distft(tmp_path, *words, code=2)
        assert message in ended.stderr and "Traceback" not in ended.stderr, words
