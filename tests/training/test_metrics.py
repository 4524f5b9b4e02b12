"""The figures of a run and of a resumed one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
def test_the_clocks_of_a_run_and_of_a_resumed_one(tmp_path: Path) -> None:
    """A run stopped within an epoch resumes with what it had measured. Rates exclude steps under the profiler."""
    command = [
        *(sys.executable, "-m", "distft.cli", "train", "--nproc", "1", "recipe=tiny", "strategy=single"),
        "batching.global_batch_size=4",
        *("run.dir=runs", "tracking.profile_steps=2", "tracking.throughput_warmup_steps=1", "tracking.report_to=[]"),
        *("training.max_steps=10", "training.logging_steps=3", "training.eval_strategy=no", "evaluation.max_samples=8"),
        *("training.save_strategy=steps", "training.save_steps=2", "training.save_total_limit=9"),
    ]

    def run(*more: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        folder = tmp_path / "runs" / "tiny"
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return json.loads((folder / "summary.json").read_text()), [json.loads(line) for line in lines]

    summary, records = run()
    logged = {record["step"]: record for record in records if "loss" in record}
    # A window ends after the warm-up, after the profiled steps, at every save and at the last step.
    assert list(logged) == [1, 2, 3, 4, 6, 8, 9, 10]
    assert logged[3]["samples_per_second"] is None and logged[6]["samples_per_second"] > 0
    seconds = 28 / summary["samples_per_second"]  # steps 4 to 10
    assert summary["measured_steps"] == 7 and summary["step_time_s"] == pytest.approx(seconds / 7)
    assert 0 < summary["data_wait_s"] < seconds + summary["train_time_s"]
    assert summary["evaluation_time_s"] > 0 and summary["saving_time_s"] > 0
    assert summary["joules_per_sample"] is None and summary["hfu"] is None
    assert logged[9]["host_rss_by_rank_gib"] == [pytest.approx(logged[9]["host_rss_gib"])]

    folder = tmp_path / "runs" / "tiny"
    shutil.rmtree(folder / "checkpoints" / "checkpoint-10")
    (folder / "summary.json").write_text(json.dumps(summary | {"status": "interrupted", "cause": "SIGTERM"}))
    carried = json.loads((folder / "checkpoints" / "checkpoint-8" / "manifest.json").read_text())["carried"][
        "telemetry"
    ]
    again, records = run()
    assert again["restarts"] == 1 and again["steps"] == 10
    # The figures cover all steps: none of the first start after step 8, and step 9 is the warm-up of the second start.
    assert again["train_loss"] == pytest.approx(summary["train_loss"], rel=1e-6)
    times = [record["time_s"] for record in records if "loss" in record]
    assert [record["step"] for record in records if "loss" in record] == list(logged) and times == sorted(times)
    assert again["train_time_s"] > times[-1] > logged[8]["time_s"]
    rated = [record for record in records if record.get("samples_per_second") and record["step"] not in (1, 9)]
    steps = [record["step"] for record in rated]
    assert steps == [4, 6, 8, 10]
    seconds = sum(n * 4 / record["samples_per_second"] for n, record in zip((1, 2, 2, 1), rated, strict=True))
    assert again["measured_steps"] == 6 and again["samples_per_second"] == pytest.approx(24 / seconds)
    assert again["evaluation_time_s"] > carried["evaluating_s"] > 0 and again["data_wait_s"] > carried["waited_s"] > 0
