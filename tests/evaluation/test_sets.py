"""Results on another data file do not replace the first ones, and only what was measured alike is compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from distft.config.recipe import load_recipe
from distft.data.toy import reviews
from distft.evaluation.run import replacement, set_of
from distft.evaluation.sets import DataOf, asked, key_of_set
from distft.evaluation.summary import headline
from distft.experiments.expand import load_experiment
from distft.experiments.results import tasks_left
from distft.reports.evaluation_charts import evaluation_charts
from distft.reports.report import report
from distft.runs.folder import RunFolder
from tests.evaluation.conftest import distft
from tests.reports.conftest import make

OWN, OTHER, THIRD = DataOf("own", "/a/own.jsonl"), DataOf("rows", "/b/rows.jsonl"), DataOf("rows", "/c/rows.jsonl")


def test_a_set_is_named_after_its_data() -> None:
    found: dict[str, Any] = {}

    def add(data: DataOf, own: DataOf | None = OWN, name: str | None = None) -> str:
        key = key_of_set("imdb", data, own, name, found)
        found[key] = {"data": {"name": data.name, "place": data.place}}
        return key

    assert [add(OWN), add(OTHER), add(THIRD), add(OTHER), add(OWN)] == [
        "imdb",
        "imdb@rows",
        "imdb@rows-2",
        "imdb@rows",
        "imdb",
    ]
    assert add(THIRD, name="mine") == "imdb@mine"
    found.clear()  # the training is not known: the first data are its own
    assert [add(OTHER, None), add(THIRD, None), add(OTHER, None)] == ["imdb", "imdb@rows", "imdb"]
    found.clear()
    found["imdb"] = {"figures": {}}  # of before: on which data is not known
    assert add(OTHER, None) == "imdb@rows" and add(OWN) == "imdb"


def test_what_a_task_measures_on(tmp_path: Path) -> None:
    run = load_recipe(["recipe=tiny_sentiment", "evaluation.alpaca.path=a/pairs.json"])

    def key(task: Any, *words: str) -> str:
        return set_of(
            task, load_recipe(["recipe=tiny_sentiment", "evaluation.alpaca.path=a/pairs.json", *words]), run, {}
        )

    for task in ("perplexity", "imdb", "alpaca", "lm_eval", "mt_bench"):
        assert key(task) == key(task, "evaluation.max_samples=7", "evaluation.seed=3") == task
        assert key(task, "evaluation.name=mine") == f"{task}@mine"
    assert key("perplexity", f"data.test_path={tmp_path}/x y.jsonl") == "perplexity@x-y"
    assert key("imdb", f"evaluation.imdb.path={tmp_path}/films.csv") == "imdb@films"
    assert key("alpaca", "evaluation.alpaca.path=b/pairs.json") == "alpaca@pairs"
    # The run's recipe names no data for these, so the first become its own.
    assert key("mt_bench", "evaluation.mt_bench.questions=q.jsonl") == "mt_bench"
    benchmarks = "evaluation.lm_eval.tasks=[arc_easy,gsm8k]"
    assert key("lm_eval", benchmarks) == "lm_eval"
    first: dict[str, Any] = {"lm_eval": {"data": {"name": "gsm8k", "place": "['gsm8k'] None"}}}
    assert set_of("lm_eval", load_recipe(["recipe=tiny", benchmarks]), run, first) == "lm_eval@arc_easy+gsm8k"
    assert len(key("imdb", f"evaluation.imdb.path=/{'long/' * 9}{'name' * 60}.csv")) == len("imdb@") + 60


def test_a_second_file_of_the_same_name_keeps_the_first_results(tmp_path: Path) -> None:
    for number, place in enumerate(("a", "b")):
        (tmp_path / place).mkdir()
        lines = [json.dumps(row) for row in reviews(12, seed=number)]
        (tmp_path / place / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = ["evaluate", "model=tiny", "evaluation.tasks=[imdb]", "evaluation.imdb.methods=[logprob]"]
    distft(tmp_path, *words, "evaluation.imdb.path=a/rows.jsonl")
    folder = RunFolder(tmp_path / "runs" / "evaluate-tiny")
    first = json.loads(folder.results.read_text(encoding="utf-8"))["imdb"]
    ended = distft(tmp_path, *words, "evaluation.imdb.path=b/rows.jsonl")
    assert "replaces" not in ended.stderr and "imdb@rows: accuracy: base" in ended.stderr
    found = json.loads(folder.results.read_text(encoding="utf-8"))
    assert found["imdb"] == first and list(found) == ["imdb", "imdb@rows"]
    assert found["imdb@rows"]["data"]["place"] == str(tmp_path / "b" / "rows.jsonl")
    assert (folder.evaluation / "imdb@rows" / "logprob-base.jsonl").is_file()
    made = report([folder])
    assert list(made.runs[0].evaluation) == ["imdb", "imdb@rows"]
    assert made.runs[0].figures["imdb_accuracy"] == first["figures"]["accuracy"]["base"]["value"]
    assert {chart.key for chart in evaluation_charts(made.evaluations)} == {"evaluation_imdb", "evaluation_imdb_rows"}


def test_a_file_whose_content_changed_replaces_the_result_with_a_message() -> None:
    def of(digest: str | None) -> dict[str, Any]:
        return {
            "settings": {"seed": 1},
            "figures": {"a": {"count": 5}},
            "data": {"place": "/f"},
            "items_digest": digest,
        }

    assert replacement(of("x"), of("x")) is None and replacement(of(None), of("x")) is None
    line = "replaces an earlier result on 5 items by one on 5, with data /f (x) → /f (y)"
    assert replacement(of("x"), of("y")) == line


def figure(value: float) -> dict[str, Any]:
    sides = {
        side: {"value": value, "low": value - 0.1, "high": value + 0.1} for side in ("base", "adapter", "difference")
    }
    return {"title": "accuracy", "form": ".3f", "better": "higher", "count": 50, "verdict": "gain", **sides}


def result(digest: str | None = None, **parts: Any) -> dict[str, Any]:
    return {"figures": {"accuracy": figure(0.5)}, "items_digest": digest, **parts}


def test_the_headline_names_the_set() -> None:
    text = headline({"imdb": result(), "imdb@films": result()})
    assert "imdb accuracy 0.500 → 0.500 (gain); imdb accuracy on films 0.500 → 0.500 (gain)" in text


@pytest.mark.parametrize(
    ("one", "other", "why"),
    [
        (result("x"), result("y"), "its runs were evaluated with different items"),
        (
            result("x", judge={"model": "a"}),
            result("x", judge={"model": "b"}),
            "its runs were evaluated with different judges",
        ),
        (result("x"), result("x"), None),
        (result(None), result("x"), None),  # of before
    ],
)
def test_figures_on_different_items_are_not_compared(
    one: dict[str, Any], other: dict[str, Any], why: str | None, tmp_path: Path
) -> None:
    folders = [
        make(tmp_path, name, f"lora.r={rank}", evaluation={"imdb": found})
        for name, rank, found in (("a", 2, one), ("b", 4, other))
    ]
    (item,) = [item for item in report(folders).comparisons if item.figure == "imdb_accuracy"]
    assert (item.verdict, item.why) == ("not compared", why) if why else item.verdict == "equal" or item.ratio == 1.0


def test_an_experiment_evaluates_again_if_its_settings_have_changed(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["tiny", "tiny_sentiment", "evaluation.tasks=[imdb]", f"run.dir={tmp_path}"]
    run = load_experiment(words).runs[0]
    made = make(tmp_path, "made")
    shutil.move(made.path, tmp_path / run.name)
    folder = RunFolder(tmp_path / run.name)
    for found, left in (
        ({"asked": asked("imdb", run.recipe)}, []),
        ({}, []),  # of before
        ({"asked": "other"}, ["imdb"]),
    ):
        folder.write_summary({**folder.read_summary(), "evaluation": {"imdb": {"figures": {}, **found}}})
        assert tasks_left(run) == left
    changed = load_experiment([*words, "evaluation.imdb.subset=7"]).runs[0]
    assert (
        asked("imdb", changed.recipe)
        != asked("imdb", run.recipe)
        == asked("imdb", load_experiment(words).runs[1].recipe)
    )
