"""Texts that are encoded segment by segment have the tokens, and the places of characters, of the whole texts."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from distft.data.segments import SegmentEncoder, encode_whole

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_END}"
_O200K = "|".join(
    rf"[^\r\n\p{{L}}\p{{N}}]?{case}{_CONTRACTIONS}?" for case in (f"{_UPPER}*{_LOWER}+", f"{_UPPER}+{_LOWER}*")
)
_PATTERNS = {
    "llama3": [_LLAMA],
    "qwen2": [_LLAMA.replace("{1,3}", "")],
    "o200k": [rf"{_O200K}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n/]+|\s+(?!\S)|\s+"],
    "deepseek3": [
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_END}",
    ],
}
_UNSPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_KINDS = ["gpt2", "digits", "trimmed", "nfc", "begins", *_PATTERNS]
_ATOMS = [
    *(" ", "  ", "\n", " \n", "\n\n ", "\t", "\r\n", "\xa0", "\u3000", "\u2028", "\x1c", "\x85", "\u180e", "\u200b"),
    *("a", "The", "it's", "'ll", "DON'T", "x1", "12345", "½", "٣", "é", "e\u0301", "\u0308", "Größe", "Привет", "नमस्ते"),
    *(
        "漢字",
        "かな",
        "한국",
        "ไทย",
        "🙂",
        "👩\u200d🔬",
        "/",
        "//\n",
        "...",
        "(a)",
        "{",
        "`",
        "<s>",
        "</s>",
        "<|im_end|>",
        "\ufeff",
    ),
]
_TEXTS = st.lists(
    st.one_of(st.sampled_from(_ATOMS), st.just(" "), st.text(st.characters(codec="utf-8"), max_size=3)), max_size=24
).map("".join)


@functools.cache
def _trained(kind: str) -> Tokenizer:
    """A byte-level tokenizer that splits as one of `_KINDS` does."""
    found = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind not in _PATTERNS)
    before = [pre_tokenizers.Split(Regex(each), "isolated") for each in _PATTERNS.get(kind, [])]
    if kind == "digits":
        before = [pre_tokenizers.Digits(individual_digits=True)]
    found.pre_tokenizer = pre_tokenizers.Sequence([*before, level]) if before else level
    if kind == "nfc":
        found.normalizer = normalizers.NFC()
    texts = ["it's the café in Größe that we'll see, 12345 times... " * 3, "".join(_ATOMS), "Привет мир नमस्ते 漢字 かな"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    found.train_from_iterator(texts, trainer)
    found.add_special_tokens([AddedToken(each, normalized=False) for each in ("<s>", "</s>", "<|im_end|>")])
    if kind == "begins":
        beginning = ("<s>", found.token_to_id("<s>"))
        found.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[beginning]
        )
    if kind == "trimmed":
        found.post_processor = processors.ByteLevel(trim_offsets=True)
    return found


def _same(backend: Any, texts: list[str], characters: list[tuple[int | None, ...]]) -> bool:
    found = SegmentEncoder(backend)(texts, characters)
    expected = encode_whole(backend, texts, characters)
    return [(each.ids.tolist(), each.places, each.ends) for each in found] == [
        (each.ids.tolist(), each.places, each.ends) for each in expected
    ]


@pytest.mark.parametrize("kind", _KINDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(texts=st.lists(_TEXTS, min_size=1, max_size=4), data=st.data())
def test_segments_have_the_tokens_of_the_whole_text(kind: str, texts: list[str], data: st.DataObject) -> None:
    backend = _trained(kind)
    assert SegmentEncoder(backend).can_encode
    place = st.one_of(st.none(), st.integers(0, 40))
    characters = [data.draw(st.tuples(place, place)) for _ in texts]
    assert _same(backend, texts, characters)


@pytest.mark.parametrize("kind", _KINDS)
def test_each_pair_of_characters_beside_a_space(kind: str) -> None:
    parts = [(a, b, c) for a in _ATOMS for b in (" ", "  ", " \n") for c in _ATOMS]
    assert _same(_trained(kind), ["".join(each) for each in parts], [(len(a), len(a + b)) for a, b, _ in parts])


def test_an_added_token_that_takes_blanks_along_or_has_a_space() -> None:
    for token in (
        AddedToken("<s>", rstrip=True),
        AddedToken("<s>", lstrip=True),
        AddedToken("two words", normalized=False),
        AddedToken("word", single_word=True),
    ):
        backend = Tokenizer.from_str(_trained("gpt2").to_str())
        backend.add_special_tokens([token])
        assert SegmentEncoder(backend).can_encode
        texts = [f"a {token.content} b{token.content} c", "two words or wordy word", "none of it here"]
        assert _same(backend, texts, [(0, 5)] * len(texts))


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": pre_tokenizers.Metaspace()},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": _UNSPLIT},
        {"pre_tokenizer": pre_tokenizers.Split(Regex(r"\w+ \w+|\s+"), "isolated")},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Digits(), _UNSPLIT])},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"), _UNSPLIT])},
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_LLAMA), "removed"), _UNSPLIT])},
        {"pre_tokenizer": pre_tokenizers.Sequence([])},
        {"pre_tokenizer": None},
        {"normalizer": normalizers.Replace(" ", "_")},
        {"post_processor": processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 421)])},
    ],
    ids=lambda change: "-".join(f"{key}={type(value).__name__}" for key, value in change.items()),
)
def test_other_tokenizers_get_whole_texts(change: dict[str, Any]) -> None:
    backend = Tokenizer.from_str(_trained("gpt2").to_str())
    for name, part in change.items():
        setattr(backend, name, part)
    assert not SegmentEncoder(backend).can_encode


def test_words_are_forgotten_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distft.data.segments._KEPT", 8)
    texts = ["to be or not to be", "that is the question"]
    assert _same(_trained("gpt2"), texts * 3, [(3, 9)] * 6)
