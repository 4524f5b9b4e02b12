"""Modelfiles: the template in Go's language renders what the chat template does, or is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from distft.data.named_templates import CHATML
from distft.errors import ModelError
from distft.export.ollama import go_template, modelfile, pieces_of, rendered

from .conftest import TEMPLATE

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
WITH_BRACES = "{% for m in messages %}{{ '{{' + m.role + '}}' + m.content + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ '{{assistant}}' }}{% endif %}"
)
ASK, ANSWER, AGAIN = (
    {"role": "user", "content": "Why {{ .System }}?"},
    {"role": "assistant", "content": "So."},
    {"role": "user", "content": "Really?\n"},
)


def tokenizer_with(tokenizer: Any, template: str) -> Any:
    found = copy.deepcopy(tokenizer)
    found.chat_template = template
    return found


@pytest.mark.parametrize("template", [SMOLLM2, LLAMA3, GEMMA, CHATML, TEMPLATE, WITH_BRACES])
@pytest.mark.parametrize("adds_begin", [False, True])
def test_the_template_renders_what_the_chat_template_does(template: str, adds_begin: bool, tokenizer: Any) -> None:
    found = tokenizer_with(tokenizer, template)
    pieces = pieces_of(found)
    text = go_template(pieces, adds_begin=adds_begin)
    system = {"role": "system", "content": "Be brief."}
    conversations = [[ASK], [ASK, ANSWER, {**AGAIN, "content": "Really?"}]]
    if pieces.before_system:
        conversations += [[system, *each] for each in conversations]
    for messages in conversations:
        expected = found.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        begin = pieces.begin if adds_begin else ""
        assert begin + rendered(text, pieces.default_system, messages) == expected


def test_a_default_system_prompt_is_the_modelfiles(tokenizer: Any) -> None:
    pieces = pieces_of(tokenizer_with(tokenizer, SMOLLM2))
    assert pieces.default_system == "You are a helpful AI assistant named SmolLM"
    text = modelfile(
        "m.gguf", go_template(pieces, adds_begin=False), pieces.default_system, ["<|im_end|>"], {"num_ctx": 512}
    )
    assert text.splitlines()[0] == "FROM ./m.gguf"
    assert 'SYSTEM """You are a helpful AI assistant named SmolLM"""' in text
    assert text.endswith('PARAMETER stop "<|im_end|>"\nPARAMETER repeat_penalty 1.0\nPARAMETER num_ctx 512\n')


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}",  # turns are numbered
        "{% for m in messages %}{{ m.role }}{{ messages | length }}{{ m.content }}{% endfor %}assistant",
        "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[0].content }}",
    ],
)
def test_a_template_that_cannot_be_written_in_go_is_refused(template: str, tokenizer: Any) -> None:
    with pytest.raises(ModelError, match=r"Ollama's language; export --to gguf|refuses a conversation"):
        pieces_of(tokenizer_with(tokenizer, template))
