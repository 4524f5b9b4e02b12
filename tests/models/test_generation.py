"""The end of a turn that was trained stops the model, also after it was saved and loaded again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaForCausalLM

from distft.data.named_templates import use_template
from distft.models.embeddings import add_rows, train_new_rows, vocabulary_size
from distft.models.generation import end_answers_at, read_stop_tokens, save_stop_tokens, stop_tokens
from distft.models.tiny import tiny_config


def model() -> Any:
    with torch.device("meta"):
        return LlamaForCausalLM(tiny_config())


def test_stop_tokens_are_saved_beside_an_adapter_and_read_again(tmp_path: Path) -> None:
    trained, again = model(), model()
    end_answers_at(trained, [7])
    end_answers_at(trained, [7])
    assert stop_tokens(trained) == [2, 7]
    save_stop_tokens(trained, tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [2, 7]
    read_stop_tokens(again, tmp_path)
    assert stop_tokens(again) == [2, 7]
    read_stop_tokens(again, tmp_path / "none")
    assert stop_tokens(again) == [2, 7]


def test_tokens_of_a_named_template_get_rows_that_are_trained(tokenizer: Any) -> None:
    chatting = copy.deepcopy(tokenizer)
    new = chatting.convert_tokens_to_ids(use_template(chatting, "chatml"))
    base = LlamaForCausalLM(tiny_config())
    rows = base.get_input_embeddings().weight.shape[0]
    mean = base.get_input_embeddings().weight.detach().mean(0)
    add_rows(base, vocabulary_size(chatting), new)
    weight = base.get_input_embeddings().weight
    assert new == [rows, rows + 1] and weight.shape[0] == rows + 2
    torch.testing.assert_close(weight[new[1]].detach(), mean)
    wanted = train_new_rows({"r": 4}, base, rows, new)["trainable_token_indices"]
    assert wanted == {"model.embed_tokens": new, "lm_head": new}
    spare = train_new_rows({"r": 4}, base, rows + 2, new)["trainable_token_indices"]
    assert spare == wanted, "also where the base has the rows already"
