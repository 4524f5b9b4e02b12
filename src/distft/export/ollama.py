"""Ollama: the Modelfile of a GGUF file, whose template (Go's) is derived from the chat template (Jinja's).

A chat template is tried on a few conversations, which shows what it writes before, between and after what is said. The
Go template writes the same; `rendered` evaluates it, so that the proof can compare its prompts with those of the
training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.errors import ModelError

_SYSTEM, _ASK, _SAY, _ASK_AGAIN, _SAY_AGAIN = (f"distft-part-{number}-of-5" for number in range(1, 6))
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Pieces:
    """What a chat template writes around what is said."""

    begin: str
    """Before everything else."""
    default: str
    """After `begin`, where a conversation has no system prompt."""
    before_system: str
    after_system: str
    """Empty, like `before_system`, if the template has no system prompts."""
    before_user: str
    before_answer: str
    after_answer: str

    @property
    def default_system(self) -> str | None:
        """The system prompt that the template writes by itself; None if what it writes is no system prompt."""
        before, after, text = self.before_system, self.after_system, self.default
        if not text or not (before or after) or not (text.startswith(before) and text.endswith(after)):
            return None
        return text[len(before) : len(text) - len(after)]


def pieces_of(tokenizer: Any) -> Pieces:
    """Take the chat template of `tokenizer` apart.

    Raises:
        ModelError: it writes a turn differently in different places, so that a Go template cannot be derived.
    """
    alone = _split(_render(tokenizer, [("user", _ASK)]), _ASK)
    turns = [("user", _ASK), ("assistant", _SAY), ("user", _ASK_AGAIN), ("assistant", _SAY_AGAIN)]
    head, before, between, again, _ = _split(_render(tokenizer, turns), _ASK, _SAY, _ASK_AGAIN, _SAY_AGAIN)
    ended = _render(tokenizer, turns[:2], answer=False).rpartition(_SAY)[2]
    if head != alone[0] or before != alone[1] or again != before or not between.startswith(ended):
        raise ModelError(_UNLIKE)
    before_user = between[len(ended) :]
    if not head.endswith(before_user):
        raise ModelError(_UNLIKE)
    begin = tokenizer.bos_token if tokenizer.bos_token and head.startswith(tokenizer.bos_token) else ""
    default = head[: len(head) - len(before_user)]
    if begin and not default.startswith(begin):
        begin = ""  # each turn begins with it
    default = default[len(begin) :]
    before_system = after_system = ""
    try:
        lead, middle, _ = _split(_render(tokenizer, [("system", _SYSTEM), ("user", _ASK)]), _SYSTEM, _ASK)
    except (ModelError, ValueError):
        pass  # the template knows no system prompts
    else:
        if not lead.startswith(begin) or not middle.endswith(before_user):
            raise ModelError(_UNLIKE)
        before_system, after_system = lead[len(begin) :], middle[: len(middle) - len(before_user)]
    return Pieces(begin, default, before_system, after_system, before_user, before, ended)


_UNLIKE = (
    "the chat template writes a turn differently in different places, and distft cannot write it in Ollama's language; "
    "export --to gguf, which has the template itself"
)


def _render(tokenizer: Any, turns: Sequence[tuple[str, str]], *, answer: bool = True) -> str:
    messages = [{"role": role, "content": text} for role, text in turns]
    ends = turns[-1][0] == "assistant"
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer and not ends))
    except Exception as error:  # a template is a program, and may raise anything
        raise ModelError(f"the chat template refuses a conversation: {error}") from error


def _split(text: str, *marks: str) -> list[str]:
    """The text before, between and after the marks.

    Raises:
        ModelError: one is missing, or they have another order.
    """
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise ModelError(_UNLIKE)
        parts.append(before)
    return [*parts, text]


def go_template(pieces: Pieces, *, adds_begin: bool) -> str:
    """The template in Go's language; without the beginning of sequence if the GGUF file has llama.cpp add it."""
    default = pieces.default if pieces.default_system is None else ""
    turns = [("user", pieces.before_user, ""), ("assistant", pieces.before_answer, pieces.after_answer)]
    if pieces.before_system or pieces.after_system:
        turns.insert(0, ("system", pieces.before_system, pieces.after_system))
    cases = ""
    for number, (role, before, after) in enumerate(turns):
        case = f'{"else if" if number else "if"} eq .Role "{role}"'
        cases += f"{{{{ {case} }}}}{_literal(before)}{{{{ .Content }}}}{_literal(after)}"
    return (
        ("" if adds_begin else _literal(pieces.begin))
        + (f"{{{{ if not .System }}}}{_literal(default)}{{{{ end }}}}" if default else "")
        + f"{{{{ range .Messages }}}}{cases}{{{{ end }}}}{{{{ end }}}}"
        + _literal(pieces.before_answer)
    )


def _literal(text: str) -> str:
    if '"""' in text:
        raise ModelError('the chat template writes """, which a Modelfile cannot hold')
    return text.replace("{{", '{{ "{{" }}')


def modelfile(
    file: str, template: str | None, system: str | None, stops: Sequence[str], parameters: Mapping[str, Any]
) -> str:
    """The text of the Modelfile. Ollama punishes repetition unless told not to; training did not."""
    lines = [f"FROM ./{file}"]
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    if system:
        lines.append(f'SYSTEM """{system}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines += [f"PARAMETER {name} {value}" for name, value in {"repeat_penalty": 1.0, **parameters}.items()]
    return "\n".join(lines) + "\n"


def context(model: Path, longest: int) -> int:
    """Tokens of a conversation for which Ollama makes room: 4096, or the `longest` sample of the training, as far as
    the model in the folder has positions."""
    positions = json.loads((model / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    wanted = max(4096, longest)
    return min(wanted, positions) if isinstance(positions, int) else wanted


def sampling(model: Path) -> dict[str, Any]:
    """Ollama's parameters for what generation_config.json in the folder of a model says."""
    file = model / "generation_config.json"
    said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not said.get("do_sample"):
        return {"temperature": 0}
    return {name: said[name] for name in ("temperature", "top_k", "top_p", "min_p") if said.get(name) is not None}


def rendered(template: str, system: str | None, messages: Messages) -> str:
    """What Ollama makes of a conversation with this template: an evaluator for what `go_template` writes.

    `system` is the Modelfile's, which stands where the conversation has no system prompt.
    """
    if system and not any(message["role"] == "system" for message in messages):
        messages = [{"role": "system", "content": system}, *messages]
    scope = {
        "Messages": messages,
        "System": "\n\n".join(str(each["content"]) for each in messages if each["role"] == "system"),
    }
    text, rest = _evaluate(list(_tokens(template)), scope, None)
    assert not rest, rest
    return text


def _tokens(template: str) -> Iterator[tuple[bool, str]]:
    """Literal text (False) and actions (True)."""
    for number, part in enumerate(re.split(r"\{\{(.*?)\}\}", template.replace('{{ "{{" }}', "\0"), flags=re.DOTALL)):
        yield bool(number % 2), part.strip() if number % 2 else part.replace("\0", "{{")


def _evaluate(
    tokens: list[tuple[bool, str]], scope: Mapping[str, Any], message: Mapping[str, Any] | None
) -> tuple[str, list[tuple[bool, str]]]:
    """The text of the tokens up to the `else` or `end` of this level, and what is left from there on."""
    text = ""
    while tokens:
        is_action, part = tokens[0]
        if not is_action:
            text, tokens = text + part, tokens[1:]
        elif part == ".Content":
            assert message is not None
            text, tokens = text + str(message["content"]), tokens[1:]
        elif part == "range .Messages":
            body, rest = tokens[1:], tokens[1:]
            for each in scope["Messages"]:
                made, rest = _evaluate(body, scope, each)
                text += made
            if not scope["Messages"]:
                _, rest = _evaluate(body, scope, {"role": "", "content": ""})
            tokens = rest[1:]
        elif part.startswith("if "):
            made, tokens = _branches(tokens, scope, message)
            text += made
        else:
            return text, tokens
    return text, tokens


def _branches(
    tokens: list[tuple[bool, str]], scope: Mapping[str, Any], message: Mapping[str, Any] | None
) -> tuple[str, list[tuple[bool, str]]]:
    text, done = "", False
    while tokens[0][1] != "end":
        condition = tokens[0][1].removeprefix("else").strip().removeprefix("if").strip()
        made, tokens = _evaluate(tokens[1:], scope, message)
        if not done and _holds(condition, scope, message):
            text, done = made, True
    return text, tokens[1:]


def _holds(condition: str, scope: Mapping[str, Any], message: Mapping[str, Any] | None) -> bool:
    if condition == "not .System":
        return not scope["System"]
    found = re.fullmatch(r'eq \.Role "(\w+)"', condition)
    assert found is not None and message is not None, condition
    return bool(message["role"] == found[1])
