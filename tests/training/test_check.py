"""Everything that can be known about a run before its weights are loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import distft
from distft.api.check import check_words
from distft.cli.main import main
from distft.config.recipe import load_recipe
from distft.errors import RecipeError
from distft.launch.submit import Submission
from distft.runs.folder import RunFolder
from distft.training.disk import checkpoint_bytes, disk_findings


def faults(*words: str) -> dict[str, str]:
    """The problem of every fault that the command finds, by its key."""
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


CHATS = [
    [{"role": "user", "content": f"What is {n} + 1?"}, {"role": "assistant", "content": str(n + 1)}] for n in range(20)
]


@pytest.mark.parametrize("columns", ["messages", "prompt and completion"])
def test_conversations_without_a_chat_template_are_a_fault(columns: str, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    rows = [
        {"messages": chat} if columns == "messages" else {"prompt": chat[:1], "completion": chat[1:]} for chat in CHATS
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    found = faults("recipe=tiny", f"data.name={file}")
    assert found.keys() == {"data.chat_template"}
    assert "the tokenizer of tiny has no chat template" in found["data.chat_template"]
    told = distft.check("tiny", {"data.name": str(file), "data.chat_template": "chatml"}).lines()
    assert [line for line in told if "data: read as" in line], "what was inferred is said before the run"


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


def test_submit_finds_what_check_finds(tmp_path: Path) -> None:
    """Before the job queues, and for all runs at once; not what only a container holds."""
    words = ["recipe=tiny", "lora.target_modules=[q_porj]", "training.lr_scheduler_type=cosine_with_min_lr"]
    submission = Submission.of_recipe(load_recipe([*words, f"run.dir={tmp_path}"]), words)
    with pytest.raises(RecipeError) as caught:
        submission.check_runs()
    assert {fault.key for fault in caught.value.faults} == {"lora.target_modules", "training.lr_scheduler_type"}
    Submission.of_recipe(load_recipe([*words, "slurm.container=image"]), words).check_runs()


def test_validate_finds_what_check_finds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "validate", "tiny", "lora.target_modules=[q_porj]"]) == 2
    assert "did you mean q_proj?" in capsys.readouterr().err


def test_checkpoints_that_do_not_fit_on_the_disk_are_a_fault(tmp_path: Path) -> None:
    """fp32 weights and two states of AdamW take 12 bytes; two are kept, and a third is complete before one goes."""
    recipe = load_recipe(["recipe=tiny", "run.dir=new/runs", "training.save_total_limit=2"])
    text, none = disk_findings(recipe, 2**20, tmp_path)
    assert text.startswith("about 12.0 MiB a checkpoint, 3 at a time; ") and none == []
    _, (fault,) = disk_findings(recipe, 10**15, tmp_path)
    assert fault.key == "run.dir" and "training.save_total_limit" in fault.hint


def test_checkpoints_that_are_there_already_need_no_more_room(tmp_path: Path) -> None:
    """Otherwise a run on a disk that is just large enough could not be restarted."""
    recipe = load_recipe(["recipe=tiny", "run.dir=runs", "training.save_total_limit=2"])
    tight = shutil.disk_usage(tmp_path).free // 36 + 2**22  # three checkpoints of 12 bytes a value: 144 MiB too much
    assert disk_findings(recipe, tight, tmp_path)[1] != []
    folder = RunFolder.claim(tmp_path / "runs", "tiny", exact=True)
    (folder.checkpoints / "checkpoint-1").mkdir(parents=True)
    with (folder.checkpoints / "checkpoint-1" / "optimizer.pt").open("wb") as file:
        file.truncate(2**30)  # sparse
    for status, fits in (("running", True), ("finished", False), ("failed", True)):
        folder.write_summary({"status": status})
        assert (disk_findings(recipe, tight, tmp_path)[1] == []) == fits


def test_what_rounding_does_to_a_full_fine_tune_is_said_before_the_run() -> None:
    words = ["recipe=tiny", "lora=null", "quantization=null", "model.dtype=bfloat16", "training.bf16=false"]
    assert any("updated in bfloat16" in line for line in check_words(words).lines())
    assert not any("updated in" in line for line in check_words(["recipe=tiny"]).lines())


@pytest.mark.parametrize(
    ("word", "expected"),
    [("training.optim=adamw_8bit", 6), ("training.optim=sgd", 4), ("training.optim=lion_32bit", 8), ("lora=null", 12)],
)
def test_bytes_of_a_trained_value(word: str, expected: int) -> None:
    recipe = load_recipe(["recipe=tiny", "quantization=null", word])
    assert checkpoint_bytes(recipe, 1) == expected
