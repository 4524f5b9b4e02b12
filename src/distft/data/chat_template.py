"""From a conversation to the text that the model sees, with its trained parts known to the character.

The text is what `apply_chat_template` gives for the whole conversation, and is tokenized without adding anything. Which
part of it the assistant generates comes from the template's own generation markers, from TRL's training template for
it, or from rendering the conversation up to each turn and checking that the whole begins with it. Where none of these
tells, the conversation is not used.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from distft import upstream_api
from distft.config.recipe import Recipe
from distft.data.conversations import Conversation, Message
from distft.data.named_templates import ANSWER, OWN, QUESTION, end_of_turn, special_tokens, tried
from distft.data.templates import SYSTEM, Dropped, Example, Turn
from distft.errors import DataError
from distft.text import first_line

_INEXACT = "turns that the chat template renders differently once others follow"
_LOST_CALLS = "calls of tools that the chat template leaves out (data.chat_template=qwen2_5 renders them)"
_DATE = datetime.datetime(2024, 7, 26)
Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class ChatTemplate:
    """A template and what to train in its texts. It can be sent to other processes."""

    text: str
    variables: dict[str, str]
    """The special tokens that the template may write, by name: `bos_token`, …"""
    marked: bool
    """Whether the template marks what the assistant generates."""
    end: str
    """What ends a turn of the assistant: a special token, or some text."""
    train_on: str | tuple[str, ...]
    train_end: bool
    cut: Literal["end", "beginning"]
    room: int | None
    """The most tokens of a sample."""
    arguments_as_text: bool
    """Whether the template takes the arguments of a call as JSON text."""
    source: str
    """Where the template and its masks come from, for the report."""

    def example(self, said: Conversation) -> Example | Dropped:
        """The conversation as text with its trained parts, or why it cannot be trained on."""
        messages = [self._message(message) for message in said.messages]
        try:
            text, marks = self._rendered(messages, said.tools)
            trained = self._trained(messages, said, text, marks)
            if trained is None:
                return Dropped(_INEXACT)
            if not trained:
                return Dropped("no turn to train on")
            return self._with_turns(messages, said, text, trained)
        except Exception as error:  # a template is a program, and may raise anything
            if isinstance(error, MemoryError):
                raise
            return Dropped(f"a conversation that the chat template refuses ({first_line(error)})")

    def _message(self, message: Message) -> Message:
        if not self.arguments_as_text or "tool_calls" not in message:
            return message
        calls = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
        return {**message, "tool_calls": calls}

    def _rendered(self, messages: list[Message], tools: list[Any] | None) -> tuple[str, Spans]:
        texts, marks = upstream_api.render_chats(self.text, [messages], tools, self.variables, spans=self.marked)
        return texts[0], [(int(start), int(end)) for start, end in marks[0]] if self.marked else []

    # -- what is trained -------------------------------------------------------------------------------------------

    def _trained(self, messages: list[Message], said: Conversation, text: str, marks: Spans) -> Spans | None:
        """The trained parts, in order; None if they cannot be told."""
        wanted = self._wanted(messages, said)
        if self.train_on == "all" and all(wanted):
            return [(0, len(text))]
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        spans: Spans = []
        bounds: list[int | None] | None = None
        if len(marks) > len(answers):
            marks = _joined(marks)
        if self.marked and not _matches([messages[number] for number in answers], text, marks):
            simple = wanted == [message["role"] == "assistant" for message in messages] and self.train_end
            marked = "".join(text[start:end] for start, end in marks)
            said_all = all(_answer(messages[number]) in marked for number in answers)
            return marks if simple and marks and said_all else None
        for number, message in enumerate(messages):
            if not wanted[number]:
                continue
            if message["role"] == "assistant":
                span = (
                    self._to_end(text, marks[answers.index(number)])
                    if self.marked
                    else self._generated(messages[: number + 1], said.tools, text)
                )
                if span is None:
                    return None
                spans.append(span if self.train_end else self._without_end(text, span))
                continue
            bounds = bounds or self._bounds(messages, said.tools, text)
            start, end = bounds[number], bounds[number + 1]
            if start is None or end is None:
                return None
            spans.append((start, end))
        return [(start, end) for start, end in spans if start < end]

    def _wanted(self, messages: list[Message], said: Conversation) -> list[bool]:
        """Whether each message is trained. An answer that says nothing is not, unless everything is."""
        last = max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=None)
        found = []
        for number, (message, flag) in enumerate(zip(messages, said.trained, strict=True)):
            role = message["role"]
            if self.train_on == "last_assistant":
                chosen = number == last
            elif self.train_on in ("all", "assistant"):
                chosen = self.train_on == "all" or role == "assistant"
            else:
                chosen = role in self.train_on
            if flag is not None:
                chosen = flag
            if role == "assistant" and self.train_on != "all" and _says_nothing(message):
                chosen = False
            found.append(chosen)
        return found

    def _generated(self, messages: list[Message], tools: list[Any] | None, text: str) -> tuple[int, int] | None:
        """The characters of the last of `messages` that the assistant generates, if the whole `text` begins so."""
        before = upstream_api.render_chats(self.text, [messages[:-1]], tools, self.variables, answer_next=True)[0][0]
        up_to = upstream_api.render_chats(self.text, [messages], tools, self.variables)[0][0]
        if up_to.startswith(before) and text.startswith(up_to):
            return len(before), len(up_to)
        return None

    def _to_end(self, text: str, span: tuple[int, int]) -> tuple[int, int]:
        """A marked part, up to the end of its turn if the template leaves that out."""
        start, end = span
        if self.end and text.startswith(self.end, end) and self.end not in text[start:end]:
            return start, end + len(self.end)
        return span

    def _without_end(self, text: str, span: tuple[int, int]) -> tuple[int, int]:
        start, end = span
        place = text.rfind(self.end, start, end) if self.end else -1
        return (start, place) if place >= 0 else span

    # -- turns -----------------------------------------------------------------------------------------------------

    def _bounds(self, messages: list[Message], tools: list[Any] | None, text: str) -> list[int | None]:
        """Where each message begins in `text`, and where the last one ends; None where that cannot be told."""
        found: list[int | None] = [0]
        for number in range(1, len(messages)):
            try:
                before = upstream_api.render_chats(self.text, [messages[:number]], tools, self.variables)[0][0]
            except Exception:  # some templates refuse a conversation that ends in this turn
                before = "\0"
            found.append(len(before) if text.startswith(before) else None)
        return [*found, len(text)]

    def _with_turns(self, messages: list[Message], said: Conversation, text: str, trained: Spans) -> Example | Dropped:
        """The example, with its turns as far as its length or its report needs them."""
        notes, parts = tuple(_notes(said, text)), tuple(trained)
        if _LOST_CALLS in notes:
            return Dropped(_LOST_CALLS)
        may_be_long = self.room is not None and len(text.encode()) > self.room
        if not may_be_long and self.train_on in ("assistant", "last_assistant") and not any(said.trained):
            return Example(text, parts, rendered=True, turns=(Turn("assistant", 0),), notes=notes)
        bounds, roles = self._bounds(messages, said.tools, text), [message["role"] for message in messages]
        cut: Literal["end", "beginning", "nowhere"] = self.cut
        lead = next((number for number, role in enumerate(roles) if role not in SYSTEM), len(roles))
        later = [number for number in range(lead + 1, len(roles)) if roles[number] == "user"]
        if may_be_long and cut == "beginning" and not later:
            cut = "end"  # a single question has no beginning that could be left out
        elif may_be_long and cut == "beginning":
            head = self._head(messages, said.tools, text, bounds, lead, later)
            if head is None:
                cut = "nowhere"
            elif lead:
                bounds[lead] = head
            elif head:  # a system prompt of the template's
                bounds, roles = [0, head, *bounds[1:]], ["system", *roles]
        turns = tuple(Turn(role, start) for role, start in zip(roles, bounds[:-1], strict=True) if start is not None)
        return Example(text, parts, rendered=True, turns=turns, cut=cut, end=self.end, notes=notes)

    def _head(
        self,
        messages: list[Message],
        tools: list[Any] | None,
        text: str,
        bounds: Sequence[int | None],
        lead: int,
        later: Sequence[int],
    ) -> int | None:
        """How many characters of `text` come before the turns when the first of them are left out: the `lead` messages
        of the system, or a prompt of the template's. None if the rest, from one of the `later` questions on, would be
        rendered differently."""
        starts = [number for number in later if bounds[number] is not None]
        if not starts:
            return None
        shorter = messages[:lead] + messages[starts[-1] :]
        rendered = upstream_api.render_chats(self.text, [shorter], tools, self.variables)[0][0]
        tail = text[bounds[starts[-1]] :]
        head = rendered[: len(rendered) - len(tail)]
        return len(head) if rendered.endswith(tail) and text.startswith(head) else None


def chat_template(recipe: Recipe, tokenizer: Any) -> ChatTemplate:
    """The template that renders the recipe's conversations: the tokenizer's, which `data.chat_template` may have set.

    Raises:
        DataError: there is none, it fails, or it does not tell what the assistant says.
    """
    data, own = recipe.data, tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    if not own:
        place = recipe.model.tokenizer or recipe.model.name
        raise DataError(
            f"the data are conversations, and the tokenizer of {place} has no chat template\n"
            "  set data.chat_template=chatml, another that TRL ships (llama3, qwen3, …), or a .jinja file"
        )
    name = "the tokenizer's own" if data.chat_template in (None, OWN) else f"data.chat_template={data.chat_template}"
    text, masks = own, "its generation markers"
    tried(own, tokenizer)
    if not upstream_api.has_generation_markers(own):
        training = upstream_api.training_template(tokenizer)
        text, masks = (own, "rendering turn by turn") if training is None else (training, "TRL's training template")
        if _renders_differently(own, text, tokenizer):
            masks += ", which keeps the thinking of earlier turns, where the tokenizer's own drops it"
    roles = data.train_on if isinstance(data.train_on, str) else tuple(data.train_on)
    found = ChatTemplate(
        text=at_a_fixed_date(text),
        variables=dict(tokenizer.special_tokens_map),
        marked=upstream_api.has_generation_markers(text),
        end=end_of_turn(text, tokenizer),
        train_on=roles,
        train_end=data.train_on_end_of_turn,
        cut=data.truncation,
        room=recipe.training.get("max_length", 1024),
        arguments_as_text=_takes_arguments_as_text(text, tokenizer),
        source=f"{name}; what the assistant says comes from {masks}",
    )
    _require_exact(found)
    return found


def _require_exact(template: ChatTemplate) -> None:
    """Check on a conversation of two questions that the trained parts can be told, and that an answer has an end."""
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}] * 2
    made = template.example(Conversation(turns, (None,) * 4))
    if QUESTION not in upstream_api.render_chats(template.text, [turns], None, template.variables)[0][0]:
        raise DataError(
            "the chat template leaves out what is said as text: it is for messages with images\n"
            "  set data.chat_template to another"
        )
    if isinstance(made, Dropped) and made.reason == _INEXACT:
        raise DataError(
            "the chat template renders an answer differently once another question follows, so that it cannot be told "
            "exactly what is trained\n  set data.train_on=last_assistant, or data.chat_template to a copy with "
            "{% generation %} markers around what the assistant says"
        )
    if template.train_end and not template.end:
        raise DataError(
            "the chat template writes nothing after an answer, so that the model would not learn to stop\n  set "
            "data.chat_template to another, or data.train_on_end_of_turn=false"
        )


def stop_tokens_of(template: ChatTemplate, tokenizer: Any) -> list[int]:
    """The token that ends a turn of the assistant; none if that is text."""
    return [tokenizer.convert_tokens_to_ids(template.end)] if template.end in special_tokens(tokenizer) else []


def _matches(answers: Sequence[Message], text: str, marks: Spans) -> bool:
    """Whether the marked parts are those of the answers, one each, in order."""
    if len(answers) != len(marks):
        return False
    return all(_answer(message) in text[start:end] for message, (start, end) in zip(answers, marks, strict=True))


def _answer(message: Message) -> str:
    """What an answer says after its reasoning."""
    return str(message["content"]).rpartition("</think>")[2].strip()


def _joined(marks: Spans) -> Spans:
    """The marked parts, those that touch as one: a template may mark what is said and its end one after the other."""
    found: Spans = []
    for start, end in marks:
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], end
        else:
            found.append((start, end))
    return found


def _says_nothing(message: Message) -> bool:
    return not (str(message["content"]).strip() or message.get("tool_calls") or message.get("reasoning_content"))


def _notes(said: Conversation, text: str) -> list[str]:
    """What the report counts about a conversation: reasoning, and what the template leaves out."""
    found = set()
    for message in said.messages:
        content, reasoning = str(message["content"]), str(message.get("reasoning_content") or "")
        if not reasoning and "</think>" in content:
            reasoning, _, content = content.partition("</think>")
            reasoning = reasoning.rpartition("<think>")[2]
        if reasoning.strip():
            found.add("reasoning" if reasoning.strip() in text else "reasoning that the chat template drops")
        if content.strip() not in text:
            found.add(f"a turn of {message['role']} that the chat template leaves out or changes")
        if message["role"] == "assistant" and _says_nothing(message):
            found.add("an empty answer, which is not trained")
        if any(call["function"]["name"] not in text for call in message.get("tool_calls", [])):
            found.add(_LOST_CALLS)
    names = [tool.get("function", {}).get("name") for tool in said.tools or []]
    if any(isinstance(name, str) and name not in text for name in names):
        found.add("tools that the chat template leaves out")
    return sorted(found)


def _renders_differently(own: str, training: str, tokenizer: Any) -> bool:
    """Whether the training template gives another text than the tokenizer's own for two questions."""
    turns: list[Message] = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}] * 2
    variables = tokenizer.special_tokens_map
    texts = [upstream_api.render_chats(text, [turns], None, variables)[0][0] for text in (own, training)]
    return texts[0] != texts[1]


def _takes_arguments_as_text(text: str, tokenizer: Any) -> bool:
    """Whether a template fails on arguments of a call that are an object, and not on their JSON text."""

    def works(arguments: Any) -> bool:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        turns: list[Message] = [{"role": "user", "content": QUESTION}]
        turns.append({"role": "assistant", "content": "", "tool_calls": [call]})
        try:
            upstream_api.render_chats(text, [turns], None, tokenizer.special_tokens_map)
        except Exception:  # a template is a program, and may raise anything
            return False
        return True

    return not works({"a": 1}) and works('{"a": 1}')


def at_a_fixed_date(text: str) -> str:
    """The template with today's date, where it writes that, replaced by a fixed one: data stay the same every day."""
    return re.sub(
        r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda found: repr(_DATE.strftime(found[2])), text, flags=re.DOTALL
    )
