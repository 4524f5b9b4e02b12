"""Variables that another launcher left in the shell: removed and named, or refused with what to unset."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from distft.distributed.launcher_args import Launcher
from distft.distributed.leftovers import check_meeting, remove_empty, remove_launch, remove_settings
from distft.distributed.process import guarded
from distft.distributed.world import World
from distft.errors import LaunchError
from distft.launch import local

LEFT = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "29500", "TORCHELASTIC_MAX_RESTARTS": "3"}
SETTINGS = {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true", "ACCELERATE_MIXED_PRECISION": "fp16"}
KEPT = {"HOME": "/h", "FSDP_RESHARD_AFTER_FORWARD": "true", "ACCELERATE_LOG_LEVEL": "info", "NCCL_DEBUG": "WARN"}


def test_what_a_launcher_left_is_removed_and_named() -> None:
    environment = {**LEFT, **SETTINGS, **KEPT, "LOCAL_WORLD_SIZE": ""}
    removed = remove_launch(environment)
    assert environment == KEPT
    assert sorted(removed) == sorted(f"{name}={value}" for name, value in (LEFT | SETTINGS).items())


def test_a_worker_keeps_its_place_and_loses_settings() -> None:
    environment = {**LEFT, **SETTINGS, **KEPT}
    assert remove_settings(environment) == [f"{name}={value}" for name, value in SETTINGS.items()]
    assert environment == {**LEFT, **KEPT}


def test_distft_train_says_what_it_ignores(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "PET_"))]:
        monkeypatch.delenv(name)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}.items():
        monkeypatch.setenv(name, value)
    environment = local._own_environment()
    assert not environment.keys() & {"RANK", "WORLD_SIZE", "ACCELERATE_USE_FSDP"}
    said = "distft: ignoring RANK=0, WORLD_SIZE=2, ACCELERATE_USE_FSDP=true, left over in the environment"
    assert capsys.readouterr().err.startswith(said)


def test_empty_variables_are_as_good_as_none() -> None:
    environment = {"RANK": "", "WORLD_SIZE": " ", "LOCAL_RANK": "", "HOME": ""}
    assert World.from_environment(environment) == World()
    remove_empty(environment)
    assert environment == {"HOME": ""}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "the environment has RANK=0, but no WORLD_SIZE; .*: unset RANK$"),
        ({"WORLD_SIZE": "2", "RANK": ""}, "the environment has WORLD_SIZE=2, but no RANK; .*: unset WORLD_SIZE$"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 of WORLD_SIZE=2; ranks are counted from 0"),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, "RANK=zero, which is not a number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1, which is not a number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "LOCAL_RANK=x, which is not a number"),
    ],
)
def test_a_place_that_is_none_is_refused(environment: Mapping[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        World.from_environment(environment)


def test_one_process_may_be_given_a_size_of_one() -> None:
    assert World.from_environment({"WORLD_SIZE": "1"}) == World()
    assert World.from_environment({"WORLD_SIZE": "1", "RANK": "0"}) == World()


def test_a_worker_without_a_meeting_point_is_told_what_to_unset() -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "2"}
    with pytest.raises(LaunchError) as caught:
        check_meeting(2, environment)
    message = str(caught.value)
    assert message.startswith("the environment has RANK=0 and WORLD_SIZE=2, but no MASTER_ADDR and no MASTER_PORT")
    assert "unset RANK WORLD_SIZE LOCAL_RANK" in message and "distft train, with the same arguments" in message
    check_meeting(2, {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"})
    check_meeting(2, {"SLURM_STEP_NUM_TASKS": "2"})  # which export() gives a meeting point
    check_meeting(1, {"RANK": "0", "WORLD_SIZE": "1"})


def test_a_worker_ends_with_2_and_a_command_takes_no_notice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    done = []
    assert guarded(lambda: done.append("worker"), of_launcher=True) == 2
    assert "unset RANK WORLD_SIZE" in capsys.readouterr().err
    assert guarded(lambda: done.append("command")) == 0
    assert done == ["command"] and capsys.readouterr().err == ""


def test_settings_that_no_launcher_made_are_ignored_aloud(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    seen = []
    assert guarded(lambda: seen.append("ACCELERATE_USE_DEEPSPEED" in os.environ), of_launcher=True) == 0
    assert seen == [False]
    assert "distft: ignoring ACCELERATE_USE_DEEPSPEED=true: the recipe decides" in capsys.readouterr().err


def test_a_compiler_that_only_the_launcher_asks_for_is_refused() -> None:
    environment = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}
    with pytest.raises(LaunchError, match="dynamo backend INDUCTOR, which would compile the model"):
        Launcher().check_agrees(World(), environment, "tiny", "ddp", "no", "COMMAND")
    Launcher().check_agrees(World(), {"ACCELERATE_DYNAMO_BACKEND": "NO"}, "tiny", "ddp", "no", "COMMAND")


def test_workers_of_distft_train_do_not_judge_its_own_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DISTFT_OUTCOME", str(tmp_path))
    assert Launcher.of_parent() == Launcher()
