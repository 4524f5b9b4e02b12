"""Words encode texts exactly as the tokenizer does, or leave them to it."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from distft.data.encode import encode
from distft.data.templates import Example, Turn
from distft.data.tokenize import tokenize
from distft.data.words import Words, words_of
from tests.pretrained import smollm2

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(*patterns: str) -> Any:
    return pre_tokenizers.Sequence([*(pre_tokenizers.Split(Regex(each), "isolated") for each in patterns), BYTES])


SPLITS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "llama3": split(LLAMA3),
    "qwen": split(LLAMA3.replace("{1,3}", "")),
    "gpt4o": split(GPT4O),
    "deepseek": split(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK),
}


def like(tokenizer: Any, splits: Any, normalizer: Any = None, post: Any = None) -> Any:
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.pre_tokenizer = splits
    if normalizer is not None:
        other.backend_tokenizer.normalizer = normalizer
    if post is not None:
        other.backend_tokenizer.post_processor = post
    return other


def texts_of(file: Path, number: int) -> list[str]:
    with file.open(encoding="utf-8") as lines:
        return [line for line, _ in zip(lines, range(number), strict=False)]


@pytest.fixture(scope="module")
def texts(shared_data: Path) -> list[str]:
    """Real rows as JSON and as text, and random strings of characters that patterns tell apart."""
    found = [line for file in sorted(shared_data.glob("*.jsonl")) for line in texts_of(file, 4)]
    found += [value for line in found for value in json.loads(line).values() if isinstance(value, str)]
    some = random.Random(0)
    alphabets = [
        "aB 's\n\r\t1_.-<|>/\\",
        "aéÉßñǅʰ 12²½٣\u0301\u2028\u3000中かカ、’…€'SſT\n",
        "\x00\x1c\x85\xa0 \u200b🙂ª・a\n",
    ]
    found += ["".join(some.choices(alphabet, k=40)) for alphabet in alphabets for _ in range(200)]
    return [*found, "", " ", "\n\n", "</s>", "a</s><s> b<pad>", "<s", "x" * 500]


def differences(tokenizer: Any, texts: list[str]) -> tuple[int, list[str]]:
    """How many texts are left to the tokenizer, and those that it encodes in another way."""
    words = words_of(tokenizer)
    assert words is not None
    left, wrong = 0, []
    for special in (True, False):
        expected = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=special)
        for text, encoding in zip(texts, expected, strict=True):
            tokens = words(text, special)
            if tokens is None:
                left += 1
            elif tokens.ids.tolist() != encoding.ids:
                wrong.append(text)
    return left // 2, wrong


@pytest.mark.parametrize("kind", SPLITS)
def test_tokens_are_those_of_the_tokenizer(tokenizer: Any, texts: list[str], kind: str) -> None:
    normalizer = normalizers.NFC() if kind in ("qwen", "digits") else None
    left, wrong = differences(like(tokenizer, SPLITS[kind], normalizer), texts)
    assert not wrong
    assert left < len(texts) / 3, "only those with characters that Unicode has changed, or that NFC changes"


def test_tokens_of_smollm2_are_those_of_its_tokenizer(texts: list[str]) -> None:
    turns = [f"<|im_start|>user\n{text}<|im_end|>\n" for text in texts[:40]]
    left, wrong = differences(AutoTokenizer.from_pretrained(smollm2()), [*texts, *turns])
    assert not wrong and left < len(texts) / 3


@pytest.mark.parametrize(
    ("kind", "trims", "max_length"),
    [("gpt2", False, None), ("gpt2", True, 24), ("llama3", True, None), ("llama3", False, 24)],
)
def test_trained_parts_are_those_of_tokenize(
    tokenizer: Any, texts: list[str], kind: str, trims: bool, max_length: int | None
) -> None:
    """Also where a part begins within a word, which is left to `tokenize`."""
    post = processors.ByteLevel(trim_offsets=trims)
    other, some, examples = like(tokenizer, SPLITS[kind], post=post), random.Random(1), []
    for text in (text for text in texts if len(text) > 3):
        low, middle, high = sorted(some.choices(range(len(text) + 1), k=3))
        if low < middle:
            turns = (Turn("system", 0), Turn("user", low), Turn("assistant", middle))
            spans = ((low, middle), (middle, high)) if middle < high else ((low, middle),)
            examples.append(Example(text, spans, rendered=True, turns=turns, cut=some.choice(["end", "beginning"])))
        examples.append(
            Example.trained_from(text, text.rfind(" ") + 1, tail_from=some.choice([None, text.find(" ") + 1]))
        )
    role = Counter[str]()
    expected = list(tokenize(examples, other, max_length, Counter(), role))
    found = encode(examples, other, max_length, words_of(other))
    for example, sample, (ids, labels, cut) in zip(examples, found, expected, strict=True):
        assert (sample.ids.tolist(), sample.labels.tolist(), sample.cut) == (ids, labels, cut), example
    assert sum((Counter(sample.trained) for sample in found), Counter()) == role


def test_texts_with_tokens_that_take_in_spaces_are_left_to_the_tokenizer(tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    other.add_tokens([AddedToken("<mask>", lstrip=True, normalized=False), AddedToken("[X]", normalized=False)])
    words = words_of(other)
    assert words is not None and words("a <mask> b", True) is None
    tokens = words("a [X] b", True)
    assert tokens is not None and tokens.ids.tolist() == other("a [X] b")["input_ids"]


@pytest.mark.parametrize(
    "change",
    [
        lambda backend: setattr(backend, "normalizer", normalizers.Lowercase()),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Metaspace()),
        lambda backend: setattr(backend, "pre_tokenizer", split(r"\w+|\W+")),
        lambda backend: setattr(backend, "encode_special_tokens", True),
        lambda backend: setattr(backend.model, "dropout", 0.1),
    ],
    ids=["normalizer", "prefix", "metaspace", "pattern", "no special tokens", "dropout"],
)
def test_tokenizers_that_do_something_else_have_no_words(tokenizer: Any, change: Any) -> None:
    other = copy.deepcopy(tokenizer)
    change(other.backend_tokenizer)
    assert words_of(other) is None


def test_a_pattern_that_splits_differently_is_not_used(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from distft.data import words

    monkeypatch.setattr(words, "_GPT2", words._GPT2.replace("'ll|", ""))
    found = Words(copy.deepcopy(tokenizer))
    assert found("So it is.", True) is None
