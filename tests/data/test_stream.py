"""Streamed data: every window is what it is said to be, whoever makes it, and the plan sees each sample as declared."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distft.config.schema import Batching
from distft.data.batch_plan import Plan, RankBatches
from distft.data.checks import data_faults
from distft.data.prefetch import Prefetch
from distft.data.prepare import Splits
from distft.data.stream import Position, Stream
from distft.data.windowed_plan import WindowedPlan
from distft.errors import DataError, RecipeError
from tests.data.http_server import Server
from tests.data.rows import Prepare, recipe_of, trained, write_rows

WORDS = (
    "data.name=null",
    "data.files=part-*.jsonl",
    "data.format={prompt: q, completion: a}",
    "data.streaming=true",
    "data.window=12",
    "training.max_steps=10",
    "training.eval_strategy=no",
    "batching.global_batch_size=4",
    "batching.micro_batch=2",
    "data.validation_fraction=0.25",
    "data.test_fraction=0.25",
)
HELD_OUT = 6
SIZES = (9, 20, 1, 11)
"""Rows of each file; every seventh is empty."""


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The answers of the rows of all files in order; some are empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "1")  # the process that makes windows ahead of time is tested by itself
    answers = ["" if number % 7 == 5 else f"n{number}" for number in range(sum(SIZES))]
    left: Iterator[str] = iter(answers)
    for part, size in enumerate(SIZES):
        write_rows(tmp_path / f"part-{part}.jsonl", [{"q": "Which?", "a": next(left)} for _ in range(size)])
    return answers


def seen(splits: Splits, numbers: Any, tokenizer: Any) -> list[str]:
    return [trained(splits.samples[number], tokenizer).strip().removesuffix("</s>") for number in numbers]


def stream_of(splits: Splits) -> Stream:
    assert splits.stream is not None
    return splits.stream


def plan_of(splits: Splits) -> Plan:
    return splits.plan(7, splits.recipe.batching)


def test_windows_are_the_rows_in_order_without_the_held_out_again_and_again(
    rows: list[str], prepare: Prepare, tokenizer: Any
) -> None:
    splits = prepare(*WORDS)
    held = {answer for each in (splits.validation, splits.test) for answer in _answers(each, tokenizer)}
    assert held == {answer for answer in rows[:HELD_OUT] if answer}
    streamed = [answer for answer in rows[HELD_OUT:] if answer]
    expected = [streamed[number % len(streamed)] for number in range(8 * 12)]
    assert seen(splits, range(8 * 12), tokenizer) == expected
    assert _answers(splits.train, tokenizer) == expected[:12]
    assert splits.report.rows["train"] == 12 and splits.report.dropped == {"an empty response": 2}


def _answers(samples: Any, tokenizer: Any) -> list[str]:
    return [trained(row, tokenizer).strip().removesuffix("</s>") for row in samples]


@pytest.mark.parametrize("batching", ["batching.micro_batch=2", "batching.micro_batch_tokens=64"])
def test_every_step_has_a_shuffled_part_of_its_window_on_any_number_of_processes(
    rows: list[str], prepare: Prepare, batching: str
) -> None:
    splits = prepare(*WORDS, batching, "training.max_length=16")
    plan = plan_of(splits)
    assert plan.steps == 3 and [plan.samples_after(step) for step in (0, 1, 3, 7)] == [0, 4, 12, 28]
    lengths = [len(splits.samples[number]["input_ids"]) for number in range(4 * 12)]
    in_memory = Plan(lengths[12:24], splits.recipe.batching, 7)
    for window in range(4):
        steps = [plan.samples(3 * window + step).tolist() for step in range(3)]
        together = [number for step in steps for number in step]
        assert sorted(together) == list(range(12 * window, 12 * window + 12)) != together
        tokens = plan.tokens_after(3 * window + 2) - plan.tokens_after(3 * window)
        assert tokens == sum(lengths[number] for number in steps[0] + steps[1])
    assert [plan.samples(3 + step).tolist() for step in range(3)] == [
        (in_memory.samples(3 + step) + 12).tolist() for step in range(3)
    ], "as a plan of the window's samples would have them"
    for world_size in (1, 2, 4):
        rounds = plan.accumulation(world_size, 4)
        ranks = [RankBatches(plan, rank, world_size, rounds) for rank in range(world_size)]
        for window in range(4):
            for each in ranks:
                each.set_epoch(window)
            batches = list(zip(*map(list, ranks), strict=True))
            assert len(batches) == 3 * rounds
            for step in range(3):
                within = batches[step * rounds : (step + 1) * rounds]
                found = sorted(number for one in within for batch in one for number in batch)
                assert found == sorted(plan.samples(3 * window + step).tolist())


def test_a_process_that_comes_later_finds_the_same_windows(rows: list[str], prepare: Prepare, tokenizer: Any) -> None:
    splits = prepare(*WORDS)
    expected = [seen(splits, range(12 * window, 12 * window + 12), tokenizer) for window in range(6)]
    stream = stream_of(splits)
    for window in range(6):
        stream.remove(window)
    assert [path.name for path in stream.folder.iterdir() if path.is_dir()] == ["000000"], "the first one stays"
    again: Stream = pickle.loads(pickle.dumps(stream))
    assert len(again.window(4).lengths) == 12
    assert {path.name for path in stream.folder.iterdir() if path.is_dir()} == {"000000", "000004"}
    later = prepare(*WORDS)
    assert stream_of(later).folder == stream.folder
    assert seen(later, range(48, 60), tokenizer) == expected[4]
    for record in stream.folder.glob("*.json"):  # a cache that lost them makes all windows before again
        record.unlink()
    stream_of(later).remove(5)
    assert seen(prepare(*WORDS), range(60, 72), tokenizer) == expected[5]
    assert len([path for path in stream.folder.iterdir() if path.is_dir()]) <= 3


def test_windows_that_were_trained_on_are_removed(
    rows: list[str], prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    asked: list[int] = []
    monkeypatch.setattr(Prefetch, "ask_for", lambda _, number: asked.append(number))
    splits = prepare(*WORDS)
    plan, stream = plan_of(splits), stream_of(splits)
    for step in range(30):
        plan.micro_batches(step, 2)
        assert len([path for path in stream.folder.iterdir() if path.is_dir()]) <= 3
    assert sorted(set(asked)) == list(range(1, 11))
    assert len(list(stream.folder.glob("*.json"))) == 10


def test_the_next_window_is_made_by_a_process_of_its_own(rows: list[str], prepare: Prepare) -> None:
    stream = stream_of(prepare(*WORDS))
    ahead = Prefetch(stream)
    ahead.ask_for(1)
    ahead.ask_for(2)
    process = ahead._process
    assert process is not None and process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=120) == 0, "it ends when its input does"
    made = {name: (stream.folder / name / "samples.arrow").read_bytes() for name in ("000001", "000002")}
    for number in (1, 2):
        stream.remove(number)
        assert stream.window(number).file.read_bytes() == made[f"{number:06}"]


def test_a_request_that_comes_late_makes_no_window_again(rows: list[str], prepare: Prepare) -> None:
    """The process that makes windows ahead may start when training is far beyond what it was asked for first."""
    stream = stream_of(prepare(*WORDS))
    stream.window(1)
    stream.remove(1)
    stream.make_ahead(1)
    stream.make_ahead(3)
    assert sorted(path.name for path in stream.folder.iterdir() if path.is_dir()) == ["000000", "000003"]


def test_only_the_rows_of_a_window_are_read(rows: list[str], prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Position] = []
    read = Stream._rows

    def counting(self: Stream, start: Position) -> Iterator[Any]:
        for at, row in read(self, start):
            taken.append(at)
            yield at, row

    monkeypatch.setattr(Stream, "_rows", counting)
    monkeypatch.setattr("distft.data.stream._AT_ONCE", 5)
    stream = stream_of(prepare(*WORDS))
    stream.window(1)
    assert len(taken) == len(set(taken)) <= 35, "window 1 goes on where window 0 has ended"


def test_data_smaller_than_a_window_are_one_message(rows: list[str], prepare: Prepare) -> None:
    problem = r"end before the first window of 40 samples is full\n +set data.window to fewer"
    with pytest.raises(DataError, match=problem):
        prepare(*WORDS, "data.window=40", "data.validation_fraction=0", "data.test_fraction=0")
    with pytest.raises(DataError, match=r"part-\*\.jsonl has no rows beyond the 42 that are held out"):
        prepare(*WORDS, "data.window=84")


def test_a_row_that_does_not_fit_is_named(rows: list[str], prepare: Prepare, tmp_path: Path) -> None:
    write_rows(
        tmp_path / "part-1.jsonl", [{"q": "Which?", "a": "x"}, {"q": "Which?", "a": 4}] + [{"q": "", "a": "x"}] * 20
    )
    with pytest.raises(DataError, match=r"part-1\.jsonl, row 2: column 'a' contains int"):
        prepare(*WORDS)


def test_changed_data_are_other_data(rows: list[str], prepare: Prepare, tmp_path: Path) -> None:
    first = prepare(*WORDS).report
    assert prepare(*WORDS, "run.seed=3").report.digest == first.digest
    with (tmp_path / "part-3.jsonl").open("a") as file:
        file.write(json.dumps({"q": "Which?", "a": "late"}) + "\n")
    assert prepare(*WORDS).report.digest != first.digest


def test_files_at_addresses_are_fetched_as_they_are_read(
    rows: list[str], prepare: Prepare, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distft.data.stream._AT_ONCE", 5)
    here, server = prepare(*WORDS), Server()
    expected = seen(here, range(6 * 12), tokenizer)
    server.files = {f"/d/{file.name}": file.read_bytes() for file in tmp_path.glob("part-*.jsonl")}
    there = prepare(*WORDS, f"data.files={server.address}/d/part-*.jsonl")
    assert server.asked["GET /d/part-3.jsonl"] == 0
    assert seen(there, range(6 * 12), tokenizer) == expected
    assert len(list((tmp_path / "cache" / "remote").glob("*/*.jsonl"))) <= 2
    server.files["/d/part-3.jsonl"] += b'{"q": "Which?", "a": "late"}\n'
    changed = prepare(*WORDS, f"data.files={server.address}/d/part-*.jsonl")
    assert changed.report.digest != there.report.digest
    server.close()


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("data.sources=[{name: a.jsonl}]", "data.sources: cannot be streamed"),
        ("data.order=length", "data.order: orders all samples"),
        ("data.deduplicate=true", "data.deduplicate: has to know all rows"),
        ("data.max_samples=5", "data.max_samples: draws from all rows"),
        ("data.format={review: q, label: a}", "data.format: reviews with labels are not streamed"),
        ("training.max_steps=-1", "training.max_steps: is required with data.streaming"),
        ("batching={global_batch_tokens: 100}", "batching.global_batch_tokens: needs the lengths of all samples"),
        ("batching.micro_batch=auto", "batching.micro_batch: auto measures the longest samples"),
        ("data.window=3", "data.window: 3 samples are less than batching.global_batch_size=4"),
        ("data.streaming=false", "data.window: is for streamed data"),
    ],
)
def test_what_is_not_streamed_is_a_fault(rows: list[str], override: str, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_of(*WORDS, override)
    assert problem in str(caught.value)


def test_the_hub_and_packs_without_a_limit_are_faults(rows: list[str]) -> None:
    (fault,) = (fault for fault in _faults("data.files=null", "data.name=some/dataset") if fault.key == "data.name")
    assert "hf://datasets/" in fault.hint
    assert [fault.key for fault in _faults("batching.micro_batch_tokens=64", "training.max_length=null")] == [
        "training.max_length"
    ]
    with pytest.raises(
        DataError, match=r"the longest sample has 32 tokens, which exceeds batching\.micro_batch_tokens=16"
    ):
        WindowedPlan.accumulation(_fake(32, 16), 1, 1)


def _faults(*words: str) -> tuple[Any, ...]:
    with pytest.raises(RecipeError) as caught:
        recipe_of(*WORDS, *words)
    return caught.value.faults


def _fake(max_length: int, budget: int) -> Any:
    plan = object.__new__(WindowedPlan)
    plan.batching = Batching(global_batch_size=4, micro_batch_tokens=budget)
    plan.stream = object.__new__(Stream)
    plan.stream.max_length = max_length
    plan.lengths = np.array([1])
    return plan


def test_the_recipe_without_faults_has_none(rows: list[str]) -> None:
    assert data_faults(recipe_of(*WORDS)) == []
