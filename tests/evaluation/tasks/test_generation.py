"""The task `generation`: prompts and references of any form, both sides' answers, and a judge if asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distft.config.evaluation import Generation
from distft.config.recipe import load_recipe
from distft.errors import DataError
from distft.evaluation.preflight import faults
from distft.evaluation.sets import asked
from distft.evaluation.target import Target
from distft.evaluation.tasks.generation import TASK, read_prompts
from tests.evaluation.conftest import evaluation

ROWS: list[dict[str, Any]] = [
    {"prompt": "Why?", "reference": "So."},
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"prompt": "Which?", "references": ["This.", "That."]},
    {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]},
]


def file(where: Path, rows: list[dict[str, Any]]) -> str:
    path = where / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_prompts_and_references_of_every_form(tmp_path: Path) -> None:
    found = read_prompts(Generation(path=file(tmp_path, ROWS)))
    assert [one.references for one in found] == [("So.",), ("3",), ("This.", "That."), ("Me.",)]
    assert [one.question for one in found] == ["Why?", "Add.\n\n1 2", "Which?", "Who?"]
    assert len(read_prompts(Generation(path=file(tmp_path, ROWS), limit=2))) == 2
    other = read_prompts(
        Generation(path=file(tmp_path, [{"prompt": "a", "reference": "b", "gold": "c"}]), reference="gold")
    )
    assert other[0].references == ("c",)
    with pytest.raises(DataError, match=r"row 2 has no reference: .*found prompt"):
        read_prompts(Generation(path=file(tmp_path, [ROWS[0], {"prompt": "Why?"}])))


def test_both_sides_answer_and_are_compared(target: Target, tmp_path: Path) -> None:
    settings = evaluation(
        generation={"path": "tiny_summaries_test", "max_new_tokens": 4, "metrics": ["rouge1", "bleu"]}
    )
    found = TASK.run(target, settings, tmp_path)
    assert set(found["figures"]) == {"rouge1", "bleu"} and found["prompts"] == 12
    assert set(found["answers"]) == {"base", "adapter"}
    assert all(figure["difference"] is not None for figure in found["figures"].values())


def test_the_judge_is_checked_and_recorded_only_if_it_is_asked_for(replay: Callable[..., Any]) -> None:
    words = ["recipe=tiny", "evaluation.tasks=[generation]", "evaluation.generation.path=tiny_summaries_test"]
    nobody = "evaluation.judge.endpoint=http://127.0.0.1:9/v1"
    assert faults(load_recipe([*words, nobody])) == []
    (fault,) = faults(load_recipe([*words, nobody, "evaluation.generation.judged=true"]))
    assert fault.key == "evaluation.judge.endpoint"
    assert "is required for this task" in str(faults(load_recipe(words[:2]))[0])


def test_its_own_keys_do_not_change_what_other_tasks_were_asked() -> None:
    plain, with_file = (
        load_recipe(["recipe=tiny", *more]) for more in ([], ["evaluation.generation.path=tiny_summaries_test"])
    )
    assert asked("mt_bench", plain) == asked("mt_bench", with_file)
    assert asked("generation", plain) != asked("generation", with_file)
