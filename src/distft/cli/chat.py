"""`distft chat` and `distft generate`: talk to a model, or have it answer many prompts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from distft.cli.arguments import Commands
from distft.console import say
from distft.errors import LaunchError, ModelError

if TYPE_CHECKING:
    from distft.evaluation.chat import Chat
    from distft.evaluation.generate import Answer, Sampling
    from distft.evaluation.request import Request

_COMMANDS = {
    "/base": "ask the base, without what was trained, the last question",
    "/reset": "forget the conversation",
    "/help": "show this list",
    "/exit": "leave, as Ctrl-D does; Ctrl-C stops an answer",
}


def add_to(commands: Commands) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk to a trained model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="In the conversation:\n"
        + "\n".join(f"  {name:<8}{what}" for name, what in _COMMANDS.items())
        + "\nexamples:\n  distft chat runs/tiny\n  distft chat runs/tiny --once 'What do whales eat?'"
        + "\n  echo 'What do whales eat?' | distft chat runs/tiny",
    )
    _add_model(parser)
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt (needs a chat template)")
    parser.add_argument("--once", metavar="TEXT", help="print the answer to this question, and end")
    parser.set_defaults(run=chat)

    parser = commands.add_parser(
        "generate",
        help="answer the prompts in a file",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The file has rows with `messages`, `conversations`, `prompt`, or `instruction` (with `input` or "
        "`context`);\nan answer at the end of a conversation is left out. Each row is written with `answer`, and "
        "`finished`:\nfalse where the answer was cut off.\n"
        "example:\n  distft generate runs/tiny --input prompts.jsonl --output answers.jsonl",
    )
    _add_model(parser)
    parser.add_argument("--input", type=Path, required=True, help="data file with prompts")
    parser.add_argument("--output", type=Path, required=True, help="JSON Lines file to write")
    parser.set_defaults(run=generate)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="run folder, folder of an adapter or a model, or hub ID")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of its recipe")
    parser.add_argument("--base", action="store_true", help="ask the base, without what was trained")
    parser.add_argument("--max-new-tokens", type=_positive, default=512, metavar="N", help="longest answer (512)")
    parser.add_argument(
        "--temperature", type=_not_negative, default=0.0, metavar="T", help="0 (default) takes the likeliest token"
    )
    parser.add_argument(
        "--top-p", type=_share, default=1.0, metavar="P", help="draw from the likeliest tokens of this total (1)"
    )
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="for a temperature above 0 (42)")


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def _not_negative(text: str) -> float:
    if not 0 <= (number := float(text)) < float("inf"):
        raise ValueError
    return number


def _share(text: str) -> float:
    if not 0 < (number := float(text)) <= 1:
        raise ValueError
    return number


def chat(options: argparse.Namespace) -> None:
    question = options.once
    if question is None and not sys.stdin.isatty():
        question = sys.stdin.read().strip()
    if question is not None and not question.strip():
        raise LaunchError("nothing was asked; give a question with --once, or on stdin")
    request = _request(options)
    from distft.evaluation.chat import Chat, load_target

    target, template = load_target(request)
    if options.base and target.result is None:
        say(f"{options.model} is a base already; --base has no effect")
    talk = Chat(target, template.name, _sampling(options), options.system)
    if question is not None:
        _answer(talk, question, options)
        return
    what = "base" if options.base or target.result is None else "adapter" if target.is_adapter else "whole model"
    say(f"{options.model} ({what}), template {template.name} ({template.why}); /help lists commands")
    _converse(talk, options)


def _converse(talk: Chat, options: argparse.Namespace) -> None:
    """Read questions from the terminal until it ends."""
    import readline  # noqa: F401  # `input` edits lines and remembers them with it

    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if question == "/exit":
            return
        if question == "/reset":
            talk.reset()
        elif question.startswith("/") and question != "/base":
            print("\n".join(f"{name:<8}{what}" for name, what in _COMMANDS.items()))
        elif question:
            try:
                _answer(talk, question, options)
            except KeyboardInterrupt:
                print("\n(stopped; the question is forgotten)")
            except ModelError as error:
                say(str(error))


def _answer(talk: Chat, question: str, options: argparse.Namespace) -> None:
    def write(text: str) -> None:
        print(text, end="", flush=True)

    answer = talk.ask_base(write) if question == "/base" else talk.ask(question, write, base=options.base)
    print()
    if answer is None:
        say("nothing was asked yet")
    elif not answer.finished:
        say(_cut_off(answer, options.max_new_tokens))


def _cut_off(answer: Answer, limit: int) -> str:
    if answer.tokens >= limit:
        return f"the answer was cut off after {limit} tokens; --max-new-tokens allows more"
    return "the conversation is as long as the model can read; /reset starts anew"


def generate(options: argparse.Namespace) -> None:
    from distft.evaluation.answers import answer_file, prompts_of

    if options.output.exists():
        raise LaunchError(f"{options.output} already exists and will not be overwritten; give another --output")
    rows = prompts_of(options.input)
    answered, cut = answer_file(
        _request(options), rows, _sampling(options), options.output, base=options.base, name=options.model
    )
    note = f", {cut} of them cut off (--max-new-tokens)" if cut else ""
    say(f"{answered} answers{note}: {options.output}")


def _request(options: argparse.Namespace) -> Request:
    from distft.evaluation.request import Request

    return Request.to_talk_to(options.model, options.overrides)


def _sampling(options: argparse.Namespace) -> Sampling:
    from distft.evaluation.generate import Sampling

    return Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)
