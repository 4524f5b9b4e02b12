"""Texts with classes: which rows, how they are drawn, and the label words that may follow a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distft.config.evaluation import Classification, Evaluation
from distft.data.formats import class_number
from distft.data.prompts import Template, render
from distft.data.sources import KNOWN_DATASETS, read_source
from distft.errors import DataError
from distft.paths import packaged
from distft.text import shorten

_LISTED = 6
_KEY = "evaluation.classification"
_PLACE = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Replaces the placeholder while the prompt is rendered."""
TEXT = "{text}"
"""The placeholder for the text in `evaluation.classification.prompt`."""


@dataclass(frozen=True)
class Review:
    """A row: its number in its source, its text, and its class number; `group` is what figures are also given for."""

    row: int
    text: str
    label: int
    group: str = ""


@dataclass(frozen=True)
class Prompt:
    """The tokens given to the model, and those of each label word after them (at least one each)."""

    prefix: list[int]
    continuations: list[list[int]]

    @property
    def nested(self) -> bool:
        """Whether a label word begins with the tokens of another, whose probability then contains its own."""
        ordered = sorted(self.continuations)
        return any(longer[: len(shorter)] == shorter for shorter, longer in pairwise(ordered))

    def ended(self, end: int) -> Prompt:
        """With the token `end` after every label word."""
        return Prompt(self.prefix, [[*tokens, end] for tokens in self.continuations])


def subset(reviews: Sequence[Review], size: int | None, balanced: bool, seed: int, classes: int) -> list[Review]:
    """`size` reviews (all if None) drawn by `seed`, in their original order.

    If `balanced`, the same number of each class, which the rarest class limits.
    """
    order = np.random.default_rng(seed).permutation(len(reviews)).tolist()
    if balanced:
        of_class = [[i for i in order if reviews[i].label == label] for label in range(classes)]
        each = min([len(members) for members in of_class] + ([] if size is None else [size // classes]))
        order = [i for members in of_class for i in members[:each]]
    return [reviews[i] for i in sorted(order if balanced else order[:size])]


def continued(
    text: str, tail_from: int, words: Sequence[str], tokenizer: Any, max_length: int | None, *, special: bool = True
) -> Prompt:
    """The prompt `text`, tokenized together with each word, as in training; with `special`, the tokenizer adds its
    tokens.

    It is truncated to `max_length` tokens before the character `tail_from`, the same for all words. If a tokenizer
    merges the end of the prompt with a word, the merged token belongs to the continuation.
    """
    encoded = tokenizer(
        [text + word for word in words], return_offsets_mapping=True, truncation=False, add_special_tokens=special
    )
    ids = [list(row) for row in encoded["input_ids"]]
    for row, offsets in zip(ids, encoded["offset_mapping"], strict=True):
        if row[-1] == tokenizer.eos_token_id and offsets[-1][0] == offsets[-1][1]:  # the tokenizer's own
            row.pop()
    begins = [
        next(place for place, (_, end) in enumerate(offsets) if end > len(text))
        for offsets in encoded["offset_mapping"]
    ]
    cut = min(begins)
    while any(row[:cut] != ids[0][:cut] for row in ids):
        cut -= 1
    prefix, continuations = ids[0][:cut], [row[cut:] for row in ids]
    if max_length is not None:
        over = (
            len(prefix) + max(map(len, continuations)) + 1 - max_length
        )  # 1 for the end of the sequence, as in training
        tail = next(place for place, (_, end) in enumerate(encoded["offset_mapping"][0]) if end > tail_from)
        if over > 0:
            prefix = prefix[: max(tail - over, 0)] + prefix[tail:]
    return Prompt(prefix, continuations)


def file_of(name: str) -> Path:
    """The file that `name` is: a path, or a data set that ships with distft."""
    known, path = KNOWN_DATASETS.get(name), Path(name).expanduser()
    return packaged(known.file) if known is not None and known.file and not path.exists() else path


def load_labelled(settings: Classification, name: str, key: str) -> tuple[list[str], list[Review]]:
    """The label words of a file of texts with classes, and its rows. `key` is the recipe's for the file.

    Labels are words, or the numbers of `label_words`. Without these, the words are those in the file, in their order
    by code points.

    Raises:
        DataError: the file cannot be read, a row has no text or another label, or there are fewer than two classes.
    """
    rows = list(read_source(file_of(name)))
    columns = [settings.text, settings.label, *([settings.group] if settings.group else [])]
    if rows and (missing := [column for column in columns if column not in rows[0]]):
        raise DataError(
            f"{name} has no column {', '.join(missing)}; it has {', '.join(rows[0])}\n"
            "  name yours: evaluation.classification.text, .label and .group"
        )
    words = settings.label_words or _words_in(rows, settings.label, name)
    if len({_folded(word) for word in words}) < max(len(words), 2):
        raise DataError(f"the label words {words} are not two or more different words ({key}, label_words)")
    found = []
    for number, row in enumerate(rows):
        if not isinstance(row.get(settings.text), str) or not row[settings.text].strip():
            raise DataError(f"row {number} of {name} has no text in column {settings.text}: {str(row)[:200]}")
        label = _class_of(row.get(settings.label), words)
        if label is None:
            raise DataError(
                f"row {number} of {name} has {str(row.get(settings.label))[:40]!r} in column {settings.label}; "
                f"expected {shorten(map(repr, words), _LISTED)}, or a class number from 0 to {len(words) - 1}\n"
                "  for other classes: evaluation.classification.label_words=[WORD,WORD]"
            )
        found.append(Review(number, row[settings.text], label, str(row[settings.group]) if settings.group else ""))
    return words, found


def _words_in(rows: Sequence[Mapping[str, Any]], column: str, name: str) -> list[str]:
    """The different labels, if they are words."""
    labels = [row.get(column) for row in rows]
    if any(not isinstance(label, str) or not label.strip() or label.strip().isdecimal() for label in labels):
        raise DataError(
            f"{name} has labels that are no words in column {column}: what does the model answer for each class?\n"
            "  evaluation.classification.label_words=[WORD,WORD], in the order of the class numbers from 0"
        )
    return sorted({str(label).strip() for label in labels})


def _class_of(label: Any, words: Sequence[str]) -> int | None:
    known = {_folded(word): number for number, word in enumerate(words)}
    if isinstance(label, str) and _folded(label) in known:
        return known[_folded(label)]
    return class_number(label, len(words))


def _folded(word: str) -> str:
    return word.strip().casefold()


def drawn(settings: Classification, rows: Sequence[Review], seed: int, classes: int) -> list[Review]:
    """The rows that the settings take.

    Raises:
        DataError: none.
    """
    if found := subset(rows, settings.subset, settings.balanced, seed, classes):
        return found
    raise DataError("no rows are left to classify; a class may have none (evaluation.classification.balanced=false)")


def read_labelled(
    settings: Evaluation, file: Literal["path", "validation"]
) -> tuple[list[str], list[Review], int | None]:
    """The label words, the rows of a file to classify, and the number of the positive class, if there is one.

    Raises:
        DataError: no file is named, it cannot be read, or the settings do not fit it.
    """
    section = settings.classification
    if (name := getattr(section, file)) is None:
        raise DataError(f"is required for this task: texts with classes\n  {_KEY}.{file}=FILE")
    if section.prompt.count(TEXT) != 1:
        raise DataError(f"{_KEY}.prompt must have {TEXT} once, where the text is to stand; got {section.prompt!r}")
    words, available = load_labelled(section, name, f"{_KEY}.{file}")
    positive = None
    if section.positive is not None:
        known = [word.casefold() for word in words]
        if section.positive.casefold() not in known:
            raise DataError(f"{_KEY}.positive={section.positive} is not a label word; there are {', '.join(words)}")
        positive = known.index(section.positive.casefold())
    return words, drawn(section, available, settings.seed, len(words)), positive


def around(tokenizer: Any, template: Template, prompt: str) -> tuple[str, str]:
    """What stands before and after the text in a rendered `prompt`."""
    rendered = render(tokenizer, template, [{"role": "user", "content": prompt.replace(TEXT, _PLACE)}])
    head, _, tail = rendered.partition(_PLACE)
    if template == "plain" and not tail[-1:].isspace():
        tail += " "  # as between a prompt and its completion
    return head, tail


def require_room(
    head: str, tail: str, words: list[str], tokenizer: Any, max_length: int | None, template: Template
) -> None:
    """Raises DataError if the question alone takes `max_length` tokens."""
    question = continued(head + tail, len(head), words, tokenizer, None, special=template != "chat")
    needed = len(question.prefix) + max(map(len, question.continuations)) + 1
    if max_length is not None and needed >= max_length:
        raise DataError(
            f"the question takes {needed} of {max_length} tokens, which leaves no room for a text; raise "
            f"{_KEY}.max_length, or shorten {_KEY}.prompt"
        )


def prompt_of(
    text: str, head: str, tail: str, words: list[str], tokenizer: Any, max_length: int | None, template: Template
) -> Prompt:
    """The text between `head` and `tail` before each label word. A text that is too long is cut at its end."""
    text = head + text.strip()
    return continued(text + tail, len(text), words, tokenizer, max_length, special=template != "chat")


def prompts_of(
    rows: Sequence[Review], words: list[str], prompt: str, tokenizer: Any, max_length: int | None, template: Template
) -> list[Prompt]:
    """The question about each row, in this template.

    Raises:
        DataError: the question leaves no room for a text.
    """
    head, tail = around(tokenizer, template, prompt)
    require_room(head, tail, words, tokenizer, max_length, template)
    return [prompt_of(row.text, head, tail, words, tokenizer, max_length, template) for row in rows]
