"""`distft compare` evaluates every run whose experiment names tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distft.errors import ExperimentError, RecipeError
from distft.experiments.compare import Comparison
from distft.experiments.expand import load_experiment
from distft.runs.folder import RunFolder
from tests.evaluation.conftest import distft

EXPERIMENT = """\
base: tiny_sentiment
overrides:
  strategy: single
  quantization: null
  tracking.report_to: []
  evaluation: {before_and_after: false, tasks: [imdb], imdb: {subset: 6, methods: [logprob]}}
variants:
  small: {lora.r: 4}
  large: {lora.r: 16}
budget: {steps: 2}
"""


def write(where: Path, text: str = EXPERIMENT) -> None:
    file = where / "recipes" / "experiments" / "ranks.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def test_every_run_of_an_experiment_is_evaluated_and_the_report_has_the_columns(tmp_path: Path) -> None:
    write(tmp_path)
    ended = distft(tmp_path, "compare", "experiment=ranks")
    assert ended.stderr.count("evaluates imdb") == ended.stderr.count("evaluated in") == 2
    runs = [RunFolder(tmp_path / "runs" / f"ranks-{name}") for name in ("small", "large")]
    accuracies = [run.read_summary()["evaluation"]["imdb"]["figures"]["accuracy"]["adapter"]["value"] for run in runs]
    report = json.loads((tmp_path / "runs" / "ranks.json").read_text(encoding="utf-8"))
    assert [run["figures"]["imdb_accuracy"] for run in report["runs"]] == accuracies
    assert "IMDB accuracy" in ended.stdout and "## What the fine-tune changed" in ended.stdout
    assert json.loads(runs[0].results.read_text(encoding="utf-8"))["imdb"]["reviews"] == 6

    summary = runs[1].read_summary()
    runs[1].write_summary(summary | {"evaluation": None})  # as if it had been stopped before
    ended = distft(tmp_path, "compare", "experiment=ranks", "--resume")
    assert ended.stderr.count("had finished") == 2 and ended.stderr.count("evaluates imdb") == 1
    assert runs[1].read_summary()["evaluation"] == summary["evaluation"]


def test_missing_inputs_of_an_evaluation_are_reported_before_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, EXPERIMENT.replace("tasks: [imdb]", "tasks: [mt_bench]"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"evaluation\.mt_bench\.questions: is required"):
        Comparison(load_experiment(["experiment=ranks"])).run(resume=False)
    assert not (tmp_path / "runs").exists()


def test_unusable_files_of_a_judge_are_reported_before_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        tmp_path,
        EXPERIMENT.replace(
            "tasks: [imdb]", "tasks: [alpaca], alpaca: {path: pairs.json}, judge: {endpoint: 'http://127.0.0.1:9/v1'}"
        ),
    )
    (tmp_path / "pairs.json").write_text('[{"instruction": "One"}]')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ExperimentError,
        match=r"2 faults:\n.*pairs\.json, entry 1(?s:.*)judge\.endpoint: no server answers at http://127",
    ):
        Comparison(load_experiment(["experiment=ranks"])).run(resume=False)
    assert not (tmp_path / "runs").exists()


def test_the_shipped_experiments_have_the_evaluations_of_their_reports() -> None:
    tasks = {
        name: {tuple(run.recipe.evaluation.tasks) for run in load_experiment([f"experiment={name}"]).runs}
        for name in ("rank", "duel", "ablation")
    }
    assert tasks == {
        "rank": {("perplexity", "lm_eval", "mt_bench", "alpaca")},
        "duel": {("imdb",)},
        "ablation": {("imdb",)},
    }
    (first, *_) = load_experiment(["experiment=rank"]).runs
    assert first.recipe.evaluation.lm_eval.tasks == ["mmlu", "arc_easy", "arc_challenge", "gsm8k"]
