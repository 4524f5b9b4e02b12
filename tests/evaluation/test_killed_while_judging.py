"""`distft evaluate` is killed while it judges, and continues where it stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distft.files import read_lines

PAIRS = [{"instruction": f"Say {number} words.", "output": " ".join(["word"] * number)} for number in range(1, 9)]


def test_after_a_kill_nothing_is_generated_or_judged_twice(
    tmp_path: Path, adapter: Path, replay: Callable[..., Any]
) -> None:
    server = replay(
        lambda body, number: (200, f"Feedback: fine. [RESULT] {1 + len(body['messages'][0]['content']) % 5}"),
        delay_s=0.3,
    )
    (tmp_path / "pairs.json").write_text(json.dumps(PAIRS))
    command = [
        sys.executable,
        "-m",
        "distft.evaluation",
        "model=tiny",
        f"adapter={adapter}",
        "model.dtype=float32",
        "evaluation.tasks=[alpaca]",
        "evaluation.alpaca.path=pairs.json",
        "evaluation.generation.max_new_tokens=8",
        f"evaluation.judge.endpoint={server.address}",
        "evaluation.judge.model=recorded",
        "evaluation.judge.concurrency=1",
    ]
    root = Path(__file__).parents[3]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root / "src"), "HF_HUB_OFFLINE": "1"}
    first = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while len(server.bodies) < 6:
        assert first.poll() is None, first.stderr.read() if first.stderr else ""
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    folder = tmp_path / "runs" / "evaluate-tiny-adapter" / "evaluation" / "alpaca"
    judged = read_lines(folder / "judge_answers.rank0.jsonl")
    generated = (folder / "answers.jsonl").read_bytes()
    time.sleep(0.5)  # the request that was under way when it was killed ends
    before = len(server.bodies)
    assert before - 1 <= len(judged) + 1 and len(judged) >= 4

    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    asked = {record["prompt"] for record in read_lines(folder / "judge_answers.jsonl")}
    assert len(server.bodies) - before == len(asked) - len(judged)
    assert all(server.prompts.count(record["prompt"]) == 1 for record in judged)
    assert (folder / "answers.jsonl").read_bytes() == generated
    result = json.loads((folder.parent.parent / "evaluation.json").read_text())["alpaca"]
    assert result["judged"] == {
        side: {"judgements": 16, "unparsed": 0, "asked_again": 0} for side in ("base", "adapter")
    }
