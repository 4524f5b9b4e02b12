"""Which runs are repeats of each other, and what a report says about a variant as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distft.config.recipe import load_recipe
from distft.errors import RunFolderError
from distft.files import to_json
from distft.reports.markdown import markdown
from distft.reports.report import report, report_on_runs
from distft.reports.results import NOT_THERE, Run, read_run
from distft.runs.folder import RunFolder

from .conftest import equal, make, row


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
    assert row(text, "Variants", "x-a")["samples/s"] == "41.00 (40.00–44.00)"
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


def test_a_run_that_failed_before_it_loaded_its_weights_joins_its_variant(tmp_path: Path) -> None:
    folders = [
        make(tmp_path, "a", status="failed", cause="OutOfMemory: at load", weights_digest=None),
        make(tmp_path, "a-r2"),
        make(tmp_path, "a-r3"),
        make(tmp_path, "b", weights_digest="other weights under the same name"),
    ]
    made = report(folders)
    assert [(variant.runs, variant.finished) for variant in made.variants] == [(("a", "a-r2", "a-r3"), 2), (("b",), 1)]
    assert equal(made)["base_weights"] is False


def test_the_answer_names_at_most_three_unfinished_variants(tmp_path: Path) -> None:
    bad = [
        make(tmp_path, f"bad{r}", f"lora.r={r}", status="failed", cause="OutOfMemory: no", samples_per_second=None)
        for r in range(1, 6)
    ]
    answer = report([*bad, make(tmp_path, "good")]).verdict
    assert (
        "bad3 has no finished run (out of memory). 2 more variants have no finished run." in answer
        and "bad4" not in answer
    )


def test_a_run_that_never_started_has_a_row_with_its_cause(tmp_path: Path) -> None:
    why = "there is no data file " + "x" * 100
    recipes = [load_recipe(["recipe=tiny", f"lora.r={r}"]).model_dump() for r in (1, 2)]
    absent = [
        Run.unread(tmp_path / name, NOT_THERE, cause, recipe)
        for name, cause, recipe in zip(("gone", "later"), (why, None), recipes, strict=True)
    ]
    made = report_on_runs([read_run(make(tmp_path, "a")), *absent])
    text = markdown(made)
    assert row(text, "Runs", "gone")["status"] == f"missing: {why}"[:63] + "…"
    assert row(text, "Runs", "later")["status"] == "missing"
    assert f"- `gone`: missing: {why}\n- `later`: missing\n" in text
    document = json.loads(made.to_json())
    assert document["missing"] == {"gone": why, "later": ""}
    assert [(variant["name"], variant["finished"]) for variant in document["variants"]] == [
        ("a", 1),
        ("gone", 0),
        ("later", 0),
    ]
    assert document["differences"] == {"lora.r": {"a": 16, "gone": 1, "later": 2}}, "their machine is unknown"
    assert "later has no finished run (missing)" in made.verdict


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
        rank = {
            "rank": 0,
            "step_time_s": 0.6 + idle,
            "compute_s": 0.6,
            "communication_exposed_s": 0.0,
            "copy_exposed_s": 0.0,
            "idle_s": idle,
            "data_wait_s": 0.1,
            "products_s": 0.5,
        }
        folder.profile.write_text(to_json({"steps": [4, 6], "device": "cuda", "ranks": [rank]}))
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
    assert (shown["bound"], shown["host, ms/step"], shown["saving, s"]) == (
        "arithmetic",
        "200.0 (22%)",
        "1.0",
    )
    assert f"- `{first.name}` is bound by arithmetic: compute 67%" in text
    stored = json.loads(made.to_json())["variants"][0]
    assert stored["bound"]["kind"] == "arithmetic" and stored["split"]["host_s"] == pytest.approx(0.2)


def test_without_a_profile_the_report_says_how_to_get_one(tmp_path: Path) -> None:
    assert "No run was profiled. Set tracking.profile_steps=3" in markdown(report([make(tmp_path, "a")]))
    damaged = make(tmp_path, "b")
    damaged.profile.write_text('{"ranks": [{}]}')
    with pytest.raises(RunFolderError, match=r"profile\.json is damaged"):
        report([damaged])
