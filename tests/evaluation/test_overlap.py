"""Items that were trained on are counted, whatever file they come from."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distft.config.recipe import Recipe, load_recipe
from distft.data.named_templates import use_template
from distft.data.prepare import prepare_data
from distft.distributed.world import World
from distft.evaluation.overlap import overlap
from distft.evaluation.summary import headline, overlap_line, warnings
from distft.evaluation.target import Target, Trained
from distft.evaluation.tasks.perplexity import PerplexityTask
from distft.reports.markdown import markdown
from distft.reports.report import report
from tests.reports.conftest import make

UNSPLIT = ["data.validation_fraction=0", "training.eval_strategy=no"]
FORMAT = ["data.format.prompt=q", "data.format.completion=a"]


def rows(path: Path, numbers: range) -> Path:
    lines = [json.dumps({"q": f"Question {number}? ", "a": "Yes, it is."}) for number in numbers]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def recipe(path: Path, *words: str) -> Recipe:
    fixed = ["recipe=tiny", "model.dtype=float32", "quantization=null", *UNSPLIT]
    return load_recipe([*fixed, f"data.name={path}", *FORMAT, *words])


@pytest.fixture
def trained(tmp_path: Path, tokenizer: Any) -> Trained:
    """Trained on rows 0 to 29 of a file."""
    made = recipe(rows(tmp_path / "train.jsonl", range(30)), "data.test_fraction=0")
    return Trained(made, prepare_data(made, tokenizer).report.digest)


def test_the_same_rows_in_another_file_are_counted_and_said(
    adapter: Path, target: Target, trained: Trained, tmp_path: Path
) -> None:
    other = rows(tmp_path / "other.jsonl", range(20, 40))  # 10 of its 20 rows were trained on
    asked = recipe(tmp_path / "train.jsonl", f"data.test_path={other}")
    found = PerplexityTask().run(Target.load(asked, adapter, World(), trained), asked.evaluation, tmp_path / "out")
    assert found["overlap"] == {"count": 10, "items": 20}
    assert overlap_line("perplexity", found) == "perplexity: 10 of 20 items were trained on"
    (warning,) = warnings("perplexity", found, "out")
    assert warning == "perplexity: 10 of 20 items were trained on, so its figures are not those of unseen text"
    assert "perplexity: 10 of 20 items were trained on" in headline({"perplexity": found}).lower()
    folder = make(tmp_path, "a", evaluation={"perplexity": found})
    made = report([folder])
    assert f"- Warning: {warning}." in markdown(made) and "10 of 20" in made.verdict
    assert json.loads(made.to_json())["runs"][0]["evaluation"]["perplexity"]["overlap"]["count"] == 10
    # A split by another seed holds out rows that were trained on.
    resplit = replace(
        target, recipe=recipe(tmp_path / "train.jsonl", "data.test_fraction=0.2", "run.seed=9"), trained=trained
    )
    assert overlap(resplit) == {"count": 6, "items": 6}


def test_inputs_count_as_trained_on_without_their_answers(target: Target, trained: Trained, tmp_path: Path) -> None:
    assert overlap(replace(target, trained=trained), ["Question 3?", "Question 30?", ""]) == {"count": 1, "items": 3}
    lines = [{"i": "Name a fruit.", "c": "", "r": "Pear."}, {"i": "Summarise.", "c": "A text.", "r": "Short."}]
    (tmp_path / "dolly.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    words = ["data.format={instruction: i, context: c, response: r}", "data.test_fraction=0"]
    dolly = load_recipe(["recipe=tiny", f"data.name={tmp_path}/dolly.jsonl", *UNSPLIT, *words])
    asked = ["Name a fruit.", "Summarise."]  # the second was trained on with a text to summarise
    assert overlap(replace(target, trained=Trained(dolly)), asked) == {"count": 1, "items": 2}


def test_every_turn_of_a_conversation_counts_as_trained_on(target: Target, tmp_path: Path) -> None:
    turns = ["Are you well?", "Very well.", "Since when?", "Since May."]
    roles = ["user", "assistant"] * 2
    talk = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": talk}) + "\n", encoding="utf-8")
    words = ["data.format.messages=messages", "data.chat_template=chatml", "data.test_fraction=0"]
    made = load_recipe(["recipe=tiny", f"data.name={tmp_path}/talk.jsonl", *UNSPLIT, *words])
    chatting = copy.deepcopy(target.tokenizer)
    use_template(chatting, "chatml")
    known = replace(target, tokenizer=chatting, trained=Trained(made))
    assert overlap(known, ["Since when? ", "Very well.", "How old are you?"]) == {"count": 2, "items": 3}


def test_what_is_not_known_is_said(target: Target, trained: Trained, tmp_path: Path) -> None:
    def why(known: Trained | None) -> str:
        found = overlap(replace(target, trained=known), ["Question 3?"])
        assert found is not None and found["count"] is None
        return str(found["why"])

    assert why(None) == "the training is not known"
    once = recipe(tmp_path / "train.jsonl", "data.test_fraction=0", "data.deduplicate=true")
    assert why(replace(trained, recipe=once)).startswith("the training mixed or deduplicated its data")
    rows(tmp_path / "train.jsonl", range(31))
    assert why(trained) == "the data of the training have changed since"
    (tmp_path / "train.jsonl").unlink()
    assert why(trained) == "the data of the training are not here any more"
    assert overlap(replace(target, trained=trained, result=None), ["Question 3?"]) is None


def test_a_report_repeats_what_training_counted(tmp_path: Path) -> None:
    counted = {"validation": 0, "test": 12}
    made = report([make(tmp_path, "a", held_out_overlap=counted), make(tmp_path, "b", "lora.r=2")])
    line = "a: 12 test samples were trained on, so its held-out losses are not those of unseen text."
    assert f"- Warning: {line}" in markdown(made) and "- Warning: b" not in markdown(made)
    assert json.loads(made.to_json())["runs"][0]["overlap"] == counted
