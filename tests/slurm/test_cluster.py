"""The cluster of the tests is what the other tests here take it for: nodes that are hosts, jobs that start again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

from . import cluster as program
from .cluster import Cluster

CONNECT = """\
import os, socket, time
head, rank = os.environ["HEAD"], int(os.environ["SLURM_PROCID"])
if rank == 0:
    with socket.create_server((socket.gethostbyname(head), 29500)) as server:
        print(server.accept()[0].recv(9).decode())
else:
    for attempt in range(100):
        try:
            socket.create_connection((head, 29500)).send(socket.gethostname().encode())
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
"""


def test_a_node_reaches_the_head_node_by_its_name(cluster: Cluster) -> None:
    (cluster.folder / "jobs" / "connect.py").write_text(CONNECT)
    job = cluster.script(
        "export HEAD=$(scontrol show hostnames | head -n1)\nsrun hostname\n"
        f"srun --ntasks-per-node=1 {sys.executable} {cluster.folder}/jobs/connect.py\n",
        "--nodes=2",
        "--ntasks-per-node=1",
        name="connect",
    )
    assert cluster.wait(job) == "COMPLETED", cluster.output(job).read_text()
    *names, connected = cluster.output(job).read_text().split()
    assert len(set(names)) == 2 and set(names) <= set(cluster.nodes)
    assert connected == max(names)


def test_a_requeued_job_starts_again(cluster: Cluster) -> None:
    job = cluster.script('echo "${SLURM_RESTART_COUNT:-first}"\n[ -n "$SLURM_RESTART_COUNT" ] || sleep 300\n')
    cluster.wait(job, {"RUNNING"})
    cluster.call("scontrol", "requeue", job)
    assert cluster.wait(job, limit_s=60) == "COMPLETED"
    assert cluster.show(job)["Restarts"] == "1"
    assert "REQUEUED" in cluster.call("sacct", "--duplicates", "--noheader", "--format=State", f"--jobs={job}")
    printed = cluster.output(job).read_text().split()
    assert printed[-1] == "1", printed  # "first" stands before it where the shell came that far


def test_a_job_of_higher_priority_preempts(cluster: Cluster) -> None:
    low = cluster.script("sleep 300\n", "--partition=low", "--nodes=4", "--exclusive", name="low")
    cluster.wait(low, {"RUNNING"})
    high = cluster.script("true\n", "--partition=high", "--nodes=4", "--exclusive", name="high")
    assert cluster.wait(high, limit_s=120) == "COMPLETED"
    assert cluster.show(low)["Restarts"] == "1"
    cluster.call("scancel", low)
    cluster.wait(low)


def test_a_node_goes_down_and_comes_back(cluster: Cluster) -> None:
    node = cluster.nodes[-1]
    cluster.set_node(node, "down")
    assert cluster.node_states()[node] == "down"
    cluster.set_node(node, "resume")
    cluster.wait_idle()
    cluster.crash(node)
    cluster.start_node(node)
    job = cluster.script("hostname\n", f"--nodelist={node}")
    assert cluster.wait(job) == "COMPLETED"
    assert cluster.output(job).read_text().split() == [node]


def test_down_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    """Also beside another cluster, with a job that runs, and after the process that started it has ended."""

    def command(what: str) -> None:
        subprocess.run([sys.executable, program.__file__, what, tmp_path, "--nodes=2"], check=True, timeout=120)

    def links() -> set[str]:
        return set(psutil.net_if_addrs())

    def sleepers() -> list[psutil.Process]:
        return [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == ["sleep", "4242"]]

    before = links()
    command("up")
    other = Cluster(tmp_path, nodes=2)
    job = other.script("setsid sleep 4242 &\nsrun --ntasks-per-node=1 sleep 4242\n", "--nodes=2", "--ntasks-per-node=1")
    other.wait(job, {"RUNNING"})
    other.call("bash", "-c", "until pgrep --full --exact 'sleep 4242'; do sleep 0.1; done")
    assert links() > before
    command("down")
    assert not sleepers()
    assert links() == before
    named = [process.pid for process in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(process.info)]
    assert not named
    command("down")
    assert set(cluster.node_states()) == set(cluster.nodes)
