"""`distft report` as a command, on run folders and on an experiment with damaged, failed and missing runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distft.cli.main import main
from distft.experiments.expand import load_experiment

from .conftest import make


def test_the_command_prints_or_writes_markdown_or_json(tmp_path: Path, capsys: Any) -> None:
    words = [str(make(tmp_path, name, f"lora.r={r}").path) for r, name in enumerate("ab", 1)]
    assert main(["report", *words]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# 2 runs\n\n**b is as fast as a.**\n\n2 runs of 2 variants, 2 finished.\n")
    target = tmp_path / "out" / "report.md"
    assert main(["report", *words, "--output", str(target)]) == 0
    assert target.read_text(encoding="utf-8") == text
    assert capsys.readouterr().out == f"report: {target}\n"
    assert main(["report", "--json", *words]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in document["runs"]] == ["a", "b"]
    assert document["variants"][0]["spreads"]["samples_per_second"]["median"] == 40.0


def test_a_run_that_ended_with_its_best_model_says_so(tmp_path: Path, capsys: Any) -> None:
    best = {"metric": "eval_loss", "value": 1.25, "step": 40, "is_result": True}
    folder = make(tmp_path, "a", best=best, stopped_early={"step": 60, "of": 2000, "evaluations": 2})
    assert main(["report", str(folder.path)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    why = "eval_loss did not improve for 2 evaluations; the best was eval_loss 1.25 at step 40"
    assert f"`a`: stopped early at step 60 of 2,000: {why}." in text
    assert "`a`: the result is the model of the best evaluation: eval_loss 1.25 at step 40." in text


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "give the folders of runs"), (["."], "summary.json"), (["experiment=tiny"], "none of its 12 runs exists")],
)
def test_a_path_that_is_not_a_run_exits_with_2(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_cannot_be_written_exits_with_2(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    assert main(["report", str(make(tmp_path, "a").path), "--output", str(tmp_path / "file" / "report.md")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_reports_do_not_import_torch(tmp_path: Path) -> None:
    program = "import sys, distft.reports.markdown, distft.reports.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path).returncode == 0


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the runs of an experiment `mine`: a and b, two runs each, without a-r2."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipes" / "experiments" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("base: tiny\nvariants: {a: {lora.r: 1}, b: {lora.r: 2}}\nrepeats: 2\n")
    for name, r in (("a", 1), ("b", 2), ("b-r2", 2)):
        make(tmp_path / "runs", f"mine-{name}", f"lora.r={r}")
    return tmp_path / "runs"


def reported(capsys: Any, *words: str) -> tuple[dict[str, Any], str]:
    """The report on `mine` as JSON, and the messages."""
    assert main(["report", "experiment=mine", "tracking.report_to=[]", *words, "--json"]) == 0
    shown = capsys.readouterr()
    return json.loads(shown.out), shown.err


@pytest.mark.parametrize("name", ["summary.json", "profile.json", "recipe.yaml", "environment.json"])
def test_a_damaged_folder_has_a_row_in_the_report_of_its_experiment(name: str, mine: Path, capsys: Any) -> None:
    path = mine / "mine-b" / name
    path.write_text(path.read_text()[:50] if path.exists() else '{"ran')
    document, said = reported(capsys)
    damaged = next(run for run in document["runs"] if run["name"] == "mine-b")
    assert damaged["status"] == "damaged" and name in damaged["cause"] and said == ""
    assert {variant["name"]: (variant["runs"], variant["finished"]) for variant in document["variants"]} == {
        "a": (["mine-a", "mine-a-r2"], 1),
        "b": (["mine-b", "mine-b-r2"], 1),
    }
    assert document["differences"] == {"lora.r": {"a": 1, "b": 2}}
    assert main(["report", "experiment=mine", "tracking.report_to=[]"]) == 0
    assert f"- `mine-b`: damaged: {damaged['cause']}\n" in capsys.readouterr().out


def test_a_run_that_failed_before_it_had_a_folder_joins_its_variant(mine: Path, capsys: Any) -> None:
    """Where the first variant has no finished run, the sentence says with which the others are compared."""
    shutil.rmtree(mine / "mine-a")
    path = mine.parent / "recipes" / "experiments" / "mine.yaml"
    path.write_text(path.read_text().replace("b: {lora.r: 2}", "b: {lora.r: 2}, c: {lora.r: 3}"))
    make(mine, "mine-c", "lora.r=3")
    log = mine / "mine-logs" / "mine-a.log"
    log.parent.mkdir()
    log.write_text("distft: there is no folder /no/such/model (model)\nat exit\n")
    assert reported(capsys)[0]["missing"]["mine-a"] == "there is no folder /no/such/model (model)", (
        "it may have just begun"
    )
    log.write_text(log.read_text() + "distft compare: this run ended without a folder, with exit code 2\n")
    document, _ = reported(capsys)
    assert document["missing"].keys() == {"mine-a-r2", "mine-c-r2"}
    assert [(run["name"], run["outcome"], run["cause"]) for run in document["runs"] if run["status"] != "finished"] == [
        ("mine-a", "failed", "there is no folder /no/such/model (model)")
    ]
    assert [(variant["name"], variant["runs"], variant["finished"]) for variant in document["variants"]] == [
        ("a", ["mine-a", "mine-a-r2"], 0),
        ("b", ["mine-b", "mine-b-r2"], 2),
        ("c", ["mine-c", "mine-c-r2"], 1),
    ]
    assert document["verdict"].startswith("c is as fast as b")
    assert document["verdict"].endswith(". a has no finished run (failed, missing); the others are compared with b.")


def test_runs_made_with_another_recipe_are_reported(mine: Path, capsys: Any) -> None:
    document, said = reported(
        capsys, "training.max_steps=7", "lora.r=4", "slurm.nodes=2", "evaluation.seed=1", "tracking.tags=[x]"
    )
    assert len(document["runs"]) == 3
    assert said.splitlines() == [
        "distft: warning: 3 of 4 runs of mine were made with another recipe than today's:",
        "  lora.r: was 1, is now 4 (mine-a)",
        "  training.max_steps: was None, is now 7 (mine-a, mine-b, mine-b-r2)",
        "  lora.r: was 2, is now 4 (mine-b, mine-b-r2)",
    ]
    _, said = reported(capsys, "evaluation.max_samples=3")
    assert "evaluation.max_samples: was None, is now 3" in said, "its losses are of other rows"


def test_an_experiment_is_reported_with_its_missing_runs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Two runs of the shipped experiment, as trained: DDP and FSDP2 on two processes."""
    monkeypatch.chdir(tmp_path)
    words = [
        "experiment=tiny",
        "training.max_steps=2",
        "evaluation.max_samples=2",
        "tracking.report_to=[]",
        "run.dir=out",
    ]
    runs = [run for run in load_experiment(words).runs if run.variant.endswith("_32bit") and run.repeat == 1]
    for run in runs:
        command = [sys.executable, "-m", "distft.cli", "train", *run.arguments, "--nproc", "2"]
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))
        }
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr[-3000:]
    assert main(["report", *words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [(run["name"], run["strategy"], run["world_size"]) for run in document["runs"]] == [
        ("tiny-ddp_32bit", "ddp", 2),
        ("tiny-fsdp_32bit", "fsdp", 2),
    ]
    assert len(document["missing"]) == 10
    assert all(item["equal"] for item in document["equality"])
    assert {key.partition(".")[0] for key in document["differences"]} == {"strategy", "as run", "quantization"}
    assert [variant["finished"] for variant in document["variants"]] == [0, 0, 1, 1]
    assert main(["report", *words]) == 0
    assert "Missing: `tiny-ddp_4bit`, `tiny-fsdp_4bit` and 8 more." in capsys.readouterr().out
