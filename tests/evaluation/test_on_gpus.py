"""`distft evaluate` on GPUs: a 4-bit base in bf16, on one process and on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distft.config.evaluation import TASKS
from distft.files import read_lines
from distft.runs.folder import RunFolder
from tests.evaluation.conftest import distft

QUESTIONS = [
    {"question_id": number, "category": category, "turns": [f"Name {number} things.", "Name one more."]}
    for number, category in enumerate(("writing", "roleplay", "math", "stem"), 81)
]
PAIRS = [{"instruction": f"Name {number} things.", "input": "", "output": "One. Two."} for number in range(1, 6)]


@pytest.mark.gpu(2)
@pytest.mark.timeout(900)
def test_every_task_on_one_and_on_two_gpus(tasks: Path, tmp_path: Path) -> None:
    questions, pairs = tmp_path / "questions.jsonl", tmp_path / "pairs.json"
    questions.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    pairs.write_text(json.dumps(PAIRS))
    distft(
        tmp_path,
        "train",
        "recipe=tiny_sentiment",
        "--nproc",
        "2",
        "model.dtype=bfloat16",
        "training.bf16=true",
        "quantization.bnb_4bit_compute_dtype=bfloat16",
        "run.name=learned",
        "tracking.report_to=[]",
    )
    run = RunFolder(tmp_path / "runs" / "learned")
    words = [
        f"evaluation.tasks=[{','.join(TASKS)}]",
        "evaluation.lm_eval.tasks=[sentiment,sentiment_write]",
        f"evaluation.lm_eval.include_path={tasks}",
        f"evaluation.mt_bench.questions={questions}",
        f"evaluation.alpaca.path={pairs}",
        "evaluation.judge.model=tiny",
        "evaluation.judge.max_new_tokens=16",
        "evaluation.judge.attempts=2",
        "evaluation.generation.max_new_tokens=16",
        "tracking.report_to=[]",
    ]

    found: dict[int, dict[str, Any]] = {}
    for processes in (2, 1):
        distft(tmp_path, "evaluate", "runs/learned", "--nproc", str(processes), *words)
        found[processes] = json.loads(run.results.read_text(encoding="utf-8"))
        assert set(found[processes]) == set(TASKS)
        assert {name: result["world_size"] for name, result in found[processes].items()} == dict.fromkeys(
            TASKS, processes
        )
        assert found[processes]["mt_bench"]["questions"] == len(QUESTIONS)
        for name in ("mt_bench", "alpaca"):  # a judge that writes random words gives no verdicts
            unparsed = found[processes][name]["figures"]["unparsed"]
            assert 0 <= unparsed["base"]["value"] <= 1 and 0 <= unparsed["adapter"]["value"] <= 1
        for file in run.evaluation.rglob("*.jsonl"):  # the other number of processes does all of it again
            assert read_lines(file)
            file.unlink()

    for name in ("perplexity", "imdb", "lm_eval"):  # products in bf16 differ with the shape of their batch
        for figure, two in found[2][name]["figures"].items():
            one = found[1][name]["figures"][figure]
            for side in ("base", "adapter"):
                assert one[side]["value"] == pytest.approx(two[side]["value"], rel=0.02, abs=0.05), (name, figure, side)
    assert found[1]["perplexity"]["tokens"] == found[2]["perplexity"]["tokens"]
    accuracy = found[1]["imdb"]["figures"]["accuracy"]
    assert accuracy["adapter"]["low"] > accuracy["base"]["high"], "the chain learns on GPUs as well"
