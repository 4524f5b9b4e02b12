"""What `distft evaluate` is asked to do, and the mistakes in it."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest

from distft.errors import LaunchError, RecipeError, RunFolderError
from distft.evaluation.request import Request
from distft.runs.folder import RunFolder


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ([], LaunchError, "say what to evaluate: a run folder"),
        (["adapter=x"], LaunchError, "say what to evaluate"),
        (["nowhere"], RunFolderError, "run folder nowhere does not exist"),
        (["model=tiny", "adapter=nowhere"], RunFolderError, "nowhere is not an adapter folder"),
        (["model=tiny"], RecipeError, r"data\.name: is required: which text should perplexity .*\? \(data\.name=FILE"),
        (
            ["model=/no/model"],
            RecipeError,
            r"2 faults(?s:.*)data\.name(?s:.*)model\.name: there is no folder /no/model",
        ),
        (["model=tiny", "data.name=tiny", "data.test_fraction=0"], RecipeError, r"holds out no rows"),
        (["model=tiny", "evaluation.tasks=[imbd]"], RecipeError, r"evaluation\.tasks\.0: expected 'perplexity'"),
        (["model=tiny", "evaluation.judge.modell=x"], RecipeError, r"evaluation\.judge\.modell: unknown key"),
    ],
)
def test_a_mistake_is_found_before_anything_is_loaded(
    words: list[str], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        Request.of(words)


def test_an_unfinished_run_has_nothing_to_evaluate(learned: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(learned.recipe.read_text(encoding="utf-8"), encoding="utf-8")
    with (
        pytest.raises(RunFolderError, match="the run has not finished; wait for it"),
        (tmp_path / ".lock").open("w") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        Request.of([str(tmp_path)])
    started = {"command": ["train.py", "recipe=a", "run.name=b"], "working_folder": str(Path.cwd())}
    (tmp_path / "environment.json").write_text(json.dumps(started), encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"has not finished; resume it with distft train recipe=a run\.name=b"):
        Request.of([str(tmp_path)])
    with pytest.raises(RunFolderError, match=f"did you mean {tmp_path}"):
        Request.of([str(tmp_path.with_name(f"{tmp_path.name}s"))])


def test_the_result_of_a_run_has_a_card_and_everyone_may_read_it(learned: RunFolder) -> None:
    text = (learned.adapter / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\nlibrary_name: peft\n") and "trained on `tiny_sentiment`" in text
    umask = os.umask(0o077)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in learned.adapter.iterdir()} == {0o666 & ~umask}


def test_columns_are_checked_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"body": "some text"}\n' * 20)
    words = [
        "model=tiny",
        f"data.name={tmp_path / 'text.jsonl'}",
        "data.format.text=text",
        "training.completion_only_loss=false",
    ]
    with pytest.raises(RecipeError, match=r"has no column text; it has body \(name yours: data.format.text=COLUMN"):
        Request.of(words)
