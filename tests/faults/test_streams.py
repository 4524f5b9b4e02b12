"""A streamed run that is killed in a later window goes on with the same samples, and keeps few windows on disk."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from ..data.rows import write_rows
from ..distributed.conftest import finish
from ..distributed.test_guards import wait_for_step
from .conftest import assert_same_run, begin, ranks

WINDOW, STEPS = 3, 12
WORDS = (
    "data.name=null",
    "data.files=part-*.jsonl",
    "data.format={prompt: q, completion: a}",
    "data.max_samples=null",
    "data.streaming=true",
    "data.window=12",
    f"training.max_steps={STEPS}",
    "training.save_steps=2",
    "evaluation.before_and_after=false",
)


def test_a_streamed_run_killed_in_its_second_window_ends_the_same(tmp_path: Path, tokenizer: Any) -> None:
    words = (*WORDS, f"model.name={tokenizer.name_or_path}")
    ended = []
    for name, kills in (("whole", False), ("killed", True)):
        where = tmp_path / name
        where.mkdir()
        for part in range(3):
            rows = [{"q": f"What is {part} times {n}?", "a": f" It is {part * n}."} for n in range(10)]
            write_rows(where / f"part-{part}.jsonl", rows)
        process = begin(where, "ddp", *words, DISTFT_CACHE=str(where / "cache"))
        if kills:
            wait_for_step(where, WINDOW + 1)
            ranks(process)[1].send_signal(signal.SIGKILL)
        ended.append(finish(process, where))
        assert ended[-1].code == 0, ended[-1].stderr[-3000:]
    whole, killed = (each.folder for each in ended)
    assert killed.read_summary()["restarts"] == 1 and whole.read_summary()["restarts"] == 0
    assert_same_run(killed, whole)
    for name in ("whole", "killed"):
        windows = [path.name for path in (tmp_path / name / "cache").glob("streams/*/*") if path.is_dir()]
        # The first, the last two, and the one that was made ahead of time.
        assert set(windows) <= {"000000", "000002", "000003", "000004", ".000004.partial"}
