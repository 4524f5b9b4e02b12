"""A run that the flat layout of distft 0.1.0 left interrupted resumes with today's packages, to the same end.

`tests/fixtures/before_the_move` is its folder: interrupted at step 5 of 8 on CPU. `expected_*` are of the same command
without the interruption.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distft.files import read_lines
from distft.training.checkpoints import read_tensors

from ..distributed.conftest import finish, start

FIXTURE = Path(__file__).parents[1] / "fixtures" / "before_the_move"


@pytest.mark.slow
def test_a_run_from_before_the_move_resumes_to_the_same_losses_and_adapter(tmp_path: Path) -> None:
    shutil.copytree(FIXTURE, tmp_path / "runs" / "before_the_move")
    words = json.loads((FIXTURE / "environment.json").read_text())["command"][1:]
    ended = finish(start([sys.executable, "-m", "distft.train", *words], tmp_path, OMP_NUM_THREADS="1"), tmp_path)
    assert ended.code == 0, ended.stderr[-3000:]
    assert f"resuming {ended.folder.path} after step 5" in ended.stderr
    summary = ended.folder.read_summary()
    assert (summary["status"], summary["steps"], summary["restarts"]) == ("finished", 8, 1)

    records, expected = ended.folder.read_metrics(), read_lines(FIXTURE / "expected_metrics.jsonl")
    assert [record["step"] for record in records] == [record["step"] for record in expected]
    for record, other in zip(records, expected, strict=True):
        for key in ("loss", "grad_norm", "learning_rate", "samples", "tokens"):  # CPUs round differently
            if key in other:
                assert record[key] == pytest.approx(other[key], rel=1e-4), (record["step"], key)
    adapter = read_tensors(ended.folder.adapter)
    torch.testing.assert_close(adapter, load_file(FIXTURE / "expected_adapter.safetensors"), rtol=1e-3, atol=1e-5)
