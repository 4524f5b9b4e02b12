"""Which folder a command continues in: the run it was stopped in, if recipe, data and base are still the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distft.config.recipe import load_recipe
from distft.distributed.strategies.selection import strategy_for
from distft.distributed.world import World
from distft.errors import RunFolderError
from distft.runs import manifest
from distft.runs.folder import RunFolder
from distft.runs.resume import Place, find_place

FACTS = {"data_digest": "d1", "held_out_digest": "h1", "weights_digest": "w1", "start_digest": None}


def place(where: Path, *words: str, facts: dict[str, Any] | None = None) -> Place:
    """Where the command `distft train recipe=tiny WORDS` would write."""
    recipe = load_recipe(["recipe=tiny", *words])
    found, lock = find_place(recipe, strategy_for(recipe, World(), on_gpu=False), where, facts or FACTS)
    lock.release()
    return found


def begin(where: Path, *words: str, status: str = "interrupted", step: int = 4, **digests: Any) -> RunFolder:
    """A run folder as `distft train recipe=tiny WORDS` leaves it, with a checkpoint after `step` unless that is 0."""
    folder = place(where, "run.resume=never", *words).folder
    folder.recipe.write_text(load_recipe(["recipe=tiny", *words]).to_yaml())
    folder.write_summary({"status": status, "cause": "SIGTERM", "restarts": 0, **FACTS, **digests})
    if step:
        checkpoint(folder, step, "optimizer.pt")
    return folder


def checkpoint(folder: RunFolder, step: int, *files: str) -> Path:
    path = folder.checkpoints / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "trainer_state.json", *files):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"x")
    manifest.write(path, {"step": step, "world_size": 1, "format": "whole", "carried": {}})
    return path


def test_the_same_command_continues(tmp_path: Path) -> None:
    folder = begin(tmp_path)
    found = place(tmp_path)
    assert (found.folder, found.claimed, found.step) == (folder, False, 4)
    assert [note.partition(" (")[0] for note in found.notes] == [f"resuming {folder.path} after step 4"]


def test_other_settings_start_a_new_run_and_say_so(tmp_path: Path) -> None:
    begin(tmp_path)
    found = place(tmp_path, "training.learning_rate=1e-5")
    assert found.folder.name == "tiny-2" and found.claimed
    (note,) = found.notes
    assert note.startswith(f"starting a new run: {tmp_path / 'runs' / 'tiny'} was interrupted with different settings")
    assert "training.learning_rate: was 0.003, is now 1e-05" in note


def test_resume_insists_and_shows_what_has_changed(tmp_path: Path) -> None:
    begin(tmp_path)
    assert place(tmp_path, "run.resume=must").step == 4
    with pytest.raises(RunFolderError, match=r"training\.learning_rate: was 0\.003, is now 1e-05"):
        place(tmp_path, "run.resume=must", "training.learning_rate=1e-5")
    assert place(tmp_path, "run.force=true", "training.learning_rate=1e-5").step == 4


@pytest.mark.parametrize("before", [None, "finished"])
def test_resume_without_an_interrupted_run_is_a_mistake(before: str | None, tmp_path: Path) -> None:
    if before is not None:
        begin(tmp_path, status=before)
    with pytest.raises(RunFolderError, match="there is no interrupted run of the name tiny"):
        place(tmp_path, "run.resume=must")
    assert place(tmp_path).claimed


def test_a_name_on_the_command_line_is_never_another_folder(tmp_path: Path) -> None:
    begin(tmp_path, "run.name=mine")
    with pytest.raises(RunFolderError, match=r"run\.force=true"):
        place(tmp_path, "run.name=mine", "training.learning_rate=1e-5")


def test_the_first_settings_again_find_their_own_run(tmp_path: Path) -> None:
    """In between, other settings made a run of their own, which may even have finished."""
    folder = begin(tmp_path)
    begin(tmp_path, "training.learning_rate=1e-5", status="finished")
    assert place(tmp_path).folder == folder
    assert place(tmp_path, "training.learning_rate=1e-5").folder.name == "tiny-3"


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("data_digest", "the training data"),
        ("held_out_digest", "the held-out data"),
        ("weights_digest", "the base's weights"),
    ],
)
def test_other_data_or_another_base_are_not_continued(key: str, what: str, tmp_path: Path) -> None:
    begin(tmp_path)
    changed = FACTS | {key: "new"}
    line = f"{what}: the digest was {FACTS[key]}, is now new"
    found = place(tmp_path, facts=changed)
    assert found.claimed and line in found.notes[0]
    with pytest.raises(RunFolderError, match=line):
        place(tmp_path, "run.resume=must", facts=changed)
    forced = place(tmp_path, "run.force=true", facts=changed)
    assert forced.step == 4 and line in forced.notes


def test_the_adapter_that_a_run_starts_from_is_known_by_its_content(tmp_path: Path) -> None:
    """It may have been moved, but not changed."""
    facts = FACTS | {"start_digest": "s1"}
    begin(tmp_path, "adapter=a", start_digest="s1")
    assert place(tmp_path, "adapter=b", facts=facts).step == 4
    with pytest.raises(RunFolderError, match="the adapter that it starts from: the digest was s1, is now s2"):
        place(tmp_path, "adapter=a", "run.resume=must", facts=facts | {"start_digest": "s2"})
    with pytest.raises(RunFolderError, match=r"adapter: was '.*/a', is now None"):
        place(tmp_path, "run.resume=must")


def test_a_run_that_recorded_no_digest_is_continued_with_a_note(tmp_path: Path) -> None:
    begin(tmp_path, held_out_digest=None, weights_digest=None)
    assert place(tmp_path).notes[-1] == (
        "not checked whether it changed, because the run did not record its digest: the held-out data, the base's "
        "weights"
    )


def test_weights_without_their_optimizer_are_no_checkpoint_to_resume_from(tmp_path: Path) -> None:
    """As `training.save_only_model` saves them."""
    folder = begin(tmp_path)
    checkpoint(folder, 6)
    found = place(tmp_path)
    assert found.step == 4
    assert "skipping checkpoint-6: it has the weights but not the optimizer's state" in found.notes[0]
    checkpoint(folder, 8, "optimizer_0/__0_0.distcp")
    assert place(tmp_path).step == 8
    checkpoint(folder, 9, "global_step9/zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert place(tmp_path).step == 9


@pytest.mark.parametrize(("keep", "left"), [(None, 5), (-1, 5), (0, 5), (2, 2), (9, 5)])
def test_retention_counts_as_upstream_does(keep: int | None, left: int, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in range(1, 6):
        checkpoint(folder, step, "optimizer.pt")
    manifest.retire(folder.checkpoints, keep)
    assert sorted(map(manifest.step_of, folder.checkpoints.iterdir())) == list(range(6 - left, 6))


def test_retention_keeps_the_newest_that_a_run_can_resume_from(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2):
        checkpoint(folder, step, "optimizer.pt")
    for step in (3, 4):
        checkpoint(folder, step)
    (folder.checkpoints / "checkpoint-1" / "manifest.json").write_text(json.dumps({"step": 1})[:-3])
    manifest.retire(folder.checkpoints, 1)
    assert sorted(map(manifest.step_of, folder.checkpoints.iterdir())) == [2, 4]


def test_a_folder_that_is_a_dangling_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(tmp_path / "gone")
    assert place(tmp_path).folder.name == "tiny-2"
    (tmp_path / "runs" / "tiny-3").symlink_to(tmp_path / "gone")
    with pytest.raises(RunFolderError, match=r"in use.* run\.name=tiny-4$"):
        RunFolder.claim(tmp_path / "runs", "tiny", exact=True)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(RunFolderError, match=r"cannot create the folder .*link.*set run\.dir"):
        RunFolder.claim(tmp_path / "link", "tiny", exact=False)


def test_what_a_run_may_be_continued_with(tmp_path: Path) -> None:
    """Not with what would compare two different sets of held-out samples, or steer the learning rate."""
    begin(tmp_path, "evaluation.tasks=[]", "training.eval_strategy=steps", "training.eval_steps=2")
    free = ("training.eval_strategy=no", "training.logging_steps=1", "batching.micro_batch=2", "tracking.tags=[a]")
    assert place(tmp_path, *free).step == 4
    for word in ("evaluation.max_samples=8", "evaluation.before_and_after=false"):
        assert place(tmp_path, "training.eval_strategy=steps", "training.eval_steps=2", word).claimed
    steered = ("training.lr_scheduler_type=reduce_lr_on_plateau", "training.eval_strategy=steps")
    begin(tmp_path, *steered, "training.eval_steps=2", "run.name=steered")
    assert place(tmp_path, *steered, "training.eval_steps=2", "run.name=steered").step == 4
    with pytest.raises(RunFolderError, match=r"training\.eval_steps: was 2, is now 3"):
        place(tmp_path, *steered, "training.eval_steps=3", "run.name=steered")


def test_a_key_that_the_earlier_version_did_not_have_has_not_changed(tmp_path: Path) -> None:
    folder = begin(tmp_path)
    lines = folder.recipe.read_text().splitlines(keepends=True)
    folder.recipe.write_text("".join(line for line in lines if "trust_remote_code" not in line))
    assert place(tmp_path).step == 4
    folder.recipe.unlink()
    found = place(tmp_path)
    assert found.claimed and "recipe.yaml is not valid any more" in found.notes[0]
