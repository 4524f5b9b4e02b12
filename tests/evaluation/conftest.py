"""A run that has learned to name the sentiment of the built-in reviews, and the ways to evaluate it in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distft.data.toy import reviews
from distft.runs.folder import RunFolder


def environment() -> dict[str, str]:
    """That of a process of distft in a test: offline, and one thread, for several processes share few cores."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "DISTFT_OUTCOME"))}
    return kept | {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def distft(where: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """`distft` with `words`, run in `where` to its end."""
    command = [sys.executable, "-m", "distft.cli", *words]
    ended = subprocess.run(command, cwd=where, env=environment(), capture_output=True, text=True, timeout=540)
    assert ended.returncode == code, f"exit code {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
    return ended


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> RunFolder:
    """A finished run of the recipe `tiny_sentiment` in fp32 (60 steps), not evaluated. Tests copy it to write into it."""
    where = tmp_path_factory.mktemp("learned")
    distft(where, "train", "recipe=tiny_sentiment", "strategy=single", "quantization=null", "training.max_steps=60",
           "run.name=learned", "evaluation.before_and_after=false")  # fmt: skip
    return RunFolder(where / "runs" / "learned")


@pytest.fixture
def run(learned: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of `learned` to evaluate."""
    import shutil

    shutil.copytree(learned.path, tmp_path / "runs" / "learned")
    return RunFolder(tmp_path / "runs" / "learned")


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files of lm-eval with documents of their own: two of choices, their group, and one of writing."""
    folder = tmp_path_factory.mktemp("tasks")
    asked = [
        {"question": f"### Review:\n{row['text']}\n\n### Sentiment:\n", "choices": ["negative", "positive"], "label": row["label"]}
        for row in reviews(40, seed=99)
    ]  # fmt: skip
    for name, rows in (("first", asked[:24]), ("second", asked[24:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(
            f"task: sentiment_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
            "doc_to_target: label\nmetric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
            "  - {metric: acc_norm, aggregation: mean, higher_is_better: true}\n",
            encoding="utf-8",
        )
    (folder / "group.yaml").write_text(
        "group: sentiment\ntask: [sentiment_first, sentiment_second]\naggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\n",
        encoding="utf-8",
    )
    (folder / "write.yaml").write_text(
        f"task: sentiment_write\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/first.jsonl}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{choices[label]}}'\n"
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}\n'
        "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n",
        encoding="utf-8",
    )
    return folder


@pytest.fixture(scope="session")
def load() -> Callable[..., Any]:
    """A function from a run folder and overrides to its `Target`, in this process."""

    def target(folder: RunFolder, *words: str) -> Any:
        from distft.config.recipe import load_recipe
        from distft.distributed.world import World
        from distft.evaluation.target import Target

        return Target.load(load_recipe([f"recipe={folder.recipe}", *words]), folder.adapter, World())

    return target
