"""The host name of this machine, which torch's launchers look up."""

from __future__ import annotations

import socket
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Host:
    """A host name and its addresses, none if it cannot be resolved. `here`: one of them is this machine's."""

    name: str
    addresses: tuple[str, ...] = ()
    here: bool = False


def host() -> Host:
    name = socket.gethostname()
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return Host(name)
    addresses = tuple(dict.fromkeys(str(address[0]) for *_, address in found))
    own = {address.address for interface in psutil.net_if_addrs().values() for address in interface}
    return Host(name, addresses, any(address in own or address.startswith("127.") for address in addresses))
