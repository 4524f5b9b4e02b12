"""Synthetic film reviews, labelled by sentiment, or in pairs of which the positive one is to be preferred.

The rows have IMDB's schema (`text`, and `label`: 0 negative, 1 positive), or `prompt`, `chosen` and `rejected`. They
need no download, and are simple enough for a small model to learn from.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from distft.files import write_atomically
from distft.paths import cache_folder

ROWS = 1_200
SEED = 7
PROMPT = "Write a review of a film.\n\n"

_OPENINGS = (
    "I saw this {thing} on {day}.",
    "My {friend} took me to this {thing}.",
    "We watched the {thing} at home.",
    "This {thing} came out on {day}.",
    "On {day} I watched this {thing} with my {friend}.",
    "The {thing} runs for two hours.",
    "",
)
_JUDGEMENTS = (
    "The {part} was {word}.",
    "I found the {part} {word}.",
    "What a {word} {thing}!",
    "The {part} is {word} from the first minute to the last.",
    "Everybody said that the {part} was {word}, and so it was.",
    "A {word} {part}, all in all.",
)
_CLOSINGS = {
    1: (
        "I will see it again.",
        "Do not miss it.",
        "My {friend} loved it.",
        "Go and see it.",
        "I left with a smile.",
        "",
    ),
    0: (
        "I want my money back.",
        "Stay at home.",
        "My {friend} fell asleep.",
        "Do not waste your evening.",
        "I left early.",
        "",
    ),
}
_WORDS = {
    1: ("wonderful", "brilliant", "moving", "funny", "beautiful", "clever", "gripping", "great", "charming", "superb"),
    0: ("awful", "boring", "dull", "clumsy", "terrible", "weak", "tedious", "bad", "silly", "dreadful"),
}
_PLACEHOLDERS = {
    "thing": ("film", "movie", "picture"),
    "part": ("story", "acting", "music", "ending", "dialogue", "camera work", "cast", "plot"),
    "day": ("Monday", "Friday", "Sunday", "a rainy evening"),
    "friend": ("friend", "sister", "father", "neighbour"),
}


def tiny_sentiment() -> Path:
    """The file of the built-in reviews in the user's cache, written by the first process that asks for it."""
    return _file("tiny_sentiment", reviews())


def tiny_preferences() -> Path:
    """The same for the built-in pairs."""
    return _file("tiny_preferences", preferences())


def tiny_ratings() -> Path:
    """The same for the built-in answers with a label."""
    return _file("tiny_ratings", ratings())


def _file(name: str, rows: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file = cache_folder() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
    if not file.exists():
        write_atomically(file, text)
    return file


def reviews(count: int = ROWS, seed: int = SEED) -> list[dict[str, Any]]:
    """`count` distinct rows, reproducible for a given `seed`; negative and positive rows alternate."""
    draw = random.Random(seed)  # noqa: S311
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(rows) < count:
        label = len(rows) % 2
        parts = [draw.choice(_OPENINGS), *draw.sample(_JUDGEMENTS, draw.randint(1, 2)), draw.choice(_CLOSINGS[label])]
        text = " ".join(_fill(part, label, draw) for part in parts if part)
        if text not in seen:
            seen.add(text)
            rows.append({"text": text, "label": label})
    return rows


def preferences(count: int = ROWS // 2) -> list[dict[str, Any]]:
    """`count` rows with a positive and a negative review each."""
    texts = [row["text"] for row in reviews(2 * count)]
    pairs = zip(texts[1::2], texts[::2], strict=True)
    return [{"prompt": PROMPT, "chosen": one, "rejected": other} for one, other in pairs]


def ratings(count: int = ROWS) -> list[dict[str, Any]]:
    """`count` rows with a review each, which is to be preferred if it is positive."""
    rows = reviews(count)
    return [{"prompt": PROMPT, "completion": row["text"], "label": bool(row["label"])} for row in rows]


def _fill(template: str, label: int, draw: random.Random) -> str:
    words = {name: draw.choice(options) for name, options in _PLACEHOLDERS.items()}
    return template.format(**words, word=draw.choice(_WORDS[label]))
