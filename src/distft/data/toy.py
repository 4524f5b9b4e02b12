"""Short film reviews with a sentiment, made by code: rows in IMDB's schema (`text`, and `label` 0 negative or 1 positive) for which
nothing has to be downloaded, and which a small model can learn to tell apart."""

from __future__ import annotations

import random
from typing import Any

ROWS = 1_200
SEED = 7

_OPENINGS = (
    "I saw this {thing} on {day}.", "My {friend} took me to this {thing}.", "We watched the {thing} at home.", "This {thing} came out on {day}.",
    "On {day} I watched this {thing} with my {friend}.", "The {thing} runs for two hours.", "",
)  # fmt: skip
_JUDGEMENTS = (
    "The {part} was {word}.", "I found the {part} {word}.", "What a {word} {thing}!", "The {part} is {word} from the first minute to the last.",
    "Everybody said that the {part} was {word}, and so it was.", "A {word} {part}, all in all.",
)  # fmt: skip
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
_FILL = {
    "thing": ("film", "movie", "picture"),
    "part": ("story", "acting", "music", "ending", "dialogue", "camera work", "cast", "plot"),
    "day": ("Monday", "Friday", "Sunday", "a rainy evening"),
    "friend": ("friend", "sister", "father", "neighbour"),
}


def reviews(count: int = ROWS, seed: int = SEED) -> list[dict[str, Any]]:
    """`count` rows, the same for the same seed, every other one positive; no two texts are equal."""
    draw = random.Random(seed)  # noqa: S311
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(rows) < count:
        label = len(rows) % 2
        parts = [draw.choice(_OPENINGS), *draw.sample(_JUDGEMENTS, draw.randint(1, 2)), draw.choice(_CLOSINGS[label])]
        text = " ".join(_filled(part, label, draw) for part in parts if part)
        if text not in seen:
            seen.add(text)
            rows.append({"text": text, "label": label})
    return rows


def _filled(template: str, label: int, draw: random.Random) -> str:
    words = {name: draw.choice(options) for name, options in _FILL.items()}
    return template.format(**words, word=draw.choice(_WORDS[label]))
