"""Python's garbage collector leaves alone what was there before step 1, and so no rank stops for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .conftest import finish, start

WATCHED = """
import gc, json, sys

from distft.training.run import train

seen = []  # of every full collection: how many objects it leaves alone, and how many it goes through


def watch(phase, info):
    if phase == "start" and info["generation"] == 2:
        seen.append([gc.get_freeze_count(), len(gc.get_objects())])


gc.callbacks.append(watch)
train(sys.argv[1:])
gc.collect()
print(json.dumps(seen))
"""


def test_a_full_collection_in_the_training_goes_through_little(tmp_path: Path) -> None:
    overrides = [
        "recipe=tiny",
        "strategy=single",
        "training.max_steps=2",
        "evaluation.before_and_after=false",
        "tracking.report_to=[]",
    ]
    ended = finish(start([sys.executable, "-c", WATCHED, *overrides], tmp_path), tmp_path)
    assert ended.code == 0, ended.stderr[-3000:]
    seen = json.loads(ended.stdout.splitlines()[-1])
    assert max(number for _, number in seen) > 100_000  # before
    later = [number for frozen, number in seen if frozen]
    assert later, "nothing was frozen"
    assert max(later) < min(frozen for frozen, _ in seen if frozen) / 5, seen
