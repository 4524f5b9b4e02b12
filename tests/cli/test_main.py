"""The command line as a whole: its help, its options and its exit codes."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator

import pytest

from distft.cli.main import main, parser

COMMANDS = [
    "train",
    "evaluate",
    "submit",
    "jobs",
    "fetch",
    "recipes",
    "experiments",
    "compare",
    "report",
    "data",
    "merge",
    "export",
    "doctor",
]


def test_help_lists_every_command_and_imports_neither_torch_nor_trl() -> None:
    code = (
        "import sys; from distft.cli.main import parser; print(parser().format_help()); "
        "print(sorted({'torch', 'trl', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert all(f"\n    {command}" in ended.stdout for command in COMMANDS)
    assert ended.stdout.endswith("[]\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: distft {command}" in capsys.readouterr().out


def test_overrides_may_follow_options() -> None:
    options, rest = parser().parse_known_args(["train", "recipe=tiny", "--nproc", "2", "lora.r=8"])
    assert (options.overrides, options.nproc, rest) == (["recipe=tiny"], 2, ["lora.r=8"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "recipe=tiny", "--nproc", "-1"], "the number of processes must be at least 1, got -1"),
        (["train", "recipe=tiny", "--nproc", "0"], "the number of processes must be at least 1, got 0"),
        (["recipes", "show", "tiny", "--nproc", "0"], "the number of processes must be at least 1, got 0"),
        (
            ["evaluate", "model=tiny", "data.name=tiny", "--nproc", "0"],
            "the number of processes must be at least 1, got 0",
        ),
        (["compare", "tiny", "--repeats", "0"], "the number of repeats must be at least 1, got 0"),
        (["submit"], "nothing to submit: give recipe=NAME or experiment=NAME"),
        (["merge", "nowhere"], "nowhere has no adapter to merge"),
        (["report", "nowhere"], "nowhere contains neither a run's summary.json nor a trainer_state.json"),
    ],
)
def test_a_mistake_is_exit_code_2_and_one_message(words: list[str], message: str) -> None:
    ended = subprocess.run([sys.executable, "-m", "distft.cli", *words], capture_output=True, text=True)
    assert ended.returncode == 2
    assert message in ended.stderr and "Traceback" not in ended.stderr


def test_an_unknown_option_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--procs", "2"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --procs" in capsys.readouterr().err


def test_train_without_a_recipe_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    assert "distft train tiny" in capsys.readouterr().err


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers that run something."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield parser
    for group in groups:
        for child in group.choices.values():
            yield from leaves(child)


def test_each_help_shows_an_example() -> None:
    found = list(leaves(parser()))
    assert len(found) > 20
    assert [leaf.prog for leaf in found if f"\n  {leaf.prog}" not in leaf.format_help()] == []
