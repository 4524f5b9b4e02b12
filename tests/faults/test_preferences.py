"""A run over preferences that runs out of memory goes on from its checkpoint with the same steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import losses
from .test_out_of_memory import assert_same_updates, go, site

KTO = (
    *("recipe=kto", "training.completion_only_loss=null", "model.dtype=float32", "data.max_samples=40"),
    *("batching.global_batch_size=8", "batching.micro_batch_tokens=null", "batching.micro_batch=4"),
    *("strategy=single", "training.learning_rate=0.1", "preference.beta=0.5"),
)


def test_out_of_memory_and_resumed_it_is_the_same_run(tmp_path: Path) -> None:
    """Two steps before the fault, from the checkpoint; with `kto`, whose estimate of KL is that of the global batch."""
    (tmp_path / "whole").mkdir()
    whole = go(tmp_path / "whole", *KTO, nproc=1)
    assert whole.code == 0, whole.stderr[-3000:]
    (tmp_path / "broken").mkdir()
    ended = go(tmp_path / "broken", *KTO, nproc=1, site=site(tmp_path, 0, 3, (4,)))
    assert ended.code == 0, ended.stderr[-3000:]
    summary = ended.folder.read_summary()
    assert (summary["restarts"], summary["global_batch_size"], summary["micro_batch"]) == (1, 8, 2)
    assert "after step 2" in ended.stderr, "from the last checkpoint"
    ours, theirs = losses(ended.folder), losses(whole.folder)
    assert len(ours) == len(theirs) == 6
    for found, expected in zip(ours, theirs, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    assert_same_updates(ended.folder, whole.folder)
