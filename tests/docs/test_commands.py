"""Commands and programs on every page run, recipes of commands for other machines load, messages are the real ones."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from distft.api.recipe import load, load_experiment
from distft.cli.main import main

from .pages import PAGES, README, ROOT, Page, needs_another_machine, page

LIMIT_S = 400  # of a command, on a busy machine

ALL = {command.text: command for each in PAGES for command in each.commands}
ELSEWHERE = [command.text for command in ALL.values() if command.elsewhere]
MAKE = [command for command in ALL if command.startswith("make ")]
AS_TYPED = "distft train recipe=tiny "
"""Commands that start like this run in a shell; other `distft` commands run in this process, to save the imports."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder, shared by all pages: their own rows, and the recipes and experiments that the pages show."""
    folder = tmp_path_factory.mktemp("reader")
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["question", "answer"])
        rows.writerows([f"What is {n} and {n}?", f"It is {2 * n}."] for n in range(40))
    turns = [[("user", f"What is {n} and {n}?"), ("assistant", f"It is {2 * n}.")] for n in range(40)]
    chats = [{"messages": [{"role": role, "content": text} for role, text in each]} for each in turns]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats), encoding="utf-8")
    graded = [{"prompt": f"{n} + {n} = ", "completion": str(2 * n), "level": n // 10} for n in range(40)]
    (folder / "graded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in graded), encoding="utf-8")
    pairs = [{"prompt": f"{n} + {n} = ", "chosen": str(2 * n), "rejected": str(2 * n + 1)} for n in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    (folder / "shards").mkdir()
    for part in range(2):
        lines = [json.dumps({"question": f"Is {n} even?", "answer": "no" if n % 2 else "yes"}) for n in range(part, 20)]
        with pa.CompressedOutputStream(str(folder / "shards" / f"part-{part}.jsonl.zst"), "zstd") as stream:
            stream.write("\n".join(lines).encode())
    for each in PAGES:
        for _, text in each.blocks("yaml"):
            path = folder / text.splitlines()[0].removeprefix("# ")
            assert not path.exists(), f"two pages show a file {path.name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def reader(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The reader's folder as the working directory, in an environment without a connection."""
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "WANDB_"))]:
        monkeypatch.delenv(name)
    for name, value in {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(folder)
    yield folder


def bash(command: str, where: Path) -> subprocess.CompletedProcess[str]:
    """`command` as typed with the environment of this Python active."""
    return subprocess.run(["bash", "-c", command], cwd=where, capture_output=True, text=True, timeout=LIMIT_S)


def run(command: str, where: Path) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "distft" and not command.startswith(AS_TYPED) and not {">", "|", "&&"} & set(words):
        assert main(words[1:]) == 0, command
    else:
        ended = bash(command, where)
        assert ended.returncode == 0, f"{command}\n{ended.stdout[-1000:]}\n{ended.stderr[-3000:]}"


def test_the_readme_is_short_and_has_every_kind_of_command() -> None:
    assert len(README.text.splitlines()) <= 150
    assert {"make demo", "make test"} <= {" ".join(shlex.split(command, comments=True)) for command in MAKE}
    assert any("accelerate launch" in command for command in ELSEWHERE)
    assert any("sbatch" in command for command in ELSEWHERE)
    assert len(ALL) - len(ELSEWHERE) - len(MAKE) >= 20


@pytest.fixture(scope="module")
def done() -> set[str]:
    """Commands that have run: pages come in their order, and one that repeats a command uses its result."""
    return set()


@pytest.mark.timeout(1500)  # all commands of a page
@pytest.mark.parametrize("shown", PAGES, ids=lambda each: each.path.stem)
def test_commands_and_programs_run_in_the_order_of_the_pages(shown: Page, reader: Path, done: set[str]) -> None:
    for here in dict.fromkeys((README, shown)):  # a page selected alone needs the run that the README makes
        for language, text in here.blocks("sh", "python"):
            if language == "python":
                program = compile(text, shown.name, "exec")
                if here is shown and not needs_another_machine(text.splitlines()[0]):
                    exec(program, {})
                continue
            for command in text.splitlines():
                words = " ".join(shlex.split(command, comments=True))
                if not words or words in done or ALL[command].elsewhere or command in MAKE:
                    continue
                run(command, reader)
                done.add(words)


def test_the_commands_leave_what_the_pages_promise(reader: Path, done: set[str]) -> None:
    for command in ("distft train recipe=tiny --nproc 2 training.max_steps=10 lora.r=8", "distft merge runs/tiny"):
        if command not in done:
            run(command, reader)
            done.add(command)
    assert (reader / "runs" / "tiny" / "merged" / "model.safetensors").is_file()
    tree = next(text for _, text in page("quick-start").blocks("text") if text.startswith("runs/<name>/"))
    there = {path.name for path in (reader / "runs" / "tiny").iterdir() if not path.name.startswith(".")}
    assert {name for name in there - {"merged"} if name not in tree} == set()
    run("distft recipes schema > recipe.schema.json", reader)
    assert json.loads((reader / "recipe.schema.json").read_text(encoding="utf-8"))["title"] == "distft recipe"


@pytest.mark.parametrize("command", ELSEWHERE)
def test_recipes_of_commands_for_other_machines_load(command: str, reader: Path) -> None:
    words = shlex.split(command, comments=True)
    settings = [word for word in words if re.match(r"[\w.]+=", word)]
    if "experiment=" in command:
        assert f"experiment={load_experiment(settings).name}" in words
    elif words[:2] == ["distft", "evaluate"]:
        settings = [word for word in settings if not word.startswith(("model=", "adapter="))]
        assert settings or words[2].startswith("runs/")
        load(settings)
    elif words[1] in ("report", "chat", "export"):
        assert words[2].startswith("runs/")
    elif words[:2] == ["distft", "import"]:
        assert (reader / words[2]).is_file()
    elif words[:2] == ["distft", "train"] and not settings:
        assert (reader / f"{words[2]}.yml").is_file(), "the recipe that is imported from it"
    elif words[:2] == ["distft", "compare"]:
        assert [load([f"recipe={name}"]).source.name for name in words[2:]] == words[2:]
    else:
        assert f"recipe={load(settings).source.name}" in words


@pytest.mark.parametrize("command", ELSEWHERE)
def test_starters_are_there_and_are_bash(command: str) -> None:
    for word in shlex.split(command, comments=True):
        if word.startswith(("launch/", "slurm/")):
            text = (ROOT / word).read_text(encoding="utf-8")
            assert text.startswith("#!/usr/bin/env bash\n")
            assert subprocess.run(["bash", "-n", str(ROOT / word)]).returncode == 0
            assert os.access(ROOT / word, os.X_OK) or word.endswith(".sbatch")


@pytest.mark.parametrize("command", MAKE)
def test_make_knows_the_targets(command: str) -> None:
    ended = bash(command.replace("make ", "make --dry-run ", 1), ROOT)
    assert ended.returncode == 0, ended.stderr


MESSAGES = [part for each in PAGES for _, text in each.blocks("console") for part in text.split("$ ")[1:]]


@pytest.mark.parametrize("shown", MESSAGES, ids=lambda part: part.splitlines()[0])
def test_messages_are_the_real_ones(shown: str, reader: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command, _, message = shown.partition("\n")
    assert main(shlex.split(command)[1:]) == 2
    assert capfd.readouterr().err.strip() == message.strip()


def test_the_experiment_of_the_pages_is_one(reader: Path) -> None:
    experiment = load_experiment(["experiment=precision"])
    assert [run.variant for run in experiment.runs] == ["bits4", "bits32"] * 5
