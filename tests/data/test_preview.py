"""What `distft data preview` prints."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from distft.data.named_templates import use_template
from distft.data.preview import preview
from distft.data.templates import format_dolly
from distft.data.tokenize import IGNORED
from tests.data.rows import ALL, RESPONSE_ONLY, recipe_of, tokenize_one, write_rows


def previewed(tokenizer: Any, tmp_path: Path, *overrides: str, colour: bool = False) -> str:
    file = write_rows(tmp_path / "rows.jsonl", [{"instruction": "Say it.", "context": "", "response": "It."}])
    return preview(
        recipe_of(f"data.path={file}", *ALL, RESPONSE_ONLY, *overrides), tokenizer, rows=range(3), colour=colour
    )


@pytest.mark.usefixtures("prepare")
def test_a_preview_marks_trained_tokens(tokenizer: Any, tmp_path: Path) -> None:
    text = previewed(tokenizer, tmp_path)
    assert "### Instruction:\nSay it.\n\n### Response:\n⟦It.</s>⟧\n" in text
    assert text.endswith("legend: ⟦trained⟧ masked")
    assert "\033" not in text


@pytest.mark.usefixtures("prepare")
def test_a_preview_on_a_terminal_marks_them_by_colour(tokenizer: Any, tmp_path: Path) -> None:
    text = previewed(tokenizer, tmp_path, colour=True)
    assert "\033[2m### Instruction:\nSay it.\n\n### Response:\n\033[0m\033[32mIt.</s>\033[0m\n" in text
    assert "⟦" not in text


@pytest.mark.usefixtures("prepare")
def test_a_preview_shows_token_counts_lengths_and_the_report(tokenizer: Any, tmp_path: Path) -> None:
    ids, labels, _ = tokenize_one(format_dolly("Say it.", "", "It.", completion_only=True), tokenizer, None)
    text = previewed(tokenizer, tmp_path)
    assert f"sample 0: {len(ids)} tokens, {sum(label != IGNORED for label in labels)} trained" in text
    assert f"data: train 1, validation 0, test 0 samples; {len(ids)} training tokens" in text
    assert "lengths in tokens (train)" in text and "█" in text


@pytest.mark.usefixtures("prepare")
def test_a_preview_of_a_conversation_shows_who_says_what(tokenizer: Any, tmp_path: Path) -> None:
    turns = [("system", "Be."), ("user", "One?"), ("assistant", "First."), ("user", "Two?"), ("assistant", "Second.")]
    messages = [{"role": role, "content": text} for role, text in turns]
    recipe = recipe_of(f"data.name={write_rows(tmp_path / 'rows.jsonl', [{'messages': messages}])}", *ALL)
    chatting = copy.deepcopy(tokenizer)
    use_template(chatting, "chatml")
    text = preview(recipe, chatting, rows=range(1), colour=False)
    start, end = "<|im_start|>", "<|im_end|>"
    assert f"{start}system\nBe.{end}\n{start}user\nOne?{end}\n{start}assistant\n⟦First.{end}⟧\n" in text
    assert f"{start}user\nTwo?{end}\n{start}assistant\n⟦Second.{end}⟧\n" in text
    assert re.search(r"^data: trained tokens: \d+ of assistant$", text, re.MULTILINE)
