"""Benchmarks by lm-eval: the scores of its own command, and what differences mean."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlitedict import SqliteDict

from distft.config.evaluation import LmEval
from distft.errors import DataError
from distft.evaluation.tasks.lm_eval import documents, figures, load_benchmarks
from distft.runs.folder import RunFolder
from tests.evaluation.conftest import distft, environment

NAMES = ["sentiment", "sentiment_write"]


def words(tasks: Path) -> list[str]:
    asked = f"[{','.join(NAMES)}]"
    return [
        "evaluation.tasks=[lm_eval]",
        f"evaluation.lm_eval.tasks={asked}",
        f"evaluation.lm_eval.include_path={tasks}",
        "tracking.report_to=[]",
    ]


def own_command(model: Path, tasks: Path, output: Path) -> dict[str, dict[str, Any]]:
    """What lm-eval's own command finds for the model in a folder."""
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={model},dtype=float32",
        "--tasks",
        *NAMES,
        "--include_path",
        str(tasks),
        "--seed",
        "42",
        "--device",
        "cpu",
        "--batch_size",
        "8",
        "--output_path",
        str(output),
    ]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    (file,) = output.rglob("results_*.json")
    return dict(json.loads(file.read_text(encoding="utf-8"))["results"])


def scores(results: dict[str, dict[str, Any]]) -> dict[tuple[str, str], float]:
    return {
        (task, key): value
        for task, found in results.items()
        for key, value in found.items()
        if isinstance(value, float)
    }


def test_on_two_processes_the_adapter_scores_as_lm_evals_own_command_on_the_merged_model(
    run: RunFolder, tasks: Path, tmp_path: Path
) -> None:
    where = run.path.parents[1]
    distft(where, "evaluate", "runs/learned", "--nproc", "2", *words(tasks))
    found = json.loads(run.results.read_text(encoding="utf-8"))["lm_eval"]
    distft(where, "merge", "runs/learned")
    theirs = scores(own_command(run.merged, tasks, tmp_path / "theirs"))
    ours = scores(found["results"]["adapter"])
    assert {
        ("sentiment", "acc,none"),
        ("sentiment_first", "acc_norm,none"),
        ("sentiment_write", "exact_match,none"),
    } <= theirs.keys()
    for key in theirs:  # identical, except that processes sum standard errors in another order
        assert ours[key] == (pytest.approx(theirs[key], rel=1e-12) if "stderr" in key[1] else theirs[key])
    assert ours.keys() == theirs.keys()
    gained = found["figures"]["sentiment/acc"]
    assert gained["adapter"]["value"] == theirs["sentiment", "acc,none"] and gained["count"] == 40
    assert gained["verdict"] == "gain"  # it has learned this very task
    assert found["overlap"]["count"] == 0 and found["overlap"]["items"] >= 40
    for side in ("base", "adapter"):
        kept = [file.name for file in (run.evaluation / "lm_eval" / side).rglob("*.json*")]
        assert any(name.startswith("results_") for name in kept)
        assert sum(name.startswith("samples_") for name in kept) == 3

    # Its answers are kept: changed ones are what a second evaluation finds, on one process the share of the first.
    for file in (run.evaluation / "lm_eval" / "answers").glob("base-*.db"):
        with SqliteDict(str(file), autocommit=True) as answers:
            for key in list(answers):
                answers[key] = (-1.0, False) if isinstance(answers[key], tuple) else "positive"
    distft(where, "evaluate", "runs/learned", "--nproc", "2", *words(tasks))
    again = json.loads(run.results.read_text(encoding="utf-8"))["lm_eval"]["results"]
    assert again["base"]["sentiment"]["acc,none"] == 0.5  # all alike: the first choice, for every document
    assert again["base"]["sentiment_write"]["exact_match,none"] == 0.5
    assert scores(again["adapter"]) == ours


def test_on_a_quantised_base_it_scores_as_the_merged_model_within_a_standard_error(
    run: RunFolder, tasks: Path, tmp_path: Path
) -> None:
    where = run.path.parents[1]
    recipe = run.recipe.read_text(encoding="utf-8")
    assert "quantization: null" in recipe
    four = "quantization: {load_in_4bit: true, bnb_4bit_compute_dtype: float32}"
    run.recipe.write_text(recipe.replace("quantization: null", four), encoding="utf-8")
    distft(where, "evaluate", "runs/learned", *words(tasks))
    found = json.loads(run.results.read_text(encoding="utf-8"))["lm_eval"]
    assert json.loads(run.results.read_text(encoding="utf-8"))["lm_eval"]["settings"]["bits"] == 4
    distft(where, "merge", "runs/learned")
    theirs = own_command(run.merged, tasks, tmp_path / "theirs")
    for task, key in (("sentiment", "acc"), ("sentiment_first", "acc_norm"), ("sentiment_write", "exact_match")):
        ours, error = found["results"]["adapter"][task][f"{key},none"], theirs[task][f"{key}_stderr,none"]
        assert abs(ours - theirs[task][f"{key},none"]) <= error


def results(values: list[float], mean: float, error: float) -> dict[str, Any]:
    return {
        "results": {"arc": {"alias": "arc", "acc,none": mean, "acc_stderr,none": error, "sample_len": len(values)}},
        "higher_is_better": {"arc": {"acc": True}},
        "n-samples": {"arc": {"original": 400, "effective": len(values)}},
        "samples": {"arc": [{"doc_id": number, "filter": "none", "acc": value} for number, value in enumerate(values)]},
    }


def test_a_difference_is_taken_over_the_same_documents() -> None:
    base = [float(number % 2) for number in range(400)]
    adapter = [1.0 if number < 24 else value for number, value in enumerate(base)]  # 12 more are right, none is lost
    found = figures({"base": results(base, 0.5, 0.025), "adapter": results(adapter, 0.53, 0.025)})["arc/acc"]
    assert found["verdict"] == "gain"
    assert found["difference"]["value"] == pytest.approx(0.03)
    assert found["difference"]["low"] > 0 and found["base"]["high"] > found["adapter"]["low"]
    swapped = [1.0 - value if number < 24 else value for number, value in enumerate(base)]  # as many lost as won
    found = figures({"base": results(base, 0.5, 0.025), "adapter": results(swapped, 0.5, 0.025)})["arc/acc"]
    assert found["verdict"] == "inconclusive" and found["difference"]["low"] < 0 < found["difference"]["high"]


def test_a_figure_that_is_not_a_mean_over_documents_is_compared_by_its_errors() -> None:
    values = [0.0, 1.0] * 50
    found = figures({"base": results(values, 12.0, 1.0), "adapter": results(values, 13.0, 1.0)})["arc/acc"]
    assert found["difference"]["high"] - 1.0 == pytest.approx(1.959964 * 2**0.5, abs=1e-5)
    assert found["verdict"] == "inconclusive"


def test_a_document_is_compared_with_what_was_trained_by_its_longest_text() -> None:
    doc = {"question": "Is water wet?", "answer": "yes", "choices": ["yes", "no, it is not wet at all"], "label": 0}
    two = [{"doc_id": 0, "doc": doc, "filter": name} for name in ("strict", "flexible")]
    assert documents({"a": [*two, {"doc_id": 1, "doc": {"label": 3}}], "b": two}) == [
        "Is water wet?",
        "",
        "Is water wet?",
    ]


def test_an_unknown_task_is_reported(tasks: Path, tmp_path: Path) -> None:
    """Tasks are looked for in the folder and among lm-eval's own, those of a group of the folder as well."""
    folder = shutil.copytree(tasks, tmp_path / "tasks")
    (folder / "mixed.yaml").write_text("group: mixed\ntask: [sentiment_first, arc_easy]\n", encoding="utf-8")

    def load(*names: str) -> None:
        load_benchmarks(LmEval(tasks=list(names), include_path=str(folder)))

    load("sentiment", "sentiment_write")
    with pytest.raises(DataError, match=r"does not know sentimental \(did you mean sentiment\?\); .*include_path"):
        load("sentimental", "sentiment")
    for name in ("arc_easy", "mixed"):
        with pytest.raises(DataError, match=rf"{name} cannot be loaded: .*ai2_arc(?s:.*)documents come from the hub"):
            load(name)


def test_a_report_shows_groups_without_their_parts() -> None:
    from distft.reports.sections import evaluation_table

    def of(task: str) -> dict[str, Any]:
        return {"alias": task, "acc,none": 0.5, "acc_stderr,none": 0.1}

    base = {
        "results": {"mmlu": of("mmlu"), "mmlu_law": of("mmlu_law"), "arc": of("arc")},
        "group_subtasks": {"mmlu": ["mmlu_law"]},
        "higher_is_better": {},
        "n-samples": {"mmlu_law": {"effective": 7}, "arc": {"effective": 9}},
        "samples": {},
    }
    found = figures({"base": base})
    assert {name: (figure["count"], figure.get("detail", False)) for name, figure in found.items()} == {
        "mmlu/acc": (7, False),
        "mmlu_law/acc": (7, True),
        "arc/acc": (9, False),
    }
    shown = [row[1:6] for row in evaluation_table({"run": {"lm_eval": {"figures": found}}}).texts]
    interval = "0.500 [0.304, 0.696]"
    assert shown == [["mmlu: acc", "7", interval, "–", "–"], ["arc: acc", "9", interval, "–", "–"]]
