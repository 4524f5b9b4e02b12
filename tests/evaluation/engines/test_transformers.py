"""Answers of a model in this process: each depends on its item alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distft.data.prompts import Message, instruction_prompt
from distft.evaluation.engines.transformers import TransformersEngine, _Draw
from distft.evaluation.generate import Answer, Item, Sampling


def user(text: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": text},)


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny)


def engine_for(model: Any, tokenizer: Any, batch_tokens: int = 4_096) -> TransformersEngine:
    return TransformersEngine(model, tokenizer, {"weights": "tiny"}, batch_tokens=batch_tokens, template="instruction")


def written(engine: TransformersEngine, items: list[Item]) -> list[Answer]:
    found = dict(engine.write(items))
    assert sorted(found) == list(range(len(items)))
    return [found[index] for index in range(len(items))]


MIXED = [
    Item(user(text), Sampling(tokens, temperature, 0.9, seed=7))
    for text in (
        "Hi",
        "Tell me something.",
        "What do you know about rivers, and where do they all go to in the end? " * 4,
    )
    for tokens, temperature in ((15, 0.0), (15, 0.8), (8, 1.2))
]


def test_a_batch_of_mixed_lengths_and_temperatures_equals_single_items(model: Any, tokenizer: Any) -> None:
    together = written(engine_for(model, tokenizer), MIXED)
    alone = [written(engine_for(model, tokenizer, 1), [item])[0] for item in MIXED]
    backwards = written(engine_for(model, tokenizer, 300), MIXED[::-1])[::-1]
    assert together == alone == backwards
    assert all(answer.text for answer in together)
    assert len({answer.text for answer in together}) > len(MIXED) / 2  # not all the same text


def test_greedy_decoding_takes_the_likeliest_token(model: Any, tokenizer: Any) -> None:
    item = Item(user("Tell me something."), Sampling(25))
    ids = tokenizer(instruction_prompt(item.messages), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(25):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    expected = tokenizer.decode(ids[0, -25:], skip_special_tokens=True)
    assert written(engine_for(model, tokenizer), [item])[0].text == expected


def test_the_seed_decides_the_text(model: Any, tokenizer: Any) -> None:
    engine = engine_for(model, tokenizer)
    texts = [
        written(engine, [Item(user("Tell me something."), Sampling(20, 1.0, seed=seed))])[0].text for seed in (1, 2, 1)
    ]
    assert texts[0] == texts[2] != texts[1]


def test_an_answer_ends_at_the_end_of_sequence(model: Any, tokenizer: Any) -> None:
    items = [Item(user("Tell me something."), Sampling(90, 1.0, seed=seed)) for seed in range(6)]
    answers = written(engine_for(model, tokenizer), items)
    ended = [number for number, answer in enumerate(answers) if answer.finished]
    assert ended  # the tiny model can stop
    answer = answers[ended[0]]
    assert answer.tokens < 90 and tokenizer.eos_token not in answer.text
    # With exactly as many tokens as the answer has, none is left for its end: the same text, cut off.
    tighter = Item(items[ended[0]].messages, Sampling(answer.tokens, 1.0, seed=ended[0]))
    assert written(engine_for(model, tokenizer), [tighter]) == [Answer(answer.text, answer.tokens, False)]


def test_generation_settings_of_the_model_are_ignored(tiny: Path, tokenizer: Any, model: Any) -> None:
    item = Item(user("Tell me something."), Sampling(30))
    other = AutoModelForCausalLM.from_pretrained(tiny)
    other.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0)
    assert written(engine_for(other, tokenizer), [item]) == written(engine_for(model, tokenizer), [item])
    assert other.generation_config.repetition_penalty == 3.0  # restored


def test_draws_have_the_probabilities_of_the_scores() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    count = 20_000
    draw = _Draw(range(count), torch.device("cpu"))
    chosen = draw(torch.empty(0), probabilities.log().expand(count, -1)).argmax(-1)
    shares = torch.bincount(chosen, minlength=5) / count
    assert torch.allclose(shares, probabilities, atol=0.015)  # four standard errors at 0.5
    assert shares[4] == 0


def test_an_answer_is_as_long_as_the_prompt_leaves_room(model: Any, tokenizer: Any) -> None:
    engine = engine_for(model, tokenizer, 10_000)
    positions = model.config.max_position_embeddings
    empty = len(engine._ids(engine.prompt(user(""))))
    word = " rivers"
    assert len(engine._ids(engine.prompt(user(word * 10)))) == empty + 10
    full, nearly = (Item(user(word * (positions - empty - left)), Sampling(20)) for left in (0, 5))
    answers = written(engine, [full, nearly])
    assert answers[0] == Answer("", 0, False)
    assert 0 < answers[1].tokens <= 5


CHAT_TEMPLATE = (
    "<s>{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_special_tokens_of_a_chat_template_are_not_added_twice(tiny: Path, model: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = CHAT_TEMPLATE
    engine = TransformersEngine(model, tokenizer, {}, batch_tokens=100, template="chat")
    prompt = engine.prompt(user("One?"))
    ids = engine._ids(prompt)
    assert prompt == "<s>user: One?\nassistant:"
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
