"""Byte-level BPE word by word, so that a word which was seen before costs one look-up.

Nearly all time of a byte-level tokenizer goes into splitting texts and tracking offsets, and texts consist of few
words. Here Python's `re` splits them, the tokenizer's own model encodes each word once, and the tokenizer itself is
left with texts for which that might not be the same.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import unicodedata
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

Ids = np.ndarray[Any, np.dtype[np.int32]]
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How `ByteLevel` splits."""
_SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_KEPT, _LONG = 1 << 17, 64
"""The most words whose tokens are kept, and the most characters of one."""
_PROBES = {
    True: (
        "It's we'll you're I've he'd 'm we'LL I'M don''t  x\n\n y \r\n\t z\x1c\x1f 1234567 12a3 a1b2",
        "$9.99 (a)[b]\n\n\n",
        "\n    def f(x):\n\treturn x**2  # what?\n\n\n\n",
        "  </a><b> HTMLParser iOS McX aB _a_b_ a-b a/b\\n ... !!!\n!! \n",
        *(f"{a}{b}{c}" for a in " a" for b in map(chr, range(128)) for c in ("x", " ", "\n\n", "  7", ".\n")),
    ),
    False: (
        " Größe naïve ﬁ Ωμέγα Привет שלום 漢字かなカナ，。 “quoted” — it’s… €5 ≤ → ■ ʰ ǅ\u3000x\u2028y ",
        "ÉtÉ MÀx\xa0w 'ſ it'ſ",
        "½Ⅷ² ٣٤ a½b  # ¿qué?\n\n\n\n  «é» é\n\n é \x85é\r\n é1é  ؟ क्या हिन्दी ไทย é’s éа 中1文 \n中 !中文!\n",
        *(f"{a}{b}{c}" for a in " a\n" for b in "é×ŉЖ中ー٣²’“\u2003\xa0" for c in ("x", " ", "\n\n", "7", ".\n")),
    ),
}
"""Texts that patterns might split differently in `re` and in the tokenizer: of ASCII, and others."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text, and which of them begin where."""

    ids: Ids
    added: int
    """The number of tokens before the text."""
    words: list[str]
    """The text in parts, each with whole tokens."""
    encoded: Sequence[bytes]
    """The ids of each part, as int32."""
    trims: bool

    def first_from(self, character: int) -> int | None:
        """The first token that ends after `character`; None if one may begin before it."""
        if character == 0:
            return self.added
        ends, tokens = self._ends
        place = int(np.searchsorted(ends, character))
        if place == len(ends) or ends[place] != character:
            return None
        return self.added + int(tokens[place]) // 4

    def covers(self, start: int, end: int) -> tuple[int, int] | None:
        """The tokens of the characters from `start` to before `end`: the first, and the one after the last; None if
        that cannot be told."""
        first, after = self.first_from(start), self.first_from(end)
        if first is None or after is None or (self.trims and self.words and self._ends_blank(end)):
            return None
        return first, after

    def _ends_blank(self, character: int) -> bool:
        """Whether what comes before `character` is blank: offsets may leave that out."""
        return self.words[int(np.searchsorted(self._ends[0], character))][-1:].isspace()

    @functools.cached_property
    def _ends(self) -> tuple[Any, Any]:
        """Of each part, the character after its last, and the bytes of ids up to there."""
        words, encoded = (np.cumsum(np.fromiter(map(len, each), np.int64)) for each in (self.words, self.encoded))
        return words, encoded


class _Known(dict[str, bytes]):
    """The ids of each word."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model, self._bytes = model, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def __missing__(self, word: str) -> bytes:
        found = [token.id for each, _ in self._bytes.pre_tokenize_str(word) for token in self._model.tokenize(each)]
        ids = array("i", found).tobytes()
        if len(word) <= _LONG:
            if len(self) >= _KEPT:
                self.clear()
            self[word] = ids
        return ids


class Words:
    """Encodes texts as a tokenizer does. It must not change afterwards."""

    def __init__(self, tokenizer: Any) -> None:
        """Raises:
        _Unknown: the tokenizer does something else, or more.
        """
        backend = tokenizer.backend_tokenizer
        if type(backend.model).__name__ != "BPE" or backend.model.dropout or backend.encode_special_tokens:
            raise _Unknown
        normalizer, post = _state(backend.normalizer), json.dumps(_state(backend.post_processor))
        if normalizer not in (None, {"type": "NFC"}):
            raise _Unknown
        self._levels = _levels(_state(backend.pre_tokenizer))
        self._known = _Known(backend.model)
        self._trims = '"trim_offsets": true' in post
        added = list(backend.get_added_tokens_decoder().items())
        self._added = {token.content: np.int32(number).tobytes() for number, token in added}
        plain = {token.content for _, token in added if not _is_flexible(token)}
        self._flexible = self._added.keys() - plain
        self._composes = normalizer is not None
        if not all(map(_is_composed, self._added)):
            raise _Unknown
        self._hint = _common_beginning(list(self._added))
        longest_first = sorted(self._added, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})" if added else "(?!)")
        tokenizer([""], truncation=False)  # tells the backend not to truncate or pad
        inner, outer = (backend.encode("a", add_special_tokens=each).ids for each in (False, True))
        self._before = outer[: len(outer) - len(inner)]
        if outer != self._before + inner:
            raise _Unknown
        self._backend = backend
        self._is_right: dict[bool, bool] = {}

    def _splits_right(self, ascii_only: bool) -> bool:
        """Whether it gives what the tokenizer gives on the texts where that is least sure."""
        texts, split = _PROBES[ascii_only], self._backend.pre_tokenizer.pre_tokenize_str
        for text, expected in zip(texts, self._backend.encode_batch(texts), strict=True):
            found = self._tokens(text, True, ascii_only)
            if found is None:
                continue
            words = [text[start:end] for _, (start, end) in split(text)]
            if found.ids.tolist() != expected.ids or (found.words != words and not self._split.search(text)):
                return False
        return True

    def __call__(self, text: str, adds_special_tokens: bool) -> Tokens | None:
        """The tokens of a text; None if only the tokenizer itself is sure to know them."""
        ascii_only = text.isascii()
        if ascii_only not in self._is_right:
            self._is_right[ascii_only] = self._splits_right(ascii_only)
        return self._tokens(text, adds_special_tokens, ascii_only) if self._is_right[ascii_only] else None

    def _tokens(self, text: str, adds_special_tokens: bool, ascii_only: bool) -> Tokens | None:
        if not ascii_only and (_changed().search(text) or (self._composes and not _is_composed(text))):
            return None
        levels, parts = self._levels(ascii_only), [text]
        if self._hint in text:
            parts = self._split.split(text)
            if not self._flexible.isdisjoint(parts[1::2]):
                return None
        known = self._known
        if len(parts) == 1:
            words = _words(levels, text)
            encoded = list(map(known.__getitem__, words))
        else:
            words, encoded = [], []
            for number, part in enumerate(parts):
                some = [part] if number % 2 else _words(levels, part)
                words += some
                encoded += [self._added[part]] if number % 2 else map(known.__getitem__, some)
        if sum(map(len, words)) != len(text):
            return None
        before = self._before if adds_special_tokens else []
        ids = np.frombuffer(b"".join([np.array(before, np.int32).tobytes(), *encoded]), np.int32)
        return Tokens(ids, len(before), words, encoded, self._trims)


def words_of(tokenizer: Any) -> Words | None:
    """`Words` for a tokenizer, or None if that would not give the same."""
    try:
        return Words(tokenizer)
    except _Unknown:
        return None


class _Unknown(Exception):
    """A part of a tokenizer that is not known here."""


def _common_beginning(texts: Sequence[str]) -> str:
    first, last = min(texts, default=""), max(texts, default="")
    return first[: next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _is_composed(text: str) -> bool:
    return unicodedata.is_normalized("NFC", text)


def _is_flexible(token: Any) -> bool:
    """Whether an added token may be found in other texts than its own, or is looked for after the others."""
    return bool(token.lstrip or token.rstrip or token.single_word or token.normalized)


def _state(part: Any) -> Any:
    """A part of a tokenizer as what its file has of it."""
    try:
        return None if part is None else json.loads(part.__getstate__())
    except Exception:  # one that is written in Python has no such state
        raise _Unknown from None


# -- how texts are split -----------------------------------------------------------------------------------------------


def _words(levels: Sequence[re.Pattern[str]], text: str) -> list[str]:
    """The words of a text: what is split by each pattern in turn. What no pattern matches is left out if there is one
    pattern."""
    if len(levels) == 1:
        return levels[0].findall(text)
    parts = [text]
    for level in levels:
        parts = [piece for part in parts for piece in level.split(part) if piece]
    return parts


def _levels(splits: Any) -> Callable[[bool], Sequence[re.Pattern[str]]]:
    """The patterns that split ASCII texts, or all others: those of a `ByteLevel`, which may have others before it."""
    if not isinstance(splits, dict):
        raise _Unknown
    parts = splits["pretokenizers"] if splits.get("type") == "Sequence" else [splits]
    *before, last = parts or [{}]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        raise _Unknown
    patterns = [_pattern_of(part) for part in before] + ([_GPT2] if last["use_regex"] else [])
    if not patterns:
        raise _Unknown
    _compiled(tuple(patterns), True)
    return functools.partial(_compiled, tuple(patterns))


def _pattern_of(part: dict[str, Any]) -> str:
    if part["type"] == "Digits":
        return r"\p{N}" if part["individual_digits"] else r"\p{N}+"
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        (kind, pattern), *_ = part["pattern"].items()
        return str(pattern) if kind == "Regex" else re.escape(pattern)
    raise _Unknown


@functools.cache
def _compiled(patterns: tuple[str, ...], ascii_only: bool) -> Sequence[re.Pattern[str]]:
    found = [_translated(pattern, ascii_only) for pattern in patterns]
    try:
        return [re.compile(f"({pattern})") for pattern in found]
    except re.error:
        raise _Unknown from None


_PIECES = re.compile(r"\\p\{\w+\}|\\[sSd]|\\[rntfv]|\\[^\w]|\\|\[\^?|\]|\(\??|\}\+|[$^]|\[:|&&|(?s:.)")
"""What a pattern is translated by."""
_NOT_OUTSIDE, _NOT_IN_CLASS = ("(", "}+", "$", "^", "\\"), ("[", "[^", "[:", "&&", r"\S")
"""What `re` may understand differently, or not at all."""


def _translated(pattern: str, ascii_only: bool) -> str:
    """A pattern of the tokenizer for `re`, for characters of which both know the same."""
    found, in_class = [], False
    for piece in _PIECES.findall(pattern):
        inside = None
        if piece in ((*_NOT_IN_CLASS, "\\") if in_class else _NOT_OUTSIDE):
            raise _Unknown
        if piece.startswith("["):
            in_class = True
        elif piece == "]":
            in_class = False
        elif piece.startswith(r"\p"):
            inside = _category(piece[3:-1], ascii_only)
        elif piece == r"\d":
            inside = _category("Nd", ascii_only)
        elif piece == r"\s":
            inside = _SPACES
        elif piece == r"\S":
            piece = f"[^{_SPACES}]"
        found.append(piece if inside is None else inside if in_class else f"[{inside}]")
    return "".join(found)


@functools.cache
def _category(name: str, ascii_only: bool) -> str:
    """The characters of a general category, such as `L` or `Lu`, as ranges of a class."""
    if not re.fullmatch("[LMNPSZC][a-z]?", name):
        raise _Unknown
    if ascii_only:
        return _ranges([number for number in range(128) if unicodedata.category(chr(number)).startswith(name)])
    return _ranges([number for number, category in enumerate(_categories()) if category.startswith(name)])


@functools.cache
def _categories() -> list[str]:
    """The category of each character below U+10000 that no version of Unicode since 3.2 has changed, else ""."""
    old, new = unicodedata.ucd_3_2_0.category, unicodedata.category
    both = ((old(chr(number)), new(chr(number))) for number in range(min(sys.maxunicode, 0xFFFF) + 1))
    return [now if then == now and now not in ("Cn", "Cs", "Co") else "" for then, now in both]


@functools.cache
def _changed() -> re.Pattern[str]:
    """A character of which two versions of Unicode may know different things."""
    return re.compile(f"[^{_ranges([number for number, category in enumerate(_categories()) if category])}]")


def _ranges(numbers: Sequence[int]) -> str:
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return "".join(f"\\u{low:04x}-\\u{high:04x}" for low, high in found) or r"\uffff"  # which is no character
