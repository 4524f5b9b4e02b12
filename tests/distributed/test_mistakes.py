"""A user's mistake has one short message, the exit code 2, no traceback, and starts nothing again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from distft.training.beside import free_port

from .conftest import Ended, Train, finish, start

PYTHON = sys.executable
ACCELERATE = [PYTHON, "-m", "accelerate.commands.launch"]


def distft(where: Path, *words: str, **changes: str) -> Ended:
    return finish(start([PYTHON, "-m", "distft.cli", *words], where, **changes), where)


def messages(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("distft: ")]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["recipe=ddp_qlra"], "there is no recipe 'ddp_qlra' (did you mean ddp_qlora?)"),
        (["recipe=tiny", "lora.rank=4"], "command line: lora.rank: unknown key (it is lora.r)"),
        (
            ["recipe=tiny", "batching.micro_batch=two"],
            "batching.micro_batch: expected a valid integer or 'auto', got 'two' (str)",
        ),
        (["recipe=tiny", "batching.micro_batch=3"], "micro-batches that divide: 1, 2, 4, 8"),
        (["recipe=fsdp_bf16", "quantization.load_in_8bit=true"], "8-bit weights cannot be sharded by FSDP2"),
        (["recipe=tiny", "data.path=missing.jsonl"], "there is no data file or folder missing.jsonl"),
        (["recipe=tiny", "data.path=empty.jsonl"], "empty.jsonl is empty"),
        (["recipe=tiny", "data.path=columns.jsonl"], "has no column instruction, response; it has question, answer"),
        (["recipe=tiny", "data.path=dropped.jsonl"], "no row is left to train on"),
        (["recipe=tiny", "model.name=/nowhere/model"], "command line: model.name: there is no folder /nowhere/model"),
        (
            ["recipe=tiny", "lora.target_modules=[query]"],
            "use any of down_proj, gate_proj, k_proj, o_proj, q_proj",
        ),
        (["recipe=tiny", "model.name=nobody/no-such-model"], "hf download nobody/no-such-model"),
        (["recipe=tiny", "run.name=taken"], "such as run.name=taken-2"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_each_mistake_is_named_once(words: list[str], expected: str, tmp_path: Path) -> None:
    """On two processes, through `distft train`: what the parent does not see is found by workers."""
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "columns.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path / "dropped.jsonl").write_text('{"instruction": "a", "context": "", "response": " "}\n' * 3)
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    ended = distft(tmp_path, "train", *words, "tracking.report_to=[]", "--nproc", "2", HF_HUB_OFFLINE="1")
    assert ended.code == 2, ended.stderr
    assert expected in ended.stderr
    assert len(messages(ended.stderr)) == 1, ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_missing_file_is_found_before_the_model_is_built(tmp_path: Path) -> None:
    words = ["recipe=tiny", "data.name=rows.jsonl", "data.format.prompt=q", "data.format.completion=a"]
    cache = tmp_path / "cache"
    for command in (["train", *words, "--nproc", "1"], ["data", "preview", *words], ["fetch", *words]):
        ended = distft(tmp_path, *command, DISTFT_CACHE=str(cache))
        assert (ended.code, len(messages(ended.stderr))) == (2, 1)
        assert ended.stderr.endswith("there is no data file or folder rows.jsonl\n")
    assert not list(cache.glob("tiny*"))


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    ended = distft(tmp_path, "train", "recipe=nothing", "--debug")
    assert ended.code == 2
    assert "Traceback" in ended.stderr and "RecipeError" in ended.stderr


def test_python_m_ends_with_2_and_the_message(tmp_path: Path) -> None:
    ended = finish(start([PYTHON, "-m", "distft.train", "recipe=tiny", "data.path=no.csv"], tmp_path), tmp_path)
    assert ended.code == 2
    fault = "command line: data.path: there is no data file or folder no.csv"
    assert ended.stderr == f"distft: the recipe has a fault:\n  {fault}\n"
    assert "Traceback" not in ended.stderr


def test_under_a_bare_launcher_the_message_comes_first_and_nothing_starts_again(tmp_path: Path) -> None:
    command = [
        *ACCELERATE,
        "--multi_gpu",
        "--num_processes",
        "2",
        "--max_restarts",
        "3",
        "--main_process_port",
        str(free_port()),
        "-m",
        "distft.train",
        "recipe=tiny",
        "data.path=no.csv",
    ]
    ended = finish(start(command, tmp_path), tmp_path)
    assert ended.code != 0
    assert len(messages(ended.stderr)) == 1, "a restart would say it again"
    before, message, _ = ended.stderr.partition("there is no data file or folder no.csv")
    assert message and "Traceback" not in before


def test_one_process_instead_of_two_is_not_silent(tmp_path: Path) -> None:
    """accelerate starts one process for `--cpu --num_processes 2`, and says nothing."""
    command = [*ACCELERATE, "--cpu", "--num_processes", "2", "-m", "distft.train", "recipe=tiny"]
    ended = finish(start(command, tmp_path), tmp_path)
    assert ended.code != 0
    assert "2 processes were requested, but this run has 1" in ended.stderr
    assert "distft train recipe=tiny --nproc 2" in ended.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("strategy", "config", "told"), [("ddp", "fsdp", "fsdp"), ("fsdp", "ddp", "ddp"), ("zero2", "zero3", "zero3")]
)
def test_a_config_file_that_disagrees_stops_the_run(strategy: str, config: str, told: str, tmp_path: Path) -> None:
    from distft.paths import packaged

    file = packaged(f"accelerate_configs/{config}.yaml")
    command = [
        *ACCELERATE,
        "--config_file",
        str(file),
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--main_process_port",
        str(free_port()),
        "-m",
        "distft.train",
        "recipe=tiny",
        "quantization=null",
        f"strategy={strategy}",
    ]
    ended = finish(start(command, tmp_path), tmp_path)
    assert ended.code != 0
    assert f"--config_file {file} says {told}, the recipe tiny says {strategy}" in ended.stderr
    assert "accelerate launch -m distft.train recipe=tiny" in ended.stderr
    assert not (tmp_path / "runs").exists(), "nothing was loaded or written"


def test_a_config_file_that_agrees_is_taken(tmp_path: Path) -> None:
    from distft.paths import packaged

    file = packaged("accelerate_configs/fsdp.yaml")
    command = [
        *ACCELERATE,
        "--config_file",
        str(file),
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--main_process_port",
        str(free_port()),
        "-m",
        "distft.train",
        "recipe=tiny",
        "quantization=null",
        "strategy=fsdp",
        "training.max_steps=2",
        "evaluation.before_and_after=false",
        "tracking.report_to=[]",
    ]
    ended = finish(start(command, tmp_path), tmp_path)
    assert ended.code == 0, ended.stderr[-3000:]
    assert ended.folder.read_summary()["strategy"] == "fsdp"


def test_one_process_falls_back_and_says_so_once(train: Train) -> None:
    ended = train("recipe=tiny", "training.max_steps=2", "evaluation.before_and_after=false", nproc=1)
    assert ended.code == 0, ended.stderr[-3000:]
    assert ended.stderr.count("falling back from ddp to single") == 1
    summary = ended.folder.read_summary()
    assert (summary["strategy"], summary["requested_strategy"], summary["gradient_accumulation_steps"]) == (
        "single",
        "ddp",
        4,
    )


@pytest.mark.gpu(2)
def test_one_process_that_sees_several_gpus_stops_and_gives_the_command(tmp_path: Path) -> None:
    ended = finish(start([PYTHON, "-m", "distft.train", "recipe=tiny"], tmp_path), tmp_path)
    assert ended.code == 2
    assert f"one process sees {torch.cuda.device_count()} GPUs" in ended.stderr
    assert "accelerate launch -m distft.train recipe=tiny" in ended.stderr


@pytest.mark.gpu(2)
def test_strategy_single_uses_one_of_several_gpus(tmp_path: Path) -> None:
    command = [
        PYTHON,
        "-m",
        "distft.train",
        "recipe=tiny",
        "strategy=single",
        "training.max_steps=2",
        "tracking.report_to=[]",
    ]
    ended = finish(start(command, tmp_path), tmp_path)
    assert ended.code == 0, ended.stderr[-3000:]
    assert ended.folder.read_summary()["world_size"] == 1
