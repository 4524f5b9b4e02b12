"""Answer the prompts in a file, and write each row with its answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distft.data.conversations import conversation, from_texts
from distft.data.files import Row, files_at
from distft.data.prompts import Message
from distft.errors import DataError
from distft.evaluation.chat import engine_of, load_target
from distft.evaluation.generate import Item, Sampling, generate
from distft.evaluation.request import Request
from distft.files import append_lines

_CONVERSATIONS = ("messages", "conversations", "prompt")
_CONTEXTS = ("context", "input")


class Prompt(NamedTuple):
    """A row, and the conversation that its answer continues."""

    row: Row
    messages: tuple[Message, ...]


def prompts_of(path: Path) -> list[Prompt]:
    """The prompts of a data file.

    Raises:
        DataError: the file cannot be read, or a row has no prompt; the message says which.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    rows = [row for file in files_at(path) for row in file]
    if not rows:
        raise DataError(f"{path} has no rows")
    found = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(Prompt(row, _messages(row)))
        except DataError as error:
            raise DataError(f"{path}, row {number}: {error}") from None
    return found


def _messages(row: Row) -> tuple[Message, ...]:
    column = next((name for name in _CONVERSATIONS if row.get(name)), None)
    if column is not None and not isinstance(row[column], str):
        turns = conversation(row[column], column).messages
    elif column is not None:
        turns = [{"role": "user", "content": row[column]}]
    elif row.get("instruction"):
        context = next((str(row[name]) for name in _CONTEXTS if row.get(name)), "")
        turns = from_texts(str(row["instruction"]), context, "").messages
    else:
        raise DataError(f"expected messages, conversations, prompt or instruction; found {', '.join(row) or 'nothing'}")
    if turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not turns or turns[-1]["role"] != "user":
        raise DataError("the conversation does not end with a question of the user")
    return tuple(turns)  # type: ignore[arg-type]


def answer_file(
    request: Request, prompts: Sequence[Prompt], sampling: Sampling, output: Path, *, base: bool, name: str
) -> tuple[int, int]:
    """Write the rows of `prompts` with `answer` and `finished` to `output`, as JSON Lines.

    Answers are kept next to `output` until all are written: after an interruption, the same call continues.

    Returns:
        The number of answers, and of those that were cut off.
    """
    target, template = load_target(request, identify=True)
    side = "base" if base else target.sides[-1]
    items = [Item(prompt.messages, sampling) for prompt in prompts]
    kept = output.with_name(f".{output.name}.answers.jsonl")
    with target.side(side):
        engine = engine_of(target, template.name, {"weights": target.identity[side]})
        answers = generate(engine, items, target.world, kept, name)
    rows: list[dict[str, Any]] = [
        {**prompt.row, "answer": answer.text, "finished": answer.finished}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    unfinished = output.with_name(f".{output.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    append_lines(unfinished, rows)
    unfinished.replace(output)
    kept.unlink()
    return len(answers), sum(not answer.finished for answer in answers)
