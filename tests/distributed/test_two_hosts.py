"""Two machines without a scheduler run the same command. Here they are two network namespaces, joined by a veth
pair."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distft.runs.folder import RunFolder
from distft.training.checkpoints import read_tensors

from .conftest import Ended, finish, start

ADDRESSES = ("10.213.7.1", "10.213.7.2")
MEETING = f"{ADDRESSES[0]}:29617"
RUN = (
    "recipe=tiny",
    "training.max_steps=6",
    "training.logging_steps=1",
    "tracking.report_to=[]",
    "evaluation.before_and_after=false",
    "training.eval_strategy=no",
)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[str, str]]:
    """Names of two network namespaces; nothing leads out of them but the cable between them."""
    names = tuple(f"distft{os.getpid()}h{number}" for number in range(2))
    why = None
    if shutil.which("ip") is None:
        why = "needs ip (Debian's package iproute2)"
    elif os.getuid() != 0:
        why = "needs root to make network namespaces"
    if why is None:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
            for name, address in zip(names, ADDRESSES, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "eth0", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            why = f"network namespaces cannot be made here: {error.stderr.strip()}"
    try:
        if why is not None:
            pytest.fail(why) if os.environ.get("DISTFT_CI") else pytest.skip(why)
        yield names[0], names[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def train(where: Path, hosts: tuple[str, str], *more: str) -> list[Ended]:
    """The command on both hosts, to the end of both."""
    command = [
        sys.executable,
        "-m",
        "distft.cli",
        "train",
        *RUN,
        *more,
        "--nnodes",
        "2",
        "--rdzv",
        MEETING,
        "--node-rank",
    ]
    started = [
        start(["ip", "netns", "exec", host, *command, str(number)], where, OMP_NUM_THREADS="1")
        for number, host in enumerate(hosts)
    ]
    return [finish(process, where) for process in started]


def test_two_hosts_meet_and_train_as_one(hosts: tuple[str, str], tmp_path: Path) -> None:
    """The same losses and adapter as two processes of one machine, to the bit."""
    there = tmp_path / "there"
    there.mkdir()
    for ended in train(there, hosts):
        assert ended.code == 0, ended.stderr[-3000:]
    (folder,) = map(RunFolder, (there / "runs").iterdir())
    summary = folder.read_summary()
    assert (summary["status"], summary["world_size"], summary["steps"]) == ("finished", 2, 6)

    here = tmp_path / "here"
    here.mkdir()
    local = [sys.executable, "-m", "distft.cli", "train", *RUN, "--nproc", "2"]
    ended = finish(start(local, here, OMP_NUM_THREADS="1"), here)
    assert ended.code == 0, ended.stderr[-3000:]
    losses = [
        [(record["loss"], record["grad_norm"]) for record in run.read_metrics() if "loss" in record]
        for run in (folder, ended.folder)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    ours, theirs = read_tensors(folder.adapter), read_tensors(ended.folder.adapter)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_mistake_on_two_hosts_ends_both(hosts: tuple[str, str], tmp_path: Path) -> None:
    for ended in train(tmp_path, hosts, "lora.target_modules=[query]"):
        assert ended.code == 2
        assert ended.stderr.count("lora.target_modules: 'query' matches no module") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--nnodes", "2"), "--nnodes 2 needs --rdzv HOST:PORT"),
        (("--nnodes", "2", "--rdzv", "here"), "got here"),
        (("--nnodes", "2", "--rdzv", "here:29500", "--node-rank", "2"), "nodes are counted from 0 to 1"),
        (
            ("--nnodes", "2", "--rdzv", "no-such-host.invalid:29500", "--node-rank", "1"),
            "no-such-host.invalid cannot be reached from here",
        ),
    ],
)
def test_a_place_that_is_none_is_refused(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distft.cli", "train", "recipe=tiny", *words]
    ended = finish(start(command, tmp_path), tmp_path)
    assert ended.code == 2
    assert message in ended.stderr
