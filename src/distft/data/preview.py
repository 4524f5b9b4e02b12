"""`distft data preview`: what the model is trained on, as text: which tokens count, how long samples are, what was dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distft.config.recipe import Recipe
from distft.data.prepare import prepare
from distft.data.tokenize import IGNORED, lengths_of


def preview(recipe: Recipe, tokenizer: Any, *, rows: Sequence[int], colour: bool) -> str:
    """The samples `rows` of the train split with trained and masked tokens told apart, the histogram of lengths, and what
    was truncated or dropped."""
    splits = prepare(recipe, tokenizer)
    lines: list[str] = []
    for number in (number for number in rows if number < len(splits.train)):
        row = splits.train[number]
        trained = sum(label != IGNORED for label in row["labels"])
        lines += [
            f"── sample {number}: {len(row['input_ids'])} tokens, {trained} trained " + "─" * 40,
            _shown(row, tokenizer, colour),
        ]
    lengths = lengths_of(splits.train).tolist()
    lines += ["── lengths in tokens (train) " + "─" * 40, *_histogram(lengths), *splits.report.lines()]
    lines.append("legend: " + ("\033[32mtrained\033[0m \033[2mmasked\033[0m" if colour else "⟦trained⟧ masked"))
    return "\n".join(lines)


def _shown(row: Mapping[str, Any], tokenizer: Any, colour: bool) -> str:
    pieces, start = [], 0
    trained = [label != IGNORED for label in row["labels"]]
    for end in range(1, len(trained) + 1):
        if end == len(trained) or trained[end] != trained[start]:
            piece = tokenizer.decode(row["input_ids"][start:end], skip_special_tokens=False)
            marks = ("\033[32m", "\033[0m") if trained[start] else ("\033[2m", "\033[0m")
            pieces.append(marks[0] + piece + marks[1] if colour else f"⟦{piece}⟧" if trained[start] else piece)
            start = end
    return "".join(pieces)


def _histogram(lengths: Sequence[int], bins: int = 10, width: int = 40) -> list[str]:
    low, high = min(lengths), max(lengths) + 1
    step = max(1, -(-(high - low) // bins))
    counts = [sum(low + i * step <= n < low + (i + 1) * step for n in lengths) for i in range(-(-(high - low) // step))]
    top = max(counts)
    return [
        f"{low + i * step:>7,} – {low + (i + 1) * step - 1:<7,} {count:>7,} {'█' * round(width * count / top)}"
        for i, count in enumerate(counts)
    ]
