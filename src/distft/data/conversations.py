"""From a row to a conversation: messages in one form, whichever of the public formats they were written in.

OpenAI's and the hub's `role`/`content` and ShareGPT's `from`/`value`, content as text or as parts, calls of tools and
reasoning in their own fields or among the parts, all become what chat templates read.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distft.errors import DataError

Message = dict[str, Any]
"""`role` and `content`, both text, and where they apply `tool_calls`, `reasoning_content`, `name`, `tool_call_id`."""

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function": "tool",
}
"""The roles of ShareGPT's `from`."""
_CALLS = ("function_call", "tool_call")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_MEDIA = ("image", "audio", "video", "file")
_WEIGHTS = ("weight", "loss_weight")


@dataclass(frozen=True)
class Conversation:
    """The turns of a row. `trained` says of each whether it is, where the row does: None leaves it to its role."""

    messages: list[Message]
    trained: tuple[bool | None, ...]
    tools: list[Any] | None = None

    def __add__(self, other: Conversation) -> Conversation:
        return Conversation(self.messages + other.messages, self.trained + other.trained, self.tools or other.tools)


def has_messages(value: Any) -> bool:
    """Whether `value` is a list of messages of a known form, or its JSON text."""
    value = _from_json(value)
    if not isinstance(value, list) or not value or not isinstance(value[0], Mapping):
        return False
    return {"role", "content"} <= value[0].keys() or {"from", "value"} <= value[0].keys()


def conversation(value: Any, column: str, tools: Any = None, system: str = "") -> Conversation:
    """The conversation in `value`, the content of `column`.

    Raises:
        DataError: it is not one, or has content other than text.
    """
    messages = _from_json(value)
    if isinstance(messages, Mapping):
        messages = [messages]
    if not isinstance(messages, list):
        raise DataError(
            f"column {column!r} contains {type(value).__name__} values; expected a list of messages\n"
            f"  found {reprlib.repr(value)}; a message is an object with role and content, or with from and value"
        )
    found: list[tuple[Message, bool | None]] = []
    for number, message in enumerate(messages, 1):
        try:
            one = _message(message)
            flag = _flag(message)
        except DataError as error:
            raise DataError(f"message {number} in column {column!r} {error}") from None
        if found and one.pop("_call", False) and found[-1][0].get("_merge") and found[-1][1] == flag:
            found[-1][0]["tool_calls"].extend(one["tool_calls"])  # several calls at once
            continue
        found.append((one, flag))
    for one, _ in found:
        one.pop("_merge", None)
        one.pop("_call", None)
    if system.strip() and not (found and found[0][0]["role"] == "system"):
        found.insert(0, ({"role": "system", "content": system}, None))
    return Conversation([one for one, _ in found], tuple(flag for _, flag in found), tools_of(tools))


def from_texts(instruction: str, context: str, response: str, system: str = "") -> Conversation:
    """A question, with its context below it, and the answer."""
    question = f"{instruction}\n\n{context}" if context.strip() else instruction
    turns = [("system", system)] if system.strip() else []
    turns += [("user", question), ("assistant", response)]
    return Conversation([{"role": role, "content": text} for role, text in turns], (None,) * len(turns))


def tools_of(value: Any) -> list[Any] | None:
    """The JSON schemas of tools, each in the form that templates expect; None if there are none.

    Raises:
        DataError: they are not a list of objects.
    """
    tools = _from_json(value)
    if tools is None or tools == "" or tools == []:
        return None
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"the tools are not a list of JSON schemas: {reprlib.repr(value)}")
    return [_plain(tool) if "function" in tool else {"type": "function", "function": _plain(tool)} for tool in tools]


def _message(message: Any) -> Message:
    """A message in the form of chat templates. `_call` and `_merge` mark a call that is a turn of its own."""
    if not isinstance(message, Mapping):
        raise DataError(f"is {reprlib.repr(message)}; expected an object with role and content, or with from and value")
    if message.get("role") is None and message.get("from") is not None:
        speaker = str(message["from"]).strip().lower()
        if speaker in _CALLS:
            calls = _calls(message.get("value"))
            if calls is None:  # not JSON: what the assistant said
                return _spoken("assistant", message.get("value"))
            return {"role": "assistant", "content": "", "tool_calls": calls, "_call": True, "_merge": True}
        if speaker not in _SPEAKERS:
            raise DataError(f"is from {message['from']!r}; expected one of {', '.join([*_SPEAKERS, *_CALLS])}")
        return _spoken(_SPEAKERS[speaker], message.get("value"))
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise DataError(f"has no role; it has {', '.join(map(str, message)) or 'nothing'}")
    found = _spoken(message["role"], message.get("content"))
    reasoning = next((message[key] for key in _REASONING if isinstance(message.get(key), str) and message[key]), None)
    if reasoning is not None:
        found["reasoning_content"] = _checked(reasoning)
    called = message.get("tool_calls") or message.get("function_call")
    if called:
        calls = _calls(called)
        if calls is None:
            raise DataError(f"has calls of tools that are not JSON: {reprlib.repr(called)}")
        found["tool_calls"] = [*found.get("tool_calls", []), *calls]
    for key in ("name", "tool_call_id"):
        if isinstance(message.get(key), str) and message[key]:
            found[key] = message[key]
    if message["role"] == "function":
        found["role"] = "tool"
    return found


def _spoken(role: str, content: Any) -> Message:
    """A message of `role`, from content that is text or a list of parts."""
    if content is None or isinstance(content, str):
        return {"role": role, "content": _checked(content or "")}
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        raise DataError(f"has content of the type {type(content).__name__}: {reprlib.repr(content)}; expected text")
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[Any] = []
    for part in content:
        kind = "text" if isinstance(part, str) else str(part.get("type") or "text") if isinstance(part, Mapping) else ""
        if medium := next((medium for medium in _MEDIA if medium in kind), None):
            raise DataError(f"has {kind!r} content, and distft trains on text alone\n  leave out rows with {medium}s")
        if kind in _CALLS or kind == "tool_calls":
            found = _calls(part.get("value") or part.get(kind) or part.get("tool_call"))
            if found is None:
                raise DataError(f"has a call of a tool that is not JSON: {reprlib.repr(part)}")
            calls += found
            continue
        keys = ("text", "value", "content", kind)
        text = part if isinstance(part, str) else next((part[k] for k in keys if isinstance(part.get(k), str)), None)
        if text is None or kind not in ("text", "input_text", "output_text", *_REASONING):
            raise DataError(f"has a part that is not text: {reprlib.repr(part)}")
        (reasoning if kind in _REASONING else texts).append(_checked(text))
    message: Message = {"role": role, "content": "".join(texts)}
    if reasoning:
        message["reasoning_content"] = "".join(reasoning)
    if calls:
        message["tool_calls"] = calls
    return message


def _calls(value: Any) -> list[Any] | None:
    """Calls of tools, each with its arguments as an object; None if they are not JSON."""
    calls = _from_json(value)
    if isinstance(calls, Mapping):
        calls = [calls]
    if not isinstance(calls, list) or not calls:
        return None
    found = []
    for call in calls:
        inner = call.get("function") if isinstance(call, Mapping) and call.get("function") is not None else call
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            return None
        arguments = _from_json(inner.get("arguments", inner.get("parameters")))
        one = {
            "type": "function",
            "function": {"name": inner["name"], "arguments": {} if arguments is None else arguments},
        }
        if isinstance(call.get("id"), str):
            one["id"] = call["id"]
        found.append(one)
    return found


def _flag(message: Mapping[str, Any]) -> bool | None:
    """What the message says about its training: a weight of 0 excludes it; `train` includes or excludes it."""
    train = message.get("train")
    if isinstance(train, bool):
        return train
    for key in _WEIGHTS:
        weight = message.get(key)
        if weight is None:
            continue
        if weight not in (0, 1):
            raise DataError(f"has {key} {weight!r}; expected 0 or 1")
        return None if weight else False
    return None


def _from_json(value: Any) -> Any:
    """What a JSON text of a list or an object says; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return list(value) if isinstance(value, tuple) else value


def _plain(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool without the keys that Arrow has filled with null."""
    return {
        key: _plain(value) if isinstance(value, Mapping) else value for key, value in tool.items() if value is not None
    }


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError("contains half of a surrogate pair, which is not a character") from None
    return text
