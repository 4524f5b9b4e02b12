"""A curriculum by the base's loss, on two processes: killed, and without its cache, a run goes on in the same order."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

from ..distributed.conftest import finish
from ..distributed.test_guards import wait_for_step
from .conftest import assert_same_run, begin, go, ranks

CURRICULUM = ("data.order=loss", "data.max_samples=30", "evaluation.before_and_after=false", "training.save_steps=2")


def test_a_run_that_was_killed_keeps_its_order_without_the_cache(tiny: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / tiny.name).symlink_to(tiny)
    place = {"DISTFT_CACHE": str(cache)}
    whole = go(tmp_path / "whole", "ddp", *CURRICULUM, **place)
    assert whole.code == 0, whole.stderr[-3000:]
    expected = whole.folder.read_summary()
    samples = expected["data_order"]["scored"]
    assert expected["data_order"] == {"by": "loss", "stages": 4, "scored": samples, "cached": 0}
    assert samples == 24 and expected["scoring_time_s"] > 0

    process = begin(tmp_path / "killed", "ddp", *CURRICULUM, **place)
    folder = wait_for_step(tmp_path / "killed", 3)
    shutil.rmtree(cache / "scores")
    random.choice([*ranks(process).values()]).send_signal(signal.SIGKILL)
    ended = finish(process, tmp_path / "killed")
    assert ended.code == 0, ended.stderr[-3000:]
    assert_same_run(folder, whole.folder)
    summary = folder.read_summary()
    assert summary["restarts"] == 1
    assert summary["data_order"] == {"by": "loss", "stages": 4, "scored": 0, "cached": samples}
    assert summary["data_order_digest"] == expected["data_order_digest"]
    assert not (cache / "scores").exists(), "nothing was scored again"
