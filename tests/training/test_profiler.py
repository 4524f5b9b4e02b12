"""Where the time of a step goes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.runs.folder import RunFolder
from distft.training.profiler import Activity, longest, shares

NAMES = (
    "sgemm_128x64",
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL",
    "Memcpy HtoD (Pinned -> Device)",
    "gloo:all_reduce",
    "aten::mm",
)


PROFILE = (
    *("run.dir=runs", "tracking.profile_steps=2", "tracking.throughput_warmup_steps=1", "tracking.report_to=[]"),
    *("recipe=tiny", "evaluation.before_and_after=false"),
)
"""Profile the second and third step."""


def test_each_moment_is_counted_once() -> None:
    activities = [
        Activity("gemm", 0.0, 4.0),
        Activity("gemm", 1.0, 3.0),  # at the same time, on another stream
        Activity("ncclDevKernel_AllReduce", 3.0, 6.0),  # one second of it hidden
        Activity("Memcpy DtoH (Device -> Pinned)", 5.0, 7.0),
        Activity("Memset (Device)", 8.0, 8.5),
    ]
    found = shares(activities, 10.0)
    expected = {
        "compute_s": 4.0,
        "communication_exposed_s": 2.0,
        "copy_exposed_s": 1.5,
        "idle_s": 2.5,
        "communication_s": 3.0,
        "products_s": 4.0,
    }
    assert found == pytest.approx(expected)


def test_matrix_products_are_distinguished_from_other_computation() -> None:
    products = (
        *("sm90_xmma_gemm_bf16bf16_bf16f32", "nvjet_tst_256x128", "void cutlass::Kernel2", "flash_fwd_kernel"),
        *("aten::addmm", "fmha_cutlassF_bf16"),
    )
    others = (
        *("void at::native::vectorized_elementwise_kernel", "dequantize_4bit_kernel", "ncclDevKernel_AllGather"),
        *("aten::copy_", "Memcpy HtoD"),
    )
    names = products + others
    assert [Activity(name, 0, 1).is_product for name in names] == [True] * 6 + [False] * 5
    found = shares([Activity("gemm", 0, 2), Activity("elementwise", 1, 4), Activity("gemm", 3, 5)], 6)
    assert (found["compute_s"], found["products_s"]) == (5, 4)


def test_without_activities_all_time_is_idle() -> None:
    assert shares([], 2.0)["idle_s"] == 2.0


def test_the_longest_activities_come_first() -> None:
    activities = [Activity("a", 0, 1), Activity("b", 1, 4), Activity("a", 4, 5)]
    assert longest(activities, 10.0) == [
        {"name": "b", "share": 0.3, "count": 1},
        {"name": "a", "share": 0.2, "count": 2},
    ]


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 40), st.integers(0, 10)), max_size=12))
def test_the_parts_agree_with_a_count_of_every_second(drawn: list[tuple[str, int, int]]) -> None:
    activities = [Activity(name, start, start + length) for name, start, length in drawn]
    counted = dict.fromkeys(("compute", "communication", "copy", "idle"), 0)
    for second in range(50):
        kinds = {activity.kind for activity in activities if activity.start <= second < activity.end}
        counted[next((kind for kind in ("compute", "communication", "copy") if kind in kinds), "idle")] += 1
    found = shares(activities, 50)
    keys = ("compute_s", "communication_exposed_s", "copy_exposed_s", "idle_s")
    assert [found[key] for key in keys] == pytest.approx(list(counted.values()))


@pytest.mark.slow
def test_a_run_reports_where_its_time_went(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distft.cli", "train", "--nproc", "2", *PROFILE, "training.max_steps=5"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "profile of steps 2 to 3, of the rank with the most idle time: compute" in done.stdout + done.stderr
    record = json.loads((tmp_path / "runs" / "tiny" / "profile.json").read_text())
    assert (
        record["steps"] == [2, 3] and record["device"] == "cpu" and [rank["rank"] for rank in record["ranks"]] == [0, 1]
    )
    for rank in record["ranks"]:
        parts = [rank[key] for key in ("compute_s", "communication_exposed_s", "copy_exposed_s", "idle_s")]
        assert all(part >= 0 for part in parts) and sum(parts) == pytest.approx(rank["step_time_s"], rel=0.02)
        assert 0 < rank["products_s"] < rank["compute_s"]
        assert rank["compute_s"] > 0.2 * rank["step_time_s"] and rank["communication_s"] > 0 and rank["data_wait_s"] > 0
        assert {"aten::mm", "LoraMlpBackward"} <= {each["name"] for each in rank["longest"]}


def test_no_step_is_profiled_if_none_is_left_for_timing(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "distft.cli", "train", "--nproc", "1", *PROFILE, "strategy=single"),
        *("training.max_steps=2", "training.logging_steps=1"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no profile: 2 steps leave none for it" in done.stdout + done.stderr
    folder = tmp_path / "runs" / "tiny"
    assert not (folder / "profile.json").exists()
    assert json.loads((folder / "summary.json").read_text())["samples_per_second"] > 0


def ended(program: str, where: Path, steps: int = 5) -> tuple[int, RunFolder]:
    """The exit code and the folder of a profiled run that `program` starts and tampers with."""
    command = [sys.executable, "-c", program, *PROFILE, "strategy=single", f"training.max_steps={steps}"]
    code = subprocess.run(command, cwd=where, capture_output=True, timeout=300).returncode
    return code, RunFolder(where / "runs" / "tiny")


def test_a_run_that_fails_under_the_profiler_reports_its_own_error(tmp_path: Path) -> None:
    """Its exit code is that of the failure, not of a crash when the process exits."""
    program = (
        "from distft.train import main; from distft.training.trainer import Trainer; import sys\n"
        "step = Trainer.training_step\n"
        "def fails(self, *args, **kwargs):\n"
        "    if self.state.global_step == 2: raise RuntimeError('on purpose')\n"
        "    return step(self, *args, **kwargs)\n"
        "Trainer.training_step = fails\n"
        "sys.exit(main())"
    )
    code, folder = ended(program, tmp_path)
    assert (code, folder.read_summary()["cause"]) == (1, "RuntimeError: on purpose")


def test_a_failure_to_write_the_profile_leaves_the_result(tmp_path: Path) -> None:
    program = (
        "import sys; from distft.training import profiler; from distft.train import main\n"
        "def fails(*_): raise RuntimeError('on purpose')\n"
        "profiler.shares = fails\n"
        "sys.exit(main())"
    )
    code, folder = ended(program, tmp_path)
    summary = folder.read_summary()
    assert (code, summary["status"], summary["cause"], summary["steps"]) == (1, "failed", "RuntimeError: on purpose", 5)
    assert (folder.adapter / "adapter_model.safetensors").is_file()


def test_a_stopped_run_reports_where_its_time_went(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from distft.train import main; from distft.training.trainer import Trainer\n"
        "step = Trainer.training_step\n"
        "def stops(self, *args, **kwargs):\n"
        "    if self.state.global_step == 4: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return step(self, *args, **kwargs)\n"
        "Trainer.training_step = stops\n"
        "sys.exit(main())"
    )
    code, folder = ended(program, tmp_path, steps=8)
    assert code == 75
    assert json.loads(folder.profile.read_text())["steps"] == [2, 3]
