"""What a model writes depends on the item alone, and is written once."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from distft.config.evaluation import Evaluation
from distft.config.recipe import load_recipe
from distft.distributed.world import World
from distft.errors import MissingExtraError, ModelError
from distft.evaluation.engines.choose import choose_engine, obstacle_to_vllm
from distft.evaluation.engines.transformers import TransformersEngine, _Draw
from distft.evaluation.engines.vllm import Served, Server
from distft.evaluation.generate import Answer, Item, Message, Sampling, instruction_prompt, render
from distft.evaluation.target import Target
from distft.files import read_lines
from tests.evaluation import writes

PROGRAM = Path(writes.__file__)


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


def test_a_batch_of_mixed_lengths_and_temperatures_equals_one_by_one(model: Any, tokenizer: Any) -> None:
    together = written(engine_for(model, tokenizer), MIXED)
    alone = [written(engine_for(model, tokenizer, 1), [item])[0] for item in MIXED]
    backwards = written(engine_for(model, tokenizer, 300), MIXED[::-1])[::-1]
    assert together == alone == backwards
    assert all(answer.text for answer in together)
    assert len({answer.text for answer in together}) > len(MIXED) / 2  # they are not all one text


def test_greedy_is_what_the_likeliest_token_gives_each_time(model: Any, tokenizer: Any) -> None:
    item = Item(user("Tell me something."), Sampling(25))
    ids = tokenizer(instruction_prompt(item.messages), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(25):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    expected = tokenizer.decode(ids[0, -25:], skip_special_tokens=True)
    assert written(engine_for(model, tokenizer), [item])[0].text == expected


def test_a_seed_and_a_prompt_make_the_text(model: Any, tokenizer: Any) -> None:
    engine = engine_for(model, tokenizer)
    texts = [
        written(engine, [Item(user("Tell me something."), Sampling(20, 1.0, seed=seed))])[0].text for seed in (1, 2, 1)
    ]
    assert texts[0] == texts[2] != texts[1]


def test_an_answer_ends_at_the_end_of_sequence(model: Any, tokenizer: Any) -> None:
    items = [Item(user("Tell me something."), Sampling(90, 1.0, seed=seed)) for seed in range(6)]
    answers = written(engine_for(model, tokenizer), items)
    ended = [number for number, answer in enumerate(answers) if answer.finished]
    assert ended  # the tiny model has learned to stop
    answer = answers[ended[0]]
    assert answer.tokens < 90 and tokenizer.eos_token not in answer.text
    # As many tokens as the answer has leave none for its end: the same text, cut off.
    tighter = Item(items[ended[0]].messages, Sampling(answer.tokens, 1.0, seed=ended[0]))
    assert written(engine_for(model, tokenizer), [tighter]) == [Answer(answer.text, answer.tokens, False)]


def test_settings_that_come_with_the_model_do_not_count(tiny: Path, tokenizer: Any, model: Any) -> None:
    item = Item(user("Tell me something."), Sampling(30))
    other = AutoModelForCausalLM.from_pretrained(tiny)
    other.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0)
    assert written(engine_for(other, tokenizer), [item]) == written(engine_for(model, tokenizer), [item])
    assert other.generation_config.repetition_penalty == 3.0  # and they come back


def test_draws_have_the_probabilities_of_the_scores() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    count = 20_000
    draw = _Draw(range(count), torch.device("cpu"))
    chosen = draw(torch.empty(0), probabilities.log().expand(count, -1)).argmax(-1)
    shares = torch.bincount(chosen, minlength=5) / count
    assert torch.allclose(shares, probabilities, atol=0.015)  # four standard errors of 0.5
    assert shares[4] == 0


def test_a_prompt_that_leaves_no_room_has_no_answer_and_one_that_leaves_little_a_short_one(
    model: Any, tokenizer: Any
) -> None:
    engine = engine_for(model, tokenizer, 10_000)
    positions = model.config.max_position_embeddings
    empty = len(engine._ids(engine.prompt(user(""))))
    word = " rivers"
    assert len(engine._ids(engine.prompt(user(word * 10)))) == empty + 10
    full, nearly = (Item(user(word * (positions - empty - left)), Sampling(20)) for left in (0, 5))
    answers = written(engine, [full, nearly])
    assert answers[0] == Answer("", 0, False)
    assert 0 < answers[1].tokens <= 5


CONVERSATION: tuple[Message, ...] = (
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two. "},
    {"role": "user", "content": "Three?"},
)


def test_without_a_chat_template_the_prompt_is_the_one_of_training() -> None:
    assert instruction_prompt(CONVERSATION[:1]) == "### Instruction:\nOne?\n\n### Response:\n"
    assert instruction_prompt(CONVERSATION) == (
        "### Instruction:\nOne?\n\n### Response:\nTwo.\n\n### Instruction:\nThree?\n\n### Response:\n"
    )


def test_a_chat_template_goes_first_and_its_special_tokens_stand_once(tiny: Path, model: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    assert render(tokenizer, "chat", CONVERSATION) == "<s>user: One?\nassistant: Two. \nuser: Three?\nassistant:"
    engine = TransformersEngine(model, tokenizer, {}, batch_tokens=100, template="chat")
    ids = engine._ids(engine.prompt(CONVERSATION))
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def environment() -> dict[str, str]:
    root = Path(__file__).parents[2]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"}


def test_killed_in_the_middle_nothing_is_written_twice(tmp_path: Path, tiny: Path) -> None:
    journal, result = tmp_path / "answers.jsonl", tmp_path / "result"
    part = tmp_path / "answers.rank0.jsonl"
    command = [sys.executable, str(PROGRAM), str(journal), str(result)]
    first = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(read_lines(part)) < 5:
        assert first.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = read_lines(part)
    assert 5 <= len(before) < len(writes.ITEMS)
    assert not result.with_suffix(".0").exists()
    with part.open("a") as file:
        file.write('{"key": "torn off in the mid')

    subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=300)
    after = read_lines(journal)
    record = json.loads(result.with_suffix(".0").read_text())
    assert record["asked"] == len(writes.ITEMS) - len(before)
    assert len(after) == len({line["key"] for line in after}) == len(writes.ITEMS)
    kept = {line["key"]: line for line in after}
    assert all(kept[line["key"]] == line for line in before)

    subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=300)
    again = json.loads(result.with_suffix(".0").read_text())
    assert again == {"asked": 0, "answers": record["answers"]}


def test_two_processes_write_what_one_does_and_each_its_share(tmp_path: Path, tiny: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    program = [str(PROGRAM), str(tmp_path / "one.jsonl"), str(alone)]
    subprocess.run([sys.executable, *program], env=environment(), check=True, capture_output=True, timeout=300)
    program = [str(PROGRAM), str(tmp_path / "two.jsonl"), str(shared)]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *program],
        env=environment(), check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    one = json.loads(alone.with_suffix(".0").read_text())
    ranks = [json.loads(shared.with_suffix(f".{rank}").read_text()) for rank in (0, 1)]
    assert one["answers"] == ranks[0]["answers"] == ranks[1]["answers"]
    assert [rank["asked"] for rank in ranks] == [len(writes.ITEMS) / 2] * 2


def a_target(adapter_config: dict[str, Any] | None, tmp_path: Path, device: str, *words: str) -> Target:
    """As much of a target as is looked at before anything is loaded."""
    if adapter_config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(adapter_config))
    recipe = load_recipe(["recipe=tiny", *words])
    result = None if adapter_config is None else tmp_path
    return Target(
        recipe, World(), None, torch.device(device), result, result is not None, {"base": "b", "adapter": "a"}
    )


@pytest.mark.parametrize(
    ("config", "device", "words", "says"),
    [
        (None, "cpu", ["quantization=null"], "no GPU"),
        (None, "cuda:0", ["quantization={load_in_4bit: true}"], "does not quantise"),
        ({"r": 8, "use_dora": True}, "cuda:0", ["quantization=null"], "use_dora"),
        ({"r": 8, "modules_to_save": ["lm_head"]}, "cuda:0", ["quantization=null"], "modules_to_save"),
        ({"r": 300}, "cuda:0", ["quantization=null"], "up to rank 256"),
        (
            {"r": 8, "use_dora": False, "modules_to_save": None, "rank_pattern": {}},
            "cuda:0",
            ["quantization=null"],
            None,
        ),
        (None, "cuda:0", ["quantization=null"], None),
    ],
)
def test_vllm_is_taken_only_where_it_writes_what_was_trained(
    config: dict[str, Any] | None, device: str, words: list[str], says: str | None, tmp_path: Path
) -> None:
    obstacle = obstacle_to_vllm(a_target(config, tmp_path, device, *words))
    assert obstacle is None if says is None else obstacle is not None and says in obstacle


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_not_installed_is_said_with_its_extra(tmp_path: Path) -> None:
    settings = Evaluation.model_validate({"generation": {"engine": "vllm"}})
    with pytest.raises(MissingExtraError, match=r"pip install 'distft\[vllm\]'"):
        choose_engine(a_target(None, tmp_path, "cuda:0"), settings, "base")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_vllm_that_cannot_start_is_an_error_with_a_remedy(tokenizer: Any) -> None:
    """The supervisor is a real process; without vLLM it cannot start the server."""
    served = Served("m", None, "float32", trust_remote_code=False)
    server = Server(served.command(1, 0.5), os.environ)
    with pytest.raises(ModelError, match=r"exited with code 1; .*evaluation\.generation\.engine=transformers"):
        server.wait_until_healthy("http://127.0.0.1:1")
