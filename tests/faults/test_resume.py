"""Interrupted at any step and resumed, a run is the one that was never interrupted, to the bit on CPU."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from distft.runs import manifest
from distft.runs.folder import RunFolder

from ..distributed.conftest import finish
from ..distributed.test_guards import wait_for_step
from .conftest import KINDS, STEPS, assert_same_run, begin, go, losses

Whole = Callable[[str], RunFolder]


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_saves_and_the_same_command_goes_on_to_the_same_end(
    kind: str, uninterrupted: Whole, tmp_path: Path
) -> None:
    whole = uninterrupted(kind)
    process = begin(tmp_path, kind)
    folder = wait_for_step(tmp_path, 4)
    process.send_signal(signal.SIGTERM)
    ended = finish(process, tmp_path)
    assert ended.code == 75, ended.stderr[-3000:]
    assert "The same command resumes from it" in ended.stderr
    checkpoint, skipped = manifest.newest(folder.checkpoints)
    assert checkpoint is not None and not skipped
    stopped = manifest.step_of(checkpoint)
    assert 4 <= stopped < STEPS and f"after step {stopped}" in folder.read_summary()["cause"]

    resumed = go(tmp_path, kind)
    assert resumed.code == 0, resumed.stderr[-3000:]
    assert f"resuming {folder.path} after step {stopped}" in resumed.stderr
    assert_same_run(folder, whole)
    summary = folder.read_summary()
    assert (summary["restarts"], summary["status"], summary["steps"]) == (1, "finished", STEPS)
    assert summary["eval_before"] == whole.read_summary()["eval_before"]
    assert summary["tokens"] == whole.read_summary()["tokens"]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_checkpoints_are_skipped_and_an_older_one_is_taken(
    kind: str, uninterrupted: Whole, tmp_path: Path
) -> None:
    whole = uninterrupted(kind)
    process = begin(tmp_path, kind, "training.save_total_limit=4")
    folder = wait_for_step(tmp_path, 10)
    process.send_signal(signal.SIGTERM)
    assert finish(process, tmp_path).code == 75
    newest, second, third = sorted(folder.checkpoints.glob("checkpoint-*"), key=manifest.step_of, reverse=True)[:3]
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    (second / "manifest.json").unlink()
    resumed = go(tmp_path, kind, "training.save_total_limit=4")
    assert resumed.code == 0, resumed.stderr[-3000:]
    assert f"skipping {newest.name}: {largest.relative_to(newest)} is damaged" in resumed.stderr
    assert f"skipping {second.name}: it has no manifest" in resumed.stderr
    assert f"after step {manifest.step_of(third)}" in resumed.stderr
    assert_same_run(folder, whole)


@pytest.mark.parametrize(("before", "after"), [("ddp", "single"), ("single", "ddp")])
def test_another_world_size_goes_on_with_the_same_samples(before: str, after: str, tmp_path: Path) -> None:
    still = ("lora.lora_dropout=0",)
    whole = go(tmp_path / "whole", before, *still).folder
    process = begin(tmp_path / "changed", before, *still)
    wait_for_step(tmp_path / "changed", 4)
    process.send_signal(signal.SIGTERM)
    assert finish(process, tmp_path / "changed").code == 75
    resumed = go(tmp_path / "changed", after, *still)
    assert resumed.code == 0, resumed.stderr[-3000:]
    sizes = [KINDS[kind][1] for kind in (after, before)]
    line = f"world size {sizes[0]} instead of {sizes[1]}: every step has the same samples"
    assert line in resumed.stderr
    assert any(line in note for note in resumed.folder.read_summary()["changed_for_you"])
    ours, theirs = losses(resumed.folder), losses(whole)
    assert [step for step, *_ in ours] == [step for step, *_ in theirs]
    for (step, loss, _), (_, expected, _) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(expected, abs=1e-4), step


def test_fsdp_restores_the_shard_of_every_rank(uninterrupted: Whole, tmp_path: Path) -> None:
    """At the last step each rank's shard of the adapter and of the optimizer's states, and its random state, are those
    of the run that was never interrupted; so are they if every rank got its own back, and not rank 0's."""
    whole = uninterrupted("fsdp")
    process = begin(tmp_path, "fsdp")
    folder = wait_for_step(tmp_path, 4)
    process.send_signal(signal.SIGTERM)
    assert finish(process, tmp_path).code == 75
    assert go(tmp_path, "fsdp").code == 0
    last = f"checkpoint-{STEPS}"
    ours, theirs = (manifest.read(run.checkpoints / last)["files"] for run in (folder, whole))
    shards = [name for name in theirs if name.endswith(".distcp")]
    assert sorted(shards) == [
        f"{part}_0/__{rank}_0.distcp" for part in ("optimizer", "pytorch_model_fsdp") for rank in (0, 1)
    ]
    assert theirs[shards[0]]["sha256"] != theirs[shards[1]]["sha256"], "each rank has another shard"
    for name in [*shards, "rng_state_0.pth", "rng_state_1.pth", "scheduler.pt"]:
        assert ours[name] == theirs[name], name


def test_shards_are_refused_where_they_cannot_be_read(tmp_path: Path) -> None:
    process = begin(tmp_path, "fsdp")
    wait_for_step(tmp_path, 4)
    process.send_signal(signal.SIGTERM)
    assert finish(process, tmp_path).code == 75
    overrides, _ = KINDS["fsdp"]
    refused = go(tmp_path, "single", *overrides)
    assert refused.code == 2
    assert "has checkpoints in the format 'sharded by fsdp'; single on 1 process cannot read them" in refused.stderr


def test_a_changed_recipe_is_refused_with_its_differences(tmp_path: Path) -> None:
    process = begin(tmp_path, "single")
    wait_for_step(tmp_path, 4)
    process.send_signal(signal.SIGTERM)
    assert finish(process, tmp_path).code == 75
    refused = go(tmp_path, "single", "training.learning_rate=1e-5", "lora.lora_dropout=0", "--resume")
    assert refused.code == 2
    assert "training.learning_rate: was 0.003, is now 1e-05" in refused.stderr
    assert "lora.lora_dropout: was 0.05, is now 0" in refused.stderr
    assert "run.force=true" in refused.stderr
    taken = go(tmp_path, "single", "training.learning_rate=1e-5", "lora.lora_dropout=0", "run.force=true")
    assert taken.code == 0, taken.stderr[-3000:]
    assert taken.folder.read_summary()["restarts"] == 1


def test_two_runs_at_once_never_share_a_folder(tmp_path: Path) -> None:
    same = (
        "run.name=shared",
        "training.num_train_epochs=1000",
    )  # the first is still at work when the second has started
    first = begin(tmp_path, "single", *same)
    wait_for_step(tmp_path, 4)
    second = go(tmp_path, "single", *same)
    assert second.code == 2
    assert "another process is running in" in second.stderr
    first.send_signal(signal.SIGTERM)
    assert finish(first, tmp_path).code == 75


def test_retention_keeps_the_newest_and_a_manifest_is_strict(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "weights").write_bytes(bytes([step]) * 100)
        manifest.write(checkpoint, {"step": step})
    unfinished = tmp_path / "checkpoint-4"
    unfinished.mkdir()
    manifest.retire(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    (tmp_path / "checkpoint-3" / "weights").write_bytes(b"\3" * 99)
    found, skipped = manifest.newest(tmp_path)
    assert found == tmp_path / "checkpoint-2"
    assert skipped == [
        "skipping checkpoint-4: it has no manifest, so saving it did not finish",
        "skipping checkpoint-3: weights has 99 bytes instead of 100",
    ]
    (tmp_path / "checkpoint-2" / "manifest.json").write_text(json.dumps({"step": 2})[:-3])
    assert manifest.newest(tmp_path)[0] is None
