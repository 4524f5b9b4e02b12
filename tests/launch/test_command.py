"""The command line and environment of workers, and a machine's place among the nodes of a run."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path

import pytest

from distft.cli.main import main
from distft.errors import LaunchError
from distft.launch.command import EVALUATION, worker_command, worker_environment
from distft.launch.node import Node, interface_of

RECIPE = ["recipe=tiny"]
WRONG = (
    "head:99999",
    "head:0",
    "head:",
    ":29500",
    "::1:29500",
    "[]:29500",
    "[head]:29500",
    "tcp://head:29500",
    "a b:29500",
)


def option(command: list[str], name: str) -> str:
    return command[command.index(f"--{name}") + 1]


def test_a_single_worker_needs_no_launcher() -> None:
    assert worker_command(RECIPE, 1, 3, Node()) == [sys.executable, "-m", "distft.train", *RECIPE]
    assert worker_command(RECIPE, 1, 3, Node(), EVALUATION)[1:] == ["-m", "distft.evaluation", *RECIPE]


def test_several_workers_are_started_and_restarted_by_accelerate() -> None:
    command = worker_command(RECIPE, 4, 3, Node())
    assert command[:4] == [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    assert (option(command, "num_processes"), option(command, "max_restarts")) == ("4", "3")
    assert option(command, "rdzv_backend") == "c10d"
    assert "--rdzv_conf" not in command
    assert Path(option(command, "config_file")).name == "launcher.yaml", "not the user's default_config.yaml"
    assert command[-3:] == ["-m", "distft.train", *RECIPE]


@pytest.mark.parametrize("rank", [0, 1])
def test_each_node_starts_its_share_and_node_0_hosts_the_rendezvous(rank: int) -> None:
    command = worker_command(RECIPE, 4, 0, Node(2, rank, "head:29500"))
    assert (option(command, "num_processes"), option(command, "num_machines")) == ("8", "2")
    assert option(command, "machine_rank") == str(rank)
    assert (option(command, "main_process_ip"), option(command, "main_process_port")) == ("head", "29500")
    assert option(command, "rdzv_conf").startswith(f"is_host={1 - rank},")


def test_the_environment_names_the_size_and_the_shared_folder_and_keeps_the_user_s_settings() -> None:
    made = worker_environment({"OMP_NUM_THREADS": "7", "HOME": "/h"}, 2, Path("/notes"), Node())
    assert made["DISTFT_NPROC"] == "2" and made["DISTFT_OUTCOME"] == "/notes"
    assert made["OMP_NUM_THREADS"] == "7" and made["HOME"] == "/h"
    assert made["PYTHONSAFEPATH"] == "1", "no worker imports what is in the working folder"


def test_two_runs_on_one_machine_do_not_share_a_rendezvous() -> None:
    ids = {worker_environment({}, 2, Path("/notes"), Node())["PET_RDZV_ID"] for _ in range(2)}
    assert len(ids) == 2


def test_nodes_of_one_run_share_a_rendezvous() -> None:
    made = worker_environment({}, 2, Path("/notes"), Node(2, 1, "127.0.0.1:29500"))
    assert made["PET_RDZV_ID"] == "127.0.0.1:29500" and made["PET_LOCAL_ADDR"] == "127.0.0.1"
    assert made["DISTFT_NPROC"] == "4"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "no-such-host.invalid"])
def test_loopback_has_no_interface_that_others_reach(address: str) -> None:
    assert interface_of(address) is None


def test_an_ipv6_address_of_node_0_is_written_in_brackets() -> None:
    for rank in range(2):
        node = Node.of(2, rank, "[::1]:29611")
        assert (node.host, node.port, node.address()) == ("::1", "29611", "::1")
        command = worker_command(RECIPE, 1, 0, node)
        assert (option(command, "main_process_ip"), option(command, "main_process_port")) == ("[::1]", "29611")
    assert worker_environment({}, 1, Path("/notes"), node)["PET_LOCAL_ADDR"] == "::1"


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_port_in_use_is_found_on_node_0_at_once(
    family: int, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket(family) as taken:
        taken.bind((address, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["train", "recipe=tiny", "--nnodes", "2", "--rdzv", f"127.0.0.1:{port}"]) == 2
        assert capsys.readouterr().err == (
            f"distft: --rdzv 127.0.0.1:{port}: port {port} is not free on this machine (Address already in use); "
            "choose another port, the same on every node\n"
        )
        Node.of(2, 1, f"127.0.0.1:{port}").check_rendezvous()  # where node 0 listens
    Node.of(2, 0, f"127.0.0.1:{port}").check_rendezvous()


def test_a_host_that_node_0_cannot_resolve_is_found_there_too() -> None:
    for rank in range(2):
        with pytest.raises(LaunchError, match=r"no-such-host.invalid cannot be reached from here"):
            Node.of(2, rank, "no-such-host.invalid:29500").check_rendezvous()


@pytest.mark.parametrize(
    ("count", "rank", "rendezvous", "message"),
    [
        (2, 2, "head:29500", "nodes are counted from 0 to 1"),
        (1, 1, "", "nodes are counted from 0 to 0"),
        (2, -1, "head:29500", "nodes are counted from 0 to 1"),
        (0, 0, "", "the number of nodes must be at least 1, got --nnodes 0"),
        (-2, 0, "", "the number of nodes must be at least 1, got --nnodes -2"),
        (2, 0, "", "needs --rdzv HOST:PORT"),
        (2, 0, "head", "got head"),
        *((2, 0, wrong, f"got {re.escape(wrong)}") for wrong in WRONG),
    ],
)
def test_an_invalid_place_is_rejected(count: int, rank: int, rendezvous: str, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        Node.of(count, rank, rendezvous)
