"""This machine as one of the nodes of a run."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass

import psutil

from distft.errors import LaunchError

_PORT = r"(?:[1-9]\d{0,3}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5])"
_ENDPOINT = re.compile(rf"(?:[\w.-]+|\[[0-9a-f:.]*:[0-9a-f:.]*\]):{_PORT}", re.ASCII | re.IGNORECASE)
"""`HOST:PORT` as torch's rendezvous takes it."""


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
        if count < 1:
            raise LaunchError(f"the number of nodes must be at least 1, got --nnodes {count}")
        if not 0 <= rank < count:
            raise LaunchError(f"--node-rank {rank} of --nnodes {count}: nodes are counted from 0 to {count - 1}")
        if count > 1 and not _ENDPOINT.fullmatch(rendezvous):
            got = f"; got {rendezvous}" if rendezvous else ""
            raise LaunchError(
                f"--nnodes {count} needs --rdzv HOST:PORT, the same on every node: a name or address of node 0 that "
                f"all nodes can reach (an IPv6 address in brackets), and a port that is free there{got}"
            )
        return cls(count, rank, rendezvous)

    @property
    def host(self) -> str:
        """The rendezvous host, an IPv6 address without its brackets."""
        return self.bracketed_host.strip("[]")

    @property
    def bracketed_host(self) -> str:
        return self.rendezvous.rpartition(":")[0]

    @property
    def port(self) -> str:
        return self.rendezvous.rpartition(":")[2]

    def check_rendezvous(self) -> None:
        """Check what would keep several nodes waiting for each other until a timeout, as far as this one can know it.

        Raises:
            LaunchError: the rendezvous host has no address, or this is node 0 and the port is in use here.
        """
        if self.count == 1:
            return
        self.address()
        if self.rank == 0 and (problem := _why_not_free(int(self.port))):
            raise LaunchError(
                f"--rdzv {self.rendezvous}: port {self.port} is not free on this machine ({problem}); choose another "
                "port, the same on every node"
            )

    def address(self) -> str:
        """The name or address by which the other nodes reach this machine.

        Raises:
            LaunchError: the rendezvous host has no address.
        """
        try:
            family, *_, target = socket.getaddrinfo(self.host, int(self.port), type=socket.SOCK_DGRAM)[0]
            if self.rank == 0:
                return self.host
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(target)  # sends nothing; the kernel chooses the interface
                return str(probe.getsockname()[0])
        except OSError as error:
            raise LaunchError(f"--rdzv {self.rendezvous}: {self.host} cannot be reached from here ({error})") from error


def _why_not_free(port: int) -> str | None:
    """Why a server cannot listen on `port` on all interfaces, as torch's store does; None if it can."""
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
        if probe.family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            return error.strerror
    return None


def interface_of(address: str) -> str | None:
    """This machine's network interface with `address`; None for loopback, which other machines cannot reach."""
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4]
    except OSError:
        return None
    wanted = _plain(str(found[0]))
    if ipaddress.ip_address(wanted).is_loopback:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(_plain(known.address) == wanted for known in addresses):
            return name
    return None


def _plain(address: str) -> str:
    """An address without the zone of a link-local one (`fe80::1%eth0`)."""
    return address.partition("%")[0]
