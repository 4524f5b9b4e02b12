"""The place of a process, from the variables that each launcher sets, and messages that are printed once per node."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distft.distributed.process import say_once
from distft.distributed.world import World

# What Slurm 23 sets in the batch script of `sbatch --nodes=2 --ntasks-per-node=8` …
BATCH = {
    "SLURM_JOB_ID": "4242",
    "SLURM_NTASKS": "16",
    "SLURM_NPROCS": "16",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_TASKS_PER_NODE": "8(x2)",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
# … and in the tenth task of an `srun` in it.
STEP = BATCH | {
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}
TORCHRUN = {
    "RANK": "9",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "16",
    "LOCAL_WORLD_SIZE": "8",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29500",
}


def test_an_empty_environment_is_one_process() -> None:
    world = World.from_environment({})
    assert world == World(rank=0, local_rank=0, world_size=1, local_world_size=1, node=0)
    assert world.is_main


def test_torchrun_s_variables_are_read() -> None:
    world = World.from_environment(TORCHRUN)
    assert world == World(rank=9, local_rank=1, world_size=16, local_world_size=8, node=1)
    assert not world.is_main


def test_torchrun_takes_precedence_over_the_slurm_step_that_started_it() -> None:
    # One srun task a node starts torchrun there, so the step counts nodes and torchrun counts processes.
    step = STEP | {
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    }
    assert World.from_environment(step | TORCHRUN) == World(9, 1, 16, 8, 1)


def test_accelerate_s_variables_for_one_process_are_one_process() -> None:
    assert (
        World.from_environment(
            {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True", "OMP_NUM_THREADS": "1"}
        )
        == World()
    )


def test_workers_of_accelerate_s_notebook_launcher_are_on_one_node() -> None:
    # accelerate.notebook_launcher sets these three and no LOCAL_WORLD_SIZE.
    assert World.from_environment({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}) == World(1, 1, 2, 2, 0)


def test_the_node_is_derived_from_the_rank_if_the_launcher_does_not_set_it() -> None:
    environment = {key: value for key, value in TORCHRUN.items() if key != "GROUP_RANK"}
    assert World.from_environment(environment).node == 1


def test_the_tasks_of_srun_are_processes() -> None:
    assert World.from_environment(STEP) == World(rank=9, local_rank=1, world_size=16, local_world_size=8, node=1)


def test_the_shell_of_a_slurm_batch_job_is_one_process() -> None:
    assert World.from_environment(BATCH) == World()


def test_a_slurm_step_of_one_task_is_one_process() -> None:
    assert World.from_environment(BATCH | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}) == World()


@pytest.mark.parametrize(
    ("tasks", "sizes"), [("2,1", [2, 1]), ("4(x2),2", [4, 4, 2]), ("3,1(x2)", [3, 1, 1])], ids=lambda value: str(value)
)
def test_the_local_size_is_that_of_this_node_even_if_nodes_differ(tasks: str, sizes: list[int]) -> None:
    found = []
    for node, size in enumerate(sizes):
        place = {
            "SLURM_NODEID": str(node),
            "SLURM_PROCID": str(sum(sizes[:node]) + size - 1),
            "SLURM_LOCALID": str(size - 1),
        }
        environment = STEP | place | {"SLURM_STEP_NUM_TASKS": str(sum(sizes)), "SLURM_STEP_TASKS_PER_NODE": tasks}
        found.append(World.from_environment(environment).local_world_size)
    assert found == sizes


def test_the_place_within_a_slurm_step_is_exported_for_torch() -> None:
    environment = dict(STEP)
    World.from_environment(environment).export(environment)
    assert {key: environment[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")} == {
        "RANK": "9",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "16",
        "LOCAL_WORLD_SIZE": "8",
    }
    assert environment["MASTER_ADDR"] and 1024 <= int(environment["MASTER_PORT"]) < 65_536
    # The exported variables describe the same place.
    assert World.from_environment(environment) == World.from_environment(STEP)


def test_all_tasks_of_a_step_export_the_same_address_and_port() -> None:
    addresses = set()
    for task in ("0", "9"):
        environment = STEP | {"SLURM_PROCID": task}
        World.from_environment(environment).export(environment)
        addresses.add((environment["MASTER_ADDR"], environment["MASTER_PORT"]))
    assert len(addresses) == 1


@pytest.mark.parametrize("environment", [TORCHRUN, BATCH, {}], ids=["torchrun", "batch shell", "nothing"])
def test_variables_set_by_a_launcher_are_kept(environment: dict[str, str]) -> None:
    exported = dict(environment)
    World.from_environment(environment).export(exported)
    assert exported == environment


# A launch of two workers with this process as their parent, restarted for each further attempt.
LAUNCHER = """
import os, subprocess, sys
worker = "from os import environ; from distft.distributed.process import say_once; "
worker += "from distft.distributed.world import World; "
worker += "say_once('no data', World.from_environment(environ), environ)"
for attempt in range(int(sys.argv[1])):
    environment = {**os.environ, "WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": str(attempt)}
    places = [{**environment, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    workers = [subprocess.Popen([sys.executable, "-c", worker], env=place) for place in places]
    assert [worker.wait() for worker in workers] == [0, 0]
"""


def launch(folder: Path, attempts: int = 1) -> list[str]:
    """The stderr lines of a launch. TMPDIR is the test's own, so that nothing is left behind."""
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, str(attempts)], env=environment, capture_output=True, text=True, check=True
    )
    return done.stderr.splitlines()


def test_two_processes_of_one_launch_print_once(tmp_path: Path) -> None:
    assert launch(tmp_path) == ["distft: no data"]


def test_a_second_launch_prints_again(tmp_path: Path) -> None:
    assert launch(tmp_path) + launch(tmp_path) == ["distft: no data"] * 2


def test_a_restarted_attempt_prints_again(tmp_path: Path) -> None:
    assert launch(tmp_path, attempts=3) == ["distft: no data"] * 3


def test_a_single_process_always_prints(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        say_once("no data", World(), {})
    assert capsys.readouterr().err == "distft: no data\n" * 2
