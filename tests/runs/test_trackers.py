"""What W&B gets: one row per optimizer step, however often a run is started, and what its environment variables say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distft.config.recipe import load_recipe
from distft.config.schema import Tracking
from distft.distributed.world import World
from distft.runs.folder import RunFolder
from distft.runs.trackers import trackers
from distft.runs.wandb import log_evaluation, logged_records, run_identity, tracking_of

# A start of a run that logs steps FIRST to LAST as the trainer does, with an evaluation after every second step, and is
# killed after the last one if told so. `metrics.jsonl` has the steps that earlier starts made.
START = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from transformers import TrainerControl, TrainerState
from distft.config.recipe import load_recipe
from distft.distributed.world import World
from distft.runs.folder import RunFolder
from distft.runs.trackers import trackers
from distft.runs.wandb import closing_wandb

folder, first, last, killed = RunFolder(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:] == ["kill"]
with closing_wandb():
    (tracker,) = trackers(load_recipe(["recipe=tiny"]), folder, World())
    arguments = SimpleNamespace(to_dict=dict, run_name=None, output_dir="checkpoints")
    state, control = TrainerState(global_step=first - 1, is_world_process_zero=True), TrainerControl()
    tracker.on_train_begin(arguments, state, control, model=SimpleNamespace(num_parameters=lambda: 1))
    for state.global_step in range(first, last + 1):
        loss = state.global_step + first / 100
        folder.append_metrics({"step": state.global_step, "loss": loss})
        tracker.on_log(arguments, state, control, logs={"loss": loss})
        if state.global_step % 2 == 0:
            tracker.on_log(arguments, state, control, logs={"eval_loss": 9.0})
    if killed:
        time.sleep(3)  # W&B writes its file once a second
        os._exit(1)
"""


def history(folder: RunFolder) -> list[tuple[int, int, float, bool]]:
    """`_step`, the optimizer step, the loss, and whether there is an evaluation, of every row of every start."""
    files = sorted(folder.wandb.glob("offline-run-*/run-*.wandb"))
    records = [record for file in files for record in logged_records(file) if record["type"] == "history"]
    items = [record["history"]["item"] for record in records]
    return [(row["_step"], row["train/global_step"], row["train/loss"], "eval/loss" in row) for row in items]


def test_a_killed_and_resumed_run_is_one_history_offline(tmp_path: Path) -> None:
    """Killed after step 6, whose row W&B did not write; resumed from step 4."""
    folder = RunFolder(tmp_path)
    environment = os.environ | {"WANDB_MODE": "offline"}
    for words in (("1", "6", "kill"), ("5", "8")):
        command = [sys.executable, "-c", START, str(tmp_path), *words]
        folder.keep_metrics(int(words[0]) - 1)
        ended = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert ended.returncode == (1 if "kill" in words else 0), ended.stderr[-2000:]
    rows = history(folder)
    assert [row[:2] for row in rows] == [(step, step) for step in range(1, 9)]
    assert [row[2] for row in rows] == [1.01, 2.01, 3.01, 4.01, 5.01, 6.05, 7.05, 8.05]
    assert [row[3] for row in rows] == [False, True] * 4
    assert json.loads(folder.wandb_run.read_text())["project"] == "distft"


def tracking(monkeypatch: pytest.MonkeyPatch, *words: str, **variables: str) -> Tracking:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return tracking_of(load_recipe(["recipe=tiny", *words]))


def test_variables_of_wandb_are_honoured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    variables = {"WANDB_PROJECT": "p", "WANDB_ENTITY": "e", "WANDB_RUN_GROUP": "g", "WANDB_TAGS": "a, b"}
    found = tracking(monkeypatch, **variables)
    assert (found.project, found.entity, found.group, found.tags) == ("p", "e", "g", ["a", "b"])
    assert capsys.readouterr().err == ""


def test_what_the_recipe_sets_overrides_them_and_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tracking(monkeypatch, "tracking.project=mine", WANDB_PROJECT="p", WANDB_DIR="/elsewhere")
    assert found.project == "mine"
    said = capsys.readouterr().err
    assert "wandb: WANDB_PROJECT=p is overridden by tracking.project=mine\n" in said
    assert "wandb: WANDB_DIR is ignored: W&B's files are in the run folder" in said
    tracking(monkeypatch, "tracking.project=p")
    assert "WANDB_PROJECT" not in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("WANDB_DISABLED", "true"), ("WANDB_MODE", "disabled")])
def test_wandb_can_be_turned_off(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    recipe, folder = load_recipe(["recipe=tiny"]), RunFolder(tmp_path)
    assert trackers(recipe, folder, World()) == []
    assert "wandb: turned off by the environment" in capsys.readouterr().err
    log_evaluation(recipe, folder, {"accuracy": 1.0})
    assert not list(tmp_path.iterdir())


def test_a_run_stays_in_the_project_of_its_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the figures of `distft evaluate`, which reads the recipe of the run folder."""
    folder = RunFolder(tmp_path)
    first = run_identity(tracking(monkeypatch, WANDB_PROJECT="p", WANDB_ENTITY="e"), folder)
    monkeypatch.delenv("WANDB_PROJECT")
    assert run_identity(tracking(monkeypatch), folder) == first == {"id": first["id"], "project": "p", "entity": "e"}
    folder.wandb_run.write_text('{"id": "old"}')  # as written before
    assert run_identity(tracking(monkeypatch, "tracking.entity=mine"), folder) == {
        "id": "old",
        "project": "distft",
        "entity": "mine",
    }
    assert json.loads(folder.wandb_run.read_text())["id"] == "old"
