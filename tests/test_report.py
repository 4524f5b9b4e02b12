"""Reports: what is read from run folders, which runs are repeats, what was equal, and what is called a difference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distft.cli import main
from distft.errors import RunFolderError
from distft.experiment import load_experiment
from distft.markdown import markdown
from distft.recipe import load_recipe
from distft.report import Report, report
from distft.run import RunFolder, to_json

FIGURES: dict[str, Any] = {
    "status": "finished", "strategy": "ddp", "requested_strategy": "ddp", "world_size": 2, "global_batch_size": 16, "steps": 10,
    "skipped_steps": 0, "samples": 160, "tokens": 8000, "train_loss": 2.5, "eval_before": {"loss": 4.0, "perplexity": 54.6},
    "eval_after": {"loss": 2.0, "perplexity": 7.39}, "train_time_s": 4.0, "samples_per_second": 40.0,
    "tokens_per_second": 2000.0, "peak_memory_gib": 8.0, "restarts": 0,
}  # fmt: skip


def make(parent: Path, name: str, *overrides: str, gpu: str | None = None, **figures: Any) -> RunFolder:
    """A run folder as a run leaves it, of the embedded recipe with `overrides`; `figures` change those above."""
    folder = RunFolder.claim(parent, name, exact=True)
    recipe = load_recipe(["recipe=tiny", *overrides, f"run.name={name}", f"run.dir={parent}"])
    folder.recipe.write_text(recipe.to_yaml(), encoding="utf-8")
    machine = {"python": "3.11.7", "cpus": 2, "packages": {"torch": "2.13.0"}, "gpus": [{"name": gpu}] if gpu else []}
    folder.environment.write_text(to_json({**machine, "command": ["train.py", name]}), encoding="utf-8")
    folder.append_metrics(
        {"step": 0, "test_loss": 4.0}, {"step": 5, "loss": 3.0, "samples": 80, "tokens": 4000},
        {"step": 10, "loss": 2.25, "samples": 160, "tokens": 8000}, {"step": 10, "test_loss": 2.0},
    )  # fmt: skip
    folder.write_summary({**FIGURES, **figures})
    return folder


def verdicts(made: Report, figure: str) -> dict[str, str]:
    return {item.variant: item.verdict for item in made.comparisons if item.figure == figure}


def equal(made: Report) -> dict[str, bool | None]:
    return {item.what: item.equal for item in made.equality}


def row(text: str, heading: str, first: str) -> dict[str, str]:
    """The row of the table under a heading that starts with `first`, by the table's own head."""
    lines = [line for line in text.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(line) for line in lines}) == 1  # aligned
    (found,) = [line for line in cells if line[0] == first]
    return dict(zip(cells[0], found, strict=True))


# ---- one run ---------------------------------------------------------------------------------------------------------


def test_a_run_s_figures_are_those_of_its_folder(tmp_path: Path) -> None:
    made = report([make(tmp_path, "a", mfu=0.5, energy_j=1234.5, restarts=2)])
    (run,) = made.runs
    assert run.figures == {
        "steps": 10, "samples": 160, "tokens": 8000, "train_loss": 2.5, "final_loss": 2.25, "eval_loss_before": 4.0,
        "eval_loss_after": 2.0, "perplexity_before": 54.6, "perplexity_after": 7.39, "train_time_s": 4.0,
        "samples_per_second": 40.0, "tokens_per_second": 2000.0, "mfu": 0.5, "peak_memory_gib": 8.0, "energy_j": 1234.5,
        "restarts": 2, "imdb_accuracy": None, "imdb_f1": None, "mt_bench_score": None, "alpaca_win_rate": None,
    }  # fmt: skip
    shown = row(markdown(made), "Runs", "a")
    assert (shown["strategy"], shown["processes"], shown["last train loss"], shown["MFU"]) == (
        "ddp",
        "2",
        "2.2500",
        "0.500",
    )
    assert json.loads(made.to_json())["runs"][0]["figures"] == run.figures
    assert set(equal(made).values()) == {None}
    assert made.comparisons == ()


def test_a_run_that_did_not_finish_stands_there_with_its_cause_and_what_is_known(tmp_path: Path) -> None:
    unfinished = dict.fromkeys(FIGURES) | {"strategy": "ddp", "world_size": 2}
    failed = make(tmp_path, "bad", **{**unfinished, "status": "failed", "cause": "OutOfMemory: 3 | 4 GiB\nless"})
    started = make(tmp_path, "new", "lora.r=1", **{**unfinished, "status": "running"})
    started.metrics.unlink()
    with failed.metrics.open("a") as file:
        file.write('{"step": 11, "lo')  # torn by a kill
    made = report([failed, started, make(tmp_path, "good", "lora.r=2")])
    text = markdown(made)
    assert "3 runs of 3 variants, 1 finished." in text
    assert "- `bad`: failed: OutOfMemory: 3 | 4 GiB less\n- `new`: running\n" in text
    assert row(text, "Runs", "bad")["samples"] == "160"
    assert row(text, "Runs", "new")["samples"] == "–"
    assert row(text, "Runs", "bad")["samples/s"] == "–"
    assert made.comparisons == ()
    assert "as run.samples" not in made.differences


@pytest.mark.parametrize("name", ["recipe.yaml", "summary.json", "environment.json", "metrics.jsonl"])
def test_a_damaged_folder_is_named(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path, "a")
    (folder.path / name).write_text("{\n{\n", encoding="utf-8")
    with pytest.raises(RunFolderError, match=name.replace(".", r"\.")):
        report([folder])


# ---- repeats and variants --------------------------------------------------------------------------------------------


def test_runs_of_one_recipe_are_one_variant_with_its_median_and_range(tmp_path: Path) -> None:
    folders = [
        make(tmp_path, "x-a", samples_per_second=40.0),
        make(tmp_path, "x-b", "lora.r=4", samples_per_second=50.0),
        make(tmp_path, "x-a-r2", "tracking.group=x", "run.resume=never", samples_per_second=44.0),
        make(tmp_path, "x-a-r3", samples_per_second=41.0),
        make(tmp_path, "x-b-r2", "lora.r=4", status="failed", samples_per_second=None),
    ]
    made = report([*folders, RunFolder(tmp_path / "." / "x-a")])  # the same folder again is no repeat
    assert {variant.name: variant.runs for variant in made.variants} == {
        "x-a": ("x-a", "x-a-r2", "x-a-r3"),
        "x-b": ("x-b", "x-b-r2"),
    }
    text = markdown(made)
    assert row(text, "Variants", "x-a")["samples/s"] == "41.00 (40.00 – 44.00)"
    assert row(text, "Variants", "x-b")["finished"] == "1 of 2"
    assert row(text, "Variants", "x-b")["samples/s"] == "50.00"
    assert "- `lora.r`: 16 (in `x-a`), 4 (in `x-b`)" in text
    assert "tracking.group" not in text


def test_other_processes_or_another_machine_are_another_variant(tmp_path: Path) -> None:
    folders = [
        make(tmp_path / place, "a", **how)
        for place, how in (("1", {}), ("2", {"world_size": 1}), ("3", {"gpu": "H200"}))
    ]  # type: ignore[arg-type]
    made = report(folders)
    assert [variant.name for variant in made.variants] == [str(folder.path) for folder in folders]
    assert set(made.differences) == {"as run.world_size", "machine.gpus"}


def test_a_difference_inside_the_spread_is_not_called_one(tmp_path: Path) -> None:
    def runs(name: str, r: int, *speeds: float) -> list[RunFolder]:
        return [make(tmp_path, f"{name}-r{n}", f"lora.r={r}", samples_per_second=speed) for n, speed in enumerate(speeds, 1)]  # fmt: skip

    made = report([*runs("base", 1, 40, 44), *runs("near", 2, 43, 60), *runs("fast", 3, 45, 47), *runs("once", 4, 80)])
    assert verdicts(made, "samples_per_second") == {
        "near-r1": "no difference",
        "fast-r1": "different",
        "once-r1": "no spread",
    }
    assert set(verdicts(made, "train_loss").values()) == {"equal"}
    text = markdown(made)
    assert row(text, "Against `base-r1`", "fast-r1")["samples/s"] == "× 1.095"
    assert row(text, "Against `base-r1`", "near-r1")["samples/s"] == "no difference"
    assert row(text, "Against `base-r1`", "once-r1")["samples/s"] == "(× 1.905)"
    assert "no spread to judge by" in text


def test_losses_that_differ_by_rounding_alone_are_equal(tmp_path: Path) -> None:
    made = report([make(tmp_path, "a"), make(tmp_path, "b", "lora.r=4", train_loss=2.50001, peak_memory_gib=8.01)])
    assert verdicts(made, "train_loss") == {"b": "equal"}
    assert verdicts(made, "peak_memory_gib") == {"b": "no spread"}


# ---- what was equal --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "figures", "unequal"),
    [
        (["lora.r=4"], {}, set()),
        (["run.seed=1"], {}, {"samples", "order", "seed"}),
        (["data.max_samples=100"], {}, {"samples", "order"}),
        (["batching.global_batch_size=8"], {"global_batch_size": 8}, {"global_batch"}),
        (["batching.global_batch_size=null", "batching.global_batch_tokens=800"],
         {"global_batch_size": None, "global_batch_tokens": 800}, {"global_batch"}),
        (["training.max_steps=9"], {"samples": 144, "tokens": 7200, "steps": 9}, {"samples", "tokens", "steps"}),
        (["training.max_length=64"], {"tokens": 7000}, {"tokens"}),
        (["model.dtype=bfloat16"], {}, {"base_weights"}),
        (["quantization=null"], {}, {"base_weights"}),
        (["quantization.bnb_4bit_quant_storage=float32"], {}, set()),
        (["lora.r=4"], {"train_loss": 2.524}, set()),
        (["lora.r=4"], {"train_loss": 2.53}, {"loss"}),
        (["lora.r=4"], {"eval_after": {"loss": 1.9, "perplexity": 6.7}}, {"loss"}),
        (["run.on_bad_numbers=skip"], {"skipped_steps": 1}, {"samples"}),
    ],
)  # fmt: skip
def test_what_was_equal_follows_from_the_folders(
    overrides: list[str], figures: dict[str, Any], unequal: set[str], tmp_path: Path
) -> None:
    made = report([make(tmp_path, "a"), make(tmp_path, "b", *overrides, **figures)])
    assert {what for what, is_equal in equal(made).items() if not is_equal} == unequal


def test_speed_is_compared_only_where_what_must_be_equal_was(tmp_path: Path) -> None:
    folders = [make(tmp_path, "a"), make(tmp_path, "b", "training.max_length=64", tokens=7000)]
    assert verdicts(report(folders), "train_time_s") == {"b": "equal"}
    made = report(folders, equal=["samples", "tokens"])
    assert verdicts(made, "train_time_s") == {"b": "not compared"}
    assert verdicts(made, "peak_memory_gib") == {"b": "equal"}
    assert "- `b`: its speed is not compared, for it did other work (not equal: tokens)." in markdown(made)
    assert "- `as run.tokens`: 8000 (in `a`), 7000 (in `b`)" in markdown(made)
    assert [item.what for item in made.equality if item.declared] == ["samples", "tokens"]


def test_a_section_that_one_lacks_is_one_line(tmp_path: Path) -> None:
    text = markdown(report([make(tmp_path, "a"), make(tmp_path, "b", "quantization=null")]))
    (line,) = [line for line in text.split("## What differs")[1].splitlines() if "quantization" in line]
    assert line.startswith("- `quantization`: load_in_4bit true, load_in_8bit false, ")
    assert line.endswith(" (in `a`), not set (in `b`)")


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_or_writes_markdown_or_json(tmp_path: Path, capsys: Any) -> None:
    words = [str(make(tmp_path, name, f"lora.r={r}").path) for r, name in enumerate("ab", 1)]
    assert main(["report", *words]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# 2 runs\n\n2 runs of 2 variants, 2 finished.\n")
    target = tmp_path / "out" / "report.md"
    assert main(["report", *words, "--output", str(target)]) == 0
    assert target.read_text(encoding="utf-8") == text
    assert capsys.readouterr().out == f"report: {target}\n"
    assert main(["report", "--json", *words]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in document["runs"]] == ["a", "b"]
    assert document["variants"][0]["spreads"]["samples_per_second"]["median"] == 40.0


@pytest.mark.parametrize(
    ("words", "told"),
    [([], "give the folders of runs"), (["."], "summary.json"), (["experiment=tiny"], "none of its 8 runs is there")],
)
def test_what_is_no_run_ends_with_2(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", *words]) == 2
    assert told in capsys.readouterr().err


def test_a_file_that_cannot_be_written_ends_with_2(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    assert main(["report", str(make(tmp_path, "a").path), "--output", str(tmp_path / "file" / "report.md")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_report_loads_no_torch(tmp_path: Path) -> None:
    program = "import sys, distft.markdown, distft.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path).returncode == 0


def test_an_experiment_that_was_run_is_reported_with_what_is_missing(
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
        ("tiny-ddp_32bit", "ddp", 2), ("tiny-fsdp_32bit", "fsdp", 2),
    ]  # fmt: skip
    assert len(document["missing"]) == 6
    assert all(item["equal"] for item in document["equality"])
    assert set(document["differences"]) == {"strategy", "as run.strategy"}
    assert main(["report", *words]) == 0
    assert "Not there: `tiny-ddp_4bit`, `tiny-fsdp_4bit`, `tiny-ddp_4bit-r2`" in capsys.readouterr().out
