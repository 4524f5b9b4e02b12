"""`distft evaluate` as a user starts it: what it writes and where, on one process and on two, through a kill, and from mistakes."""

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

from distft.errors import Fault, LaunchError, RecipeError, RunFolderError
from distft.evaluation.checks import check
from distft.evaluation.settings import TaskName
from distft.evaluation.tasks import Request
from distft.offline import _records
from distft.recipe import load_recipe
from distft.run import RunFolder, read_lines, write_atomically
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
    from wandb.proto.wandb_internal_pb2 import Record

    file = max(folder.wandb.glob("offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime)
    found = {}
    for content in _records(file.read_bytes()):
        for item in Record.FromString(content).summary.update:
            found[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
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
    unparsed = found["imdb"]["unparsed"]["base"]
    assert len(unparsed["first"]) == min(5, unparsed["count"]) > 0
    matrix = found["imdb"]["confusion"]["logprob"]["adapter"]
    said = "; ".join(
        f"class {word}, said negative {row[0]}, said positive {row[1]}"
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
    distft(where, "evaluate", "runs/learned", *words)
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
        (["nowhere"], RunFolderError, "nowhere is no run folder"),
        (["model=tiny", "adapter=nowhere"], RunFolderError, "nowhere holds no adapter"),
        (["model=tiny"], LaunchError, r"of which text the perplexity is: data\.name="),
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
    with pytest.raises(RunFolderError, match="the run has not finished"):
        Request.of([str(tmp_path)])


def test_files_that_tasks_lack_are_told_all_at_once() -> None:
    words = ["evaluation.tasks=[mt_bench,alpaca,imdb,lm_eval]", "evaluation.alpaca.path=/nowhere.json", "evaluation.imdb.path=/no.csv",
             "evaluation.lm_eval.include_path=/none"]  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        check(load_recipe(words))
    assert [fault.key for fault in caught.value.faults] == [
        "evaluation.mt_bench.questions", "evaluation.alpaca.path", "evaluation.imdb.path", "evaluation.lm_eval.include_path",
    ]  # fmt: skip
    assert all(isinstance(fault, Fault) and fault.where == "command line" for fault in caught.value.faults[1:])


def test_a_judge_is_a_name_or_a_mapping_and_tasks_do_not_change_what_is_learned() -> None:
    from distft.record import _FREE_TO_CHANGE, _differences

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
