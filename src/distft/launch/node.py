"""This machine as one of the nodes of a run."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass

import psutil

from distft.errors import LaunchError


@dataclass(frozen=True)
class Node:
    """This machine's place among the nodes of a run. Each node has one launcher, all with the same number of processes.

    `rendezvous` is the `host:port` where the launchers of several nodes meet; the host is node 0.
    """

    count: int = 1
    rank: int = 0
    rendezvous: str = ""

    @classmethod
    def of(cls, count: int, rank: int, rendezvous: str) -> Node:
        """Create a node from command-line options.

        Raises:
            LaunchError: the options are not valid.
        """
        host, _, port = rendezvous.rpartition(":")
        if count < 1 or not 0 <= rank < count:
            raise LaunchError(
                f"--node-rank {rank} of --nnodes {count}: nodes are counted from 0 to {max(count, 1) - 1}"
            )
        if count > 1 and not (host and port.isdigit() and 0 < int(port) < 2**16):
            got = f"; got {rendezvous}" if rendezvous else ""
            raise LaunchError(
                f"--nnodes {count} needs --rdzv HOST:PORT, the same on every node: a name or address of node 0 that "
                f"all nodes can reach, and a port that is free there{got}"
            )
        return cls(count, rank, rendezvous)

    @property
    def host(self) -> str:
        return self.rendezvous.rpartition(":")[0]

    @property
    def port(self) -> str:
        return self.rendezvous.rpartition(":")[2]

    def address(self) -> str:
        """The name or address by which the other nodes reach this machine.

        Raises:
            LaunchError: the rendezvous host has no address.
        """
        if self.rank == 0:
            return self.host
        try:
            family, *_, target = socket.getaddrinfo(self.host, int(self.port), type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(target)  # sends nothing; the kernel chooses the interface
                return str(probe.getsockname()[0])
        except OSError as error:
            raise LaunchError(f"--rdzv {self.rendezvous}: {self.host} cannot be reached from here ({error})") from error


def interface_of(address: str) -> str | None:
    """This machine's network interface with `address`; None for loopback, which other machines cannot reach."""
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(address)
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address == address for known in addresses) and not address.startswith("127."):
            return name
    return None
