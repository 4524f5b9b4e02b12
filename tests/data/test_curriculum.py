"""The order of an epoch by length, by a column, and by given scores: exact, and the same on any number of processes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.config.schema import Batching
from distft.data.batch_plan import Plan
from distft.data.checks import data_file_faults
from distft.data.curriculum import known_stages, sample_hashes, stage_numbers, trained_tokens
from distft.data.prepare import Splits
from distft.data.splits import lengths_of
from distft.errors import DataError
from tests.data.rows import Prepare, recipe_of, whole, write_rows

BATCHES = ({"global_batch_size": 8, "micro_batch": 1}, {"global_batch_size": 8, "micro_batch_tokens": 60})
NO_SPLITS = ("data.validation_fraction=0", "data.test_fraction=0", "training.eval_strategy=no")
NUMBERS = st.lists(st.integers(0, 9), min_size=4, max_size=60)


def plan_of(splits: Splits, *words: str) -> Plan:
    recipe, lengths = recipe_of(*words), lengths_of(splits.train)
    stages = known_stages(recipe.data, lengths, splits.difficulties)
    return Plan(lengths, recipe.batching, recipe.run.seed, stages)


def hard_rows(count: int = 40) -> list[dict[str, Any]]:
    """Rows whose difficulty is not the order of the file, and grows with no length."""
    return [{"text": f"Row {n * 7 % count}.", "hard": n * 7 % count} for n in range(count)]


@settings(deadline=None)
@given(NUMBERS, st.integers(1, 4))
def test_stages_have_equally_many_samples_and_are_in_order(numbers: list[int], stages: int) -> None:
    found = stage_numbers(np.array(numbers), stages)
    sizes = np.bincount(found, minlength=stages)
    assert sizes.max() - sizes.min() <= 1
    for one, other in itertools.pairwise(range(stages)):
        assert np.array(numbers)[found == one].max() <= np.array(numbers)[found == other].min()


@settings(deadline=None)
@given(NUMBERS, st.integers(1, 4), st.integers(0, 99), st.integers(0, 2))
def test_an_epoch_takes_stage_after_stage_and_shuffles_within_each(
    numbers: list[int], stages: int, seed: int, epoch: int
) -> None:
    """The order is that of the shuffled epoch, sorted by stage: other stages do not change it within a stage."""
    batching, of = Batching(global_batch_size=3), stage_numbers(np.array(numbers), stages)
    lengths = np.array(numbers) + 1
    shuffled, staged = Plan(lengths, batching, seed), Plan(lengths, batching, seed, of)
    assert staged.steps == shuffled.steps
    steps = range(epoch * staged.steps, (epoch + 1) * staged.steps)
    before, after = ([int(n) for step in steps for n in plan.samples(step)] for plan in (shuffled, staged))
    assert after == sorted(before, key=lambda sample: of[sample])
    assert [len(staged.samples(step)) for step in steps] == [len(shuffled.samples(step)) for step in steps]


def test_one_stage_is_the_shuffled_order_and_as_many_as_samples_the_sorted_one() -> None:
    lengths, batching = np.array([5, 3, 9, 1, 7, 2]), Batching(global_batch_size=6)
    one, six = (Plan(lengths, batching, 1, stage_numbers(lengths, stages)).samples(0) for stages in (1, 6))
    assert one.tolist() == Plan(lengths, batching, 1).samples(0).tolist()
    assert lengths[six].tolist() == [1, 2, 3, 5, 7, 9]


def test_other_micro_batches_keep_the_stages() -> None:
    """A run whose samples cannot be packed is padded, and has the same steps."""
    lengths = np.arange(40)[::-1] + 1
    plan = Plan(lengths, Batching(global_batch_size=8, micro_batch_tokens=60), 3, stage_numbers(lengths, 5))
    padded = plan.divided(Batching(global_batch_size=8, micro_batch=2))
    for step in range(2 * plan.steps):
        assert padded.samples(step).tolist() == plan.samples(step).tolist()
        assert max(len(part) for ranks in padded.micro_batches(step, 1) for part in ranks) == 2


def test_epochs_shuffle_anew() -> None:
    plan = Plan(range(1, 41), Batching(global_batch_size=40), 0, stage_numbers(np.arange(40), 4))
    first, second = plan.samples(0).tolist(), plan.samples(1).tolist()
    assert first != second
    assert [sorted(first[at : at + 10]) for at in range(0, 40, 10)] == [
        sorted(second[at : at + 10]) for at in range(0, 40, 10)
    ]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("order", ["length", "hard"])
def test_steps_and_global_batches_are_the_same_on_any_number_of_processes(
    prepare: Prepare, tmp_path: Path, order: str, batch: dict[str, int]
) -> None:
    rows = [{"text": "a " * (n * 7 % 40 + 1), "hard": n * 11 % 40} for n in range(40)]
    words = (
        f"data.name={write_rows(tmp_path / 'rows.jsonl', rows)}",
        "data.format.text=text",
        f"data.order={order}",
        *NO_SPLITS,
        *(f"batching.{key}={value}" for key, value in batch.items()),
    )
    splits = prepare(*words)
    plan = plan_of(splits, *words)
    hard = plan.lengths if order == "length" else splits.difficulties
    assert hard is not None
    steps = [plan.samples(step) for step in range(plan.steps)]
    assert [len(step) for step in steps] == [8] * 5, "the global batch does not change"
    means = [hard[step].mean() for step in steps]
    assert means == sorted(means)
    for world_size in (1, 2, 4):
        for step, expected in enumerate(steps):
            packs = itertools.chain(*plan.micro_batches(step, world_size))
            assert sorted(itertools.chain(*packs)) == sorted(expected.tolist())


def test_a_column_orders_the_samples_that_have_its_numbers(prepare: Prepare, tmp_path: Path, tokenizer: Any) -> None:
    """Also with splits and dropped rows, where the samples are not the rows."""
    rows = hard_rows()
    rows[3]["text"] = ""
    words = (f"data.name={write_rows(tmp_path / 'rows.jsonl', rows)}", "data.format.text=text", "data.order=hard")
    splits = prepare(*words)
    assert splits.difficulties is not None
    texts = [whole(row, tokenizer) for row in splits.train]
    assert all(f"Row {number:.0f}." in text for number, text in zip(splits.difficulties, texts, strict=True))
    assert any("order: by hard in 4 stages of 7 samples: 0" in line for line in splits.report.lines())


def test_numbers_may_be_text_as_in_a_csv_file(prepare: Prepare, tmp_path: Path) -> None:
    lines = ["text,hard", *(f"Row {n}.,{n / 2}" for n in range(8))]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    words = (f"data.name={tmp_path / 'rows.csv'}", "data.format.text=text", "data.order=hard", *NO_SPLITS)
    found = prepare(*words).difficulties
    assert found is not None
    assert sorted(found.tolist()) == [n / 2 for n in range(8)]


def test_a_mixture_is_ordered_as_a_whole(prepare: Prepare, tmp_path: Path, tokenizer: Any) -> None:
    """Sources of different formats, one of which repeats."""
    a = write_rows(tmp_path / "a.jsonl", [{"body": f"First {n}.", "hard": n} for n in range(30)])
    b = write_rows(tmp_path / "b.jsonl", [{"q": f"Second {n}?", "a": " Yes.", "hard": n + 20} for n in range(10)])
    words = (
        f"data={{name: null, sources: [{{name: {a}, format: {{text: body}}, weight: 1}}, "
        f"{{name: {b}, format: {{prompt: q, completion: a}}, weight: 1}}]}}",
        *NO_SPLITS,
        "data.stopping_strategy=all_exhausted",
        "data.order=hard",
        "data.stages=6",
        "batching.global_batch_size=10",
        "batching.micro_batch=1",
    )
    splits = prepare(*words)
    plan = plan_of(splits, *words)
    assert len(plan.lengths) == 60
    kinds = [
        "".join(whole(row, tokenizer).split()[0][0] for row in splits.train.select(plan.samples(step)))
        for step in range(plan.steps)
    ]
    assert kinds[:2] == ["F" * 10] * 2, "the easiest are of the first source alone"
    assert sorted("".join(kinds[2:])) == sorted("F" * 10 + "S" * 30)
    other = write_rows(tmp_path / "b.jsonl", [{"q": "Second?", "a": " Yes."}])
    (fault,) = data_file_faults(recipe_of(*words))
    assert (fault.key, fault.problem) == ("data.order", f"the data ({other}) has no column hard; it has q, a")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "needs a number in each row, and this one has none"),
        ("very", "needs a number in each row, and this one has 'very'"),
        (True, "needs a number in each row, and this one has True"),
        ([1], "needs a number in each row, and this one has [1]"),
        (float("nan"), "needs a finite number in each row, and this one has nan"),
        (10**400, "needs a finite number in each row, and this one has 1000"),
    ],
)
def test_a_row_without_a_number_is_named(prepare: Prepare, tmp_path: Path, value: Any, problem: str) -> None:
    """In the first rows by the quick check, and behind them when all are read."""
    rows = hard_rows()
    rows[4]["hard"] = rows[30]["hard"] = value
    words = ("data.format.text=text", "data.order=hard")
    file = write_rows(tmp_path / "rows.jsonl", rows)
    (fault,) = data_file_faults(recipe_of(f"data.name={file}", *words))
    assert fault.key == "data.order"
    assert fault.problem.startswith(f"{file}, row 5: data.order=hard {problem}")
    rows[4]["hard"] = 1
    file = write_rows(tmp_path / "rows.jsonl", rows)
    assert data_file_faults(recipe_of(f"data.name={file}", *words)) == []
    with pytest.raises(DataError) as caught:
        prepare(f"data.name={file}", *words)
    assert str(caught.value).startswith(f"{file}, row 31: data.order=hard {problem}")


def test_an_unknown_column_lists_those_of_the_data(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", hard_rows())
    (fault,) = data_file_faults(recipe_of(f"data.name={file}", "data.format.text=text", "data.order=lenght"))
    assert (fault.key, fault.problem) == ("data.order", f"the data ({file}) has no column lenght; it has text, hard")
    assert "shuffled, length, loss" in fault.hint


def test_more_stages_than_samples_are_refused(prepare: Prepare, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", hard_rows(8))
    for order in ("length", "loss", "hard"):
        with pytest.raises(DataError, match=r"data.stages=9 needs at least as many training samples, and there are 8"):
            prepare(f"data.name={file}", "data.format.text=text", *NO_SPLITS, f"data.order={order}", "data.stages=9")


def test_the_order_changes_neither_samples_nor_splits(prepare: Prepare, tmp_path: Path) -> None:
    words = (f"data.name={write_rows(tmp_path / 'rows.jsonl', hard_rows())}", "data.format.text=text")
    plain, *others = (prepare(*words, f"data.order={order}") for order in ("shuffled", "length", "hard"))
    for other in others:
        assert other.train["input_ids"][:] == plain.train["input_ids"][:]
        assert other.report.digest == plain.report.digest


def test_samples_are_known_by_their_tokens_and_labels(prepare: Prepare, tmp_path: Path) -> None:
    """Also where rows of the table are selected, of several files, and repeated."""
    rows = [{"q": f"{n}?", "a": f" {n}." * (n % 3 + 1)} for n in range(30)]
    words = ("data.format={prompt: q, completion: a}", *NO_SPLITS)
    train = prepare(f"data.name={write_rows(tmp_path / 'rows.jsonl', rows)}", *words).train
    found = sample_hashes(train)
    assert len({*found.tolist()}) == 30
    chosen = [29, 3, 3, 0]
    assert sample_hashes(train.select(chosen)).tolist() == found[chosen].tolist()
    expected = [sum(label != -100 for label in labels[1:]) for labels in train["labels"]]
    assert trained_tokens(train).tolist() == expected
    text = prepare(f"data.name={tmp_path / 'rows.jsonl'}", *words, "training.completion_only_loss=false").train
    assert text["input_ids"][:] == train["input_ids"][:]
    assert not {*sample_hashes(text).tolist()} & {*found.tolist()}, "other labels"
