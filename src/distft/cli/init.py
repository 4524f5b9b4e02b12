"""`distft init`: five questions, or as many flags, make a recipe that `distft check` passes."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from distft.api.check import check_words
from distft.cli.arguments import Commands
from distft.config.files import folder_name
from distft.config.schema import StrategyName
from distft.config.yaml import dump_yaml
from distft.console import say
from distft.distributed.strategies.selection import STRATEGIES
from distft.errors import LaunchError, RecipeError
from distft.files import write_atomically


@dataclass(frozen=True)
class Question:
    flag: str
    text: str
    default: str
    choices: tuple[str, ...] = ()


METHODS = ("lora", "qlora", "full")
QUESTIONS = (
    Question("model", "Which model? A hub ID, a folder, or tiny for the embedded one", "tiny"),
    Question("data", "Which data? A file, a folder, a hub ID, or tiny for the embedded ones", "tiny"),
    Question("method", "Train an adapter (lora), one on a 4-bit base (qlora), or all weights (full)?", "lora", METHODS),
    Question("strategy", "How to use several GPUs?", "ddp", get_args(StrategyName)),
    Question("batch", "How many samples make a step, over all processes?", "16"),
)


def add_to(commands: Commands) -> None:
    parser = commands.add_parser(
        "init",
        help="write a recipe from the answers to five questions",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Each flag answers a question; the others are asked on a terminal, and otherwise take their defaults.\n"
        "examples:\n"
        "  distft init\n"
        "  distft init --model Qwen/Qwen3-0.6B --data chats.jsonl --method qlora --output recipes/mine.yaml",
    )
    for question in QUESTIONS:
        parser.add_argument(f"--{question.flag}", choices=question.choices or None, help=question.text)
    parser.add_argument("--output", type=Path, help="recipe to write (default: recipes/NAME.yaml, after the data)")
    parser.set_defaults(run=init)


def init(options: argparse.Namespace) -> None:
    answers = {question.flag: getattr(options, question.flag) or _ask(question) for question in QUESTIONS}
    if not answers["batch"].isdecimal() or answers["batch"] == "0":
        raise LaunchError(f"--batch is {answers['batch']!r}; expected a number of samples, at least 1")
    name = folder_name(Path(answers["data"]).name.split(".")[0])
    target: Path = options.output or Path("recipes") / f"{name}.yaml"
    if target.exists():
        raise LaunchError(f"{target} already exists and will not be overwritten; give another --output")
    head = f"# Written by `distft init`: {answers['model']} on {answers['data']}.\n"
    recipe = recipe_of(**answers)
    try:
        write_atomically(target, head + dump_yaml(recipe))
        try:
            check_words([str(target)], processes=1)  # what it finds is said with the name of the file
        except RecipeError as error:
            if {fault.key for fault in error.faults} != {"data.chat_template"}:
                raise
            recipe["data"]["chat_template"] = "chatml"
            write_atomically(target, head + dump_yaml(recipe))
            check_words([str(target)], processes=1)
            say(f"{answers['model']} has no chat template: data.chat_template is chatml")
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    say(f"{target} is written; next: distft check {target}, then distft train {target}")


def _ask(question: Question) -> str:
    if not sys.stdin.isatty():
        return question.default
    choices = f" ({', '.join(question.choices)})" if question.choices else ""
    while True:
        answer = input(f"{question.text}{choices} [{question.default}] ").strip() or question.default
        if not question.choices or answer in question.choices:
            return answer
        print(f"expected one of {', '.join(question.choices)}")


def recipe_of(model: str, data: str, method: str, strategy: str, batch: str) -> dict[str, Any]:
    """The recipe of these answers, as a mapping."""
    rate = {"lora": 2e-4, "qlora": 2e-4, "full": 2e-5}[method]
    quantization: dict[str, Any] = {"load_in_4bit": True}
    if "weights" in STRATEGIES[cast(StrategyName, strategy)].shards:
        quantization["bnb_4bit_quant_storage"] = "bfloat16"  # 4-bit weights are only sharded in this form
    return {
        "strategy": strategy,
        "model": {"name": model},
        **({"quantization": quantization} if method == "qlora" else {}),
        **({} if method == "full" else {"lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}}),
        "data": {"name": data},
        "batching": {"global_batch_size": int(batch), "micro_batch_tokens": 4096},
        "training": {
            "num_train_epochs": 3,
            "learning_rate": rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.03,
            "max_length": 2048,
            "gradient_checkpointing": True,
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
        },
        "tracking": {"report_to": []},
    }
