"""A real SLURM cluster on this machine, each node in namespaces of its own: `python tests/slurm/cluster.py up FOLDER`.

Every node lives in namespaces of its own: it has its host name, its address on a bridge, its processes and an
`/etc/hosts` in which the other nodes' names stand. So a node resolves and reaches the others as on a cluster, `crash`
takes a node away with everything on it, and nothing of this machine's settings is changed. Everything that is written
lies under FOLDER; `python tests/slurm/cluster.py down FOLDER` ends what `up` started, whoever called it and however it
ended. It needs root and Debian's packages (`PACKAGES`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

PACKAGES = "munge slurmctld slurmd slurmdbd slurm-client mariadb-server-core iproute2"
PROGRAMS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd", "sbatch", "scontrol", "ip", "nsenter", "unshare")
START_LIMIT_S = 60
ENDED = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY"}
)
MARK = "DISTFT_TEST_CLUSTER"
"""Stands in the environment of every process of a cluster, and of none of its jobs: `down` finds them by it."""

DATABASE_TABLES = Path("/usr/share/mysql/mysql_system_tables.sql")


class NoClusterError(Exception):
    """A cluster cannot be had here; the message says why."""


def _call(*command: str, check: bool = True, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    ended = subprocess.run(command, text=True, capture_output=True, env=env, cwd=cwd)
    if check and ended.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {ended.returncode}: {ended.stderr or ended.stdout}")
    return ended.stdout


class Cluster:
    """The cluster in `folder`: as a context manager it stands for as long as the block.

    Partitions: `cpu` is the default one; a job in `high` preempts one in `low`, which is requeued after `grace_s`.
    Every node has two GPUs in name only (`--gres=gpu:2` is granted; there is no device behind it).
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 4,
        *,
        cpus: int = 2,
        kill_wait_s: int = 15,
        grace_s: int = 15,
        credentials_s: int = 5,
        node_timeout_s: int = 15,
    ) -> None:
        self.folder = folder.resolve()
        self.nodes = tuple(f"n{index}" for index in range(1, nodes + 1))
        self.cpus = cpus
        self._times = {
            "kill_wait_s": kill_wait_s,
            "grace_s": grace_s,
            "credentials_s": credentials_s,
            "node_timeout_s": node_timeout_s,
        }
        self._started: list[subprocess.Popen[bytes]] = []

    # Up and down

    def __enter__(self) -> Cluster:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def up(self) -> None:
        """Start everything and wait until every node is idle. Raises NoClusterError, with the ends of the logs."""
        if missing := [program for program in PROGRAMS if not shutil.which(program, path=_path())]:
            raise NoClusterError(f"{', '.join(missing)} not found (Debian's packages: {PACKAGES})")
        if os.geteuid() != 0:
            raise NoClusterError("a SLURM cluster of namespaces needs root")
        if self._link.exists():
            raise NoClusterError(f"{self.folder} holds a cluster already: take it down first")
        try:
            self._start()
            self.wait_idle()
        except BaseException as error:
            logs = self.logs()
            self.down()
            if isinstance(error, (RuntimeError, OSError)):
                raise NoClusterError(f"the cluster did not start: {error}\n{logs}") from error
            raise

    def down(self) -> None:
        """End every process of the cluster and take its network away. Does nothing where that is done."""
        deadline = time.monotonic() + START_LIMIT_S
        while processes := self._processes():
            for process in processes:
                _kill(process)
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes of the cluster in {self.folder} cannot be killed: {processes}")
            time.sleep(0.05)
        for started in self._started:
            started.wait()
        self._started.clear()
        if self._link.exists():
            bridge = self._link.read_text()
            for namespace in _call("ip", "netns", "list").split("\n"):
                if namespace.split(" ")[0].startswith(f"{bridge}n"):
                    _call("ip", "netns", "del", namespace.split(" ")[0])
            for link in json.loads(_call("ip", "-json", "link", "show") or "[]"):
                if link.get("master") == bridge:
                    _call("ip", "link", "del", link["ifname"], check=False)  # the kernel may be quicker
            _call("ip", "link", "del", bridge, check=False)
            self._link.unlink()
        shutil.rmtree(self.folder / "database", ignore_errors=True)  # 90 MB; logs and jobs stay

    def crash(self, node: str) -> None:
        """Take a node away at once, with every process on it, as a power cut does."""
        while processes := self._processes(node):
            for process in processes:
                _kill(process)
            time.sleep(0.05)

    def start_node(self, node: str) -> None:
        """Start a node, after `crash` as well; it takes jobs again once it has reported itself."""
        bridge = self._link.read_text()
        namespace = f"{bridge}{node}"
        inside = 'mount --bind "$1" /etc/hosts && hostname "$2" && { slurmd -D -N "$2" -f "$3" & wait; }'
        unshare = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        shell = ["bash", "-c", inside, "node", str(self.folder / "hosts"), node, str(self.conf)]
        self._daemon(node, "nsenter", f"--net=/run/netns/{namespace}", *unshare, *shell)

    # What tests ask and do

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def env(self) -> dict[str, str]:
        """The environment for SLURM's commands: without what a job above this process may have left."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN"))}
        return {**kept, "PATH": _path(), "SLURM_CONF": str(self.conf)}

    def call(self, *command: str, check: bool = True, cwd: Path | None = None) -> str:
        """A command's standard output. Raises RuntimeError, with its standard error, where it failed."""
        return _call(*command, check=check, env=self.env, cwd=cwd)

    def sbatch(self, *arguments: str, cwd: Path | None = None) -> str:
        """Submit (`sbatch --parsable`); the job's id."""
        return self.call("sbatch", "--parsable", *arguments, cwd=cwd).strip().split(";")[0]

    def script(self, text: str, *arguments: str, name: str = "job") -> str:
        """Submit the lines `text` as a bash script with `arguments` to sbatch; its output goes to `output(job)`."""
        path = self.folder / "jobs" / f"{name}.sbatch"
        path.write_text(f"#!/bin/bash\n{text}")
        return self.sbatch("--open-mode=append", f"--output={self.output('%j')}", *arguments, str(path))

    def output(self, job: str) -> Path:
        """What a job of `script` prints."""
        return self.folder / "jobs" / f"{job}.out"

    def show(self, job: str) -> dict[str, str]:
        """`scontrol show job`, by field: JobState, Reason, Restarts, ExitCode, NodeList, …"""
        fields = (field.partition("=") for field in self.call("scontrol", "show", "job", "-o", job).split())
        return {name: value for name, _, value in fields}

    def state(self, job: str) -> str:
        """The job's state, such as PENDING, RUNNING, COMPLETED."""
        return self.show(job)["JobState"]

    def wait(self, job: str, states: Collection[str] = ENDED, limit_s: float = 60) -> str:
        """Wait until the job is in one of `states`; that state. Raises TimeoutError, which shows the job."""
        deadline = time.monotonic() + limit_s
        while (state := self.state(job)) not in states:
            if time.monotonic() > deadline:
                shown = "\n".join(f"{key}={value}" for key, value in self.show(job).items())
                raise TimeoutError(f"job {job} is {state} after {limit_s} s, not {' or '.join(states)}\n{shown}")
            time.sleep(0.2)
        return state

    def node_states(self) -> dict[str, str]:
        """The state of each node: idle, mixed, allocated, down, …; `*` at its end where it does not answer."""
        lines = self.call("sinfo", "--noheader", "--Node", "--partition=cpu", "--format=%N %T").splitlines()
        return dict(line.split() for line in lines)

    def wait_idle(self) -> None:
        """Wait until every node is idle. Raises RuntimeError where that takes too long, or a daemon has ended."""
        deadline = time.monotonic() + START_LIMIT_S
        states: object = "slurmctld does not answer"
        while time.monotonic() < deadline:
            try:
                states = self.node_states()
            except RuntimeError as error:
                states = error
            if states == dict.fromkeys(self.nodes, "idle"):
                return
            self._check_alive()
            time.sleep(0.2)
        raise RuntimeError(f"nodes are not idle after {START_LIMIT_S} s: {states}")

    def set_node(self, node: str, state: str) -> None:
        """`set_node("n1", "down")`: its jobs end or are requeued; `"resume"`: it takes jobs again."""
        reason = [] if state == "resume" else ["reason=test"]
        self.call("scontrol", "update", f"nodename={node}", f"state={state}", *reason)

    def logs(self, lines: int = 20) -> str:
        """The ends of what the daemons print; `log/*.log` has the same with times."""
        ends = (
            "\n".join([f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-lines:]])
            for path in sorted((self.folder / "log").glob("*.out"))
        )
        return "\n".join(ends)

    # How it is made

    @property
    def _link(self) -> Path:
        """The file with the name of the cluster's bridge; it exists while the cluster stands."""
        return self.folder / "bridge"

    def _start(self) -> None:
        for name in ("state", "spool", "log", "dev", "jobs", "database"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        network = self._make_network()
        self._write_configuration(network)
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        files = ("socket=munge.socket", "pid-file=munge.pid", "seed-file=munge.seed", "log-file=log/munge.log")
        options = [f"--{option}={self.folder / path}" for option, path in (file.split("=") for file in files)]
        # --force: a folder that others may enter, or root as its user, is a warning for munged.
        self._daemon("munged", "munged", "-F", "--force", f"--key-file={key}", *options)
        self._start_accounting(f"{network}.254")
        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        self._wait_open(f"{network}.254", self._port)  # a slurmd that finds none asks again only seconds later
        for node in self.nodes:
            self.start_node(node)

    def _write_configuration(self, network: str) -> None:
        host = socket.gethostname().split(".")[0]
        addresses = {node: f"{network}.{index}" for index, node in enumerate(self.nodes, start=1)}
        names = [("127.0.0.1", "localhost"), (f"{network}.254", host), *((at, node) for node, at in addresses.items())]
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for address, name in names))
        with contextlib.ExitStack() as stack:
            probes = [stack.enter_context(socket.create_server((f"{network}.254", 0))) for _ in range(3)]
            self._port, self._accounting_port, self._database_port = (probe.getsockname()[1] for probe in probes)
        nodes = "\n".join(
            f"NodeName={node} NodeAddr={address} Port=6818 CPUs={self.cpus} RealMemory=64000 Gres=gpu:2"
            for node, address in addresses.items()
        )
        ports = {"port": self._port, "accounting_port": self._accounting_port, "database_port": self._database_port}
        values = {"host": host, "network": network, "folder": self.folder, "nodes": nodes, **self._times, **ports}
        for name in ("slurm.conf", "slurmdbd.conf"):
            made = self.folder / name
            made.touch(0o600)  # slurmdbd takes no other mode
            made.write_text((Path(__file__).parent / name).read_text().format(**values))
        devices = [self.folder / "dev" / f"gpu{index}" for index in range(2)]
        for device in devices:
            if not device.exists():
                os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in devices))

    def _start_accounting(self, address: str) -> None:
        """A database of our own and slurmdbd before it, which slurmctld has to find when it starts."""
        mariadbd = [
            "mariadbd",
            "--no-defaults",
            "--user=root",
            f"--datadir={self.folder}/database",
            "--lc-messages-dir=/usr/share/mysql",
            "--innodb-log-file-size=4M",
            "--innodb-flush-log-at-trx-commit=0",
        ]
        tables = f"create database mysql;\nuse mysql;\n{DATABASE_TABLES.read_text()}"
        made = subprocess.run([*mariadbd, "--bootstrap"], input=tables, text=True, capture_output=True, env=self.env)
        if made.returncode:
            raise RuntimeError(f"mariadbd --bootstrap: {made.stderr}")
        place = [
            f"--bind-address={address}",
            f"--port={self._database_port}",
            f"--socket={self.folder}/database.socket",
        ]
        self._daemon("mariadbd", *mariadbd, *place, "--skip-grant-tables")
        self._wait_open(address, self._database_port)
        self._daemon("slurmdbd", "slurmdbd", "-D")
        self._wait_open(address, self._accounting_port)

    def _wait_open(self, address: str, port: int) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            try:
                socket.create_connection((address, port), timeout=1).close()
                return
            except OSError:
                self._check_alive()
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.05)

    def _check_alive(self) -> None:
        if dead := [started.args for started in self._started if started.poll() is not None]:
            raise RuntimeError(f"this ended at once: {dead}")

    def _make_network(self) -> str:
        """A bridge and one network namespace a node. The first three numbers of its addresses."""
        for number in range(200):
            bridge = f"distft{number}"
            # The name is the lock: of several clusters that start at once each gets a bridge of its own.
            made = subprocess.run(["ip", "link", "add", bridge, "type", "bridge"], capture_output=True, text=True)
            if made.returncode == 0:
                break
            if "File exists" not in made.stderr:
                raise RuntimeError(f"ip link add {bridge} type bridge: {made.stderr}")
        else:
            raise RuntimeError("200 clusters stand on this machine: take some down")
        self._link.write_text(bridge)
        network = f"198.18.{number}"  # 198.18.0.0/15 is set aside for tests of networks
        _call("ip", "address", "add", f"{network}.254/24", "dev", bridge)
        _call("ip", "link", "set", bridge, "up")
        for index, node in enumerate(self.nodes, start=1):
            inside = f"{bridge}{node}"
            _call("ip", "netns", "add", inside)
            _call("ip", "link", "add", inside, "type", "veth", "peer", "name", "eth0", "netns", inside)
            _call("ip", "link", "set", inside, "master", bridge, "up")
            _call("ip", "-netns", inside, "address", "add", f"{network}.{index}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _call("ip", "-netns", inside, "link", "set", link, "up")
        return network

    def _daemon(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            mark = {MARK: f"{self.folder}/{name}"}
            environment = {"PATH": _path(), "LC_ALL": "C.UTF-8", "SLURM_CONF": str(self.conf), **mark}
            streams: Any = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            process = subprocess.Popen(command, cwd=self.folder, env=environment, start_new_session=True, **streams)
            self._started.append(process)

    def _processes(self, name: str = "") -> list[int]:
        """The cluster's processes that live, or those of one daemon or node. A node's jobs end with it."""
        mark = f"{MARK}={self.folder}/{name}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                entries = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if any(entry == mark if name else entry.startswith(mark) for entry in entries):
                found.append(int(path.parent.name))
        return found


def _path() -> str:
    """PATH with the folders of Debian's daemons, which a user's PATH may lack."""
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["up", "down"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=4)
    parsed = parser.parse_args(arguments)
    cluster = Cluster(parsed.folder, parsed.nodes)
    if parsed.what == "down":
        cluster.down()
        return 0
    try:
        cluster.up()
    except NoClusterError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(cluster.nodes)} nodes are idle. To use them: export SLURM_CONF={cluster.conf}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
