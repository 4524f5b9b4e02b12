"""`distft evaluate` as a user starts it: what it writes and where, on one process and on two, through a kill, and from mistakes."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distft.config.evaluation import TaskName
from distft.config.recipe import load_recipe
from distft.errors import Fault, LaunchError, RecipeError, RunFolderError
from distft.evaluation import preflight
from distft.evaluation.preflight import check_inputs
from distft.evaluation.request import Request
from distft.evaluation.run import _known, replacement
from distft.files import read_lines, write_atomically
from distft.runs.folder import RunFolder
from distft.runs.wandb import logged_records
from tests.evaluation.conftest import distft, environment

LOGPROB = "evaluation.imdb.methods=[logprob]"


def result(folder: RunFolder) -> dict[str, Any]:
    return dict(json.loads(folder.results.read_text(encoding="utf-8")))


def values(folder: RunFolder) -> dict[tuple[str, str, str], float]:
    return {
        (task, name, side): figure[side]["value"]
        for task, found in result(folder).items()
        for name, figure in found["figures"].items()
        for side in ("base", "adapter", "difference")
    }


def logged_to_wandb(folder: RunFolder) -> dict[str, Any]:
    """The summary values in the newest file of the folder's offline W&B run."""
    file = max(folder.wandb.glob("offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime)
    found = {}
    for record in logged_records(file):
        found |= record.get("summary", {}).get("update", {})
    return found


def test_the_whole_chain_learns_and_every_place_has_its_figures(run: RunFolder) -> None:
    where = run.path.parents[1]
    ended = distft(where, "evaluate", "runs/learned")  # the recipe's own tasks: perplexity and imdb
    found = result(run)
    accuracy = found["imdb"]["figures"]["accuracy"]
    assert accuracy["adapter"]["low"] > accuracy["base"]["high"]  # more than the interval
    assert accuracy["verdict"] == "gain"
    assert "imdb: accuracy: base" in ended.stderr
    assert found["imdb"]["of_class"][0] == found["imdb"]["of_class"][1]
    perplexity = found["perplexity"]
    assert perplexity["figures"]["perplexity"]["verdict"] == "gain"
    assert perplexity["tokens"] == sum(
        record["tokens"] for record in read_lines(run.evaluation / "perplexity" / "base.jsonl")
    )
    for side in ("base", "adapter"):  # what counting the raw outputs gives
        records = read_lines(run.evaluation / "imdb" / f"logprob-{side}.jsonl")
        right = [record["log_likelihoods"][record["label"]] == max(record["log_likelihoods"]) for record in records]
        assert accuracy[side]["value"] == pytest.approx(sum(right) / len(right))
        records = read_lines(run.evaluation / "perplexity" / f"{side}.jsonl")
        loss = -sum(record["log_likelihood"] for record in records) / perplexity["tokens"]
        assert perplexity["figures"]["perplexity"][side]["value"] == pytest.approx(math.exp(loss))
    there = sum(found["imdb"]["of_class"])
    assert (
        f"imdb: {there} of 240 reviews, the same number of each class (evaluation.imdb.balanced=false takes all)"
        in ended.stderr
    )
    written = read_lines(run.evaluation / "imdb" / "generation-adapter.jsonl")
    matrix = [[0, 0, 0], [0, 0, 0]]
    for record in written:
        matrix[record["label"]][2 if record["read"] is None else record["read"]] += 1
    assert len(written) == there and matrix == found["imdb"]["confusion"]["generation"]["adapter"]
    labels = {record["row"]: record["label"] for record in read_lines(run.evaluation / "imdb" / "logprob-base.jsonl")}
    assert {record["row"]: record["label"] for record in written} == labels
    unparsed = found["imdb"]["unparsed"]["base"]
    assert len(unparsed["first"]) == min(5, unparsed["count"]) > 0
    matrix = found["imdb"]["confusion"]["logprob"]["adapter"]
    said = "; ".join(
        f"class {word}, predicted negative {row[0]}, predicted positive {row[1]}"
        for word, row in zip(("negative", "positive"), matrix, strict=True)
    )
    assert f"imdb: confusion matrix by likelihood: adapter: {said}" in ended.stderr
    assert f'imdb: answers without a label word: base: answers {unparsed["count"]}, "' in ended.stderr

    summary = run.read_summary()
    assert summary["status"] == "finished"
    for part in ("figures", "confusion", "unparsed"):
        assert summary["evaluation"]["imdb"][part] == found["imdb"][part]
    tracked = logged_to_wandb(run)
    assert tracked["evaluation/imdb/accuracy/adapter"] == pytest.approx(accuracy["adapter"]["value"])
    assert tracked["evaluation/imdb/accuracy/adapter_low"] == pytest.approx(accuracy["adapter"]["low"])
    identities = {path.name.rpartition("-")[2] for path in run.wandb.glob("offline-run-*")}
    assert identities == {json.loads(run.wandb_run.read_text(encoding="utf-8"))["id"]}  # one run of W&B's

    report = distft(where, "report", "runs/learned").stdout
    assert f"{accuracy['adapter']['value']:.3f} [{accuracy['adapter']['low']:.3f}" in report
    assert "IMDB accuracy" in report and "### imdb: confusion matrix by generation" in report
    assert report.splitlines()[2].startswith("**The fine-tune changed held-out perplexity ")
    distft(where, "report", "runs/learned", "--output", "page.html")
    page = (where / "page.html").read_text(encoding="utf-8")
    assert "What the fine-tune changed" in page and "Evaluation: imdb" in page


def test_two_processes_find_what_one_finds_in_the_same_order(run: RunFolder, learned: RunFolder) -> None:
    where = run.path.parents[1]
    words = [
        "evaluation.imdb.subset=30",
        "evaluation.max_samples=30",
        LOGPROB,
        "tracking.report_to=[]",
        "evaluation.batch_tokens=500",
    ]
    distft(where, "evaluate", "runs/learned", "--nproc", "2", *words)
    two, orders = values(run), [read_lines(file) for file in sorted(run.evaluation.glob("*/*.jsonl"))]
    assert result(run)["imdb"]["world_size"] == 2
    for file in run.evaluation.glob("*/*.jsonl"):
        file.unlink()
    distft(where, "evaluate", "runs/learned", *words)
    assert values(run) == pytest.approx(two, rel=1e-5, abs=1e-6)
    again = [read_lines(file) for file in sorted(run.evaluation.glob("*/*.jsonl"))]
    assert [[record["key"] for record in file] for file in again] == [
        [record["key"] for record in file] for file in orders
    ]
    assert len(orders) == 4


def test_killed_in_the_middle_it_goes_on_and_scores_nothing_twice(run: RunFolder) -> None:
    where = run.path.parents[1]
    words = [
        "evaluation.tasks=[imdb]",
        LOGPROB,
        "tracking.report_to=[]",
        "evaluation.batch_tokens=1",
    ]  # one review a batch
    command = [sys.executable, "-m", "distft.cli", "evaluate", "runs/learned", *words]
    child = subprocess.Popen(
        command, cwd=where, env=environment(), start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    part = run.evaluation / "imdb" / "logprob-base.rank0.jsonl"
    deadline = time.monotonic() + 300
    while not (part.is_file() and len(read_lines(part)) >= 5):
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()
        time.sleep(0.05)
    for line in subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True).stdout.split():
        os.kill(int(line), signal.SIGKILL)  # the worker; what has started it would start it again
    child.kill()
    child.communicate()
    known = read_lines(part)
    assert 5 <= len(known) < 200
    marked = [{**record, "log_likelihoods": [-1000.0, -2000.0 - number]} for number, record in enumerate(known)]
    torn = '{"key": "torn'
    write_atomically(part, "".join(json.dumps(record) + "\n" for record in marked) + torn)
    ended = distft(where, "evaluate", "runs/learned", *words)
    assert f"imdb, base, likelihoods: {len(marked)} of " in ended.stderr and "are already in runs/" in ended.stderr
    records = {record["key"]: record for record in read_lines(run.evaluation / "imdb" / "logprob-base.jsonl")}
    assert [records[record["key"]] for record in marked] == marked  # taken as they were, not scored again
    assert len(records) == result(run)["imdb"]["reviews"] > len(marked)
    assert not part.exists()
    before = (run.evaluation / "imdb" / "logprob-base.jsonl").stat().st_mtime_ns
    distft(where, "evaluate", "runs/learned", *words)  # all is known: nothing is written
    assert (run.evaluation / "imdb" / "logprob-base.jsonl").stat().st_mtime_ns == before


def test_a_model_and_an_adapter_are_evaluated_as_the_adapters_run_was_trained(run: RunFolder) -> None:
    where = run.path.parents[1]
    words = ["evaluation.imdb.subset=20", "evaluation.tasks=[imdb]", LOGPROB, "tracking.report_to=[]"]
    distft(where, "evaluate", "model=tiny", "adapter=runs/learned/adapter", *words)
    beside = result(run)["imdb"]
    assert beside["settings"]["dtype"] == "float32" and beside["settings"]["bits"] == 16
    copied = where / "elsewhere"
    run.adapter.rename(copied)
    distft(
        where, "evaluate", "model=tiny", "adapter=elsewhere", "model.dtype=float32", "data.name=tiny_sentiment",
        "data.test_fraction=0.2", *words,
    )  # fmt: skip
    apart = result(RunFolder(where / "runs" / "evaluate-tiny-elsewhere"))["imdb"]
    assert apart["weights"] == beside["weights"]
    assert apart["figures"]["accuracy"]["adapter"] == beside["figures"]["accuracy"]["adapter"]


def test_a_trial_that_replaces_a_result_says_so_and_a_model_alone_can_be_reported(tmp_path: Path) -> None:
    words = ["evaluate", "model=tiny", "data.name=tiny_sentiment", "evaluation.tasks=[imdb]", LOGPROB]
    assert "replaces" not in distft(tmp_path, *words, "evaluation.imdb.subset=20").stderr
    folder = RunFolder(tmp_path / "runs" / "evaluate-tiny")
    ended = distft(tmp_path, *words, "evaluation.imdb.subset=10")
    assert (
        "imdb: replaces an earlier result on 20 items by one on 10, with imdb.subset 20 → 10 (runs/evaluate-tiny/evaluation.json)"
        in ended.stderr
    )
    assert ended.stderr.rstrip().endswith("distft: results: runs/evaluate-tiny/evaluation.json")
    accuracy = result(folder)["imdb"]["figures"]["accuracy"]["base"]
    report = distft(tmp_path, "report", "runs/evaluate-tiny").stdout
    assert "evaluated: nothing was trained here" in report
    assert f"{accuracy['value']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]" in report


def test_results_of_other_weights_are_not_left_out_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path)
    records = {"imdb": {"weights": {"base": "a"}}, "alpaca": {"weights": {"base": "b"}}}
    write_atomically(folder.results, json.dumps(records))
    assert _known(folder, {"base": "b"}) == {"alpaca": records["alpaca"]}
    assert f"imdb: {folder.results} has results for other weights, which are dropped now" in capsys.readouterr().err


def test_what_replaces_a_result_is_named_by_what_differs() -> None:
    def of(count: int, **settings: Any) -> dict[str, Any]:
        figure = {"count": count}
        return {
            "settings": {"packages": {"torch": "1"}, **settings},
            "figures": {"a/acc": figure, "a/f1": figure, "b/acc": figure},
        }

    before = of(20, seed=1, judge={"model": "a", "mode": "absolute"})
    assert replacement(None, before) is None and replacement(before, before) is None
    newer = of(20, seed=1, judge={"model": "a", "mode": "absolute"}, packages={"torch": "2"})
    assert replacement(before, newer) is None
    now = of(5, seed=1, judge={"model": "a", "mode": "pairwise"})
    assert (
        replacement(before, now)
        == 'replaces an earlier result on 40 items by one on 10, with judge.mode "absolute" → "pairwise"'
    )


def test_stopped_by_a_signal_it_says_that_the_same_command_goes_on(run: RunFolder) -> None:
    words = ["evaluation.tasks=[imdb]", LOGPROB, "tracking.report_to=[]", "evaluation.batch_tokens=1"]
    command = [sys.executable, "-m", "distft.evaluation", "runs/learned", *words]
    child = subprocess.Popen(command, cwd=run.path.parents[1], env=environment(), stderr=subprocess.PIPE, text=True)
    part = run.evaluation / "imdb" / "logprob-base.rank0.jsonl"
    deadline = time.monotonic() + 300
    while not (part.is_file() and read_lines(part)):
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 75
    assert "stopped by SIGINT (finished items are kept; run the same command to continue)" in said


def test_the_help_lists_the_tasks(tmp_path: Path) -> None:
    shown = distft(tmp_path, "evaluate", "--help").stdout
    listed = shown.split("tasks (evaluation.tasks=")[1].splitlines()[1:]
    assert [line.split()[0] for line in listed if line.strip()] == list(TaskName.__args__)
    assert all(len(line) <= 100 and len(line.split()) > 2 for line in listed if line.strip())


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ([], LaunchError, "say what to evaluate: a run folder"),
        (["adapter=x"], LaunchError, "say what to evaluate"),
        (["nowhere"], RunFolderError, "run folder nowhere does not exist"),
        (["model=tiny", "adapter=nowhere"], RunFolderError, "nowhere is not an adapter folder"),
        (["model=tiny"], RecipeError, r"data\.name: is required: which text should perplexity be measured on\? \(data\.name=FILE"),
        (["model=/no/such/model"], RecipeError, r"2 faults(?s:.*)data\.name(?s:.*)model\.name: there is no folder /no/such/model"),
        (["model=tiny", "data.name=tiny", "data.test_fraction=0"], RecipeError, r"holds out no rows"),
        (["model=tiny", "evaluation.tasks=[imbd]"], RecipeError, r"evaluation\.tasks\.0: expected 'perplexity'"),
        (["model=tiny", "evaluation.judge.modell=x"], RecipeError, r"evaluation\.judge\.modell: unknown key"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_before_anything_is_loaded(
    words: list[str], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        Request.of(words)


def test_an_unfinished_run_has_nothing_to_evaluate(learned: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(learned.recipe.read_text(encoding="utf-8"), encoding="utf-8")
    with (
        pytest.raises(RunFolderError, match="the run has not finished; wait for it"),
        (tmp_path / ".lock").open("w") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        Request.of([str(tmp_path)])
    started = {"command": ["train.py", "recipe=a", "run.name=b"], "working_folder": str(Path.cwd())}
    (tmp_path / "environment.json").write_text(json.dumps(started), encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"has not finished; resume it with distft train recipe=a run\.name=b"):
        Request.of([str(tmp_path)])
    with pytest.raises(RunFolderError, match=f"did you mean {tmp_path}"):
        Request.of([str(tmp_path.with_name(f"{tmp_path.name}s"))])


def test_files_that_tasks_lack_are_told_all_at_once() -> None:
    words = ["evaluation.tasks=[mt_bench,alpaca,imdb,lm_eval]", "evaluation.alpaca.path=/nowhere.json", "evaluation.imdb.path=/no.csv",
             "evaluation.lm_eval.include_path=/none"]  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        check_inputs(load_recipe(words))
    assert [fault.key for fault in caught.value.faults] == [
        "evaluation.mt_bench.questions", "evaluation.alpaca.path", "evaluation.imdb.path", "evaluation.lm_eval.include_path",
    ]  # fmt: skip
    assert all(isinstance(fault, Fault) and fault.where == "command line" for fault in caught.value.faults[1:])


def test_all_that_tasks_lack_is_told_at_once_before_a_process_is_started(tmp_path: Path) -> None:
    (tmp_path / "pairs.json").write_text('[{"question": "a"}]')
    (tmp_path / "questions.jsonl").write_text('{"question_id": 1, "category": "math"}\n')
    (tmp_path / "rows.csv").write_text("text,label\nGood,positive\n")
    (tmp_path / "rubric.txt").write_text("Score 1: bad\n")
    words = [
        "model=tiny", "data.name=tiny_sentiment", "evaluation.tasks=[perplexity,imdb,lm_eval,alpaca,mt_bench]", "evaluation.judge=./judge",
        "evaluation.alpaca.path=pairs.json", "evaluation.mt_bench.questions=questions.jsonl", "evaluation.imdb.path=rows.csv",
        "evaluation.lm_eval.tasks=[arc_eazy]", "evaluation.judge.rubric=rubric.txt", "evaluation.imdb.subst=20",
    ]  # fmt: skip
    said = distft(tmp_path, "evaluate", *words, code=2).stderr
    assert "the recipe has 7 faults:" in said
    for line in (
        "evaluation.imdb.subst: unknown key (did you mean subset?)",
        "evaluation.mt_bench.questions: questions.jsonl, line 1 lacks turns",
        "evaluation.alpaca.path: pairs.json, entry 1: AlpacaEval's format needs",
        "evaluation.imdb.path: row 0 of rows.csv has 'positive' in column label, which must hold class numbers: 0 for 'negative', 1 for",
        "evaluation.lm_eval.tasks: lm-eval does not know arc_eazy (did you mean arc_easy?)",
        "evaluation.judge.rubric: the rubric rubric.txt lacks Score 2:",
        "evaluation.judge.model: there is no folder ./judge",
    ):
        assert f"command line: {line}" in said
    assert "distft: perplexity: " not in said and not (tmp_path / "runs").exists()


def test_what_is_not_in_the_cache_is_a_fault_where_the_hub_is_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    (tmp_path / "pairs.json").write_text('[{"instruction": "a", "output": "b"}]')
    recipe = load_recipe(["evaluation.tasks=[alpaca]", f"evaluation.alpaca.path={tmp_path / 'pairs.json'}", "evaluation.judge=no/judge",
                          "model.name=no/base"])  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (judge,), (base,) = preflight.faults(recipe), preflight.base_faults(recipe)
    assert judge.key == "evaluation.judge.model" and "no/judge (the judge) is not in the cache" in judge.problem
    assert base.key == "model.name" and "no/base is not in the cache" in base.problem
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert preflight.faults(recipe) == preflight.base_faults(recipe) == []


def test_columns_of_the_text_are_looked_at_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"body": "some text"}\n' * 20)
    words = [
        "model=tiny",
        f"data.name={tmp_path / 'text.jsonl'}",
        "data.format.text=text",
        "training.completion_only_loss=false",
    ]
    with pytest.raises(RecipeError, match=r"has no column text; it has body \(name yours: data.format.text=COLUMN"):
        Request.of(words)


def test_a_judge_is_a_name_or_a_mapping_and_tasks_do_not_change_what_is_learned() -> None:
    from distft.runs.record import _FREE_TO_CHANGE, _differences

    named = load_recipe(["evaluation.judge=prometheus-eval/prometheus-7b-v2.0", "evaluation.tasks=[mt_bench]"])
    mapped = load_recipe(["evaluation.judge={model: a/b, endpoint: 'http://127.0.0.1:8000/v1'}"])
    assert named.evaluation.judge.model == "prometheus-eval/prometheus-7b-v2.0"
    assert mapped.evaluation.judge.endpoint == "http://127.0.0.1:8000/v1"
    assert "evaluation." in _FREE_TO_CHANGE
    assert not list(_differences(load_recipe([]).model_dump(), named.model_dump()))


@pytest.mark.parametrize(
    "lora", ["lora.r=4", "lora=null"]
)  # without an adapter both models are loaded, one after the other
def test_perplexities_are_those_that_training_measured_before_and_after(lora: str, tmp_path: Path) -> None:
    distft(tmp_path, "train", "recipe=tiny_sentiment", "strategy=single", "quantization=null", "training.max_steps=4", lora,
           "evaluation.max_samples=20", "run.name=a", "tracking.report_to=[]")  # fmt: skip
    folder = RunFolder(tmp_path / "runs" / "a")
    distft(tmp_path, "evaluate", "runs/a", "evaluation.tasks=[perplexity]")
    found, summary = result(folder)["perplexity"], folder.read_summary()
    for side, measured in (("base", "eval_before"), ("adapter", "eval_after")):
        assert found["figures"]["loss"][side]["value"] == pytest.approx(summary[measured]["loss"], rel=1e-4)
    assert found["samples"] == 20
