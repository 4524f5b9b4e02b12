"""Everything that an evaluation lacks is found at once, before any model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from distft.config.recipe import load_recipe
from distft.errors import Fault, RecipeError
from distft.evaluation import preflight
from tests.evaluation.conftest import distft


def test_all_missing_files_are_reported_at_once() -> None:
    words = [
        "evaluation.tasks=[mt_bench,alpaca,imdb,lm_eval]",
        "evaluation.alpaca.path=/nowhere.json",
        "evaluation.imdb.path=/no.csv",
        "evaluation.lm_eval.include_path=/none",
    ]
    with pytest.raises(RecipeError) as caught:
        preflight.check_inputs(load_recipe(words))
    assert [fault.key for fault in caught.value.faults] == [
        "evaluation.mt_bench.questions",
        "evaluation.alpaca.path",
        "evaluation.imdb.path",
        "evaluation.lm_eval.include_path",
    ]
    assert all(isinstance(fault, Fault) and fault.where == "command line" for fault in caught.value.faults[1:])


def test_all_mistakes_are_reported_at_once_before_a_process_is_started(tmp_path: Path) -> None:
    (tmp_path / "pairs.json").write_text('[{"question": "a"}]')
    (tmp_path / "questions.jsonl").write_text('{"question_id": 1, "category": "math"}\n')
    (tmp_path / "rows.csv").write_text("text,label\nGood,positive\n")
    (tmp_path / "rubric.txt").write_text("Score 1: bad\n")
    words = [
        "model=tiny",
        "data.name=tiny_sentiment",
        "evaluation.tasks=[perplexity,imdb,lm_eval,alpaca,mt_bench]",
        "evaluation.judge=./judge",
        "evaluation.alpaca.path=pairs.json",
        "evaluation.mt_bench.questions=questions.jsonl",
        "evaluation.imdb.path=rows.csv",
        "evaluation.lm_eval.tasks=[arc_eazy]",
        "evaluation.judge.rubric=rubric.txt",
        "evaluation.imdb.subst=20",
    ]
    said = distft(tmp_path, "evaluate", *words, code=2).stderr
    assert "the recipe has 7 faults:" in said
    for line in (
        "evaluation.imdb.subst: unknown key (did you mean subset?)",
        "evaluation.mt_bench.questions: questions.jsonl, line 1 lacks turns",
        "evaluation.alpaca.path: pairs.json, entry 1: AlpacaEval's format needs",
        "evaluation.imdb.path: row 0 of rows.csv has 'positive' in column label, which must hold class numbers: "
        "0 for 'negative', 1 for",
        "evaluation.lm_eval.tasks: lm-eval does not know arc_eazy (did you mean arc_easy?)",
        "evaluation.judge.rubric: the rubric rubric.txt lacks Score 2:",
        "evaluation.judge.model: there is no folder ./judge",
    ):
        assert f"command line: {line}" in said
    assert "distft: perplexity: " not in said and not (tmp_path / "runs").exists()


def test_what_is_not_in_the_cache_is_a_fault_if_the_hub_is_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    (tmp_path / "pairs.json").write_text('[{"instruction": "a", "output": "b"}]')
    words = [
        "evaluation.tasks=[alpaca]",
        f"evaluation.alpaca.path={tmp_path / 'pairs.json'}",
        "evaluation.judge=no/judge",
        "model.name=no/base",
    ]
    recipe = load_recipe(words)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (judge,), (base,) = preflight.faults(recipe), preflight.base_faults(recipe)
    assert judge.key == "evaluation.judge.model" and "no/judge (the judge) is not in the cache" in judge.problem
    assert base.key == "model.name" and "no/base is not in the cache" in base.problem
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert preflight.faults(recipe) == preflight.base_faults(recipe) == []
