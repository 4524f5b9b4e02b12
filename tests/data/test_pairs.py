"""Pairs of answers: what is the prompt, what is trained, and which rows are no pairs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from distft.data.named_templates import use_template
from distft.data.pairs import sequences_of
from distft.data.prepare import prepare_data
from distft.data.preview import preview
from distft.data.splits import lengths_of, longest_sequence
from distft.models.loading import load_tokenizer
from tests.data.rows import ALL, Prepare, recipe_of, trained, whole, write_rows

SAYS = (("user", "Q"), ("assistant", "g"), ("assistant", "b"))
USER, GOOD, BAD = ({"role": role, "content": text} for role, text in SAYS)
CHAT = "data.chat_template=chatml"
ASKED, SAID = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
PAIRS = ("recipe=dpo", *ALL)


@pytest.mark.parametrize(
    ("row", "words", "prompt", "answers"),
    [
        ({"prompt": "Q:", "chosen": " g", "rejected": " b"}, (), "Q:", (" g", " b")),
        ({"chosen": "Q: a good one", "rejected": "Q: a bad one"}, (), "Q: a", (" good one", " bad one")),
        ({"prompt": "Q", "chosen": "g", "rejected": "b"}, (CHAT,), ASKED, ("g" + SAID, "b" + SAID)),
        ({"prompt": "Q", "chosen": [GOOD], "rejected": [BAD]}, (CHAT,), ASKED, ("g" + SAID, "b" + SAID)),
        ({"prompt": [USER], "chosen": GOOD, "rejected": BAD}, (CHAT,), ASKED, ("g" + SAID, "b" + SAID)),
        ({"prompt": "Q", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, (CHAT,), ASKED, ("g" + SAID, "b" + SAID)),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, (CHAT,), ASKED, ("g" + SAID, "b" + SAID)),
        (
            {"system": "S", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            (CHAT,),
            f"<|im_start|>system\nS<|im_end|>\n{ASKED}",
            ("g" + SAID, "b" + SAID),
        ),
        (
            {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]},
            (CHAT,),
            f"{ASKED}g<|im_end|>\n{ASKED}",
            ("g" + SAID, "b" + SAID),
        ),
    ],
    ids=json.dumps,
)
@pytest.mark.usefixtures("prepare")
def test_the_answers_are_trained_and_the_prompt_is_not(
    row: dict[str, Any], words: tuple[str, ...], prompt: str, answers: tuple[str, str], tokenizer: Any, tmp_path: Path
) -> None:
    recipe = recipe_of(*PAIRS, f"data.name={write_rows(tmp_path / 'pairs.jsonl', [row])}", *words)
    if words:
        tokenizer = copy.deepcopy(tokenizer)
        use_template(tokenizer, "chatml")
    (pair,) = prepare_data(recipe, tokenizer).train
    end = "" if words else tokenizer.eos_token
    for sequence, answer in zip(sequences_of([pair]), answers, strict=True):
        assert trained(sequence, tokenizer) == answer + end
        assert whole(sequence, tokenizer).startswith(prompt + answer)


def test_rows_that_are_no_pairs_are_dropped_and_counted(prepare: Prepare, tmp_path: Path) -> None:
    good = {"prompt": "Q", "chosen": "a longer answer", "rejected": "b"}
    rows = [good, good | {"rejected": good["chosen"]}, good | {"rejected": ""}, good | {"chosen": None}]
    splits = prepare(*PAIRS, f"data.name={write_rows(tmp_path / 'pairs.jsonl', rows)}")
    assert len(splits.train) == 1
    assert splits.report.dropped == {
        "a chosen answer that equals the rejected one": 1,
        "an empty answer of a pair": 2,
    }
    chosen, rejected = sequences_of(splits.train)
    assert lengths_of(splits.train).tolist() == [len(chosen["input_ids"]) + len(rejected["input_ids"])]
    assert longest_sequence(splits.train) == len(chosen["input_ids"]) > len(rejected["input_ids"])


def test_a_pair_is_trained_only_if_a_part_of_both_answers_is_left(prepare: Prepare, tmp_path: Path) -> None:
    row = {"prompt": "word " * 30, "chosen": "g", "rejected": "b"}
    rows = [{"prompt": "Q", "chosen": "g" * 100, "rejected": "b"}, row]
    splits = prepare(*PAIRS, f"data.name={write_rows(tmp_path / 'pairs.jsonl', rows)}", "training.max_length=16")
    assert len(splits.train) == 1 and splits.report.dropped_untrained["train"] == 1
    assert len(sequences_of(splits.train)[0]["input_ids"]) == 16


def test_the_preview_shows_both_sequences_of_real_pairs(shared_data: Path) -> None:
    recipe = recipe_of("recipe=dpo", f"data.name={shared_data / 'dpo_sample.jsonl'}", CHAT, "training.max_length=512")
    shown = preview(recipe, load_tokenizer(recipe), rows=[0], colour=False)
    assert shown.count("<|im_start|>assistant\n⟦") == 2
    assert "\nchosen (" in shown and "\nrejected (" in shown
