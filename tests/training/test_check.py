"""Everything that can be known about a run before its weights are loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import distft
from distft.cli.main import main
from distft.errors import RecipeError


def faults(*words: str) -> dict[str, str]:
    """The problem of every fault that the command finds, by its key."""
    from distft.api.check import check_words

    with pytest.raises(RecipeError) as caught:
        check_words(words)
    return {fault.key: fault.problem for fault in caught.value.faults}


def test_a_recipe_without_faults_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "recipe=tiny", "--deep"]) == 0
    shown = capsys.readouterr()
    lines = [line[:13].strip() for line in shown.out.splitlines()]
    assert set(lines) == {"ok", "run"} and shown.err == ""
    assert "317, validation 39, test 41 samples" in shown.out


def test_faults_of_values_and_files_come_together(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    found = faults("recipe=tiny", "lora.rr=3", "data.path=absent.jsonl", f"run.dir={tmp_path / 'gone'}")
    assert found.keys() == {"lora.rr", "data.path", "run.dir"}
    assert "there is no data file or folder absent.jsonl" in found["data.path"]


@pytest.mark.parametrize(
    ("command", "word"), [("check", "training.learning_rat=1"), ("train", f"run.dir={__file__}/x")]
)
def test_a_typo_and_a_folder_that_cannot_be_are_found_without_torch(command: str, word: str) -> None:
    program = (
        "import sys; from distft.cli.main import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, command, "recipe=tiny", word], capture_output=True, text=True
    )
    assert ended.returncode == 2 and f"command line: {word.partition('=')[0]}: " in ended.stderr


def test_the_python_function_returns_what_the_command_prints() -> None:
    found = distft.check("tiny", {"lora.r": 8})
    assert not found.faults and any("tokenizer" in line for line in found.lines())
    with pytest.raises(RecipeError, match=r"lora\.rr"):
        distft.check("tiny", {"lora.rr": 8})


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_run_name_that_is_not_a_folder(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "mine"
    if kind == "link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.write_text("")
    found = faults("recipe=tiny", f"run.dir={tmp_path}", "run.name=mine")
    assert str(path) in found["run.name"]
    distft.check("tiny", {"run.dir": str(tmp_path / "new" / "deep")})


@pytest.mark.parametrize("key", ["run.dir", "run.name"])
def test_a_name_that_is_too_long_for_a_folder(key: str) -> None:
    assert "more than 255 bytes" in faults("recipe=tiny", f"{key}={'x' * 256}")[key]
