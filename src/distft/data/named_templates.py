"""Chat templates by name, for bases that have none: `chatml`, those that TRL ships, and files."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from distft import upstream_api
from distft.config.recipe import load_recipe
from distft.config.validation import nearest
from distft.errors import DataError
from distft.text import first_line

CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}"
    "{{- '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
OWN = "tokenizer"
"""The value of `data.chat_template` that means the tokenizer's own."""
_WITH_IMAGES = ("vl", "llava", "idefics", "smolvlm", "diffusion")
"""Parts of the names of templates whose messages are not texts."""
_SPECIAL = re.compile(r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>\s]{1,40}｜>|<(?:start|end)_of_turn>|<\|?turn\|?>")
QUESTION, ANSWER = "distft-question", "distft-answer"
"""What is said in a conversation that a template is tried on."""


def template_names() -> list[str]:
    """The names that `data.chat_template` may have, besides `tokenizer` and paths."""
    return ["chatml", *sorted(_shipped())]


def name_problem(name: str) -> str | None:
    """What is wrong with a value of `data.chat_template`, or None. Reads no template."""
    if is_path(name):
        return None if Path(name).expanduser().is_file() else f"there is no file {name}"
    if name == OWN or name in template_names():
        return None
    hint = nearest(name, template_names())
    return f"{name!r} is not tokenizer, the path of a .jinja file, or one of {', '.join(template_names())}" + (
        f"; {hint}" if hint else ""
    )


def template_text(name: str) -> str:
    """The template of this name or path.

    Raises:
        DataError: there is none.
    """
    if problem := name_problem(name):
        raise DataError(f"data.chat_template: {problem}")
    if name == "chatml":
        return CHATML
    path = Path(name).expanduser() if is_path(name) else _shipped()[name]
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template={name} cannot be read: {first_line(error)}") from error


def words_of_run(file: Path, result: Path) -> list[str]:
    """What loads the recipe `file` of a run, with the chat template saved in its `result` where the recipe names a
    template file, which may have changed since."""
    words = [f"recipe={file.absolute()}"]
    name, saved = load_recipe(words).data.chat_template, result.absolute() / "chat_template.jinja"
    if name is not None and is_path(name) and saved.is_file():
        words.append(f"data.chat_template={json.dumps(str(saved))}")
    return words


def use_template(tokenizer: Any, name: str) -> list[str]:
    """Make the template of this name or path the tokenizer's own, and return the tokens that it lacked.

    Tokens such as `<|im_start|>` that the template writes are added to the tokenizer; the one that ends a turn becomes
    its end of sequence, as in models that are trained on conversations.

    Raises:
        DataError: there is no such template, or it fails.
    """
    from transformers import AddedToken

    text = template_text(name)
    tokenizer.chat_template = text
    written = tried(text, tokenizer)
    new = [token for token in dict.fromkeys(_SPECIAL.findall(written)) if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True)
    end = end_of_turn(text, tokenizer)
    if end in special_tokens(tokenizer) and end != tokenizer.eos_token:
        pads = tokenizer.pad_token
        tokenizer.eos_token = end
        tokenizer.pad_token = pads
    return new


def special_tokens(tokenizer: Any) -> set[str]:
    """The tokens that the tokenizer never splits or merges with others."""
    return {token.content for token in tokenizer.added_tokens_decoder.values()}


def tried(text: str, tokenizer: Any) -> str:
    """What a template makes of a short conversation, with a system prompt where it knows one.

    Raises:
        DataError: it makes nothing of it.
    """
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    fault: Exception | None = None
    for conversation in ([{"role": "system", "content": "Be kind."}, *turns], turns):
        try:
            return upstream_api.render_chats(text, [conversation], None, tokenizer.special_tokens_map)[0][0]
        except Exception as error:  # a template is a program, and may raise anything
            fault = error
    assert fault is not None
    raise DataError(
        f"the chat template cannot render a question and its answer: {first_line(fault)}\n"
        "  set data.chat_template to another, such as chatml"
    )


def end_of_turn(text: str, tokenizer: Any) -> str:
    """What a template writes after an answer: the special token, if there is one; "" if nothing marks the end."""
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    written = upstream_api.render_chats(text, [turns], None, tokenizer.special_tokens_map)[0][0]
    after = written.rpartition(ANSWER)[2]
    places = {after.find(token): token for token in special_tokens(tokenizer) if token and token in after}
    return places[min(places)] if places else after.strip()


def _shipped() -> dict[str, Path]:
    """TRL's templates of text models by name. TRL itself is not imported."""
    spec = importlib.util.find_spec("trl")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    files = [file for folder in folders for file in (Path(folder) / "chat_templates").glob("*.jinja")]
    return {
        file.stem: file
        for file in files
        if not file.stem.endswith("_training") and not any(part in file.stem for part in _WITH_IMAGES)
    }


def is_path(name: str) -> bool:
    """Whether a value of `data.chat_template` names a file."""
    return name.endswith((".jinja", ".j2"))
