"""`distft evaluate` as a user runs it: its results, on one process and on two, after a kill and after a signal."""

from __future__ import annotations

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


def test_a_trained_model_improves_and_its_figures_reach_every_output(run: RunFolder) -> None:
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


def test_two_processes_get_the_results_of_one_in_the_same_order(run: RunFolder, learned: RunFolder) -> None:
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


def test_after_a_kill_nothing_is_scored_twice(run: RunFolder) -> None:
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


def test_an_adapter_is_evaluated_with_the_recipe_of_its_run(run: RunFolder) -> None:
    where = run.path.parents[1]
    words = ["evaluation.imdb.subset=20", "evaluation.tasks=[imdb]", LOGPROB, "tracking.report_to=[]"]
    distft(where, "evaluate", "model=tiny", "adapter=runs/learned/adapter", *words)
    beside = result(run)["imdb"]
    assert beside["settings"]["dtype"] == "float32" and beside["settings"]["bits"] == 16
    copied = where / "elsewhere"
    run.adapter.rename(copied)
    distft(
        where,
        "evaluate",
        "model=tiny",
        "adapter=elsewhere",
        "model.dtype=float32",
        "data.name=tiny_sentiment",
        "data.test_fraction=0.2",
        *words,
    )
    apart = result(RunFolder(where / "runs" / "evaluate-tiny-elsewhere"))["imdb"]
    assert apart["weights"] == beside["weights"]
    assert apart["figures"]["accuracy"]["adapter"] == beside["figures"]["accuracy"]["adapter"]


def test_replacing_a_result_is_reported_and_a_model_alone_has_a_report(tmp_path: Path) -> None:
    words = ["evaluate", "model=tiny", "data.name=tiny_sentiment", "evaluation.tasks=[imdb]", LOGPROB]
    assert "replaces" not in distft(tmp_path, *words, "evaluation.imdb.subset=20").stderr
    folder = RunFolder(tmp_path / "runs" / "evaluate-tiny")
    ended = distft(tmp_path, *words, "evaluation.imdb.subset=10")
    assert (
        "imdb: replaces an earlier result on 20 items by one on 10, with imdb.subset 20 → 10 "
        "(runs/evaluate-tiny/evaluation.json)" in ended.stderr
    )
    assert ended.stderr.rstrip().endswith("distft: results: runs/evaluate-tiny/evaluation.json")
    accuracy = result(folder)["imdb"]["figures"]["accuracy"]["base"]
    report = distft(tmp_path, "report", "runs/evaluate-tiny").stdout
    assert "evaluated: nothing was trained" in report
    assert f"{accuracy['value']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]" in report


def test_results_for_other_weights_are_set_aside_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path)
    records = {"imdb": {"weights": {"base": "a"}}, "alpaca": {"weights": {"base": "b"}}}
    write_atomically(folder.results, json.dumps(records))
    assert _known(folder, {"base": "b"}) == {"alpaca": records["alpaca"]}
    assert (
        f"imdb: {folder.results} has results for other weights, which are now in evaluation-old.json"
        in capsys.readouterr().err
    )
    assert json.loads((tmp_path / "evaluation-old.json").read_text(encoding="utf-8")) == {"imdb": records["imdb"]}


def test_a_replacement_names_the_settings_that_differ() -> None:
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


def test_after_a_signal_it_says_how_to_continue(run: RunFolder) -> None:
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
    listed = shown.split("Tasks (evaluation.tasks=")[1].partition("\nexamples:")[0].splitlines()[1:]
    assert [line.split()[0] for line in listed if line.strip()] == list(TaskName.__args__)
    assert all(len(line) <= 100 and len(line.split()) > 2 for line in listed if line.strip())


@pytest.mark.parametrize(
    "lora", ["lora.r=4", "lora=null"]
)  # without an adapter both models are loaded, one after the other
def test_perplexities_match_those_that_training_measures(lora: str, tmp_path: Path) -> None:
    distft(
        tmp_path,
        "train",
        "recipe=tiny_sentiment",
        "strategy=single",
        "quantization=null",
        "training.max_steps=4",
        lora,
        "evaluation.max_samples=20",
        "run.name=a",
        "tracking.report_to=[]",
    )
    folder = RunFolder(tmp_path / "runs" / "a")
    distft(tmp_path, "evaluate", "runs/a", "evaluation.tasks=[perplexity]")
    found, summary = result(folder)["perplexity"], folder.read_summary()
    for side, measured in (("base", "eval_before"), ("adapter", "eval_after")):
        assert found["figures"]["loss"][side]["value"] == pytest.approx(summary[measured]["loss"], rel=1e-4)
    assert found["samples"] == 20
