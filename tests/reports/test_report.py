"""Reports: what is read from run folders, which runs are repeats, what was equal, and what is called a difference."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from distft.cli.main import main
from distft.config.recipe import load_recipe
from distft.errors import RunFolderError
from distft.evaluation.metrics import Estimate
from distft.experiments.expand import load_experiment
from distft.files import to_json
from distft.reports.markdown import markdown
from distft.reports.report import NOT_THERE, Report, report, report_on_runs
from distft.reports.results import Run, read_run
from distft.runs.folder import RunFolder

FIGURES: dict[str, Any] = {
    "status": "finished", "strategy": "ddp", "requested_strategy": "ddp", "world_size": 2, "global_batch_size": 16, "steps": 10,
    "skipped_steps": 0, "samples": 160, "tokens": 8000, "train_loss": 2.5, "eval_before": {"loss": 4.0, "perplexity": 54.6},
    "eval_after": {"loss": 2.0, "perplexity": 7.39}, "train_time_s": 4.0, "samples_per_second": 40.0,
    "tokens_per_second": 2000.0, "peak_memory_gib": 8.0, "restarts": 0, "data_digest": "0123456789abcdef",
    "weights_digest": "fedcba9876543210",
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


def test_a_run_that_no_process_writes_to_was_killed(tmp_path: Path) -> None:
    folder = make(tmp_path, "a", status="running")
    with FileLock(folder.lock):
        (run,) = report([folder]).runs
        assert (run.status, run.cause) == ("running", None)
    (run,) = report([folder]).runs
    assert run.status == "killed" and "goes on from the last checkpoint" in str(run.cause)


def test_a_run_s_figures_are_those_of_its_folder(tmp_path: Path) -> None:
    made = report([make(tmp_path, "a", mfu=0.5, energy_j=1234.5, restarts=2, measured_steps=9)])
    (run,) = made.runs
    assert run.figures == {
        "steps": 10, "measured_steps": 9, "samples": 160, "tokens": 8000, "train_loss": 2.5, "final_loss": 2.25, "eval_loss_before": 4.0,
        "eval_loss_after": 2.0, "perplexity_before": 54.6, "perplexity_after": 7.39, "train_time_s": 4.0,
        "samples_per_second": 40.0, "tokens_per_second": 2000.0, "mfu": 0.5, "peak_memory_gib": 8.0, "energy_j": 1234.5,
        "restarts": 2, "imdb_accuracy": None, "imdb_f1": None, "mt_bench_score": None, "alpaca_win_rate": None,
        "alpaca_preferred_rate": None, **dict.fromkeys(("hfu", "joules_per_sample", "joules_per_step", "energy_idle_share", "step_time_s", "data_wait_s",
                         "evaluation_time_s", "saving_time_s", "host_rss_gib")),
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


def test_two_runs_of_one_variant_say_nothing_of_what_variants_have_in_common(tmp_path: Path) -> None:
    made = report([make(tmp_path, "a"), make(tmp_path, "a-r2"), make(tmp_path, "b", "lora.r=4", status="failed")])
    assert set(equal(made).values()) == {None} and row(markdown(made), "What was equal", "samples")["equal"] == "–"


def an_evaluation(**verdicts: str) -> dict[str, Any]:
    """What a summary holds of two tasks: the verdicts on an accuracy and on pairs won, and what stands behind them."""
    side = {"value": 0.5, "low": 0.4, "high": 0.6}

    def figure(title: str, verdict: str) -> dict[str, Any]:
        return {
            "title": title,
            "form": ".2f",
            "count": 40,
            "base": side,
            "adapter": {**side, "value": 0.75},
            "difference": side,
            "verdict": verdict,
        }

    counts = {"judgements": 8, "unparsed": 5, "asked_again": 0}
    return {
        "imdb": {
            "figures": {"accuracy": figure("accuracy", verdicts["imdb"]), "f1": figure("F1", "gain")},
            "confusion": {"rows": ["bad", "good"], "columns": ["bad", "good", "unparsed"], "logprob": {"base": [[7, 3, 0], [4, 6, 0]]},
                          "generation": {"base": [[0, 1, 9], [2, 3, 5]]}},
            "unparsed": {"base": {"count": 14, "first": ["no | idea", "no | idea", "hm"]}, "adapter": {"count": 0, "first": []}},
        },
        "alpaca": {
            "figures": {"preferred_rate": figure("pairs won", verdicts["alpaca"])},
            "outcomes": {side: {"win": 1, "tie": 2, "loss": 1, "unparsed": 4} for side in ("base", "adapter")},
            "position": {"base": {"first_preferred": 0.75, "inconsistent": 2, "pairs": 4}, "adapter": {"first_preferred": 0.5, "inconsistent": 1, "pairs": 4}},
            "judge": {"model": "j", "mode": "pairwise", "max_new_tokens": 18},
            "judged": {"base": {**counts, "unparsed": 4}, "adapter": counts},
            "reasons": {"cut off before [RESULT]": 6, "no [RESULT]": 3},
        },
    }  # fmt: skip


def test_a_single_run_s_headline_says_what_the_fine_tune_changed_or_nothing(tmp_path: Path) -> None:
    measured = report([make(tmp_path, "measured")]).verdict
    assert measured.startswith("Held-out perplexity 54.60 before training and 7.39 after it")
    assert report([make(tmp_path, "bare", eval_before=None)]).verdict == ""
    failed = report([make(tmp_path, "bad", status="failed", cause="OutOfMemory: no")]).verdict
    assert failed == "bad has no finished run (out of memory)."

    alone = {
        "title": "accuracy",
        "form": ".2f",
        "count": 40,
        "base": {"value": 0.5},
        "adapter": None,
        "difference": None,
        "verdict": None,
    }
    untrained = make(tmp_path, "alone", status="evaluated", evaluation={"imdb": {"figures": {"accuracy": alone}}})
    assert report([untrained]).verdict.startswith("The base alone was evaluated")

    found = an_evaluation(imdb="gain", alpaca="too few items")
    fair = {
        task: {key: value for key, value in of.items() if key not in ("position", "judged")}
        for task, of in found.items()
    }
    headline = "The fine-tune changed imdb accuracy 0.50 → 0.75 (gain). Too few items for pairs won."
    made = report([make(tmp_path, "changed", evaluation=fair)])
    assert made.verdict == headline and f"**{headline}**" in markdown(made)
    assert json.loads(made.to_json())["verdict"] == headline and made.warnings == []
    doubted = report([make(tmp_path, "doubted", evaluation=found)]).verdict
    assert (
        doubted
        == "The fine-tune changed imdb accuracy 0.50 → 0.75 (gain). The judge's verdicts are unreliable for alpaca."
    )
    fair["imdb"]["figures"]["accuracy"]["verdict"] = "inconclusive"
    same = report([make(tmp_path, "same", evaluation=fair)]).verdict
    assert same == ("No change could be shown: inconclusive for imdb accuracy; too few items for pairs won.")
    two = report([make(tmp_path, "one", "lora.r=1"), make(tmp_path, "two", "lora.r=2", evaluation=found)]).verdict
    assert two.startswith("two is as fast as one"), "the headline of several variants is how they compare"


def test_a_report_shows_what_stands_behind_the_figures_and_warns(tmp_path: Path) -> None:
    folder = make(tmp_path, "a", evaluation=an_evaluation(imdb="gain", alpaca="gain"))
    text = markdown(report([folder]))
    assert "| task   |" in text, "one run needs no column of names"
    rows = {
        tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|")))
        for line in text.splitlines()
        if line.startswith("|")
    }
    assert {
        ("base", "bad", "7", "3"), ("side", "class", "predicted bad", "predicted good", "no label word"), ("base", "good", "2", "3", "5"),
        ("base", "14", '"no \\| idea" · "hm"'),
        ("side", "wins", "ties", "losses", "unparsed", "first answer preferred", "orders disagree"),
        ("base", "1", "2", "1", "4", "75.0%", "2 of 4 pairs"), ("adapter", "1", "2", "1", "4", "50.0%", "1 of 4 pairs"),
    } <= rows  # fmt: skip
    assert "### alpaca: outcomes, compared in both orders" in text
    unread, biased = (line for line in text.splitlines() if line.startswith("- Warning: "))
    assert unread == (
        "- Warning: alpaca: 9 of 16 verdicts of the judge could not be parsed, so its figures say little; most common reason (6 times): "
        f"cut off before [RESULT] (evaluation.judge.max_new_tokens=18). See {folder.path}/evaluation/alpaca/judgements.jsonl."
    )
    assert "orders disagree in at least half of the pairs" in biased
    assert "(base 2 of 4 pairs, first answer preferred in 75% of verdicts)" in biased, (
        "the adapter's 1 of 4 is below half"
    )
    several = markdown(report([folder, make(tmp_path, "b", evaluation=an_evaluation(imdb="loss", alpaca="loss"))]))
    table = several.split("### imdb: confusion matrix by likelihood\n\n")[1].split("\n\n")[0].splitlines()
    first = [[cell.strip() for cell in line.split("|")[1:4]] for line in (table[0], *table[2:])]
    assert first == [["run", "side", "class"], *([run, "base", word] for run in "ab" for word in ("bad", "good"))]


def test_a_run_that_did_not_finish_stands_there_with_its_cause_and_what_is_known(tmp_path: Path) -> None:
    unfinished = dict.fromkeys(FIGURES) | {"strategy": "ddp", "world_size": 2}
    failed = make(tmp_path, "bad", **{**unfinished, "status": "failed", "cause": "OutOfMemory: 3 | 4 GiB\nless"})
    started = make(tmp_path, "new", "lora.r=1", **{**unfinished, "status": "running"})
    started.metrics.unlink()
    with failed.metrics.open("a") as file:
        file.write('{"step": 11, "lo')  # torn by a kill
    made = report([failed, started, make(tmp_path, "good", "lora.r=2")])
    text = markdown(made)
    assert "3 runs of 3 variants, 1 finished, 1 out of memory." in text
    assert made.verdict.endswith(
        "how fast they were; bad has no finished run (out of memory); new has no finished run (running)."
    )
    assert "- `bad`: out of memory: 3 | 4 GiB less\n- `new`: running\n" in text
    assert row(text, "Runs", "new")["status"] == "running"
    assert "| out of memory: 3 \\| 4 GiB less |" in text
    outcomes = {run["name"]: (run["outcome"], run["cause"]) for run in json.loads(made.to_json())["runs"]}
    assert outcomes["bad"] == ("out of memory", "OutOfMemory: 3 | 4 GiB\nless")
    assert (outcomes["new"], outcomes["good"]) == (("running", None), ("finished", None))
    assert row(text.replace("\\|", "//"), "Runs", "bad")["samples"] == "160"
    assert row(text, "Runs", "new")["samples"] == "–"
    assert row(text.replace("\\|", "//"), "Runs", "bad")["samples/s"] == "–"
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
        make(tmp_path, "x-b-r2", "lora.r=4", status="failed", cause="RuntimeError: no", samples_per_second=None),
    ]
    made = report([*folders, RunFolder(tmp_path / "." / "x-a")])  # the same folder again is no repeat
    assert {variant.name: variant.runs for variant in made.variants} == {
        "x-a": ("x-a", "x-a-r2", "x-a-r3"),
        "x-b": ("x-b", "x-b-r2"),
    }
    text = markdown(made)
    assert row(text, "Variants", "x-a")["samples/s"] == "41.00 (40.00 – 44.00)"
    assert row(text, "Variants", "x-b")["finished"] == "1 of 2; failed: RuntimeError: no"
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


def runs(parent: Path, name: str, r: int, *speeds: float | None, **figures: Any) -> list[RunFolder]:
    return [make(parent, f"{name}-r{n}", f"lora.r={r}", samples_per_second=speed, **figures) for n, speed in enumerate(speeds, 1)]  # fmt: skip


def test_a_run_that_failed_before_it_had_its_weights_is_with_those_that_had_them(tmp_path: Path) -> None:
    folders = [
        make(tmp_path, "a", status="failed", cause="OutOfMemory: at load", weights_digest=None), make(tmp_path, "a-r2"),
        make(tmp_path, "a-r3"), make(tmp_path, "b", weights_digest="other weights under the same name"),
    ]  # fmt: skip
    made = report(folders)
    assert [(variant.runs, variant.finished) for variant in made.variants] == [(("a", "a-r2", "a-r3"), 2), (("b",), 1)]
    assert equal(made)["base_weights"] is False


def test_a_difference_inside_the_spread_is_not_called_one(tmp_path: Path) -> None:
    folders = [
        *runs(tmp_path, "base", 1, 40, 40.4, 39.6), *runs(tmp_path, "near", 2, 40.2, 41, 40.1), *runs(tmp_path, "fast", 3, 52, 51.5, 51.8),
        *runs(tmp_path, "slow", 5, 20, 20.1, 20.2), *runs(tmp_path, "once", 4, 80),
    ]  # fmt: skip
    made = report(folders)
    assert verdicts(made, "samples_per_second") == {
        "near-r1": "no difference", "fast-r1": "different", "slow-r1": "different", "once-r1": "no spread",
    }  # fmt: skip
    assert set(verdicts(made, "train_loss").values()) == {"equal"}
    found = {item.variant: item for item in made.comparisons if item.figure == "samples_per_second"}
    near, fast = found["near-r1"], found["fast-r1"]
    assert near.low is not None and near.high is not None and near.low < 1 < near.high
    assert fast.low is not None and fast.high is not None and 1 < fast.low < fast.ratio < fast.high  # type: ignore[operator]
    text = markdown(made)
    assert (
        row(text, "Against `base-r1`", "fast-r1")["samples/s"]
        == f"× {fast.ratio:.3f} ({fast.low:.3f} – {fast.high:.3f})"
    )
    assert row(text, "Against `base-r1`", "near-r1")["samples/s"] == f"no difference ({near.low:.3f} – {near.high:.3f})"
    assert row(text, "Against `base-r1`", "once-r1")["samples/s"] == "(× 2.000)"
    assert "no spread to judge by" in text and "together for the 3 variants of a column (Bonferroni)" in text
    assert (
        f"fast-r1 is 1.29 times as fast as base-r1 ({fast.low:.2f}–{fast.high:.2f}); slow-r1 is 1.99 times as slow as base-r1 ("
        in text
    )
    assert f"near-r1 is as fast as base-r1 ({near.low:.2f}–{near.high:.2f} times)" in text
    assert (
        "once-r1 ran once or base-r1 did, so that a difference could be chance (here 2.00 times as fast as base-r1)"
        in text
    )
    record = json.loads(made.to_json())
    assert f"**{record['verdict']}**" in text.splitlines()
    assert record["comparisons"][0].keys() >= {"ratio", "low", "high", "verdict"} and record["confidence"] == 0.95


def test_a_figure_that_is_not_known_or_not_positive_breaks_no_comparison(tmp_path: Path) -> None:
    made = report([
        *runs(tmp_path, "a", 1, 40, float("nan"), None, energy_j=0.0), *runs(tmp_path, "b", 2, 44, 44.2, 44.1, energy_j=5.0),
        *runs(tmp_path, "c", 3, None, None, energy_j=0.0),
    ])  # fmt: skip
    assert verdicts(made, "samples_per_second") == {"b-r1": "no spread"}
    assert verdicts(made, "energy_j") == {"b-r1": "different", "c-r1": "equal"}
    (energy,) = [item for item in made.comparisons if (item.variant, item.figure) == ("b-r1", "energy_j")]
    assert (energy.ratio, energy.low, energy.high) == (None, None, None)
    assert row(markdown(made), "Against `a-r1`", "b-r1")["energy"] == "different"


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
        ([], {"data_digest": "other rows under the same name"}, {"samples", "order"}),
        ([], {"weights_digest": "other weights under the same name"}, {"base_weights"}),
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


def test_where_losses_that_must_be_equal_diverge_the_verdict_on_speed_is_withheld(tmp_path: Path) -> None:
    folders = [*runs(tmp_path, "a", 1, 40, 40.1, 40.2), *runs(tmp_path, "b", 2, 80, 80.1, 80.2, train_loss=2.55)]
    assert verdicts(report(folders), "samples_per_second") == {
        "b-r1": "different"
    }  # nobody said that losses must be equal
    made = report(folders, equal=["samples", "loss"])
    assert {verdicts(made, figure)["b-r1"] for figure in ("samples_per_second", "train_time_s")} == {"withheld"}
    assert verdicts(made, "peak_memory_gib") == {"b-r1": "equal"}
    words = (
        "The verdict on the speed of b-r1 against a-r1 is withheld: the losses were declared equal and diverge by more than 1.00% "
        "(mean train loss 2.5500 against 2.5000, 2.00% apart)"
    )
    assert made.verdict == f"{words}."
    text = markdown(made)
    assert f"**{words}.**" in text and "times as" not in text
    assert row(text, "Against `a-r1`", "b-r1")["samples/s"] == "withheld"
    assert row(text, "What was equal", "loss") == {"what": "loss", "declared": "yes", "equal": "no"}
    assert all(item.ratio is None for item in made.comparisons if item.verdict == "withheld")
    wider = report(folders, equal=["samples", "loss"], loss_tolerance=0.03)
    assert verdicts(wider, "samples_per_second") == {"b-r1": "different"} and equal(wider)["loss"]
    assert "within 3.00% of the first" in markdown(wider)


def test_an_experiment_states_its_tolerance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipes" / "experiments" / "mine.yaml"
    path.parent.mkdir(parents=True)
    text = "base: tiny\nvariants: {a: {lora.r: 1}, b: {lora.r: 2}}\nrepeats: 2\nequal: [samples, loss]\n"
    for turn in ("", "-r2"):
        make(tmp_path / "runs", f"mine-a{turn}", "lora.r=1")
        make(tmp_path / "runs", f"mine-b{turn}", "lora.r=2", train_loss=2.55)
    told = {}
    for tolerance in ("", "loss_tolerance: 0.03\n", "loss_tolerance: 0\n"):
        path.write_text(text + tolerance)
        code = main(["report", "experiment=mine", "--json"])
        shown = capsys.readouterr()
        told[tolerance] = json.loads(shown.out)["verdict"] if code == 0 else shown.err
    assert told[""].startswith("The verdict on the speed of b against a is withheld")
    assert told["loss_tolerance: 0.03\n"].startswith("b is as fast as a")
    assert "loss_tolerance: expected" in told["loss_tolerance: 0\n"]


@pytest.mark.parametrize("loss", [float("nan"), None])
def test_a_loss_that_one_variant_lacks_is_not_equal(loss: float | None, tmp_path: Path) -> None:
    made = report([make(tmp_path, "a"), make(tmp_path, "b", "lora.r=4", train_loss=loss)], equal=["loss"])
    assert verdicts(made, "samples_per_second") == {"b": "withheld"}
    assert "mean train loss is known of one alone" in made.verdict


def test_models_with_tokenizers_of_their_own_are_judged_by_time_and_by_the_task(tmp_path: Path) -> None:
    """As the experiment `duel` declares: the samples alone."""
    after = {"loss": 2.0, "perplexity": 7.39}

    def duel(parent: Path, *accuracies: float | None, count: int = 2000) -> Report:
        folders = []
        for name, model, speed, tokens, accuracy in (
            ("a", "one", 40, 8000, accuracies[0]),
            ("b", "two", 50, 7000, accuracies[1]),
        ):
            for turn in (1, 2, 3):
                rest = {
                    "title": "accuracy",
                    "count": count,
                    "form": ".3f",
                    "base": None,
                    "difference": None,
                    "verdict": None,
                }
                value = dataclasses.asdict(Estimate.proportion(accuracy, count)) if accuracy else None
                figure = {"accuracy": {**rest, "adapter": value}}
                folders.append(make(parent, f"{name}{turn}", f"model.name={model}", samples_per_second=speed + turn / 10, tokens=tokens,
                                    train_loss=2.5 if name == "a" else 1.5, eval_after=after, evaluation={"imdb": {"figures": figure}}))  # fmt: skip
        return report(folders, equal=["samples"])

    made = duel(tmp_path / "known", 0.90, 0.95)
    assert verdicts(made, "samples_per_second") == {"b1": "different"} == verdicts(made, "imdb_accuracy")
    for figure in ("train_loss", "eval_loss_after", "perplexity_after", "tokens_per_second"):
        assert verdicts(made, figure) == {"b1": "not compared"}
    assert made.verdict.startswith("b1 is 1.25 times as fast as a1 (")
    # Wilson's intervals of 0.90 and 0.95 of 2,000 and Newcombe's of their difference, by hand: 0.0338 to 0.0664.
    assert (
        "), in time to the same samples, and on the task: IMDB accuracy 0.900 to 0.950, by +0.034 to +0.066 over the items, different"
        in made.verdict
    )
    text = markdown(made)
    assert row(text, "Against `a1`", "b1")["IMDB accuracy"] == "× 1.056"
    assert "IMDB accuracy from 0.900 to 0.950, by +0.034 to +0.066 over the items: different" in text
    few = duel(tmp_path / "few", 13 / 24, 16 / 24, count=24)
    assert verdicts(few, "imdb_accuracy") == {"b1": "no difference"}, (
        "that the repeats agree says nothing of other items"
    )
    assert "mean train loss is not compared: the tokenizers differ" in markdown(made)
    unknown = duel(tmp_path / "unknown", None, None)
    assert unknown.verdict.endswith("), in time to the same samples; how well they solve the task no run has measured.")


def test_of_many_that_did_not_finish_the_sentence_names_three(tmp_path: Path) -> None:
    bad = [
        make(tmp_path, f"bad{r}", f"lora.r={r}", status="failed", cause="OutOfMemory: no", samples_per_second=None)
        for r in range(1, 6)
    ]
    told = report([*bad, make(tmp_path, "good")]).verdict
    assert "bad3 has no finished run (out of memory); 2 more have none either." in told and "bad4" not in told


def test_what_never_began_stands_in_its_row_with_its_cause(tmp_path: Path) -> None:
    why = "there is no data file " + "x" * 100
    recipes = [load_recipe(["recipe=tiny", f"lora.r={r}"]).model_dump() for r in (1, 2)]
    absent = [
        Run.unread(tmp_path / name, NOT_THERE, cause, recipe)
        for name, cause, recipe in zip(("gone", "later"), (why, None), recipes, strict=True)
    ]
    made = report_on_runs([read_run(make(tmp_path, "a")), *absent])
    text = markdown(made)
    assert row(text, "Runs", "gone")["status"] == f"not there: {why}"[:63] + "…"
    assert row(text, "Runs", "later")["status"] == "not there"
    assert f"- `gone`: not there: {why}\n- `later`: not there\n" in text
    document = json.loads(made.to_json())
    assert document["missing"] == {"gone": why, "later": ""}
    assert [(variant["name"], variant["finished"]) for variant in document["variants"]] == [
        ("a", 1),
        ("gone", 0),
        ("later", 0),
    ]
    assert document["differences"] == {"lora.r": {"a": 16, "gone": 1, "later": 2}}, "nothing is said of their machine"
    assert "later has no finished run (not there)" in made.verdict


def test_a_section_that_one_lacks_is_one_line(tmp_path: Path) -> None:
    text = markdown(report([make(tmp_path, "a"), make(tmp_path, "b", "quantization=null")]))
    (line,) = [line for line in text.split("## What differs")[1].splitlines() if "quantization" in line]
    assert line.startswith("- `quantization`: load_in_4bit true, load_in_8bit false, ")
    assert line.endswith(" (in `a`), not set (in `b`)")


# ---- an experiment ---------------------------------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the runs of an experiment `mine`: a and b, twice each, of which a-r2 is not there."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipes" / "experiments" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("base: tiny\nvariants: {a: {lora.r: 1}, b: {lora.r: 2}}\nrepeats: 2\n")
    for name, r in (("a", 1), ("b", 2), ("b-r2", 2)):
        make(tmp_path / "runs", f"mine-{name}", f"lora.r={r}")
    return tmp_path / "runs"


def reported(capsys: Any, *words: str) -> tuple[dict[str, Any], str]:
    """The report on `mine` as JSON, and what was said beside it."""
    assert main(["report", "experiment=mine", "tracking.report_to=[]", *words, "--json"]) == 0
    shown = capsys.readouterr()
    return json.loads(shown.out), shown.err


@pytest.mark.parametrize("name", ["summary.json", "profile.json", "recipe.yaml", "environment.json"])
def test_a_damaged_folder_is_a_row_of_its_experiment(name: str, mine: Path, capsys: Any) -> None:
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


def test_a_run_that_failed_before_it_had_a_folder_is_one_of_its_variant(mine: Path, capsys: Any) -> None:
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
    assert document["verdict"].endswith(
        "; a has no finished run (failed, not there, so that the others are compared with b)."
    )


def test_runs_of_another_recipe_are_told(mine: Path, capsys: Any) -> None:
    document, said = reported(
        capsys, "training.max_steps=7", "lora.r=4", "slurm.nodes=2", "evaluation.seed=1", "tracking.tags=[x]"
    )
    assert len(document["runs"]) == 3
    assert said.splitlines() == [
        "distft: warning: 3 of 4 runs of mine were made with another recipe than their names mean now:",
        "  lora.r: 1 then, 4 now (mine-a)",
        "  training.max_steps: None then, 7 now (mine-a, mine-b, mine-b-r2)",
        "  lora.r: 2 then, 4 now (mine-b, mine-b-r2)",
    ]
    _, said = reported(capsys, "evaluation.max_samples=3")
    assert "evaluation.max_samples: None then, 3 now" in said, "its losses are of other rows"


# ---- the command -----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("words", "told"),
    [([], "give the folders of runs"), (["."], "summary.json"), (["experiment=tiny"], "none of its 12 runs is there")],
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
    program = "import sys, distft.reports.markdown, distft.reports.report; sys.exit('torch' in sys.modules)"
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
    assert len(document["missing"]) == 10
    assert all(item["equal"] for item in document["equality"])
    assert {key.partition(".")[0] for key in document["differences"]} == {"strategy", "as run", "quantization"}
    assert [variant["finished"] for variant in document["variants"]] == [0, 0, 1, 1]
    assert main(["report", *words]) == 0
    assert "Not there: `tiny-ddp_4bit`, `tiny-fsdp_4bit` and 8 more." in capsys.readouterr().out


# ---- where the time goes ---------------------------------------------------------------------------------------------


def test_repeats_share_one_split_and_one_bound(tmp_path: Path) -> None:
    folders = []
    for number, idle in enumerate((0.2, 0.4), 1):
        folder = make(
            tmp_path,
            f"a-{number}0",
            gpu="NVIDIA H200",
            step_time_s=0.9,
            evaluation_time_s=2.0,
            saving_time_s=1.0,
            mfu=0.3,
        )
        ranks = [{"rank": 0, "step_time_s": 0.6 + idle, "compute_s": 0.6, "communication_exposed_s": 0.0, "copy_exposed_s": 0.0, "idle_s": idle,
                  "data_wait_s": 0.1, "products_s": 0.5}]  # fmt: skip
        folder.profile.write_text(to_json({"steps": [4, 6], "device": "cuda", "ranks": ranks}))
        folders.append(folder)
    folders.append(make(tmp_path, "b", "lora.r=4"))
    made = report(folders)
    first, other = made.variants
    assert first.split is not None and first.bound is not None
    assert (first.split.step_time_s, first.split.host_s) == (pytest.approx(0.9), pytest.approx(0.2))
    assert first.bound.kind == "arithmetic" and "MFU 0.300" in first.bound.evidence
    assert sum(first.time.values()) == pytest.approx(10 * 0.9 + 2.0 + 1.0)
    assert (other.split, other.bound, other.time) == (None, None, {})
    text = markdown(made)
    shown = row(text, "Where the time goes", first.name)
    assert (shown["bound"], shown["host, ms a step"], shown["saving, s"]) == (
        "arithmetic",
        "200.0 (22%)",
        "1.0",
    )
    assert f"- `{first.name}` is bound by arithmetic: compute 67%" in text
    stored = json.loads(made.to_json())["variants"][0]
    assert stored["bound"]["kind"] == "arithmetic" and stored["split"]["host_s"] == pytest.approx(0.2)


def test_without_a_profile_it_is_said_how_to_get_one(tmp_path: Path) -> None:
    assert "No run was profiled: tracking.profile_steps=3" in markdown(report([make(tmp_path, "a")]))
    damaged = make(tmp_path, "b")
    damaged.profile.write_text('{"ranks": [{}]}')
    with pytest.raises(RunFolderError, match=r"profile\.json is damaged"):
        report([damaged])


def test_losses_of_repeats_have_no_spread_for_they_share_the_seed(tmp_path: Path) -> None:
    """Two runs of a side that agree to the bit would leave an interval of no width, and any other loss outside of it."""
    folders = [make(tmp_path, f"{name}{turn}", f"lora.r={r}", train_loss=loss, samples_per_second=40.0 + turn)
               for r, (name, loss) in enumerate((("a", 2.50), ("b", 2.51)), 1) for turn in (1, 2)]  # fmt: skip
    made = report(folders)
    assert verdicts(made, "train_loss") == {"b1": "no spread"} and verdicts(made, "eval_loss_after") == {"b1": "equal"}
    text = markdown(made)
    assert row(text, "Against `a1`", "b1")["mean train loss"] == "(× 1.004)"
    assert "a loss, which the seed decides that all repeats share" in " ".join(text.split())


def test_what_the_repeats_cannot_tell_is_not_called_as_fast(tmp_path: Path) -> None:
    folders = [make(tmp_path, f"{name}{turn}", f"lora.r={r}", samples_per_second=speed)
               for r, (name, speeds) in enumerate((("a", (96.6, 84.7)), ("b", (70.0, 58.0))), 1) for turn, speed in enumerate(speeds, 1)]  # fmt: skip
    verdict = report(folders).verdict
    told = (
        r"Whether b1 is faster or slower than a1 the repeats cannot tell "
        r"\(here 1\.42 times as slow as a1 \(0\.\d+–\d+\.\d+\); a difference of 5% takes about 88 of each\)\."
    )
    assert re.fullmatch(told, verdict), verdict
