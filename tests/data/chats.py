"""Tokenizers with the chat templates that TRL ships, conversations to render with them, and TRL's own labels."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import Any

import trl
from tokenizers import AddedToken
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from distft.config.recipe import Recipe, load_recipe
from distft.data.chat_template import ChatTemplate, at_a_fixed_date, chat_template
from distft.data.conversations import conversation
from distft.data.templates import Dropped
from distft.data.tokenize import IGNORED, tokenize

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
_SPECIAL = re.compile(r"<\|[\w.\- ]+\|>|<｜[^｜<>'\"]+｜>|<(?:start|end)_of_turn>|<\|?turn\|?>|</?think>|\[/?INST\]")


def with_template(tokenizer: Any, text: str) -> Any:
    """The tokenizer with this template, and as single tokens all that look like special ones in it."""
    found = copy.deepcopy(tokenizer)
    tokens = [token for token in dict.fromkeys(_SPECIAL.findall(text)) if token not in found.get_vocab()]
    found.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
    found.chat_template = text
    return found


def labels_of(tokenizer: Any, messages: Any, *overrides: str, tools: Any = None) -> tuple[list[int], list[int]] | str:
    """What distft trains: ids and labels, or why the conversation was dropped."""
    made = _template(tokenizer, tokenizer.chat_template, overrides).example(conversation(messages, "messages", tools))
    if isinstance(made, Dropped):
        return made.reason
    ((ids, labels, _),) = tokenize([made], tokenizer, None)
    return ids, labels


@functools.cache
def _template(tokenizer: Any, text: str, overrides: tuple[str, ...]) -> ChatTemplate:
    return chat_template(recipe_of(*overrides), tokenizer)


def recipe_of(*overrides: str) -> Recipe:
    return load_recipe(["training.max_length=null", *overrides])


def trl_labels(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None) -> tuple[list[int], list[int]]:
    """What TRL trains with assistant_only_loss: as `SFTTrainer` renders and masks it."""
    own = tokenizer.chat_template
    template = own if has_generation_markers(own) else get_training_chat_template(tokenizer)
    out = tokenizer.apply_chat_template(
        messages,
        tools=tools,
        chat_template=at_a_fixed_date(template),  # gpt-oss and Muse write the date of today
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids = list(out["input_ids"])
    return ids, [token if mask else IGNORED for token, mask in zip(ids, out["assistant_masks"], strict=True)]
