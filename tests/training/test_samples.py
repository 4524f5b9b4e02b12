"""Which prompts a run answers, how it answers them under padding and packs, and what is kept of the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distft.config.recipe import load_recipe
from distft.models.attention import UNPACKED
from distft.models.generation import end_tokens, write
from distft.models.loading import load_tokenizer
from distft.runs.folder import RunFolder
from distft.runs.samples import Answers, Samples
from distft.training.checks import training_faults
from distft.training.samples import marks_of, prompt_and_answer

from .test_packing import PACKED, PADDED, trainer_of

NO = -100


class Letters:
    """A tokenizer whose tokens are the characters of a text."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


def parts(text: str, trained: str, marks: tuple[str, ...] = (), **more: Any) -> tuple[str, str]:
    """The prompt and the answer of `text`, of which the characters marked `x` in `trained` are."""
    labels = [ord(letter) if mark == "x" else NO for letter, mark in zip(text, trained, strict=True)]
    prompt, answer = prompt_and_answer({"input_ids": [*map(ord, text)], "labels": labels, **more}, Letters(), marks)
    return Letters().decode(prompt), Letters().decode(answer)


def test_the_prompt_is_what_stands_before_the_last_trained_part() -> None:
    assert parts("why? so.", "-----xxx") == ("why? ", "so.")
    assert parts("a?b.c?d.\n", "--xx--xx-") == ("a?b.c?", "d."), "the earlier answer belongs to the conversation"
    assert parts("why? so.why? no", "-----xxx-----xx", chosen=8) == ("why? ", "so."), "the chosen answer of a pair"


def test_a_text_that_is_trained_as_a_whole_is_divided_after_its_template() -> None:
    assert parts("Q: x A: y A: z", "-" + 13 * "x", (" A: ",)) == ("Q: x A: y A: ", "z")
    assert parts("a plain text", "-" + 11 * "x", (" A: ",)) == ("a plai", "n text")
    assert len(parts(200 * "a", "-" + 199 * "x")[0]) == 32


def test_the_template_s_mark_is_that_of_the_training_data() -> None:
    recipe = load_recipe(["recipe=tiny"])
    assert marks_of(recipe, load_tokenizer(recipe)) == ["\n\n### Response:\n"]
    sentiment = load_recipe(["recipe=tiny_sentiment"])
    assert marks_of(sentiment, load_tokenizer(sentiment)) == ["\n\n### Sentiment:\n"]


@pytest.mark.parametrize(("words", "attention"), [(PADDED, "sdpa"), (PACKED, UNPACKED)], ids=["padded", "packed"])
def test_a_model_in_training_writes_what_it_finds_likeliest(
    words: tuple[str, ...], attention: str, tmp_path: Path
) -> None:
    """Prompts of different lengths in one batch, token by token, with a cache, and with the kernels of the training."""
    trainer = trainer_of(tmp_path, *words)
    model, ends = trainer.model, end_tokens(trainer.model, trainer.processing_class)
    model.get_base_model().set_attn_implementation(attention)
    prompts = [list(row)[:size] for row, size in zip(trainer.eval_dataset["input_ids"], (5, 9), strict=False)]
    model.train()
    before = torch.get_rng_state()
    written = write(model, prompts, 6, ends, trainer.processing_class.pad_token_id)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert model.get_base_model().config._attn_implementation == attention
    model.eval()
    for prompt, row in zip(prompts, written, strict=True):
        stop = next((place for place, token in enumerate(row) if token in ends), len(row))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *row[:stop]]])).logits[0]
        assert row[:stop] == logits.argmax(-1).tolist()[len(prompt) - 1 : -1]


def test_settings_without_effect_are_refused() -> None:
    recipe = load_recipe(["recipe=tiny", "evaluation.samples={each_evaluation: true}"])
    assert [fault.key for fault in training_faults(recipe, on_gpu=False)] == ["evaluation.samples.each_evaluation"]
    words = ["recipe=tiny", "evaluation.samples={number: 2, each_evaluation: true}"]
    assert training_faults(load_recipe(words), on_gpu=False) == []
    (fault,) = training_faults(load_recipe([*words, "training.eval_strategy=no"]), on_gpu=False)
    assert "there are no evaluations" in str(fault)
    assert load_recipe(["recipe=tiny", "evaluation.samples=4"]).evaluation.samples.number == 4


def test_a_resumed_run_keeps_the_answers_until_its_step(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert Samples.read(folder) is None
    told = Samples(("Who?",), ("I.",))
    for when, step in (("before", 0), ("evaluation", 5), ("evaluation", 10), ("after", 10)):
        told = told.with_answers(Answers(when, step, (f"{when} {step}\nand more",)))  # type: ignore[arg-type]
    told.write(folder)
    found = Samples.read(folder)
    assert found == told
    assert [each.label for each in found.until(5).answers] == ["before", "step 5"]
    assert [each.label for each in found.until(10).answers] == ["before", "step 5", "step 10"]
    assert found.lines() == [
        "held-out prompt 1: Who?",
        "  reference: I.",
        "  before: before 0 and more",
        "  after: after 10 and more",
    ]
    assert found.table()[1][1] == ["Who?", "I.", "step 5", 5, "evaluation 5\nand more"]
