"""W&B without a connection: whether there is a key, and how far an offline run came, from its file: what was logged last may not have
reached it before a kill."""

from __future__ import annotations

import netrc
import os
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

WANDB_FINISH_S = 60.0
"""How long the end of a run waits for what is still to be uploaded."""
_HEAD = 7
"""Bytes at the start of a file, and before each chunk: checksum (4), length (2), kind (1)."""
_BLOCK = 32 * 1024
_WHOLE, _FIRST, _LAST = 1, 2, 4


def has_wandb_key() -> bool:
    """Whether W&B would find a key here: in the environment, or in the netrc file where `wandb login` leaves it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urllib.parse.urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def last_step(file: Path) -> int:
    """The last `train/global_step` in the history that the file holds; -1 for none."""
    from wandb.proto.wandb_internal_pb2 import Record

    step = -1
    for content in _records(file.read_bytes()):
        for item in Record.FromString(content).history.item:
            if (item.key or "/".join(item.nested_key)) == "train/global_step":
                step = max(step, int(float(item.value_json)))
    return step


def _records(content: bytes) -> Iterator[bytes]:
    """The whole records of a log in LevelDB's format (https://github.com/google/leveldb/blob/main/doc/log_format.md); one that a kill
    has torn ends it."""
    place, pending = _HEAD, b""
    while place + _HEAD <= len(content):
        left = _BLOCK - place % _BLOCK
        if left < _HEAD:  # filled up with zeros
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        chunk = content[place + _HEAD : place + _HEAD + length]
        if kind == 0 or len(chunk) < length:
            return
        place += _HEAD + length
        pending = chunk if kind in (_WHOLE, _FIRST) else pending + chunk
        if kind in (_WHOLE, _LAST):
            yield pending
