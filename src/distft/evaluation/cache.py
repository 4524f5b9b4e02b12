"""A cache of finished items: one JSON line each, found by a key of the item's content, so that nothing is computed
twice.

While it works, every rank appends to a file of its own. In the end rank 0 merges them into one file in the order of
the items. Files that a killed evaluation left behind are read at the next start, whatever the number of processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from distft.console import say
from distft.distributed.collectives import gather, together
from distft.distributed.world import World
from distft.files import append_lines, read_lines, write_atomically

Work = Callable[[list[int]], Iterable[tuple[int, dict[str, Any]]]]


def key_of(*parts: Any) -> str:
    """A key for some content; equal contents have equal keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def complete(
    path: Path,
    keys: Sequence[str],
    work: Work,
    world: World,
    *,
    costs: Sequence[float] | None = None,
    title: str = "",
) -> list[dict[str, Any]]:
    """The record of each key, in order and on all ranks: cached ones as they are, the others made by `work`.

    All ranks call this. `work` gets the indices of this rank's share of the missing items and yields each index with
    its record as soon as it is finished; `key` is added to the record. With `costs` (one per item) the costliest items
    come first and ranks get equally costly shares. Items with the same key are made once.

    Raises:
        DistftError: that of `work`, on any rank.
    """
    known = {record["key"]: record for file in _files(path) for record in read_lines(file)}
    together(world, lambda: None)  # no rank appends before all have read
    missing = [*{key: i for i, key in reversed([*enumerate(keys)]) if key not in known}.values()]
    if known and world.is_main and (cached := sum(key in known for key in keys)):
        say(f"{title or path.stem}: {cached} of {len(keys)} are already in {path}")
    missing.sort(key=lambda i: (-(costs[i] if costs is not None else 0), i))
    share = missing[world.rank :: world.world_size]
    part = path.with_name(f"{path.stem}.rank{world.rank}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    made: dict[str, dict[str, Any]] = {}

    def make() -> None:
        hidden = not (world.is_main and share)
        with tqdm(total=len(share), desc=title or path.stem, disable=hidden or None, mininterval=1) as bar:
            for index, record in work(share):
                made[keys[index]] = {"key": keys[index], **record}
                append_lines(part, [made[keys[index]]])
                bar.update()

    together(world, make)
    records = known | _union(made, world)
    if world.is_main:
        _merge(path, keys, records, changed=bool(made))
    together(world, lambda: None)
    return [records[key] for key in keys]


def _merge(path: Path, keys: Sequence[str], records: dict[str, dict[str, Any]], *, changed: bool) -> None:
    """Write all records to `path` if it lacks any, and delete the files of ranks."""
    parts = [file for file in _files(path) if file != path]
    if changed or parts or not path.exists():
        others = sorted(records.keys() - set(keys))  # made with other settings, which may be asked for again
        lines = [records[key] for key in dict.fromkeys((*keys, *others))]
        write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    for file in parts:
        file.unlink()


def _files(path: Path) -> list[Path]:
    return [file for file in (path, *sorted(path.parent.glob(f"{path.stem}.rank*.jsonl"))) if file.is_file()]


def _union(made: dict[str, dict[str, Any]], world: World) -> dict[str, dict[str, Any]]:
    return {key: record for part in gather(made, world) for key, record in part.items()}
