"""Records of finished items, one JSON line each, found again by a key of their content: what was done once is never done again.

Every rank appends to a part of its own while it works; when all is done rank 0 puts them into one file, in the order of the items. Parts
that a killed run left behind are read at the next start, whatever its number of processes.
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
    """A key for a content: equal contents have equal keys."""
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
    """The record of each of `keys`, in their order and on all ranks: those that are known as they are, the rest made by `work`. All
    ranks enter.

    `work` gets the indices of this rank's share of what is missing, the costliest first (`costs`, in the order of the items, so that
    ranks have about as much to do), and yields each index with its record as it is done. A record gets its `key`. Items of one key are
    made once.

    Raises:
        DistftError: that of `work`, on any rank.
    """
    known = {record["key"]: record for file in _files(path) for record in read_lines(file)}
    together(world, lambda: None)  # nobody appends before all have read
    missing = [*{key: i for i, key in reversed([*enumerate(keys)]) if key not in known}.values()]
    if known and world.is_main and (there := sum(key in known for key in keys)):
        say(f"{title or path.stem}: {there} of {len(keys)} are done already, in {path}")
    missing.sort(key=lambda i: (-(costs[i] if costs is not None else 0), i))
    share = missing[world.rank :: world.world_size]
    part = path.with_name(f"{path.stem}.rank{world.rank}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    made: dict[str, dict[str, Any]] = {}

    def make() -> None:
        with tqdm(
            total=len(share), desc=title or path.stem, disable=not (world.is_main and share), mininterval=1
        ) as bar:
            for index, record in work(share):
                made[keys[index]] = {"key": keys[index], **record}
                append_lines(part, [made[keys[index]]])
                bar.update()

    together(world, make)
    records = known | _union(made, world)
    ordered = [records[key] for key in keys]
    if world.is_main:
        parts = [file for file in _files(path) if file != path]
        if made or parts or not path.exists():
            others = sorted(records.keys() - set(keys))  # of other settings, which may be asked for again
            lines = [records[key] for key in dict.fromkeys((*keys, *others))]
            write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        for file in parts:
            file.unlink()
    together(world, lambda: None)
    return ordered


def _files(path: Path) -> list[Path]:
    return [file for file in (path, *sorted(path.parent.glob(f"{path.stem}.rank*.jsonl"))) if file.is_file()]


def _union(made: dict[str, dict[str, Any]], world: World) -> dict[str, dict[str, Any]]:
    return {key: record for part in gather(made, world) for key, record in part.items()}
