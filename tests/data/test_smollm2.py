"""The template of a real chat model, which neither marks what is trained nor has a counterpart in TRL."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from distft.data.tokenize import IGNORED
from tests.data.chats import labels_of
from tests.pretrained import smollm2


@pytest.fixture(scope="module")
def smol() -> Any:
    return AutoTokenizer.from_pretrained(smollm2())


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_labels_of_smollm2(smol: Any, system: list[dict[str, str]]) -> None:
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "Ciao 🙂")]
    messages = [*system, *({"role": role, "content": text} for role, text in turns)]
    found = labels_of(smol, messages)
    assert not isinstance(found, str)
    ids, labels = found
    assert ids == smol.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    told = smol.decode([label for label in labels if label != IGNORED])
    assert told == "Hello.<|im_end|>\nCiao 🙂<|im_end|>\n"
    assert ("You are a helpful AI assistant" in smol.decode(ids)) == (not system), "the template's own system prompt"
