"""`distft runs` and `distft init`."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from distft.api.recipe import load
from distft.cli.init import METHODS
from distft.cli.main import main
from distft.runs.folder import RunFolder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two runs."""
    monkeypatch.chdir(tmp_path)
    for name, loss in (("one", 1.25), ("two", None)):
        folder = RunFolder(tmp_path / "runs" / name)
        folder.path.mkdir(parents=True)
        after = None if loss is None else {"loss": loss, "perplexity": 3.49}
        summary = {"status": "finished" if loss else "failed", "strategy": "ddp", "steps": 10, "eval_after": after}
        folder.summary.write_text(json.dumps(summary), encoding="utf-8")
    return tmp_path / "runs"


def test_runs_are_listed_and_shown(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "list"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["run", "status"] and "held-out loss" in head
    assert sorted(line.split()[:2] for line in lines) == [["runs/one", "finished"], ["runs/two", "failed"]]
    assert main(["runs", "list", "--json"]) == 0
    assert {row["held-out loss"] for row in json.loads(capsys.readouterr().out)} == {1.25, None}
    assert main(["runs", "show", "runs/one"]) == 0
    assert "held-out loss after   1.25" in capsys.readouterr().out
    assert main(["runs", "list", "elsewhere"]) == 2


def test_runs_are_removed_unless_a_process_writes_to_them(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "rm", "runs/one"]) == 2 and (runs / "one").is_dir()  # no terminal to ask on
    assert main(["runs", "rm", str(runs.parent), "--yes"]) == 2 and runs.is_dir()  # no run folder
    with RunFolder(runs / "two").lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["runs", "rm", "runs/one", "runs/two", "--yes"]) == 2
        assert "a process writes to runs/two" in capsys.readouterr().err
    assert main(["runs", "rm", "runs/one", "runs/two", "--yes"]) == 0
    assert list(runs.iterdir()) == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_init_writes_a_recipe(
    method: str, strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--method", method, "--strategy", strategy, "--batch", "8", "--output", "mine.yaml"]) == 0
    recipe = load(["mine.yaml"])
    assert (recipe.strategy, recipe.batching.global_batch_size) == (strategy, 8)
    assert (recipe.lora is None) == (method == "full")
    assert (recipe.quantization is None) == (method != "qlora")
    assert main(["init", "--output", "mine.yaml"]) == 2
    assert "already exists" in capsys.readouterr().err


def test_init_leaves_no_recipe_that_check_would_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--data", "gone.jsonl"]) == 2
    assert not (tmp_path / "recipes" / "gone.yaml").exists()
    assert main(["init", "--batch", "none"]) == 2
