"""Rows of the public formats become messages in one form; what is no conversation of texts is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distft.data.conversations import conversation, has_messages, tools_of
from distft.errors import DataError
from tests.data.rows import read_rows

ADD = '{"name": "add", "arguments": {"a": 1}}'
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def messages(value: Any) -> list[dict[str, Any]]:
    return conversation(value, "messages").messages


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"role": "user", "content": "Hi"}, {"role": "user", "content": "Hi"}),
        ({"from": "human", "value": "Hi"}, {"role": "user", "content": "Hi"}),
        ({"from": "GPT", "value": "Hi"}, {"role": "assistant", "content": "Hi"}),
        ({"from": "observation", "value": "3"}, {"role": "tool", "content": "3"}),
        ({"role": "function", "name": "add", "content": "3"}, {"role": "tool", "name": "add", "content": "3"}),
        ({"role": "assistant", "content": None}, {"role": "assistant", "content": ""}),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}, "c"]},
            {"role": "user", "content": "abc"},
        ),
        (
            {"role": "assistant", "content": "x", "thinking": "y"},
            {"role": "assistant", "content": "x", "reasoning_content": "y"},
        ),
        (
            {"role": "assistant", "content": [{"type": "reasoning", "value": "y"}, {"type": "text", "value": "x"}]},
            {"role": "assistant", "content": "x", "reasoning_content": "y"},
        ),
        (
            {
                "role": "assistant",
                "content": [{"type": "tool_call", "value": ADD}],
            },
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
        ),
        (
            {"from": "function_call", "value": ADD},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
        ),
        ({"from": "function_call", "value": "add 1"}, {"role": "assistant", "content": "add 1"}),
        (
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}],
            },
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
        ),
        (
            {"role": "tool", "tool_call_id": "7", "content": "3", "name": None},
            {"role": "tool", "content": "3", "tool_call_id": "7"},
        ),
    ],
)
def test_a_message_of_any_public_format_becomes_this(written: dict[str, Any], expected: dict[str, Any]) -> None:
    assert messages([written]) == [expected]
    assert messages(json.dumps([written])) == [expected], "a cell of a CSV file"


def test_calls_that_follow_each_other_are_one_turn() -> None:
    call = {"from": "function_call", "value": ADD}
    assert messages([call, call]) == [{"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}]


@pytest.mark.parametrize(
    ("keys", "trained"),
    [
        ({}, None),
        ({"weight": 0}, False),
        ({"weight": 1}, None),
        ({"loss_weight": 0.0}, False),
        ({"loss_weight": 1.0}, None),
        ({"train": True}, True),
        ({"train": False, "weight": 1}, False),
        ({"weight": None}, None),
    ],
)
def test_a_message_may_say_whether_it_is_trained(keys: dict[str, Any], trained: bool | None) -> None:
    assert conversation([{"role": "assistant", "content": "x", **keys}], "messages").trained == (trained,)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("Hi", "contains str values; expected a list of messages"),
        ([{"role": "user", "content": 4}], "message 1 in column 'messages' has content of the type int"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "has 'image_url' content"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "leave out rows with audios"),
        ([{"from": "Bob", "value": "Hi"}], "is from 'Bob'; expected one of human, user"),
        ([{"content": "Hi"}], "has no role; it has content"),
        (["Hi"], "message 1 in column 'messages' is 'Hi'; expected an object"),
        ([{"role": "assistant", "content": "x", "weight": 0.5}], "has weight 0.5; expected 0 or 1"),
        ([{"role": "user", "content": "\ud83d"}], "half of a surrogate pair"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"x": 1}]}], "has calls of tools that are not JSON"),
    ],
)
def test_what_is_no_conversation_of_texts_is_refused(value: Any, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        conversation(value, "messages")
    assert problem in str(caught.value)


def test_tools_are_schemas_in_a_list_or_its_text() -> None:
    schema = {"name": "add", "parameters": {"type": "object", "properties": {}}}
    wrapped = [{"type": "function", "function": schema}]
    for written in ([schema], json.dumps([schema]), wrapped, schema, [{**schema, "description": None}]):
        assert tools_of(written) == wrapped
    for none in (None, "", [], "[]"):
        assert tools_of(none) is None
    with pytest.raises(DataError, match="not a list of JSON schemas"):
        tools_of("add")


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("toolcall_sample", {"user", "assistant", "tool"}),
        ("reasoning_tools_sample", {"system", "user", "assistant", "tool"}),
        ("parts_sample", {"user", "assistant"}),
    ],
)
def test_real_rows_are_read_whole(shared_data: Path, name: str, roles: set[str]) -> None:
    calls, reasoning = 0, 0
    for row in read_rows(shared_data / f"{name}.jsonl"):
        value = row.get("messages") or row["conversations"]
        assert has_messages(value)
        found = conversation(value, "messages", row.get("tools"))
        assert {message["role"] for message in found.messages} <= roles
        assert len(found.messages) == len(value)
        calls += sum(len(message.get("tool_calls", [])) for message in found.messages)
        reasoning += sum("reasoning_content" in message for message in found.messages)
        if name == "parts_sample":
            assert found.trained == (False, None)
    assert (calls, reasoning) == {
        "toolcall_sample": (211, 0),
        "reasoning_tools_sample": (68, 112),
        "parts_sample": (0, 0),
    }[name]
