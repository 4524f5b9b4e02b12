"""Encode texts with a byte-level tokenizer segment by segment, so that a segment seen before costs one look-up.

Most of the time of a byte-level tokenizer goes into splitting texts, and texts repeat their words. A text may be cut
before a single space between two characters that are not blank: the patterns below match a space only as the first
character of a word or in a run of blanks, so the tokenizer has a border there anyway, and both sides have the tokens
that they have in the whole text. Tokenizers with other parts (Metaspace, other patterns) encode whole texts.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

Ids = np.ndarray[Any, np.dtype[np.int32]]
Characters = Sequence[int | None]

_SEGMENT = re.compile(r"\s*\S+(?:(?! \S)\s+\S+)*(?:\s+\Z)?")
_KEPT = 1 << 22
"""The most characters of segments whose ids are kept."""
_ODD = 32
"""The most added tokens that a text is searched for."""
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ALTERNATIVES = {
    *(_CONTRACTIONS, "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"),
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+"),
    *(r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"),
    *(r"\p{N}", r"\p{N}+", r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"),
    *(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),
    *(r" ?[\p{P}\p{S}]+[\r\n]*", r"\s*[\r\n]+", r"\s*[\r\n/]+", r"\s+(?!\S)", r"\s+"),
    *(f"[^\\r\\n\\p{{L}}\\p{{N}}]?{each}" for each in (f"{_UPPER}*{_LOWER}+", f"{_UPPER}+{_LOWER}*")),
    *(f"[^\\r\\n\\p{{L}}\\p{{N}}]?{each}{_CONTRACTIONS}?" for each in (f"{_UPPER}*{_LOWER}+", f"{_UPPER}+{_LOWER}*")),
}
"""What the patterns of GPT-2, Llama 3, Qwen, DeepSeek, GPT-4o and Mistral's Tekken consist of: none of these matches a
space after a character that is not blank."""


class Encoded(NamedTuple):
    """A text as tokens."""

    ids: Ids
    places: tuple[int | None, ...]
    """The token that has each character asked for; None where no token has it, or it is not given."""
    ends: bool
    """The last token ends where the text does."""


def encode_whole(backend: Any, texts: Sequence[str], characters: Sequence[Characters]) -> list[Encoded]:
    """`texts` encoded by the tokenizer `backend`, and the tokens of some `characters` of each."""
    found = []
    for text, encoding, wanted in zip(texts, backend.encode_batch(texts), characters, strict=True):
        places = tuple(None if each is None else encoding.char_to_token(each) for each in wanted)
        found.append(Encoded(np.array(encoding.ids, np.int32), places, _ends(encoding, text)))
    return found


class _Words(dict[str, bytes | None]):
    """The ids of each word with `before` in front of it, as int32; None for one that begins or ends in a blank."""

    def __init__(self, backend: Any, before: str) -> None:
        super().__init__()
        self._backend, self._before, self._size = backend, before, 0

    def __missing__(self, word: str) -> bytes | None:
        is_whole = bool(word) and not word[0].isspace() and not word[-1].isspace()
        ids = _ids(self._backend, self._before + word) if is_whole else None
        self._size += len(word)
        if self._size > _KEPT:
            self._size = len(word)
            self.clear()
        self[word] = ids
        return ids

    def encode(self, word: str) -> bytes:
        """The ids of a word even if it begins or ends in a blank."""
        ids = self[word]
        return _ids(self._backend, self._before + word) if ids is None else ids


class SegmentEncoder:
    """Gives what `encode_whole` gives. The tokenizer must not change afterwards."""

    def __init__(self, backend: Any) -> None:
        self._backend, self._first, self._others = backend, _Words(backend, ""), _Words(backend, " ")
        tokens = backend.get_added_tokens_decoder().values()
        flexible = (each for each in tokens if each.lstrip or each.rstrip or each.single_word or " " in each.content)
        self._odd = [each.content for each in flexible]
        inner, outer = (backend.encode("a", add_special_tokens=each).ids for each in (False, True))
        self._added = outer[: len(outer) - len(inner)]
        self._adds_at_end = outer != [*self._added, *inner]

    @property
    def can_encode(self) -> bool:
        """Whether texts may be cut for this tokenizer."""
        normalizer, splits = (_state(part) for part in (self._backend.normalizer, self._backend.pre_tokenizer))
        fits = normalizer in (None, {"type": "NFC"}) and _cuts_before_spaces(splits)
        return fits and not self._adds_at_end and len(self._odd) <= _ODD

    def __call__(self, texts: Sequence[str], characters: Sequence[Characters]) -> list[Encoded]:
        found = [self._encoded(text, wanted) for text, wanted in zip(texts, characters, strict=True)]
        uncut = [number for number, each in enumerate(found) if each is None]
        whole = iter(encode_whole(self._backend, [texts[n] for n in uncut], [characters[n] for n in uncut]))
        return [next(whole) if each is None else each for each in found]

    def _encoded(self, text: str, characters: Characters) -> Encoded | None:
        """None if the text may not be cut."""
        if any(token in text for token in self._odd):
            return None
        words = text.split(" ")
        encoded = [self._first[words[0]], *map(self._others.__getitem__, words[1:])]
        if None in encoded:  # there are blanks beside a space
            segments = _SEGMENT.findall(text)
            if not segments or sum(map(len, segments)) != len(text):
                return None
            words = [segments[0], *(segment[1:] for segment in segments[1:])]
            encoded = [self._first.encode(words[0]), *map(self._others.encode, words[1:])]
        return self._joined(text, words, encoded, characters)

    def _joined(self, text: str, words: Sequence[str], encoded: list[Any], characters: Characters) -> Encoded:
        lengths, tokens = (list(accumulate(map(len, each))) for each in (words, encoded))
        ids = np.frombuffer(b"".join([np.array(self._added, np.int32).tobytes(), *encoded]), np.int32)

        def end_of(number: int) -> int:
            """Where a word ends in the text. All but the first have a space before them."""
            return lengths[number] + number

        def around(number: int) -> tuple[int, int, Any]:
            """Where the text and the ids of two words begin, of which `number` is the second, and their encoding. The
            first comes along because the first token of a text may have other offsets than within."""
            start, token = (end_of(number - 2), tokens[number - 2] // 4) if number > 1 else (0, 0)
            return start, token, self._backend.encode(text[start : end_of(number)], add_special_tokens=False)

        def place_of(character: int | None) -> int | None:
            if character is None or character >= len(text):
                return None
            start, token, encoding = around(bisect_right(range(len(words)), character, key=end_of))
            place = encoding.char_to_token(character - start)
            return None if place is None else len(self._added) + token + place

        start, _, last = around(len(words) - 1)
        return Encoded(ids, tuple(map(place_of, characters)), _ends(last, text[start:]))


def _ids(backend: Any, text: str) -> bytes:
    return np.array(backend.encode(text, add_special_tokens=False).ids, np.int32).tobytes()


def _ends(encoding: Any, text: str) -> bool:
    """A token that was added at the end has no characters."""
    last = encoding.token_to_chars(len(encoding.ids) - 1) if len(encoding.ids) else None
    return last is not None and bool(last[1] >= len(text))


def _cuts_before_spaces(splits: Any) -> bool:
    if not isinstance(splits, dict):
        return False
    parts = splits["pretokenizers"] if splits["type"] == "Sequence" else [splits]
    if not parts or parts[-1]["type"] != "ByteLevel" or parts[-1]["add_prefix_space"]:
        return False
    patterns = [_split_by(part) for part in parts[:-1]]
    # Blanks are a match of their own, so there is a border before a space.
    return all(each <= _ALTERNATIVES for each in patterns) and (
        parts[-1]["use_regex"] or any(r"\s+" in each for each in patterns)
    )


def _split_by(part: dict[str, Any]) -> set[str]:
    """The alternatives of what texts are split by; one that is not known stands for what else a part does."""
    if part["type"] == "Digits":
        return {r"\p{N}"}
    if part["type"] != "Split" or part["behavior"] != "Isolated" or part["invert"]:
        return {""}
    return set(_alternatives(part["pattern"].get("Regex", "")))


def _alternatives(pattern: str) -> Iterator[str]:
    """What `|` separates outside of groups and classes."""
    depth = start = 0
    for found in re.finditer(r"\\.|\[(?:\\.|[^\]])*\]|[(|)]", pattern):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if found[0] == "|" and not depth:
            yield pattern[start : found.start()]
            start = found.end()
    yield pattern[start:]


def _state(part: Any) -> Any:
    """A part of a tokenizer as its file has it; of one that is written in Python, nothing."""
    try:
        return None if part is None else json.loads(part.__getstate__())
    except Exception:
        return {"type": "custom"}
