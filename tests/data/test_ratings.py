"""Answers with a label: what is trained, what the label says, and which rows and recipes do not go together."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from distft.config.recipe import load_recipe
from distft.data.checks import data_faults
from distft.data.inference import with_format
from distft.data.loader import Collator
from distft.data.named_templates import use_template
from distft.data.pairs import mismatched, sequences_of
from distft.data.prepare import prepare_data
from distft.data.preview import preview
from distft.data.tokenize import IGNORED
from distft.errors import DataError, RecipeError
from tests.data.rows import ALL, recipe_of, write_rows

KTO = ("recipe=kto", *ALL)
NONE = ("training.eval_strategy=no", "evaluation.before_and_after=false")
TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize("label", [True, False, "true", "False", 1, "0"])
@pytest.mark.usefixtures("prepare")
def test_the_label_says_whether_all_or_none_is_chosen(label: Any, tokenizer: Any, tmp_path: Path) -> None:
    """In texts and in conversations; the answer is trained and the prompt is not."""
    rows = [{"prompt": "Q:", "completion": " A", "label": label}], [{"messages": TURNS, "label": label}]
    tokenizer = copy.deepcopy(tokenizer)
    use_template(tokenizer, "chatml")
    for number, (row,) in enumerate(rows):
        words = () if "prompt" in row else ("data.chat_template=chatml",)
        recipe = recipe_of(*KTO, f"data.name={write_rows(tmp_path / f'{number}.jsonl', [row])}", *words)
        (sample,) = prepare_data(recipe, tokenizer).train
        good = str(label).lower() in ("true", "1")
        assert sample["chosen"] == (len(sample["input_ids"]) if good else 0)
        first = next(at for at, label in enumerate(sample["labels"]) if label != IGNORED)
        assert first > 0 and tokenizer.decode(sample["input_ids"][first:]).strip().startswith("A")
        assert [each["input_ids"] for each in sequences_of([sample])] == [sample["input_ids"]]
        batch = Collator(0, packed=True, for_head=True, rated=True)([sample, sample | {"chosen": 0}])
        assert batch["good"].tolist() == [good, False] and len(batch["counts"]) == 3
        assert Collator(0, packed=False, for_head=True, rated=True)([])["good"].shape == (0,)


@pytest.mark.usefixtures("prepare")
def test_the_preview_says_which_answers_are_chosen(tokenizer: Any) -> None:
    recipe = recipe_of("recipe=kto", "data.max_samples=10", "data.validation_fraction=0", "data.test_fraction=0", *NONE)
    said = preview(recipe, tokenizer, rows=range(10), colour=False)
    labels = [row["chosen"] > 0 for row in prepare_data(recipe, tokenizer).train]
    assert {True, False} == set(labels)
    assert [line.startswith("chosen (") for line in said.splitlines() if line.endswith(" tokens):")] == labels


@pytest.mark.usefixtures("prepare")
def test_real_data_are_read_and_other_labels_refused(shared_data: Path, tokenizer: Any, tmp_path: Path) -> None:
    recipe, told = with_format(recipe_of("recipe=kto", f"data.name={shared_data / 'kto_sample.jsonl'}"))
    assert recipe.data.format is not None and told is not None and "with a label" in told
    assert (recipe.data.format.messages, recipe.data.format.label) == ("messages", "label")
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "Q:", "completion": " A", "label": "great"}])
    form = (f"data.format.{name}={name}" for name in ("prompt", "completion", "label"))
    with pytest.raises(DataError, match=r"row 1: column 'label' contains 'great'; expected true or false"):
        prepare_data(recipe_of(*KTO, f"data.name={bad}", *form), tokenizer)
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "Q:", "chosen": " A", "rejected": " B"}])
    with pytest.raises(DataError, match=r"needs answers with a label.*\n.*loss_type=sigmoid"):
        with_format(recipe_of("recipe=kto", f"data.name={pairs}"))
    plain = write_rows(tmp_path / "plain.jsonl", [{"prompt": "Q:", "completion": " A"}])
    with pytest.raises(DataError, match=r"no column label.*\n.*data.format.label=COLUMN"):
        with_format(recipe_of("recipe=kto", f"data.name={plain}"))


@pytest.mark.parametrize(
    ("words", "problem", "hint"),
    [
        (("recipe=dpo", "preference.loss_type=kto"), "names pairs of answers", "set preference.loss_type=sigmoid"),
        (("recipe=dpo", "data.name=tiny_ratings"), "names answers with a label", "recipe=kto has it"),
        (("recipe=tiny", "data.name=tiny_ratings"), "names answers with a label", "recipe=kto has it"),
        (("recipe=kto", "data.name=dolly"), "names answers without a label", "set data.format.label"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_known_data_set_of_another_kind_is_refused(words: tuple[str, ...], problem: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(words, checks=(data_faults,))
    (fault,) = (each for each in caught.value.faults if each.key == "data.format")
    assert problem in fault.problem and hint in fault.hint


def test_a_mismatched_answer_follows_the_prompt_of_another() -> None:
    one = {"input_ids": [1, 2, 3, 4], "labels": [IGNORED, IGNORED, 3, 4]}
    other = {"input_ids": [5, 6, 7, 8], "labels": [IGNORED, 6, IGNORED, 8]}
    found = {"input_ids": [1, 2, 6, 7, 8], "labels": [IGNORED, IGNORED, 6, IGNORED, 8]}
    assert mismatched(one, other, None) == found
    assert mismatched(one, other, 3) == {name: ids[:3] for name, ids in found.items()}
