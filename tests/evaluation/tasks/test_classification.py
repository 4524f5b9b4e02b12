"""The task `classification`: any labels, languages and templates, with the same figures as IMDB's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distft.config.evaluation import Classification
from distft.config.recipe import load_recipe
from distft.data.labelled import around, load_labelled, prompt_of, require_room
from distft.errors import DataError
from distft.evaluation.classify import parse
from distft.evaluation.preflight import faults
from distft.evaluation.target import Target
from distft.evaluation.tasks.classification import TASK
from distft.evaluation.tasks.imdb import TASK as IMDB
from tests.evaluation.conftest import evaluation

KEY = "evaluation.classification.path"


def file(where: Path, rows: list[dict[str, Any]]) -> str:
    path = where / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_labels_are_words_of_any_language_or_numbers(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "label": label} for n, label in enumerate(["schlecht", "gut", "Gut ", "neutral"])]
    words, found = load_labelled(Classification(), file(tmp_path, rows[:2] + rows[3:]), KEY)
    assert (words, [row.label for row in found]) == (["gut", "neutral", "schlecht"], [2, 0, 1])
    section = Classification(label_words=["schlecht", "neutral", "gut"])
    words, found = load_labelled(section, file(tmp_path, rows), KEY)
    assert [row.label for row in found] == [0, 2, 2, 1]
    numbers = [{"text": "a", "label": 2}, {"text": "b", "label": "0"}]
    assert [row.label for row in load_labelled(section, file(tmp_path, numbers), KEY)[1]] == [2, 0]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"text": "a", "label": 1}], {}, "labels that are no words"),
        ([{"text": "a", "label": "yes"}], {}, "not two or more different words"),
        (
            [{"text": "a", "label": "yes"}],
            {"label_words": ["no", "maybe"]},
            "expected 'no', 'maybe', or a class number",
        ),
        ([{"body": "a", "label": "yes"}], {}, "has no column text; it has body, label"),
        ([{"text": " ", "label": "yes"}, {"text": "a", "label": "no"}], {}, "row 0 .* has no text"),
    ],
)
def test_what_does_not_fit_is_named(
    rows: list[dict[str, Any]], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        load_labelled(Classification(**settings), file(tmp_path, rows), KEY)


def test_preflight_names_the_key_of_a_mistake(tmp_path: Path) -> None:
    def found(*words: str) -> list[str]:
        recipe = load_recipe(["recipe=tiny", "evaluation.tasks=[classification]", *words])
        return [str(fault) for fault in faults(recipe)]

    (line,) = found()
    assert KEY in line and "is required for this task" in line
    shipped = f"{KEY}=tiny_languages_test"
    assert found(shipped) == []
    (line,) = found(shipped, "evaluation.classification.prompt=What?")
    assert "must have {text} once" in line
    (line,) = found(shipped, "evaluation.classification.positive=good")
    assert "is not a label word; there are negative, positive" in line
    (line,) = found(f"{KEY}={tmp_path / 'none.csv'}")
    assert KEY in line


def test_an_answer_names_a_class_in_any_script() -> None:
    assert [parse(text, ["gut", "schlecht"]) for text in ("Gut!", "**schlecht**", "gute Suppe", "gutä")] == [
        0,
        1,
        None,
        None,
    ]
    assert [parse(text, ["好", "不好"]) for text in ("好的。", "不好", "还好")] == [0, 1, None]


@pytest.mark.parametrize("template", ["instruction", "plain"])
def test_a_long_text_is_cut_at_its_end_and_the_question_stays(template: Any, target: Target) -> None:
    head, tail = around(target.tokenizer, template, "Good or bad?\n\n{text}\n\nAnswer:")
    words, decode = ["good", "bad"], target.tokenizer.decode
    whole = prompt_of("A walk by the lake.", head, tail, words, target.tokenizer, None, template)
    assert decode(whole.prefix, skip_special_tokens=True).strip() == (head + "A walk by the lake." + tail).strip()
    room = len(whole.prefix) + 3
    cut = prompt_of("A walk by the lake. " * 20, head, tail, words, target.tokenizer, room, template)
    text = decode(cut.prefix, skip_special_tokens=True).strip()
    assert text.startswith((head + "A walk").strip()) and text.endswith(tail.strip())
    assert len(cut.prefix) + max(map(len, cut.continuations)) + 1 == room
    with pytest.raises(DataError, match=r"the question takes .* of 8 tokens, which leaves no room for a text"):
        require_room(head, tail, words, target.tokenizer, 8, template)
    require_room(head, tail, words, target.tokenizer, room, template)


def test_the_figures_have_each_language_and_those_of_one_class_only_if_asked(target: Target, tmp_path: Path) -> None:
    section = {"path": "tiny_languages_test", "group": "language", "methods": ["logprob"]}
    found = TASK.run(target, evaluation(classification=section), tmp_path)
    languages = ("de", "en", "es", "fr", "zh")
    assert set(found["figures"]) == {"accuracy", "macro_f1", *(f"accuracy_{name}" for name in languages)}
    assert found["texts"] == 30 and found["label_words"] == ["negative", "positive"] and found["positive"] is None
    accuracies = [found["figures"][f"accuracy_{name}"] for name in languages]
    assert [each["count"] for each in accuracies] == [6] * 5
    for side in ("base", "adapter"):
        mean = sum(each[side]["value"] for each in accuracies) / 5
        assert found["figures"]["accuracy"][side]["value"] == pytest.approx(mean)
    again = TASK.run(target, evaluation(classification=section | {"positive": "Positive"}), tmp_path)
    assert again["figures"]["accuracy"] == found["figures"]["accuracy"]
    assert {"precision", "recall", "f1"} <= set(again["figures"])


def test_imdb_is_an_instance_of_it(target: Target, tmp_path: Path) -> None:
    """The same rows in IMDB's prompt give the figures of the task `imdb`, by either method."""
    rows = [
        {"text": f"The film was {word} on day {n}.", "label": n % 2, "word": ("negative", "positive")[n % 2]}
        for n, word in enumerate(["bad", "good", "dull", "great"] * 3)
    ]
    path, shared = file(tmp_path, rows), {"subset": None, "max_new_tokens": 12}
    own = {"path": path, "label": "word", "positive": "positive", "prompt": "### Review:\n{text}\n\n### Sentiment:\n"}
    settings = evaluation(imdb={"path": path, **shared}, classification=own | shared, generation={"template": "plain"})
    recipe = target.recipe.model_copy(update={"evaluation": settings})
    there = Target(**{**vars(target), "recipe": recipe})
    imdb, general = (task.run(there, settings, tmp_path / name) for task, name in ((IMDB, "a"), (TASK, "b")))
    for part in ("figures", "confusion"):
        assert json.dumps(imdb[part], sort_keys=True) == json.dumps(general[part], sort_keys=True)
    assert TASK.data(recipe) == IMDB.data(recipe)
