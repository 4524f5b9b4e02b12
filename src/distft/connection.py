"""Ask the Hugging Face Hub only if it can be reached: its clients would retry each request for a minute."""

from __future__ import annotations

import functools
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from distft.console import say

_LIMIT_S = 5.0
"""How long to wait for an answer of the hub's host."""


@contextmanager
def cache_only() -> Iterator[None]:
    """Put the hub's clients in offline mode; they read HF_HUB_OFFLINE only when they are imported."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    datasets: Any = sys.modules.get("datasets.config")
    before_datasets = before if datasets is None else datasets.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    if datasets is not None:
        datasets.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        datasets = sys.modules.get("datasets.config")  # it may have been imported in between
        if datasets is not None:
            datasets.HF_HUB_OFFLINE = before_datasets


@contextmanager
def cache_if_unreachable() -> Iterator[None]:
    """Put the hub's clients in offline mode if the hub's host does not answer, and say so once per process."""
    from huggingface_hub import constants

    problem = None if constants.HF_HUB_OFFLINE else _problem(constants.ENDPOINT)
    if problem is None:
        yield
        return
    _report(constants.ENDPOINT, problem)
    with cache_only():
        yield


@functools.cache
def _report(endpoint: str, problem: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        say(f"{endpoint} cannot be reached ({problem}); models and data come from the local cache")


def _problem(endpoint: str) -> str | None:
    """Why no connection to `endpoint` can be made; None if one can, or if a proxy would make it."""
    place = urlsplit(endpoint)
    if place.hostname is None or place.scheme in getproxies():
        return None
    try:
        address = place.hostname, place.port or (80 if place.scheme == "http" else 443)
        socket.create_connection(address, timeout=_LIMIT_S).close()
    except OSError as error:
        return str(error)
    return None
