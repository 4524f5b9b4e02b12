"""Templates, and that no answer is written twice: after a kill, and by several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from transformers import AutoTokenizer

from distft.data.prompts import Message, instruction_prompt, render
from distft.files import read_lines
from tests.evaluation import generate_worker
from tests.evaluation.engines.test_transformers import CHAT_TEMPLATE

PROGRAM = Path(generate_worker.__file__)


CONVERSATION: tuple[Message, ...] = (
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two. "},
    {"role": "user", "content": "Three?"},
)


def test_without_a_chat_template_the_prompt_is_that_of_training() -> None:
    assert instruction_prompt(CONVERSATION[:1]) == "### Instruction:\nOne?\n\n### Response:\n"
    assert instruction_prompt(CONVERSATION) == (
        "### Instruction:\nOne?\n\n### Response:\nTwo.\n\n### Instruction:\nThree?\n\n### Response:\n"
    )


def test_a_chat_template_renders_the_whole_conversation(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = CHAT_TEMPLATE
    assert render(tokenizer, "chat", CONVERSATION) == "<s>user: One?\nassistant: Two. \nuser: Three?\nassistant:"


def environment() -> dict[str, str]:
    root = Path(__file__).parents[2]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"}


def test_nothing_is_written_twice_after_a_kill(tmp_path: Path, tiny: Path) -> None:
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
    assert 5 <= len(before) < len(generate_worker.ITEMS)
    assert not result.with_suffix(".0").exists()
    with part.open("a") as file:
        file.write('{"key": "torn off in the mid')

    subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=300)
    after = read_lines(journal)
    record = json.loads(result.with_suffix(".0").read_text())
    assert record["asked"] == len(generate_worker.ITEMS) - len(before)
    assert len(after) == len({line["key"] for line in after}) == len(generate_worker.ITEMS)
    kept = {line["key"]: line for line in after}
    assert all(kept[line["key"]] == line for line in before)

    subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=300)
    again = json.loads(result.with_suffix(".0").read_text())
    assert again == {"asked": 0, "answers": record["answers"]}


def test_two_processes_write_what_one_does_and_half_each(tmp_path: Path, tiny: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    program = [str(PROGRAM), str(tmp_path / "one.jsonl"), str(alone)]
    subprocess.run([sys.executable, *program], env=environment(), check=True, capture_output=True, timeout=300)
    program = [str(PROGRAM), str(tmp_path / "two.jsonl"), str(shared)]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *program],
        env=environment(),
        check=True,
        capture_output=True,
        timeout=300,
    )
    one = json.loads(alone.with_suffix(".0").read_text())
    ranks = [json.loads(shared.with_suffix(f".{rank}").read_text()) for rank in (0, 1)]
    assert one["answers"] == ranks[0]["answers"] == ranks[1]["answers"]
    assert [rank["asked"] for rank in ranks] == [len(generate_worker.ITEMS) / 2] * 2
