"""`distft data preview`: print what the model is trained on, which tokens count, and what was dropped.

The text of a sample comes from its template: of a conversation, in `distft.data.chat_template`, which takes named ones
from `distft.data.named_templates`; of columns, in `distft.data.templates`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distft.config.recipe import Recipe
from distft.data.pairs import sequences_of
from distft.data.prepare import prepare_data
from distft.data.splits import lengths_of
from distft.data.tokenize import IGNORED

_GREEN, _DIM, _RESET = "\033[32m", "\033[2m", "\033[0m"


def preview(recipe: Recipe, tokenizer: Any, *, rows: Sequence[int], colour: bool) -> str:
    """The training samples numbered `rows` with trained and masked tokens marked (in colour or with ⟦ ⟧), a histogram
    of lengths, and how many samples were truncated or dropped."""
    splits = prepare_data(recipe, tokenizer)
    lines: list[str] = []
    for number in (number for number in rows if number < len(splits.train)):
        row = splits.train[number]
        trained = sum(label != IGNORED for label in row["labels"])
        lines.append(f"── sample {number}: {len(row['input_ids'])} tokens, {trained} trained " + "─" * 40)
        if "chosen" in row:
            whole = {0: ("rejected",), len(row["input_ids"]): ("chosen",)}  # of an answer with a label
            names = whole.get(row["chosen"], ("chosen", "rejected"))
            for name, sequence in zip(names, sequences_of([row]), strict=True):
                lines += [f"{name} ({len(sequence['input_ids'])} tokens):", _marked(sequence, tokenizer, colour)]
        else:
            lines.append(_marked(row, tokenizer, colour))
    lengths = lengths_of(splits.train).tolist()
    lines += ["── lengths in tokens (train) " + "─" * 40, *_histogram(lengths), *splits.report.lines()]
    legend = f"{_GREEN}trained{_RESET} {_DIM}masked{_RESET}" if colour else "⟦trained⟧ masked"
    return "\n".join([*lines, f"legend: {legend}"])


def _marked(row: Mapping[str, Any], tokenizer: Any, colour: bool) -> str:
    """The decoded text of a sample, run by run of trained or masked tokens."""
    pieces, start = [], 0
    trained = [label != IGNORED for label in row["labels"]]
    for end in range(1, len(trained) + 1):
        if end == len(trained) or trained[end] != trained[start]:
            piece = tokenizer.decode(row["input_ids"][start:end], skip_special_tokens=False)
            if colour:
                pieces.append(f"{_GREEN if trained[start] else _DIM}{piece}{_RESET}")
            else:
                pieces.append(f"⟦{piece}⟧" if trained[start] else piece)
            start = end
    return "".join(pieces)


def _histogram(lengths: Sequence[int], bins: int = 10, width: int = 40) -> list[str]:
    low, high = min(lengths), max(lengths) + 1
    step = max(1, -(-(high - low) // bins))
    starts = range(low, high, step)
    counts = [sum(start <= length < start + step for length in lengths) for start in starts]
    top = max(counts)
    return [
        f"{start:>7,} – {start + step - 1:<7,} {count:>7,} {'█' * round(width * count / top)}"
        for start, count in zip(starts, counts, strict=True)
    ]
