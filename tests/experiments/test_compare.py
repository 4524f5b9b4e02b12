"""`distft compare`: real runs of an experiment, one after the other, and their report."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from distft.config.schema import Format
from distft.errors import ExperimentError, RunFolderError
from distft.experiments.compare import Comparison
from distft.experiments.expand import load_experiment
from distft.models.digest import digest as weights_digest
from distft.runs.folder import RunFolder

EXPERIMENT = """
base: tiny
overrides:
  strategy: single
  evaluation.before_and_after: false
  training: {logging_steps: 1, eval_strategy: "no", save_strategy: "no"}
variants:
  four: {}
  full: {quantization: null}
  broken: {data.name: rows.jsonl, data.format.text: body, training.completion_only_loss: false}
budget: {steps: 3}
equal: [order, global_batch]
"""
COMPARE = [sys.executable, "-m", "distft.cli", "compare", "experiment=mine", "tracking.report_to=[]"]


def folder_with(where: Path) -> Path:
    path = where / "recipes" / "experiments" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(EXPERIMENT)
    return where


def call(where: Path, *more: str, limit_s: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMPARE, *more], cwd=where, capture_output=True, text=True, timeout=limit_s)


def test_one_that_fails_leaves_the_others_alone_and_is_made_up_for(tiny: Path, tmp_path: Path) -> None:
    done = call(folder_with(tmp_path))
    assert done.returncode == 1, done.stderr
    assert "1/3 mine-four: finished in" in done.stderr and "2/3 mine-full: finished in" in done.stderr
    fault = "the recipe has a fault: command line: data.name: there is no data file or folder rows.jsonl"
    assert f"3/3 mine-broken: failed (exit code 2): {fault}" in done.stderr
    report = json.loads((tmp_path / "runs" / "mine.json").read_text())
    assert [(run["name"], run["status"]) for run in report["runs"]] == [
        ("mine-four", "finished"),
        ("mine-full", "finished"),
        ("mine-broken", "failed"),
    ]
    digests = {
        RunFolder(tmp_path / "runs" / f"mine-{name}").read_summary()["weights_digest"] for name in ("four", "full")
    }
    assert digests == {weights_digest(str(tiny))}
    assert report["missing"] == {} and report["runs"][2]["cause"] == fault
    assert [(variant["name"], variant["finished"]) for variant in report["variants"]][2] == ("broken", 0)
    assert "broken has no finished run (failed)" in report["verdict"]
    row, *_ = [line for line in done.stdout.splitlines() if line.startswith("| mine-broken ")]
    assert "failed: the recipe has a fault: command line: data.name: " in row
    assert {each["what"]: each["equal"] for each in report["equality"] if each["declared"]} == {
        "order": True,
        "global_batch": True,
    }
    assert "| mine-four" in done.stdout and (tmp_path / "runs" / "mine.md").read_text() in done.stdout

    again = call(tmp_path)
    assert again.returncode == 2
    assert (
        "2 of 3 runs of mine exist already (mine-four, mine-full); --resume makes those that have not finished"
        in again.stderr
    )

    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"body": f"row {n} says {n * n}"}) + "\n" for n in range(200))
    )
    before = RunFolder(tmp_path / "runs" / "mine-four").summary.read_text()
    rest = call(tmp_path, "--resume", "--watch")
    assert rest.returncode == 0, rest.stderr
    assert "\x1b" not in rest.stdout + rest.stderr  # no terminal, no table: plain lines
    assert rest.stderr.count("had finished") == 2 and "3/3 mine-broken: finished in" in rest.stderr
    assert RunFolder(tmp_path / "runs" / "mine-four").summary.read_text() == before
    assert json.loads((tmp_path / "runs" / "mine.json").read_text())["missing"] == {}


def test_a_signal_stops_the_run_at_hand_and_resume_goes_on_with_it(tmp_path: Path) -> None:
    folder_with(tmp_path)
    # `broken` is left out by its own mistake; the others train long enough to be stopped in the middle.
    command = [*COMPARE, "training.logging_steps=1", "data.max_samples=null"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    run = RunFolder(tmp_path / "runs" / "mine-four")
    end = time.monotonic() + 120
    while not run.summary.exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "the same command with --resume makes the remaining runs" in said
    assert "2/3" not in said and not (tmp_path / "runs" / "mine-full").exists()
    rest = call(tmp_path, "data.max_samples=null", "--resume")
    assert "2/3 mine-full: finished in" in rest.stderr, rest.stderr
    assert run.read_summary()["status"] == "finished"
    assert not list((tmp_path / "runs").glob("mine-four-*"))


def finished(where: Path, *more: str) -> list[RunFolder]:
    """Folders of `four` and `full` as finished runs leave them, without having trained."""
    folders = []
    for run in load_experiment(["experiment=mine", "tracking.report_to=[]", *more], folder=where).runs[:2]:
        folders.append(RunFolder.claim(where / "runs", run.name, exact=True))
        folders[-1].recipe.write_text(run.recipe.to_yaml())
        folders[-1].write_summary({"status": "finished", "strategy": "single", "world_size": 1})
    return folders


def test_a_damaged_run_is_made_anew_beside_what_is_left_of_it(tmp_path: Path) -> None:
    four, _ = finished(folder_with(tmp_path))
    four.summary.write_text(torn := four.summary.read_text()[:80])
    (tmp_path / "runs" / "mine-four.damaged").mkdir()
    done = call(tmp_path, "--resume")
    assert (
        "mine-four runs again; its damaged folder is now runs/mine-four.damaged-2: "
        "runs/mine-four has no readable summary" in done.stderr
    )
    assert "1/3 mine-four: finished in" in done.stderr and "2/3 mine-full: had finished" in done.stderr, done.stderr
    assert (tmp_path / "runs" / "mine-four.damaged-2" / "summary.json").read_text() == torn
    report = json.loads((tmp_path / "runs" / "mine.json").read_text())
    assert [run["status"] for run in report["runs"]] == ["finished", "finished", "failed"]


def test_the_format_that_a_run_inferred_is_no_change_of_its_recipe(tmp_path: Path) -> None:
    words = ("data.name=rows.jsonl", f"run.dir={tmp_path / 'runs'}")
    experiment = load_experiment(["experiment=mine", *words], folder=folder_with(tmp_path))
    for folder, run in zip(finished(tmp_path, *words), experiment.runs, strict=False):
        changes = {"format": Format(instruction="a", response="b"), "chat_template": "tokenizer"}
        data = run.recipe.data.model_copy(update=changes)
        folder.recipe.write_text(run.recipe.model_copy(update={"data": data}).to_yaml())
    Comparison(experiment)._check_recipes()
    named = load_experiment(["experiment=mine", *words, "data.format.text=b"], folder=tmp_path)
    with pytest.raises(RunFolderError, match=r"data\.format\.instruction: was 'a', is now None"):
        Comparison(named)._check_recipes()


def test_runs_of_another_recipe_do_not_count_as_made(tmp_path: Path) -> None:
    folders = finished(folder_with(tmp_path))
    done = call(tmp_path, "--resume", "lora.r=4")
    assert done.returncode == 2 and "had finished" not in done.stderr
    assert "2 of 3 runs of mine were made with another recipe than today's:" in done.stderr
    assert "  lora.r: was 16, is now 4 (mine-four, mine-full)\nrun.dir=FOLDER starts a separate set" in done.stderr
    for folder in folders:  # one that would be made from its beginning in any case
        folder.write_summary({"status": "failed", "strategy": "single", "world_size": 1})
    Comparison(
        load_experiment(["experiment=mine", f"run.dir={tmp_path / 'runs'}", "lora.r=4"], folder=tmp_path)
    )._check_recipes()


@pytest.mark.parametrize(
    ("words", "offline", "lines"),
    [
        (["model.name=/no/such/model"], False, ["mine: there is no folder /no/such/model (model and tokenizer)"]),
        (["model.name=nobody/none"], False, []),
        (
            ["data.name=no.jsonl", "model.tokenizer=/no"],
            False,
            [
                "mine: there is no folder /no (tokenizer)",
                "mine: there is no data file or folder no.jsonl (data)",
            ],
        ),
        (
            ["model.name=nobody/none"],
            True,
            ["mine: the model and tokenizer nobody/none is not in the cache; on a machine"],
        ),
    ],
)
def test_what_every_run_lacks_is_told_once_before_the_first(
    words: list[str], offline: bool, lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    folder_with(tmp_path)
    comparison = Comparison(
        load_experiment(["experiment=mine", f"run.dir={tmp_path / 'runs'}", *words], folder=tmp_path)
    )
    if not lines:
        comparison._check_needs()  # one variant alone lacks its data, and the hub may have the model
        return
    with pytest.raises(ExperimentError) as caught:
        comparison.run(resume=False)
    told = str(caught.value).splitlines()[1:]
    assert [line.strip()[: len(expected)] for line, expected in zip(told, lines, strict=False)] == lines
    assert not (tmp_path / "runs").exists()


def test_out_of_memory_is_a_result_where_no_restart_is_allowed(tmp_path: Path) -> None:
    """Started again, the run would halve its micro-batch and be another one."""
    path = folder_with(tmp_path) / "recipes" / "experiments" / "mine.yaml"
    path.write_text(
        "base: tiny\noverrides: {run.max_restarts: 0}\n"
        "variants: {big: {}, none: {quantization: null}}\nbudget: {steps: 1}\n"
    )
    cause = (
        "OutOfMemory: out of memory on rank 0 with a micro-batch of 4 samples: 3.00 GiB were asked for, "
        "1.00 of the GPU's 8.00 GiB are free."
    )
    for run in load_experiment(["experiment=mine", "tracking.report_to=[]"], folder=tmp_path).runs:
        folder = RunFolder.claim(tmp_path / "runs", run.name, exact=True)
        folder.recipe.write_text(run.recipe.to_yaml())
        folder.write_summary({"status": "failed", "cause": cause, "strategy": "ddp", "world_size": 2})
    done = call(tmp_path, "--resume")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("had run out of memory, which is its result") == 2
    assert "2 runs of 2 variants, 0 finished, 2 out of memory." in done.stdout
    assert not (tmp_path / "runs" / "mine-logs").exists()
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("| mine-big ")]
    assert "| out of memory: on rank 0 with a micro-batch of 4 samples: 3.00… |" in row
    assert f"- `mine-big`: out of memory: {cause.removeprefix('OutOfMemory: out of memory ')}\n" in done.stdout
